"""The commands that measure: find a scheme, time packages, tell where a package loses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pipeline.commands.shared import aside, check_package, check_positive, open_store
from pipeline.errors import UsageError
from pipeline.task import GENERATE


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
