"""The page ``index.html`` of a folder of packages: those that are whole side by side, and those that are damaged.

A package is shown when its files are those of its manifest by name, size and kind, and the texts that the page takes
from it by digest too. Weights are not read: that takes a second for each, and `pipeline.package.verify` is there for
it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import digest, files
from pipeline.artifact import CHECKSUMS, MANIFEST, SIGNATURE, SIGNED, VALIDATION, Manifest, read_json, read_manifest
from pipeline.documents import html_report, measured, svg
from pipeline.errors import PackageError, QwenOnnxError, UsageError
from pipeline.package import config as package_config, contents as package_files, graphs as package_graphs

INDEX = "index.html"


def write(folder: Path) -> Path:
    """Write ``index.html`` of all packages in ``folder``, all at once; returns its path.

    Raises:
        UsageError: there are no packages, or the page that is there is somebody else's.
        ResourceError: it cannot be written.
        RuntimeMissing: jinja2 is not installed.
    """
    target, text = folder / INDEX, page(folder)
    if target.exists() and html_report.MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{target} was not written by qwen-onnx",
            why="it would be replaced; the packages beside it are as they were",
            fix="move it away, or keep packages in a folder of their own",
        )
    files.publish(target, text)
    return target


def page(folder: Path) -> str:
    """The page (HTML).

    Raises:
        UsageError: there are no packages.
        RuntimeMissing: jinja2 is not installed.
        OSError: the folder cannot be read.
    """
    packages: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    for path in find(folder):
        try:
            packages.append({**_shown(path), "anchor": f"package-{len(packages) + 1}"})
        except QwenOnnxError as error:
            damaged.append({"folder": path.name, "problem": f"{error.what}{error.why and f': {error.why}'}"})
    return html_report.render(
        "report-index.html.jinja",
        folder=folder.resolve().name,
        packages=packages,
        damaged=damaged,
        overview_plot=_overview(packages),
    )


def find(folder: Path) -> list[Path]:
    """The folders in ``folder`` that are or were packages, by name.

    Raises:
        UsageError: there is none, or ``folder`` is a package itself.
    """
    if (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is a package", fix=f"give the folder that it is in: {folder.resolve().parent}")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", fix="build a package first, or give the folder of packages")
    found = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and path.is_dir()
        and any((path / name).exists() for name in (MANIFEST, CHECKSUMS))
    ]
    if not found:
        raise UsageError(f"there are no packages in {folder}", fix="build one first, or give the folder of packages")
    return found


def _shown(folder: Path) -> dict[str, Any]:
    """All that the page tells of one package.

    Raises:
        PackageError: it is damaged.
    """
    try:
        manifest = _whole(folder)
        validation = read_json(folder / VALIDATION)
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{folder.name} cannot be read", why=str(error)) from None
    try:
        shown = html_report.summary(manifest.data, validation)
        size = sum(size for size, _ in manifest.files.values()) / 1e6
        point = (size, float(validation["decode"]["mean_kl"])) if manifest.generates else None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise PackageError("its manifest or validation does not follow its schema", why=problem) from None
    return {
        **shown,
        "digest": manifest.digest,
        "link": f"./{quote(folder.name)}/{html_report.REPORT}" if html_report.REPORT in manifest.files else "",
        "point": point,
        "attribution": measured.attribution(folder),
        "bench": measured.bench(folder),
    }


def _whole(folder: Path) -> Manifest:
    """Check a package without reading its weights.

    Raises:
        PackageError: it is damaged.
    """
    manifest = read_manifest(folder)
    entries = {path.name: path.lstat() for path in folder.iterdir()}
    wanted = {name: sha256 for name, (_, sha256) in manifest.files.items()}
    problems = [f"{name} is missing" for name in sorted({*wanted, MANIFEST, CHECKSUMS} - entries.keys())]
    allowed = {*wanted, MANIFEST, CHECKSUMS, *(SIGNED if SIGNATURE in entries else ())}
    problems += [f"{name} was added" for name in sorted(entries.keys() - allowed)]
    problems += [f"{name} is no regular file" for name, entry in entries.items() if not stat.S_ISREG(entry.st_mode)]
    if not problems:
        problems = [
            f"{name} has changed"
            for name, (size, sha256) in manifest.files.items()
            if entries[name].st_size != size
            or (name in (VALIDATION, html_report.REPORT) and digest.of_file(folder / name) != sha256)
        ]
        sums = package_files.checksums({**wanted, MANIFEST: digest.of_file(folder / MANIFEST)})
        if (folder / CHECKSUMS).read_bytes() != sums:
            problems.append(f"{CHECKSUMS} does not agree with the manifest")
    if problems:
        raise PackageError("it is not the package that was built", why="; ".join(problems))
    package_config.check_settings(folder, manifest)
    package_graphs.check_external_data(folder)
    return manifest


def _overview(packages: Sequence[Mapping[str, Any]]) -> str:
    """Size against loss of all packages that generate text; empty when there is one."""
    points = [
        svg.Point(package["point"][0], package["point"][1], str(number), package["name"])
        for number, package in enumerate(packages, 1)
        if package["point"]
    ]
    if len(points) < 2:
        return ""
    told = "; ".join(f"{point.mark} {point.name}: {point.x:.0f} MB, KL {html_report.nats(point.y)}" for point in points)
    return svg.scatter("Size against loss", told, points, "MB (better: left)", "mean KL, decode", more=False)
