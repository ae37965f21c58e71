"""What makes up a checkpoint directory: its digest, and every check that needs no weights in memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.checkpoint import qwen1_tokenizer
from pipeline.checkpoint.headless import full_name
from pipeline.errors import CheckpointError
from pipeline.facts import multimodal, qwen1_layout
from pipeline.facts.family import FAMILIES, Family, Shape, read_shape
from pipeline.facts.multimodal import Layout
from pipeline.runtime import audio_tower

_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PREPROCESSOR, _CHAT_TEMPLATE = "preprocessor_config.json", "chat_template.json"
# Files beside config.json that may ask for code, and what they are for.
_ASKING = {
    "tokenizer_config.json": "tokenizer",
    _PREPROCESSOR: "image processor",
    "processor_config.json": "processor",
    "video_preprocessor_config.json": "video processor",
}
_ADAPTER, _ADAPTER_CONFIG = ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
# A shard of a thousand tensors has 100 kB of header; the format's own limit of 100 MB would cost a gigabyte to parse.
_MAX_JSON = 16_000_000
_MAX_TOKENIZER = 64_000_000
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
WIDTHS = {"BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4} | {
    "I64": 8,
    "U64": 8,
    **_FLOATS,
}
# How another library runs embedding models; what they say is in `pipeline.task`.
_FOREIGN = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
# A name that only the classes without a head have, and what to do with a checkpoint of theirs.
_EMBEDDING = "embed_tokens.weight"
_NO_HEAD = "it has no head to generate with: if it is an embedding model, set `task: embed` in the recipe"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype and shape


def tree_digest(folder: Path) -> str:
    """sha256 (hex) of a checkpoint directory: `digest.of_tree` over the files that are used, so that notes, caches and
    a clone's ``.git`` do not count, and a local copy equals what the hub delivers."""
    return digest.of_tree(folder, {path.name: digest.of_file(path) for path in parts(folder)})


def is_part(name: str) -> bool:
    """Whether a file of that name is part of a checkpoint: weights, configuration, tokenizer, licence."""
    return name not in _FOREIGN and (
        name.endswith((".safetensors", ".json", ".jinja", ".tiktoken"))
        or name in ("merges.txt", "vocab.txt")
        or name.startswith(("LICENSE", "NOTICE"))
    )


def parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_part(path.name) and path.is_file())


def check_directory(folder: Path, headless: bool = False) -> dict[str, Any]:
    """Check a checkpoint; returns its `Shape` and the number of parameters as facts.

    Args:
        headless: whether it may lack a head, and the full names of weights (`pipeline.checkpoint.headless`).

    Raises:
        CheckpointError: it is damaged, unsafe, incomplete or of no supported family.
    """
    _check_links(folder)
    files = weight_files(folder)
    found = {path.name: _read_json(path, _limit(path)) for path in parts(folder) if path.suffix == ".json"}
    config = folder / "config.json"
    # The code of Qwen 1.0 is known, and never run: the checkpoint is converted.
    convertible = qwen1_layout.is_qwen1(found.get(config.name))
    for name, what in _ASKING.items():
        if "auto_map" in found.get(name, {}) and not convertible:
            raise CheckpointError(
                f"the checkpoint's {what} asks for code of its own (auto_map)",
                where=str(folder / name),
                why="running a checkpoint's code would give it this machine",
                fix=f"use a checkpoint whose {what} transformers has built in",
            )
    if config.name not in found:
        raise CheckpointError("the checkpoint has no config.json", where=str(folder), fix="copy it from the publisher")
    settings = found[config.name]
    shape = read_shape(settings, str(config))
    if settings.get("quantization_config"):
        raise CheckpointError(
            "the checkpoint is quantized already (quantization_config)",
            where=str(config),
            why="rounding it again would add to its error",
            fix="use the publisher's float checkpoint, or its GGUF file",
        )
    if convertible:
        qwen1_tokenizer.read(folder / qwen1_tokenizer.FILE, shape.vocabulary)
    elif not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer.json",
            where=str(folder),
            fix="save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    family = FAMILIES[shape.model_type]
    if family.multimodal:
        _check_preprocessor(settings, family, folder)
    tensors: Tensors = {}
    for path in files:
        more = read_tensors(path)
        if twice := sorted(more.keys() & tensors.keys()):
            raise CheckpointError(f"two shards have the tensor {twice[0]}", where=str(path), fix="fetch them again")
        tensors |= more
    if headless:
        tensors = {full_name(name): tensor for name, tensor in tensors.items()}
        shape = replace(shape, tied=True)
    if convertible:
        as_qwen2 = qwen1_layout.as_qwen2(settings, str(config))
        _check_tensors(tensors, {name: dims for name, dims, _ in qwen1_layout.weights(as_qwen2)}, folder)
    else:
        layout = multimodal.in_files(family, tensors)
        towers = multimodal.expected(settings, shape, layout, str(config))
        _check_tensors(tensors, dict(_expected(shape, layout)) | dict(towers), folder)
    return {**shape.facts(), "parameters": sum(math.prod(dims) for _, dims in tensors.values())}


def _limit(path: Path) -> int:
    """How many bytes of a JSON file are read."""
    return _MAX_TOKENIZER if path.name == "tokenizer.json" else _MAX_JSON


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


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that the index names."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if index.is_file():
        return [folder / name for name in check_shards(folder, _names(folder))]
    unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE)
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    reason = f"it has {', '.join(unsafe)}: loading a pickle runs its code" if unsafe else ""
    remedy = "convert it to safetensors where you trust it" if unsafe else f"the weights are in {SINGLE} or in {INDEX}"
    raise CheckpointError(
        "the checkpoint has no safetensors",
        where=str(folder),
        why=reason,
        fix=f"name the GGUF file itself: {folder / files[0]}" if files else remedy,
    )


def _check_preprocessor(settings: dict[str, Any], family: Family, folder: Path) -> None:
    """Check the file that says how pictures or sounds are prepared."""
    path = folder / _PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(
            f"the checkpoint has no {path.name}",
            where=str(folder),
            why=f"it says how {'pictures' if family.sees else 'sounds'} are prepared",
            fix="copy it from the publisher",
        )
    if family.hears:
        tower = audio_tower.read(settings, str(folder / "config.json"))
        audio_tower.check_extractor(_read_json(path, _MAX_JSON), tower, str(path))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def check_shards(folder: Path, present: Collection[str]) -> list[str]:
    """The shards that the index in ``folder`` names, all of which must be ``present``; none without an index.

    Raises:
        CheckpointError: one is missing, or the index is damaged.
    """
    index = folder / INDEX
    if SINGLE in present or not index.is_file():
        return []
    names = _read_json(index, _MAX_JSON).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError("the index of the shards has no weight_map", where=str(index))
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"the index names {name!r}, which is no safetensors file beside it", where=str(index))
        if name not in present:
            raise CheckpointError(f"the shard {name} is missing", where=str(index), fix="fetch the checkpoint again")
    return shards


def _check_tensors(tensors: Tensors, expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """What is missing would be filled with random values, without an error, when the model is loaded."""
    wrong = []
    for name, dims in expected.items():
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
            fix=_NO_HEAD if _EMBEDDING in tensors else "fetch the checkpoint again, or correct its config.json",
        )


def _expected(shape: Shape, layout: Layout) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the decoder that transformers' classes need."""
    prefix = layout.text
    hidden, heads, kv_heads = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield f"{prefix}.embed_tokens.weight", (shape.vocabulary, hidden)
    yield f"{prefix}.norm.weight", (hidden,)
    if not shape.tied:
        yield f"{layout.head}.weight", (shape.vocabulary, hidden)
    matrices = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
    }
    vectors = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    if shape.model_type.startswith("qwen2"):
        vectors |= {
            f"self_attn.{name}_proj.bias": size for name, size in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        }
    if shape.model_type.startswith("qwen3"):
        vectors |= {"self_attn.q_norm.weight": shape.head_dim, "self_attn.k_norm.weight": shape.head_dim}
    dense, sparse = dict(_mlp("mlp", shape.intermediate, hidden)), dict(_experts(shape))
    for layer in range(shape.layers):
        for name, dims in (matrices | (sparse if layer in shape.sparse_layers else dense)).items():
            yield f"{prefix}.layers.{layer}.{name}.weight", dims
        for name, size in vectors.items():
            yield f"{prefix}.layers.{layer}.{name}", (size,)


def family_of(folder: Path) -> Family:
    """The family of a checkpoint that has been checked."""
    return FAMILIES[json.loads((folder / "config.json").read_bytes())["model_type"]]


def write_chat_template(folder: Path, first: bool = False) -> None:
    """Write ``chat_template.jinja``, where the template is only in ``chat_template.json``: tokenizers do not read that.

    Args:
        first: whether that goes before what ``tokenizer_config.json`` has.

    Raises:
        CheckpointError: the file holds something else.
    """
    path, made = folder / _CHAT_TEMPLATE, folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    if not path.is_file() or made.is_file():
        return
    if not first and config.is_file() and _read_json(config, _MAX_JSON).get("chat_template"):
        return
    template = _read_json(path, _MAX_JSON).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{_CHAT_TEMPLATE} has no chat_template", where=str(path), fix="fetch it again")
    made.write_text(template, encoding="utf-8")


def _mlp(name: str, inner: int, hidden: int) -> Iterable[tuple[str, tuple[int, int]]]:
    yield f"{name}.gate_proj", (inner, hidden)
    yield f"{name}.up_proj", (inner, hidden)
    yield f"{name}.down_proj", (hidden, inner)


def _experts(shape: Shape) -> Iterable[tuple[str, tuple[int, int]]]:
    """The matrices of a layer's mixture: router, experts, and the shared expert with its gate."""
    if shape.experts is None:
        return
    yield "mlp.gate", (shape.experts.count, shape.hidden)
    for expert in range(shape.experts.count):
        yield from _mlp(f"mlp.experts.{expert}", shape.experts.intermediate, shape.hidden)
    if shape.experts.shared_intermediate:
        yield "mlp.shared_expert_gate", (1, shape.hidden)
        yield from _mlp("mlp.shared_expert", shape.experts.shared_intermediate, shape.hidden)


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


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file in the order of their bytes; its header must account for each byte, once."""
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
        if dtype not in WIDTHS or any(type(number) is not int or number < 0 for number in (*dims, first, last)):
            raise ValueError(f"{name} has an unknown dtype, or a size or offset that is no natural number")
        if first != end or last - first != math.prod(dims) * WIDTHS[dtype]:
            raise ValueError(f"{name} does not lie where the tensor before it ends, or has not the size of its shape")
        tensors[name], end = (dtype, dims), last
    return tensors, end


def check_adapter(adapter: Path) -> Tensors:
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
    kind = adapter_settings(adapter).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"the adapter is {kind!r}, not LORA", where=str(adapter / _ADAPTER_CONFIG))
    return read_tensors(adapter / _ADAPTER)


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """The content of an adapter's ``adapter_config.json``."""
    return _read_json(adapter / _ADAPTER_CONFIG, _MAX_JSON)
