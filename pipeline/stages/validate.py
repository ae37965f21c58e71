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
    adapters,
    chat,
    generate,
    graph,
    long_context,
    metrics,
    npu_agreement,
    openvino,
    parity,
    positions,
    reference,
    replay,
    retrieval_agreement,
    texts,
    vision_agreement,
)
from pipeline import session as sessions
from pipeline.adapter_files import ENDING
from pipeline.agreement import Tally, gate
from pipeline.artifact import GOLDEN, VALIDATION, Artifact, Progress, Result, Step, candidate, graph_files
from pipeline.errors import GateError, StageError
from pipeline.recipe import Gates, Validate
from pipeline.reference import Reference
from pipeline.session import Session
from pipeline.task import GENERATE, TASKS
from pipeline.texts import Conversation
from pipeline.thinking import VARIABLE

if TYPE_CHECKING:
    import numpy.typing as npt

# A package that answers this many times longer than a reference that came to an end has lost its end token.
_RUNAWAY = 2
# Each adapter is held against a window of each domain. How much of its effect the package shows is measured on the
# beginnings of these. In 4 bits it is 0.96 to 1.0, and 0.83 where the effect is hardly there (KL 0.001). An adapter
# that is ignored gives 0, one of another scale that scale; the gates on KL notice any other one with a large effect.
_ADAPTER_WINDOWS, _EFFECT_TOKENS = 4, 64
_EFFECT = (0.6, 1.5)


@dataclass(frozen=True)
class Window:
    """A stretch of evaluation text."""

    domain: str
    ids: list[int]


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
    windows = cut(torch_model.tokenizer, spec.windows, spec.window_tokens)
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
            report |= _compiled_agreement(torch_model, inputs, step.fields["soc"], spec, windows, scratch, progress)
        else:
            twin = _twin(session, scratch)
            whole = _whole_prompts(twin)
            part = 0.75 / (1 + len(own))
            report |= _agreement(
                torch_model, session, whole, windows, lambda done, what: progress(0.05 + part * done, what)
            )
        if spec.long_tokens:
            report["long"] = long_context.measure(
                torch_model, session, spec.long_tokens, lambda part, what: progress(0.8 + 0.05 * part, what)
            )
    except ValueError as error:
        report["finite"] = False
        report["failure"] = str(error)
    else:
        report["finite"] = True
    progress(0.85 if "compile" not in inputs else 0.65, "greedy answers")
    report |= _answers(torch_model, session, conversations[: spec.answers], spec.greedy_tokens, golden)
    if own:
        told = partial(progress, 0.85)
        report["adapters"] = {
            name: _adapter(torch_model, (session, twin), inputs["adapters"].path, name, windows, spec, golden, told)
            for name in own
        }
    if session.image_token is not None:
        report["images"], more = vision_agreement.measure(
            torch_model, session, inputs["checkpoint"].path, spec.greedy_tokens, lambda _, what: progress(0.9, what)
        )
        golden += more
    shutil.rmtree(scratch, ignore_errors=True)
    _write_golden(golden, out_dir)
    progress(0.95, "tokenizer and chat template")
    report["tokenizer"] = parity.tokenizers(torch_model.tokenizer, package, session, texts.TOKENIZER_PROBES)
    report["chat_template"] = parity.chat_templates(torch_model.tokenizer, package, session, conversations)
    report["chat_template"]["thinking"] = thinking
    return report


def _extended(checkpoint: Path, session: Session, spec: Validate) -> dict[str, int]:
    """Of a checkpoint whose positions are scaled: its ``original`` window, ``context``, what is ``measured`` (tokens).

    Raises:
        StageError: the long text does not fit the context, or ends within the original window.
    """
    config = json.loads((checkpoint / "config.json").read_bytes())
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


def _whole_prompts(twin: Session) -> Callable[[Sequence[int]], npt.NDArray[np.float32]]:
    """What gives logits ``[T, V]`` for all tokens of a prompt at once."""
    if replay.provider_of(twin.config) == "OpenVINO":
        return partial(openvino.prompt_logits, twin.package)
    return partial(generate.prefill_logits, twin)


def _twin(session: Session, scratch: Path) -> Session:
    """The package, or where its head sees the last token only, its twin whose head sees all of them."""
    if replay.provider_of(session.config) == "OpenVINO":
        return session
    twin = _whole_prompt_twin(session.package, scratch)
    if twin == session.package:
        return session
    return sessions.open_package(twin, provider="cpu" if session.provider == "cpu" else "")


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
        if path.is_file() and path.name != "model.onnx":
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
        progress(index / len(windows), f"window {index + 1} of {len(windows)} ({window.domain})")
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


def _adapter(
    torch_model: Reference,
    opened: tuple[Session, Session],
    folder: Path,
    name: str,
    windows: Sequence[Window],
    spec: Validate,
    golden: list[dict[str, Any]],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Figures of the package with an adapter against the reference to which peft has applied it, and its answers.

    ``effect`` tells how much of what the adapter changes in the reference it changes in the package: the divergence
    alone would not tell a slight adapter from one that is ignored.

    Args:
        opened: the package, and its twin for whole prompts.
        folder: of the stage that made the adapter's file.
    """
    file, few = folder / f"{name}{ENDING}", windows[:_ADAPTER_WINDOWS]
    session, twin = (adapters.activate(entry, file) for entry in opened)
    short = [window.ids[:_EFFECT_TOKENS] for window in few]
    plain = [(torch_model.logits(ids), generate.prefill_logits(opened[1], ids)) for ids in short]
    report: dict[str, Any] = {"windows": len(few)}
    with reference.adapted(torch_model, folder / "peft" / name) as wanted:
        try:
            whole = partial(generate.prefill_logits, twin)
            report |= _agreement(wanted, session, whole, few, lambda _, what: tell(f"{name}, {what}"))
            products = [
                metrics.change_products(
                    (metrics.log_softmax(before), metrics.log_softmax(wanted.logits(ids))),
                    (metrics.log_softmax(other), metrics.log_softmax(generate.prefill_logits(twin, ids))),
                )
                for ids, (before, other) in zip(short, plain, strict=True)
            ]
            same, energy = np.sum(products, axis=0)
            report["effect"] = round(float(same / energy), 4) if energy else 0.0
        except ValueError as error:
            return {**report, "finite": False, "failure": str(error)}
        tell(f"{name}, greedy answers")
        conversations = texts.CONVERSATIONS[: spec.answers]
        answers = _answers(wanted, session, conversations, spec.greedy_tokens, golden)
    return {**report, "finite": True, "greedy": answers["greedy"]}


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
    torch_model: Reference,
    session: Session,
    conversations: Sequence[Conversation],
    limit: int,
    golden: list[dict[str, Any]],
) -> dict[str, Any]:
    """Greedy answers of both to the same prompts, and whether they end; the package's are added to ``golden``."""
    answers = []
    for conversation in conversations:
        messages, given = conversation.given()
        prompt = torch_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **given)
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
        adapter = (session.adapters, session.adapter) if session.adapter else None
        _, logprobs = replay.scores(session.model, prompt, longer[:limit], session.window, adapter)
        entry = {"name": conversation.name, "prompt": prompt, "tokens": longer[:limit]}
        entry |= {"adapter": session.adapter} if session.adapter else {}
        golden.append({**entry, "logprobs": [round(value, 5) for value in logprobs]})
    mean = sum(answer["agreement"] for answer in answers) / len(answers)
    return {
        "greedy": {"tokens": limit, "agreement": round(mean, 4), "answers": answers},
        "eos": {"ids": sorted(session.eos), "reference_ids": sorted(torch_model.eos)},
    }


def _write_golden(entries: Sequence[Mapping[str, Any]], out_dir: Path) -> None:
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (out_dir / GOLDEN).write_text(lines, encoding="utf-8")


def gates(report: Mapping[str, Any], wanted: Gates) -> list[dict[str, Any]]:
    """Every gate with what was measured.

    Returns:
        for each ``metric``, ``path``, ``value``, ``bound``, ``sense`` (max or min), ``passed``.
    """
    found = _agreement_gates(report, wanted)
    for name, figures in report.get("adapters", {}).items():
        found += _agreement_gates(figures, wanted, f" with {name}")
        if figures["finite"]:
            for bound, sense in zip(_EFFECT, ("min", "max"), strict=True):
                found.append(gate("adapter_effect", name, figures["effect"], bound, sense))
    missing_eos = len(set(report["eos"]["reference_ids"]) ^ set(report["eos"]["ids"]))
    found.append(gate("eos_mismatches", "", missing_eos, 0, "max"))
    for key in ("tokenizer", "chat_template"):
        for name in ("runtime", "served"):
            unexplained = [entry for entry in report[key][name] if "reason" not in entry]
            found.append(gate(f"{key}_mismatches", name, len(unexplained), 0, "max"))
    return found + (_image_gates(report["images"], wanted) if "images" in report else [])


def _image_gates(images: Mapping[str, Any], wanted: Gates) -> list[dict[str, Any]]:
    """The recipe's gates for answers about pictures, and those for the pictures themselves, which are no choice."""
    found = [
        gate("pixel_error", "image", images["pixel_error"], vision_agreement.MAX_PIXEL_ERROR, "max"),
        gate("feature_cosine", "image", images["feature_cosine"], vision_agreement.MIN_COSINE, "min"),
        gate("greedy", "image", images["greedy"], wanted.greedy, "min"),
    ]
    for metric, sense in (("mean_kl", "max"), ("top1", "min")):
        if (bound := getattr(wanted, metric)) is not None:
            found.append(gate(metric, "image", images[metric], bound, sense))
    prompts = sum(not answer["prompt_agrees"] for answer in images["answers"])
    return [*found, gate("chat_template_mismatches", "image", prompts, 0, "max")]


def _agreement_gates(report: Mapping[str, Any], wanted: Gates, suffix: str = "") -> list[dict[str, Any]]:
    """The gates on logits and answers, of the package or (``suffix``) of it with an adapter."""
    found = [gate("finite", suffix.strip(), float(report["finite"]), 1.0, "min")]
    for path in ("prefill", "decode") if report["finite"] else ():
        figures = report[path]
        for metric in ("mean_kl", "p99_kl", "perplexity_ratio", "top1"):
            bound = getattr(wanted, metric)
            if bound is not None:
                sense = "min" if metric == "top1" else "max"
                found.append(gate(metric, f"{path}{suffix}", figures[metric], bound, sense))
    if "long" in report and wanted.mean_kl is not None:  # of so few tokens the mean alone says something
        found.append(gate("mean_kl", "long", report["long"]["mean_kl"], wanted.mean_kl, "max"))
    if "greedy" in report:
        found.append(gate("greedy", f"decode{suffix}", report["greedy"]["agreement"], wanted.greedy, "min"))
        runaway = sum(answer["reference_ended"] and not answer["ended"] for answer in report["greedy"]["answers"])
        found.append(gate("runaway_answers", f"decode{suffix}", runaway, wanted.runaway, "max"))
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
