"""Answers as server-sent events, which end when they are complete, when they fail, and when nobody reads them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.serve.web import failures

Value = TypeVar("Value")

KIND = "text/event-stream"
_PING = b": the answer is being worked on\n\n"  # a comment; clients skip it
_DONE = b"data: [DONE]\n\n"
_PATIENCE = 0.5
"""Seconds that the first chunk is waited for before the status is sent: what fails at once has a status of its own."""


class Source:
    """The events of the chunks of an answer: first `open` it, then iterate, and close it in any case.

    Args:
        chunks: each becomes an event of JSON; one with a ``type`` is called by it, as in the API of responses.
        named: whether events have names, and no ``[DONE]`` at their end.
        failed: is told of an error after the status was sent; it becomes the last event.
    """

    def __init__(
        self,
        chunks: AsyncIterator[BaseModel],
        named: bool = False,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._chunks, self._named, self._failed = chunks, named, failed
        self._coming: asyncio.Future[BaseModel] | None = None
        self._last: list[bytes] | None = None

    async def open(self) -> None:
        """Wait a moment for the first chunk; raises what the chunks raise until then."""
        try:
            if await self._wait(_PATIENCE):
                error = self._ready.exception()
                if error is not None and not isinstance(error, StopAsyncIteration):
                    raise error
        except BaseException:
            await self.aclose()
            raise

    async def next(self, ping: float) -> bytes | None:
        """The next event; a comment when there is none for ``ping`` seconds; None after the last one."""
        if self._last is not None:
            return self._last.pop(0) if self._last else None
        if not await self._wait(ping):
            return _PING
        coming, self._coming = self._ready, None
        try:
            chunk = coming.result()
        except StopAsyncIteration:
            self._last = [] if self._named else [_DONE]
            return await self.next(ping)
        except Exception as error:
            self._failed(error)
            self._last = [] if self._named else [_DONE]
            return self._failure(error)
        return _event(chunk.model_dump_json(), getattr(chunk, "type", "") if self._named else "")

    async def aclose(self) -> None:
        """Give up what is not done yet."""
        if self._coming is not None:
            await _cancelled(self._coming)
        if hasattr(self._chunks, "aclose"):
            await self._chunks.aclose()

    async def _wait(self, seconds: float) -> bool:
        if self._coming is None:
            self._coming = asyncio.ensure_future(_next(self._chunks))
        done, _ = await asyncio.wait({self._coming}, timeout=seconds)
        return bool(done)

    @property
    def _ready(self) -> asyncio.Future[BaseModel]:
        assert self._coming is not None
        return self._coming

    def _failure(self, error: Exception) -> bytes:
        body = failures.described(error)[1]
        if self._named:
            return _event(json.dumps({"type": "error", **body["error"]}), "error")
        return _event(json.dumps(body))


async def _next(chunks: AsyncIterator[BaseModel]) -> BaseModel:
    return await anext(chunks)


def _event(data: str, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()


class Events(Response):
    """A response that sends each event when it is there, and closes the source in any case.

    Args:
        ping: seconds of silence after which a comment is sent.
    """

    media_type = KIND

    def __init__(self, source: Source, ping: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source, self._ping = source, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send all of it; returns early when the client has gone."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))
        finally:
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        while (data := await self._source.next(self._ping)) is not None:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Value]) -> Value | None:
    """The result of ``work``, which is given up when the client goes; None then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancelled(gone)
        await _cancelled(working)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has let go."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
        await task
