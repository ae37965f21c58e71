"""A package of a few kilobytes that verifies: enough for archives, registries, layouts and differences of releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline import digest
from pipeline.artifact import CHECKSUMS, MANIFEST
from pipeline.package import contents as package_files

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
CARD = """---
base_model: Qwen/Tiny
license: apache-2.0
library_name: onnxruntime-genai
pipeline_tag: text-generation
tags: [onnx]
language:
- en
---

# tiny
"""
CONFIG: dict[str, Any] = {
    "model": {
        "type": "qwen2",
        "bos_token_id": 256,
        "eos_token_id": [257, 256],
        "pad_token_id": 256,
        "vocab_size": 260,
        "context_length": 64,
        "decoder": {"filename": "model.onnx", "session_options": {"log_id": "x", "provider_options": []}},
    },
    "search": {"max_length": 64, "temperature": 0.7},
}
_FIGURES = {"mean_kl": 0.02, "top1": 0.91, "perplexity_ratio": 1.02, "domains": {"code": {"mean_kl": 0.01}}}
VALIDATION: dict[str, Any] = {
    "text": {"sha256": "e3"},
    "prefill": _FIGURES,
    "decode": _FIGURES,
    "gates": [{"metric": "mean_kl", "path": "decode", "sense": "max", "bound": 0.035, "value": 0.02, "passed": True}],
}
GOLDEN = [{"name": "code", "prompt": [1, 2], "tokens": [3, 4, 5]}, {"name": "sum", "prompt": [6], "tokens": [7]}]
FACTS: dict[str, Any] = {
    "schema_version": 1,
    "name": "tiny-cpu-int4",
    "source": {"base_model": "Qwen/Tiny", "license": "Apache-2.0", "languages": ["en", "zh"], "sha256": "aa"},
    "recipe": {
        "description": "Tiny",
        "architecture": {"model_type": "qwen2", "layers": 2},
        "quantize": {"algorithm": "gptq"},
    },
    "quantization": {"algorithm": "gptq"},
    "steps": {},
    "tools": {"onnx": "1.0"},
    "target": {"name": "cpu", "provider": "CPUExecutionProvider", "dtype": "float32"},
    "runtime": {"name": "onnxruntime-genai", "minimum": "0.14.1"},
}


def graph(*operators: str, output: str = "logits", opset: int = 21) -> ModelProto:
    """A chain of operators that take one input, over weights in ``model.onnx.data``."""
    weights = numpy_helper.from_array(np.zeros(4, np.float32), "x0")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": "0", "length": "16"}.items():
        weights.external_data.add(key=key, value=value)
    names = [f"x{index}" for index in range(len(operators))] + [output]
    nodes = [helper.make_node(kind, [names[at]], [names[at + 1]]) for at, kind in enumerate(operators)]
    shape = helper.make_tensor_value_info(output, TensorProto.FLOAT, [4])
    made = helper.make_graph(nodes, "g", [], [shape], [weights])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])


def tokenizer(added: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>", "<|im_start|>"), merged: bool = True) -> str:
    """tokenizer.json over bytes, with or without a merge."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if merged:
        vocabulary["ll"] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("l", "l")] if merged else []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(added))
    return str(made.to_str())


def write(folder: Path, weights: bytes = bytes(range(64)) * 512, **manifest: Any) -> Path:
    """Write a package into ``folder``, which is made, and return it; ``manifest`` replaces parts of the manifest."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph("Identity", "Abs").SerializeToString())
    (folder / "model.onnx.data").write_bytes(weights)
    texts = {
        "genai_config.json": json.dumps(CONFIG),
        "tokenizer.json": tokenizer(),
        "chat_template.jinja": TEMPLATE,
        "LICENSE": "Do what you like.",
        "README.md": CARD,
        "validation.json": json.dumps(VALIDATION),
        "golden.jsonl": "".join(json.dumps(entry) + "\n" for entry in GOLDEN),
        "replay.py": "print('replayed')\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return seal(folder, **manifest)


def seal(folder: Path, **manifest: Any) -> Path:
    """Write manifest and checksums for whatever lies in ``folder``."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": digest.of_file(path)}
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, CHECKSUMS)
    }
    (folder / MANIFEST).write_text(json.dumps({**FACTS, "files": files, **manifest}), encoding="utf-8")
    sums = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: digest.of_file(folder / MANIFEST)}
    (folder / CHECKSUMS).write_bytes(package_files.checksums(sums))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Name → bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
