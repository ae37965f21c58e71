"""The programs that app teams copy: each is run as it stands, and answers what `qwen-onnx generate` answers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import card, cli

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "deploy" / "samples"
QUESTION = 'The "quick"\tbrown fox \\ löwe'
HEADERS = "QWEN_ONNX_GENAI_HEADERS"
REAL = ROOT / "artifacts" / "qwen2.5-coder-0.5b-instruct-cpu-int4"
Ask = Callable[[Path, str], str]


def _said(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, check=False, text=True, encoding="utf-8", env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return _whole(done.stdout)


def _whole(text: str) -> str:
    """Without what stands for bytes that are no character, and without spaces.

    Tiny models say such bytes; the runtime leaves them out, and the space that begins the token after them.
    """
    return "".join(text.replace("\ufffd", "").split())


def _generated(package: Path, question: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The text that qwen-onnx itself answers."""
    options = ["--prompt", question, "--max-tokens", "200", "--trust", "--json"]
    capsys.readouterr()
    assert cli.main(["generate", str(package), *options]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return _whole("".join(event.get("text", "") for event in events if "token" in event))


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def _python(package: Path, question: str) -> str:
    return _said(sys.executable, SAMPLES / "chat.py", package, question)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """chat.cpp, compiled against the library of the wheel as its first lines say."""
    compiler, headers = shutil.which("g++"), Path(os.environ.get(HEADERS, ""))
    if not compiler:
        pytest.skip("there is no g++")
    if not (headers / "ort_genai.h").is_file():
        pytest.skip(f"the wheels have no headers: let {HEADERS} name the folder include/ of a release")
    genai, runtime = _folder("onnxruntime_genai"), _folder("onnxruntime") / "capi"
    library, program = genai / "libonnxruntime-genai.so", tmp_path_factory.mktemp("chat") / "chat"
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-isystem", headers, f"-Wl,-rpath,{genai}"]
    subprocess.run([compiler, *options, SAMPLES / "chat.cpp", library, "-o", program], check=True)
    found = next(runtime.glob("libonnxruntime.so.*"))
    return lambda package, question: _said(program, package, question, ORT_LIB_PATH=str(found))


@pytest.fixture(scope="module")
def node() -> Ask:
    """chat.mjs with what its package.json names."""
    program = shutil.which("node")
    if not program:
        pytest.skip("there is no Node")
    wanted = json.loads((SAMPLES / "package.json").read_bytes())["dependencies"]
    if missing := [name for name in wanted if not (SAMPLES / "node_modules" / name).is_dir()]:
        pytest.skip(f"no {', '.join(missing)}: npm install --ignore-scripts, in deploy/samples")
    return lambda package, question: _said(program, SAMPLES / "chat.mjs", package, question)


@pytest.mark.slow
def test_the_sample_in_python_answers_as_generate_does(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((SAMPLES / "chat.py").read_text().splitlines()) <= 24
    wanted = _generated(tiny_package, QUESTION, capsys)
    assert len(wanted) > 10
    assert _python(tiny_package, QUESTION) == wanted


@pytest.mark.slow
def test_the_sample_in_cpp_compiles_without_a_warning_and_answers_so_too(compiled: Ask, tiny_package: Path) -> None:
    assert compiled(tiny_package, QUESTION) == _python(tiny_package, QUESTION)


@pytest.mark.slow
def test_the_sample_for_node_answers_so_too(node: Ask, tiny_package: Path) -> None:
    assert node(tiny_package, QUESTION) == _python(tiny_package, QUESTION)


@pytest.mark.slow
def test_the_sample_with_openais_client_answers_so_too(tiny_package: Path) -> None:
    pytest.importorskip("openai")
    from test_server import serving

    with serving(tiny_package) as server:
        variables = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
        answer = _said(sys.executable, SAMPLES / "client.py", QUESTION, **variables)
    assert answer == _python(tiny_package, QUESTION)


@pytest.mark.real
def test_the_samples_agree_on_the_default_package(node: Ask) -> None:
    question = "What is the capital of France? One word."
    assert _python(REAL, question) == node(REAL, question) == "Paris"


@pytest.mark.real
def test_the_sample_in_cpp_agrees_on_the_default_package(compiled: Ask) -> None:
    assert compiled(REAL, "What is the capital of France? One word.") == "Paris"


def test_no_language_shows_the_last_token_of_the_sequence_after_the_end() -> None:
    """The end is no part of the sequence: its last token would be shown twice."""
    shown = card._languages({}, plugin=False)
    texts = [shown, *(path.read_text(encoding="utf-8") for path in SAMPLES.glob("chat.*"))]
    assert len(texts) == 5
    for text in texts:
        assert not any(word in text for word in ("[^1]", "GetSequenceData", "getLastTokenInSequence"))
    assert shown.count("GetNextTokens()[0]") == 2
