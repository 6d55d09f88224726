"""Errors as OpenAI's clients read them: {"error": {"message":, "type":, "param":, "code":}}."""

from __future__ import annotations

import json


class BadRequest(Exception):
    """A request that cannot be answered as it is.

    Args:
        message: what was expected, what came.
        param: the field.
        status: 400, 404 for what is not there, 408 for what did not come in time, 413 for what is too large.
        code: a short name for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers: dict[str, str] = {}


KINDS = {**dict.fromkeys((400, 404, 408, 413), "invalid_request_error"), 429: "rate_limit_error"}


def body_of(message: str, status: int, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error; `message` is brought to one line of at most 500 characters."""
    said = {"message": " ".join(message.split())[:500], "type": KINDS.get(status, "server_error"), "param": param, "code": code}
    return json.dumps({"error": said}).encode()
