"""The page ``report.html`` of a package: what it is, what was measured of it, and what it is made of, for people.

Pages load nothing and run nothing: style and plots are inside, and a content security policy forbids all else. Answers
of models, texts of recipes and names are escaped by the template engine. The same package gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.documents import card, svg
from pipeline.errors import RuntimeMissing
from pipeline.facts.machine import elsewhere

REPORT = "report.html"
MARK = '<meta name="generator" content="qwen-onnx">'  # tells pages of ours from those of others
_DATA = Path(__file__).parent.parent / "data"
_PATHS = ("prefill", "decode")
_METRICS = {
    "finite": "all logits finite",
    "mean_kl": "mean KL divergence (nats)",
    "p99_kl": "99th percentile of KL divergence (nats)",
    "perplexity_ratio": "perplexity over the reference’s",
    "top1": "top-1 agreement",
    "routing": "experts chosen as the reference does",
    "expert_error": "largest error of one expert",
    "greedy": "greedy agreement",
    "pixel_error": "largest error of a normalized pixel",
    "mel_difference": "largest difference of spectrograms",
    "feature_cosine": "least cosine of a feature of an image or a sound",
    "runaway_answers": "answers that do not end",
    "adapter_effect": "share of the adapter’s effect",
    "eos_mismatches": "end tokens that differ",
    "cosine": "cosine with the reference’s vector, mean",
    "min_cosine": "cosine with the reference’s vector, smallest",
    "score_error": "difference from the reference’s score, largest",
    "ranking": "pairs of documents in the reference’s order",
    "batch_cosine": "cosine of a padded batch with its texts alone, smallest",
    "batch_score_error": "difference of a padded batch from its texts alone",
    "tokenizer_mismatches": "tokenizer: unexplained differences",
    "chat_template_mismatches": "chat template: unexplained differences",
}
_WHOSE = {"runtime": "the runtime’s", "served": "qwen-onnx’s"}


def page(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """The page of one package (HTML).

    Args:
        manifest: the content of ``manifest.json``; ``quantization``, the facts of that step, may be missing.
        validation: the content of ``validation.json``.

    Raises:
        RuntimeMissing: jinja2 is not installed.
        LookupError, TypeError, ValueError, AttributeError: the two do not follow their schema.
    """
    return render(
        "report.html.jinja",
        package=summary(manifest, validation),
        manifest=manifest,
        validation=validation,
        quantized=manifest.get("quantization", {}),
        locations=[_location(entry) for entry in manifest["source"]["locations"]],
        figures=_figures(validation),
        npu_nodes=_nodes(validation.get("npu", {"placement": {}})),
        answers=[_answer(entry) for entry in _answers(validation)],
        parity=_parity(validation),
        counts=_counts(manifest.get("quantization", {})),
        recipe=_yaml(manifest["recipe"]),
        report=REPORT,
    )


def summary(manifest: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
    """What both pages tell of a package, as texts and plots; raises as `page` does."""
    target, figures = manifest["target"], validation.get("decode")
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    weights = sum(size for name, size in sizes.items() if name.endswith((".data", ".bin")))
    bits = manifest.get("quantization", {}).get("bits_per_weight")
    gates = [_gate(gate) for gate in validation["gates"]]
    passed = sum(gate["passed"] for gate in gates)
    tiles = [_tile("Weights", f"{weights / 1e6:,.0f} MB", f"of {sum(sizes.values()) / 1e6:,.0f} MB in all")]
    tiles += [_tile("Bits a weight", f"{bits:.2f}", "scales and zero points included")] if bits else []
    if figures:
        tiles += [
            _tile("Mean KL", nats(figures["mean_kl"]), "nats a token, decode path"),
            _tile("Top-1 agreement", f"{figures['top1']:.1%}", "of tokens, decode path"),
            _tile("Perplexity", f"{figures['perplexity_ratio']:.3f} ×", "the reference’s, decode path"),
        ]
    if found := validation.get("retrieval"):
        tiles += [_tile(term, f"{found[name]:.4f}", note) for name, (term, note) in _RETRIEVAL.items() if name in found]
    tiles.append(_tile("Gates", f"{passed} of {len(gates)}", "passed"))
    return {
        "name": manifest["name"],
        "description": manifest["recipe"].get("description") or manifest["source"]["base_model"],
        "scheme": card.scheme(manifest["recipe"].get("quantize", {})),
        "target": target["name"],
        "executed": f"{target['validated_on']} ({target['validated_device']})",
        "warning": _warning(target),
        "passed": validation["passed"] is True and passed == len(gates),
        "gates": gates,
        "gates_passed": passed,
        "tiles": tiles,
        "megabytes": f"{weights / 1e6:,.0f}",
        "bits": f"{bits:.2f}" if bits else "–",
        "kl": nats(figures["mean_kl"]) if figures else "–",
        "top1": f"{figures['top1']:.1%}" if figures else "–",
        "ratio": f"{figures['perplexity_ratio']:.3f}" if figures else "–",
        "domains_plot": _domains_plot(validation),
    }


def render(template: str, **values: Any) -> str:
    """Fill a template of ``pipeline/data``; every value is escaped unless the template says otherwise.

    Raises:
        RuntimeMissing: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RuntimeMissing("jinja2 is not installed", why=str(error), fix="pip install '.[serve]'") from None
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: svg.visible(value) if type(value) is str else value,
        keep_trailing_newline=True,
        loader=jinja2.FileSystemLoader(_DATA),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"nats": nats, "percent": lambda value: f"{value:.1%}"}
    style = (_DATA / "report.css").read_text(encoding="utf-8")
    known = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    values |= {"mark": MARK, "style": style, "style_hash": f"sha256-{known}", "version": __version__}
    return environment.get_template(template).render(values)


def nats(value: float) -> str:
    """A divergence with as many digits as mean something."""
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


# What is measured of packages that embed or rank: term and note.
_RETRIEVAL = {
    "cosine": ("Cosine", "with the reference’s vectors, on average"),
    "min_cosine": ("Smallest cosine", "of all texts"),
    "score_error": ("Score", "largest difference from the reference’s"),
    "ranking": ("Ranking", "share of pairs in the reference’s order"),
}


def _tile(term: str, value: str, note: str) -> dict[str, str]:
    return {"term": term, "value": value, "note": note}


def _warning(target: Mapping[str, Any]) -> str:
    """That a package was not executed on its own hardware, and why; empty when it was."""
    missing = target["not_validated_on_target"]
    if own := elsewhere(target["provider"], target["validated_on"], missing):
        return f"Not executed on {own}: {missing}."
    if "emulator" in target["validated_device"] or "software" in target["validated_device"]:
        return f"Executed on {target['validated_device']}, not on the hardware it is for."
    return ""


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "metric": _METRICS.get(gate["metric"], gate["metric"]),
        "path": _WHOSE.get(gate["path"], gate["path"]),
        "value": f"{gate['value']:.4g}",
        "bound": f"{'≤' if gate['sense'] == 'max' else '≥'} {gate['bound']:g}",
        "passed": gate["passed"] is True,
    }


def _domains_plot(validation: Mapping[str, Any]) -> str:
    """Mean KL by text, with the gate of the mean over all; empty when nothing was measured."""
    paths = [path for path in _PATHS if path in validation]
    if not paths:
        return ""
    names = {"all texts": None, **{name: name for name in validation[paths[0]]["domains"]}}
    groups = []
    for label, name in names.items():
        found = {path: validation[path]["domains"][name] if name else validation[path] for path in paths}
        groups.append(
            svg.Group(
                label,
                [
                    svg.Bar(found[path]["mean_kl"], f"{nats(found[path]['mean_kl'])} {path}", kind)
                    for path, kind in zip(_PATHS, "ab", strict=True)
                    if path in found
                ],
            )
        )
    bounds = [gate["bound"] for gate in validation["gates"] if gate["metric"] == "mean_kl"]
    told = "; ".join(f"{group.label}: {', '.join(bar.text for bar in group.bars)}" for group in groups)
    return svg.bars("Mean KL divergence by text", told, groups, bounds[0] if bounds else None)


def _location(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "hub":
        file = f", file {entry['file']}" if entry.get("file") else ""
        return f"Hugging Face hub: {entry['repo']} at revision {entry['revision']}{file}"
    return f"Python package index: {', '.join(wheel['requirement'] for wheel in entry['wheels'])}"


def _figures(validation: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for path in _PATHS:
        found = validation.get(path)
        for name, entry in {"all texts": found, **found["domains"]}.items() if found else ():
            cells = [
                f"{entry['positions']:,}",
                nats(entry["mean_kl"]),
                f"{entry['p99_kl']:.3f}",
                f"{entry['top1']:.1%}",
            ]
            cells += [f"{entry[key]:.3f}" for key in ("reference_perplexity", "perplexity", "perplexity_ratio")]
            rows.append({"path": path, "text": name, "cells": cells})
    return rows


def _nodes(npu: Mapping[str, Any]) -> int:
    """How many nodes the compiled graphs were made from."""
    return sum(sum(counts.values()) for counts in npu.get("compiled_from", npu["placement"]).values())


def _answers(validation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All answers: to texts, about pictures, and on sounds."""
    for section in ("greedy", "images", "audio"):
        for entry in validation.get(section, {}).get("answers", ()):
            question = f": {entry['question']}" if "question" in entry else ""
            yield {**entry, "name": f"{entry['name']}{question}"}


def _answer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Both answers, cut where their texts part."""
    reference, own = entry["reference"], entry["answer"]
    length = next((at for at, pair in enumerate(zip(reference, own, strict=False)) if pair[0] != pair[1]), None)
    same = reference[:length] if length is not None else min(reference, own, key=len)
    if any(text[len(same) :][:1].isalnum() for text in (reference, own)):  # not in the middle of a word
        same = same.rstrip(string.ascii_letters + string.digits)
    at = entry["first_divergence"]
    return {
        "name": entry["name"],
        "identical": at is None and reference == own,
        "verdict": "identical" if at is None else f"same for {at} tokens ({entry['agreement']:.0%} of the reference’s)",
        "same": same,
        "reference": reference[len(same) :],
        "own": own[len(same) :],
        "reference_end": "" if entry["reference_ended"] else " (cut here)",
        "own_end": "" if entry["ended"] else " (cut here)",
    }


def _parity(validation: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, what, count in (("tokenizer", "tokenizer", "probes"), ("chat_template", "chat template", "conversations")):
        found = validation.get(key, {})
        for who, whose in _WHOSE.items() if key in validation else ():
            if who not in found:
                continue
            differences = [
                {"name": entry["name"], "reason": entry.get("reason", "no known reason: a miss")}
                for entry in found[who]
            ]
            same = found[count] - len({difference["name"] for difference in differences})
            rows.append({"what": what, "whose": whose, "same": same, "all": found[count], "differences": differences})
    return rows


def _counts(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of how many weights there are of each scheme, and operators of each type; most first."""
    given = (
        ("weights", "Weights by scheme: bits / block size", "Scheme"),
        ("operators", "Operators of the graph", "Operator"),
    )
    return [
        {"caption": caption, "what": what, "rows": sorted(facts[key].items(), key=lambda row: (-row[1], row[0]))}
        for key, caption, what in given
        if facts.get(key)
    ]


def _yaml(value: Any) -> str:
    import yaml

    # Sorted as in manifest.json: the order of a recipe's keys means nothing, and must not change a package.
    return str(yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=100))
