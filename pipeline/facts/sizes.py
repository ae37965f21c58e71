"""How many bytes a model takes, from its sizes and its scheme: the one place where they are computed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.facts.family import Experts, Shape
from pipeline.facts.scheme import Scheme, WeightScheme

# A runtime without a model, its tokenizer, and the arena's slack: measured with onnxruntime-genai 0.14.1 on a package
# of 400 MB, which peaked at 770 MB after prompts of 512 tokens and at 875 MB after 2048.
_RUNTIME = 320_000_000
# Tokens of a prompt whose activations are counted: longer prompts take more, unless the runtime cuts them in chunks.
_PROMPT = 2048
# The tokenizer's files (16 MB), graph, configuration and reports.
FILES = 17_000_000


@dataclass(frozen=True)
class Tower:
    """The sizes of an encoder of images or sounds in front of a decoder.

    Attributes:
        layers, hidden, intermediate: of its transformer.
        matrices: of an MLP: 2, or 3 where it is gated.
        merged: width of what its projector takes.
        out: the decoder's width.
        mergers: how many projectors there are, whose first matrix is square.
        square: whether projectors have that matrix.
    """

    layers: int
    hidden: int
    intermediate: int
    matrices: int
    merged: int
    out: int
    mergers: int = 1
    square: bool = True

    @property
    def parameters(self) -> int:
        """Weights of its matrices."""
        block = 4 * self.hidden * self.hidden + self.matrices * self.hidden * self.intermediate
        projector = self.merged * self.out + self.square * self.merged * self.merged
        return self.layers * block + self.mergers * projector


@dataclass(frozen=True)
class Weight:
    """Weights of equal shape: a path among theirs, what they are, their number, rows, and elements of each row."""

    path: str
    role: str
    count: int
    rows: int
    columns: int


def weights(shape: Shape, each_layer: bool) -> Iterator[Weight]:
    """The matrices of a decoder, named as the exporters do; with ``each_layer`` those of each, else of all together."""
    hidden, attention, cache = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers if each_layer else 1):
        count = 1 if each_layer else shape.layers
        at = f"model.layers.{layer}"
        yield Weight(f"{at}.attn.qkv_proj", "body", count, attention + 2 * cache, hidden)
        yield Weight(f"{at}.attn.o_proj", "body", count, hidden, attention)
        sparse = int(layer in shape.sparse_layers) if each_layer else len(shape.sparse_layers)
        if sparse < count:
            yield from _mlp(f"{at}.mlp", count - sparse, shape.intermediate, hidden)
        if sparse and shape.experts:
            yield from _mixture(f"{at}.mlp", sparse, shape.experts, hidden)
    yield Weight("lm_head", "head", 1, shape.vocabulary, hidden)
    yield Weight("model.embed_tokens", "embedding", 1, shape.vocabulary, hidden)


def _mlp(at: str, count: int, width: int, hidden: int) -> Iterator[Weight]:
    yield Weight(f"{at}.gate_proj", "body", count, width, hidden)
    yield Weight(f"{at}.up_proj", "body", count, width, hidden)
    yield Weight(f"{at}.down_proj", "body", count, hidden, width)


def _mixture(at: str, count: int, experts: Experts, hidden: int) -> Iterator[Weight]:
    yield Weight(f"{at}.gate", "router", count, experts.count, hidden)
    # All experts of a layer are one weight: patterns of a scheme match their common path.
    number, width = count * experts.count, experts.intermediate
    yield Weight(f"{at}.experts", "experts", 2 * number, width, hidden)
    yield Weight(f"{at}.experts", "experts", number, hidden, width)
    if experts.shared_intermediate:
        yield Weight(f"{at}.shared_expert_gate", "router", count, 1, hidden)
        yield from _mlp(f"{at}.shared_expert", count, experts.shared_intermediate, hidden)


def package_bytes(shape: Shape, scheme: Scheme, floats: int, tower: Tower | None = None) -> int:
    """Bytes of a package's weights.

    Args:
        floats: bits of a weight that is not quantized, and of scales.
        tower: stays as it is.
    """
    numbered = any(re.search(r"\d", item.match) for item in scheme.overrides)
    bits = 0.0
    for weight in weights(shape, numbered):
        if weight.role == "embedding" and scheme.embedding == "shared":
            continue
        stored = scheme.of_weight(weight.path, weight.role)
        bits += weight.count * weight.rows * weight.columns * _bits(weight, scheme, stored, floats)
    return int(bits) // 8 + (floats * tower.parameters // 8 if tower else 0)


def _bits(weight: Weight, scheme: Scheme, stored: WeightScheme | None, floats: int) -> float:
    """Bits of each element of a weight, scales and zero points included."""
    if scheme.algorithm == "dynamic":
        return floats if weight.role in ("embedding", "router") else 8
    if stored is None or scheme.algorithm == "none":
        return floats
    size = stored.block_size if stored.block_size > 0 else weight.columns
    width: float = stored.bits
    if scheme.algorithm == "nncf" and weight.role == "body":
        ratio = scheme.options.get("compress_config", {}).get("ratio", 1.0)
        width = ratio * width + (1 - ratio) * 8
    return width + (floats + (0 if stored.symmetric else stored.bits)) / size


def float_bytes(shape: Shape, tower: Tower | None = None) -> int:
    """Bytes of a checkpoint's weights in float32; head and embedding count apart, as they do while a graph is made."""
    body = shape.body_parameters + 2 * shape.vocabulary_parameters
    return 4 * (body + (tower.parameters if tower else 0))


def parameters(shape: Shape, tower: Tower | None = None, head: bool = True) -> int:
    """Different weights of a model's matrices; biases and norms, a few in a thousand, are not counted."""
    vocabulary = shape.vocabulary_parameters * (1 if shape.tied or not head else 2)
    return shape.body_parameters + vocabulary + (tower.parameters if tower else 0)


def largest_layer(shape: Shape) -> int:
    """Weights of one layer: a mixture, where there are any."""
    mixture = shape.mixture_parameters(shape.experts.count) if shape.experts else 0
    dense = shape.mlp_parameters if len(shape.sparse_layers) < shape.layers else 0
    return shape.attention_parameters + max(mixture, dense)


def cache_bytes(shape: Shape, context: int, floats: int) -> int:
    """Bytes of the keys and values of ``context`` tokens."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * context * floats // 8


def runtime_bytes(shape: Shape, packed: int, context: int, floats: int) -> int:
    """Bytes of memory of a device that runs a package: its weights, the cache of a context, the runtime, and what it
    computes with while it reads a prompt (`_PROMPT` tokens at once)."""
    experts = shape.experts.per_token * shape.experts.intermediate if shape.experts else 0
    width = 4 * shape.hidden + 2 * max(shape.intermediate, experts)
    prompt = min(context, _PROMPT) * width * floats // 8
    return packed + cache_bytes(shape, context, floats) + prompt + _RUNTIME
