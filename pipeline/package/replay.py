"""Replay a package's golden transcript: does this device compute what was validated?

This file is also shipped inside packages, where ``python replay.py`` runs it: it needs onnxruntime-genai and nothing of
this project. The model is fed each golden answer token by token. Counted is how often it ranks the golden token first,
and how far the token's log-probability is from the recorded one; a near tie that goes the other way costs one token and
not the rest of the answer.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays = Mapping[str, npt.NDArray[Any]]

GOLDEN = "golden.jsonl"
MANIFEST = "manifest.json"
DEFAULT = {"top1": 0.9, "logprob": 0.15}
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # NAME of NAME.onnx_adapter
# Exit codes, those of qwen-onnx: the device differs or the package is damaged; the runtime or its hardware is missing.
DIFFERS, MISSING = 9, 10


# Providers that are plugins of their own: name in the configuration → the provider's name, the module with its library.
PLUGINS = {
    "qnn": ("QNNExecutionProvider", "onnxruntime_qnn"),
    "OpenVINO": ("OpenVINOExecutionProvider", "onnxruntime_ep_openvino"),
    "webgpu": ("WebGpuExecutionProvider", "onnxruntime_ep_webgpu"),
    "NvTensorRtRtx": ("NvTensorRTRTXExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx"),
}
# OpenVINO's own device for processors, which reads what is made for its NPU. It would round to bfloat16 where it can.
OPENVINO_ON_CPU = {"device_type": "CPU", "load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}
_registered: set[str] = set()
_BESIDE = ("embedding", "vision", "speech")  # graphs that a model that sees or hears has beside its decoder
# What the tower of a model that hears is given, and of what type.
SOUNDS = {"audio_embeds": "float32", "audio_sizes": "int64", "audio_sizes_frames": "int64"}
_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"  # of one picture, in the words of all Qwen-VL tokenizers


@dataclass(frozen=True)
class Media:
    """Pictures or sounds as a model's tower takes them.

    Attributes:
        arrays: by the runtime's names. Of pictures: ``pixel_values`` float32 ``[N, 1176]``, the patches of all, one
            picture after the other; ``image_grid_thw`` int64 ``[pictures, 3]``, 1 and patches down and across of each;
            ``num_image_tokens`` int64 ``[1]``. Of sounds: `SOUNDS`.
        tokens: how many tokens of a prompt each picture or sound takes.
    """

    arrays: Arrays
    tokens: tuple[int, ...]

    @property
    def heard(self) -> bool:
        """Whether they are sounds."""
        return "audio_sizes" in self.arrays


def register_plugin(runtime: Any, provider: str) -> None:
    """Tell ``runtime`` (the module ``onnxruntime_genai``) of a provider's plugin, if there is one and it is installed.

    What is missing shows when a model is loaded.
    """
    if provider not in PLUGINS or provider in _registered:
        return
    name, module = PLUGINS[provider]
    try:
        library = importlib.import_module(module).get_library_path()
    except ImportError:
        return
    runtime.register_execution_provider_library(name, str(library))
    _registered.add(provider)


def unrunnable(package: Path, config: Mapping[str, Any], provider: str = "") -> str:
    """Why a package must not be loaded here; empty when it may.

    Two graphs in one binary make the emulator of onnxruntime-qnn 2.7.0 end the process.
    """
    if provider_of(config) != "qnn":
        return ""
    if provider == "cpu":
        return "its graphs are compiled for an NPU: no other provider reads them"
    split = all((package / f"{name}_qnn.bin").is_file() for name in ("prefill", "decode"))
    if not split and platform.machine() in ("x86_64", "AMD64"):
        return "its prefill and decode share one binary, which the emulator cannot load; an NPU can"
    return ""


def configure(runtime: Any, settings: Any, config: Mapping[str, Any], on_cpu: bool, threads: int) -> None:
    """Prepare a package's configuration for loading.

    Args:
        runtime: the module ``onnxruntime_genai``.
        settings: its ``Config`` of the package.
        config: the content of the package's ``genai_config.json``.
        on_cpu: let the processor run it, whatever it is for.
        threads: of the processor.
    """
    own = provider_of(config)
    through_openvino = on_cpu and own == "OpenVINO"
    if not on_cpu or through_openvino:
        register_plugin(runtime, own)
    session: dict[str, Any] = {"intra_op_num_threads": threads}
    if through_openvino:
        session["provider_options"] = [{own: OPENVINO_ON_CPU}]
    elif on_cpu and own != "cpu":
        # Else ONNX Runtime would round the activations of QDQ products to 8 bits, which no other provider does.
        session["session.qdq_matmulnbits_accuracy_level"] = "1"
    parts = [name for name in ("decoder", *_BESIDE) if name in config["model"]]
    settings.overlay(json.dumps({"model": {name: {"session_options": session} for name in parts}}))
    if on_cpu and not through_openvino:
        settings.clear_providers()


@contextlib.contextmanager
def chatter_aside() -> Iterator[None]:
    """Send to standard error what native libraries print to standard output while they load."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def provider_of(config: Mapping[str, Any]) -> str:
    """The first provider that a ``genai_config.json`` asks for, also in stages of a pipeline; else ``cpu``."""
    options = [
        entry for part in _parts(config) for entry in part.get("session_options", {}).get("provider_options", ())
    ]
    return str(next(iter(options[0]))) if options else "cpu"


def graphs_of(config: Mapping[str, Any]) -> list[str]:
    """The files of the graphs that a ``genai_config.json`` names."""
    return [part["filename"] for part in _parts(config) if "filename" in part]


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The decoder, its stages if it is a pipeline, and the graphs beside it of a model that sees."""
    model = config["model"]
    decoder = model["decoder"]
    stages = [stage for group in decoder.get("pipeline", ()) for stage in group.values()]
    return [decoder, *stages, *(model[name] for name in _BESIDE if name in model)]


def prepare(model: Any, pictures: Sequence[bytes]) -> Media:
    """What a model that sees is given for pictures, PNG or JPEG, that have been checked before.

    Each goes through the runtime's processor on its own: onnxruntime-genai 0.14.1 mixes up several that differ in size.

    Args:
        model: an ``onnxruntime_genai.Model``.
    """
    import onnxruntime_genai as og

    processor = model.create_multimodal_processor()
    found = [processor(_PLACEHOLDER, images=og.Images.open_bytes(picture)) for picture in pictures]
    tokens = tuple(int(made["num_image_tokens"].as_numpy().sum()) for made in found)
    grids = np.concatenate([made["image_grid_thw"].as_numpy() for made in found])
    arrays = {
        "pixel_values": np.concatenate([made["pixel_values"].as_numpy() for made in found]),
        "image_grid_thw": grids.astype(np.int64),  # else numpy may have another type of 64 bits
        "num_image_tokens": np.array([sum(tokens)], np.int64),
    }
    return Media(arrays, tokens)


def pack(sounds: Arrays) -> dict[str, dict[str, Any]]:
    """Arrays as JSON values: ``dtype``, ``shape``, and their bytes in base64."""

    def packed(values: npt.NDArray[Any]) -> dict[str, Any]:
        data = base64.b64encode(values.tobytes()).decode()
        return {"dtype": str(values.dtype), "shape": list(values.shape), "data": data}

    return {name: packed(values) for name, values in sounds.items()}


def unpack(sounds: Mapping[str, Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays that `pack` has packed.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: they are no such arrays.
    """
    found = {}
    for name, entry in sounds.items():
        if name not in SOUNDS or entry["dtype"] != SOUNDS[name]:
            raise ValueError(f"{name!r} of {entry['dtype']!r} is nothing that a tower is given")
        data = np.frombuffer(base64.b64decode(entry["data"], validate=True), entry["dtype"])
        found[name] = data.reshape([int(size) for size in entry["shape"]])
    return found


def feed(generator: Any, prompt: Sequence[int], media: Media | None = None) -> None:
    """Give a prompt to a generator: ids, among them one for each feature of the pictures or sounds."""
    ids = np.asarray(prompt, np.int32)
    if media is None:
        generator.append_tokens(ids)
        return
    import onnxruntime_genai as og

    named = og.NamedTensors()
    named["input_ids"] = ids[None]
    for name, values in media.arrays.items():
        named[name] = np.ascontiguousarray(values)
    generator.set_inputs(named)


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``golden.jsonl``: ``name``, ``prompt`` and ``tokens`` (ids), ``logprobs`` (nats, one a token).

    Answers that were given with a LoRA adapter have its name besides (``adapter``). Those that show pictures have
    ``images``, each a PNG in base64; those that let sounds be heard have ``sounds``, what the model's tower is given
    (`pack`).

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it cannot be read, or is no transcript.
    """
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for entry in entries:
        lists = entry["prompt"], entry["tokens"]
        if not all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in lists):
            raise ValueError("token ids are whole numbers")
        numbers = entry["logprobs"]
        if len(numbers) != len(entry["tokens"]) or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("there is one log-probability a token")
        for image in entry.get("images", ()):
            if not base64.b64decode(image, validate=True).startswith(b"\x89PNG\r\n\x1a\n"):
                raise ValueError("an image is no PNG")
        _heard(entry)
        if not entry["prompt"]:
            raise ValueError("a prompt is empty")
        if "adapter" in entry and not _ADAPTER.fullmatch(entry["adapter"]):
            raise ValueError("the name of an adapter is no file name")
    if not any(entry["tokens"] for entry in entries):
        raise ValueError("it has no tokens")
    return entries


def _heard(entry: Mapping[str, Any]) -> Media | None:
    arrays = unpack(entry.get("sounds", {}))
    return Media(arrays, tuple(arrays["audio_sizes"].ravel().tolist())) if arrays else None


def media_of(model: Any, entry: Mapping[str, Any]) -> Media | None:
    """The pictures that an entry of a transcript shows, or its sounds."""
    encoded = [base64.b64decode(image) for image in entry.get("images", ())]
    return prepare(model, encoded) if encoded else _heard(entry)


def scores(
    model: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    window: int = 1,
    adapter: tuple[Any, str] | None = None,
    media: Media | None = None,
) -> tuple[list[int], list[float]]:
    """Let the model answer ``tokens`` after ``prompt``.

    Args:
        model: an ``onnxruntime_genai.Model``.
        prompt, tokens: ids.
        window: tokens that a static model takes at a time; the runtime fills up the last ones of a prompt.
        adapter: an ``onnxruntime_genai.Adapters`` and the name in it of the one to answer with.
        media: the pictures or sounds of the prompt.

    Returns:
        before each token, the id that the model ranks first, and the token's log-probability in nats.
    """
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    room = -(-len(prompt) // window) * window + max(len(tokens), 1)
    parameters.set_search_options(max_length=room, do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter:
        generator.set_active_adapter(*adapter)  # before the first token: the cache must not be of two models
    feed(generator, prompt, media)
    first, logprobs = [], []
    for index, token in enumerate(tokens):
        logits = np.asarray(generator.get_logits(), np.float32)
        row = _last_row(logits)
        first.append(int(row.argmax()))
        logprobs.append(float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum())))
        if index == len(tokens) - 1:
            break  # nobody asks what follows it, and there may be no room for it
        # Static models take no second append: the token is made the only choice instead.
        logits[:] = -1e9
        logits[..., token] = 0.0
        generator.set_logits(logits)
        generator.generate_next_token()
    return first, logprobs


def _last_row(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    row: npt.NDArray[np.float64] = logits.reshape(-1, logits.shape[-1])[-1].astype(np.float64)
    return row


def replay(
    model: Any, entries: Sequence[dict[str, Any]], window: int = 1, package: Path | None = None
) -> dict[str, Any]:
    """Run all entries; ``window`` as in `scores`, ``package`` is where the adapters of entries lie that have one.

    Returns:
        ``prompts``; ``identical``: prompts whose every token is ranked first, so that a greedy answer is the same;
        ``tokens``; ``top1``: share of tokens ranked first; ``logprob``: mean difference of log-probabilities, in nats;
        where there are adapters, ``adapters``: the same for each of them by name, whose entries count there only.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry.get("adapter", ""), []).append(entry)
    found = {name: _replay(model, group, window, _loaded(model, name, package)) for name, group in groups.items()}
    plain = found.pop("", {"prompts": 0, "identical": 0, "tokens": 0, "top1": 1.0, "logprob": 0.0})
    return {**plain, "adapters": found} if found else plain


def _loaded(model: Any, name: str, package: Path | None) -> tuple[Any, str] | None:
    """An adapter of the package, ready to be activated."""
    if not name:
        return None
    import onnxruntime_genai as og

    adapters = og.Adapters(model)
    adapters.load(str((package or Path()) / f"{name}.onnx_adapter"), name)
    return adapters, name


def _replay(
    model: Any, entries: Sequence[dict[str, Any]], window: int, adapter: tuple[Any, str] | None
) -> dict[str, Any]:
    identical = right = total = 0
    differences: list[float] = []
    for entry in entries:
        media = media_of(model, entry)
        first, logprobs = scores(model, entry["prompt"], entry["tokens"], window, adapter, media)
        same = sum(a == b for a, b in zip(first, entry["tokens"], strict=True))
        identical += same == len(first)
        right, total = right + same, total + len(first)
        differences += [abs(a - b) for a, b in zip(logprobs, entry["logprobs"], strict=True)]
    mean = float(np.mean(differences)) if differences else 0.0
    return {
        "prompts": len(entries),
        "identical": identical,
        "tokens": total,
        "top1": round(right / total, 4) if total else 1.0,
        "logprob": round(mean, 4) if np.isfinite(mean) else float("inf"),
    }


def verdict(result: dict[str, Any], tolerance: dict[str, float]) -> str:
    """What is out of tolerance (``top1`` at least, ``logprob`` at most), with each adapter; empty when nothing is."""
    found = []
    for name, part in (("", result), *result.get("adapters", {}).items()):
        whose = f" with {name}" if name else ""
        if part["top1"] < tolerance["top1"]:
            found.append(
                f"{part['top1']:.1%} of golden tokens{whose} are ranked first, "
                f"at least {tolerance['top1']:.0%} should be"
            )
        if not part["logprob"] <= tolerance["logprob"]:
            found.append(
                f"log-probabilities{whose} differ by {part['logprob']:.3f} nats, "
                f"at most {tolerance['logprob']:g} are expected"
            )
    return "; ".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the package in this file's folder, or in the folder given; returns an exit code."""
    parser = argparse.ArgumentParser(
        description="Does this device compute what was validated? Needs onnxruntime-genai."
    )
    parser.add_argument("package", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--cpu", action="store_true", help="on the processor, whatever the package is for")
    options = parser.parse_args(arguments)
    try:
        tolerance = {**DEFAULT, **json.loads((options.package / MANIFEST).read_bytes()).get("replay", {})}
        entries = read(options.package / GOLDEN)
    except Exception as error:  # whatever it is, the reader is told in one line
        return _failed(error, "fetch the package again: it is damaged", DIFFERS)
    try:
        import onnxruntime_genai as og

        config = json.loads((options.package / "genai_config.json").read_bytes())
        if problem := unrunnable(options.package, config, "cpu" if options.cpu else ""):
            raise RuntimeError(problem)
        window = config["model"]["decoder"].get("sliding_window", {}).get("window_size", 1)
        settings = og.Config(str(options.package))
        configure(og, settings, config, options.cpu, os.cpu_count() or 1)
        begin = time.perf_counter()
        with chatter_aside():
            model = og.Model(settings)
        result = replay(model, entries, window, options.package)
    except Exception as error:
        return _failed(error, "install the runtime that README.md names, on the hardware that it names", MISSING)
    problem = verdict(result, tolerance)
    print(
        f"{result['identical']} of {result['prompts']} answers identical, {result['top1']:.1%} of {result['tokens']} "
        f"tokens ranked first, log-probabilities within {result['logprob']:.4f} nats on average "
        f"({time.perf_counter() - begin:.0f} s)"
    )
    for name, part in result.get("adapters", {}).items():
        print(f"with {name}: {part['identical']} of {part['prompts']} answers identical, {part['top1']:.1%} of tokens")
    print(f"FAIL: {problem}" if problem else "PASS: this device computes what was validated")
    return DIFFERS if problem else 0


def _failed(error: Exception, fix: str, code: int) -> int:
    text = str(error).splitlines()[0] if str(error) else ""
    print(f"error: {type(error).__name__}: {text}\nnext: {fix}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
