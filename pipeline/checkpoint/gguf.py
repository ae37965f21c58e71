"""GGUF files, converted to ordinary checkpoints in a limited process.

A GGUF file comes from outside, and a hostile one can make its parser hang or claim absurd sizes. So `check` walks over
it first, and believes no count or length that the file has not the bytes for; and all of it, that walk included, runs
in a process whose memory and time are bounded.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import Progress
from pipeline.errors import CheckpointError
from pipeline.facts.family import FAMILIES


@dataclass(frozen=True)
class Limits:
    """Seconds of processor time, and bytes of address space on top of what the file's size explains."""

    seconds: int
    memory: int


# Libraries reserve far more addresses than they use: for each thread's stack and heap, on every core.
METADATA = Limits(60, 8_000_000_000)
WEIGHTS = Limits(3600, 16_000_000_000)

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # gguf.TokenType
# Value types of the GGUF specification: widths of the scalars, and the two others.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_ITEMS = 4_000_000  # the largest vocabularies have 300 thousand tokens
_MAX_DIMS = 4


def convert(source: Path, out_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` (float32) and the tokenizer.

    Raises:
        CheckpointError: the file is no GGUF, is damaged, or did not parse within its limits.
        OSError: the disk is full.
    """
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(
                "the checkpoint is not a GGUF file",
                where=str(source),
                why="a checkpoint is a GGUF file, or a directory with safetensors",
                fix="correct the source in the recipe",
            )
    progress(0.05, "reading GGUF metadata and tokenizer")
    _limited("tokenizer", source, out_dir, METADATA)
    progress(0.2, "dequantizing GGUF weights")
    _limited("weights", source, out_dir, WEIGHTS)
    return {"source": "gguf"}


def _limited(what: str, source: Path, out_dir: Path, limits: Limits) -> None:
    command = [sys.executable, "-m", "pipeline.checkpoint.gguf", what, str(source.resolve()), str(out_dir.resolve())]
    command += [str(limits.seconds), str(limits.memory), str(os.getpid())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    exceeded = f"it took more than {limits.seconds} s of processor time, or more memory than it may"
    try:
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10 * limits.seconds,  # of waiting for a busy machine; the processor time is limited where it runs
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(source, what, exceeded) from None
    if run.returncode == 0:
        return
    if run.returncode in (-signal.SIGXCPU, -signal.SIGKILL) or "MemoryError" in run.stderr:
        raise _refused(source, what, exceeded)
    if "No space left" in run.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out_dir))
    lines = run.stderr.strip().splitlines()
    why = lines[-1].removeprefix("ValueError: ")[:500] if lines else f"its parser ended with code {run.returncode}"
    raise _refused(source, what, why)


def _refused(source: Path, what: str, why: str) -> CheckpointError:
    return CheckpointError(f"the GGUF file's {what} cannot be read", where=str(source), why=why, fix="fetch it again")


def _limit(limits: Limits, explained: int) -> None:
    """Bound this process; ``explained`` are the bytes that the file itself accounts for."""
    memory = limits.memory + explained
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


def check(source: Path) -> int:
    """Walk over a GGUF file's structure; returns the number of its weights.

    Every count and length must be covered by bytes of the file, so that time and memory are bounded by its size.

    Raises:
        ValueError: it is truncated, claims what it does not have, or is of no supported architecture.
    """
    import gguf

    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data)
        walk.take(4)
        version = walk.number("<I")
        if version not in (2, 3):
            raise ValueError(f"it is of GGUF version {version}; 2 and 3 can be read")
        tensors, pairs = walk.count("tensors"), walk.count("metadata")
        metadata: dict[bytes, Any] = {}
        for _ in range(pairs):
            name = walk.string()
            metadata[name] = walk.value(walk.number("<I"))
        architecture = metadata.get(b"general.architecture")
        known = architecture.decode(errors="replace") if isinstance(architecture, bytes) else architecture
        # Such a file does not say whether the router's weights are normalized: mixtures of experts cannot be read.
        supported = [name for name, family in FAMILIES.items() if not family.experts]
        if known not in supported:
            raise ValueError(f"architecture {known!r} is not supported; supported: {', '.join(supported)}")
        alignment = metadata.get(b"general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment} bytes is not possible")
        ends, weights = [], 0
        for _ in range(tensors):
            name = walk.string()
            dims = [walk.number("<Q") for _ in range(min(walk.number("<I"), _MAX_DIMS + 1))]
            kind, offset = walk.number("<I"), walk.number("<Q")
            if kind not in sizes or not 1 <= len(dims) <= _MAX_DIMS or 0 in dims:
                raise ValueError(f"tensor {name!r} has an unknown type or shape")
            block, width = sizes[kind]
            ends.append((offset + math.prod(dims) // block * width, name))
            weights += math.prod(dims)
        start = -(-walk.at // alignment) * alignment
        last, name = max(ends, default=(0, b""))
        if start + last > len(data):
            raise ValueError(f"tensor {name!r} ends at byte {start + last}, the file at {len(data)}: it is truncated")
    return weights


class _Walk:
    """A position in a GGUF file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> int:
        """Go ``size`` bytes on; returns the position before."""
        before = self.at
        if size > len(self.data) - before:
            raise ValueError(f"at byte {before} it claims {size} bytes more, but it ends at {len(self.data)}")
        self.at += size
        return before

    def number(self, form: str) -> int:
        """An unsigned integer of a `struct` format."""
        value: int = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, what: str) -> int:
        """A number of items, each of which has 8 bytes at least."""
        number = self.number("<Q")
        if number > min(_MAX_ITEMS, (len(self.data) - self.at) // 8):
            raise ValueError(f"at byte {self.at - 8} it claims {number} {what}, but it has {len(self.data)} bytes")
        return number

    def string(self) -> bytes:
        """A string, with its length before it."""
        size = self.number("<Q")
        start = self.take(size)
        return self.data[start : start + size]

    def value(self, kind: int) -> bytes | int | None:
        """A value: a string, an unsigned integer of 32 bits, or ``None`` for what is merely passed."""
        if kind == _STRING:
            return self.string()
        if kind == _UINT32:
            return self.number("<I")
        if kind in _WIDTHS:
            self.take(_WIDTHS[kind])
        elif kind == _ARRAY:
            items = self.number("<I")
            if items == _STRING:
                for _ in range(self.count("strings")):
                    self.take(self.number("<Q"))
            elif items in _WIDTHS:
                number = self.number("<Q")
                if number > _MAX_ITEMS:
                    raise ValueError(f"at byte {self.at - 8} it claims {number} numbers")
                self.take(number * _WIDTHS[items])
            else:
                raise ValueError(f"at byte {self.at - 4} it has an array of unknown type {items}")
        else:
            raise ValueError(f"at byte {self.at - 4} it has a value of unknown type {kind}")
        return None


def _strings(field: Any) -> list[str]:
    return [bytes(field.parts[index]).decode("utf-8") for index in field.data]


def _field(reader: Any, name: str) -> Any:
    if name not in reader.fields:
        raise ValueError(f"its metadata has no {name}")
    return reader.fields[name]


def _optional(reader: Any, name: str) -> Any:
    return reader.fields[name].contents() if name in reader.fields else None


def _token_id(reader: Any, name: str, tokens: list[str]) -> int:
    number = int(_field(reader, name).contents())
    if not 0 <= number < len(tokens):
        raise ValueError(f"{name} is {number}, but there are {len(tokens)} tokens")
    return number


def _write_tokenizer(source: Path, out_dir: Path) -> None:
    """Write the tokenizer from the GGUF metadata.

    transformers' own reading of it loses most control tokens and takes another end-of-answer token.
    """
    import gguf
    import tokenizers
    from transformers import Qwen2TokenizerFast
    from transformers.convert_slow_tokenizer import Qwen2Converter

    reader = gguf.GGUFReader(source)
    if _optional(reader, "tokenizer.ggml.model") != "gpt2":
        raise ValueError("its tokenizer is not of Qwen's kind (byte-level BPE)")
    tokens = _strings(_field(reader, "tokenizer.ggml.tokens"))
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(_field(reader, "tokenizer.ggml.merges"))]
    kinds = _field(reader, "tokenizer.ggml.token_type").contents()
    if len(kinds) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens, but {len(kinds)} token types")
    vocab = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL}
    backend = Qwen2Converter(None).converted(vocab, merges)
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)])
            if backend.token_to_id(token) != index:
                raise ValueError(f"token {token!r} would become {backend.token_to_id(token)}, not {index}")
    eos = _token_id(reader, "tokenizer.ggml.eos_token_id", tokens)
    end_of_text = tokens.index("<|endoftext|>") if "<|endoftext|>" in tokens else eos
    has_pad = "tokenizer.ggml.padding_token_id" in reader.fields
    pad = _token_id(reader, "tokenizer.ggml.padding_token_id", tokens) if has_pad else end_of_text
    architecture = _field(reader, "general.architecture").contents()
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=backend,
        eos_token=tokens[eos],
        pad_token=tokens[pad],
        unk_token=None,
        bos_token=None,
        model_max_length=int(_field(reader, f"{architecture}.context_length").contents()),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _optional(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(out_dir)
    generation = {"eos_token_id": list(dict.fromkeys([eos, end_of_text])), "pad_token_id": pad, "do_sample": False}
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")


def _rope_scaling(reader: Any, architecture: str) -> dict[str, Any] | None:
    """The scaling of the rotary frequencies in transformers' words; what is not supported is refused later, by name."""
    kind = _optional(reader, f"{architecture}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    found = {"rope_type": kind, "factor": _optional(reader, f"{architecture}.rope.scaling.factor")}
    original = _optional(reader, f"{architecture}.rope.scaling.original_context_length")
    return found if original is None else {**found, "original_max_position_embeddings": int(original)}


def _write_weights(source: Path, out_dir: Path) -> None:
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    # Alone in a directory: transformers would also take an adapter or a configuration that lies beside the file.
    alone = out_dir / "gguf"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(source)
    config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf")
    head_dim = _optional(gguf.GGUFReader(source), f"{config.model_type}.attention.key_length")
    if head_dim is not None:  # transformers reads neither it nor the scaling
        config.head_dim = int(head_dim)
    config.rope_scaling = _rope_scaling(gguf.GGUFReader(source), config.model_type)
    model, report = AutoModelForCausalLM.from_pretrained(
        alone, config=config, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    if absent := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(absent)} tensors, such as {absent[0]}")  # they were filled with random values
    generation = json.loads((out_dir / "generation_config.json").read_bytes())
    model.config.eos_token_id = generation["eos_token_id"][0]
    model.config.bos_token_id = generation["eos_token_id"][-1]
    model.config.pad_token_id = generation["pad_token_id"]
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(out_dir, max_shard_size="100GB")
    (alone / "model.gguf").unlink()
    alone.rmdir()


def _main(what: str, source: Path, out_dir: Path, limits: Limits, parent: int) -> None:
    _die_with_parent(parent)
    _limit(limits, 4 * source.stat().st_size)
    weights = check(source)
    if what == "tokenizer":
        _write_tokenizer(source, out_dir)
    else:
        _limit(
            limits, 16 * weights
        )  # float32 weights exist up to four times while transformers turns them into a model
        _write_weights(source, out_dir)


if __name__ == "__main__":
    _main(
        sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Limits(int(sys.argv[4]), int(sys.argv[5])), int(sys.argv[6])
    )
