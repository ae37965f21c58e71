"""The commands of packages that embed texts or rank documents."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.commands import arguments, shared
from pipeline.errors import UsageError
from pipeline.task import EMBED, RERANK


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "embed", embed, "turn texts into vectors with a package that embeds")
    parser.add_argument("package", type=Path)
    text = "a document, as it is, or - for standard input; may be given again"
    parser.add_argument("--text", action="append", default=[], help=text)
    text = "a query, with the instruction before it; may be given again"
    parser.add_argument("--query", action="append", default=[], metavar="TEXT", help=text)
    text = "keep the first N dimensions, of models that were trained for it"
    parser.add_argument("--dimensions", type=int, metavar="N", help=text)
    _common(parser)

    parser = arguments.command(root, "rerank", rerank, "score documents for a query with a package that ranks")
    parser.add_argument("package", type=Path)
    parser.add_argument("--query", required=True, metavar="TEXT")
    text = "a document, or - for standard input; may be given again"
    parser.add_argument("--document", action="append", required=True, metavar="TEXT", help=text)
    _common(parser)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instruct", metavar="TEXT", help="what queries are for (default: to search the web)")
    parser.add_argument("--truncate", action="store_true", help="cut what is longer than the model takes")
    parser.add_argument("--threads", type=int, help="processor threads (default: all cores)")
    parser.add_argument("--trust", action="store_true", help="skip the digests of a package verified before")
    arguments.json(parser)


def embed(options: argparse.Namespace) -> int:
    from pipeline.runtime import retrieval

    shared.check_positive(options, "threads", "dimensions")
    instruct = {"instruction": options.instruct} if options.instruct else {}
    asked = [("query", {"query": text, **instruct}) for text in options.query]
    asked += [("document", {"document": _given(text)}) for text in options.text]
    if not asked:
        raise UsageError("there is nothing to embed", fix="give --text, --query, or both; each may be given again")
    if instruct and not options.query:
        raise UsageError("--instruct is for queries, and there is no --query", why="documents are embedded as they are")
    shared.check_package(options, EMBED)
    opened = retrieval.open_package(options.package, options.threads)
    rows = [opened.ids(form, options.truncate, **texts) for form, texts in asked]
    vectors = opened.embed(rows, options.dimensions)
    for (form, texts), row, vector in zip(asked, rows, vectors, strict=True):
        values = [round(float(value), 7) for value in vector]
        if options.json:
            print(json.dumps({form: texts[form], "tokens": len(row), "embedding": values}, ensure_ascii=False))
        else:
            print(f"{form} ({len(row)} tokens, {len(values)} dimensions): {' '.join(map(str, values[:4]))} ...")
    queries = len(options.query)
    for index, vector in enumerate(vectors[:queries] if not options.json else ()):
        near = ", ".join(f"{float(vector @ other):.4f}" for other in vectors[queries:])
        if near:
            print(f"cosines of query {index + 1} with the texts: {near}")
    return 0


def rerank(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.runtime import retrieval

    shared.check_positive(options, "threads")
    shared.check_package(options, RERANK)
    opened = retrieval.open_package(options.package, options.threads)
    instruct = {"instruction": options.instruct} if options.instruct else {}
    documents = [_given(text) for text in options.document]
    rows = [opened.ids("pair", options.truncate, query=options.query, document=text, **instruct) for text in documents]
    scores = opened.scores(rows)
    order = sorted(range(len(rows)), key=lambda index: -scores[index])  # equal ones stay in the order given
    for index in order if options.json else ():
        facts = {"index": index, "score": round(scores[index], 6), "tokens": len(rows[index])}
        print(json.dumps({**facts, "document": documents[index]}, ensure_ascii=False))
    if not options.json:
        shown = [(f"{scores[index]:.4f}", str(index + 1), documents[index].replace("\n", " ")[:80]) for index in order]
        print(report.table(shown, ("SCORE", "NO.", "DOCUMENT")))
    return 0


def _given(text: str) -> str:
    """A text of the command line, or standard input for ``-``."""
    return sys.stdin.read() if text == "-" else text
