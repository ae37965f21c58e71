"""Answering with an adapter: the one that a session's generators all have, from their first token on.

The runtime lets a generator take several adapters, or one in the middle of an answer, and mixes what they compute
without a word. Here a session has one adapter or none, and `pipeline.runtime.generate.start` activates it before a
prompt is fed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.artifact import read_manifest
from pipeline.errors import PackageError, UsageError
from pipeline.package import adapter_files
from pipeline.package.adapter_files import ENDING
from pipeline.runtime import session as sessions
from pipeline.runtime.session import Session


def find(package: Path, given: str) -> Path:
    """The file of an adapter: of the package's own by its name, or any other by its path.

    Raises:
        UsageError: there is no such adapter.
    """
    if given.endswith(ENDING):
        if Path(given).is_file():
            return Path(given)
        raise UsageError(f"there is no adapter file {given}")
    known = adapter_files.names(package)
    if given not in known:
        raise UsageError(
            f"{package} has no adapter `{given}`",
            why=f"it has {', '.join(known) or 'none'}",
            fix=f"name one of them, or give the path of a file (…{ENDING}) that `qwen-onnx adapter` wrote",
        )
    return package / f"{given}{ENDING}"


def check(package: Path, file: Path) -> None:
    """Check a file from elsewhere against a package: what is said of it, and its bytes.

    Raises:
        PackageError: it is not for this package, or is not what was converted.
    """
    adapter_files.check(file, package, adapter_files.base_of(read_manifest(package)))


def activate(session: Session, file: Path) -> Session:
    """A session whose generators have the adapter in ``file``; the model is the same one, loaded once.

    Raises:
        PackageError: the file does not fit the graph, or the runtime does not take it.
        UsageError: the session has an adapter already, or its kind of model takes none.
    """
    if session.adapter:
        raise UsageError(
            f"the session has the adapter {session.adapter} already",
            why="of two adapters the runtime would compute a mixture",
            fix="begin with the session without one",
        )
    if problem := adapter_files.unsuited(session.config):
        raise UsageError(f"{session.package} takes no adapters", why=problem)
    described, known = adapter_files.read_description(file), adapter_files.slots(session.package)
    if absent := sorted(described.ranks.keys() - known.keys()):
        raise PackageError(f"{file.name} does not fit {session.package}", why=f"the graph has no slot {absent[0]}")
    adapter_files.check_tensors(file, described, known)
    try:
        loaded = sessions.runtime().Adapters(session.model)
        loaded.load(str(file), described.name)
    except Exception as error:  # the binding raises bare exceptions of the C++ side
        raise PackageError(f"{file.name} cannot be loaded", where=str(file), why=str(error).split("\n")[0]) from None
    return replace(session, adapter=described.name, adapters=loaded)
