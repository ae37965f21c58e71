"""A package in a Python program: what the server's endpoints answer, without a server.

    with Generator("artifacts/qwen2.5-coder-0.5b-instruct-cpu-int4") as model:
        answer = model.chat([{"role": "user", "content": "Hello"}], max_tokens=50)
        print(answer.choices[0].message.content)

Fields, answers and errors are those of the endpoints of the same name. The model has a process of its own, and what
speaks to it an event loop in a thread: methods may be called from any thread, and awaited in any event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar, overload

from pydantic import BaseModel

from pipeline.errors import QwenOnnxError, UsageError
from pipeline.serve import chat, completions, embeddings, models, protocol, responses
from pipeline.serve.engine import Limits
from pipeline.serve.models import Model, Models
from pipeline.serve.protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    EmbeddingRequest,
    Embeddings,
    Ranking,
    RerankRequest,
)
from pipeline.serve.refusals import Refused, Unavailable
from pipeline.serve.responses_protocol import Event, Response, ResponseRequest
from pipeline.serve.worker import Options

Value = TypeVar("Value")
Messages = Sequence[Mapping[str, Any]]


class _Endpoint(NamedTuple):
    """A kind of request, what answers it whole, and what answers it in pieces."""

    kind: type[protocol.Given]
    whole: Callable[..., Coroutine[Any, Any, Any]]
    pieces: Callable[..., Coroutine[Any, Any, Any]] | None = None


# By the field that each request has and no other, which is how those of a batch are told apart.
_ENDPOINTS = {
    "messages": _Endpoint(ChatRequest, chat.complete, chat.stream),
    "prompt": _Endpoint(CompletionRequest, completions.complete, completions.stream),
    "query": _Endpoint(RerankRequest, embeddings.rerank),
}
_RESPONSES = _Endpoint(ResponseRequest, responses.complete, responses.stream)
_EMBEDDINGS = _Endpoint(EmbeddingRequest, embeddings.embed)


class Generator:
    """A package that answers. Open it with ``with``, ``async with`` or `open`, and it is closed with them or `close`.

    Args:
        package: its folder.
        name: what requests call it; the folder's name unless told otherwise. ``model="<name>:<adapter>"`` in a request
            answers with one of its LoRA adapters.
        options: how it is loaded, such as how many threads it may use.
        limits: how long answers may take, and how many may wait.
    """

    def __init__(
        self, package: str | Path, *, name: str = "", options: Options | None = None, limits: Limits | None = None
    ) -> None:
        self._package, self._name, self._options, self._limits = Path(package), name, options, limits
        self._host: _Host | None = None
        self._closed = False
        self._lock = threading.Lock()

    def open(self) -> Self:
        """Load the model, unless it is loaded.

        Raises:
            QwenOnnxError: it cannot be loaded.
            UsageError: it has been closed.
        """
        with self._lock:
            if self._closed:
                raise UsageError("the generator is closed", fix="make another one")
            if self._host is None:
                host = _Host(models.load(self._package, self._name, self._options, self._limits))
                # At the latest when the program ends: else the model's process would outlive what speaks to it.
                weakref.finalize(self, host.close)
                host.start()
                self._host = host
        return self

    def close(self) -> None:
        """End the model's process; what is being answered fails with `Unavailable`. More than once does nothing."""
        with self._lock:
            self._closed = True
            if self._host is not None:
                self._host.close()

    @property
    def model(self) -> Model:
        """What is known of the package; raises `UsageError` when it is not open."""
        return self._opened.model

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.open)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **fields: Any) -> Answers[ChatChunk]: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] | None = None, **fields: Any) -> ChatCompletion: ...
    def chat(self, messages: Messages, **fields: Any) -> ChatCompletion | Answers[ChatChunk]:
        """The answer to a conversation, as of `/v1/chat/completions`; an iterator of its chunks with ``stream``."""
        return self._answer(_ENDPOINTS["messages"], {"messages": messages, **fields})

    @overload
    async def achat(self, messages: Messages, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[ChatChunk]: ...
    @overload
    async def achat(
        self, messages: Messages, *, stream: Literal[False] | None = None, **fields: Any
    ) -> ChatCompletion: ...
    async def achat(self, messages: Messages, **fields: Any) -> ChatCompletion | AsyncAnswers[ChatChunk]:
        """`chat`, awaited; with ``stream`` an asynchronous iterator."""
        return await self._aanswer(_ENDPOINTS["messages"], {"messages": messages, **fields})

    @overload
    def complete(self, prompt: Any, *, stream: Literal[True], **fields: Any) -> Answers[Completion]: ...
    @overload
    def complete(self, prompt: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Completion: ...
    def complete(self, prompt: Any, **fields: Any) -> Completion | Answers[Completion]:
        """What goes on after a text or token ids, as of `/v1/completions`."""
        return self._answer(_ENDPOINTS["prompt"], {"prompt": prompt, **fields})

    @overload
    async def acomplete(self, prompt: Any, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[Completion]: ...
    @overload
    async def acomplete(self, prompt: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Completion: ...
    async def acomplete(self, prompt: Any, **fields: Any) -> Completion | AsyncAnswers[Completion]:
        """`complete`, awaited."""
        return await self._aanswer(_ENDPOINTS["prompt"], {"prompt": prompt, **fields})

    @overload
    def respond(self, input: Any, *, stream: Literal[True], **fields: Any) -> Answers[Event]: ...
    @overload
    def respond(self, input: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Response: ...
    def respond(self, input: Any, **fields: Any) -> Response | Answers[Event]:  # noqa: A002 - the field's name
        """The answer to a text or to items, as of `/v1/responses`."""
        return self._answer(_RESPONSES, {"input": input, **fields})

    @overload
    async def arespond(self, input: Any, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[Event]: ...
    @overload
    async def arespond(self, input: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Response: ...
    async def arespond(self, input: Any, **fields: Any) -> Response | AsyncAnswers[Event]:  # noqa: A002
        """`respond`, awaited."""
        return await self._aanswer(_RESPONSES, {"input": input, **fields})

    def embed(self, input: Any, **fields: Any) -> Embeddings:  # noqa: A002
        """A vector of each text, as of `/v1/embeddings`, of packages that embed."""
        return self._answer(_EMBEDDINGS, {"input": input, **fields})  # type: ignore[no-any-return]

    async def aembed(self, input: Any, **fields: Any) -> Embeddings:  # noqa: A002
        """`embed`, awaited."""
        return await self._aanswer(_EMBEDDINGS, {"input": input, **fields})  # type: ignore[no-any-return]

    def rerank(self, query: str, documents: Sequence[Any], **fields: Any) -> Ranking:
        """Documents by how relevant they are, as of `/v1/rerank`, of packages that rank."""
        return self._answer(_ENDPOINTS["query"], {"query": query, "documents": documents, **fields})  # type: ignore[no-any-return]

    async def arerank(self, query: str, documents: Sequence[Any], **fields: Any) -> Ranking:
        """`rerank`, awaited."""
        return await self._aanswer(  # type: ignore[no-any-return]
            _ENDPOINTS["query"], {"query": query, "documents": documents, **fields}
        )

    def batch(self, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
        """The answers of many requests, in their order; in place of one that fails its error.

        Args:
            requests: fields of each. One with ``messages`` is of `chat`, with ``prompt`` of `complete`, with ``query``
                of `rerank`; one with ``input`` is of `embed` where the package embeds, else of `respond`.
        """
        return self._opened.result(self._batch(requests))

    async def abatch(self, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
        """`batch`, awaited."""
        return await self._opened.awaited(self._batch(requests))

    @property
    def _opened(self) -> _Host:
        if self._closed:
            raise UsageError("the generator is closed", fix="make another one")
        if self._host is None:
            raise UsageError("the generator is not open", fix="use it in `with`, or call `open` first")
        return self._host

    def _answer(self, endpoint: _Endpoint, fields: Mapping[str, Any]) -> Any:
        host = self._opened
        request = _request(endpoint, host.model, fields)
        if getattr(request, "stream", None) and endpoint.pieces:
            return Answers(self, host, host.result(endpoint.pieces(host.models, request)))
        return host.result(endpoint.whole(host.models, request))

    async def _aanswer(self, endpoint: _Endpoint, fields: Mapping[str, Any]) -> Any:
        host = self._opened
        request = _request(endpoint, host.model, fields)
        if getattr(request, "stream", None) and endpoint.pieces:
            return AsyncAnswers(self, host, await host.awaited(endpoint.pieces(host.models, request)))
        return await host.awaited(endpoint.whole(host.models, request))

    async def _batch(self, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
        host = self._opened
        # As many at once as find room: those of a batch are no reason to refuse one another.
        room = asyncio.Semaphore(max(1, min(host.model.engine.limits.queue, host.model.engine.options.parallel)))

        async def one(fields: Any) -> BaseModel | QwenOnnxError:
            async with room:
                try:
                    endpoint = _endpoint(host.model, fields)
                    answer: BaseModel = await endpoint.whole(host.models, _request(endpoint, host.model, fields))
                except QwenOnnxError as error:
                    return error
                return answer

        return list(await asyncio.gather(*(one(fields) for fields in requests)))


def _endpoint(model: Model, fields: Any) -> _Endpoint:
    if not isinstance(fields, Mapping):
        raise Refused("a request of a batch is no mapping of fields", why=f"it is a {type(fields).__name__}")
    if fields.get("stream"):
        raise Refused("a request of a batch cannot be streamed", fix="leave it out", parameter="stream")
    for name, endpoint in _ENDPOINTS.items():
        if name in fields:
            return endpoint
    if "input" in fields:
        return _RESPONSES if model.generates else _EMBEDDINGS
    raise Refused("a request of a batch has nothing to answer", fix=f"give one of {', '.join(_ENDPOINTS)} and input")


def _request(endpoint: _Endpoint, model: Model, fields: Mapping[str, Any]) -> protocol.Given:
    return protocol.parse(endpoint.kind, {"model": model.name, **fields})


class _Host:
    """A model, its engine, and the thread of the event loop in which they live."""

    def __init__(self, model: Model) -> None:
        self.model, self.models = model, Models([model])
        self._loop = asyncio.new_event_loop()
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
            if self._over:
                return
            self._over = True
            if self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
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
        """Let ``work`` be done some time; it is not needed any more when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._kept(work()))

    def _kept(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    def _run(self) -> None:
        self._pending: set[asyncio.Task[None]] = set()  # a loop holds its tasks only weakly
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _stop(self) -> None:
        try:
            await self.model.engine.stop(0)
            await asyncio.sleep(0)  # who waits for an answer is told now
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        finally:
            self._loop.stop()


def _gone() -> Unavailable:
    return Unavailable("the generator was closed before the answer was there")


Chunk = TypeVar("Chunk")


class Answers(Generic[Chunk]):
    """The pieces of an answer. It is given up when the iterator is left: by `close`, ``with``, or when nobody has it."""

    def __init__(self, owner: Generator, host: _Host, chunks: Any) -> None:
        self._owner = owner  # which would be closed if nobody had it
        self._host, self._chunks, self._over = host, chunks, False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            return self._host.result(_next(self._chunks))
        except _End:
            self._over = True
            raise StopIteration from None
        except BaseException:
            self._leave()
            raise

    def close(self) -> None:
        """Give the answer up, unless it has ended."""
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._host.forget(self._chunks.aclose)


class AsyncAnswers(Generic[Chunk]):
    """The same, awaited. It is given up by `aclose`, ``async with``, or when nobody has it."""

    def __init__(self, owner: Generator, host: _Host, chunks: Any) -> None:
        self._owner = owner  # which would be closed if nobody had it
        self._host, self._chunks, self._over = host, chunks, False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        try:
            return await self._host.awaited(_next(self._chunks))
        except _End:
            self._over = True
            raise StopAsyncIteration from None
        except BaseException:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Give the answer up, unless it has ended."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._host.forget(self._chunks.aclose)


class _End(Exception):  # noqa: N818 - it is none
    """The end of a stream: neither a future nor a coroutine can hold a StopAsyncIteration."""


async def _next(chunks: Any) -> Any:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        raise _End from None
