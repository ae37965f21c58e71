"""The commands of builds that are spread over machines: write their workflow, and run one step of it.

A recipe that names a branch is refused here: it could move between two steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.artifact import Artifact, Step
    from pipeline.builds.store import Store
    from pipeline.facts.recipe import Loaded


def add(root: Any) -> None:
    """Add the commands to the command line."""
    text = "write the steps of recipes as a Snakemake workflow, for several machines"
    parser = arguments.command(root, "workflow", workflow, text)
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the workflow")
    text = "folder of packages (default: %(default)s)"
    parser.add_argument("--packages", type=Path, default=arguments.ARTIFACTS, metavar="DIR", help=text)
    arguments.store(parser)

    parser = arguments.command(root, "step", step, "make one step of a recipe, from steps that are in the store")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("stage", metavar="STAGE", help="as `qwen-onnx plan` lists them")
    parser.add_argument("--key", default="", help="refuse to make another step than the one of this key")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put the package there as well")
    arguments.store(parser)
    arguments.json(parser)


def workflow(options: argparse.Namespace) -> int:
    from pipeline.builds import workflow
    from pipeline.builds.store import Store

    plans: dict[str, tuple[Path, list[Step]]] = {}
    for path in options.recipes:
        loaded, steps = _plan(path)
        if loaded.name in plans:
            raise UsageError(
                f"two recipes are called {loaded.name}",
                where=f"{plans[loaded.name][0]}, {path}",
                why="their packages would be put into the same folder",
                fix="rename a file, or its folder",
            )
        plans[loaded.name] = (path, steps)
    store = Store(options.store)
    jobs = workflow.jobs(plans, options.store, options.packages)
    again = workflow.write(jobs, options.out, store, (sys.executable, "-m", "pipeline"))
    present = sum(store.get(job.stage, job.key) is not None for job in jobs)
    shared = sum(len(steps) for _, steps in plans.values()) - len(jobs)
    print(f"{options.out}: {len(jobs)} steps of {len(plans)} recipes, {shared} shared, {present} in the store already")
    for path in again:
        print(f"{path.name} is no longer in the store, and runs again")
    print(f"next:  cd {options.out} && snakemake --cores 2")
    print("       on a Slurm cluster: snakemake --workflow-profile profiles/slurm")
    return 0


def step(options: argparse.Namespace) -> int:
    from pipeline.builds import report, runner
    from pipeline.builds.store import Store

    loaded, steps = _plan(options.recipe)
    if options.out and options.stage != "package":
        raise UsageError(f"--out is for packages, and {options.stage} makes none", fix="leave out --out")
    planned = next((step for step in steps if step.stage == options.stage), None)
    if options.key and planned and planned.key != options.key:
        raise UsageError(
            f"{options.stage} of {loaded.name} is another step here than the one asked for",
            where=f"{planned.key[:16]}, not {options.key[:16]}",
            why="the recipe, the checkpoint, the tools or the hardware differ from where the workflow was written",
            fix="install the same constraints.txt on every machine, or write the workflow again",
        )
    store = Store(options.store)
    reporter = report.reporter(options.json)
    try:
        made = runner.make_step(steps, options.stage, store, reporter)
        if options.out:
            _deliver(made, loaded, store, options.out)
    finally:
        reporter.close()
    return 0


def _deliver(package: Artifact, loaded: Loaded, store: Store, out: Path) -> None:
    """Put a package where builds put it, and show it among the others there."""
    from pipeline.builds import runner
    from pipeline.documents import index

    runner.install(package, out / loaded.name, store)
    with store.lock("index"):  # else a build that looked before another was done could write after it
        index.write(out)


def _plan(path: Path) -> tuple[Loaded, list[Step]]:
    from pipeline.builds import plan
    from pipeline.facts import recipe

    loaded = recipe.load(path)
    return loaded, plan.make(loaded)
