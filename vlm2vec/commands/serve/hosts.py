"""Which names a server answers to: a web page whose own name was made to point here must not read what a server without a key holds."""

from __future__ import annotations

import ipaddress
from typing import Any

from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.failures import failure


def is_address(name: str) -> bool:
    """Whether this is an IP address: no name, so that nobody can point it elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def names_at(host: str, allowed: list[str]) -> frozenset[str] | None:
    """Names that are answered besides addresses, None for all.

    Args:
        host: what is listened at. Where it is not this machine alone, its names are not known: all are answered unless some are said.
        allowed: what the user says; "*" for all.
    """
    if "*" in allowed:
        return None
    here = host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    return frozenset(name.lower() for name in ("localhost", host, *allowed)) if here or allowed else None


class KnownHosts:
    """Refuses requests of other names with 400."""

    def __init__(self, app: Any, names: frozenset[str]):
        self.app, self.names = app, names

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            said = next((value for key, value in scope["headers"] if key == b"host"), b"").decode("latin-1").lower()
            name = said[1:].partition("]")[0] if said.startswith("[") else said.partition(":")[0]
            if name and not is_address(name) and name not in self.names:
                error = BadRequest(
                    f"Host {name[:100]!r}: expected {', '.join(sorted(self.names))}; start the server with --allow-host NAME"
                )
                await failure(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
