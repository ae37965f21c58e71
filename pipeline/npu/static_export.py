"""From a checkpoint to the float32 stages of a static decoder pipeline, which onnxruntime-genai runs as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.npu import static_decoder
from pipeline.npu.static_decoder import Sizes

# The stages in the order in which they run; None: in prefill and in decode.
STAGES = {"front": None, "prefill": "prompt", "decode": "token", "update": None, "head": None}
NPU_STAGES = ("prefill", "decode", "head")


def export(loaded: Reference, out_dir: Path, window: int, cache: int) -> dict[str, Any]:
    """Write ``front``, ``prefill``, ``decode``, ``update`` and ``head.onnx`` with their data.

    Args:
        loaded: the checkpoint; its weights are those that are written.
        window: tokens of a prefill call.
        cache: slots of the cache, and so the context length.

    Returns:
        the ``genai_config.json`` that runs them.

    Raises:
        StageError: the model has something that these graphs do not.
    """
    import onnx

    try:
        sizes = static_decoder.sizes_of(loaded.model, window, cache)
    except ValueError as error:
        raise StageError("no static graphs can be written of this checkpoint", why=str(error)) from None
    if loaded.tokenizer.convert_ids_to_tokens(sizes.pad) is not None:
        raise StageError(
            "no static graphs can be written of this checkpoint",
            why=f"the vocabulary's last id, {sizes.pad}, is a token; windows are filled up with one that no text has",
            fix="add a row to the embedding and the head",
        )
    weights = {name: values.numpy() for name, values in loaded.model.state_dict().items()}
    with ExternalDataWriter(out_dir / "front.data") as writer:
        front = static_decoder.front(sizes, weights["model.embed_tokens.weight"], writer)
    with ExternalDataWriter(out_dir / "layers.data") as writer:
        prefill = static_decoder.layers(sizes, weights, writer)
    with ExternalDataWriter(out_dir / "head.data") as writer:
        head = static_decoder.head(sizes, weights["model.norm.weight"], weights["lm_head.weight"], writer)
    models = {
        "front": front,
        "prefill": prefill,
        "decode": static_decoder.with_tokens(prefill, 1),
        "update": static_decoder.update(sizes),
        "head": head,
    }
    for name, model in models.items():
        onnx.save(model, str(out_dir / f"{name}.onnx"))
    return genai_config(sizes, loaded, models)


def genai_config(sizes: Sizes, loaded: Reference, models: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a decoder pipeline of these graphs."""
    config = loaded.model.generation_config
    names = {kind: f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    return {
        "model": {
            "type": "decoder-pipeline",
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else loaded.eos[-1],
            "eos_token_id": list(loaded.eos),
            "pad_token_id": sizes.pad,
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.cache,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": sizes.head_dim,
                "hidden_size": sizes.hidden,
                "num_attention_heads": sizes.heads,
                "num_hidden_layers": sizes.layers,
                "num_key_value_heads": sizes.kv_heads,
                "sliding_window": {
                    "window_size": sizes.window,
                    "pad_value": 0,
                    "alignment": "left",
                    "slide_key_value_cache": False,
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "past_sequence_length": "past_seq_len",
                    "total_sequence_length": "total_seq_len",
                    "past_key_names": names["key"],
                    "past_value_names": names["value"],
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": names["key"].replace("past_key_values", "present"),
                    "present_value_names": names["value"].replace("past_key_values", "present"),
                },
                "pipeline": [{name: _stage(name, models[name]) for name in STAGES}],
            },
        },
        "search": {
            "max_length": sizes.cache,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _stage(name: str, model: Any) -> dict[str, Any]:
    inputs, outputs = graph.interface(model)
    phase = {"prompt": {"run_on_token_gen": False}, "token": {"run_on_prompt": False}, None: {}}[STAGES[name]]
    last = {"is_lm_head": True} if name == "head" else {}
    return {"filename": f"{name}.onnx", "inputs": list(inputs), "outputs": list(outputs), **phase, **last}
