"""The commands about the store: list it, check it, collect what no recipe needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.commands import arguments
from pipeline.commands.shared import load, open_store
from pipeline.errors import QwenOnnxError


def add(root: Any) -> None:
    """Add the commands to the command line."""
    store = root.add_parser("store", help="list, clean, check the store").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, action, text in (
        ("list", list_all, "all artifacts"),
        ("check", check, "compare every artifact with its digests, and remove damaged ones"),
        ("gc", collect, "remove artifacts that no recipe needs, abandoned work and downloads"),
    ):
        parsed = arguments.command(store, name, action, text)
        arguments.store(parsed)
        if name == "gc":
            parsed.add_argument("--keep", type=Path, nargs="*", help="recipes to keep (default: all below recipes/)")


def list_all(options: argparse.Namespace) -> int:
    from pipeline.builds import report

    entries = open_store(options).entries()
    rows = [(entry.stage, entry.key[:16], entry.digest[:16], report.summary(entry)) for entry in entries]
    print(report.table(rows, ("STAGE", "KEY", "DIGEST", "MADE IN")))
    return 0


def check(options: argparse.Namespace) -> int:
    store = open_store(options)
    entries = store.entries()
    bad = {entry.key: problems for entry in entries if (problems := store.problems(entry))}
    for entry in entries:
        if entry.key in bad:
            with store.lock(entry.key):
                store.remove(entry)
            print(f"{entry.stage} {entry.key[:16]}: {'; '.join(bad[entry.key])}: removed, the next build makes it anew")
    print(f"{len(entries) - len(bad)} artifacts are whole, {len(bad)} were damaged")
    return 0


def collect(options: argparse.Namespace) -> int:
    from pipeline.facts import recipe

    paths = options.keep if options.keep is not None else recipe.find(arguments.RECIPES)
    keep: set[str] = set()
    for path in paths:
        try:
            keep.update(step.key for step in load(path, options)[1])
        except QwenOnnxError as error:
            if options.keep:
                raise
            print(f"{path}: not kept ({error.what})", file=sys.stderr)
    freed = open_store(options).collect(keep)
    print(f"{freed / 1e9:.2f} GB freed")
    return 0
