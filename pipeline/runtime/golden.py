"""Replay what a package recorded when it was validated, with the runtime that is installed here."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import GOLDEN, read_manifest
from pipeline.errors import PackageError, UsageError
from pipeline.package import retrieval_config


def replay(package: Path, provider: str = "") -> dict[str, Any]:
    """Run the golden transcript on this machine, within the tolerance of the manifest.

    Args:
        provider: ``cpu`` runs it on the processor, whatever the package is for.

    Returns:
        what `pipeline.package.replay.replay` returns, and ``provider``: what computed.

    Raises:
        PackageError: the transcript or the model cannot be loaded, or the device is out of tolerance.
        RuntimeMissing: the package's provider is not to be had here.
    """
    from pipeline.package import replay as transcript
    from pipeline.runtime import adapters, generate, images, session

    try:
        entries = transcript.read(package / GOLDEN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(
            f"{GOLDEN} cannot be read", where=str(package / GOLDEN), why=str(error), codes=["replay.unreadable"]
        ) from None
    opened = session.open_package(package, provider=provider)
    try:
        for entry in entries:
            for image in entry.get("images", ()):
                images.check(base64.b64decode(image), GOLDEN)
            media = transcript.media_of(opened.model, entry)
            generate.check_answer(opened, entry["prompt"], entry["tokens"], media)
        for name in sorted({entry["adapter"] for entry in entries if "adapter" in entry}):
            adapters.activate(opened, adapters.find(package, name))
    except (UsageError, RuntimeError) as error:
        raise PackageError(
            f"{GOLDEN} is no transcript of this model", why=str(error), codes=["replay.unreadable"]
        ) from None
    result = transcript.replay(opened.model, entries, opened.window, package)
    tolerance = {**transcript.DEFAULT, **read_manifest(package).data.get("replay", {})}
    if problem := transcript.verdict(result, tolerance):
        raise PackageError(
            "this machine does not compute what was validated",
            why=problem,
            fix="update onnxruntime-genai, and report the device and the versions",
            codes=["replay.differs"],
        )
    return {**result, "provider": opened.provider}


def told(result: Mapping[str, Any]) -> str:
    """A few words on a result of `replay`."""
    same = f"on {result['provider']}: {result['identical']} of {result['prompts']} answers identical"
    near = f"log-probabilities within {result['logprob']:.4f} nats on average"
    found = [f"{same}, {result['top1']:.1%} of {result['tokens']} tokens ranked first, {near}"]
    for name, part in result.get("adapters", {}).items():
        found.append(f"with {name}: {part['identical']} of {part['prompts']} answers identical")
    return "; ".join(found)


def replay_retrieval(package: Path) -> dict[str, Any]:
    """The same of a package that embeds or ranks.

    Returns:
        what `pipeline.package.retrieval_replay.replay` returns.

    Raises:
        PackageError, RuntimeMissing: as `replay`.
    """
    from pipeline.package import retrieval_replay
    from pipeline.runtime import retrieval

    config = retrieval_config.read_config(package)
    try:
        entries = retrieval_replay.read(package / GOLDEN, config["dimensions"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PackageError(
            f"{GOLDEN} cannot be read", where=str(package / GOLDEN), why=str(error), codes=["replay.unreadable"]
        ) from None
    opened = retrieval.open_package(package)
    if max(token for entry in entries for token in entry["ids"]) >= opened.tokenizer.trusted.get_vocab_size():
        raise PackageError(
            f"{GOLDEN} is no transcript of this model",
            why="it has ids outside of the vocabulary",
            codes=["replay.unreadable"],
        )
    result = retrieval_replay.replay(opened.session, config, entries)
    if problem := retrieval_replay.verdict(result, read_manifest(package).data.get("replay", {})):
        raise PackageError(
            "this machine does not compute what was validated",
            why=problem,
            fix="update onnxruntime, and report the device and the versions",
            codes=["replay.differs"],
        )
    return result
