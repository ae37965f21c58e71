"""Started with the Python of the environment for llama.cpp: runs one GGUF file there. Not a module of this project.

It lies in a folder without modules, since Python looks for what is imported beside the file that it starts first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np


class LlamaCpp:
    """`pipeline.bench_loop.Engine` on llama.cpp's own interface, at its default settings but for size and threads."""

    def __init__(self, path: str, length: int, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = length
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._batch = int(llama_cpp.llama_n_batch(self._context))
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self.context_length = int(llama_cpp.llama_model_n_ctx_train(self._model))

    def start(self, length: int) -> None:  # noqa: ARG002 - the context has been made for the longest sequence
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def feed(self, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), self._batch):
            part = ids[first : first + self._batch]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            if code := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(part))):
                sys.exit(f"llama_decode failed with {code}")
        llama_cpp.llama_synchronize(self._context)

    def rewind(self, length: int) -> None:
        if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, length, -1):
            sys.exit(f"llama.cpp cannot go back to {length} tokens")

    def next_token(self) -> int:
        values = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self.vocabulary,))
        return int(values.argmax())

    def logits(self) -> bytes:
        return ctypes.string_at(llama_cpp.llama_get_logits_ith(self._context, -1), 4 * self.vocabulary)


def quantize(source: str, out: str) -> None:
    """Write ``out``, Q4_K_M, from a GGUF file of floats, as llama.cpp's own tool does."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if code := llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)):
        sys.exit(f"llama_model_quantize failed with {code}")


def main() -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    if "quantize" in job:
        quantize(job["quantize"], job["out"])
        return
    found = importlib.util.spec_from_file_location("bench_loop", job["loop"])
    assert found is not None
    assert found.loader is not None
    loop = importlib.util.module_from_spec(found)
    found.loader.exec_module(loop)
    loop.die_with_parent()
    out = loop.results()
    errors = llama_cpp.llama_log_callback(
        lambda level, text, _: sys.stderr.write(text.decode()) if level == 4 else None
    )
    llama_cpp.llama_log_set(errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    longest = max(map(len, job["windows"])) + 1 if "windows" in job else loop.room(job["prefill"], job["decode"])
    begin = time.perf_counter()
    engine = LlamaCpp(job["model"], longest, job["threads"])
    loop.serve(engine, time.perf_counter() - begin, job, out)


if __name__ == "__main__":
    main()
