"""What the project promises of the real checkpoint. Minutes; `make cpu` before it makes most of it a cache hit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
MODEL = "qwen2.5-coder-0.5b-instruct"
MEGABYTE = 1_000_000

# Half of the text shows whether a promise is kept, in half of the time; `make cpu` builds the default recipe whole.
SHORTER = """
extends: {recipes}/{model}/{name}.yaml
validate: {{windows: 4}}
"""
# What field reports found to run and to answer gibberish: W8A8 with 8-bit products in 16-bit sums.
KNOWN_BAD = """
extends: [{recipes}/{model}/_model.yaml, {recipes}/_base/cpu-int8.yaml]
quantize: {{algorithm: dynamic, body: null, embedding: float, options: {{per_channel: true, reduce_range: false}}}}
validate: {{windows: 1, answers: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def _in_the_project() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


def _build(recipe: Path, out: Path) -> dict[str, object]:
    assert cli.main(["build", str(recipe), "--out", str(out)]) == 0
    package = out / f"{MODEL}-{recipe.stem}"
    return {
        "package": package,
        "weights": sum(path.stat().st_size for path in package.glob("*.data")),
        **json.loads((package / "validation.json").read_bytes()),
    }


@pytest.mark.parametrize(
    ("recipe", "megabytes", "mean_kl", "top1"),
    [
        ("cpu-int4", 400, 0.03, 0.89),
        ("cpu-int8", 800, 0.005, 0.97),
        ("cpu-w8a8", 560, 0.02, 0.93),
        ("cuda-int4", 600, 0.06, 0.86),
    ],
)
def test_packages_keep_their_promises(recipe: str, megabytes: int, mean_kl: float, top1: float, tmp_path: Path) -> None:
    path, out = ROOT / "recipes" / MODEL / f"{recipe}.yaml", ROOT / "artifacts"
    if recipe != "cpu-int4":
        out, path = tmp_path, tmp_path / MODEL / f"{recipe}.yaml"
        path.parent.mkdir()
        path.write_text(SHORTER.format(recipes=ROOT / "recipes", model=MODEL, name=recipe))
    built = _build(path, out)
    assert built["weights"] <= megabytes * MEGABYTE
    for way in ("prefill", "decode"):
        assert built[way]["mean_kl"] <= mean_kl
        assert built[way]["top1"] >= top1
    candidate = built["candidate"]
    assert (candidate["executed_on"] == candidate["provider"]) is not bool(candidate["not_executed_on_target"])
    assert built["tokenizer"]["served"] == built["chat_template"]["served"] == []


def test_the_default_package_verifies_replays_and_answers_without_the_build_tools() -> None:
    blocked = "import sys; sys.modules.update({name: None for name in ('torch', 'transformers', 'olive', 'onnx')}); "
    call = "from pipeline import cli; sys.exit(cli.main(sys.argv[1:]))"
    package = f"artifacts/{MODEL}-cpu-int4"
    commands = [
        ["verify", package, "--replay"],
        ["generate", package, "--prompt", "What is the capital of France? One word.", "--max-tokens", "16"],
    ]
    outputs = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", blocked + call, *command], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "6 of 6 answers identical" in outputs[0]
    assert "Paris" in outputs[1]


def test_the_default_package_comes_from_its_manifest_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the weights, which is all but the validation: three minutes on two cores, and 5 GB of disk for as long."""
    package = str(_build(ROOT / "recipes" / MODEL / "cpu-int4.yaml", ROOT / "artifacts")["package"])
    capsys.readouterr()
    shared = ["--downloads", "artifacts/.store/downloads"]
    assert cli.main(["rebuild", package, "--until", "quantize", *shared, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {file["name"]: file["state"] for file in told["files"]} == {
        "model.onnx": "equal",
        "model.onnx.data": "equal",
    }
    assert told["steps"] == {"checkpoint": True, "quantize": True}


def test_int8_that_loses_too_much_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / MODEL / "cpu-bad.yaml"
    recipe.parent.mkdir()
    recipe.write_text(KNOWN_BAD.format(recipes=ROOT / "recipes", model=MODEL))
    assert cli.main(["build", str(recipe), "--out", str(tmp_path / "out")]) == 8
    errors = capsys.readouterr().err
    assert "mean_kl (decode) is" in errors
    assert "the gate is at most 0.005" in errors
    assert "reduce_range: true" in errors
    assert not (tmp_path / "out").exists()
