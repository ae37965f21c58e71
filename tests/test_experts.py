"""Mixtures of experts: graphs against PyTorch, quantized experts one by one, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import digest
from pipeline.artifact import Artifact, Step
from pipeline.builds import plan
from pipeline.checkpoint import files as checkpoint_files, reference
from pipeline.errors import CheckpointError, RecipeError, StageError
from pipeline.export import exporter
from pipeline.facts import recipe
from pipeline.facts.expert_forms import fused_problem
from pipeline.facts.family import Experts, Shape
from pipeline.facts.scheme import Scheme
from pipeline.facts.target import TARGETS
from pipeline.fidelity import expert_agreement, metrics
from pipeline.graph import edits as graph, external_data
from pipeline.quantization import blockwise, calibration, expert_weights, quantizer
from pipeline.runtime import generate, session

FAMILIES = ("qwen2_moe", "qwen3_moe")
PROMPT = list(range(5, 13))
INT4 = {"bits": 4, "block_size": 16, "symmetric": False}
INT8 = {"bits": 8, "block_size": 16, "symmetric": True}
SHAPE = Shape("qwen3_moe", 2, 64, 128, 4, 2, 32, 512, 512, False, Experts(8, 2, 64, normalized=True))


def _scheme(algorithm: str = "min_error", **more: Any) -> Scheme:
    given = {"algorithm": algorithm, "calibration_windows": 2, **more}
    return Scheme.model_validate_json(json.dumps(given if algorithm == "none" else {"body": INT4, **given}))


def _quiet(_part: float, _what: str) -> None:
    pass


# What is decided before anything is read.


@pytest.mark.parametrize(
    ("target", "scheme", "shape", "problem"),
    [
        ("cpu", _scheme(), SHAPE, ""),
        ("cpu", _scheme("none"), SHAPE, ""),
        ("cpu", _scheme("rtn"), SHAPE, "algorithm rtn quantizes no fused experts"),
        ("cpu", _scheme(body={**INT4, "block_size": 128}), SHAPE, "blocks of 128 do not divide the sizes 64 and 64"),
        ("cuda", _scheme("none"), SHAPE, ""),
        ("cuda", _scheme(), SHAPE, "no fused operator for 4-bit experts"),
        ("webgpu", _scheme(), SHAPE, "no zero points"),
        ("webgpu", _scheme(body={**INT4, "symmetric": True}), SHAPE, ""),
        ("webgpu", _scheme("none"), SHAPE, "no fused operator for float experts"),
        ("directml", _scheme(), SHAPE, "directml has no fused operator"),
        ("tensorrt-rtx", _scheme(), SHAPE, "tensorrt-rtx has no fused operator"),
    ],
)
def test_where_experts_are_one_operator(target: str, scheme: Scheme, shape: Shape, problem: str) -> None:
    found = fused_problem(TARGETS[target], scheme, shape)
    assert problem in found
    assert bool(problem) == bool(found)


def test_an_operator_that_normalizes_is_not_for_routers_that_do_not() -> None:
    shape = Shape(**{**vars(SHAPE), "experts": Experts(8, 2, 64, normalized=False)})
    scheme = _scheme(body={**INT4, "symmetric": True})
    assert "normalizes the router's weights" in fused_problem(TARGETS["webgpu"], scheme, shape)


def _recipe(folder: Path, checkpoint: Mapping[str, Any], **sections: Any) -> recipe.Loaded:
    value = {
        "target": "cpu",
        "checkpoint": {"license": "Apache-2.0", "base_model": "tiny", **checkpoint},
        "export": {"exporter": "native"},
        "quantize": {"algorithm": "min_error", "body": INT4},
        "validate": {
            "windows": 4,
            "window_tokens": 32,
            "greedy_tokens": 8,
            "answers": 2,
            "gates": {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.5, "greedy": 0.5, "routing": 0.85},
        },
        **sections,
    }
    path = folder / "tiny" / "cpu.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return recipe.load(path)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., dict[str, Step]]:
    """Maker of the steps of a recipe, by stage, from sizes alone."""

    def made(**sections: Any) -> dict[str, Step]:
        sizes = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 32}
        experts = {"count": 8, "per_token": 2, "intermediate": 64, "normalized": True}
        architecture = {"model_type": "qwen3_moe", **sizes, "vocabulary": 512, "experts": experts}
        source = {"sources": [{"type": "hub", "repo": "a/b", "revision": "0" * 40}]}
        sections = {"architecture": architecture, **sections}
        return {step.stage: step for step in plan.make(_recipe(tmp_path, source, **sections))}

    return made


@pytest.mark.parametrize(
    ("sections", "form"),
    [
        ({}, "fused"),
        ({"export": {"exporter": "native", "experts": "dense"}}, "dense"),
        ({"target": "directml", "quantize": {"algorithm": "min_error", "body": INT4}}, "dense"),
        ({"quantize": {"algorithm": "rtn", "body": INT4}}, "dense"),
    ],
    ids=["processors", "as the recipe says", "no such operator", "no such pass"],
)
def test_the_form_of_experts_follows_from_target_and_scheme(
    sections: dict[str, Any], form: str, planned: Callable[..., dict[str, Step]]
) -> None:
    assert planned(**sections)["export"].fields["experts"] == form


@pytest.mark.parametrize(
    ("sections", "texts"),
    [
        ({"export": {"exporter": "native", "rotate": True}}, ["export.rotate: experts are held against PyTorch's"]),
        (
            {"quantize": {"algorithm": "dynamic"}, "export": {"exporter": "native", "experts": "fused"}},
            ["quantize.algorithm: dynamic would quantize the routers", "export.experts: algorithm dynamic"],
        ),
        (
            {"target": "directml", "export": {"exporter": "native", "experts": "fused"}},
            ["export.experts: directml has no fused operator"],
        ),
    ],
    ids=["rotated", "dynamic", "fused"],
)
def test_what_cannot_be_built_is_refused_when_planned(
    sections: dict[str, Any], texts: list[str], planned: Callable[..., dict[str, Step]]
) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(**sections)
    assert all(text in str(caught.value) for text in texts), str(caught.value)


# Graphs.


@pytest.fixture(scope="module")
def references(checkpoint_of: Callable[..., Path]) -> Callable[[str], reference.Reference]:
    return cache(lambda model_type: reference.load(checkpoint_of(model_type)))


@pytest.fixture(scope="module")
def exported(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Maker of a float graph, ``(model_type, fused) -> folder``, each made once; do not write into it."""
    import onnx

    @cache
    def made(model_type: str, fused: bool = True) -> Path:
        folder, checkpoint = tmp_path_factory.mktemp("graph"), checkpoint_of(model_type)
        onnx.save(exporter.export_native(checkpoint, folder, "float32", fused), str(folder / "model.onnx"))
        for path in checkpoint.glob("tokenizer*"):
            shutil.copyfile(path, folder / path.name)
        return folder

    return made


def _quantized(source: Path, checkpoint: Path, folder: Path, scheme: Scheme) -> dict[str, Any]:
    folder.mkdir()
    facts = quantizer.quantize(source, checkpoint, folder, scheme, _quiet)
    for path in source.iterdir():
        if path.suffix not in (".onnx", ".data"):
            shutil.copyfile(path, folder / path.name)
    return facts


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_greedy_tokens_are_pytorchs(
    model_type: str, fused: bool, exported: Callable[..., Path], references: Callable[[str], reference.Reference]
) -> None:
    folder, torch_model = exported(model_type, fused), references(model_type)
    opened, ids = session.open_package(folder), list(range(3, 99))
    wanted = torch_model.logits(ids)
    assert np.abs(generate.prefill_logits(opened, ids) - wanted).max() < 2e-4
    assert np.abs(generate.decode_logits(opened, ids) - wanted).max() < 2e-4
    answer, _ = torch_model.greedy(PROMPT, 64)
    assert list(generate.stream(opened, PROMPT, 64)) == answer
    operators = graph.operators(graph.load(folder / "model.onnx"))
    assert operators.get("MoE", 0) == 2 * fused
    assert operators.get("ScatterElements", 0) == 2 * (not fused)
    assert json.loads((folder / "genai_config.json").read_text())["model"]["type"] == model_type.removesuffix("_moe")


WAYS: dict[str, tuple[Scheme, bool]] = {
    "4 bits": (_scheme(), True),
    "4 bits symmetric": (_scheme(body={**INT4, "symmetric": True}), True),
    "4 bits by gptq": (_scheme("gptq"), True),
    "8 bits in one layer": (_scheme(overrides=[{"match": "model.layers.0.mlp.experts", "scheme": INT8}]), True),
    "8 bits": (_scheme(body=INT8), True),
    "one layer in float": (_scheme(exclude=["model.layers.0.mlp.experts"]), True),
    "4 bits, plain operators": (_scheme(), False),
    "4 bits by gptq, plain operators": (_scheme("gptq"), False),
    "plain operators by Olive's pass": (_scheme("rtn"), False),
    "products in integers": (_scheme("w8a8", body={"bits": 8, "block_size": -1, "symmetric": True}, head=INT8), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_quantized_experts_stay_near_the_reference(
    model_type: str,
    way: str,
    exported: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    tmp_path: Path,
) -> None:
    scheme, fused = WAYS[way]
    source, folder = exported(model_type, fused), tmp_path / "quantized"
    facts = _quantized(source, checkpoint_of(model_type), folder, scheme)
    ids = list(range(3, 99))
    wanted = metrics.log_softmax(references(model_type).logits(ids))
    opened = session.open_package(folder)
    for found in (generate.prefill_logits(opened, ids), generate.decode_logits(opened, ids)):
        limit = 0.005 if way == "8 bits" else 0.3
        assert float(metrics.kl_divergence(wanted, metrics.log_softmax(found)).mean()) < limit
    if fused:
        assert facts["operators"].get("QMoE", 0) == 2 - (way == "one layer in float")
        assert facts["experts"]["count"] == 8 * facts["operators"]["QMoE"]
        assert facts["experts"]["relative_error"] <= facts["experts"]["worst_error"] < 0.03
    routers = {weight.path for weight in graph.weights(graph.load(source / "model.onnx")) if weight.role == "router"}
    kept = {weight.path for weight in graph.weights(graph.load(folder / "model.onnx")) if weight.role == "router"}
    assert kept == routers
    assert len(routers) == (4 if model_type == "qwen2_moe" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_forms_of_a_mixture_compute_the_same(
    model_type: str, exported: Callable[..., Path], checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    logits = []
    for fused in (True, False):
        folder = tmp_path / str(fused)
        _quantized(exported(model_type, fused), checkpoint_of(model_type), folder, _scheme("gptq", accuracy_level=1))
        logits.append(generate.prefill_logits(session.open_package(folder), list(range(3, 67))))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(
    exported: Callable[..., Path], checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        _quantized(exported("qwen3_moe"), checkpoint_of("qwen3_moe"), tmp_path / name, _scheme("gptq"))
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "error", "text"),
    [
        (_scheme("rtn"), RecipeError, "rtn cannot quantize a mixture of experts"),
        (_scheme(body={**INT4, "block_size": 128}), StageError, "no multiple of the block size 128"),
        (_scheme(exclude=["*.mlp.gate"]), RecipeError, "no weight matches `*.mlp.gate`"),
    ],
    ids=["a pass without experts", "blocks", "a pattern of routers only"],
)
def test_what_experts_cannot_become_is_refused(
    scheme: Scheme,
    error: type[Exception],
    text: str,
    exported: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as caught:
        _quantized(exported("qwen3_moe"), checkpoint_of("qwen3_moe"), tmp_path / "quantized", scheme)
    assert text in str(caught.value)


# Calibration.


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_expert_is_calibrated_with_the_tokens_that_go_to_it(
    model_type: str,
    checkpoint_of: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted from what the reference itself chooses and multiplies while it reads the same text."""
    import torch

    checkpoint, layer, expert = checkpoint_of(model_type), 0, 3
    model, seen = references(model_type).model, {}
    mixture = model.model.layers[layer].mlp
    module = mixture.experts[expert]
    hooks = [
        module.down_proj.register_forward_pre_hook(lambda _, given: seen.update(inner=given[0])),
        module.gate_proj.register_forward_pre_hook(lambda _, given: seen.update(outer=given[0])),
        mixture.gate.register_forward_hook(lambda _, __, logits: seen.update(logits=logits)),
    ]
    with torch.inference_mode():
        model(torch.tensor(calibration.windows(checkpoint, 1)))
    for hook in hooks:
        hook.remove()
    share = seen["logits"].softmax(-1)
    best = share.topk(2, -1)
    weights = best.values / best.values.sum(-1, keepdim=True) if model_type == "qwen3_moe" else best.values
    weight = weights.t()[(best.indices == expert).t()][:, None]  # in the order in which the reference does it
    assert len(weight) >= calibration._FEWEST
    monkeypatch.setattr(calibration, "_FEWEST_INNER", 1)
    walk = calibration.Hessians(checkpoint, 1)
    for part, kind in (("gate_up_proj", "outer"), ("down_proj", "inner")):
        (found,) = walk.of(f"model.layers.{layer}.mlp.experts.{expert}.{part}")
        rows = seen[kind] * weight
        torch.testing.assert_close(found, rows.t() @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_an_expert_that_hardly_any_token_goes_to_is_rounded(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_FEWEST_INNER", 10_000)
    walk, values = calibration.Hessians(checkpoint_of("qwen3_moe"), 1), np.random.default_rng(0).random((8, 64), "f")
    scheme = _scheme().body
    assert scheme is not None
    made = walk.quantize("model.layers.1.mlp.experts.2.down_proj", values, scheme)
    plain = blockwise.quantize(values, 4, 16, False)
    np.testing.assert_array_equal(made.packed, plain.packed)


# Validation.


def _measured(torch_model: reference.Reference, package: Path, scratch: Path) -> dict[str, Any]:
    windows = [list(range(3, 67)), list(range(100, 164))]
    with expert_agreement.Recorder(torch_model) as seen:
        for ids in windows:
            torch_model.logits(ids)
    return expert_agreement.measure(seen, package, windows, scratch)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dense"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_expert_and_every_choice_of_a_float_graph_is_the_references(
    model_type: str,
    fused: bool,
    exported: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    tmp_path: Path,
) -> None:
    found = _measured(references(model_type), exported(model_type, fused), tmp_path / "scratch")
    assert found["routing"]["agreement"] > 0.998
    assert found["count"] == 16
    assert found["outputs"]["largest"] < 1e-10


def _damaged(source: Path, folder: Path, name: str, damage: Callable[[Any], None]) -> Path:
    """A copy of a package in which ``damage`` was done to an initializer."""
    shutil.copytree(source, folder)
    tensor = next(item for item in graph.load(folder / "model.onnx").graph.initializer if name in item.name)
    values = external_data.read_tensor(tensor, folder)
    place = {entry.key: entry.value for entry in tensor.external_data}
    changed = np.array(values)
    damage(changed)
    assert not np.array_equal(changed, values)
    with (folder / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(changed.tobytes())
    return folder


def _exchange(values: Any) -> None:
    values[[2, 5]] = values[[5, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_exchanged_experts_are_found_and_named(
    model_type: str,
    exported: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    tmp_path: Path,
) -> None:
    """Of quantized ones, which are near the reference's but for that."""
    whole = tmp_path / "whole"
    _quantized(exported(model_type), checkpoint_of(model_type), whole, _scheme())
    good = _measured(references(model_type), whole, tmp_path / "first")
    assert good["routing"]["agreement"] > 0.85
    assert 1e-4 < good["outputs"]["largest"] < 0.05
    damaged = _damaged(whole, tmp_path / "damaged", "layers.0.mlp.experts.down_proj.weight_Q4", _exchange)
    found = _measured(references(model_type), damaged, tmp_path / "second")
    assert found["outputs"]["largest"] > 0.5
    assert found["outputs"]["expert"] in ("model.layers.0.mlp.experts.2", "model.layers.0.mlp.experts.5")


@pytest.mark.slow
def test_a_reference_that_is_left_on_the_disk_shows_the_same(
    exported: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    _quantized(exported("qwen2_moe"), checkpoint_of("qwen2_moe"), whole, _scheme())
    on_disk = reference.load(checkpoint_of("qwen2_moe"), held_whole=0)
    assert next(on_disk.model.model.layers[0].mlp.experts[0].parameters()).device.type == "meta"
    expected = _measured(references("qwen2_moe"), whole, tmp_path / "first")
    assert _measured(on_disk, whole, tmp_path / "second") == expected


@pytest.mark.slow
def test_experts_are_told_apart_among_integer_products(
    exported: Callable[..., Path],
    checkpoint_of: Callable[..., Path],
    references: Callable[[str], reference.Reference],
    tmp_path: Path,
) -> None:
    """What they yield is scaled by token behind the product, and what they read is rounded before it."""
    scheme = _scheme("w8a8", body={"bits": 8, "block_size": -1, "symmetric": True}, head=INT8)
    _quantized(exported("qwen2_moe", False), checkpoint_of("qwen2_moe"), tmp_path / "package", scheme)
    found = _measured(references("qwen2_moe"), tmp_path / "package", tmp_path / "scratch")
    assert 1e-5 < found["outputs"]["largest"] < 0.005


@pytest.mark.slow
def test_a_router_that_chooses_others_is_found(
    exported: Callable[..., Path], references: Callable[[str], reference.Reference], tmp_path: Path
) -> None:
    def turn(values: Any) -> None:
        values[:] = np.roll(values, 1, axis=1)

    damaged = _damaged(exported("qwen3_moe"), tmp_path / "damaged", "layers.1.mlp.gate", turn)
    found = _measured(references("qwen3_moe"), damaged, tmp_path / "scratch")
    assert found["routing"]["fewest"] < 0.5
    assert found["routing"]["layer"] == 1


# Checkpoints.


@pytest.mark.slow
def test_experts_that_are_missing_are_named(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("qwen2_moe"), folder)
    assert checkpoint_files.check_directory(folder)["experts"]["dense_layers"] == [1]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    lost = {"model.layers.2.mlp.experts.6.up_proj.weight", "model.layers.0.mlp.shared_expert_gate.weight"}
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, values in tensors.items():
        shards["b.safetensors" if "experts.7" in name else "a.safetensors"][name] = values
    for file, inside in shards.items():
        save_file({name: values for name, values in inside.items() if name not in lost}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files.check_directory(folder)
    assert all(f"{name} is missing" in str(caught.value) for name in lost), str(caught.value)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the shard b\.safetensors is missing"):
        checkpoint_files.check_directory(folder)


# Whole stages.


def _artifact(stage: str, path: Path, facts: Mapping[str, Any]) -> Artifact:
    files = {file.name: (file.stat().st_size, digest.of_file(file)) for file in path.iterdir() if file.is_file()}
    return Artifact(stage, "0" * 64, "0" * 64, path, files, facts)


@pytest.mark.slow
def test_the_stages_make_a_package_that_generates(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """All of them in this process, from the plan of a recipe; in test_build the same is a build."""
    from pipeline.stages import STAGES

    source = {"sources": [{"type": "local", "path": str(checkpoint_of("qwen3_moe"))}]}
    loaded = _recipe(tmp_path, source, quantize={"algorithm": "gptq", "body": INT4, "calibration_windows": 2})
    made: dict[str, Artifact] = {}
    for step in plan.make(loaded):
        folder = tmp_path / step.stage / "out"
        folder.mkdir(parents=True)
        given = Step(**{**vars(step), "context": {**step.context, "downloads": str(tmp_path / "downloads")}})
        result = STAGES[step.stage](given, {name: made[name] for name in step.inputs}, folder, _quiet)
        assert result.refused is None, result.refused
        made[step.stage] = _artifact(step.stage, folder, result.facts)
    validation = json.loads((made["validate"].path / "validation.json").read_text())
    assert validation["experts"]["routing"]["agreement"] >= 0.85
    assert {gate["metric"] for gate in validation["gates"]} >= {"routing", "expert_error"}
    assert made["export"].facts["experts"] == "fused"
    package = made["package"].path
    assert list(generate.stream(session.open_package(package), PROMPT, 8))
    operators = json.loads((package / "manifest.json").read_text())["quantization"]["operators"]
    assert operators["QMoE"] == 2
    assert "experts that the routers choose" in (package / "report.html").read_text()


def test_the_schemes_of_quantized_experts_are_read_from_the_graph() -> None:
    import onnx

    attributes = {"expert_weight_bits": 8, "block_size": 64}
    for inputs, symmetric in ((["x", "l", "a", "b", "", "c", "d"], True), (["x", *["y"] * 12], False)):
        node = onnx.helper.make_node("QMoE", inputs, ["z"], **attributes)
        scheme = expert_weights.scheme_of(node)
        assert (scheme.bits, scheme.block_size, scheme.symmetric) == (8, 64, symmetric)
