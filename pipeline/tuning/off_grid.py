"""A checkpoint whose weights lie on no quantizer's grid: ``python -m pipeline.tuning.off_grid RECIPE OUT``.

A checkpoint that was dequantized is easy for the tool that quantized it, which finds its own grid again. Here every
weight is moved by up to half a step of 4 bits, evenly, so that nothing of a grid is left, and a recipe for the new
checkpoint is written. What two tools lose on it compares fairly; it is a model of its own, a little worse than the
original, and nothing to ship.

Shapes in this module:
    N: output channels, K: input channels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import files
from pipeline.builds import plan, report, runner
from pipeline.builds.store import Store
from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import QwenOnnxError, UsageError
from pipeline.facts import recipe

if TYPE_CHECKING:
    import torch

_BLOCK, _STEPS = 32, 15
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def moved(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``weight`` (``[N, K]``), each value moved evenly by up to half of a 15th of the range of the 32 around it."""
    import torch

    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    step = (padded.amax(2) - padded.amin(2)) / _STEPS
    shift = torch.rand(padded.shape, generator=generator).sub_(0.5).mul_(step[..., None])
    return weight + shift.flatten(1)[:, : weight.shape[1]]


def write(source: Path, out: Path, seed: int = 0) -> None:
    """Write the checkpoint ``source`` into ``out``, its matrices moved; vectors stay.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    found = {name: moved(values, generator) if values.ndim == 2 else values for name, values in Tensors(source).all()}
    save_file(found, out / _WEIGHTS[0], metadata={"format": "pt"})
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _WEIGHTS:
            shutil.copyfile(path, out / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write checkpoint and recipe; returns an exit code."""
    parser = argparse.ArgumentParser(description="Move a recipe's checkpoint off the grid that it was quantized on.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path, help="folder to make: checkpoint/, and a recipe of the same name")
    parser.add_argument("--store", type=Path, default=Path("artifacts/.store"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    reporter = report.reporter(False)
    try:
        if options.out.exists():
            raise UsageError(f"{options.out} exists", fix="give another folder, or remove it")
        loaded = recipe.load(options.recipe)
        steps = [step for step in plan.make(loaded) if step.stage == "checkpoint"]
        made = runner.build(steps, Store(options.store), reporter)
        partial = options.out.with_name(f".{options.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "checkpoint").mkdir(parents=True)
        write(made["checkpoint"].path, partial / "checkpoint")
        start = os.path.relpath(options.recipe.resolve(), options.out.resolve())
        lines = [
            f"extends: {json.dumps(start)}",
            "checkpoint: {sources: [{type: local, path: checkpoint}], sha256: null, size: null}",
        ]
        files.publish(partial / options.recipe.name, "\n".join(lines) + "\n")
        partial.rename(options.out)
    except QwenOnnxError as error:
        reporter.close()
        report.show_error(error, False)
        return error.exit_code
    finally:
        reporter.close()
    print(f"next: qwen-onnx build {options.out / options.recipe.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
