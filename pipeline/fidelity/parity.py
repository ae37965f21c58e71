"""Whether a package's tokenizer and chat template give the reference's token ids.

Two implementations are held against transformers': the one that this project serves with (`pipeline.runtime.chat`),
which must agree everywhere, and the runtime's own, which app teams may call and which is known to part from it in a few
places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import QwenOnnxError
from pipeline.facts.texts import Conversation
from pipeline.runtime import chat, session as sessions
from pipeline.runtime.session import Session

# Where onnxruntime-genai's own tokenizer and template renderer are known to part from the reference, seen with 0.14.1.
# They are reported and named in the model card, and do not stop a package; any other difference does.
KNOWN = {
    "decomposed accents": "the runtime does not normalize text (NFC): give it composed characters",
    "tools": "the runtime rewrites tool descriptions before the template sees them: render the template yourself",
    "tool result": "the runtime rewrites tool descriptions before the template sees them: render the template yourself",
    "thinking, tools": "the runtime rewrites tool descriptions before the template sees them",
    "no thinking": "the runtime gives templates no enable_thinking: render the template yourself",
    "no thinking, turns": "the runtime gives templates no enable_thinking: render the template yourself",
    "no thinking, tools": "the runtime gives templates no enable_thinking, and rewrites tool descriptions",
}


def tokenizers(reference: Any, package: Path, session: Session, probes: Mapping[str, str]) -> dict[str, Any]:
    """Compare ids of ``probes``, and the texts that decoding gives back.

    Args:
        reference: transformers' tokenizer.

    Returns:
        ``probes``: how many; ``runtime`` and ``served``: for each of the two the probes whose ids or text differ, with
        a ``reason`` where the difference is known.
    """
    runtime, served = sessions.runtime().Tokenizer(session.model), chat.load(package)
    wrong: dict[str, list[dict[str, Any]]] = {"runtime": [], "served": []}
    for name, probe in probes.items():
        wanted = reference(probe, add_special_tokens=False)["input_ids"]
        found = {"runtime": [int(token) for token in runtime.encode(probe)], "served": served.encode(probe)}
        for who, ids in found.items():
            if ids != wanted:
                wrong[who].append({"name": name, "wanted": wanted, "found": ids, **_reason(who, name)})
        text = reference.decode(wanted, skip_special_tokens=True)
        if served.decode(wanted) != text:
            wrong["served"].append({"name": name, "decoded": served.decode(wanted)})
    return {"probes": len(probes), **wrong}


def chat_templates(
    reference: Any, package: Path, session: Session, conversations: Sequence[Conversation]
) -> dict[str, Any]:
    """Compare the ids of rendered conversations, tools and other variables of the template included.

    Returns:
        ``conversations``: how many; ``runtime`` and ``served``: for each the conversations that differ.
    """
    runtime, served = sessions.runtime().Tokenizer(session.model), chat.load(package)
    wrong: dict[str, list[dict[str, Any]]] = {"runtime": [], "served": []}
    for conversation in conversations:
        messages, given = conversation.given()
        tools = given.get("tools")
        wanted = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **given)
        try:
            ids = served.encode_chat(messages, **given)
        except QwenOnnxError as error:
            wrong["served"].append({"name": conversation.name, "error": error.what})
        else:
            if ids != wanted:
                wrong["served"].append({"name": conversation.name, "found": reference.decode(ids)})
        try:
            text = runtime.apply_chat_template(json.dumps(messages), tools=json.dumps(tools) if tools else None)
        except Exception as error:  # the binding raises bare exceptions of the C++ side
            problem = {"error": str(error).split("\n")[0]}
            wrong["runtime"].append({"name": conversation.name, **problem, **_reason("runtime", conversation.name)})
        else:
            if [int(token) for token in runtime.encode(text)] != wanted:
                known = _reason("runtime", conversation.name)
                wrong["runtime"].append({"name": conversation.name, "found": text, **known})
    return {"conversations": len(conversations), **wrong}


def _reason(who: str, name: str) -> dict[str, str]:
    return {"reason": KNOWN[name]} if who == "runtime" and name in KNOWN else {}
