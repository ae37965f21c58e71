"""Olive, one pass at a time: options checked against the installed pass, failures raised.

Olive's engine logs a failed pass and exits 0, and it ignores options that a pass does not know, as do the libraries
that it calls. Passes are therefore run directly, and what they take is asked of the installed code first.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import QwenOnnxError, RecipeError, RuntimeMissing, StageError
from pipeline.facts.target import CPU

# Both libraries report home unless told otherwise before they are imported; Olive imports ONNX Runtime.
os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True)
class Nested:
    """Options that a pass hands on, unchecked, to the library that it calls.

    Attributes:
        option: the option of the pass that holds them.
        known: asks the installed library for those that it reads.
    """

    option: str
    known: Callable[[], set[str]]


@dataclass(frozen=True)
class OlivePass:
    """A pass, and which of its options a recipe may not set.

    Attributes:
        module, name: where the class is.
        ours: options that follow from other parts of a recipe, or that a package depends on; also the nested ones.
        idle: options that are accepted and do nothing here; also the nested ones.
        nested: options of the library below.
    """

    module: str
    name: str
    ours: tuple[str, ...]
    idle: tuple[str, ...] = ()
    nested: Nested | None = None


def _builder_options() -> set[str]:
    """Options that the installed genai builder reads for a Qwen decoder; it ignores all others."""
    files = ("builder.py", "builders/base.py", "builders/qwen.py")
    return _read_options("onnxruntime_genai", *(f"models/{file}" for file in files))


def _dynamic_options() -> set[str]:
    """Options that ONNX Runtime's dynamic quantizer reads; it ignores all others."""
    return _read_options("onnxruntime", "quantization/base_quantizer.py", "quantization/onnx_quantizer.py")


def _read_options(package: str, *files: str) -> set[str]:
    """Keys of ``extra_options`` in source files: neither library has a list of them."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeMissing(f"{package} is not installed", fix="pip install '.[build]'")
    text = "".join((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8") for file in files)
    use = r'extra_options(?:\.get\(|\[)\s*"(\w+)"|"(\w+)" in (?:self\.)?extra_options'
    return {first or second for first, second in re.findall(use, text)}


def _optimum_options() -> set[str]:
    """Parameters of optimum's export function; it swallows all others."""
    from optimum.exporters.onnx import main_export

    parameters = inspect.signature(main_export).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


# Weights are moved into one file afterwards, whatever a pass does.
_FILES = (
    "all_tensors_to_one_file",
    "convert_attribute",
    "external_data_name",
    "save_as_external_data",
    "size_threshold",
)

_OUR_PASS = ("schemes", "accuracy_level", "share_embedding", "form", "integer", "progress")

PASSES: dict[str, OlivePass] = {
    "genai": OlivePass(
        "olive.passes.onnx.model_builder",
        "ModelBuilder",
        ours=(
            *("precision", "metadata_only", "search", "exclude_embeds", "exclude_lm_head"),
            *("adapter_path", "config_only", "filename", "hf_remote", "hf_token", "prune_lm_head"),
        ),
        # The builder writes float32 for the CPU; what these are for comes later, or not at all.
        idle=(
            *("int4_accuracy_level", "int4_algo_config", "int4_block_size", "int4_is_symmetric"),
            *("int4_nodes_to_exclude", "int4_op_types_to_quantize", "qmoe_block_size", "shared_embeddings"),
            *("enable_cuda_graph", "enable_webgpu_graph", "use_8bits_moe", "use_cuda_bf16", "use_qdq"),
            "use_webgpu_fp32",
        ),
        nested=Nested("extra_options", _builder_options),
    ),
    "optimum": OlivePass(
        "olive.passes.onnx.optimum_conversion",
        "OptimumConversion",
        ours=(
            *("fp16", "device", "components", "user_script", "script_dir"),
            *("model_name_or_path", "output", "opset", "dtype", "task", "trust_remote_code", "framework", "monolith"),
            *("subfolder", "revision", "force_download", "local_files_only", "cache_dir", "token", "library_name"),
            *("custom_onnx_configs", "fn_get_submodels", "no_post_process"),
        ),
        nested=Nested("extra_args", _optimum_options),
    ),
    "rtn": OlivePass(
        "olive.passes.onnx.rtn_quantization",
        "OnnxBlockWiseRtnQuantization",
        ours=(
            *("bits", "block_size", "is_symmetric", "accuracy_level", "nodes_to_include", "nodes_to_exclude"),
            *_FILES,
        ),
        idle=("axis",),  # read by no one: Olive always quantizes along the last axis
    ),
    "k_quant": OlivePass(
        "olive.passes.onnx.kquant_quantization",
        "OnnxKQuantQuantization",
        ours=("bits", "block_size", "accuracy_level", "customized_weight_config", "nodes_to_exclude", *_FILES),
    ),
    "dynamic": OlivePass(
        "olive.passes.onnx.quantization",
        "OnnxDynamicQuantization",
        # Olive overwrites the last two with its own `activation_symmetric` and `weight_symmetric`.
        ours=("quant_mode", *_FILES, "ActivationSymmetric", "WeightSymmetric"),
        nested=Nested("extra_options", _dynamic_options),
    ),
    "static": OlivePass(
        "olive.passes.onnx.quantization",
        "OnnxStaticQuantization",
        ours=(
            *("quant_mode", "precision", "activation_type", "per_channel", "quant_preprocess", "prepare_qdq_config"),
            *("quant_format", "data_config", "calibration_providers", "op_types_to_quantize", "nodes_to_quantize"),
            *("extra_options", "nodes_to_exclude", "tensor_quant_overrides", *_FILES),
        ),
    ),
    "openvino": OlivePass(
        "olive.passes.openvino.optimum_intel",
        "OpenVINOOptimumConversion",
        ours=("components", "device", "extra_args", "ov_quant_config", "script_dir", "user_script"),
    ),
    "nncf": OlivePass(
        "olive.passes.openvino.compression",
        "OpenVINOWeightCompression",
        ours=(
            *("data_config", "extra_args", "ignored_scope", "ignored_scope_type", "reuse_cache", "script_dir"),
            *("target_device", "transform_fn", "user_script"),
        ),
        # NNCF is in an environment of its own; of what it takes, this alone is no part of the scheme and needs no data.
        nested=Nested("compress_config", lambda: {"ratio"}),
    ),
    "min_error": OlivePass(
        "pipeline.quantization.blockwise_passes",
        "BlockWiseMinErrorQuantization",
        ours=_OUR_PASS,
    ),
    "w8a8": OlivePass("pipeline.quantization.blockwise_passes", "BlockWiseMinErrorQuantization", ours=_OUR_PASS),
    "gptq": OlivePass(
        "pipeline.quantization.blockwise_passes",
        "BlockWiseGptqQuantization",
        ours=(*_OUR_PASS, "checkpoint", "calibration_windows", "rotate"),
    ),
}

# Options that every run of a pass has; a recipe's come on top.
_FIXED: dict[str, dict[str, Any]] = {
    "genai": {"precision": "fp32"},
    "min_error": {"schemes": {}},
    "w8a8": {"schemes": {}},
    "gptq": {"schemes": {}, "checkpoint": ""},
}


def pass_class(name: str) -> Any:
    """The class of the installed pass.

    Raises:
        RuntimeMissing: Olive is not installed.
    """
    wanted = PASSES[name]
    try:
        return getattr(importlib.import_module(wanted.module), wanted.name)
    except ImportError as error:
        raise RuntimeMissing("Olive cannot be loaded", why=str(error), fix="pip install '.[build]'") from None


def known_options(name: str) -> list[str]:
    """Options of the installed pass that a recipe may set."""
    kind, wanted = pass_class(name), PASSES[name]
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    return sorted(set(kind._default_config(DEFAULT_CPU_ACCELERATOR)).difference(wanted.ours, wanted.idle))


def check_options(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that the installed pass, or the library below it, would ignore or reject.

    Raises:
        RecipeError: with all of them, and the nearest right names.
    """
    if not options:
        return
    known = known_options(name)
    problems = _unknown(name, options, known)
    nested = PASSES[name].nested
    below: list[str] = []
    if nested and isinstance(options.get(nested.option), Mapping):
        below = sorted(nested.known().difference(PASSES[name].ours, PASSES[name].idle))
        problems += _unknown(name, options[nested.option], below, f"{nested.option}.")
    problems = problems or _ill_typed(name, options)
    if problems:
        rows = "\n".join(f"  {problem}" for problem in problems)
        takes = f"known: {', '.join(known)}" if known else "remove them: a recipe sets none of its options"
        if nested and below:
            takes += f"; in {nested.option}: {', '.join(below)}"
        raise RecipeError(f"Olive's {PASSES[name].name} does not take these options\n{rows}", where=where, fix=takes)


def _unknown(name: str, options: Mapping[str, Any], known: list[str], prefix: str = "") -> list[str]:
    problems = []
    for option in options:
        if option in known:
            continue
        if option in PASSES[name].ours:
            problems.append(f"`{prefix}{option}` follows from other keys of the recipe")
        elif option in PASSES[name].idle:
            problems.append(f"`{prefix}{option}` has no effect here")
        else:
            near = difflib.get_close_matches(option, known, 1, 0.5)
            hint = f"; did you mean `{prefix}{near[0]}`?" if near else ""
            problems.append(f"unknown option `{prefix}{option}`{hint}")
    return problems


def _ill_typed(name: str, options: Mapping[str, Any]) -> list[str]:
    kind = pass_class(name)
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    try:
        kind.generate_config(DEFAULT_CPU_ACCELERATOR, {**_FIXED.get(name, {}), **options}, disable_search=True)
    except Exception as error:  # pydantic's, of whichever version Olive uses
        return [" ".join(str(error).split())]
    return []


def run_pass(name: str, config: Mapping[str, Any], model: Any, out_dir: Path, provider: str = CPU) -> Any:
    """Run one pass on an Olive model handler, and return the handler of what it wrote below ``out_dir``.

    Args:
        provider: the execution provider that the result is for.

    Raises:
        StageError: it failed, or yielded no model.
    """
    kind = pass_class(name)
    from olive.passes.olive_pass import create_pass_from_dict

    config = {**_FIXED.get(name, {}), **config}
    try:
        made = create_pass_from_dict(kind, config, disable_search=True, accelerator_spec=_accelerator(provider)).run(
            model, str(out_dir)
        )
    except (QwenOnnxError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, such as a full disk; not a library's message
            raise
        raise StageError(
            f"Olive's {kind.__name__} failed", where=_shown(config), why=f"{type(error).__name__}: {error}"
        ) from error
    if made is None:
        raise StageError(f"Olive's {kind.__name__} yielded no model", where=_shown(config))
    return made


def _accelerator(provider: str) -> Any:
    from olive.hardware.accelerator import AcceleratorSpec, Device

    device = Device.CPU if provider == CPU else Device.NPU if provider == "QNNExecutionProvider" else Device.GPU
    return AcceleratorSpec(device, provider)


def _shown(config: Mapping[str, Any]) -> str:
    """The settings of a pass, without the long ones."""
    return ", ".join(
        f"{key}={value!r}" for key, value in config.items() if len(repr(value)) < 80 and not callable(value)
    )


def hf_model(checkpoint: Path) -> Any:
    """Olive's handler of a checkpoint directory."""
    from olive.model import HfModelHandler

    return HfModelHandler(str(checkpoint))


def onnx_model(folder: Path, attributes: dict[str, Any] | None = None, name: str = "model.onnx") -> Any:
    """Olive's handler of a graph in ``folder``."""
    from olive.model import ONNXModelHandler

    return ONNXModelHandler(str(folder), onnx_file_name=name, model_attributes=attributes)


def feeds(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A data configuration that hands ``samples`` (arrays by input name) to a pass that calibrates."""
    from olive.data.registry import Registry

    class Samples:
        """Olive takes pairs of input and label."""

        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int) -> tuple[Mapping[str, Any], int]:
            return samples[index], 0

    def make(**_: Any) -> Samples:
        return Samples()

    Registry.register_dataset("qwen_onnx_calibration")(make)
    return {
        "name": "calibration",
        "type": "DataContainer",
        "load_dataset_config": {"type": "qwen_onnx_calibration"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }


def require(folder: Path, name: str, *files: str) -> None:
    """Check that a pass wrote ``files``.

    Raises:
        StageError: it did not.
    """
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise StageError(f"Olive's {PASSES[name].name} ended without {', '.join(missing)}", where=str(folder))
