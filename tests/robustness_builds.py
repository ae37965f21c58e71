"""Builds that are killed, starved, doubled and damaged, on copies of one tiny project."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import builds
import psutil
from builds import STAGES, Project
from robustness_cases import Bench, Case, need
from test_store import holder_of

from pipeline import digest
from pipeline.builds.store import Store
from pipeline.package import verify


def _again(project: Project) -> str:
    """What the next build makes, whether all of its package verifies, and what is left of earlier work."""
    events = builds.build(project)
    verify.package(project.package)
    left = [path.name for path in (project.store / "tmp").iterdir()]
    damage = builds.damage(project)
    whole = "store whole" if not damage and not left else f"store has {[*damage, *left]}"
    return f"the next run makes {' and '.join(builds.stages(events, 'done')) or 'nothing'}, {whole}"


def killed(stage: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        project = bench.built()
        project.forget(stage)
        shutil.rmtree(project.out)
        with builds.stopped_at(project, stage) as (process, worker):
            process.kill()
            with contextlib.suppress(psutil.Error):  # it has died with its parent
                worker.resume()
            need(builds.end(process, project)[0] == -signal.SIGKILL, "the build was over")
        partial = project.stored(stage) or project.out.exists()
        return f"{'something' if partial else 'nothing'} partial visible, {_again(project)}"

    return run


def full_disk(stage: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        project = bench.built()
        with builds.small_disk(bench.folder() / "disk") as disk:
            shutil.copytree(project.store, disk / "store")
            there = Project(project.recipe, disk / "store", project.out)
            there.forget(stage)
            with builds.stopped_at(there, stage) as (process, worker):
                filler = builds.fill(disk)
                worker.resume()
                code, events, err = builds.end(process, there)
            need(not err, err)
            named = "disk" in events[-1]["what"] + events[-1]["why"] and "free some space" in events[-1]["fix"]
            partial = "something" if there.stored(stage) else "nothing"
            filler.unlink()
            observed = f"exit {code}, the disk is {'' if named else 'not '}named, {partial} partial visible"
            return f"{observed}, {_again(there)}"

    return run


def two_at_once(bench: Bench) -> str:
    project = builds.new_project(bench.folder(), bench.part("checkpoint_of")("qwen2"))
    processes = [builds.start(project, "--json") for _ in range(2)]
    ends: list[tuple[int, builds.Events, str]] = []
    threads = [threading.Thread(target=lambda one=one: ends.append(builds.end(one, project))) for one in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    need(len(ends) == 2, "both builds end")
    codes = " and ".join(str(code) for code, _, _ in ends)
    events = [event for _, part, _ in ends for event in part]
    once = sorted(builds.stages(events, "done")) == sorted(builds.stages(events, "hit")) == sorted(STAGES)
    fresh = sum(event["fresh"] for event in events if event["event"] == "package")
    made = "each stage made once" if once else f"made {builds.stages(events, 'done')}"
    return f"exit {codes}, {made}, {fresh} new package, {_again(project)}"


def stale_lock(bench: Bench) -> str:
    """A process that has locked the last step and works on it dies, and the build does not wait for it."""
    project = bench.built()
    [entry] = project.stored("package")
    project.forget("package")
    holder = holder_of(project.store, entry.name)
    holder.kill()
    holder.communicate(timeout=60)
    need(list((project.store / "tmp").iterdir()), "the dead process had begun")
    need((project.store / "locks").is_dir(), "there are locks")
    events = builds.build(project)
    waited = any("waiting" in event.get("text", "") for event in events)
    return f"{'waits' if waited else 'does not wait'}, makes {' and '.join(builds.stages(events, 'done'))}, " + (
        "the dead one's work is cleared" if not list((project.store / "tmp").iterdir()) else "its work stays"
    )


def corrupt(stage: str, needed_by: str) -> Callable[[Bench], str]:
    """One bit of an artifact that the next stage reads; its size and times stay."""

    def run(bench: Bench) -> str:
        project = bench.built()
        [entry] = project.stored(stage)
        weights = entry / "files" / "model.onnx.data"
        before = digest.of_file(weights)
        builds.flip(weights)
        project.forget(needed_by, "package")
        events = builds.build(project)
        notes = [event["text"] for event in events if event["event"] == "note"]
        named = any(stage in text and "model.onnx.data has changed" in text for text in notes)
        same = "with the bytes it had" if digest.of_file(weights) == before else "with other bytes"
        made = ", ".join(builds.stages(events, "done"))
        return f"{'named' if named else 'not named'}, makes {made}, {same}, {len(builds.damage(project))} damaged"

    return run


def lost_record(bench: Bench) -> str:
    """An entry whose record is cut off, as after a loss of power."""
    project = bench.built()
    [entry] = project.stored("quantize")
    record = entry / "artifact.json"
    record.write_bytes(record.read_bytes()[:40])
    need(Store(project.store).get("quantize", entry.name) is None, "the entry counts as whole")
    return _again(project)


def any_path(bench: Bench) -> str:
    """Checkpoint, recipe, store and package below a path with spaces and letters of several scripts."""
    folder = bench.folder() / "mit Leerzeichen, größe & 模型"
    shutil.copytree(bench.part("checkpoint_of")("qwen3"), folder / "прев ью")
    project = builds.new_project(folder, Path("../прев ью"))
    code, out, err = builds.run(*project.command)
    need(not err, err)
    told = "its place is told" if str(project.package) in out else "its place is not told"
    facts = json.loads(builds.without_build_tools("verify", str(project.package), "--replay", "--json"))
    replayed = facts["replay"]["identical"] == facts["replay"]["prompts"] > 0
    # Where a local checkpoint lay is nobody's business.
    private = str(folder) not in (project.package / "manifest.json").read_text(encoding="utf-8")
    return f"exit {code}, {told}, {'replayed' if replayed else 'differs'}, " + (
        "no path in the manifest" if private else "the path is in the manifest"
    )


_BUILD = "`qwen-onnx build` of a tiny model"
_WHOLE = "store whole"

BUILDS = [
    *(
        Case(
            *(18, f"SIGKILL in {stage}", f"nothing partial visible, the next run makes {stage}, {_WHOLE}"),
            *(f"{_BUILD} in a process of its own, killed while that stage runs", killed(stage)),
        )
        for stage in STAGES
    ),
    *(
        Case(
            *(19, f"disk full in {stage}"),
            f"exit 6, the disk is named, nothing partial visible, the next run makes {stage}, {_WHOLE}",
            *(f"{_BUILD} with its store on a small tmpfs that is filled while that stage runs", full_disk(stage)),
        )
        for stage in STAGES
    ),
    Case(
        *(20, "two builds of one key at once"),
        f"exit 0 and 0, each stage made once, 1 new package, the next run makes nothing, {_WHOLE}",
        *(f"{_BUILD}, started twice", two_at_once),
    ),
    Case(
        *(21, "lock of a dead process", "does not wait, makes package, the dead one's work is cleared"),
        *(f"{_BUILD} after a process was killed that had locked a step and begun it", stale_lock),
    ),
    *(
        Case(
            *(22, f"flipped bit in the artifact of {stage}"),
            f"named, makes {stage}, {needed_by}, package, with the bytes it had, 0 damaged",
            *(f"{_BUILD} from a store that was damaged", corrupt(stage, needed_by)),
        )
        for stage, needed_by in (("export", "quantize"), ("quantize", "validate"))
    ),
    Case(
        *(22, "record of an artifact cut off", f"the next run makes quantize, {_WHOLE}"),
        *(f"{_BUILD} from a store that was damaged", lost_record),
    ),
    Case(
        *(24, "path with spaces and letters of several scripts"),
        "exit 0, its place is told, replayed, no path in the manifest",
        *(f"{_BUILD}, `verify --replay` of its package where no build tool can be imported", any_path),
    ),
]
