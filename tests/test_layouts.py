"""A package laid out for other programs: Foundry Local, and repositories of model hubs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_package
from tiny import CHAT_TEMPLATE, THINKING_TEMPLATE

from pipeline import cli
from pipeline.errors import PackageError, QwenOnnxError, UsageError
from pipeline.formats import layouts


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_package.write(tmp_path_factory.mktemp("package") / "tiny")


def test_foundry_local_finds_a_name_and_a_template(package: Path, tmp_path: Path) -> None:
    """What its scanner looks for: genai_config.json and inference_model.json with a Name, and no download.tmp."""
    out = tmp_path / "cache" / "model"
    assert cli.main(["layout", str(package), str(out), "--for", "foundry"]) == 0
    found = json.loads((out / "inference_model.json").read_bytes())
    assert found == {
        "Name": "tiny-cpu-int4",
        "PromptTemplate": {
            "system": "<|im_start|>system\n{Content}<|im_end|>\n",
            "user": "<|im_start|>user\n{Content}<|im_end|>\n",
            "assistant": "<|im_start|>assistant\n{Content}<|im_end|>\n",
            "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
    }
    rest = tiny_package.content(out)
    del rest["inference_model.json"]
    assert rest == tiny_package.content(package)
    assert (out / "model.onnx.data").stat().st_ino == (package / "model.onnx.data").stat().st_ino
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    with pytest.raises(UsageError, match="is taken"):
        layouts.write(package, out, "foundry")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING_TEMPLATE])
def test_templates_of_models_become_texts(template: str) -> None:
    found = layouts.prompt_template(template)
    assert found["prompt"] == "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n"
    assert found["system"] == "<|im_start|>system\n{Content}<|im_end|>\n"


@pytest.mark.parametrize("template", ["{{ messages | length }}", "{{ messages[-1].content | upper }}", ""])
def test_a_template_that_does_more_is_refused(template: str) -> None:
    with pytest.raises(QwenOnnxError) as caught:
        layouts.prompt_template(template)
    assert isinstance(caught.value, PackageError | UsageError)


def test_a_repository_for_a_hub(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    assert layouts.write(package, out, "hub") == [".gitattributes"]
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model, card.data.language) == ("apache-2.0", "Qwen/Tiny", ["en"])
    rows = attributes(out, "model.onnx", "model.onnx.data", "tokenizer.json", "README.md")
    assert rows == {
        "model.onnx": ("lfs", "unset"),
        "model.onnx.data": ("lfs", "unset"),
        "tokenizer.json": ("unspecified", "unset"),
        "README.md": ("unspecified", "unset"),
    }


def test_large_files_go_to_lfs_whatever_their_names(package: Path, tmp_path: Path) -> None:
    large = tiny_package.write(tmp_path / "large")
    (large / "a vocabulary.json").write_bytes(b" " * (11 << 20))
    layouts.write(tiny_package.seal(large), tmp_path / "hub", "hub")
    assert attributes(tmp_path / "hub", "a vocabulary.json") == {"a vocabulary.json": ("lfs", "unset")}


def attributes(folder: Path, *names: str) -> dict[str, tuple[str, str]]:
    """What git itself says of files: where they go, and whether their line ends are changed."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True, env=environment)
    command = ["git", "check-attr", "-z", "filter", "text", "--", *names]
    done = subprocess.run(command, cwd=folder, check=True, env=environment, capture_output=True, text=True)
    parts = done.stdout.split("\0")[:-1]
    values = {(parts[at], parts[at + 1]): parts[at + 2] for at in range(0, len(parts), 3)}
    return {name: (values[name, "filter"], values[name, "text"]) for name in names}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# no metadata\n", "base_model, license"),
        (tiny_package.CARD.replace("license: apache-2.0\n", ""), "license"),
        (tiny_package.CARD.replace("tags: [onnx]", "tags: [onnx"), "expected"),
        (tiny_package.CARD.replace("license: apache-2.0", "license: mit"), "mit, Apache-2.0"),
    ],
)
def test_a_card_that_a_hub_cannot_read_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    folder = tiny_package.write(tmp_path / "bad")
    (folder / "README.md").write_text(text)
    tiny_package.seal(folder)
    with pytest.raises(PackageError) as caught:
        layouts.write(folder, tmp_path / "out", "hub")
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()
