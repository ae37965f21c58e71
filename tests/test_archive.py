"""A package as one file: the same bytes everywhere, and nothing but a package comes out of one."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_package

from pipeline import cli
from pipeline.errors import PackageError, ResourceError, UsageError
from pipeline.formats import archive, tar


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_package.write(tmp_path_factory.mktemp("package") / "tiny")


@pytest.fixture(scope="module")
def packed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "tiny.tar"
    archive.pack(package, path)
    return path


def test_equal_packages_give_equal_archives(package: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "under another name"
    shutil.copytree(package, copy, copy_function=shutil.copyfile)  # other times
    (copy / "LICENSE").chmod(0o600)
    found = archive.pack(copy, tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == packed.read_bytes()
    assert found.size == packed.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_time_of_entries_is_given(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    archive.pack(package, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as file:
        assert {(entry.mtime, entry.uid, entry.gid, entry.mode) for entry in file} == {(1_700_000_000, 0, 0, 0o644)}
        assert file.getnames() == sorted(file.getnames())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        archive.pack(package, tmp_path / "y.tar")


def test_a_package_that_does_not_verify_is_not_packed(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "LICENSE").write_text("other")
    with pytest.raises(PackageError, match="not the package that was built"):
        archive.pack(copy, tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    with pytest.raises(UsageError, match="inside of the package"):
        archive.pack(package, package / "x.tar")


def test_what_was_packed_comes_out(package: Path, packed: Path, tmp_path: Path) -> None:
    found = archive.unpack(packed, tmp_path / "out")
    assert tiny_package.content(tmp_path / "out") == tiny_package.content(package)
    assert (found.files, found.kept) == (len(list(package.iterdir())), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert archive.unpack(packed, tmp_path / "out").kept == found.files  # the same package is there already
    with tarfile.open(packed) as file:  # other tools read it, too
        assert {Path(name).name: file.extractfile(name).read() for name in file.getnames()} == tiny_package.content(
            package
        )  # type: ignore[union-attr]


def test_a_place_that_is_taken_stays_as_it_is(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="holds something else"):
        archive.unpack(packed, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(UsageError, match="there is no archive"):
        archive.unpack(tmp_path, tmp_path / "other")


def test_what_an_interruption_left_is_kept_if_whole(package: Path, packed: Path, tmp_path: Path) -> None:
    place = tmp_path / ".out.unpack"
    place.mkdir()
    shutil.copy(package / "model.onnx.data", place)
    (place / "tokenizer.json").write_bytes(b"x" * (package / "tokenizer.json").stat().st_size)
    (place / "stranger").symlink_to(package)
    before = (place / "model.onnx.data").stat().st_ino
    assert archive.unpack(packed, tmp_path / "out").kept == 1
    assert (tmp_path / "out" / "model.onnx.data").stat().st_ino == before
    assert tiny_package.content(tmp_path / "out") == tiny_package.content(package)
    assert package.is_dir()


def test_killed_while_unpacking_nothing_is_there_and_the_next_run_goes_on(tmp_path: Path) -> None:
    package = tiny_package.write(tmp_path / "large", weights=bytes(48 << 20))
    archive.pack(package, tmp_path / "x.tar")
    run = [sys.executable, "-m", "pipeline", "unpack", str(tmp_path / "x.tar"), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    staged = tmp_path / ".out.unpack"
    until = time.monotonic() + 60
    while not (staged / "golden.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert staged.is_dir()
    assert not (tmp_path / "out").exists()
    assert archive.unpack(tmp_path / "x.tar", tmp_path / "out").kept > 0
    assert tiny_package.content(tmp_path / "out") == tiny_package.content(package)
    assert not staged.exists()


def test_two_at_once_do_not_meet(packed: Path, tmp_path: Path) -> None:
    import fcntl

    place = tmp_path / ".out.unpack"
    place.mkdir()
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="another process"):
            archive.unpack(packed, tmp_path / "out")
    finally:
        os.close(descriptor)


def member(name: str, data: bytes = b"x", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


def made_by_tar(name: str, **fields: object) -> bytes:
    """An archive as other programs write them, with headers that change what follows."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo(name)
        info.pax_headers = {"path": "../../evil"}
        file.addfile(info)
    return out.getvalue()


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "the folder above": (lambda good: member("tiny-cpu-int4/../../evil") + good, "is no file of one folder"),
    "dots as a folder": (lambda good: member("../evil") + good, "is no file of one folder"),
    "an absolute path": (lambda good: member("/tmp/evil") + good, "is no file of one folder"),
    "a path of Windows": (lambda good: member("tiny-cpu-int4/..\\evil") + good, "is no file of one folder"),
    "a hidden file": (lambda good: member("tiny-cpu-int4/.bashrc") + good, "is no file of one folder"),
    "a file outside of the folder": (lambda good: member("evil") + good, "is no file of one folder"),
    "two folders": (lambda good: member("other/evil") + good, "in several folders"),
    "a symbolic link": (
        lambda good: member("tiny-cpu-int4/evil", b"", type=tarfile.SYMTYPE, linkname="/etc") + good,
        "is a symbolic link",
    ),
    "a hard link": (
        lambda good: member("tiny-cpu-int4/evil", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd") + good,
        "is a hard link",
    ),
    "a device": (lambda good: member("tiny-cpu-int4/evil", b"", type=tarfile.CHRTYPE) + good, "is a character device"),
    "a pipe": (lambda good: member("tiny-cpu-int4/evil", b"", type=tarfile.FIFOTYPE) + good, "is a pipe"),
    "a folder": (lambda good: member("tiny-cpu-int4/evil", b"", type=tarfile.DIRTYPE) + good, "is a folder"),
    "a header that renames": (lambda good: made_by_tar("tiny-cpu-int4/x") + good, "header that changes other entries"),
    "a long name": (lambda good: member("tiny-cpu-int4/" + "x" * 200) + good, "header that changes other entries"),
    "a sparse bomb": (lambda good: member("tiny-cpu-int4/x", b"", type=tarfile.GNUTYPE_SPARSE) + good, "a sparse file"),
    "a name that stands twice": (lambda good: member("tiny-cpu-int4/LICENSE") + good, "are one file"),
    "names that differ by case": (lambda good: member("tiny-cpu-int4/license") + good, "where case does not count"),
    "a size beyond the end": (
        lambda good: member("tiny-cpu-int4/x")[:124] + b"77777777777\0" + good,
        "begins no entry",
    ),
    "a compressed bomb": (gzip.compress, "begins no entry of a tar archive"),
    "an archive that is cut off": (lambda good: good[: len(good) // 2], "it ends within"),
    "no end": (lambda good: good[: good.rindex(b"ustar") - 257], "it has no end"),
    "something after the end": (lambda good: good + member("tiny-cpu-int4/evil"), "something comes after its end"),
    "nothing": (lambda _: b"", "it has no end"),
    "an empty archive": (lambda _: bytes(10240), "it has no files"),
    "no package": (lambda _: member("tiny-cpu-int4/x") + END, "it has no manifest.json"),
    "a file beside the package": (lambda good: member("tiny-cpu-int4/evil") + good, "is not in the manifest"),
    "other bytes": (lambda good: good.replace(b"Do what you like.", b"Do what we like!."), "LICENSE of the archive"),
    "a changed manifest": (lambda good: good.replace(b'"Qwen/Tiny"', b'"Qwen/Fake"'), "SHA256SUMS does not agree"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused(packed: Path, tmp_path: Path, case: str) -> None:
    change, text = HOSTILE[case]
    data = change(packed.read_bytes().replace(b"tiny-cpu-int4/", b"tiny-cpu-int4/")).replace(
        b"tiny-cpu-int4/", b"tiny-cpu-int4/"
    )
    bad = tmp_path / "in" / "bad.tar"
    bad.parent.mkdir()
    bad.write_bytes(data)
    with pytest.raises(PackageError) as caught:
        archive.unpack(bad, tmp_path / "in" / "out")
    assert text in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "bad.tar"]


def test_quotas_hold_before_anything_is_written(packed: Path, tmp_path: Path) -> None:
    for quota, text in (
        (tar.Quota(size=1000), "more than 1000 bytes"),
        (tar.Quota(files=3), "more than 3 files"),
    ):
        with pytest.raises(PackageError) as caught:
            archive.unpack(packed, tmp_path / "out", quota)
        assert text in str(caught.value)
    flood = b"".join(member(f"tiny-cpu-int4/{index}", b"") for index in range(5000)) + END
    (tmp_path / "flood.tar").write_bytes(flood)
    with pytest.raises(PackageError, match="refused") as caught:
        archive.unpack(tmp_path / "flood.tar", tmp_path / "out")
    assert "more than 1000 files" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sizes_of_eight_gigabytes_and_more_can_be_written() -> None:
    header = archive._header("tiny-cpu-int4/model.onnx.data", 9 << 30, 0)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 << 30
    with pytest.raises(PackageError, match="cannot be written"):
        archive._header("x" * 300, 1, 0)


def test_a_full_disk_is_told(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="bytes are to be written"):
        archive.unpack(packed, tmp_path / "out")


def test_commands(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", str(package), "-o", str(tmp_path / "x.tar"), "--json"]) == 0
    assert '"files": 12' in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "x.tar"), "-o", str(tmp_path / "out")]) == 0
    assert "12 files, verified" in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "x.tar"), "-o", str(tmp_path / "other"), "--max-files", "2"]) == 9
