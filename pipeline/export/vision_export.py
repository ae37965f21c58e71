"""What a Qwen-VL package has beside its decoder: the vision tower, the embedding, and how pictures are prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import CheckpointError, StageError
from pipeline.export import fusion_graph, vision_graph
from pipeline.export.decoder_graph import Embedded
from pipeline.facts.multimodal import Layout
from pipeline.facts.vision import FRAMES, TOKENS, Vision
from pipeline.graph.external_data import ExternalDataWriter

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
_BICUBIC = 3
# By family, what transformers' processor takes when its configuration has nothing.
_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def embedded(config: Any, vision: Vision) -> Embedded:
    """How the decoder takes its embeddings and positions.

    Args:
        config: transformers' configuration of the text model.
    """
    scaling = config.rope_scaling or {}
    interleaved = vision.kind == "qwen3_vl"
    sections = scaling.get("mrope_section") or ((24, 20, 20) if interleaved else ())
    return Embedded(tuple(sections), interleaved, len(vision.deepstack))


def write(
    checkpoint: Path, out_dir: Path, settings: Mapping[str, Any], vision: Vision, tensors: Tensors, layout: Layout
) -> None:
    """Write ``vision.onnx`` and ``embedding.onnx``, float32 with their data, and ``processor_config.json``.

    Args:
        settings: the content of ``config.json``.
        layout: of ``tensors``.

    Raises:
        CheckpointError: ``preprocessor_config.json`` prepares pictures in a way that the runtime does not.
    """
    import onnx

    prepared = processor(json.loads((checkpoint / PREPROCESSOR).read_bytes()), vision, str(checkpoint / PREPROCESSOR))
    (out_dir / PROCESSOR).write_text(json.dumps(prepared, indent=4), encoding="utf-8")
    with ExternalDataWriter(out_dir / "vision.onnx.data") as writer:
        model = vision_graph.write(vision, tensors, writer, layout.towers[0])
    onnx.save(model, str(out_dir / "vision.onnx"))
    with ExternalDataWriter(out_dir / "embedding.onnx.data") as writer:
        table = tensors.read(f"{layout.text}.embed_tokens.weight").numpy()
        model = fusion_graph.write(table, _tokens(settings)["image_token_id"], vision.feature, writer)
    onnx.save(model, str(out_dir / "embedding.onnx"))


def configure(model: dict[str, Any], checkpoint: Path, settings: Mapping[str, Any], vision: Vision) -> None:
    """Complete the section ``model`` of a ``genai_config.json`` in place.

    Raises:
        StageError: the tokenizer has no padding token.
    """
    from transformers import AutoTokenizer

    model["decoder"]["hidden_size"] = vision.feature
    session = model["decoder"]["session_options"]
    model["embedding"] = {
        "filename": "embedding.onnx",
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
        "session_options": session,
    }
    model["vision"] = {
        "filename": "vision.onnx",
        "config_filename": PROCESSOR,
        "spatial_merge_size": vision.merge,
        "patch_size": vision.patch,
        # It times the frames of videos; of pictures there is one frame. The runtime wants it all the same.
        "tokens_per_second": 2.0,
        "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
        "outputs": {"image_features": "image_features"},
        "session_options": session,
    }
    model |= _tokens(settings)
    # The runtime takes every such token in a prompt for padding: it must be one that no conversation has.
    pad = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True).pad_token_id
    if pad is None:
        raise StageError(
            "the checkpoint's tokenizer has no padding token",
            where=str(checkpoint / "tokenizer_config.json"),
            why="the runtime leaves out tokens of a prompt that are padding, and has to know which",
            fix="set pad_token to <|endoftext|>, as published checkpoints have it",
        )
    model["pad_token_id"] = pad


def _tokens(settings: Mapping[str, Any]) -> dict[str, int]:
    return {key: settings.get(key, default) for key, default in TOKENS.items()}


def processor(given: Mapping[str, Any], vision: Vision, where: str) -> dict[str, Any]:
    """The runtime's ``processor_config.json`` for a checkpoint's ``preprocessor_config.json``.

    Raises:
        CheckpointError: it does something else than Qwen's image processors do.
    """
    size = {**_PIXELS, **(given.get("size") or {})}
    bounds = {
        "min_pixels": given.get("min_pixels") or size["shortest_edge"],
        "max_pixels": given.get("max_pixels") or size["longest_edge"],
    }
    wanted = {
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": FRAMES,
        "resample": _BICUBIC,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }
    problems = [
        f"{key} is {given[key]!r}, not {value!r}" for key, value in wanted.items() if given.get(key, value) != value
    ]
    mean, std = given.get("image_mean") or _MEAN, given.get("image_std") or _STD
    for key, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list) or len(values) != 3 or not all(_positive(value) for value in values):
            problems.append(f"{key} is {values!r}")
    problems += [f"{key} is {value!r}" for key, value in bounds.items() if type(value) is not int or value < 1]
    factor = given.get("rescale_factor", 1 / 255)
    if not _positive(factor):
        problems.append(f"rescale_factor is {factor!r}")
    if not problems and bounds["max_pixels"] < max(bounds["min_pixels"], (vision.patch * vision.merge) ** 2):
        problems.append(f"at most {bounds['max_pixels']} pixels are too few")
    if problems:
        raise CheckpointError(
            "pictures cannot be prepared as the checkpoint wants them", where=where, why="; ".join(problems)
        )
    family = "qwen3_vl" if vision.kind == "qwen3_vl" else "qwen2_5_vl"
    sides = {"patch_size": vision.patch, "merge_size": vision.merge}
    transforms = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        # Width and height are asked for and not used where `smart_resize` is set.
        ("resize", "Resize", {"width": 540, "height": 360, "smart_resize": 1, **bounds, **sides}),
        ("rescale", "Rescale", {"rescale_factor": factor}),
        ("normalize", "Normalize", {"mean": mean, "std": std, family: 1}),
        ("patch_image", "PatchImage", {**sides, "temporal_patch_size": FRAMES}),
    ]
    operations = [
        {"operation": {"name": name, "type": kind, **({"attrs": options} if options else {})}}
        for name, kind, options in transforms
    ]
    return {"processor": {"name": "qwen_vl_image_processor", "transforms": operations}}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
