"""Bodies of requests as they come in: counted in the server's limit from their first part on, and given so many seconds."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.limits import Refused

if TYPE_CHECKING:
    from fastapi import Request

    from vlm2vec.commands.serve.batcher import Batcher

THROWN_AWAY = 1 << 30  # bytes of a refused body that are read before its connection is closed
STALLED = 1.0  # seconds without a part after which a refused body is read no further
LOOK = 0.25  # seconds after which a body that stalls looks at the clock and at the server's state


class Incoming:
    """A request's body. Its bytes count in `held_mib` until the end of the block, since what was parsed of them is held as long."""

    def __init__(self, request: Request, batcher: Batcher):
        self.request, self.batcher = request, batcher
        self._held, self._more = 0, True

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self.batcher.release(self._held)
        self._held = 0

    async def read(self) -> bytearray:
        """The body.

        What is refused is read on and thrown away, as long as it comes: clients that are still writing would see a broken connection
        and no answer.

        Raises:
            BadRequest: 413 beyond the limit, 408 beyond `body_seconds`.
            Refused: too much is held or waits already, or the server stops.
            CancelledError: the client has gone.
        """
        content, limits = bytearray(), self.batcher.limits
        most, end = limits.body_mib << 20, time.monotonic() + limits.body_seconds
        told = self.request.headers.get("content-length", "")
        told_size = int(told) if told.isdecimal() and len(told) < 20 else 0
        try:
            if told_size > most:
                raise BadRequest(f"a body of {told_size} bytes: expected at most {most}", status=413)
            self.batcher.admit(told_size)
            while self._more:
                part = await self._part(end)
                if len(content) + len(part) > most:
                    raise BadRequest(f"a body of more than {most} bytes: expected at most that", status=413)
                self.batcher.hold(len(part), beside=self._held)
                self._held += len(part)
                content += part
        except (BadRequest, Refused) as e:
            content.clear()
            self.__exit__()
            await self._throw_away(end)
            e.headers["Connection"] = "close"
            raise
        return content

    async def _part(self, end: float) -> bytes:
        while (left := end - time.monotonic()) > 0:
            try:
                return self._content(await asyncio.wait_for(self.request.receive(), min(left, LOOK)))
            except TimeoutError:
                if self.batcher.closed:
                    raise Refused(503, "the server is stopping; ask again in a moment", 5) from None
        raise BadRequest(f"the body did not come within {self.batcher.limits.body_seconds:g} seconds", status=408)

    def _content(self, message: dict[str, Any]) -> bytes:
        if message["type"] == "http.disconnect":
            raise CancelledError
        self._more = message.get("more_body", False)
        return message.get("body", b"")

    async def _throw_away(self, end: float) -> None:
        size = 0
        while self._more and size <= THROWN_AWAY and time.monotonic() < end:
            try:
                size += len(self._content(await asyncio.wait_for(self.request.receive(), STALLED)))
            except TimeoutError:
                return
