"""What a server takes at most, and the errors that say so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        inputs: of one request.
        queued_inputs: of all requests that are not answered yet; beyond it new ones are told to come again.
        body_mib: of one request's body. held_mib: of all bodies that come in and pictures that wait.
        body_seconds: in which a body must have come.
        pixels: width times height of a picture. request_pixels: of all pictures of one request.
        connections: open ones; beyond it new ones are told 503.
        batch_size: inputs of one pass of the model, at most; its tokens are bounded as `encode` bounds them.
        wait_ms: how long a first input waits for others to share its pass, where others are on their way.
        drain_seconds: how long a server that is told to stop goes on answering what it has taken.
    """

    inputs: int = 2048
    queued_inputs: int = 8192
    body_mib: int = 64
    held_mib: int = 1024
    body_seconds: float = 30.0
    pixels: int = 64_000_000
    request_pixels: int = 500_000_000
    connections: int = 1024
    batch_size: int = 32
    wait_ms: float = 5.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value}: expected a number above 0")


class Refused(Exception):
    """A request that is not taken now.

    Args:
        status: 429 beyond a limit, 503 while the server stops.
        retry_after: seconds after which another try may be taken.
    """

    def __init__(self, status: int, message: str, retry_after: int):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.headers = {"Retry-After": str(retry_after)}
