"""The commands that measure: find a scheme, time packages, tell where a package loses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline import bench_loop
from pipeline.commands import arguments
from pipeline.commands.shared import aside, check_package, check_positive, open_store
from pipeline.errors import UsageError
from pipeline.task import GENERATE


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "tune", tune, "find a scheme for each weight, and write it as a recipe")
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--max-kl", type=float, metavar="NATS", help="the smallest package within this mean KL divergence"
    )
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="with weights within N bytes; without --max-kl the most faithful"
    )
    parser.add_argument(
        "--min-decode-ratio", type=float, metavar="R", help="at least R times as fast a token as the fastest scheme"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="recipe to write (default: RECIPE with -tuned)")
    arguments.store(parser)
    arguments.json(parser)

    parser = arguments.command(root, "bench", bench, "time packages against one another, and against other tools")
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    against = (
        "llama.cpp, llama.cpp-q4_k_m (quantized here by llama.cpp), plain-olive (ModelBuilder's INT4), torch or "
        "torch-bfloat16; may be given again"
    )
    parser.add_argument("--against", action="append", default=[], metavar="PEER", help=against)
    for name, what, usual in (
        ("prefill", "prompt lengths", bench_loop.PREFILL),
        ("decode", "depths of context that answers are timed at", bench_loop.DECODE),
    ):
        text = f"{what}, in tokens (default: {','.join(map(str, usual))})"
        parser.add_argument(f"--{name}", type=_lengths, default=usual, metavar="N,N...", help=text)
    parser.add_argument("--quality", action="store_true", help="also how far each is from the checkpoint; minutes")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: PACKAGE.bench.json, beside the first)")
    parser.add_argument("--trust", action="store_true", help="load packages without checking them first")
    arguments.store(parser)
    arguments.json(parser)

    parser = arguments.command(root, "attribute", attribute, "tell where a package loses what it loses")
    parser.add_argument("package", type=Path)
    parser.add_argument("--trust", action="store_true", help="load the package without checking it first")
    arguments.store(parser)
    arguments.json(parser)


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(part) for part in text.split(","))
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a length that is not positive")
    return lengths


def tune(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import recipe
    from pipeline.tuning import tune

    check_positive(options, "max_kl", "max_bytes", "min_decode_ratio")
    out = options.out or options.recipe.with_name(f"{options.recipe.stem}-tuned.yaml")
    loaded = recipe.load(options.recipe)
    if loaded.recipe.task != GENERATE:
        raise UsageError(f"tune measures what a model generates, and this recipe's is to {loaded.recipe.task}")
    given = {key: getattr(options, key) for key in recipe.Objective.model_fields}
    if (options.min_decode_ratio or 0) > 1:
        raise UsageError("--min-decode-ratio is above 1", why="nothing is faster than each weight's fastest scheme")
    asked = recipe.Objective(**given) if any(given.values()) else loaded.recipe.objective
    reporter = report.reporter(options.json)
    try:
        found = tune.tune(loaded, open_store(options), reporter, asked, out)
    finally:
        reporter.close()
    if options.json:
        facts = {"recipe": str(out), "bytes": found.size, "predicted_kl": found.predicted, "mean_kl": found.measured}
        print(json.dumps({**facts, "decode_ratio": round(found.decode_ratio, 3)}))
        return 0
    print(f"{out}: {found.size / 1e6:.0f} MB of weights, mean KL {found.measured:.4f}")
    print(f"next: qwen-onnx build {out}")
    return 0


def bench(options: argparse.Namespace) -> int:
    from pipeline.bench import compare as bench, peers
    from pipeline.builds import report
    from pipeline.documents import measured

    check_positive(options, "rounds", "threads")
    peers.check_names(options.against)
    first: Path = options.packages[0].resolve()
    out = options.out or measured.beside(first, "bench")
    bench.check_place(out)
    paths = {path.resolve(): path for path in options.packages}
    names = [path.name for path in paths]
    packages = {str(given) if names.count(path.name) > 1 else path.name: given for path, given in paths.items()}
    for path in packages.values():
        check_package(argparse.Namespace(package=path, trust=options.trust), GENERATE)
    settings = bench.Settings(options.rounds, options.prefill, options.decode, options.threads or 0, options.quality)
    data = bench.measure(packages, options.against, settings, open_store(options), aside)
    bench.write(data, out)
    print(json.dumps(data) if options.json else f"{report.bench(data)}\n\nwritten to {out}")
    return 0


def attribute(options: argparse.Namespace) -> int:
    from pipeline import files
    from pipeline.builds import report
    from pipeline.documents import measured
    from pipeline.tuning import attribution

    check_package(options, GENERATE)
    reporter = report.reporter(options.json)
    try:
        found = attribution.attribute(
            options.package, open_store(options), lambda part, path: reporter.note(f"{part:4.0%}  {path}")
        )
    finally:
        reporter.close()
    path = measured.beside(options.package, "attribution")
    files.publish(path, json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
        return 0
    print(report.attribution(found))
    print(f"all of it: {path}")
    return 0
