"""How one release of a package differs from another, and what that means for the app that uses it.

All is read from files; no runtime loads anything. What counts as which difference is said in `pipeline.diff.rules`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import GOLDEN, VALIDATION, Manifest, read_json, read_manifest
from pipeline.diff import quality as quality_diff, rules as diff_rules, tokenizers as tokenizer_diff
from pipeline.diff.rules import Finding
from pipeline.documents import measured
from pipeline.errors import PackageError
from pipeline.package import onnx_references, retrieval_config, verify

_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_ABSENT = "absent"


@dataclass(frozen=True)
class Diff:
    """Two releases, by name and digest, their differences, and the verdict."""

    old: Manifest
    new: Manifest
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """That of the worst difference."""
        return diff_rules.verdict(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        sides = {
            side: {"name": manifest.data["name"], "digest": manifest.digest}
            for side, manifest in (("old", self.old), ("new", self.new))
        }
        return {**sides, "verdict": self.verdict, "findings": [finding.as_dict() for finding in self.findings]}


def compare(old: Path, new: Path, trust: bool = False) -> Diff:
    """Compare two packages, verified unless they are trusted.

    Raises:
        PackageError: a package fails verification, or a file of it cannot be read.
    """
    manifests = [read_manifest(package) if trust else verify.package(package) for package in (old, new)]
    first, second = manifests
    findings = [
        *_manifest(first, second),
        *_settings(old, new, first, second),
        *tokenizer_diff.compare(old, new),
        *_graphs(old, new),
        *quality_diff.quality(_json(old / VALIDATION), _json(new / VALIDATION)),
        *quality_diff.answers(_golden(old), _golden(new)),
        *quality_diff.speed(measured.read_bench(old), measured.read_bench(new), old.name, new.name),
        *_sizes(first, second),
        *_adapters(first, second),
    ]
    order = [diff_rules.BREAKING, diff_rules.REVIEW, diff_rules.COMPATIBLE]
    return Diff(first, second, tuple(sorted(findings, key=lambda finding: order.index(finding.verdict))))


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object of a package; empty where there is no such file."""
    try:
        data = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{path} cannot be read", why=str(error)) from None
    return data if isinstance(data, Mapping) else {}


def _golden(package: Path) -> list[Any]:
    path = package / GOLDEN
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{path} cannot be read", why=str(error)) from None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values; `_ABSENT` where a side has none."""
    for key in sorted({*old, *new}):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if before != after:
            yield key, before, after


# Rule → where the manifest says it; values are compared as they stand.
_MANIFEST_RULES = {
    "schema": ("schema_version",),
    "base": ("source", "base_model"),
    "checkpoint": ("source", "sha256"),
    "languages": ("source", "languages"),
    "licence": ("source", "license"),
    "architecture": ("recipe", "architecture"),
    "scheme": ("recipe", "quantize"),
    "tools": ("tools",),
    "runtime": ("runtime", "name"),
    "provider": ("target", "provider"),
    "replay": ("replay",),
}


def _manifest(old: Manifest, new: Manifest) -> Iterator[Finding]:
    if old.task != new.task:
        yield Finding("task", "task", old.task, new.task)
    for rule, path in _MANIFEST_RULES.items():
        before, after = (_at(manifest.data, *path) for manifest in (old, new))
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for key, was, now in _changed(before, after):
                yield Finding(rule, f"{path[-1]}.{key}", was, now)
        else:
            yield Finding(rule, ".".join(path), before, after)
    minimum = [str(_at(manifest.data, "runtime", "minimum") or "0") for manifest in (old, new)]
    if minimum[0] != minimum[1]:
        before, after = (_version(text) for text in minimum)
        yield Finding("runtime.raised" if after > before else "runtime.lowered", "runtime.minimum", *minimum)
    targets = [_object(manifest.data["target"]) for manifest in (old, new)]
    for key, was, now in _changed(*targets):
        if key != "provider":
            yield Finding("target", f"target.{key}", was, now)


def _version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = _object(value).get(key)
    return value


def _settings(old: Path, new: Path, first: Manifest, second: Manifest) -> Iterator[Finding]:
    """Differences of genai_config.json, or of the configuration of packages that generate nothing."""
    name = "genai_config.json" if first.generates else retrieval_config.CONFIG
    if first.generates != second.generates:
        return
    before, after = (_flat(_json(package / name)) for package in (old, new))
    for key, was, now in _changed(before, after):
        field = key.rpartition(".")[2]
        if field == "context_length" and isinstance(was, int) and isinstance(now, int):
            yield Finding("config.context.less" if now < was else "config.context.more", key, was, now)
        elif key == "model.type":
            yield Finding("config.type", key, was, now)
        elif field in _IDS:
            if not _same_ids(was, now):
                yield Finding("config.tokens", key, was, now)
        elif key != "search.max_length":  # it follows the context
            yield Finding("config.search" if key.startswith("search.") else "config.other", key, was, now)


def _same_ids(old: Any, new: Any) -> bool:
    """Whether ids mean the same: one, or several in any order."""
    before, after = (value if isinstance(value, list) else [value] for value in (old, new))
    return sorted(map(str, before)) == sorted(map(str, after))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with keys such as ``model.decoder.filename``."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= _flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _graphs(old: Path, new: Path) -> Iterator[Finding]:
    before, after = (_read_graphs(package) for package in (old, new))
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            shown = ("there" if name in side else _ABSENT for side in (before, after))
            yield Finding("graph.interface", name, *shown)
            continue
        first, second = before[name], after[name]
        for key, was, now in _changed(first["interface"], second["interface"]):
            yield Finding("graph.interface", f"{name}: {key}", was, now)
        for key, was, now in _changed(first["operators"], second["operators"]):
            rule = "graph.operators" if was == _ABSENT else "graph.counts"
            yield Finding(rule, f"{name}: {key}", 0 if was == _ABSENT else was, 0 if now == _ABSENT else now)
        for key, was, now in _changed(first["opsets"], second["opsets"]):
            newer = now != _ABSENT and (was == _ABSENT or now > was)
            yield Finding("graph.opset" if newer else "graph.counts", f"{name}: opset of {key}", was, now)


def _read_graphs(package: Path) -> dict[str, dict[str, Any]]:
    """Of each graph its inputs and outputs, operators and opsets."""
    found = {}
    for path in sorted(package.glob("*.onnx")):
        try:
            data = path.read_bytes()
            inputs = {f"input {name}": [kind, *dims] for name, (kind, dims) in onnx_references.inputs(data).items()}
            outputs = {f"output {name}": "there" for name in onnx_references.outputs(data)}
            parts = {"operators": onnx_references.operators(data), "opsets": onnx_references.opsets(data)}
        except (OSError, ValueError) as error:
            raise PackageError(f"{path.name} is not an ONNX model", where=str(path), why=str(error)) from None
        found[path.name] = {"interface": inputs | outputs, **parts}
    return found


def _sizes(old: Manifest, new: Manifest) -> Iterator[Finding]:
    before, after = (sum(size for size, _ in manifest.files.values()) for manifest in (old, new))
    if before != after:
        larger = after > before * (1 + diff_rules.SIZE_SHARE)
        yield Finding("size.larger" if larger else "size.changed", "bytes of all files", before, after)
    for name in sorted(old.files.keys() - new.files.keys()):
        if not name.endswith((".onnx", ".onnx_adapter")):  # told as graphs and adapters
            yield Finding("files.removed", name, "there", _ABSENT)
    for name in sorted(new.files.keys() - old.files.keys()):
        yield Finding("files.added", name, _ABSENT, "there")
    licences = [manifest.files.get("LICENSE", (0, _ABSENT))[1] for manifest in (old, new)]
    if licences[0] != licences[1]:
        yield Finding("licence.text", "sha256 of LICENSE", *licences)


def _adapters(old: Manifest, new: Manifest) -> Iterator[Finding]:
    before, after = (_object(manifest.data.get("adapters")) for manifest in (old, new))
    for name, was, now in _changed(before, after):
        rule = "adapter.removed" if now == _ABSENT else "adapter.added" if was == _ABSENT else "adapter.changed"
        yield Finding(rule, name, *(_object(side).get("sha256", _ABSENT) for side in (was, now)))
