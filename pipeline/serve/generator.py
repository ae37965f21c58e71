"""A package in a Python program: what the server's endpoints answer, without a server.

    with Generator("artifacts/qwen2.5-coder-0.5b-instruct-cpu-int4") as model:
        answer = model.chat([{"role": "user", "content": "Hello"}], max_tokens=50)
        print(answer.choices[0].message.content)

Fields, answers and errors are those of the endpoints of the same name. The model has a process of its own, and what
speaks to it an event loop in a thread: methods may be called from any thread, and awaited in any event loop.
"""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, overload

from pydantic import BaseModel

from pipeline.errors import QwenOnnxError, UsageError
from pipeline.serve.api import bodies, chat, completions, embeddings, protocol, responses, runs
from pipeline.serve.api.protocol import (
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
from pipeline.serve.api.responses_protocol import Event, Response, ResponseRequest
from pipeline.serve.inference import models
from pipeline.serve.inference.engine import Limits
from pipeline.serve.inference.host import Answers, AsyncAnswers, Host, Pieces
from pipeline.serve.inference.models import Model
from pipeline.serve.inference.worker import Options
from pipeline.serve.refusals import Refused

Messages = Sequence[Mapping[str, Any] | BaseModel]


class _Endpoint(NamedTuple):
    """A kind of request, what answers it whole, and what answers it in pieces."""

    kind: type[protocol.Given]
    whole: Callable[..., Coroutine[Any, Any, Any]]
    pieces: Callable[..., Coroutine[Any, Any, Any]] | None = None


_CHAT = _Endpoint(ChatRequest, chat.complete, chat.stream)
_COMPLETIONS = _Endpoint(CompletionRequest, completions.complete, completions.stream)
_RESPONSES = _Endpoint(ResponseRequest, responses.complete, responses.stream)
_EMBEDDINGS = _Endpoint(EmbeddingRequest, embeddings.embed)
_RANKINGS = _Endpoint(RerankRequest, embeddings.rerank)
# By the field that each request has and no other, which is how those of a batch are told apart.
_BATCHED = {"messages": _CHAT, "prompt": _COMPLETIONS, "query": _RANKINGS}


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
        self._host: Host | None = None
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
                host = Host(models.load(self._package, self._name, self._options, self._limits))
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
    def chat(self, messages: Messages, **fields: Any) -> Any:
        """The answer to a conversation, as of `/v1/chat/completions`; an iterator of its chunks with ``stream``."""
        return self._answer(_CHAT, {"messages": messages, **fields})

    @overload
    async def achat(self, messages: Messages, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[ChatChunk]: ...
    @overload
    async def achat(
        self, messages: Messages, *, stream: Literal[False] | None = None, **fields: Any
    ) -> ChatCompletion: ...
    async def achat(self, messages: Messages, **fields: Any) -> Any:
        """`chat`, awaited; with ``stream`` an asynchronous iterator."""
        return await self._aanswer(_CHAT, {"messages": messages, **fields})

    @overload
    def complete(self, prompt: Any, *, stream: Literal[True], **fields: Any) -> Answers[Completion]: ...
    @overload
    def complete(self, prompt: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Completion: ...
    def complete(self, prompt: Any, **fields: Any) -> Any:
        """What goes on after a text or token ids, as of `/v1/completions`."""
        return self._answer(_COMPLETIONS, {"prompt": prompt, **fields})

    @overload
    async def acomplete(self, prompt: Any, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[Completion]: ...
    @overload
    async def acomplete(self, prompt: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Completion: ...
    async def acomplete(self, prompt: Any, **fields: Any) -> Any:
        """`complete`, awaited."""
        return await self._aanswer(_COMPLETIONS, {"prompt": prompt, **fields})

    @overload
    def respond(self, input: Any, *, stream: Literal[True], **fields: Any) -> Answers[Event]: ...
    @overload
    def respond(self, input: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Response: ...
    def respond(self, input: Any, **fields: Any) -> Any:  # noqa: A002 - the field's name
        """The answer to a text or to items, as of `/v1/responses`."""
        return self._answer(_RESPONSES, {"input": input, **fields})

    @overload
    async def arespond(self, input: Any, *, stream: Literal[True], **fields: Any) -> AsyncAnswers[Event]: ...
    @overload
    async def arespond(self, input: Any, *, stream: Literal[False] | None = None, **fields: Any) -> Response: ...
    async def arespond(self, input: Any, **fields: Any) -> Any:  # noqa: A002
        """`respond`, awaited."""
        return await self._aanswer(_RESPONSES, {"input": input, **fields})

    def embed(self, input: Any, **fields: Any) -> Embeddings:  # noqa: A002
        """A vector of each text, as of `/v1/embeddings`, of packages that embed."""
        found: Embeddings = self._answer(_EMBEDDINGS, {"input": input, **fields})
        return found

    async def aembed(self, input: Any, **fields: Any) -> Embeddings:  # noqa: A002
        """`embed`, awaited."""
        found: Embeddings = await self._aanswer(_EMBEDDINGS, {"input": input, **fields})
        return found

    def rerank(self, query: str, documents: Sequence[Any], **fields: Any) -> Ranking:
        """Documents by how relevant they are, as of `/v1/rerank`, of packages that rank."""
        found: Ranking = self._answer(_RANKINGS, {"query": query, "documents": documents, **fields})
        return found

    async def arerank(self, query: str, documents: Sequence[Any], **fields: Any) -> Ranking:
        """`rerank`, awaited."""
        found: Ranking = await self._aanswer(_RANKINGS, {"query": query, "documents": documents, **fields})
        return found

    def batch(self, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
        """The answers of many requests, in their order; in place of one that fails its error.

        Args:
            requests: fields of each. One with ``messages`` is of `chat`, with ``prompt`` of `complete`, with ``query``
                of `rerank`; one with ``input`` is of `embed` where the package embeds, else of `respond`.
        """
        host = self._opened
        return host.result(_batch(host, requests))

    async def abatch(self, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
        """`batch`, awaited."""
        host = self._opened
        return await host.awaited(_batch(host, requests))

    @property
    def _opened(self) -> Host:
        if self._closed:
            raise UsageError("the generator is closed", fix="make another one")
        if self._host is None:
            raise UsageError("the generator is not open", fix="use it in `with`, or call `open` first")
        return self._host

    def _answer(self, endpoint: _Endpoint, fields: Mapping[str, Any]) -> Any:
        host = self._opened
        found = host.result(_answered(host, endpoint, fields))
        return Answers(self, host, found) if isinstance(found, Pieces) else found

    async def _aanswer(self, endpoint: _Endpoint, fields: Mapping[str, Any]) -> Any:
        host = self._opened
        found = await host.awaited(_answered(host, endpoint, fields))
        return AsyncAnswers(self, host, found) if isinstance(found, Pieces) else found


# What runs in the event loop


async def _answered(host: Host, endpoint: _Endpoint, fields: Mapping[str, Any]) -> Any:
    """The answer, or its `Pieces`. Requests are read from JSON, so that they mean what they mean to the server."""
    given = await bodies.parse(_written({"model": host.model.name, **fields}))
    request = protocol.parse(endpoint.kind, given)
    if endpoint.pieces and getattr(request, "stream", None):
        return Pieces(await endpoint.pieces(host.models, request))
    return await endpoint.whole(host.models, request)


def _written(fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused("the request has what JSON has not", why=str(error)) from None


def _plain(value: Any) -> Any:
    """Messages and items of earlier answers are given back as they are."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"there is a {type(value).__name__} in it")


async def _batch(host: Host, requests: Sequence[Mapping[str, Any]]) -> list[BaseModel | QwenOnnxError]:
    # As many at once as find room: those of a batch are no reason to refuse one another.
    limits, most = host.model.engine.limits, host.model.engine.options.parallel
    several = any(isinstance(fields, Mapping) and _has_several(fields) for fields in requests)
    room = asyncio.Semaphore(max(1, min(most, limits.queue // runs.AT_ONCE if several else limits.queue)))

    async def one(fields: Any) -> BaseModel | QwenOnnxError:
        async with room:
            try:
                answer: BaseModel = await _answered(host, _endpoint(host.model, fields), fields)
            except QwenOnnxError as error:
                return error
            return answer

    return list(await asyncio.gather(*map(one, requests)))


def _has_several(fields: Mapping[str, Any]) -> bool:
    """Whether a request may be for several answers."""
    return any(fields.get(name) is not None for name in ("n", "best_of")) or isinstance(fields.get("prompt"), list)


def _endpoint(model: Model, fields: Any) -> _Endpoint:
    if not isinstance(fields, Mapping):
        raise Refused("a request of a batch is no mapping of fields", why=f"it is a {type(fields).__name__}")
    if fields.get("stream"):
        raise Refused("a request of a batch cannot be streamed", fix="leave it out", parameter="stream")
    for name, endpoint in _BATCHED.items():
        if name in fields:
            return endpoint
    if "input" in fields:
        return _RESPONSES if model.generates else _EMBEDDINGS
    raise Refused("a request of a batch has nothing to answer", fix=f"give one of {', '.join(_BATCHED)} and input")
