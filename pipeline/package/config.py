"""What a package's configuration may say: every key that is not known here is refused before a runtime reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, Manifest, is_file_name, read_json, shown
from pipeline.errors import PackageError
from pipeline.package import retrieval_config

# Keys that a genai_config.json may have; every other one is refused. Left out on purpose: `custom_ops_library` and
# `ep_library_path`, whose values the runtime loads as native code.
_SESSION = {
    "log_id": str,
    "provider_options": [{}],
    "intra_op_num_threads": int,
    "inter_op_num_threads": int,
    "enable_cpu_mem_arena": bool,
    "enable_mem_pattern": bool,
    "graph_optimization_level": str,
    "session.disable_cpu_ep_fallback": str,
}
_STAGE = {
    "filename": str,
    "inputs": [""],
    "outputs": [""],
    "run_on_prompt": bool,
    "run_on_token_gen": bool,
    "is_lm_head": bool,
    "session_options": _SESSION,
}
_DECODER = {
    "session_options": _SESSION,
    "filename": str,
    "pipeline": [_STAGE],
    "sliding_window": {"window_size": int, "pad_value": int, "alignment": str, "slide_key_value_cache": bool},
    "head_size": int,
    "hidden_size": int,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "inputs": dict,
    "outputs": dict,
}
_BESIDE = {"session_options": _SESSION, "filename": str, "inputs": dict, "outputs": dict}
_CONFIG: dict[str, Any] = {
    "model": {
        "type": str,
        "bos_token_id": int,
        "eos_token_id": (int, list),
        "pad_token_id": int,
        "context_length": int,
        "vocab_size": int,
        "decoder": _DECODER,
        "embedding": _BESIDE,
        "vision": {
            **_BESIDE,
            "config_filename": str,
            "spatial_merge_size": int,
            "patch_size": int,
            "tokens_per_second": (int, float),
        },
        "speech": _BESIDE,
        "image_token_id": int,
        "video_token_id": int,
        "vision_start_token_id": int,
    },
    "search": {
        "chunk_size": int,
        "diversity_penalty": (int, float),
        "do_sample": bool,
        "early_stopping": bool,
        "length_penalty": (int, float),
        "max_length": int,
        "min_length": int,
        "no_repeat_ngram_size": int,
        "num_beams": int,
        "num_return_sequences": int,
        "past_present_share_buffer": bool,
        "repetition_penalty": (int, float),
        "temperature": (int, float),
        "top_k": int,
        "top_p": (int, float),
    },
}
# What prepares a picture: each transform with its options. The runtime knows more, and some of them read files.
_NUMBER = (int, float)
_TRANSFORMS: dict[str, dict[str, Any]] = {
    "DecodeImage": {"color_space": str},
    "ConvertRGB": {},
    "Resize": dict.fromkeys(
        ("width", "height", "smart_resize", "min_pixels", "max_pixels", "patch_size", "merge_size"), int
    ),
    "Rescale": {"rescale_factor": _NUMBER},
    "Normalize": {"mean": [_NUMBER], "std": [_NUMBER], "qwen2_5_vl": int, "qwen3_vl": int},
    "PatchImage": dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), int),
}
PROCESSOR = "processor_config.json"
# Options of providers, none of which names a file that the runtime would load.
_PROVIDERS = {
    "cuda": ("enable_cuda_graph", "enable_skip_layer_norm_strict_mode"),
    "dml": (),
    "webgpu": ("enableGraphCapture", "validationMode"),
    "NvTensorRtRtx": ("enable_cuda_graph",),
    # Not `load_config`: it may name files, such as caches of what was compiled.
    "OpenVINO": ("device_type", "enable_causallm"),
    "qnn": (
        *("backend_type", "soc_model", "htp_performance_mode", "htp_graph_finalization_optimization_mode"),
        "enable_block_quant_weight_optimization",
    ),
}
_OPTION = re.compile(r"[A-Za-z0-9_-]{0,40}")
# What callers read of a configuration, so that a file without it is refused here and not a traceback there.
_NEEDED = ("type", "context_length", "vocab_size", "eos_token_id", "decoder")


def check_settings(package: Path, manifest: Manifest) -> None:
    """Refuse a configuration that the package's task does not have.

    Raises:
        PackageError: naming every key.
    """
    if manifest.generates:
        check_config(package)
    elif (found := retrieval_config.read_config(package)["task"]) != manifest.task:
        raise PackageError(
            f"{MANIFEST} says that the package is to {manifest.task}, its configuration to {found!r}",
            codes=["configuration.task"],
        )


def check_config(package: Path) -> None:
    """Refuse a ``genai_config.json`` with unknown keys, or with paths that leave the package.

    Raises:
        PackageError: naming every key.
    """
    path = package / "genai_config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(
            "genai_config.json cannot be read", where=str(path), why=str(error), codes=["configuration.unreadable"]
        ) from None
    problems = list(_config_problems(config, _CONFIG, ""))
    model = config.get("model") if isinstance(config, dict) else None
    if isinstance(model, dict):
        decoder = model.get("decoder")
        windowed = isinstance(decoder, dict) and "sliding_window" in decoder
        needed = (*_NEEDED, "pad_token_id") if windowed else _NEEDED
        if "speech" in model:
            needed = (*needed, "pad_token_id", "embedding", "vision")
        elif "vision" in model:
            # Without these the runtime computes something else, and says nothing.
            needed = (*needed, "pad_token_id", "embedding", "image_token_id", "vision_start_token_id")
            problems += _processor_problems(package)
        problems += [f"`model.{name}` is missing" for name in needed if name not in model]
    if problems:
        raise PackageError(
            "genai_config.json has keys or values that this program does not trust",
            where=str(path),
            why="; ".join(problems),
            fix="do not load it: some keys make the runtime load native code",
            codes=["configuration.untrusted"],
        )


def _processor_problems(package: Path) -> list[str]:
    """What is wrong with the transforms that prepare pictures."""
    try:
        config = read_json(package / PROCESSOR)
        if set(config) != {"processor"} or set(config["processor"]) != {"name", "transforms"}:
            raise ValueError("it has other keys than a processor's")
        for entry in config["processor"]["transforms"]:
            operation = entry["operation"]
            known = _TRANSFORMS.get(operation["type"])
            if set(entry) != {"operation"} or not set(operation) <= {"name", "type", "attrs"} or known is None:
                raise ValueError(f"the transform {operation['type']!r} is not known to be safe")
            for name, value in operation.get("attrs", {}).items():
                if name not in known or not _is_option(value, known[name]):
                    raise ValueError(f"the option {name!r} of {operation['type']} is not known, or has the wrong type")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [f"{PROCESSOR}: {error}"]
    return []


def _is_option(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_option(item, kind[0]) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _config_problems(value: Any, allowed: Any, key: str) -> Iterator[str]:
    if isinstance(allowed, dict):
        if not isinstance(value, dict):
            yield f"`{key or 'the file'}` is no object"
            return
        for name, item in value.items():
            inner = f"{key}.{shown(name)}" if key else shown(name)
            if name in allowed:
                yield from _config_problems(item, allowed[name], inner)
            else:
                yield f"unknown key `{inner}`"
    elif isinstance(allowed, list):
        yield from _list_problems(value, allowed[0], key)
    elif allowed is dict:
        if not isinstance(value, dict) or not all(is_name(item) for item in value.values()):
            yield f"`{key}` does not map to names"
    elif not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):
        yield f"`{key}` has the wrong type"
    elif isinstance(value, list) and not all(type(item) is int for item in value):
        yield f"`{key}` is no list of whole numbers"
    elif key.endswith("window_size") and value < 1:
        yield f"`{key}` is not positive"
    elif key.endswith("filename"):
        yield from _graph_problems(value, key)


def _list_problems(value: Any, allowed: Any, key: str) -> Iterator[str]:
    """Of a list of names, of the stages of a pipeline, or of providers."""
    if not isinstance(value, list):
        yield f"`{key}` is no list"
    elif allowed == "":
        if not all(is_name(item) for item in value):
            yield f"`{key}` is no list of names"
    elif allowed:
        for group in value:
            for name, stage in group.items() if isinstance(group, dict) else [("", group)]:
                yield from _config_problems(stage, allowed, f"{key}.{shown(name)}")
    elif not all(_is_provider(entry) for entry in value):
        yield f"`{key}` names providers or options that are not known to be safe"


def _is_provider(entry: Any) -> bool:
    """One provider with options that are plain words: no path, and nothing that loads a library."""
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((name, options),) = entry.items()
    known = _PROVIDERS.get(name)
    return (
        known is not None
        and isinstance(options, dict)
        and all(option in known for option in options)
        and all(isinstance(value, str) and _OPTION.fullmatch(value) for value in options.values())
    )


def _graph_problems(name: str, key: str) -> Iterator[str]:
    if key.endswith("config_filename"):
        if name != PROCESSOR:
            yield f"`{key}` is {name!r}, not {PROCESSOR!r}"
    elif not is_file_name(name):
        yield f"`{key}` leaves the package: {name!r}"
    elif not name.endswith(".onnx"):  # else its external data would not be checked
        yield f"`{key}` does not end in .onnx: {name!r}"


def is_name(value: Any) -> bool:
    """Whether a value is a text that leads into no folder."""
    return isinstance(value, str) and bool(value) and not set(value) & set("/\\\0") and value not in (".", "..")
