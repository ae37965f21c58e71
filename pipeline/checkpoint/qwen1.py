"""Qwen 1.0 checkpoints, converted to Qwen2's layout without running the code that comes with them.

The weights keep their bytes: query, key and value are rows of one fused matrix, one after the other, so that each shard
is its old bytes below a new header. Nothing is loaded.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifact import Progress
from pipeline.checkpoint import files as checkpoint_files, qwen1_tokenizer
from pipeline.checkpoint.files import INDEX, WIDTHS
from pipeline.errors import CheckpointError
from pipeline.facts import qwen1_layout

_BLOCK = 1 << 20
_EMBEDDING = "transformer.wte.weight"
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Settings of generation_config.json that carry over; those of the second row where it samples.
_SETTINGS = {"repetition_penalty": float, "max_new_tokens": int}
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int}


def convert(source: Path, out_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write a checkpoint that `checkpoint_files.check_directory` has passed as one of ``Qwen2ForCausalLM``.

    Returns:
        facts: what it was, and what became of its scaling beyond ``seq_length``.

    Raises:
        CheckpointError: it has tensors that Qwen2 has no place for, or its tokenizer is no byte-level BPE.
        OSError: the disk is full.
    """
    config = qwen1_layout.as_qwen2(json.loads((source / "config.json").read_bytes()), str(source / "config.json"))
    places = {name: names for name, _, names in qwen1_layout.weights(config)}
    files = checkpoint_files.weight_files(source)
    shards = {path: checkpoint_files.read_tensors(path) for path in files}
    _refuse_others(shards, {*places, "lm_head.weight"}, source)
    progress(0.05, "tokenizer of Qwen 1.0")
    given = source / "generation_config.json"
    settings = json.loads(given.read_bytes()) if given.is_file() else {}
    chat = settings.get("chat_format") == "chatml"
    eos = [qwen1_tokenizer.END, qwen1_tokenizer.END_OF_TEXT][0 if chat else 1 :]
    context = config["max_position_embeddings"]
    ids = qwen1_tokenizer.write(source / qwen1_tokenizer.FILE, out_dir, config["vocab_size"], context, eos[0])
    tokens = {"eos_token_id": [ids[token] for token in eos], "pad_token_id": ids[qwen1_tokenizer.END_OF_TEXT]}
    _write_json(out_dir / "generation_config.json", {**tokens, **_generation(settings)})
    config |= {
        "eos_token_id": ids[eos[0]],
        "bos_token_id": ids[qwen1_tokenizer.END_OF_TEXT],
        "pad_token_id": ids[qwen1_tokenizer.END_OF_TEXT],
        "torch_dtype": next(_DTYPES[found[_EMBEDDING][0]] for found in shards.values() if _EMBEDDING in found),
    }
    _write_json(out_dir / "config.json", config)
    where: dict[str, str] = {}
    for index, path in enumerate(files):
        progress(0.1 + 0.8 * index / len(files), f"converting {path.name}")
        moved = list(_moved(shards[path], places))
        _write_shard(path, out_dir / path.name, moved)
        where |= {name: path.name for _, parts in moved for name, _, _ in parts}
    if files[0].name != checkpoint_files.SINGLE:
        total = sum(path.stat().st_size for path in files)
        _write_json(out_dir / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for path in checkpoint_files.parts(source):
        if path.name.startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, out_dir / path.name)
    return {"source": "Qwen 1.0", "context_ends": "where dynamic NTK and log-n scaling would begin (seq_length)"}


def _refuse_others(shards: dict[Path, checkpoint_files.Tensors], known: set[str], source: Path) -> None:
    others = sorted(name for found in shards.values() for name in found if name not in known)
    others = [name for name in others if not qwen1_layout.is_buffer(name)]
    if others:
        raise CheckpointError(
            f"the checkpoint has {len(others)} tensors that Qwen2 has no place for, such as {others[0]}",
            where=str(source),
            why="without them the model would compute something else",
            fix="use one as it was published",
        )


Part = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def _moved(
    tensors: checkpoint_files.Tensors, places: dict[str, tuple[str, ...]]
) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """For each tensor of a shard, in order, its size in bytes and what its rows become: nothing, for buffers."""
    for name, (dtype, dims) in tensors.items():
        names = places.get(name, ())
        rows = (dims[0] // len(names), *dims[1:]) if names else ()
        yield math.prod(dims) * WIDTHS[dtype], tuple((part, dtype, rows) for part in names)


def _write_shard(source: Path, out: Path, moved: list[tuple[int, tuple[Part, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, parts in moved:
        for name, dtype, dims in parts:
            size = math.prod(dims) * WIDTHS[dtype]
            header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format keeps tensors aligned
    with source.open("rb") as given, out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        given.seek(8 + struct.unpack("<Q", given.read(8))[0])
        for size, parts in moved:
            left = size
            while left:
                block = given.read(min(left, _BLOCK))
                if not block:
                    raise CheckpointError("a safetensors file changed while it was read", where=str(source))
                left -= len(block)
                if parts:
                    file.write(block)


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that transformers knows, too; the others are of the code that is not run."""
    sample = settings.get("do_sample") is True
    wanted = _SETTINGS | (_SAMPLING if sample else {})
    found: dict[str, Any] = {"do_sample": sample}
    for name, kind in wanted.items():
        value: Any = settings.get(name)
        if type(value) in (int, float) and 0 <= value < 1e9:
            found[name] = kind(value)
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
