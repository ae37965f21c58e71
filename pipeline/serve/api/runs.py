"""Several answers that are made together and end together: choices of one request, or prompts of a batch."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar

from pipeline.serve.events import End, Event, Request
from pipeline.serve.inference.engine import READY, Engine, Stream
from pipeline.serve.refusals import Busy, TimedOut

AT_ONCE = 8
"""Answers of one request that are asked for at a time: more would fill the queue that others wait in."""

_PAUSE = 0.05  # seconds until a queue that was full is looked at again


class Run:
    """The events of several answers as they come, each with the place of its request.

    The first answer is asked for at once, the others as the queue has room. When one fails, so does the run. `close` it
    when it ends and when it is left: all answers are given up then.

    Raises:
        Busy, Unavailable: the engine does not take the first one.
        TimedOut: it has had no room for another one in the time that a request may take.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], client: str = "") -> None:
        self._engine, self._client = engine, client
        self._left = len(requests)
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._early: deque[tuple[int, Event | Exception]] = deque()
        self._room = asyncio.Semaphore(AT_ONCE - 1)
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._begin(0, requests[0])
        if len(requests) > 1:
            self._tasks.append(asyncio.create_task(self._begin_others(requests)))

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            raise StopAsyncIteration
        index, event = self._early.popleft() if self._early else await self._events.get()
        if isinstance(event, Exception):
            self.close()
            raise event
        if isinstance(event, End):
            self._left -= 1
            self._room.release()
        return index, event

    async def open(self) -> Run:
        """Wait until the process has begun with an answer, and return the run, which goes on as if nobody had waited.

        Raises:
            Exception: what an answer failed with until then; nothing is left running, nor is it when the wait is ended.
        """
        try:
            self._early.append(await self._events.get())
        except BaseException:
            self.close()
            raise
        error = self._early[0][1]
        if isinstance(error, Exception):
            self.close()
            raise error
        return self

    def close(self) -> None:
        """Give up what has not ended."""
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.cancel()

    def _begin(self, index: int, request: Request) -> None:
        stream = self._engine.submit(request, self._client)
        self._streams.append(stream)
        self._tasks.append(asyncio.create_task(self._listen(index, stream)))

    async def _begin_others(self, requests: Sequence[Request]) -> None:
        index, seconds = 1, self._engine.limits.timeout
        try:
            async with asyncio.timeout(seconds):
                for index in range(1, len(requests)):
                    await self._room.acquire()
                    await self._begin_when_there_is_room(index, requests[index])
        except TimeoutError:
            why = f"of {len(requests)} answers {index} were begun in the {seconds:g} seconds that a request may take"
            self._events.put_nowait((index, TimedOut("the answers take too long", why=why)))
        except Exception as error:
            self._events.put_nowait((index, error))

    async def _begin_when_there_is_room(self, index: int, request: Request) -> None:
        engine = self._engine
        while True:
            # Half of the queue is left to others. What an engine refuses it counts as a client that was turned away.
            if 2 * engine.waiting < engine.limits.queue or (not engine.running and engine.state == READY):
                with contextlib.suppress(Busy):
                    return self._begin(index, request)
            await asyncio.sleep(_PAUSE)

    async def _listen(self, index: int, stream: Stream) -> None:
        try:
            async for event in stream:
                self._events.put_nowait((index, event))
        except Exception as error:  # whatever it is, who reads the run is told
            self._events.put_nowait((index, error))


Chunk = TypeVar("Chunk")


class Chunks(Generic[Chunk]):
    """The chunks of a run. `aclose` them when they are left early, which gives the run up; so does forgetting them."""

    def __init__(self, run: Run, made: Callable[[Run], AsyncGenerator[Chunk, None]]) -> None:
        self._run = run
        self._chunks = made(run)
        weakref.finalize(self, _give_up, run, asyncio.get_running_loop()).atexit = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        try:
            return await anext(self._chunks)
        except BaseException:
            self._run.close()
            raise

    async def aclose(self) -> None:
        """Give up what has not ended."""
        self._run.close()
        await self._chunks.aclose()


def _give_up(run: Run, loop: asyncio.AbstractEventLoop) -> None:
    """Close a run from any thread: garbage is collected in all of them."""
    with contextlib.suppress(RuntimeError):  # the loop has ended, and all that ran in it
        loop.call_soon_threadsafe(run.close)
