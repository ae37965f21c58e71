"""Events of the model's process as chunks and completions: what is streamed adds up to the whole."""

from __future__ import annotations

import json

import pytest

from pipeline.runtime.thinking import Splitter
from pipeline.serve.api import answers
from pipeline.serve.api.answers import ChatAnswer, PlainAnswer
from pipeline.serve.events import LENGTH, STOP, End, Event, Piece, Prefilled
from pipeline.serve.inference.tool_calls import ToolCalls

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLED = 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


def events_of(text: str, size: int, reason: str = STOP) -> list[Event]:
    pieces = [text[place : place + size] for place in range(0, len(text), size)]
    return [Prefilled(5, 5, 3), *(Piece(7, piece) for piece in pieces), End(reason, "", 5, 3, len(pieces))]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_message_has_thoughts_text_and_calls_however_it_is_cut(size: int) -> None:
    answer = ChatAnswer(0, Splitter(), ToolCalls(TOOLS))
    events = events_of(f"<think>\nhm\n</think>\n\n{CALLED}", size)
    chunks = [chunk for event in events if (chunk := answer.push(event))]
    whole = answer.choice()
    assert (whole.message.reasoning_content, whole.message.content) == ("hm", "Let me see.")
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": "é"})
    deltas = [chunk.delta for chunk in chunks]
    assert "".join(delta.reasoning_content or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    entries = [entry for delta in deltas for entry in delta.tool_calls or ()]
    assert [entry.id for entry in entries if entry.id] == [call.id]
    assert "".join(entry.function.arguments or "" for entry in entries) == call.function.arguments
    assert all(len(delta.tool_calls or ()) <= 1 for delta in deltas)


def test_tokens_of_thoughts_are_counted() -> None:
    answer = ChatAnswer(0, Splitter(inside=True))
    for event in [Piece(1, "a"), Piece(1, "b"), Piece(1, "</think>"), Piece(1, "\n\nc"), End(LENGTH, "d", 9, 4, 4)]:
        answer.push(event)
    assert answer.choice().message.content == "cd"
    assert answer.choice().finish_reason == "length"
    found = answers.usage([[answer.counts, answer.counts]])
    assert (found.prompt_tokens, found.completion_tokens, found.total_tokens) == (9, 8, 17)
    assert found.prompt_tokens_details.cached_tokens == 4
    assert found.completion_tokens_details.reasoning_tokens == 6


def test_an_answer_of_nothing_but_a_call_has_no_content() -> None:
    answer = ChatAnswer(0, None, ToolCalls(TOOLS))
    for event in events_of(CALLED.removeprefix("Let me see.\n"), 3):
        answer.push(event)
    assert answer.choice().message.content is None


def test_without_tools_a_call_is_text() -> None:
    answer = ChatAnswer(0)
    for event in events_of(CALLED, 4):
        answer.push(event)
    assert answer.choice().message.content == CALLED
    assert answer.choice().message.tool_calls is None


def test_a_plain_answer_adds_up_and_begins_with_what_it_was_asked_to() -> None:
    answer = PlainAnswer(3, "once ")
    events: list[Event] = [Piece(1, "a", -1.0), Piece(1, "", -2.0), Piece(1, "b", -3.0), End(STOP, "c", 2, 0, 3)]
    chunks = [chunk for event in events if (chunk := answer.push(event))]
    assert "".join(chunk.text for chunk in chunks) == answer.choice(0).text == "once abc"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert answer.likelihood == -2.0
