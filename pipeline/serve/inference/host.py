"""A model, its engine and the event loop that both need, in a thread: what a Python program speaks to.

Streams are given up when they are left: whoever makes an answer of no use to anybody has others wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pipeline.errors import UsageError
from pipeline.serve.inference.models import Model, Models
from pipeline.serve.refusals import Unavailable

Value = TypeVar("Value")
Chunk = TypeVar("Chunk")


class Pieces:
    """The pieces of an answer, to be had one after another."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._coming: asyncio.Task[Any] | None = None

    async def next(self) -> Any:
        """The next one; raises StopAsyncIteration after the last."""
        self._coming = asyncio.current_task()
        try:
            return await anext(self._chunks)
        finally:
            self._coming = None

    async def leave(self) -> None:
        """Give up what has not ended; whoever waits for the next piece is let go."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.wait({self._coming})
        await self._chunks.aclose()


class Host:
    """A model, its engine, and the thread of the event loop in which they live."""

    def __init__(self, model: Model) -> None:
        self.model, self.models = model, Models([model])
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"qwen-onnx {model.name}", daemon=True)
        self._lock = threading.Lock()
        self._over = False

    def start(self) -> None:
        """Load the model; raises `QwenOnnxError`."""
        self._thread.start()
        try:
            self.result(self.model.engine.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the model's process, the loop and its thread. Whoever waits for something is told."""
        with self._lock:
            if not self._over:
                self._over = True
                self._loop.call_soon_threadsafe(self._ending.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
        """Begin ``work`` in the loop; raises `UsageError` after the end of it."""
        with self._lock:  # so that nothing is begun after what ends the loop
            if not self._over:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise UsageError("the generator is closed", fix="make another one")

    def result(self, work: Coroutine[Any, Any, Value]) -> Value:
        """The result of ``work``, which is given up when waiting for it is interrupted."""
        future = self.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _gone() from None
        except BaseException:
            future.cancel()
            raise

    async def awaited(self, work: Coroutine[Any, Any, Value]) -> Value:
        """The result of ``work``, which is given up when the caller is cancelled."""
        future = self.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _gone() from None

    def forget(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let ``work`` be done soon; when the loop has ended, it is not needed any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(work()))

    def _run(self) -> None:
        # The loop's own pool could not be ended while the program ends, for that takes another thread.
        with contextlib.closing(self._loop), concurrent.futures.ThreadPoolExecutor() as pool:
            self._loop.set_default_executor(pool)
            self._loop.run_until_complete(self._live())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        if self.model.tokenizer.renderer:
            self.model.tokenizer.renderer.close()

    async def _live(self) -> None:
        await self._ending.wait()
        await self.model.engine.stop(0)
        await asyncio.sleep(0)  # who waits for an answer is told now
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _gone() -> Unavailable:
    return Unavailable("the answer was given up before it was there", why="the generator or its stream was closed")


# Streams


class _Left:
    """What is given up when it is left."""

    def __init__(self, owner: object, host: Host, pieces: Pieces) -> None:
        self._owner = owner  # which would be closed if nobody had it
        self._host, self._pieces, self._over = host, pieces, False

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> bool:
        """Give the answer up; returns whether that had been done."""
        left, self._over = self._over, True
        if not left:
            self._host.forget(self._pieces.leave)
        return left

    def _ended(self, error: BaseException) -> bool:
        """Whether an error is but the end; the answer is given up in any case."""
        left = self._leave()
        return isinstance(error, StopAsyncIteration) or (left and isinstance(error, Unavailable))


class Answers(_Left, Generic[Chunk]):
    """The pieces of an answer, which is given up when they are left: by `close`, ``with``, or when nobody has them."""

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            piece: Chunk = self._host.result(self._pieces.next())
        except BaseException as error:
            if self._ended(error):
                raise StopIteration from None
            raise
        return piece

    def close(self) -> None:
        """Give the answer up, unless it has ended."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()


class AsyncAnswers(_Left, Generic[Chunk]):
    """The same, awaited. It is given up by `aclose`, ``async with``, or when nobody has it."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        try:
            piece: Chunk = await self._host.awaited(self._pieces.next())
        except BaseException as error:
            if self._ended(error):
                raise StopAsyncIteration from None
            raise
        return piece

    async def aclose(self) -> None:
        """Give the answer up, unless it has ended."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
