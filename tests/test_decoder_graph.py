"""The graph that is written here, a weight at a time, against PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint import reference
from pipeline.errors import StageError
from pipeline.export import decoder_graph, exporter
from pipeline.runtime import generate, session

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 13))


def _exported(checkpoint: Path, folder: Path) -> session.Session:
    import onnx

    folder.mkdir()
    onnx.save(exporter.export_native(checkpoint, folder, "float32"), str(folder / "model.onnx"))
    for path in checkpoint.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return session.open_package(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_logits_and_greedy_tokens_are_pytorchs(
    model_type: str, tied: bool, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(model_type, tied)
    opened, torch_model = _exported(checkpoint, tmp_path / "graph"), reference.load(checkpoint)
    ids = list(range(3, 99))
    wanted = torch_model.logits(ids)
    assert np.abs(generate.prefill_logits(opened, ids) - wanted).max() < 1e-4
    assert np.abs(generate.decode_logits(opened, ids) - wanted).max() < 1e-4
    answer, _ = torch_model.greedy(PROMPT, 64)
    assert list(generate.stream(opened, PROMPT, 64)) == answer


def test_positions_beyond_the_window_that_yarn_extends(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "yarn"
    shutil.copytree(checkpoint_of("qwen2"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_bytes())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config["max_position_embeddings"] = 256
    (checkpoint / "config.json").write_text(json.dumps(config))
    opened, torch_model = _exported(checkpoint, tmp_path / "graph"), reference.load(checkpoint)
    assert opened.context_length == 256
    ids = [3 + index % 90 for index in range(200)]
    wanted = torch_model.logits(ids)
    assert np.abs(generate.prefill_logits(opened, ids) - wanted).max() < 1e-4
    assert np.abs(generate.decode_logits(opened, ids) - wanted).max() < 1e-4


def test_what_the_graph_has_not_is_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint_of("qwen2"))
    for setting, value, said in (
        ("hidden_act", "gelu", "activation is gelu"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding-window"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "type dynamic"),
    ):
        config = AutoConfig.from_pretrained(checkpoint_of("qwen2"))
        setattr(config, setting, value)
        with pytest.raises(ValueError, match=said):
            decoder_graph.sizes_of(config)
    shutil.copytree(checkpoint_of("qwen2"), tmp_path / "changed")
    config.hidden_act = "gelu"
    config.save_pretrained(tmp_path / "changed")
    with pytest.raises(StageError, match="no graph can be written"):
        exporter.export_native(tmp_path / "changed", tmp_path, "float32")


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_with_its_layers_on_the_disk_is_the_same(tied: bool, checkpoint_of: Callable[..., Path]) -> None:
    checkpoint = checkpoint_of("qwen2", tied)
    files = sorted(checkpoint.iterdir())
    whole, streamed = reference.load(checkpoint), reference.load(checkpoint, held_whole=0)
    assert {str(parameter.device) for parameter in streamed.model.model.layers.parameters()} == {"meta"}
    assert np.array_equal(streamed.logits(PROMPT), whole.logits(PROMPT))
    assert streamed.greedy(PROMPT, 16) == whole.greedy(PROMPT, 16)
    assert sorted(checkpoint.iterdir()) == files
