"""The verbs of trust: check a package, sign one, make one again."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.errors import GateError, StageError, StoreError, UsageError
from pipeline.package.provenance import BUILDER

if TYPE_CHECKING:
    from pipeline.builds.rebuild import Rebuilt


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(
        root, "verify", verify, "check a package before it is used; nothing of it is loaded before that"
    )
    parser.add_argument("package", type=Path)
    arguments.key(parser)
    parser.add_argument("--replay", action="store_true", help="then load it and replay its golden transcript here")
    arguments.provider(parser)
    arguments.json(parser)

    parser = arguments.command(root, "sign", sign, "sign a package, and say where it comes from")
    parser.add_argument("package", type=Path)
    text = "private key, P-256 or P-384; the password of an encrypted one is in $QWEN_ONNX_KEY_PASSWORD"
    parser.add_argument("--key", type=Path, required=True, metavar="PEM", help=text)
    default = os.environ.get("QWEN_ONNX_BUILDER", BUILDER)
    text = "URI of what built it, for the provenance (default: $QWEN_ONNX_BUILDER or %(default)s)"
    parser.add_argument("--builder-id", default=default, metavar="URI", help=text)
    arguments.json(parser)

    text = "make a package again from its manifest, and compare; ends with 0 equal, 22 a file differs"
    parser = arguments.command(root, "rebuild", rebuild, text)
    parser.add_argument("package", type=Path)
    text = "an empty folder (default: a temporary one, beside --out or the package)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the new package is put (default: not kept)")
    parser.add_argument("--downloads", type=Path, metavar="DIR", help="keep and take what is fetched here")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="where a local checkpoint is now")
    text = "where a LoRA adapter is now, of one that was merged the folder alone; may be given again"
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help=text)
    text = "end with this stage, such as quantize, and compare graphs and weights"
    parser.add_argument("--until", default="", metavar="STAGE", help=text)
    text = "although tools have other versions than the manifest says"
    parser.add_argument("--other-versions", action="store_true", help=text)
    arguments.key(parser)
    arguments.json(parser)


def verify(options: argparse.Namespace) -> int:
    from pipeline.builds.report import Events
    from pipeline.package import verify, verify_script
    from pipeline.runtime import golden

    replayed: dict[str, Any] = {}

    def replay(received: verify.Received) -> str:
        if received.manifest.generates:
            replayed.update(golden.replay(options.package, options.provider))
            return golden.told(replayed)
        from pipeline.package import retrieval_replay

        replayed.update(golden.replay_retrieval(options.package))
        return retrieval_replay.told(replayed)

    steps = (("runtime", verify.required_runtime), ("replay", replay)) if options.replay else ()
    report = verify.inspect(verify.Received(options.package, options.key), steps or (("runtime", verify.runtime),))
    facts = {"package": str(options.package), **report.as_dict()}
    if replayed:
        facts |= {"runtime": next(check.text for check in report.checks if check.name == "runtime"), "replay": replayed}
    if report.error:
        if not options.json:
            print("\n".join(verify_script.lines(report)), file=sys.stderr)
            raise report.error
        Events().emit("error", exit_code=report.error.exit_code, **report.error.as_dict(), **facts)
        return report.error.exit_code
    if options.json:
        print(json.dumps(facts))
        return 0
    print("\n".join(verify_script.lines(report)))
    print(f"{facts['name']}  digest {facts['digest']}")
    return 0


def sign(options: argparse.Namespace) -> int:
    from pipeline.artifact import SIGNED
    from pipeline.package import signing

    made = signing.sign(options.package, options.key, options.builder_id)
    if options.json:
        print(json.dumps({"package": str(options.package), **made}))
        return 0
    print(f"{options.package}: wrote {' and '.join(SIGNED)}, signed with the key {made['hint'][:16]}")
    print(f"next: qwen-onnx verify {options.package} --key PUBLIC.pem")
    return 0


def rebuild(options: argparse.Namespace) -> int:
    from pipeline.artifact import MANIFEST
    from pipeline.builds import rebuild, report, runner
    from pipeline.builds.store import Store
    from pipeline.package import verify

    if options.out and options.until not in ("", "package"):
        raise UsageError(f"--until {options.until} makes no package to put at --out", fix="leave out one of them")
    if options.out and options.out.resolve() == options.package.resolve():
        raise UsageError("--out is the package itself", fix="choose another place: both are compared")
    manifest = verify.package(options.package, key=options.key)
    given = rebuild.Given(options.checkpoint, _named(options.adapter))
    made = rebuild.loaded(manifest, options.package / MANIFEST, given)
    steps, versions = rebuild.planned(manifest, made)
    steps = rebuild.until(steps, options.until)
    if not options.other_versions:
        rebuild.check_versions(versions)
    with _fresh_store(options) as root:
        reporter = report.reporter(options.json)
        try:
            store = Store(root)
            found, last = rebuild.make(options.package, manifest, steps, versions, store, reporter)
            if options.out:
                runner.install(last, options.out, store)
        finally:
            reporter.close()
    if options.json:
        report.Events().emit("rebuild", package=str(options.package), digest=manifest.digest, **found.as_dict())
    else:
        print("\n".join(_rebuild_lines(found)))
    return 0 if found.equal else rebuild.DIFFERS


def _named(adapters: list[str]) -> dict[str, Path]:
    """``NAME=DIR`` or, of a merged adapter, ``DIR``."""
    pairs = (text.rpartition("=") for text in adapters)
    return {name: Path(folder) for name, _, folder in pairs}


@contextlib.contextmanager
def _fresh_store(options: argparse.Namespace) -> Iterator[Path]:
    """An empty store, with downloads that may be shared; a temporary one is removed, unless a failed step left its log.

    Raises:
        UsageError: the store that was given is not empty.
        StoreError: it cannot be made.
    """
    given = options.store
    if given and given.exists() and (not given.is_dir() or any(given.iterdir())):
        raise UsageError(
            f"{given} is not empty",
            why="what a store has already would be taken from it, and nothing would be shown",
            fix="give an empty folder with --store, or none",
        )
    beside = (options.out or options.package).resolve()
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        root = given or Path(tempfile.mkdtemp(prefix=f".{beside.name}.rebuild-", dir=beside.parent))
        if options.downloads:
            options.downloads.mkdir(parents=True, exist_ok=True)
            root.mkdir(parents=True, exist_ok=True)
            (root / "downloads").symlink_to(options.downloads.resolve())
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise StoreError("there is no place for a fresh store", why=why, fix="choose one with --store") from None
    try:
        yield root
    except (GateError, StageError):
        raise  # it names a file in the store
    except BaseException:
        _discard(root, given)
        raise
    _discard(root, given)


def _discard(root: Path, given: Path | None) -> None:
    if given is None:
        shutil.rmtree(root, ignore_errors=True)


def _rebuild_lines(found: Rebuilt) -> list[str]:
    """What `rebuild` tells people."""
    width = max(len(file.name) for file in found.files)
    rows = [f"{file.state:<8} {file.name:<{width}}  {file.why}".rstrip() for file in found.files]
    rows += [
        f"other version  {name}: {then or 'none'}, here {now or 'none'}" for name, (then, now) in found.versions.items()
    ]
    if changed := [name for name, same in found.steps.items() if not same]:
        rows.append(f"the first step whose result differs: {changed[0]}")
    same = sum(file.state == "equal" for file in found.files)
    rows.append(f"{same} of {len(found.files)} files equal: {'the same package' if found.equal else 'NOT the same'}")
    return rows
