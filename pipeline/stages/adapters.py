"""Give the quantized graph slots for LoRA adapters, and convert the recipe's adapters to the runtime's format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import files
from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.checkpoint import files as checkpoint_files
from pipeline.errors import CheckpointError, StageError
from pipeline.graph import edits as graph
from pipeline.lora import convert as lora, files as lora_files, slots as lora_graph
from pipeline.package import adapter_files


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write ``model.onnx`` with slots, ``NAME.onnx_adapter`` and its description for each adapter, and all other files.

    What peft saved is kept below ``peft/NAME``, for validation.

    Raises:
        CheckpointError: an adapter has changed since the plan, cannot be kept apart or does not fit the checkpoint.
        StageError: the model is of a kind, or the graph in a form, that takes no adapters.
    """
    import onnx

    source = inputs["quantize"].path
    if problem := adapter_files.unsuited(json.loads((source / "genai_config.json").read_bytes())):
        raise StageError("the model takes no adapters", why=problem, fix="merge one instead: `checkpoint.adapter`")
    progress(0.0, "slots")
    model = graph.load(source / "model.onnx")
    slots = lora_graph.add_slots(model, step.fields["dtype"])
    onnx.save(model, str(out_dir / "model.onnx"))
    for path in sorted(source.iterdir()):
        if path.name != "model.onnx":
            _bring(path, out_dir / path.name)
    facts = {}
    for index, (name, given) in enumerate(step.fields["adapters"].items()):
        progress((index + 0.5) / (len(step.fields["adapters"]) + 1), name)
        own = out_dir / "peft" / name
        _keep(Path(step.context["folders"][name]), own, given["sha256"])
        file = out_dir / f"{name}{adapter_files.ENDING}"
        base = inputs["checkpoint"].digest
        described = lora.convert(own, out_dir, slots, file, name, base, given["license"])
        facts[name] = {
            "slots": len(described.ranks),
            "rank": max(described.ranks.values()),
            "size": file.stat().st_size,
        }
    return Result({"slots": len(slots), "adapters": facts})


def _bring(source: Path, target: Path) -> None:
    """Weights are large, and artifacts are never changed: a link is enough."""
    if source.suffix == ".data":
        files.link(source, target)
    else:
        shutil.copyfile(source, target)


def _keep(source: Path, target: Path, sha256: str) -> None:
    """Copy what peft saved, and look at the copy: whatever becomes of the original, this is what was planned."""
    target.mkdir(parents=True)
    for name in checkpoint_files.ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)
    if lora_files.identity(target) != sha256:
        raise CheckpointError(
            "the adapter has changed since the build was planned", where=str(source), fix="run the same command again"
        )
