"""The commands that hand a package over: archives, registries, layouts of other programs, the difference of releases.

One function a command. Imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pipeline.commands import arguments
from pipeline.errors import UsageError

CACHE = "QWEN_ONNX_OCI"


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "pack", pack, "write a package as one file, whose bytes are always the same")
    parser.add_argument("package", type=Path)
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="(default: PACKAGE.tar)")
    arguments.key(parser)
    arguments.json(parser)

    parser = arguments.command(root, "unpack", unpack, "make a package of an archive, and verify it")
    parser.add_argument("archive", type=Path, metavar="FILE")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    for name, usual, what in (("bytes", 200 * 10**9, "bytes"), ("files", 1000, "files")):
        text = f"refuse an archive of more {what} (default: %(default)s)"
        parser.add_argument(f"--max-{name}", type=arguments.positive, default=usual, metavar="N", help=text)
    arguments.key(parser)
    arguments.json(parser)

    _add_registries(root)

    parser = arguments.command(root, "layout", layout, "lay a package out as another program wants it")
    parser.add_argument("package", type=Path)
    parser.add_argument("out", type=Path)
    text = "Foundry Local's cache, or a repository of a model hub"
    parser.add_argument("--for", dest="kind", choices=("foundry", "hub"), required=True, help=text)
    arguments.key(parser)
    arguments.json(parser)

    parser = arguments.command(
        root, "diff", diff, "compare two releases; ends with 0 compatible, 20 needs review, 21 breaking"
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="every difference, also of kinds that are found often")
    parser.add_argument("--trust", action="store_true", help="skip the digests of packages that were verified before")
    arguments.json(parser)


def _add_registries(root: Any) -> None:
    oci = root.add_parser("oci", help="packages in OCI registries").add_subparsers(required=True, metavar="ACTION")
    parser = arguments.command(oci, "push", oci_push, "push a package to a registry")
    parser.add_argument("package", type=Path)
    parser.add_argument("reference", metavar="HOST/NAME:TAG")
    parser.add_argument("--plain-http", action="store_true", help="without TLS, for a registry on this machine")
    arguments.key(parser)
    arguments.json(parser)

    parser = arguments.command(oci, "pull", oci_pull, "pull a package; files that are here are not fetched again")
    parser.add_argument("reference", metavar="HOST/NAME:TAG")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    text = f"OCI layout that keeps what was pulled (default: ${CACHE} or .oci beside DIR)"
    parser.add_argument("--cache", type=Path, metavar="DIR", help=text)
    parser.add_argument("--plain-http", action="store_true", help="without TLS, for a registry on this machine")
    arguments.key(parser)
    arguments.json(parser)

    parser = arguments.command(oci, "export", oci_export, "put a package into an OCI image layout")
    parser.add_argument("package", type=Path)
    parser.add_argument("layout", type=Path)
    parser.add_argument("--tag", default="latest", help="(default: %(default)s)")
    arguments.key(parser)
    arguments.json(parser)

    parser = arguments.command(oci, "import", oci_import, "make a package of an artifact in an OCI image layout")
    parser.add_argument("layout", type=Path)
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    parser.add_argument("--tag", default="", help="(default: the only one)")
    arguments.key(parser)
    arguments.json(parser)


def pack(options: argparse.Namespace) -> int:
    from pipeline.formats import archive

    out = options.out or options.package.resolve().with_suffix(options.package.resolve().suffix + ".tar")
    packed = archive.pack(options.package, out, options.key)
    facts = {"archive": str(out), "bytes": packed.size, "sha256": packed.sha256, "files": packed.files}
    return _tell(options, facts, f"{out}: {packed.files} files, {packed.size} bytes\nsha256 {packed.sha256}")


def unpack(options: argparse.Namespace) -> int:
    from pipeline.formats import archive, tar

    quota = tar.Quota(options.max_bytes, options.max_files)
    found = archive.unpack(options.archive, options.out, quota, options.key)
    facts = {"package": str(options.out), "name": found.manifest.data["name"], "digest": found.manifest.digest}
    facts |= {"files": found.files, "kept": found.kept}
    text = f"{options.out}: {found.files} files, verified ({found.kept} were there already)"
    return _tell(options, facts, f"{text}\ndigest {found.manifest.digest}")


def oci_export(options: argparse.Namespace) -> int:
    from pipeline.formats import oci_layout

    image = oci_layout.write(options.package, options.layout, options.tag, options.key)
    facts = {"layout": str(options.layout), "tag": options.tag, "digest": image.blob.digest}
    return _tell(options, facts, f"{options.layout}:{options.tag} is {image.blob.digest}")


def oci_import(options: argparse.Namespace) -> int:
    from pipeline.formats import oci_layout

    image = oci_layout.read(options.layout, options.tag)
    manifest = oci_layout.extract(options.layout, image, options.out, options.key)
    facts = {"package": str(options.out), "name": manifest.data["name"], "digest": manifest.digest}
    return _tell(options, facts, f"{options.out}: {len(image.layers)} files, verified\ndigest {manifest.digest}")


def oci_push(options: argparse.Namespace) -> int:
    from pipeline.formats import oci_registry

    moved = oci_registry.push(options.package, options.reference, options.plain_http, options.key)
    facts = {"reference": options.reference, "digest": moved.digest, "sent": moved.moved, "there": moved.kept}
    text = f"{options.reference} is {moved.digest}\n{moved.moved} bytes sent, {moved.kept} were there already"
    return _tell(options, facts, text)


def oci_pull(options: argparse.Namespace) -> int:
    from pipeline.formats import oci_layout, oci_registry

    tag = oci_registry.tag_of(options.reference)
    cache = options.cache or Path(os.environ.get(CACHE) or options.out.resolve().parent / ".oci")
    image, moved = oci_registry.pull(options.reference, cache, tag, options.plain_http, options.key)
    manifest = oci_layout.extract(cache, image, options.out, options.key)
    facts: dict[str, Any] = {"package": str(options.out), "name": manifest.data["name"], "digest": manifest.digest}
    facts |= {"artifact": moved.digest, "fetched": moved.moved, "there": moved.kept}
    text = f"{options.out}: {len(image.layers)} files, verified\ndigest {manifest.digest}"
    return _tell(options, facts, f"{text}\n{moved.moved} bytes fetched, {moved.kept} were there already")


def layout(options: argparse.Namespace) -> int:
    from pipeline.formats import layouts

    added = layouts.write(options.package, options.out, options.kind, options.key)
    facts = {"layout": str(options.out), "for": options.kind, "added": added}
    return _tell(options, facts, f"{options.out}: the package, and {', '.join(added)}")


def diff(options: argparse.Namespace) -> int:
    from pipeline.diff import releases as release_diff, rules as diff_rules, table as diff_report

    if options.old.resolve() == options.new.resolve():
        raise UsageError(f"{options.old} is compared with itself", fix="give two releases")
    found = release_diff.compare(options.old, options.new, options.trust)
    if options.json:
        print(json.dumps(found.as_dict(), ensure_ascii=False))
    else:
        print(diff_report.text(found, options.all))
    return diff_rules.EXIT_CODES[found.verdict]


def _tell(options: argparse.Namespace, facts: dict[str, Any], text: str) -> int:
    print(json.dumps(facts) if options.json else text)
    return 0
