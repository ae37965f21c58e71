"""Packages that embed texts or rank documents: what they compute is PyTorch's, however texts are padded."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gpu import run

from pipeline import cli
from pipeline.artifact import GOLDEN, MANIFEST, VALIDATION, Artifact
from pipeline.builds import plan
from pipeline.checkpoint import headless
from pipeline.errors import CheckpointError, PackageError, UsageError
from pipeline.facts import recipe, texts
from pipeline.fidelity import retrieval_agreement
from pipeline.graph import edits as graph
from pipeline.package import config as package_config, retrieval_config, retrieval_replay, verify
from pipeline.runtime import golden, retrieval
from pipeline.runtime.retrieval import Retriever
from pipeline.task import TASKS

pytestmark = [
    # What the exporter says of itself.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BODY = {"bits": 8, "block_size": 32, "symmetric": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "float": {"algorithm": "none"},
    "int8": {"algorithm": "min_error", "body": BODY, "embedding": BODY},
    "int4": {"algorithm": "gptq", "body": {**BODY, "bits": 4, "symmetric": False}, "embedding": BODY},
}
# Scores of a tiny random model are all over [0, 1], and change much with a little.
GATES: dict[tuple[str, str], dict[str, float]] = {
    ("embed", "float"): {"cosine": 0.99999, "min_cosine": 0.9999, "ranking": 0.99},
    ("embed", "int8"): {"cosine": 0.999, "min_cosine": 0.998, "ranking": 0.9},
    ("embed", "int4"): {"cosine": 0.95, "min_cosine": 0.8, "ranking": 0.7},
    ("rerank", "float"): {"score_error": 0.001, "ranking": 0.99},
    ("rerank", "int8"): {"score_error": 0.1, "ranking": 0.9},
    ("rerank", "int4"): {"score_error": 0.6, "ranking": 0.6},
}
GENERATION = {"mean_kl": 1.0, "top1": 0.1, "perplexity_ratio": 9.0}


def write_recipe(folder: Path, checkpoint: Path, task: str, scheme: str, **sections: Any) -> Path:
    value = {
        "task": task,
        "target": "cpu",
        "checkpoint": {
            "sources": [{"type": "local", "path": str(checkpoint)}],
            "license": "Apache-2.0",
            "base_model": "tiny",
        },
        "quantize": SCHEMES[scheme],
        "validate": {"windows": 2, "window_tokens": 32, "gates": GATES.get((task, scheme), GENERATION)},
        **sections,
    }
    path = folder / "tiny" / f"{task}-{scheme}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")  # JSON is YAML
    return path


def problems(tmp_path: Path, task: str = "embed", scheme: str = "int8", **sections: Any) -> str:
    """What is said of a recipe that is refused."""
    with pytest.raises(recipe.strict_yaml.RecipeError) as caught:
        recipe.load(write_recipe(tmp_path, tmp_path, task, scheme, **sections))
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"validate": {"gates": {"mean_kl": 0.1}}}, "missing key `validate.gates.cosine`"),
        ({"validate": {"gates": {"cosine": 0.9, "top1": 0.9}}}, "`top1` is no gate of task embed; those are cosine"),
        ({"target": "cuda"}, "made for target cpu only"),
        ({"export": {"exporter": "optimum"}}, "made from the genai exporter's"),
        ({"export": {"rotate": True}}, "vectors would be turned too"),
        ({"export": {"draft_tokens": 3}}, "drafts are for generation"),
        ({"quantize": {**SCHEMES["int8"], "head": BODY}}, "no head to quantize"),
        ({"quantize": {**SCHEMES["int8"], "embedding": "shared"}}, "no head to share with"),
        ({"quantize": {"algorithm": "rtn", "body": BODY}}, "task embed takes gptq, min_error, none, not rtn"),
        ({"task": "embedding"}, "`task`: should be 'generate', 'embed' or 'rerank', got 'embedding'"),
    ],
)
def test_what_a_task_has_no_use_for_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    assert said in problems(tmp_path, **sections)


def test_generation_has_no_gates_of_other_tasks(tmp_path: Path) -> None:
    said = problems(tmp_path, task="generate", validate={"gates": GENERATION | {"cosine": 0.9}})
    assert "`cosine` is no gate of task generate; those are mean_kl, top1, perplexity_ratio" in said


def test_shards_without_a_head_are_named_in_full_and_keep_their_bytes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shards = {
        "a.safetensors": {"embed_tokens.weight": np.ones((3, 2), np.float32), "norm.weight": np.zeros(2, np.float32)},
        "b.safetensors": {"layers.0.mlp.up_proj.weight": np.arange(6, dtype=np.float32)},
    }
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "qwen3", "architectures": ["Qwen3Model"], "tie_word_embeddings": False, "hidden_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for _ in range(2):  # what is complete stays so
        headless.complete(tmp_path)
        for name, tensors in shards.items():
            found = load_file(tmp_path / name)
            assert {f"model.{tensor}" for tensor in tensors} == set(found)
            for tensor, values in tensors.items():
                np.testing.assert_array_equal(found[f"model.{tensor}"], values)
        written = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())["weight_map"]
        assert written == {f"model.{tensor}": name for tensor, name in index["weight_map"].items()}
        settings = json.loads((tmp_path / "config.json").read_bytes())
        assert settings == config | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    assert {path.name for path in tmp_path.iterdir()} == {*shards, "config.json", "model.safetensors.index.json"}


def test_an_order_agrees_pair_by_pair() -> None:
    wanted = np.array([[1.0, 2.0, 3.0]])
    assert retrieval_agreement.concordance(wanted, wanted * 5) == 1.0
    assert retrieval_agreement.concordance(wanted, -wanted) == 0.0
    assert retrieval_agreement.concordance(wanted, np.array([[2.0, 1.0, 3.0]])) == pytest.approx(2 / 3)


def test_scores_are_the_probability_of_yes_without_overflow() -> None:
    logits = np.array([[0.0, 0.0], [1.0, 3.0], [900.0, -900.0], [-900.0, 900.0]], np.float32)
    np.testing.assert_allclose(retrieval_replay.scores(logits), [0.5, 1 / (1 + np.exp(-2)), 0, 1], atol=1e-12)


class Letters:
    """A tokenizer whose ids are code points; there are no control tokens."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        assert not special  # what users type is text
        return list(map(ord, text))


CONFIG: dict[str, Any] = {
    "task": "rerank",
    "filename": "model.onnx",
    "output": "logits",
    "context_length": 30,
    "dimensions": 2,
    "labels": {"no": 1, "yes": 2},
    "before": [1, 2],
    "after": [3],
    "forms": dict(TASKS["rerank"].forms),
    "instruction": "judge",
}


def encode(truncate: bool = False, **given: str) -> list[int]:
    tokenizer: Any = Letters()
    return retrieval.encode(tokenizer, CONFIG | {"forms": {"pair": "{query}|{document}"}}, "pair", truncate, given)


def test_texts_stand_in_their_form_whatever_they_say() -> None:
    assert encode(query="{document}", document="{query}") == [1, 2, *map(ord, "{document}|{query}"), 3]
    given = {"query": "q", "document": "d"}
    whole = "".join(map(chr, retrieval.encode(Letters(), CONFIG | {"context_length": 99}, "pair", False, given)[2:-1]))  # type: ignore[arg-type]
    assert whole == "<Instruct>: judge\n<Query>: q\n<Document>: d"


def test_a_text_that_is_too_long_is_refused_or_cut_at_its_end() -> None:
    with pytest.raises(UsageError, match="has 42 tokens; the model takes 27"):
        encode(query="q", document="d" * 40)
    assert encode(truncate=True, query="q", document="d" * 40) == [1, 2, *map(ord, "q|" + "d" * 25), 3]
    with pytest.raises(UsageError, match="the document is empty"):
        encode(query="q", document=" ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filename": "../model.onnx"}, "no graph of the package"),
        ({"filename": "model.so"}, "no graph of the package"),
        ({"custom_ops_library": "x.so"}, "unknown key `custom_ops_library`"),
        ({"before": [1, -2]}, "`before` is no list of token ids"),
        ({"labels": {"no": "1", "yes": 2}}, "`labels` does not map to token ids"),
        ({"labels": {"yes": 2, "no": 1}}, "`labels` are not those of task rerank: no, yes"),
        ({"forms": {"pair": 1}}, "`forms` does not map pair to texts"),
        ({"forms": {"query": "{query}"}}, "`forms` does not map pair to texts"),
        ({"forms": {"pair": "{query}{secret}"}}, "names {secret}, which nobody gives"),
        ({"task": "generate"}, "`task` is 'generate'"),
        ({"dimensions": 0}, "too small"),
        ({"context_length": True}, "`context_length` has the wrong type"),
        ({"output": None}, "`output` has the wrong type"),
    ],
)
def test_a_configuration_that_is_not_trusted_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert retrieval_config.CONFIG == retrieval_replay.CONFIG
    (tmp_path / retrieval_replay.CONFIG).write_text(json.dumps(CONFIG))
    assert retrieval_config.read_config(tmp_path) == CONFIG
    (tmp_path / retrieval_replay.CONFIG).write_text(json.dumps(CONFIG | change))
    with pytest.raises(PackageError, match=re.escape(said)):
        retrieval_config.read_config(tmp_path)


GOOD = {"name": "a", "ids": [1, 2], "values": [0.5, 1]}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        *map(json.dumps, (GOOD | {"ids": []}, GOOD | {"ids": [-1]}, GOOD | {"values": [1]}, {"ids": [1]})),
    ],
)
def test_what_is_no_golden_result_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / GOLDEN
    path.write_text(json.dumps(GOOD) + "\n")
    assert retrieval_replay.read(path, 2) == [GOOD]
    path.write_text(line + "\n")
    with pytest.raises((ValueError, LookupError, TypeError)):
        retrieval_replay.read(path, 2)


def test_a_verdict_names_what_is_out_of_tolerance() -> None:
    assert retrieval_replay.verdict({"cosine": 0.99}, {"cosine": 0.99}) == ""
    assert "cosine 0.9800" in retrieval_replay.verdict({"cosine": 0.98}, {"cosine": 0.99})
    assert retrieval_replay.verdict({"score": 0.05}, {"score": 0.05}) == ""
    assert "differs by inf" in retrieval_replay.verdict({"score": float("inf")}, {"score": 0.05})


@pytest.fixture(scope="module")
def checkpoints(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny decoder without a head, as the class without one writes it; and one that answers yes to some pairs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {"embed": tmp_path_factory.mktemp("embed") / "c", "rerank": tmp_path_factory.mktemp("rerank") / "c"}
    for folder, tied in zip(found.values(), (True, False), strict=True):
        shutil.copytree(checkpoint_of("qwen3", tied), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3", True), dtype=torch.float32)
    whole.base_model.save_pretrained(found["embed"])
    assert json.loads((found["embed"] / "config.json").read_bytes())["architectures"] == ["Qwen3Model"]
    (found["embed"] / "modules.json").write_text('[{"idx": 0, "name": "0"}]')  # as published, for another library

    # What all pairs have in common is taken from the difference between yes and no, or each would get the same answer.
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("qwen3", False), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of("qwen3", False))
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    with torch.inference_mode():
        rows = [tokenizer(pair(query, text))["input_ids"] for query in texts.QUERIES[:3] for text in texts.DOCUMENTS]
        hidden = torch.stack([model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
        common, head = hidden.mean(0), model.lm_head.weight
        difference = head[yes] - head[no]
        head[yes] = head[no] + difference - common * (difference @ common) / (common @ common)
    model.save_pretrained(found["rerank"])
    return found


def pair(query: str, document: str) -> str:
    """What the authors of Qwen3-Reranker publish, as one text."""
    asked = TASKS["rerank"]
    return f"{asked.before}<Instruct>: {asked.instruction}\n<Query>: {query}\n<Document>: {document}{asked.after}"


Packages = Callable[[str, str], dict[str, Artifact]]


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """``(task, scheme) -> artifacts by stage``, each made once, in this process; do not write into them."""

    @cache
    def made_once(task: str, scheme: str) -> dict[str, Artifact]:
        folder = tmp_path_factory.mktemp("retrieval")
        steps = plan.make(recipe.load(write_recipe(folder, checkpoints[task], task, scheme)))
        # Checkpoint and export are the same for all schemes.
        artifacts = {} if scheme == "float" else {k: v for k, v in made_once(task, "float").items() if k in SHARED}
        for step in steps[len(artifacts) :]:
            artifacts[step.stage] = run(step, artifacts, folder / step.stage)
        return artifacts

    return made_once


SHARED = ("checkpoint", "export")
slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_are_those_of_pytorch(task: str, scheme: str, made: Packages, checkpoints: dict[str, Path]) -> None:
    """Against transformers' own classes on the checkpoint as it came, with what the authors publish around texts."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    package = made(task, scheme)["package"].path
    opened = retrieval.open_package(package, 1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[task])
    given = texts.DOCUMENTS[:4]
    with torch.inference_mode():
        if task == "embed":
            model = AutoModel.from_pretrained(checkpoints[task], dtype=torch.float32)
            rows = [tokenizer(text + "<|endoftext|>")["input_ids"] for text in given]
            assert rows == [opened.ids("document", document=text) for text in given]
            hidden = (model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows)
            wanted = torch.stack([torch.nn.functional.normalize(vector, dim=0) for vector in hidden]).numpy()
            cosines = retrieval_replay.cosines(wanted, opened.embed(rows))
            assert cosines.min() > {"float": 0.99999, "int8": 0.999, "int4": 0.8}[scheme]
            return
        model = AutoModelForCausalLM.from_pretrained(checkpoints[task], dtype=torch.float32)
        no, yes = (tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes"))
        rows = [tokenizer(pair("what is it?", text))["input_ids"] for text in given]
        assert rows == [opened.ids("pair", query="what is it?", document=text) for text in given]
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1, [no, yes]] for row in rows])
        scores = torch.nn.functional.softmax(logits, dim=1)[:, 1].numpy()
    differences = np.abs(scores - np.array(opened.scores(rows)))
    assert differences.max() < {"float": 1e-4, "int8": 0.1, "int4": 0.6}[scheme]
    assert np.ptp(scores) > 0.01  # they say something


@slow
@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_padded_batch_is_its_texts_one_by_one(task: str, scheme: str, made: Packages) -> None:
    opened = retrieval.open_package(made(task, scheme)["package"].path, 1)
    rows = [[5, 17, 40], [9] * 11, [300, 2, 7, 80, 41, 6], [77]]
    alone = opened.run(rows)
    assert np.isfinite(alone).all()
    assert len({tuple(row) for row in alone.round(3)}) == len(rows)
    for left in (False, True):
        batch = retrieval_replay.run(opened.session, opened.config["output"], rows, left)
        np.testing.assert_allclose(batch, alone, atol=2e-3 if scheme == "float" else 0.05)
        if scheme == "float" and task == "embed":
            np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1, atol=1e-5)


@slow
def test_graphs_hold_what_they_need_and_no_more(made: Packages) -> None:
    for task, columns in (("embed", 64), ("rerank", 2)):
        model = graph.load(made(task, "float")["package"].path / "model.onnx")
        assert graph.interface(model) == (("input_ids", "attention_mask"), (TASKS[task].output,))
        (output,) = model.graph.output
        assert [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] == ["batch_size", columns]
        names = {tensor.name for tensor in model.graph.initializer}
        assert not any("lm_head" in name for name in names)
        assert {weight.role for weight in graph.weights(model)} == {"body", "embedding"}
    facts = made("embed", "int4")["quantize"].facts
    assert facts["operators"]["MatMulNBits"] == 2 * 5
    assert facts["operators"]["GatherBlockQuantized"] == 1


@slow
def test_a_validation_tells_each_text_and_a_miss_is_refused(
    made: Packages, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for task, count in (("embed", len(texts.QUERIES) + len(texts.DOCUMENTS) + 2), ("rerank", 48)):
        report = json.loads((made(task, "int8")["package"].path / VALIDATION).read_bytes())
        assert report["passed"]
        assert len(report["retrieval"]["rows"]) == report["retrieval"]["texts"] == count
        assert {gate["metric"] for gate in report["gates"]} >= {"finite", "ranking", "tokenizer_mismatches"}
    gates = {"validate": {"windows": 1, "window_tokens": 32, "gates": {"cosine": 0.9999999}}}
    steps = plan.make(recipe.load(write_recipe(tmp_path, checkpoints["embed"], "embed", "int4", **gates)))
    with pytest.raises(AssertionError) as caught:
        run(steps[3], made("embed", "int4"), tmp_path / "validate")
    assert "cosine is 0.9" in str(caught.value)
    assert "the gate is at least 1" in str(caught.value)


@slow
def test_a_headless_checkpoint_is_completed_and_generates_nothing(
    made: Packages, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    origin = load_file(checkpoints["embed"] / "model.safetensors")
    assert "embed_tokens.weight" in origin
    completed = made("embed", "float")["checkpoint"].path
    found = load_file(completed / "model.safetensors")
    assert {f"model.{name}" for name in origin} == set(found)
    assert all((found[f"model.{name}"] == value).all() for name, value in origin.items())
    assert json.loads((completed / "config.json").read_bytes())["architectures"] == ["Qwen3ForCausalLM"]
    assert not (completed / "modules.json").exists()
    path = write_recipe(tmp_path, checkpoints["embed"], "generate", "float")
    with pytest.raises(CheckpointError, match="set `task: embed`"):
        run(plan.make(recipe.load(path))[0], {}, tmp_path / "checkpoint")


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


@slow
def test_embed_gives_vectors_of_queries_and_texts(made: Packages) -> None:
    package = made("embed", "int8")["package"].path
    arguments = ["embed", str(package), "--query", "bees", "--text", texts.DOCUMENTS[0], "--text", "a<|im_end|>"]
    code, out, err = command(*arguments, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [next(iter(row)) for row in rows] == ["query", "document", "document"]
    opened = retrieval.open_package(package)
    wanted = opened.embed([opened.ids("query", query="bees"), opened.ids("document", document=texts.DOCUMENTS[0])])
    np.testing.assert_allclose([row["embedding"] for row in rows[:2]], wanted, atol=1e-5)
    end = opened.tokenizer.trusted.token_to_id("<|im_end|>")
    assert end not in opened.ids("document", document="a<|im_end|>")

    _, short, _ = command(*arguments, "--json", "--dimensions", "8")
    cut = np.array(json.loads(short.splitlines()[1])["embedding"])
    np.testing.assert_allclose(cut, wanted[1, :8] / np.linalg.norm(wanted[1, :8]), atol=1e-5)
    _, other, _ = command(*arguments, "--json", "--instruct", "Find insects")
    assert json.loads(other.splitlines()[0])["embedding"] != rows[0]["embedding"]
    assert other.splitlines()[1:] == out.splitlines()[1:]  # documents take no instruction
    code, shown, _ = command(*arguments)
    assert code == 0
    assert f"cosines of query 1 with the texts: {float(wanted[0] @ wanted[1]):.4f}" in shown


@slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to embed"),
        (["--text", "a", "--instruct", "b"], "there is no --query"),
        (["--text", "a", "--dimensions", "65"], "65 dimensions are not in [1, 64]"),
        (["--text", "a", "--dimensions", "0"], "--dimensions 0 is not positive"),
        (["--text", " "], "the document is empty"),
        (["--text", "word " * 600], "the model takes 511"),
    ],
)
def test_what_cannot_be_embedded_is_refused(made: Packages, arguments: list[str], said: str) -> None:
    code, _, err = command("embed", str(made("embed", "int8")["package"].path), *arguments)
    assert code == 2
    assert said in err


@slow
def test_rerank_orders_documents_and_long_ones_can_be_cut(made: Packages) -> None:
    package = made("rerank", "int8")["package"].path
    documents = [part for text in texts.DOCUMENTS[:4] for part in ("--document", text)]
    code, out, err = command("rerank", str(package), "--query", "bees", *documents, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert sorted(row["index"] for row in rows) == [0, 1, 2, 3]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    long = ["--query", "bees", "--document", "word " * 600]
    assert command("rerank", str(package), *long)[0] == 2
    code, shown, _ = command("rerank", str(package), *long, "--truncate")
    assert code == 0
    assert "word word" in shown


@slow
@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("embed", ["generate", "{}", "--prompt", "hi"]),
        ("embed", ["rerank", "{}", "--query", "a", "--document", "b"]),
        ("rerank", ["embed", "{}", "--text", "a"]),
        ("rerank", ["bench", "{}"]),
        ("embed", ["attribute", "{}"]),
    ],
)
def test_a_package_is_used_for_what_it_is_made_for(made: Packages, task: str, arguments: list[str]) -> None:
    package = str(made(task, "int8")["package"].path)
    code, _, err = command(*(part.format(package) for part in arguments))
    assert code == 2
    assert f"is a package to {task}" in err


@slow
@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_received_package_verifies_and_replays_without_the_build_tools(
    task: str, made: Packages, tmp_path: Path
) -> None:
    package = made(task, "int4")["package"].path
    code, out, err = command("verify", str(package), "--replay")
    assert (code, err) == (0, "")
    assert "results computed again" in out
    blocked = ["pipeline", "torch", "transformers", "olive", "onnx", "onnxruntime_genai", "pydantic"]
    start = f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.argv = sys.argv[1:]; "
    script = start + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(package / "replay.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PASS: this device computes what was validated" in done.stdout
    lines = (package / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    card = start + lines.replace('Path(".")', f"Path({str(package)!r})")
    done = subprocess.run(
        [sys.executable, "-I", "-c", card, "card"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"0?\.\d+", done.stdout)


@slow
def test_a_device_that_computes_something_else_is_found_out(made: Packages, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(made("embed", "float")["package"].path, package)
    entries = [json.loads(line) for line in (package / GOLDEN).read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        entry["values"] = entry["values"][::-1]
    (package / GOLDEN).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(PackageError, match="does not compute what was validated"):
        golden.replay_retrieval(package)
    manifest = json.loads((package / MANIFEST).read_bytes())
    with pytest.raises(PackageError, match="its configuration to 'embed'"):
        package_config.check_settings(package, verify.Manifest(manifest | {"task": "rerank"}))


@slow
def test_a_build_ends_in_a_package_that_the_command_line_runs(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, checkpoints["rerank"], "rerank", "int8", generation={"context_length": 256})
    place = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert command("build", str(path), *place, "--prompt", "hi")[0] == 2
    code, out, err = command("build", str(path), *place)
    assert code == 0, err
    package = tmp_path / "out" / "tiny-rerank-int8"
    assert f"qwen-onnx rerank {package}" in out
    assert "score_error" in out
    code, out, err = command("rerank", str(package), "--query", "bees", "--document", "word " * 300)
    assert code == 2
    assert "rebuild with a larger generation.context_length" in err
    assert "damaged" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Score" in (package / "report.html").read_text(encoding="utf-8")
    assert isinstance(retrieval.open_package(package), Retriever)
