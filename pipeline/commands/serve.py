"""The command that serves packages."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pipeline.commands.shared import check_positive
from pipeline.errors import RuntimeMissing, UsageError


def serve(options: argparse.Namespace) -> int:
    check_positive(options, "queue", "parallel", "timeout", "threads", "max_body", "drain_seconds", "write_seconds")
    try:
        from pipeline.serve.inference.engine import Limits
        from pipeline.serve.inference.worker import Options
        from pipeline.serve.web import logs, security, server
        from pipeline.serve.web.settings import Settings
    except ImportError as error:
        raise RuntimeMissing(
            "the libraries of the server are not installed", why=str(error), fix="pip install '.[serve]'"
        ) from None
    # Taken out: the processes of the models have no need of it.
    keys = security.keys_of(os.environ.pop(security.VARIABLE, "").replace(",", "\n"), security.VARIABLE)
    if options.api_keys:
        keys += security.read_keys(options.api_keys)
    setup = server.Setup(
        packages=[_named(text) for text in options.packages],
        place=server.Place(options.host, options.port, options.allow_public_without_key),
        settings=Settings(
            keys=keys,
            hosts=_hosts(options.host) if not keys and security.is_loopback(options.host) else (),
            origins=tuple(_origin(text) for text in options.cors),
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            max_prompt_tokens=options.max_prompt_tokens,
            max_tokens=options.max_tokens,
            max_body=options.max_body,
            drain_seconds=options.drain_seconds,
            write_seconds=options.write_seconds,
            page=options.page,
        ),
        options=Options(
            threads=options.threads or 0,
            provider=options.provider,
            parallel=options.parallel,
            self_test=options.self_test,
            lookup=options.lookup,
        ),
        limits=Limits(queue=options.queue, timeout=options.timeout, idle=options.idle_seconds),
        trust=options.trust,
    )
    logs.set_up(options.log_format)
    server.run(setup, _emit if options.json else server.say)
    return 0


def _emit(event: str, facts: dict[str, Any]) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def _named(text: str) -> tuple[str, Path]:
    """``NAME=PACKAGE`` or ``PACKAGE``."""
    name, equals, folder = text.partition("=")
    if not equals or os.path.isdir(text):  # noqa: PTH112 - pathlib's raises where the text is too long for a path
        return "", Path(text)
    if not name or not name.isprintable() or set(name) & set(" /:?#"):
        raise UsageError(f"{name!r} cannot be the name of a model", fix="use letters, digits, `.`, `-` and `_`")
    return name, Path(folder)


def _hosts(host: str) -> tuple[str, ...]:
    given = host.lower() if not (":" in host and not host.startswith("[")) else f"[{host.lower()}]"
    return tuple(dict.fromkeys(("127.0.0.1", "localhost", "[::1]", given)))


def _origin(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator or not scheme or not rest or "/" in rest or "*" in text:
        raise UsageError(f"--cors {text} is no origin", fix="give one such as https://app.example.org")
    return text


def whole(text: str) -> int:
    """A number that is not negative, for the command line."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def seconds(text: str) -> float:
    """A time that is not negative, for the command line."""
    number = float(text)
    if not 0 <= number < 1e9:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return number


def port(text: str) -> int:
    """A port, for the command line."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no port")
    return number
