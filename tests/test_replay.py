"""The golden replay tells a device that computes what was validated from one that does not, with the runtime alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gpu import BASES, run, steps_of

from pipeline import cli
from pipeline.artifact import GOLDEN, MANIFEST, Artifact
from pipeline.facts import machine
from pipeline.facts.target import TARGETS
from pipeline.graph import edits as graph
from pipeline.graph.external_data import read_tensor
from pipeline.package import replay
from pipeline.runtime import golden, session as sessions

pytestmark = [
    # What the exporter says of itself.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

GOOD = {"name": "a", "prompt": [1, 2], "tokens": [3, 4], "logprobs": [-0.5, -1]}


def lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_a_transcript_is_read_as_it_was_written(tmp_path: Path) -> None:
    silent = {"name": "an answer that ended at once", "prompt": [1], "tokens": [], "logprobs": []}
    path = tmp_path / GOLDEN
    path.write_text(lines(GOOD, silent), encoding="utf-8")
    assert replay.read(path) == [GOOD, silent]


# Text of a file, and what is said of it (for what JSON or Python says themselves: the kind of error).
MALFORMED: dict[str, tuple[str, str]] = {
    "nothing": ("", "it has no tokens"),
    "no tokens at all": (lines({**GOOD, "tokens": [], "logprobs": []}), "it has no tokens"),
    "no JSON": ("{", "Expecting property name"),
    "cut off": (lines(GOOD)[:-20], "Unterminated string"),
    "one good line, one bad": (lines(GOOD) + "x\n", "Expecting value"),
    "no object": ("[1]\n", "TypeError"),
    "no log-probabilities": (lines({"prompt": [1], "tokens": [2]}), "logprobs"),
    "too few of them": (lines({**GOOD, "logprobs": [-0.5]}), "one log-probability a token"),
    "text for one of them": (lines({**GOOD, "logprobs": [-0.5, "-1"]}), "one log-probability a token"),
    "an empty prompt": (lines({**GOOD, "prompt": []}), "a prompt is empty"),
    "text for a prompt": (lines({**GOOD, "prompt": "hello"}), "token ids are whole numbers"),
    "a decimal id": (lines({**GOOD, "tokens": [3, 4.0]}), "token ids are whole numbers"),
    "a flag for an id": (lines({**GOOD, "prompt": [True]}), "token ids are whole numbers"),
    "nothing for tokens": (lines({**GOOD, "tokens": None}), "token ids are whole numbers"),
    "an image that is no PNG": (lines({**GOOD, "images": ["R0lGODlh"]}), "an image is no PNG"),
    "an image that is no base64": (lines({**GOOD, "images": ["?"]}), "Error"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_transcript_is_refused(case: str, tmp_path: Path) -> None:
    text, said = MALFORMED[case]
    path = tmp_path / GOLDEN
    path.write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, LookupError, TypeError)) as caught:
        replay.read(path)
    assert said in repr(caught.value)


TOLERANCE = {"top1": 0.9, "logprob": 0.15}


@pytest.mark.parametrize(
    ("top1", "logprob", "said"),
    [
        (1.0, 0.0, ()),
        (0.9, 0.15, ()),
        (0.8999, 0.0, ("90.0% of golden tokens are ranked first, at least 90% should be",)),
        (1.0, 0.151, ("differ by 0.151 nats, at most 0.15 are expected",)),
        (0.5, 2.0, ("50.0% of golden tokens", "differ by 2.000 nats")),
        (1.0, math.inf, ("differ by inf nats",)),
        (1.0, math.nan, ("differ by nan nats",)),
    ],
)
def test_a_verdict_names_what_is_out_of_tolerance(top1: float, logprob: float, said: tuple[str, ...]) -> None:
    found = replay.verdict({"top1": top1, "logprob": logprob}, TOLERANCE)
    assert len(found.split("; ")) == len(said) or not (found or said)
    assert all(part in found for part in said)


def test_figures_are_over_all_tokens_and_a_broken_device_is_infinitely_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer with a token that goes the other way, one that is the same; then logits that are no numbers."""
    entries = [{**GOOD, "tokens": [3, 4, 5], "logprobs": [-1.0, -1.0, -1.0]}, {**GOOD, "tokens": [6], "logprobs": [-1]}]
    answers = iter([([3, 9, 5], [-1.0, -1.4, -1.0]), ([6], [-1.0])])
    monkeypatch.setattr(replay, "scores", lambda *_: next(answers))
    assert replay.replay(None, entries) == {"prompts": 2, "identical": 1, "tokens": 4, "top1": 0.75, "logprob": 0.1}
    monkeypatch.setattr(replay, "scores", lambda _, __, tokens, *___: (list(tokens), [math.nan] * len(tokens)))
    found = replay.replay(None, entries)
    assert found["logprob"] == math.inf
    assert replay.verdict(found, TOLERANCE)


@pytest.fixture(scope="module")
def packages(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole packages of one tiny checkpoint: 4 bits for the processor, float16 for CUDA; do not write into them."""
    made = {}
    for name, scheme in (("cpu", "min_error"), ("cuda", "none")):
        folder = tmp_path_factory.mktemp("replay") / name
        folder.mkdir()
        validate = {
            "windows": 4,
            "window_tokens": 32,
            "greedy_tokens": 8,
            "gates": {"mean_kl": 0.3, "p99_kl": 5.0, "top1": 0.8, "perplexity_ratio": 1.5},
        }
        # The tiny checkpoint's embedding is not its head, and is narrower than the base's blocks.
        narrow = {"head": {"bits": 8, "block_size": 64, "symmetric": True}, "embedding": "float", "overrides": []}
        quantize = {"algorithm": scheme, **(narrow if scheme != "none" else {})}
        artifacts: dict[str, Artifact] = {}
        for step in steps_of(folder, checkpoint_of("qwen2"), name, scheme, validate=validate, quantize=quantize):
            artifacts[step.stage] = run(step, artifacts, folder / step.stage)
        made[name] = artifacts["package"].path
    assert (BASES / "cpu-int4.yaml").is_file()
    return made


def script(package: Path, *arguments: str, block: Sequence[str] = (), cwd: Path | None = None) -> tuple[int, str]:
    """The exit code of the package's script and all that it wrote, where nothing of the build can be imported."""
    blocked = ["pipeline", "torch", "transformers", "olive", "onnx", "pydantic", *block]
    # With -I neither this folder nor any setting of Python leads to the project.
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-I", "-c", code, str(package / "replay.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd or package, env=environment)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def lines_of(package: Path) -> list[dict[str, Any]]:
    return replay.read(package / GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_same_machine_gives_the_same_answers_with_the_same_probabilities(
    name: str, packages: dict[str, Path]
) -> None:
    package = packages[name]
    entries = lines_of(package)
    assert sum(len(entry["tokens"]) for entry in entries) > 20
    found = golden.replay(package, provider="cpu")
    assert found["provider"] == "cpu"
    assert found["identical"] == found["prompts"] == len(entries)
    assert found["tokens"] == sum(len(entry["tokens"]) for entry in entries)
    assert found["top1"] == 1.0
    assert found["logprob"] < 1e-3
    assert json.loads((package / MANIFEST).read_bytes())["replay"] == {
        "top1": TARGETS[name].replay.top1,
        "logprob": TARGETS[name].replay.logprob,
    }


@pytest.mark.slow
def test_fed_tokens_have_the_probabilities_of_the_whole_text(packages: dict[str, Path]) -> None:
    """Token by token or from logits of every position at once: the same figure, computed in another way."""
    from pipeline.fidelity import metrics
    from pipeline.runtime import generate

    opened = sessions.open_package(packages["cuda"], provider="cpu")
    prompt, tokens = lines_of(packages["cuda"])[0]["prompt"], [7, 300, 42, 42, 511]  # which it would not say
    first, logprobs = replay.scores(opened.model, prompt, tokens)
    rows = metrics.log_softmax(generate.decode_logits(opened, [*prompt, *tokens]))[len(prompt) - 1 : -1]
    assert first == rows.argmax(axis=1).tolist()
    assert max(logprobs) < -1
    np.testing.assert_allclose(logprobs, rows[np.arange(len(tokens)), tokens], atol=0.05)  # in float16

    again = sessions.open_package(packages["cuda"], provider="cpu").model
    found = replay.replay(again, [{"prompt": prompt, "tokens": tokens, "logprobs": logprobs}])
    assert found["logprob"] < 1e-3
    assert found["identical"] == 0
    assert found["top1"] < 0.5


@pytest.mark.slow
def test_the_script_needs_the_runtime_and_nothing_of_the_project(packages: dict[str, Path], tmp_path: Path) -> None:
    assert (packages["cpu"] / "replay.py").read_bytes() == Path(replay.__file__).read_bytes()
    for cwd in (packages["cpu"], tmp_path):
        code, text = script(packages["cpu"], cwd=cwd)
        assert code == 0, text
        assert "PASS: this device computes what was validated" in text
        assert "100.0% of" in text
    code, text = script(packages["cpu"], str(packages["cpu"]), "--cpu", cwd=tmp_path)
    assert code == 0, text


@pytest.mark.slow
def test_without_the_runtime_the_script_says_so(packages: dict[str, Path]) -> None:
    code, text = script(packages["cpu"], block=["onnxruntime_genai"])
    assert code == replay.MISSING == 10
    assert "onnxruntime_genai" in text
    assert "next: install the runtime that README.md names" in text


@pytest.mark.slow
def test_a_package_for_other_hardware_says_so_and_runs_on_the_processor_when_asked(
    packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    package = packages["cuda"]
    if machine.execution(TARGETS["cuda"]).provider == TARGETS["cuda"].provider:
        pytest.skip("CUDA is there")
    code, text = script(package)
    assert code == 10
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 2
    code, text = script(package, "--cpu")
    assert code == 0, text
    assert "PASS" in text

    assert cli.main(["verify", str(package), "--replay"]) == 10
    shown = capsys.readouterr()
    assert "is for the provider cuda, which is not to be had here" in shown.err
    assert "pip install onnxruntime-genai-cuda==" in shown.err
    assert cli.main(["verify", str(package), "--replay", "--provider", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["replay"]
    assert (facts["provider"], facts["top1"]) == ("cpu", 1.0)


@pytest.mark.slow
def test_what_was_measured_elsewhere_is_labelled_so_wherever_it_is_told(packages: dict[str, Path]) -> None:
    from pipeline.builds import report

    here, row = machine.execution(TARGETS["cuda"]), TARGETS["cuda"]
    if here.provider == row.provider:
        pytest.skip("CUDA is there")
    package = packages["cuda"]
    candidate = json.loads((package / "validation.json").read_bytes())["candidate"]
    assert (candidate["provider"], candidate["executed_on"]) == (row.provider, here.provider)
    assert candidate["not_executed_on_target"] == here.missing
    target = json.loads((package / MANIFEST).read_bytes())["target"]
    assert (target["provider"], target["validated_on"]) == (row.provider, here.provider)
    assert f"NOT on {row.provider}: {here.missing}" in report.package(package)
    card = " ".join((package / "README.md").read_text(encoding="utf-8").split())
    assert f"not on {row.provider}".casefold() in card.casefold()
    own = packages["cpu"]
    assert "NOT on" not in report.package(own) + (own / "README.md").read_text(encoding="utf-8")


def perturbed(package: Path, folder: Path, factor: float) -> Path:
    """A copy whose quantization scales of one projection are too large, as where a kernel reads them wrong."""
    shutil.copytree(package, folder)
    model = graph.load(folder / "model.onnx")
    found = [
        tensor for tensor in model.graph.initializer if tensor.name.endswith("_scales") and "down_proj" in tensor.name
    ]
    assert len(found) == 2
    for tensor in found:
        wrong = read_tensor(tensor, folder) * np.float32(factor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / place["location"]).open("r+b") as file:
            file.seek(int(place["offset"]))
            file.write(wrong.tobytes())
    return folder


@pytest.mark.slow
def test_a_device_that_reads_scales_wrong_is_found_out_and_one_that_rounds_otherwise_is_not(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    code, text = script(perturbed(packages["cpu"], tmp_path / "wrong", 3.0))
    assert code == replay.DIFFERS == 9
    assert "FAIL: " in text
    assert "nats, at most 0.15 are expected" in text
    code, text = script(perturbed(packages["cpu"], tmp_path / "rounded", 1.001))
    assert code == 0, text


@pytest.mark.slow
@pytest.mark.parametrize("name", [GOLDEN, MANIFEST])
def test_a_damaged_package_is_not_blamed_on_the_runtime(name: str, packages: dict[str, Path], tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(packages["cpu"], package)
    (package / name).write_text("{", encoding="utf-8")
    code, text = script(package)
    assert code == 9
    assert "next: fetch the package again: it is damaged" in text
