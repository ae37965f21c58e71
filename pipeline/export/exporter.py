"""From a checkpoint to a float32 ONNX graph with its ``genai_config.json``, by one of two exporters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import olive
from pipeline.checkpoint.files import family_of
from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import RecipeError, StageError
from pipeline.export import audio_export, decoder_graph, vision_export
from pipeline.export.decoder_graph import Embedded
from pipeline.facts import multimodal
from pipeline.facts.family import FAMILIES, read_shape
from pipeline.facts.target import CPU, TARGETS
from pipeline.facts.vision import read_vision
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.npu import openvino
from pipeline.runtime import audio_tower

if TYPE_CHECKING:
    import onnx

_PRECISIONS = {"float32": "fp32", "float16": "fp16"}


def check_family(checkpoint: Path, exporter: str) -> None:
    """Refuse what an exporter cannot write, which `pipeline.builds.plan` does for models whose sizes it knows.

    Raises:
        RecipeError: it is such a model.
    """
    family = family_of(checkpoint)
    if exporter not in family.exporters:
        raise RecipeError(
            f"{exporter} cannot export {family.model_type}",
            where="export.exporter",
            fix=f"use {' or '.join(family.exporters)}",
        )


def export_genai(checkpoint: Path, out_dir: Path, options: Mapping[str, Any], provider: str, dtype: str) -> None:
    """Write ``model.onnx``, ``model.onnx.data`` and ``genai_config.json`` with Olive's ModelBuilder.

    Its rotary tables are those of plain frequencies: `pipeline.export.rotary` puts scaled ones in their place.

    Raises:
        StageError: it failed, or left something out.
    """
    # The builder would run code that comes with a checkpoint (`hf_remote`), and does so by default.
    extra = {**options.get("extra_options", {}), "hf_remote": False}
    config = {"precision": _PRECISIONS[dtype], **options, "extra_options": extra}
    plain = _plain(checkpoint, out_dir.with_name(f"{out_dir.name}.plain"))
    olive.run_pass("genai", config, olive.hf_model(plain), out_dir, provider)
    olive.require(out_dir, "genai", "model.onnx", "genai_config.json")
    if plain != checkpoint:
        shutil.rmtree(plain)


def _plain(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with plain rotary frequencies over its whole context: itself, or made in ``folder`` of links.

    The builder takes max_position_embeddings for the context. It scales frequencies for YaRN only where the
    configuration has beta_fast, which Qwen's has not, and then not as transformers does: it does not round the ramp's
    ends, and knows no attention_factor.
    """
    settings, _ = _settings(checkpoint)
    context = read_shape(settings, str(checkpoint / "config.json")).context
    if settings.get("rope_scaling") is None and settings.get("max_position_embeddings", context) == context:
        return checkpoint
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    changed = {**settings, "rope_scaling": None, "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")
    return folder


def export_plain_int4(checkpoint: Path, out_dir: Path) -> None:
    """Write what Olive's ModelBuilder makes of a checkpoint at its INT4 defaults, to compare with.

    Raises:
        StageError: it failed, or left something out.
    """
    export_genai(checkpoint, out_dir, {"precision": "int4"}, CPU, "float32")


def export_optimum(
    checkpoint: Path,
    out_dir: Path,
    options: Mapping[str, Any],
    provider: str,  # noqa: ARG001 - it writes one graph for all
    dtype: str,  # noqa: ARG001 - float32, `pipeline.facts.target` refuses others
) -> None:
    """Write ``model.onnx`` with its data (float32) with Olive's OptimumConversion, and a ``genai_config.json``.

    Raises:
        StageError: it failed, or left something out.
        CheckpointError: config.json is not of a supported family.
    """
    extra = {
        "do_validation": False,
        **options.get("extra_args", {}),
        "task": "text-generation-with-past",
        # It would put a Transpose of the embedding where a tied head was, and hide the head from quantization.
        "no_post_process": True,
    }
    config = {"target_opset": 18, **options, "extra_args": extra}
    olive.run_pass("optimum", config, olive.hf_model(checkpoint), out_dir)
    olive.require(out_dir, "optimum", "model.onnx")
    inputs, _ = graph.interface(graph.load(out_dir / "model.onnx"))
    _write_config(out_dir, _genai_config(*_settings(checkpoint), inputs))


def export_openvino(checkpoint: Path, out_dir: Path) -> None:
    """Write ``model.xml`` and ``model.bin`` (float32) with Olive, ``model.onnx`` and ``genai_config.json`` around them.

    Raises:
        RuntimeMissing: there is no environment for OpenVINO.
        StageError: Olive's pass failed, or left something out.
        CheckpointError: config.json is not of a supported family.
    """
    openvino.convert(checkpoint, out_dir)
    config = _genai_config(*_settings(checkpoint), openvino.INPUTS)
    openvino.wrap(out_dir, config["model"]["vocab_size"])
    config["model"]["decoder"] |= openvino.DECODER
    _write_config(out_dir, config)


# Settings of execution providers in ``genai_config.json``, as the genai builder writes them where nothing else is asked
# for: on CUDA the sum of a skip connection is kept in float32.
_PROVIDERS: dict[str, dict[str, str]] = {
    "cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"},
    "dml": {},
    "webgpu": {"enableGraphCapture": "0", "validationMode": "basic"},
    "NvTensorRtRtx": {"enable_cuda_graph": "1"},
}


def export_native(
    checkpoint: Path, out_dir: Path, dtype: str, fused_experts: bool = True, provider: str = CPU
) -> onnx.ModelProto:
    """Write ``model.onnx.data`` and ``genai_config.json`` of a graph of our own, a weight in memory at a time.

    Of a model that sees also what `pipeline.export.vision_export` writes.

    Args:
        fused_experts: whether a mixture of experts, if there is one, is one operator.
        provider: the execution provider that the package asks for.

    Returns:
        the decoder's graph, which is not saved yet.

    Raises:
        StageError: the model has something that the graph does not.
        CheckpointError: the weights cannot be read.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True).get_text_config(decoder=True)
    tensors = Tensors(checkpoint)
    settings, generation = _settings(checkpoint)
    family = family_of(checkpoint)
    layout = multimodal.in_files(family, list(tensors))
    vision = read_vision(settings, read_shape(settings, "config.json"), "config.json") if family.sees else None
    tower = audio_tower.read(settings, "config.json") if family.hears else None
    if family.multimodal and dtype != "float32":
        raise StageError("models that see or hear are exported in float32", why=f"{dtype} was asked for")
    embedded = vision_export.embedded(config, vision) if vision else Embedded() if tower else None
    kind = np.dtype(dtype).type
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        try:
            model = decoder_graph.write(
                config, tensors, writer, kind, layout.text, layout.head, embedded, fused_experts=fused_experts
            )
        except ValueError as error:
            raise StageError("no graph can be written of this checkpoint", why=str(error)) from None
    inputs, _ = graph.interface(model)
    made = _genai_config(settings, generation, inputs)
    if option := next(target.option for target in TARGETS.values() if target.provider == provider):
        made["model"]["decoder"]["session_options"]["provider_options"] = [{option: _PROVIDERS[option]}]
    made["search"]["past_present_share_buffer"] = True  # attention writes new keys and values into the cache
    if vision:
        vision_export.write(checkpoint, out_dir, settings, vision, tensors, layout)
        vision_export.configure(made["model"], checkpoint, settings, vision)
    if tower:
        audio_export.write(out_dir, tower, config.hidden_size, tensors, layout)
        audio_export.configure(made["model"])
    _write_config(out_dir, made)
    return model


def _settings(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of ``config.json`` and of ``generation_config.json``, if there is one."""
    path = checkpoint / "generation_config.json"
    generation = json.loads(path.read_bytes()) if path.is_file() else {}
    return json.loads((checkpoint / "config.json").read_bytes()), generation


def _write_config(out_dir: Path, config: Mapping[str, Any]) -> None:
    (out_dir / "genai_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


Exporter = Callable[[Path, Path, Mapping[str, Any], str, str], None]
"""Called with the checkpoint, the folder to write, options of the pass, the provider and the activations' dtype."""
EXPORTERS: dict[str, Exporter] = {"genai": export_genai, "optimum": export_optimum}


def _genai_config(
    settings: Mapping[str, Any], generation: Mapping[str, Any], inputs: tuple[str, ...]
) -> dict[str, Any]:
    """A ``genai_config.json`` for a decoder with separate past and present caches, as optimum writes it."""
    shape = read_shape(settings, "config.json")
    text = settings.get("text_config", {})
    tokens = {key: settings.get(key, text.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens |= {key: generation[key] for key in tokens if generation.get(key) is not None}
    eos = tokens["eos_token_id"]
    bos = tokens["bos_token_id"] if tokens["bos_token_id"] is not None else (eos[-1] if isinstance(eos, list) else eos)
    pad = tokens["pad_token_id"] if tokens["pad_token_id"] is not None else (eos[0] if isinstance(eos, list) else eos)
    known = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    named = {name: name for name in known if name in inputs}
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    return {
        "model": {
            "bos_token_id": bos,
            "context_length": shape.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "inputs": {**named, **past},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
            },
            "eos_token_id": eos,
            "pad_token_id": pad,
            "type": FAMILIES[shape.model_type].runtime,
            "vocab_size": shape.vocabulary,
        },
        # Past and present are different tensors in this graph, so the runtime must not make them one buffer.
        "search": {"do_sample": False, "max_length": shape.context, "past_present_share_buffer": False},
    }
