"""What an answer may look like, as grammars of llguidance: JSON that a schema describes, and calls of tools.

All functions are safe in threads, and compiling leaves Python's lock free. What was compiled before costs milliseconds;
one of the largest schemas (`schemas.MAX_BYTES`) takes up to a second, so a server calls these by `asyncio.to_thread`.
llguidance's own limits end what is hostile.

A schema with ``strict`` is followed in all that it says, or the request is refused with the keyword that a grammar
cannot express (``uniqueItems``, ``not``, ``if``, ...). Without it, such keywords are left to the model, as OpenAI's API
does; all others are followed. JSON is written on one line with a space after commas and colons, as templates show it to
the models: where white space is free, a model can go on with it for ever. Properties come in the schema's order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pipeline.serve.inference import schemas
from pipeline.serve.inference.constraint import Constraint, bytes_tokenizer, first_line, matcher
from pipeline.serve.inference.tool_calls import CLOSE, FUNCTION, HERMES, OPEN, XML
from pipeline.serve.refusals import Refused, Unsupported

__all__ = ["Constraint", "check", "response_grammar", "tools_grammar"]

Values = Mapping[str, Any]

MAX_TOOLS = 128
"""That is OpenAI's limit too."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT = "(?s:.*)"
_ENDLESS = "it has no finite value"


def response_grammar(response_format: Values | None) -> str:
    """The grammar of an answer with a ``response_format`` of OpenAI's API; empty where its text is free.

    Raises:
        Refused: the format or its schema is wrong, too large, or can have no value.
        Unsupported: the kind of format, or a keyword of a strict schema, is not supported.
    """
    rule = _response(response_format)
    return _checked(f"start: {rule}\n", "response_format") if rule else ""


def tools_grammar(
    tools: Sequence[Values],
    tool_choice: str | Values | None = None,
    parallel: bool = True,
    form: str = HERMES,
    response_format: Values | None = None,
) -> str:
    """The grammar of an answer that may call tools; empty when there are none and text is free.

    ``auto`` leaves text free, and a call that has begun follows the schema of its function; with a response format, the
    answer is either calls or that JSON. ``required`` is calls from the beginning to the end, at least one; a named
    function is one call of it. ``none`` is text in which no call begins, or the JSON. In Qwen3-Coder's form text is
    free with ``auto``, and what needs a grammar is refused.

    Args:
        tools: as OpenAI's API has them.
        tool_choice: ``none``, ``auto`` (when left out), ``required``, a named function, or allowed tools with a mode.
        parallel: whether there may be more than one call.
        form: how the model writes calls (`pipeline.serve.inference.tool_calls.form_of`).
        response_format: what the answer has to be when it is no call.

    Raises:
        Refused: as of `response_grammar`; or a tool or choice is wrong.
        Unsupported: as of `response_grammar`; or the package's template knows no tools.
    """
    response = _response(response_format)
    if not tools:
        if tool_choice not in (None, "none", "auto"):  # a mapping has no hash
            raise Refused("tool_choice asks for a call, and there are no tools", parameter="tool_choice")
        return _checked(f"start: {response}\n", "response_format") if response else ""
    if form not in {HERMES, XML}:
        why = "its chat template does not say how the model writes calls"
        raise Unsupported("the package cannot call tools", why=why, parameter="tools")
    functions = _functions(tools)
    mode, chosen = _choice(tool_choice, list(functions))
    openers = (OPEN,) if form == HERMES else (OPEN, FUNCTION)
    if mode == "none":
        never = " & ".join(f"~/{_TEXT}{opener}{_TEXT}/" for opener in openers)
        return _checked(f"start: {response or 'TEXT'}\nTEXT: /{_TEXT}/ & {never}\n", "tools")
    if form == XML:
        _refuse_xml(mode, parallel, any(strict for _, strict in functions.values()), response)
        return ""
    rules = {}
    for place, (name, (schema, strict)) in enumerate(functions.items()):
        if name in chosen:
            rules[f"call_{place}"] = rule = f"call_{place}: {_hermes(name, schema, strict)}\n"
            _checked(f"start: call_{place}\n{rule}", f"tools[{place}].function.parameters")
    start = _start(mode, parallel, response, " | ".join(rules))
    return _checked(start + "".join(rules.values()), "tools")


def check(grammar: str, parameter: str) -> None:
    """Compile a grammar and look for what may come first.

    Raises:
        Refused: it cannot be compiled, or nothing can follow it; ``parameter`` is to blame.
        Unsupported: it has what grammars cannot express.
    """
    why = _fault(grammar)
    if not why:
        return
    if any(sign in why for sign in ("Unimplemented", "not supported", "Unknown format")):
        fix = "leave it out, or leave out `strict`" if "look-around" not in why else "write the pattern without it"
        raise Unsupported("the schema has what no grammar can hold an answer to", why=why, fix=fix, parameter=parameter)
    raise Refused("the schema cannot be compiled", why=why, parameter=parameter)


@lru_cache(maxsize=256)
def _fault(grammar: str) -> str:
    """Why nothing can follow a grammar; empty when something can."""
    import numpy as np

    found = matcher(bytes_tokenizer(), grammar)
    first = b"" if found.is_error() else found.compute_bitmask()
    if found.is_error():
        why = first_line(found.get_error())
        return _ENDLESS if why.startswith("NoExtension") else why
    return "" if np.frombuffer(first, np.uint8).any() else _ENDLESS


def _checked(rules: str, parameter: str) -> str:
    grammar = f"%llguidance {{}}\n{rules}"
    check(grammar, parameter)
    return grammar


def _response(response_format: Values | None) -> str:
    """The rule of an answer that is no call; empty where it is any text."""
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return ""
    if kind == "json_object":
        return _json({"type": "object"}, strict=True)
    if kind != "json_schema":
        why = "there are `text`, `json_object` and `json_schema`"
        raise Unsupported(f"response_format `{kind!s:.40}` is not known", why=why, parameter="response_format")
    given = response_format.get("json_schema")
    if not isinstance(given, Mapping) or given.get("schema") is None:
        raise Refused("response_format has no schema", parameter="response_format.json_schema.schema")
    schemas.check(given["schema"], "response_format.json_schema.schema")
    rule = _json(given["schema"], strict=bool(given.get("strict")))
    _checked(f"start: {rule}\n", "response_format.json_schema.schema")
    return rule


def _json(schema: Values, strict: bool) -> str:
    """The rule of a value that a schema describes."""
    how = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return "%json " + json.dumps({**schema, schemas.GUIDANCE: {**how, "lenient": not strict}})


def _functions(tools: Sequence[Values]) -> dict[str, tuple[Values, bool]]:
    """The schema of each function's arguments, and whether it is strict, by name."""
    if len(tools) > MAX_TOOLS:
        raise Refused(f"there are {len(tools)} tools, and {MAX_TOOLS} are the most", parameter="tools")
    found: dict[str, tuple[Values, bool]] = {}
    size = 0
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise Unsupported("a tool is no function", why="functions are what models here call", parameter=where)
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            why = "it needs 1 to 64 letters, digits, `_`, `-` or `.`"
            raise Refused(f"`{name!s:.80}` is no name of a function", why=why, parameter=f"{where}.function.name")
        if name in found:
            raise Refused(f"there are two functions `{name}`", parameter=f"{where}.function.name")
        where += ".function.parameters"
        schema = function.get("parameters")
        if schema is None:  # as OpenAI's API: no parameters
            schema = {"type": "object", "properties": {}, "additionalProperties": False}
        size += schemas.check(schema, where)
        if schema.get("type", "object") != "object":
            raise Refused(
                "arguments have to be an object", why=f"their type is {schema['type']!r:.80}", parameter=where
            )
        found[name] = {"type": "object", **schema}, bool(function.get("strict"))
    if size > schemas.MAX_BYTES:
        why = f"they have {size} bytes, and {schemas.MAX_BYTES} are the most"
        raise Refused("the schemas of the tools are too large", why=why, parameter="tools")
    return found


def _choice(tool_choice: str | Values | None, names: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The mode of a tool choice (``none``, ``auto``, ``required`` or ``one``), and the functions that may be called."""
    if tool_choice is None:
        return "auto", names
    if isinstance(tool_choice, str):
        if tool_choice not in {"none", "auto", "required"}:
            why = "there are `none`, `auto`, `required` and a named function"
            raise Refused(f"tool_choice `{tool_choice:.40}` is not known", why=why, parameter="tool_choice")
        return tool_choice, names
    kind = tool_choice.get("type")
    if kind == "function":
        return "one", _known([tool_choice], names)
    allowed = tool_choice.get("allowed_tools")
    if kind == "allowed_tools" and isinstance(allowed, Mapping) and allowed.get("mode") in ("auto", "required"):
        return allowed["mode"], _known(allowed.get("tools") or (), names)
    why = "there are `function` and `allowed_tools` with mode `auto` or `required`"
    raise Unsupported(f"tool_choice of type `{kind!s:.40}` is not supported", why=why, parameter="tool_choice")


def _known(chosen: Sequence[Values], names: Sequence[str]) -> list[str]:
    found = []
    for choice in chosen:
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names:
            why = f"the tools are {', '.join(names)}"
            raise Refused(f"tool_choice names `{name!s:.80}`, which is no tool", why=why, parameter="tool_choice")
        found.append(str(name))
    if not found:
        raise Refused("tool_choice allows no tool", parameter="tool_choice")
    return found


def _start(mode: str, parallel: bool, response: str, names: str) -> str:
    """The first rules: where calls are in an answer."""
    several = parallel and mode != "one"
    calls = f'"{OPEN}" call' + (f' ("\\n{OPEN}" call)*' if several else "")
    call = f"call: {names}\n"
    if mode != "auto":
        return f"start: {calls}\n{call}"
    if response:
        return f"start: {response} | {calls}\n{call}"
    start = "start: (begun call)* TEXT" if several else "start: TEXT | begun call"
    # The lazy one is done as soon as a tag is there, and text cannot go on over it.
    return f"{start}\nTEXT: /{_TEXT}/\nbegun[lazy]: /{_TEXT}{OPEN}/\n{call}"


def _hermes(name: str, schema: Values, strict: bool) -> str:
    """A call after its opening tag, as templates show it."""
    begin = f'\n{{"name": "{name}", "arguments": '
    return f"{json.dumps(begin)} {_json(schema, strict)} {json.dumps(f'}}{chr(10)}{CLOSE}')}"


def _refuse_xml(mode: str, parallel: bool, strict: bool, response: str) -> None:
    """Models that write tags around each argument are read, and cannot be held to a schema."""
    why = "this model writes calls as tags, which are read as they come and follow no grammar"
    if mode != "auto":
        raise Unsupported("the package cannot be made to call a tool", why=why, parameter="tool_choice")
    if strict:
        raise Unsupported("the package has no strict tools", why=why, parameter="tools")
    if not parallel:
        raise Unsupported("the package cannot be held to one call", why=why, parameter="parallel_tool_calls")
    if response:
        raise Unsupported("tools and a response format do not go together here", why=why, parameter="response_format")
