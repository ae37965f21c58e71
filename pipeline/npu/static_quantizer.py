"""Calibrated QDQ quantization of the NPU's stages: 16-bit activations, 8- or 4-bit weights.

Olive's static quantization finds the ranges and writes the graph; what it has no way to say is done to its result: the
cache's tensors get one scale, so that they pass through the graph's edges as integers, and 4-bit weights get blocks.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import olive
from pipeline.errors import StageError
from pipeline.facts.scheme import Scheme, WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter, read_tensor
from pipeline.npu import static_decoder, static_session
from pipeline.quantization import graph_weights

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.artifact import Progress
    from pipeline.npu.static_session import Feed

# Most calls of prefill that are kept for calibration; each holds a whole cache.
_MAX_CALLS = 48
# HTP stores a block's scale as its channel's largest divided by 16, times a whole number up to 16.
_SCALE_STEPS = 16


def quantize(
    source: Path, out_dir: Path, scheme: Scheme, texts: Sequence[Sequence[int]], progress: Progress
) -> dict[str, Any]:
    """Quantize the float stages in ``source`` into ``out_dir``.

    Args:
        texts: windows of token ids to calibrate with.

    Returns:
        facts: ``calls`` (of prefill, that the ranges were found with), ``operators`` of the layers.

    Raises:
        StageError: a pass failed or yielded something else.
    """
    import onnx

    progress(0.02, "running the calibration text")
    calls, rows = _calibration(source, texts)
    progress(0.15, "Olive: ranges of the layers")
    layers, folder = _static(source, "prefill", calls, out_dir / "layers", scheme)
    count = sum(value.name.startswith("new.") for value in layers.graph.output) // 2
    for index in range(count):
        for kind in ("key", "value"):
            names = (f"past_key_values.{index}.{kind}", f"new.{index}.{kind}", f"layers.{index}.{kind}s")
            _tie(layers, names)
    _integer_edges(layers, ("past_key_values.", "new."))
    if scheme.body and scheme.body.bits == 4:
        progress(0.6, "4-bit blocks")
        _block_weights(layers, source, scheme.body)
    with ExternalDataWriter(out_dir / "layers.data") as writer:
        graph_weights.repack(layers, folder, writer)
    shutil.rmtree(folder)
    progress(0.7, "Olive: ranges of the head")
    head, folder = _static(source, "head", [{"last_hidden": row[None, None]} for row in rows], out_dir / "head", scheme)
    with ExternalDataWriter(out_dir / "head.data") as writer:
        graph_weights.repack(head, folder, writer)
    shutil.rmtree(folder)
    progress(0.9, "embedding")
    front = graph.load(source / "front.onnx")
    embedding = next(weight for weight in graph.weights(front) if weight.role == "embedding")
    schemes = {embedding.path: scheme.embedding} if isinstance(scheme.embedding, WeightScheme) else {}
    with ExternalDataWriter(out_dir / "front.data") as writer:
        graph_weights.quantize_weights(front, source, writer, schemes)
    update = graph.load(source / "update.onnx")
    for value in (*update.graph.input, *update.graph.output):
        if value.name.startswith(("past_key_values.", "new.", "present.")):
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT16
    decode = static_decoder.with_tokens(layers, 1)
    for name, model in (("front", front), ("prefill", layers), ("decode", decode), ("update", update), ("head", head)):
        onnx.save(model, str(out_dir / f"{name}.onnx"))
    return {"calls": len(calls), "operators": graph.operators(layers)}


def _calibration(source: Path, texts: Sequence[Sequence[int]]) -> tuple[list[Feed], npt.NDArray[np.float32]]:
    """What the layers and the head are fed while the float stages read ``texts``, as far as the cache goes."""
    names = ("front", "prefill", "update")
    sessions = {name: static_session.on_processor(source / f"{name}.onnx") for name in names}
    shapes = {entry.name: entry.shape for entry in sessions["prefill"].get_inputs()}
    window, slots = shapes["embeds"][1], shapes["past_key_values.0.key"][2]
    texts = [ids[:slots] for ids in texts]
    total = sum(-(-len(ids) // window) for ids in texts)
    chosen = set(np.random.default_rng(0).permutation(total)[:_MAX_CALLS].tolist())  # of all texts, early and late
    calls: list[Feed] = []
    seen = itertools.count()

    def watch(name: str, feed: Feed) -> None:
        if name == "prefill" and next(seen) in chosen:
            calls.append({key: np.array(value) for key, value in feed.items()})

    stages = static_session.Stages(sessions, window=window, pad=0, watch=watch)
    rows = [stages.prefill(ids)[0] for ids in texts]
    every = np.concatenate(rows)
    return calls, every[:: max(1, len(every) // 256)]


def _static(
    source: Path, name: str, feeds: Sequence[Feed], folder: Path, scheme: Scheme
) -> tuple[onnx.ModelProto, Path]:
    """Olive's static quantization of one stage; the graph, and the folder with its data."""
    folder.mkdir()
    config = {
        **scheme.options,
        "precision": "int8",
        "activation_type": "uint16",
        "per_channel": True,
        "quant_preprocess": False,
        "prepare_qdq_config": True,
        "save_as_external_data": True,
        "external_data_name": "model.onnx.data",
        "data_config": olive.feeds(feeds),
        "nodes_to_exclude": _attention(source / f"{name}.onnx"),
    }
    made = olive.run_pass(
        "static", config, olive.onnx_model(source, name=f"{name}.onnx"), folder, "QNNExecutionProvider"
    )
    model = graph.load(Path(made.model_path))
    del model.graph.value_info[:]
    if "DequantizeLinear" not in graph.operators(model):
        raise StageError(f"static quantization changed nothing of {name}")
    return model, Path(made.model_path).parent


def _attention(path: Path) -> list[str]:
    """The nodes between queries, keys and values, which stay float (float16 on the NPU).

    HTP multiplies two 16-bit activations as if the second had 8 bits: scores of Qwen2.5-0.5B's first layer were off
    by up to 12 nats, while the processor computed the same graph right.
    """
    kinds = (".scores/MatMul", ".mask/Mul", ".masked/Add", ".shares/Softmax", ".mixed/MatMul")
    return [node.name for node in graph.load(path).graph.node if node.name.endswith(kinds)]


def _tie(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give tensors one scale and zero point that cover all of them, so that values pass between them unchanged."""
    import onnx

    known = {tensor.name: tensor for tensor in model.graph.initializer}
    parts = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0].removesuffix("_QuantizeLinear_Input") in names:
            parts.append((known[node.input[1]], known[node.input[2]]))
    if len(parts) < len(names):
        raise StageError(f"the cache's tensors are not all quantized: {', '.join(names)}")
    low = high = 0.0
    for scale_tensor, zero_tensor in parts:
        scale, zero = (float(onnx.numpy_helper.to_array(tensor)) for tensor in (scale_tensor, zero_tensor))
        low, high = min(low, -zero * scale), max(high, (65535 - zero) * scale)
    shared = np.float32((high - low) / 65535)
    zero_point = np.uint16(round(-low / float(shared)))
    for scale_tensor, zero_tensor in parts:
        for tensor, value in ((scale_tensor, shared), (zero_tensor, zero_point)):
            dims = tuple(tensor.dims)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value).reshape(dims), tensor.name))


def _integer_edges(model: onnx.ModelProto, prefixes: tuple[str, ...]) -> None:
    """Let inputs and outputs of those names be uint16: the nodes that convert them go."""
    import onnx

    inputs = {value.name for value in model.graph.input if value.name.startswith(prefixes)}
    outputs = {value.name for value in model.graph.output if value.name.startswith(prefixes)}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in inputs:
            renamed[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.output[0] in outputs:
            renamed[node.input[0]] = node.output[0]
            renamed[node.output[0]] = f"{node.output[0]}_float"  # what inside the graph reads it goes on reading floats
            kept.append(node)
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for value in (*model.graph.input, *model.graph.output):
        if value.name in inputs | outputs:
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT16


def _block_weights(model: onnx.ModelProto, source: Path, scheme: WeightScheme) -> None:
    """Replace the 8-bit weights of the convolutions by 4-bit ones in blocks of input channels."""
    import ml_dtypes
    import onnx

    floats = {tensor.name: tensor for tensor in graph.load(source / "prefill.onnx").graph.initializer}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type != "DequantizeLinear" or not name.endswith(".weight") or len(floats[name].dims) != 4:
            continue
        if floats[name].dims[1] % scheme.block_size:
            raise StageError(
                f"{name} has {floats[name].dims[1]} input channels, no multiple of blocks of {scheme.block_size}",
                where="quantize.body.block_size",
                fix="choose a smaller block_size",
            )
        codes, scales = blocks(np.asarray(read_tensor(floats[name], source)), scheme.block_size)
        for key, values in zip(
            node.input, (codes.astype(ml_dtypes.int4), scales, np.zeros(scales.shape, ml_dtypes.int4)), strict=True
        ):
            known[key].CopyFrom(onnx.numpy_helper.from_array(values, key))
        del node.attribute[:]
        attributes: Mapping[str, int] = {"axis": 1, "block_size": scheme.block_size}
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())


def blocks(weight: npt.NDArray[np.float32], size: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes in [-8, 7], ``[O, I, 1, 1]``, and scales ``[O, I / size, 1, 1]`` of a convolution's weight.

    HTP takes whole multiples of a channel's unit only; for each block the one of least squared error is chosen.
    """
    rows, columns = weight.shape[:2]
    parts = weight.reshape(rows, columns // size, size).astype(np.float32)
    unit = np.abs(parts).max(axis=(1, 2), keepdims=True) / (7.5 * _SCALE_STEPS)
    unit = np.maximum(unit, np.float32(1e-12))
    best = np.full(parts.shape[:2], np.inf, np.float32)
    scale = np.zeros(parts.shape[:2], np.float32)
    codes = np.zeros(parts.shape, np.int8)
    for step in range(1, _SCALE_STEPS + 1):
        tried = unit * np.float32(step)
        rounded = np.clip(np.rint(parts / tried), -8, 7)
        error = np.square(parts - rounded * tried).sum(axis=2)
        better = error < best
        best[better] = error[better]
        scale[better] = np.broadcast_to(tried[..., 0], scale.shape)[better]
        codes[better] = rounded[better].astype(np.int8)
    return codes.reshape(weight.shape), scale[..., None, None]
