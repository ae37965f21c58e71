"""Write a checkpoint as a float GGUF file, for llama.cpp to quantize: a peer for every checkpoint of these families.

The file has no tokenizer: benchmarks feed token ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import UsageError
from pipeline.facts import family, positions

if TYPE_CHECKING:
    import numpy.typing as npt

_ORIGINAL = "original_max_position_embeddings"
_ARCHITECTURES = {"qwen2": "QWEN2", "qwen3": "QWEN3"}


def export(checkpoint: Path, out: Path) -> None:
    """Write ``out``: matrices in float16, vectors in float32.

    Raises:
        UsageError: llama.cpp's names for the family's tensors are not known here.
        CheckpointError: the weights cannot be read.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_bytes())
    if (kind := config["model_type"]) not in _ARCHITECTURES:
        raise UsageError(
            f"{kind} is not written as GGUF", fix=f"known: {', '.join(_ARCHITECTURES)}; compare with another peer"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_ARCHITECTURES[kind]], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, kind)
    _describe(writer, config)
    for name, values in Tensors(checkpoint).all():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), _stored(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(family.read_shape(config, "config.json").context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    if positions.kind(config, "config.json") == "yarn":
        scaling = config["rope_scaling"]
        if others := sorted(set(scaling) - {"type", "rope_type", "factor", _ORIGINAL}):
            raise UsageError(f"YaRN with {others[0]} is not written as GGUF", fix="compare with another peer")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(scaling.get(_ORIGINAL) or config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype("float16") if values.ndim > 1 else values
