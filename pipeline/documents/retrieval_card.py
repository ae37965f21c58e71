"""The README.md of a package that embeds texts or ranks documents, written from facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.documents import card
from pipeline.task import TASKS

_USE = {
    "embed": """query = result("query", query="How do bees tell one another where the flowers are?")
documents = [result("document", document=text) for text in ("Honeybees dance.", "The tram leaves at noon.")]
print([float(query @ document) for document in documents])  # cosines: vectors have length 1
""",
    "rerank": """query = "How do bees tell one another where the flowers are?"
for text in ("Honeybees dance.", "The tram leaves at noon."):
    no, yes = result("pair", query=query, document=text)
    print(text, 1 / (1 + np.exp(no - yes)))  # in [0, 1]
""",
}
_WHAT = {
    "embed": "gives each text a vector of length 1",
    "rerank": "tells how relevant a document is to a query, in [0, 1]",
}
_MIXING = "Vectors of two packages are not quite the same: do not mix them in one index."


def readme(manifest: Mapping[str, Any], validation: Mapping[str, Any], weights: int) -> str:
    """The model card (Markdown with the metadata block that model hubs read); arguments as `card.readme` has them."""
    source, target, recipe, task = manifest["source"], manifest["target"], manifest["recipe"], TASKS[manifest["task"]]
    figures = validation["retrieval"]
    words = card.scheme(recipe.get("quantize", {}))
    rows = "\n".join(
        f"| {gate['metric']} | {gate['value']:g} | {'at most' if gate['sense'] == 'max' else 'at least'} {gate['bound']:g} |"
        for gate in validation["gates"]
    )
    measure, bound = next(iter(manifest["replay"].items()))
    near = f"cosines at least {bound:g}" if measure == "cosine" else f"scores within {bound:g}"
    shorter = ""
    if not task.labels:
        shorter = """
Where the model was trained for it (Matryoshka), the first dimensions of a vector can stand for it: cut it, and divide it by its
length again (`--dimensions`).
"""
    command = {
        "embed": 'qwen-onnx embed DIR --query "..." --text "..."',
        "rerank": 'qwen-onnx rerank DIR --query "..." --document "..."',
    }[task.name]
    return f"""{card.front_matter(manifest, "onnxruntime", task.tag)}

# {manifest["name"]}

{recipe.get("description") or source["base_model"]}, as an ONNX package for onnxruntime: {words}, {weights / 1e6:.0f} MB of weights,
for {target["title"]} ({target["provider"]}, {target["dtype"]} activations). It {_WHAT[task.name]}.

## Check it, then run it

    {manifest["runtime"]["install"]}
    python verify.py --replay

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(".")  # this directory
config = json.loads((folder / "retrieval.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # control tokens in texts are text
session = onnxruntime.InferenceSession(str(folder / config["filename"]))


def result(form, **texts):
    text = config["forms"][form].format(instruction=config["instruction"], **texts)
    ids = [*config["before"], *tokenizer.encode(text, add_special_tokens=False).ids, *config["after"]]
    return session.run(None, {{"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}})[0][0]


{_USE[task.name]}```

Texts of a batch may be padded on either side: the graph reads `attention_mask`, takes each text's last token, and computes the
result from that. Texts are at most {manifest["context_length"]:,} tokens long. Replace `config["instruction"]` by what your queries are for.
{shorter}
`verify.py` checks every file before anything is loaded, and `--key PUBLIC.pem` who signed it, where it is signed. `replay.py`, which
it runs, needs only onnxruntime: it computes the results of `golden.jsonl` again and says whether they are what was validated
({near}). With qwen-onnx installed, `qwen-onnx verify DIR --replay` checks everything else too, and
`{command}` runs it.

## How close it is to the original

Measured with onnxruntime {manifest["tools"]["onnxruntime"]} on {target["validated_on"]}, against the checkpoint in float32
({validation["reference"]["runtime"]}), on {figures["texts"]} texts.

| measure | value | gate |
| --- | --- | --- |
{rows}

`report.html` shows each text, and `validation.json` has the same for programs.

{card.intended(manifest)}## Limits

{card.limits(source["base_model"])} {_MIXING if not task.labels else ""}

{card.origin(manifest, words)}"""
