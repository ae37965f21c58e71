"""The Responses API: items become messages, and every event of an answer is one that OpenAI's own types take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from test_server import Server, eventually, serving
from test_thinking import ALWAYS

from pipeline.serve import Generator
from pipeline.serve.api import response_items
from pipeline.serve.api.protocol import (
    ChatChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
    parse,
)
from pipeline.serve.api.response_events import Building
from pipeline.serve.api.responses_protocol import (
    Event,
    FunctionCall,
    ItemEvent,
    Message,
    PieceEvent,
    Response,
    ResponseEvent,
    ResponseRequest,
    Thinking,
    WholeEvent,
)
from pipeline.serve.inference.engine import Limits
from pipeline.serve.inference.worker import Options
from pipeline.serve.refusals import Refused, TimedOut, TooLong, UnknownModel, Unsupported

slow = pytest.mark.slow
ASKED = "The quick brown fox"
FEW: dict[str, Any] = {"max_output_tokens": 8, "temperature": 0}
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def checked(events: list[Event]) -> Response:
    """The response at the end of events, each of which is one of OpenAI's, in an order that is one of theirs."""
    from openai.types.responses import Response as Theirs, ResponseStreamEvent

    theirs: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert theirs.validate_json(event.model_dump_json()).type == event.type
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert isinstance(last, ResponseEvent)
    Theirs.model_validate_json(last.response.model_dump_json())
    items = [event.item for event in events if isinstance(event, ItemEvent) and event.type.endswith(".done")]
    if last.response.status != "failed":
        assert items == last.response.output
    for index, item in enumerate(items):
        pieces = [event for event in events if isinstance(event, PieceEvent) and event.output_index == index]
        (whole,) = [event for event in events if isinstance(event, WholeEvent) and event.output_index == index]
        assert {event.item_id for event in (*pieces, whole)} == {item.id}
        text = item.arguments if isinstance(item, FunctionCall) else item.content[0].text
        assert "".join(event.delta for event in pieces) == text == (whole.arguments or whole.text or "")
        kinds = [event.type for event in events if getattr(event, "output_index", None) == index]
        ends = ["response.output_item.added", "response.output_item.done"]
        assert [kinds[0], kinds[-1]] == ends
    return last.response


# Requests


def asked(**more: Any) -> ResponseRequest:
    return parse(ResponseRequest, {"model": "m", "input": "hi", **more})


def said(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("more", "parameter", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps no prompts"),
        ({"store": True}, "store", "keeps no responses"),
        ({"background": True}, "background", "fetched later"),
        ({"truncation": "auto"}, "truncation", "drops no items"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "as they are"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "runs no tools"),
        ({"tools": [TOOL, {"type": "custom", "name": "x"}]}, "tools[1].type", "no JSON"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "runs no tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "keeps no responses"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "has not"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0]", "encrypted"),
        ({"input": [{"type": "reasoning", "summary": [{"text": "x"}]}]}, "input[0]", "summary"),
        (said({"type": "input_file", "file_id": "x"}), "input[0].content[0].type", "files are not read"),
        (said({"type": "input_image", "file_id": "x"}), "input[0].content[0].file_id", "keeps no files"),
    ],
)
def test_what_is_not_honoured_says_why(more: dict[str, Any], parameter: str, told: str) -> None:
    with pytest.raises(Unsupported) as caught:
        asked(**more)
    assert caught.value.parameter == parameter
    assert told in f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize(
    ("more", "parameter", "told"),
    [
        ({"max_tokens": 5}, "max_tokens", "did you mean `max_output_tokens`?"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "text or a list"),
        ({"input": [5]}, "input[0]", "an object"),
        ({"input": [{"content": "x"}]}, "input[0]", "with type"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0]", "'developer'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input[0].name", "is unknown"),
        (said({"type": "input_text"}), "input[0].content[0].text", "is missing"),
        (said({"type": "output_text", "text": "x"}), "input[0].content[0]", "'input_text'"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "is missing"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "matches"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'medium'"),
    ],
)
def test_a_wrong_field_is_named(more: dict[str, Any], parameter: str, told: str) -> None:
    with pytest.raises(Refused) as caught:
        asked(**more)
    assert caught.value.parameter == parameter
    assert told in str(caught.value)


def test_every_field_of_openais_is_taken_or_refused() -> None:
    from openai.types.responses import response_create_params

    theirs = set(response_create_params.ResponseCreateParamsStreaming.__annotations__)
    assert "previous_response_id" in theirs
    assert theirs <= set(ResponseRequest.model_fields) | set(ResponseRequest.refused)


def test_the_schema_of_a_request_is_one_of_openapis() -> None:
    def mappings(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            yield from ([value["discriminator"]["mapping"]] if "discriminator" in value else [])
            value = list(value.values())
        for item in value if isinstance(value, list) else []:
            yield from mappings(item)

    found = list(mappings(ResponseRequest.model_json_schema()))
    assert found
    assert all(isinstance(place, str) for mapping in found for place in mapping.values())


def test_items_become_messages() -> None:
    request = asked(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "user", "content": "b"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {**CALL, "id": "fc_1", "status": "completed"},
            {**CALL, "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "led to nothing"}]},
            {"role": "user", "content": "d"},
        ],
    )
    chat, places = response_items.conversation(request)
    told = [message.model_dump(exclude_none=True) for message in chat.messages]
    assert [message["role"] for message in told] == [
        *("system", "developer", "user", "assistant", "tool", "tool", "user")
    ]
    assert places == [None, 0, 1, 2, 6, 7, 9]
    assert told[3]["reasoning_content"] == "hm"
    assert told[3]["content"] == [{"type": "text", "text": "c"}]
    assert [one["id"] for one in told[3]["tool_calls"]] == ["c1", "c2"]


def test_only_allowed_tools_are_shown() -> None:
    other = {"type": "function", "name": "other"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    chat, _ = response_items.conversation(asked(tools=[TOOL, other], tool_choice=choice))
    assert chat.tools is not None
    assert [tool.function.name for tool in chat.tools] == ["weather"]
    assert chat.tool_choice == "required"
    with pytest.raises(Refused, match="there is no tool `weather`") as caught:
        response_items.conversation(asked(tools=[other], tool_choice=choice))
    assert caught.value.parameter == "tool_choice.tools"


def test_log_probabilities_have_to_be_included() -> None:
    with pytest.raises(Refused) as caught:
        response_items.conversation(asked(top_logprobs=2))
    assert caught.value.parameter == "top_logprobs"
    chat, _ = response_items.conversation(asked(top_logprobs=2, include=["message.output_text.logprobs"]))
    assert (chat.logprobs, chat.top_logprobs) == (True, 2)


# Events, of chunks that are given


BEGUN = Response(
    id="resp_1",
    created_at=1,
    status="in_progress",
    model="m",
    parallel_tool_calls=True,
    temperature=1,
    top_p=1,
    text={"format": {"type": "text"}},
    tool_choice="auto",
    tools=[],
)


def built(*deltas: Delta, reason: Any = "stop", logprobs: list[TokenLogprob] | None = None) -> list[Event]:
    building = Building(BEGUN)
    events = building.begin()
    for delta in (*deltas, Delta()):
        last = delta == Delta()
        told = ChatLogprobs(content=logprobs) if logprobs and delta.content else None
        choice = ChunkChoice(index=0, delta=delta, finish_reason=reason if last else None, logprobs=told)
        events += building.push(ChatChunk(id="x", created=1, model="m", choices=[choice]))
    return events + building.end()


def called(index: int, arguments: str, name: str | None = None) -> Delta:
    function = FunctionDelta(name=name, arguments=arguments)
    call = ToolCallDelta(index=index, id=f"call_{index}" if name else None, function=function)
    return Delta(tool_calls=[call])


def test_thoughts_text_and_calls_are_items_in_their_order() -> None:
    events = built(
        Delta(role="assistant", content=""),
        Delta(reasoning_content="h"),
        Delta(reasoning_content="m", content="So"),
        Delta(content=" be it."),
        called(0, "", "f"),
        called(0, '{"a":'),
        called(0, "1}"),
        called(1, "{}", "g"),
        reason="tool_calls",
    )
    response = checked(events)
    thoughts, message, first, second = response.output
    assert isinstance(thoughts, Thinking)
    assert thoughts.content[0].text == "hm"
    assert response.output_text == "So be it."
    assert isinstance(first, FunctionCall)
    assert isinstance(second, FunctionCall)
    assert [(call.call_id, call.name, call.arguments) for call in (first, second)] == [
        ("call_0", "f", '{"a":1}'),
        ("call_1", "g", "{}"),
    ]
    assert response.status == message.status == second.status == "completed"


def test_an_answer_of_nothing_is_a_message_without_text() -> None:
    response = checked(built())
    assert response.output_text == ""
    assert len(response.output) == 1


def test_an_answer_that_is_cut_is_incomplete_and_so_is_its_last_item() -> None:
    response = checked(built(Delta(reasoning_content="hm"), Delta(content="So"), reason="length"))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["completed", "incomplete"]
    assert response.completed_at is None


def test_log_probabilities_are_those_of_the_text() -> None:
    tokens = [
        TokenLogprob(token=text, logprob=-1.0, bytes=list(text.encode()), top_logprobs=[])
        for text in ("</think>", "\n\n", "So")
    ]
    (message,) = checked(built(Delta(content="So"), logprobs=tokens)).output
    assert isinstance(message, Message)
    assert [one.token for one in message.content[0].logprobs] == ["So"]


# Answers of a model


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Iterator[Generator]:
    with Generator(tiny_package, options=Options(threads=1)) as opened:
        yield opened


@slow
def test_an_answer_is_that_of_a_chat_completion_and_of_its_stream(model: Generator) -> None:
    from openai.types.responses import Response as Theirs

    chat = model.chat([{"role": "user", "content": ASKED}], max_tokens=8, temperature=0)
    whole = model.respond(ASKED, instructions=None, metadata={"a": "b"}, **FEW)
    streamed = checked(list(model.respond(ASKED, stream=True, **FEW)))
    assert whole.output_text == streamed.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.total_tokens == streamed.usage.total_tokens == chat.usage.total_tokens
    assert (whole.status, whole.metadata, whole.store) == ("incomplete", {"a": "b"}, False)
    assert (whole.temperature, whole.max_output_tokens) == (0, 8)
    theirs = Theirs.model_validate_json(whole.model_dump_json())
    assert theirs.output_text == whole.output_text
    assert len({whole.id, streamed.id}) == 2


@slow
def test_a_function_is_called_and_its_answer_is_read(model: Generator) -> None:
    given: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "temperature": 0, "parallel_tool_calls": False}
    streamed = checked(list(model.respond(ASKED, stream=True, **given)))
    whole = model.respond(ASKED, **given)
    for response in (streamed, whole):
        (call,) = [item for item in response.output if isinstance(item, FunctionCall)]
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
        assert response.status == "completed"
        assert response.tools == [{**TOOL, "strict": False}]
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    again = [{"role": "user", "content": ASKED}, *whole.output, answer]
    after = model.respond(again, tools=[TOOL], **FEW)
    assert after.usage is not None
    assert whole.usage is not None
    assert after.usage.input_tokens > whole.usage.input_tokens
    with pytest.raises(Refused) as caught:
        model.respond([again[0], answer], tools=[TOOL], **FEW)
    assert caught.value.parameter == "input[1].call_id"


@slow
def test_an_answer_follows_a_schema(model: Generator) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = checked(list(model.respond(ASKED, text=form, temperature=0, stream=True)))
    assert json.loads(response.output_text) == {"a": 1}
    assert response.text == form


@slow
def test_log_probabilities_can_be_included(model: Generator) -> None:
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = checked(list(model.respond(ASKED, stream=True, **FEW, **more)))
    (message,) = response.output
    assert isinstance(message, Message)
    logprobs = message.content[0].logprobs
    assert len(logprobs) == 8
    assert all(len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob for one in logprobs)


@slow
@pytest.mark.parametrize(
    ("more", "kind", "parameter"),
    [
        (said({"type": "input_image", "image_url": "data:x"}), Unsupported, "input[0].content[0].image_url"),
        ({"input": "fox " * 600}, TooLong, "input"),
        ({"instructions": "fox " * 600}, TooLong, "input"),
        ({"reasoning": {"effort": "high"}}, Unsupported, "reasoning.effort"),
        ({"tool_choice": "required"}, Refused, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, Refused, "tools"),
        ({"model": "other"}, UnknownModel, "model"),
        ({"top_logprobs": 2}, Refused, "top_logprobs"),
        ({"chat_template_kwargs": {"colour": 1}}, Unsupported, "chat_template_kwargs.colour"),
        ({"input": [{"role": "assistant", "content": None}]}, Refused, "input[0].content"),
        ({"input": [CALL, {**CALL, "call_id": "c2", "arguments": "no"}]}, Refused, "input[1].arguments"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_a_model_cannot_do_is_refused_by_the_names_of_this_request(
    more: dict[str, Any], kind: type[Refused], parameter: str, stream: bool, model: Generator
) -> None:
    with pytest.raises(kind) as caught:
        model.respond(**{"input": "hi", "stream": stream, **more})
    assert caught.value.parameter == parameter
    assert "messages" not in str(caught.value)


@slow
def test_a_stream_that_is_left_early_frees_the_engine(model: Generator) -> None:
    engine = model.model.engine
    before = engine.counts.cancelled
    with model.respond(ASKED, stream=True, temperature=0) as events:
        assert [next(events).type for _ in range(5)][-1] == "response.output_text.delta"
    assert eventually(lambda: engine.running + engine.waiting == 0, 10)
    assert engine.counts.cancelled == before + 1
    assert list(events) == []
    assert model.respond(ASKED, **FEW).output_text


@slow
def test_an_answer_that_fails_on_the_way_says_so_in_its_last_event(tiny_package: Path) -> None:
    with Generator(tiny_package, options=Options(threads=1), limits=Limits(timeout=0.01)) as opened:
        response = checked(list(opened.respond(ASKED, temperature=0, stream=True)))
        assert response.status == "failed"
        assert response.error is not None
        assert response.error.code == "server_error"
        assert "takes too long" in response.error.message
        with pytest.raises(TimedOut):
            opened.respond(ASKED, temperature=0)


@pytest.fixture(scope="module")
def thinking(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    """A tiny model whose template opens the block of thoughts."""
    from pipeline.export import exporter

    checkpoint, folder = checkpoint_of("qwen3"), tmp_path_factory.mktemp("responses") / "thinking"
    folder.mkdir()
    exporter.export_genai(checkpoint, folder, {}, "CPUExecutionProvider", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    (folder / "chat_template.jinja").write_text(ALWAYS, encoding="utf-8")
    with Generator(folder, options=Options(threads=1)) as opened:
        yield opened


@slow
def test_thoughts_are_an_item_and_can_be_given_back(thinking: Generator) -> None:
    given: dict[str, Any] = {"thinking_budget": 6, "max_output_tokens": 90, "temperature": 0}
    streamed = checked(list(thinking.respond(ASKED, stream=True, **given)))
    whole = thinking.respond(ASKED, **given)
    for response in (streamed, whole):
        thoughts, message = response.output
        assert isinstance(thoughts, Thinking)
        assert isinstance(message, Message)
        assert thoughts.status == "completed"
        assert thoughts.content[0].text
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens >= 6
    assert streamed.output_text == whole.output_text
    again = [{"role": "user", "content": ASKED}, *whole.output, {"role": "user", "content": "Go on"}]
    assert thinking.respond(again, **given).output


# Over HTTP


@pytest.fixture(scope="module")
def server(tiny_package: Path) -> Iterator[Server]:
    with serving(tiny_package, "--max-tokens", "300") as started:
        yield started


@slow
def test_the_official_client_is_answered(server: Server) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(model="tiny", input=ASKED, **FEW)
        assert (whole.status, whole.object) == ("incomplete", "response")
        assert whole.output_text
        events = list(client.responses.create(model="tiny", input=ASKED, stream=True, **FEW))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == whole.output_text
        with client.responses.stream(
            model="tiny",
            input=ASKED,
            tools=[{**TOOL, "strict": True}],
            tool_choice={"type": "function", "name": "weather"},
            temperature=0,
        ) as stream:
            for _ in stream:
                pass
            (call,) = [item for item in stream.get_final_response().output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Paris"}
        with pytest.raises(openai.BadRequestError, match="max_output_tokens") as caught:
            client.responses.create(model="tiny", input=ASKED, max_output_tokens=301)
        assert caught.value.param == "max_output_tokens"
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            client.responses.create(model="tiny", input=ASKED, previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError, match="there is no model `other`"):
            client.responses.create(model="other", input=ASKED, stream=True)


@slow
def test_events_are_named_and_a_client_that_goes_frees_its_place(server: Server) -> None:
    body = {"model": "tiny", "input": ASKED, "stream": True, **FEW}
    text = server.post("/v1/responses", body).text
    events = [event.splitlines() for event in text.strip().split("\n\n") if not event.startswith(":")]
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in text
    before = server.metric("qwen_onnx_model_cancelled_total")
    with httpx.stream(
        "POST", f"{server.url}/v1/responses", json={**body, "max_output_tokens": 300}, timeout=30
    ) as answer:
        assert answer.status_code == 200
        next(answer.iter_bytes())
    assert server.calm(10)
    assert server.metric("qwen_onnx_model_cancelled_total") == before + 1
