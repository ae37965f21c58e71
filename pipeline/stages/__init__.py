"""The stages: each one function ``run(step, inputs, out_dir, progress) -> Result``.

A stage reads its step's fields and the directories of its inputs, writes below ``out_dir`` and knows nothing of
other stages, of the plan or of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.stages import adapters, checkpoint, compile, export, package, quantize, validate  # noqa: A004 - a stage


class Stage(Protocol):
    """What every stage looks like."""

    def __call__(self, step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
        """Do the work of ``step``."""


STAGES: dict[str, Stage] = {
    "checkpoint": checkpoint.run,
    "export": export.run,
    "quantize": quantize.run,
    "compile": compile.run,
    "adapters": adapters.run,
    "validate": validate.run,
    "package": package.run,
}
