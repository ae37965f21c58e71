"""What an app team does with a package alone: its README followed to the letter, in an environment with nothing else.

``python tests/handoff.py DIR`` copies the package to another folder, makes an environment, and runs there what the
README's section on checking and running shows, a line and a program after the other. It prints what each took and said;
exit code 1 when one of them fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

_SECTION = re.compile(r"^## Check it, then run it\n(.*?)^#", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```python\n(.*?)^```|^ {4}(\S[^\n]*)", re.MULTILINE | re.DOTALL)


def steps(readme: str) -> list[tuple[str, list[str]]]:
    """What a card tells its reader to run: a title, and a command."""
    section = _SECTION.search(readme)
    assert section, "the card does not say how to check the package and run it"
    found: list[tuple[str, list[str]]] = []
    for program, line in _BLOCK.findall(section[1]):
        found.append(("the program in Python", ["python", "-c", program]) if program else (line, ["sh", "-c", line]))
    return found


def main(package: Path) -> int:
    """Follow the README of a package; returns an exit code."""
    with tempfile.TemporaryDirectory() as folder:
        received = shutil.copytree(package, Path(folder) / "received")
        begin = time.monotonic()
        venv.create(Path(folder) / "environment", with_pip=True)
        # Nothing of the environment that this program runs in.
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        variables["PATH"] = os.pathsep.join((str(Path(folder) / "environment" / "bin"), os.defpath))
        for title, command in steps((received / "README.md").read_text(encoding="utf-8")):
            start = time.monotonic()
            done = subprocess.run(command, cwd=received, env=variables, capture_output=True, text=True, check=False)
            print(f"{time.monotonic() - start:6.1f} s  {title}", flush=True)
            print(
                "\n".join(f"          {line}" for line in (done.stdout + done.stderr).strip().splitlines()), flush=True
            )
            if done.returncode:
                print(f"it ended with {done.returncode}")
                return 1
        print(f"{time.monotonic() - begin:6.1f} s  altogether, the environment included")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
