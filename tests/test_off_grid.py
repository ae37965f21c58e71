"""Peers are compared on weights that none of them has quantized before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_tune import RECIPE

from pipeline import cli
from pipeline.checkpoint import reference
from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import UsageError
from pipeline.export import gguf_export
from pipeline.quantization import blockwise
from pipeline.tuning import off_grid

pytestmark = pytest.mark.slow


def test_a_grid_that_fits_no_longer_does() -> None:
    """Weights on the grid of 4 bits are found again without loss; moved ones lose what any weights lose."""
    import torch

    random = np.random.default_rng(0)
    given = blockwise.quantize(random.standard_normal((64, 128)).astype(np.float32), 4, 32, True)
    on_grid = blockwise.dequantize(given, 4, 128)
    assert blockwise.quantize(on_grid, 4, 32, True).relative_error < 1e-9
    found = off_grid.moved(torch.from_numpy(on_grid), torch.Generator().manual_seed(0)).numpy()
    assert blockwise.quantize(found, 4, 32, True).relative_error > 0.003
    step = np.ptp(on_grid.reshape(64, 4, 32), axis=2) / 15
    moves = (found - on_grid).reshape(64, 4, 32) / step[..., None]
    assert np.abs(moves).max() <= 0.5 + 1e-6
    assert abs(moves.mean()) < 0.02
    assert moves.std() == pytest.approx(12**-0.5, rel=0.05)


def test_the_program_writes_a_checkpoint_and_a_recipe_that_builds(
    checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "cpu-int4.yaml").write_text(RECIPE.format(path=checkpoint_of("qwen2")))
    arguments = [str(home / "cpu-int4.yaml"), str(tmp_path / "moved"), "--store", str(tmp_path / "store")]
    assert off_grid.main(arguments) == 0
    assert f"next: qwen-onnx build {tmp_path / 'moved' / 'cpu-int4.yaml'}" in capsys.readouterr().out
    before = reference.load(checkpoint_of("qwen2")).model.state_dict()
    after = reference.load(tmp_path / "moved" / "checkpoint").model.state_dict()
    assert after.keys() == before.keys()
    for name, values in before.items():
        assert bool((values == after[name]).all()) is (values.ndim == 1), name
    assert cli.main(["plan", str(tmp_path / "moved" / "cpu-int4.yaml"), "--store", str(tmp_path / "store")]) == 0
    assert off_grid.main(arguments) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("qwen3", True)])
def test_a_gguf_file_holds_what_the_checkpoint_holds(
    model_type: str, tied: bool, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    source = checkpoint_of(model_type, tied)
    gguf_export.export(source, tmp_path / "model.gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    wanted = dict(Tensors(source).all())
    assert len(tensors) == len(wanted)
    query = wanted["model.layers.1.self_attn.q_proj.weight"].numpy()
    np.testing.assert_allclose(tensors["blk.1.attn_q.weight"].data, query, rtol=1e-3, atol=1e-6)
    norm = wanted["model.norm.weight"].numpy()
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, norm)
    assert ("output.weight" in tensors) is not tied
    assert read.fields["general.architecture"].contents() == model_type


def test_a_gguf_file_scales_frequencies_as_the_checkpoint_does(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    import gguf

    source = tmp_path / "scaled"
    shutil.copytree(checkpoint_of("qwen2"), source)
    config = json.loads((source / "config.json").read_bytes())
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    (source / "config.json").write_text(json.dumps(config))
    gguf_export.export(source, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    names = ("context_length", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
    assert [fields[f"qwen2.{name}"].contents() for name in names] == [1024, "yarn", 4.0, 256]
    config["rope_scaling"]["beta_fast"] = 16
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="YaRN with beta_fast is not written"):
        gguf_export.export(source, tmp_path / "other.gguf")


def test_a_family_without_names_for_its_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    with pytest.raises(UsageError, match="qwen2_moe is not written as GGUF"):
        gguf_export.export(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
