"""Calls of tools in what a model writes: told apart from text, and given on, as the answer streams.

Qwen2.5 and Qwen3 write ``<tool_call>``, a JSON object with ``name`` and ``arguments``, ``</tool_call>`` (as Hermes
models do); Qwen3-Coder writes ``<function=...>`` and ``<parameter=...>`` tags inside. Text is read character by
character, so where it is cut makes no difference. This module knows text and nothing of models or tokenizers.

What is no well-formed call loses nothing:

- What breaks before its arguments have begun is text as it was written: broken JSON, a call that is never closed,
  members other than ``name`` and ``arguments``, arguments that are no object, and a function that was not offered.
  Clients are never told to call what they did not offer.
- A call whose arguments have begun stays, with its arguments as far as they came. These are no valid JSON then, so that
  nobody calls a function with half of them; what breaks them off and what follows is text. When an answer ends there
  (as at its limit), markup that has only begun is dropped.
- Arguments that are left out, ``null`` or an empty string are ``{}``; ones that are a string with an object in it are
  that object. Line ends and other control characters, which models leave bare in strings of JSON, are escaped.
- White space before a call and after the last one belongs to neither call nor text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pipeline.serve.inference.json_text import Broken, ObjectText, escaped, object_of, string_of, value_of
from pipeline.serve.inference.schemas import types_of

HERMES, XML = "hermes", "xml"
OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_SPACE = " \t\r\n"
_LONGEST_NAME = 256
_MOST_SPACE = 256  # is held back until it is clear whether a call follows; more of it is text


@dataclass(frozen=True)
class Text:
    """Text of the answer that became final."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call has begun: the ``index``-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments; all pieces together are a JSON object."""

    index: int
    text: str


Delta = Text | CallBegin | CallArguments
_Steps = Generator[None, str, Any]


def form_of(template: str) -> str:
    """How models of a chat template write calls: `HERMES`, `XML`, or empty where the template has no calls."""
    if FUNCTION in template and PARAMETER in template:
        return XML
    return HERMES if OPEN in template else ""


class ToolCalls:
    """Tells calls from text in an answer that comes in pieces.

    Args:
        tools: those that the request offers, as OpenAI's API has them: ``{"type": "function", "function": {...}}``.
        form: how the model writes calls (`form_of`).
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], form: str = HERMES) -> None:
        functions = [tool["function"] for tool in tools]
        self._offered = {function["name"]: function.get("parameters") or {} for function in functions}
        self._form = form
        self._deltas: list[Delta] = []
        self._calls = 0
        self._ahead: list[str] = []  # characters to read before those to come, the next one last
        self._raw = ""  # what was read and not told yet
        self._begun = False  # whether the call that is being read was told of
        self._ended = False
        self._run = self._answer()
        next(self._run)

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._calls

    def push(self, text: str) -> list[Delta]:
        """What became final with ``text``."""
        for char in text:
            self._run.send(char)
        return self._told()

    def rest(self) -> list[Delta]:
        """What was held back when no more text came; nothing can be pushed any more."""
        self._ended = True
        for _ in self._run:  # nothing is waited for any more
            pass
        return self._told()

    def _told(self) -> list[Delta]:
        """The deltas since the last time, neighbours of a kind as one."""
        result: list[Delta] = []
        for (kind, index), group in groupby(self._deltas, key=lambda delta: (type(delta), getattr(delta, "index", 0))):
            deltas = list(group)
            text = "".join(delta.text for delta in deltas if not isinstance(delta, CallBegin))
            if kind is CallBegin:
                result += deltas
            elif text:
                result.append(Text(text) if kind is Text else CallArguments(index, text))
        self._deltas = []
        return result

    # What is told.

    def _text(self, text: str) -> None:
        self._deltas.append(Text(text))

    def _begin(self, name: str) -> None:
        self._deltas.append(CallBegin(self._calls, f"call_{secrets.token_hex(12)}", name))
        self._calls += 1
        self._begun = True

    def _argue(self, text: str) -> None:
        self._deltas.append(CallArguments(self._calls - 1, text))
        self._raw = ""

    # Reading: each of these takes characters as they come; "" is the end of the answer.

    def _peek(self) -> _Steps:
        if not self._ahead and not self._ended:
            char = yield
            if not self._ended:
                self._ahead.append(char)
        return self._ahead[-1] if self._ahead else ""

    def _take(self) -> _Steps:
        char = yield from self._peek()
        if not char:
            raise Broken
        self._raw += self._ahead.pop()
        return char

    def _back(self, text: str) -> None:
        """Read ``text``, which was read last, once more."""
        self._ahead += reversed(text)
        self._raw = self._raw[: len(self._raw) - len(text)]

    def _space(self) -> _Steps:
        while (char := (yield from self._peek())) and char in _SPACE:
            yield from self._take()

    def _one_of(self, *tags: str) -> _Steps:
        """The one of ``tags`` that comes; where another text comes, nothing has been read."""
        read = ""
        while read not in tags:
            char = yield from self._peek()
            if not any(tag.startswith(read + char) for tag in tags):
                self._back(read)
                raise Broken
            read += yield from self._take()
        return read

    def _until(self, tags: Sequence[str], tell: Callable[[str], None], space: str, most: int) -> _Steps:
        """Tell text up to the one of ``tags`` that comes, less the white space right before it, at most ``most``.

        Where none comes, "" is returned, and what was held back is left in ``_raw``.
        """
        self._raw = ""
        while (yield from self._peek()):
            yield from self._take()
            found = next((tag for tag in tags if self._raw.endswith(tag)), "")
            if found:
                return found
            cut = self._raw.rfind("<")  # no tag has a second one
            if cut < 0 or not any(tag.startswith(self._raw[cut:]) for tag in tags):
                cut = len(self._raw)
            cut = max(len(self._raw[:cut].rstrip(space)), cut - most)
            if cut:
                tell(self._raw[:cut])
                self._raw = self._raw[cut:]
        return ""

    def _answer(self) -> _Steps:
        tags = {XML: (OPEN, FUNCTION), HERMES: (OPEN,)}.get(self._form, ())
        while tag := (yield from self._until(tags, self._text, _SPACE, _MOST_SPACE)):
            self._begun = False
            try:
                yield from self._xml(tag) if self._form == XML else self._hermes()
            except Broken:
                if not (self._begun and self._ended):
                    kept = self._raw.rstrip(_SPACE)
                    self._text(kept)
                    self._back(self._raw[len(kept) :])
        if self._raw.strip(_SPACE) or not self._calls:
            self._text(self._raw)

    def _closed(self) -> _Steps:
        """The end of a call, which models leave out at times."""
        self._raw = ""
        yield from self._space()
        try:
            yield from self._one_of(CLOSE)
        except Broken:
            if (yield from self._peek()):
                self._back(self._raw)

    def _hermes(self) -> _Steps:
        yield from self._space()
        yield from self._one_of("{")
        name = arguments = ""
        end = ","
        while end == ",":
            yield from self._space()
            key = yield from self._string()
            yield from self._space()
            yield from self._one_of(":")
            yield from self._space()
            if key == "name" and not name:
                name = yield from self._string()
                if name not in self._offered:
                    raise Broken
            elif key == "arguments" and not arguments:
                arguments = yield from self._arguments(name)
            else:
                raise Broken
            yield from self._space()
            end = yield from self._one_of(*("}" if self._begun else ",}"))
        if not name:
            raise Broken
        if not self._begun:
            self._begin(name)
            self._argue(arguments or "{}")
        yield from self._closed()

    def _string(self) -> _Steps:
        literal = yield from self._one_of('"')
        char = ""
        while char != '"':
            char = yield from self._take()
            literal += char
            if char == "\\":
                literal += yield from self._take()
        return string_of(literal)

    def _arguments(self, name: str) -> _Steps:
        """The arguments, told as they come when it is known what they are for."""
        first = yield from self._peek()
        if first == '"':
            text = yield from self._string()
            return object_of(text) if text.strip(_SPACE) else "{}"
        if first != "{":
            yield from self._one_of("null")
            return "{}"
        scanner = ObjectText()
        told = []
        if name:
            self._begin(name)
        while not scanner.ended:
            told.append(scanner.feed((yield from self._peek())))
            yield from self._take()
            if name:
                self._argue(told.pop())
        return "".join(told)

    def _xml(self, tag: str) -> _Steps:
        if tag == OPEN:
            yield from self._space()
            yield from self._one_of(FUNCTION)
        name = yield from self._tag_name()
        if name not in self._offered:
            raise Broken
        yield from self._space()
        while (yield from self._one_of(PARAMETER, END_FUNCTION)) == PARAMETER:
            key = yield from self._tag_name()
            before = ", " if self._begun else "{"
            if not self._begun:
                self._begin(name)
            self._argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._value(types_of(self._offered[name], key))
            yield from self._space()
        if not self._begun:
            self._begin(name)
            self._argue("{")
        self._argue("}")
        yield from self._closed()

    def _tag_name(self) -> _Steps:
        name = ""
        while (char := (yield from self._take())) != ">":
            name += char
            if char in "<\n" or len(name) > _LONGEST_NAME:
                raise Broken
        return name

    def _value(self, types: Set[str]) -> _Steps:
        """A parameter's value up to its closing tag; a string is told as it comes."""
        if (yield from self._peek()) == "\n":
            yield from self._take()
        parts: list[str] = []
        streams = types == {"string"}
        if streams:
            self._argue('"')

        def tell(text: str) -> None:
            if streams:
                self._deltas.append(CallArguments(self._calls - 1, escaped(text)))
            else:
                parts.append(text)

        if not (yield from self._until((END_PARAMETER,), tell, "\n", 1)):
            tell(self._raw)
            self._argue("".join(parts))
            raise Broken
        self._argue('"' if streams else value_of("".join(parts), types))
