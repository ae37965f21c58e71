"""The commands of packages that embed texts or rank documents."""

from __future__ import annotations

import argparse
import json
import sys

from pipeline.commands import shared
from pipeline.errors import UsageError
from pipeline.task import EMBED, RERANK


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
