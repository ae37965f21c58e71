"""Write a checkpoint as a float ONNX graph that onnxruntime-genai can run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import olive
from pipeline.artifact import Artifact, Progress, Result, Step
from pipeline.checkpoint import files as checkpoint_files, reference
from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.export import decoder_graph, exporter, retrieval_export, rotary
from pipeline.facts.recipe import Export
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.npu import static_decoder, static_export
from pipeline.quantization import graph_weights, rotation
from pipeline.runtime import audio_tower
from pipeline.task import GENERATE, TASKS

# Files of the checkpoint that travel with the graph; the exporters' own copies of them are replaced.
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    audio_tower.PREPROCESSOR,
)


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write ``model.onnx``, ``model.onnx.data``, ``genai_config.json`` and the tokenizer files.

    Graphs that generate nothing come with a ``retrieval.json`` instead.

    Raises:
        StageError: the exporter failed, or wrote something else.
        RecipeError: it does not take an option, or cannot export models of this family.
    """
    import onnx

    spec = Export.model_validate({key: step.fields[key] for key in Export.model_fields if key in step.fields})
    source = inputs["checkpoint"].path
    written: str = step.fields["exporter"]
    exporter.check_family(source, written)
    task = TASKS[step.fields.get("task", GENERATE)]
    if written == "static":
        return _static(step, source, out_dir, spec.rotate, progress)
    olive.check_options(written, spec.options, "export.options")
    if written == "openvino":
        return _openvino(source, out_dir, spec.rotate, progress)
    if written == "native":
        return _native(step, source, out_dir, spec, progress)
    work = out_dir / "export"
    work.mkdir()
    given = _rotated(source, out_dir / "rotated", progress) if spec.rotate else source
    progress(0.3, f"Olive with {written}")
    exporter.EXPORTERS[written](given, work, spec.options, step.fields["provider"], step.fields["dtype"])
    progress(0.8, "packing weights")
    model = graph.load(work / "model.onnx")
    if not task.generates:
        config = retrieval_export.write_config(task, source, out_dir)
        retrieval_export.pool(model, work, task.output, list(config["labels"].values()))
    inputs_before = graph.interface(model)
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        if spec.last_token_head and task.generates:
            graph.prune_head(model, 1 + (spec.draft_tokens or 0))
        scaled = rotary.scale_tables(model, source / "config.json")
        # GPUs' runtimes do not all fold constants, and there the tables are half as large.
        computed = step.fields["dtype"] == "float32" and rotary.compute_tables(model, work, source / "config.json")
        graph_weights.repack(model, work, writer)
    onnx.save(model, str(out_dir / "model.onnx"))
    if task.generates:
        shutil.copyfile(work / "genai_config.json", out_dir / "genai_config.json")
    shutil.rmtree(work)
    shutil.rmtree(out_dir / "rotated", ignore_errors=True)
    _copy_sidecars(source, out_dir)
    return Result(
        {
            "exporter": written,
            "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
            "inputs": len(inputs_before[0]),
            "operators": graph.operators(model),
            "scaled_rotary_tables": scaled,
            "computed_rotary_tables": computed,
        }
    )


def _native(step: Step, source: Path, out_dir: Path, spec: Export, progress: Progress) -> Result:
    """A graph of our own, written a weight at a time."""
    import onnx

    family = checkpoint_files.family_of(source)
    if family.multimodal and spec.rotate:
        raise StageError("a model that sees or hears cannot be rotated", where="export.rotate", fix="remove `rotate`")
    given = _rotated(source, out_dir / "rotated", progress) if spec.rotate else source
    progress(0.3, "writing weights")
    model = exporter.export_native(
        given, out_dir, step.fields["dtype"], spec.experts != "dense", step.fields["provider"]
    )
    if spec.last_token_head:
        # Drafts come from a text's own words, and the runtime verifies none against a picture.
        graph.prune_head(model, 1 if family.sees else 1 + (spec.draft_tokens or 0))
    onnx.save(model, str(out_dir / "model.onnx"))
    shutil.rmtree(out_dir / "rotated", ignore_errors=True)
    _copy_sidecars(source, out_dir)
    facts = {"exporter": "native", "opset": decoder_graph.OPSET, "operators": graph.operators(model)}
    return Result(facts | ({"experts": spec.experts} if spec.experts else {}))


def _copy_sidecars(source: Path, out_dir: Path) -> None:
    for name in SIDECARS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out_dir / name)


def _static(step: Step, source: Path, out_dir: Path, rotate: bool, progress: Progress) -> Result:
    """The stages of a static decoder, in place of one graph."""
    progress(0.05, "loading the checkpoint")
    loaded = reference.load(source)
    if rotate:
        _rotate(loaded, progress)
    progress(0.4, "writing the stages")
    config = static_export.export(loaded, out_dir, step.fields["window"], step.fields["cache"])
    (out_dir / "genai_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    _copy_sidecars(source, out_dir)
    operators = graph.operators(graph.load(out_dir / "prefill.onnx"))
    return Result({"exporter": "static", "opset": static_decoder.OPSET, "operators": operators})


def _openvino(source: Path, out_dir: Path, rotate: bool, progress: Progress) -> Result:
    """OpenVINO's own graph, and one node around it."""
    given = _rotated(source, out_dir / "rotated", progress) if rotate else source
    progress(0.3, "Olive with openvino, in its own environment")
    exporter.export_openvino(given, out_dir)
    shutil.rmtree(out_dir / "rotated", ignore_errors=True)
    _copy_sidecars(source, out_dir)
    return Result({"exporter": "openvino"})


def _rotate(loaded: Reference, progress: Progress) -> None:
    progress(0.1, "rotating the residual stream")
    try:
        rotation.rotate(loaded.model)
    except ValueError as error:
        raise StageError("the checkpoint cannot be rotated", where="export.rotate", why=str(error)) from None


def _rotated(checkpoint: Path, folder: Path, progress: Progress) -> Path:
    """The checkpoint in another basis, in ``folder``."""
    loaded = reference.load(checkpoint)
    _rotate(loaded, progress)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
