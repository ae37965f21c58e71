"""The README.md and NOTICE of a package, written from facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.facts.machine import elsewhere
from pipeline.package.replay import PLUGINS
from pipeline.task import EMBED, GENERATE, RERANK

# Licences that model hubs know by name, in small letters; SPDX identifiers as recipes write them.
HUB_LICENSES = ("Apache-2.0", "MIT")
TOOLS_LICENSE = "LICENSE-qwen-onnx"  # of the scripts, where the model's licence is another
USE = {
    GENERATE: "Answers to what people or programs ask, on the device or server of whoever runs it, as the base model gives them",
    EMBED: "Vectors of texts, to find texts by their meaning",
    RERANK: "Scores of documents for a query, to order what a search has found",
}


def front_matter(manifest: Mapping[str, Any], library: str, tag: str) -> str:
    """The metadata block that model hubs read (YAML).

    Args:
        library: distribution that runs the package.
        tag: what hubs call its task.
    """
    source, target = manifest["source"], manifest["target"]
    known = source["license"] in HUB_LICENSES
    own = f"other\nlicense_name: {source['license'].lower()}\nlicense_link: LICENSE"
    languages = "".join(f"\n- {language}" for language in source["languages"]) or " []"
    return f"""---
base_model: {source["base_model"]}
base_model_relation: quantized
license: {source["license"].lower() if known else own}
library_name: {library}
pipeline_tag: {tag}
tags: [onnx, {library}, qwen, {target["name"]}]
language:{languages}
---"""


def limits(base_model: str) -> str:
    """What nobody should expect."""
    return (
        f"The model inherits the knowledge, the languages and the biases of {base_model}; quantization adds the loss that was "
        "measured. The figures hold for the texts they were measured on; measure on your own before you depend on them."
    )


def intended(manifest: Mapping[str, Any]) -> str:
    """The section on what a package is for, and what it is not for."""
    source = manifest["source"]
    spoken = ", ".join(source["languages"]) or "those of the base model"
    return f"""## Intended use

{USE[manifest.get("task", GENERATE)]}. Languages: {spoken}. What the licence and the card of {source["base_model"]} allow and warn of holds
here too. Not for decisions about people, their health or their rights without somebody who answers for them: the model can be
wrong, and sounds sure when it is.

"""


def readme(manifest: Mapping[str, Any], validation: Mapping[str, Any], weights: int) -> str:
    """The model card (Markdown with the metadata block that model hubs read).

    Args:
        manifest: all of ``manifest.json`` but its file list.
        validation: the content of ``validation.json``.
        weights: bytes of external data.
    """
    source, target, recipe = manifest["source"], manifest["target"], manifest["recipe"]
    words = scheme(recipe.get("quantize", {}))
    rows = "\n".join(
        f"| {path} | {figures['mean_kl']:.4f} | {figures['p99_kl']:.3f} | {figures['top1']:.1%} "
        f"| {figures['perplexity']:.3f} ({figures['perplexity_ratio']:.3f} ×) |"
        for path in ("prefill", "decode")
        if (figures := validation[path])
    )
    domains = "\n".join(
        f"| {name} | {figures['mean_kl']:.4f} | {figures['top1']:.1%} | {figures['perplexity_ratio']:.3f} |"
        for name, figures in validation["decode"]["domains"].items()
    )
    executed = f"{target['validated_on']} ({target['validated_device']})"
    if own := elsewhere(target["provider"], target["validated_on"], target["not_validated_on_target"]):
        executed += f", **not on {own}**: run `replay.py` on the device"
    sees = "images" in validation
    plugin = ""
    if found := PLUGINS.get(target["option"]):
        name, module = found
        plugin = f'import {module}\n\nog.register_execution_provider_library("{name}", {module}.get_library_path())'
    tag = "image-text-to-text" if sees else "audio-text-to-text" if "audio" in validation else "text-generation"
    return f"""{front_matter(manifest, "onnxruntime-genai", tag)}

# {manifest["name"]}

{recipe.get("description") or source["base_model"]}, as an ONNX package for onnxruntime-genai: {words}, {weights / 1e6:.0f} MB of weights,
for {target["title"]} ({target["provider"]}, {target["dtype"]} activations).

## Check it, then run it

    {manifest["runtime"]["install"]}
    python verify.py --replay

```python
import json
import onnxruntime_genai as og
{plugin}
model = og.Model(".")  # this directory
tokenizer = og.Tokenizer(model)
messages = json.dumps([{{"role": "user", "content": "Write a haiku about ONNX."}}])
prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + 200)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(prompt):]))
```

`verify.py` checks every file before anything is loaded ({_VERIFY}), and
`--key PUBLIC.pem` who signed it, where it is signed. `replay.py`, which it runs, needs only the runtime: it feeds the golden answers of `golden.jsonl` to your device and says, usually within a
minute, whether it computes what was validated: at least {manifest["replay"]["top1"]:.0%} of the tokens ranked first, log-probabilities
within {manifest["replay"]["logprob"]:g} nats on average. With qwen-onnx installed, `qwen-onnx verify DIR --replay` checks everything else too,
and `qwen-onnx generate DIR --prompt "..."` answers.

{_languages(validation, bool(plugin))}{_thinking(validation)}Text that users type can contain control tokens such as `<|im_end|>`. The runtime's own tokenizer would obey them;
`qwen-onnx generate` takes them as plain text.

## How close it is to the original

Measured with {validation["candidate"]["runtime"]} on {executed}, against the checkpoint in float32
({validation["reference"]["runtime"]}), on {validation["text"]["windows"]} windows of {validation["text"]["window_tokens"]} tokens of held-out text.
KL divergence is in nats a token.

| path | mean KL | p99 KL | top-1 agreement | perplexity (against the reference) |
| --- | --- | --- | --- | --- |
{rows}

| text (decode path) | mean KL | top-1 agreement | perplexity ratio |
| --- | --- | --- | --- |
{domains}

Greedy answers agree with the reference's for {validation["greedy"]["agreement"]:.0%} of {validation["greedy"]["tokens"]} tokens before the first
difference. `report.html` shows every figure, gate and answer, and `validation.json` has them for programs.

{_pictures(validation["images"]) if sees else ""}{_audio(validation)}{_adapters(manifest, validation)}{_npu(validation, manifest) if "npu" in validation else _openvino(target)}{intended(manifest)}## Limits

{limits(source["base_model"])}
{_extended(validation)}
{origin(manifest, words)}"""


_VERIFY = "it needs Python 3.11 alone, and `sha256sum --check SHA256SUMS` says half of it without"


def _languages(validation: Mapping[str, Any], plugin: bool) -> str:
    """How to run a package from other languages than Python; nothing where the runtime does not prepare the inputs."""
    if "audio" in validation:
        return ""
    register = " Register the provider's plugin first, as above." if plugin else ""
    return f"""### From C#, C++, Java and JavaScript

The same in the runtime's other bindings; `DIR` is this directory.{register}

```csharp
using Microsoft.ML.OnnxRuntimeGenAI;  // dotnet add package Microsoft.ML.OnnxRuntimeGenAI

using var model = new Model("DIR");
using var tokenizer = new Tokenizer(model);
var messages = "[{{\\"role\\": \\"user\\", \\"content\\": \\"Write a haiku about ONNX.\\"}}]";
using var prompt = tokenizer.Encode(tokenizer.ApplyChatTemplate("", messages, "", true));
using var parameters = new GeneratorParams(model);
parameters.SetSearchOption("max_length", prompt[0].Length + 200);
using var generator = new Generator(model, parameters);
generator.AppendTokenSequences(prompt);
using var stream = tokenizer.CreateStream();
while (!generator.IsDone()) {{
    generator.GenerateNextToken();
    Console.Write(stream.Decode(generator.GetNextTokens()[0]));
}}
```

```cpp
#include <iostream>
#include "ort_genai.h"  // link with onnxruntime-genai

int main() {{
    auto model = OgaModel::Create("DIR");
    auto tokenizer = OgaTokenizer::Create(*model);
    const char* messages = R"([{{"role": "user", "content": "Write a haiku about ONNX."}}])";
    auto prompt = OgaSequences::Create();
    tokenizer->Encode(tokenizer->ApplyChatTemplate("", messages, "", true), *prompt);
    auto parameters = OgaGeneratorParams::Create(*model);
    parameters->SetSearchOption("max_length", prompt->SequenceCount(0) + 200);
    auto generator = OgaGenerator::Create(*model, *parameters);
    generator->AppendTokenSequences(*prompt);
    auto stream = OgaTokenizerStream::Create(*tokenizer);
    while (!generator->IsDone()) {{
        generator->GenerateNextToken();
        std::cout << stream->Decode(generator->GetNextTokens()[0]) << std::flush;
    }}
}}
```

```java
import ai.onnxruntime.genai.*;

try (var model = new Model("DIR"); var tokenizer = new Tokenizer(model); var parameters = new GeneratorParams(model)) {{
    var messages = "[{{\\"role\\": \\"user\\", \\"content\\": \\"Write a haiku about ONNX.\\"}}]";
    var prompt = tokenizer.encode(tokenizer.applyChatTemplate("", messages, null, true));
    parameters.setSearchOption("max_length", prompt.getSequence(0).length + 200);
    try (var generator = new Generator(model, parameters); var stream = tokenizer.createStream()) {{
        generator.appendTokenSequences(prompt);
        int shown = prompt.getSequence(0).length;
        while (!generator.isDone()) {{
            generator.generateNextToken();
            var sequence = generator.getSequence(0);
            if (sequence.length > shown) System.out.print(stream.decode(sequence[shown++]));  // the end is not in it
        }}
    }}
}}
```

The runtime has no binding for JavaScript: a page or a Node program asks a server in OpenAI's protocol, such as `qwen-onnx serve DIR`.
Without a server, Node runs graphs for processors with onnxruntime-node: `deploy/samples` of qwen-onnx has a program that does, and these
as whole programs.

"""


def origin(manifest: Mapping[str, Any], words: str) -> str:
    """The section that says where a package comes from; ``words`` are of its quantization."""
    source = manifest["source"]
    return f"""## Where it comes from

| | |
| --- | --- |
| base model | {source["base_model"]} |
| checkpoint | sha256 `{source["sha256"]}` |
| licence | {source["license"]} (see `LICENSE` and `NOTICE`) |
| quantization | {words} |
| needs | {manifest["runtime"]["name"]} ≥ {manifest["runtime"]["minimum"]} |

`manifest.json` names the recipe, every step, every tool version and every file.
"""


def _extended(validation: Mapping[str, Any]) -> str:
    """What is known of positions beyond the window that the weights were trained for; nothing where there are none."""
    facts = validation.get("extended")
    if not facts:
        return ""
    known = f"nothing was measured beyond {facts['measured']} tokens"
    if long := validation.get("long"):
        known = (
            f"over the last {long['positions']} of {long['tokens']} tokens mean KL is {long['mean_kl']:.4f} and top-1 agreement "
            f"{long['top1']:.1%}, and nothing was measured beyond"
        )
    return f"""
The context was extended from {facts["original"]} to {facts["context"]} tokens (YaRN): {known}. Scaled positions also change
answers to short texts a little, in the original as here.
"""


def _thinking(validation: Mapping[str, Any]) -> str:
    """What is particular to models that can think before they answer, and leave it."""
    if not validation["chat_template"].get("thinking"):
        return ""
    return """The model thinks before it answers, between `<think>` and `</think>`, unless its chat template is told not to (`enable_thinking`),
which the runtime's own renderer cannot do: render `chat_template.jinja` yourself, or use `qwen-onnx generate --no-thinking`. It shows
thoughts apart from the answer, and `--thinking-budget N` ends them after N tokens. Leave thoughts out of earlier turns.

"""


def _pictures(found: Mapping[str, Any]) -> str:
    """What is particular to models that see."""
    return f"""## Pictures

    qwen-onnx generate DIR --image photo.png --prompt "What is this?"

Of {len(found["answers"])} questions about pictures that were drawn for it, the answers' mean KL divergence is {found["mean_kl"]:.4f} nats, top-1 agreement
{found["top1"]:.1%}; the features of the pictures have a cosine of at least {found["feature_cosine"]:.4f} with the original's. Pictures that need no resizing
are prepared exactly as the original prepares them. Others are not quite: sides that lie halfway between two sizes are rounded up,
where transformers rounds to even, and pixels are rounded in another order; a JPEG may decode to colours that differ by a few steps.

The runtime (onnxruntime-genai 0.14.1) reads PNG and JPEG. Given BMP, GIF, TIFF or WebP it **ends the process**, and a JPEG that is cut off
makes it wait for ever: check files before you hand them over, as `qwen-onnx generate` does. Give its processor one picture at a time, and put
the results together: it mixes up several pictures of different sizes without a word. `prepare` and `feed` in `replay.py` show how.
After an answer, `rewind_to` the last token and append it together with what follows.

"""


def _adapters(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """How to answer with the package's LoRA adapters, and how close that is; nothing for packages without slots."""
    if "adapters" not in manifest:
        return ""
    more = """`qwen-onnx adapter DIR PEFT_DIR --name NAME` converts another adapter of this checkpoint for this package, and
`qwen-onnx generate DIR --adapter FILE` answers with it; nobody has validated it then.
"""
    if not manifest["adapters"]:
        return f"## Adapters\n\nThe graph has slots for LoRA adapters, and none comes along.\n{more}\n"
    rows = "\n".join(
        f"| {name} | {facts['rank']} | {facts['license']} | {found['decode']['mean_kl']:.4f} "
        f"| {found['decode']['top1']:.1%} | {found['greedy']['agreement']:.0%} |"
        for name, facts in manifest["adapters"].items()
        for found in (validation["adapters"][name],)
    )
    name = next(iter(manifest["adapters"]))
    return f"""## Adapters

LoRA adapters lie beside the weights as `NAME.onnx_adapter`. One generator answers with one of them, or with none:

```python
adapters = og.Adapters(model)
adapters.load("{name}.onnx_adapter", "{name}")
generator = og.Generator(model, parameters)
generator.set_active_adapter(adapters, "{name}")  # once, before append_tokens
```

The runtime does not refuse a second adapter, nor one that comes after the prompt: the answer would be of a mixture. With
qwen-onnx installed, `qwen-onnx generate DIR --adapter {name} --prompt "..."` does it right.

Each was measured against the checkpoint in float32 with peft's own adapter, on the decode path:

| adapter | largest rank (those of q, k and v add up) | licence | mean KL | top-1 agreement | greedy agreement |
| --- | --- | --- | --- | --- | --- |
{rows}

{more}
"""


def _npu(validation: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """What is known of compiled graphs."""
    facts, npu = validation["npu"], manifest["recipe"]["npu"]
    nodes = "; ".join(
        f"{stage}: {', '.join(f'{count} on {provider}' for provider, count in counts.items())}"
        for stage, counts in facts.get("compiled_from", facts["placement"]).items()
    )
    shared = ""
    if npu.get("share_weights"):
        shared = """
Prefill and decode share one binary here. The emulator cannot load such a binary: what was executed are two binaries of the
same graphs. Run `replay.py` on the device before you depend on it.
"""
    return f"""## On the NPU

Compiled for {facts["soc"]} by onnxruntime-qnn, and executed with fallback to the processor disabled ({nodes}). The logits differ by at
most {facts["largest_difference"]:g} from those of the same graphs on the processor (the largest logit is {facts["largest_logit"]:g}; mean KL {facts["mean_kl"]:g}).
{shared}
A prompt is filled up to whole windows of {npu.get("window", 64)} tokens, which count towards the context length. Use a new generator for each
request: a pipeline neither rewinds nor takes a second prompt. Token id {facts["pad"]} must not be in a prompt.

"""


def _openvino(target: Mapping[str, Any]) -> str:
    """What is particular to packages for Intel's NPU; nothing for others."""
    if target["option"] != "OpenVINO":
        return ""
    return """## On the NPU

`model.onnx` hands everything to OpenVINO, which compiles `model.xml` for the NPU when the model is loaded; nothing falls back to
the processor. Set `device_type` in `genai_config.json` to `CPU` or `GPU` to run it there, or `replay.py --cpu` to check it on the
processor. The key-value cache belongs to the model, not to the generator: let one generator end before the next begins, and
serve one conversation at a time.

"""


def _audio(validation: Mapping[str, Any]) -> str:
    """What is known of how a package hears; nothing for others."""
    if not (found := validation.get("audio")):
        return ""
    return f"""## Sounds

    qwen-onnx generate DIR --audio clip.wav --prompt "What do you hear?"

WAV files of whole numbers at 16 kHz, at most 30 s each; `--audio` may be given again. On sounds made by code, spectrograms are within
{found["mel_difference"]:.0e} of transformers', features of the audio tower ({found["tower"]}) have a cosine of at least {found["feature_cosine"]:.5f} with PyTorch's, and along
the answers of the reference the mean KL divergence is {found["mean_kl"]:.4f}, top-1 agreement {found["top1"]:.1%}.

onnxruntime-genai has no type for this model. It runs it as `phi4mm`, whose own processor prepares other inputs: give it token ids, spectrograms
and sizes (`og.NamedTensors`, as `feed` in `replay.py` does), and a new generator for each sound that comes later.

"""


def notice(manifest: Mapping[str, Any], original: str = "") -> str:
    """Whose work this is, what was changed, and the notices that came along (section 4 of the Apache License)."""
    source = manifest["source"]
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest["tools"].items()))
    return f"""This package contains {source["base_model"]}, licensed under {source["license"]} (see LICENSE).

Changed from the original: the weights were converted to ONNX and quantized
({scheme(manifest["recipe"].get("quantize", {}))}). Made with {tools}.
Nothing of these tools is in the package but replay.py and verify.py, which are part of qwen-onnx, licensed under Apache-2.0
(see {"LICENSE" if source["license"] == "Apache-2.0" else TOOLS_LICENSE}). bom.cdx.json has the licence of each.
{_whose(manifest)}""" + (f"\nThe notices of the original:\n\n{original}" if original else "")


def _whose(manifest: Mapping[str, Any]) -> str:
    """The licences of adapters."""
    rows = [
        f"The adapter {name} is licensed under {facts['license']}."
        for name, facts in manifest.get("adapters", {}).items()
    ]
    return "\n".join(["", *rows, ""]) if rows else ""


def scheme(quantize: Mapping[str, Any]) -> str:
    """A few words on a scheme."""
    body = quantize.get("body")
    if not body:
        return {"none": "float weights", "dynamic": "INT8 weights and activations (dynamic)"}[quantize["algorithm"]]
    blocks = "by channel" if body["block_size"] == -1 else f"in blocks of {body['block_size']}"
    words = f"INT{body['bits']} weights {blocks} ({quantize['algorithm']})"
    words += {"static": ", 16-bit activations", "w8a8": ", 8-bit activations"}.get(quantize["algorithm"], "")
    if quantize["algorithm"] == "nncf" and "compress_config" in quantize.get("options", {}):
        words += ", INT8 for those that lose most"
    head = quantize.get("head")
    if head and head != body:
        words += f", INT{head['bits']} head"
    embedding = quantize.get("embedding")
    if embedding == "shared":
        words += ", shared with the embedding" if head and head != body else ", head shared with the embedding"
    elif isinstance(embedding, Mapping) and embedding != body:
        words += f", INT{embedding['bits']} embedding"
    others = sorted({entry["scheme"]["bits"] for entry in quantize.get("overrides") or ()} - {body["bits"]})
    if others:
        words += f", INT{' and INT'.join(map(str, others))} for some weights"
    return words
