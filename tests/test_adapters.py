"""LoRA adapters beside the weights: each computes what peft computes, the base stays itself, and misuse is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import cli
from pipeline.artifact import Artifact, Estimate, Step
from pipeline.builds import plan
from pipeline.checkpoint import reference
from pipeline.errors import CheckpointError, PackageError, StageError, UsageError
from pipeline.facts import recipe
from pipeline.fidelity import metrics
from pipeline.lora import files as lora_files
from pipeline.package import adapter_files
from pipeline.runtime import adapters, generate, session as sessions, speculation
from pipeline.runtime.session import Session

IDS = list(range(3, 60))
BASE = "b" * 64
# Of different ranks, scales and modules; the first leaves k_proj of a packed projection out, the second has all.
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "second": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
}


def adapter_of(base: Path, folder: Path, size: float = 0.3, seed: int = 0, **config: Any) -> Path:
    """Save a random adapter of ``base`` as peft saves one; ``size`` is that of the entries of B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=size) if size else torch.nn.init.zeros_(parameter)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`ADAPTERS` of the tiny Qwen2, as peft saves them; do not write into them."""
    folder = tmp_path_factory.mktemp("peft")
    given = enumerate(ADAPTERS.items())
    return {name: adapter_of(checkpoint_of("qwen2"), folder / name, 0.3, seed, **spec) for seed, (name, spec) in given}


def _artifact(stage: str, folder: Path, **facts: Any) -> Artifact:
    return Artifact(stage, "k" * 64, BASE, folder, {}, facts)


def _graph(checkpoint: Path, folder: Path, form: str, exporter_name: str, dtype: str = "float32") -> Path:
    """What the quantize stage leaves of a checkpoint: a graph, float or in 4 bits, and the files beside it."""
    import onnx

    from pipeline.export import exporter
    from pipeline.facts.scheme import WeightScheme
    from pipeline.graph import edits as graph
    from pipeline.graph.external_data import ExternalDataWriter
    from pipeline.quantization import graph_weights

    work = folder / "exported"
    work.mkdir(parents=True)
    if exporter_name == "native":
        onnx.save(exporter.export_native(checkpoint, work, "float32"), str(work / "model.onnx"))
    else:
        provider = {"float32": "CPUExecutionProvider", "float16": "CUDAExecutionProvider"}[dtype]
        exporter.EXPORTERS[exporter_name](checkpoint, work, {}, provider, dtype)
    model = graph.load(work / "model.onnx")
    scheme = WeightScheme(bits=4, block_size=16, symmetric=False)
    wanted = {weight.path: scheme for weight in graph.weights(model) if weight.role == "body"}
    out = folder / form
    out.mkdir()
    with ExternalDataWriter(out / "model.onnx.data") as writer:
        if form == "int4":
            graph_weights.quantize_weights(model, work, writer, wanted, accuracy_level=1)
        else:
            graph_weights.repack(model, work, writer)
    onnx.save(model, str(out / "model.onnx"))
    shutil.copyfile(work / "genai_config.json", out / "genai_config.json")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, out / name)
    return out


def _adapt(quantized: Path, given: dict[str, Path], out: Path, dtype: str = "float32") -> Path:
    """Run the stage."""
    from pipeline.stages import adapters as stage

    fields = {name: {"sha256": lora_files.identity(path), "license": "MIT"} for name, path in given.items()}
    context = {"folders": {name: str(path) for name, path in given.items()}}
    step = Step("adapters", "k" * 64, {"adapters": fields, "dtype": dtype}, (), {}, Estimate(0, 0, 0), context=context)
    out.mkdir(parents=True)
    inputs = {"checkpoint": _artifact("checkpoint", quantized), "quantize": _artifact("quantize", quantized)}
    stage.run(step, inputs, out, lambda *_: None)
    return out


@pytest.fixture(scope="module")
def made(
    checkpoint_of: Callable[..., Path], saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """For ``float`` and ``int4`` the graph as quantized, and with slots and both adapters; do not write into them."""
    found = {}
    for form in ("float", "int4"):
        folder = tmp_path_factory.mktemp("made")
        quantized = _graph(checkpoint_of("qwen2"), folder, form, "native")
        found[form] = quantized, _adapt(quantized, saved, folder / "adapted")
    return found


def _reference(checkpoint: Path, package: Path) -> reference.Reference:
    """PyTorch with the weights of ``package``, read back where they are quantized."""
    from functools import partial

    from pipeline.graph import edits as graph
    from pipeline.tuning import attribution, sensitivity

    loaded = reference.load(checkpoint)
    model = graph.load(package / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    stored = {graph.path_of(node, ""): attribution._Stored(node, tensors, package) for node in nodes}
    sensitivity.replace(loaded, {path: partial(attribution._Stored.values, one) for path, one in stored.items()})
    return loaded


def _file(package: Path, name: str) -> Path:
    return package / f"{name}{adapter_files.ENDING}"


def _logits(opened: Session) -> tuple[Any, Any]:
    return generate.prefill_logits(opened, IDS), generate.decode_logits(opened, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "int4"])
def test_each_adapter_computes_what_peft_computes_and_the_base_stays_as_it_was(
    form: str, made: dict[str, tuple[Path, Path]], saved: dict[str, Path], checkpoint_of: Callable[..., Path]
) -> None:
    quantized, package = made[form]
    before = _logits(sessions.open_package(quantized, 1))
    opened = sessions.open_package(package, 1)
    torch_model = _reference(checkpoint_of("qwen2"), package)
    plain = torch_model.logits(IDS)
    own = {name: adapters.activate(opened, _file(package, name)) for name in ADAPTERS}
    for name, session in own.items():
        with reference.adapted(torch_model, saved[name]) as wanted:
            logits, answer = wanted.logits(IDS), wanted.greedy(IDS[:8], 24)[0]
        assert np.abs(logits - plain).max() > 1  # else nothing is shown
        for found in _logits(session):
            np.testing.assert_allclose(found, logits, atol=1e-3)
        assert list(generate.stream(session, IDS[:8], 24)) == answer
        assert list(speculation.stream(session, IDS[:8], 24)) == answer
    np.testing.assert_array_equal(torch_model.logits(IDS), plain)  # the reference is as it was, too
    for found, wanted_bits in zip(_logits(opened), before, strict=True):
        np.testing.assert_array_equal(found, wanted_bits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what optimum and torch say when they export
@pytest.mark.parametrize(
    ("model_type", "exporter_name", "dtype", "near"),
    [
        ("qwen2", "optimum", "float32", 1e-3),
        ("qwen3", "genai", "float32", 1e-3),
        ("qwen2", "genai", "float16", 0.1),  # for CUDA, on the processor
    ],
)
def test_graphs_of_every_exporter_have_slots(
    model_type: str, exporter_name: str, dtype: str, near: float, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(model_type)
    saved = adapter_of(checkpoint, tmp_path / "peft", 0.05, **ADAPTERS["second"])
    quantized = _graph(checkpoint, tmp_path / "graph", "float", exporter_name, dtype)
    package = _adapt(quantized, {"a": saved}, tmp_path / "out", dtype)
    opened = adapters.activate(sessions.open_package(package, 1, "cpu"), _file(package, "a"))
    torch_model = reference.load(checkpoint)
    plain = torch_model.logits(IDS)
    with reference.adapted(torch_model, saved) as wanted:
        logits = wanted.logits(IDS)
    assert np.abs(logits - plain).max() > 10 * near
    for found in _logits(opened):
        np.testing.assert_allclose(found, logits, atol=near)


@pytest.mark.slow
def test_slots_are_no_weights_to_be_quantized(made: dict[str, tuple[Path, Path]]) -> None:
    from pipeline.graph import edits as graph

    quantized, package = (graph.load(folder / "model.onnx") for folder in made["float"])
    assert [weight.path for weight in graph.weights(package)] == [weight.path for weight in graph.weights(quantized)]
    assert len(adapter_files.slots(made["float"][1])) == 10  # 5 projections of 2 layers: q, k and v are packed
    assert adapter_files.slots(made["float"][0]) == {}


@pytest.mark.slow
def test_validation_notices_an_adapter_that_is_ignored_or_is_another_one_however_slight(
    made: dict[str, tuple[Path, Path]],
    checkpoint_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.fidelity import text_agreement
    from pipeline.stages import validate

    checkpoint = checkpoint_of("qwen2")
    saved = {name: adapter_of(checkpoint, tmp_path / name, 0.01, **spec) for name, spec in ADAPTERS.items()}
    slight = _adapt(made["int4"][0], saved, tmp_path / "slight")
    torch_model, activate = reference.load(checkpoint), adapters.activate
    gates = {"mean_kl": 0.3, "top1": 0.7, "perplexity_ratio": 1.5}
    spec = recipe.Validate.model_validate({"greedy_tokens": 2, "answers": 1, "gates": gates})
    windows = [text_agreement.Window("code", IDS), text_agreement.Window("math", IDS[::-1])]

    def failed(package: Path) -> set[tuple[str, str]]:
        opened = sessions.open_package(package, 1)
        found = text_agreement.adapter_agreement(
            torch_model, (opened, opened), package, "first", windows, spec, [], lambda _: None
        )
        rest = {"finite": True, "prefill": found["prefill"], "decode": found["decode"], "greedy": found["greedy"]}
        same = {"eos": {"ids": [], "reference_ids": []}, **{key: {"runtime": [], "served": []} for key in PARITY}}
        every = validate.gates({**rest, **same, "adapters": {"first": found}}, spec.gates)
        return {(gate["metric"], gate["sense"]) for gate in every if not gate["passed"]}

    loud = made["int4"][1]
    assert failed(loud) == failed(slight) == set()
    monkeypatch.setattr(adapters, "activate", lambda session, _: session)
    assert failed(slight) == {("adapter_effect", "min")}
    assert {("adapter_effect", "min"), ("mean_kl", "max")} <= failed(loud)
    monkeypatch.setattr(adapters, "activate", lambda session, _: activate(session, _file(session.package, "second")))
    assert failed(slight) == {("adapter_effect", "min")}
    assert ("mean_kl", "max") in failed(loud)

    monkeypatch.setattr(adapters, "activate", activate)
    path = slight / "peft" / "first" / "adapter_config.json"
    config = json.loads(path.read_bytes())
    for factor, sense in ((2, "min"), (0.5, "max")):  # the reference's scale is another one than the package's
        changed = {"lora_alpha": factor * config["lora_alpha"], "alpha_pattern": {}}
        path.write_text(json.dumps({**config, **changed}))
        assert failed(slight) == {("adapter_effect", sense)}


PARITY = ("tokenizer", "chat_template")


def test_how_much_of_a_change_is_reproduced() -> None:
    random = np.random.default_rng(0)
    before, other, change = (random.standard_normal((5, 9)).astype(np.float32) for _ in range(3))
    for share in (0.0, 1.0, 2.0, -0.5):
        same, energy = metrics.change_products((before, before + change), (other, other + share * change))
        assert same / energy == pytest.approx(share, abs=1e-5)


# --- What cannot be kept apart is refused before anything is loaded.

_GOOD = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight": (2, 2) for part in "AB"}


def _peft(folder: Path, tensors: dict[str, tuple[int, ...]] = _GOOD, **settings: Any) -> Path:
    """The files of an adapter, with zeros for values."""
    header, at = {}, 0
    for name, dims in tensors.items():
        size = 4 * int(np.prod(dims))
        header[name] = {"dtype": "F32", "shape": list(dims), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    given = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def _only(module: str) -> dict[str, tuple[int, ...]]:
    return {f"base_model.model.{module}.lora_{part}.weight": (2, 2) for part in "AB"}


BAD: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "DoRA": ({"use_dora": True}, _GOOD, "use_dora is set: DoRA rescales the whole weight"),
    "biases": ({"bias": "all"}, _GOOD, "bias is set: biases were trained too"),
    "biases of the products": ({"lora_bias": True}, _GOOD, "lora_bias is set"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, _GOOD, "modules_to_save is set"),
    "transposed": ({"fan_in_fan_out": True}, _GOOD, "fan_in_fan_out is set"),
    "repeated layers": ({"layer_replication": [[0, 1], [0, 1]]}, _GOOD, "layer_replication is set"),
    "another base": ({"init_lora_weights": "pissa"}, _GOOD, "'pissa', which changes the base model"),
    "something of the future": ({"use_warp": 1}, _GOOD, "use_warp is set"),
    "the head": ({}, _only("lm_head"), "lm_head has no place for one"),
    "the embedding": ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 2)}, "is no lora_A or lora_B"),
    "an expert": ({}, _only("model.layers.0.mlp.experts.3.up_proj"), "experts.3.up_proj has no place"),
    "half": ({}, {next(iter(_GOOD)): (2, 2)}, "up_proj has one matrix of two"),
    "of three dimensions": ({}, dict.fromkeys(_GOOD, (2, 2, 1)), "has 3 dimensions"),
    "nothing": ({}, {}, "it has no tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_pair_of_matrices_beside_a_projection_is_refused(case: str, tmp_path: Path) -> None:
    settings, tensors, text = BAD[case]
    with pytest.raises(CheckpointError, match="cannot be kept apart") as caught:
        lora_files.check(_peft(tmp_path / "adapter", tensors, **settings))
    assert text in caught.value.why
    assert "checkpoint.adapter" in caught.value.fix


def test_settings_that_tell_of_the_training_are_no_obstacle(tmp_path: Path) -> None:
    told = {
        "lora_dropout": 0.1,
        "use_rslora": True,
        "eva_config": {"rho": 2},
        "init_lora_weights": "eva",
        "use_dora": False,
    }
    lora_files.check(_peft(tmp_path / "adapter", **told))


@pytest.mark.parametrize(
    ("named", "told"),
    [("Qwen/Qwen2.5", "Qwen/Qwen2.5"), ("/home/me/secret/base", "base"), (r"C:\me\base", "base"), (None, "")],
)
def test_a_path_of_the_training_machine_is_not_told(named: str | None, told: str, tmp_path: Path) -> None:
    assert lora_files.trained_on(_peft(tmp_path / "adapter", base_model_name_or_path=named)) == told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("of a wider base", "has shape"),
        ("of a deeper base", "such as base_model.model.model.layers.2"),
        ("of a shallower base", "is missing"),
        ("without effect", "changes nothing"),
        ("not a number", "no numbers"),
        ("too large", "too large for float16"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    kind: str, text: str, saved: dict[str, Path], made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from pipeline.lora import convert as lora

    package, folder = made["float"][1], tmp_path / "adapter"
    shutil.copytree(saved["first"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    if kind == "of a wider base":
        tensors = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in tensors.items()}
    elif kind == "of a deeper base":
        tensors |= {name.replace("layers.1", "layers.2"): value.clone() for name, value in tensors.items()}
    elif kind == "of a shallower base":
        tensors = {name: value for name, value in tensors.items() if "layers.1" not in name}
    else:
        factor = {"without effect": 0.0, "not a number": float("nan"), "too large": 1e6}[kind]
        tensors = {name: value * factor if "lora_B" in name else value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    known = adapter_files.slots(package)
    if kind == "too large":
        known = {name: replace(slot, dtype="float16") for name, slot in known.items()}
    with pytest.raises(CheckpointError, match=text):
        lora.convert(folder, package, known, tmp_path / "x.onnx_adapter", "x", BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- Files of adapters are held against the graph before the runtime sees them.


@pytest.fixture
def package(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(made["float"][1], tmp_path / "package"))


def _redescribe(file: Path, **changes: Any) -> None:
    described = replace(adapter_files.read_description(file), **changes)
    file.with_name(f"{file.name}.json").write_text(adapter_files.description(described))


def _swap(package: Path) -> None:
    shutil.copyfile(_file(package, "second"), _file(package, "first"))


CHANGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another file": (_swap, "is not the file that was converted"),
    "no file": (lambda p: _file(p, "first").unlink(), "is not the file that was converted"),
    "no description": (lambda p: _file(p, "first").with_name("first.onnx_adapter.json").unlink(), "nothing is said"),
    "a description that is no JSON": (
        lambda p: _file(p, "first").with_name("first.onnx_adapter.json").write_text("{"),
        "cannot be read",
    ),
    "another checkpoint": (lambda p: _redescribe(_file(p, "first"), base="c" * 64), "package of another checkpoint"),
    "another slot": (lambda p: _redescribe(_file(p, "first"), ranks={"model.x": 4}), "has no slot model.x"),
    "a name for terminals": (lambda p: _redescribe(_file(p, "first"), ranks={"\x1b[2J": 4}), "is no line of text"),
    "no rank": (lambda p: _redescribe(_file(p, "first"), ranks={"model.x": 0}), "no positive number"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGED)
def test_a_file_that_is_not_what_is_said_of_it_is_refused(case: str, package: Path) -> None:
    adapter_files.check(_file(package, "first"), package, BASE)
    change, text = CHANGED[case]
    change(package)
    with pytest.raises(PackageError) as caught:
        adapter_files.check(_file(package, "first"), package, BASE)
    assert text in str(caught.value)


TENSORS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another type": (lambda t: t.update({key: value.astype(np.float16) for key, value in t.items()}), "is float16"),
    "another shape": (
        lambda t: t.update({key: value[:1] for key, value in list(t.items())[:1]}),
        "not float32 [128, 2]",
    ),
    "one missing": (lambda t: t.pop(next(iter(t))), "is missing"),
    "one more": (lambda t: t.update(x=np.zeros((1, 1), np.float32)), "tensor x is not in its description"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_the_runtime_would_stumble_over_later_are_refused_now(case: str, package: Path) -> None:
    import onnxruntime

    from pipeline.lora import convert as lora

    file = _file(package, "first")
    held = onnxruntime.AdapterFormat.read_adapter(str(file))
    tensors = {name: value.numpy().copy() for name, value in sorted(held.get_parameters().items())}
    change, text = TENSORS[case]
    change(tensors)
    lora._write(tensors, file)
    opened = sessions.open_package(package, 1)
    with pytest.raises(PackageError, match="does not fit the package") as caught:
        adapters.activate(opened, file)
    assert text in caught.value.why
    file.write_bytes(b"junk" * 100)
    with pytest.raises(PackageError, match="is no adapter of ONNX Runtime"):
        adapters.activate(opened, file)


@pytest.mark.slow
def test_one_adapter_at_a_time_and_none_where_the_runtime_ignores_them(package: Path) -> None:
    opened = sessions.open_package(package, 1)
    first = adapters.activate(opened, _file(package, "first"))
    with pytest.raises(UsageError, match="has the adapter first already"):
        adapters.activate(first, _file(package, "second"))
    seeing = replace(opened, config={"model": {**opened.config["model"], "vision": {}}})
    with pytest.raises(UsageError, match="takes no adapters") as caught:
        adapters.activate(seeing, _file(package, "first"))
    assert "ignores adapters of such models without a word" in caught.value.why


@pytest.mark.slow
def test_a_model_with_eyes_gets_no_slots(
    made: dict[str, tuple[Path, Path]], saved: dict[str, Path], tmp_path: Path
) -> None:
    quantized = Path(shutil.copytree(made["float"][0], tmp_path / "quantized"))
    config = json.loads((quantized / "genai_config.json").read_bytes())
    config["model"]["vision"] = {"filename": "vision.onnx"}
    (quantized / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="takes no adapters"):
        _adapt(quantized, saved, tmp_path / "out")


@pytest.mark.parametrize("given", ["third", "third.onnx_adapter"])
def test_an_unknown_adapter_is_refused_with_the_known_ones(given: str, tmp_path: Path) -> None:
    for name in ("legal", "billing"):
        _file(tmp_path, name).touch()
    with pytest.raises(UsageError) as caught:
        adapters.find(tmp_path, given)
    if given == "third":
        assert "billing, legal" in caught.value.why
    assert adapters.find(tmp_path, "legal") == _file(tmp_path, "legal")


def test_two_adapters_on_the_command_line_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "nowhere", "--prompt", "x", "--adapter", "a", "--adapter", "b"]) == 2
    assert "a mixture" in capsys.readouterr().err


# --- Plans.

_RECIPE: dict[str, Any] = {
    "target": "cpu",
    "checkpoint": {
        "sources": [{"type": "hub", "repo": "a/b", "revision": "0" * 40}],
        "license": "Apache-2.0",
        "base_model": "b",
    },
    "quantize": {"algorithm": "min_error", "body": {"bits": 4, "block_size": 32, "symmetric": False}},
    "validate": {"gates": {"mean_kl": 0.1, "top1": 0.8, "perplexity_ratio": 1.1}},
}


def _steps(folder: Path, **more: Any) -> dict[str, Step]:
    path = folder / "m" / "cpu.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**_RECIPE, **more}))
    return {step.stage: step for step in plan.make(recipe.load(path))}


def test_another_adapter_repeats_what_comes_after_quantization(tmp_path: Path) -> None:
    _peft(tmp_path / "m" / "a")
    plain = _steps(tmp_path)
    assert "adapters" not in plain
    one = _steps(tmp_path, adapters={"a": {"path": "a"}})
    assert list(one) == ["checkpoint", "export", "quantize", "adapters", "validate", "package"]
    assert {key: step.key for key, step in one.items() if key in ("checkpoint", "export", "quantize")} == {
        key: plain[key].key for key in ("checkpoint", "export", "quantize")
    }
    (tmp_path / "m" / "a" / "README.md").write_text("words")
    (tmp_path / "m" / "a" / "optimizer.pt").write_text("x")
    assert _steps(tmp_path, adapters={"a": {"path": "a"}})["package"].key == one["package"].key
    _peft(tmp_path / "m" / "a", r=3)
    other = _steps(tmp_path, adapters={"a": {"path": "a"}})
    assert [name for name in one if one[name].key != other[name].key] == ["adapters", "validate", "package"]
    assert "adapters" in _steps(tmp_path, adapters={})


def test_the_place_of_an_adapter_is_not_published(tmp_path: Path) -> None:
    folder = _peft(tmp_path / "elsewhere" / "legal")
    fields = _steps(tmp_path, adapters={"legal": {"path": str(folder)}})["package"].fields
    assert fields["recipe"]["adapters"] == {"legal": {"path": "legal"}}
    assert str(tmp_path) not in json.dumps(fields)


def test_an_adapter_that_cannot_be_kept_apart_or_is_missing_is_refused_by_the_plan(tmp_path: Path) -> None:
    _peft(tmp_path / "m" / "a", use_dora=True)
    with pytest.raises(CheckpointError, match="cannot be kept apart"):
        _steps(tmp_path, adapters={"a": {"path": "a"}})
    with pytest.raises(CheckpointError, match="there is no adapter at"):
        _steps(tmp_path, adapters={"a": {"path": "gone"}})


@pytest.mark.slow
def test_an_adapter_that_changes_between_plan_and_build_is_refused(
    made: dict[str, tuple[Path, Path]], saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lora_files.identity
    monkeypatch.setattr(lora_files, "identity", lambda path: real(path) if "peft" in str(path) else "0")
    folder = Path(shutil.copytree(saved["first"], tmp_path / "given"))
    with pytest.raises(CheckpointError, match="has changed since the build was planned"):
        _adapt(made["float"][0], {"first": folder}, tmp_path / "out")


# --- From a recipe to an answer.


@pytest.mark.slow
def test_a_package_with_two_adapters_is_built_verified_and_answers_with_each(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with a third one that comes later."""
    checkpoint, home = checkpoint_of("qwen2"), tmp_path / "tiny"
    for seed, (name, spec) in enumerate(ADAPTERS.items()):
        adapter_of(checkpoint, home / name, 0.05, seed, **spec)
    value = {
        **_RECIPE,
        "checkpoint": {**_RECIPE["checkpoint"], "sources": [{"type": "local", "path": str(checkpoint)}]},
        "export": {"exporter": "native"},
        "quantize": {"algorithm": "min_error", "body": {"bits": 4, "block_size": 16, "symmetric": False}},
        "adapters": {"first": {"path": "first"}, "second": {"path": "second", "license": "MIT"}},
        "validate": {
            "windows": 4,
            "window_tokens": 32,
            "greedy_tokens": 8,
            "gates": {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.6, "greedy": 0.4},
        },
    }
    (home / "cpu.yaml").write_text(yaml.safe_dump(value))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    def answer(*more: str) -> str:
        code, out, err = run("generate", str(package), "--prompt", "The quick", "--max-tokens", "12", "--json", *more)
        assert code == 0, err
        return "".join(json.loads(line)["text"] for line in out.splitlines())

    package = tmp_path / "out" / "tiny-cpu"
    code, _, err = run(
        "build", str(home / "cpu.yaml"), "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")
    )
    assert code == 0, err
    manifest = json.loads((package / "manifest.json").read_bytes())
    assert sorted(manifest["adapters"]) == ["first", "second"]
    assert manifest["adapters"]["second"]["license"] == "MIT"
    validation = json.loads((package / "validation.json").read_bytes())
    assert all(found["effect"] > 0.9 for found in validation["adapters"].values())
    assert "peft" not in {path.name for path in package.iterdir()}
    code, out, _ = run("verify", str(package), "--replay", "--json")
    replayed = json.loads(out)["replay"]["adapters"]
    assert code == 0
    assert {name: found["identical"] for name, found in replayed.items()} == {"first": 6, "second": 6}

    answers = {name: answer("--adapter", name) for name in ADAPTERS}
    golden = [json.loads(line) for line in (package / "golden.jsonl").read_text().splitlines()]
    assert {entry.get("adapter", "") for entry in golden} == {"", *ADAPTERS}
    assert len({answer(), *answers.values()}) > 1
    assert run("generate", str(package), "--prompt", "x", "--adapter", "third")[0] == 2

    late = str(tmp_path / "late.onnx_adapter")
    given = ("adapter", str(package), str(home / "first"), "--name", "late", "--out")
    code, out, err = run(*given, late)
    assert code == 0, err
    assert "Whether it was trained on this very checkpoint it cannot tell" in out
    assert (tmp_path / "late.onnx_adapter").read_bytes() == _file(package, "first").read_bytes()
    assert answer("--adapter", late) == answers["first"]
    assert run(*given, str(package / "late.onnx_adapter"))[0] == 2  # a package is sealed
    _redescribe(tmp_path / "late.onnx_adapter", base="0" * 64)
    assert run("generate", str(package), "--prompt", "x", "--adapter", late)[0] == 9

    shutil.copyfile(_file(package, "second"), _file(package, "first"))
    assert run("verify", str(package))[0] == 9
