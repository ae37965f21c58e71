"""Walk a plan against a store: hit, or run in a process of its own and publish."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.artifact import CHECKSUMS, MANIFEST, VALIDATION, Artifact, Need, Step, read_manifest
from pipeline.builds import processes
from pipeline.builds.processes import Process
from pipeline.builds.report import Reporter
from pipeline.builds.store import Store
from pipeline.errors import QwenOnnxError, ResourceError, StageError, StoreError, UsageError, from_dict

# Left free on the disk and in memory for everything else.
_SPARE = 500_000_000


def need(steps: Sequence[Step], store: Store) -> Need:
    """Sum up the estimates of all steps that are not in the store."""
    import psutil

    missing = [step.estimate for step in steps if store.get(step.stage, step.key) is None]
    return Need(
        memory=max((estimate.memory for estimate in missing), default=0),
        disk=sum(estimate.disk for estimate in missing),
        seconds=sum(estimate.seconds for estimate in missing),
        free_memory=psutil.virtual_memory().available,
        free_disk=shutil.disk_usage(store.root).free,
    )


def check(needed: Need) -> None:
    """Refuse a build that this machine cannot hold.

    Raises:
        ResourceError: memory or disk is too small.
    """
    if needed.memory > needed.free_memory:
        raise ResourceError(
            f"the build needs about {needed.memory / 1e9:.1f} GB of memory, {needed.free_memory / 1e9:.1f} GB are free",
            why="a build that runs out of memory is killed without a word",
            fix="close other programs, or build on a larger machine",
        )
    if needed.disk and needed.disk + _SPARE > needed.free_disk:
        raise ResourceError(
            f"the build needs about {needed.disk / 1e9:.1f} GB of disk, {needed.free_disk / 1e9:.1f} GB are free",
            fix="free some space (`qwen-onnx store gc`), or choose another place with --store",
        )


def build(steps: Sequence[Step], store: Store, reporter: Reporter) -> dict[str, Artifact]:
    """Bring every step's artifact into the store, and return them by stage.

    Raises:
        GateError: validation was refused; its report stays in the store, as the last artifact.
        QwenOnnxError: whatever made a step fail.
    """
    for _ in steps:  # each round makes at least one damaged artifact anew
        try:
            return _walk(steps, store, reporter)
        except _DamagedError as damage:
            reporter.note(f"{damage}: it is made anew")
    return _walk(steps, store, reporter)


def make_step(steps: Sequence[Step], stage: str, store: Store, reporter: Reporter) -> Artifact:
    """Bring the artifact of one step into the store, from inputs that are there already.

    Raises:
        UsageError: the steps have no such stage, or its inputs are not in the store.
        GateError: the step is a validation that was refused, or needs one that was.
        QwenOnnxError: whatever made the step fail.
    """
    found = {step.stage: step for step in steps}
    if stage not in found:
        raise UsageError(f"the recipe has no step {stage}", why=f"its steps are {', '.join(found)}")
    step = found[stage]
    inputs = {name: store.get(name, found[name].key) for name in step.inputs}
    present = {name: artifact for name, artifact in inputs.items() if artifact}
    if missing := [name for name in inputs if name not in present]:
        raise UsageError(
            f"{stage} cannot run yet: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the store",
            where=", ".join(str(store.root / name / found[name].key) for name in missing),
            why="a step reads the results of others, and makes none of them",
            fix=f"run the step {missing[0]} first, or `qwen-onnx build`, which runs all of them",
        )
    for artifact in present.values():
        _accept(artifact)
    if store.get(stage, step.key) is None:
        check(need([step], store))
    try:
        made = _one(step, present, store, reporter)
    except _DamagedError as damage:
        raise StoreError(
            str(damage),
            why="its files do not have the digests they were stored with; it has been removed",
            fix="run that step again, and then this one",
        ) from None
    _accept(made)
    return made


def _accept(artifact: Artifact) -> None:
    """Refuse to go on from a validation that was refused."""
    if refused := artifact.facts.get("refused"):
        error = from_dict(refused)
        error.where = str(artifact.path / VALIDATION)
        raise error


class _DamagedError(Exception):
    """A stored artifact was damaged, and has been removed."""


def _walk(steps: Sequence[Step], store: Store, reporter: Reporter) -> dict[str, Artifact]:
    done: dict[str, Artifact] = {}
    if any(store.get(step.stage, step.key) is None for step in steps):
        check(need(steps, store))
    if any(step.stage in processes.FORKED and store.get(step.stage, step.key) is None for step in steps):
        processes.prepare()
    for step in steps:
        inputs = {name: done[name] for name in step.inputs}
        done[step.stage] = _one(step, inputs, store, reporter)
        _accept(done[step.stage])
    return done


def _one(step: Step, inputs: Mapping[str, Artifact], store: Store, reporter: Reporter) -> Artifact:
    hit = store.get(step.stage, step.key)
    if hit:
        reporter.hit(hit)
        return hit
    try:
        return _make(step, inputs, store, reporter)
    except BrokenPipeError:  # the reader of what is told has gone; nothing is wrong with the disk
        raise
    except OSError as error:
        raise ResourceError(
            f"the result of {step.stage} cannot be stored",
            why=f"the disk of {store.root}: {error}",
            fix="free some space and run the same command again",
        ) from None


def _make(step: Step, inputs: Mapping[str, Artifact], store: Store, reporter: Reporter) -> Artifact:
    """Run a step under its lock, and publish what it wrote.

    Raises:
        OSError: the store's disk is full or fails.
    """
    with store.lock(step.key, lambda: reporter.note(f"{step.stage}: another build is at it, waiting")) as lock:
        hit = store.get(step.stage, step.key)
        if hit:
            reporter.hit(hit)
            return hit
        for artifact in inputs.values():
            _check_input(artifact, store)
        reporter.start(step)
        started = time.monotonic()
        with store.workspace(step) as out_dir:
            facts, peak = _run(step, inputs, out_dir, store, lock, reporter)
            artifact = store.publish(step, out_dir, facts, time.monotonic() - started, peak)
        reporter.done(artifact)
        return artifact


def _check_input(artifact: Artifact, store: Store) -> None:
    """A step that runs reads its inputs by content: a flipped bit in the store must not travel on."""
    problems = store.problems(artifact)
    if problems:
        store.remove(artifact)
        raise _DamagedError(f"the stored {artifact.stage} was damaged ({problems[0]})")


def _run(
    step: Step, inputs: Mapping[str, Artifact], out_dir: Path, store: Store, lock: int, reporter: Reporter
) -> tuple[dict[str, Any], int]:
    """Run a step in a worker; returns its facts and its peak resident memory in bytes."""
    log = store.root / "logs" / f"{step.stage}-{step.key[:16]}.log"
    read_end, write_end = os.pipe()
    context = {**step.context, "downloads": str((store.root / "downloads").resolve())}
    job = {
        "step": {**step.as_dict(), "context": context},
        "inputs": {name: {**asdict(artifact), "path": str(artifact.path)} for name, artifact in inputs.items()},
        "out_dir": str(out_dir),
    }
    job_file = out_dir.parent / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    # The worker inherits the lock: if this process is killed, nobody else starts until the worker is gone too.
    process = processes.start(step.stage, job_file, log, write_end, lock)
    os.close(write_end)
    outcome: dict[str, Any] = {}
    with _killed(process), os.fdopen(read_end) as events:
        for line in events:
            if not line.endswith("\n"):  # the worker died while it wrote
                break
            event = json.loads(line)
            if event["event"] == "progress":
                reporter.progress(step.stage, event["part"], event["what"])
            else:
                outcome = event
        code = process.wait()
    job_file.unlink()
    if outcome.get("event") == "error":
        raise _located(from_dict(outcome), log)
    if outcome.get("event") != "result" or code:
        raise _died(step, code, log)
    facts = dict(outcome["facts"])
    if outcome["refused"]:
        facts["refused"] = outcome["refused"]
    return facts, int(outcome["peak_memory"])


@contextlib.contextmanager
def _killed(process: Process) -> Iterator[None]:
    """Leave no worker behind, whatever happens to this process's attention."""
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


def _located(error: QwenOnnxError, log: Path) -> QwenOnnxError:
    if isinstance(error, StageError) and not error.fix:
        error.fix = f"read {log}"
    return error


def _died(step: Step, code: int, log: Path) -> QwenOnnxError:
    if code == -signal.SIGKILL:
        return ResourceError(
            f"{step.stage} was killed",
            why=f"by the system, most likely for want of memory (about {step.estimate.memory / 1e9:.1f} GB are needed)",
            fix="close other programs, or build on a larger machine, and run the same command again",
        )
    return StageError(f"{step.stage} ended without a result (exit code {code})", fix=f"read {log}")


def install(package: Artifact, folder: Path, store: Store) -> bool:
    """Put a package from the store at ``folder``, all at once; ``False`` when it is already there, byte by byte.

    Raises:
        ResourceError: it cannot be written there.
        StoreError: the stored package was damaged.
        UsageError: something that is no package is there.
    """
    from pipeline.package import verify

    temporary, old = folder.parent / f".{folder.name}.new", folder.parent / f".{folder.name}.old"
    try:
        with store.lock(digest.of_value(str(folder.resolve()))):
            if old.exists() and not folder.exists():  # killed between the two renames below
                old.rename(folder)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            _check_place(folder)
            with contextlib.suppress(QwenOnnxError, OSError):
                if verify.check_files(folder).digest == read_manifest(package.path).digest:
                    return False
            if problems := store.problems(package):
                store.remove(package)
                raise StoreError(
                    f"the stored package was damaged: {problems[0]}",
                    why="its files do not have the digests they were stored with; it has been removed",
                    fix="run the same command again: it is made anew",
                )
            _replace(folder, package.path, temporary, old)
    except OSError as error:
        raise ResourceError(
            f"the package cannot be written to {folder}",
            why=str(error),
            fix="free some space or choose another place with --out; the package is safe in the store",
        ) from None
    return True


def _check_place(folder: Path) -> None:
    """Refuse to replace what no build has put there."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = names and not names & {MANIFEST, CHECKSUMS}
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or foreign:
        raise UsageError(
            f"{folder} exists and is no package",
            why="a build replaces its package as a whole, and these files would be lost",
            fix="move it away, or choose another place with --out; the package is safe in the store",
        )


def _replace(folder: Path, source: Path, temporary: Path, old: Path) -> None:
    """Copy ``source``, then put the copy in the place of ``folder``."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
