"""Bad checkpoints, recipes, packages, archives and downloads, given to what takes them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builds
import hub
import test_archive
import test_checkpoint
import test_download
import test_gguf
import test_lock
import test_recipe
import test_trust
import test_verify
import tiny_package
from robustness_cases import Bench, Case, need, refusal, told
from test_verify_script import script

from pipeline.checkpoint import fetch as checkpoint
from pipeline.formats import archive
from pipeline.package import signing

Tamper = Callable[[Path], Any]
BOMB = "\n".join(["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)])


def _nothing(_part: float, _what: str) -> None:
    pass


def _left(folder: Path) -> str:
    return "something was written" if any(folder.iterdir()) else "nothing written"


def _prepared(source: Path) -> str:
    """What the stage that takes checkpoints does with ``source``."""
    out = source.parent / "out"
    out.mkdir()
    code, reason = refusal(lambda: checkpoint.prepare(source, None, out, _nothing))
    return told(code, reason, source.parent, _left(out))


def directory(spoil: str) -> Callable[[Bench], str]:
    """A checkpoint directory that is whole but for one thing."""

    def run(bench: Bench) -> str:
        folder = test_checkpoint.write_whole(bench.folder() / "model")
        test_checkpoint.HOSTILE[spoil][0](folder)
        return _prepared(folder)

    return run


def huge_header(bench: Bench) -> str:
    tracemalloc.start()
    try:
        observed = directory("header of 2^63 bytes")(bench)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return observed.replace(":", ", less than 1 MB taken:", 1) if peak < 1e6 else f"{peak / 1e6:.0f} MB taken"


def gguf_file(case: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        path = bench.folder() / "model.gguf"
        path.write_bytes(test_gguf.HOSTILE[case][0])
        begun = time.monotonic()
        observed = _prepared(path)
        seconds = time.monotonic() - begun
        return observed.replace(":", ", within 10 s:", 1) if seconds < 10 else f"it took {seconds:.0f} s"

    return run


def unlocked(revision: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        folder = bench.folder()
        path = test_lock.write_recipe(folder, test_lock.BLOCK.replace("main", revision))
        code, _, err = builds.run("plan", str(path), "--locked", "--store", str(folder / "store"))
        return told(code, err, folder, "nothing fetched" if not list((folder / "store").rglob("*.*")) else "fetched")

    return run


def recipe(text: str) -> Callable[[Bench], str]:
    """The second line of what is said has the file, the line and the mistake."""

    def run(bench: Bench) -> str:
        folder = bench.folder()
        path = test_recipe.write(folder, test_recipe.EXTENDS + text)
        begun = time.monotonic()
        code, _, err = builds.run("recipe", "lint", str(path))
        need(time.monotonic() - begun < 10, "it took more than 10 s")
        rows = err.replace(f"{path.parent}/", "").splitlines()
        return f"exit {code}, file and line: {rows[1].strip() if len(rows) > 1 else err}"

    return run


def package(tamper: Tamper, again: bool = False) -> Callable[[Bench], str]:
    """A signed package that would tell when it is loaded, after ``tamper``; ``again`` signs what came of it."""

    def run(bench: Bench) -> str:
        folder = bench.folder()
        private, public = test_trust.keys(folder, "maker")
        made = test_trust.write_package(folder / "package")
        signing.sign(made, private)
        tamper(made)
        if again:
            test_trust.sign_anything(made, private)
        code, report = script(made, "--key", str(public), "--replay")
        command, out, _ = builds.run("verify", str(made), "--key", str(public), "--replay", "--json")
        checks = json.loads(out.splitlines()[-1])["checks"]
        if (command, checks) != (code, report["checks"]):
            return f"the script ends with {code}, the command with {command}"
        loaded = "loaded" if (folder / "loaded").exists() else "not loaded"
        return told(code, checks[-1]["text"], folder, f"{', '.join(checks[-1]['codes'])}, {loaded}")

    return run


def rejected(case: str) -> Callable[[Bench], str]:
    tamper, again, _ = test_trust.REJECTED[case]
    return package(tamper, again)


def other_key(bench: Bench) -> str:
    def sign(made: Path) -> None:
        signing.sign(made, test_trust.keys(made.parent, "stranger")[0])

    return package(sign)(bench)


def graph(case: str) -> Callable[[Bench], str]:
    """A graph whose weights are said to lie somewhere else; all digests and the signature fit."""
    entries = test_verify.HOSTILE_DATA[case][0]

    def tamper(made: Path) -> None:
        data = test_verify.model(test_verify.external("w", **entries)).SerializeToString()
        (made / "model.onnx").write_bytes(data)
        test_trust.reseal(made)

    return package(tamper, again=True)


def linked_weights(made: Path) -> None:
    (made / "model.onnx.data").rename(made.parent / "elsewhere")
    (made / "model.onnx.data").symlink_to(made.parent / "elsewhere")


def tar(change: Callable[[bytes], bytes], *options: str) -> Callable[[Bench], str]:
    """`qwen-onnx unpack` of an archive that was changed, or under a quota."""

    def run(bench: Bench) -> str:
        folder = bench.folder()
        archive.pack(tiny_package.write(folder / "tiny-cpu-int4"), folder / "good.tar")
        (folder / "in").mkdir()
        (folder / "in" / "bad.tar").write_bytes(change((folder / "good.tar").read_bytes()))
        code, _, err = builds.run("unpack", str(folder / "in" / "bad.tar"), "-o", str(folder / "in" / "out"), *options)
        left = [path.name for path in (folder / "in").rglob("*")]
        why = err.partition("why: ")[2].partition("\n")[0].replace("tiny-cpu-int4/", "")
        return told(code, why or err, folder, "nothing written" if left == ["bad.tar"] else f"{left} written")

    return run


def hostile_tar(case: str) -> Callable[[Bench], str]:
    return tar(test_archive.HOSTILE[case][0])


def flood(_: bytes) -> bytes:
    members = (test_archive.member(f"tiny-cpu-int4/{index}", b"") for index in range(5000))
    return b"".join(members) + test_archive.END


def download_cut(bench: Bench) -> str:
    block = 10 * 1024 * 1024  # the client writes in blocks of this size
    body = bytes(range(256)) * 48 * 1024
    with hub.serve({"model.gguf": body}) as served:
        served.spoil = lambda number, sent: sent[: block + 1000] if number == 1 else sent
        spec = test_download.spec_of([test_download.FILE], hashlib.sha256(body).hexdigest())
        answer = test_download.fetch_hub(served, bench.folder(), spec)
        right = Path(answer["path"]).read_bytes() == body
    resumed = served.ranges == ["all", f"bytes={block}-"]
    return f"{'resumed where it was cut' if resumed else served.ranges}, {'the pinned' if right else 'other'} bytes"


def wrong_bytes(bench: Bench) -> str:
    folder = bench.folder()
    with hub.serve({"model.gguf": test_download.WHOLE}) as served:
        served.spoil = lambda _number, body: b"X" + body[1:]
        answer = test_download.fetch_hub(served, folder, test_download.spec_of([test_download.FILE]))
    kept = [path for path in folder.rglob("*.gguf") if path.is_file()]
    state = "nothing kept" if not kept else "something was kept"
    return f"fetched {len(served.ranges)} times, then refused, {state}: {answer.get('what', answer)}"


def read_only(command: Callable[[Bench, Path], list[str]]) -> Callable[[Bench], str]:
    """A command that writes to a file system that takes nothing."""

    def run(bench: Bench) -> str:
        folder = bench.folder()
        with builds.small_disk(folder / "disk", "8m") as disk:
            arguments = command(bench, disk)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            code, out, err = builds.run(*arguments)
        return told(code, err or out, folder / "disk", "no traceback")

    return run


def build_into(bench: Bench, disk: Path) -> list[str]:
    project = bench.built()
    return ["build", str(project.recipe), "--store", str(project.store), "--out", str(disk / "out")]


def build_store(bench: Bench, disk: Path) -> list[str]:
    project = bench.built()
    return ["build", str(project.recipe), "--store", str(disk / "store"), "--out", str(project.out)]


def pack_into(bench: Bench, disk: Path) -> list[str]:
    return ["pack", str(tiny_package.write(bench.folder() / "tiny")), "-o", str(disk / "x.tar")]


def unpack_into(bench: Bench, disk: Path) -> list[str]:
    folder = bench.folder()
    archive.pack(tiny_package.write(folder / "tiny"), folder / "x.tar")
    return ["unpack", str(folder / "x.tar"), "-o", str(disk / "out")]


def sign_in(bench: Bench, disk: Path) -> list[str]:
    made = test_trust.write_package(disk / "package")
    return ["sign", str(made), "--key", str(test_trust.keys(bench.folder(), "maker")[0])]


_PREPARE, _LINT, _UNPACK = "the stage that takes checkpoints", "`qwen-onnx recipe lint`", "`qwen-onnx unpack`"
_VERIFY = "`qwen-onnx verify --key --replay` and the package's own script, on a signed package with a tripwire"
_FETCH = "a checkpoint source, against a hub on the loopback"
_REFUSED = "exit 4, nothing written"
_READ_ONLY = "on a file system mounted read-only: "
_OUTSIDE = "exit 9, data.outside, not loaded"
_SCHEME = "quantize:\n  head: {bits: 8, block_size: 32, symmetric: true}\n  head: {bits: 4}"

FILES = [
    Case(1, "checkpoint of `.bin` files alone", _REFUSED, _PREPARE, directory("pickle only")),
    Case(2, "`auto_map` in config.json", _REFUSED, _PREPARE, directory("auto_map")),
    Case(2, "`auto_map` in tokenizer_config.json", _REFUSED, _PREPARE, directory("auto_map of the tokenizer")),
    Case(3, "a branch where a lock is required", "exit 3, nothing fetched", "`plan --locked`", unlocked("main")),
    Case(3, "a tag where a lock is required", "exit 3, nothing fetched", "`plan --locked`", unlocked("v1.0")),
    Case(4, "safetensors cut in the header", _REFUSED, _PREPARE, directory("cut in the header")),
    Case(4, "safetensors cut in the weights", _REFUSED, _PREPARE, directory("cut in the weights")),
    Case(4, "safetensors of no bytes", _REFUSED, _PREPARE, directory("empty weights")),
    Case(5, "safetensors header of 2^63 bytes", f"{_REFUSED}, less than 1 MB taken", _PREPARE, huge_header),
    *(
        Case(6, f"GGUF: {case}", f"{_REFUSED}, within 10 s", _PREPARE, gguf_file(key))
        for case, key in {
            "the 43 bytes that hang the reference reader": "array of 2^63",
            "array of 2^63 strings": "strings 2^63",
            "string of 2^63 bytes": "string of 2^63 bytes",
            "2^63 tensors": "2^63 tensors",
        }.items()
    ),
    Case(
        7,
        "`!!python/object` in a recipe",
        "exit 3, file and line",
        _LINT,
        recipe("description: !!python/object/apply:os.system ['exit 1']"),
    ),
    Case(8, "alias bomb of 10^39 items", "exit 3, file and line", _LINT, recipe(BOMB)),
    Case(9, "duplicate key", "exit 3, file and line", _LINT, recipe(_SCHEME)),
    Case(9, "unknown key", "exit 3, file and line", _LINT, recipe("quantize: {algoritm: rtn}")),
    Case(10, "external data in `../x`", _OUTSIDE, _VERIFY, graph("the folder above")),
    Case(10, "external data in `/etc/passwd`", _OUTSIDE, _VERIFY, graph("an absolute path")),
    Case(10, "external data in `a/../../b`", _OUTSIDE, _VERIFY, graph("a detour")),
    Case(11, "external data that is a link", "exit 9, files.special, not loaded", _VERIFY, package(linked_weights)),
    Case(12, "external data at offset -8", _OUTSIDE, _VERIFY, graph("a negative offset")),
    Case(12, "external data of 10^12 bytes", _OUTSIDE, _VERIFY, graph("a huge length")),
    Case(
        13,
        "`custom_ops_library`",
        "exit 9, configuration.untrusted, not loaded",
        _VERIFY,
        rejected("custom_ops_library"),
    ),
    *(
        Case(14, f"archive with {case}", "exit 9, nothing written", _UNPACK, hostile_tar(case))
        for case in (
            *("the folder above", "dots as a folder", "an absolute path", "a path of Windows"),
            *("a symbolic link", "a hard link", "a device", "a pipe"),
        )
    ),
    Case(15, "compressed bomb", "exit 9, nothing written", _UNPACK, hostile_tar("a compressed bomb")),
    Case(15, "sparse file", "exit 9, nothing written", _UNPACK, hostile_tar("a sparse bomb")),
    Case(15, "archive of 5000 files", "exit 9, nothing written", _UNPACK, tar(flood)),
    Case(
        15,
        "archive beyond a quota of bytes",
        "exit 9, nothing written",
        f"{_UNPACK[:-1]} --max-bytes 1000`",
        tar(lambda good: good, "--max-bytes", "1000"),
    ),
    *(
        Case(row, case, f"exit 9, {code}, not loaded", _VERIFY, rejected(name))
        for row, case, name, code in (
            (16, "one flipped bit", "bit flip", "digests.changed"),
            (
                *(16, "one flipped bit, with manifest and checksums made to fit"),
                *("bit flip, manifest and checksums made to fit", "digests.provenance, digests.signature"),
            ),
            (17, "extra file", "extra file", "files.extra"),
            (17, "extra file that the manifest lists", "extra file, in the manifest", "files.unsigned"),
            (17, "missing file", "missing file", "files.missing"),
            (17, "names that differ by case alone", "case collision", "files.extra, files.case"),
            (17, "link in place of a file", "symlink", "files.special"),
            (32, "signature of other words", "wrong signature", "signature.wrong"),
            (32, "unsigned, where a key is given", "unsigned", "signature.missing"),
            (33, "manifest of a newer schema", "newer schema", "manifest.version"),
        )
    ),
    Case(32, "signed with another key", "exit 9, signature.wrong, not loaded", _VERIFY, other_key),
    Case(23, "download that is cut", "resumed where it was cut, the pinned bytes", _FETCH, download_cut),
    Case(
        23,
        "wrong bytes of the right size",
        "fetched 2 times, then refused, nothing kept",
        _FETCH,
        wrong_bytes,
    ),
    *(
        Case(24, f"{case} a read-only place", f"exit {code}, no traceback", _READ_ONLY + how, read_only(command))
        for case, code, how, command in (
            ("package built into", 6, "`build --out`", build_into),
            ("store in", 11, "`build --store`", build_store),
            ("archive written to", 6, "`pack -o`", pack_into),
            ("archive unpacked to", 6, "`unpack -o`", unpack_into),
            ("package signed in", 6, "`sign`", sign_in),
        )
    ),
]
