"""The command line: parse, call, map errors to exit codes (`pipeline.errors`)."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from pipeline import __version__
from pipeline.commands import (
    adapters,
    build,
    formats,
    generate,
    measure,
    models,
    recipes,
    retrieval,
    serve,
    store,
    trust,
    workflow,
)
from pipeline.commands.arguments import Command
from pipeline.errors import ERRORS, INTERRUPTED, QwenOnnxError

# In the order in which they are listed.
_COMMANDS = (
    *(build, workflow, measure, models, recipes, store),
    *(trust, generate, serve, retrieval, adapters, formats),
)
READER_GONE = 141  # what shells say of programs that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        code = command(options)
        sys.stdout.flush()  # here, where a reader that has gone is still no traceback
        return code
    except QwenOnnxError as error:
        from pipeline.builds.report import show_error

        show_error(error, getattr(options, "json", False))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, such as `head`; what was asked for may not be done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _parser() -> argparse.ArgumentParser:
    codes = ", ".join(f"{kind.exit_code} {name}" for name, kind in ERRORS.items())
    parser = argparse.ArgumentParser(
        prog="qwen-onnx",
        description="Turn a Qwen checkpoint into an ONNX package that an app team can trust.",
        epilog=f"Exit codes: 0 success, 1 a bug, {codes}, {INTERRUPTED} interrupted, {READER_GONE} output closed.",
    )
    parser.add_argument("--version", action="version", version=f"qwen-onnx {__version__}")
    root = parser.add_subparsers(required=True, metavar="COMMAND")
    for commands in _COMMANDS:
        commands.add(root)
    return parser


if __name__ == "__main__":
    sys.exit(main())
