"""What is wrong with a request, in one refusal: which fields, what was expected there, and the nearest right name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.serve.refusals import Refused, Unsupported

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    Place = tuple[str | int, ...]

MOST = 8
"""Mistakes that one refusal tells."""

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}, not {actual_length},",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "union_tag_invalid": "a {discriminator} of {expected_tags}",
    "union_tag_not_found": "an object with {discriminator}",
}
# What OpenAI's API knows of messages, their parts and tools, and why it is not taken here.
_TAGS = {
    "input_audio": "sounds are not taken in conversations yet",
    "file": "files are not read; their text can be sent as text",
    "video_url": "videos are not taken, and nothing is fetched",
    "video": "videos are not taken",
    "function": "the role gave way to `tool`",
}
_DISCRIMINATORS = ("type", "role")


def check_fields(data: Any, refused: Mapping[str, str]) -> None:
    """Refuse what is no object, and fields that are known and not honoured; null is as good as nothing.

    Raises:
        Refused, Unsupported: as said.
    """
    if not isinstance(data, dict):
        raise Refused("the body of the request is no JSON object", why=f"it is {_shown(data)}")
    for name, why in refused.items():
        if data.get(name) is not None:
            raise Unsupported(f"`{name}` is not honoured", why=why, fix="leave it out", parameter=name)


def refusal(kind: type[BaseModel], error: ValidationError, data: Any) -> Refused:
    """The one refusal that tells all mistakes of ``data``, of which pydantic may find several in a place."""
    found: dict[Place, list[Mapping[str, Any]]] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_place(one, data), []).append(one)
    # Where a list was meant, a mistake inside it says more than that the list is no text.
    deepest = [place for place in found if not any(_inside(other, place) for other in found)]
    told = [_told(kind, place, found[place]) for place in deepest[:MOST]]
    if len(deepest) > MOST:
        told.append(f"and {len(deepest) - MOST} more")
    known = any(one["type"] == "union_tag_invalid" and one["ctx"]["tag"] in _TAGS for one in found[deepest[0]])
    return (Unsupported if known else Refused)("; ".join(told), parameter=_written(deepest[0]) or None)


def _inside(place: Place, other: Place) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _place(error: Mapping[str, Any], data: Any) -> Place:
    """Where a mistake is in the request: pydantic's own place names members of unions as well."""
    place: list[str | int] = []
    tagged = False
    for index, step in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        tags = [data.get(name) for name in _DISCRIMINATORS] if isinstance(data, dict) else []
        if not tagged and not last and step != "function" and step in tags:
            tagged = True
        elif (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int)):
            place.append(step)
            data, tagged = data[step], False
        elif last and error["type"] in {"missing", "extra_forbidden"}:
            place.append(step)
    return tuple(place)


def _written(place: Place) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _told(kind: type[BaseModel], place: Place, errors: Sequence[Mapping[str, Any]]) -> str:
    name, first = _written(place) or "the request", errors[0]
    if any(error["type"] == "missing" for error in errors):
        return f"`{name}` is missing"
    if all(error["type"] == "extra_forbidden" for error in errors):
        known = list(kind.model_fields) if len(place) == 1 else _nested(kind)
        near = difflib.get_close_matches(str(place[-1]), known, 1, 0.5)
        return f"`{name}` is unknown" + (f"; did you mean `{near[0]}`?" if near else "")
    wanted = list(dict.fromkeys(_wanted(error) for error in errors if error["type"] != "extra_forbidden"))
    told = f"`{name}` is {_shown(first['input'])}, and {' or '.join(wanted)} is expected"
    if first["type"] == "literal_error" and len(place) == 1:
        told += f" ({kind.model_fields[str(place[0])].description or 'no other is to be had here'})"
    if first["type"] == "union_tag_invalid" and (why := _TAGS.get(first["ctx"]["tag"])):
        told += f" ({why})"
    return told


def _wanted(error: Mapping[str, Any]) -> str:
    form = _KINDS.get(error["type"])
    if form is None:
        return str(error["msg"])
    if error["type"] in {"too_short", "too_long"}:
        form = form.replace("_length}", "_length} entries", 1)
    return form.format_map({key: _plain(value) for key, value in error.get("ctx", {}).items()})


def _plain(value: Any) -> Any:
    """Whole numbers that pydantic tells as floats, and names without its quotes."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value in {"True", "False"}:
        return value.lower()
    return value.strip("'") if isinstance(value, str) and value.count("'") == 2 else value


def _shown(value: Any) -> str:
    if not value and isinstance(value, list | dict):
        return "empty"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _nested(kind: type[BaseModel]) -> list[str]:
    """Names of all fields that a request may have inside its fields."""
    models = kind.model_json_schema().get("$defs", {}).values()
    return sorted({name for model in models for name in model.get("properties", {})})
