"""A Qwen2 or Qwen3 decoder as graphs of standard operators with fixed shapes, for compilers that take no others.

The model is cut at its seams into the stages of an onnxruntime-genai decoder pipeline:

====== ========================================================================= =============
stage  what it does                                                              runs on
====== ========================================================================= =============
front  ids and lengths to embeddings, rotary rows, mask; any number of tokens    the processor
layers all decoder layers, as one graph for prefill and one for decode           the NPU
update puts new keys and values into their slots of the cache, picks the last row the processor
head   the last norm and the output head, for one token                          the NPU
====== ========================================================================= =============

Shapes in this module:
    T: tokens of a call, S: slots of the cache, H: hidden size, A: attention heads, K: key-value heads, D: head size,
    V: vocabulary.

Operators are those that Qualcomm's HTP does best: linear layers are 1x1 convolutions (weights may have a scale per
channel), norms are ``RMSNormalization``, grouped heads are folded into the rows, and the softmax scale is in the
weights. No node depends on T, so that a graph serves another T by its declared shapes alone (`with_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph.builder import GraphBuilder
from pipeline.graph.external_data import ExternalDataWriter

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

# The first opset with RMSNormalization.
OPSET = 23
# Taken from the scores of what may not be seen: as much as float16 holds beside scores of thousands, which the first
# layer of Qwen2.5-0.5B has. Slots of the cache that were never written are far from zero once they are quantized.
MASKED = 30_000.0
_INT64 = 7  # onnx.TensorProto.INT64, without the import


@dataclass(frozen=True)
class Sizes:
    """What the graphs of a decoder depend on; ``rotary`` are the ``[D / 2]`` inverse frequencies."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    normed_heads: bool
    window: int
    cache: int
    pad: int
    rotary: npt.NDArray[np.float64]


def sizes_of(model: Any, window: int, cache: int) -> Sizes:
    """The sizes of a transformers Qwen2 or Qwen3 ``ForCausalLM``, for prefill of ``window`` tokens at a time.

    Raises:
        ValueError: ``cache`` is no multiple of ``window``, or the model has layers that this module does not write.
    """
    config = model.config
    if cache % window:
        raise ValueError(f"a cache of {cache} slots is no multiple of the window of {window} tokens")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError("a layer has sliding-window attention")
    if (config.rope_scaling or {}).get("rope_type", "default") != "default":
        raise ValueError(f"rotary embeddings are scaled: {config.rope_scaling}")
    if config.hidden_act != "silu":
        raise ValueError(f"the activation is {config.hidden_act}")
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        normed_heads=hasattr(model.model.layers[0].self_attn, "q_norm"),
        window=window,
        cache=cache,
        # The runtime fills the last window with this id and looks for it in prompts: one that no text has. Qwen's
        # vocabularies are padded at their end.
        pad=config.vocab_size - 1,
        rotary=model.model.rotary_emb.inv_freq.double().numpy(),
    )


def front(sizes: Sizes, embedding: npt.NDArray[np.float32], writer: ExternalDataWriter) -> onnx.ModelProto:
    """The stage before the layers.

    Inputs: ``input_ids`` int32 ``[1, T]``; ``past_seq_len`` int32 ``[1, 1]``, the slot of the call's last token, as the
    runtime counts; ``total_seq_len`` int32 ``[1]``, not used, but the runtime feeds both lengths or neither.
    Outputs: ``embeds`` float32 ``[1, T, H]``; ``cos``, ``sin`` float32 ``[1, 1, T, D]``; ``mask`` float32
    ``[1, 1, T, S + T]``, 0 for what may be seen and -1 for what may not; ``slots`` int64 ``[T]``; ``last`` int64
    ``[1]``, the row of the last token that is no padding.
    """
    g = GraphBuilder(writer)
    ids = g.input("input_ids", np.int32, [1, "tokens"])
    end = g.input("past_seq_len", np.int32, [1, 1])
    g.input("total_seq_len", np.int32, [1])
    g.node("Gather", [g.constant("embed_tokens.weight", embedding), ids], "embeds")
    zero, one = g.constant("zero", np.array(0)), g.constant("one", np.array(1))
    count = g.node("Gather", [g.node("Shape", [ids], "ids_shape"), one], "count")
    rows = g.node("Range", [zero, count, one], "rows")
    end = g.node("Cast", [g.node("Reshape", [end, g.ints(1)], "end")], "end_long", to=_INT64)
    begin = g.node("Sub", [g.node("Add", [end, one], "after"), count], "begin")
    slots = g.node("Add", [rows, begin], "slots")
    angles = np.outer(np.arange(sizes.cache), sizes.rotary)
    for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        table = g.constant(f"{name}_cache", np.concatenate([values, values], axis=1).astype(np.float32))
        g.node("Unsqueeze", [g.node("Gather", [table, slots], f"{name}_rows"), g.ints(0, 1)], name)
    row, column = g.node("Unsqueeze", [rows, g.ints(0)], "row"), g.node("Unsqueeze", [rows, g.ints(1)], "column")
    past = g.node("Less", [g.constant("cache_slots", np.arange(sizes.cache)[None]), begin], "past_seen")
    count_dim = g.node("Unsqueeze", [count, g.ints(0)], "count_dim")
    shape = g.node("Concat", [count_dim, g.ints(sizes.cache)], "past_shape", axis=0)
    past = g.node("Expand", [past, shape], "past_seen_rows")
    seen = g.node("Concat", [past, g.node("LessOrEqual", [row, column], "new_seen")], "seen", axis=1)
    bounds = [g.constant("visible", np.array(0, np.float32)), g.constant("hidden_from", np.array(-1, np.float32))]
    g.node("Unsqueeze", [g.node("Where", [seen, *bounds], "mask_rows"), g.ints(0, 1)], "mask")
    padding = g.node("Equal", [ids, g.constant("pad", np.array(sizes.pad, np.int32))], "padding")
    real = g.node("Cast", [g.node("Not", [padding], "real")], "real_long", to=_INT64)
    g.node("ReduceMax", [g.node("Mul", [real, row], "real_rows"), g.ints(1)], "last", keepdims=0)
    g.output("embeds", np.float32, [1, "tokens", sizes.hidden])
    for name in ("cos", "sin"):
        g.output(name, np.float32, [1, 1, "tokens", sizes.head_dim])
    g.output("mask", np.float32, [1, 1, "tokens", "visible"])
    g.output("slots", np.int64, ["tokens"])
    g.output("last", np.int64, [1])
    return g.model("front", OPSET)


def layers(sizes: Sizes, weights: Mapping[str, npt.NDArray[np.float32]], writer: ExternalDataWriter) -> onnx.ModelProto:
    """All layers, for ``sizes.window`` tokens.

    Inputs: ``embeds``, ``cos``, ``sin``, ``mask`` of `front`; ``past_key_values.N.key`` and ``.value`` float32
    ``[1, K, S, D]``, keys rotated. Outputs: ``hidden`` float32 ``[1, T, H]``; ``new.N.key`` and ``.value`` float32
    ``[1, K, T, D]``, the call's own rows.

    Args:
        weights: of the checkpoint, by their names in transformers.
    """
    g, t, s = GraphBuilder(writer), sizes.window, sizes
    x = g.input("embeds", np.float32, [1, t, s.hidden])
    cos, sin = (g.input(name, np.float32, [1, 1, t, s.head_dim]) for name in ("cos", "sin"))
    mask = g.input("mask", np.float32, [1, 1, t, s.cache + t])
    group = s.heads // s.kv_heads
    mask = g.node("Concat", [mask] * group, "mask_of_group", axis=2) if group > 1 else mask
    for index in range(s.layers):
        past = [
            g.input(f"past_key_values.{index}.{kind}", np.float32, [1, s.kv_heads, s.cache, s.head_dim])
            for kind in ("key", "value")
        ]
        x = _layer(g, s, weights, index, x, (cos, sin, mask), past)
    g.node("Identity", [x], "hidden")
    g.output("hidden", np.float32, [1, t, s.hidden])
    for index in range(s.layers):
        for kind in ("key", "value"):
            g.output(f"new.{index}.{kind}", np.float32, [1, s.kv_heads, t, s.head_dim])
    return g.model("layers", OPSET)


def _layer(
    g: GraphBuilder,
    s: Sizes,
    weights: Mapping[str, npt.NDArray[np.float32]],
    index: int,
    x: str,
    shared: tuple[str, str, str],
    past: list[str],
) -> str:
    here, there = f"layers.{index}", f"model.layers.{index}"
    cos, sin, mask = shared
    normed = _norm(g, s, x, weights[f"{there}.input_layernorm.weight"], f"{here}.attn_norm")
    scale = np.float32(s.head_dim**-0.5)

    def project(kind: str, heads: int, factor: np.float32) -> str:
        weight, bias = (weights.get(f"{there}.self_attn.{kind}_proj.{part}") for part in ("weight", "bias"))
        assert weight is not None
        made = _linear(g, normed, weight * factor, None if bias is None else bias * factor, f"{here}.{kind}")
        return g.node("Reshape", [made, g.ints(1, -1, heads, s.head_dim)], f"{here}.{kind}_heads")

    # The scale of the softmax is in the queries' weights, or in the gain of their norm.
    queries = project("q", s.heads, np.float32(1) if s.normed_heads else scale)
    keys, values = (project(kind, s.kv_heads, np.float32(1)) for kind in "kv")
    if s.normed_heads:
        gains = [weights[f"{there}.self_attn.{kind}_norm.weight"] for kind in "qk"]
        queries = _norm(g, s, queries, gains[0] * scale, f"{here}.q_norm")
        keys = _norm(g, s, keys, gains[1], f"{here}.k_norm")
    queries = _rotate(g, s, g.node("Transpose", [queries], f"{here}.q_t", perm=[0, 2, 1, 3]), cos, sin, f"{here}.q_rot")
    keys = g.node("Transpose", [keys], f"{here}.k_t", perm=[0, 2, 1, 3])
    shift = _key_shift(s, weights.get(f"{there}.self_attn.k_proj.bias"))
    if shift is None:
        keys = _rotate(g, s, keys, cos, sin, f"new.{index}.key")
    else:
        keys = _rotate(g, s, keys, cos, sin, f"{here}.k_rot")
        keys = g.node("Sub", [keys, g.constant(f"{here}.key_shift", shift)], f"new.{index}.key")
    values = g.node("Transpose", [values], f"new.{index}.value", perm=[0, 2, 1, 3])
    keys = g.node("Concat", [past[0], keys], f"{here}.keys", axis=2)
    values = g.node("Concat", [past[1], values], f"{here}.values", axis=2)
    queries = g.node("Reshape", [queries, g.ints(1, s.kv_heads, -1, s.head_dim)], f"{here}.q_grouped")
    keys = g.node("Transpose", [keys], f"{here}.keys_t", perm=[0, 1, 3, 2])
    scores = g.node("MatMul", [queries, keys], f"{here}.scores")
    depth = g.constant("mask_depth", np.array([MASKED], np.float32))
    scores = g.node("Add", [scores, g.node("Mul", [mask, depth], f"{here}.mask")], f"{here}.masked")
    mixed = g.node("MatMul", [g.node("Softmax", [scores], f"{here}.shares", axis=-1), values], f"{here}.mixed")
    mixed = g.node("Reshape", [mixed, g.ints(1, s.heads, -1, s.head_dim)], f"{here}.mixed_heads")
    mixed = g.node("Transpose", [mixed], f"{here}.mixed_t", perm=[0, 2, 1, 3])
    mixed = g.node("Reshape", [mixed, g.ints(1, -1, s.heads * s.head_dim)], f"{here}.mixed_rows")
    weight, bias = weights[f"{there}.self_attn.o_proj.weight"], weights.get(f"{there}.self_attn.o_proj.bias")
    mixed = _linear(g, mixed, weight, bias, f"{here}.o")
    x = g.node("Add", [x, mixed], f"{here}.after_attn")
    normed = _norm(g, s, x, weights[f"{there}.post_attention_layernorm.weight"], f"{here}.mlp_norm")
    gate, up = (
        _linear(g, normed, weights[f"{there}.mlp.{kind}_proj.weight"], None, f"{here}.{kind}")
        for kind in ("gate", "up")
    )
    gate = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{here}.sigmoid")], f"{here}.silu")
    gated = g.node("Mul", [gate, up], f"{here}.gated")
    down = _linear(g, gated, weights[f"{there}.mlp.down_proj.weight"], None, f"{here}.down")
    return g.node("Add", [x, down], f"{here}.after_mlp")


def _key_shift(s: Sizes, bias: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32] | None:
    """What may be taken from all keys of a layer, ``[1, K, 1, D]``: a query's softmax does not see a constant.

    The biases of Qwen2's keys are so large that scores reach the thousands, where the NPU's products are off by whole
    nats. Rotary embedding turns the slow half of a head's channels by less than a radian over the cache: their bias is
    nearly the same in all keys, and goes.
    """
    if bias is None:
        return None
    slow = np.tile(s.rotary * s.cache < 1.0, 2)
    return (bias.reshape(1, s.kv_heads, 1, s.head_dim) * slow).astype(np.float32)


def _linear(
    g: GraphBuilder, x: str, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None, name: str
) -> str:
    """``[1, T, in]`` to ``[1, T, out]`` by a 1x1 convolution; compilers cancel the transposes."""
    rows, columns = weight.shape
    x = g.node("Reshape", [x, g.ints(1, 1, -1, columns)], f"{name}.rows")
    x = g.node("Transpose", [x], f"{name}.channels", perm=[0, 3, 1, 2])
    inputs = [x, g.constant(f"{name}.weight", weight[:, :, None, None])]
    if bias is not None:
        inputs.append(g.constant(f"{name}.bias", bias))
    y = g.node("Conv", inputs, f"{name}.conv", kernel_shape=[1, 1])
    y = g.node("Transpose", [y], f"{name}.conv_t", perm=[0, 2, 3, 1])
    return g.node("Reshape", [y, g.ints(1, -1, rows)], name)


def _norm(g: GraphBuilder, s: Sizes, x: str, gain: npt.NDArray[np.float32], name: str) -> str:
    return g.node("RMSNormalization", [x, g.constant(f"{name}.weight", gain)], name, axis=-1, epsilon=s.epsilon)


def _rotate(g: GraphBuilder, s: Sizes, x: str, cos: str, sin: str, name: str) -> str:
    """Rotary embedding of ``[1, heads, T, D]``."""
    half = s.head_dim // 2
    first, second = f"{name}.first", f"{name}.second"
    g.node("Split", [x, g.ints(half, half)], f"{name}.halves", [first, second], axis=-1)
    turned = g.node("Concat", [g.node("Neg", [second], f"{name}.neg"), first], f"{name}.turned", axis=-1)
    return g.node("Add", [g.node("Mul", [x, cos], f"{name}.cos"), g.node("Mul", [turned, sin], f"{name}.sin")], name)


def update(sizes: Sizes, cache_dtype: type = np.float32) -> onnx.ModelProto:
    """The stage behind the layers.

    Inputs: ``slots``, ``last`` of `front`; ``hidden``, ``new.N.key``, ``new.N.value`` of `layers`; the past cache.
    Outputs: ``present.N.key`` and ``.value``, which the runtime lets share the memory of the past;
    ``last_hidden`` float32 ``[1, 1, H]``.
    """
    g, s = GraphBuilder(), sizes
    slots = g.input("slots", np.int64, ["tokens"])
    last = g.input("last", np.int64, [1])
    hidden = g.input("hidden", np.float32, [1, "tokens", s.hidden])
    g.node("Gather", [hidden, last], "last_hidden", axis=1)
    column = g.node("Unsqueeze", [slots, g.ints(0, 1, 3)], "slot_column")
    for index in range(s.layers):
        for kind in ("key", "value"):
            past = g.input(f"past_key_values.{index}.{kind}", cache_dtype, [1, s.kv_heads, s.cache, s.head_dim])
            new = g.input(f"new.{index}.{kind}", cache_dtype, [1, s.kv_heads, "tokens", s.head_dim])
            if not index and kind == "key":
                indices = g.node("Expand", [column, g.node("Shape", [new], "new_shape")], "indices")
            g.node("ScatterElements", [past, indices, new], f"present.{index}.{kind}", axis=2)
            g.output(f"present.{index}.{kind}", cache_dtype, [1, s.kv_heads, s.cache, s.head_dim])
    g.output("last_hidden", np.float32, [1, 1, s.hidden])
    return g.model("update", OPSET)


def head(
    sizes: Sizes, gain: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], writer: ExternalDataWriter
) -> onnx.ModelProto:
    """``last_hidden`` float32 ``[1, 1, H]`` to ``logits`` float32 ``[1, 1, V]``."""
    g = GraphBuilder(writer)
    x = g.input("last_hidden", np.float32, [1, 1, sizes.hidden])
    _linear(g, _norm(g, sizes, x, gain, "norm"), weight, None, "logits")
    g.output("logits", np.float32, [1, 1, sizes.vocabulary])
    return g.model("head", OPSET)


def with_tokens(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
    """The same `layers` or `head` for another number of tokens: no node says it, only inputs and outputs do."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.value_info[:]
    for value in (*made.graph.input, *made.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name == "mask":
            dims[3].dim_value += tokens - dims[2].dim_value
        if not value.name.startswith("past_key_values."):
            dims[-2].dim_value = tokens
    return made
