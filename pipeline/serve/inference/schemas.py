"""JSON schemas that clients send: their limits, and what they say of a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.serve.inference.json_text import JSON_TYPES
from pipeline.serve.refusals import Refused, Unsupported

Schema = Mapping[str, Any]

MAX_BYTES = 64 << 10
"""Of all schemas of a request; the slowest ones of that size take up to a second to compile."""
MAX_DEPTH = 64
"""Braces and brackets inside one another; two of them a level of objects."""
GUIDANCE = "x-guidance"
_DATA = frozenset({"const", "default", "enum", "examples"})
_HOPS = 16
_LEVELS = 4  # of unions and references: each may have many branches that lead back to it


def check(schema: Any, parameter: str) -> int:
    """The size of a schema in bytes, once it is clear that it can be read.

    Raises:
        Refused: it is no object, too large or nested too deep, or says how it is to be compiled.
        Unsupported: it refers to another document.
    """
    if not isinstance(schema, Mapping):
        raise Refused("a schema has to be an object", why=f"it is {schema!r:.40}", parameter=parameter)
    rows: list[tuple[Any, int]] = [(schema, 1)]
    while rows:
        value, depth = rows.pop()
        if depth > MAX_DEPTH:
            why = f"it has more than {MAX_DEPTH} braces and brackets inside one another"
            raise Refused("the schema is nested too deep", why=why, parameter=parameter)
        if isinstance(value, Mapping):
            _check_references(value, parameter)
            rows += [(item, depth + 1) for key, item in value.items() if key not in _DATA]
        elif isinstance(value, list | tuple):
            rows += [(item, depth + 1) for item in value]
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused("the schema is no JSON", why=str(error), parameter=parameter) from None
    if size > MAX_BYTES:
        why = f"it has {size} bytes, and {MAX_BYTES} are the most"
        raise Refused("the schema is too large", why=why, parameter=parameter)
    return size


def _check_references(value: Schema, parameter: str) -> None:
    if GUIDANCE in value:
        raise Refused(f"the schema has `{GUIDANCE}`", why="how it is compiled is the server's", parameter=parameter)
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = value.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            why = f"`{key}` is `{target:.80}`, and the server reads nothing but the request"
            fix = "put what it refers to under `$defs`"
            raise Unsupported("the schema refers to another document", why=why, fix=fix, parameter=parameter)


def types_of(schema: Schema, key: str) -> frozenset[str]:
    """The JSON types that a property may have; none of them named means all.

    A property that an object's schema does not describe is a string.
    """
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return _types(properties[key], schema, _LEVELS)
    others = schema.get("additionalProperties")
    return _types(others, schema, _LEVELS) if isinstance(others, Mapping) and others else frozenset({"string"})


def _types(schema: Any, root: Schema, hops: int) -> frozenset[str]:  # noqa: PLR0911 - a case each
    if not isinstance(schema, Mapping) or not hops:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset({named})
    if isinstance(named, list):
        return frozenset(item for item in named if isinstance(item, str))
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return frozenset(JSON_TYPES.get(type(value), "null") for value in values)
    for kind in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(kind), list):
            found = [_types(item, root, hops - 1) for item in schema[kind]]
            if kind == "allOf":
                return next((types for types in found if types), frozenset())
            return frozenset().union(*found) if all(found) else frozenset()
    if isinstance(schema.get("$ref"), str):
        return _types(resolved(schema, root), root, hops - 1)
    return frozenset({"object"}) if "properties" in schema else frozenset()


def resolved(schema: Any, root: Schema) -> Any:
    """What a ``$ref`` of ``schema`` points to in ``root``, if anything; ``schema`` itself without one."""
    for _ in range(_HOPS):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        found: Any = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        schema = found
    return None
