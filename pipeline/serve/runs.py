"""Several answers that are made together and end together: choices of one request, or prompts of a batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar

from pipeline.serve.engine import Engine, Stream
from pipeline.serve.events import End, Event, Request

AT_ONCE = 8
"""Answers of one request that are asked for at a time: more would fill the queue that others wait in."""


class Run:
    """The events of several answers as they come, each with the place of its request.

    When one fails, so does the run. `close` it when it ends and when it is left: all answers are given up then.

    Raises:
        Busy, Unavailable: the engine takes no more; nothing is left running.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], client: str = "") -> None:
        self._engine, self._client = engine, client
        self._waiting = deque(enumerate(requests))
        self._left = len(requests)
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        try:
            while self._waiting and len(self._streams) < AT_ONCE:
                self._begin()
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            raise StopAsyncIteration
        index, event = await self._events.get()
        if isinstance(event, Exception):
            self.close()
            raise event
        if isinstance(event, End):
            self._left -= 1
            if self._waiting:
                self._begin()
        return index, event

    def close(self) -> None:
        """Give up what has not ended."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        for stream in self._streams:
            stream.cancel()

    def _begin(self) -> None:
        index, request = self._waiting.popleft()
        stream = self._engine.submit(request, self._client)
        self._streams.append(stream)
        self._tasks.append(asyncio.create_task(self._listen(index, stream)))

    async def _listen(self, index: int, stream: Stream) -> None:
        try:
            async for event in stream:
                self._events.put_nowait((index, event))
        except Exception as error:  # whatever it is, who reads the run is told
            self._events.put_nowait((index, error))


Chunk = TypeVar("Chunk")


class Chunks(Generic[Chunk]):
    """The chunks of a run. `aclose` them when they are left early, which gives the run up."""

    def __init__(self, run: Run, made: Callable[[Run], AsyncGenerator[Chunk, None]]) -> None:
        self._run = run
        self._chunks = made(run)

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
