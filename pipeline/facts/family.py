"""What is true of each Qwen architecture, read from a checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.facts import positions, qwen1_layout

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
        runtime: the genai runtime's ``model.type``; it knows no types of mixtures, and runs their graphs like others.
        head_dim: what transformers takes when config.json has none; ``None`` is hidden size / attention heads.
        experts: whether its MLPs are mixtures of experts.
        context: the same for the length of the context.
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
    runtime: str
    head_dim: int | None = None
    experts: bool = False
    context: int = positions.DEFAULT
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


_EVERY = ("genai", "optimum", "native", "static", "openvino")
_NATIVE = ("native",)
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
        Family("qwen2", "Qwen2ForCausalLM", _EVERY, "Qwen1.5, Qwen2, Qwen2.5", "qwen2"),
        Family("qwen3", "Qwen3ForCausalLM", _EVERY, "Qwen3", "qwen3", head_dim=128),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", ("native",), "Qwen1.5-MoE, Qwen2-MoE", "qwen2", experts=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", ("native",), "Qwen3-MoE", "qwen3", experts=True),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", _NATIVE, "Qwen2-VL", "qwen2_5_vl", sees=True),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _NATIVE, "Qwen2.5-VL", "qwen2_5_vl", sees=True),
        Family(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            _NATIVE,
            "Qwen3-VL",
            "qwen3_vl",
            head_dim=128,
            context=128000,
            sees=True,
        ),
        Family(
            "qwen2_audio",
            "Qwen2AudioForConditionalGeneration",
            _NATIVE,
            "Qwen2-Audio",
            "phi4mm",
            hears=True,
            text="qwen2",
            defaults=_QWEN2,
        ),
    )
}


@dataclass(frozen=True)
class Experts:
    """The sizes of the mixtures of a decoder.

    Attributes:
        count: of the experts of a layer.
        per_token: how many of them a token goes to.
        intermediate: inner size of each.
        normalized: whether the weights of the chosen ones sum to one.
        shared_intermediate: inner size of the expert that all tokens go to; 0 when there is none.
        sparse_step: every so many layers one is a mixture.
        dense_layers: layers that are none, whatever the step says.
    """

    count: int
    per_token: int
    intermediate: int
    normalized: bool = False
    shared_intermediate: int = 0
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, in elements and counts.

    A layer that is a mixture has ``experts.count`` MLPs of width ``experts.intermediate`` instead of one of width
    ``intermediate``, and may have one more that all tokens go through.
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
    experts: Experts | None = None

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers whose MLP is a mixture of experts."""
        given = self.experts
        if given is None:
            return ()
        every = range(given.sparse_step - 1, self.layers, given.sparse_step)
        return tuple(layer for layer in every if layer not in given.dense_layers)

    @property
    def attention_parameters(self) -> int:
        """Weights of the attention projections of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Weights of the MLP of a layer that is no mixture."""
        return 3 * self.hidden * self.intermediate

    @property
    def body_parameters(self) -> int:
        """Weights of the attention and MLP projections of all layers, of all experts and of what routes to them."""
        return self._body(self.experts.count if self.experts else 0)

    @property
    def active_parameters(self) -> int:
        """Weights of all layers that one token goes through; fewer than all of a mixture of experts."""
        return self._body(self.experts.per_token if self.experts else 0)

    def mixture_parameters(self, count: int) -> int:
        """Weights of a mixture with ``count`` of its experts: these, the router, the shared expert and its gate."""
        given = self.experts
        if given is None:
            return 0
        widths = count * given.intermediate + given.shared_intermediate
        return 3 * self.hidden * widths + self.hidden * (given.count + bool(given.shared_intermediate))

    def _body(self, count: int) -> int:
        sparse = len(self.sparse_layers)
        mlps = (self.layers - sparse) * self.mlp_parameters + sparse * self.mixture_parameters(count)
        return self.layers * self.attention_parameters + mlps

    @property
    def vocabulary_parameters(self) -> int:
        """Weights of one vocabulary matrix (head or embedding)."""
        return self.vocabulary * self.hidden

    def facts(self) -> dict[str, Any]:
        """As a JSON value; without ``experts`` where there are none."""
        found = asdict(self)
        if self.experts is None:
            del found["experts"]
        else:
            found["experts"]["dense_layers"] = list(self.experts.dense_layers)
        return found


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
_EXPERT_FIELDS = {
    "count": "num_experts",
    "per_token": "num_experts_per_tok",
    "intermediate": "moe_intermediate_size",
    "shared_intermediate": "shared_expert_intermediate_size",
    "sparse_step": "decoder_sparse_step",
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
    mixture = _expert_sizes(text, family)
    bad += [f"{_EXPERT_FIELDS[name]} is {value!r}" for name, value in mixture.items() if not _is_size(value)]
    if bad:
        raise CheckpointError(f"config.json has no positive integer for a size: {', '.join(bad)}", where=where)
    experts = None
    if mixture:
        normalized = bool(text.get("norm_topk_prob", False))
        dense = _dense_layers(text, sizes["layers"], where)
        experts = Experts(**mixture, normalized=normalized, dense_layers=dense)
    if experts and experts.per_token > experts.count:
        raise CheckpointError(f"a token goes to {experts.per_token} of {experts.count} experts", where=where)
    sizes["context"] = positions.read(text, sizes["context"], where).context
    tied = bool(text.get("tie_word_embeddings", False))
    return Shape(model_type=family.model_type, tied=tied, **sizes, experts=experts)


def _expert_sizes(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if not family.experts:
        return {}
    sizes = {name: config.get(key) for name, key in _EXPERT_FIELDS.items()}
    if sizes["sparse_step"] is None:
        sizes["sparse_step"] = 1
    if family.model_type != "qwen2_moe":
        del sizes["shared_intermediate"]
    return sizes


def _dense_layers(config: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    given = config.get("mlp_only_layers") or []
    if not isinstance(given, list) or not all(type(layer) is int and 0 <= layer < layers for layer in given):
        raise CheckpointError(f"mlp_only_layers is {given!r}, no list of the {layers} layers", where=where)
    return tuple(sorted(set(given)))


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0  # a bool is an int, too
