"""A package that answers: the process of its model, the queue before it, and what becomes of both when one fails.

Requests wait in a bounded queue, one line for each client, and the lines take turns. The process answers a few of them
at a time. When it ends, what it was answering fails, what waits goes on waiting, and a new process is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.errors import QwenOnnxError, StageError, UsageError
from pipeline.serve.events import End, Event, Piece, Prefilled, Request
from pipeline.serve.inference import worker
from pipeline.serve.refusals import Busy, TimedOut, Unavailable

LOADING, READY, IDLE, RESTARTING, FAILED, STOPPING = "loading", "ready", "idle", "restarting", "failed", "stopping"
_KINDS: dict[str, type[Prefilled | Piece | End]] = {"prefilled": Prefilled, "piece": Piece, "end": End}
_LINE = 1 << 30  # most bytes of a line; vectors of a batch are long
_BACKOFF = (0.0, 0.5, 2.0, 10.0, 30.0)  # seconds before a process is started again, by how often it ended of late
_LATE = 60.0  # seconds after which an end no longer counts as one of a row


@dataclass(frozen=True)
class Limits:
    """What an engine lets in.

    Attributes:
        queue: most requests that wait.
        timeout: seconds that a request may take in all, its wait included.
        stall: seconds without a word after which a process that works is ended.
        idle: seconds without a request after which the model is unloaded; 0 never.
    """

    queue: int = 16
    timeout: float = 600.0
    stall: float = 120.0
    idle: float = 0.0


@dataclass
class Counts:
    """What has happened since the engine was made."""

    requests: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    restarts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Told:
    """One thing that happened to a request, for metrics: ``first`` token, ``token`` after another, ``end``; seconds
    since it was asked or since the token before."""

    what: str
    seconds: float


@dataclass(eq=False)
class _Job:
    number: int
    client: str
    message: dict[str, Any]
    asked: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    events: asyncio.Queue[Event | dict[str, Any] | Exception] = field(default_factory=asyncio.Queue)
    running: bool = False
    over: bool = False
    spoke: float = 0.0
    timer: asyncio.TimerHandle | None = None


class Stream:
    """The events of one answer, as they come: `Prefilled` any number of times, `Piece` each token, `End` once.

    Iterating raises `Unavailable` when the model's process ends, `TimedOut`, and `UsageError` for what the package
    cannot take.
    """

    def __init__(self, engine: Engine, job: _Job) -> None:
        self._engine, self._job = engine, job

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._job.over and self._job.events.empty():
            raise StopAsyncIteration
        event = await self._job.events.get()
        if isinstance(event, Exception):
            raise event
        assert not isinstance(event, dict)
        return event

    def cancel(self) -> None:
        """Give the answer up; nothing happens when it has ended."""
        self._engine.cancel(self._job)


class Engine:
    """One package. Make it and use it in one event loop."""

    def __init__(
        self,
        package: Path,
        options: worker.Options | None = None,
        limits: Limits | None = None,
        observe: Callable[[Told], None] = lambda _: None,
    ) -> None:
        self.package = package
        self.options, self.limits = options or worker.Options(), limits or Limits()
        self.state, self.why = LOADING, "it is being loaded"
        self.counts = Counts()
        self.facts: dict[str, Any] = {}
        self.observe = observe
        self._process: asyncio.subprocess.Process | None = None
        self._lines: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._running: dict[int, _Job] = {}
        self._numbers = 0
        self._spoke = self._used = time.monotonic()
        self._took: deque[float] = deque([1.0], maxlen=20)
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._error: QwenOnnxError | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._lines.values()))

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    @property
    def pid(self) -> int | None:
        """Process of the model, while there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def self_test(self) -> dict[str, Any]:
        """What the last start made of the golden answers: ``problem``, ``tokens``, ``seconds``; empty before."""
        found: dict[str, Any] = self.facts.get("self_test", {})
        return found

    async def start(self) -> None:
        """Load the model and wait until it is there.

        Raises:
            QwenOnnxError: it cannot be loaded.
        """
        self.begin()
        while self.state == LOADING:
            await self._change()
        if self._error:
            await self.stop(0)
            raise self._error

    def begin(self) -> None:
        """Load the model, without waiting for it."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._live()), asyncio.create_task(self._watch())]

    async def stop(self, drain: float = 30.0) -> None:
        """Let what was asked come to its end, for ``drain`` seconds at most, and end the process."""
        self._enter(STOPPING, "the server is being stopped")
        deadline = time.monotonic() + drain
        while (self.waiting or self.running) and self.pid and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._change(), max(0.0, deadline - time.monotonic()))
        for job in self._jobs():
            self._finish(job, Unavailable("the server is being stopped", retry_after=10))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()

    def submit(self, request: Request, client: str = "") -> Stream:
        """Ask for an answer.

        Args:
            client: whose turn it is; requests of one client wait for one another, and not those of others for them.

        Raises:
            Busy: the queue is full.
            Unavailable: the model cannot be loaded, or is being stopped.
        """
        return Stream(self, self._enqueue({"answer": request.as_dict()}, client))

    async def embed(self, rows: list[list[int]], dimensions: int | None, client: str = "") -> list[list[float]]:
        """Vectors of rows of ids, one for each; raises as `submit` and `Stream` do."""
        found: list[list[float]] = await self._whole({"embed": rows, "dimensions": dimensions}, "vectors", client)
        return found

    async def rank(self, rows: list[list[int]], client: str = "") -> list[float]:
        """Scores of rows of ids, each a query with a document; raises as `submit` and `Stream` do."""
        found: list[float] = await self._whole({"rank": rows}, "scores", client)
        return found

    async def _whole(self, message: dict[str, Any], name: str, client: str) -> Any:
        job = self._enqueue(message, client)
        try:
            found = await job.events.get()
        finally:
            self.cancel(job)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, dict)
        return found[name]

    def cancel(self, job: _Job) -> None:
        """Give a request up, waiting or running."""
        if job.over:
            return
        self.counts.cancelled += 1
        self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        if job.running:
            job.over = True
            self._send({"cancel": job.number})  # it counts as running until the process says that it has let go
            if job.timer:
                job.timer.cancel()
        else:
            self._finish(job)

    def _enqueue(self, message: dict[str, Any], client: str) -> _Job:
        if self.state in (FAILED, STOPPING):
            raise Unavailable(f"{self.package.name} cannot answer", why=self.why, retry_after=10)
        if self.waiting >= self.limits.queue and (self.running or self.state != READY):
            self.counts.refused += 1
            after = max(1.0, sum(self._took) / len(self._took) * self.waiting / max(1, self._parallel))
            raise Busy(
                "too many requests are waiting", why=f"the queue holds {self.limits.queue}", retry_after=round(after)
            )
        self._numbers += 1
        self.counts.requests += 1
        job = _Job(self._numbers, client, {"id": self._numbers, **message})
        job.timer = asyncio.get_running_loop().call_later(self.limits.timeout, self._expire, job)
        self._lines.setdefault(client, deque()).append(job)
        self._used = time.monotonic()
        self._wake.set()
        self._pump()
        return job

    def _expire(self, job: _Job) -> None:
        if job.over:
            return
        self.counts.timed_out += 1
        job.events.put_nowait(
            TimedOut("the answer takes too long", why=f"a request may take {self.limits.timeout:g} seconds in all")
        )
        self._give_up(job)

    @property
    def _parallel(self) -> int:
        return int(self.facts.get("parallel", 1))

    def _pump(self) -> None:
        """Give the process what it can take."""
        if self.pid is None or not self.facts or self.state not in (READY, STOPPING):
            return
        while self._lines and len(self._running) < self._parallel:
            client, line = next(iter(self._lines.items()))
            job = line.popleft()
            self._lines.move_to_end(client)
            if not line:
                del self._lines[client]
            job.running, job.begun = True, time.monotonic()
            self._running[job.number] = job
            self._spoke = time.monotonic()
            self._send(job.message)
            job.message = {}

    def _send(self, message: dict[str, Any]) -> None:
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _live(self) -> None:
        """Keep a process as long as one is wanted."""
        ends, begun = 0, 0.0
        while True:
            await asyncio.sleep(_BACKOFF[min(ends, len(_BACKOFF) - 1)])
            begun = time.monotonic()
            await self._spawn()
            await self._listen()
            code = await self._end()
            if self.state == IDLE:
                self._wake.clear()
                if not self.waiting:
                    await self._wake.wait()
                self._enter(LOADING, "it is being loaded")
                continue
            if self._error is not None and not self.counts.restarts and not self.counts.requests:
                self._enter(FAILED, self._error.what)
                return
            ends = 1 if time.monotonic() - begun > _LATE else ends + 1
            self.counts.restarts += 1
            why = self._error.what if self._error else f"its process ended ({_ended(code)})"
            self._enter(RESTARTING, why)
            for job in list(self._running.values()):
                self._finish(job, Unavailable("the model failed while it answered", why=why, retry_after=2))

    async def _spawn(self) -> None:
        self.facts, self._error = {}, None
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pipeline.serve.inference.worker",
            str(self.package),
            json.dumps(asdict(self.options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE,
            start_new_session=True,  # an interrupt at the terminal is for the server to act upon
        )

    async def _listen(self) -> None:
        """Take in what the process tells, until it ends."""
        assert self._process
        assert self._process.stdout
        async for line in self._process.stdout:
            self._spoke = time.monotonic()
            message = json.loads(line)
            if "ready" in message:
                self.facts = message["ready"]
                if self.state != STOPPING:
                    self._enter(READY, "")
            elif "failed" in message:
                self._error = errors.from_dict(message["failed"])
            else:
                self._take(message)
            self._pump()

    def _take(self, message: dict[str, Any]) -> None:
        job = self._running.get(message["id"])
        if job is None:
            return
        if "cancelled" in message or job.over:
            if not message.keys().isdisjoint(("cancelled", "end", "error", "vectors", "scores")):
                self._finish(job)
            return
        name = next(name for name in message if name != "id")
        if name == "error":
            self._finish(job, _refused(message["error"]))
        elif name in ("vectors", "scores"):
            job.events.put_nowait(message)
            self._finish(job)
        else:
            event = _KINDS[name](**message[name])
            if isinstance(event, Piece):
                event = replace(event, top=tuple((token, logprob) for token, logprob in event.top))
            self._count(job, event)
            job.events.put_nowait(event)
            if isinstance(event, End):
                self._finish(job)

    def _count(self, job: _Job, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Piece):
            self.counts.tokens += 1
            self.observe(Told("token", now - job.spoke) if job.spoke else Told("first", now - job.asked))
            job.spoke = now
        elif isinstance(event, End):
            self.counts.prompt_tokens += event.prompt
            self.counts.cached_tokens += event.cached
            self._took.append(now - job.begun)
            self.observe(Told("end", now - job.asked))

    def _finish(self, job: _Job, error: Exception | None = None) -> None:
        if error is not None and not job.over:
            self.counts.failed += 1
            job.events.put_nowait(error)
        job.over = True
        if job.timer:
            job.timer.cancel()
        self._running.pop(job.number, None)
        line = self._lines.get(job.client)
        if line and job in line:
            line.remove(job)
            if not line:
                del self._lines[job.client]
        self._used = time.monotonic()
        self._signal()

    def _jobs(self) -> list[_Job]:
        return [*self._running.values(), *(job for line in self._lines.values() for job in line)]

    async def _watch(self) -> None:
        """End a process that hangs, and unload a model that nobody asks."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.stall / 4))
            now = time.monotonic()
            if self._running and now - self._spoke > self.limits.stall:
                self._kill()
            elif self.limits.idle and self.state == READY and not self._jobs() and now - self._used > self.limits.idle:
                self._enter(IDLE, "nobody has asked for a while; the next request loads it")
                self._close()

    def _close(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _end(self) -> int | None:
        """Let the process end, or end it; returns its exit code."""
        if self._process is None:
            return None
        self._close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        return self._process.returncode

    def _enter(self, state: str, why: str) -> None:
        if self.state == STOPPING:
            return
        self.state, self.why = state, why
        self._signal()

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _change(self) -> Coroutine[Any, Any, Any]:
        """What ends with the next change: also with one between this call and the moment that it is awaited."""
        return self._changed.wait()


def _refused(described: dict[str, str]) -> Exception:
    """The error of a request that the process describes: what cannot be done is the client's to change."""
    error = errors.from_dict(described)
    if isinstance(error, UsageError):
        return error
    if isinstance(error, StageError):
        return Unavailable(error.what, why=error.why, retry_after=1)
    return UsageError(error.what, where=error.where, why=error.why, fix=error.fix)


def _ended(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
