"""Models for GPUs, made and run on a machine without one: float16 graphs with the operators of each target.

The recipes are the repository's bases, on tiny checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pipeline import digest
from pipeline.artifact import CHECKSUMS, MANIFEST, Artifact, Step
from pipeline.builds import plan
from pipeline.checkpoint import reference
from pipeline.checkpoint.reference import Reference
from pipeline.errors import PackageError, RuntimeMissing, StageError
from pipeline.facts import recipe
from pipeline.facts.scheme import WeightScheme
from pipeline.facts.target import TARGETS
from pipeline.fidelity import metrics
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter, read_tensor
from pipeline.package import config as package_config, replay
from pipeline.quantization import blockwise, gptq, graph_weights
from pipeline.runtime import generate, session as sessions

pytestmark = [
    # What the exporter says of itself.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BASES = Path(__file__).parent.parent / "recipes" / "_base"
TEXT = ("qwen2", "qwen3")  # mixtures of experts: test_experts
GPUS = [name for name, row in TARGETS.items() if "float16" in row.dtypes and "genai" in row.exporters]
PROMPT = "The quick brown fox jumps over the lazy dog, 你好 and def add(first):\n    return"
Make = Callable[[str, str, str], Artifact]
RECIPES = Path(__file__).parent.parent / "recipes"


def quiet(part: float, what: str) -> None:
    assert 0 <= part <= 1
    assert what


def steps_of(folder: Path, checkpoint: Path, name: str, scheme: str, **sections: Any) -> list[Step]:
    """The steps for a tiny checkpoint by the base ``name``-int4, or without quantization."""
    value = {
        "target": name,
        "checkpoint": {
            "sources": [{"type": "local", "path": str(checkpoint)}],
            "license": "Apache-2.0",
            "base_model": "tiny",
        },
        "validate": {"gates": {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.5}},
        **({"quantize": {"algorithm": "none"}} if scheme == "none" else {"quantize": {"algorithm": scheme}}),
    }
    if scheme != "none":
        value["extends"] = os.path.relpath(BASES / f"{name}-int4.yaml", folder)
    path = folder / f"{name}-{scheme}.yaml"
    path.write_text(json.dumps({**value, **sections}), encoding="utf-8")  # JSON is YAML
    return plan.make(recipe.load(path))


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path) -> Artifact:
    """One stage, in this process."""
    from pipeline.stages import STAGES

    out_dir.mkdir(parents=True)
    step = replace(step, context={**step.context, "downloads": str(out_dir.parent / "downloads")})
    result = STAGES[step.stage](step, {name: inputs[name] for name in step.inputs}, out_dir, quiet)
    assert result.refused is None
    files = {path.name: (path.stat().st_size, digest.of_file(path)) for path in out_dir.iterdir()}
    return Artifact(step.stage, step.key, digest.of_value(files), out_dir, files, result.facts)


@pytest.fixture(scope="module")
def made(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``(target, model_type, algorithm) -> quantized artifact``, each made once; do not write into it."""

    @cache
    def exported(name: str, model_type: str) -> tuple[Path, Artifact]:
        folder = tmp_path_factory.mktemp("gpu") / name
        folder.mkdir()
        step = steps_of(folder, checkpoint_of(model_type), name, "none")[1]
        inputs = {"checkpoint": Artifact("checkpoint", "", "", checkpoint_of(model_type), {}, {})}
        return folder, run(step, inputs, folder / "export")

    @cache
    def quantized(name: str, model_type: str, scheme: str) -> Artifact:
        folder, source = exported(name, model_type)
        checkpoint = Artifact("checkpoint", "", "", checkpoint_of(model_type), {}, {})
        step = steps_of(folder, checkpoint_of(model_type), name, scheme)[2]
        return run(step, {"checkpoint": checkpoint, "export": source}, folder / scheme)

    return quantized


@pytest.fixture(scope="module")
def torch_model(checkpoint_of: Callable[..., Path]) -> Callable[[str], Reference]:
    return cache(lambda model_type: reference.load(checkpoint_of(model_type)))


def divergence(model: Reference, package: Path) -> float:
    """Mean KL divergence in nats over a text, token by token, on the processor."""
    ids = model.tokenizer(PROMPT)["input_ids"]
    found = generate.decode_logits(sessions.open_package(package, provider="cpu"), ids)
    return float(metrics.kl_divergence(metrics.log_softmax(model.logits(ids)), metrics.log_softmax(found)).mean())


def dtypes(model: onnx.ModelProto) -> dict[str, set[int]]:
    """Types of the activations that go in and out (the logits aside, which some readers want in float32), of scales."""
    values = [*model.graph.input, *model.graph.output]
    found = {value.type.tensor_type.elem_type for value in values if value.name != "logits"}
    return {
        "activations": found - {TensorProto.INT64},
        "weights": {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1},
        "scales": {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("_scales")},
    }


def configured(package: Path) -> tuple[str, dict[str, Any]]:
    config = json.loads((package / "genai_config.json").read_bytes())
    return replay.provider_of(config), config


def test_there_are_targets() -> None:
    assert {"cuda", "directml", "webgpu", "tensorrt-rtx"} <= set(GPUS)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_our_own_graph_asks_for_the_provider(
    name: str, checkpoint_of: Callable[..., Path], torch_model: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("qwen3")
    step = steps_of(tmp_path, checkpoint, name, "none", export={"exporter": "native"})[1]
    inputs = {"checkpoint": Artifact("checkpoint", "", "", checkpoint, {}, {})}
    package = run(step, inputs, tmp_path / "export").path
    assert configured(package)[0] == TARGETS[name].option
    assert dtypes(onnx.load(package / "model.onnx", load_external_data=False))["activations"] == {TensorProto.FLOAT16}
    assert divergence(torch_model("qwen3"), package) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TEXT)
@pytest.mark.parametrize("name", GPUS)
def test_a_float16_export_is_the_checkpoint(name: str, model_type: str, made: Make, torch_model: Any) -> None:
    package, row = made(name, model_type, "none").path, TARGETS[name]
    provider, _ = configured(package)
    assert provider == row.option
    package_config.check_config(package)
    model = graph.load(package / "model.onnx")
    found = dtypes(model)
    assert found["activations"] == {TensorProto.FLOAT16}
    assert TensorProto.FLOAT not in found["weights"]
    assert graph.operators(model)["GroupQueryAttention"] == 2
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    assert not row.max_opset or opset <= row.max_opset

    wanted = torch_model(model_type)
    assert divergence(wanted, package) < 1e-4
    session = sessions.open_package(package, provider="cpu")
    assert session.provider == "cpu"
    ids = wanted.tokenizer("In the morning")["input_ids"]
    answer, _ = wanted.greedy(ids, 32)
    assert len(set(answer)) > 5
    assert list(generate.stream(session, ids, 32)) == answer


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TEXT)
@pytest.mark.parametrize("name", GPUS)
def test_a_quantized_model_has_the_operators_of_its_target(
    name: str, model_type: str, made: Make, torch_model: Any
) -> None:
    source, package = made(name, model_type, "none").path, made(name, model_type, "min_error").path
    row = TARGETS[name]
    assert row.kernels
    before, after = (graph.load(folder / "model.onnx") for folder in (source, package))
    assert graph.interface(after) == graph.interface(before)
    assert dtypes(after)["activations"] == {TensorProto.FLOAT16}
    assert dtypes(after)["scales"] == {TensorProto.FLOAT16}
    assert configured(package) == configured(source)
    counts = graph.operators(after)
    kept = recipe.load(RECIPES / "qwen2.5-coder-0.5b-instruct" / f"{name}-int4.yaml").recipe.quantize.exclude
    products = sum(weight.role != "embedding" and weight.path not in kept for weight in graph.weights(before))
    assert products > 8
    used, other = ("DequantizeLinear", "MatMulNBits") if row.kernels.form == "qdq" else ("MatMulNBits", "MatMul")
    assert counts[used] == products
    assert other not in counts
    assert not counts.get("GatherBlockQuantized") or row.kernels.embedding
    for given in graph_weights.quantized_schemes(after).values():
        assert given.block_size in row.kernels.block_sizes[given.bits]
        assert given.symmetric or row.kernels.zero_points
    # A tiny model loses more in 4 bits than a real one.
    assert divergence(torch_model(model_type), package) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TEXT)
def test_both_forms_hold_the_same_weights_and_compute_the_same(model_type: str, made: Make, tmp_path: Path) -> None:
    """``DequantizeLinear`` before ``MatMul`` and ``MatMulNBits`` are two spellings of one symmetric quantization."""
    source = made("tensorrt-rtx", model_type, "none").path
    models: dict[str, onnx.ModelProto] = {}
    for form in ("nbits", "qdq"):
        model, folder = graph.load(source / "model.onnx"), tmp_path / form
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.onnx*"))
        schemes = {
            weight.path: WeightScheme(bits=4, block_size=32, symmetric=True)
            for weight in graph.weights(model)
            if weight.role != "embedding"
        }
        with ExternalDataWriter(folder / "model.onnx.data") as writer:
            graph_weights.quantize_weights(model, source, writer, schemes, form=form)
        onnx.save(model, str(folder / "model.onnx"))
        assert graph_weights.quantized_schemes(model) == schemes
        models[form] = model

    tensors = {
        form: {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) > 1}
        for form, model in models.items()
    }
    compared = 0
    for node in models["qdq"].graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scales = (tensors["qdq"][name] for name in node.input)
        assert (codes.data_type, scales.data_type) == (TensorProto.INT4, TensorProto.FLOAT16)
        columns, rows = codes.dims
        packed = stored(codes, tmp_path / "qdq")
        signed = blockwise.unpack(packed.reshape(1, -1), 4)[0][: rows * columns].astype(np.int8)
        signed = np.where(signed > 7, signed - 16, signed).reshape(columns, rows)
        scale = np.repeat(read_tensor(scales, tmp_path / "qdq").astype(np.float32), 32, axis=0)
        packed, scale_of_blocks = (read_tensor(tensors["nbits"][name], tmp_path / "nbits") for name in node.input)
        nbits = blockwise.BlockQuantized(packed, scale_of_blocks, None, 0.0)
        np.testing.assert_array_equal((signed * scale).T, blockwise.dequantize(nbits, 4, columns))
        compared += 1
    assert compared == graph.operators(models["nbits"])["MatMulNBits"]

    # Where the runtime makes one node of the two, it would round activations to 8 bits on the processor.
    config = configured(tmp_path / "qdq")[1]
    config["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"] = "1"
    (tmp_path / "qdq" / "genai_config.json").write_text(json.dumps(config))
    ids = [5, 17, 40, 8, 99, 23, 7]
    left, right = (
        generate.decode_logits(sessions.open_package(tmp_path / form, 1, "cpu"), ids) for form in ("nbits", "qdq")
    )
    assert np.abs(left).max() > 5
    np.testing.assert_allclose(left, right, rtol=0, atol=0.1)  # float16 sums in another order


def stored(tensor: TensorProto, folder: Path) -> Any:
    """The bytes of a tensor whose type NumPy does not have."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.frombuffer(tensor.raw_data, np.uint8)
    entry = {item.key: item.value for item in tensor.external_data}
    data = (folder / entry["location"]).read_bytes()
    return np.frombuffer(data, np.uint8, int(entry["length"]), int(entry["offset"]))


@pytest.mark.slow
def test_what_has_no_qdq_form_is_refused(made: Make, tmp_path: Path) -> None:
    source, path = made("tensorrt-rtx", "qwen2", "none").path, "model.layers.0.mlp.down_proj"
    for given in ({"bits": 8, "symmetric": True}, {"bits": 4, "symmetric": False}):
        model = graph.load(source / "model.onnx")
        schemes = {path: WeightScheme.model_validate({**given, "block_size": 32})}
        with (
            ExternalDataWriter(tmp_path / "model.onnx.data") as writer,
            pytest.raises(StageError, match=f"{path} has no QDQ form"),
        ):
            graph_weights.quantize_weights(model, source, writer, schemes, form="qdq")


def with_manifest(source: Path, folder: Path, name: str, checkpoint: Path) -> Path:
    """A copy with as much of a manifest as tells what to install."""
    shutil.copytree(source, folder)
    fields = steps_of(folder.parent, checkpoint, name, "none")[-1].fields
    manifest = {"schema_version": 1, "name": "x", "source": {}, "recipe": {}, "steps": {}, "target": {}, "files": {}}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "runtime": fields["runtime"]}), encoding="utf-8")
    assert not (folder / CHECKSUMS).exists()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_a_provider_that_is_not_there_says_what_to_install(
    name: str, made: Make, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    from pipeline.facts import machine

    if machine.execution(TARGETS[name]).provider == TARGETS[name].provider:
        pytest.skip("it is there")
    source = made(name, "qwen2", "none").path
    package = with_manifest(source, tmp_path / "package", name, checkpoint_of("qwen2"))
    runtime = TARGETS[name].runtime
    with pytest.raises(RuntimeMissing, match=f"is for the provider {TARGETS[name].option}") as caught:
        sessions.open_package(package)
    assert caught.value.why
    assert "pip install" in caught.value.fix
    assert f"{runtime.package}==" in caught.value.fix
    assert runtime.plugin in caught.value.fix
    assert "`--provider cpu`" in caught.value.fix
    with pytest.raises(RuntimeMissing, match=f"is for the provider {TARGETS[name].option}"):
        sessions.open_package(source)  # nor is a model without a manifest taken for a damaged one


@pytest.mark.slow
def test_a_damaged_model_is_not_blamed_on_a_provider_that_was_not_asked_for(made: Make, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(made("cuda", "qwen2", "none").path, package)
    (package / "model.onnx").write_bytes(b"no model")
    with pytest.raises(PackageError, match="cannot be loaded"):
        sessions.open_package(package, provider="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_codes_are_rounded_to_the_float16_scales_that_are_stored(bits: int, symmetric: bool) -> None:
    """Weights this small have subnormal scales, which differ most between the two types."""
    weight = np.random.default_rng(0).normal(0, 2e-5 if bits == 4 else 2e-4, (64, 256)).astype(np.float16)
    found = blockwise.quantize(weight, bits, 32, symmetric)
    assert found.scale.dtype == np.float16
    values = weight.astype(np.float32)

    def error(given: blockwise.BlockQuantized) -> float:
        difference = np.square(blockwise.dequantize(given, bits, 256) - values, dtype=np.float64).sum()
        return float(difference / np.square(values, dtype=np.float64).sum())

    assert found.relative_error == pytest.approx(error(found), rel=1e-3)
    exact = blockwise.quantize(values, bits, 32, symmetric)
    assert exact.scale.dtype == np.float32
    rounded_later = error(replace(exact, scale=exact.scale.astype(np.float16)))
    assert error(exact) < error(found) < (1.001 if bits == 4 else 1.0) * rounded_later


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_a_float16_weight_is_that_of_its_values_with_float16_scales(symmetric: bool) -> None:
    import torch

    generator = np.random.default_rng(0)
    weight = generator.normal(0, 0.02, (48, 128)).astype(np.float16)
    inputs = (generator.normal(size=(512, 128)) @ generator.normal(size=(128, 128))).astype(np.float32)
    factor = gptq.factor(gptq.hessian(torch.from_numpy(inputs)))
    found = gptq.quantize(weight, factor, 4, 32, symmetric)
    assert found.scale.dtype == np.float16
    assert found.packed.shape == (48, 4, 16)
    values = weight.astype(np.float32)
    exact, plain = gptq.quantize(values, factor, 4, 32, symmetric), blockwise.quantize(weight, 4, 32, symmetric)

    def loss(given: blockwise.BlockQuantized) -> float:
        return float(np.square(inputs @ (blockwise.dequantize(given, 4, 128) - values).T).sum())

    assert loss(found) < 0.8 * loss(plain)
    assert loss(found) == pytest.approx(loss(exact), rel=0.1)


def config_with(*providers: Any) -> dict[str, Any]:
    decoder = {"session_options": {"log_id": "x", "provider_options": list(providers)}, "filename": "model.onnx"}
    return {"model": {"type": "qwen2", "context_length": 8, "vocab_size": 8, "eos_token_id": 1, "decoder": decoder}}


SAFE = {
    "none": (),
    **{name: ({row.option: {}},) for name, row in TARGETS.items() if row.option and not row.missing},
    "recorded CUDA graphs": ({"cuda": {"enable_cuda_graph": "1"}},),
    "recorded WebGPU": ({"webgpu": {"enableGraphCapture": "1"}},),
}
UNSAFE: dict[str, tuple[Any, ...]] = {
    "a provider that is not known": ({"Custom": {}},),
    "another spelling": ({"CUDA": {}},),
    "a library among the options": ({"cuda": {"custom_ops_library": "evil.so"}},),
    "a path as a value": ({"cuda": {"enable_cuda_graph": "../evil.so"}},),
    "a value that is no text": ({"cuda": {"enable_cuda_graph": {"path": "evil.so"}}},),
    "a long value": ({"cuda": {"enable_cuda_graph": "x" * 41}},),
    "an option of another provider": ({"dml": {"enable_cuda_graph": "1"}},),
    "a second one hidden in an entry": ({"cuda": {}, "QNN": {"backend_path": "evil.so"}},),
    "a second entry": ({"cuda": {}}, {"QNN": {"backend_path": "evil.so"}}),
    "no options": ({"cuda": "evil.so"},),
    "no provider": ({},),
    "a name": ("cuda",),
}


@pytest.mark.parametrize("case", SAFE)
def test_providers_of_the_targets_pass_the_check(case: str, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(config_with(*SAFE[case])))
    package_config.check_config(tmp_path)


@pytest.mark.parametrize("case", UNSAFE)
def test_no_provider_brings_anything_that_the_runtime_would_load(case: str, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(config_with(*UNSAFE[case])))
    with pytest.raises(
        PackageError, match="provider_options` names providers or options that are not known to be safe"
    ):
        package_config.check_config(tmp_path)
