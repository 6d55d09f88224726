"""Errors as responses."""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError

from fastapi import Response
from starlette.exceptions import HTTPException

from vlm2vec.commands.serve.errors import BadRequest, body_of
from vlm2vec.commands.serve.limits import Refused

log = logging.getLogger(__name__)


def failure(error: Exception) -> Response:
    """The answer to a request that failed."""
    json_type = "application/json"
    if isinstance(error, BadRequest):
        return Response(body_of(str(error), error.status, error.param, error.code), error.status, error.headers, media_type=json_type)
    if isinstance(error, Refused):
        return Response(body_of(str(error), error.status), error.status, error.headers, media_type=json_type)
    if isinstance(error, CancelledError):
        return Response(body_of("the client has gone", 499), 499, media_type=json_type)
    if isinstance(error, HTTPException):
        return Response(body_of(str(error.detail), error.status_code), error.status_code, error.headers, media_type=json_type)
    log.error("a request failed", exc_info=error)
    return Response(body_of("the server could not answer this; its log says why", 500), 500, media_type=json_type)
