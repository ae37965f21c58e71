"""What is true of the vision tower of a Qwen-VL checkpoint: its sizes, and the weights that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.facts.family import Shape

CHANNELS = 3  # of a pixel
FRAMES = 2  # that make up a patch; a picture is taken twice
# Ids of the tokens that a text has around and instead of an image, as transformers has them by default.
TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}


@dataclass(frozen=True)
class Vision:
    """The sizes of a vision tower.

    Attributes:
        kind: the family, ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        depth: number of blocks.
        width: channels of a patch inside the tower.
        heads: of attention.
        intermediate: channels inside the MLP of a block.
        output: channels of a feature, the decoder's hidden size.
        patch: pixels on each side of a patch.
        merge: patches on each side of the square that becomes one feature.
        window: squares on each side of a window that attention is limited to; 0 for none.
        whole: blocks whose attention sees the whole image all the same.
        positions: learned positions on each side of their grid; 0 for none.
        deepstack: blocks whose output is merged, too, for the decoder's first layers.
    """

    kind: str
    depth: int
    width: int
    heads: int
    intermediate: int
    output: int
    patch: int
    merge: int
    window: int = 0
    whole: tuple[int, ...] = ()
    positions: int = 0
    deepstack: tuple[int, ...] = ()

    @property
    def patch_values(self) -> int:
        """Numbers of a patch, as the processor delivers them."""
        return CHANNELS * FRAMES * self.patch**2

    @property
    def feature(self) -> int:
        """Numbers of a feature: for the embedding, and for each of the decoder's first layers."""
        return self.output * (1 + len(self.deepstack))

    @property
    def merged(self) -> int:
        """Patches that become one feature."""
        return self.merge**2


# By family, for each key of `vision_config`, what transformers takes when it is missing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
    | {"patch_size": 14, "hidden_act": "quick_gelu"},
    "qwen2_5_vl": {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    | {"window_size": 112, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"},
    "qwen3_vl": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
    | {"out_hidden_size": 3584, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}
    | {"hidden_act": "gelu_pytorch_tanh"},
}
_COMMON = {"spatial_merge_size": 2, "temporal_patch_size": FRAMES, "in_channels": CHANNELS}
_LISTS = ("fullatt_block_indexes", "deepstack_visual_indexes")


def read_vision(config: Mapping[str, Any], shape: Shape, where: str) -> Vision:
    """The `Vision` that a ``config.json`` describes.

    Args:
        config: its content.
        shape: of its decoder.

    Raises:
        CheckpointError: a size is no positive integer, or the sizes do not fit together or the decoder.
    """
    kind, given = shape.model_type, config.get("vision_config") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError("config.json has a vision_config that is no object", where=where)
    known = _DEFAULTS[kind]
    values = {**_COMMON, **known, **{key: value for key, value in given.items() if key in _COMMON or key in known}}
    problems = [
        f"{key} is {value!r}"
        for key, value in values.items()
        if key not in (*_LISTS, "hidden_act") and not _size(value)
    ]
    problems += [f"{key} is {values[key]!r}" for key in _LISTS if key in values and not _indexes(values[key])]
    for key, value in {**_COMMON, "hidden_act": known["hidden_act"]}.items():
        if key != "spatial_merge_size" and values[key] != value:
            problems.append(f"{key} is {values[key]!r}, not {value!r}")
    if not problems:
        found = _vision(kind, values)
        problems = list(_problems(found, values, shape))
        if not problems:
            return found
    raise CheckpointError("config.json has a vision_config that is not supported", where=where, why="; ".join(problems))


def _vision(kind: str, values: Mapping[str, Any]) -> Vision:
    width = values["embed_dim" if kind == "qwen2_vl" else "hidden_size"]
    patch, merge = values["patch_size"], values["spatial_merge_size"]
    return Vision(
        kind=kind,
        depth=values["depth"],
        width=width,
        heads=values["num_heads"],
        intermediate=width * values["mlp_ratio"] if kind == "qwen2_vl" else values["intermediate_size"],
        output=values["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"],
        patch=patch,
        merge=merge,
        window=values.get("window_size", 0) // (patch * merge),
        whole=tuple(values.get("fullatt_block_indexes", ())),
        positions=int(values.get("num_position_embeddings", 0) ** 0.5),
        deepstack=tuple(values.get("deepstack_visual_indexes", ())),
    )


def _problems(found: Vision, values: Mapping[str, Any], shape: Shape) -> Iterator[str]:
    if found.width % found.heads or found.width // found.heads % 4:
        yield f"{found.heads} heads do not share {found.width} channels in fours"
    if found.output != shape.hidden:
        yield f"features of {found.output} channels do not fit a decoder of {shape.hidden}"
    if "window_size" in values and not found.window:
        yield f"window_size {values['window_size']} is less than one square of patches"
    if found.positions**2 != values.get("num_position_embeddings", 0):
        yield f"{values['num_position_embeddings']} positions are no square"
    if any(index >= found.depth for index in (*found.whole, *found.deepstack)):
        yield f"a block is named that {found.depth} blocks do not have"
    if len(found.deepstack) >= shape.layers:
        yield f"{len(found.deepstack)} features are more than {shape.layers} layers of the decoder take"


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


def _indexes(value: Any) -> bool:
    whole = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    return whole and sorted(set(value)) == value


def expected(vision: Vision) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, without its prefix, and shape of every weight of the tower."""
    width, inner = vision.width, vision.width * vision.merged
    yield "patch_embed.proj.weight", (width, CHANNELS, FRAMES, vision.patch, vision.patch)
    if vision.kind == "qwen3_vl":
        yield "patch_embed.proj.bias", (width,)
        yield "pos_embed.weight", (vision.positions**2, width)
    mlp = {
        "qwen2_vl": {"fc1": (vision.intermediate, width), "fc2": (width, vision.intermediate)},
        "qwen2_5_vl": {"gate_proj": (vision.intermediate, width), "up_proj": (vision.intermediate, width)}
        | {"down_proj": (width, vision.intermediate)},
        "qwen3_vl": {"linear_fc1": (vision.intermediate, width), "linear_fc2": (width, vision.intermediate)},
    }[vision.kind]
    for index in range(vision.depth):
        path = f"blocks.{index}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{path}.{norm}", width, vision)
        yield from _linear(f"{path}.attn.qkv", (3 * width, width))
        yield from _linear(f"{path}.attn.proj", (width, width))
        for name, dims in mlp.items():
            yield from _linear(f"{path}.mlp.{name}", dims)
    norm, first, last = merger_names(vision.kind)
    mergers = [
        ("merger", width),
        *((f"deepstack_merger_list.{index}", inner) for index in range(len(vision.deepstack))),
    ]
    for path, normed in mergers:
        yield from _norm(f"{path}.{norm}", normed, vision)
        yield from _linear(f"{path}.{first}", (inner, inner))
        yield from _linear(f"{path}.{last}", (vision.output, inner))


def merger_names(kind: str) -> tuple[str, str, str]:
    """The norm and the two linear layers of a merger."""
    return ("norm", "linear_fc1", "linear_fc2") if kind == "qwen3_vl" else ("ln_q", "mlp.0", "mlp.2")


def _linear(path: str, dims: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", dims
    yield f"{path}.bias", dims[:1]


def _norm(path: str, width: int, vision: Vision) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", (width,)
    if vision.kind != "qwen2_5_vl":
        yield f"{path}.bias", (width,)
