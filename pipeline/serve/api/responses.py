"""`/v1/responses`, free of HTTP: items become the messages of a chat completion, and its answer items and events."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from pipeline.errors import QwenOnnxError, UsageError
from pipeline.serve.api import answers, chat, response_items
from pipeline.serve.api.protocol import ChatChunk, ChatRequest
from pipeline.serve.api.response_events import Building
from pipeline.serve.api.responses_protocol import CallItem, Event, Response, ResponseError, ResponseRequest
from pipeline.serve.api.runs import Chunks
from pipeline.serve.inference.models import Models
from pipeline.serve.refusals import RateLimited, Refused

# Fields that chat completions have under other names.
_NAMES = {
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}


async def complete(models: Models, request: ResponseRequest, client: str = "") -> Response:
    """The whole answer; raises as `pipeline.serve.api.chat.complete` does, in the terms of this request."""
    opened = await stream(models, request, client)
    try:
        return await opened.whole()
    finally:
        await opened.aclose()


async def stream(models: Models, request: ResponseRequest, client: str = "") -> Events:
    """The answer in events; what can be refused is refused before there is one, and raises as `complete` does."""
    asked, places = response_items.conversation(request)
    model, _ = models.find(request.model)
    try:
        chunks = await chat.stream(models, asked, client)
    except Refused as error:
        raise _translated(error, request, places) from None
    return Events(chunks, Building(_begun(request, asked, model.search)))


class Events:
    """The events of a response. `aclose` them when they are left early, which gives the answer up.

    An answer that fails on the way ends with `response.failed`; a bug raises.
    """

    def __init__(self, chunks: Chunks[ChatChunk], building: Building) -> None:
        self._chunks, self._building = chunks, building
        self._events = self._made()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Give up what has not ended."""
        await self._chunks.aclose()
        await self._events.aclose()

    async def whole(self) -> Response:
        """The response at its end; raises what made it fail."""
        async for chunk in self._chunks:
            self._building.push(chunk)
        self._building.end()
        return self._building.response

    async def _made(self) -> AsyncGenerator[Event, None]:
        for event in self._building.begin():
            yield event
        try:
            async for chunk in self._chunks:
                for event in self._building.push(chunk):
                    yield event
        except QwenOnnxError as error:
            yield self._building.fail(_failure(error))
            return
        for event in self._building.end():
            yield event


def _failure(error: QwenOnnxError) -> ResponseError:
    text = ": ".join(part for part in (error.what, error.why) if part)
    if isinstance(error, RateLimited):
        return ResponseError(code="rate_limit_exceeded", message=text, type=error.kind)
    if isinstance(error, UsageError) or (isinstance(error, Refused) and error.status < 500):
        return ResponseError(code="invalid_prompt", message=text, type="invalid_request_error")
    return ResponseError(code="server_error", message=text, type="server_error")


def _begun(request: ResponseRequest, asked: ChatRequest, search: dict[str, Any]) -> Response:
    """The response before anything of it is there, with what was asked and what it means where nothing was."""

    def chosen(name: str) -> float:
        given = getattr(request, name)
        return float(search.get(name, 1.0) if given is None else given)

    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    choice = request.tool_choice
    return Response(
        id=answers.identifier("resp").replace("-", "_"),
        created_at=int(time.time()),
        status="in_progress",
        model=request.model,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning={"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
        temperature=chosen("temperature"),
        top_p=chosen("top_p"),
        top_logprobs=asked.top_logprobs or 0,
        text={"format": {"type": "text"}} | text,
        tool_choice=choice or "auto" if isinstance(choice, str | None) else choice.model_dump(),
        tools=[
            tool.model_dump(exclude_none=True) | {"parameters": tool.parameters, "strict": bool(tool.strict)}
            for tool in request.tools or ()
        ],
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )


def _translated(error: Refused, request: ResponseRequest, places: Sequence[int | None]) -> Refused:
    """What chat completions refuse, by the names that this request has for it."""

    def called(match: re.Match[str]) -> str:
        """A call, which is an item of its own: one of those from the first item of its message on."""
        first = places[int(match[1])] or 0
        calls = [index for index, item in enumerate(request.input) if index >= first and isinstance(item, CallItem)]
        return f"input[{calls[int(match[2])]}]"

    def named(text: str) -> str:
        text = re.sub(r"messages\[(\d+)\]\.tool_calls\[(\d+)\]\.function", called, _renamed(text))
        return re.sub(r"messages(\[(\d+)\])?", lambda match: _place(match[2], request, places), text)

    return type(error)(
        _sentence(error.what, named),
        where=error.where,
        why=error.why,
        fix=_sentence(error.fix, named),
        parameter=named(error.parameter) if error.parameter else None,
        retry_after=error.retry_after,
    )


def _renamed(text: str) -> str:
    for name, own in _NAMES.items():
        text = re.sub(rf"(?<![\w.]){name}(?!\w)", own, text)
    return text.replace("].tool_call_id", "].call_id")


def _sentence(text: str, named: Any) -> str:
    """A sentence whose names in backticks are translated."""
    return re.sub(r"`[^`]*`", lambda match: named(match[0]), text)


def _place(index: str | None, request: ResponseRequest, places: Sequence[int | None]) -> str:
    if index is None or isinstance(request.input, str):
        return "input"
    item = places[int(index)]
    return "instructions" if item is None else f"input[{item}]"
