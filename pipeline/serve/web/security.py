"""Who may ask, under which name of the server, and how much: keys, hosts, and what is spent in a minute."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.serve.refusals import Forbidden, RateLimited, Unauthorized

VARIABLE = "QWEN_ONNX_API_KEYS"
"""Environment variable with keys, apart by commas or line ends."""

HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
"""Of every response that does not say otherwise."""

_SHORTEST = 16  # characters of a key: what is shorter is guessed, or was meant to be replaced
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_MINUTE = 60.0
_MOST_CLIENTS = 10_000  # whose spending is remembered: addresses are free to whoever has a network of them


@dataclass(frozen=True)
class Key:
    """A key, by its digest: nothing that is logged or dumped has the key itself.

    Attributes:
        name: of its owner. Keys of one name are one client, so that one can be replaced by the other.
        digest: sha256 of the key.
    """

    name: str
    digest: bytes


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: one a line, ``KEY`` or ``NAME:KEY``; empty lines and ``#`` comments are skipped.

    Raises:
        UsageError: it cannot be read, everybody may read it, or it has no keys, bad ones or the same one twice.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no regular file", fix="give a file with one key a line")
        if status.st_mode & stat.S_IROTH:
            raise UsageError(
                f"every user of this machine may read {path}",
                why="its keys are secrets",
                fix=f"chmod o-rwx {path}",
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"the keys in {path} cannot be read", why=str(error)) from None
    keys = keys_of(text, str(path))
    if not keys:
        raise UsageError(f"{path} has no keys", why="the server would be open to everybody", fix="write one a line")
    return keys


def keys_of(text: str, where: str) -> tuple[Key, ...]:
    """The keys of a text, one a line; ``where`` it is from is for errors, which never show a key.

    Raises:
        UsageError: as `read_keys`.
    """
    found: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, secret = (part.strip() for part in entry.partition(":"))
        if not colon:
            name, secret = f"key-{number}", entry
        problem = _key_problem(name, secret)
        if problem:
            raise UsageError(
                f"a key cannot be used: {problem}",
                where=f"{where}, line {number}",
                fix="make one: openssl rand -hex 32",
            )
        digest = hashlib.sha256(secret.encode()).digest()
        if any(key.digest == digest for key in found):
            raise UsageError("a key stands there twice", where=f"{where}, line {number}", fix="leave one of them out")
        found.append(Key(name, digest))
    return tuple(found)


def _key_problem(name: str, secret: str) -> str:
    if not _NAME.fullmatch(name):
        return "its name is not 1 to 64 letters, digits, `_`, `.`, `@` or `-`"
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        return "it has characters that no header takes"
    return f"it has fewer than {_SHORTEST} characters" if len(secret) < _SHORTEST else ""


def admitted(keys: Sequence[Key], headers: Mapping[str, str]) -> str:
    """The name of the key that a request has, as ``Authorization: Bearer`` or ``x-api-key``.

    Every key is compared, and none is compared by its characters: the time tells nothing of them.

    Raises:
        Unauthorized: it has none, or another one.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    fix = "send `Authorization: Bearer KEY`"
    if not given.strip():
        raise Unauthorized("there is no API key", why="this server asks for one", fix=fix)
    digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
    found = [key.name for key in keys if hmac.compare_digest(key.digest, digest)]
    if not found:
        raise Unauthorized("the API key is not known", fix=fix)
    return found[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host that a server listens on."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(hosts: Sequence[str], given: str) -> None:
    """Refuse a request that is for another name: a page of an evil name that resolves to this machine sends such.

    Args:
        hosts: names that are taken; any when there are none.
        given: the ``Host`` header.

    Raises:
        Forbidden: another name, or none.
    """
    name = given.strip().lower()
    name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
    if hosts and name not in hosts:
        raise Forbidden(
            f"this server is not called {name[:80]!r}",
            why="without keys it answers to its own names only, so that no web page can reach it under another one",
            fix=f"ask for {hosts[0]}, name it with --host, or give the server keys",
        )


class Window:
    """What was spent in the last minute, of a limit."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._spent: deque[tuple[float, int]] = deque()
        self._sum = 0

    def wait(self) -> float:
        """Seconds until something is left of the limit; 0 when there is something now."""
        now = self._clock()
        while self._spent and self._spent[0][0] <= now - _MINUTE:
            self._sum -= self._spent.popleft()[1]
        rest = self._sum
        if rest < self._limit:
            return 0.0
        for when, count in self._spent:
            rest -= count
            if rest < self._limit:
                return when + _MINUTE - now
        return _MINUTE

    def spend(self, count: int) -> None:
        """Count something as spent now; it may be more than was left, and is then owed."""
        if count > 0:
            self._spent.append((self._clock(), count))
            self._sum += count

    @property
    def idle(self) -> bool:
        """Whether nothing was spent in the last minute."""
        self.wait()
        return not self._spent


class Budgets:
    """The requests and tokens of a minute, of each client."""

    def __init__(self, requests: int, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = {"requests": requests, "tokens": tokens}, clock
        self._windows: dict[tuple[str, str], Window] = {}

    def take(self, client: str) -> None:
        """Count a request of a client.

        Raises:
            RateLimited: it has had its requests or its tokens of the minute; the request is not counted.
        """
        for what, limit in self._limits.items():
            if limit and (after := self._window(what, client).wait()):
                raise RateLimited(
                    f"the limit of {limit} {what} a minute is reached",
                    fix="ask again later, and see the header Retry-After",
                    retry_after=after,
                )
        self._spend("requests", client, 1)

    def spend(self, client: str, tokens: int) -> None:
        """Count tokens of a client, of prompts and answers."""
        self._spend("tokens", client, tokens)

    def _spend(self, what: str, client: str, count: int) -> None:
        if self._limits[what]:
            self._window(what, client).spend(count)

    def _window(self, what: str, client: str) -> Window:
        if len(self._windows) > _MOST_CLIENTS:
            self._windows = {key: window for key, window in self._windows.items() if not window.idle}
        if len(self._windows) > _MOST_CLIENTS:  # the rest of the world shares one
            client = ""
        return self._windows.setdefault((what, client), Window(self._limits[what], self._clock))
