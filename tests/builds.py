"""Builds of tiny checkpoints through the real command line, and ways to stop, starve and damage them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline import cli
from pipeline.builds.store import Store

STAGES = ["checkpoint", "export", "quantize", "validate", "package"]
NAME = "tiny-cpu"
# A tiny model loses more in 4 bits than a real one (qwen2 by genai: mean KL 0.02, top-1 0.99 with an 8-bit head).
GATES = {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.5, "greedy": 0.5}
Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Project:
    """A recipe, and where its build puts things."""

    recipe: Path
    store: Path
    out: Path

    @property
    def package(self) -> Path:
        return self.out / NAME

    @property
    def command(self) -> list[str]:
        return ["build", str(self.recipe), "--store", str(self.store), "--out", str(self.out)]

    def stored(self, stage: str) -> list[Path]:
        """The artifacts of a stage, whole or not."""
        return list((self.store / stage).glob("*"))

    def forget(self, *stages: str) -> None:
        for stage in stages:
            shutil.rmtree(self.store / stage)

    def copy(self, folder: Path) -> Project:
        """The same in another folder, to be damaged at will."""
        copy = Project(folder / "tiny" / "cpu.yaml", folder / "store", folder / "out")
        copy.recipe.parent.mkdir(parents=True)
        shutil.copyfile(self.recipe, copy.recipe)
        shutil.copytree(self.store, copy.store)
        shutil.copytree(self.out, copy.out)
        return copy

    def edit(self, section: str, value: Any) -> None:
        """Merge ``value`` into a section of the recipe, or set a plain value."""
        recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        recipe[section] = {**recipe[section], **value} if isinstance(value, dict) else value
        self.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def tiny_recipe(checkpoint: Path, exporter: str = "genai", gates: dict[str, float] = GATES) -> dict[str, Any]:
    """INT4 for processors, of a tiny checkpoint."""
    return {
        "description": "tiny",
        "target": "cpu",
        "checkpoint": {
            "sources": [{"type": "local", "path": str(checkpoint)}],
            "license": "Apache-2.0",
            "base_model": "tiny",
        },
        "export": {"exporter": exporter},
        "quantize": {"algorithm": "min_error", "body": {"bits": 4, "block_size": 16, "symmetric": False}},
        "validate": {"windows": 4, "window_tokens": 32, "greedy_tokens": 8, "gates": gates},
    }


def new_project(folder: Path, checkpoint: Path, exporter: str = "genai") -> Project:
    recipe = tiny_recipe(checkpoint, exporter)
    path = folder / "tiny" / "cpu.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Project(path, folder / "store", folder / "out")


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command; a bug is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def build(project: Project) -> Events:
    """Build with success; returns the events."""
    code, out, err = run(*project.command, "--json")
    assert (code, err) == (0, ""), out
    return [json.loads(line) for line in out.splitlines()]


def stages(events: Events, event: str) -> list[str]:
    return [entry["stage"] for entry in events if entry["event"] == event]


def start(project: Project, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *project.command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # Shells start what they run in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def workers(project: Project) -> list[psutil.Process]:
    """The processes that run a step of this project's store, whoever their parent is: they hold its log open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(Path(opened.path).parent == project.store / "logs" for opened in process.open_files()):
                found.append(process)
    return found


def worker_of(builder: subprocess.Popen[str], project: Project) -> psutil.Process | None:
    """The process that runs a step of ``builder``, stopped where it is: a step of a tiny model ends within a second."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(builder.pid).children(recursive=True):
            if any(Path(opened.path).parent == project.store / "logs" for opened in process.open_files()):
                process.suspend()
                return process
    return None


def until(condition: Callable[[], Any], what: str) -> Any:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if value := condition():
            return value
        time.sleep(0.002)
    return pytest.fail(f"never: {what}")


@contextlib.contextmanager
def stopped_at(project: Project, stage: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A build in a process of its own, and its worker, stopped, at the moment when ``stage`` runs."""
    process = start(project, "--json")
    try:
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            if (event["event"], event.get("stage")) == ("start", stage):
                break
        yield process, until(lambda: worker_of(process, project), "a worker")
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], project: Project) -> tuple[int, Events, str]:
    """Exit code, remaining events and standard error; no worker may be left."""
    out, err = process.communicate(timeout=100)
    until(lambda: not workers(project), "the end of the worker")
    assert "Traceback" not in err
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def damage(project: Project) -> list[str]:
    """What is wrong with the artifacts of a store, all bytes read."""
    store = Store(project.store)
    return [problem for entry in store.entries() for problem in store.problems(entry)]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, and neither its size nor its times."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Importing any of these raises, in the process and as a proof that a package is served without them.
_BLOCKED = """
import sys
BUILD_TOOLS = {"torch", "transformers", "olive", "optimum", "onnx", "onnxruntime_extensions"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BUILD_TOOLS:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Blocked())
from pipeline import cli
code = cli.main(sys.argv[1:])
assert not BUILD_TOOLS & sys.modules.keys(), BUILD_TOOLS & sys.modules.keys()
sys.exit(code)
"""


def without_build_tools(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", _BLOCKED, *arguments], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "600m") -> Iterator[Path]:
    """A file system of its own in ``folder``, which is made; by default large enough for a build to begin."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave nothing free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        while free := shutil.disk_usage(disk).free:
            with contextlib.suppress(OSError):  # the build writes at the same time
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
    return filler
