"""Whether the experts of a package are the reference's: which of them a token goes to, and what each computes.

The figures of a whole model say little of either: a token that goes elsewhere may be none the worse for it, and an
expert that hardly any token goes to may compute anything.

Shapes in this module:
    T: tokens, H: hidden size, E: experts of a layer, C: experts that a token goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import files
from pipeline.errors import StageError
from pipeline.graph import edits as graph
from pipeline.quantization.expert_weights import ROUTER_WEIGHTS

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.checkpoint.reference import Reference

    Floats = npt.NDArray[np.float32]

# Tokens of the first window that every expert computes.
_PROBES = 8
# A logit so much above all others gives an expert the whole weight, in float16, too.
_SURE = 30.0


class Recorder:
    """Keeps what the mixtures of a reference see and choose, while it is a context.

    Attributes:
        chosen: of each layer the experts of all tokens, ``[T, C]`` for each window.
        inputs: of each layer what its experts read, ``[_PROBES, H]``.
    """

    def __init__(self, reference: Reference) -> None:
        self.mixtures = {
            index: layer.mlp for index, layer in enumerate(reference.decoder.layers) if hasattr(layer.mlp, "experts")
        }
        self.chosen: dict[int, list[npt.NDArray[np.int64]]] = {index: [] for index in self.mixtures}
        self.inputs: dict[int, Floats] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for index, mixture in self.mixtures.items():
            self._hooks.append(mixture.gate.register_forward_hook(partial(self._record, index)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, index: int, module: Any, given: tuple[Any, ...], logits: Any) -> None:  # noqa: ARG002
        self.inputs.setdefault(index, given[0].flatten(0, -2)[:_PROBES].float().numpy())
        self.chosen[index].append(_best(logits.flatten(0, -2).float().numpy(), self.mixtures[index].top_k))


def measure(seen: Recorder, package: Path, windows: Sequence[Sequence[int]], scratch: Path) -> dict[str, Any]:
    """The figures of a package, ``experts`` of its validation.

    Args:
        seen: what the reference chose for the same ``windows``, in this order.
        package: directory of ``model.onnx``, which the processor runs.
        windows: token ids.
        scratch: a folder to write into.

    Returns:
        ``routing``: share of choices that are the reference's, over all layers and of the layer with the fewest;
        ``chosen``: how many experts any token went to, of ``count``; ``outputs``: mean and largest squared error of
        what an expert computes, relative to what the reference's does.

    Raises:
        StageError: the graph has not the reference's mixtures.
    """
    model = graph.load(package / "model.onnx")
    routers = {
        int(weight.path.split(".")[2]): model.graph.node[weight.node].output[0]
        for weight in graph.weights(model)
        if weight.path.endswith(".mlp.gate")
    }
    if routers.keys() != seen.mixtures.keys():
        why = f"its routers are in the layers {sorted(routers)}, the reference's in {sorted(seen.mixtures)}"
        raise StageError("the graph has not the mixtures of experts of its reference", why=why)
    shares = _routing(model, routers, seen, package, windows, scratch)
    errors = _outputs(model, routers, seen, package, scratch)
    used = sum(len(np.unique(np.concatenate(rows))) for rows in seen.chosen.values())
    fewest, worst = min(shares, key=lambda index: shares[index]), max(errors, key=lambda path: errors[path])
    return {
        "routing": {
            "agreement": round(float(np.mean(list(shares.values()))), 6),
            "fewest": round(shares[fewest], 6),
            "layer": fewest,
        },
        "count": len(errors),
        "chosen": used,
        "outputs": {
            "error": float(f"{np.mean(list(errors.values())):.3g}"),
            "largest": float(f"{errors[worst]:.3g}"),
            "expert": worst,
        },
    }


def _best(logits: Floats, count: int) -> npt.NDArray[np.int64]:
    return np.sort(np.argsort(-logits, axis=-1, kind="stable")[:, :count])


def _routing(
    model: onnx.ModelProto,
    routers: Mapping[int, str],
    seen: Recorder,
    package: Path,
    windows: Sequence[Sequence[int]],
    scratch: Path,
) -> dict[int, float]:
    """For each layer the share of choices that are the reference's."""
    import onnx

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.output[:]
    dtype = _dtype(model)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    twin.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in routers.values())
    run = _session(twin, package, scratch)
    empty = {
        value.name: np.zeros((1, _dims(value)[1].dim_value, 0, _dims(value)[3].dim_value), dtype)
        for value in _caches(model)
    }
    same: dict[int, list[float]] = {index: [] for index in routers}
    for number, ids in enumerate(windows):
        row = np.array([ids], np.int64)
        found = run(list(routers.values()), {"input_ids": row, "attention_mask": np.ones_like(row), **empty})
        for (index, rows), logits in zip(seen.chosen.items(), found, strict=True):
            chosen = _best(logits[0].astype(np.float32), seen.mixtures[index].top_k)
            hits = [len(np.intersect1d(*pair)) for pair in zip(chosen, rows[number], strict=True)]
            same[index].append(float(np.mean(hits)) / seen.mixtures[index].top_k)
    return {index: float(np.mean(shares)) for index, shares in same.items()}


def _outputs(
    model: onnx.ModelProto, routers: Mapping[int, str], seen: Recorder, package: Path, scratch: Path
) -> dict[str, float]:
    """For each expert, by its path, the relative squared error of what it computes."""
    import torch

    found = {}
    for index, mixture in seen.mixtures.items():
        path = f"model.layers.{index}.mlp.experts"
        fused = next((node for node in model.graph.node if graph.path_of(node, "") == path), None)
        given = seen.inputs[index].astype(_dtype(model))
        compute = (
            _unrolled(model, path, routers[index], package, scratch, len(mixture.experts))
            if fused is None
            else _alone(model, fused, package, scratch, len(mixture.experts))
        )
        with torch.inference_mode():
            for expert, module in enumerate(mixture.experts):
                wanted = module(torch.from_numpy(seen.inputs[index])).numpy()
                lost = np.square(compute(given, expert).astype(np.float64) - wanted).sum()
                found[f"{path}.{expert}"] = float(lost / np.square(wanted, dtype=np.float64).sum())
    return found


Compute = Callable[["npt.NDArray[Any]", int], "npt.NDArray[Any]"]


def _alone(model: onnx.ModelProto, node: onnx.NodeProto, package: Path, scratch: Path, count: int) -> Compute:
    """Of a fused node what each of its experts computes: a copy of it that chooses one, of the same weights."""
    import onnx

    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    for attribute in copied.attribute:
        if attribute.name in ("k", "normalize_routing_weights"):
            attribute.i = 1
    del copied.input[ROUTER_WEIGHTS:]  # which are there where they are not to be normalized
    copied.input[:2] = ["x", "logits"]
    run = _session(_part(model, [copied], ["x", "logits"], [copied.output[0]]), package, scratch)

    def compute(given: npt.NDArray[Any], expert: int) -> npt.NDArray[Any]:
        logits = np.zeros((len(given), count), given.dtype)
        logits[:, expert] = _SURE
        found: npt.NDArray[Any] = run(None, {"x": given[None], "logits": logits})[0][0]
        return found

    return compute


def _unrolled(model: onnx.ModelProto, path: str, router: str, package: Path, scratch: Path, count: int) -> Compute:
    """The same of experts that are nodes of their own: all between what the router reads and what they yield."""
    ends = {graph.path_of(node, ""): node.input[0] for node in model.graph.node if node.input}
    names = [ends[f"{path}.{expert}.weighted.Mul"] for expert in range(count)]  # what the router's weights are put to
    maker = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    given_name = model.graph.node[maker[router]].input[0]
    needed, open_names = set(), list(names)
    while open_names:
        index = maker.get(open_names.pop(), -1)
        if index >= 0 and index not in needed:
            needed.add(index)
            open_names += [name for name in model.graph.node[index].input if name != given_name]
    nodes = [model.graph.node[index] for index in sorted(needed)]
    run = _session(_part(model, nodes, [given_name], names), package, scratch)
    return lambda given, expert: run([names[expert]], {given_name: given[None]})[0][0]


def _part(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """A model of some nodes, with the weights that they read."""
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(_dtype(model)))
    read = {name for node in nodes for name in node.input}
    made = onnx.helper.make_graph(
        nodes,
        "part",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in inputs],
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    return onnx.helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)


def _session(
    model: onnx.ModelProto, package: Path, scratch: Path
) -> Callable[[Sequence[str] | None, Mapping[str, Any]], list[npt.NDArray[Any]]]:
    """A model on the processor, with the external data of ``package``."""
    import onnx
    import onnxruntime as ort

    scratch.mkdir(exist_ok=True)
    onnx.save(model, str(scratch / "part.onnx"))
    if not (scratch / "model.onnx.data").exists():
        files.link(package / "model.onnx.data", scratch / "model.onnx.data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # As `pipeline.package.replay.configure`: other providers do not round the activations of QDQ products.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    opened = ort.InferenceSession(str(scratch / "part.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda names, feeds: list(opened.run(names, dict(feeds)))


def _caches(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [value for value in model.graph.input if len(_dims(value)) == 4]


def _dims(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _dtype(model: onnx.ModelProto) -> Any:
    """Of the activations: that of the cache."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(_caches(model)[0].type.tensor_type.elem_type)
