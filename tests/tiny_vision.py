"""Tiny checkpoints of the three Qwen-VL classes, with everything that published ones have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import END, END_OF_TEXT, VOCABULARY, fill, make_tokenizer, point

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

# As Qwen's: a message is a text, or a list of pictures and texts.
TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
{{- '# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content or [] %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_SPARSE: dict[str, Any] = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
_SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        _SPARSE,
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        _SPARSE,
        {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
        | {"window_size": 56, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"head_dim": 32}
        | {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}},
        {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16}
        | {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
}


def tiny_vision_checkpoint(folder: Path, model_type: str, tied: bool = False, nested: bool = False) -> Path:
    """Write a checkpoint into ``folder`` and return it.

    Args:
        nested: name Qwen2-VL's and Qwen2.5-VL's weights as Qwen3-VL's; else as published, with a flat config.json.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, more=VISION_TOKENS, template=TEMPLATE)
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
    end, end_of_text = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    name, text, vision = _SIZES[model_type]
    tokens = {"eos_token_id": end, "bos_token_id": end_of_text}
    tying = {"tie_word_embeddings": tied}
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, **text, **tokens, **tying},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **tying,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        fill(model)
        if not tied:
            point(model, len(tokenizer))
        else:
            model.model.language_model.norm.weight.data.mul_(torch.randint(0, 2, (64,)) * 2 - 1)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[end, end_of_text], pad_token_id=end_of_text, bos_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(folder)
    if model_type != "qwen3_vl":
        _lay_out(folder, nested)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    processor = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    processor |= {"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    if model_type == "qwen3_vl":
        processor |= {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        processor |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _lay_out(folder: Path, nested: bool) -> None:
    """Name the weights, and lay out config.json, in one of the two published ways."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    if nested:
        found = {_nested(name): value for name, value in found.items()}
        save_file(found, path, metadata={"format": "pt"})
        return
    assert {name.split(".")[0] for name in found} <= {"model", "visual", "lm_head"}
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    (folder / "config.json").write_text(json.dumps({**text, **config}, indent=2))


def _nested(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
