"""How two tokenizers differ: their vocabularies and control tokens, and the ids of texts on which tokenizers part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.diff.rules import Finding
from pipeline.errors import PackageError, QwenOnnxError, RuntimeMissing
from pipeline.facts import texts
from pipeline.runtime import chat

_FILE = "tokenizer.json"
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
_SHOWN = 5  # tokens that a finding names


def compare(old: Path, new: Path) -> Iterator[Finding]:
    """Differences of two packages' tokenizers and chat templates.

    Raises:
        PackageError: a tokenizer cannot be read.
    """
    before, after = (chat.template_of(package) for package in (old, new))
    if before != after:
        changed = list(_prompts(before, after))
        shown = ", ".join(changed) or "none of the probe conversations"
        yield Finding("template", f"chat template; other prompts for: {shown}", _size(before), _size(after))
    if (old / _FILE).read_bytes() == (new / _FILE).read_bytes():
        return
    first, second = _read(old), _read(new)
    yield from _vocabulary(_tokens(first), _tokens(second))
    merges = [_object(data.get("model")).get("merges") for data in (first, second)]
    if merges[0] != merges[1]:
        yield Finding("tokenizer.merges", "merges", *(len(part) if isinstance(part, list) else 0 for part in merges))
    controls = [_controls(data) for data in (first, second)]
    if controls[0] != controls[1]:
        yield Finding("tokenizer.special", "control tokens", *(_without(*pair) for pair in (controls, controls[::-1])))
    for step in _STEPS:
        if first.get(step) != second.get(step):
            yield Finding("tokenizer.steps", step, _kind(first.get(step)), _kind(second.get(step)))
    yield from _probes(old, new)


def _read(package: Path) -> dict[str, Any]:
    try:
        data = read_json(package / _FILE)
        if not isinstance(data, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{package / _FILE} cannot be read", why=str(error)) from None
    return data


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _added(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = data.get("added_tokens")
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _tokens(data: Mapping[str, Any]) -> dict[str, Any]:
    """Token → id, added ones included."""
    vocabulary = _object(_object(data.get("model")).get("vocab"))
    return {**vocabulary, **{str(entry.get("content")): entry.get("id") for entry in _added(data)}}


def _controls(data: Mapping[str, Any]) -> dict[str, Any]:
    """Text → id of the tokens that control the model."""
    return {str(entry.get("content")): entry.get("id") for entry in _added(data) if entry.get("special") is True}


def _vocabulary(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Finding]:
    moved = [token for token, number in old.items() if new.get(token) != number]
    if moved:
        rest = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
        before, after = ({token: tokens.get(token) for token in moved[:_SHOWN]} for tokens in (old, new))
        yield Finding("tokenizer.moved", f"tokens{rest}", before, after)
    added = [token for token in new if token not in old]
    if added:
        yield Finding(
            "tokenizer.added", f"{len(added)} tokens, such as {', '.join(added[:_SHOWN])}", len(old), len(new)
        )


def _without(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {token: number for token, number in one.items() if other.get(token) != number}


def _kind(step: Any) -> str:
    return str(_object(step).get("type", "settings")) if step else "none"


def _size(template: str) -> str:
    return f"{len(template)} characters" if template else "none"


def _probes(old: Path, new: Path) -> Iterator[Finding]:
    """Texts that have other ids."""
    try:
        first, second = chat.load(old), chat.load(new)
    except RuntimeMissing as error:
        yield Finding("tokenizer.unchecked", error.what, None, None)
        return
    for name, text in texts.TOKENIZER_PROBES.items():
        before, after = first.encode(text), second.encode(text)
        if before != after:
            yield Finding("tokenizer.probes", f"ids of the text {name!r}", before[:12], after[:12])


def _prompts(old: str, new: str) -> Iterator[str]:
    """Names of the conversations that become another prompt, or none."""
    for conversation in texts.conversations("enable_thinking" in old + new):
        if _prompt(old, conversation) != _prompt(new, conversation):
            yield conversation.name


def _prompt(template: str, conversation: texts.Conversation) -> str:
    messages, variables = conversation.given()
    try:
        return chat.render(template, messages, **variables)
    except QwenOnnxError as error:
        return error.what
