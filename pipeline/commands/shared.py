"""What several commands begin with: a recipe, a store, a package that is checked, numbers that are positive."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.artifact import Step
    from pipeline.builds.store import Store
    from pipeline.facts.recipe import Loaded


def load(path: Path, options: argparse.Namespace) -> tuple[Loaded, list[Step]]:
    from pipeline.builds import plan

    loaded = locked(path, options)
    return loaded, plan.make(loaded)


def locked(path: Path, options: argparse.Namespace) -> Loaded:
    """A recipe, with the commit of today where it names a branch; CI refuses that."""
    from pipeline.facts import recipe

    loaded = recipe.load(path)
    if any(source.type == "hub" and not source.locked for source in loaded.recipe.checkpoint.sources):
        from pipeline.builds import lock

        return lock.pinned(loaded, lock.is_strict(getattr(options, "locked", False)), aside)
    return loaded


def open_store(options: argparse.Namespace) -> Store:
    from pipeline.builds.store import Store

    return Store(options.store)


def aside(text: str) -> None:
    """Tell how far a long command has come, where it is not mistaken for its result."""
    print(text, file=sys.stderr, flush=True)


def check_package(options: argparse.Namespace, task: str) -> None:
    """Verify a package, unless it is trusted, and refuse one that is for something else.

    Raises:
        PackageError, RuntimeMissing: as `verify.package` and `verify.check_runtime`.
        UsageError: it is made for another task.
    """
    from pipeline.artifact import MANIFEST, read_manifest
    from pipeline.package import verify

    if not options.trust:
        verify.check_runtime(verify.package(options.package))
    if not (options.package / MANIFEST).is_file():  # trusted, and not yet a package
        return
    found = read_manifest(options.package).task
    if found != task:
        raise UsageError(f"{options.package} is a package to {found}, not to {task}", fix=f"use `qwen-onnx {found}`")


def check_positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # NaN is not positive either
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")
