"""What several commands take: options, and kinds of values that are checked as they are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[argparse.Namespace], int]
ARTIFACTS, RECIPES = Path("artifacts"), Path("recipes")
_UNITS = {"GB": 10**9, "GIB": 1 << 30, "MB": 10**6, "MIB": 1 << 20}


def command(root: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    """Add a command to ``root`` that calls ``run``; ``text`` is what lists say of it."""
    parser: argparse.ArgumentParser = root.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def locked(parser: argparse.ArgumentParser) -> None:
    text = "refuse a recipe that names a branch or tag, as is done in CI"
    parser.add_argument("--locked", action="store_true", help=text)


def store(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("QWEN_ONNX_STORE", ARTIFACTS / ".store"))
    parser.add_argument("--store", type=Path, default=default, help="(default: $QWEN_ONNX_STORE or %(default)s)")


def key(parser: argparse.ArgumentParser) -> None:
    text = "the public key that the package must be signed with; without one, nobody asks who made it"
    parser.add_argument("--key", type=Path, metavar="PEM", help=text)


def provider(parser: argparse.ArgumentParser) -> None:
    text = "cpu: on the processor, whatever hardware the package is for (default: its own)"
    parser.add_argument("--provider", choices=("cpu",), default="", help=text)


def json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output, one JSON object a line")


def memory(text: str) -> int:
    """Bytes of ``4GB``, ``512 MiB`` and the like, for the command line."""
    number = text.strip().upper().rstrip("GMIB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = float(number) * _UNITS[unit.strip() or "GB"]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory, such as 4GB or 512MiB") from None
    if not 0 < size < 1e15:  # NaN is not, either
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory that a device has")
    return int(size)


def positive(text: str) -> int:
    """A positive whole number, for the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number
