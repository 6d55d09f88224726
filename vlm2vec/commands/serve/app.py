"""The application: routes, and what all of them share (errors of one shape, bodies within limits, counting)."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from torch.nn.functional import normalize

from vlm2vec.checkpoint.release import __version__
from vlm2vec.checkpoint.words import said_as
from vlm2vec.commands.serve import requests
from vlm2vec.commands.serve.batcher import Batcher, Embedded
from vlm2vec.commands.serve.bodies import Incoming
from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.failures import failure
from vlm2vec.commands.serve.hosts import KnownHosts
from vlm2vec.commands.serve.limits import Limits, Refused
from vlm2vec.commands.serve.metrics import Metrics
from vlm2vec.encoding import require_width

if TYPE_CHECKING:
    from vlm2vec.data.index import Index
    from vlm2vec.model import VLM2Vec

INLINE_BYTES = 32 << 10  # a body that is read without leaving the thread of the event loop
COUNTED = ("/v1/embeddings", "/search", "/thumbnail")


class Service:
    """What the routes share: model, queue, index, limits, numbers.

    Args:
        name: of the model, as clients say it.
    """

    def __init__(self, model: VLM2Vec, name: str, limits: Limits, index: Index | None = None):
        self.model, self.name, self.limits, self.index = model, name, limits, index
        self.started = int(time.time())
        self.draining = False
        self.batcher = Batcher(model, limits, observe=lambda *numbers: self.metrics.passed(*numbers))
        self.metrics = Metrics(lambda: self.batcher.queued, lambda: len(index) if index is not None else 0)

    def drain(self) -> None:
        """Take no new request; those that were taken are answered."""
        self.draining = True
        self.batcher.drain()

    async def embed(self, request: Request, inputs: list[Any], role: str | None) -> Embedded:
        """Vectors of a request's inputs; its inputs leave the queue where the client goes away."""
        prompt = None
        if role is not None:
            inputs, prompt = said_as(self.model, inputs, role)
        try:
            answer = asyncio.wrap_future(self.batcher.submit(inputs, prompt))
        except ValueError as e:
            raise BadRequest(str(e), "input") from None
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
                raise CancelledError
            return answer.result()
        except ValueError as e:
            raise BadRequest(str(e), "input") from None
        finally:
            gone.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection. The body was read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service, names: frozenset[str] | None = None) -> FastAPI:
    """The application of a service; `vlm2vec.commands.serve.search_page` adds the index's routes where there is one.

    Args:
        names: that it answers to, as `vlm2vec.commands.serve.hosts.names_at` gives them; None for all.
    """
    app = FastAPI(title="vlm2vec", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    if names is not None:
        app.add_middleware(KnownHosts, names=names)
    app.add_middleware(Counted, metrics=service.metrics)
    for kind in (BadRequest, Refused, HTTPException, CancelledError, Exception):
        app.add_exception_handler(kind, _told)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        with Incoming(request, service.batcher) as incoming:
            with service.batcher.coming():
                asked = await read(await incoming.read(), requests.parse, service.limits.pixels, service.limits.request_pixels)
                if asked.model not in ("", service.name):
                    raise BadRequest(f"no model {asked.model[:100]!r} here; there is {service.name}", "model", 404, "model_not_found")
                try:
                    require_width(service.model, asked.dimensions)
                except ValueError as e:
                    raise BadRequest(str(e).replace("truncate_dim=", "dimensions: "), "dimensions") from None
            made = await service.embed(request, asked.inputs, asked.role)
        vectors = normalize(made.vectors[:, : asked.dimensions], dim=-1)
        return Response(await read(vectors, requests.answer, asked, service.name, made.tokens, made.cut), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        if name != service.name:
            raise BadRequest(f"no model {name[:100]!r} here; there is {service.name}", "model", 404, "model_not_found")
        return _model(service)

    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if service.draining else "ok" if service.batcher.alive else "failed"
        said = {"status": status, "model": service.name, "queued_inputs": service.batcher.queued}
        return Response(json.dumps(said), 200 if status == "ok" else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class Counted:
    """Counts requests by path and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, path = time.monotonic(), scope["path"] if scope["path"] in COUNTED else "other"

        async def counting(message: dict) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
                self.metrics.seconds.labels(path).observe(time.monotonic() - start)
            await send(message)

        await self.app(scope, receive, counting)


async def _told(request: Request, error: Exception) -> Response:
    return failure(error)


async def read(body: Any, function: Any, *arguments: Any) -> Any:
    """`function(body, *arguments)`, in another thread where it is large enough to keep others waiting."""
    size = len(body) if isinstance(body, bytearray) else body.numel() * 4
    return await run_in_threadpool(function, body, *arguments) if size > INLINE_BYTES else function(body, *arguments)


def _model(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "vlm2vec",
        "dimensions": service.model.embedding_dim,
    }
