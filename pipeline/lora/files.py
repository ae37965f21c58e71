"""The directory of a LoRA adapter as peft saves it, held against what can be kept apart from the weights.

Nothing is loaded: `adapter_config.json` and the header of the safetensors say enough to refuse at planning time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.checkpoint import files as checkpoint_files
from pipeline.errors import CheckpointError

# Settings of peft (0.21) that say how an adapter was trained, or whose effect its tensors and their names show. All
# others must be off: what they add is no product of two matrices beside a projection.
_TOLD = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# Starting points that leave the base model as it is. Others (PiSSA, OLoRA, CorDA, LoftQ…) take a part out of it first.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_REASONS = {
    "use_dora": "DoRA rescales the whole weight",
    "bias": "biases were trained too",
    "lora_bias": "the products have biases",
    "modules_to_save": "whole modules were trained",
    "fan_in_fan_out": "its weights are transposed",
    "layer_replication": "it is of a model with repeated layers",
    "alora_invocation_tokens": "it begins in the middle of a prompt",
    "trainable_token_indices": "rows of the embedding were trained",
}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj")


def identity(folder: Path) -> str:
    """sha256 (hex) of the adapter: of its two files, so that notes and optimizer states beside them do not count."""
    return digest.of_tree(folder, {name: digest.of_file(folder / name) for name in checkpoint_files.ADAPTER_FILES})


def check(folder: Path) -> None:
    """Refuse an adapter that is not a pair of matrices beside each of some projections of the decoder.

    Raises:
        CheckpointError: naming every setting and tensor that stands in the way; or it is damaged, unsafe, no LoRA.
    """
    tensors = checkpoint_files.check_adapter(folder)
    settings = checkpoint_files.adapter_settings(folder)
    if problems := [*_setting_problems(settings), *_tensor_problems(tensors)]:
        raise CheckpointError(
            "the adapter cannot be kept apart from the weights",
            where=str(folder),
            why="; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else ""),
            fix="merge it instead (`checkpoint.adapter`), or train one on attention and MLP projections alone",
        )


def trained_on(folder: Path) -> str:
    """What the adapter itself calls its base model; the last part of a path, whose rest is nobody's business."""
    named = str(checkpoint_files.adapter_settings(folder).get("base_model_name_or_path") or "")
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else re.split(r"[/\\]", named.rstrip("/\\"))[-1]


def _setting_problems(settings: dict[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if name == "init_lora_weights":
            if value not in _STARTS:
                yield f"init_lora_weights is {value!r}, which changes the base model"
        elif name not in _TOLD and value and not (name == "bias" and value == "none"):
            yield f"{name} is set: {_REASONS.get(name, 'it does more than two matrices beside a weight can')}"


def _tensor_problems(tensors: checkpoint_files.Tensors) -> Iterator[str]:
    found: dict[str, set[str]] = {}
    for name, (_, dims) in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if not match:
            yield f"tensor {name} is no lora_A or lora_B"
        elif len(dims) != 2:
            yield f"tensor {name} has {len(dims)} dimensions, not 2"
        else:
            found.setdefault(match[1], set()).add(match[2])
    if not tensors:
        yield "it has no tensors"
    for module, parts in found.items():
        if not _PROJECTION.fullmatch(module):
            yield f"{module} has no place for one: those are q, k, v, o, gate, up and down_proj of the layers"
        elif parts != {"A", "B"}:
            yield f"{module} has one matrix of two"
