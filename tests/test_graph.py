"""Named edits on a decoder small enough to be written by hand: embedding, one projection, a residual, the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.errors import StageError
from pipeline.facts.scheme import WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ALIGNMENT, ExternalDataWriter, read_tensor, stored_bits
from pipeline.package.onnx_references import LAST_LOGITS
from pipeline.quantization import blockwise, graph_weights

VOCABULARY, HIDDEN = 48, 64
EMBEDDING, BODY, HEAD = "model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"
IDS = np.array([[3, 47, 0, 3, 21]], np.int64)


def values(head_columns: int = VOCABULARY, bias: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(3)
    return {
        "model.embed_tokens.weight": random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32),
        "up.weight": random.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) + np.float32(bias),
        "lm_head.MatMul.weight": random.standard_normal((HIDDEN, head_columns)).astype(np.float32),
        "cos_cache": random.standard_normal((16, 16)).astype(np.float32),
    }


def write_model(folder: Path, constants: dict[str, np.ndarray[Any, Any]] | None = None) -> onnx.ModelProto:
    """Write the float model into ``folder`` and return it as edits see it: without its external data."""
    constants = constants or values()
    nodes = [
        helper.make_node("Gather", [EMBEDDING + ".weight", "input_ids"], ["h0"], "/model/embed_tokens/Gather"),
        helper.make_node("Gather", ["cos_cache", "position"], ["cos"], "/model/rotary_emb/Gather"),
        helper.make_node("MatMul", ["h0", "up.weight"], ["up"], "/model/layers.0/mlp/up_proj/MatMul"),
        helper.make_node("MatMul", ["up", "h0_t"], ["scores"], "/model/layers.0/attn/MatMul"),
        helper.make_node("Transpose", ["h0"], ["h0_t"], "/model/layers.0/attn/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["scores", "h0"], ["mixed"], "/model/layers.0/attn/MatMul_1"),
        helper.make_node("Add", ["mixed", "up"], ["h1"], "/model/layers.0/Add"),
        helper.make_node("MatMul", ["h1", "lm_head.MatMul.weight"], ["logits"], "/lm_head/MatMul"),
    ]
    nodes[3], nodes[4] = nodes[4], nodes[3]
    columns = constants["lm_head.MatMul.weight"].shape[1]
    made = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("position", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", columns]),
            helper.make_tensor_value_info("cos", TensorProto.FLOAT, [1, 16]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    with ExternalDataWriter(folder / "model.onnx.data") as writer:
        model.graph.initializer.extend(writer.write(name, array) for name, array in constants.items())
    onnx.save(model, str(folder / "model.onnx"))
    return graph.load(folder / "model.onnx")


def run(folder: Path, model: onnx.ModelProto | None = None, output: str = "logits") -> np.ndarray[Any, Any]:
    """An output of ONNX Runtime; ``model`` is saved into ``folder`` first."""
    import onnxruntime

    if model is not None:
        onnx.save(model, str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits: np.ndarray[Any, Any] = session.run([output], {"input_ids": IDS, "position": np.array([2])})[0]
    return logits


def expected(constants: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    h0 = constants["model.embed_tokens.weight"][IDS]
    up = h0 @ constants["up.weight"]
    h1 = up @ h0.transpose(0, 2, 1) @ h0 + up
    logits: np.ndarray[Any, Any] = h1 @ constants["lm_head.MatMul.weight"]
    return logits


def dequantized(weight: np.ndarray[Any, Any], scheme: WeightScheme) -> np.ndarray[Any, Any]:
    quantized = blockwise.quantize(weight, scheme.bits, scheme.block_size, scheme.symmetric)
    return blockwise.dequantize(quantized, scheme.bits, weight.shape[1])


def scheme(bits: int, block_size: int, symmetric: bool) -> WeightScheme:
    return WeightScheme.model_validate({"bits": bits, "block_size": block_size, "symmetric": symmetric})


def test_weights_are_the_constant_matrices_with_the_modules_names_and_roles(tmp_path: Path) -> None:
    found = graph.weights(write_model(tmp_path))
    assert [(weight.path, weight.role, weight.rows, weight.columns) for weight in found] == [
        (EMBEDDING, "embedding", VOCABULARY, HIDDEN),
        (BODY, "body", HIDDEN, HIDDEN),
        (HEAD, "head", VOCABULARY, HIDDEN),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_pruned_head_gives_the_last_tokens_logits_and_pruning_can_be_undone(tmp_path: Path, tokens: int) -> None:
    model = write_model(tmp_path)
    before = model.SerializeToString()
    whole = run(tmp_path)
    np.testing.assert_allclose(whole, expected(values()), rtol=1e-4, atol=1e-2)
    assert not graph.unprune_head(model)

    graph.prune_head(model, tokens)
    assert run(tmp_path, model) == pytest.approx(whole[:, -1:], rel=1e-5, abs=1e-2)
    assert [dim.dim_value or dim.dim_param for dim in model.graph.output[0].type.tensor_type.shape.dim][1:] == [1, 48]
    assert (LAST_LOGITS in graph.interface(model)[1]) is (tokens > 1)
    if tokens > 1:
        found = run(tmp_path, model, LAST_LOGITS)
        assert found == pytest.approx(whole[:, -tokens:], rel=1e-5, abs=1e-2)

    assert graph.unprune_head(model)
    assert model.SerializeToString() == before


def test_a_graph_without_a_head_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    model.graph.output.pop(0)
    with pytest.raises(StageError, match="no output head"):
        graph.prune_head(model)


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"<html>not a model</html>")
    for name in ("model.onnx", "absent.onnx"):
        with pytest.raises(StageError, match=f"{name} cannot be read as an ONNX model"):
            graph.load(tmp_path / name)


def test_external_data_is_aligned_deterministic_and_read_back_and_tiny_tensors_stay_inline(tmp_path: Path) -> None:
    arrays = {
        "large": np.arange(1000, dtype=np.float32).reshape(10, 100),
        "tiny": np.arange(255, dtype=np.float32),
        "transposed": np.arange(600, dtype=np.int64).reshape(20, 30).T,
        "exactly at the limit": np.arange(256, dtype=np.float32),
    }
    files = []
    for name in ("a", "b"):
        with ExternalDataWriter(tmp_path / name) as writer:
            tensors = {key: writer.write(key, array) for key, array in arrays.items()}
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) == 2 * ALIGNMENT + ALIGNMENT + 1024  # two that fill a page or two, and the last
    for key, array in arrays.items():
        np.testing.assert_array_equal(read_tensor(tensors[key], tmp_path), array)
        external = {entry.key: entry.value for entry in tensors[key].external_data}
        assert bool(external) == (key != "tiny")
        assert int(external.get("offset", 0)) % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("outputs", "renamed"),
    [
        (["logits_Q4", "cos"], "logits"),  # as Olive's RTN pass leaves it
        (["logits_Q8", "cos"], "logits"),
        (["logits", "cos"], "logits"),
        (["other", "cos"], "other"),  # nothing that looks like it: not touched
    ],
)
def test_renamed_outputs_get_their_names_back_where_it_is_clear_which(
    outputs: list[str], renamed: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path)
    model.graph.node[-1].output[0] = model.graph.output[0].name = outputs[0]
    graph.restore_outputs(model, ("logits", "cos"))
    assert graph.interface(model)[1] == (renamed, "cos")
    assert model.graph.node[-1].output[0] == renamed


@pytest.mark.slow
@pytest.mark.parametrize("head", [scheme(8, 32, True), scheme(8, 16, False), scheme(4, 64, False), scheme(4, 16, True)])
def test_a_shared_embedding_is_the_head_s_bytes_and_computes_with_them(head: WeightScheme, tmp_path: Path) -> None:
    source, out_dir = tmp_path / "float", tmp_path / "quantized"
    model = write_model(source)
    out_dir.mkdir()
    body = scheme(4, 16, False)
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        errors = graph_weights.quantize_weights(
            model, source, writer, {HEAD: head, BODY: body}, accuracy_level=1, share_embedding=True
        )
    assert graph_weights.quantized_schemes(model) == {EMBEDDING: head, BODY: body, HEAD: head}
    assert set(errors) == {HEAD, BODY}

    constants = values()
    restored = dequantized(constants["lm_head.MatMul.weight"].T, head)
    constants["up.weight"] = dequantized(constants["up.weight"].T, body).T
    constants |= {"lm_head.MatMul.weight": restored.T, "model.embed_tokens.weight": restored}
    wanted = expected(constants)
    np.testing.assert_allclose(run(out_dir, model), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = f"lm_head.MatMul.weight_Q{head.bits}"
    assert stored[f"embedding.{packed}"].external_data == stored[packed].external_data
    counted = stored_bits(model, out_dir)
    model.graph.initializer.remove(stored[f"embedding.{packed}"])
    assert stored_bits(model, out_dir) == counted


@pytest.mark.slow
def test_weights_without_a_scheme_stay_as_they_were_and_unused_ones_are_dropped(tmp_path: Path) -> None:
    source, out_dir = tmp_path / "float", tmp_path / "quantized"
    model = write_model(source, values() | {"unused": np.ones((64, 64), np.float32)})
    out_dir.mkdir()
    seen: list[tuple[float, str]] = []
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        graph_weights.quantize_weights(
            model,
            source,
            writer,
            {BODY: scheme(8, 32, True), EMBEDDING: scheme(4, 32, True)},
            progress=lambda part, path: seen.append((part, path)),
        )
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert "unused" not in stored
    for name in ("lm_head.MatMul.weight", "cos_cache"):
        np.testing.assert_array_equal(read_tensor(stored[name], out_dir), values()[name])
    assert [path for _, path in seen] == [EMBEDDING, BODY]
    constants = values()
    constants["up.weight"] = dequantized(constants["up.weight"].T, scheme(8, 32, True)).T
    constants["model.embed_tokens.weight"] = dequantized(constants["model.embed_tokens.weight"], scheme(4, 32, True))
    wanted = expected(constants)
    np.testing.assert_allclose(run(out_dir, model), wanted, rtol=1e-3, atol=2e-2 * np.abs(wanted).max())


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "float", values(bias=float("nan")))
    with (
        ExternalDataWriter(tmp_path / "model.onnx.data") as writer,
        pytest.raises(StageError, match=f"weight {BODY} cannot be quantized") as caught,
    ):
        graph_weights.quantize_weights(model, tmp_path / "float", writer, {BODY: scheme(4, 32, True)})
    assert "NaN" in caught.value.why


@pytest.mark.parametrize(
    ("head_columns", "schemes", "why"),
    [
        (VOCABULARY, {}, "no quantized head"),
        (32, {HEAD: scheme(4, 32, True)}, "48x64 and 32x64"),
        (VOCABULARY, {HEAD: scheme(4, 128, True)}, "no multiple of the head's block size 128"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    head_columns: int, schemes: dict[str, WeightScheme], why: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "float", values(head_columns))
    with (
        ExternalDataWriter(tmp_path / "model.onnx.data") as writer,
        pytest.raises(StageError, match="cannot share") as caught,
    ):
        graph_weights.quantize_weights(model, tmp_path / "float", writer, schemes, share_embedding=True)
    assert why in caught.value.why
    assert caught.value.fix
    assert (tmp_path / "model.onnx.data").stat().st_size == 0
