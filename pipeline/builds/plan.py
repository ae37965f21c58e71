"""From a recipe to steps: pure, no weights, no network, no heavy import."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__, digest
from pipeline.artifact import Step
from pipeline.checkpoint import files as checkpoint_files
from pipeline.errors import CheckpointError, RecipeError, RuntimeMissing
from pipeline.facts import (
    estimate,
    expert_forms,
    exporters,
    machine,
    models,
    multimodal,
    positions,
    target as targets,
    texts,
)
from pipeline.facts.family import FAMILIES, Shape, read_shape
from pipeline.facts.recipe import Loaded, Recipe, exporter_of
from pipeline.facts.sizes import Tower
from pipeline.facts.target import CPU, TARGETS, Target, file_problem
from pipeline.lora import files as lora_files
from pipeline.npu import isolated
from pipeline.task import EMBED, TASKS, Task

# Distributions that provide the same module for other hardware.
_SAME = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
}
Fields = Callable[[Loaded], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """What is known of a stage before it runs; raise ``version`` when its code gives other results.

    A ``compiled`` stage, and inputs from it, are for targets whose graphs are compiled ahead of time; an ``adapted``
    one is for recipes with ``adapters``.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    tools: tuple[str, ...]
    compiled: bool = False
    adapted: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("checkpoint", 1, (), ("torch", "transformers", "gguf", "tokenizers", "peft", "safetensors")),
    Stage(
        "export", 3, ("checkpoint",), ("olive-ai", "onnxruntime-genai", "optimum-onnx", "onnx", "torch", "transformers")
    ),
    Stage(
        "quantize", 4, ("checkpoint", "export"), ("olive-ai", "onnxruntime", "onnx", "numpy", "torch", "transformers")
    ),
    Stage("compile", 1, ("quantize",), ("onnxruntime", "onnxruntime-qnn"), compiled=True),
    # After quantization, which takes minutes and does not depend on adapters.
    Stage(
        "adapters",
        1,
        ("checkpoint", "quantize"),
        ("onnx", "onnxruntime", "peft", "safetensors", "torch", "transformers"),
        adapted=True,
    ),
    Stage(
        "validate",
        3,
        ("checkpoint", "quantize", "compile", "adapters"),
        ("onnxruntime-genai", "torch", "transformers", "tokenizers"),
    ),
    Stage("package", 10, ("checkpoint", "quantize", "compile", "adapters", "validate"), ("onnxruntime-genai",)),
)


def make(loaded: Loaded, versions: Mapping[str, str] | None = None) -> list[Step]:
    """The steps of a recipe, in order.

    Args:
        loaded: the recipe.
        versions: of the tools; the installed ones of those that are left out.

    Raises:
        RecipeError: the recipe's target cannot be built by this version, or it names a branch (`pipeline.builds.lock`).
        CheckpointError: a local checkpoint is missing, is not supported, or cannot have the recipe's context.
        RuntimeMissing: a tool is not installed.
    """
    recipe = loaded.recipe
    target = TARGETS[recipe.target]
    if loose := [source for source in recipe.checkpoint.sources if source.type == "hub" and not source.locked]:
        raise RecipeError(
            "the recipe is not locked",
            where=f"{loaded.path}: {loose[0].repo} at {loose[0].revision}",
            why="a branch or tag moves: what is built would depend on the day",
            fix=f"qwen-onnx lock {loaded.path}",
        )
    if target.missing:
        raise RecipeError(
            f"target {target.name} cannot be built",
            where=str(loaded.path),
            why=target.missing,
            fix="`qwen-onnx targets` shows what each target lacks",
        )
    known = models.published(recipe.checkpoint.base_model)
    if known and not known.shape.tied and recipe.quantize.embedding == "shared":
        raise RecipeError(
            f"{known.name} cannot share its head with the embedding",
            where=f"{loaded.path}: quantize.embedding",
            why="they are two matrices in it",
            fix="give the embedding a scheme of its own, such as {bits: 8, block_size: 128, symmetric: true}",
        )
    for config, where in _local_configs(loaded):
        positions.check_context(config, _context_length(recipe), where)
    shape, tower = shape_of(loaded), tower_of(loaded)
    if shape:
        if FAMILIES[shape.model_type].multimodal:
            _check_media(loaded, target)
        _check_family(loaded, shape)
    size = estimate.of("quantize", recipe, shape, tower).disk
    if shape and (problem := file_problem(target, size)):
        raise RecipeError(
            f"the package would be too large for {target.name}",
            where=str(loaded.path),
            why=problem,
            fix="quantize to fewer bits, or choose a smaller model",
        )
    stages = stages_of(target, recipe.adapters is not None)
    names = {name for stage in stages for name in stage.tools}
    if target.isolated:
        names.add(target.runtime.plugin.partition("==")[0])
    found = {name: (versions or {}).get(name) or installed(name) for name in sorted(names)}
    own = isolated.pins() if target.isolated else {}
    steps: dict[str, Step] = {}
    for stage in stages:
        inputs = tuple(name for name in stage.inputs if name in steps)
        fields = _fields(stage.name, loaded)
        tools = _tools(stage, target, TASKS[recipe.task], found)
        if stage.name == "package":
            fields |= {"sha256": steps["checkpoint"].fields["sha256"]}
            fields |= {"tools": {**own, **found, "qwen-onnx": __version__}}
        key = digest.of_value(
            {
                "stage": stage.name,
                "version": stage.version,
                "fields": fields,
                "inputs": [steps[name].key for name in inputs],
                "tools": tools,
            }
        )
        need = estimate.of(stage.name, recipe, shape, tower)
        steps[stage.name] = Step(stage.name, key, fields, inputs, tools, need, _context(stage.name, loaded))
    return list(steps.values())


def family_problems(recipe: Recipe, shape: Shape) -> list[str]:
    """What cannot be built of a model of that shape as a recipe says, each with its place in it."""
    target, export = TARGETS[recipe.target], recipe.export
    written = exporter_of(recipe, shape)
    found = [*expert_forms.problems(target, written, export.rotate, export.experts, recipe.quantize, shape)]
    # A recipe that does not tell the sizes has been checked with the exporter of other models.
    section = {**export.model_dump(exclude_none=True), "exporter": written}
    found += targets.problems(target, section, recipe.quantize)
    return [f"{'.'.join(map(str, loc))}: {text}" for loc, text in found]


def _check_family(loaded: Loaded, shape: Shape) -> None:
    if found := family_problems(loaded.recipe, shape):
        raise RecipeError(
            f"{shape.model_type} cannot be built as the recipe says\n" + "\n".join(f"  {text}" for text in found),
            where=str(loaded.path),
            fix="correct the recipe; `qwen-onnx recipe schema` lists all keys",
        )


def stages_of(target: Target, adapted: bool = False) -> list[Stage]:
    """The stages of a build for ``target``, in order; ``adapted`` when LoRA adapters are kept apart."""
    return [stage for stage in STAGES if (target.compiled or not stage.compiled) and (adapted or not stage.adapted)]


def _check_media(loaded: Loaded, target: Target) -> None:
    """Refuse what models that see or hear cannot be built for or with.

    Raises:
        RecipeError: saying why.
    """
    if target.provider != CPU:
        what, why = f"target {target.name}", "their graphs are written and checked for the processor only"
    elif loaded.recipe.adapters is not None:
        what, why = "a recipe with `adapters`", "slots are made in decoders of text alone"
    elif not TASKS[loaded.recipe.task].generates:
        what, why = f"task {loaded.recipe.task}", "they generate text"
    else:
        return
    raise RecipeError(f"{what} takes no models that see or hear", where=str(loaded.path), why=why)


def _tools(stage: Stage, target: Target, task: Task, found: Mapping[str, str]) -> dict[str, str]:
    """The versions that a step's result depends on."""
    if target.isolated and stage.name in ("export", "quantize"):
        return isolated.pins()
    plugin = target.runtime.plugin.partition("==")[0]
    more = (plugin,) if target.isolated and stage.name == "validate" else ()
    names = (*stage.tools, *more)
    if not task.generates and stage.name in ("validate", "package"):
        names = tuple("onnxruntime" if name == "onnxruntime-genai" else name for name in names)
    return {name: found[name] for name in names}


def installed(name: str) -> str:
    """The installed version of a distribution, without importing it.

    Raises:
        RuntimeMissing: it is not installed.
    """
    for distribution in _SAME.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeMissing(
        f"{name} is not installed",
        why="building needs the `build` extra",
        fix="make .venv, or pip install --constraint constraints.txt '.[build]'",
    )


def shape_of(loaded: Loaded) -> Shape | None:
    """The model's sizes as far as they are known without fetching: from the recipe, or a local config.json."""
    given = loaded.recipe.architecture
    if given:
        return given.shape
    return next((read_shape(config, where) for config, where in _local_configs(loaded)), None)


def tower_of(loaded: Loaded) -> Tower | None:
    """The sizes of what is in front of the decoder, where a local config.json tells them."""
    return next((multimodal.tower(config, read_shape(config, at), at) for config, at in _local_configs(loaded)), None)


def _local_configs(loaded: Loaded) -> Iterator[tuple[Any, str]]:
    """The ``config.json`` of each local checkpoint that has one, and its path."""
    for source in loaded.recipe.checkpoint.sources:
        if source.type == "local":
            path = loaded.path.parent / source.path / "config.json"
            if path.is_file():
                try:
                    yield json.loads(path.read_bytes()), str(path)
                except ValueError as error:
                    raise CheckpointError("config.json is not JSON", where=str(path), why=str(error)) from None


def _context_length(recipe: Recipe) -> int | None:
    """The context that a recipe asks for; ``None`` where it takes the checkpoint's."""
    return recipe.npu.cache if recipe.npu else recipe.generation.context_length


def _fields(stage: str, loaded: Loaded) -> dict[str, Any]:
    recipe = loaded.recipe
    target, task = TARGETS[recipe.target], TASKS[recipe.task]
    # Not said of generation, which all steps are for unless they are told otherwise.
    purpose = {} if task.generates else {"task": task.name}
    if stage in ("checkpoint", "adapters"):
        headless = {"headless": True} if task.name == EMBED else {}
        return {**_identity(loaded), **headless} if stage == "checkpoint" else _adapters(loaded)
    if stage == "export":
        dtype = recipe.export.dtype or target.dtypes[0]
        npu = {"window": recipe.npu.window, "cache": recipe.npu.cache} if recipe.npu else {}
        draft = target.draft_tokens if recipe.export.draft_tokens is None else recipe.export.draft_tokens
        shape = shape_of(loaded)
        form = expert_forms.form(target, recipe.quantize, shape, recipe.export.experts)
        written = exporter_of(recipe, shape)
        own = {"exporter": written, "provider": target.provider, "dtype": dtype, "draft_tokens": draft}
        own |= {"experts": form} if form and written == exporters.NATIVE else {}  # other exporters know none
        return {**recipe.export.model_dump(mode="json", exclude={"experts"}), **own, **npu, **purpose}
    if stage == "quantize":
        form = target.kernels.form if target.kernels else ""
        scheme = recipe.quantize.model_dump(mode="json")
        for key in ("vision", "audio"):
            if scheme[key] == "float":
                del scheme[key]  # most models have none
        fields = {**scheme, "form": form, "rotate": recipe.export.rotate, **purpose}
        return fields | ({"text": texts.CALIBRATION.sha256} if recipe.quantize.algorithm in ("gptq", "static") else {})
    if stage == "compile":
        assert recipe.npu is not None  # `recipe` refuses a compiled target without it
        return {"soc": recipe.npu.soc, "share_weights": recipe.npu.share_weights}
    if stage == "validate":
        fields = recipe.validation.model_dump(mode="json")
        if fields["long_tokens"] is None:  # the key of a recipe without stays what it was
            del fields["long_tokens"]
        here = asdict(machine.execution(target))
        names = {"target": target.name, "provider": target.provider}
        soc = {"soc": recipe.npu.soc} if recipe.npu else {}
        return {**fields, "text": texts.EVALUATION.sha256, **names, **soc, "execution": here, **purpose}
    checkpoint = recipe.checkpoint
    return {
        "name": loaded.name,
        "description": recipe.description,
        "recipe": _published(loaded.resolved),
        "generation": recipe.generation.model_dump(mode="json"),
        "license": checkpoint.license,
        "base_model": checkpoint.base_model,
        "languages": list(checkpoint.languages),
        "sources": [source.model_dump(mode="json") for source in checkpoint.sources if source.type != "local"],
        "target": {
            "name": target.name,
            "title": target.title,
            "provider": target.provider,
            "option": target.option,
            "dtype": recipe.export.dtype or target.dtypes[0],
            "shapes": target.shapes,
            **({"soc": recipe.npu.soc} if recipe.npu else {}),
        },
        "runtime": _runtime(target) if task.generates else _plain_runtime(),
        "replay": asdict(target.replay) if task.generates else dict(task.tolerance),
        **purpose,
        "max_file": target.max_file,
    }


def _runtime(target: Target) -> dict[str, str]:
    runtime = target.runtime
    return {"name": runtime.package, "minimum": runtime.minimum, "install": _install(target)}


def _plain_runtime() -> dict[str, str]:
    """What runs packages that generate nothing: the version that they were validated with, or a newer one."""
    version = installed("onnxruntime")
    return {
        "name": "onnxruntime",
        "minimum": version,
        "install": f"pip install onnxruntime=={version} tokenizers numpy",
    }


def _install(target: Target) -> str:
    runtime = target.runtime
    plugin = f" {runtime.plugin}" if runtime.plugin else ""
    return (
        runtime.install or f"pip install {runtime.package}=={runtime.newest or installed('onnxruntime-genai')}{plugin}"
    )


def _published(resolved: dict[str, Any]) -> dict[str, Any]:
    """The recipe as a package shows it: where a local checkpoint or adapter lay is nobody's business."""
    checkpoint = dict(resolved.get("checkpoint", {}))
    sources = [
        {**source, "path": Path(source["path"]).name} if source.get("type") == "local" else source
        for source in checkpoint.get("sources", [])
    ]
    merged = {"adapter": Path(checkpoint["adapter"]).name} if checkpoint.get("adapter") else {}
    adapters = resolved.get("adapters")
    shown = {name: {**given, "path": Path(given["path"]).name} for name, given in (adapters or {}).items()}
    more = {} if adapters is None else {"adapters": shown}
    return {**resolved, "checkpoint": {**checkpoint, "sources": sources, **merged}, **more}


def _identity(loaded: Loaded) -> dict[str, Any]:
    spec = loaded.recipe.checkpoint
    identity: dict[str, Any] = {"sha256": spec.sha256}
    if spec.sha256 is None:
        pinned = [source for source in spec.sources if source.type == "hub"]
        local = [loaded.path.parent / source.path for source in spec.sources if source.type == "local"]
        present = [path for path in local if path.exists()]
        if present:
            identity["sha256"] = (
                digest.of_file(present[0]) if present[0].is_file() else checkpoint_files.tree_digest(present[0])
            )
        elif pinned:
            identity["revision"] = f"{pinned[0].repo}@{pinned[0].revision}"
        else:
            raise CheckpointError(
                f"there is no checkpoint at {', '.join(map(str, local))}",
                where=str(loaded.path),
                fix="correct checkpoint.sources; paths start at the recipe's folder",
            )
    if spec.adapter:
        adapter = loaded.path.parent / spec.adapter
        if not adapter.is_dir():
            raise CheckpointError(f"there is no adapter at {adapter}", where=str(loaded.path))
        identity["adapter"] = digest.of_tree(adapter)
    given = loaded.recipe.architecture
    identity["architecture"] = given.model_dump(mode="json", exclude_none=True) if given else None
    return identity


def _context(stage: str, loaded: Loaded) -> dict[str, Any]:
    base = loaded.path.parent.resolve()
    if stage == "checkpoint":
        return {
            "checkpoint": loaded.recipe.checkpoint.model_dump(mode="json"),
            "base": str(base),
            "context_length": _context_length(loaded.recipe),
        }
    if stage == "adapters":
        return {"folders": {name: str(base / given.path) for name, given in (loaded.recipe.adapters or {}).items()}}
    return {}


def _adapters(loaded: Loaded) -> dict[str, Any]:
    """For each adapter its digest and licence; raises `CheckpointError` for one that cannot be kept apart."""
    recipe, found = loaded.recipe, {}
    for name, given in (recipe.adapters or {}).items():
        folder = loaded.path.parent / given.path
        lora_files.check(folder)
        found[name] = {"sha256": lora_files.identity(folder), "license": given.license or recipe.checkpoint.license}
    return {"adapters": found, "dtype": recipe.export.dtype or TARGETS[recipe.target].dtypes[0]}
