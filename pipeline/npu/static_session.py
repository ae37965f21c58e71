"""Running the stages of a static decoder one by one with ONNX Runtime, each where it is wanted.

onnxruntime-genai runs them as one pipeline and shows the logits of the last token only; measuring needs all rows, and
calibration what goes in and out of each stage. Shapes as in `pipeline.npu.static_decoder`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Feed = dict[str, "npt.NDArray[Any]"]
_TYPES = {"tensor(float)": np.float32, "tensor(uint16)": np.uint16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Stages:
    """Open stages; ``watch`` is called with the name and the inputs of each that runs."""

    sessions: Mapping[str, Any]
    window: int
    pad: int
    watch: Callable[[str, Feed], None] = lambda name, feed: None  # noqa: ARG005

    def cache(self) -> Feed:
        """An empty cache: ``past_key_values.N.key`` and ``.value``."""
        declared = self.sessions["prefill"].get_inputs()
        return {
            entry.name: np.zeros(entry.shape, _TYPES[entry.type])
            for entry in declared
            if entry.name.startswith("past_key_values.")
        }

    def call(self, name: str, ids: Sequence[int], start: int, cache: Feed) -> npt.NDArray[np.float32]:
        """Run the layers (``prefill`` or ``decode``) on ``ids`` in the slots from ``start``; the cache is updated.

        Returns:
            hidden ``[n, H]`` float32 of the n given tokens.
        """
        width = self.window if name == "prefill" else 1
        padded = np.full((1, width), self.pad, np.int32)
        padded[0, : len(ids)] = ids
        given: Feed = {
            "input_ids": padded,
            "past_seq_len": np.array([[start + width - 1]], np.int32),
            "total_seq_len": np.array([0], np.int32),
            **cache,
        }
        for stage in ("front", name, "update"):
            given |= self._run(stage, given)
        cache |= {key: given[key.replace("past_key_values", "present")] for key in cache}
        hidden: npt.NDArray[np.float32] = given["hidden"][0, : len(ids)]
        return hidden

    def prefill(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], Feed]:
        """Hidden ``[n, H]`` of all ``ids``, window by window, and the cache after them."""
        cache = self.cache()
        starts = range(0, len(ids), self.window)
        rows = [self.call("prefill", ids[start : start + self.window], start, cache) for start in starts]
        return np.concatenate(rows), cache

    def logits(self, hidden: npt.NDArray[np.float32], head: str = "head") -> npt.NDArray[np.float32]:
        """Logits ``[n, V]`` float32 of hidden rows ``[n, H]``, as many rows at a time as the head takes."""
        width = self.sessions[head].get_inputs()[0].shape[1]
        parts = []
        for start in range(0, len(hidden), width):
            part = hidden[start : start + width]
            padded = np.zeros((1, width, hidden.shape[1]), np.float32)
            padded[0, : len(part)] = part
            parts.append(self._run(head, {"last_hidden": padded})["logits"][0, : len(part)])
        return np.concatenate(parts)

    def _run(self, name: str, given: Feed) -> Feed:
        session = self.sessions[name]
        feed = {entry.name: given[entry.name] for entry in session.get_inputs()}
        self.watch(name, feed)
        outputs = [entry.name for entry in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, feed), strict=True))


def on_processor(model: Path) -> Any:
    """A session of one stage on the processor."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])


def link(source: Path, target: Path) -> None:
    """Let ``target`` be the file ``source``, without a copy where the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
