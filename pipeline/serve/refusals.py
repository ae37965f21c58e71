"""Requests that a server does not honour, and the status and code that say so in the terms of OpenAI's API."""

from __future__ import annotations

from pipeline.errors import QwenOnnxError


class Refused(QwenOnnxError):  # noqa: N818 - it is what the server did
    """A request that is not honoured.

    Args:
        what, where, why, fix: as of all errors.
        parameter: the field of the request that is to blame.
        retry_after: seconds after which it may be honoured.
    """

    exit_code = 2
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        parameter: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.parameter, self.retry_after = parameter, retry_after


class Unsupported(Refused):
    """The loaded package, its provider or this server cannot do what is asked."""

    code = "unsupported_value"


class TooLong(Refused):
    """A prompt that does not fit the context or the server's limit."""

    code = "context_length_exceeded"


class Unauthorized(Refused):
    """No key, or a wrong one."""

    status, kind, code = 401, "authentication_error", "invalid_api_key"


class UnknownModel(Refused):
    """A model that is not served here."""

    status, code = 404, "model_not_found"


class TooLarge(Refused):
    """A body or picture of too many bytes."""

    status, code = 413, "request_too_large"


class RateLimited(Refused):
    """A key that has had its requests or tokens of the minute."""

    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Busy(Refused):
    """A queue that is full."""

    status, kind, code = 503, "server_error", "overloaded"


class Unavailable(Refused):
    """A model that is loading, failed or is being stopped; or a process that ended while it answered."""

    status, kind, code = 503, "server_error", "unavailable"


class TimedOut(Refused):
    """An answer that took longer than the server allows."""

    status, kind, code = 504, "server_error", "timeout"


class NotFound(Refused):
    """A path that is not served."""

    status, code = 404, "not_found"


class NotAllowed(Refused):
    """A method that a path does not take."""

    status, code = 405, "method_not_allowed"


class Forbidden(Refused):
    """A name of this server that it does not answer to."""

    status, kind, code = 403, "permission_error", "forbidden_host"


class TooSlow(Refused):
    """A body that does not come."""

    status, code = 408, "request_timeout"
