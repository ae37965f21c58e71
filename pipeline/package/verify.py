"""Check a received package before anything in it is trusted.

The order matters: signature, the exact set of files, their digests, the manifest, the configuration's keys, the graphs'
external data, adapters; and only then, where asked for, is the model loaded and its golden transcript replayed. A check
that fails ends it. All of this runs on the standard library alone, see `pipeline.package.verify_script`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.artifact import Manifest, check_schema, load_manifest
from pipeline.errors import PackageError, QwenOnnxError, RuntimeMissing
from pipeline.package import (
    adapter_files,
    config as package_config,
    contents as package_files,
    graphs as package_graphs,
    signature,
)
from pipeline.package.signature import Signed

PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"
# Distributions of the two runtimes, the one for packages that generate text first.
_RUNTIMES = {
    True: (
        "onnxruntime-genai",
        "onnxruntime-genai-cuda",
        "onnxruntime-genai-directml",
        "onnxruntime-genai-winml",
    ),
    False: ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
}


@dataclass(frozen=True)
class Check:
    """How one check ended.

    Attributes:
        name: of the check.
        state: `PASSED`, `FAILED`, or `UNCHECKED` where it could not be made and nobody insisted.
        codes: what is wrong, for programs (`docs/verify.md`).
        text: the same for people; what was found where nothing is wrong.
    """

    name: str
    state: str
    codes: tuple[str, ...] = ()
    text: str = ""


@dataclass
class Received:
    """A package while it is checked, and what is known of it by then.

    Attributes:
        path: its directory.
        key: the public key that it should be signed with; ``None`` takes it unsigned.
        progress: called with the size of each block that was read.
    """

    path: Path
    key: Path | None = None
    progress: Callable[[int], None] | None = None
    signed: Signed | None = None
    loaded: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """Read by an earlier check."""
        assert self.loaded is not None
        return self.loaded


Step = tuple[str, Callable[[Received], str | Check]]
"""The name of a check, and what makes it: it raises, or returns what was found."""


@dataclass(frozen=True)
class Report:
    """All checks that were made, in order.

    Attributes:
        error: why the last one failed; ``None`` when none did.
    """

    manifest: Manifest | None
    checks: Sequence[Check] = field(default_factory=tuple)
    error: QwenOnnxError | None = None

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        named = {"name": self.manifest.data["name"], "digest": self.manifest.digest} if self.manifest else {}
        files = {"files": len(self.manifest.files) + 2} if self.manifest else {}
        checks = [{**asdict(check), "codes": list(check.codes)} for check in self.checks]
        return {**named, **files, "passed": self.error is None, "checks": checks}


def _signature(received: Received) -> str | Check:
    received.signed = signature.read(received.path, received.key)
    if received.signed is None:
        return Check("signature", UNCHECKED, ("signature.none",), "the package is not signed")
    if not received.signed.checked:
        return Check("signature", UNCHECKED, ("signature.unchecked",), "it is signed; --key says by whom it should be")
    more = "" if received.signed.subjects is None else ", and so is its provenance"
    return f"signed with the key that was given{more}"


def _files(received: Received) -> str:
    manifest = load_manifest(received.path)
    package_files.check_names(received.path, manifest, received.signed)
    received.loaded = manifest
    count = len(manifest.files) + 2 if received.signed is None else len(received.signed.files) + 1
    return f"{count} files, and no others"


def _digests(received: Received) -> str:
    package_files.check_digests(received.path, received.manifest, received.signed, received.progress)
    return "every file is as built"


def _manifest(received: Received) -> str:
    check_schema(received.path, received.manifest)
    return f"schema version {received.manifest.data['schema_version']}"


def _configuration(received: Received) -> str:
    package_config.check_settings(received.path, received.manifest)
    return "no key that makes a runtime load code or leave the package"


def _external_data(received: Received) -> str:
    package_graphs.check_external_data(received.path)
    return "inside the package"


def _adapters(received: Received) -> str:
    adapter_files.check_package(received.path, received.manifest)
    return f"{len(received.manifest.data.get('adapters', {}))}, all for this package"


def _license(received: Received) -> str:
    if "LICENSE" not in received.manifest.files:
        raise PackageError(
            f"{received.path} has no LICENSE", why="nobody may use weights without one", codes=["license.missing"]
        )
    return "LICENSE is there"


_BEFORE: tuple[Step, ...] = (
    ("signature", _signature),
    ("files", _files),
    ("digests", _digests),
    ("manifest", _manifest),
    ("configuration", _configuration),
    ("external data", _external_data),
    ("adapters", _adapters),
)
_AFTER: tuple[Step, ...] = (("license", _license),)


def inspect(received: Received, between: Sequence[Step] = ()) -> Report:
    """Make all checks in order, up to the first that fails.

    Args:
        between: what needs a runtime; made when everything that the runtime would read has been checked.
    """
    checks: list[Check] = []
    known = None
    for name, make in (*_BEFORE, *between, *_AFTER):
        try:
            made = _made(received, make)
        except QwenOnnxError as error:
            codes = error.codes or (f"{name.replace(' ', '-')}.refused",)
            checks.append(Check(name, FAILED, codes, error.why or error.what))
            return Report(known, checks, error)
        checks.append(made if isinstance(made, Check) else Check(name, PASSED, text=made))
        if name == "manifest":
            known = received.manifest
    return Report(known, checks)


def _made(received: Received, make: Callable[[Received], str | Check]) -> str | Check:
    if not received.path.is_dir():
        raise PackageError(
            f"there is no package directory {received.path}",
            fix="give the directory that `qwen-onnx build` wrote",
            codes=["files.missing"],
        )
    try:
        return make(received)
    except OSError as error:
        raise PackageError(f"{received.path} cannot be read", why=str(error), codes=["files.unreadable"]) from None


def package(folder: Path, progress: Callable[[int], None] | None = None, key: Path | None = None) -> Manifest:
    """All checks that need no runtime, in order; returns the manifest.

    Raises:
        PackageError: the first check that failed.
        UsageError: the key cannot be read.
    """
    received = Received(folder, key, progress)
    if error := inspect(received).error:
        raise error
    return received.manifest


def check_files(folder: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Check that a directory holds exactly the files of its manifest, unchanged; whoever signed it.

    Raises:
        PackageError: naming every file that is missing, added, changed, a link or otherwise special.
    """
    received = Received(folder, None, progress)
    for _, make in _BEFORE[:4]:
        _made(received, make)
    return received.manifest


def runtime(received: Received) -> str | Check:
    """The step that asks whether the installed runtime fits; where it does not, nothing can be loaded."""
    try:
        return check_runtime(received.manifest)
    except RuntimeMissing as error:
        return Check("runtime", UNCHECKED, error.codes, error.what)


def required_runtime(received: Received) -> str:
    """The same where the model is to be loaded."""
    return check_runtime(received.manifest)


def check_runtime(manifest: Manifest) -> str:
    """The installed runtime's version, if it is recent enough for the package.

    Raises:
        RuntimeMissing: it is absent or older than the manifest's ``runtime.minimum``.
    """
    minimum = ".".join(map(str, _version(str(manifest.data["runtime"].get("minimum", "0")))))
    names = _RUNTIMES[manifest.generates]
    installed = {entry.name: entry.version for name in names for entry in metadata.distributions(name=name)}
    if not installed:
        raise RuntimeMissing(
            f"{names[0]} is not installed", fix=f"pip install '{names[0]}>={minimum}'", codes=["runtime.missing"]
        )
    found = next(iter(installed.values()))
    if _version(found) < _version(minimum):
        raise RuntimeMissing(
            f"{names[0]} {found} is too old for the package",
            why=f"it needs {minimum}",
            fix=f"pip install '{names[0]}>={minimum}'",
            codes=["runtime.old"],
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
