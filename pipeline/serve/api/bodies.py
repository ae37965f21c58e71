"""The bodies of requests: JSON, within bounds of size, time and depth, and nothing that parsers read differently."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pipeline.serve.refusals import Refused, TooLarge, TooSlow

Receive = Callable[[], Awaitable[Any]]

_DEPTH = 64  # schemas of tools nest a dozen deep
_LARGE = 1 << 18  # bytes whose parsing takes milliseconds: it is done beside the event loop
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Gone(Exception):  # noqa: N818 - it is what the client has
    """The client has gone before its request was complete."""


async def read(receive: Receive, headers: Mapping[str, str], most: int, seconds: float) -> bytes:
    """The body of a request, which is counted while it comes, whatever its headers say of its length.

    Raises:
        Refused: it is not sent as JSON.
        TooLarge: it has more than ``most`` bytes.
        TooSlow: it has not come within ``seconds``.
        Gone: the client has.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps web pages out: a browser asks before it sends this type to another origin.
        raise Refused("the request is not JSON", why=f"its content type is {kind[:80]!r}", fix="send application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused("compressed requests are not taken", fix="send the JSON as it is")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > most:
                    raise _too_large(most)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise TooSlow("the request has not arrived", why=f"it may take {seconds:g} seconds") from None


def _too_large(most: int) -> TooLarge:
    return TooLarge("the request is too large", why=f"this server takes {most} bytes (--max-body)")


async def parse(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        Refused: it is no JSON, names a key twice in an object, nests too deep, or has NaN, infinite numbers or
            surrogates, which are no characters.
    """
    return _parsed(body) if len(body) < _LARGE else await asyncio.to_thread(_parsed, body)


def _parsed(body: bytes) -> Any:
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        _check_depth(value)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("the request has surrogates", why="they are halves of characters, and none themselves") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Refused("the request is no JSON", why=_reason(error)) from None
    return value


def _reason(error: ValueError) -> str:
    """What is wrong with a text, without the text."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> Refused:
    return Refused("the request is nested too deep", why=f"{_DEPTH} levels are read")
