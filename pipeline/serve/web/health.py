"""How the models of a server are, and the reasons where one is not as it should be."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from pipeline.serve.inference.engine import FAILED, IDLE, LOADING, READY, RESTARTING, STOPPING
from pipeline.serve.inference.models import Models

_SAMPLE = 32  # tokens that a speed is the median of
_SLOW = 5.0
"""Times slower than at first that counts as degraded: long contexts and a neighbour on the machine cost less."""

_ORDER = (STOPPING, FAILED, RESTARTING, LOADING)


class ModelHealth(BaseModel):
    """How one model is."""

    state: str = Field(description="loading, ready, idle (unloaded; the next request loads it), restarting, failed...")
    why: str = Field("", description="Why it is not ready.")
    waiting: int
    running: int
    restarts: int
    tokens_per_second: float | None = Field(None, description="Of late, of all answers together.")
    self_test: dict[str, Any] = Field(
        default_factory=dict, description="Of the golden answers at the last start: problem, tokens, seconds."
    )


class Health(BaseModel):
    """The answer of `GET /health` and `GET /ready`."""

    status: Literal["ok", "degraded", "loading", "restarting", "failed", "stopping"]
    reasons: list[str]
    models: dict[str, ModelHealth]


class Pace:
    """How fast a model makes tokens, now and at first."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_SAMPLE)

    def note(self, seconds: float, running: int) -> None:
        """Take in the time from one token of an answer to its next, while so many took turns."""
        each = seconds / max(1, running)
        if len(self._first) < _SAMPLE:
            self._first.append(each)
        self._last.append(each)

    @property
    def tokens_per_second(self) -> float | None:
        """Of late; None before there is a token to tell from."""
        middle = statistics.median(self._last) if self._last else 0.0
        return 1 / middle if middle else None

    @property
    def problem(self) -> str:
        """That it is much slower than at first; empty when it is not, or is not known."""
        if len(self._first) < _SAMPLE or len(self._last) < _SAMPLE:
            return ""
        first, last = statistics.median(self._first), statistics.median(self._last)
        if last <= _SLOW * first:
            return ""
        return f"it makes {1 / last:.1f} tokens a second, and made {1 / first:.1f} at first"


def of(models: Models, paces: Mapping[str, Pace], stopping: bool = False) -> Health:
    """The health of all models together: the worst state, else whether one is degraded."""
    found: dict[str, ModelHealth] = {}
    reasons: list[str] = []
    for model in models:
        engine, pace = model.engine, paces[model.name]
        speed = pace.tokens_per_second
        found[model.name] = ModelHealth(
            state=engine.state,
            why=engine.why,
            waiting=engine.waiting,
            running=engine.running,
            restarts=engine.counts.restarts,
            tokens_per_second=round(speed, 2) if speed else None,
            self_test=engine.self_test,
        )
        if engine.state not in (READY, IDLE):
            reasons.append(f"{model.name} is {engine.state}: {engine.why}")
        if problem := engine.self_test.get("problem"):
            reasons.append(f"{model.name} does not compute what was validated: {problem}")
        if pace.problem:
            reasons.append(f"{model.name} is slow: {pace.problem}")
    states = {health.state for health in found.values()} | ({STOPPING} if stopping else set())
    status: Any = next((state for state in _ORDER if state in states), "degraded" if reasons else "ok")
    return Health(status=status, reasons=reasons, models=found)


def answers(health: Health) -> bool:
    """Whether requests are answered."""
    return health.status in ("ok", "degraded")
