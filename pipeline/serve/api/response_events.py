"""The chunks of a chat completion as the items of a response, and the events that tell of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.serve.api.answers import identifier
from pipeline.serve.api.protocol import ChatChunk, ChunkChoice, TokenLogprob, ToolCallDelta, Usage
from pipeline.serve.api.responses_protocol import (
    Event,
    FunctionCall,
    IncompleteDetails,
    InputDetails,
    ItemEvent,
    Message,
    OutputDetails,
    OutputItemOf,
    OutputText,
    PartEvent,
    PieceEvent,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseUsage,
    Status,
    Thinking,
    Thoughts,
    WholeEvent,
)

_TEXT, _REASONING, _CALL = "output_text", "reasoning_text", "function_call_arguments"
_PREFIXES = {_TEXT: "msg", _REASONING: "rs", _CALL: "fc"}


@dataclass
class _Open:
    """The item that is being written; of a call its id and name as well."""

    kind: str
    call: tuple[str, str] = ("", "")
    id: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = identifier(_PREFIXES[self.kind]).replace("-", "_")

    def part(self, begun: bool = False) -> OutputText | Thoughts:
        text = "" if begun else "".join(self.text)
        if self.kind == _REASONING:
            return Thoughts(text=text)
        return OutputText(text=text, logprobs=[] if begun else self.logprobs)

    def item(self, status: Status) -> OutputItemOf:
        begun = status == "in_progress"
        if self.kind == _CALL:
            arguments = "".join(self.text)
            return FunctionCall(id=self.id, status=status, call_id=self.call[0], name=self.call[1], arguments=arguments)
        part = self.part()
        if isinstance(part, Thoughts):
            return Thinking(id=self.id, status=status, content=[] if begun else [part])
        return Message(id=self.id, status=status, content=[] if begun else [part])


class Building:
    """A response that grows: chunks go in, events come out, and `response` is what there is of it.

    Args:
        begun: the response before anything of it is there.
    """

    def __init__(self, begun: Response) -> None:
        self.response = begun
        self._open: _Open | None = None
        self._items: list[OutputItemOf] = []
        self._events: list[Event] = []
        self._number = 0
        self._cut = False

    def begin(self) -> list[Event]:
        """The events before the first piece."""
        self._tell(ResponseEvent, "response.created", response=self.response)
        self._tell(ResponseEvent, "response.in_progress", response=self.response)
        return self._told()

    def push(self, chunk: ChatChunk) -> list[Event]:
        """What a chunk tells."""
        for choice in chunk.choices:
            self._take(choice)
        if chunk.usage:
            self.response = self.response.model_copy(update={"usage": _usage(chunk.usage)})
        return self._told()

    def end(self) -> list[Event]:
        """The events at the end of an answer that came to one."""
        if not self._items and self._open is None:
            self._begin(_TEXT)  # an answer of nothing is a message without text
        status: Status = "incomplete" if self._cut else "completed"
        self._close(status)
        self._finish(status, incomplete_details=IncompleteDetails() if self._cut else None)
        return self._told()

    def fail(self, error: ResponseError) -> Event:
        """The last event of an answer that came to no end; what was written of it stays."""
        if self._open is not None:
            self._items.append(self._open.item("incomplete"))
            self._open = None
        self._finish("failed", error=error)
        return self._told()[0]

    def _take(self, choice: ChunkChoice) -> None:
        delta, logprobs = choice.delta, choice.logprobs.content if choice.logprobs else []
        if delta.reasoning_content:
            self._write(_REASONING, delta.reasoning_content)
        if delta.content:
            self._write(_TEXT, delta.content, logprobs)
        for call in delta.tool_calls or ():
            self._call(call)
        self._cut = self._cut or choice.finish_reason == "length"

    def _call(self, delta: ToolCallDelta) -> None:
        if delta.id is not None:
            self._begin(_CALL, (delta.id, delta.function.name or ""))
        if delta.function.arguments:
            self._piece(delta.function.arguments)

    def _write(self, kind: str, text: str, logprobs: Sequence[TokenLogprob] = ()) -> None:
        told = list(logprobs)
        if self._open is None or self._open.kind != kind:
            self._begin(kind)
            told = _of_text(told, text)
        self._piece(text, told)

    def _begin(self, kind: str, call: tuple[str, str] = ("", "")) -> None:
        self._close("completed")
        self._open = _Open(kind, call)
        self._tell(
            ItemEvent, "response.output_item.added", output_index=self._index, item=self._open.item("in_progress")
        )
        if kind != _CALL:
            self._tell(PartEvent, "response.content_part.added", **self._place, part=self._open.part(begun=True))

    def _piece(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> None:
        assert self._open is not None
        self._open.text.append(text)
        self._open.logprobs += logprobs
        self._tell(
            PieceEvent, f"response.{self._open.kind}.delta", **self._where, delta=text, **self._told_of(logprobs)
        )

    def _close(self, status: Status) -> None:
        """End the item that is open."""
        ended = self._open
        if ended is None:
            return
        text = "".join(ended.text)
        if ended.kind == _CALL:
            whole: dict[str, Any] = {"arguments": text, "name": ended.call[1]}
        else:
            whole = {"text": text, **self._told_of(ended.logprobs)}
        self._tell(WholeEvent, f"response.{ended.kind}.done", **self._where, **whole)
        if ended.kind != _CALL:
            self._tell(PartEvent, "response.content_part.done", **self._place, part=ended.part())
        item = ended.item(status)
        self._tell(ItemEvent, "response.output_item.done", output_index=self._index, item=item)
        self._items.append(item)
        self._open = None

    def _finish(self, status: str, **more: Any) -> None:
        done = {"completed_at": int(time.time())} if status == "completed" else {}
        update = {"status": status, "output": self._items, **done, **more}
        self.response = self.response.model_copy(update=update)
        self._tell(ResponseEvent, f"response.{status}", response=self.response)

    @property
    def _index(self) -> int:
        return len(self._items)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": self._index}

    @property
    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return self._place | ({} if self._open.kind == _CALL else {"content_index": 0})

    def _told_of(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Events of text have log-probabilities, none when they were not asked for."""
        return {"logprobs": list(logprobs)} if self._open and self._open.kind == _TEXT else {}

    def _tell(self, kind: type[Event], name: str, /, **fields: Any) -> None:
        self._events.append(kind(type=name, sequence_number=self._number, **fields))
        self._number += 1

    def _told(self) -> list[Event]:
        told, self._events = self._events, []
        return told


def _of_text(logprobs: Sequence[TokenLogprob], text: str) -> list[TokenLogprob]:
    """The last tokens that ``text`` needs: those before ended the thoughts or made a call."""
    wanted, found = len(text.encode()), 0
    for index in range(len(logprobs) - 1, -1, -1):
        found += len(logprobs[index].bytes)
        if found >= wanted:
            return list(logprobs[index:])
    return list(logprobs)


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )
