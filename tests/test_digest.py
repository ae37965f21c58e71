"""Digests depend on contents alone; errors keep their exit code and their words across a process boundary."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from pipeline import digest, errors

FILES = {"b.txt": b"two", "a/c.bin": b"\x00" * 3, "a.txt": b"one", "é.txt": b""}


def plant(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_tree_is_each_file_s_relative_path_and_sha256(tmp_path: Path) -> None:
    tree = digest.tree(plant(tmp_path, FILES))
    assert tree == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert digest.of_tree(tmp_path) == digest.of_tree(tmp_path / "elsewhere", tree)


def test_the_digest_of_a_tree_ignores_times_order_place_and_empty_folders(tmp_path: Path) -> None:
    one = plant(tmp_path / "one", FILES)
    two = plant(tmp_path / "two", dict(reversed(FILES.items())))
    os.utime(two / "a.txt", (0, 0))
    (two / "empty").mkdir()
    assert digest.of_tree(one) == digest.of_tree(two)


@pytest.mark.parametrize(
    "other",
    [
        FILES | {"a.txt": b"onE"},
        FILES | {"d.txt": b""},
        {name: data for name, data in FILES.items() if name != "é.txt"},
        {name.replace("b.txt", "B.txt"): data for name, data in FILES.items()},
        {name.replace("a/c.bin", "a_c.bin"): data for name, data in FILES.items()},
        FILES | {"a.txt": FILES["b.txt"], "b.txt": FILES["a.txt"]},
    ],
    ids=["content", "added", "removed", "renamed", "moved", "swapped"],
)
def test_the_digest_of_a_tree_changes_with_any_name_or_content(other: dict[str, bytes], tmp_path: Path) -> None:
    assert digest.of_tree(plant(tmp_path / "one", FILES)) != digest.of_tree(plant(tmp_path / "two", other))


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_digested_whole_and_its_progress_adds_up(size: int, tmp_path: Path) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "file"
    path.write_bytes(data[:size])
    blocks: list[int] = []
    assert digest.of_file(path, blocks.append) == hashlib.sha256(data[:size]).hexdigest()
    assert sum(blocks) == size


def test_canonical_json_of_equal_values_is_equal_and_reads_back() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "語"}}
    text = digest.canonical_json(value)
    assert text == '{"a":{"ü":"語"},"b":[1,2.5,null,true]}'.encode()
    assert digest.canonical_json(dict(reversed(value.items()))) == text
    assert json.loads(text) == value
    assert digest.of_value(value) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_canonical_json_refuses_numbers_that_json_has_not(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest.canonical_json({"deep": [number]})


def test_the_docstring_of_errors_lists_every_class_with_its_own_exit_code() -> None:
    listed = re.findall(r"[├└]── (\w+) +(\d+) ", errors.__doc__ or "")
    own = [kind for kind in errors.QwenOnnxError.__subclasses__() if kind.__module__ == errors.__name__]
    assert listed == [(kind.__name__, str(kind.exit_code)) for kind in own]
    codes = [kind.exit_code for kind in errors.ERRORS.values()]
    assert [name for name, _ in listed] == list(errors.ERRORS)
    assert len({*codes, 0, errors.QwenOnnxError.exit_code, errors.INTERRUPTED}) == len(codes) + 3


@pytest.mark.parametrize("kind", errors.ERRORS.values(), ids=errors.ERRORS)
def test_an_error_survives_the_process_boundary(kind: type[errors.QwenOnnxError]) -> None:
    sent = kind("what\nhappened", where="here", why="because", fix="do this")
    got = errors.from_dict(json.loads(json.dumps(sent.as_dict())))
    assert (type(got), got.as_dict(), str(got)) == (kind, sent.as_dict(), str(sent))


def test_an_error_shows_the_parts_that_are_known() -> None:
    assert str(errors.UsageError("it broke", fix="mend it")) == "it broke\n  next: mend it"


def test_a_report_of_no_known_error_is_a_failed_stage() -> None:
    assert isinstance(errors.from_dict({"error": "ValueError", "what": "x"}), errors.StageError)
