"""The index's routes: one page to search by words or by a picture, its answers, and small pictures of what was found."""

from __future__ import annotations

import asyncio
import io
import json
import os
from importlib import resources
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from torch.nn.functional import normalize

from vlm2vec.commands.serve import requests
from vlm2vec.commands.serve.app import Service, read
from vlm2vec.commands.serve.bodies import Incoming
from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.limits import Refused
from vlm2vec.data.index import Hit
from vlm2vec.files.documents import kind, parse_json
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.images import open_picture

MOST_HITS = 200
SIDE = 320  # pixels of a small picture's longer side
POLICY = "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def add_routes(app: FastAPI, service: Service) -> None:
    """/ with the page, POST /search, GET /thumbnail?key=."""
    page = resources.files("vlm2vec.commands.serve").joinpath("page.html").read_text(encoding="utf-8")
    index = service.index

    @app.get("/")
    async def front() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, headers=headers, media_type="text/html; charset=utf-8")

    @app.get("/about")
    async def about() -> dict:
        return {"model": service.name, "entries": len(index), "folder": os.path.basename(index.folder)}

    @app.post("/search")
    async def search(request: Request) -> Response:
        with Incoming(request, service.batcher) as incoming:
            query, k = await read(await incoming.read(), parse, service.limits.pixels)
            try:
                await run_in_threadpool(index.refresh)
            except ValueError as e:
                raise Refused(503, f"the index was replaced: {e}", 60) from None
            made = await service.embed(request, [query], "query")
        hits = await run_in_threadpool(index.search_vectors, normalize(made.vectors, dim=-1), k)
        return Response(json.dumps({"results": [told(rank, hit) for rank, hit in enumerate(hits[0], 1)]}), media_type="application/json")

    reading = asyncio.Semaphore(2)  # decoding large pictures takes memory

    @app.get("/thumbnail")
    async def thumbnail(key: str) -> Response:
        file = index.file_of(key)
        if not file or not file.lower().endswith(PICTURES):
            raise BadRequest(f"no picture of {key[:100]!r} in the index", "key", 404)
        async with reading:
            try:
                content = await run_in_threadpool(small, file)
            except (ValueError, OSError):
                raise BadRequest(f"the picture of {key[:100]!r} cannot be read any more; update the index", "key", 404) from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "max-age=60"})


def parse(body: bytes | bytearray, pixels: int) -> tuple[Any, int]:
    """(query, k) of {"text":, "image": a data URI, "k":}. BadRequest names what was expected."""
    try:
        said = parse_json(body.decode(errors="replace"), "the body")
    except ValueError as e:
        raise BadRequest(str(e)) from None
    if not isinstance(said, dict) or set(said) - {"text", "image", "k"}:
        raise BadRequest(f"expected an object with text, image or k, got {kind(said)}")
    k = said.get("k", 24)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_HITS:
        raise BadRequest(f"k: expected an integer from 1 to {MOST_HITS}, got {kind(k)}", "k")
    text, image = said.get("text"), said.get("image")
    if text is not None and not isinstance(text, str):
        raise BadRequest(f"text: expected a text, got {kind(text)}", "text")
    if not (text and text.strip()) and image is None:
        raise BadRequest("say what to look for: text, image or both", "text")
    if image is None:
        return text, k
    content = requests.picture(image, "image", requests.Room(pixels, pixels))
    return ({"text": text, "image": content} if text and text.strip() else {"image": content}), k


def told(rank: int, hit: Hit) -> dict[str, Any]:
    """A hit as the page reads it."""
    pictured = hit.file.lower().endswith(PICTURES)
    shown = "image" if pictured else "video" if hit.file.lower().endswith(FILMS) else "text"
    url = f"thumbnail?key={quote(hit.key, safe='')}" if pictured else None
    return {"rank": rank, "score": round(hit.score, 6), "key": hit.key, "kind": shown, "text": hit.text, "thumbnail": url}


def small(file: str) -> bytes:
    """A JPEG of at most `SIDE` pixels a side."""
    picture = open_picture(file)
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=85)
    return content.getvalue()
