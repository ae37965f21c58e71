"""Checkpoints whose positions reach beyond the window that they were trained for, exported and run there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_olive import artifact, quiet, run_export, step

from pipeline.artifact import Artifact
from pipeline.checkpoint import reference
from pipeline.errors import CheckpointError
from pipeline.fidelity import long_context
from pipeline.runtime import generate, session as sessions
from pipeline.stages import checkpoint as checkpoint_stage, package

pytestmark = [
    pytest.mark.slow,
    # What the exporters say of themselves.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Exporting aten..index operator"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WINDOW, FACTOR = 64, 4
# As Qwen2.5's and Qwen3's model cards have it, and with everything that transformers reads.
SCALINGS: dict[str, dict[str, Any]] = {
    "qwen2.5": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW},
    "qwen3": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW},
    "no window": {"rope_type": "yarn", "factor": 4.0},
    "attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
        "attention_factor": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
    },
}


@pytest.fixture(scope="module")
def scaled(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``(model_type, scaling) -> checkpoint`` with a window of 64 tokens."""

    @cache
    def made(model_type: str, scaling: str) -> Path:
        folder = tmp_path_factory.mktemp("scaled") / "checkpoint"
        shutil.copytree(checkpoint_of(model_type), folder)
        config = json.loads((folder / "config.json").read_bytes())
        config |= {"max_position_embeddings": WINDOW, "rope_scaling": SCALINGS.get(scaling)}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


CASES = [
    ("qwen2", "genai", "qwen2.5"),
    ("qwen3", "genai", "qwen3"),
    ("qwen2", "genai", "no window"),
    ("qwen2", "genai", "attention factor"),
    ("qwen3", "genai", "mscale"),
    ("qwen2", "optimum", "qwen2.5"),
    ("qwen3", "optimum", "attention factor"),
]


@pytest.mark.parametrize(("model_type", "exporter", "scaling"), CASES)
def test_yarn_gives_the_logits_of_pytorch_within_and_beyond_the_window(
    scaled: Callable[..., Path], tmp_path: Path, model_type: str, exporter: str, scaling: str
) -> None:
    checkpoint = scaled(model_type, scaling)
    made: Artifact = run_export(checkpoint, tmp_path / "export", exporter)
    assert made.facts["scaled_rotary_tables"] is (exporter == "genai")
    assert not list(made.path.glob("export*"))
    config = json.loads((made.path / "genai_config.json").read_bytes())
    assert config["model"]["context_length"] == config["search"]["max_length"] == FACTOR * WINDOW
    session = sessions.open_package(made.path)
    ids = [int(token) for token in np.random.default_rng(1).integers(0, 400, FACTOR * WINDOW - 1)]
    wanted = reference.load(checkpoint).logits(ids)
    decoded = generate.decode_logits(session, ids)
    bound = 2e-4 * np.abs(wanted).max()
    assert np.abs(decoded[:WINDOW] - wanted[:WINDOW]).max() < bound
    assert np.abs(decoded[WINDOW:] - wanted[WINDOW:]).max() < bound
    last = generate.prefill_logits(session, ids)[-1]
    assert np.abs(last - wanted[-1]).max() < bound
    plain = reference.load(scaled(model_type, "")).logits(ids)
    assert np.abs(plain - wanted)[:WINDOW].max() > 100 * bound  # what a graph without YaRN would compute
    assert np.abs(plain - wanted)[WINDOW:].max() > 100 * bound


def test_a_long_text_tells_scaled_positions_from_plain_ones(scaled: Callable[..., Path], tmp_path: Path) -> None:
    right = scaled("qwen2", "qwen2.5")
    wrong = tmp_path / "checkpoint"
    shutil.copytree(right, wrong)
    config = json.loads((wrong / "config.json").read_bytes())
    (wrong / "config.json").write_text(json.dumps(config | {"rope_scaling": None, "max_position_embeddings": 256}))
    torch_model = reference.load(right)
    found = {}
    for name, checkpoint in (("right", right), ("wrong", wrong)):
        session = sessions.open_package(run_export(checkpoint, tmp_path / name, "genai").path)
        found[name] = long_context.measure(torch_model, session, 200, quiet)
    assert found["right"]["tokens"] == 200
    assert found["right"]["positions"] == long_context.LAST
    assert found["right"]["mean_kl"] < 1e-5
    assert found["right"]["top1"] == 1
    assert found["wrong"]["mean_kl"] > 1e-3


def test_the_reference_of_a_long_text_is_that_of_the_whole_text(scaled: Callable[..., Path]) -> None:
    torch_model = reference.load(scaled("qwen3", "qwen3"))
    ids = long_context.text(torch_model.tokenizer, 1300)  # in three pieces
    whole = torch_model.logits(ids)[-long_context.LAST :]
    found = long_context.reference_logits(torch_model, ids)
    assert np.abs(found - whole).max() < 1e-4 * np.abs(whole).max()


def test_a_context_ends_where_dual_chunk_attention_would_begin(scaled: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(scaled("qwen2", ""), checkpoint)
    config = json.loads((checkpoint / "config.json").read_bytes())
    chunks = {"chunk_size": WINDOW, "local_size": 8, "original_max_position_embeddings": WINDOW}
    config |= {"max_position_embeddings": 1_010_000, "dual_chunk_attention_config": chunks}
    (checkpoint / "config.json").write_text(json.dumps(config))
    made = run_export(checkpoint, tmp_path / "export", "genai")
    session = sessions.open_package(made.path)
    assert session.context_length == WINDOW
    ids = list(range(3, 3 + WINDOW - 1))
    wanted = reference.load(checkpoint).logits(ids)
    assert np.abs(generate.decode_logits(session, ids) - wanted).max() < 2e-4 * np.abs(wanted).max()

    recipe = {"type": "local", "path": str(checkpoint)}
    context = {"checkpoint": {"sources": [recipe], "license": "l", "base_model": "b"}, "base": str(tmp_path)}
    for wanted_context in (None, WINDOW + 1, WINDOW):
        given = replace(
            step("checkpoint", {}), context=context | {"context_length": wanted_context, "downloads": tmp_path}
        )
        folder = tmp_path / f"made-{wanted_context}"
        folder.mkdir()
        if wanted_context == WINDOW:
            assert checkpoint_stage.run(given, {}, folder, quiet).facts["context"] == WINDOW
        else:
            with pytest.raises(CheckpointError, match="needs dual chunk attention"):
                checkpoint_stage.run(given, {}, folder, quiet)
    source, model = artifact("checkpoint", checkpoint), artifact("quantize", made.path)
    package._check_context(model, source, None)  # what was cut already
    with pytest.raises(CheckpointError, match="needs dual chunk attention"):
        package._check_context(model, source, WINDOW + 1)
