"""The command that serves packages."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pipeline.commands import arguments
from pipeline.commands.shared import check_positive
from pipeline.errors import RuntimeMissing, UsageError


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "serve", serve, "answer over HTTP as OpenAI's API does, with packages")
    parser.add_argument("packages", nargs="+", metavar="PACKAGE", help="a folder, or NAME=FOLDER")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    text = "0 takes a free one, and tells which (default: %(default)s)"
    parser.add_argument("--port", type=port, default=8000, help=text)
    text = "a file with one key a line, KEY or NAME:KEY; also $QWEN_ONNX_API_KEYS, apart by commas"
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help=text)
    text = "listen where other machines reach it although there are no keys"
    parser.add_argument("--allow-public-without-key", action="store_true", help=text)
    text = "let web pages of this origin ask; may be given again"
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=text)
    for name, what in (
        ("requests-per-minute", "of each key, or address without keys"),
        ("tokens-per-minute", "of prompts and answers, of each key or address"),
        ("max-prompt-tokens", "of a prompt"),
        ("max-tokens", "of an answer"),
    ):
        text = f"{what} (default: {'the context' if name.startswith('max') else 'no limit'})"
        parser.add_argument(f"--{name}", type=whole, default=0, metavar="N", help=text)
    text = "largest request, such as 8MB (default: 32MiB)"
    parser.add_argument("--max-body", type=arguments.memory, default=32 << 20, metavar="SIZE", help=text)
    text = "requests that may wait for a model; more get 503 (default: %(default)s)"
    parser.add_argument("--queue", type=int, default=16, metavar="N", help=text)
    text = "answers that take turns, and conversations whose caches are kept (default: %(default)s)"
    parser.add_argument("--parallel", type=int, default=4, metavar="N", help=text)
    text = "that an answer may take, its wait included (default: %(default)s)"
    parser.add_argument("--timeout", type=seconds, default=600.0, metavar="SECONDS", help=text)
    text = "without a request after which a model is unloaded until the next one (default: never)"
    parser.add_argument("--idle-seconds", type=seconds, default=0.0, metavar="SECONDS", help=text)
    text = "that answers have to come to their end when the server is stopped (default: %(default)s)"
    parser.add_argument("--drain-seconds", type=seconds, default=30.0, metavar="SECONDS", help=text)
    text = "in which a client has to take some of what waits for it (default: %(default)s)"
    parser.add_argument("--write-seconds", type=seconds, default=30.0, metavar="SECONDS", help=text)
    parser.add_argument("--threads", type=int, help="processor threads of each model (default: all cores)")
    arguments.provider(parser)
    parser.add_argument("--trust", action="store_true", help="load packages without checking them first")
    text = "do not replay the beginning of the golden answers when a model is loaded"
    lookup = "draft greedy answers (temperature 0) from what was said, and verify many tokens at once"
    parser.add_argument("--lookup", action="store_true", help=lookup)
    parser.add_argument("--no-self-test", dest="self_test", action="store_false", help=text)
    parser.add_argument("--no-page", dest="page", action="store_false", help="no page at /")
    text = "of the lines on standard error: console or json (default: %(default)s)"
    parser.add_argument("--log-format", choices=("console", "json"), default="console", help=text)
    arguments.json(parser)


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
