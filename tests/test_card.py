"""The texts of a package say what was done to the model, and keep the notices that came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.documents import card
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


def test_hubs_read_the_licence_and_what_it_was_made_from() -> None:
    manifest = {"target": {"name": "cpu"}}
    source = {"base_model": "Qwen/Tiny", "license": "Apache-2.0", "languages": ["en", "zh"]}
    known = yaml.safe_load(card.front_matter(manifest | {"source": source}, "onnxruntime", "text-ranking").strip("-\n"))
    assert (known["license"], known["base_model"]) == ("apache-2.0", "Qwen/Tiny")
    assert (known["base_model_relation"], known["pipeline_tag"]) == ("quantized", "text-ranking")
    assert known["language"] == ["en", "zh"]
    own = {"source": source | {"license": "Qwen-Research", "languages": []}}
    other = yaml.safe_load(card.front_matter(manifest | own, "onnxruntime", "text-ranking").strip("-\n"))
    assert (other["license"], other["license_name"], other["license_link"]) == ("other", "qwen-research", "LICENSE")
    assert other["language"] == []


def test_the_scripts_have_their_own_licence_where_the_models_is_another() -> None:
    source = {"base_model": "Qwen", "license": "Odd"}
    manifest = {"source": source, "tools": {}, "recipe": {"quantize": {"algorithm": "none"}}}
    assert card.TOOLS_LICENSE in card.notice(manifest)
    source["license"] = "Apache-2.0"
    assert card.TOOLS_LICENSE not in card.notice(manifest)


@pytest.mark.parametrize("validation", [{}, {"images": {}}])
def test_the_runtimes_other_languages_are_shown(validation: dict[str, Any]) -> None:
    text = card._languages(validation, plugin=False)
    assert [f"```{name}\n" in text for name in ("csharp", "cpp", "java")] == [True] * 3
    assert "{{" not in text
    assert not card._languages({"audio": {}}, plugin=False)


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
