"""What a build came to, for machines: one JSON object, and JUnit's XML, which every CI system shows."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.artifact import VALIDATION, Artifact, Step, read_manifest
from pipeline.builds.report import Lines, Reporter
from pipeline.errors import GateError, QwenOnnxError

SCHEMA_VERSION = 1
# What XML 1.0 cannot hold, escaped or not.
_UNWRITABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Recorder:
    """A reporter that remembers each step: what it came to, and whether it was in the store.

    Attributes:
        reporter: the one that all is passed on to.
    """

    def __init__(self) -> None:
        self.reporter: Reporter = Lines()
        self._started = time.monotonic()
        self._found: dict[str, tuple[Artifact, bool]] = {}
        self._running = ""

    def hit(self, artifact: Artifact) -> None:
        # A walk that begins again, since something was damaged, meets what it has made before.
        self._found.setdefault(artifact.stage, (artifact, True))
        self.reporter.hit(artifact)

    def start(self, step: Step) -> None:
        self._running = step.stage
        self.reporter.start(step)

    def progress(self, stage: str, part: float, what: str) -> None:
        self.reporter.progress(stage, part, what)

    def done(self, artifact: Artifact) -> None:
        self._running = ""
        self._found[artifact.stage] = (artifact, False)
        self.reporter.done(artifact)

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def close(self) -> None:
        self.reporter.close()

    def summary(self, name: str, folder: Path | None = None, error: QwenOnnxError | None = None) -> dict[str, Any]:
        """The build so far.

        Args:
            name: of the recipe.
            folder: of the package, once it is there.
            error: what ended the build.

        Returns:
            ``name``, ``outcome`` (``built``, ``refused`` by a gate or ``failed``), ``exit_code``, ``seconds`` of this
            build, ``steps`` (their ``seconds`` are those of when they were made), ``gates``, ``package``, ``error`` and
            ``failed_step``; the last three are ``None`` where there is none.
        """
        outcome = "built" if error is None else "refused" if isinstance(error, GateError) else "failed"
        validated = self._found.get("validate")
        gates = json.loads((validated[0].path / VALIDATION).read_bytes())["gates"] if validated else []
        return {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "outcome": outcome,
            "exit_code": error.exit_code if error else 0,
            "seconds": round(time.monotonic() - self._started, 1),
            "steps": [_step(artifact, cached) for artifact, cached in self._found.values()],
            "gates": gates,
            "package": _package(folder) if folder else None,
            "error": error.as_dict() if error else None,
            "failed_step": (self._running or None) if error else None,
        }


def _step(artifact: Artifact, cached: bool) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "key": artifact.key,
        "digest": artifact.digest,
        "cached": cached,
        "seconds": artifact.seconds,
        "peak_memory": artifact.peak_memory,
        "bytes": artifact.size,
    }


def _package(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    sizes = {name: size for name, (size, _) in manifest.files.items()}
    return {"path": str(folder), "digest": manifest.digest, "bytes": sum(sizes.values()), "files": sizes}


def junit(summary: Mapping[str, Any]) -> str:
    """A summary as JUnit's XML: a suite of steps, and one of gates.

    The gates stand for the step ``validate``, which measures them together: each is given its share of the time. A step
    that was in the store counts as skipped, since nothing of it ran.
    """
    name, error = summary["name"], summary["error"]
    steps, gates = [], []
    for step in summary["steps"]:
        if step["stage"] == "validate" and summary["gates"]:
            continue
        case = _case(f"{name}.steps", step["stage"], 0.0 if step["cached"] else step["seconds"])
        if step["cached"]:
            ElementTree.SubElement(case, "skipped", message=f"in the store: {step['key'][:16]}")
        steps.append(case)
    if error and summary["outcome"] == "failed":
        case = _case(f"{name}.steps", summary["failed_step"] or "build", 0.0)
        found = ElementTree.SubElement(case, "error", message=_text(error["what"]), type=error["error"])
        parts = (("where", error["where"]), ("why", error["why"]), ("next", error["fix"]))
        found.text = _text("\n".join(f"{label}: {text}" for label, text in parts if text))
        steps.append(case)
    taken = next(
        (step["seconds"] for step in summary["steps"] if step["stage"] == "validate" and not step["cached"]), 0
    )
    for gate in summary["gates"]:
        path = f" ({gate['path']})" if gate["path"] else ""
        case = _case(f"{name}.gates", f"{gate['metric']}{path}", taken / len(summary["gates"]))
        sign = "at most" if gate["sense"] == "max" else "at least"
        text = f"{gate['metric']}{path} is {gate['value']:g}, the gate is {sign} {gate['bound']:g}"
        if gate["passed"]:
            ElementTree.SubElement(case, "system-out").text = _text(text)
        else:
            ElementTree.SubElement(case, "failure", message=_text(text), type="GateError").text = _text(text)
        gates.append(case)
    root = ElementTree.Element("testsuites", name=_text(name))
    for suite, cases in (("steps", steps), ("gates", gates)):
        if cases:
            root.append(_suite(f"{name}.{suite}", cases))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: str, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=_text(suite), name=_text(name), time=f"{seconds:.3f}")


def _suite(name: str, cases: list[ElementTree.Element]) -> ElementTree.Element:
    def count(kind: str) -> str:
        return str(sum(case.find(kind) is not None for case in cases))

    seconds = sum(float(case.attrib["time"]) for case in cases)
    counts = {"tests": str(len(cases)), "failures": count("failure"), "errors": count("error")}
    counts |= {"skipped": count("skipped"), "time": f"{seconds:.3f}"}
    suite = ElementTree.Element("testsuite", {"name": _text(name), **counts})
    suite.extend(cases)
    return suite


def _text(text: str) -> str:
    """``text`` without what XML cannot hold."""
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)
