"""Fetch a checkpoint and write it as float32 safetensors with its tokenizer: the PyTorch reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.checkpoint import fetch as checkpoint
from pipeline.errors import CheckpointError
from pipeline.facts import positions
from pipeline.facts.recipe import Checkpoint


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:  # noqa: ARG001
    """Write ``config.json``, ``model.safetensors`` and the tokenizer files.

    Raises:
        DownloadError: no source could be reached.
        CheckpointError: the bytes are not what was pinned, are no supported checkpoint, or cannot have the context that
            the recipe asks for.
    """
    base = Path(step.context["base"])
    spec = Checkpoint.model_validate(step.context["checkpoint"], strict=False)
    source = checkpoint.fetch(spec, Path(step.context["downloads"]), base, lambda part, what: progress(part / 4, what))
    adapter = base / spec.adapter if spec.adapter else None
    headless = step.fields.get("headless", False)
    facts = checkpoint.prepare(
        source, adapter, out_dir, lambda part, what: progress((1 + 3 * part) / 4, what), headless
    )
    config = json.loads((out_dir / "config.json").read_bytes())
    positions.check_context(config, step.context.get("context_length"), f"{source}: config.json")
    planned = step.fields.get("architecture") or {}
    wrong = [f"{key} is {facts.get(key)}, not {value}" for key, value in planned.items() if facts.get(key) != value]
    if wrong:
        raise CheckpointError(
            "the checkpoint is not the architecture that the recipe states",
            why="; ".join(wrong),
            fix="correct the recipe's `architecture`, or remove it",
        )
    return Result(facts)
