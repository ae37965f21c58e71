"""Tables of rotary positions that the runtime computes when it loads a model, so that no package has to carry them.

The genai builder stores the cosines and sines of every position of the context: 8 MB for 32,768 positions of 64
dimensions. They follow from a few frequencies, and ONNX Runtime folds what has constant inputs while it loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.external_data import read_tensor

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

_TABLES = {"cos_cache": "Cos", "sin_cache": "Sin"}
_PREFIX = "/model/rotary"
# Largest difference between a table and what is computed instead; cosines that two libraries compute differ by 1e-7.
_TOLERANCE = 1e-6


def compute_tables(model: onnx.ModelProto, folder: Path, config: Path) -> bool:
    """Replace the stored tables (``[positions, head_size / 2]`` float32) by nodes that compute them.

    Args:
        model: edited in place; its external data lies in ``folder``.
        config: the checkpoint's ``config.json``, which names the base of the frequencies.

    Returns:
        ``False`` when there are none, or they hold something else than plain frequencies (scaled ones, for long
        contexts): they stay as they are.
    """
    import onnx

    tables = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in _TABLES}
    if set(tables) != set(_TABLES) or any(tensor.data_type != onnx.TensorProto.FLOAT for tensor in tables.values()):
        return False
    positions, half = tables["cos_cache"].dims
    frequencies = _frequencies(json.loads(config.read_bytes()), half)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        if np.abs(function(angles) - read_tensor(tables[name], folder)).max() > _TOLERANCE:
            return False
    for tensor in tables.values():
        model.graph.initializer.remove(tensor)
    constants = {
        "start": np.float32(0),
        "limit": np.float32(positions),
        "delta": np.float32(1),
        "axes": np.array([1]),
        "frequencies": frequencies[None],
    }
    names = {key: f"{_PREFIX}/{key}" for key in (*constants, "positions", "column", "angles")}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), names[key]) for key, value in constants.items()
    )
    for operator, inputs, output in reversed(
        (
            ("Range", [names["start"], names["limit"], names["delta"]], names["positions"]),
            ("Unsqueeze", [names["positions"], names["axes"]], names["column"]),
            ("Mul", [names["column"], names["frequencies"]], names["angles"]),
            *((operator, [names["angles"]], table) for table, operator in _TABLES.items()),
        )
    ):
        model.graph.node.insert(0, onnx.helper.make_node(operator, inputs, [output], name=f"{_PREFIX}/{operator}"))
    return True


def _frequencies(settings: Mapping[str, Any], half: int) -> npt.NDArray[np.float32]:
    """``base ** (-i / half)``, in the order of operations and the precision of transformers' ``default`` rope."""
    base = np.float32(settings.get("rope_theta", 10000.0))
    exponents = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    found: npt.NDArray[np.float32] = np.float32(1.0) / base**exponents
    return found
