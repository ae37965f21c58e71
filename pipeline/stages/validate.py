"""Hold what ships, run by the runtime that ships it, against the PyTorch reference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import (
    audio_agreement,
    generate,
    graph,
    metrics,
    npu_agreement,
    openvino,
    parity,
    reference,
    replay,
    texts,
    vision_agreement,
)
from pipeline import session as sessions
from pipeline.agreement import Tally
from pipeline.artifact import GOLDEN, VALIDATION, Artifact, Progress, Result, Step, graph_files
from pipeline.errors import GateError, StageError
from pipeline.recipe import Gates, Validate
from pipeline.reference import Reference
from pipeline.session import Session
from pipeline.texts import Conversation

if TYPE_CHECKING:
    import numpy.typing as npt

# A package that answers this many times longer than a reference that came to an end has lost its end token.
_RUNAWAY = 2


@dataclass(frozen=True)
class Window:
    """A stretch of evaluation text."""

    domain: str
    ids: list[int]


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write ``validation.json`` and ``golden.jsonl``; the result is refused when a gate is not met.

    Raises:
        StageError: the evaluation text is too short, or is not the pinned one.
        PackageError: the runtime cannot load the model.
    """
    spec = Validate.model_validate(
        {key: step.fields[key] for key in Validate.model_fields if key in step.fields}, strict=False
    )
    model = inputs.get("compile", inputs["quantize"])
    package = model.path
    progress(0.0, "loading the reference")
    torch_model = reference.load(inputs["checkpoint"].path)
    execution = step.fields["execution"]
    provider = "cpu" if execution["missing"] else ""
    session = sessions.open_package(package, provider=provider)
    windows = cut(torch_model.tokenizer, spec.windows, spec.window_tokens)
    report: dict[str, Any] = {
        "schema_version": 1,
        "reference": {
            "checkpoint": inputs["checkpoint"].digest,
            "dtype": "float32",
            "runtime": f"torch {step.tools['torch']}",
        },
        "candidate": {
            "files": graph_files(model),
            "runtime": ", ".join(f"{name} {step.tools[name]}" for name in step.tools if name.startswith("onnxruntime")),
            "target": step.fields["target"],
            "provider": step.fields["provider"],
            "executed_on": execution["provider"],
            "device": execution["device"],
            "not_executed_on_target": execution["missing"],
        },
        "text": {"sha256": step.fields["text"], "windows": len(windows), "window_tokens": spec.window_tokens},
    }
    scratch = out_dir.parent / "twin"
    try:
        if "compile" in inputs:
            report |= _compiled_agreement(torch_model, inputs, step.fields["soc"], spec, windows, scratch, progress)
        else:
            whole = _whole_prompts(session, scratch)
            report |= _agreement(torch_model, session, whole, windows, progress)
    except ValueError as error:
        report["finite"] = False
        report["failure"] = str(error)
    else:
        report["finite"] = True
    shutil.rmtree(scratch, ignore_errors=True)
    progress(0.85 if "compile" not in inputs else 0.65, "greedy answers")
    conversations = texts.CONVERSATIONS[: spec.answers]
    answers, golden = _answers(torch_model, session, conversations, spec.greedy_tokens)
    report |= answers
    if session.image_token is not None:
        progress(0.9, "pictures")
        report["images"], more = vision_agreement.measure(
            torch_model, session, inputs["checkpoint"].path, spec.greedy_tokens, lambda _, what: progress(0.9, what)
        )
        golden += more
    if audio_agreement.applies(inputs["checkpoint"].path):
        progress(0.9, "sounds")
        heard, more = _hearing(torch_model, session, inputs["checkpoint"].path, spec.greedy_tokens)
        report |= heard
        golden += more
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in golden)
    (out_dir / GOLDEN).write_text(lines, encoding="utf-8")
    progress(0.95, "tokenizer and chat template")
    report["tokenizer"] = parity.tokenizers(torch_model.tokenizer, package, session, texts.TOKENIZER_PROBES)
    report["chat_template"] = parity.chat_templates(torch_model.tokenizer, package, session, texts.CONVERSATIONS)
    report["gates"] = gates(report, spec.gates)
    report["passed"] = all(gate["passed"] for gate in report["gates"])
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (out_dir / VALIDATION).write_text(text + "\n", encoding="utf-8")
    facts = {"passed": report["passed"], **{path: report.get(path) for path in ("prefill", "decode")}}
    return Result(facts, None if report["passed"] else _refusal(report, inputs["quantize"].facts).as_dict())


def cut(tokenizer: Any, count: int, length: int) -> list[Window]:
    """``count`` windows of ``length`` tokens from the evaluation text, the domains taking turns.

    Raises:
        StageError: the text is too short.
    """
    corpus = texts.EVALUATION.read()
    ids = {domain: tokenizer(text, add_special_tokens=False)["input_ids"] for domain, text in corpus.items()}
    windows = []
    for index in range(count):
        turn, domain = divmod(index, len(ids))
        name = list(ids)[domain]
        part = ids[name][turn * length : (turn + 1) * length]
        if len(part) < length:
            raise StageError(
                f"the evaluation text holds fewer than {count} windows of {length} tokens",
                where="validate.windows, validate.window_tokens",
                why=f"its {name} part has {len(ids[name])} tokens",
                fix="ask for fewer or shorter windows",
            )
        windows.append(Window(name, part))
    return windows


def _whole_prompts(session: Session, scratch: Path) -> Callable[[Sequence[int]], npt.NDArray[np.float32]]:
    """What gives logits ``[T, V]`` for all tokens of a prompt at once."""
    if replay.provider_of(session.config) == "OpenVINO":
        return partial(openvino.prompt_logits, session.package)
    twin = _whole_prompt_twin(session.package, scratch)
    if twin == session.package:
        return partial(generate.prefill_logits, session)
    provider = "cpu" if session.provider == "cpu" else ""
    return partial(generate.prefill_logits, sessions.open_package(twin, provider=provider))


def _whole_prompt_twin(package: Path, folder: Path) -> Path:
    """The package with logits for all tokens of a prompt: the same weights, byte for byte, less one Slice node.

    The head of a package sees the last token only; measuring every position through it would take a prefill each.
    """
    import onnx

    model = graph.load(package / "model.onnx")
    if not graph.unprune_head(model):
        return package
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    for path in package.iterdir():
        if path.name != "model.onnx":
            try:
                os.link(path, folder / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, folder / path.name)
    return folder


def _agreement(
    torch_model: Reference,
    session: Session,
    whole: Callable[[Sequence[int]], npt.NDArray[np.float32]],
    windows: Sequence[Window],
    progress: Progress,
) -> dict[str, Any]:
    """Figures of the prefill (by ``whole``) and the decode path, over all windows and by domain."""
    prefill, decode = Tally(), Tally()
    last_token_error = 0.0
    for index, window in enumerate(windows):
        progress(0.05 + 0.8 * index / len(windows), f"window {index + 1} of {len(windows)} ({window.domain})")
        wanted = metrics.log_softmax(torch_model.logits(window.ids))
        found = whole(window.ids)
        prefill.add(window.domain, wanted, found, window.ids)
        last = generate.prefill_logits(session, window.ids)[-1]
        last_token_error = max(last_token_error, _largest_difference(last, found[-1]))
        decode.add(window.domain, wanted, generate.decode_logits(session, window.ids), window.ids)
    return {
        path: {**tally.figures(), "domains": {domain: tally.figures(domain) for domain in tally.domains}}
        for path, tally in (("prefill", prefill), ("decode", decode))
    } | {"last_token_prefill_error": round(last_token_error, 6)}


def _compiled_agreement(
    torch_model: Reference,
    inputs: Mapping[str, Artifact],
    soc: str,
    spec: Validate,
    windows: Sequence[Window],
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The same figures of a compiled package, executed stage by stage."""
    found = npu_agreement.measure(
        torch_model,
        inputs["compile"].path,
        inputs["quantize"].path,
        soc,
        [(window.domain, window.ids) for window in windows],
        spec.decode_tokens or spec.window_tokens // 2,
        scratch,
        lambda part, what: progress(0.05 + 0.6 * part, what),
    )
    found["npu"]["compiled_from"] = inputs["compile"].facts["placement"]
    return found


def _largest_difference(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    return float(np.abs(left - right).max())


def _answers(
    torch_model: Reference, session: Session, conversations: Sequence[Conversation], limit: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Greedy answers of both to the same prompts, and whether they end; and the package's for ``golden.jsonl``."""
    answers, golden = [], []
    for conversation in conversations:
        tools = [dict(tool) for tool in conversation.tools] or None
        prompt = torch_model.tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages], tools=tools, add_generation_prompt=True, tokenize=True
        )
        wanted, ended = torch_model.greedy(prompt, limit)
        longer = list(generate.stream(session, prompt, _RUNAWAY * limit if ended else limit))
        found = longer[: len(wanted)] if not ended else longer
        answers.append(
            {
                "name": conversation.name,
                "agreement": round(metrics.greedy_agreement(wanted, found[: max(len(wanted), 1)]), 4),
                "first_divergence": metrics.first_divergence(wanted, found),
                "reference_ended": ended,
                "ended": len(longer) < generate.room(session, len(prompt), _RUNAWAY * limit if ended else limit),
                "reference": torch_model.tokenizer.decode(wanted),
                "answer": torch_model.tokenizer.decode(found),
            }
        )
        _, logprobs = replay.scores(session.model, prompt, longer[:limit], session.window)
        entry = {"name": conversation.name, "prompt": prompt, "tokens": longer[:limit]}
        golden.append({**entry, "logprobs": [round(value, 5) for value in logprobs]})
    mean = sum(answer["agreement"] for answer in answers) / len(answers)
    return {
        "greedy": {"tokens": limit, "agreement": round(mean, 4), "answers": answers},
        "eos": {"ids": sorted(session.eos), "reference_ids": sorted(torch_model.eos)},
    }, golden


def _hearing(
    torch_model: Reference, session: Session, checkpoint: Path, limit: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of answers on sounds, and entries for ``golden.jsonl``."""
    try:
        figures, golden = audio_agreement.measure(torch_model, session, checkpoint, limit)
    except ValueError as error:
        return {"finite": False, "failure": f"on sounds: {error}"}, []
    return {"audio": figures}, golden


def gates(report: Mapping[str, Any], wanted: Gates) -> list[dict[str, Any]]:
    """Every gate with what was measured.

    Returns:
        for each ``metric``, ``path``, ``value``, ``bound``, ``sense`` (max or min), ``passed``.
    """
    found = [_gate("finite", "", float(report["finite"]), 1.0, "min")]
    for path in ("prefill", "decode") if report["finite"] else ():
        figures = report[path]
        for metric in ("mean_kl", "p99_kl", "perplexity_ratio"):
            bound = getattr(wanted, metric)
            if bound is not None:
                found.append(_gate(metric, path, figures[metric], bound, "max"))
        found.append(_gate("top1", path, figures["top1"], wanted.top1, "min"))
    found.append(_gate("greedy", "decode", report["greedy"]["agreement"], wanted.greedy, "min"))
    if "audio" in report:
        for metric, value, bound, sense in audio_agreement.bounds(report["audio"], wanted):
            found.append(_gate(metric, "audio", value, bound, sense))
    runaway = sum(answer["reference_ended"] and not answer["ended"] for answer in report["greedy"]["answers"])
    found.append(_gate("runaway_answers", "decode", runaway, wanted.runaway, "max"))
    missing_eos = len(set(report["eos"]["reference_ids"]) ^ set(report["eos"]["ids"]))
    found.append(_gate("eos_mismatches", "", missing_eos, 0, "max"))
    for key in ("tokenizer", "chat_template"):
        for name in ("runtime", "served"):
            unexplained = [entry for entry in report[key][name] if "reason" not in entry]
            found.append(_gate(f"{key}_mismatches", name, len(unexplained), 0, "max"))
    return found + (_image_gates(report["images"], wanted) if "images" in report else [])


def _image_gates(images: Mapping[str, Any], wanted: Gates) -> list[dict[str, Any]]:
    """The recipe's gates for answers about pictures, and those for the pictures themselves, which are no choice."""
    found = [
        _gate("pixel_error", "image", images["pixel_error"], vision_agreement.MAX_PIXEL_ERROR, "max"),
        _gate("feature_cosine", "image", images["feature_cosine"], vision_agreement.MIN_COSINE, "min"),
        _gate("mean_kl", "image", images["mean_kl"], wanted.mean_kl, "max"),
        _gate("top1", "image", images["top1"], wanted.top1, "min"),
        _gate("greedy", "image", images["greedy"], wanted.greedy, "min"),
    ]
    prompts = sum(not answer["prompt_agrees"] for answer in images["answers"])
    return [*found, _gate("chat_template_mismatches", "image", prompts, 0, "max")]


def _gate(metric: str, path: str, value: float, bound: float, sense: str) -> dict[str, Any]:
    passed = value <= bound if sense == "max" else value >= bound
    return {"metric": metric, "path": path, "value": value, "bound": bound, "sense": sense, "passed": bool(passed)}


def _refusal(report: Mapping[str, Any], quantized: Mapping[str, Any]) -> GateError:
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    rows = [
        f"{gate['metric']}{' (' + gate['path'] + ')' if gate['path'] else ''} is {gate['value']:g}, "
        f"the gate is {'at most' if gate['sense'] == 'max' else 'at least'} {gate['bound']:g}"
        for gate in failed
    ]
    if not report["finite"]:
        rows.insert(0, str(report["failure"]))
    advice = {
        "dynamic": "quantize.options: {reduce_range: true} avoids saturated sums on processors without VNNI; "
        "algorithm min_error with 8 bits keeps activations out of it",
        "nncf": "a smaller quantize.options.compress_config.ratio, or 8 bits",
        "rtn": "algorithm min_error at the same size, symmetric: false, a smaller block_size, "
        "or an override with 8 bits for model.layers.*.mlp.down_proj",
    }
    fix = advice.get(
        str(quantized.get("algorithm")),
        "more bits for the weights that lose most (`qwen-onnx tune`), symmetric: false, or a smaller block_size",
    )
    return GateError("the model does not reproduce its reference", why="; ".join(rows), fix=f"try {fix}")
