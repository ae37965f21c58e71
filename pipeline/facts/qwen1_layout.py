"""Qwen 1.0 (Qwen-1.8B, 7B, 14B, 72B) in terms of Qwen2: configuration and names of the weights.

Its class, ``QWenLMHeadModel``, exists as code beside each checkpoint only, which is never run here. For as many tokens
as ``seq_length`` it computes what transformers' ``Qwen2ForCausalLM`` computes: RMS norms, rotary halves, biases on
query, key and value alone, ``w1(x) * silu(w2(x))``. Beyond them it scales the base of the rotary frequencies
(``use_dynamic_ntk``) and the queries (``use_logn_attn``), which Qwen2 does not, so the context ends there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import CheckpointError

MODEL_TYPE, ARCHITECTURE = "qwen", "QWenLMHeadModel"

# Tensors that older versions of the class stored though they follow from the configuration.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attn.logn_tensor", ".rotary_emb.inv_freq")
# What must be so for a layer to be one of Qwen2's, with the default of the published configuration class.
_FIXED = {"no_bias": True, "scale_attn_weights": True, "rotary_pct": 1.0}


def is_qwen1(config: Any) -> bool:
    """Whether a ``config.json`` is Qwen 1.0's."""
    return (
        isinstance(config, Mapping)
        and config.get("model_type") == MODEL_TYPE
        and config.get("architectures") == [ARCHITECTURE]
    )


def as_qwen2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The ``config.json`` of the Qwen2 model that computes the same as a Qwen 1.0 one; sizes are not checked.

    Raises:
        CheckpointError: it has an encoder for images or sounds, or parts that Qwen2 has not.
    """
    for key in ("visual", "audio"):
        if key in config:
            raise CheckpointError(
                f"the checkpoint has an encoder beside its decoder ({key})",
                where=where,
                why="of Qwen 1.0 the language models are supported, not Qwen-VL and Qwen-Audio",
                fix="use Qwen-7B, its Chat model, or another size of them",
            )
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    channels = config.get("kv_channels", 128)
    wrong = [f"{key} is {config[key]!r}" for key, wanted in _FIXED.items() if config.get(key, wanted) != wanted]
    if type(hidden) is int and type(heads) is int and (type(channels) is not int or channels * heads != hidden):
        wrong.append(f"kv_channels is {channels!r}, not hidden_size / num_attention_heads")
    numbers = {"rms_norm_eps": ("layer_norm_epsilon", 1e-6), "rope_theta": ("rotary_emb_base", 10000)}
    found = {name: config.get(key, default) for name, (key, default) in numbers.items()}
    wrong += [f"{numbers[name][0]} is {value!r}" for name, value in found.items() if not _is_positive(value)]
    if type(context := config.get("seq_length")) is not int or context < 1:  # Qwen2 would take a default
        wrong.append(f"seq_length is {context!r}")
    if wrong:
        raise CheckpointError(
            "the checkpoint is no Qwen 1.0 model that can be converted",
            where=where,
            why="; ".join(wrong),
            fix="use one as it was published",
        )
    doubled = config.get("intermediate_size")  # of both halves, gate and up
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.get("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": doubled // 2 if type(doubled) is int else doubled,
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        # max_position_embeddings is what the scaling beyond seq_length reaches.
        "max_position_embeddings": context,
        "rms_norm_eps": found["rms_norm_eps"],
        "rope_theta": float(found["rope_theta"]),
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.get("tie_word_embeddings") is True,
    }


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e12


def is_buffer(name: str) -> bool:
    """Whether a tensor is none of the weights, and is left out."""
    return name.endswith(_BUFFERS)


def weights(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name and shape of each of Qwen 1.0's weights, and the names of the Qwen2 weights that it holds row after row.

    Args:
        config: what `as_qwen2` returned.
    """
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "transformer.wte.weight", (vocabulary, hidden), ("model.embed_tokens.weight",)
    yield "transformer.ln_f.weight", (hidden,), ("model.norm.weight",)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden), ("lm_head.weight",)
    parts: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "ln_1.weight": ((hidden,), ("input_layernorm.weight",)),
        "attn.c_attn.weight": ((3 * hidden, hidden), tuple(f"self_attn.{name}_proj.weight" for name in "qkv")),
        "attn.c_attn.bias": ((3 * hidden,), tuple(f"self_attn.{name}_proj.bias" for name in "qkv")),
        "attn.c_proj.weight": ((hidden, hidden), ("self_attn.o_proj.weight",)),
        "ln_2.weight": ((hidden,), ("post_attention_layernorm.weight",)),
        "mlp.w1.weight": ((inner, hidden), ("mlp.up_proj.weight",)),
        "mlp.w2.weight": ((inner, hidden), ("mlp.gate_proj.weight",)),
        "mlp.c_proj.weight": ((hidden, inner), ("mlp.down_proj.weight",)),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, (dims, names) in parts.items():
            yield f"transformer.h.{layer}.{name}", dims, tuple(f"model.layers.{layer}.{part}" for part in names)
