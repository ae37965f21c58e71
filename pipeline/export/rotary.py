"""Tables of rotary positions: those of scaled frequencies, and tables that the runtime computes when it loads a model.

The genai builder stores the cosines and sines of every position of the context: 8 MB for 32,768 positions of 64
dimensions. They follow from a few frequencies, and ONNX Runtime folds what has constant inputs while it loads, so that
no package has to carry them. The builder is given plain frequencies; where a checkpoint scales them (YaRN), the tables
are replaced by what transformers computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.facts import positions
from pipeline.graph.external_data import read_tensor

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    Floats = npt.NDArray[np.float32]

_TABLES = {"cos_cache": "Cos", "sin_cache": "Sin"}
_PREFIX = "/model/rotary"
# Largest difference between a table and what is computed instead; cosines that two libraries compute differ by 1e-7.
_TOLERANCE = 1e-6


def scale_tables(model: onnx.ModelProto, config: Path) -> bool:
    """Replace the builder's tables by those of the checkpoint's scaled frequencies, in the dtype that they have.

    Args:
        model: edited in place.
        config: the checkpoint's ``config.json``.

    Returns:
        ``False`` when its frequencies are not scaled, or the graph has no tables, but computes what transformers does.
    """
    import onnx

    settings = json.loads(config.read_bytes())
    tables = _tables(model)
    if not tables or positions.kind(settings, str(config)) in (None, "default"):
        return False
    count, half = tables["cos_cache"].dims
    cosines, sines = _computed(settings, count, half)
    for name, values in (("cos_cache", cosines), ("sin_cache", sines)):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tables[name].data_type)
        tables[name].CopyFrom(onnx.numpy_helper.from_array(values.astype(dtype), name))
    return True


def compute_tables(model: onnx.ModelProto, folder: Path, config: Path) -> bool:
    """Replace the stored tables (``[positions, head_size / 2]`` float32) by nodes that compute them.

    Args:
        model: edited in place; its external data lies in ``folder``.
        config: the checkpoint's ``config.json``, which names the base of the frequencies, and how they are scaled.

    Returns:
        ``False`` when there are none, or they hold something else than the frequencies that it names: they stay as
        they are.
    """
    import onnx

    tables = _tables(model)
    if not tables or any(tensor.data_type != onnx.TensorProto.FLOAT for tensor in tables.values()):
        return False
    settings = json.loads(config.read_bytes())
    count, half = tables["cos_cache"].dims
    for name, values in zip(_TABLES, _computed(settings, count, half), strict=True):
        if np.abs(values - read_tensor(tables[name], folder)).max() > _TOLERANCE:
            return False
    for tensor in tables.values():
        model.graph.initializer.remove(tensor)
    frequencies, factor = _frequencies(settings, half)
    constants = {
        "start": np.float32(0),
        "limit": np.float32(count),
        "delta": np.float32(1),
        "axes": np.array([1]),
        "frequencies": frequencies[None],
    }
    nodes = [
        ("Range", ["start", "limit", "delta"], "positions"),
        ("Unsqueeze", ["positions", "axes"], "column"),
        ("Mul", ["column", "frequencies"], "angles"),
    ]
    if factor == 1.0:
        nodes += [(operator, ["angles"], table) for table, operator in _TABLES.items()]
    else:
        constants["factor"] = np.float32(factor)
        for table, operator in _TABLES.items():
            nodes += [(operator, ["angles"], operator.lower()), ("Mul", [operator.lower(), "factor"], table)]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), _named(key)) for key, value in constants.items()
    )
    for operator, inputs, output in reversed(nodes):
        given, made = [_named(name) for name in inputs], _named(output)
        model.graph.node.insert(0, onnx.helper.make_node(operator, given, [made], name=_named(f"{output}/{operator}")))
    return True


def _tables(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Both tables of a graph, by name; none where it has not both."""
    found = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in _TABLES}
    return found if set(found) == set(_TABLES) else {}


def _named(name: str) -> str:
    return name if name in _TABLES else f"{_PREFIX}/{name}"


def _computed(settings: Mapping[str, Any], count: int, half: int) -> tuple[Floats, Floats]:
    """Cosines and sines ``[count, half]`` of the positions before ``count``."""
    frequencies, factor = _frequencies(settings, half)
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def _frequencies(settings: Mapping[str, Any], half: int) -> tuple[Floats, float]:
    """Frequencies ``[half]``, and what cosines and sines are multiplied with, as transformers has them."""
    base = settings.get("rope_theta", 10000.0)
    if positions.kind(settings, "config.json") == "yarn":
        return _yarn(settings, base, half)
    # In the order of operations and the precision of transformers' ``default`` rope.
    exponents = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    found: Floats = np.float32(1.0) / np.float32(base) ** exponents
    return found, 1.0


def _yarn(settings: Mapping[str, Any], base: float, half: int) -> tuple[Floats, float]:
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PretrainedConfig(
        rope_theta=base,
        rope_scaling=dict(settings["rope_scaling"]),
        head_dim=2 * half,
        hidden_size=2 * half,
        num_attention_heads=1,
        max_position_embeddings=settings.get("max_position_embeddings", 32768),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found: Floats = frequencies.float().numpy()
    return found, float(factor)
