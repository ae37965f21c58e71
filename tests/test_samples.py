"""The programs that app teams copy: each is run as it stands, and answers what `qwen-onnx generate` answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import handoff
import pytest

from pipeline import cli
from pipeline.documents import card

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "deploy" / "samples"
QUESTION = 'The "quick"\tbrown fox \\ löwe'
HEADERS, JAVA = "QWEN_ONNX_GENAI_HEADERS", "QWEN_ONNX_GENAI_JAVA"
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


def _runtime() -> str:
    """ONNX Runtime's library in its wheel, which the one of onnxruntime-genai looks for in ``ORT_LIB_PATH``."""
    return str(next((_folder("onnxruntime") / "capi").glob("libonnxruntime.so.*")))


@pytest.fixture(scope="module")
def compiler() -> Callable[[Path, Path], Path]:
    """Compiles a source in C++ against the library of the wheel, as the first lines of chat.cpp say."""
    program, headers = shutil.which("g++"), Path(os.environ.get(HEADERS, ""))
    if not program:
        pytest.skip("there is no g++")
    if not (headers / "ort_genai.h").is_file():
        pytest.skip(f"the wheels have no headers: let {HEADERS} name the folder include/ of a release")
    genai = _folder("onnxruntime_genai")
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-isystem", headers, f"-Wl,-rpath,{genai}"]

    def compile_source(source: Path, out: Path) -> Path:
        subprocess.run([program, *options, source, genai / "libonnxruntime-genai.so", "-o", out], check=True)
        return out

    return compile_source


@pytest.fixture(scope="module")
def compiled(compiler: Callable[[Path, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """chat.cpp."""
    program = compiler(SAMPLES / "chat.cpp", tmp_path_factory.mktemp("chat") / "chat")
    return lambda package, question: _said(program, package, question, ORT_LIB_PATH=_runtime())


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


CARD_QUESTION = "Write a haiku about ONNX."


def _of_card(language: str, package: Path) -> str:
    """The program in a language that a model card shows, for a package."""
    [program] = re.findall(rf"```{language}\n(.*?)```", card._languages({}, plugin=False), re.DOTALL)
    return str(program).replace('"DIR"', json.dumps(str(package)))


@pytest.mark.slow
def test_what_a_card_shows_in_cpp_compiles_and_answers_so_too(
    compiler: Callable[[Path, Path], Path], tiny_package: Path, tmp_path: Path
) -> None:
    (tmp_path / "card.cpp").write_text(_of_card("cpp", tiny_package), encoding="utf-8")
    program = compiler(tmp_path / "card.cpp", tmp_path / "card")
    assert _said(program, ORT_LIB_PATH=_runtime()) == _python(tiny_package, CARD_QUESTION)


@pytest.mark.slow
def test_what_a_card_shows_in_java_compiles_and_answers_so_too(tiny_package: Path, tmp_path: Path) -> None:
    classes = os.environ.get(JAVA, "")
    if not shutil.which("javac") or not classes:
        pytest.skip(f"no compiler for Java, or no {JAVA}: let it name onnxruntime-genai's jar")
    imports, _, body = _of_card("java", tiny_package).partition("\n")
    main = f"public class Card {{ public static void main(String[] words) throws Exception {{{body}}} }}"
    (tmp_path / "Card.java").write_text(f"{imports}\n{main}\n", encoding="utf-8")
    subprocess.run(["javac", "-cp", classes, "-d", tmp_path, tmp_path / "Card.java"], check=True)
    options = ["-Dstdout.encoding=UTF-8", f"-Donnxruntime-genai.native.onnxruntime.path={_runtime()}"]
    where = f"{classes}{os.pathsep}{tmp_path}"
    answer = _said("java", *options, "-cp", where, "Card", ORT_LIB_PATH=_runtime())
    assert answer == _python(tiny_package, CARD_QUESTION)


@pytest.mark.real
def test_the_samples_agree_on_the_default_package(node: Ask) -> None:
    question = "What is the capital of France? One word."
    assert _python(REAL, question) == node(REAL, question) == "Paris"


@pytest.mark.real
def test_the_sample_in_cpp_agrees_on_the_default_package(compiled: Ask) -> None:
    assert compiled(REAL, "What is the capital of France? One word.") == "Paris"


def _followed(package: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed while the README of a package was followed."""
    code = handoff.main(package)
    said = capsys.readouterr().out
    if code and "No matching distribution" in said:
        pytest.skip("no package index can be reached")
    assert code == 0, said
    return said


@pytest.mark.slow
def test_a_card_followed_to_the_letter_in_an_environment_with_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = ROOT / "tests" / "fixtures" / "packages" / "signable"
    titles = [title for title, _ in handoff.steps((package / "README.md").read_text(encoding="utf-8"))]
    assert [title.split()[0] for title in titles] == ["pip", "python", "the"]
    said = _followed(package, capsys)
    assert "replay" in said
    assert all(title in said for title in titles)


@pytest.mark.real
def test_the_default_package_alone_is_verified_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ONNX" in _followed(REAL, capsys).split("the program in Python")[-1].upper()


def test_no_language_shows_the_last_token_of_the_sequence_after_the_end() -> None:
    """The end is no part of the sequence: its last token would be shown twice."""
    shown = card._languages({}, plugin=False)
    texts = [shown, *(path.read_text(encoding="utf-8") for path in SAMPLES.glob("chat.*"))]
    assert len(texts) == 5
    for text in texts:
        assert not any(word in text for word in ("[^1]", "GetSequenceData", "getLastTokenInSequence"))
    assert shown.count("GetNextTokens()[0]") == 2
