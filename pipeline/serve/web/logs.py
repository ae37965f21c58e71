"""What a server writes on standard error. Of what is asked and answered: digests and lengths, never a word.

Digests are keyed by a secret of this process, so that nobody can try what might have been asked.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import sys
import traceback
from typing import Any

import structlog

_SECRET = secrets.token_bytes(32)
FORMATS = ("console", "json")


def set_up(style: str) -> None:
    """Write lines for people (``console``) or one JSON object a line (``json``), those of the HTTP library included."""
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        shared.append(structlog.processors.JSONRenderer())
    else:
        shared.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0))
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [_Forward()], False
    logger.setLevel(logging.WARNING)


def log(event: str, **facts: Any) -> None:
    """One line."""
    structlog.get_logger().info(event, **facts)


def bug(error: BaseException, **facts: Any) -> None:
    """An error that is none of a client: its kind and where it was raised; its words might be a client's."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    structlog.get_logger().error("bug", error=type(error).__name__, trace=places, **facts)


def digest(data: bytes) -> str:
    """Tells equal contents of one run apart from others, and nothing else of them."""
    return hmac.new(_SECRET, data, hashlib.sha256).hexdigest()[:16]


class _Forward(logging.Handler):
    """Lines of the HTTP library, without tracebacks, whose messages may have contents."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            bug(error, what=record.getMessage().strip())
        else:
            structlog.get_logger().warning(record.getMessage().strip())
