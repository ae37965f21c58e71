"""Runs the server: checks and loads packages, listens, and lets answers come to their end when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from pipeline.errors import UsageError
from pipeline.package import verify
from pipeline.serve.inference import models as served
from pipeline.serve.inference.engine import Limits
from pipeline.serve.inference.models import Model, Models
from pipeline.serve.inference.worker import Options
from pipeline.serve.web import app as apps
from pipeline.serve.web.connection import Connection
from pipeline.serve.web.security import is_loopback
from pipeline.serve.web.settings import Settings

Tell = Callable[[str, dict[str, Any]], None]
"""Is told what happens: the name of an event and its facts."""

_LEAVE = 5.0  # seconds for engines to end after the answers have


@dataclass(frozen=True)
class Place:
    """Where the server listens.

    Attributes:
        public: that everybody who reaches it may ask, is meant so.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    public: bool = False


@dataclass(frozen=True)
class Setup:
    """All of a server.

    Attributes:
        packages: name and folder of each; an empty name is that of the folder.
        trust: load them without checking them first.
    """

    packages: Sequence[tuple[str, Path]]
    place: Place = field(default_factory=Place)
    settings: Settings = field(default_factory=Settings)
    options: Options = field(default_factory=Options)
    limits: Limits = field(default_factory=Limits)
    trust: bool = False


def run(setup: Setup, tell: Tell) -> None:
    """Serve until SIGTERM or SIGINT, and return when all answers have ended.

    Raises:
        UsageError: the address cannot be listened on, may not be without keys, or two packages have one name.
        PackageError, RuntimeMissing: a package is none, is damaged, or cannot be loaded here.
    """
    check_place(setup.place, bool(setup.settings.keys))
    with listening(setup.place) as bound:
        models = opened(setup)
        asyncio.run(_serve(setup, models, bound, tell))


def check_place(place: Place, keys: bool) -> None:
    """Refuse to be open to a network without keys, unless that is meant."""
    if not (keys or place.public or is_loopback(place.host)):
        raise UsageError(
            f"{place.host} can be reached from other machines, and there are no API keys",
            why="whoever reaches it could use the model",
            fix="give --api-keys FILE, or say --allow-public-without-key",
        )


@contextlib.contextmanager
def listening(place: Place) -> Iterator[socket.socket]:
    """A socket that is bound; before packages are read, since that takes a while."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            place.host.strip("[]"), place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(128)
            bound.setblocking(False)
            yield bound
    except (OSError, OverflowError) as error:
        used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise UsageError(
            f"{place.host}:{place.port} cannot be listened on",
            why="another program does" if used else str(error),
            fix="choose another --port; 0 takes a free one" if used else "choose another --host or --port",
        ) from None


def opened(setup: Setup) -> Models:
    """The packages, checked; their engines are not started."""
    found: list[Model] = []
    for name, package in setup.packages:
        if not setup.trust:
            verify.check_runtime(verify.package(package))
        elif not package.is_dir():
            raise UsageError(f"there is no directory {package}")
        model = served.load(package, name, setup.options, setup.limits)
        if any(model.name == other.name for other in found):
            raise UsageError(f"two packages are called {model.name}", fix="name one of them: NAME=PACKAGE")
        found.append(model)
    return Models(found)


class _Server(uvicorn.Server):
    """uvicorn, whose signals are handled here: it would end by the signal, and not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def _serve(setup: Setup, models: Models, bound: socket.socket, tell: Tell) -> None:
    settings = setup.settings

    class Ours(Connection):
        read_seconds, write_seconds = settings.body_seconds, settings.write_seconds

    app = apps.create(models, settings)
    config = uvicorn.Config(
        app,
        http=Ours,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # longer than clients keep theirs: none asks on one that is being closed
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit  # the second time
        server.should_exit = app.state.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    loading = asyncio.create_task(_load(models, tell))
    tell(
        "listening",
        {"url": url_of(setup.place.host, bound), "models": [name for model in models for name in model.ids]},
    )
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is not None:
            stop()  # a server without one of its models is not what was asked for
        await serving
        tell("stopped", {})
        if loading.done():
            loading.result()
    finally:
        loading.cancel()
        await asyncio.gather(loading, *(model.engine.stop(0) for model in models), return_exceptions=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _load(models: Models, tell: Tell) -> None:
    async def load(model: Model) -> None:
        await model.engine.start()
        if model.engine.state == "ready":
            tell("ready", {"model": model.name, **model.engine.facts})

    await asyncio.gather(*map(load, models))


def url_of(host: str, bound: socket.socket) -> str:
    """Where a server is to be asked."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - it is where to ask, not where to listen
    if ":" in name and not name.startswith("["):
        name = f"[{name}]"
    return f"http://{name}:{bound.getsockname()[1]}"


def say(event: str, facts: dict[str, Any]) -> None:
    """Tell people on standard error."""
    if event == "listening":
        models, url = facts["models"], facts["url"]
        message = '{"model": "%s", "messages": [{"role": "user", "content": "Hello"}]}' % models[0]  # noqa: UP031
        lines = [
            f"listening on {url}, with {', '.join(models)}",
            f"  page  {url}/",
            f"  ask   curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{message}'",
        ]
    elif event == "ready":
        lines = [f"{facts['model']} is loaded ({facts['seconds']:.1f} s, {facts['provider']})"]
        if problem := facts.get("self_test", {}).get("problem"):
            lines.append(f"warning: it does not compute what was validated: {problem}")
    else:
        lines = [event]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
