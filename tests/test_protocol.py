"""Requests that are wrong are refused in one answer that names the field, what is expected, and the nearest name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.serve.api.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Given,
    RerankRequest,
    TokenizeRequest,
    Usage,
    parse,
)
from pipeline.serve.refusals import Refused, Unsupported

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("more", "parameter", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean `temperature`?"),
        ({"ignore_eos": True}, "ignore_eos", "`ignore_eos` is unknown"),
        ({"temperature": math.nan}, "temperature", "is NaN, and a finite number"),
        ({"top_p": math.inf}, "top_p", "finite number"),
        ({"temperature": "1"}, "temperature", 'is "1", and a number'),
        ({"temperature": 2.1}, "temperature", "at most 2"),
        ({"n": 10**6}, "n", "at most 8"),
        ({"n": True}, "n", "whole number"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "at most 100"),
        ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": {}}, "messages", "a list is expected"),
        ({"messages": [5]}, "messages[0]", "an object"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "with role"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0]", "'developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": "x", "contnet": 1}]}, "messages[0].contnet", "mean `content`?"),
        (user(5), "messages[0].content", "text or a list"),
        (user([]), "messages[0].content", "empty"),
        (user([{"type": "text", "text": 5}]), "messages[0].content[0].text", "text is expected"),
        (user([{"type": "text", "text": "x", "more": 5}]), "messages[0].content[0].more", "unknown"),
        (user([{"type": "image_url", "image_url": "x"}]), "messages[0].content[0].image_url", "an object"),
        (user([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].image_url.url", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "matches"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tool_choice": "maybe"}, "tool_choice", "'required' or an object"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"store": True}, "store", "Nothing is stored"),
        ({"service_tier": "flex"}, "service_tier", "There is one"),
        ({"stream_options": {"include": True}}, "stream_options.include", "unknown"),
    ],
)
def test_a_wrong_field_is_named(more: dict[str, Any], parameter: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(ChatRequest, CHAT | more)
    assert caught.value.parameter == parameter
    assert said in str(caught.value)
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")


@pytest.mark.parametrize("data", [None, 5, [], "x", math.nan])
def test_a_body_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(Refused, match="no JSON object"):
        parse(ChatRequest, data)


def test_all_mistakes_are_told_at_once_up_to_a_limit() -> None:
    with pytest.raises(Refused) as caught:
        parse(ChatRequest, {"temperature": -1, "n": 9, "messages": [1] * 20})
    text = str(caught.value)
    assert all(f"`{name}`" in text for name in ("model", "temperature", "n", "messages[0]"))
    assert "more" in text
    assert len(text) < 1000


def test_a_long_value_is_not_given_back() -> None:
    with pytest.raises(Refused) as caught:
        parse(ChatRequest, CHAT | {"temperature": "x" * 10_000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ChatRequest.refused)
def test_what_is_not_honoured_says_why(name: str) -> None:
    with pytest.raises(Unsupported) as caught:
        parse(ChatRequest, CHAT | {name: {}})
    assert caught.value.parameter == name
    assert caught.value.why
    parse(ChatRequest, CHAT | {name: None})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]), "sounds"),
        (user([{"type": "file", "file": {}}]), "files"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "`tool`"),
    ],
)
def test_kinds_of_content_that_openai_knows_are_unsupported(more: dict[str, Any], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        parse(ChatRequest, CHAT | more)


def test_null_is_as_good_as_leaving_a_field_out() -> None:
    names = [name for name in ChatRequest.model_fields if name not in CHAT]
    assert parse(ChatRequest, CHAT | dict.fromkeys(names)) == parse(ChatRequest, CHAT)


def test_an_answer_can_be_sent_back_as_clients_write_it() -> None:
    """The client of OpenAI writes all fields that it knows of."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", **empty}
    tool = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "5"}]}
    parse(ChatRequest, CHAT | {"messages": [message, tool]})


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_and_inputs_come_in_four_forms(prompt: Any) -> None:
    assert parse(CompletionRequest, {"model": "m", "prompt": prompt}).prompt == prompt
    assert parse(EmbeddingRequest, {"model": "m", "input": prompt}).input == prompt


@pytest.mark.parametrize("prompt", [[], [[]], [["a"]], ["a", 1], None, {}, -1, [-1], [True], [1 << 31], ["a"] * 257])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(Refused) as caught:
        parse(CompletionRequest, {"model": "m", "prompt": prompt})
    assert str(caught.value.parameter).startswith("prompt")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (RerankRequest, {"model": "m", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1}),
        (TokenizeRequest, {"content": "x", "add_special": False}),
        (EmbeddingRequest, {"model": "m", "input": "x", "encoding_format": "base64", "dimensions": 8}),
    ],
)
def test_requests_that_are_right_are_taken(kind: type[Given], data: dict[str, Any]) -> None:
    assert parse(kind, data).model_dump(exclude_none=True) == data


def test_answers_show_null_where_openai_does_and_leave_out_the_rest() -> None:
    choice = ChatChoice(index=0, message=AnswerMessage(content="x"), finish_reason="stop")
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    shown = ChatCompletion(id="i", created=1, model="m", choices=[choice], usage=usage).model_dump(mode="json")
    assert shown["choices"][0]["message"] == {"role": "assistant", "content": "x", "refusal": None}
    assert shown["choices"][0]["logprobs"] is None
    assert Delta().model_dump() == {}
