"""Replay the golden results of a package that embeds or ranks: does this device compute what was validated?

This file is also shipped inside packages, where ``python replay.py`` runs it: it needs onnxruntime and numpy, and
nothing of this project. Each golden entry has token ids and the result that was computed when the package was
validated; it is computed again, and held against that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

CONFIG = "retrieval.json"
GOLDEN = "golden.jsonl"
MANIFEST = "manifest.json"
# Exit codes, those of qwen-onnx: the device differs or the package is damaged; the runtime is missing.
DIFFERS, MISSING = 9, 10


def load(package: Path, config: Mapping[str, Any], threads: int = 0) -> Any:
    """An ``onnxruntime.InferenceSession`` of the package's graph on the processor; 0 threads are all cores."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    return onnxruntime.InferenceSession(str(package / config["filename"]), options, providers=["CPUExecutionProvider"])


def run(session: Any, output: str, rows: Sequence[Sequence[int]], left: bool = False) -> Floats:
    """Results ``[B, D]`` of rows of token ids, which are filled up on the right (or ``left``) and masked."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, part], mask[index, part] = row, 1
    found: Floats = session.run([output], {"input_ids": ids, "attention_mask": mask})[0]
    return found


def scores(logits: Floats) -> npt.NDArray[np.float64]:
    """The probability of the last label among ``[B, L]`` logits of labels: of *yes* against *no*."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    found: npt.NDArray[np.float64] = shifted[..., -1] / shifted.sum(axis=-1)
    return found


def cosines(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The cosine of each row of ``left`` with that of ``right``."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    found: npt.NDArray[np.float64] = (left * right).sum(axis=-1) / lengths
    return found


def read(path: Path, dimensions: int) -> list[dict[str, Any]]:
    """The entries of a ``golden.jsonl``: ``name``, ``ids`` and ``values`` (``dimensions`` of them).

    Raises:
        OSError, ValueError, LookupError, TypeError: it cannot be read, or has no results.
    """
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for entry in entries:
        ids, values = entry["ids"], entry["values"]
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError("token ids are natural numbers, at least one")
        if len(values) != dimensions or not all(isinstance(number, int | float) for number in values):
            raise ValueError(f"a result has {dimensions} numbers")
    if not entries:
        raise ValueError("it has no results")
    return entries


def replay(session: Any, config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute all entries again, one by one.

    Returns:
        ``texts``: how many; ``cosine``: the smallest of results with recorded ones, or for labels ``score``: the
        largest difference of scores.
    """
    found = np.concatenate([run(session, config["output"], [entry["ids"]]) for entry in entries])
    wanted = np.asarray([entry["values"] for entry in entries], np.float32)
    if config["labels"]:
        differs = float(np.abs(scores(found) - scores(wanted)).max())
        return {"texts": len(entries), "score": round(differs, 6) if np.isfinite(differs) else float("inf")}
    cosine = float(cosines(found, wanted).min())
    return {"texts": len(entries), "cosine": round(cosine, 6) if np.isfinite(cosine) else 0.0}


def verdict(result: Mapping[str, Any], tolerance: Mapping[str, float]) -> str:
    """What is out of tolerance (``cosine`` at least, ``score`` at most); empty when nothing is."""
    if "cosine" in result and not result["cosine"] >= tolerance["cosine"]:
        least = f"at least {tolerance['cosine']:g} is expected"
        return f"a vector has cosine {result['cosine']:.4f} with the recorded one, {least}"
    if "score" in result and not result["score"] <= tolerance["score"]:
        return f"a score differs by {result['score']:.4f}, at most {tolerance['score']:g} is expected"
    return ""


def told(result: Mapping[str, Any]) -> str:
    """A few words on a result."""
    near = f"cosines at least {result['cosine']:.5f}" if "cosine" in result else f"scores within {result['score']:.5f}"
    return f"{result['texts']} results computed again, {near}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the package in this file's folder, or in the folder given; returns an exit code."""
    parser = argparse.ArgumentParser(description="Does this device compute what was validated? Needs onnxruntime.")
    parser.add_argument("package", type=Path, nargs="?", default=Path(__file__).parent)
    package: Path = parser.parse_args(arguments).package
    try:
        config = json.loads((package / CONFIG).read_bytes())
        tolerance = json.loads((package / MANIFEST).read_bytes())["replay"]
        entries = read(package / GOLDEN, config["dimensions"])
    except Exception as error:  # whatever it is, the reader is told in one line
        return _failed(error, "fetch the package again: it is damaged", DIFFERS)
    try:
        begin = time.perf_counter()
        result = replay(load(package, config), config, entries)
    except Exception as error:
        return _failed(error, "install the runtime that README.md names", MISSING)
    problem = verdict(result, tolerance)
    print(f"{told(result)} ({time.perf_counter() - begin:.0f} s)")
    print(f"FAIL: {problem}" if problem else "PASS: this device computes what was validated")
    return DIFFERS if problem else 0


def _failed(error: Exception, fix: str, code: int) -> int:
    text = str(error).splitlines()[0] if str(error) else ""
    print(f"error: {type(error).__name__}: {text}\nnext: {fix}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
