"""Calls of tools in text that streams: what is a call, what is text, and that cuts make no difference."""

from __future__ import annotations

import json
import random
from itertools import groupby
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE

from pipeline.serve.inference.tool_calls import HERMES, XML, CallArguments, CallBegin, Text, ToolCalls, form_of

pytestmark = pytest.mark.unit

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"$ref": "#/$defs/ratio"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "$defs": {"ratio": {"type": "number"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g"}},
]


def read(pieces: Any, form: str = HERMES) -> list[tuple[str, ...]]:
    """What a parser tells of pieces, neighbours of a kind as one: ("text", ...), ("call", name, arguments)."""
    parser = ToolCalls(TOOLS, form)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.rest()
    rows: list[tuple[str, ...]] = []
    indices = []
    for kind, group in groupby(deltas, key=type):
        for delta in group:
            if isinstance(delta, CallBegin):
                assert delta.id.startswith("call_")
                indices.append(delta.index)
                rows.append(("call", delta.name, ""))
            elif isinstance(delta, CallArguments):
                assert delta.index == len(indices) - 1
                assert delta.text
                rows[-1] = ("call", rows[-1][1], rows[-1][2] + delta.text)
            elif rows and rows[-1][0] == "text":
                rows[-1] = ("text", rows[-1][1] + delta.text)
            else:
                rows.append(("text", delta.text))
        assert kind in {Text, CallBegin, CallArguments}
    assert indices == list(range(parser.calls))
    return rows


def hermes(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    rows = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{rows}</function>\n</tool_call>"


TRICKY = (
    r'{"text": "}{ \" \\ </tool_call> <tool_call>{\"name\": [\u00e9]", "items": [{"a": [1, -2.5e3, true, null]}, {}]}'
)

GOOD = [
    (hermes("{}"), [("call", "f", "{}")]),
    (hermes(TRICKY), [("call", "f", TRICKY)]),
    (hermes('{"text": "äöü 漢字 🎉"}'), [("call", "f", '{"text": "äöü 漢字 🎉"}')]),
    ("Let me see.\n" + hermes('{"count": 1}'), [("text", "Let me see."), ("call", "f", '{"count": 1}')]),
    (
        hermes("{}") + "\n" + hermes("{}", "g") + "\n",
        [("call", "f", "{}"), ("call", "g", "{}")],
    ),
    (
        hermes("{}") + "\nand\n" + hermes("{}", "g") + " so",
        [("call", "f", "{}"), ("text", "\nand"), ("call", "g", "{}"), ("text", " so")],
    ),
    ('<tool_call>{"arguments": {"count": 3}, "name": "f"}</tool_call>', [("call", "f", '{"count": 3}')]),
    ('<tool_call>{"name": "f"}</tool_call>', [("call", "f", "{}")]),
    (hermes("null"), [("call", "f", "{}")]),
    (hermes('""'), [("call", "f", "{}")]),
    (hermes(json.dumps('{"text": "a \\"b\\""}')), [("call", "f", '{"text": "a \\"b\\""}')]),
    (hermes('{"text": "two\nlines\t"}'), [("call", "f", '{"text": "two\\nlines\\t"}')]),  # which is no JSON
    ('<tool_call>\n{"name": "f", "arguments": {}}', [("call", "f", "{}")]),  # the closing tag is missing
    (
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}',
        [("call", "f", "{}"), ("call", "g", "{}")],
    ),
    ("a < b <tool <tool_call", [("text", "a < b <tool <tool_call")]),
    (" \n", [("text", " \n")]),
    ("", [("text", "")]),
]

BROKEN = [
    '<tool_call>\n{"name": "f", "argu',
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": "no object"}\n</tool_call>',
    '<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>',
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": 5}\n</tool_call>',
    '<tool_call>\n{"arguments": {"a": 1,}, "name": "f"}\n</tool_call>',
    '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "text <tool_call> </tool_call> text",
    "  <tool_call>",
    '<tool_call>{"name": "f", "arguments": "\\ud800{}"}</tool_call>',
]


def cuts(text: str) -> list[list[str]]:
    """A text in pieces: whole, each character, each cut in two, and at random."""
    draw = random.Random(0)
    found = [[text], list(text)] + [[text[:cut], text[cut:]] for cut in range(1, len(text))]
    for _ in range(20):
        places = sorted(draw.sample(range(len(text) + 1), min(5, len(text))))
        found.append([text[start:end] for start, end in zip([0, *places], [*places, None], strict=True)])
    return found


def plain(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [row for row in rows if row != ("text", "")]


@pytest.mark.parametrize(("text", "expected"), GOOD)
def test_calls_are_told_from_text_however_it_is_cut(text: str, expected: list[tuple[str, ...]]) -> None:
    for pieces in cuts(text):
        assert read(pieces) == plain(expected), pieces
    for row in expected:
        if row[0] == "call":
            assert isinstance(json.loads(row[2]), dict)


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_call_is_text_as_it_was_written(text: str) -> None:
    for pieces in cuts(text):
        assert read(pieces) == [("text", text)], pieces


def test_a_call_after_a_broken_one_is_a_call() -> None:
    text = "<tool_call>\n<tool_call>\n" + hermes("{}").removeprefix("<tool_call>\n")
    assert read([text]) == [("text", "<tool_call>"), ("call", "f", "{}")]


def test_an_unfinished_call_keeps_its_arguments() -> None:
    whole = hermes('{"text": "abc", "count": 12}')
    begun = whole.index("{", 15)
    for end in range(begun + 1, len(whole)):
        ((kind, name, arguments),) = read([whole[:end]])
        assert (kind, name) == ("call", "f")
        assert '{"text": "abc", "count": 12}'.startswith(arguments)
        assert arguments == whole[begun : min(end, begun + 28)]


def test_arguments_that_break_off_are_no_valid_json_and_the_rest_is_text() -> None:
    rows = read([hermes('{"count": 1,,}')])
    assert rows == [("call", "f", '{"count": 1,'), ("text", ",}}\n</tool_call>")]
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(rows[0][2])


def test_arguments_stream_as_they_are_written() -> None:
    parser = ToolCalls(TOOLS)
    assert parser.push('Hi <tool_call>\n{"name": "f", "argum') == [Text("Hi")]
    begin, arguments = parser.push('ents": {"te')
    assert isinstance(begin, CallBegin)
    assert (begin.index, begin.name, arguments) == (0, "f", CallArguments(0, '{"te'))
    assert parser.push('xt": "a') == [CallArguments(0, 'xt": "a')]
    assert parser.push('"}}\n</tool_call>\n') == [CallArguments(0, '"}')]
    assert parser.rest() == []


XML_GOOD = [
    (xml(name="g"), [("call", "g", "{}")]),
    (
        xml(("text", 'def f():\n    return "<b>" \\ 1\n'), ("count", "5"), ("flag", "True"), ("ratio", "0.5")),
        [
            (
                "call",
                "f",
                '{"text": "def f():\\n    return \\"<b>\\" \\\\ 1\\n", "count": 5, "flag": true, "ratio": 0.5}',
            )
        ],
    ),
    (xml(("items", '[1, {"a": "b"}]')), [("call", "f", '{"items": [1, {"a": "b"}]}')]),
    (xml(("maybe", "null")), [("call", "f", '{"maybe": null}')]),
    (xml(("maybe", "12")), [("call", "f", '{"maybe": "12"}')]),
    (xml(("text", "null"), ("other", "5")), [("call", "f", '{"text": "null", "other": "5"}')]),
    (xml(("count", "many")), [("call", "f", '{"count": "many"}')]),
    (
        xml(("text", "</tool_call> </function> <parameter=x>")),
        [("call", "f", '{"text": "</tool_call> </function> <parameter=x>"}')],
    ),
    (
        "So:\n<function=f>\n<parameter=count>1</parameter></function>\n</tool_call>\n" + xml(name="g"),
        [("text", "So:"), ("call", "f", '{"count": 1}'), ("call", "g", "{}")],
    ),
    (xml(name="h"), [("text", xml(name="h"))]),
    ("<tool_call>\n<function=f>\nno</function>", [("text", "<tool_call>\n<function=f>\nno</function>")]),
    ("<function=f>\n<parameter=count>\n1", [("call", "f", '{"count": 1')]),
    ("<function=f>\n<parameter=text>\nab\n</para", [("call", "f", '{"text": "ab\\n</para')]),
    (
        "<function=f>\n<parameter=count>1</parameter> oops",
        [("call", "f", '{"count": 1'), ("text", " oops")],
    ),
]


@pytest.mark.parametrize(("text", "expected"), XML_GOOD)
def test_tags_of_qwen3_coder_are_read_however_they_are_cut(text: str, expected: list[tuple[str, ...]]) -> None:
    for pieces in cuts(text):
        assert read(pieces, XML) == expected, pieces


def test_random_arguments_come_through_unchanged() -> None:
    draw = random.Random(1)
    alphabet = ['"', "\\", "{", "}", "[", "<", "/", "tool_call>", "</tool_call>", "é", "🎉", "\n", " ", "a", ":", ","]

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth else 4)
        if kind == 4:
            return [value(depth - 1) for _ in range(draw.randrange(3))]
        if kind == 5:
            return {"".join(draw.choices(alphabet, k=3)): value(depth - 1) for _ in range(draw.randrange(3))}
        return [None, draw.random() * 1e9, draw.randrange(-9, 9), "".join(draw.choices(alphabet, k=9))][kind]

    for _ in range(200):
        arguments = {"a": value(3), "b": value(2)}
        written = json.dumps(arguments, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        text = "x" + hermes(written) + "\n" + hermes(json.dumps(written), "g")
        size = draw.randrange(1, 9)
        rows = read([text[start : start + size] for start in range(0, len(text), size)])
        assert rows == [("text", "x"), ("call", "f", written), ("call", "g", written)]


def test_random_noise_is_read_alike_however_it_is_cut_and_nothing_is_lost() -> None:
    draw = random.Random(2)
    parts = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f"',
        ', "arguments": ',
        "{",
        "}",
        '"',
        "\n",
        "<function=f>",
        "<",
        "a",
    ]
    parts += ["<parameter=text>", "</parameter>", "</function>", "\\", "1", ","]
    for _ in range(400):
        text = "".join(draw.choices(parts, k=12))
        for form in (HERMES, XML):
            whole = read([text], form)
            assert read(list(text), form) == whole
            if not any(row[0] == "call" for row in whole):
                assert whole == [("text", text)]


def test_long_hostile_answers_take_time_that_grows_with_their_length() -> None:
    text = "<tool_call>{" * 4000 + hermes('{"items": ' + "[" * 20000)
    rows = read([text])
    assert rows[-2:] == [("call", "f", '{"items": ' + "[" * 20000), ("text", "}\n</tool_call>")]


def test_white_space_without_end_is_text_and_takes_no_time() -> None:
    parser = ToolCalls(TOOLS)
    told = [delta for _ in range(300) for delta in parser.push("\n" * 1000)] + parser.rest()
    assert "".join(delta.text for delta in told if isinstance(delta, Text)) == "\n" * 300_000


def test_the_form_is_told_from_the_template() -> None:
    assert form_of(CHAT_TEMPLATE) == HERMES
    assert form_of("... <tool_call>\n<function=x>\n<parameter=y>") == XML
    assert form_of("{{ messages }}") == ""
