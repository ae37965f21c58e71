"""Make a package again from its own manifest, and compare what comes out, file by file.

The manifest holds the resolved recipe; where a local checkpoint or adapter lay, it does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.artifact import CHECKSUMS, MANIFEST, SIGNED, VALIDATION, Artifact, Manifest, Step, graph_files
from pipeline.builds import plan, runner
from pipeline.builds.report import Reporter
from pipeline.builds.store import Store
from pipeline.documents import html_report
from pipeline.documents.bom import BOM
from pipeline.errors import CheckpointError, RuntimeMissing, UsageError
from pipeline.facts import recipe
from pipeline.facts.recipe import Checkpoint, Loaded, LocalSource, Recipe

DIFFERS = 22
"""The exit code, beside those of `pipeline.errors` and `pipeline.diff.rules`, when a file is not what it was."""
EQUAL, CHANGED, MISSING, ADDED, ALLOWED = "equal", "differs", "missing", "added", "allowed"
_SIGNING = "signing adds it to a package that is there, with a random number in it: it is not rebuilt"
_TOLD = "it tells the versions of the tools, and --other-versions were used"
# What names versions, or the digest of a file that does.
_TELLS_VERSIONS = (MANIFEST, CHECKSUMS, BOM, VALIDATION, html_report.REPORT, "NOTICE", "README.md")


@dataclass(frozen=True)
class Given:
    """What a manifest does not hold: where the checkpoint is now, and the directory of each adapter (``""`` merged)."""

    checkpoint: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """A file of the package: its state, and why it may differ where it does and may."""

    name: str
    state: str
    why: str = ""


@dataclass(frozen=True)
class Rebuilt:
    """What came out.

    Attributes:
        files: each file of either package, or of the stage that the rebuild ended with.
        steps: stage → whether its artifact has the digest that the manifest says.
        versions: tool → version then and now, where they are not the same.
    """

    files: tuple[Compared, ...]
    steps: Mapping[str, bool]
    versions: Mapping[str, tuple[str, str]]

    @property
    def equal(self) -> bool:
        """Whether no file differs that may not."""
        return all(file.state in (EQUAL, ALLOWED) for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "equal": self.equal,
            "files": [asdict(file) for file in self.files],
            "steps": dict(self.steps),
            "versions": {name: {"then": then, "now": now} for name, (then, now) in self.versions.items()},
        }


def loaded(manifest: Manifest, where: Path, given: Given) -> Loaded:
    """The recipe of a manifest, with what it does not tell put in.

    Raises:
        RecipeError: this version reads it no longer.
        UsageError: the checkpoint or an adapter has to be given, or cannot be.
    """
    value = dict(manifest.data["recipe"])
    wanted = recipe.read(value, where)
    _check_names(wanted, given)
    checkpoint = _with_checkpoint(wanted.checkpoint, manifest, where, given.checkpoint)
    if checkpoint.adapter:
        checkpoint = checkpoint.model_copy(update={"adapter": _adapter("", given)})
    changes: dict[str, Any] = {"checkpoint": checkpoint}
    if wanted.adapters is not None:
        apart = {name: it.model_copy(update={"path": _adapter(name, given)}) for name, it in wanted.adapters.items()}
        changes["adapters"] = apart
    return Loaded(str(manifest.data["name"]), where, wanted.model_copy(update=changes), value)


def _check_names(wanted: Recipe, given: Given) -> None:
    known = {*(wanted.adapters or {}), *([""] if wanted.checkpoint.adapter else [])}
    if unknown := sorted(given.adapters.keys() - known):
        raise UsageError(
            f"the package was built without the adapter {unknown[0]}".rstrip(),
            why=f"those it has: {', '.join(wanted.adapters or {}) or 'none'}",
            fix="--adapter NAME=DIR for those of the recipe's `adapters`, --adapter DIR for a merged one",
        )


def _with_checkpoint(spec: Checkpoint, manifest: Manifest, where: Path, given: Path | None) -> Checkpoint:
    elsewhere = [source for source in spec.sources if source.type != "local"]
    if given is None:
        if elsewhere:
            return spec.model_copy(update={"sources": tuple(elsewhere)})
        name = Path(next(source.path for source in spec.sources if source.type == "local")).name
        raise UsageError(
            "the package was built from a local checkpoint",
            where=str(where),
            why=f"its manifest tells the name `{name}` and the digest, not where it lay",
            fix="say where it is now: --checkpoint PATH",
        )
    if not given.exists():
        raise CheckpointError(f"there is no checkpoint at {given}", fix="correct --checkpoint")
    if elsewhere and manifest.data["source"].get("sha256") is None:
        raise UsageError(
            "the checkpoint cannot be given",
            where=str(where),
            why="the recipe pins it by a commit of the hub, and has no digest to compare it with",
            fix="leave out --checkpoint: it is fetched",
        )
    return spec.model_copy(update={"sources": (LocalSource(type="local", path=str(given.resolve())), *elsewhere)})


def _adapter(name: str, given: Given) -> str:
    if path := given.adapters.get(name):
        return str(path.resolve())
    raise UsageError(
        f"the package was built with {f'the adapter {name}' if name else 'an adapter merged into the checkpoint'}",
        why="its manifest does not tell where it lay",
        fix=f"say where it is now: --adapter {f'{name}=' if name else ''}DIR",
    )


def planned(manifest: Manifest, made: Loaded) -> tuple[list[Step], dict[str, tuple[str, str]]]:
    """The steps, and the tools whose version is not the manifest's: then and now, empty where one did not take part.

    Raises:
        CheckpointError: what was given is not what the package was built from.
        QwenOnnxError: as `plan.make`.
    """
    steps = plan.make(made)
    then, now = manifest.data.get("tools", {}), steps[-1].fields["tools"]
    wanted, found = manifest.data["source"].get("sha256"), steps[0].fields["sha256"]
    if wanted != found:
        raise CheckpointError(
            "this is not the checkpoint that the package was built from",
            where=f"expected sha256 {wanted}, got {found}",
            fix="give the one that it was built from with --checkpoint",
        )
    names = sorted({*then, *now})
    pairs = {name: (str(then.get(name, "")), str(now.get(name, ""))) for name in names}
    return steps, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_versions(versions: Mapping[str, tuple[str, str]]) -> None:
    """Refuse to rebuild with other tools.

    Raises:
        RuntimeMissing: naming each with both versions.
    """
    if versions:
        named = "; ".join(f"{name} {then or 'none'}, here {now or 'none'}" for name, (then, now) in versions.items())
        raise RuntimeMissing(
            "the package was built with other versions of the tools",
            why=named,
            fix="install those that it was built with, or take what is here with --other-versions",
        )


def until(steps: Sequence[Step], stage: str) -> list[Step]:
    """The steps up to that of ``stage``; all without one.

    Raises:
        UsageError: there is no such stage.
    """
    names = [step.stage for step in steps]
    if stage and stage not in names:
        raise UsageError(f"the package has no stage {stage}", fix=f"--until takes one of {', '.join(names)}")
    return list(steps[: names.index(stage) + 1]) if stage else list(steps)


def make(
    package: Path,
    manifest: Manifest,
    steps: Sequence[Step],
    versions: Mapping[str, tuple[str, str]],
    store: Store,
    reporter: Reporter,
) -> tuple[Rebuilt, Artifact]:
    """Run the steps in ``store`` and compare; returns also the last artifact.

    Raises:
        QwenOnnxError: as `runner.build`.
    """
    artifacts = runner.build(steps, store, reporter)
    last = artifacts[steps[-1].stage]
    told = manifest.data["steps"]
    known = {name: step["digest"] for name, step in told.items() if "digest" in step}
    same = {name: known[name] == made.digest for name, made in artifacts.items() if name in known}
    if last.stage == "package":
        then = {**{name: sha256 for name, (_, sha256) in manifest.files.items()}, **_unlisted(package)}
        now = {name: sha256 for name, (_, sha256) in last.files.items()}
    else:
        now = graph_files(last)
        then = {name: manifest.files[name][1] for name in now if name in manifest.files}
    return Rebuilt(tuple(_compare(then, now, bool(versions))), same, versions), last


def _unlisted(package: Path) -> dict[str, str]:
    """The digests of those files of a verified package that its manifest does not list."""
    names = [MANIFEST, CHECKSUMS, *(name for name in SIGNED if (package / name).is_file())]
    return {name: digest.of_file(package / name) for name in names}


def _compare(then: Mapping[str, str], now: Mapping[str, str], other_versions: bool) -> list[Compared]:
    found = []
    for name in sorted({*then, *now}):
        state = MISSING if name not in now else ADDED if name not in then else CHANGED
        if then.get(name) == now.get(name):
            found.append(Compared(name, EQUAL))
        elif name in SIGNED and state == MISSING:
            found.append(Compared(name, ALLOWED, _SIGNING))
        elif name in _TELLS_VERSIONS and other_versions:
            found.append(Compared(name, ALLOWED, _TOLD))
        else:
            found.append(Compared(name, state))
    return found
