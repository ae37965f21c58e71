"""Whether a model is to think before it answers, and for how long: what a request says of it in several ways."""

from __future__ import annotations

from typing import Any

from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.thinking import CLOSING, OPEN, VARIABLE
from pipeline.serve.api.protocol import ChatRequest
from pipeline.serve.inference.models import Model
from pipeline.serve.refusals import Refused, Unsupported

# Models are not trained for degrees of effort. What a degree can mean is how many tokens of thoughts there may be.
EFFORTS: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 8192, "high": None, "xhigh": None}


def wanted(model: Model, request: ChatRequest, formed: bool) -> bool | None:
    """Whether the model is to think; None leaves it to its template.

    Args:
        formed: whether the answer has to follow a grammar, which it does from its first token: models that may think
            or not then do so only when they are told to.

    Raises:
        Refused: a request says both.
        Unsupported: the model cannot be told.
    """
    effort = request.reasoning_effort
    said = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs": (request.chat_template_kwargs or {}).get(VARIABLE),
        "reasoning_effort": None if effort is None else effort != "none",
    }
    said = {name: value for name, value in said.items() if value is not None}
    for name, value in said.items():
        if not isinstance(value, bool):
            raise Refused(f"`{VARIABLE}` is neither true nor false", parameter=name)
    if len(set(said.values())) > 1:
        raise Refused(f"{' and '.join(f'`{name}`' for name in said)} contradict each other", parameter=[*said][-1])
    if not said:
        return False if formed and model.switch else None
    name, value = next(iter(said.items()))
    if not model.switch and value != model.thinks:
        raise Unsupported(
            f"the model cannot be told to {'think' if value else 'answer without thinking'}",
            why=f"its chat template knows no {VARIABLE}: it {'always thinks' if model.thinks else 'never does'}",
            fix=f"leave out `{name}`",
            parameter=name,
        )
    return value


def variables(model: Model, think: bool | None) -> dict[str, Any]:
    """What the chat template is told."""
    return {} if think is None or not model.switch else {VARIABLE: think}


def opened(tokenizer: Tokenizer) -> list[int]:
    """Ids that open a block of thoughts at the end of a prompt, as a model's first tokens would."""
    return tokenizer.encode(f"{OPEN}\n")


def budget(model: Model, request: ChatRequest, think: bool | None, inside: bool, limit: int) -> int | None:
    """Most tokens of the thoughts, or None.

    Args:
        inside: whether the prompt has opened the block.
        limit: most tokens of the whole answer.

    Raises:
        Unsupported: there are no thoughts to end.
        Refused: it leaves no room for an answer.
    """
    given = request.thinking_budget
    possible = inside or (model.thinks and model.switch and think is not False)
    if given is not None and not possible:
        raise Unsupported(
            "there are no thoughts to give a budget to",
            why="the model does not think here",
            fix="leave out `thinking_budget`",
            parameter="thinking_budget",
        )
    tokens = given if given is not None else EFFORTS.get(request.reasoning_effort or "high")
    if tokens is None or not possible:
        return None
    room = limit - len(model.tokenizer.encode(CLOSING))
    if tokens < room:
        return tokens
    if given is None:  # an effort is no number that was asked for: half of what there is goes to the answer
        return room // 2 if room > 1 else None
    raise Refused(
        f"a thinking budget of {given} tokens leaves no room for an answer",
        why=f"ending the thoughts takes {limit - room} more, of {limit} tokens in all",
        fix="raise `max_tokens`, or lower `thinking_budget`",
        parameter="thinking_budget",
    )
