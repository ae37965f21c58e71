"""Builds that are spread over machines: what a workflow lists, what a single step refuses, and whole runs of both."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline import cli
from pipeline.artifact import Estimate, Step
from pipeline.builds import plan, runner, workflow
from pipeline.builds.report import Lines
from pipeline.builds.store import Store
from pipeline.errors import GateError, StoreError, UsageError
from pipeline.facts import recipe
from pipeline.package import verify

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "qwen2.5-coder-0.5b-instruct"
SNAKEMAKE = ROOT / ".venv-snakemake" / "bin" / "snakemake"
TARGETS, MODELS = ("cpu", "cuda", "webgpu"), ("qwen2", "qwen3")
GATES = {"mean_kl": 0.5, "top1": 0.7, "perplexity_ratio": 2.0, "greedy": 0.3}


def _plans(*names: str) -> dict[str, tuple[Path, list[Step]]]:
    loaded = [recipe.load(RECIPES / f"{name}.yaml") for name in names]
    return {item.name: (item.path, plan.make(item)) for item in loaded}


def test_a_step_that_recipes_share_is_listed_once_and_after_its_inputs(tmp_path: Path) -> None:
    plans = _plans("cpu-int4", "cpu-int8", "cuda-int4")
    keys = {step.key for _, steps in plans.values() for step in steps}
    jobs = workflow.jobs(plans, tmp_path / "store", tmp_path / "out")
    assert {job.key for job in jobs} == keys
    # One checkpoint for all; one export for both recipes for processors.
    assert Counter(job.stage for job in jobs) == {
        "checkpoint": 1,
        "export": 2,
        "quantize": 3,
        "validate": 3,
        "package": 3,
    }
    assert len({job.name for job in jobs}) == len({job.mark for job in jobs}) == len(jobs)
    before: set[str] = set()
    for job in jobs:
        assert set(job.inputs) <= before
        before.add(job.mark)


def test_resources_are_the_estimates_of_the_plan(tmp_path: Path) -> None:
    plans = _plans("cpu-int4")
    [(_, steps)] = plans.values()
    for step, job in zip(steps, workflow.jobs(plans, tmp_path, tmp_path), strict=True):
        assert (job.stage, job.key) == (step.stage, step.key)
        assert job.mem_mb == math.ceil(step.estimate.memory / 1e6)
        assert job.runtime * 60 >= max(600, 3 * step.estimate.seconds)
        assert ("--out" in job.command) == (job.stage == "package")


def test_a_workflow_is_written_again_when_the_store_has_lost_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "flow", Store(tmp_path / "store")
    command = ["workflow", str(RECIPES / "cpu-int4.yaml"), "--out", str(out), "--store", str(store.root)]
    assert cli.main(command) == 0
    assert "5 steps of 1 recipes, 0 shared, 0 in the store already" in capsys.readouterr().out
    [(_, steps)] = _plans("cpu-int4").values()
    (out / "done").mkdir()
    for step in steps[:2]:
        (out / "done" / workflow.mark(step.stage, step.key)).touch()
    with store.lock(steps[0].key), store.workspace(steps[0]) as files:
        (files / "weights").write_bytes(b"x")
        store.publish(steps[0], files, {})
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "1 in the store already" in said
    assert f"export-{steps[1].key} is no longer in the store, and runs again" in said
    assert (out / "logs").is_dir()
    assert [path.name for path in (out / "done").iterdir()] == [f"checkpoint-{steps[0].key}"]


def test_two_recipes_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [str(RECIPES / "cpu-int4.yaml")] * 2
    assert cli.main(["workflow", *twice, "--out", str(tmp_path), "--store", str(tmp_path / "store")]) == 2
    assert "two recipes are called qwen2.5-coder-0.5b-instruct-cpu-int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export"], ["export cannot run yet: checkpoint is not in the store", "run the step checkpoint first"]),
        (["package"], ["checkpoint, quantize, validate are not in the store"]),
        (["weigh"], ["no step weigh", "checkpoint, export, quantize, validate, package"]),
        (["export", "--out", "."], ["--out is for packages"]),
        (["export", "--key", "0" * 64], ["another step here", "0000000000000000", "constraints.txt"]),
    ],
)
def test_a_step_that_cannot_run_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code = cli.main(["step", str(RECIPES / "cpu-int4.yaml"), *arguments, "--store", str(tmp_path)])
    err = capsys.readouterr().err
    assert code == 2
    assert [word for word in words if word not in err] == []
    assert not any((tmp_path / stage.name).exists() for stage in plan.STAGES)


def _step(stage: str, *inputs: str) -> Step:
    return Step(stage, f"{stage}-key", {}, inputs, {}, Estimate(0, 0, 0))


def _stored(store: Store, step: Step, **facts: object) -> Path:
    with store.lock(step.key), store.workspace(step) as files:
        (files / "weights").write_bytes(b"0123456789")
        return store.publish(step, files, facts).path / "weights"


def test_a_step_never_reads_a_damaged_input(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), [_step("checkpoint"), _step("export", "checkpoint")]
    _stored(store, steps[0]).write_bytes(b"0123456798")
    with pytest.raises(StoreError, match="the stored checkpoint was damaged"):
        runner.make_step(steps, "export", store, Lines())
    with pytest.raises(UsageError, match="checkpoint is not in the store"):
        runner.make_step(steps, "export", store, Lines())


def test_nothing_is_made_of_a_refused_validation(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), [_step("validate"), _step("package", "validate")]
    _stored(store, steps[0], refused=GateError("mean_kl is 3").as_dict())
    for stage in ("validate", "package"):
        with pytest.raises(GateError, match="mean_kl is 3") as refused:
            runner.make_step(steps, stage, store, Lines())
        assert refused.value.where.endswith("validation.json")


# Whole runs.


@dataclass(frozen=True)
class Flow:
    """A workflow over tiny recipes, and where it puts things."""

    root: Path
    recipes: tuple[Path, ...]

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def out(self) -> Path:
        return self.root / "packages"

    @property
    def folder(self) -> Path:
        return self.root / "flow"

    @property
    def keys(self) -> list[str]:
        return [step["key"] for step in json.loads((self.folder / "steps.json").read_bytes())]

    def stored(self) -> set[str]:
        return {entry.key for entry in Store(self.store).entries()}

    def told(self, what: str) -> Counter[str]:
        """How often a line such as ``quantize    done      0123456789ab`` was written, by key."""
        lines = "\n".join(path.read_text(encoding="utf-8") for path in (self.folder / "logs").glob("*.log"))
        return Counter(re.findall(rf"^\w+ +{what} +([0-9a-f]{{12}})", lines, re.MULTILINE))

    def digests(self) -> dict[str, str]:
        """The digests of its packages, each verified."""
        return {path.parent.name: verify.package(path.parent).digest for path in self.out.glob("*/manifest.json")}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[..., Path]) -> tuple[Path, ...]:
    """Recipes of two models for three targets."""
    folder, found = tmp_path_factory.mktemp("recipes"), []
    for model in MODELS:
        for target in TARGETS:
            value = {
                "description": "tiny",
                "target": target,
                "checkpoint": {
                    "sources": [{"type": "local", "path": str(checkpoint_of(model))}],
                    "license": "Apache-2.0",
                    "base_model": "tiny",
                },
                "export": {"exporter": "genai"},
                "quantize": {"algorithm": "min_error", "body": {"bits": 4, "block_size": 32, "symmetric": False}}
                | ({} if target == "cpu" else {"embedding": "float", "accuracy_level": 0}),
                "validate": {"windows": 4, "window_tokens": 32, "greedy_tokens": 8, "gates": GATES},
            }
            path = folder / model / f"{target}-int4.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(value), encoding="utf-8")
            found.append(path)
    return tuple(found)


@pytest.fixture(scope="module")
def plain(recipes: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The same built one after another: the number of steps that ran, and the digests of the packages."""
    flow, made = Flow(tmp_path_factory.mktemp("plain"), recipes), 0
    for path in recipes:
        done = _own("build", str(path), "--store", str(flow.store), "--out", str(flow.out), "--json")
        made += sum(json.loads(line)["event"] == "done" for line in done.splitlines())
    return made, flow.digests()


def _own(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def _slurm() -> Iterator[dict[str, str]]:
    """A Slurm of one node on the loopback interface; yields what programs need to find it."""
    held = 'echo "$SLURM_CONF"; echo "$PATH"; cat > /dev/null'  # until its input is closed
    script = ROOT / "deploy" / "slurm" / "one-node.sh"
    with subprocess.Popen(
        [str(script), "sh", "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            configuration, path = (process.stdout.readline().strip() for _ in range(2))
            assert configuration, "Slurm did not start"
            yield {"SLURM_CONF": configuration, "PATH": path}
        finally:
            process.stdin.close()
            process.wait(60)


@contextlib.contextmanager
def _here() -> Iterator[dict[str, str]]:
    yield {}


@dataclass(frozen=True)
class Place:
    """Where Snakemake runs jobs, and how it is told."""

    options: tuple[str, ...]
    around: Callable[[], contextlib.AbstractContextManager[dict[str, str]]]


PLACES = {
    "local": Place(("--cores", "2", "--resources", "mem_mb=12000"), _here),
    "slurm": Place(
        (
            *("--workflow-profile", "profiles/slurm", "--slurm-no-account", "--slurm-status-command", "squeue"),
            *("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"),
        ),
        _slurm,
    ),
}


def _kill_once(flow: Flow, stage: str, killed: list[int], over: threading.Event) -> None:
    """Kill the first process that runs ``stage``, as a system does that is short of memory."""
    while not over.is_set():
        for log in (flow.store / "logs").glob(f"{stage}-*.log"):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(Path(opened.path) == log for opened in process.open_files()):
                        process.kill()
                        killed.append(process.pid)
                        return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not SNAKEMAKE.is_file(), reason="Snakemake is not installed: make .venv-snakemake")
@pytest.mark.parametrize(
    "where",
    [
        "local",
        pytest.param(
            "slurm", marks=pytest.mark.skipif("QWEN_ONNX_SLURM" not in os.environ, reason="eight minutes: make slurm")
        ),
    ],
)
def test_a_workflow_does_what_the_plain_runner_does_through_a_failure_and_a_kill(
    tmp_path: Path, recipes: tuple[Path, ...], plain: tuple[int, dict[str, str]], where: str
) -> None:
    flow, place = Flow(tmp_path, recipes), PLACES[where]
    folders = ["--out", str(flow.folder), "--packages", str(flow.out), "--store", str(flow.store)]
    _own("workflow", *map(str, recipes), *folders)
    killed: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=_kill_once, args=(flow, "quantize", killed, over), daemon=True)
    with (
        place.around() as variables,
        (tmp_path / "snakemake.log").open("w") as told,
        contextlib.ExitStack() as ended,
    ):
        ended.callback(over.set)

        def snakemake() -> subprocess.Popen[bytes]:
            environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
            command = [str(SNAKEMAKE), *place.options]
            process = subprocess.Popen(command, cwd=flow.folder, env=environment, stdout=told, stderr=told)
            ended.callback(process.kill)
            return process

        def said() -> str:
            return (tmp_path / "snakemake.log").read_text(encoding="utf-8")

        killer.start()
        process = snakemake()
        while not (killed and len(flow.stored()) >= 6):
            assert process.poll() is None, said()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)  # what it has started goes on
        process.wait()
        assert 6 <= len(flow.stored()) < len(flow.keys)
        assert snakemake().wait(1200) == 0, said()
        assert "nothing to be done" not in said().casefold()
        assert snakemake().wait(60) == 0
        assert "nothing to be done" in said().casefold()
    # 2 checkpoints for 6 recipes; each step once, and one of them tried twice.
    assert len(flow.keys) == 2 + 4 * len(recipes)
    assert flow.told("done") == Counter(key[:12] for key in flow.keys)
    assert sorted(flow.told("running").values()) == [1] * (len(flow.keys) - 1) + [2]
    assert flow.stored() == set(flow.keys)
    assert (sum(flow.told("done").values()), flow.digests()) == plain
