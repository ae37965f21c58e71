"""Hold what ships, run by the runtime that ships it, against the PyTorch reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifact import GOLDEN, VALIDATION, Artifact, Progress, Result, Step, candidate, graph_files
from pipeline.checkpoint import files as checkpoint_files, reference
from pipeline.checkpoint.reference import Reference
from pipeline.errors import GateError, StageError
from pipeline.facts import positions, texts
from pipeline.facts.recipe import Gates, Validate
from pipeline.fidelity import (
    audio_agreement,
    expert_agreement,
    long_context,
    media_agreement,
    parity,
    retrieval_agreement,
    text_agreement,
    vision_agreement,
)
from pipeline.fidelity.agreement import gate
from pipeline.fidelity.text_agreement import Window
from pipeline.runtime import chat, session as sessions
from pipeline.runtime.session import Session
from pipeline.runtime.thinking import VARIABLE
from pipeline.task import GENERATE, TASKS

# How answers about pictures and on sounds are measured, by their section of the report.
_MEDIA = {"images": vision_agreement, "audio": audio_agreement}


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write ``validation.json`` and ``golden.jsonl``; the result is refused when a gate is not met.

    Raises:
        StageError: the evaluation text is too short, or is not the pinned one; or the long text does not reach beyond
            the window that the checkpoint was trained for, or leaves the context.
        PackageError: the runtime cannot load the model.
    """
    spec = Validate.model_validate(
        {key: step.fields[key] for key in Validate.model_fields if key in step.fields}, strict=False
    )
    task = TASKS[step.fields.get("task", GENERATE)]
    progress(0.0, "loading the reference")
    torch_model = reference.load(inputs["checkpoint"].path)
    windows = text_agreement.cut(torch_model.tokenizer, spec.windows, spec.window_tokens)
    report = _header(step, inputs, len(windows), spec.window_tokens)
    if task.generates:
        report |= _generation(step, inputs, torch_model, spec, windows, out_dir, progress)
        report["gates"] = gates(report, spec.gates)
    else:
        ids = [window.ids for window in windows]
        found, golden = retrieval_agreement.measure(torch_model, inputs["quantize"].path, task, ids, progress)
        _write_golden(golden, out_dir)
        report |= {"task": task.name, **found}
        bounds = spec.gates.model_dump(include={*task.required, *task.optional})
        report["gates"] = retrieval_agreement.gates(report, bounds)
    report["passed"] = all(gate["passed"] for gate in report["gates"])
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (out_dir / VALIDATION).write_text(text + "\n", encoding="utf-8")
    facts = {"passed": report["passed"], **{path: report.get(path) for path in ("prefill", "decode")}}
    return Result(facts, None if report["passed"] else _refusal(report, inputs["quantize"].facts).as_dict())


def _header(step: Step, inputs: Mapping[str, Artifact], windows: int, tokens: int) -> dict[str, Any]:
    """What is compared with what, where, and on which text."""
    execution = step.fields["execution"]
    return {
        "schema_version": 1,
        "reference": {
            "checkpoint": inputs["checkpoint"].digest,
            "dtype": "float32",
            "runtime": f"torch {step.tools['torch']}",
        },
        "candidate": {
            "files": graph_files(candidate(inputs)),
            "runtime": ", ".join(f"{name} {step.tools[name]}" for name in step.tools if name.startswith("onnxruntime")),
            "target": step.fields["target"],
            "provider": step.fields["provider"],
            "executed_on": execution["provider"],
            "device": execution["device"],
            "not_executed_on_target": execution["missing"],
        },
        "text": {"sha256": step.fields["text"], "windows": windows, "window_tokens": tokens},
    }


def _generation(
    step: Step,
    inputs: Mapping[str, Artifact],
    torch_model: Reference,
    spec: Validate,
    windows: Sequence[Window],
    out_dir: Path,
    progress: Progress,
) -> dict[str, Any]:
    """What is measured of a package that generates text."""
    package = candidate(inputs).path
    session = sessions.open_package(package, provider="cpu" if step.fields["execution"]["missing"] else "")
    extended = _extended(inputs["checkpoint"].path, session, spec)
    report: dict[str, Any] = {"extended": extended} if extended else {}
    scratch = out_dir.parent / "twin"
    own = sorted(inputs["adapters"].facts["adapters"]) if "adapters" in inputs else []
    thinking = chat.load(package).takes(VARIABLE)
    conversations = texts.conversations(thinking)
    golden: list[dict[str, Any]] = []
    try:
        if "compile" in inputs:
            report |= text_agreement.compiled_agreement(
                torch_model, inputs, step.fields["soc"], spec, windows, scratch, progress
            )
        else:
            twin = text_agreement.twin(session, scratch)
            whole = text_agreement.whole_prompts(twin)
            part = 0.75 / (1 + len(own))
            with expert_agreement.Recorder(torch_model) as seen:
                report |= text_agreement.agreement(
                    torch_model, session, whole, windows, lambda done, what: progress(0.05 + part * done, what)
                )
            if seen.mixtures:
                progress(0.78, "experts, one by one")
                rows = [window.ids for window in windows]
                report["experts"] = expert_agreement.measure(seen, package, rows, out_dir.parent / "experts")
        if spec.long_tokens:
            report["long"] = long_context.measure(
                torch_model, session, spec.long_tokens, lambda part, what: progress(0.8 + 0.05 * part, what)
            )
    except ValueError as error:
        report["finite"] = False
        report["failure"] = str(error)
    else:
        report["finite"] = True
    shutil.rmtree(out_dir.parent / "experts", ignore_errors=True)
    progress(0.85 if "compile" not in inputs else 0.65, "greedy answers")
    some = conversations[: spec.answers]
    report |= text_agreement.answers(torch_model, session, some, spec.greedy_tokens, golden)
    if own:
        told = partial(progress, 0.85)
        report["adapters"] = {
            name: text_agreement.adapter_agreement(
                torch_model, (session, twin), inputs["adapters"].path, name, windows, spec, golden, told
            )
            for name in own
        }
    report |= _media(torch_model, session, inputs["checkpoint"].path, spec, golden, progress)
    shutil.rmtree(scratch, ignore_errors=True)
    _write_golden(golden, out_dir)
    progress(0.95, "tokenizer and chat template")
    report["tokenizer"] = parity.tokenizers(torch_model.tokenizer, package, session, texts.TOKENIZER_PROBES)
    report["chat_template"] = parity.chat_templates(torch_model.tokenizer, package, session, conversations)
    report["chat_template"]["thinking"] = thinking
    return report


def _media(
    torch_model: Reference,
    session: Session,
    checkpoint: Path,
    spec: Validate,
    golden: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Answers about pictures or on sounds, of a model that sees or hears; the package's are added to ``golden``."""
    family = checkpoint_files.family_of(checkpoint)
    section = "images" if family.sees else "audio" if family.hears else ""
    if not section:
        return {}
    try:
        figures, entries = _MEDIA[section].measure(
            torch_model, session, checkpoint, spec.greedy_tokens, lambda _, what: progress(0.9, what)
        )
    except ValueError as error:
        return {"finite": False, "failure": f"{section}: {error}"}
    golden += entries
    return {section: figures}


def _extended(checkpoint: Path, session: Session, spec: Validate) -> dict[str, int]:
    """Of a checkpoint whose positions are scaled: its ``original`` window, ``context``, what is ``measured`` (tokens).

    Raises:
        StageError: the long text does not fit the context, or ends within the original window.
    """
    config = json.loads((checkpoint / "config.json").read_bytes())
    config = config.get("text_config", config)
    reach = positions.read(config, config.get("max_position_embeddings") or positions.DEFAULT, str(checkpoint))
    if spec.long_tokens and spec.long_tokens >= session.context_length:
        raise StageError(
            f"a text of {spec.long_tokens} tokens does not fit the context of {session.context_length}",
            where="validate.long_tokens",
            fix=f"ask for {session.context_length - 1} or less",
        )
    if reach.context <= reach.original:
        return {}
    least = reach.original + long_context.LAST
    if spec.long_tokens and spec.long_tokens < least:
        raise StageError(
            f"a text of {spec.long_tokens} tokens ends within the window of {reach.original} that is extended",
            where="validate.long_tokens",
            why="nothing would be measured beyond it",
            fix=f"ask for {least} or more",
        )
    return {
        "original": reach.original,
        "context": session.context_length,
        "measured": max(spec.window_tokens, spec.long_tokens or 0),
    }


def _write_golden(entries: Sequence[Mapping[str, Any]], out_dir: Path) -> None:
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (out_dir / GOLDEN).write_text(lines, encoding="utf-8")


def gates(report: Mapping[str, Any], wanted: Gates) -> list[dict[str, Any]]:
    """Every gate with what was measured.

    Returns:
        for each ``metric``, ``path``, ``value``, ``bound``, ``sense`` (max or min), ``passed``.
    """
    found = text_agreement.gates(report, wanted)
    for name, figures in report.get("adapters", {}).items():
        found += text_agreement.gates(figures, wanted, f" with {name}")
        if figures["finite"]:
            for bound, sense in zip(text_agreement.EFFECT, ("min", "max"), strict=True):
                found.append(gate("adapter_effect", name, figures["effect"], bound, sense))
    missing_eos = len(set(report["eos"]["reference_ids"]) ^ set(report["eos"]["ids"]))
    found.append(gate("eos_mismatches", "", missing_eos, 0, "max"))
    for key in ("tokenizer", "chat_template"):
        for name in ("runtime", "served"):
            unexplained = [entry for entry in report[key][name] if "reason" not in entry]
            found.append(gate(f"{key}_mismatches", name, len(unexplained), 0, "max"))
    for section, module in _MEDIA.items():
        if figures := report.get(section):
            found += media_agreement.gates(figures, module.bounds(figures), section, wanted)
    return found


def _refusal(report: Mapping[str, Any], quantized: Mapping[str, Any]) -> GateError:
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    rows = [
        f"{gate['metric']}{' (' + gate['path'] + ')' if gate['path'] else ''} is {gate['value']:g}, "
        f"the gate is {'at most' if gate['sense'] == 'max' else 'at least'} {gate['bound']:g}"
        for gate in failed
    ]
    for name, part in (("", report), *report.get("adapters", {}).items()):
        if "failure" in part:
            rows.insert(0, f"{name}: {part['failure']}" if name else str(part["failure"]))
    advice = {
        "dynamic": "quantize.options: {reduce_range: true} avoids saturated sums on processors without VNNI; "
        "algorithm min_error with 8 bits keeps activations out of it",
        "retrieval": "8 bits for model.layers.*.mlp.down_proj (an override), symmetric: false, or a smaller block_size",
        "nncf": "a smaller quantize.options.compress_config.ratio, or 8 bits",
        "rtn": "algorithm min_error at the same size, symmetric: false, a smaller block_size, "
        "or an override with 8 bits for model.layers.*.mlp.down_proj",
    }
    fix = advice.get(
        "retrieval" if "retrieval" in report else str(quantized.get("algorithm")),
        "more bits for the weights that lose most (`qwen-onnx tune`), symmetric: false, or a smaller block_size",
    )
    if {gate["metric"] for gate in failed} == {"adapter_effect"}:  # more bits would not help
        fix = "an adapter that was trained on this checkpoint, and report this if it was"
    return GateError("the model does not reproduce its reference", why="; ".join(rows), fix=f"try {fix}")
