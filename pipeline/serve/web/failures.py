"""Errors as OpenAI's API tells them: a status, and an object with message, type, parameter and code."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from pipeline.errors import QwenOnnxError, UsageError
from pipeline.serve.api import bodies
from pipeline.serve.refusals import Refused

CLIENT_GONE = 499
"""What is counted of requests whose clients have gone; nobody gets to see it."""


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell of an error; of a bug they tell no more than that it is one."""
    if isinstance(error, bodies.Gone):
        return CLIENT_GONE, _body("the client has gone", "invalid_request_error", None, "client_gone")
    if isinstance(error, Refused):
        return error.status, _body(_sentence(error), error.kind, error.parameter, error.code)
    if isinstance(error, UsageError):
        return 400, _body(_sentence(error), "invalid_request_error", None, "invalid_value")
    if isinstance(error, QwenOnnxError):
        return 500, _body(_sentence(error), "server_error", None, type(error).__name__)
    text = "the server failed at this request, and has logged why under its id"
    return 500, _body(text, "server_error", None, "internal_error")


def response(error: Exception) -> Response:
    """The response that tells of an error."""
    status, body = described(error)
    headers = {}
    if isinstance(error, Refused) and error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(json.dumps(body), status, headers, "application/json")


def is_bug(error: Exception) -> bool:
    """Whether an error is none that a client or a machine can be blamed for."""
    return not isinstance(error, QwenOnnxError | bodies.Gone)


def _body(message: str, kind: str, parameter: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _sentence(error: QwenOnnxError) -> str:
    """All that an error says, in one line."""
    text = error.what + (f" ({error.where})" if error.where else "")
    text += f": {error.why}" if error.why else ""
    return text + (f"; {error.fix}" if error.fix else "")
