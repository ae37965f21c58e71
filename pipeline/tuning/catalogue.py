"""What can be made of each published model: which bases apply to it, what a build needs, and what a device needs.

Bases are the files ``_base/<target>-<scheme>.yaml`` below the folder of the recipes; a scheme is known by that name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import Estimate
from pipeline.builds import plan
from pipeline.errors import RecipeError, UsageError
from pipeline.facts import estimate, recipe as recipes, sizes, strict_yaml
from pipeline.facts.family import FAMILIES
from pipeline.facts.models import MODELS, OWNER, STRENGTHS, Model
from pipeline.facts.recipe import Architecture, Recipe
from pipeline.facts.scheme import WeightScheme
from pipeline.facts.target import TARGETS, Target, file_problem

BASES = "_base"
MIXED = "moe-"  # schemes of that name are for mixtures of experts
CONTEXT = 4096  # tokens, unless another number is asked for
# Publishers cut checkpoints into shards of at most so many bytes: 37 of them for 72B, 118 for 235B.
_SHARD = 4_000_000_000
_GIB = 1 << 30


@dataclass(frozen=True)
class Base:
    """A base recipe: what is the same for all models on a target with a scheme.

    Attributes:
        value: what it says, with all that it extends.
        recipe: it with some checkpoint of the hub, to compute with: no model's rules are held against it.
    """

    target: Target
    scheme: str
    path: Path
    value: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """``<target>-<scheme>``."""
        return f"{self.target.name}-{self.scheme}"


@dataclass(frozen=True)
class Demand:
    """What a device needs to run a package: bytes of disk and of memory, with a context of so many tokens."""

    disk: int
    memory: int
    context: int


@dataclass(frozen=True)
class Planned:
    """A build that is not to be had as a recipe yet.

    Attributes:
        steps: what each of its stages needs.
        shards: about how many files the checkpoint's weights are in.
        demand: what the package needs on its device.
        memory, disk: bytes of a machine that holds the build: memory as machines have it.
        obstacle: why this version cannot build it; empty when it can.
    """

    model: Model
    base: Base
    steps: tuple[tuple[str, Estimate], ...]
    shards: int
    demand: Demand
    memory: int
    disk: int
    obstacle: str


def find(name: str) -> Model:
    """A model by its name, or by that of a repository with the same sizes; with or without owner, in any case.

    Raises:
        UsageError: there is none.
    """
    wanted = name.lower().removeprefix(f"{OWNER.lower()}/")
    for model in MODELS.values():
        if wanted in [known.lower() for known in (model.name, *model.also)]:
            return model
    known = [repo for model in MODELS.values() for repo in (model.name, *model.also)]
    near = strict_yaml.nearest(name.rpartition("/")[2], known).removeprefix("; ")
    raise UsageError(f"the catalogue has no model {name}", fix=near or "`qwen-onnx models` lists them")


def select(task: str = "", family: str = "") -> list[Model]:
    """The models that are made for a task, of a family; all without either.

    Raises:
        UsageError: no model is.
    """
    families = sorted({model.family for model in MODELS.values()})
    for what, word, known in (("task", task, list(STRENGTHS)), ("family", family, families)):
        if word and word not in known:
            hint = strict_yaml.nearest(word, known)
            raise UsageError(f"there is no {what} `{word}`{hint}", fix=f"known: {', '.join(known)}")
    found = [m for m in MODELS.values() if (not task or task in m.strengths) and (not family or m.family == family)]
    if not found:
        raise UsageError(f"no model of family {family} is made for {task}", fix="leave one of them out")
    return found


def bases(folder: Path, target: str) -> list[Base]:
    """The bases of a target below the folder of the recipes.

    Raises:
        UsageError: there is no such target, or no base for it.
        RecipeError: a base cannot be read.
    """
    if target not in TARGETS:
        raise UsageError(
            f"unknown target `{target}`{strict_yaml.nearest(target, list(TARGETS))}",
            fix=f"known: {', '.join(TARGETS)}",
        )
    found = list(_bases(folder, TARGETS[target]))
    if not found:
        raise UsageError(
            f"there are no bases for {target} below {folder / BASES}", fix="run it where recipes/ is, or name --recipes"
        )
    return found


def _bases(folder: Path, target: Target) -> Iterator[Base]:
    for path in sorted((folder / BASES).glob(f"{target.name}-*.yaml")):
        document = strict_yaml.read(path)
        if document.findings:
            raise strict_yaml.error(document.findings, path, fix="")
        if document.value.get("target") == target.name:
            some = {"sources": [_source(f"{OWNER}/any")], "license": "any", "base_model": "any"}
            recipe = recipes.read({**document.value, "checkpoint": some}, path)
            yield Base(target, path.stem.removeprefix(f"{target.name}-"), path, document.value, recipe)


def _source(repo: str) -> dict[str, str]:
    return {"type": "hub", "repo": repo, "revision": "main"}


def base(folder: Path, target: str, scheme: str) -> Base:
    """The base of a target and a scheme.

    Raises:
        UsageError: there is none.
    """
    found = {item.scheme: item for item in bases(folder, target)}
    if scheme not in found:
        hint = strict_yaml.nearest(scheme, list(found))
        raise UsageError(f"{target} has no scheme `{scheme}`{hint}", fix=f"known: {', '.join(found)}")
    return found[scheme]


def value(model: Model, base: Base, context: int | None = None) -> dict[str, Any]:
    """What a recipe for ``model`` says beside its base.

    Args:
        context: length of the package's context; the model's or the base's own without it.
    """
    known = Architecture.model_fields
    own: dict[str, Any] = {
        "description": f"{model.name} for {base.target.title}, {base.scheme}",
        "checkpoint": {
            "sources": [_source(model.repo)],
            "license": model.license,
            "base_model": model.repo,
            "languages": list(model.languages),
        },
        "architecture": {key: size for key, size in model.shape.facts().items() if key in known},
    }
    if context and base.target.compiled:
        own["npu"] = {"cache": _rounded(context, base.value["npu"]["window"])}
    elif context:
        own["generation"] = {"context_length": context}
    embedding = _fitted(model, base).quantize.embedding
    if embedding != base.recipe.quantize.embedding:
        assert isinstance(embedding, WeightScheme)
        own["quantize"] = {"embedding": embedding.model_dump()}
    return own


def _fitted(model: Model, base: Base) -> Recipe:
    """A base with an embedding of its own, in the head's scheme, where the model's head is another matrix."""
    quantize = base.recipe.quantize
    own = quantize.head or quantize.body
    if model.shape.tied or quantize.embedding != "shared" or own is None:
        return base.recipe
    return base.recipe.model_copy(update={"quantize": quantize.model_copy(update={"embedding": own})})


def _rounded(context: int, window: int) -> int:
    """Cache slots for a context: whole windows, and no fewer than 128."""
    return max(128, math.ceil(context / window) * window)


def as_recipe(model: Model, base: Base, context: int | None = None) -> Recipe:
    """A recipe for ``model``, checked.

    Raises:
        RecipeError: the model cannot be built so.
    """
    own = value(model, base, context)
    merged = {**base.value, **own}
    for section in ("npu", "generation", "quantize"):
        if isinstance(base.value.get(section), dict) and section in own:
            merged[section] = {**base.value[section], **own[section]}
    return recipes.read(merged, base.path)


def obstacle(model: Model, base: Base) -> str:
    """Why this version cannot build a model so; empty when it can."""
    if model.family not in FAMILIES:
        return f"family {model.family} is not supported; supported: {', '.join(FAMILIES)}"
    if model.headless:
        return "it has no head: packages are decoders that generate"
    if base.target.missing:
        return base.target.missing
    try:
        recipe = as_recipe(model, base)
    except RecipeError as error:
        return findings(error)
    return (
        _mixture_problem(model, base)
        or "; ".join(plan.family_problems(recipe, model.shape))
        or file_problem(base.target, estimate.packed(recipe, model.shape, model.tower))
    )


def _mixture_problem(model: Model, base: Base) -> str:
    """Why a base is for other models, with or without mixtures of experts; empty when it is not."""
    if base.scheme.startswith(MIXED) and not model.shape.experts:
        return "its scheme is for mixtures of experts"
    if model.shape.experts and base.recipe.quantize.embedding == "shared":
        return f"its scheme is for models without mixtures of experts, which have those that begin with {MIXED}"
    return ""


def findings(error: RecipeError) -> str:
    """What an error of a recipe found, without the places."""
    return "; ".join(row.partition(": ")[2] for row in error.what.split("\n")[1:]) or error.what


def demand_of(model: Model, base: Base, context: int = CONTEXT) -> Demand:
    """What the package that a base makes of a model needs on its device."""
    return demand(model, _fitted(model, base), context)


def demand(model: Model, recipe: Recipe, context: int = CONTEXT) -> Demand:
    """What the package that a recipe makes of a model needs on its device."""
    packed, width = estimate.packed(recipe, model.shape, model.tower), estimate.floats(recipe)
    memory = sizes.runtime_bytes(model.shape, packed, context, width)
    return Demand(packed + sizes.FILES, memory, context)


def planned(model: Model, base: Base, context: int = CONTEXT, exporter: str = "") -> Planned:
    """What a build would need, whether or not this version can do it.

    Args:
        exporter: another one than the base's.

    Raises:
        UsageError: there is no such exporter.
    """
    if exporter and exporter not in estimate.EXPORTING:
        raise UsageError(f"there is no exporter `{exporter}`", fix=f"known: {', '.join(estimate.EXPORTING)}")
    recipe = _fitted(model, base)
    if exporter:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"exporter": exporter})})
    stages = [stage.name for stage in plan.stages_of(base.target)]
    steps = tuple((stage, estimate.of(stage, recipe, model.shape, model.tower)) for stage in stages)
    peak = max(need.memory for _, need in steps)
    return Planned(
        model,
        base,
        steps,
        math.ceil(2 * model.computed / _SHARD),
        demand(model, recipe, context),
        machine(peak),
        sum(need.disk for _, need in steps),
        obstacle(model, base),
    )


def machine(memory: int) -> int:
    """Bytes of the smallest machine that has so many free: machines come in powers of two, and keep a tenth."""
    size = 4 * _GIB
    while 0.9 * size < memory:
        size *= 2
    return size
