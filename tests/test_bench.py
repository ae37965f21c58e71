"""Benchmarks: the same work for all, medians and ratios that are what they say, and peers that are honestly absent."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from builds import tiny_recipe
from test_gguf import _write as write_gguf

from pipeline import bench_loop, cli
from pipeline.artifact import Manifest
from pipeline.bench import (
    compare as bench,
    peers,
    processes as bench_process,
    quality as bench_quality,
    run as bench_run,
)
from pipeline.bench.compare import Settings
from pipeline.bench.peers import Absent, Subject
from pipeline.builds.store import Store
from pipeline.errors import GateError, PackageError, ResourceError, StageError, UsageError
from pipeline.export import exporter

ROOT = Path(__file__).parent.parent
LLAMACPP = Path(os.environ.get(peers.VARIABLE) or ROOT / peers.DEFAULT)
with_llamacpp = pytest.mark.skipif(
    not (LLAMACPP / "bin" / "python").is_file(), reason=f"there is no environment for llama.cpp: make {peers.DEFAULT}"
)
FIGURES = ("prefill_8", "prefill_24", "decode_4", "decode_40", *bench.SCALARS)


class Diary:
    """An engine that writes down what it is asked for, and holds it to the rules of the loop."""

    vocabulary, context_length = 512, 4096

    def __init__(self) -> None:
        self.room, self.ids, self.fed = 0, list[int](), list[tuple[int, list[int]]]()

    def start(self, length: int) -> None:
        self.room, self.ids = length, []

    def feed(self, ids: Sequence[int]) -> None:
        self.fed.append((len(self.ids), list(ids)))
        self.ids += ids
        assert len(self.ids) <= self.room
        assert all(0 <= token < self.vocabulary for token in ids)

    def rewind(self, length: int) -> None:
        assert length <= len(self.ids)
        del self.ids[length:]

    def next_token(self) -> int:
        return 0

    def logits(self) -> bytes:
        return bytes(4 * self.vocabulary)


@pytest.mark.parametrize(
    ("prefill", "decode"), [((128, 512, 2048), (16, 512, 1500)), ((8,), (40, 4)), ((1,), (1,)), ((9, 5), (5, 20))]
)
def test_every_length_is_read_and_every_depth_is_decoded(prefill: tuple[int, ...], decode: tuple[int, ...]) -> None:
    engine = Diary()
    found = bench_loop.time_run(engine, prefill, decode)
    assert list(found["prefill"]) == [str(length) for length in sorted(prefill)]
    assert list(found["decode"]) == [str(depth) for depth in sorted(decode)]
    assert min(*found["prefill"].values(), *found["decode"].values(), found["time_to_first_token"]) > 0
    for length in prefill:
        assert any(at == 0 and len(ids) == length for at, ids in engine.fed)
    for depth in decode:
        answer = [at for at, ids in engine.fed if len(ids) == 1 and depth <= at < depth + bench_loop.DECODED]
        assert set(answer) == set(range(depth, depth + bench_loop.DECODED))
    assert engine.room <= bench_loop.room(prefill, decode)
    # Whatever is at a place is the same token: all that was fed is one text, read again and again.
    text: dict[int, set[int]] = {}
    for at, ids in engine.fed:
        for index, token in enumerate(ids):
            text.setdefault(at + index, set()).add(token)
    assert all(len(tokens) == 1 for tokens in text.values())


def test_what_others_compute_is_noticed_and_what_the_runs_compute_is_not_theirs() -> None:
    others, own = bench.Others(), bench.Others._now()[2]
    code = "import time\nwhile time.process_time() < 0.6: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as other:
        time.sleep(1.5)
        busy = others.cores()
        assert bench.Others._now()[2] - own < 0.3  # it has not ended: whose it is shows then
        other.communicate(b"\n")
    assert busy > 0.1
    assert bench.Others._now()[2] - own > 0.5


def test_peak_memory_is_that_of_the_run_and_not_of_what_started_it() -> None:
    ballast = b"x" * 300_000_000
    code = "from pipeline import bench_loop; kept = b'x' * 50_000_000; print(bench_loop.peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 50_000_000 < int(done.stdout) < len(ballast) / 2


def _run(speed: float) -> dict[str, Any]:
    return {
        "prefill": {"8": speed, "24": 2 * speed},
        "decode": {"4": 3 * speed, "40": 4 * speed},
        "time_to_first_token": 1 / speed,
        "load": 2 / speed,
        "peak_memory": int(1000 * speed),
    }


def test_figures_are_medians_and_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    for name, size in (("a", 7), ("b", 11)):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_bytes(bytes(size))
    subjects = [Subject(name, kind, "1", tmp_path / name) for name, kind in (("a", "package"), ("b", "peer"))]
    # The machine was twice as slow in the second round; the ratio of medians would be 2.5.
    runs = {"a": [_run(speed) for speed in (10.0, 5.0, 12.0)], "b": [_run(speed) for speed in (5.0, 2.5, 4.0)]}
    quality = {"b": {"mean_kl": 0.5, "perplexity_ratio": 1.25}}
    found = bench.document(subjects, runs, Settings(3, (8, 24), (4, 40), 2), quality, {"c": "it is not here"})
    assert list(found) == ["schema_version", "machine", "rounds", "subjects", "absent"]
    assert (found["schema_version"], found["rounds"], found["machine"]["threads"]) == (1, 3, 2)
    first, second = found["subjects"]
    assert (first["name"], first["kind"], first["bytes"], first["ratios"]) == ("a", "package", 7, {})
    assert (second["kind"], second["bytes"], second["version"]) == ("peer", 11, "1")
    assert (first["prefill"], first["decode"]) == ({"8": 10.0, "24": 20.0}, {"4": 30.0, "40": 40.0})
    assert (second["load"], second["peak_memory"], second["time_to_first_token"]) == (0.5, 4000, 0.25)
    assert (first["mean_kl"], first["perplexity_ratio"]) == (None, None)
    assert (second["mean_kl"], second["perplexity_ratio"]) == (0.5, 1.25)
    assert list(second["ratios"]) == list(FIGURES)
    assert second["ratios"]["prefill_8"] == second["ratios"]["peak_memory"] == 2.0
    assert second["ratios"]["load"] == 0.5
    assert found["absent"] == [{"name": "c", "why": "it is not here"}]


def test_a_document_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bench.json"
    bench.write({"schema_version": 1}, path)
    with pytest.raises(TypeError):
        bench.write({"schema_version": object()}, path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot be written"):
        bench.write({}, tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.bench.json", "folder"]
    assert json.loads(path.read_bytes()) == {"schema_version": 1}


@pytest.mark.parametrize("place", ["", "none/a.json"])
def test_a_place_that_cannot_be_written_is_refused_at_once(place: str, tmp_path: Path) -> None:
    bench.check_place(tmp_path / "a.json")
    with pytest.raises(UsageError, match="--out"):
        bench.check_place(tmp_path / place)


PROCESSES = {
    "print('{\"a\": 1}')": None,
    "pass": StageError("x failed", why="it ended with exit code 0"),
    "print('{\"a\"', end='')": StageError("x failed", why="it ended with exit code 0"),
    "raise ValueError('broken')": StageError("x failed", why="ValueError: broken"),
    "import os; os.kill(os.getpid(), 9)": ResourceError("x was killed", why="most likely for want of memory"),
    "import sys, json; print('noise', file=sys.stderr); print(json.dumps(json.load(sys.stdin)), file=sys.stderr); "
    "sys.exit(8)": GateError("far away"),
}


@pytest.mark.parametrize("code", PROCESSES)
def test_a_process_that_fails_says_why(code: str) -> None:
    job, wanted = GateError("far away").as_dict(), PROCESSES[code]
    if wanted is None:
        assert bench_process.call([sys.executable, "-c", code], job, "x", bench_process.one_object) == {"a": 1}
        return
    with pytest.raises(type(wanted)) as caught:
        bench_process.call([sys.executable, "-c", code], job, "x", bench_process.one_object)
    assert (caught.value.what, caught.value.why) == (wanted.what, wanted.why)


def test_what_cannot_be_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "nowhere", "--against", "vllm"]) == 2
    assert "known: llama.cpp, llama.cpp-q4_k_m, plain-olive, torch, torch-bfloat16" in capsys.readouterr().err
    assert cli.main(["bench", "nowhere", "--out", str(tmp_path)]) == 2
    for text in ("0", "8,", "8,x", "-1"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "nowhere", f"--prefill={text}"])


def _manifest(sources: list[dict[str, Any]], sha256: str = "0" * 64, **checkpoint: Any) -> Manifest:
    return Manifest(
        {
            "name": "tiny",
            "steps": {},
            "recipe": {"checkpoint": {"sources": sources, **checkpoint}},
            "source": {
                "locations": [source for source in sources if source["type"] != "local"],
                "sha256": sha256,
                "license": "Apache-2.0",
                "base_model": "tiny",
            },
        }
    )


def test_a_peer_without_its_environment_is_absent_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.VARIABLE, str(tmp_path / "none"))
    store = Store(tmp_path / "store")
    ours = {name for name in peers.PEERS if name.startswith("llama.cpp")}
    for name in ours:
        with pytest.raises(Absent, match=r"there is no environment for llama\.cpp at .*none\. `make \.venv-llamacpp`"):
            peers.PEERS[name](_manifest([]), store, print)
    for name in set(peers.PEERS) - ours:
        with pytest.raises(Absent, match="the checkpoint of tiny is not in the store"):
            peers.PEERS[name](_manifest([]), store, print)


@pytest.mark.parametrize("version", ["", "0.0.1"])
def test_another_llamacpp_than_the_pinned_one_is_no_peer(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    if version:
        info = tmp_path / "lib" / "python3.11" / "site-packages" / f"llama_cpp_python-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: llama_cpp_python\nVersion: {version}\n")
    monkeypatch.setenv(peers.VARIABLE, str(tmp_path))
    with pytest.raises(Absent, match=f"has llama-cpp-python {version or 'not'} installed, not .*`make "):
        peers.PEERS["llama.cpp"](_manifest([]), Store(tmp_path / "store"), print)


LOCAL = {"type": "local", "path": "model.gguf"}
HUB = {"type": "hub", "repo": "a/b", "revision": "0" * 40}
ELSEWHERE = {
    "an adapter": (_manifest([LOCAL], adapter="lora"), Absent, "has an adapter merged in"),
    "a directory": (_manifest([{"type": "local", "path": "model"}]), Absent, "was not built from one"),
    "a repository's directory": (_manifest([HUB]), Absent, "was not built from one"),
    "a local file": (_manifest([LOCAL]), Absent, r"Copy it to .*downloads.0{64}\.gguf"),
    "a source of no kind": (_manifest([{**HUB, "file": "x", "revision": "-"}]), PackageError, "sources cannot be"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_package_that_no_gguf_file_stands_for(case: str, tmp_path: Path) -> None:
    manifest, kind, text = ELSEWHERE[case]
    with pytest.raises(kind, match=text):
        peers._gguf(manifest, Store(tmp_path), print)


@pytest.mark.parametrize("sources", [[LOCAL], [{**HUB, "file": "model.gguf"}]])
def test_the_gguf_file_is_the_one_with_the_digest(sources: list[dict[str, Any]], tmp_path: Path) -> None:
    store = Store(tmp_path)
    content = b"weights"
    kept = tmp_path / "downloads" / f"{hashlib.sha256(content).hexdigest()}.gguf"
    manifest = _manifest(sources, kept.stem)
    kept.write_bytes(content)
    assert peers._gguf(manifest, store, print) == kept
    if sources == [LOCAL]:
        kept.write_bytes(b"other weights")
        with pytest.raises(Absent, match="Copy it to"):
            peers._gguf(manifest, store, print)


def _project(folder: Path, checkpoint: Path) -> list[str]:
    """Build a package of ``checkpoint``; returns what a benchmark of it is asked with."""
    recipe = tiny_recipe(checkpoint, gates={"mean_kl": 0.5, "top1": 0.7, "perplexity_ratio": 1.5, "greedy": 0.3})
    path = folder / "tiny" / "cpu.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert cli.main(["build", str(path), "--store", str(folder / "store"), "--out", str(folder)]) == 0
    package, store = str(folder / "tiny-cpu"), str(folder / "store")
    lengths = ["--prefill", "24,8", "--decode", "40,4", "--rounds", "1", "--threads", "1"]
    return ["bench", package, "--store", store, *lengths]


@pytest.fixture(scope="module")
def command(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return _project(tmp_path_factory.mktemp("bench"), checkpoint_of("qwen2"))


@pytest.mark.slow
def test_a_package_is_timed_against_every_peer_that_is_here(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(peers.VARIABLE, str(tmp_path / "none"))
    names = ["plain-olive", "torch", "torch-bfloat16", "llama.cpp"]
    against = [part for name in names for part in ("--against", name)]
    assert cli.main([*command, *against, "--quality"]) == 0
    shown = capsys.readouterr()
    package = Path(command[1])
    found = json.loads(package.with_name("tiny-cpu.bench.json").read_bytes())
    assert f"written to {package}.bench.json" in shown.out
    assert "absent: llama.cpp: there is no environment" in shown.out
    assert [entry["name"] for entry in found["absent"]] == ["llama.cpp"]
    assert [entry["name"] for entry in found["subjects"]] == ["tiny-cpu", *names[:3]]
    for entry in found["subjects"]:
        assert list(entry["prefill"]) == ["8", "24"]
        assert list(entry["decode"]) == ["4", "40"]
        assert list(entry["ratios"]) == ([] if entry is found["subjects"][0] else list(FIGURES))
        assert min(entry["bytes"], entry["peak_memory"] / 1e6, entry["load"], entry["time_to_first_token"]) > 0
    own, olive, torch, bfloat = found["subjects"]
    assert olive["ratios"]["prefill_24"] == pytest.approx(own["prefill"]["24"] / olive["prefill"]["24"], rel=1e-3)
    assert own["bytes"] == sum(path.stat().st_size for path in package.iterdir())
    assert torch["mean_kl"] < 1e-6 < bfloat["mean_kl"] < min(own["mean_kl"], olive["mean_kl"])
    assert torch["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
    validated = json.loads((package / "validation.json").read_bytes())["decode"]
    assert own["mean_kl"] == pytest.approx(validated["mean_kl"], abs=1e-5)
    assert own["perplexity_ratio"] == pytest.approx(validated["perplexity_ratio"], abs=1e-5)


@pytest.mark.slow
def test_what_is_written_for_machines_is_what_is_kept(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "else.json"
    assert cli.main([*command, "--json", "--trust", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_bytes())
    (only,) = found["subjects"]
    assert (only["mean_kl"], only["perplexity_ratio"], only["ratios"]) == (None, None, {})
    assert cli.main([*command, "--trust", "--prefill", "448"]) == 2
    assert "512 tokens do not fit" in capsys.readouterr().err
    assert cli.main([*command, "--trust", "--prefill", "447", "--out", str(out)]) == 0


@pytest.mark.slow
def test_quality_needs_one_reference(command: list[str], tmp_path: Path) -> None:
    package = Path(command[1])
    with pytest.raises(UsageError, match="nothing to measure quality against"):
        bench_quality.check([package], Store(tmp_path / "empty"))
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((package / "manifest.json").read_bytes())
    manifest["steps"]["checkpoint"]["digest"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="different checkpoints"):
        bench_quality.check([package, other], Store(tmp_path / "empty"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what optimum and torch say when they export
@pytest.mark.parametrize("kind", ["genai", "optimum", "torch-float32"])
def test_an_engine_forgets_what_it_is_told_to(kind: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Depths are reached by rewinding: what follows must be computed as if nothing had been there."""
    folder = checkpoint_of("qwen2")
    if kind != "torch-float32":
        exporter.EXPORTERS[kind](folder, tmp_path, {}, "CPUExecutionProvider", "float32")
        folder, kind = tmp_path, "genai"
    engine = bench_run._ENGINES[kind](folder, 1)
    ids = [5, 17, 40, 8, 9, 200, 30, 31]

    def fed(before: Sequence[int]) -> npt.NDArray[np.float32]:
        engine.start(64)
        engine.feed([*ids[:4], *before])
        if before:
            engine.rewind(4)
        for token in ids[4:]:
            engine.feed([token])
        return np.frombuffer(engine.logits(), np.float32)

    assert len(fed([])) == engine.vocabulary
    np.testing.assert_allclose(fed([7] * 30), fed([]), atol=1e-4)


@pytest.mark.slow
@with_llamacpp
def test_llamacpp_runs_the_file_that_the_package_was_built_from(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(peers.VARIABLE, str(LLAMACPP))
    file = write_gguf(checkpoint_of("qwen2"), tmp_path / "model.gguf")
    command = [*_project(tmp_path, file), "--against", "llama.cpp", "--quality"]
    assert cli.main(command) == 0
    kept = tmp_path / "store" / "downloads" / f"{hashlib.sha256(file.read_bytes()).hexdigest()}.gguf"
    (absent,) = json.loads((tmp_path / "tiny-cpu.bench.json").read_bytes())["absent"]
    assert f"Copy it to {kept}" in absent["why"]
    kept.write_bytes(file.read_bytes())
    assert cli.main(command) == 0
    found = json.loads((tmp_path / "tiny-cpu.bench.json").read_bytes())
    own, llama = found["subjects"]
    assert (llama["name"], llama["bytes"], found["absent"]) == ("llama.cpp", file.stat().st_size, [])
    # The same float32 weights; what differs is that llama.cpp keeps keys and values in float16.
    assert llama["mean_kl"] < 1e-3 < own["mean_kl"]
    assert min(llama["prefill"]["24"], llama["decode"]["40"]) > 0
