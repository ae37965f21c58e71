"""The bill of materials of a package: CycloneDX 1.6 with a machine-learning component and its model card.

It is pure and has neither a date nor a random number, so that the same build has the same bill. The library of
CycloneDX has no model cards yet (11.12): the document is written as JSON, and a test holds it against that library's
strict validator.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.documents import card
from pipeline.package.provenance import purl
from pipeline.task import EMBED, GENERATE

BOM = "bom.cdx.json"
_MODEL, _CHECKPOINT = "model", "checkpoint"
# Licences of tools, as their distributions say: an SPDX identifier or expression.
_LICENSES = {
    "gguf": "MIT",
    "numpy": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0",
    "olive-ai": "MIT",
    "onnx": "Apache-2.0",
    "onnxruntime": "MIT",
    "onnxruntime-ep-openvino": "MIT",
    "onnxruntime-genai": "MIT",
    "onnxruntime-qnn": "MIT",
    "optimum-onnx": "Apache-2.0",
    "peft": "Apache-2.0",
    "qwen-onnx": "Apache-2.0",
    "safetensors": "Apache-2.0",
    "tokenizers": "Apache-2.0",
    "torch": ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSD-3-Clause AND BSL-1.0 AND MIT"),
    "transformers": "Apache-2.0",
}


def document(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    """The bill.

    Args:
        manifest: the content of ``manifest.json``; of its files only the model's are told.
        validation: the content of ``validation.json``.
    """
    tools = [_tool(name, version) for name, version in sorted(manifest["tools"].items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, manifest['steps']['package']['key'])}",
        "version": 1,
        "metadata": {
            "tools": {"components": [tool for tool in tools if tool["name"] == "qwen-onnx"]},
            "component": _model(manifest, validation),
        },
        "components": [_checkpoint(manifest["source"]), *(tool for tool in tools if tool["name"] != "qwen-onnx")],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": sorted([_CHECKPOINT, f"tool:{manifest['runtime']['name']}"])},
            {"ref": _CHECKPOINT},
        ],
    }


def _model(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    source, recipe = manifest["source"], manifest["recipe"]
    words = card.scheme(recipe.get("quantize", {}))
    files = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(entry["sha256"])}
        for name, entry in sorted(manifest["files"].items())
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": manifest["name"],
        "description": f"{source['base_model']} as an ONNX package: {words}",
        "licenses": _licenses(source["license"]),
        "modelCard": _card(manifest, validation),
        "components": files,
        "pedigree": {"ancestors": [{k: v for k, v in _checkpoint(source).items() if k != "bom-ref"}], "notes": words},
    }


def _card(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    source, target, task = manifest["source"], manifest["target"], manifest.get("task", GENERATE)
    given = ["text", *(kind for kind, key in (("image", "images"), ("audio", "audio")) if key in validation)]
    made = {GENERATE: "text", EMBED: "vector"}.get(task, "score")
    architecture = manifest["recipe"].get("architecture", {}).get("model_type", "")
    properties = {
        "base_model": source["base_model"],
        "languages": ", ".join(source["languages"]),
        "quantization": card.scheme(manifest["recipe"].get("quantize", {})),
        "target": f"{target['title']} ({target['provider']})",
        "validated_on": target["validated_on"],
        "runtime": f"{manifest['runtime']['name']} >= {manifest['runtime']['minimum']}",
    }
    return {
        "modelParameters": {
            "task": task,
            "architectureFamily": "transformer",
            **({"modelArchitecture": architecture} if architecture else {}),
            "inputs": [{"format": kind} for kind in given],
            "outputs": [{"format": made}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(validation))},
        "considerations": {
            "useCases": [card.USE[task]],
            "technicalLimitations": [card.limits(source["base_model"])],
        },
        "properties": [{"name": f"qwen-onnx:{name}", "value": value} for name, value in properties.items() if value],
    }


def _metrics(validation: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Every gate's figure, and what it was held against."""
    for gate in validation["gates"]:
        held = f"{'at most' if gate['sense'] == 'max' else 'at least'} {gate['bound']:g} is accepted"
        path = f"{gate['path']}, " if gate["path"] else ""
        yield {"type": str(gate["metric"]), "value": f"{gate['value']:g}", "slice": f"{path}{held}"}


def _checkpoint(source: Mapping[str, Any]) -> dict[str, Any]:
    hub = next((place for place in source.get("locations", ()) if place.get("type") == "hub"), None)
    return {
        "type": "machine-learning-model",
        "bom-ref": _CHECKPOINT,
        "name": source["base_model"],
        **({"version": hub["revision"], "purl": purl("huggingface", hub["repo"], hub["revision"])} if hub else {}),
        "licenses": _licenses(source["license"]),
        **({"hashes": _hashes(source["sha256"])} if source.get("sha256") else {}),
    }


def _tool(name: str, version: str) -> dict[str, Any]:
    kind, place = ("application", "generic") if name == "qwen-onnx" else ("library", "pypi")
    told = _LICENSES.get(name)
    return {
        "type": kind,
        "bom-ref": f"tool:{name}",
        "name": name,
        "version": version,
        "purl": purl(place, name, version),
        **({"licenses": _licenses(told)} if told else {}),
    }


def _licenses(license_id: str) -> list[dict[str, Any]]:
    """A licence by its SPDX identifier or expression; publishers' own licences have a name."""
    if " AND " in license_id:
        return [{"expression": license_id}]
    return [{"license": {"id" if license_id in card.HUB_LICENSES else "name": license_id}}]


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
