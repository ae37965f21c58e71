"""Assemble what an app team gets: one flat directory that says what it is and can be checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.artifact import (
    CHECKSUMS,
    GOLDEN,
    MANIFEST,
    SCHEMA_VERSION,
    VALIDATION,
    Artifact,
    Progress,
    Result,
    Step,
    candidate,
    graph_files,
)
from pipeline.documents import bom, card, html_report, retrieval_card
from pipeline.documents.bom import BOM
from pipeline.errors import StageError
from pipeline.facts import positions
from pipeline.package import adapter_files, bundle, contents as package_files, replay, retrieval_replay, verify
from pipeline.package.retrieval_config import CONFIG
from pipeline.package.verify_script import SCRIPT
from pipeline.task import GENERATE, TASKS

_PARTS = (".onnx", ".data", ".bin", ".xml", ".onnx_adapter")
_LICENSES = Path(__file__).parent.parent / "data"


def run(step: Step, inputs: Mapping[str, Artifact], out_dir: Path, progress: Progress) -> Result:
    """Write the package.

    Raises:
        StageError: the validation is of another model, or the licence text is missing.
        CheckpointError: the recipe asks for a context that the checkpoint cannot have.
        PackageError: the package fails its own verification.
    """
    model, checkpoint, validated = candidate(inputs), inputs["checkpoint"], inputs["validate"]
    validation = json.loads((validated.path / VALIDATION).read_bytes())
    if not validation["passed"] or validation["candidate"]["files"] != graph_files(model):
        raise StageError("the model to be packaged is not the one that passed validation")
    shipped = _shipped(model)
    for index, (name, path) in enumerate(sorted(shipped.items())):
        progress(0.8 * index / len(shipped), name)
        shutil.copyfile(path, out_dir / name)
    for name in (VALIDATION, GOLDEN):
        shutil.copyfile(validated.path / name, out_dir / name)
    task = TASKS[step.fields.get("task", GENERATE)]
    script, configure, readme = _WRITERS[task.generates]
    shutil.copyfile(Path(str(script.__file__)), out_dir / "replay.py")
    (out_dir / SCRIPT).write_text(bundle.verify_script(), encoding="utf-8")
    if task.generates:
        _check_context(model, checkpoint, step.fields["generation"]["context_length"])
    context = configure(out_dir, step.fields["generation"])
    _write_license(checkpoint.path, str(step.fields["license"]), out_dir)
    if step.fields["license"] != "Apache-2.0":
        shutil.copyfile(_LICENSES / "Apache-2.0.txt", out_dir / card.TOOLS_LICENSE)
    manifest = _describe(step, inputs, validation["candidate"])
    if not task.generates:
        manifest |= {"task": task.name, "context_length": context}
    if "adapters" in inputs:
        manifest["adapters"] = _adapters(model.path)
    size = sum(path.stat().st_size for path in out_dir.iterdir() if path.suffix in (".data", ".bin"))
    (out_dir / "README.md").write_text(readme(manifest, validation, size), encoding="utf-8")
    own = _own_text(checkpoint.path, "NOTICE")
    original = own.read_text(encoding="utf-8", errors="replace") if own else ""
    (out_dir / "NOTICE").write_text(card.notice(manifest, original), encoding="utf-8")
    progress(0.9, "digests")
    manifest["files"] = {path.name: _entry(path) for path in sorted(out_dir.iterdir())}
    (out_dir / BOM).write_text(_bom(manifest, validation), encoding="utf-8")
    manifest["files"][BOM] = _entry(out_dir / BOM)
    report = out_dir / html_report.REPORT  # it lists all files before it
    report.write_text(html_report.page(manifest, validation), encoding="utf-8")
    manifest["files"][report.name] = _entry(report)
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
    (out_dir / MANIFEST).write_text(text + "\n", encoding="utf-8")
    sums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    sums[MANIFEST] = digest.of_file(out_dir / MANIFEST)
    (out_dir / CHECKSUMS).write_bytes(package_files.checksums(sums))
    verify.package(out_dir)
    return Result({"name": step.fields["name"], "weights": size, "files": len(sums) + 1})


def _bom(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """The bill of materials, whose files are the ones that are a part of the model."""
    parts = {name: entry for name, entry in manifest["files"].items() if Path(name).suffix in _PARTS}
    made = bom.document({**manifest, "files": parts}, validation)
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _adapters(folder: Path) -> dict[str, Any]:
    """What the manifest says of each adapter: what stands beside its file, in short."""
    found = {}
    for name in adapter_files.names(folder):
        described = adapter_files.read_description(folder / f"{name}{adapter_files.ENDING}")
        found[name] = {
            "sha256": described.sha256,
            "base": described.base,
            "license": described.license,
            "rank": max(described.ranks.values()),
            "slots": len(described.ranks),
        }
    return found


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": digest.of_file(path)}


def _shipped(model: Artifact) -> dict[str, Path]:
    """What goes into the package, by name: binaries that share their weights replace those that do not."""
    files = {name: model.path / name for name in model.files if "/" not in name}
    shared = [model.path / name for name in model.files if name.startswith("shared/")]
    if shared:
        for path in shared:
            files.pop(f"{path.stem}_qnn.bin", None)
        files |= {path.name: path for path in shared}
    return files


def _check_context(model: Artifact, checkpoint: Artifact, wanted: int | None) -> None:
    """Once more: the checkpoint's own step does not depend on the recipe's context, and may come from the store."""
    config = json.loads((checkpoint.path / "config.json").read_bytes())
    made = json.loads((model.path / "genai_config.json").read_bytes())["model"]["context_length"]
    positions.check_context(config, wanted or made, "generation.context_length")


def _write_config(out_dir: Path, generation: Mapping[str, Any]) -> int:
    """Put the recipe's search options into the exporter's configuration; returns the context length."""
    path = out_dir / "genai_config.json"
    config = json.loads(path.read_bytes())
    if generation["context_length"]:
        config["model"]["context_length"] = min(generation["context_length"], config["model"]["context_length"])
    config["search"]["max_length"] = config["model"]["context_length"]
    for key in ("do_sample", "temperature", "top_p", "top_k"):
        config["search"][key] = generation[key]
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")
    return int(config["model"]["context_length"])


def _write_retrieval_config(out_dir: Path, generation: Mapping[str, Any]) -> int:
    """The same of packages that generate nothing: the longest text is all that there is to set."""
    path = out_dir / CONFIG
    config = json.loads(path.read_bytes())
    config["context_length"] = min(generation["context_length"] or config["context_length"], config["context_length"])
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(config["context_length"])


# Whether a package generates text → the script that replays its golden results, what writes its configuration, and
# what writes its card.
_WRITERS = {
    True: (replay, _write_config, card.readme),
    False: (retrieval_replay, _write_retrieval_config, retrieval_card.readme),
}


def _write_license(checkpoint: Path, license_id: str, out_dir: Path) -> None:
    own, known = _own_text(checkpoint, "LICENSE"), _LICENSES / f"{license_id}.txt"
    if not own and not known.is_file():
        raise StageError(
            f"there is no text of the licence {license_id}",
            why="nobody may use weights without one, and the checkpoint has no file LICENSE",
            fix="put the licence's text beside the checkpoint as LICENSE",
        )
    shutil.copyfile(own or known, out_dir / "LICENSE")


def _own_text(checkpoint: Path, name: str) -> Path | None:
    """The checkpoint's file of that name, with or without an ending such as ``.txt`` or ``.md``."""
    return next((path for path in sorted(checkpoint.glob(f"{name}*")) if path.is_file()), None)


def _describe(step: Step, inputs: Mapping[str, Artifact], executed: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest, but for its files."""
    fields = step.fields
    return {
        "schema_version": SCHEMA_VERSION,
        "name": fields["name"],
        "source": {
            "base_model": fields["base_model"],
            "license": fields["license"],
            "languages": fields["languages"],
            "locations": fields["sources"],
            "sha256": fields["sha256"],
        },
        "recipe": fields["recipe"],
        "quantization": dict(inputs["quantize"].facts),
        "steps": {name: {"key": artifact.key, "digest": artifact.digest} for name, artifact in inputs.items()}
        | {"package": {"key": step.key}},
        "tools": fields["tools"],
        "target": {
            **fields["target"],
            "validated_on": executed["executed_on"],
            "validated_device": executed["device"],
            "not_validated_on_target": executed["not_executed_on_target"],
        },
        "runtime": fields["runtime"],
        "replay": fields["replay"],
    }
