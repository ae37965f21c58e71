"""Plans: every recipe of the repository, and which change repeats which step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.builds import plan
from pipeline.errors import CheckpointError, RecipeError, RuntimeMissing
from pipeline.facts import recipe
from pipeline.facts.target import TARGETS

ROOT = Path(__file__).parent.parent
RECIPES = recipe.find(ROOT / "recipes")
STAGES = [stage.name for stage in plan.STAGES if not (stage.compiled or stage.adapted)]
VERSIONS = {name: "1" for stage in plan.STAGES if not stage.compiled for name in stage.tools}


def test_there_are_recipes_for_every_target() -> None:
    assert {recipe.load(path).recipe.target for path in RECIPES} == set(TARGETS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_plans_without_weights_or_says_what_is_missing(path: Path) -> None:
    loaded = recipe.load(path)
    missing = TARGETS[loaded.recipe.target].missing
    if missing:
        with pytest.raises(RecipeError, match="cannot be built") as caught:
            plan.make(loaded)
        assert missing in str(caught.value)
        return
    steps = plan.make(loaded)
    compiled = TARGETS[loaded.recipe.target].compiled
    expected = [stage.name for stage in plan.STAGES if not stage.adapted and (compiled or not stage.compiled)]
    assert [step.stage for step in steps] == expected
    assert all(step.estimate.memory > 0 and step.estimate.seconds > 0 for step in steps)


BASE = """
target: cpu
checkpoint:
  sources: [{type: hub, repo: a/b, revision: 0123456789012345678901234567890123456789}]
  license: Apache-2.0
  base_model: b
"""
REST = """
description: words
export: {exporter: genai}
quantize: {algorithm: min_error, body: {bits: 4, block_size: 32, symmetric: false}}
validate: {gates: {mean_kl: 0.1, top1: 0.8, perplexity_ratio: 1.1}}
generation: {top_k: 20}
"""


def _keys(folder: Path, text: str, versions: dict[str, str] | None = None) -> dict[str, str]:
    path = folder / "m" / "cpu.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return {step.stage: step.key for step in plan.make(recipe.load(path), versions or VERSIONS)}


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("revision: 0123", "revision: 9123", "checkpoint"),
        ("exporter: genai", "exporter: optimum", "export"),
        ("block_size: 32", "block_size: 64", "quantize"),
        ("algorithm: min_error", "algorithm: gptq", "quantize"),
        ("mean_kl: 0.1", "mean_kl: 0.2", "validate"),
        ("description: words", "description: other words", "package"),
        ("top_k: 20", "top_k: 21", "package"),
    ],
)
def test_a_change_repeats_what_depends_on_it_and_nothing_else(tmp_path: Path, old: str, new: str, first: str) -> None:
    before, after = _keys(tmp_path, BASE + REST), _keys(tmp_path, (BASE + REST).replace(old, new))
    changed = [stage for stage in STAGES if before[stage] != after[stage]]
    assert changed == STAGES[STAGES.index(first) :]


def test_a_new_tool_version_repeats_what_it_makes(tmp_path: Path) -> None:
    before = _keys(tmp_path, BASE + REST)
    after = _keys(tmp_path, BASE + REST, {**VERSIONS, "olive-ai": "2"})
    assert [stage for stage in STAGES if before[stage] != after[stage]] == STAGES[1:]


@pytest.mark.parametrize("name", sorted(VERSIONS))
def test_a_tool_is_part_of_the_identity_of_the_first_step_that_uses_it(tmp_path: Path, name: str) -> None:
    """And of the package's, which tells all versions; a step without the tool, before it, stays cached."""
    first = next(stage.name for stage in plan.STAGES if name in stage.tools)
    before, after = _keys(tmp_path, BASE + REST), _keys(tmp_path, BASE + REST, {**VERSIONS, name: "2"})
    changed = [stage for stage in STAGES if before[stage] != after[stage]]
    assert changed[0] == first
    assert changed[-1] == "package"


def test_a_tool_that_is_not_installed_is_named() -> None:
    with pytest.raises(RuntimeMissing, match="no-such-tool is not installed"):
        plan.installed("no-such-tool")


def test_a_local_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    text = (BASE + REST).replace(
        "{type: hub, repo: a/b, revision: 0123456789012345678901234567890123456789}", "{type: local, path: gone}"
    )
    with pytest.raises(CheckpointError, match="gone"):
        _keys(tmp_path, text)


def test_notes_beside_a_local_checkpoint_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    folder = tmp_path / "m" / "here"
    folder.mkdir()
    (folder / "merges.txt").write_text("x")
    text = (BASE + REST).replace(
        "{type: hub, repo: a/b, revision: 0123456789012345678901234567890123456789}", "{type: local, path: here}"
    )
    before = _keys(tmp_path, text)
    (folder / "notes.md").write_text("words")
    assert _keys(tmp_path, text) == before
    (folder / "merges.txt").write_text("y")
    assert _keys(tmp_path, text)["checkpoint"] != before["checkpoint"]


@pytest.mark.parametrize("generation", ["", "generation: {context_length: 262145}"])
def test_a_context_that_the_checkpoint_cannot_have_is_refused_when_planned(tmp_path: Path, generation: str) -> None:
    """Qwen2.5-7B-Instruct-1M: trained on 262,144 tokens, and a million by dual chunk attention."""
    (tmp_path / "here").mkdir()
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = {"model_type": "qwen2", "vocab_size": 512, **sizes, "max_position_embeddings": 1010000}
    text = json.dumps({**config, "dual_chunk_attention_config": chunks})
    (tmp_path / "here" / "config.json").write_text(text)
    local = BASE.replace("type: hub, repo: a/b, revision: 0123456789012345678901234567890123456789", _LOCAL)
    rest = REST.replace("generation: {top_k: 20}", "")
    with pytest.raises(CheckpointError, match=r"needs dual chunk attention[\s\S]*to 262144 or less") as caught:
        _keys(tmp_path, local + rest + generation)
    assert "config.json" in caught.value.where
    assert _keys(tmp_path, local + rest + "generation: {context_length: 262144}")


_LOCAL = "type: local, path: ../here"


def test_a_long_text_is_a_field_of_validation_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m" / "cpu.yaml"
    path.parent.mkdir()
    found = {}
    for name, text in (("without", REST), ("with", REST.replace("gates:", "long_tokens: 5000, gates:"))):
        path.write_text(BASE + text)
        found[name] = next(step for step in plan.make(recipe.load(path), VERSIONS) if step.stage == "validate")
    assert "long_tokens" not in found["without"].fields
    assert found["with"].fields["long_tokens"] == 5000
    assert found["with"].estimate.seconds > found["without"].estimate.seconds
    assert found["with"].estimate.memory > found["without"].estimate.memory
