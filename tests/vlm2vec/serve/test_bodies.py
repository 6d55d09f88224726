"""Bodies that stall, swell or never end, and pictures that are larger than their bytes: what a server without a key must bear."""

import asyncio
import contextlib
import json
import time
from concurrent.futures import CancelledError

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from fastapi import Request

from tests.vlm2vec.serve.test_embeddings_route import pixels
from vlm2vec.commands.serve import bodies
from vlm2vec.commands.serve.app import Service, create_app
from vlm2vec.commands.serve.bodies import Incoming
from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.hosts import names_at
from vlm2vec.commands.serve.limits import Limits, Refused
from vlm2vec.commands.serve.requests import parse

HALF_MIB = b"x" * (1 << 19)


@pytest.fixture
def service(model, monkeypatch):
    monkeypatch.setattr(bodies, "STALLED", 0.02)
    monkeypatch.setattr(bodies, "LOOK", 0.02)
    made = Service(model, "tiny", Limits(held_mib=2, body_mib=3, body_seconds=0.3))
    yield made
    made.batcher.close()


def coming(parts, stalls=False, headers=()):
    """A request whose body comes in these parts, and then ends or stalls."""
    left = list(parts)

    async def receive():
        await asyncio.sleep(0)
        if not left:
            await asyncio.sleep(60)
        part = left.pop(0)
        return part if isinstance(part, dict) else {"type": "http.request", "body": part, "more_body": bool(left) or stalls}

    return Request({"type": "http", "headers": list(headers)}, receive)


def read(service, *some, **options):
    async def one():
        with Incoming(coming(*some, **options), service.batcher) as incoming:
            return bytes(await incoming.read())

    return asyncio.run(one())


def test_bodies_that_come_in_count_in_the_limit(service):
    """Ten that stall after half a MiB hold what the limit says and no more; then they are told so, and all is free again."""

    async def stalling(told):
        try:
            with Incoming(coming([HALF_MIB], stalls=True), service.batcher) as incoming:
                await incoming.read()
        except (BadRequest, Refused) as e:
            told.append((e.status, e.headers.get("Connection")))

    async def ten():
        told = []
        tasks = [asyncio.create_task(stalling(told)) for _ in range(10)]
        await asyncio.sleep(0.15)
        held, refused = service.batcher._held, len(told)
        await asyncio.gather(*tasks)
        return held, refused, told

    held, refused, told = asyncio.run(ten())
    assert held == 2 << 20 and refused == 6
    assert told == [(429, "close")] * 6 + [(408, "close")] * 4
    assert service.batcher._held == 0
    assert read(service, [HALF_MIB] * 6) == HALF_MIB * 6, "one alone is taken"
    assert service.batcher._held == 0


def test_what_is_held_is_held_until_the_answer(service):
    async def two():
        with Incoming(coming([HALF_MIB] * 3), service.batcher) as incoming:
            await incoming.read()
            with pytest.raises(Refused, match="2 MiB are held already, of at most 2"):
                with Incoming(coming([HALF_MIB] * 2), service.batcher) as other:
                    await other.read()

    asyncio.run(two())
    assert service.batcher._held == 0


@pytest.mark.parametrize(
    ("parts", "options", "error", "status"),
    [
        ([HALF_MIB] * 7, {}, BadRequest, 413),
        ([b"a"], {"headers": [(b"content-length", b"4194304")]}, BadRequest, 413),
        ([b"a"], {"stalls": True}, BadRequest, 408),
        ([b"a", {"type": "http.disconnect"}], {}, CancelledError, None),
    ],
    ids=["swells", "told too large", "stalls", "gone"],
)
def test_a_body_that_is_refused_ends(service, parts, options, error, status):
    start = time.monotonic()
    with pytest.raises(error) as e:
        read(service, parts, **options)
    assert getattr(e.value, "status", None) == status and time.monotonic() - start < 5
    assert service.batcher._held == 0


def test_a_stop_does_not_wait_for_bodies(service):
    async def stopped():
        task = asyncio.create_task(asyncio.to_thread(read, service, [b"a"], stalls=True))
        await asyncio.sleep(0.05)
        service.drain()
        return await task

    with pytest.raises(Refused, match="stopping") as e:
        asyncio.run(stopped())
    assert e.value.status == 503


def test_pixels_of_a_request_are_bounded():
    """Pictures of one colour are few bytes: neither their number nor their bytes bound what reading them costs."""
    body = json.dumps({"input": [pixels(100, 100)] * 4}).encode()
    assert len(parse(body, 10_000, 40_000).inputs) == 4
    with pytest.raises(BadRequest, match=r"input\[3\]: with it the pictures of this request have more pixels"):
        parse(body, 10_000, 39_999)
    message = [{"role": "user", "content": [{"type": "image", "image": pixels(100, 100)}] * 4}]
    with pytest.raises(BadRequest, match=r"messages\[0\].content\[3\]: with it"):
        parse(json.dumps({"messages": message}).encode(), 10_000, 39_999)
    assert Limits().request_pixels >= Limits().pixels


def asked(app, path, host):
    """The status of a GET with this Host."""
    told = []

    async def send(message):
        told.append(message.get("status"))

    scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", host)] if host else [], "query_string": b""}
    asyncio.run(app(scope, coming([b""]).receive, send))
    return told[0]


def test_other_names_are_refused(service):
    """A page of evil.example whose name points to this machine is of the same origin as the server, as its browser sees it."""
    app = create_app(service, names_at("127.0.0.1", ["search.example"]))
    for host in (b"127.0.0.1:8000", b"localhost", b"LOCALHOST:1", b"[::1]:8000", b"search.example", b"10.0.0.7", None):
        assert asked(app, "/health", host) == 200, host
    for host in (b"evil.example", b"evil.example:8000", b"127.0.0.1.evil.example", b"localhost.evil.example"):
        assert asked(app, "/health", host) == 400, host
    assert names_at("0.0.0.0", []) is None and names_at("127.0.0.1", ["*"]) is None and names_at("0.0.0.0", ["a"]) is not None


def test_health_tells_of_a_thread_that_has_ended(service, monkeypatch):
    app = create_app(service)
    assert asked(app, "/health", None) == 200
    dead = type("Dead", (), {"is_alive": lambda self: False, "join": lambda self, timeout: None})()
    with contextlib.closing(service.batcher), monkeypatch.context() as broken:
        broken.setattr(service.batcher, "_threads", [*service.batcher._threads, dead])
        assert asked(app, "/health", None) == 503
