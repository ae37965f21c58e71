"""The texts of a package say what was done to the model, and keep the notices that came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import card
from pipeline.errors import StageError
from pipeline.stages import package

BODY = {"bits": 4, "block_size": 64, "symmetric": False}
HEAD = {"bits": 8, "block_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("quantize", "text"),
    [
        ({"algorithm": "none"}, "float weights"),
        ({"algorithm": "rtn", "body": BODY}, "INT4 weights in blocks of 64 (rtn)"),
        ({"algorithm": "rtn", "body": BODY, "head": BODY}, "INT4 weights in blocks of 64 (rtn)"),
        (
            {"algorithm": "min_error", "body": BODY, "head": HEAD, "embedding": "shared"},
            "INT4 weights in blocks of 64 (min_error), INT8 head, shared with the embedding",
        ),
        (
            {"algorithm": "min_error", "body": BODY, "embedding": "shared"},
            "INT4 weights in blocks of 64 (min_error), head shared with the embedding",
        ),
        (
            {"algorithm": "gptq", "body": BODY, "embedding": HEAD, "overrides": [{"match": "*", "scheme": HEAD}]},
            "INT4 weights in blocks of 64 (gptq), INT8 embedding, INT8 for some weights",
        ),
    ],
)
def test_the_scheme_is_told_in_full(quantize: dict[str, Any], text: str) -> None:
    manifest = {
        "source": {"base_model": "Qwen", "license": "Apache-2.0"},
        "tools": {"b": "2", "a": "1"},
        "recipe": {"quantize": quantize},
    }
    shown = card.notice(manifest)
    assert f"({text})" in shown
    assert "a 1, b 2" in shown
    assert card.notice(manifest, "Copyright of the original").endswith("Copyright of the original")


def test_the_licence_of_the_checkpoint_comes_first(tmp_path: Path) -> None:
    package._write_license(tmp_path, "Apache-2.0", tmp_path)
    assert "Apache License" in (tmp_path / "LICENSE").read_text()
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    out.mkdir()
    with pytest.raises(StageError, match="no text of the licence Odd"):
        package._write_license(own, "Odd", out)
    (own / "LICENSE.md").write_text("do what you like")
    package._write_license(own, "Odd", out)
    assert (out / "LICENSE").read_text() == "do what you like"
