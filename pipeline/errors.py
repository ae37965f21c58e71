"""The errors a user can meet, and the exit code of each.

    QwenOnnxError
    ├── UsageError        2   a command line or request that cannot be honoured
    ├── RecipeError       3   a recipe that is misspelt, ill-typed or impossible
    ├── CheckpointError   4   a checkpoint that is missing, damaged, refused or not what was pinned
    ├── DownloadError     5   bytes that could not be fetched
    ├── ResourceError     6   not enough memory or disk, or a disk that filled up
    ├── StageError        7   an export or quantization that failed or yielded something else
    ├── GateError         8   a model that does not reproduce its reference
    ├── PackageError      9   a package that fails verification
    ├── RuntimeMissing   10   a library or execution provider that is absent or does not fit
    └── StoreError       11   a store that cannot be used

0 is success, 1 a bug (with its traceback), 130 an interrupt.
"""

from __future__ import annotations

from collections.abc import Sequence

INTERRUPTED = 130


class QwenOnnxError(Exception):
    """What happened, and as far as known where, why, and what to do next.

    Args:
        what: one sentence without a full stop.
        where: file, line, key or step.
        why: the cause, or why it matters.
        fix: what the user can do.
        codes: what is wrong with a package, for programs (`docs/verify.md`).
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "", codes: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix
        self.codes = tuple(codes)

    def __str__(self) -> str:
        rows = [self.what]
        rows += [f"  {label}: {text}" for label, text in self._parts() if text]
        return "\n".join(rows)

    def _parts(self) -> tuple[tuple[str, str], ...]:
        return (("where", self.where), ("why", self.why), ("next", self.fix))

    def as_dict(self) -> dict[str, str]:
        """The parts, for machine-readable output and for crossing a process boundary."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "fix": self.fix,
        }


class UsageError(QwenOnnxError):
    """A command line or request that cannot be honoured."""

    exit_code = 2


class RecipeError(QwenOnnxError):
    """A recipe that is misspelt, ill-typed or impossible."""

    exit_code = 3


class CheckpointError(QwenOnnxError):
    """A checkpoint that is missing, damaged, refused or not what was pinned."""

    exit_code = 4


class DownloadError(QwenOnnxError):
    """Bytes that could not be fetched."""

    exit_code = 5


class ResourceError(QwenOnnxError):
    """Not enough memory or disk."""

    exit_code = 6


class StageError(QwenOnnxError):
    """An export or quantization that failed or yielded something else."""

    exit_code = 7


class GateError(QwenOnnxError):
    """A model that does not reproduce its reference."""

    exit_code = 8


class PackageError(QwenOnnxError):
    """A package that fails verification."""

    exit_code = 9


class RuntimeMissing(QwenOnnxError):  # noqa: N818 - what is missing is the runtime
    """A library or execution provider that is absent or does not fit."""

    exit_code = 10


class StoreError(QwenOnnxError):
    """A store that cannot be used."""

    exit_code = 11


ERRORS: dict[str, type[QwenOnnxError]] = {
    kind.__name__: kind
    for kind in (
        UsageError,
        RecipeError,
        CheckpointError,
        DownloadError,
        ResourceError,
        StageError,
        GateError,
        PackageError,
        RuntimeMissing,
        StoreError,
    )
}


def from_dict(data: dict[str, str]) -> QwenOnnxError:
    """The error that `QwenOnnxError.as_dict` described."""
    kind = ERRORS.get(data.get("error", ""), StageError)
    return kind(
        data.get("what", "unknown error"),
        where=data.get("where", ""),
        why=data.get("why", ""),
        fix=data.get("fix", ""),
    )
