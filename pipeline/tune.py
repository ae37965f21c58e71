"""Find the scheme of each weight: measure once what every weight loses, then give bits where they save most.

The losses are those of the calibration text, so that the evaluation text, which gates are measured on, stays unseen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import allocation, digest, files, plan, recipe, runner
from pipeline.allocation import Option
from pipeline.artifact import Artifact
from pipeline.errors import GateError, RecipeError, UsageError
from pipeline.recipe import Loaded
from pipeline.report import Reporter
from pipeline.scheme import WeightScheme
from pipeline.store import Store
from pipeline.target import TARGETS

VERSION = 1
# Of each domain this many tokens are read to measure a weight: enough to rank weights, which differ a hundredfold.
_WINDOWS, _TOKENS = 4, 64
# What is measured; the loss of the others follows from how much more or less of the weight they change.
_MEASURED = WeightScheme(bits=4, block_size=32, symmetric=False)
_CHOICES = (
    WeightScheme(bits=4, block_size=64, symmetric=False),
    _MEASURED,
    WeightScheme(bits=8, block_size=64, symmetric=True),
)
# A found scheme is built and measured, and predictions are corrected by that, at most so often; a scheme is good enough
# when it loses at least this share of what it may.
_ROUNDS, _NEAR = 4, 0.9


@dataclass(frozen=True)
class Found:
    """A scheme that was built.

    Attributes:
        chosen: an option for each weight of the body.
        predicted, measured: KL divergence in nats: the sum of what the weights lose alone on the calibration text, and
            what the package loses on the evaluation text, the larger of both paths.
    """

    chosen: Mapping[str, Option]
    predicted: float
    measured: float

    @property
    def size(self) -> int:
        """Bytes of the body's weights."""
        return sum(option.size for option in self.chosen.values())


def tune(
    loaded: Loaded, store: Store, reporter: Reporter, max_loss: float | None, max_size: int | None, out: Path
) -> Found:
    """Write a recipe to ``out`` whose overrides name a scheme for each projection, and build it up to validation.

    Args:
        loaded: a recipe with algorithm ``gptq`` or ``min_error``; its head and embedding stay as they are.
        max_loss: largest mean KL divergence wanted.
        max_size: most bytes for the body's weights.

    Raises:
        RecipeError: the recipe's weights have no schemes of their own.
        UsageError: both bounds are missing, or ``out`` is the recipe itself.
        GateError: no scheme tried meets the recipe's gates.
        QwenOnnxError: whatever makes a step fail.
    """
    if loaded.recipe.quantize.algorithm not in ("gptq", "min_error"):
        raise RecipeError(
            f"algorithm {loaded.recipe.quantize.algorithm} is not tuned",
            where=str(loaded.path),
            fix="use gptq or min_error",
        )
    if max_loss is None and max_size is None:
        raise UsageError("there is nothing to tune for", fix="give --max-kl or --max-bytes")
    if out.resolve() == loaded.path.resolve():
        raise UsageError(f"{out} is the recipe itself", fix="give another file with --out")
    options = _options(loaded, store, reporter)
    bound, best, refusal = max_loss, None, None
    tried: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        chosen = allocation.allocate(options, bound, max_size)
        predicted = sum(option.loss for option in chosen.values())
        if any(predicted == before for before, _ in tried):
            break
        made = _write(loaded, chosen, out)
        report, refusal = _built(made, store, reporter)
        measured = max(report[path]["mean_kl"] for path in ("prefill", "decode"))
        found = Found(chosen, predicted, measured)
        reporter.note(f"{found.size / 1e6:.0f} MB of body weights: mean KL {measured:.4f}, predicted {predicted:.4f}")
        if refusal is None and (max_loss is None or measured <= max_loss) and (best is None or found.size < best.size):
            best = found
        if max_loss is None or (best is found and measured >= _NEAR * max_loss):
            break
        tried.append((predicted, measured))
        bound = _next(tried, max_loss)
    if best is None:
        raise refusal or GateError(
            f"no scheme that was tried reaches a mean KL of {max_loss}",
            where=str(out),
            why=f"the last one has {measured:.4f}",
            fix="allow more, or give head and embedding more bits",
        )
    if best is not found:
        _write(loaded, best.chosen, out)
    return best


def _next(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """The sum of losses to ask for, from (predicted, measured) of all tries so far: on a line through the last two.

    One try says by what factor predictions are off. Two say how much is lost whatever the body's schemes are.
    """
    aim = (1 + _NEAR) / 2 * wanted
    predicted, measured = tried[-1]
    if len(tried) > 1:
        before, was = tried[-2]
        slope = (measured - was) / (predicted - before)
        if slope > 0:
            return max(0.0, predicted + (aim - measured) / slope)
    return predicted * aim / measured


def _built(loaded: Loaded, store: Store, reporter: Reporter) -> tuple[dict[str, Any], GateError | None]:
    """The validation report of a recipe, and the refusal where it is one."""
    steps = [step for step in plan.make(loaded) if step.stage != "package"]
    try:
        made = runner.build(steps, store, reporter)
    except GateError as error:
        return json.loads(Path(error.where).read_bytes()), error
    return json.loads((made["validate"].path / "validation.json").read_bytes()), None


def _options(loaded: Loaded, store: Store, reporter: Reporter) -> dict[str, list[Option]]:
    """The options of each projection, measured or from the store."""
    steps = [step for step in plan.make(loaded) if step.stage in ("checkpoint", "export")]
    made = runner.build(steps, store, reporter)
    kernels = TARGETS[loaded.recipe.target].kernels
    choices = [
        scheme
        for scheme in _CHOICES
        if kernels is None
        or (scheme.block_size in kernels.block_sizes.get(scheme.bits, ()) and (kernels.zero_points or scheme.symmetric))
    ]
    facts = {"version": VERSION, "export": made["export"].key, "choices": [choice.model_dump() for choice in choices]}
    path = store.root / "sensitivity" / f"{digest.of_value(facts)}.json"
    if not path.is_file():
        measured = _measure(made, choices, reporter)
        files.publish(path, json.dumps({"facts": facts, "options": measured}, indent=1) + "\n")
    stored = json.loads(path.read_bytes())["options"]
    return {
        name: [Option(WeightScheme.model_validate(entry["scheme"]), entry["size"], entry["loss"]) for entry in entries]
        for name, entries in stored.items()
    }


def _measure(made: Mapping[str, Artifact], choices: list[WeightScheme], reporter: Reporter) -> dict[str, Any]:
    from pipeline import blockwise, calibration, graph, reference, sensitivity
    from pipeline.external_data import read_tensor

    folder = made["export"].path
    model = graph.load(folder / "model.onnx")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {weight.path: weight for weight in graph.weights(model) if weight.role == "body"}

    def values(path: str) -> Any:
        return read_tensor(initializers[model.graph.node[weights[path].node].input[1]], folder).T

    def quantized(path: str, scheme: WeightScheme) -> blockwise.BlockQuantized:
        return blockwise.quantize(values(path), scheme.bits, scheme.block_size, scheme.symmetric)

    def restored(path: str) -> Callable[[], Any]:
        return lambda: blockwise.dequantize(quantized(path, _MEASURED), _MEASURED.bits, weights[path].columns)

    loaded = reference.load(made["checkpoint"].path)
    ids = [row[:_TOKENS] for row in calibration.windows(made["checkpoint"].path, _WINDOWS)]

    def show(part: float, path: str) -> None:
        reporter.note(f"sensitivity {part:4.0%}  {path}")

    losses = sensitivity.measure(loaded, {path: restored(path) for path in weights}, ids, show)
    found: dict[str, Any] = {}
    for path, loss in losses.items():
        base = quantized(path, _MEASURED).relative_error
        entries = []
        for scheme in choices:
            made_so = quantized(path, scheme)
            share = made_so.relative_error / base if base else 0.0
            entries.append({"scheme": scheme.model_dump(), "size": made_so.nbytes, "loss": loss * share})
        found[path] = entries
    return found


def _write(loaded: Loaded, chosen: Mapping[str, Option], out: Path) -> Loaded:
    """A recipe that extends the given one, with the schemes that differ from its body's as overrides."""
    body = loaded.recipe.quantize.body
    lines = [
        f"# Found by `qwen-onnx tune {loaded.path.name}`: bits where they save most.",
        f"extends: {json.dumps(os.path.relpath(loaded.path.resolve(), out.resolve().parent))}",
        "quantize:",
        "  overrides:",
    ]
    for path, option in chosen.items():
        if option.scheme != body:
            scheme = ", ".join(f"{key}: {json.dumps(value)}" for key, value in option.scheme.model_dump().items())
            lines.append(f"    - {{match: {path}, scheme: {{{scheme}}}}}")
    if lines[-1].endswith(":"):
        lines[-1] += " []"
    files.publish(out, "\n".join(lines) + "\n")
    return recipe.load(out)
