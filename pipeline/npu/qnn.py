"""Qualcomm's NPU through ONNX Runtime: sessions on the HTP or its emulator, and binaries compiled ahead of time.

The Linux wheel of onnxruntime-qnn brings the offline compiler for every chip and an emulator that computes like the
NPU, slowly. Sessions here never fall back to the processor: a node that the NPU cannot run makes them fail.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RuntimeMissing, StageError
from pipeline.facts.target import QNN, SOCS, TARGETS
from pipeline.package.replay import chatter_aside

_INSTALL = f"pip install {TARGETS['npu'].runtime.plugin}"


def options(soc: str) -> dict[str, str]:
    """Provider options for a chip; they name no file, so that they hold on every system."""
    return {
        "backend_type": "htp",
        "soc_model": str(SOCS[soc][0]),
        "htp_performance_mode": "burst",
        "htp_graph_finalization_optimization_mode": "3",
        "enable_block_quant_weight_optimization": "1",  # 4-bit blocks become the HTP's own, not floats
    }


def library() -> str:
    """Path of the plugin with the execution provider.

    Raises:
        RuntimeMissing: onnxruntime-qnn is not installed.
    """
    try:
        import onnxruntime_qnn
    except ImportError as error:
        raise RuntimeMissing("onnxruntime-qnn cannot be loaded", why=str(error), fix=_INSTALL) from None
    return str(onnxruntime_qnn.get_library_path())


def session(
    model: Path, provider_options: Mapping[str, str], entries: Mapping[str, str] | None = None, severity: int = 3
) -> Any:
    """An ``onnxruntime.InferenceSession`` whose every node runs on the NPU or its emulator.

    Args:
        entries: more session configuration.

    Raises:
        StageError: a node has no place there, or the graph cannot be compiled.
        RuntimeMissing: there is no such device, and no emulator.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if not any(device.ep_name == QNN for device in onnxruntime.get_ep_devices()):
        plugin = library()
        try:
            onnxruntime.register_execution_provider_library(QNN, plugin)
        except Exception as error:  # the binding has several classes of its own
            why = str(error).split("\n")[0]
            raise RuntimeMissing(
                "onnxruntime-qnn does not fit the installed onnxruntime", why=why, fix=_INSTALL
            ) from None
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == QNN]
    if not devices:
        raise RuntimeMissing("onnxruntime-qnn offers no device here", why="it has neither an NPU nor its emulator")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = severity
    given = {"session.disable_cpu_ep_fallback": "1", "session.record_ep_graph_assignment_info": "1", **(entries or {})}
    for key, value in given.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(devices[:1], dict(provider_options))
    try:
        with chatter_aside():
            return onnxruntime.InferenceSession(str(model), settings)
    except Exception as error:  # the binding has several classes of its own
        raise StageError(f"{model.name} cannot run on the NPU as a whole", why=str(error).split("\n")[0]) from error


def placement(opened: Any) -> dict[str, int]:
    """How many nodes of a session's graph each execution provider took."""
    counts: dict[str, int] = {}
    for part in opened.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def compile_graphs(
    graphs: Mapping[str, Path], out_dir: Path, soc: str, share: bool = False
) -> dict[str, dict[str, int]]:
    """Write for every graph ``NAME.onnx`` (one EPContext node) and its binary into ``out_dir``.

    Args:
        share: one binary holds the weights of all graphs once.

    Returns:
        the `placement` of each graph's nodes.

    Raises:
        StageError: a graph cannot be compiled, or the compiler left a file out.
    """
    placed = {}
    kept = []  # weights are shared with sessions that are still open
    for index, (name, path) in enumerate(graphs.items()):
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(out_dir / f"{name}.onnx"),
        }
        if share:
            entries |= {"ep.share_ep_contexts": "1", "ep.stop_share_ep_contexts": str(int(index == len(graphs) - 1))}
        opened = session(path, options(soc), entries)
        placed[name] = placement(opened)
        kept.append(opened)
    del kept
    for name in graphs:
        _check_compiled(out_dir / f"{name}.onnx")
    return placed


def _check_compiled(path: Path) -> None:
    import onnx

    if not path.is_file():
        raise StageError(f"the compiler wrote no {path.name}")
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    binaries = [
        attribute.s.decode() for node in nodes for attribute in node.attribute if attribute.name == "ep_cache_context"
    ]
    if [node.op_type for node in nodes] != ["EPContext"] or len(binaries) != 1:
        raise StageError(f"{path.name} is not one compiled graph", why=f"nodes: {[node.op_type for node in nodes][:5]}")
    if not (path.parent / binaries[0]).is_file():
        raise StageError(f"{path.name} names {binaries[0]}, which the compiler did not write")
