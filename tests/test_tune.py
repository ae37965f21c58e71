"""Bits go where they save most; what a weight loses is what the model loses with it replaced."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.facts import recipe
from pipeline.facts.scheme import WeightScheme
from pipeline.graph.external_data import ALIGNMENT
from pipeline.tuning import allocation
from pipeline.tuning.allocation import Option

SCHEMES = (
    WeightScheme(bits=4, block_size=64, symmetric=False),
    WeightScheme(bits=4, block_size=32, symmetric=False),
    WeightScheme(bits=8, block_size=64, symmetric=True),
)


def options(*entries: tuple[int, float]) -> list[Option]:
    return [Option(scheme, size, loss) for scheme, (size, loss) in zip(SCHEMES, entries, strict=False)]


def random_options(seed: int) -> dict[str, list[Option]]:
    random = np.random.default_rng(seed)
    found = {}
    for name in "abcde":
        sizes = np.cumsum(random.integers(1, 20, 3))
        losses = np.sort(random.random(3))[::-1]
        found[name] = options(*((int(size), float(loss)) for size, loss in zip(sizes, losses, strict=True)))
    return found


def totals(chosen: Any) -> tuple[int, float]:
    return sum(option.size for option in chosen), sum(option.loss for option in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_keeps_to_its_bound_and_is_nearly_the_best(seed: int) -> None:
    given = random_options(seed)
    every = [totals(choice) for choice in itertools.product(*given.values())]
    largest_step = max(right.size - left.size for hull in given.values() for left, right in itertools.pairwise(hull))
    largest_gap = max(hull[-1].size - hull[0].size for hull in given.values())
    most = sorted(loss for _, loss in every)[len(every) // 3]
    size, loss = totals(allocation.allocate(given, max_loss=most).values())
    assert loss <= most + 1e-9
    assert size <= min(size for size, loss in every if loss <= most) + max(largest_step, largest_gap)
    room = sorted(size for size, _ in every)[len(every) // 2]
    size, loss = totals(allocation.allocate(given, max_size=room).values())
    assert size <= room
    slack = min(loss for other, loss in every if other <= room - largest_gap)
    assert loss <= slack + 1e-9


def test_a_bound_out_of_reach_yields_the_nearest_there_is() -> None:
    given = random_options(1)
    assert totals(allocation.allocate(given, max_loss=0.0).values())[1] == pytest.approx(
        sum(min(option.loss for option in entries) for entries in given.values())
    )
    smallest = sum(min(option.size for option in entries) for entries in given.values())
    assert totals(allocation.allocate(given, max_size=0).values())[0] == smallest


def test_the_choice_keeps_to_a_bound_of_time() -> None:
    given = {
        name: [Option(SCHEMES[1], 10, loss, 1.0), Option(SCHEMES[2], 20, 0.0, 2.0)]
        for name, loss in (("a", 0.3), ("b", 0.2), ("c", 0.1))
    }
    chosen = allocation.allocate(given, max_loss=0.0, max_time=4.5)
    assert [chosen[name].size for name in "abc"] == [20, 10, 10]


def test_an_option_that_is_larger_and_no_better_is_never_chosen() -> None:
    given = {"a": options((10, 1.0), (20, 1.5), (30, 0.1))}
    assert allocation.allocate(given, max_loss=0.5)["a"].size == 30
    assert allocation.allocate(given, max_loss=1.2)["a"].size == 10


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("qwen3", True)])
def test_a_loss_is_that_of_the_model_with_the_weight_replaced(
    model_type: str, tied: bool, checkpoint_of: Callable[..., Path]
) -> None:
    import torch

    from pipeline.checkpoint import reference
    from pipeline.fidelity import metrics
    from pipeline.tuning import sensitivity

    loaded = reference.load(checkpoint_of(model_type, tied))
    ids = np.random.default_rng(0).integers(3, 250, (2, 24)).tolist()
    attention = loaded.model.model.layers[1].self_attn
    random = np.random.default_rng(1)

    def noisy(weight: torch.Tensor) -> np.ndarray:
        values = weight.detach().numpy()
        return values + 0.05 * values.std() * random.standard_normal(values.shape).astype(np.float32)

    fused = noisy(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
    down = noisy(loaded.model.model.layers[0].mlp.down_proj.weight)
    embedding = noisy(loaded.model.model.embed_tokens.weight)
    weights = {
        "model.embed_tokens": lambda: embedding,
        "model.layers.0.mlp.down_proj": lambda: down,
        "model.layers.1.attn.qkv_proj": lambda: fused,
    }
    before = loaded.logits(ids[0])
    seen: list[str] = []
    found = sensitivity.measure(loaded, weights, ids, lambda _, path: seen.append(path))
    assert seen == list(weights)
    np.testing.assert_array_equal(loaded.logits(ids[0]), before)
    wanted = [metrics.log_softmax(loaded.logits(row)) for row in ids]
    for path, module in (
        ("model.embed_tokens", loaded.model.model.embed_tokens),
        ("model.layers.0.mlp.down_proj", loaded.model.model.layers[0].mlp.down_proj),
    ):
        kept = module.weight.data
        module.weight.data = torch.from_numpy(weights[path]())
        if path == "model.embed_tokens" and tied:  # the head keeps its own
            loaded.model.lm_head.weight = torch.nn.Parameter(kept)
        others = [metrics.log_softmax(loaded.logits(row)) for row in ids]
        module.weight.data = kept
        real = np.mean([metrics.kl_divergence(a, b) for a, b in zip(wanted, others, strict=True)])
        assert found[path] == pytest.approx(float(real), rel=1e-3, abs=1e-7)
    assert found["model.layers.1.attn.qkv_proj"] > 0
    # Few tokens of each position carry nearly all of it.
    few = sensitivity.measure(loaded, weights, ids, lambda *_: None, likeliest=16)
    assert few == pytest.approx(found, rel=0.2)
    # A head that the embedding is gathered from counts for both.
    head = noisy(loaded.model.lm_head.weight)
    both = sensitivity.measure(loaded, {"lm_head": lambda: head}, ids, lambda *_: None, shared=True)["lm_head"]
    np.testing.assert_array_equal(loaded.logits(ids[0]), before)
    for module in (loaded.model.lm_head, loaded.model.model.embed_tokens):
        module.weight = torch.nn.Parameter(torch.from_numpy(head), requires_grad=False)
    others = [metrics.log_softmax(loaded.logits(row)) for row in ids]
    real = np.mean([metrics.kl_divergence(a, b) for a, b in zip(wanted, others, strict=True)])
    assert both == pytest.approx(float(real), rel=1e-3, abs=1e-7)


RECIPE = """\
target: cpu
checkpoint:
  sources: [{{type: local, path: {path}}}]
  license: Apache-2.0
  base_model: tiny
quantize:
  algorithm: min_error
  body: {{bits: 4, block_size: 32, symmetric: false}}
  head: {{bits: 8, block_size: 32, symmetric: true}}
validate:
  windows: 4
  window_tokens: 16
  greedy_tokens: 4
  gates: {{mean_kl: 5, top1: 0.01, perplexity_ratio: 50}}
"""


@pytest.mark.slow
def test_a_found_recipe_says_each_weight_and_reaches_its_bound(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "cpu-int4.yaml").write_text(RECIPE.format(path=checkpoint_of("qwen2")))
    store = ["--store", str(tmp_path / "store")]
    assert cli.main(["build", str(home / "cpu-int4.yaml"), "--out", str(tmp_path / "out"), *store]) == 0
    report = json.loads((tmp_path / "out" / "tiny-cpu-int4" / "validation.json").read_bytes())
    plain = max(report[path]["mean_kl"] for path in ("prefill", "decode"))
    bound = plain / 2
    # Before anything is measured, a failed gate names the command that does; then what it found.
    text = (home / "cpu-int4.yaml").read_text()
    strict = home / "cpu-strict.yaml"
    strict.write_text(text.replace("mean_kl: 5", f"mean_kl: {bound}"))
    assert cli.main(["build", str(strict), "--out", str(tmp_path / "out"), *store]) == 8
    assert f"`qwen-onnx tune {strict} --max-kl" in capsys.readouterr().err
    (home / "cpu-int4.yaml").write_text(text + f"objective: {{max_kl: {bound}}}\n")
    assert cli.main(["tune", str(home / "cpu-int4.yaml"), "--json", *store]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mean_kl"] <= bound
    assert 0 < found["decode_ratio"] <= 1
    assert cli.main(["build", str(strict), "--out", str(tmp_path / "out"), *store]) == 8
    error = capsys.readouterr().err
    assert " MB more may do: 8 bits for " in error
    made = recipe.load(home / "cpu-int4-tuned.yaml").recipe
    assert {override.scheme.bits for override in made.quantize.overrides} & {8}
    assert cli.main(["build", str(home / "cpu-int4-tuned.yaml"), "--out", str(tmp_path / "out"), *store]) == 0
    tuned = json.loads((tmp_path / "out" / "tiny-cpu-int4-tuned" / "validation.json").read_bytes())
    assert max(tuned[path]["mean_kl"] for path in ("prefill", "decode")) <= bound
    data = tmp_path / "out" / "tiny-cpu-int4-tuned" / "model.onnx.data"
    assert 0 <= found["bytes"] - data.stat().st_size < ALIGNMENT  # the last tensor is not padded


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "nothing to tune for"),
        (["--max-kl", "nan"], 2, "--max-kl nan is not positive"),
        (["--max-bytes", "-1"], 2, "--max-bytes -1 is not positive"),
        (["--max-kl", "0.1", "--out", "{recipe}"], 2, "is the recipe itself"),
        (["--min-decode-ratio", "1.5"], 2, "--min-decode-ratio is above 1"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    path = home / "cpu-int4.yaml"
    path.write_text(RECIPE.format(path="nowhere"))
    given = [argument.format(recipe=path) for argument in arguments]
    assert cli.main(["tune", str(path), *given, "--store", str(tmp_path / "store")]) == code
    assert text in capsys.readouterr().err


def test_other_algorithms_are_not_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    path = home / "cpu-int8.yaml"
    path.write_text(RECIPE.format(path="nowhere").replace("min_error", "rtn"))
    assert cli.main(["tune", str(path), "--max-kl", "0.1", "--store", str(tmp_path / "store")]) == 3
    assert "algorithm rtn is not tuned" in capsys.readouterr().err


@pytest.mark.slow
def test_attribution_reads_the_weights_back_and_tells_every_loss(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "cpu-int4.yaml").write_text(RECIPE.format(path=checkpoint_of("qwen2")))
    store, package = ["--store", str(tmp_path / "store")], tmp_path / "out" / "tiny-cpu-int4"
    assert cli.main(["build", str(home / "cpu-int4.yaml"), "--out", str(package.parent), *store]) == 0
    assert cli.main(["attribute", str(package), *store]) == 0
    assert "weights of" in capsys.readouterr().out
    found = json.loads((package.parent / "tiny-cpu-int4.attribution.json").read_bytes())
    rows = {row["path"]: row for row in found["rows"]}
    assert rows["lm_head"]["kind"] == "head"
    assert rows["lm_head"]["bits"] == 8
    assert rows["model.layers.0.mlp.down_proj"]["layer"] == 0
    assert all(row["kl"] > 0 for row in rows.values() if row["bits"] == 4)
    together = found["stages"][0]["kl"]
    assert 0.3 * together < sum(row["kl"] for row in rows.values()) < 3 * together  # small losses add up
    assert found["total_kl"] == pytest.approx(sum(stage["kl"] for stage in found["stages"]))
    assert found["stages"][1]["kl"] < together  # the arithmetic adds little to the weights
