"""Choosing a model and a scheme that fit a device."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError, ResourceError, UsageError
from pipeline.facts import recipe as recipes
from pipeline.facts.models import COMMERCIAL, Model
from pipeline.tuning import catalogue
from pipeline.tuning.catalogue import Base, Demand

# What a generation is worth beside size: its publisher says of Qwen3 that 1.7B, 4B, 8B, 14B and 32B do what 3B, 7B,
# 14B, 32B and 72B of Qwen2.5 did, and of Qwen2 that 72B does more than 110B of Qwen1.5.
_GENERATION = 2.0
# Models that read more tokens than this are made for that, and are taken where others read too few.
_LONG = 262_144


@dataclass(frozen=True)
class Choice:
    """A model and a scheme.

    Attributes:
        demand: what the package needs on its device.
        why: sentences, for people.
        path: a recipe that there is for it already.
        text: the recipe to write where there is none.
    """

    model: Model
    base: Base
    demand: Demand
    why: tuple[str, ...]
    path: Path | None
    text: str


@dataclass(frozen=True)
class _Candidate:
    model: Model
    base: Base
    demand: Demand

    @property
    def loss(self) -> float:
        """What the scheme may lose: the gate of its base, in nats a token."""
        return float(self.base.value["validate"]["gates"]["mean_kl"])


def choose(
    folder: Path, task: str, memory: int, target: str, context: int, family: str = "", research: bool = False
) -> Choice:
    """The best model for a task that fits, by size and generation, and of its schemes the one that loses least.

    Args:
        folder: of the recipes.
        memory: bytes that the device has for the model.
        context: tokens of prompt and answer.
        research: also models whose licence allows nothing but research.

    Raises:
        UsageError: there is no such task, family or target, or no model for them can be built by this version.
        ResourceError: none fits.
    """
    models = catalogue.select(task, family)
    if task not in ("vision", "audio"):  # a tower takes memory that answers to texts do not gain from
        models = [model for model in models if model.tower is None] or models
    bases = catalogue.bases(folder, target)
    allowed = [model for model in models if research or model.license in COMMERCIAL]
    obstacles: dict[str, str] = {}
    candidates = list(_candidates(allowed, bases, context, obstacles))
    if not candidates:
        raise UsageError(
            f"this version builds no model for {task} on {target} with a context of {context} tokens",
            why="; ".join(dict.fromkeys(obstacles.values()))
            or "the licences of those that are left allow research only",
            fix="`qwen-onnx models` lists all, and what keeps each from being built",
        )
    fitting = [item for item in candidates if item.demand.memory <= memory]
    if not fitting:
        least = min(candidates, key=lambda item: item.demand.memory)
        raise ResourceError(
            f"no model for {task} fits {memory / 1e9:.2f} GB on {target} with a context of {context} tokens",
            why=f"the smallest, {least.model.name} as {least.base.scheme}, needs {least.demand.memory / 1e9:.2f} GB",
            fix=f"--memory {math.ceil(least.demand.memory / 1e7) / 100}GB, or a shorter --context",
        )
    best = _best(fitting)
    path, own = _existing(folder, best, memory) or (None, best.demand)
    best = replace(best, demand=own)
    text = "" if path else recipe_text(best.model, best.base, context, folder / best.model.name.lower())
    why = tuple(_reasons(best, fitting, candidates, models, memory, research))
    return Choice(best.model, best.base, best.demand, why, path, text)


def worth(model: Model) -> float:
    """How much is expected of a model: its parameters (of a mixture of experts the geometric mean of all of them and of
    those that a token goes through), doubled for each generation."""
    return math.sqrt(model.computed * model.active) * float(_GENERATION**model.generation)


def _candidates(
    models: Sequence[Model], bases: Sequence[Base], context: int, obstacles: dict[str, str]
) -> Iterator[_Candidate]:
    for model in models:
        for base in bases:
            problem = catalogue.obstacle(model, base) or _too_short(model, base, context)
            if problem:
                obstacles[f"{model.name} {base.name}"] = problem
            else:
                yield _Candidate(model, base, catalogue.demand_of(model, base, context))


def _too_short(model: Model, base: Base, context: int) -> str:
    """Why a context is too long for a model on a target; empty when it is not."""
    if context > model.shape.context:
        return f"{model.name} reads {model.shape.context} tokens"
    try:
        catalogue.as_recipe(model, base, context)
    except RecipeError as error:
        return catalogue.findings(error)
    return ""


def _best(fitting: Sequence[_Candidate]) -> _Candidate:
    usual = [item for item in fitting if item.model.shape.context <= _LONG] or fitting
    return max(usual, key=lambda item: (worth(item.model), item.model.released, -item.loss))


def _existing(folder: Path, best: _Candidate, memory: int) -> tuple[Path, Demand] | None:
    """A recipe that there is for the same model, target and scheme, and what its own weights need, if that fits."""
    for path in recipes.find(folder):
        if path.stem == best.base.name:
            recipe = recipes.load(path).recipe
            context = best.demand.context
            own = catalogue.demand(best.model, recipe, context)
            reads = recipe.npu.cache if recipe.npu else recipe.generation.context_length or context
            if recipe.checkpoint.base_model == best.model.repo and own.memory <= memory and reads >= context:
                return path, own
    return None


def _reasons(
    best: _Candidate,
    fitting: Sequence[_Candidate],
    candidates: Sequence[_Candidate],
    models: Sequence[Model],
    memory: int,
    research: bool,
) -> Iterator[str]:
    model, demand = best.model, best.demand
    yield (
        f"{model.name} is made for {', '.join(model.strengths)}, has {model.computed / 1e9:.2f} billion parameters and "
        f"the licence {model.license}"
    )
    yield (
        f"as {best.base.scheme} it takes {demand.disk / 1e9:.2f} GB of disk, and {demand.memory / 1e9:.2f} of "
        f"{memory / 1e9:.2f} GB of memory with {demand.context} tokens of context"
    )
    if others := sorted({item.base.scheme for item in candidates if item.model is model} - {best.base.scheme}):
        fit = {item.base.scheme for item in fitting if item.model is model}
        told = [f"{name} ({'fits, and loses more' if name in fit else 'does not fit'})" for name in others]
        yield f"its other schemes: {', '.join(told)}"
    better = [item for item in candidates if item not in fitting and worth(item.model) > worth(model)]
    if better:
        least = min(better, key=lambda item: item.demand.memory)
        yield f"the next better one, {least.model.name}, needs {least.demand.memory / 1e9:.2f} GB at least"
    else:
        yield "this version builds no better one for this task (by size and generation)"
    left_out = [item.name for item in models if item.license not in COMMERCIAL and worth(item) > worth(model)]
    if left_out and not research:
        yield f"left out, since the licence allows research only: {', '.join(left_out)} (--research takes it in)"


def recipe_text(model: Model, base: Base, context: int, folder: Path) -> str:
    """The YAML of a recipe for ``model`` that extends ``base``, to be written into ``folder``."""
    own = catalogue.value(model, base, context)
    (source,) = own["checkpoint"]["sources"]
    lines = [
        f"extends: {json.dumps(Path(os.path.relpath(base.path, folder)).as_posix())}",
        f"description: {json.dumps(own['description'])}",
        "checkpoint:",
        "  sources:",
        *(f"    {'- ' if index == 0 else '  '}{key}: {text}" for index, (key, text) in enumerate(source.items())),
        *(f"  {key}: {_flow(own['checkpoint'][key])}" for key in ("license", "base_model", "languages")),
        "architecture:",
        *(f"  {key}: {_flow(size)}" for key, size in own["architecture"].items()),
        *(f"{key}: {_flow(own[key])}" for key in ("npu", "generation", "quantize") if key in own),
    ]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()
