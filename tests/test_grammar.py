"""Grammars of answers: what they allow follows the schema, and what cannot be followed is refused."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.serve.inference import schemas
from pipeline.serve.inference.grammar import Constraint, response_grammar, tools_grammar
from pipeline.serve.inference.tool_calls import XML, CallArguments, CallBegin, Text, ToolCalls
from pipeline.serve.refusals import Refused, Unsupported

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "kind": {"enum": ["a", "b \u00e9", None, 3]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,4}$"}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "kind", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": 0, "maximum": 10}]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
REAL = os.environ.get("QWEN_ONNX_TOKENIZER", "")


def formatted(schema: Any, strict: bool | None = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of tiny checkpoints, with tokens for calls as Qwen's has them; or one that is named."""
    if REAL:
        return Path(REAL)
    from tiny import make_tokenizer
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, more=("<|more|>",))
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


class Walk:
    """Random answers of a grammar."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.path, self.read = path, Tokenizer.from_file(str(path))
        self.size = self.read.get_vocab_size()
        self.vocabulary = self.size + 271  # models have more logits than tokens
        self.eos = (self.read.token_to_id("<|im_end|>"), self.read.token_to_id("<|endoftext|>"))

    def constraint(self, grammar: str) -> Constraint:
        return Constraint(grammar, self.path, self.vocabulary, self.eos)

    def answer(self, grammar: str, draw: random.Random, most: int = 400) -> tuple[str, bool]:
        """A text of random allowed tokens, and whether it came to an end; closing characters are likelier."""
        constraint, ids = self.constraint(grammar), []
        while len(ids) < most:
            if constraint.done:
                return self.text(ids), True
            allowed = constraint.allowed()
            assert allowed.shape == (self.vocabulary,)
            assert not allowed[self.size :].any()
            choices = np.flatnonzero(allowed)
            closing = [token for token in map(self.read.token_to_id, '"}],') if token is not None and allowed[token]]
            token = int(draw.choice(closing if closing and draw.random() < 0.3 else choices))
            if token in self.eos:
                return self.text(ids), True
            constraint.take(token)
            ids.append(token)
        return self.text(ids), False

    def text(self, ids: list[int]) -> str:
        return str(self.read.decode(ids, skip_special_tokens=False))

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether an answer may be ``text``."""
        constraint = self.constraint(grammar)
        for token in self.read.encode(text, add_special_tokens=False).ids:
            if not constraint.allowed()[token]:
                return False
            constraint.take(token)
        return bool(constraint.allowed()[list(self.eos)].all())


@pytest.fixture(scope="session")
def walk(tokenizer_json: Path) -> Walk:
    return Walk(tokenizer_json)


def test_random_answers_follow_their_schema(walk: Walk) -> None:
    grammar = response_grammar(formatted(SCHEMA))
    draw = random.Random(0)
    for _ in range(30):
        text, ended = walk.answer(grammar, draw)
        assert ended
        value = json.loads(text)
        assert list(value) == ["name", "kind", "tags", "inner"]
        assert 1 <= len(value["name"]) <= 12
        assert value["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
        assert len(value["tags"]) <= 3
        assert all(tag.isascii() and tag.islower() and 1 <= len(tag) <= 4 for tag in value["tags"])
        assert isinstance(value["inner"], bool) or 0 <= value["inner"] <= 10
        assert "\n" not in text


def test_json_mode_is_any_object_on_one_line(walk: Walk) -> None:
    grammar = response_grammar({"type": "json_object"})
    assert walk.accepts(grammar, '{"a": [1, {"b": null}], "c": "d"}')
    for text in ("[]", "{", '{"a":1}', " {}", "{ }", "{}\n"):
        assert not walk.accepts(grammar, text)


def test_free_text_has_no_grammar() -> None:
    assert response_grammar(None) == ""
    assert response_grammar({"type": "text"}) == ""
    assert tools_grammar([]) == ""


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


GOOD = call("weather", '{"city": "Ulm", "days": 3}')
BAD = call("weather", '{"town": "Ulm"}')


def test_with_auto_text_is_free_and_calls_follow_their_schema(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS)
    for text in (
        "",
        "Hello {}",
        "a <tool b",
        GOOD,
        f"Hi\n{GOOD}",
        f"{GOOD}\n{GOOD} and more",
        call("weather", '{"city": "U"}'),
    ):
        assert walk.accepts(grammar, text), text
    for text in (BAD, f"Hi {BAD}", call("other", "{}"), f"{GOOD}\n{BAD}", "<tool_call>", "<tool_call>\nHi"):
        assert not walk.accepts(grammar, text), text


def test_one_call_at_a_time(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS, "auto", parallel=False)
    assert walk.accepts(grammar, f"Hi\n{GOOD}")
    assert walk.accepts(grammar, "Hi")
    assert not walk.accepts(grammar, f"{GOOD}\n{GOOD}")
    grammar = tools_grammar(TOOLS, "required", parallel=False)
    assert walk.accepts(grammar, GOOD)
    assert not walk.accepts(grammar, f"{GOOD}\n{GOOD}")


def test_a_required_call_is_made(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS, "required")
    assert walk.accepts(grammar, GOOD)
    assert walk.accepts(grammar, f"{GOOD}\n{GOOD}")
    for text in ("", "Hi", f"Hi {GOOD}", BAD, f"{GOOD} Hi"):
        assert not walk.accepts(grammar, text), text
    draw = random.Random(1)
    for _ in range(10):
        text, ended = walk.answer(tools_grammar(TOOLS, "required", parallel=False), draw)
        parser = ToolCalls(TOOLS)
        begin, arguments = [*parser.push(text), *parser.rest()]
        assert ended
        assert isinstance(begin, CallBegin)
        assert isinstance(arguments, CallArguments)
        value = json.loads(arguments.text)
        if begin.name == "weather":
            assert set(value) <= {"city", "days"}
            assert len(value["city"]) <= 9
            assert 1 <= value.get("days", 1) <= 9
        else:
            assert value == {}


def test_a_named_function_is_called_once(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS, {"type": "function", "function": {"name": "now"}})
    assert walk.accepts(grammar, call("now", "{}"))
    assert not walk.accepts(grammar, GOOD)
    constraint = walk.constraint(grammar)
    ids: list[int] = []
    while not constraint.done:
        forced = constraint.forced() or [int(np.flatnonzero(constraint.allowed())[0])]
        for token in forced:
            assert constraint.allowed()[token]
            constraint.take(token)
        ids += forced
    assert walk.text(ids) == call("now", "{}")


def test_allowed_tools_are_those_that_may_be_called(walk: Walk) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    grammar = tools_grammar(TOOLS, {"type": "allowed_tools", "allowed_tools": allowed})
    assert walk.accepts(grammar, call("now", "{}"))
    assert not walk.accepts(grammar, GOOD)


def test_none_is_text_without_calls(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS, "none")
    assert walk.accepts(grammar, "Hello <b> {}")
    assert not walk.accepts(grammar, f"Hi {GOOD}")


def test_tools_and_a_response_format_are_either_of_them(walk: Walk) -> None:
    grammar = tools_grammar(TOOLS, "auto", response_format={"type": "json_object"})
    assert walk.accepts(grammar, '{"a": 1}')
    assert walk.accepts(grammar, GOOD)
    assert not walk.accepts(grammar, "Hi")


def test_control_tokens_and_ids_beyond_the_vocabulary_are_never_allowed(walk: Walk) -> None:
    constraint = walk.constraint(tools_grammar(TOOLS, "none"))
    allowed = constraint.allowed()
    special = [index for index, token in walk.read.get_added_tokens_decoder().items() if token.special]
    assert set(np.flatnonzero(allowed[special])) == {special.index(token) for token in walk.eos}
    assert not allowed[walk.size :].any()
    assert constraint.allowed() is not None
    with pytest.raises(UsageError, match="cannot follow its grammar"):
        walk.constraint(response_grammar({"type": "json_object"})).take(walk.read.token_to_id("a"))


def test_grammars_that_are_no_grammars_are_named(walk: Walk) -> None:
    with pytest.raises(UsageError, match="cannot be compiled"):
        walk.constraint("start: nothing")


NESTED: dict[str, Any] = {"type": "string"}
for _ in range(40):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
LONG = {"enum": [f"value {index}" for index in range(9000)]}


@pytest.mark.parametrize(
    ("schema", "kind", "said"),
    [
        ({"$ref": "http://example.com/x.json"}, Unsupported, "another document"),
        ({"$ref": "file:///etc/passwd"}, Unsupported, "another document"),
        ({"properties": {"a": {"items": {"$ref": "other.json"}}}}, Unsupported, "another document"),
        (NESTED, Refused, "nested too deep"),
        (LONG, Refused, "too large"),
        (True, Refused, "has to be an object"),
        ({"type": "strin"}, Refused, "strin"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, Refused, "no finite value"),
        ({"$ref": "#"}, Refused, "no finite value"),
        ({"enum": []}, Refused, "empty"),
        ({"type": "object", "x-guidance": {"whitespace_flexible": True}}, Refused, "x-guidance"),
        ({"type": "array", "uniqueItems": True}, Unsupported, "uniqueItems"),
        ({"not": {"type": "string"}}, Unsupported, "not"),
        ({"type": "string", "format": "foo"}, Unsupported, "foo"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, Unsupported, "oneOf"),
        ({"type": "string", "pattern": "^(?=a)b"}, Unsupported, "look-around"),
    ],
)
def test_what_cannot_be_followed_is_refused(schema: Any, kind: type[Refused], said: str) -> None:
    with pytest.raises(kind, match=r"(?s).*" + said) as caught:
        response_grammar(formatted(schema))
    assert caught.value.parameter == "response_format.json_schema.schema"


def test_without_strict_keywords_that_no_grammar_has_are_left_to_the_model(walk: Walk) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    grammar = response_grammar(formatted(schema, strict=None))
    assert walk.accepts(grammar, "[1, 1]")
    assert not walk.accepts(grammar, '["a"]')


@pytest.mark.parametrize(
    ("arguments", "kind", "parameter"),
    [
        ((TOOLS, "sometimes"), Refused, "tool_choice"),
        ((TOOLS, {"type": "function", "function": {"name": "x"}}), Refused, "tool_choice"),
        ((TOOLS, {"type": "custom"}), Unsupported, "tool_choice"),
        (([], "required"), Refused, "tool_choice"),
        (([], {"type": "function", "function": {"name": "now"}}), Refused, "tool_choice"),
        ((TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": [], "tools": []}}), Unsupported, "tool_choice"),
        (
            (TOOLS, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["now"]}}),
            Refused,
            "tool_choice",
        ),
        ((TOOLS * 100, "auto"), Refused, "tools"),
        ((TOOLS * 2, "auto"), Refused, "tools[2].function.name"),
        (([{"type": "custom", "custom": {}}],), Unsupported, "tools[0]"),
        (([{"type": "function", "function": {"name": "a b"}}],), Refused, "tools[0].function.name"),
        (
            ([*TOOLS, {"function": {"name": "x", "parameters": {"type": "array"}}}],),
            Refused,
            "tools[2].function.parameters",
        ),
        (
            ([*TOOLS, {"function": {"name": "x", "parameters": {"$ref": "a"}}}],),
            Unsupported,
            "tools[2].function.parameters",
        ),
        ((TOOLS, "auto", True, ""), Unsupported, "tools"),
        ((TOOLS[1:], "required", True, XML), Unsupported, "tool_choice"),
        ((TOOLS, "auto", True, XML), Unsupported, "tools"),
        ((TOOLS[1:], "auto", False, XML), Unsupported, "parallel_tool_calls"),
    ],
)
def test_tools_that_cannot_be_honoured_are_refused(
    arguments: tuple[Any, ...], kind: type[Refused], parameter: str
) -> None:
    with pytest.raises(kind) as caught:
        tools_grammar(*arguments)
    assert caught.value.parameter == parameter


def test_models_that_write_tags_are_free_with_auto(walk: Walk) -> None:
    assert tools_grammar(TOOLS[1:], "auto", True, XML) == ""
    grammar = tools_grammar(TOOLS[1:], "none", True, XML)
    assert not walk.accepts(grammar, "a <function=now>")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100})$"},
        {"type": "string", "pattern": ".*" + ".*a" * 50},
        {"type": "string", "pattern": "^(\\p{L}{1,1000}\\p{N}{1,1000}){1,100}$"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}": {}}}, {"properties": {f"b{i}": {}}}]} for i in range(30)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    ],
)
def test_hostile_schemas_come_to_an_end(walk: Walk, schema: dict[str, Any]) -> None:
    begin = time.monotonic()
    try:
        grammar = response_grammar(formatted(schema))
        walk.answer(grammar, random.Random(0), most=20)
    except (Refused, UsageError):
        pass
    assert time.monotonic() - begin < 10


def test_types_of_properties() -> None:
    assert schemas.types_of(SCHEMA, "name") == {"string"}
    assert schemas.types_of(SCHEMA, "inner") == {"boolean", "number"}
    assert schemas.types_of(SCHEMA, "kind") == {"string", "null", "integer"}
    assert schemas.types_of(SCHEMA, "unknown") == {"string"}
    assert schemas.types_of({"properties": {"a": {"$ref": "#/properties/a"}}}, "a") == frozenset()
    assert Text("a") != Text("b")
