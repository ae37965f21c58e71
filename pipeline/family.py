"""What is true of each Qwen architecture, read from a checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import positions, qwen1_layout
from pipeline.errors import CheckpointError

# Bytes of float32 weights that are held in memory at once, at most: larger models are walked layer by layer.
HELD_WHOLE = 8_000_000_000


@dataclass(frozen=True)
class Family:
    """A Qwen architecture.

    Attributes:
        model_type: ``model_type`` in config.json.
        architecture: the transformers class.
        exporters: which exporters can write its graph.
        title: what people call it.
        head_dim: what transformers takes when config.json has none; ``None`` is hidden size / attention heads.
        context: the same for the length of the context.
        runtime: the genai runtime's ``model.type``, where it is not ``model_type``.
        sees: whether it takes images. ``config.json`` then has the decoder's sizes in ``text_config``; older ones of
            Qwen2-VL and Qwen2.5-VL have them among the others.
        hears: whether it takes sounds. ``config.json`` then has the decoder's sizes in ``text_config``.
        text: model type of that decoder.
        defaults: what transformers takes for sizes that ``text_config`` leaves out.
    """

    model_type: str
    architecture: str
    exporters: tuple[str, ...]
    title: str
    head_dim: int | None = None
    context: int = positions.DEFAULT
    runtime: str = ""
    sees: bool = False
    hears: bool = False
    text: str = ""
    defaults: Mapping[str, int] = field(default_factory=dict)

    @property
    def multimodal(self) -> bool:
        """Whether it is more than a decoder of text."""
        return self.sees or self.hears

    @property
    def headless(self) -> str:
        """The transformers class without a head, which checkpoints of embedding models may name."""
        return self.architecture.replace("ForCausalLM", "Model")


# The published configurations of Qwen2-Audio leave most sizes to these.
_QWEN2 = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM", ("genai", "optimum", "native"), "Qwen1.5, Qwen2, Qwen2.5"),
        Family("qwen3", "Qwen3ForCausalLM", ("genai", "optimum", "native"), "Qwen3", head_dim=128),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", ("native",), "Qwen2-VL", runtime="qwen2_5_vl", sees=True),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", ("native",), "Qwen2.5-VL", sees=True),
        Family(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            ("native",),
            "Qwen3-VL",
            head_dim=128,
            context=128000,
            sees=True,
        ),
        Family(
            "qwen2_audio",
            "Qwen2AudioForConditionalGeneration",
            ("native",),
            "Qwen2-Audio",
            runtime="phi4mm",
            hears=True,
            text="qwen2",
            defaults=_QWEN2,
        ),
    )
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, in elements and counts.

    A mixture of experts has ``experts`` MLPs of width ``expert_intermediate`` in each layer instead of one of width
    ``intermediate``, a token goes through ``experts_per_token`` of them, and through one of width
    ``shared_intermediate``.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0

    @property
    def attention_parameters(self) -> int:
        """Weights of the attention projections of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def body_parameters(self) -> int:
        """Weights of the attention and MLP projections of all layers, of all experts and of what routes to them."""
        return self.layers * (self.attention_parameters + self._mlp(self.experts))

    @property
    def active_parameters(self) -> int:
        """Weights of all layers that one token goes through; fewer than all of a mixture of experts."""
        return self.layers * (self.attention_parameters + self._mlp(self.experts_per_token))

    def _mlp(self, experts: int) -> int:
        """Weights of one layer's MLP, ``experts`` of its experts counted."""
        if not self.experts:
            return 3 * self.hidden * self.intermediate
        widths = experts * self.expert_intermediate + self.shared_intermediate
        return 3 * self.hidden * widths + self.hidden * self.experts

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of one vocabulary matrix (head or embedding)."""
        return self.vocabulary * self.hidden


# Our field → its key in config.json.
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
}


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """The `Shape` that a ``config.json`` describes; of Qwen 1.0, that of the Qwen2 model that it is converted to.

    Raises:
        CheckpointError: the family is unknown, needs remote code, or a size is missing or no positive integer, or
            positions are scaled in an unsupported way; also when ``config`` is no mapping, which JSON allows.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError("config.json is no JSON object", where=where)
    if qwen1_layout.is_qwen1(config):  # its auto_map names code that is known, and never run
        config = qwen1_layout.as_qwen2(config, where)
    if "auto_map" in config:
        raise CheckpointError(
            "the checkpoint asks for code of its own (auto_map)",
            where=where,
            why="running a checkpoint's code would give it this machine",
            fix="use a checkpoint of a class that transformers has built in",
        )
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    architectures = config.get("architectures") or ([family.architecture] if family else [])
    if family is None or architectures not in ([family.architecture], [family.headless]):
        known = "; ".join(f"{name} ({entry.architecture})" for name, entry in FAMILIES.items())
        raise CheckpointError(
            f"architecture {architectures} of model type {model_type!r} is not supported",
            where=where,
            fix=f"supported: {known}; converted: {qwen1_layout.MODEL_TYPE} ({qwen1_layout.ARCHITECTURE})",
        )
    text = config.get("text_config", {} if family.hears else config) if family.multimodal else config
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json has a text_config that is no object", where=where)
    if family.text and (kind := text.get("model_type", family.text)) != family.text:
        raise CheckpointError(f"the decoder of {family.title} is {kind!r}, not {family.text}", where=where)
    text = {**family.defaults, **text}
    sizes: dict[str, Any] = {name: text.get(key) for name, key in _FIELDS.items()}
    hidden, heads = sizes["hidden"], sizes["heads"]
    divides = _is_size(hidden) and _is_size(heads) and hidden % heads == 0
    defaults = {
        "kv_heads": heads,
        "head_dim": family.head_dim or (hidden // heads if divides else None),
        "context": family.context,
    }
    sizes |= {name: value for name, value in defaults.items() if sizes[name] is None}
    bad = [f"{_FIELDS[name]} is {value!r}" for name, value in sizes.items() if not _is_size(value)]
    if bad:
        raise CheckpointError(f"config.json has no positive integer for a size: {', '.join(bad)}", where=where)
    sizes["context"] = positions.read(text, sizes["context"], where).context
    return Shape(model_type=family.model_type, tied=bool(text.get("tie_word_embeddings", False)), **sizes)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0  # a bool is an int, too
