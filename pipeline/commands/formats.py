"""The commands that hand a package over: archives, registries, layouts of other programs, the difference of releases.

One function a command. Imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

CACHE = "QWEN_ONNX_OCI"


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
