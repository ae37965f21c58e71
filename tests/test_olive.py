"""Exports and quantizations of tiny Qwen checkpoints, by the installed Olive, run by the installed runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import olive
from pipeline.artifact import Artifact, Estimate, Progress, Step
from pipeline.checkpoint import reference
from pipeline.checkpoint.reference import Reference
from pipeline.errors import RecipeError, StageError
from pipeline.export import exporter
from pipeline.facts import texts
from pipeline.facts.scheme import Scheme
from pipeline.fidelity import metrics
from pipeline.graph import edits as graph
from pipeline.graph.external_data import read_tensor
from pipeline.quantization import graph_weights, quantizer
from pipeline.runtime import generate, session as sessions
from pipeline.runtime.session import Session

pytestmark = [
    pytest.mark.slow,
    # What the exporters say of themselves.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Exporting aten..index operator"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPT = "The quick brown fox jumps over the lazy dog, 你好 and def add(first):\n    return"


def quiet(part: float, what: str) -> None:
    assert 0 <= part <= 1
    assert what


def step(stage: str, fields: Mapping[str, Any]) -> Step:
    return Step(stage, "0" * 64, fields, (), {}, Estimate(0, 0, 0))


def artifact(stage: str, path: Path, facts: Mapping[str, Any] | None = None) -> Artifact:
    return Artifact(stage, "0" * 64, "0" * 64, path, {}, facts or {})


def run_export(
    checkpoint: Path, out_dir: Path, name: str, options: Mapping[str, Any] | None = None, rotate: bool = False
) -> Artifact:
    from pipeline.stages import export

    fields = {
        "exporter": name,
        "dtype": "float32",
        "rotate": rotate,
        "last_token_head": True,
        "draft_tokens": 15,
        "options": options or {},
        "provider": "CPUExecutionProvider",
    }
    out_dir.mkdir(exist_ok=True)
    result = export.run(step("export", fields), {"checkpoint": artifact("checkpoint", checkpoint)}, out_dir, quiet)
    return artifact("export", out_dir, {**result.facts, "from": checkpoint, "rotate": rotate})


def run_quantize(exported: Artifact, out_dir: Path, progress: Progress = quiet, **fields: Any) -> Artifact:
    from pipeline.stages import quantize

    scheme = Scheme.model_validate_json(json.dumps(fields))
    assert not scheme.problems()
    out_dir.mkdir(exist_ok=True)
    made_of = {"form": "nbits", "rotate": exported.facts.get("rotate", False)}
    given = step("quantize", {**scheme.model_dump(mode="json"), **made_of})
    inputs = {"export": exported, "checkpoint": artifact("checkpoint", exported.facts["from"])}
    return artifact("quantize", out_dir, quantize.run(given, inputs, out_dir, progress).facts)


Exports = Callable[..., Artifact]


@pytest.fixture(scope="session")
def exported(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """``(model_type, exporter, tied=False) -> artifact``, each made once."""

    @cache
    def made(model_type: str, name: str, tied: bool = False) -> Artifact:
        return run_export(checkpoint_of(model_type, tied), tmp_path_factory.mktemp("export"), name)

    return made


@pytest.fixture(scope="session")
def torch_model(checkpoint_of: Callable[..., Path]) -> Callable[..., Reference]:
    return cache(lambda model_type, tied=False: reference.load(checkpoint_of(model_type, tied)))


def divergence(model: Reference, session: Session) -> tuple[float, float]:
    """Mean KL divergence in nats and top-1 agreement over a text, token by token."""
    ids = model.tokenizer(PROMPT)["input_ids"]
    wanted = metrics.log_softmax(model.logits(ids))
    found = metrics.log_softmax(generate.decode_logits(session, ids))
    return (
        float(metrics.kl_divergence(wanted, found).mean()),
        float(metrics.top1_agreement(wanted, found).mean()),
    )


def scheme(bits: int, block_size: int = 32, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "block_size": block_size, "symmetric": symmetric}


CASES = [
    (model_type, name, tied)
    for model_type in ("qwen2", "qwen3")
    for name in ("genai", "optimum")
    for tied in (False, True)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unquantized_export_is_the_checkpoint(
    case: tuple[str, str, bool], exported: Exports, torch_model: Any, tmp_path: Path
) -> None:
    model_type, _, tied = case
    source = exported(*case)
    made = run_quantize(source, tmp_path / "out", algorithm="none")
    model, session = torch_model(model_type, tied), sessions.open_package(made.path)
    kl, agreement = divergence(model, session)
    assert kl < 1e-5
    assert agreement == 1.0

    prompt = model.tokenizer("In the morning")["input_ids"]
    wanted, _ = model.greedy(prompt, 64)
    assert len(set(wanted)) > 5
    assert list(generate.stream(session, prompt, 64)) == wanted
    assert sorted(session.eos) == sorted(model.eos)
    assert session.context_length == 512

    ids = model.tokenizer(PROMPT)["input_ids"]
    prefill = generate.prefill_logits(session, ids)
    assert prefill.shape == (1, session.vocabulary)  # the head saw the last token only
    np.testing.assert_allclose(prefill[0], model.logits(ids)[-1], atol=1e-2)


ALGORITHMS: dict[str, tuple[dict[str, Any], dict[str, int], float]] = {
    # name: recipe, how often some operators occur (in relation to the projections and the head), bound of the mean KL
    "min_error int4, shared int8 head": (
        {"algorithm": "min_error", "body": scheme(4), "head": scheme(8), "embedding": "shared"},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.6,
    ),
    "gptq int4, shared int8 head": (
        {"algorithm": "gptq", "body": scheme(4), "head": scheme(8), "embedding": "shared"},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.6,
    ),
    "min_error int8": (
        {"algorithm": "min_error", "body": scheme(8), "embedding": scheme(8)},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.01,
    ),
    "min_error int8 asymmetric": (
        {"algorithm": "min_error", "body": scheme(8, 16, False), "embedding": scheme(8, 16, False)},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.01,
    ),
    "rtn int8, float embedding": (
        {"algorithm": "rtn", "body": scheme(8), "head": scheme(8, 16, False)},
        {"MatMulNBits": 1, "GatherBlockQuantized": 0},
        0.01,
    ),
    "rtn int8 everywhere": (
        {"algorithm": "rtn", "body": scheme(8), "embedding": scheme(8, 16)},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.01,
    ),
    "rtn int8, shared": (
        {"algorithm": "rtn", "body": scheme(8), "embedding": "shared"},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.01,
    ),
    "k_quant int8, shared": (
        {"algorithm": "k_quant", "body": scheme(8, 32, False), "head": scheme(8, 16, False), "embedding": "shared"},
        {"MatMulNBits": 1, "GatherBlockQuantized": 1},
        0.01,
    ),
    "dynamic": (
        {"algorithm": "dynamic", "options": {"reduce_range": True, "per_channel": True}},
        {"MatMulNBits": 0, "GatherBlockQuantized": 0},
        0.01,
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("case", [("qwen2", "genai"), ("qwen3", "optimum")], ids=str)
def test_each_algorithm_keeps_the_interface_and_the_answers(
    name: str, case: tuple[str, str], exported: Exports, torch_model: Any, tmp_path: Path
) -> None:
    fields, operators, bound = ALGORITHMS[name]
    tied = fields.get("embedding") == "shared"  # else the embedding would take on the values of another matrix
    source = exported(*case, tied)
    made = run_quantize(source, tmp_path / "out", **fields)
    before, after = (graph.load(folder / "model.onnx") for folder in (source.path, made.path))
    assert graph.interface(after) == graph.interface(before)
    constant = [weight for weight in graph.weights(before) if weight.role != "embedding"]
    counts = graph.operators(after)
    assert counts.get("MatMulNBits", 0) == operators["MatMulNBits"] * len(constant)
    assert counts.get("GatherBlockQuantized", 0) == operators["GatherBlockQuantized"]
    assert made.facts["operators"] == counts
    assert made.facts["bits_per_weight"] < 32
    kl, _ = divergence(torch_model(case[0], tied), sessions.open_package(made.path))
    assert kl < bound
    names = {path.name for path in made.path.iterdir()}
    assert names == {path.name for path in source.path.iterdir()}  # no scratch left, nothing lost
    for other in ("genai_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (made.path / other).read_bytes() == (source.path / other).read_bytes()


@pytest.mark.parametrize("algorithm", ["min_error", "rtn"])
def test_two_matrices_are_not_stored_as_one(algorithm: str, exported: Exports, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="head and embedding are two matrices") as refused:
        run_quantize(
            exported("qwen2", "genai"), tmp_path / "out", algorithm=algorithm, body=scheme(8), embedding="shared"
        )
    assert "give the embedding a scheme of its own" in refused.value.fix
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("algorithm", ["min_error", "gptq"])
@pytest.mark.parametrize("name", ["genai", "optimum"])
def test_4_bits_leave_the_norms_of_queries_and_keys_and_their_wide_heads_alone(
    name: str, algorithm: str, exported: Exports, torch_model: Any, tmp_path: Path
) -> None:
    """A qwen3's heads are wider than hidden size / heads, and each is normalized on its own."""
    settings = json.loads((exported("qwen3", name).facts["from"] / "config.json").read_bytes())
    heads, width = settings["num_attention_heads"], settings["head_dim"]
    assert heads * width != settings["hidden_size"]
    source = exported("qwen3", name)
    fields = {"body": scheme(4, 32, False), "head": scheme(8), "embedding": scheme(8)}
    made = run_quantize(source, tmp_path / "out", algorithm=algorithm, **fields)
    before, after = (
        {tensor.name: tensor for tensor in graph.load(folder / "model.onnx").graph.initializer}
        for folder in (source.path, made.path)
    )
    norms = [key for key, tensor in before.items() if list(tensor.dims) == [width] and "norm" in key]
    assert len(norms) == 2 * settings["num_hidden_layers"]
    for key in norms:
        np.testing.assert_array_equal(read_tensor(before[key], source.path), read_tensor(after[key], made.path))
    kl, agreement = divergence(torch_model("qwen3"), sessions.open_package(made.path))
    assert kl < 0.3
    assert agreement > 0.8


def test_the_same_quantization_twice_writes_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    source = exported("qwen2", "genai", True)
    fields = ALGORITHMS["min_error int4, shared int8 head"][0]
    first, second = (run_quantize(source, tmp_path / name, **fields).path for name in ("a", "b"))
    for name in ("model.onnx", "model.onnx.data"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("algorithm", ["min_error", "rtn", "k_quant"])
def test_overrides_exclusions_and_the_head_have_what_the_recipe_says(
    algorithm: str, exported: Exports, tmp_path: Path
) -> None:
    source = exported("qwen2", "genai")
    made = run_quantize(
        source,
        tmp_path / "out",
        algorithm=algorithm,
        body=scheme(4, 32, False),
        head=scheme(8, 64, False),
        overrides=[{"match": "*.down_proj", "scheme": scheme(8, 16, False)}],
        exclude=["model.layers.1.*"],
        accuracy_level=1,
    )
    after = graph.load(made.path / "model.onnx")
    found = {path: (given.bits, given.block_size) for path, given in graph_weights.quantized_schemes(after).items()}
    assert found.pop("lm_head") == (8, 64)
    assert found.pop("model.layers.0.mlp.down_proj") == (8, 16)
    assert set(found.values()) == {(4, 32)}
    assert all(path.startswith("model.layers.0.") for path in found)
    levels = {
        attribute.i for node in after.graph.node for attribute in node.attribute if attribute.name == "accuracy_level"
    }
    assert levels == {1}
    before = graph.load(source.path / "model.onnx")
    embedding = [
        read_tensor(next(t for t in model.graph.initializer if t.name == "model.embed_tokens.weight"), folder)
        for model, folder in ((before, source.path), (after, made.path))
    ]
    np.testing.assert_array_equal(embedding[0], embedding[1])


def test_progress_of_our_own_pass_names_the_weights(exported: Exports, tmp_path: Path) -> None:
    seen: list[str] = []
    made = run_quantize(
        exported("qwen2", "genai"),
        tmp_path / "out",
        lambda _, what: seen.append(what),
        algorithm="min_error",
        body=scheme(4),
    )
    assert "model.layers.1.mlp.down_proj" in seen
    assert 0 < made.facts["relative_error"] < 0.02


@pytest.mark.parametrize("name", ["dynamic", "gptq int4, shared int8 head"])
def test_every_position_can_be_measured_whatever_became_of_the_head(
    name: str, exported: Exports, torch_model: Any, tmp_path: Path
) -> None:
    from pipeline.fidelity import text_agreement

    fields = ALGORITHMS[name][0]
    tied = fields.get("embedding") == "shared"
    made = run_quantize(exported("qwen2", "genai", tied), tmp_path / "out", **fields)
    twin = sessions.open_package(text_agreement.whole_prompt_twin(made.path, tmp_path / "twin"))
    ids = torch_model("qwen2", tied).tokenizer(PROMPT)["input_ids"]
    found = generate.prefill_logits(twin, ids)
    assert len(found) == len(ids)
    last = generate.prefill_logits(sessions.open_package(made.path), ids)
    # The dynamic pass rounds all tokens that the head sees on one scale, so that seeing fewer changes it a little.
    np.testing.assert_allclose(last[-1], found[-1], rtol=0, atol=0.5 if name == "dynamic" else 1e-4)


@pytest.mark.parametrize("case", [("qwen2", "genai"), ("qwen3", "optimum")], ids=str)
def test_gptq_is_nearer_to_the_reference_than_rounding_and_makes_the_same_bytes_again(
    case: tuple[str, str], exported: Exports, torch_model: Any, tmp_path: Path
) -> None:
    from pipeline.fidelity import text_agreement

    model = torch_model(case[0])
    ids = model.tokenizer(texts.EVALUATION.read()["english"], verbose=False)["input_ids"][:400]
    wanted = metrics.log_softmax(model.logits(ids))
    kl = {}
    for algorithm in ("min_error", "gptq"):
        made = run_quantize(exported(*case), tmp_path / algorithm, algorithm=algorithm, body=scheme(4))
        twin = sessions.open_package(text_agreement.whole_prompt_twin(made.path, tmp_path / f"{algorithm}-twin"))
        found = metrics.log_softmax(generate.prefill_logits(twin, ids))
        kl[algorithm] = float(metrics.kl_divergence(wanted, found).mean())
    assert kl["gptq"] < 0.85 * kl["min_error"]
    again = run_quantize(exported(*case), tmp_path / "again", algorithm="gptq", body=scheme(4))
    for name in ("model.onnx", "model.onnx.data"):
        assert (again.path / name).read_bytes() == (tmp_path / "gptq" / name).read_bytes()


REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "misspelt": ("dynamic", {"reduce_rang": True}, ["unknown option `reduce_rang`; did you mean `reduce_range`?"]),
    "several": (
        "genai",
        {"include_hidden_state": True, "precision": "int4", "int4_block_size": 32},
        [
            "unknown option `include_hidden_state`; did you mean `include_hidden_states`?",
            "`precision` follows from other keys of the recipe",
            "`int4_block_size` has no effect here",
        ],
    ),
    "below the builder": (
        "genai",
        {"extra_options": {"disable_qkv_fusoin": True, "prune_lm_head": True, "shared_embeddings": True}},
        [
            "unknown option `extra_options.disable_qkv_fusoin`; did you mean `extra_options.disable_qkv_fusion`?",
            "`extra_options.prune_lm_head` follows from other keys",
            "`extra_options.shared_embeddings` has no effect here",
        ],
    ),
    "code of the checkpoint": (
        "optimum",
        {"extra_args": {"trust_remote_code": True}},
        ["`extra_args.trust_remote_code`"],
    ),
    "code of the recipe": ("optimum", {"user_script": "evil.py"}, ["`user_script` follows from"]),
    "below optimum": (
        "optimum",
        {"extra_args": {"do_constant_foldin": True}},
        ["did you mean `extra_args.do_constant_folding`?"],
    ),
    "below the dynamic pass": (
        "dynamic",
        {"extra_options": {"MatMulConstBonly": True}},
        ["did you mean `extra_options.MatMulConstBOnly`?"],
    ),
    "ignored by Olive": ("rtn", {"axis": 1}, ["`axis` has no effect here"]),
    "ill-typed": ("dynamic", {"per_channel": [1]}, ["per_channel"]),
    "nested and ill-typed": ("genai", {"extra_options": "prune_lm_head=true"}, ["extra_options"]),
    "ours": ("min_error", {"scheme": {}}, ["unknown option `scheme`"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_would_be_ignored_are_refused_with_the_nearest_name(case: str) -> None:
    name, options, rows = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        olive.check_options(name, options, "recipe.yaml: quantize.options")
    for row in rows:
        assert row in caught.value.what
    assert len(caught.value.what.splitlines()) == 1 + len(rows)
    assert caught.value.where == "recipe.yaml: quantize.options"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("genai", {"extra_options": {"disable_qkv_fusion": True}}),
        ("optimum", {"target_opset": 17, "extra_args": {"do_constant_folding": False}}),
        ("dynamic", {"reduce_range": True, "extra_options": {"MatMulConstBOnly": True}}),
        ("rtn", {}),
    ],
)
def test_options_that_are_read_are_accepted(name: str, options: dict[str, Any]) -> None:
    olive.check_options(name, options, "here")


@pytest.mark.parametrize("name", olive.PASSES)
def test_the_table_of_passes_names_options_that_the_installed_code_has(name: str) -> None:
    """An option that is gone from the table's library was renamed: what it was refused for may have a new name."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    wanted = olive.PASSES[name]
    known = set(olive.pass_class(name)._default_config(DEFAULT_CPU_ACCELERATOR))
    if wanted.nested:
        assert wanted.nested.option in known
        known |= wanted.nested.known()
    assert set(wanted.ours) | set(wanted.idle) <= known


def test_an_option_of_a_recipe_reaches_the_exporter(
    checkpoint_of: Callable[..., Path], exported: Exports, tmp_path: Path
) -> None:
    unfused = run_export(
        checkpoint_of("qwen2"), tmp_path / "out", "genai", {"extra_options": {"disable_qkv_fusion": True}}
    )
    fused, apart = (
        {weight.path.rpartition(".")[2] for weight in graph.weights(graph.load(made.path / "model.onnx"))}
        for made in (exported("qwen2", "genai"), unfused)
    )
    assert "qkv_proj" in fused
    assert "qkv_proj" not in apart
    assert {"q_proj", "k_proj", "v_proj"} <= apart


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_exists(exported: Exports, tmp_path: Path) -> None:
    for fields in ({"exclude": ["*.dwn_proj"]}, {"overrides": [{"match": "*.dwn_proj", "scheme": scheme(8)}]}):
        with pytest.raises(RecipeError, match=r"no weight matches `\*\.dwn_proj`") as caught:
            run_quantize(exported("qwen2", "genai"), tmp_path / "out", algorithm="min_error", body=scheme(4), **fields)
        assert "down_proj" in caught.value.fix


def test_a_pass_that_fails_raises(exported: Exports, tmp_path: Path) -> None:
    model = olive.onnx_model(exported("qwen2", "genai").path)
    with pytest.raises(StageError, match="OnnxBlockWiseRtnQuantization failed") as caught:
        olive.run_pass("rtn", {"bits": 4, "block_size": 0, "nodes_to_include": ["/lm_head/MatMul"]}, model, tmp_path)
    assert "block_size=0" in caught.value.where
    assert "Error" in caught.value.why


def test_a_pass_that_does_not_do_what_was_asked_is_found_out(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Olive ignores a node name: here the names that it is given are wrong."""
    real = quantizer._pass_configs

    def forgetful(given: Scheme, wanted: Any, node_of: Mapping[str, str]) -> list[dict[str, Any]]:
        return real(given, wanted, {path: f"{node}x" if "down" in path else node for path, node in node_of.items()})

    monkeypatch.setattr(quantizer, "_pass_configs", forgetful)
    with pytest.raises(StageError, match="2 weights were not quantized as the scheme says") as caught:
        run_quantize(exported("qwen2", "genai"), tmp_path / "out", algorithm="rtn", body=scheme(4))
    assert "model.layers.0.mlp.down_proj is float, not 4-bit/32" in caught.value.why


def test_the_head_size_of_a_qwen3_that_does_not_state_it_is_what_transformers_takes(
    checkpoint_of: Callable[..., Path],
) -> None:
    settings = json.loads((checkpoint_of("qwen3") / "config.json").read_bytes())
    settings["head_dim"] = None
    made = exporter._genai_config(settings, {"eos_token_id": None}, ("input_ids",))
    assert made["model"]["decoder"]["head_size"] == 128
    assert made["model"]["eos_token_id"] == settings["eos_token_id"]
    assert made["model"]["decoder"]["inputs"]["input_ids"] == "input_ids"
    assert "position_ids" not in made["model"]["decoder"]["inputs"]


def test_no_telemetry_is_started(exported: Exports) -> None:
    from olive.telemetry.telemetry import Telemetry

    exported("qwen2", "genai")
    assert Telemetry._instance is None
