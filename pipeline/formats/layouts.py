"""A package as other programs want a folder to look: Foundry Local's cache, and a repository of a model hub.

Files are hard links where the file system has them. What is added comes last: the program that watches the folder takes
it as the sign that all is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline import files
from pipeline.artifact import Manifest
from pipeline.errors import PackageError, ResourceError, UsageError
from pipeline.formats import staging
from pipeline.package import verify
from pipeline.runtime import chat

FOUNDRY, ATTRIBUTES = "inference_model.json", ".gitattributes"
_CONTENT = "{Content}"
# Files that hubs keep in Git LFS: weights by their endings, and whatever is larger than they take otherwise.
_LFS = ("*.onnx", "*.data", "*.bin", "*.onnx_adapter")
_LFS_BYTES = 10 << 20
# What a hub reads of a card, and its type.
_CARD = {"base_model": str, "license": str, "library_name": str, "pipeline_tag": str, "tags": list, "language": list}


def write(package: Path, out: Path, kind: str, key: Path | None = None) -> list[str]:
    """Verify a package and lay it out at ``out`` for ``kind`` (a key of `KINDS`); returns the names of added files.

    Args:
        key: the public key that the package must be signed with.

    Raises:
        PackageError: the package fails verification, or has not what the layout needs.
        UsageError: ``out`` is taken.
        RuntimeMissing: jinja2 is not installed, which renders chat templates.
        ResourceError: ``out`` cannot be written.
    """
    manifest = verify.package(package, key=key)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} is taken", fix="remove it, or give another place")
    added = KINDS[kind](package, manifest)
    place = out.with_name(f".{out.name}.{kind}")
    try:
        staging.remove(place)
        place.mkdir(parents=True)
        for path in sorted(package.iterdir()):
            files.link(path, place / path.name)
        for name, text in added.items():
            files.publish(place / name, text)
        place.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written", why=str(error)) from None
    return list(added)


def _foundry(package: Path, manifest: Manifest) -> dict[str, str]:
    """``inference_model.json``: the name under which Foundry Local lists the model, and how its prompts are written."""
    if not manifest.generates:
        raise PackageError(f"a package to {manifest.task} is nothing for Foundry Local", why="it generates no text")
    template = prompt_template(chat.template_of(package))
    data = {"Name": manifest.data["name"], "PromptTemplate": template}
    return {FOUNDRY: json.dumps(data, indent=2, ensure_ascii=False) + "\n"}


def prompt_template(template: str) -> dict[str, str]:
    """A chat template as texts around ``{Content}``, for each role, and for a user's words with the answer's beginning.

    Raises:
        PackageError: the template does more than to put texts around messages.
        UsageError: it cannot be rendered.
    """
    first = [{"role": "system", "content": "s"}]
    asked = [*first, {"role": "user", "content": "u"}]
    system = chat.render(template, [{"role": "system", "content": _CONTENT}], add_generation_prompt=False)
    user = _after(template, first, {"role": "user", "content": _CONTENT})
    assistant = _after(template, asked, {"role": "assistant", "content": _CONTENT})
    prompt = _after(template, first, {"role": "user", "content": _CONTENT}, add_generation_prompt=True)
    found = {"system": system, "user": user, "assistant": assistant, "prompt": prompt}
    for role, text in found.items():
        if text.count(_CONTENT) != 1:
            raise PackageError("the chat template cannot be written for Foundry Local", why=f"{role}: {text[:200]!r}")
    return found


def _after(template: str, before: list[dict[str, str]], message: dict[str, str], **variables: Any) -> str:
    """What a message adds to those before it."""
    start = chat.render(template, before, add_generation_prompt=False)
    whole = chat.render(template, [*before, message], **{"add_generation_prompt": False, **variables})
    if not whole.startswith(start):
        raise PackageError(
            "the chat template cannot be written for Foundry Local",
            why=f"a message of the {message['role']} changes what is written before it",
        )
    return whole.removeprefix(start)


def _hub(package: Path, manifest: Manifest) -> dict[str, str]:
    """``.gitattributes``: which files go to Git LFS, and that no file's line ends are changed, nor its digest."""
    card = card_of((package / "README.md").read_text(encoding="utf-8"))
    licence = manifest.data["source"].get("license")
    if isinstance(licence, str) and card["license"] != licence.lower():
        raise PackageError("README.md names another licence than the manifest", why=f"{card['license']}, {licence}")
    large = [name for name, (size, _) in sorted(manifest.files.items()) if size > _LFS_BYTES]
    named = [name.replace(" ", "?") for name in large if not any(Path(name).match(pattern) for pattern in _LFS)]
    rows = ["* -text", *(f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in (*_LFS, *named))]
    return {ATTRIBUTES: "\n".join(rows) + "\n"}


def card_of(text: str) -> Mapping[str, Any]:
    """The metadata block of a model card.

    Raises:
        PackageError: there is none that a hub can read.
    """
    _, mark, rest = text.partition("---\n")
    block, end, _ = rest.partition("\n---\n")
    try:
        data = yaml.safe_load(block) if mark and end and text.startswith("---\n") else None
    except yaml.YAMLError as error:
        raise PackageError("README.md has no metadata that a hub can read", why=str(error)[:200]) from None
    wrong = [key for key, kind in _CARD.items() if not isinstance(data, dict) or not isinstance(data.get(key), kind)]
    if wrong:
        raise PackageError(
            "README.md has no metadata that a hub can read", why=f"missing or ill-typed: {', '.join(wrong)}"
        )
    return dict(data or {})


KINDS: Mapping[str, Callable[[Path, Manifest], dict[str, str]]] = {"foundry": _foundry, "hub": _hub}
