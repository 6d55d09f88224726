"""`vlm2vec serve MODEL [--index INDEX]`: embeddings over HTTP as OpenAI's clients ask for them, and a page to search an index."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from vlm2vec.commands import common
from vlm2vec.commands.serve.limits import Limits

if TYPE_CHECKING:
    from vlm2vec.commands.serve.app import Service

ABOUT = {
    "inputs": "most inputs of one request",
    "queued_inputs": "most inputs that wait; beyond it 429 with Retry-After",
    "body_mib": "most MiB of one request",
    "held_mib": "most MiB of requests that come in or wait",
    "body_seconds": "seconds in which a request must have come",
    "pixels": "most pixels, width times height, of a picture",
    "request_pixels": "most pixels of all pictures of one request",
    "connections": "most open connections",
    "batch_size": "most inputs of one pass of the model",
    "wait_ms": "milliseconds that an input waits for others to share its pass",
    "drain_seconds": "seconds to answer what was taken when told to stop",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub name (default: the one that made the index)")
    parser.add_argument("--index", help="a folder that vlm2vec index wrote: / is then a page to search it")
    parser.add_argument("--name", help="the model's name for clients (default: as it is given)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this name too (a proxy's, say), * to any; addresses and localhost always. May be repeated",
    )
    for one in fields(Limits):
        kind = float if isinstance(one.default, float) else int
        parser.add_argument(
            f"--{one.name.replace('_', '-')}", type=kind, default=one.default, metavar="N", help=f"{ABOUT[one.name]} ({one.default})"
        )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    limits = Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})
    from vlm2vec.commands.serve.hosts import names_at
    from vlm2vec.commands.serve.memory import FreePages
    from vlm2vec.commands.serve.server import BACKLOG, bound
    from vlm2vec.commands.serve.server import run as serve

    FreePages().share_heaps()  # before the model and its threads
    listening = bound(args.host, args.port)
    service = made(args, limits)
    from vlm2vec.commands.serve.app import create_app

    app = create_app(service, names_at(args.host, args.allow_host))
    if service.index is not None:
        from vlm2vec.commands.serve.search_page import add_routes

        add_routes(app, service)
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    page = f"; {where}/ searches {len(service.index)} entries" if service.index is not None else ""
    listening.listen(BACKLOG)  # who reads the next line may connect
    print(f"{service.name} at {where}/v1/embeddings{page}", flush=True)
    serve(app, service, listening)
    print("stopped", file=sys.stderr)
    return 0


def made(args: argparse.Namespace, limits: Limits) -> Service:
    """The service of a command line: index and model opened, and found to be of each other."""
    from vlm2vec.commands.serve.app import Service
    from vlm2vec.data.index import Index

    index = Index.open(args.index) if args.index is not None else None
    name = args.model or (index.about.get("model") if index is not None else None)
    if not name:
        raise ValueError("no model named; say vlm2vec serve MODEL, or --index INDEX for the one that made it")
    model = common.load_model(name, args)
    if index is not None:
        index.require_model(model)
    return Service(model, args.name or (os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name), limits, index)
