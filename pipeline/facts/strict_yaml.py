"""Strict YAML: a mapping merged with the files that it extends, and the place of every key.

Scalars follow the core schema of YAML 1.2: integers, decimals, ``true``/``false`` and ``null``; everything else is
text, so that ``no``, ``12:30`` and ``2026-01-31`` mean what they say. Refused are duplicate keys, tags, anchors and
aliases, infinite numbers, deep nesting and large files. All that is wrong is found in one reading.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_CHAIN = 8
_SHOWN = 40

Loc = tuple[str | int, ...]
_NOWHERE: Loc = (-1,)  # where values go that are read only to find what else is wrong

_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape can write what UTF-8 cannot hold
_NULL = re.compile(r"(~|null|Null|NULL)?")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,18}|0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}")
_FLOAT = re.compile(r"[-+]?(?=[0-9.]*[.eE])(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Place:
    """A line of a file, counted from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Finding:
    """Something wrong, and its place."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Document:
    """What was read.

    Attributes:
        path: the file that was asked for.
        value: the merged value; plain dicts, lists, str, int, finite float, bool and None.
        places: location → place of the key or list item that decided its value.
        findings: all that is wrong with the YAML.
        refused: locations whose value could not be read (and is None); the empty location if a file could not.
    """

    path: Path
    value: dict[str, Any] = field(default_factory=dict)
    places: dict[Loc, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    refused: set[Loc] = field(default_factory=set)

    def place(self, loc: Loc) -> Place:
        """The place of the value at ``loc``, or of the nearest that encloses it."""
        while loc and loc not in self.places:
            loc = loc[:-1]
        return self.places.get(loc, Place(self.path, 1))

    def refuse(self, loc: Loc, place: Place, text: str) -> None:
        """Note that the value at ``loc`` cannot be used."""
        self.findings.append(Finding(place, text))
        self.refused.add(loc)


def read(path: Path) -> Document:
    """Read ``path`` and the files that it ``extends``, and merge them.

    ``extends`` is a file name or a list of them, relative to the file that says so. Later ones win over earlier ones,
    the file itself over all: mappings are merged key by key, anything else (also a list) is replaced.

    Raises:
        RecipeError: ``path`` itself is absent, too large or unreadable. All else is in `Document.findings`.
    """
    return _read(path, (), {})


def error(findings: Sequence[Finding], subject: Path, fix: str) -> RecipeError:
    """One error that lists all findings about ``subject`` by file and line."""
    rows = sorted(dict.fromkeys(findings), key=lambda row: (str(row.place.file), row.place.line))
    head = f"{subject} has {len(rows)} problem{'s' * (len(rows) > 1)}"
    more = [f"… and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return RecipeError("\n  ".join([head, *map(str, rows[:_SHOWN]), *more]), fix=fix)


def nearest(word: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """``; did you mean `…`?`` with the known word most like ``word``, or nothing."""
    near = difflib.get_close_matches(word, known, 1, cutoff)
    return f"; did you mean `{near[0]}`?" if near else ""


def _read(path: Path, chain: tuple[Path, ...], done: dict[Path, Document]) -> Document:
    document = _parse(path, _bytes(path))
    names = document.value.pop("extends", None)
    if names is None:
        if ("extends",) in document.refused:
            document.refused.add(())
        return document
    if not isinstance(names, list):
        names = [names]
    if not names or not all(isinstance(name, str) and name for name in names):
        document.refuse((), document.place(("extends",)), "`extends`: should be a file name or a list of file names")
        return document
    under = Document(path)
    for index, name in enumerate(names):
        base = Path(os.path.normpath(path.parent / name))
        problem = _refusal(base, (*chain, path.resolve()))
        if not problem and base.resolve() not in done:
            try:
                done[base.resolve()] = _read(base, (*chain, path.resolve()), done)
            except RecipeError as failure:
                problem = failure.what
        if problem:
            document.refuse((), document.place(("extends", index)), f"`extends: {name}`: {problem}")
        else:
            under = _merge(under, done[base.resolve()])
    return _merge(under, document)


def _refusal(base: Path, chain: tuple[Path, ...]) -> str:
    """Why a base cannot be read, or nothing."""
    if base.resolve() in chain:
        return "a recipe cannot extend itself" + " (through others)" * (base.resolve() != chain[-1])
    if len(chain) >= MAX_CHAIN:
        return f"more than {MAX_CHAIN} files extend one another"
    if not base.is_file():
        names = [path.name for path in base.parent.glob("*.yaml")]
        return f"there is no such file{nearest(base.name, names)}"
    return ""


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        near = path.parent.glob("*.yaml") if path.parent.is_dir() else path.parent.parent.glob("*/*.yaml")
        hint = nearest(str(path), [str(other) for other in near]).removeprefix("; ")
        raise RecipeError(f"there is no recipe {path}", fix=hint or "`qwen-onnx recipe list` shows the recipes")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise RecipeError(f"{path} cannot be read", why=str(problem)) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES} bytes", why="no recipe needs that much")
    return data


def _parse(path: Path, data: bytes) -> Document:
    document = Document(path)
    line, problem = 1, ""
    try:
        text = data.decode()
        events = _events(text)
        first = next(events, None)
        value = _value(first, events, (), document) if first else None
        next(events, None)  # a second document is an error, too
    except UnicodeDecodeError as failure:
        line, problem = data[: failure.start].count(b"\n") + 1, "not UTF-8"
    except yaml.MarkedYAMLError as failure:
        line, problem = failure.problem_mark.line + 1 if failure.problem_mark else 1, f"not YAML: {failure.problem}"
    except yaml.reader.ReaderError as failure:
        line, problem = text[: failure.position].count("\n") + 1, "not YAML: a control character"
    if problem:
        document.refuse((), Place(path, line), problem)
    elif isinstance(value, dict):
        document.value.update(value)
    elif () not in document.refused:
        found = "is empty" if value is None else "holds a list" if isinstance(value, list) else "holds one value"
        document.refuse((), Place(path, line), f"a recipe is a mapping of keys to values; this file {found}")
    return document


def _events(text: str) -> Iterator[yaml.Event]:
    """The events of the one document in ``text``, never nested deeper than `MAX_DEPTH`.

    Reading events instead of composing nodes keeps aliases unexpanded and the depth of recursion bounded.
    """
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        problem = ""
        if depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
        elif documents > 1:
            problem = "a second document"
        elif isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
            problem = "half of a surrogate pair, which is no character"
        if problem:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
            yield event


def _value(event: yaml.Event, events: Iterator[yaml.Event], loc: Loc, document: Document) -> Any:
    """The value that starts with ``event``; takes the rest of it from ``events``."""
    place = _place(event, document)
    document.places.setdefault(loc, place)
    if isinstance(event, yaml.AliasEvent):
        document.refuse(loc, place, f"aliases (`*{event.anchor}`) are not allowed: share with `extends`")
        return None
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
    if event.anchor:
        document.refuse(loc, place, f"anchors (`&{event.anchor}`) are not allowed: share with `extends`")
    if event.tag:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        document.refuse(loc, place, f"tags (`{tag}`) are not allowed: a recipe is plain data")
    if isinstance(event, yaml.MappingStartEvent):
        value: Any = _mapping(events, loc, document)
    elif isinstance(event, yaml.SequenceStartEvent):
        value = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            value.append(_value(item, events, (*loc, len(value)), document))
    else:
        assert isinstance(event, yaml.ScalarEvent)
        value = scalar(event.value) if event.implicit[0] else event.value
        if isinstance(value, float) and not math.isfinite(value):
            document.refuse(loc, place, f"`{event.value}` is not a finite number")
    return None if loc in document.refused else value


def _place(event: yaml.Event, document: Document) -> Place:
    assert event.start_mark is not None
    return Place(document.path, event.start_mark.line + 1)


def _mapping(events: Iterator[yaml.Event], loc: Loc, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        place = _place(event, document)
        if not isinstance(event, yaml.ScalarEvent):
            document.findings.append(Finding(place, "a key should be a plain word"))
            _value(event, events, _NOWHERE, document)
            _value(next(events), events, _NOWHERE, document)
            continue
        key = event.value
        if event.anchor or event.tag:
            document.findings.append(Finding(place, f"key `{key}`: anchors and tags are not allowed"))
        if key in lines:
            document.findings.append(Finding(place, f"duplicate key `{key}` (first in line {lines[key]})"))
            _value(next(events), events, _NOWHERE, document)
            continue
        lines[key] = place.line
        document.places.setdefault((*loc, key), place)
        result[key] = _value(next(events), events, (*loc, key), document)
    return result


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain scalar means in the core schema (YAML 1.2, section 10.3.2); more than 18 digits are text."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text, 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NO_NUMBER.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def _merge(under: Document, over: Document) -> Document:
    """``over`` on top of ``under``; what it replaces loses its places, so that a finding is put where its cause is."""
    replaced: set[Loc] = set()

    def walk(old: dict[str, Any], new: dict[str, Any], loc: Loc) -> dict[str, Any]:
        result = dict(old)
        for key, value in new.items():
            if isinstance(result.get(key), dict) and isinstance(value, dict):
                result[key] = walk(result[key], value, (*loc, key))
            else:
                result[key] = value
                replaced.add((*loc, key))
        return result

    def stays(loc: Loc) -> bool:
        return not any(loc[:end] in replaced for end in range(1, len(loc) + 1))

    value = walk(under.value, over.value, ())
    places = {loc: place for loc, place in under.places.items() if stays(loc)} | over.places
    refused = {loc for loc in under.refused if stays(loc)} | over.refused
    findings = list(dict.fromkeys(under.findings + over.findings))  # a base that is named twice has its faults once
    return Document(over.path, value, places, findings, refused)
