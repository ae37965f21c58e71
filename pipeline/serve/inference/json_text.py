"""Text of JSON that a model writes: read as it comes, and made of what it wrote between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Set

_SPACE = " \t\r\n"
_SCALAR = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_IN_SCALAR = frozenset("abcdefghijklmnopqrstuvwxyzE0123456789+-.")
_OPENS = {"}": "{", "]": "["}
_EMPTY = {"}": "key or end", "]": "value or end"}
_BARE = {"true": "true", "false": "false", "null": "null", "none": "null"}  # templates write values as Python has them
JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


class Broken(Exception):  # noqa: N818 - no error of a user's
    """Text that is not what it has to be."""


class ObjectText:
    """Reads a JSON object character by character, in time and memory that grow with its text only.

    Attributes:
        ended: whether the object is complete.
    """

    def __init__(self) -> None:
        self.ended = False
        self._open: list[str] = []
        self._expect = "object"  # or key, key or end, colon, value, value or end, comma, string, escape, hex, scalar
        self._scalar = ""
        self._digits = 0
        self._is_key = False

    def feed(self, char: str) -> str:
        """Take the next character; the text to tell for it, which differs for a bare control character in a string.

        Raises:
            Broken: it cannot follow, or is empty; nothing was taken.
        """
        if not char or self.ended:
            raise Broken
        if self._expect in {"string", "escape", "hex"}:
            return self._in_string(char)
        if self._expect == "scalar":
            if char in _IN_SCALAR:
                self._scalar += char
                return char
            if not _SCALAR.fullmatch(self._scalar):
                raise Broken
            self._expect = "comma"
        if char not in _SPACE or self._expect == "object":
            self._between(char)
        return char

    def _in_string(self, char: str) -> str:
        if self._expect == "hex":
            if char not in "0123456789abcdefABCDEF":
                raise Broken
            self._digits -= 1
            self._expect = "hex" if self._digits else "string"
        elif self._expect == "escape":
            if char not in '"\\/bfnrtu':
                raise Broken
            self._expect, self._digits = ("hex", 4) if char == "u" else ("string", 0)
        elif char == '"':
            self._expect = "colon" if self._is_key else "comma"
        elif char == "\\":
            self._expect = "escape"
        elif char < " ":
            return escaped(char)
        return char

    def _between(self, char: str) -> None:
        """A character outside of strings and scalars that is no white space."""
        expect = self._expect
        value = expect in {"value", "value or end"}
        if char == "{" and (value or expect == "object"):
            self._open.append(char)
            self._expect = "key or end"
        elif char == "[" and value:
            self._open.append(char)
            self._expect = "value or end"
        elif char == '"' and (value or expect in {"key", "key or end"}):
            self._is_key, self._expect = not value, "string"
        elif char == ":" and expect == "colon":
            self._expect = "value"
        elif char == "," and expect == "comma":
            self._expect = "key" if self._open[-1] == "{" else "value"
        elif char in "}]" and self._open[-1:] == [_OPENS[char]] and expect in {"comma", _EMPTY[char]}:
            self._close()
        elif value and char in _IN_SCALAR:
            self._scalar, self._expect = char, "scalar"
        else:
            raise Broken

    def _close(self) -> None:
        self._open.pop()
        self.ended, self._expect = not self._open, "comma"


def object_of(text: str) -> str:
    """The JSON object that ``text`` is, without white space around it.

    Raises:
        Broken: it is none, or has half a surrogate pair, which is no character.
    """
    scanner = ObjectText()
    try:
        text.strip(_SPACE).encode()
    except UnicodeEncodeError:
        raise Broken from None
    told = "".join(map(scanner.feed, text.strip(_SPACE)))
    if not scanner.ended:
        raise Broken
    return told


def escaped(text: str) -> str:
    """``text`` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def string_of(literal: str) -> str:
    """The text of a JSON string with its quotes; control characters in it may be bare.

    Raises:
        Broken: it is none.
    """
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        raise Broken from None


def value_of(text: str, types: Set[str]) -> str:
    """The JSON of a value that was written without quotes, where its schema allows ``types``; all when empty.

    A value that fits none of them is a string: whoever validates it sees what was written.
    """
    bare = text.strip(_SPACE)
    bare = _BARE.get(bare.lower(), bare)
    try:
        kind = JSON_TYPES.get(type(json.loads(bare, parse_constant=_refuse)), "null")
    except (ValueError, RecursionError):
        kind = ""
    fits = kind in types or (kind == "integer" and "number" in types) or (kind == "number" and "integer" in types)
    if kind and (fits or not types):
        return bare
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
