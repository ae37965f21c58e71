"""Check a received package before anything in it is trusted.

The order matters: the exact set of files, their digests, the manifest, the configuration's keys, the graph's external
data; and only then, where asked for, is the model loaded and its golden transcript replayed.
"""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import adapter_files, digest, onnx_references, retrieval_config
from pipeline.artifact import CHECKSUMS, GOLDEN, MANIFEST, Manifest, is_file_name, read_json, read_manifest
from pipeline.errors import PackageError, RuntimeMissing, UsageError

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
# Distributions of the two runtimes, the one for packages that generate text first.
_RUNTIMES = {
    True: (
        "onnxruntime-genai",
        "onnxruntime-genai-cuda",
        "onnxruntime-genai-directml",
        "onnxruntime-genai-winml",
    ),
    False: ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
}


def check_files(package: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check that a directory holds exactly the files of its manifest, unchanged.

    Raises:
        PackageError: naming every file that is missing, added, changed, a link or otherwise special.
    """
    try:
        return _checked_files(package, progress)
    except OSError as error:
        raise PackageError(f"{package} cannot be read", why=str(error)) from None


def _checked_files(package: Path, progress: Callable[[int], None] | None) -> Manifest:
    if not package.is_dir():
        raise PackageError(
            f"there is no package directory {package}", fix="give the directory that `qwen-onnx build` wrote"
        )
    manifest = read_manifest(package)
    wanted = {name: sha256 for name, (_, sha256) in manifest.files.items()}
    problems = []
    entries = {entry.name: entry for entry in package.iterdir()}
    for name, entry in sorted(entries.items()):
        if not stat.S_ISREG(entry.lstat().st_mode):
            problems.append(f"{_shown(name)} is no regular file")
        elif name not in wanted and name not in (MANIFEST, CHECKSUMS):
            problems.append(f"{_shown(name)} is not in the manifest")
    problems += [f"{name} is missing" for name in sorted({*wanted, CHECKSUMS} - entries.keys())]
    folded: dict[str, str] = {}
    for name in sorted(entries):
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            problems.append(f"{_shown(name)} and {_shown(other)} are one file where case does not count")
    if not problems:
        problems = [
            f"{name} has changed ({'size' if (package / name).stat().st_size != size else 'sha256'})"
            for name, (size, sha256) in sorted(manifest.files.items())
            if (package / name).stat().st_size != size or digest.of_file(package / name, progress) != sha256
        ]
        problems += _checksum_problems(package, wanted)
    if problems:
        raise PackageError(
            f"{package} is not the package that was built",
            why="; ".join(problems),
            fix="fetch it again, and do not load it",
        )
    return manifest


def _shown(name: str) -> str:
    """A found file's name; control characters would reach the terminal."""
    return name if name.isprintable() else ascii(name)


def _checksum_problems(package: Path, wanted: Mapping[str, str]) -> list[str]:
    """SHA256SUMS must say the same as the manifest, and cover the manifest itself."""
    text = (package / CHECKSUMS).read_bytes()
    if text == checksums({**wanted, MANIFEST: digest.of_file(package / MANIFEST)}):
        return []
    return [f"{CHECKSUMS} does not agree with the files and the manifest"]


def checksums(files: Mapping[str, str]) -> bytes:
    """The content of ``SHA256SUMS`` for name → sha256, in the format of sha256sum(1)."""
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()


def check_settings(package: Path, manifest: Manifest) -> None:
    """Refuse a configuration that the package's task does not have.

    Raises:
        PackageError: naming every key.
    """
    if manifest.generates:
        check_config(package)
    elif (found := retrieval_config.read_config(package)["task"]) != manifest.task:
        raise PackageError(f"{MANIFEST} says that the package is to {manifest.task}, its configuration to {found!r}")


def check_config(package: Path) -> None:
    """Refuse a ``genai_config.json`` with unknown keys, or with paths that leave the package.

    Raises:
        PackageError: naming every key.
    """
    path = package / "genai_config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError("genai_config.json cannot be read", where=str(path), why=str(error)) from None
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
            inner = f"{key}.{name}" if key else name
            if name in allowed:
                yield from _config_problems(item, allowed[name], inner)
            else:
                yield f"unknown key `{inner}`"
    elif isinstance(allowed, list):
        yield from _list_problems(value, allowed[0], key)
    elif allowed is dict:
        if not isinstance(value, dict) or not all(_is_name(item) for item in value.values()):
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
        if not all(_is_name(item) for item in value):
            yield f"`{key}` is no list of names"
    elif allowed:
        for group in value:
            for name, stage in group.items() if isinstance(group, dict) else [("", group)]:
                yield from _config_problems(stage, allowed, f"{key}.{name}")
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


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not set(value) & set("/\\\0") and value not in (".", "..")


def check_external_data(package: Path) -> None:
    """Refuse a graph whose external data lies outside the package or outside its files.

    Raises:
        PackageError: naming the first such tensor.
    """
    for path in sorted(package.glob("*.onnx")):
        try:
            references = onnx_references.read(path.read_bytes())
        except ValueError as error:
            raise PackageError(f"{path.name} is not an ONNX model", where=str(path), why=str(error)) from None
        for entry in references:
            problem = _reference_problem(package, entry)
            if problem:
                raise PackageError(
                    f"{path.name} refers to data that it may not read",
                    where=f"tensor {entry.tensor}",
                    why=problem,
                    fix="do not load it",
                )


def _reference_problem(package: Path, entry: onnx_references.Reference) -> str:
    if not _is_name(entry.location):
        return f"location {entry.location!r} is no file name of the package"
    file = package / entry.location
    if not _is_regular(file):
        return f"location {entry.location!r} is no regular file of the package"
    if file.suffix == ".xml" and not _is_regular(file.with_suffix(".bin")):
        return f"{entry.location!r} has its weights in {file.stem}.bin, which is no regular file of the package"
    size = file.stat().st_size
    length = size - entry.offset if entry.length is None else entry.length
    if entry.offset < 0 or length < 0 or entry.offset + length > size:
        return f"bytes {entry.offset} to {entry.offset + length} of {entry.location}, which has {size}"
    return ""


def _is_regular(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def check_runtime(manifest: Manifest) -> str:
    """The installed runtime's version, if it is recent enough for the package.

    Raises:
        RuntimeMissing: it is absent or older than the manifest's ``runtime.minimum``.
    """
    from importlib import metadata

    minimum = str(manifest.data["runtime"].get("minimum", "0"))
    names = _RUNTIMES[manifest.generates]
    installed = {entry.name: entry.version for name in names for entry in metadata.distributions(name=name)}
    if not installed:
        raise RuntimeMissing(f"{names[0]} is not installed", fix="pip install '.[serve]'")
    found = next(iter(installed.values()))
    if _version(found) < _version(minimum):
        raise RuntimeMissing(
            f"{names[0]} {found} is too old for the package",
            why=f"it needs {minimum}",
            fix=f"pip install '{names[0]}>={minimum}'",
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def replay(package: Path, provider: str = "") -> dict[str, Any]:
    """Run the golden transcript on this machine, within the tolerance of the manifest.

    Args:
        provider: ``cpu`` runs it on the processor, whatever the package is for.

    Returns:
        what `pipeline.replay.replay` returns, and ``provider``: what computed.

    Raises:
        PackageError: the transcript or the model cannot be loaded, or the device is out of tolerance.
        RuntimeMissing: the package's provider is not to be had here.
    """
    from pipeline import adapters, generate, images, session
    from pipeline import replay as transcript

    try:
        entries = transcript.read(package / GOLDEN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{GOLDEN} cannot be read", where=str(package / GOLDEN), why=str(error)) from None
    opened = session.open_package(package, provider=provider)
    try:
        for entry in entries:
            for image in entry.get("images", ()):
                images.check(base64.b64decode(image), GOLDEN)
            media = transcript.media_of(opened.model, entry)
            generate.check_answer(opened, entry["prompt"], entry["tokens"], media)
        for name in sorted({entry["adapter"] for entry in entries if "adapter" in entry}):
            adapters.activate(opened, adapters.find(package, name))
    except (UsageError, RuntimeError) as error:
        raise PackageError(f"{GOLDEN} is no transcript of this model", why=str(error)) from None
    result = transcript.replay(opened.model, entries, opened.window, package)
    tolerance = {**transcript.DEFAULT, **read_manifest(package).data.get("replay", {})}
    if problem := transcript.verdict(result, tolerance):
        raise PackageError(
            "this machine does not compute what was validated",
            why=problem,
            fix="update onnxruntime-genai, and report the device and the versions",
        )
    return {**result, "provider": opened.provider}


def replay_retrieval(package: Path) -> dict[str, Any]:
    """The same of a package that embeds or ranks.

    Returns:
        what `pipeline.retrieval_replay.replay` returns.

    Raises:
        PackageError, RuntimeMissing: as `replay`.
    """
    from pipeline import retrieval, retrieval_replay

    config = retrieval_config.read_config(package)
    try:
        entries = retrieval_replay.read(package / GOLDEN, config["dimensions"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PackageError(f"{GOLDEN} cannot be read", where=str(package / GOLDEN), why=str(error)) from None
    opened = retrieval.open_package(package)
    if max(token for entry in entries for token in entry["ids"]) >= opened.tokenizer.trusted.get_vocab_size():
        raise PackageError(f"{GOLDEN} is no transcript of this model", why="it has ids outside of the vocabulary")
    result = retrieval_replay.replay(opened.session, config, entries)
    if problem := retrieval_replay.verdict(result, read_manifest(package).data.get("replay", {})):
        raise PackageError(
            "this machine does not compute what was validated",
            why=problem,
            fix="update onnxruntime, and report the device and the versions",
        )
    return result


def package(folder: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """All checks that need no runtime, in order; returns the manifest.

    Raises:
        PackageError: the first check that failed.
    """
    manifest = check_files(folder, progress)
    check_settings(folder, manifest)
    check_external_data(folder)
    adapter_files.check_package(folder, manifest)
    if "LICENSE" not in manifest.files:
        raise PackageError(f"{folder} has no LICENSE", why="nobody may use weights without one")
    return manifest
