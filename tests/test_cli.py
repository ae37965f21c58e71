"""The command line: light, honest about errors, and good to pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.facts import recipe
from pipeline.facts.target import TARGETS

ROOT = Path(__file__).parent.parent
DEFAULT = "recipes/qwen2.5-coder-0.5b-instruct/cpu-int4.yaml"
HEAVY = ("torch", "transformers", "olive", "onnx", "onnxruntime", "onnxruntime_genai", "optimum")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipe", "list"], ["plan", DEFAULT], ["targets"], ["models"], ["choose", "--memory", "1GB"]],
)
def test_light_commands_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = {"PATH": "", "QWEN_ONNX_STORE": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["plan", "recipes/none.yaml"], 3, "there is no recipe"),
        (["lock", "recipes/none.yaml"], 3, "there is no recipe"),
        (["models", "--plan", "Qwen3-80B"], 2, "the catalogue has no model Qwen3-80B"),
        (["choose", "--task", "code", "--memory", "0.1GB"], 6, "no model for code fits 0.10 GB"),
        (["recipe", "list", "tests"], 2, "there are no recipes below tests"),
        (["verify", "nowhere"], 9, "there is no package directory nowhere"),
        (["generate", "nowhere", "--prompt", "x"], 9, "there is no package directory nowhere"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "nan"], 2, "temperature nan is not in [0, 5]"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "-1"], 2, "temperature -1.0 is not in [0, 5]"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "1", "--top-p", "2"], 2, "top_p 2.0 is not in"),
        (["generate", "nowhere", "--prompt", "x", "--max-tokens", "0"], 2, "--max-tokens 0 is not positive"),
        (["generate", "nowhere", "--prompt", "x", "--threads", "-1"], 2, "--threads -1 is not positive"),
        (["generate", "nowhere", "--prompt", "x", "--top-k", "-1"], 2, "top_k -1 is negative"),
        (["generate", "nowhere", "--prompt", "x", "--seed", "-1"], 2, "seed -1 is not in"),
        (["generate", "nowhere", "--prompt", ""], 2, "the prompt is empty"),
        (["bench", "nowhere", "--rounds", "0"], 2, "--rounds 0 is not positive"),
        (["bench", "nowhere", "--threads", "0"], 2, "--threads 0 is not positive"),
        (["bench", "nowhere"], 9, "there is no package directory nowhere"),
    ],
)
def test_expected_errors_have_their_exit_code(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    assert text in capsys.readouterr().err


def test_an_error_for_machines_is_one_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "nowhere", "--json"]) == 9
    shown = capsys.readouterr()
    event = json.loads(shown.out)
    assert (event["event"], event["error"], event["exit_code"]) == ("error", "PackageError", 9)
    assert shown.err == ""


@pytest.mark.parametrize("arguments", [[], ["biuld"], ["build"], ["recipe"], ["generate", "p"], ["plan", "r", "--no"]])
def test_a_command_line_that_is_none_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: qwen-onnx" in capsys.readouterr().err


def test_lint_reports_the_worst_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "m" / "cpu.yaml"
    bad.parent.mkdir()
    bad.write_text("targt: cpu\n")
    assert cli.main(["recipe", "lint", DEFAULT, str(bad)]) == 3
    shown = capsys.readouterr()
    assert f"{DEFAULT}: good" in shown.out
    assert "did you mean `target`?" in shown.err


def test_the_plan_for_machines_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", DEFAULT, "--json", "--store", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stage"] for line in lines[:-1]] == ["checkpoint", "export", "quantize", "validate", "package"]
    assert lines[-1]["need"]["memory"] > 0


def test_schema_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "schema"]) == 0
    assert "checkpoint" in json.loads(capsys.readouterr().out)["properties"]
    assert cli.main(["targets"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in TARGETS if name not in shown] == []


@pytest.mark.parametrize("command", [["recipe", "schema"], ["targets"]])
def test_a_reader_that_has_gone_is_no_traceback_and_no_success(command: list[str]) -> None:
    """As with every program that is cut off so, the shell sees 141; a short output fails when it is flushed only."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *command], stdout=gone, stderr=subprocess.PIPE, check=False, cwd=ROOT
        )
    assert done.stderr == b""
    assert done.returncode == cli.READER_GONE


def test_a_terminal_that_lacks_characters_gets_the_rest() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = (
        "from pipeline import cli; cli.models.targets = lambda _: print('é好') or 0; "
        "raise SystemExit(cli.main(['targets']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout == b"??\n"


def test_the_readme_documents_every_exit_code() -> None:
    from pipeline.errors import ERRORS, INTERRUPTED

    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.M)}
    assert documented == {0, 1, INTERRUPTED, cli.READER_GONE, *(kind.exit_code for kind in ERRORS.values())}


def test_the_recipe_reference_names_every_key() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    schema = recipe.json_schema()
    keys = {name for part in (schema, *schema["$defs"].values()) for name in part["properties"]}
    assert {key for key in keys if key not in text} == set()
