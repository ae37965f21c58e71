"""What an answer may look like, as grammars of llguidance: JSON that a schema describes, and calls of tools.

All functions are pure and safe in threads; compiling leaves Python's lock free. A grammar that was compiled before
costs nothing to check again; one of the largest schemas (`schemas.MAX_BYTES`) takes up to 0.3 s, so a server calls them
by `asyncio.to_thread`.

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

from pipeline.serve import schemas
from pipeline.serve.constraint import Constraint, bytes_tokenizer, first_line, matcher
from pipeline.serve.refusals import Refused, Unsupported
from pipeline.serve.tool_calls import CLOSE, END_FUNCTION, END_PARAMETER, FUNCTION, HERMES, OPEN, PARAMETER, XML

__all__ = ["Constraint", "check", "response_grammar", "tools_grammar"]

Values = Mapping[str, Any]

MAX_TOOLS = 128
"""That is OpenAI's limit too."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT = "(?s:.*)"
# What a parameter of Qwen3-Coder's form can have without being more than any text or any JSON.
_ROOT = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions"})
_NOTES = frozenset({"$comment", "$id", "$schema", "default", "description", "examples", "title"})
_STRING = frozenset({"type", "enum", "const"})


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
    function is one call of it. ``none`` is text, or JSON, in which no call begins.

    Args:
        tools: as OpenAI's API has them.
        tool_choice: ``none``, ``auto`` (when left out), ``required``, a named function, or allowed tools with a mode.
        parallel: whether there may be more than one call.
        form: how the model writes calls (`pipeline.serve.tool_calls.form_of`).
        response_format: what the answer has to be when it is no call.

    Raises:
        Refused: as of `response_grammar`; or a tool or choice is wrong.
        Unsupported: as of `response_grammar`; or the package's template knows no tools.
    """
    response = _response(response_format)
    if not tools:
        if tool_choice not in {None, "none", "auto"}:
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
    rules = []
    for place, name in enumerate(functions):
        if name in chosen:
            body = (_hermes if form == HERMES else _xml)(functions[name], f"tools[{place}].function.parameters")
            body = body.replace("RULE", f"t{place}_")
            _checked(f"start: t{place}_\nVALUE: /{_TEXT}/\n{_VALUE_RULES if form == XML else ''}{body}", _of(place))
            rules.append((f"t{place}_", body))
    return _checked(_calls(mode, parallel and mode != "named", form, response, rules), "tools")
