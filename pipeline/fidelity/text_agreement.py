"""How well a package that generates answers texts: logits over windows of evaluation text, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import files
from pipeline.artifact import Artifact, Progress
from pipeline.checkpoint import reference
from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.facts import texts
from pipeline.facts.recipe import Gates, Validate
from pipeline.facts.texts import Conversation
from pipeline.fidelity import metrics, npu_agreement
from pipeline.fidelity.agreement import Tally, gate
from pipeline.graph import edits as graph
from pipeline.npu import openvino
from pipeline.package import replay
from pipeline.package.adapter_files import ENDING
from pipeline.runtime import adapters, generate, session as sessions
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

# A package that answers this many times longer than a reference that came to an end has lost its end token.
_RUNAWAY = 2
# Each adapter is held against a window of each domain. How much of its effect the package shows is measured on the
# beginnings of these. In 4 bits it is 0.96 to 1.0, and 0.83 where the effect is hardly there (KL 0.001). An adapter
# that is ignored gives 0, one of another scale that scale; the gates on KL notice any other one with a large effect.
_ADAPTER_WINDOWS, _EFFECT_TOKENS = 4, 64
EFFECT = (0.6, 1.5)


@dataclass(frozen=True)
class Window:
    """A stretch of evaluation text."""

    domain: str
    ids: list[int]


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


def whole_prompts(twin: Session) -> Callable[[Sequence[int]], npt.NDArray[np.float32]]:
    """What gives logits ``[T, V]`` for all tokens of a prompt at once."""
    if replay.provider_of(twin.config) == "OpenVINO":
        return partial(openvino.prompt_logits, twin.package)
    return partial(generate.prefill_logits, twin)


def twin(session: Session, scratch: Path) -> Session:
    """The package, or where its head sees the last token only, its twin whose head sees all of them."""
    if replay.provider_of(session.config) == "OpenVINO":
        return session
    folder = whole_prompt_twin(session.package, scratch)
    if folder == session.package:
        return session
    return sessions.open_package(folder, provider="cpu" if session.provider == "cpu" else "")


def whole_prompt_twin(package: Path, folder: Path) -> Path:
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
            files.link(path, folder / path.name)
    return folder


def agreement(
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


def adapter_agreement(
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
    session, whole_prompt = (adapters.activate(entry, file) for entry in opened)
    short = [window.ids[:_EFFECT_TOKENS] for window in few]
    plain = [(torch_model.logits(ids), generate.prefill_logits(opened[1], ids)) for ids in short]
    report: dict[str, Any] = {"windows": len(few)}
    with reference.adapted(torch_model, folder / "peft" / name) as wanted:
        try:
            whole = partial(generate.prefill_logits, whole_prompt)
            report |= agreement(wanted, session, whole, few, lambda _, what: tell(f"{name}, {what}"))
            products = [
                metrics.change_products(
                    (metrics.log_softmax(before), metrics.log_softmax(wanted.logits(ids))),
                    (metrics.log_softmax(other), metrics.log_softmax(generate.prefill_logits(whole_prompt, ids))),
                )
                for ids, (before, other) in zip(short, plain, strict=True)
            ]
            same, energy = np.sum(products, axis=0)
            report["effect"] = round(float(same / energy), 4) if energy else 0.0
        except ValueError as error:
            return {**report, "finite": False, "failure": str(error)}
        tell(f"{name}, greedy answers")
        conversations = texts.CONVERSATIONS[: spec.answers]
        found = answers(wanted, session, conversations, spec.greedy_tokens, golden)
    return {**report, "finite": True, "greedy": found["greedy"]}


def compiled_agreement(
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


def answers(
    torch_model: Reference,
    session: Session,
    conversations: Sequence[Conversation],
    limit: int,
    golden: list[dict[str, Any]],
) -> dict[str, Any]:
    """Greedy answers of both to the same prompts, and whether they end; the package's are added to ``golden``."""
    made = []
    for conversation in conversations:
        messages, given = conversation.given()
        prompt = torch_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **given)
        wanted, ended = torch_model.greedy(prompt, limit)
        longer = list(generate.stream(session, prompt, _RUNAWAY * limit if ended else limit))
        found = longer[: len(wanted)] if not ended else longer
        made.append(
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
    mean = sum(answer["agreement"] for answer in made) / len(made)
    return {
        "greedy": {"tokens": limit, "agreement": round(mean, 4), "answers": made},
        "eos": {"ids": sorted(session.eos), "reference_ids": sorted(torch_model.eos)},
    }


def gates(report: Mapping[str, Any], wanted: Gates, suffix: str = "") -> list[dict[str, Any]]:
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
    if "experts" in report:
        routing, outputs = report["experts"]["routing"], report["experts"]["outputs"]
        found.append(gate("routing", "prefill", routing["agreement"], wanted.routing, "min"))
        found.append(gate("expert_error", "", outputs["largest"], wanted.expert_error, "max"))
    if "greedy" in report:
        found.append(gate("greedy", f"decode{suffix}", report["greedy"]["agreement"], wanted.greedy, "min"))
        runaway = sum(answer["reference_ended"] and not answer["ended"] for answer in report["greedy"]["answers"])
        found.append(gate("runaway_answers", f"decode{suffix}", runaway, wanted.runaway, "max"))
    return found
