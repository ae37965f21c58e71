"""A Snakemake workflow over the steps of recipes, for more than one machine: what to run, in which order, on how much.

    <out>/Snakefile                       one rule a step; the same text for all recipes
    <out>/steps.json                      the steps, each once however many recipes share it
    <out>/profiles/{default,slurm}/       how Snakemake runs them here, and on a Slurm cluster
    <out>/done/<stage>-<key>              empty; says that a step is in the store
    <out>/logs/<stage>-<key>.log          what each attempt at a step told

Snakemake decides what runs where and when, and what is tried again. That no step is made twice is the store's doing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import files
from pipeline.artifact import Step
from pipeline.builds.store import Store

STEPS, DONE, LOGS = "steps.json", "done", "logs"
_DATA = Path(__file__).parent.parent / "data"
# File of the workflow -> file of this project.
_TEXTS = {
    "Snakefile": "workflow.smk",
    "profiles/default/config.yaml": "workflow-local.yaml",
    "profiles/slurm/config.yaml": "workflow-slurm.yaml",
}
# Estimates are for two idle cores. A scheduler kills what takes longer, so other processors get three times as long,
# and imports from a cold shared disk their time.
_SLOWER, _LEAST_MINUTES = 3, 10
_SINGLE = ("checkpoint", "adapters", "package")  # these read and write, on one core


@dataclass(frozen=True)
class Job:
    """One step as a scheduler sees it.

    Attributes:
        name: of its rule: stage, model, target and scheme; of the first recipe where several share it.
        stage, key: of the step.
        inputs: names of files in `DONE` that must be there before.
        command: what to run, without the interpreter.
        threads: cores.
        mem_mb, disk_mb: megabytes of memory and of disk.
        runtime: minutes.
    """

    name: str
    stage: str
    key: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]
    threads: int
    mem_mb: int
    disk_mb: int
    runtime: int

    @property
    def mark(self) -> str:
        """Name of the file in `DONE` that says that the step is in the store."""
        return mark(self.stage, self.key)


def mark(stage: str, key: str) -> str:
    """What the file is called that says that a step is in the store."""
    return f"{stage}-{key}"


def jobs(plans: Mapping[str, tuple[Path, Sequence[Step]]], store: Path, packages: Path) -> list[Job]:
    """The steps of several recipes, each once, in an order in which they can run.

    Args:
        plans: by a recipe's name its file and its steps.
        packages: folder that packages are put into.
    """
    found: dict[str, Job] = {}
    for name, (recipe, steps) in plans.items():
        keys = {step.stage: step.key for step in steps}
        for step in steps:
            place = ("--out", str(packages.resolve())) if step.stage == "package" else ()
            command = ("step", str(recipe.resolve()), step.stage, "--key", step.key)
            job = Job(
                name=f"{step.stage}_{name}",
                stage=step.stage,
                key=step.key,
                inputs=tuple(mark(stage, keys[stage]) for stage in step.inputs),
                command=(*command, "--store", str(store.resolve()), *place),
                threads=1 if step.stage in _SINGLE else 2,
                mem_mb=math.ceil(step.estimate.memory / 1e6),
                disk_mb=math.ceil(step.estimate.disk / 1e6),
                runtime=max(_LEAST_MINUTES, math.ceil(_SLOWER * step.estimate.seconds / 60)),
            )
            found.setdefault(step.key, job)
    return list(found.values())


def write(steps: Sequence[Job], out: Path, store: Store, program: Sequence[str]) -> list[Path]:
    """Write a workflow, and forget the marks of steps that are no longer in the store.

    Args:
        program: interpreter and module that run a job's command, on every machine.

    Returns:
        the marks that were removed: their steps run again.

    Raises:
        ResourceError: the folder cannot be written.
    """
    for name, source in _TEXTS.items():
        files.publish(out / name, (_DATA / source).read_text(encoding="utf-8"))
    listed = [{**asdict(job), "mark": job.mark, "command": [*program, *job.command]} for job in steps]
    files.publish(out / STEPS, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    stale = [out / DONE / job.mark for job in steps if store.get(job.stage, job.key) is None]
    (out / LOGS).mkdir(exist_ok=True)
    gone = [path for path in stale if path.exists()]
    for path in gone:
        path.unlink()
    return gone
