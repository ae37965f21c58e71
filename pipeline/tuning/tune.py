"""Find the scheme of each weight: measure once what every weight loses, then give bits where they save most."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.builds import plan, runner
from pipeline.builds.report import Reporter
from pipeline.builds.store import Store
from pipeline.errors import GateError, RecipeError, UsageError
from pipeline.facts import recipe
from pipeline.facts.family import FAMILIES
from pipeline.facts.recipe import Loaded, Objective
from pipeline.tuning import allocation, candidates
from pipeline.tuning.allocation import Option
from pipeline.tuning.candidates import Candidates

ALGORITHMS = ("gptq", "min_error")
_HEAD = "lm_head"
# A found scheme is built and measured, and predictions are corrected by that, at most so often; a scheme is good enough
# when it loses at least this share of what it may.
_ROUNDS, _NEAR = 4, 0.9


@dataclass(frozen=True)
class Found:
    """A scheme that was built.

    Attributes:
        chosen: an option for each weight.
        size: bytes of all weights, head and embedding included.
        predicted, measured: KL divergence in nats: the sum of what the weights lose alone on the calibration text, and
            what the package loses on the evaluation text, the larger of both paths.
        decode_ratio: how fast a token is multiplied with all weights, against the fastest option of each weight.
    """

    chosen: Mapping[str, Option]
    size: int
    predicted: float
    measured: float
    decode_ratio: float


def tune(loaded: Loaded, store: Store, reporter: Reporter, objective: Objective, out: Path) -> Found:
    """Write a recipe to ``out`` that names a scheme for each projection, and build it up to validation.

    Args:
        loaded: a recipe with algorithm ``gptq`` or ``min_error``.
        objective: with a bound on the loss the smallest scheme is found, else the most faithful one.

    Raises:
        RecipeError: the recipe's weights have no schemes of their own.
        UsageError: there is no bound, or ``out`` is the recipe itself.
        GateError: no scheme tried meets the recipe's gates.
        QwenOnnxError: whatever makes a step fail.
    """
    if loaded.recipe.quantize.algorithm not in ALGORITHMS:
        raise RecipeError(
            f"algorithm {loaded.recipe.quantize.algorithm} is not tuned",
            where=str(loaded.path),
            fix=f"use {' or '.join(ALGORITHMS)}",
        )
    shape = plan.shape_of(loaded)
    if shape and shape.experts:
        raise RecipeError(
            "mixtures of experts are not tuned",
            where=str(loaded.path),
            why="what single experts lose is not measured: that would take the whole model thousands of times",
            fix="give the experts of single layers more bits with `overrides`",
        )
    if shape and FAMILIES[shape.model_type].sees:
        raise RecipeError(
            f"schemes of {FAMILIES[shape.model_type].title} are not tuned",
            where=str(loaded.path),
            why="what a weight loses is measured on models of text alone",
            fix="give the weights that matter more bits in `quantize.overrides`",
        )
    if not any(objective.model_dump().values()):
        raise UsageError(
            "there is nothing to tune for",
            fix="give --max-kl, --max-bytes or --min-decode-ratio, or an `objective:` in the recipe",
        )
    if out.resolve() == loaded.path.resolve():
        raise UsageError(f"{out} is the recipe itself", fix="give another file with --out")
    given = candidates.measured(loaded, store, reporter)
    max_loss = objective.max_kl
    bound, best, refusal = max_loss, None, None
    tried: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        chosen = _chosen(given, objective, bound)
        predicted = sum(option.loss for option in chosen.values())
        if any(predicted == before for before, _ in tried):
            break
        made = _write(loaded, chosen, out)
        report, refusal = _built(made, store, reporter)
        measured = max(report[path]["mean_kl"] for path in ("prefill", "decode"))
        size = given.fixed + sum(option.size for option in chosen.values())
        found = Found(chosen, size, predicted, measured, _fastest(given) / _time(chosen))
        reporter.note(f"{size / 1e6:.0f} MB of weights: mean KL {measured:.4f}, predicted {predicted:.4f}")
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
            fix="allow more",
        )
    if best is not found:
        _write(loaded, best.chosen, out)
    return best


def repair(loaded: Loaded, store: Store, report: Mapping[str, Any]) -> str:
    """What to do about a package whose validation ``report`` has failed gates; empty if bits are no remedy.

    Where the losses of single weights are in the store, the cheapest promotions are named; they are predictions.
    """
    scheme = loaded.recipe.quantize
    shares = [share for gate in report["gates"] if not gate["passed"] for share in _share(gate)]
    untold = "experts" in report or "images" in report
    if scheme.algorithm not in ALGORITHMS or not report["finite"] or not shares or untold:
        return ""
    measured = max(report[path]["mean_kl"] for path in ("prefill", "decode"))
    wanted = _NEAR * min(shares) * measured
    command = f"`qwen-onnx tune {loaded.path} --max-kl {wanted:.2g}`"
    known = candidates.stored(loaded, store)
    if known is None:
        return f"{command} finds the weights that need more bits"
    now: dict[str, Option] = {}
    for path, options in known.options.items():
        role = "head" if path == _HEAD else "body"
        asked = scheme.of_weight(path, role)
        same = [option for option in options if option.scheme == asked]
        same = same or [option for option in options if asked and option.scheme.bits == asked.bits][-1:]
        now[path] = (same or options)[-1]
    predicted = sum(option.loss for option in now.values())
    upward = {
        path: [now[path], *(option for option in options if option.size > now[path].size)]
        for path, options in known.options.items()
    }
    chosen = allocation.allocate(upward, predicted * _NEAR * min(shares))
    changed = {path: option for path, option in chosen.items() if option != now[path]}
    if not changed:
        return f"{command} finds the weights that need more bits"
    cost = sum(option.size - now[path].size for path, option in changed.items())
    names = list(changed)
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    bits = changed[names[0]].scheme.bits
    return f"{cost / 1e6:.1f} MB more may do: {bits} bits for {listed}; {command} writes them down"


def _share(gate: Mapping[str, Any]) -> Iterator[float]:
    """By what factor a loss has to fall for a failed gate to pass, if it is a gate on a loss."""
    value, bound = gate["value"], gate["bound"]
    if gate["metric"] in ("mean_kl", "p99_kl"):
        yield bound / value
    elif gate["metric"] == "perplexity_ratio" and value > 1:
        yield max(0.0, bound - 1) / (value - 1)
    elif gate["metric"] == "top1" and value < 1:
        yield (1 - bound) / (1 - value)


def _chosen(given: Candidates, objective: Objective, max_loss: float | None) -> dict[str, Option]:
    room = None if objective.max_bytes is None else objective.max_bytes - given.fixed
    time = None if objective.min_decode_ratio is None else _fastest(given) / objective.min_decode_ratio
    return allocation.allocate(given.options, max_loss, room, time)


def _fastest(given: Candidates) -> float:
    return sum(min(option.time for option in options) for options in given.options.values())


def _time(chosen: Mapping[str, Option]) -> float:
    return sum(option.time for option in chosen.values())


def _next(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """The sum of losses to ask for, from (predicted, measured) of all tries so far: on a line through the last two.

    One try says by what factor predictions are off. Two say how much is lost whatever the schemes are.
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


def _write(loaded: Loaded, chosen: Mapping[str, Option], out: Path) -> Loaded:
    """A recipe that extends the given one: its head, and as overrides the schemes that differ from its body's."""
    body = loaded.recipe.quantize.body
    lines = [
        f"# Found by `qwen-onnx tune {loaded.path.name}`: bits where they save most.",
        f"extends: {json.dumps(os.path.relpath(loaded.path.resolve(), out.resolve().parent))}",
        "quantize:",
    ]
    if _HEAD in chosen:
        lines.append(f"  head: {_flow(chosen[_HEAD])}")
    rows = [
        f"    - {{match: {path}, scheme: {_flow(option)}}}"
        for path, option in chosen.items()
        if path != _HEAD and option.scheme != body
    ]
    lines += ["  overrides:", *rows] if rows else ["  overrides: []"]
    files.publish(out, "\n".join(lines) + "\n")
    return recipe.load(out)


def _flow(option: Option) -> str:
    return "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in option.scheme.model_dump().items()) + "}"
