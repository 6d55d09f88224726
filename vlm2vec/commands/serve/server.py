"""uvicorn around the application: a socket that is bound before the model is loaded, and an orderly end."""

from __future__ import annotations

import logging
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import Config

from vlm2vec.commands.serve.app import Service

log = logging.getLogger(__name__)
BACKLOG = 1024


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, port 0 for any free one. ValueError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as e:
        made.close()
        raise ValueError(f"--host {host} --port {port}: cannot be had ({getattr(e, 'strerror', None) or e}); choose another") from e
    return made


class Server(uvicorn.Server):
    """Told to stop, it takes no new requests (503), answers those it has, and then ends; told twice, it ends at once."""

    def __init__(self, config: Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM or SIGINT."""
        self.force_exit = self.should_exit
        self.service.drain()
        if not self.should_exit:
            end = threading.Timer(self.service.limits.drain_seconds, self.service.batcher.close)
            end.daemon = True
            end.start()
        self.should_exit = True


def run(app: FastAPI, service: Service, listening: socket.socket) -> None:
    """Serve until told to stop. What is not answered `drain_seconds` later is refused with 503, and connections are closed."""
    seconds = service.limits.drain_seconds
    config = Config(
        app,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=int(seconds) + 5,
        lifespan="off",
        server_header=False,
    )
    server = Server(config, service)
    try:
        server.run(sockets=[listening])
    finally:
        service.batcher.close()
