"""Is ``runtime.minimum`` true? Replays the kept packages with the oldest and the newest runtime that is claimed.

Each version is installed into an environment of its own, which has nothing of this project: ``python tests/runtimes.py
[VERSION...]``. Versions that are given are tried instead. Exit code 1 when one of them does not compute what was
validated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = Path(__file__).parent / "fixtures" / "packages"
DISTRIBUTION = "onnxruntime-genai"
NEWEST = "0.18.0"  # of November 2026


def packages() -> list[Path]:
    """The kept packages that can be replayed; the first ones recorded no probabilities."""
    return [path.parent for path in sorted(PACKAGES.glob("*/replay.py"))]


def claimed() -> list[str]:
    """The oldest version that the kept packages ask for, and the newest that was tried."""
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in packages()]
    oldest = {str(manifest["runtime"]["minimum"]) for manifest in manifests}
    return [*sorted(oldest), NEWEST]


def main(versions: list[str]) -> int:
    """Try each version; returns an exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for version in versions or claimed():
            python = _environment(Path(folder) / version, version)
            for package in packages():
                command = [str(python), "-I", str(package / "replay.py"), str(package)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                said = (done.stdout or done.stderr).strip().replace("\n", "; ")
                print(f"{DISTRIBUTION} {version}  {package.name}: exit code {done.returncode}: {said}", flush=True)
                failed += done.returncode != 0
    return 1 if failed else 0


def _environment(folder: Path, version: str) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{DISTRIBUTION}=={version}"], check=True)
    return python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
