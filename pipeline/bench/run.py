"""One run of one subject of a benchmark, in a process of its own: ``python -m pipeline.bench.run <job on stdin>``.

Jobs, as JSON objects: ``{"engine", "path", "threads", "prefill", "decode"}`` times a run, and writes one JSON object;
``{"engine", "path", "threads", "windows"}`` writes the logits of windows of tokens, float32; ``{"reference", "out",
"count", "length"}`` writes windows of evaluation text and the reference's log-probabilities into ``out``; ``{"export",
"out"}`` makes what Olive makes of a checkpoint, and ``{"gguf", "out"}`` a GGUF file of floats.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import bench_loop
from pipeline.errors import QwenOnnxError, UsageError

WINDOWS = "windows.json"


class Genai:
    """`pipeline.bench_loop.Engine` on onnxruntime-genai."""

    def __init__(self, package: Path, threads: int) -> None:
        from pipeline.runtime import session

        self._session = session.open_package(package, threads)
        if self._session.window > 1:
            raise UsageError(f"{package} is compiled for an NPU", why="an emulator's speed says nothing of the chip's")
        self.vocabulary, self.context_length = self._session.vocabulary, self._session.context_length
        self._generator: Any = None

    def start(self, length: int) -> None:
        from pipeline.runtime import generate

        self._generator = None  # the memory of the sequence before comes back first
        self._generator = generate.start(self._session, length)

    def feed(self, ids: Sequence[int]) -> None:
        self._generator.append_tokens(np.asarray(ids, np.int32))
        self._logits = self._generator.get_logits()

    def rewind(self, length: int) -> None:
        self._generator.rewind_to(length)

    def next_token(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self) -> bytes:
        return np.asarray(self._logits, np.float32).reshape(-1)[: self.vocabulary].tobytes()


class Torch:
    """`pipeline.bench_loop.Engine` on PyTorch, with transformers' model and its cache."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        kind = getattr(torch, dtype)
        self._torch, self._cache_of = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind, local_files_only=True).eval()
        config = self._model.config
        self.vocabulary, self.context_length = int(config.vocab_size), int(config.max_position_embeddings)

    def start(self, length: int) -> None:  # noqa: ARG002 - its cache grows as it goes
        self._cache = self._cache_of()

    def feed(self, ids: Sequence[int]) -> None:
        given = self._torch.tensor([list(ids)])
        out = self._model(given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = out.logits[0, -1]

    def rewind(self, length: int) -> None:
        self._cache.crop(length)

    def next_token(self) -> int:
        return int(self._logits.argmax())

    def logits(self) -> bytes:
        values: bytes = self._logits.float().numpy().tobytes()
        return values


def _torch(dtype: str) -> Callable[[Path, int], bench_loop.Engine]:
    return lambda path, threads: Torch(path, threads, dtype)


_ENGINES: dict[str, Callable[[Path, int], bench_loop.Engine]] = {
    "genai": Genai,
    "torch-float32": _torch("float32"),
    "torch-bfloat16": _torch("bfloat16"),
}


def run(job: Mapping[str, Any], out: Any) -> None:
    """Load a subject, and time it or write its logits.

    Raises:
        UsageError: the tokens do not fit its context, or its speed here would say nothing.
        RuntimeMissing: its runtime is not to be had here.
    """
    kind = job["engine"]
    _import(kind)
    begin = time.perf_counter()
    engine = _ENGINES[kind](Path(job["path"]), job["threads"])
    load = time.perf_counter() - begin
    if "prefill" in job and (needed := bench_loop.room(job["prefill"], job["decode"])) > engine.context_length:
        raise UsageError(
            f"{needed - 1} tokens do not fit {job['path']}",
            why=f"its context holds {engine.context_length}",
            fix="give shorter --prefill and --decode",
        )
    bench_loop.serve(engine, load, job, out)


def _import(kind: str) -> None:
    """Import the runtime, which is no part of loading a model."""
    from pipeline.runtime import session

    if kind == "genai":
        session.runtime()
    else:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, DynamicCache  # noqa: F401


def write_reference(checkpoint: Path, count: int, length: int, out: Path) -> None:
    """Write the windows that validation reads (`WINDOWS`), and the reference's log-probabilities of each, ``<n>.npy``.

    The arrays are ``[length, vocabulary]`` float32, from the whole window at once, as validation takes them.
    """
    from pipeline.checkpoint import reference
    from pipeline.fidelity import metrics, text_agreement

    model = reference.load(checkpoint)
    windows = text_agreement.cut(model.tokenizer, count, length)
    for index, window in enumerate(windows):
        np.save(out / f"{index}.npy", metrics.log_softmax(model.logits(window.ids)))
    rows = [{"domain": window.domain, "ids": window.ids} for window in windows]
    (out / WINDOWS).write_text(json.dumps(rows), encoding="utf-8")


def main() -> int:
    """Do the job on standard input; errors that are expected leave as JSON, with their exit code."""
    job = json.load(sys.stdin)
    bench_loop.die_with_parent()
    out = bench_loop.results()
    try:
        if "export" in job:
            from pipeline.export import exporter

            exporter.export_plain_int4(Path(job["export"]), Path(job["out"]))
        elif "gguf" in job:
            from pipeline.export import gguf_export

            gguf_export.export(Path(job["gguf"]), Path(job["out"]))
        elif "reference" in job:
            write_reference(Path(job["reference"]), job["count"], job["length"], Path(job["out"]))
        else:
            run(job, out)
    except QwenOnnxError as error:
        print(json.dumps(error.as_dict()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
