"""Quantize the weights of an exported graph, and carry everything else along."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import olive
from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.checkpoint import files as checkpoint_files, tensors
from pipeline.errors import StageError
from pipeline.facts import multimodal
from pipeline.facts.scheme import Scheme
from pipeline.npu import openvino, static_quantizer
from pipeline.package.retrieval_config import CONFIG
from pipeline.quantization import calibration, media_quantizer, quantizer
from pipeline.task import GENERATE, TASKS


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write the quantized ``model.onnx`` and ``model.onnx.data``, and copy the other files of the export.

    Raises:
        StageError: a pass failed, yielded nothing, or changed what it must not.
        RecipeError: a pass does not take an option, or a pattern matches no weight.
    """
    fields = {key: step.fields[key] for key in Scheme.model_fields if key in step.fields}
    scheme = Scheme.model_validate(fields, strict=False)
    if scheme.algorithm in olive.PASSES:
        olive.check_options(scheme.algorithm, scheme.options, "quantize.options")
    source = inputs["export"].path
    task = TASKS[step.fields.get("task", GENERATE)]
    form, rotate = step.fields["form"], step.fields["rotate"]
    checkpoint = inputs["checkpoint"].path
    family = checkpoint_files.family_of(checkpoint)
    if scheme.embedding == "shared":
        weights = tensors.Tensors(checkpoint)
        names = multimodal.in_files(family, list(weights))
        tensors.check_one_matrix(weights, f"{names.text}.embed_tokens.weight", f"{names.head}.weight")
    if scheme.algorithm == "static":
        windows = calibration.windows(checkpoint, scheme.calibration_windows)
        facts = static_quantizer.quantize(source, out_dir, scheme, windows, progress)
    elif scheme.algorithm == "nncf":
        progress(0.1, "Olive with NNCF, in its own environment")
        facts = openvino.compress(source, out_dir, scheme)
    elif family.multimodal:
        facts = media_quantizer.quantize(source, checkpoint, out_dir, scheme, progress)
    else:
        facts = quantizer.quantize(source, checkpoint, out_dir, scheme, progress, form, rotate, task.roles)
    for path in sorted(source.iterdir()):
        if path.suffix not in (".onnx", ".data") and not (out_dir / path.name).exists():
            shutil.copyfile(path, out_dir / path.name)
    config = "genai_config.json" if task.generates else CONFIG
    if not (out_dir / config).is_file():
        raise StageError(f"{config} is missing after quantization")
    return Result({"algorithm": scheme.algorithm, **facts})
