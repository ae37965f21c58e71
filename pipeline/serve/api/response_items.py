"""The items of a request of the Responses API as the messages of a chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.serve.api.protocol import ChatRequest, parse
from pipeline.serve.api.responses_protocol import (
    AllowedTools,
    AssistantItem,
    CallItem,
    FunctionChoice,
    GivenRefusal,
    InputItem,
    InputText,
    OutputItem,
    ReasoningItem,
    ResponseRequest,
    SystemItem,
    UserItem,
)
from pipeline.serve.refusals import Refused

# What both requests have, and mean the same by.
_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "parallel_tool_calls",
    "enable_thinking",
    "thinking_budget",
    "chat_template_kwargs",
    "cache_prompt",
)


def conversation(request: ResponseRequest) -> tuple[ChatRequest, list[int | None]]:
    """The streamed chat completion that a request asks for, and of each message the item that it begins with.

    The place is None of a message that is none of the items: the instructions.

    Raises:
        Refused: what is asked contradicts itself.
    """
    messages, places = _messages(request)
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    given |= {
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "response_format": _form(request),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    given |= _tools(request) | _logprobs(request)
    return parse(ChatRequest, {name: value for name, value in given.items() if value is not None}), places


def _logprobs(request: ResponseRequest) -> dict[str, Any]:
    if request.include:
        return {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.top_logprobs:
        raise Refused(
            "`top_logprobs` needs `message.output_text.logprobs` in `include`",
            fix="add it, or leave `top_logprobs` out",
            parameter="top_logprobs",
        )
    return {}


def _form(request: ResponseRequest) -> dict[str, Any] | None:
    form = request.text.format if request.text else None
    if form is None:
        return None
    given = form.model_dump(by_alias=True, exclude_none=True)
    kind = given.pop("type")
    return {"type": kind} | ({kind: given} if given else {})


def _tools(request: ResponseRequest) -> dict[str, Any]:
    choice = request.tool_choice
    tools = request.tools or []
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        if missing := sorted(allowed - {tool.name for tool in tools}):
            raise Refused(f"there is no tool `{missing[0]}`", parameter="tool_choice.tools")
        tools = [tool for tool in tools if tool.name in allowed]
    described = [
        {
            "type": "function",
            "function": tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True),
        }
        for tool in tools
    ]
    return {"tools": described or None, "tool_choice": _choice(choice)}


def _choice(choice: Any) -> Any:
    if isinstance(choice, AllowedTools):
        return choice.mode
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


@dataclass
class _Turn:
    """An answer of the model's: thoughts, text and calls, in the order in which it can only have written them."""

    place: int
    thoughts: list[str] = field(default_factory=list)
    content: list[dict[str, Any]] | str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def takes(self, item: InputItem) -> bool:
        """Whether an item can be of the same answer."""
        if isinstance(item, ReasoningItem):
            return self.content is None and not self.calls
        if isinstance(item, AssistantItem):
            return self.content is None and not self.calls
        return isinstance(item, CallItem)

    def add(self, item: InputItem) -> None:
        if isinstance(item, ReasoningItem):
            self.thoughts += [part.text for part in item.content or ()]
        elif isinstance(item, AssistantItem):
            self.content = item.content if isinstance(item.content, str) else _answered(item.content)
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            self.calls.append({"id": item.call_id, "type": "function", "function": function})

    def message(self) -> dict[str, Any] | None:
        """None for thoughts that led to nothing."""
        if self.content is None and not self.calls:
            return None
        more: dict[str, Any] = {"tool_calls": self.calls} if self.calls else {}
        if self.thoughts:
            more["reasoning_content"] = "\n".join(self.thoughts)
        return {"role": "assistant", "content": self.content, **more}


def _messages(request: ResponseRequest) -> tuple[list[dict[str, Any]], list[int | None]]:
    messages: list[dict[str, Any]] = []
    places: list[int | None] = []
    turn: _Turn | None = None

    def told(message: dict[str, Any], place: int | None) -> None:
        messages.append(message)
        places.append(place)

    def ended(turn: _Turn | None) -> None:
        if turn and (message := turn.message()):
            told(message, turn.place)

    if request.instructions is not None:
        told({"role": "system", "content": request.instructions}, None)
    if isinstance(request.input, str):
        told({"role": "user", "content": request.input}, 0)
        return messages, places
    for index, item in enumerate(request.input):
        if isinstance(item, ReasoningItem | AssistantItem | CallItem):
            if turn is None or not turn.takes(item):
                ended(turn)
                turn = _Turn(index)
            turn.add(item)
            continue
        ended(turn)
        turn = None
        told(_said(item), index)
    ended(turn)
    if not messages:
        raise Refused("the input has nothing but thoughts", fix="say something", parameter="input")
    return messages, places


def _said(item: SystemItem | UserItem | OutputItem) -> dict[str, Any]:
    if isinstance(item, OutputItem):
        named = {"name": item.name} if item.name else {}
        return {"role": "tool", "tool_call_id": item.call_id, "content": _parts(item.output), **named}
    return {"role": item.role, "content": _parts(item.content)}


def _parts(content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    found: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, InputText):
            found.append({"type": "text", "text": part.text})
        else:
            address = {"url": part.image_url, "detail": part.detail}
            found.append({"type": "image_url", "image_url": address})
    return found


def _answered(content: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, GivenRefusal)
        else {"type": "text", "text": part.text}
        for part in content
    ]
