"""Telling what goes on: bars on a terminal, plain lines in CI, JSON events for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifact import VALIDATION, Artifact, Need, Step, read_manifest
from pipeline.errors import QwenOnnxError
from pipeline.facts.machine import Execution, elsewhere
from pipeline.facts.target import Target


class Reporter(Protocol):
    """What the runner tells."""

    def hit(self, artifact: Artifact) -> None:
        """A step was found in the store."""

    def start(self, step: Step) -> None:
        """A step begins."""

    def progress(self, stage: str, part: float, what: str) -> None:
        """A step is at ``part`` in [0, 1]."""

    def done(self, artifact: Artifact) -> None:
        """A step has been made and stored."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """Nothing more will be told."""


class Lines:
    """One line for each thing that happens, and one every half minute of a long step."""

    def __init__(self) -> None:
        self._last = 0.0

    def hit(self, artifact: Artifact) -> None:
        print(f"{artifact.stage:<11} cached    {artifact.key[:12]}", flush=True)

    def start(self, step: Step) -> None:
        self._last = time.monotonic()
        print(f"{step.stage:<11} running   {step.key[:12]}  (about {step.estimate.seconds} s)", flush=True)

    def progress(self, stage: str, part: float, what: str) -> None:
        if time.monotonic() - self._last > 30:
            self._last = time.monotonic()
            print(f"{stage:<11} {part:7.0%}   {what}", flush=True)

    def done(self, artifact: Artifact) -> None:
        print(f"{artifact.stage:<11} done      {artifact.key[:12]}  {summary(artifact)}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Bars:
    """A live bar for the running step; finished steps stay as lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console()
        self._bars = Progress(
            TextColumn("{task.fields[stage]:<11}"),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._bars.start()

    def hit(self, artifact: Artifact) -> None:
        self._console.print(f"{artifact.stage:<11} [cyan]cached[/]  {artifact.key[:12]}", highlight=False)

    def start(self, step: Step) -> None:
        self._task = self._bars.add_task(f"about {step.estimate.seconds} s", total=1.0, stage=step.stage)

    def progress(self, stage: str, part: float, what: str) -> None:  # noqa: ARG002
        from rich.markup import escape

        self._bars.update(self._task, completed=part, description=escape(what))

    def done(self, artifact: Artifact) -> None:
        self._bars.remove_task(self._task)
        line = f"{artifact.stage:<11} [green]done[/]    {artifact.key[:12]}  {summary(artifact)}"
        self._console.print(line, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bars.stop()


class Events:
    """One JSON object a line."""

    def hit(self, artifact: Artifact) -> None:
        self.emit("hit", stage=artifact.stage, key=artifact.key, digest=artifact.digest)

    def start(self, step: Step) -> None:
        self.emit("start", stage=step.stage, key=step.key)

    def progress(self, stage: str, part: float, what: str) -> None:
        self.emit("progress", stage=stage, part=round(part, 4), what=what)

    def done(self, artifact: Artifact) -> None:
        self.emit(
            "done",
            stage=artifact.stage,
            key=artifact.key,
            digest=artifact.digest,
            seconds=round(artifact.seconds, 1),
            peak_memory=artifact.peak_memory,
            bytes=artifact.size,
            facts=dict(artifact.facts),
        )

    def note(self, text: str) -> None:
        self.emit("note", text=text)

    def close(self) -> None:
        pass

    def emit(self, event: str, **data: Any) -> None:
        """Write one event."""
        print(json.dumps({"event": event, **data}, ensure_ascii=False), flush=True)


def reporter(as_json: bool) -> Reporter:
    """The reporter for where standard output goes."""
    if as_json:
        return Events()
    return Bars() if sys.stdout.isatty() else Lines()


def summary(artifact: Artifact) -> str:
    """Seconds, peak memory, size on disk and, where there are any, bits per weight."""
    parts = [
        f"{artifact.seconds:.0f} s",
        f"peak {_bytes(artifact.peak_memory)}",
        _bytes(artifact.size),
    ]
    if "bits_per_weight" in artifact.facts:
        parts.append(f"{artifact.facts['bits_per_weight']:.2f} bits/weight")
    return ", ".join(parts)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def show_error(error: QwenOnnxError, as_json: bool) -> None:
    """Write an expected error: to standard error for people, as an event for machines."""
    if as_json:
        Events().emit("error", exit_code=error.exit_code, **error.as_dict())
    else:
        print(f"error: {error}", file=sys.stderr)


def plan(name: str, steps: Sequence[Step], cached: Mapping[str, Artifact | None], needed: Need) -> str:
    """The steps of a recipe, and what is still needed to make them."""
    rows = []
    for step in steps:
        hit, estimate = cached[step.stage], step.estimate
        cost = (f"{estimate.memory / 1e9:.1f} GB", f"{estimate.disk / 1e9:.1f} GB", f"{estimate.seconds} s")
        rows.append((step.stage, step.key[:12], "cached" if hit else "to do", *(("", "", "") if hit else cost)))
    lines = [name, table(rows, ("STEP", "KEY", "STATE", "MEMORY", "DISK", "TIME"))]
    if any(hit is None for hit in cached.values()):
        lines.append(
            f"needs about {needed.memory / 1e9:.1f} GB of memory ({needed.free_memory / 1e9:.1f} free), "
            f"{needed.disk / 1e9:.1f} GB of disk ({needed.free_disk / 1e9:.1f} free), {needed.seconds} s on two cores"
        )
    return "\n".join(lines)


def validation(data: Mapping[str, Any]) -> str:
    """A validation on one screen: every gate, the domains, the greedy answers."""
    rows = []
    for gate in data["gates"]:
        sign = "<=" if gate["sense"] == "max" else ">="
        mark = "pass" if gate["passed"] else "FAIL"
        rows.append((mark, gate["metric"], gate["path"], f"{gate['value']:.4g}", f"{sign} {gate['bound']:g}"))
    reference, candidate = data["reference"], data["candidate"]
    lines = [
        f"reference: {reference['runtime']}, {reference['dtype']}",
        f"measured:  {candidate['runtime']} on {candidate['executed_on']} ({candidate['device']})",
        *_elsewhere(candidate),
        table(rows, ("", "METRIC", "PATH", "VALUE", "GATE")),
    ]
    if found := data.get("retrieval"):
        return "\n".join([*lines, f"{found['texts']} texts, one by one and in padded batches"])
    if data["finite"]:
        domains = data["decode"]["domains"].items()
        lines.append("mean KL by text: " + ", ".join(f"{name} {figures['mean_kl']:.4f}" for name, figures in domains))
    if audio := data.get("audio"):
        lines.append(f"answers on sounds: mean KL {audio['mean_kl']:.4f}, cosine {audio['feature_cosine']:.6f}")
    if npu := data.get("npu"):
        nodes = sum(sum(counts.values()) for counts in npu.get("compiled_from", npu["placement"]).values())
        lines.append(
            f"compiled for {npu['soc']} from {nodes} nodes, none of them on the processor;\nlogits within "
            f"{npu['largest_difference']:.3g} of the uncompiled graphs' (largest {npu['largest_logit']:.3g})"
        )
    if found := data.get("images"):
        lines.append(
            f"pictures: features within cosine {found['feature_cosine']:.4f}, "
            f"mean KL of answers {found['mean_kl']:.4f}, top-1 {found['top1']:.1%}"
        )
    same = [answer["name"] for answer in data["greedy"]["answers"] if answer["first_divergence"] is None]
    lines.append(f"greedy answers identical to the reference's: {len(same)} of {len(data['greedy']['answers'])}")
    return "\n".join(lines)


def _elsewhere(candidate: Mapping[str, Any]) -> list[str]:
    """A line that says so when a validation ran on another provider or device than the package is for."""
    missing = candidate.get("not_executed_on_target", "")
    own = elsewhere(candidate["provider"], candidate["executed_on"], missing)
    return [f"           NOT on {own}: {missing}"] if own else []


def targets(found: Sequence[tuple[Target, Execution]]) -> str:
    """The capability table: what each target is, and what this machine can do for it."""
    rows = []
    for target, execution in found:
        weights = [f"INT{bits}" for bits in (target.kernels.block_sizes if target.kernels else ())]
        newest = f"= {target.runtime.newest}" if target.runtime.newest else f">= {target.runtime.minimum}"
        rows.append(
            (
                target.name,
                target.provider,
                "/".join(target.dtypes),
                "/".join([*weights, *_other_schemes(target)]),
                target.shapes,
                f"{target.runtime.package} {newest}",
                "no" if target.missing else "yes",
                "no" if target.missing or execution.missing else "yes",
                "" if target.missing else execution.label(),
            )
        )
    header = ("TARGET", "PROVIDER", "IO", "SCHEMES", "SHAPES", "RUNTIME", "BUILT HERE", "EXECUTED HERE", "EXECUTED ON")
    reasons = [
        (target.name, target.missing or execution.missing)
        for target, execution in found
        if target.missing or execution.missing
    ]
    return table(rows, header) + "\n\nwhy not on their own hardware here:\n" + table(reasons, ("TARGET", "REASON"))


def _other_schemes(target: Target) -> list[str]:
    plain = "float16" in target.dtypes and "none" in target.algorithms
    return ["W8A8"] * ("w8a8" in target.algorithms) + ["FP16"] * plain


def bench(data: Mapping[str, Any]) -> str:
    """The figures of a benchmark, those of the first subject over each other one's, and who is absent."""
    first = data["subjects"][0]
    speeds = [(path, length) for path in ("prefill", "decode") for length in first[path]]
    rows, ratios = [], []
    for entry in data["subjects"]:
        speed = (f"{entry[path][length]:.{1 if path == 'decode' else 0}f}" for path, length in speeds)
        times = (f"{entry['time_to_first_token']:.2f}", f"{entry['load']:.1f}")
        sizes = (f"{entry[name] / 1e6:.0f}" for name in ("peak_memory", "bytes"))
        far = (f"{entry[name]:.4f}" for name in ("mean_kl", "perplexity_ratio") if entry[name] is not None)
        rows.append((entry["name"], *speed, *times, *sizes, *far))
        if entry["ratios"]:
            names = [f"{path}_{length}" for path, length in speeds] + ["time_to_first_token", "load", "peak_memory"]
            ratios.append((entry["name"], *(f"{entry['ratios'][name]:.2f}" for name in names)))
    header = [f"{path.upper()} {length}" for path, length in speeds] + ["FIRST s", "LOAD s", "PEAK MB"]
    measured = ["MEAN KL", "PPL RATIO"] if first["mean_kl"] is not None else []
    machine = data["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['system']}",
        f"medians of {data['rounds']} interleaved runs; tokens/s at prompt lengths and depths of context:",
        table(rows, ("", *header, "SIZE MB", *measured)),
    ]
    if ratios:
        lines += ["", f"{first['name']} / the other, median of the ratios of each round:", table(ratios, ("", *header))]
    lines += [f"\nabsent: {entry['name']}: {entry['why']}" for entry in data["absent"]]
    return "\n".join(lines)


def package(folder: Path) -> str:
    """What was built and how good it is."""
    manifest = read_manifest(folder)
    size = sum(length for length, _ in manifest.files.values())
    weights = sum(length for name, (length, _) in manifest.files.items() if name.endswith((".data", ".bin")))
    measured = validation(json.loads((folder / VALIDATION).read_bytes()))
    return f"\n{measured}\n\npackage {folder}: {size / 1e6:.0f} MB, of which weights {weights / 1e6:.0f} MB"


def next_steps(folder: Path) -> str:
    """What to do with a package."""
    asked = {
        "generate": f'generate {folder} --prompt "..."     ask it something',
        "embed": f'embed {folder} --text "..."     a vector',
        "rerank": f'rerank {folder} --query "..." --document "..."     a score',
    }[read_manifest(folder).task]
    return (
        f"\nnext:  qwen-onnx {asked}\n"
        f"       qwen-onnx verify {folder} --replay           check it, here or where it is received\n"
        f"       {folder / 'README.md'}                       how an app loads it"
    )


def attribution(found: Mapping[str, Any], most: int = 10) -> str:
    """Losses by step, and the weights that lose most."""
    stages = [(stage["name"], f"{stage['kl']:.4f}") for stage in found["stages"]]
    rows = sorted(found["rows"], key=lambda row: -row["kl"])
    alone = sum(row["kl"] for row in rows) or 1.0
    shown = [
        (row["path"], f"{row['bits']}-bit/{row['block_size']}", f"{row['kl']:.5f}", f"{row['kl'] / alone:.1%}")
        for row in rows[:most]
    ]
    return "\n".join(
        (
            f"mean KL {found['total_kl']:.4f} nats a token",
            table(stages, ("STEP", "KL")),
            "",
            f"the {len(shown)} weights of {len(rows)} that lose most, each alone:",
            table(shown, ("WEIGHT", "SCHEME", "KL", "OF ALL")),
        )
    )


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Rows as aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
