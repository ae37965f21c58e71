"""What ``verify.py`` does, which packages have inside: the checks of `pipeline.package.verify` without this project.

Everything up to the load needs the standard library alone; the replay is that of ``replay.py`` beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import PackageError, RuntimeMissing
from pipeline.package import verify
from pipeline.package.verify import Received, Report, Step

SCRIPT = "verify.py"


def main(script: str, arguments: Sequence[str] | None = None) -> int:
    """Check the package in the script's folder, or in the folder given; returns an exit code."""
    parser = argparse.ArgumentParser(prog=SCRIPT, description="Check a package before anything in it is trusted.")
    parser.add_argument("package", type=Path, nargs="?", default=Path(script).parent)
    parser.add_argument("--key", type=Path, metavar="PEM", help="the public key that the package must be signed with")
    parser.add_argument("--replay", action="store_true", help="then load the model and replay its golden transcript")
    parser.add_argument("--cpu", action="store_true", help="on the processor, whatever the package is for")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    report = verify.inspect(Received(options.package, options.key), _steps(options.replay, options.cpu))
    print(json.dumps(report.as_dict()) if options.json else "\n".join(lines(report)))
    if report.error:
        print(f"error: {report.error}", file=sys.stderr)
        return report.error.exit_code
    return 0


def lines(report: Report) -> Iterator[str]:
    """A report for people, a line a check."""
    for check in report.checks:
        yield f"{check.state:9}  {check.name:13}  {check.text}"
    yield "PASS" if report.error is None else "FAIL"


def _steps(replay: bool, on_cpu: bool) -> tuple[Step, ...]:
    """The checks that need a runtime: whether it fits, and where asked for the replay."""
    if not replay:
        return (("runtime", verify.runtime),)
    return ("runtime", verify.required_runtime), ("replay", lambda received: _replay(received, on_cpu))


def _replay(received: Received, on_cpu: bool) -> str:
    """Run the package's own ``replay.py``, which has been checked like every file."""
    file = received.path / "replay.py"
    if not file.is_file():
        raise PackageError(f"{received.path} has no replay.py", codes=["replay.unreadable"])
    run: Callable[[Sequence[str]], int] = runpy.run_path(str(file))["main"]
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the report's
        code = run([str(received.path), *(["--cpu"] if on_cpu else [])])
    if code == RuntimeMissing.exit_code:
        raise RuntimeMissing("the model cannot be loaded here", fix="read what replay.py said above")
    if code:
        raise PackageError("this machine does not compute what was validated", codes=["replay.differs"])
    return "this machine computes what was validated"
