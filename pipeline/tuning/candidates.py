"""What each weight could be stored as: the bytes, the loss and the time of every scheme that is worth trying.

Losses are those of the calibration text, so that the evaluation text, which gates are measured on, stays unseen. They
are measured once and kept in the store: they depend on the graph and on how weights are quantized, not on the recipe's
schemes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import digest, files
from pipeline.artifact import Artifact, Progress
from pipeline.builds import plan, runner
from pipeline.builds.report import Reporter
from pipeline.builds.store import Store
from pipeline.errors import StageError
from pipeline.facts.recipe import Loaded
from pipeline.facts.scheme import Scheme, WeightScheme
from pipeline.facts.target import TARGETS
from pipeline.tuning.allocation import Option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

    from pipeline.checkpoint.reference import Reference
    from pipeline.graph.edits import Weight
    from pipeline.quantization.blockwise import BlockQuantized

VERSION = 4
# Of each domain this many tokens are read to measure a weight: enough to rank weights, which differ a hundredfold.
_WINDOWS, _TOKENS = 4, 64
# And so many of the likeliest tokens at each position are told apart.
_LIKELIEST = 64
_HEAD = (
    WeightScheme(bits=4, block_size=32, symmetric=True),  # the fastest
    WeightScheme(bits=4, block_size=32, symmetric=False),
    WeightScheme(bits=8, block_size=128, symmetric=True),
)
# One of them is measured: the loss of the others follows from how much less or more they change the weight.
_BODY = (WeightScheme(bits=4, block_size=64, symmetric=False), *_HEAD)


@dataclass(frozen=True)
class Candidates:
    """The options of each weight, and the bytes of all that has none, such as norms."""

    options: Mapping[str, list[Option]]
    fixed: int

    @classmethod
    def read(cls, text: str) -> Candidates:
        """What `text` wrote."""
        value = json.loads(text)
        return cls(
            {
                path: [
                    Option(WeightScheme.model_validate(entry.pop("scheme")), **entry)
                    for entry in (dict(entry) for entry in entries)
                ]
                for path, entries in value["options"].items()
            },
            value["fixed"],
        )

    def text(self, facts: Mapping[str, Any]) -> str:
        """JSON, with the ``facts`` that it was measured under."""
        options = {
            path: [
                {"scheme": item.scheme.model_dump(), "size": item.size, "loss": item.loss, "time": item.time}
                for item in entries
            ]
            for path, entries in self.options.items()
        }
        return json.dumps({"facts": facts, "fixed": self.fixed, "options": options}, indent=1) + "\n"


def stored(loaded: Loaded, store: Store) -> Candidates | None:
    """What has been measured before."""
    path, _ = _place(loaded, store)
    return Candidates.read(path.read_text()) if path.is_file() else None


def measured(loaded: Loaded, store: Store, reporter: Reporter) -> Candidates:
    """From the store, or measured now: minutes.

    Raises:
        QwenOnnxError: whatever makes checkpoint or export fail.
    """
    path, facts = _place(loaded, store)
    if not path.is_file():
        steps = [step for step in plan.make(loaded) if step.stage in ("checkpoint", "export")]
        made = runner.build(steps, store, reporter)

        def show(part: float, what: str) -> None:
            reporter.note(f"sensitivity {part:4.0%}  {what}")

        files.publish(path, _measure(loaded, made, show).text(facts))
    return Candidates.read(path.read_text())


def _place(loaded: Loaded, store: Store) -> tuple[Path, dict[str, Any]]:
    scheme = loaded.recipe.quantize
    facts = {
        "version": VERSION,
        "export": next(step.key for step in plan.make(loaded) if step.stage == "export"),
        "algorithm": scheme.algorithm,
        "calibration_windows": scheme.calibration_windows if scheme.algorithm == "gptq" else 0,
        "shared": scheme.embedding == "shared",
        "choices": {role: [item.model_dump() for item in _choices(loaded, role)] for role in ("body", "head")},
    }
    return store.root / "sensitivity" / f"{digest.of_value(facts)}.json", facts


def _choices(loaded: Loaded, role: str) -> list[WeightScheme]:
    """What the target has kernels for, from small to large; of the body's 4-bit schemes the last is measured."""
    kernels = TARGETS[loaded.recipe.target].kernels
    given = _HEAD if role == "head" else _BODY
    if kernels is None:
        return list(given)
    return [
        scheme
        for scheme in given
        if scheme.block_size in kernels.block_sizes.get(scheme.bits, ()) and (scheme.symmetric or kernels.zero_points)
    ]


@dataclass(frozen=True)
class _Trial:
    """A weight quantized by one scheme: its bytes, its relative error, and itself where its loss is measured."""

    scheme: WeightScheme
    size: int
    error: float
    made: BlockQuantized | None


def _measure(loaded: Loaded, made: Mapping[str, Artifact], progress: Progress) -> Candidates:
    from pipeline.checkpoint import reference
    from pipeline.graph import edits as graph
    from pipeline.quantization import calibration
    from pipeline.quantization.media_quantizer import EMBEDDING, TOWERS
    from pipeline.tuning import kernel_time

    scheme, folder, checkpoint = loaded.recipe.quantize, made["export"].path, made["checkpoint"].path
    model = graph.load(folder / "model.onnx")
    weights = [weight for weight in graph.weights(model) if weight.role in ("body", "head")]
    if any(weight.role == "experts" for weight in graph.weights(model)):  # whose sizes the recipe did not tell
        raise StageError("mixtures of experts are not tuned", where=str(loaded.path))
    trials = _trials(loaded, model, weights, made, lambda part, what: progress(0.3 * part, what))
    ids = [row[:_TOKENS] for row in calibration.windows(checkpoint, _WINDOWS)]
    shared = scheme.embedding == "shared"
    losses = _losses(
        reference.load(checkpoint), weights, trials, ids, shared, lambda part, what: progress(0.3 + 0.65 * part, what)
    )
    progress(0.95, "timing kernels")
    options = {
        weight.path: [
            Option(
                trial.scheme,
                trial.size,
                loss,
                kernel_time.seconds(weight.rows, weight.columns, trial.scheme, scheme.accuracy_level),
            )
            for trial, loss in zip(trials[weight.path], losses[weight.path], strict=True)
        ]
        for weight in weights
    }
    fixed = _fixed(model, scheme) + sum(
        path.stat().st_size for name in TOWERS.values() for path in folder.glob(f"{name}.data")
    )
    if (folder / EMBEDDING).is_file():
        fixed += _fixed(graph.load(folder / EMBEDDING), scheme)
    return Candidates(options, fixed)


def _trials(
    loaded: Loaded,
    model: onnx.ModelProto,
    weights: Sequence[Weight],
    made: Mapping[str, Artifact],
    progress: Progress,
) -> dict[str, list[_Trial]]:
    """Every weight by every scheme, by the recipe's algorithm, from the inputs that it has in the unquantized model."""
    from pipeline.graph.external_data import read_tensor
    from pipeline.quantization import blockwise, calibration

    scheme = loaded.recipe.quantize
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    walk = None
    if scheme.algorithm == "gptq":
        walk = calibration.Hessians(made["checkpoint"].path, scheme.calibration_windows, loaded.recipe.export.rotate)
    found: dict[str, list[_Trial]] = {}
    for done, weight in enumerate(weights):
        values = read_tensor(initializers[model.graph.node[weight.node].input[1]], made["export"].path).T
        choices = _choices(loaded, weight.role)
        measured = [given for given in choices if given.bits == 4][-1]
        for given in choices:
            # How the errors of two schemes compare hardly depends on the algorithm that rounds.
            plain = blockwise.quantize(values, given.bits, given.block_size, given.symmetric)
            kept = weight.role == "head" or given is measured
            result = walk.quantize(weight.path, values, given) if walk and kept else plain
            size = _size(weight, given, values.itemsize)
            found.setdefault(weight.path, []).append(
                _Trial(given, size, plain.relative_error, result if kept else None)
            )
        progress((done + 1) / len(weights), weight.path)
    return found


def _losses(
    whole: Reference,
    weights: Sequence[Weight],
    trials: Mapping[str, Sequence[_Trial]],
    ids: Sequence[Sequence[int]],
    shared: bool,
    progress: Progress,
) -> dict[str, list[float]]:
    """For each option its KL divergence in nats. The head's are all measured: the embedding may hang on it."""
    from pipeline.quantization import blockwise
    from pipeline.tuning import sensitivity

    def reader(trial: _Trial, columns: int) -> Callable[[], npt.NDArray[np.float32]]:
        assert trial.made is not None
        return partial(blockwise.dequantize, trial.made, trial.scheme.bits, columns)

    base = {
        weight.path: next(trial for trial in trials[weight.path] if trial.made is not None)
        for weight in weights
        if weight.role == "body"
    }
    columns = {weight.path: weight.columns for weight in weights}
    alone = sensitivity.measure(
        whole, {path: reader(trial, columns[path]) for path, trial in base.items()}, ids, progress, likeliest=_LIKELIEST
    )
    found = {
        path: [alone[path] * each.error / trial.error if trial.error else 0.0 for each in trials[path]]
        for path, trial in base.items()
    }
    for path in columns.keys() - base.keys():
        each = [{path: reader(trial, columns[path])} for trial in trials[path]]
        found[path] = [sensitivity.measure(whole, one, ids, lambda *_: None, shared, _LIKELIEST)[path] for one in each]
    return found


def _size(weight: Weight, scheme: WeightScheme, scale_bytes: int) -> int:
    """Bytes of a weight in the external-data file."""
    from pipeline.graph import external_data
    from pipeline.quantization import blockwise

    parts = blockwise.sizes(weight.rows, weight.columns, scheme.bits, scheme.block_size, scheme.symmetric, scale_bytes)
    return sum(map(external_data.footprint, parts))


def _fixed(model: onnx.ModelProto, scheme: Scheme) -> int:
    """Bytes of all but the weights that have options."""
    import onnx

    from pipeline.graph import edits as graph, external_data

    size = 0
    weight_of = {
        model.graph.node[weight.node].input[weight.role != "embedding"]: weight for weight in graph.weights(model)
    }
    for tensor in model.graph.initializer:
        weight = weight_of.get(tensor.name)
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if weight is None or (weight.role == "embedding" and scheme.embedding == "float"):
            size += external_data.footprint(math.prod(tensor.dims) * width)
        elif weight.role == "embedding" and isinstance(scheme.embedding, WeightScheme):
            size += _size(weight, scheme.embedding, width)
    return size
