"""Compile the NPU's stages ahead of time for one chip; the others are carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.npu import qnn
from pipeline.npu.static_export import NPU_STAGES

# Graphs whose weights one binary can hold once.
_SHARING = ("prefill", "decode")


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write compiled ``prefill``, ``decode`` and ``head.onnx`` with their binaries, and a configuration that uses them.

    With ``share_weights`` a folder ``shared`` has prefill and decode in one binary besides.

    Raises:
        StageError: a node cannot run on the NPU, or the compiler left something out.
        RuntimeMissing: the compiler is not installed.
    """
    source, soc = inputs["quantize"].path, step.fields["soc"]
    graphs = {name: source / f"{name}.onnx" for name in NPU_STAGES}
    placed: dict[str, dict[str, int]] = {}
    for index, (name, path) in enumerate(graphs.items()):
        progress(0.1 + 0.25 * index, f"{name} for {soc}")
        placed |= qnn.compile_graphs({name: path}, out_dir, soc)
    if step.fields["share_weights"]:
        progress(0.85, "prefill and decode in one binary")
        (out_dir / "shared").mkdir()
        qnn.compile_graphs({name: graphs[name] for name in _SHARING}, out_dir / "shared", soc, share=True)
    for path in sorted(source.iterdir()):
        if path.stem not in (*NPU_STAGES, "layers") and path.name != "genai_config.json":
            shutil.copyfile(path, out_dir / path.name)
    config = json.loads((source / "genai_config.json").read_bytes())
    (out_dir / "genai_config.json").write_text(json.dumps(_on_npu(config, soc), indent=4), encoding="utf-8")
    binaries = {str(path.relative_to(out_dir)): path.stat().st_size for path in sorted(out_dir.rglob("*.bin"))}
    return Result({"soc": soc, "placement": placed, "binaries": binaries})


def _on_npu(config: dict[str, Any], soc: str) -> dict[str, Any]:
    """The configuration with the NPU's stages on the NPU, and nowhere else."""
    for name, stage in config["model"]["decoder"]["pipeline"][0].items():
        if name in NPU_STAGES:
            stage["session_options"] = {
                "log_id": "onnxruntime-genai",
                "session.disable_cpu_ep_fallback": "1",
                "provider_options": [{"qnn": qnn.options(soc)}],
            }
    return config
