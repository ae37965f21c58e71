"""Checkpoints without a head, such as those of embedding models, made into ones that exporters and readers take.

Their weights may be named without the ``model.`` that a class with a head puts before them. The bytes of the weights
stay as they are.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

from pipeline.facts.family import FAMILIES

BODY = "model."
_HEAD = "lm_head.weight"


def full_name(name: str) -> str:
    """The name of a tensor in a class with a head."""
    return name if name.startswith((BODY, "lm_head.")) else f"{BODY}{name}"


def complete(folder: Path) -> None:
    """Name the weights in ``folder`` in full, and let ``config.json`` tell of a class with a head.

    Where there is no head, the embedding is to take its place: nothing of it reaches the graph of an embedding model.
    """
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        names |= _rename(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_bytes())
        content["weight_map"] = {full_name(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")
    config = folder / "config.json"
    settings = json.loads(config.read_bytes())
    settings["architectures"] = [FAMILIES[settings["model_type"]].architecture]
    if _HEAD not in names:
        settings["tie_word_embeddings"] = True
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename(path: Path) -> set[str]:
    """Rewrite the header of a safetensors file; returns the names in it, which are full then."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        named = {name if name == "__metadata__" else full_name(name): entry for name, entry in header.items()}
        if named.keys() == header.keys():
            return set(named)
        written = json.dumps(named, separators=(",", ":")).encode()
        written += b" " * (-len(written) % 8)  # the weights begin at a multiple of 8
        temporary = path.with_suffix(".renamed")
        with temporary.open("wb") as out:
            out.write(struct.pack("<Q", len(written)) + written)
            shutil.copyfileobj(file, out, 1 << 24)
    temporary.replace(path)
    return set(named)
