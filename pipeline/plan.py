"""From a recipe to steps: pure, no weights, no network, no heavy import."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__, checkpoint_files, digest, isolated, machine, texts
from pipeline.artifact import Estimate, Step
from pipeline.errors import CheckpointError, RecipeError, RuntimeMissing
from pipeline.family import FAMILIES, HELD_WHOLE, Shape, read_shape
from pipeline.recipe import Loaded, Recipe
from pipeline.target import CPU, TARGETS, Target, file_problem

_GB = 1_000_000_000
# Distributions that provide the same module for other hardware.
_SAME = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
}
Fields = Callable[[Loaded], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """What is known of a stage before it runs; raise ``version`` when its code gives other results.

    A ``compiled`` stage, and inputs from it, are for targets whose graphs are compiled ahead of time.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    tools: tuple[str, ...]
    compiled: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("checkpoint", 1, (), ("torch", "transformers", "gguf", "tokenizers", "peft", "safetensors")),
    Stage(
        "export", 3, ("checkpoint",), ("olive-ai", "onnxruntime-genai", "optimum-onnx", "onnx", "torch", "transformers")
    ),
    Stage(
        "quantize", 3, ("checkpoint", "export"), ("olive-ai", "onnxruntime", "onnx", "numpy", "torch", "transformers")
    ),
    Stage("compile", 1, ("quantize",), ("onnxruntime", "onnxruntime-qnn"), compiled=True),
    Stage(
        "validate",
        2,
        ("checkpoint", "quantize", "compile"),
        ("onnxruntime-genai", "torch", "transformers", "tokenizers"),
    ),
    Stage("package", 5, ("checkpoint", "quantize", "compile", "validate"), ("onnxruntime-genai",)),
)


def make(loaded: Loaded, versions: Mapping[str, str] | None = None) -> list[Step]:
    """The steps of a recipe, in order.

    Args:
        loaded: the recipe.
        versions: of the tools; the installed ones of those that are left out.

    Raises:
        RecipeError: the recipe's target cannot be built by this version.
        CheckpointError: a local checkpoint is missing.
        RuntimeMissing: a tool is not installed.
    """
    recipe = loaded.recipe
    target = TARGETS[recipe.target]
    if target.missing:
        raise RecipeError(
            f"target {target.name} cannot be built",
            where=str(loaded.path),
            why=target.missing,
            fix="`qwen-onnx targets` shows what each target lacks",
        )
    shape = shape_of(loaded)
    if shape and FAMILIES[shape.model_type].multimodal and target.provider != CPU:
        raise RecipeError(
            f"target {target.name} takes no models that see or hear",
            where=str(loaded.path),
            why=f"the graphs of a {shape.model_type} are written and checked for the processor only",
            fix="use target cpu",
        )
    size = _estimate("quantize", recipe, shape).disk
    if shape and (problem := file_problem(target, size)):
        raise RecipeError(
            f"the package would be too large for {target.name}",
            where=str(loaded.path),
            why=problem,
            fix="quantize to fewer bits, or choose a smaller model",
        )
    stages = [stage for stage in STAGES if target.compiled or not stage.compiled]
    names = {name for stage in stages for name in stage.tools}
    if target.isolated:
        names.add(target.runtime.plugin.partition("==")[0])
    found = {name: (versions or {}).get(name) or installed(name) for name in sorted(names)}
    own = isolated.pins() if target.isolated else {}
    steps: dict[str, Step] = {}
    for stage in stages:
        inputs = tuple(name for name in stage.inputs if name in steps)
        fields = _fields(stage.name, loaded)
        tools = _tools(stage, target, found)
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
        context = _context(loaded) if stage.name == "checkpoint" else {}
        estimate = _estimate(stage.name, recipe, shape)
        steps[stage.name] = Step(stage.name, key, fields, inputs, tools, estimate, context)
    return list(steps.values())


def _tools(stage: Stage, target: Target, found: Mapping[str, str]) -> dict[str, str]:
    """The versions that a step's result depends on."""
    if target.isolated and stage.name in ("export", "quantize"):
        return isolated.pins()
    plugin = target.runtime.plugin.partition("==")[0]
    more = (plugin,) if target.isolated and stage.name == "validate" else ()
    return {name: found[name] for name in (*stage.tools, *more)}


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
        return Shape(**given.model_dump(), context=0, tied=False)
    for source in loaded.recipe.checkpoint.sources:
        if source.type == "local":
            path = loaded.path.parent / source.path / "config.json"
            if path.is_file():
                try:
                    return read_shape(json.loads(path.read_bytes()), str(path))
                except ValueError as error:
                    raise CheckpointError("config.json is not JSON", where=str(path), why=str(error)) from None
    return None


def _fields(stage: str, loaded: Loaded) -> dict[str, Any]:
    recipe = loaded.recipe
    target = TARGETS[recipe.target]
    if stage == "checkpoint":
        return _identity(loaded)
    if stage == "export":
        dtype = recipe.export.dtype or target.dtypes[0]
        npu = {"window": recipe.npu.window, "cache": recipe.npu.cache} if recipe.npu else {}
        draft = target.draft_tokens if recipe.export.draft_tokens is None else recipe.export.draft_tokens
        own = {"provider": target.provider, "dtype": dtype, "draft_tokens": draft}
        return {**recipe.export.model_dump(mode="json"), **own, **npu}
    if stage == "quantize":
        form = target.kernels.form if target.kernels else ""
        scheme = recipe.quantize.model_dump(mode="json")
        for key in ("vision", "audio"):
            if scheme[key] == "float":
                del scheme[key]  # most models have none
        fields = {**scheme, "form": form, "rotate": recipe.export.rotate}
        return fields | ({"text": texts.CALIBRATION.sha256} if recipe.quantize.algorithm in ("gptq", "static") else {})
    if stage == "compile":
        assert recipe.npu is not None  # `recipe` refuses a compiled target without it
        return {"soc": recipe.npu.soc, "share_weights": recipe.npu.share_weights}
    if stage == "validate":
        fields = recipe.validation.model_dump(mode="json")
        here = asdict(machine.execution(target))
        names = {"target": target.name, "provider": target.provider}
        soc = {"soc": recipe.npu.soc} if recipe.npu else {}
        return {**fields, "text": texts.EVALUATION.sha256, **names, **soc, "execution": here}
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
        "runtime": {
            "name": target.runtime.package,
            "minimum": target.runtime.minimum,
            "install": _install(target),
        },
        "replay": asdict(target.replay),
        "max_file": target.max_file,
    }


def _install(target: Target) -> str:
    runtime = target.runtime
    plugin = f" {runtime.plugin}" if runtime.plugin else ""
    return (
        runtime.install or f"pip install {runtime.package}=={runtime.newest or installed('onnxruntime-genai')}{plugin}"
    )


def _published(resolved: dict[str, Any]) -> dict[str, Any]:
    """The recipe as a package shows it: where a local checkpoint lay is nobody's business."""
    checkpoint = dict(resolved.get("checkpoint", {}))
    sources = [
        {**source, "path": Path(source["path"]).name} if source.get("type") == "local" else source
        for source in checkpoint.get("sources", [])
    ]
    return {**resolved, "checkpoint": {**checkpoint, "sources": sources}}


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
    identity["architecture"] = given.model_dump() if given else None
    return identity


def _context(loaded: Loaded) -> dict[str, Any]:
    return {"checkpoint": loaded.recipe.checkpoint.model_dump(mode="json"), "base": str(loaded.path.parent.resolve())}


# What quantizing took of Qwen2.5-0.5B on two cores, by algorithm: memory beside 1 GB, in float32 weights (0: our own
# pass, which streams and holds a few copies of the largest weight), and seconds a gigabyte of them.
_QUANTIZING = {
    "none": (0.0, 6),
    "min_error": (0.0, 14),
    "gptq": (0.0, 58),
    "rtn": (1.6, 20),
    "k_quant": (4.0, 100),
    "dynamic": (4.0, 60),
    "static": (2.4, 60),
    "w8a8": (0.0, 14),
    "nncf": (1.2, 12),
}


def _estimate(stage: str, recipe: Recipe, shape: Shape | None) -> Estimate:
    """Rough needs, from the sizes of the weights.

    The factors are what Qwen2.5-0.5B took on two cores, rounded up: converting holds the float32 weights one and a
    half times; export and reference once, and a bit; runtimes 1 GB.
    """
    if shape is None:
        weights = 4 * (recipe.checkpoint.size or _GB)
        vocabulary = weights // 8
        packed = weights // 4
    else:
        weights = 4 * (shape.body_parameters + 2 * shape.vocabulary_parameters + shape.beside)
        vocabulary = 4 * shape.vocabulary_parameters
        floats = 16 if TARGETS[recipe.target].dtypes[0] == "float16" else 32
        bits = recipe.quantize.body.bits + 1 if recipe.quantize.body else floats
        embedding = floats if recipe.quantize.embedding == "float" else bits
        packed = (shape.body_parameters * bits + shape.vocabulary_parameters * (bits + embedding)) // 8
        packed += 4 * shape.beside
    fetched = recipe.checkpoint.size or 0
    held, pace = _QUANTIZING[recipe.quantize.algorithm]
    window = recipe.validation.window_tokens * vocabulary // (shape.hidden if shape else 1000)
    whole = weights if weights <= HELD_WHOLE or shape is None else 2 * vocabulary + weights // shape.layers
    streamed = recipe.export.exporter == "native"
    copied = all(source.type == "local" and not source.path.endswith(".gguf") for source in recipe.checkpoint.sources)
    seconds = weights / _GB  # a step's time is proportional to the weights it reads
    table = {
        "checkpoint": Estimate(
            _GB if copied and not recipe.checkpoint.adapter else weights * 3 // 2 + _GB // 2,
            weights + 2 * fetched,
            10 + int(22 * seconds),
        ),
        "export": Estimate(
            3 * vocabulary + _GB if streamed else weights * 3 // 2 + _GB // 2, weights, 8 + int(10 * seconds)
        ),
        "quantize": Estimate(
            int(held * weights) + (3 * vocabulary if held == 0 else 0) + _GB, packed, 8 + int(pace * seconds)
        ),
        "compile": Estimate(3 * packed + 2 * _GB, 3 * packed, 20 + int(40 * seconds)),
        # An emulated NPU takes minutes for what a processor does in seconds.
        "validate": Estimate(whole + packed + 6 * window + 2 * _GB, 0, 20 + int((600 if recipe.npu else 50) * seconds)),
        "package": Estimate(_GB, 2 * packed, 5),
    }
    return table[stage]
