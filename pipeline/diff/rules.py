"""What each difference between two releases of a package means for the app that uses them, and why: one table.

A release is judged by its worst difference. `docs/diff.md` shows this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COMPATIBLE, REVIEW, BREAKING = "compatible", "needs review", "breaking"
# Exit codes, beside those of `pipeline.errors`, by verdict from best to worst.
EXIT_CODES = {COMPATIBLE: 0, REVIEW: 20, BREAKING: 21}


@dataclass(frozen=True)
class Rule:
    """A kind of difference: what it is about, when it is found, its verdict, and the reason."""

    topic: str
    when: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Finding:
    """A difference: which rule it is of (a key of `RULES`), what differs, and how it was and is."""

    rule: str
    item: str
    old: Any
    new: Any

    @property
    def verdict(self) -> str:
        """What its rule says."""
        return RULES[self.rule].verdict

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rule = RULES[self.rule]
        facts = {"rule": self.rule, "topic": rule.topic, "item": self.item, "old": self.old, "new": self.new}
        return {**facts, "verdict": rule.verdict, "why": rule.why}


def verdict(findings: Iterable[Finding]) -> str:
    """The worst of all; compatible where nothing differs."""
    order = list(EXIT_CODES)
    return max((finding.verdict for finding in findings), key=order.index, default=COMPATIBLE)


# Figures that may differ without a word, because as much comes from measuring again: share of the old value, or
# difference. What is worse by more is for review, what is better by more is told.
KL_SHARE, KL_LEAST = 0.10, 0.001  # nats: below the least a share says nothing
TOP1_LESS = 0.005  # 10 of the 2048 positions that are measured
PERPLEXITY_MORE = 0.005
SPEED_SHARE = 0.10  # two benchmarks of one package on a quiet machine differ by less
SIZE_SHARE = 0.10

RULES: dict[str, Rule] = {
    "task": Rule("model", "it is made for another task", BREAKING, "an app that asks for text has no use for vectors"),
    "base": Rule(
        "model", "it is another base model", REVIEW, "another model answers otherwise, in ways no figure tells"
    ),
    "checkpoint": Rule(
        "model", "the checkpoint has another digest", REVIEW, "the weights were trained on, replaced or repaired"
    ),
    "architecture": Rule(
        "model", "layers, heads or sizes differ", REVIEW, "memory and speed change, and prompt caches do not carry over"
    ),
    "scheme": Rule("model", "it is quantized otherwise", COMPATIBLE, "what that costs is seen in quality and speed"),
    "tools": Rule(
        "model", "other versions of tools made it", COMPATIBLE, "what they changed is seen in the other rows"
    ),
    "schema": Rule(
        "model",
        "the manifest has another schema version",
        BREAKING,
        "installed versions of `verify` refuse a newer one",
    ),
    "languages": Rule("model", "other languages are named", REVIEW, "users of a language that is gone are affected"),
    "config.type": Rule(
        "config", "`model.type` differs", BREAKING, "the runtime picks the code that runs the graph by it"
    ),
    "config.context.less": Rule("config", "the context is shorter", BREAKING, "prompts that were taken are refused"),
    "config.context.more": Rule(
        "config", "the context is longer", COMPATIBLE, "prompts that were taken still are, though memory may grow"
    ),
    "config.tokens": Rule(
        "config", "ids of end, begin or padding differ", BREAKING, "an app that stops at these ids does not stop"
    ),
    "config.search": Rule(
        "config", "defaults of sampling differ", REVIEW, "an app that sets none gets other answers without a word"
    ),
    "config.other": Rule(
        "config", "another setting of genai_config.json differs", REVIEW, "settings decide where and how the graph runs"
    ),
    "tokenizer.moved": Rule(
        "tokenizer", "a token is gone, or has another id", BREAKING, "ids that an app keeps or compares mean other text"
    ),
    "tokenizer.added": Rule(
        "tokenizer", "tokens were added", REVIEW, "text that contains them is counted and split otherwise"
    ),
    "tokenizer.merges": Rule(
        "tokenizer", "merges differ", REVIEW, "texts beyond the probes may be split into other tokens"
    ),
    "tokenizer.special": Rule(
        "tokenizer", "control tokens differ", BREAKING, "apps and templates write and recognise them by name"
    ),
    "tokenizer.steps": Rule(
        "tokenizer",
        "normalizing, splitting or decoding differ",
        REVIEW,
        "texts beyond the probes may come out otherwise",
    ),
    "tokenizer.probes": Rule(
        "tokenizer", "a probe text has other ids", BREAKING, "lengths, limits and cached ids of an app no longer hold"
    ),
    "tokenizer.unchecked": Rule(
        "tokenizer", "probe texts could not be encoded", REVIEW, "whether ids are the same is then not known"
    ),
    "template": Rule("tokenizer", "the chat template differs", REVIEW, "the same conversation becomes another prompt"),
    "graph.interface": Rule(
        "graph",
        "graphs, inputs or outputs differ",
        BREAKING,
        "an app that runs the graph itself feeds it by name and type",
    ),
    "graph.operators": Rule(
        "graph", "it has types of operators that it had not", REVIEW, "an older runtime or provider may have no kernel"
    ),
    "graph.opset": Rule("graph", "it asks for a newer opset", REVIEW, "an older runtime refuses it"),
    "graph.counts": Rule(
        "graph",
        "operators of known types are more or fewer",
        COMPATIBLE,
        "kernels for them are there; speed tells the rest",
    ),
    "quality.worse": Rule(
        "quality", "a figure is worse by more than measuring again", REVIEW, "the owner decides whether it is worth it"
    ),
    "quality.better": Rule("quality", "a figure is better by as much", COMPATIBLE, "nothing is lost"),
    "quality.unmatched": Rule(
        "quality", "figures are missing, or of other texts", REVIEW, "they say nothing about the difference"
    ),
    "quality.gate": Rule(
        "quality", "a gate was loosened or removed", REVIEW, "what would have been refused before is let through"
    ),
    "golden.changed": Rule(
        "answers",
        "a golden prompt has another answer",
        REVIEW,
        "users see other words; stored expectations of tests fail",
    ),
    "golden.unmatched": Rule(
        "answers", "a golden prompt is new or gone", COMPATIBLE, "there is nothing to compare it with"
    ),
    "speed.slower": Rule(
        "speed", f"it is slower by more than {SPEED_SHARE:.0%}", REVIEW, "users wait longer; time-outs may strike"
    ),
    "speed.faster": Rule("speed", f"it is faster by more than {SPEED_SHARE:.0%}", COMPATIBLE, "nothing is lost"),
    "speed.memory": Rule(
        "speed", f"its peak memory grew by more than {SIZE_SHARE:.0%}", REVIEW, "small devices may no longer hold it"
    ),
    "speed.unmatched": Rule(
        "speed",
        "there are no benchmarks of both on one machine",
        COMPATIBLE,
        "speed is no contract; `bench` measures it",
    ),
    "size.larger": Rule(
        "size",
        f"it is larger by more than {SIZE_SHARE:.0%}",
        REVIEW,
        "downloads, disks and memory of devices are limited",
    ),
    "size.changed": Rule("size", "it has another size", COMPATIBLE, "within what releases differ by, or smaller"),
    "licence": Rule("licence", "the licence is another one", BREAKING, "what users may do with the model changes"),
    "licence.text": Rule("licence", "the licence's text differs", REVIEW, "terms may have changed under the same name"),
    "runtime": Rule("runtime", "another runtime is needed", BREAKING, "what the app has installed does not run it"),
    "runtime.raised": Rule(
        "runtime", "a newer runtime is the least", BREAKING, "an app with what was the least so far cannot load it"
    ),
    "runtime.lowered": Rule("runtime", "an older runtime is enough", COMPATIBLE, "what the app has runs it"),
    "provider": Rule("runtime", "another provider computes it", BREAKING, "the devices of its users may not have it"),
    "target": Rule(
        "runtime", "another field of the target differs", REVIEW, "it was made or validated for other devices"
    ),
    "replay": Rule("runtime", "the tolerance of the replay differs", REVIEW, "other devices pass than passed before"),
    "adapter.removed": Rule("adapters", "an adapter is gone", BREAKING, "an app that asks for it gets an error"),
    "adapter.changed": Rule("adapters", "an adapter has other weights", REVIEW, "answers with it change"),
    "adapter.added": Rule(
        "adapters", "an adapter came", COMPATIBLE, "an app that does not ask for it sees no difference"
    ),
    "files.removed": Rule("files", "a file is gone", REVIEW, "an app may read it, such as the vocabulary"),
    "files.added": Rule("files", "a file came", COMPATIBLE, "nothing reads it that did not ask for it"),
}


def table() -> str:
    """`RULES` as the rows of a Markdown table, for docs/diff.md."""
    rows = [f"| {rule.topic} | {rule.when} | {rule.verdict} | {rule.why} |" for rule in RULES.values()]
    return "\n".join(["| about | when | verdict | because |", "| --- | --- | --- | --- |", *rows])
