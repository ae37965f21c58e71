"""Locking: a recipe that names a branch or tag of the hub gets the commit that it is now, and the digest of its files.

Both are written into the recipe itself, where the source stands, and nothing else of the file changes. A lock file
beside it would be a second truth, and one for each of the recipes that share a `_model.yaml`; so one diff shows what
has moved, and all that reads recipes knows nothing of locks.

The digest costs no weights: the hub lists the sha256 of large files, and only small ones are fetched.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import digest, files
from pipeline.checkpoint import download, files as checkpoint_files
from pipeline.errors import CheckpointError, DownloadError, RecipeError
from pipeline.facts import recipe as recipes, strict_yaml
from pipeline.facts.recipe import Checkpoint, HubSource, Loaded
from pipeline.facts.strict_yaml import Loc

# Larger ones are weights, whose digest the hub has.
_SMALL = 64_000_000
_CHECKPOINT: Loc = ("checkpoint",)


@dataclass(frozen=True)
class Lock:
    """What a hub source stands for now.

    Attributes:
        source: its number in ``checkpoint.sources``.
        repo: of the source.
        revision: that was asked for.
        commit: that it is.
        sha256: of the file, or of the tree (`checkpoint_files.tree_digest`) of the directory.
        size: bytes to fetch.
    """

    source: int
    repo: str
    revision: str
    commit: str
    sha256: str
    size: int


def unlocked(checkpoint: Checkpoint) -> list[int]:
    """The numbers of the sources whose revision is a branch or tag."""
    return [
        index for index, source in enumerate(checkpoint.sources) if isinstance(source, HubSource) and not source.locked
    ]


def is_strict(asked: bool) -> bool:
    """Whether recipes must be locked: when that is asked for, and in CI (the variable ``CI`` is set)."""
    return asked or os.environ.get("CI", "").lower() not in ("", "0", "false")


def pinned(loaded: Loaded, strict: bool, tell: Callable[[str], None]) -> Loaded:
    """The recipe with commits for branches; the same one if it has none.

    Args:
        strict: refuse a recipe that has.
        tell: called with a warning that names each commit.

    Raises:
        RecipeError: the recipe is not locked, and ``strict`` says that it must be.
        CheckpointError: the recipe has a digest, and the branch other bytes.
        DownloadError: the hub was not reached, or does not have it.
    """
    loose = unlocked(loaded.recipe.checkpoint)
    if not loose:
        return loaded
    if strict:
        source = loaded.recipe.checkpoint.sources[loose[0]]
        assert isinstance(source, HubSource)
        raise RecipeError(
            "the recipe is not locked",
            where=f"{loaded.path}: {source.repo} at {source.revision}",
            why="a branch or tag moves, and here (CI, or --locked) what is built must not depend on the day",
            fix=f"qwen-onnx lock {loaded.path}",
        )
    locks = resolve(loaded)
    for lock in locks:
        tell(
            f"warning: {lock.repo} at {lock.revision} is commit {lock.commit} now; "
            f"`qwen-onnx lock {loaded.path}` writes that down"
        )
    return apply(loaded, locks)


def resolve(loaded: Loaded, revision: str = "") -> list[Lock]:
    """What the hub sources of a recipe stand for now: of those that are not locked, or have no digest.

    Args:
        revision: a branch, tag or commit for all hub sources instead of what the recipe says; the recipe's own digest
            is then not held against it.

    Raises:
        CheckpointError: the bytes are not the ones that the recipe or another source has, or are no whole checkpoint.
        DownloadError: the hub was not reached, or does not have it.
    """
    spec = loaded.recipe.checkpoint
    expected = None if revision else spec.sha256
    locks: list[Lock] = []
    for index, source in enumerate(spec.sources):
        if isinstance(source, HubSource) and (revision or not source.locked or spec.sha256 is None):
            locks.append(_resolve(index, source, revision or source.revision))
            if expected and locks[-1].sha256 != expected:
                raise CheckpointError(
                    f"{source.repo} at {locks[-1].revision} has other bytes than the recipe's",
                    where=f"{loaded.path}: expected sha256 {expected}, the hub has {locks[-1].sha256}",
                    why=f"it has moved to commit {locks[-1].commit}",
                    fix=f"qwen-onnx lock {loaded.path} --revision {locks[-1].revision} takes the new bytes",
                )
            expected = locks[-1].sha256
    return locks


def _resolve(index: int, source: HubSource, revision: str) -> Lock:
    commit, listed = download.hub_list(source.repo, revision)
    wanted = [file for file in listed if _is_wanted(file.name, source)]
    if not wanted:
        raise DownloadError(
            f"{source.repo} has no {source.file or 'checkpoint files'}",
            where=f"commit {commit}",
            why=f"it has {', '.join(sorted(file.name for file in listed)[:8]) or 'nothing'}",
            fix="correct the recipe's `repo` or `file`",
        )
    digests: dict[str, str] = {}
    size = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in wanted:
            if file.sha256 and file.size is not None:
                digests[file.name], length = file.sha256, file.size
            elif (file.size or 0) > _SMALL:
                raise CheckpointError(
                    f"the hub knows no digest of {file.name}", where=f"{source.repo} at commit {commit}"
                )
            else:
                path = download.hub_listed(source.repo, commit, file, folder)
                digests[file.name], length = digest.of_file(path), path.stat().st_size
            size += length
        if not source.file:
            checkpoint_files.check_shards(folder, digests.keys())
    sha256 = digests[source.file] if source.file else digest.of_tree(Path(), digests)
    return Lock(index, source.repo, revision, commit, sha256, size)


def _is_wanted(name: str, source: HubSource) -> bool:
    return name == source.file if source.file else "/" not in name and checkpoint_files.is_part(name)


def apply(loaded: Loaded, locks: Sequence[Lock]) -> Loaded:
    """The recipe with what was resolved, in memory."""
    resolved = json.loads(json.dumps(loaded.resolved))
    for lock in locks:
        resolved["checkpoint"]["sources"][lock.source]["revision"] = lock.commit
        resolved["checkpoint"] |= {"sha256": lock.sha256, "size": lock.size}
    return Loaded(loaded.name, loaded.path, recipes.read(resolved, loaded.path), resolved)


def write(loaded: Loaded, locks: Sequence[Lock]) -> list[Path]:
    """Write what was resolved into the recipe, or into the files that it extends; returns those that have changed.

    Raises:
        RecipeError: a file is written so that it cannot be edited without changing what else it says.
    """
    document = strict_yaml.read(loaded.path)
    wanted: dict[Path, list[tuple[Loc, str | int, str]]] = {}
    for lock in locks:
        at = ("checkpoint", "sources", lock.source, "revision")
        values: list[tuple[Loc, str | int, str]] = [(at, lock.commit, lock.revision)]
        values += [((*_CHECKPOINT, "sha256"), lock.sha256, ""), ((*_CHECKPOINT, "size"), lock.size, "")]
        for loc, value, comment in values:
            # A key that is not there yet goes where the sources stand.
            place = document.places.get(loc) or document.place(at)
            wanted.setdefault(place.file, []).append((loc, value, "" if comment == value else comment))
    before = {path: path.read_bytes().decode() for path in wanted}
    for path, values in wanted.items():
        files.publish(path, _edited(before[path], values, path))
    if recipes.load(loaded.path).recipe.checkpoint != apply(loaded, locks).recipe.checkpoint:
        for path, text in before.items():
            files.publish(path, text)
        raise RecipeError(
            "the recipe cannot be edited in place",
            where=", ".join(map(str, wanted)),
            fix="; ".join(f"set revision: {lock.commit}, sha256: {lock.sha256}" for lock in locks),
        )
    return [path for path, text in before.items() if path.read_bytes().decode() != text]


def _edited(text: str, values: Sequence[tuple[Loc, str | int, str]], path: Path) -> str:
    """``text`` with scalars at locations replaced, or added to their mapping."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    changes: dict[int, tuple[int, str]] = {}
    for loc, value, comment in values:
        node = _node(root, loc)
        shown = value if strict_yaml.scalar(str(value)) == value else json.dumps(value)
        if node is not None:
            start, end = node.start_mark.index, node.end_mark.index
            rest = text[end:].split("\n", 1)[0]
            note = f"  # {comment}" if comment and not rest.strip() else ""
            changes[start] = (end, f"{shown}{note}")
            continue
        parent = _node(root, loc[:-1])
        sources = _node(root, (*_CHECKPOINT, "sources"))
        if not isinstance(parent, yaml.MappingNode) or sources is None:
            raise RecipeError("the recipe cannot be edited in place", where=str(path), fix=f"add {loc[-1]}: {shown}")
        at = _end(sources)
        if parent.flow_style:
            added = f", {loc[-1]}: {shown}"
        else:
            at = len(text[:at]) + len(text[at:].split("\n", 1)[0])
            added = f"\n{' ' * parent.start_mark.column}{loc[-1]}: {shown}"
        changes[at] = (at, changes.get(at, (at, ""))[1] + added)
    for start, (end, new) in sorted(changes.items(), reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _node(root: Any, loc: Loc) -> Any:
    for part in loc:
        children = dict(_children(root))
        if part not in children:
            return None
        root = children[part]
    return root


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)


def _end(node: Any) -> int:
    """Where the last character of a node is; a block collection's own mark is where the next thing begins."""
    last = list(_children(node))
    end: int = node.end_mark.index if not last or node.flow_style else _end(last[-1][1])
    return end
