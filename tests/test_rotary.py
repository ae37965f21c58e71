"""The runtime computes the tables that a package does not carry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.export import rotary

POSITIONS, HEAD = 4096, 64


def tables(base: float = 1e6) -> dict[str, np.ndarray]:
    """As transformers computes them, ``[POSITIONS, HEAD / 2]``."""
    import torch

    frequencies = 1.0 / base ** (torch.arange(0, HEAD, 2, dtype=torch.int64).float() / HEAD)
    angles = torch.arange(POSITIONS).float()[:, None] * frequencies
    return {"cos_cache": angles.cos().numpy(), "sin_cache": angles.sin().numpy()}


def model_of(stored: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph that looks positions up in both tables."""
    outputs = [helper.make_tensor_value_info(name[:3], TensorProto.FLOAT, [None, HEAD // 2]) for name in stored]
    made = helper.make_graph(
        [helper.make_node("Gather", [name, "position"], [name[:3]]) for name in stored],
        "tables",
        [helper.make_tensor_value_info("position", TensorProto.INT64, [None])],
        outputs,
        [numpy_helper.from_array(values, name) for name, values in stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def config(folder: Path, base: float = 1e6, **more: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"rope_theta": base, **more}))
    return folder / "config.json"


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def scaled_tables(positions: int) -> dict[str, np.ndarray]:
    """As transformers' Qwen2 computes them from a published configuration."""
    import torch
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    settings = Qwen2Config(rope_theta=1e6, head_dim=HEAD, max_position_embeddings=32768, rope_scaling=dict(YARN))
    cos, sin = Qwen2RotaryEmbedding(settings)(torch.zeros(1), torch.arange(positions)[None])
    return {"cos_cache": cos[0, :, : HEAD // 2].numpy(), "sin_cache": sin[0, :, : HEAD // 2].numpy()}


def looked_up(model: onnx.ModelProto, positions: int) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(["cos", "sin"], {"position": np.arange(positions)})
    return found


def test_scaled_tables_are_those_of_transformers_up_to_the_last_position(tmp_path: Path) -> None:
    positions = 131072
    angles = np.arange(positions)[:, None] * np.ones(HEAD // 2)
    model = model_of({name: angles.astype(np.float32) for name in ("cos_cache", "sin_cache")})
    path = config(tmp_path, rope_scaling=YARN, max_position_embeddings=32768)
    assert not rotary.compute_tables(model, tmp_path, path)  # what the graph has is something else
    assert rotary.scale_tables(model, path)
    wanted = scaled_tables(positions).values()
    for values, table in zip(looked_up(model, positions), wanted, strict=True):
        np.testing.assert_allclose(values, table, rtol=0, atol=1e-6)
    assert rotary.compute_tables(model, tmp_path, path)
    assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < HEAD
    for values, table in zip(looked_up(model, positions), wanted, strict=True):
        np.testing.assert_allclose(values, table, rtol=0, atol=2e-6)
    assert max(np.abs(values).max() for values in wanted) == pytest.approx(1 + 0.1 * np.log(4), abs=1e-6)


def test_scaled_tables_keep_their_dtype(tmp_path: Path) -> None:
    model = model_of({name: values.astype(np.float16) for name, values in tables().items()})
    assert rotary.scale_tables(model, config(tmp_path, rope_scaling=YARN))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, wanted in scaled_tables(POSITIONS).items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_plain_tables_are_not_scaled(tmp_path: Path, scaling: object) -> None:
    model = model_of(tables())
    before = model.SerializeToString()
    assert not rotary.scale_tables(model, config(tmp_path, rope_scaling=scaling))
    assert model.SerializeToString() == before


def test_computed_tables_are_the_stored_ones_and_are_computed_when_the_model_is_loaded(tmp_path: Path) -> None:
    stored = tables()
    model = model_of(stored)
    assert rotary.compute_tables(model, tmp_path, config(tmp_path))
    assert sum(np.prod(tensor.dims) for tensor in model.graph.initializer) < HEAD
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(["cos", "sin"], {"position": np.arange(POSITIONS)})
    for values, wanted in zip(found, stored.values(), strict=True):
        np.testing.assert_allclose(values, wanted, rtol=0, atol=5e-7)
    left = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False)
    assert {node.op_type for node in left.graph.node} == {"Gather"}


@pytest.mark.parametrize("change", ["another base", "scaled", "float16", "one table"])
def test_tables_that_are_something_else_stay(change: str, tmp_path: Path) -> None:
    stored = tables(1e4 if change == "another base" else 1e6)
    if change == "scaled":
        stored = {name: values * np.float32(1.1) for name, values in stored.items()}
    if change == "float16":
        stored = {name: values.astype(np.float16) for name, values in stored.items()}
    if change == "one table":
        del stored["sin_cache"]
    model = model_of(stored)
    before = model.SerializeToString()
    assert not rotary.compute_tables(model, tmp_path, config(tmp_path))
    assert model.SerializeToString() == before
