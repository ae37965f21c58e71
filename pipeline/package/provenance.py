"""Where a package comes from, as SLSA v1 tells it in an in-toto statement: pure, from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import digest
from pipeline.package.signature import SLSA, STATEMENT

BUILD_TYPE = "urn:qwen-onnx:recipe:1"
"""Its ``externalParameters`` are the resolved recipe, its ``internalParameters`` the steps and the target."""
BUILDER = "urn:qwen-onnx:builder:unnamed"
_OWN = "qwen-onnx"


def statement(
    manifest: Mapping[str, Any],
    files: Mapping[str, str],
    builder: str = BUILDER,
    revision: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The statement.

    Args:
        manifest: the content of ``manifest.json``.
        files: name → sha256 of every file that the statement is about.
        builder: URI of who built it, which the signer vouches for.
        revision: of this project where it was signed: ``gitCommit``, and ``modified`` if files had been changed.
    """
    source, tools = manifest["source"], manifest.get("tools", {})
    own: dict[str, Any] = {"name": _OWN, "uri": f"pkg:generic/{_OWN}@{tools.get(_OWN, '')}".rstrip("@")}
    if revision:
        own |= {"digest": {"gitCommit": revision["gitCommit"]}, "annotations": {"modified": revision["modified"]}}
    recipe = {"name": "recipe", "digest": {"sha256": digest.of_value(manifest["recipe"])}}
    used = [{"uri": purl("pypi", *tool), "name": tool[0]} for tool in sorted(tools.items()) if tool[0] != _OWN]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)],
        "predicateType": SLSA,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"name": manifest["name"], "recipe": manifest["recipe"]},
                "internalParameters": {"steps": manifest["steps"], "target": manifest["target"]},
                "resolvedDependencies": [*_checkpoint(source), recipe, *used],
            },
            "runDetails": {
                "builder": {"id": builder, "version": {_OWN: tools.get(_OWN, "")}, "builderDependencies": [own]},
                "metadata": {"invocationId": manifest["steps"].get("package", {}).get("key", "")},
            },
        },
    }


def _checkpoint(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checkpoint by its digest, and each place where it was to be had."""
    whole: dict[str, Any] = {"name": source["base_model"]}
    if source.get("sha256"):
        whole["digest"] = {"sha256": source["sha256"]}
    places = [
        {"name": "checkpoint", "uri": purl("huggingface", place["repo"], place["revision"]), "annotations": place}
        for place in source.get("locations", ())
        if place.get("type") == "hub"
    ]
    wheels = [
        {"name": "checkpoint", "uri": _wheel(wheel["requirement"]), "annotations": wheel}
        for place in source.get("locations", ())
        for wheel in place.get("wheels", ())
    ]
    return [{**whole, "annotations": {"license": source["license"]}}, *places, *wheels]


def _wheel(requirement: str) -> str:
    name, _, version = requirement.partition("==")
    return purl("pypi", name, version)


def purl(kind: str, name: str, version: str) -> str:
    """A package URL (https://github.com/package-url/purl-spec)."""
    if kind == "pypi":
        name = name.lower().replace("_", "-")
    return f"pkg:{kind}/{name}@{version.replace('+', '%2B')}" if version else f"pkg:{kind}/{name}"
