"""The commands about models and targets: list them, choose a model, lock a recipe's checkpoint.

Imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.facts.models import Model
    from pipeline.tuning.catalogue import Base, Demand, Planned


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "models", models, "list the Qwen models, and what each needs")
    parser.add_argument(
        "--task", default="", help="what it should be made for: chat, code, math, thinking, vision, ..."
    )
    parser.add_argument("--family", default="", help="model type, such as qwen3")
    _device(parser)
    parser.add_argument("--plan", default="", metavar="NAME", help="show what building one would need, step by step")
    parser.add_argument("--scheme", default="int4", help="of the build that --plan shows (default: %(default)s)")
    parser.add_argument("--exporter", default="", help="of the build that --plan shows (default: the scheme's)")
    arguments.json(parser)

    parser = arguments.command(root, "choose", choose, "propose a model and a scheme that fit, and their recipe")
    parser.add_argument("--task", default="chat", help="what it should be made for (default: %(default)s)")
    text = "what the device has for the model, such as 4GB or 3.5GiB"
    parser.add_argument("--memory", type=arguments.memory, required=True, metavar="SIZE", help=text)
    parser.add_argument("--family", default="", help="model type, such as qwen3")
    _device(parser)
    parser.add_argument("--research", action="store_true", help="also models whose licence allows research only")
    arguments.json(parser)

    parser = arguments.command(root, "lock", lock, "write the commit and digest of a recipe's checkpoint into it")
    parser.add_argument("recipe", type=Path)
    text = "take this branch, tag or commit instead of the recipe's, and its bytes"
    parser.add_argument("--revision", default="", help=text)
    arguments.json(parser)

    parser = arguments.command(root, "targets", targets, "what each target is, and what this machine can do for it")
    arguments.json(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="cpu", help="(default: %(default)s)")
    text = "tokens of prompt and answer (default: %(default)s)"
    parser.add_argument("--context", type=arguments.positive, default=4096, metavar="N", help=text)
    parser.add_argument("--recipes", type=Path, default=arguments.RECIPES, metavar="DIR", help="(default: %(default)s)")


def models(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.tuning import catalogue

    if options.plan:
        return _plan(options)
    found = catalogue.select(options.task, options.family)
    bases = catalogue.bases(options.recipes, options.target)
    rows = []
    for model in found:
        demands = {base.scheme: catalogue.demand_of(model, base, options.context) for base in bases}
        obstacles = {base.scheme: catalogue.obstacle(model, base) for base in bases}
        if options.json:
            print(json.dumps(_facts(model) | {"target": options.target, "needs": _needs(demands, obstacles)}))
        else:
            mark = "" if all(obstacles.values()) else "yes"
            rows.append((*_columns(model), *(_gigabytes(demand) for demand in demands.values()), mark))
    if not options.json:
        header = ("MODEL", "FAMILY", "PARAMETERS", "CONTEXT", "LICENCE", "GOOD FOR", "LANGUAGES")
        print(report.table(rows, (*header, *(base.scheme.upper() for base in bases), "BUILT")))
        print(
            f"\nunder each scheme of {options.target}: GB of memory with {options.context} tokens of context / GB of "
            "disk; parameters in billions (those that a token goes through); BUILT: this version builds it"
        )
    return 0


def _columns(model: Model) -> tuple[str, ...]:
    sparse = f" ({model.active / 1e9:.1f})" if model.shape.experts else ""
    return (
        model.name,
        model.family,
        f"{model.computed / 1e9:.2f}{sparse}",
        str(model.shape.context),
        model.license,
        " ".join(model.strengths),
        str(model.spoken) if model.spoken > len(model.languages) else " ".join(model.languages),
    )


def _gigabytes(demand: Demand) -> str:
    return f"{demand.memory / 1e9:.1f}/{demand.disk / 1e9:.1f}"


def _needs(demands: dict[str, Demand], obstacles: dict[str, str]) -> dict[str, Any]:
    return {scheme: asdict(demand) | {"obstacle": obstacles[scheme]} for scheme, demand in demands.items()}


def _facts(model: Model) -> dict[str, Any]:
    facts = {"repo": model.repo, "family": model.family, **asdict(model)}
    return facts | {"computed_parameters": model.computed, "active_parameters": model.active}


def _plan(options: argparse.Namespace) -> int:
    from pipeline.tuning import catalogue

    base = catalogue.base(options.recipes, options.target, options.scheme)
    planned = catalogue.planned(catalogue.find(options.plan), base, options.context, options.exporter)
    if options.json:
        steps = {stage: asdict(need) for stage, need in planned.steps}
        machine = {"memory": planned.memory, "disk": planned.disk}
        rest = {"machine": machine, "package": asdict(planned.demand), "obstacle": planned.obstacle}
        facts = {"repo": planned.model.repo, "base": base.name, "shards": planned.shards}
        print(json.dumps({**facts, "steps": steps, **rest}))
    else:
        print(_planned(planned, base))
    return 0


def _planned(planned: Planned, base: Base) -> str:
    import psutil

    from pipeline.builds import report

    model, demand = planned.model, planned.demand
    rows = [
        (stage, f"{need.memory / 1e9:.1f} GB", f"{need.disk / 1e9:.1f} GB", _duration(need.seconds))
        for stage, need in planned.steps
    ]
    seconds = sum(need.seconds for _, need in planned.steps)
    here = psutil.virtual_memory().total
    held = "holds it" if 0.9 * here >= max(need.memory for _, need in planned.steps) else "does not hold it"
    shards = f"{planned.shards} shard{'s' * (planned.shards > 1)}"
    machine = f"a machine with {planned.memory >> 30} GiB of memory and {planned.disk / 1e9:.0f} GB of disk"
    size, memory = f"{demand.disk / 1e9:.1f} GB of disk", f"{demand.memory / 1e9:.1f} GB of memory"
    lines = [f"{model.name} as {base.name}: {model.computed / 1e9:.2f} billion parameters in {shards}"]
    lines += [report.table(rows, ("STEP", "MEMORY", "DISK", "TIME"))]
    lines += [f"{machine} holds the build (this one, of {here / 2**30:.0f} GiB, {held})"]
    lines += [f"it takes {_duration(seconds)} on two cores"]
    lines += [f"the package needs {size}, and {memory} with {demand.context} tokens of context"]
    lines += [f"this version does not build it: {planned.obstacle}"] * bool(planned.obstacle)
    return "\n".join(lines)


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def choose(options: argparse.Namespace) -> int:
    from pipeline.tuning import choose

    folder, given = options.recipes, (options.task, options.memory, options.target, options.context)
    choice = choose.choose(folder, *given, options.family, options.research)
    if options.json:
        facts = {"repo": choice.model.repo, "base": choice.base.name, "why": list(choice.why)}
        rest = {"recipe": str(choice.path) if choice.path else None, "text": choice.text or None}
        print(json.dumps({**facts, **asdict(choice.demand), **rest}))
        return 0
    if choice.path:
        print("\n".join(choice.why))
        print(f"\nthere is a recipe for it: {choice.path}\nnext: qwen-onnx build {choice.path}")
        return 0
    path = folder / choice.model.name.lower() / f"{choice.base.name}.yaml"
    print("\n".join(f"# {line}" for line in choice.why))
    print(f"#\n# Write this to {path}, then: qwen-onnx lock {path} && qwen-onnx build {path}")
    print(choice.text, end="")
    return 0


def lock(options: argparse.Namespace) -> int:
    from pipeline.builds import lock
    from pipeline.facts import recipe

    loaded = recipe.load(options.recipe)
    if not any(isinstance(source, recipe.HubSource) for source in loaded.recipe.checkpoint.sources):
        raise UsageError(f"{options.recipe} has no source on the hub", why="other sources do not move")
    locks = lock.resolve(loaded, options.revision)
    changed = lock.write(loaded, locks) if locks else []
    if options.json:
        print(json.dumps({"locks": [asdict(item) for item in locks], "changed": [str(path) for path in changed]}))
        return 0
    for item in locks:
        print(f"{item.repo} at {item.revision}: commit {item.commit}, sha256 {item.sha256}, {item.size / 1e6:.0f} MB")
    print(f"written: {', '.join(map(str, changed))}" if changed else f"{options.recipe} is locked already")
    return 0


def targets(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import machine
    from pipeline.facts.target import TARGETS

    found = [(target, machine.execution(target)) for target in TARGETS.values()]
    if options.json:
        for target, execution in found:
            print(json.dumps({**asdict(target), "executed_here": asdict(execution)}))
    else:
        print(report.targets(found))
    return 0
