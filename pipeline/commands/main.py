"""What each command of the command line does: one function a command, which returns an exit code.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GateError, QwenOnnxError, ResourceError, UsageError
from pipeline.task import GENERATE

if TYPE_CHECKING:
    from pipeline.artifact import Step
    from pipeline.builds.store import Store
    from pipeline.builds.summary import Recorder
    from pipeline.facts.recipe import Loaded

RECIPES = Path("recipes")


def _load(path: Path, options: argparse.Namespace) -> tuple[Loaded, list[Step]]:
    from pipeline.builds import plan

    loaded = _locked(path, options)
    return loaded, plan.make(loaded)


def _locked(path: Path, options: argparse.Namespace) -> Loaded:
    """A recipe, with the commit of today where it names a branch; CI refuses that."""
    from pipeline.facts import recipe

    loaded = recipe.load(path)
    if any(source.type == "hub" and not source.locked for source in loaded.recipe.checkpoint.sources):
        from pipeline.builds import lock

        return lock.pinned(loaded, lock.is_strict(getattr(options, "locked", False)), _aside)
    return loaded


def _open_store(options: argparse.Namespace) -> Store:
    from pipeline.builds.store import Store

    return Store(options.store)


def build(options: argparse.Namespace) -> int:
    from pipeline.builds import summary

    recorder = summary.Recorder()
    try:
        folder = _build(options, recorder)
    except QwenOnnxError as error:
        try:
            _summarize(options, recorder, None, error)
        except ResourceError as second:  # what ended the build says more
            _aside(str(second))
        raise
    _summarize(options, recorder, folder)
    return 0


def _summarize(
    options: argparse.Namespace, recorder: Recorder, folder: Path | None, error: QwenOnnxError | None = None
) -> None:
    """Write what a build came to, where that is asked for."""
    from pipeline import files
    from pipeline.builds import summary

    if not (options.summary or options.junit):
        return
    name = f"{options.recipe.resolve().parent.name}-{options.recipe.stem}"  # also of a recipe that cannot be read
    found = recorder.summary(name, folder, error)
    if options.summary:
        files.publish(options.summary, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if options.junit:
        files.publish(options.junit, summary.junit(found))


def _build(options: argparse.Namespace, recorder: Recorder) -> Path:
    """Build and deliver; returns the folder of the package."""
    from pipeline.builds import report, runner
    from pipeline.documents import index

    loaded, steps = _load(options.recipe, options)
    if options.prompt and loaded.recipe.task != GENERATE:
        raise UsageError(f"a package that can {loaded.recipe.task} answers no --prompt", fix="leave out --prompt")
    store = _open_store(options)
    recorder.reporter = report.reporter(options.json)
    try:
        artifacts = runner.build(steps, store, recorder)
        folder: Path = options.out / loaded.name
        fresh = runner.install(artifacts["package"], folder, store)
        with store.lock("index"):  # else a build that looked before another was done could write after it
            page = index.write(options.out)
    except GateError as error:
        recorder.close()
        from pipeline.tuning import tune

        validation = json.loads(Path(error.where).read_bytes())
        if not options.json:
            print(report.validation(validation))
        fix = tune.repair(loaded, store, validation) if loaded.recipe.task == GENERATE else ""
        fix = fix or error.fix
        raise GateError(error.what, where=error.where, why=error.why, fix=fix) from None
    finally:
        recorder.close()
    if options.json:
        report.Events().emit("package", path=str(folder), fresh=fresh)
        return folder
    print(report.package(folder))
    if options.prompt and fresh:
        _answer(folder, options.prompt)
    elif options.prompt:
        print("unchanged since the last build, which has answered already")
    print(report.next_steps(folder))
    print(f"       {page}  all packages side by side, in a browser")
    return folder


def _answer(folder: Path, prompt: str) -> None:
    """Let a package that was just built and verified answer a prompt, where it was validated."""
    from pipeline.artifact import read_manifest
    from pipeline.commands import answer
    from pipeline.facts import machine
    from pipeline.runtime import chat
    from pipeline.runtime.thinking import VARIABLE

    target = read_manifest(folder).data["target"]
    elsewhere = machine.elsewhere(target["provider"], target["validated_on"], target["not_validated_on_target"])
    limit = 4 if "emulator" in target["validated_device"] else 160  # a token takes an emulator a quarter of a minute
    print(f"\n> {prompt}\n")
    tokenizer = chat.load(folder)
    briefly = {VARIABLE: False} if tokenizer.takes(VARIABLE) else {}  # thoughts alone would fill the limit
    asked = tokenizer.encode_chat([{"role": "user", "content": prompt}], **briefly)
    settings = answer.Settings(limit, provider="cpu" if elsewhere else "", split=tokenizer.thinks)
    answer.stream(folder, tokenizer, asked, settings)
    if elsewhere:
        device = f"{target['validated_on']} ({target['validated_device']})"
        print(f"(answered by {device}, not on {elsewhere})", file=sys.stderr)


def report(options: argparse.Namespace) -> int:
    from pipeline.documents import index

    print(index.write(options.folder))
    return 0


def plan(options: argparse.Namespace) -> int:
    from pipeline.builds import report, runner

    loaded, steps = _load(options.recipe, options)
    store = _open_store(options)
    cached = {step.stage: store.get(step.stage, step.key) for step in steps}
    needed = runner.need(steps, store)
    if options.json:
        for step in steps:
            print(json.dumps({**step.as_dict(), "context": None, "cached": cached[step.stage] is not None}))
        print(json.dumps({"need": vars(needed)}))
    else:
        print(report.plan(loaded.name, steps, cached, needed))
    runner.check(needed)
    return 0


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
        found = tune.tune(loaded, _open_store(options), reporter, asked, out)
    finally:
        reporter.close()
    if options.json:
        facts = {"recipe": str(out), "bytes": found.size, "predicted_kl": found.predicted, "mean_kl": found.measured}
        print(json.dumps({**facts, "decode_ratio": round(found.decode_ratio, 3)}))
        return 0
    print(f"{out}: {found.size / 1e6:.0f} MB of weights, mean KL {found.measured:.4f}")
    print(f"next: qwen-onnx build {out}")
    return 0


def recipe_list(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import recipe

    paths = recipe.find(options.folder)
    if not paths:
        raise UsageError(f"there are no recipes below {options.folder}")
    loaded = [recipe.load(path) for path in paths]
    rows = [(str(item.path), item.recipe.target, item.recipe.description) for item in loaded]
    print(report.table(rows, ("RECIPE", "TARGET", "DESCRIPTION")))
    return 0


def recipe_show(options: argparse.Namespace) -> int:
    import yaml

    from pipeline.facts import recipe

    loaded = recipe.load(options.recipe)
    value = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    print(f"# {loaded.name}")
    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), end="")
    return 0


def recipe_lint(options: argparse.Namespace) -> int:
    from pipeline.builds import report
    from pipeline.facts import recipe

    worst = 0
    for path in options.recipes:
        try:
            _check_olive_options(recipe.load(path))
        except QwenOnnxError as error:
            report.show_error(error, False)
            worst = max(worst, error.exit_code)
        else:
            print(f"{path}: good")
    return worst


def _check_olive_options(loaded: Loaded) -> None:
    from pipeline import olive
    from pipeline.builds import plan
    from pipeline.facts import recipe

    wanted = loaded.recipe
    written = recipe.exporter_of(wanted, plan.shape_of(loaded))
    olive.check_options(written, wanted.export.options, f"{loaded.path}: export.options")
    if wanted.quantize.options:
        olive.check_options(wanted.quantize.algorithm, wanted.quantize.options, f"{loaded.path}: quantize.options")


def recipe_schema(options: argparse.Namespace) -> int:  # noqa: ARG001
    from pipeline.facts import recipe

    print(json.dumps(recipe.json_schema(), indent=1))
    return 0


def store_list(options: argparse.Namespace) -> int:
    from pipeline.builds import report

    entries = _open_store(options).entries()
    rows = [(entry.stage, entry.key[:16], entry.digest[:16], report.summary(entry)) for entry in entries]
    print(report.table(rows, ("STAGE", "KEY", "DIGEST", "MADE IN")))
    return 0


def store_check(options: argparse.Namespace) -> int:
    store = _open_store(options)
    entries = store.entries()
    bad = {entry.key: problems for entry in entries if (problems := store.problems(entry))}
    for entry in entries:
        if entry.key in bad:
            with store.lock(entry.key):
                store.remove(entry)
            print(f"{entry.stage} {entry.key[:16]}: {'; '.join(bad[entry.key])}: removed, the next build makes it anew")
    print(f"{len(entries) - len(bad)} artifacts are whole, {len(bad)} were damaged")
    return 0


def store_gc(options: argparse.Namespace) -> int:
    from pipeline.facts import recipe

    paths = options.keep if options.keep is not None else recipe.find(RECIPES)
    keep: set[str] = set()
    for path in paths:
        try:
            keep.update(step.key for step in _load(path, options)[1])
        except QwenOnnxError as error:
            if options.keep:
                raise
            print(f"{path}: not kept ({error.what})", file=sys.stderr)
    freed = _open_store(options).collect(keep)
    print(f"{freed / 1e9:.2f} GB freed")
    return 0


def generate(options: argparse.Namespace) -> int:
    from pipeline.commands import adapters as adapter_commands, answer
    from pipeline.runtime import audio_tower, chat, images, wav
    from pipeline.runtime.sampling import Sampling

    check_positive(options, "max_tokens", "threads", "thinking_budget")
    if len(options.adapter) > 1:
        raise UsageError(
            f"--adapter was given {len(options.adapter)} times",
            why="of two adapters the runtime would compute a mixture",
            fix="answer with one of them, or merge them before they are converted",
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, seed=options.seed)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text:
        raise UsageError("the prompt is empty", fix="give some text with --prompt, or through standard input with -")
    pictures = [images.load(path) for path in options.image]
    clips = [wav.read(path) for path in options.audio]
    _check_media(options)
    _check_thinking(options)
    check_package(options, GENERATE)
    adapter = adapter_commands.chosen(options.package, options.adapter[0], options.trust) if options.adapter else None
    tokenizer = chat.load(options.package)
    system = [{"role": "system", "content": options.system}] if options.system else []
    settings = answer.Settings(
        options.max_tokens,
        options.threads,
        options.provider,
        sampling,
        options.lookup,
        not options.raw and tokenizer.thinks,
        options.thinking_budget,
        options.json,
        adapter,
        tuple(pictures),
        tuple(clips),
    )
    if options.raw:  # sounds come first then, as base models are asked
        prompt = tokenizer.encode("".join(audio_tower.TOKENS) * len(clips)) + tokenizer.encode(text, special=False)
    else:
        variables = answer.thinking_variables(tokenizer, options.thinking)
        prompt = tokenizer.encode_chat(
            [*system, {"role": "user", "content": chat.content(text, len(pictures), len(clips))}], **variables
        )
    answer.stream(options.package, tokenizer, prompt, settings)
    return 0


def check_package(options: argparse.Namespace, task: str) -> None:
    """Verify a package, unless it is trusted, and refuse one that is for something else.

    Raises:
        PackageError, RuntimeMissing: as `verify.package` and `verify.check_runtime`.
        UsageError: it is made for another task.
    """
    from pipeline.artifact import MANIFEST, read_manifest
    from pipeline.package import verify

    if not options.trust:
        verify.check_runtime(verify.package(options.package))
    if not (options.package / MANIFEST).is_file():  # trusted, and not yet a package
        return
    found = read_manifest(options.package).task
    if found != task:
        raise UsageError(f"{options.package} is a package to {found}, not to {task}", fix=f"use `qwen-onnx {found}`")


def _check_media(options: argparse.Namespace) -> None:
    """Refuse options that do not go together with pictures or sounds."""
    if options.image and options.audio:
        raise UsageError("no model takes --image and --audio together", fix="leave out one of them")
    if options.image and options.raw:
        raise UsageError("--image does not go with --raw", fix="leave out --raw")
    if options.lookup and (options.image or options.audio):
        raise UsageError("--lookup drafts from text, and goes with neither --image nor --audio", fix="leave it out")


def _check_thinking(options: argparse.Namespace) -> None:
    """Refuse options that contradict one another, before anything is read."""
    budget = options.thinking_budget is not None
    if options.raw and (budget or options.thinking is not None):
        raise UsageError("--raw has no chat template, which is what tells a model to think", fix="leave out --raw")
    if budget and options.thinking is False:
        raise UsageError("--no-thinking leaves nothing for a --thinking-budget", fix="leave out one of them")
    if budget and options.lookup:
        raise UsageError(
            "--lookup drafts from what was said, and cannot end thoughts in between",
            fix="leave out --lookup, or --thinking-budget",
        )


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
    data = bench.measure(packages, options.against, settings, _open_store(options), _aside)
    bench.write(data, out)
    print(json.dumps(data) if options.json else f"{report.bench(data)}\n\nwritten to {out}")
    return 0


def _aside(text: str) -> None:
    """Tell how far a long command has come, where it is not mistaken for its result."""
    print(text, file=sys.stderr, flush=True)


def attribute(options: argparse.Namespace) -> int:
    from pipeline import files
    from pipeline.builds import report
    from pipeline.documents import measured
    from pipeline.tuning import attribution

    check_package(options, GENERATE)
    reporter = report.reporter(options.json)
    try:
        found = attribution.attribute(
            options.package, _open_store(options), lambda part, path: reporter.note(f"{part:4.0%}  {path}")
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


def check_positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # NaN is not positive either
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")


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
