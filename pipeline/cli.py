"""The command line: parse, call, map errors to exit codes (`pipeline.errors`).

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import ERRORS, INTERRUPTED, GateError, QwenOnnxError, UsageError

if TYPE_CHECKING:
    from pipeline.artifact import Step
    from pipeline.generate import Sampling
    from pipeline.recipe import Loaded
    from pipeline.store import Store

Command = Callable[[argparse.Namespace], int]
ARTIFACTS = Path("artifacts")
RECIPES = Path("recipes")
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
        from pipeline.report import show_error

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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = _command(commands, "build", _build, "build, validate and package a recipe")
    build.add_argument("recipe", type=Path)
    build.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of packages (default: %(default)s)")
    build.add_argument("--prompt", metavar="TEXT", help="then let a package that is new answer TEXT")
    _store_option(build)
    _json_option(build)

    plan = _command(commands, "plan", _plan, "show the steps of a recipe, what is cached and what they need")
    plan.add_argument("recipe", type=Path)
    _store_option(plan)
    _json_option(plan)

    _recipe_commands(commands)
    _store_commands(commands)
    _package_commands(commands)
    return parser


def _recipe_commands(commands: Any) -> None:
    recipe = commands.add_parser("recipe", help="list, show, check recipes").add_subparsers(
        required=True, metavar="ACTION"
    )
    listing = _command(recipe, "list", _recipe_list, "all recipes below a folder")
    listing.add_argument("folder", type=Path, nargs="?", default=RECIPES)
    show = _command(recipe, "show", _recipe_show, "a recipe with all that it extends resolved")
    show.add_argument("recipe", type=Path)
    lint = _command(recipe, "lint", _recipe_lint, "check recipes, options of Olive passes included")
    lint.add_argument("recipes", type=Path, nargs="+")
    _command(recipe, "schema", _recipe_schema, "JSON schema of a recipe, for editors")


def _store_commands(commands: Any) -> None:
    store = commands.add_parser("store", help="list, clean, check the store").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, action, text in (
        ("list", _store_list, "all artifacts"),
        ("check", _store_check, "compare every artifact with its digests, and remove damaged ones"),
        ("gc", _store_gc, "remove artifacts that no recipe needs, abandoned work and downloads"),
    ):
        parsed = _command(store, name, action, text)
        _store_option(parsed)
        if name == "gc":
            parsed.add_argument("--keep", type=Path, nargs="*", help="recipes to keep (default: all below recipes/)")


def _package_commands(commands: Any) -> None:
    verify = _command(
        commands, "verify", _verify, "check a package before it is used; nothing of it is loaded before that"
    )
    verify.add_argument("package", type=Path)
    verify.add_argument("--replay", action="store_true", help="then load it and replay its golden transcript here")
    _json_option(verify)

    generate = _command(commands, "generate", _generate, "answer a prompt with a package")
    generate.add_argument("package", type=Path)
    generate.add_argument("--prompt", required=True, help="the text, or - for standard input")
    generate.add_argument("--system", help="system message")
    generate.add_argument("--raw", action="store_true", help="continue the text as it stands, without chat template")
    generate.add_argument("--max-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    generate.add_argument("--top-p", type=float, default=0.8, help="(default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=20, help="(default: %(default)s)")
    generate.add_argument("--seed", type=int)
    generate.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    generate.add_argument("--trust", action="store_true", help="skip the digests of a package that was verified before")
    _json_option(generate)

    bench = _command(commands, "bench", _bench, "time packages against one another, or against other tools")
    bench.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    bench.add_argument(
        "--against", action="append", default=[], metavar="PEER", help="plain-olive: ModelBuilder's INT4"
    )
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    bench.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    bench.add_argument("--trust", action="store_true", help="load packages without checking them first")
    _store_option(bench)
    _json_option(bench)

    _command(commands, "targets", _targets, "what each target is, and what is missing to build it")


def _command(commands: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def _store_option(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("QWEN_ONNX_STORE", ARTIFACTS / ".store"))
    parser.add_argument("--store", type=Path, default=default, help="(default: $QWEN_ONNX_STORE or %(default)s)")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output, one JSON object a line")


def _load(path: Path) -> tuple[Loaded, list[Step]]:
    from pipeline import plan, recipe

    loaded = recipe.load(path)
    return loaded, plan.make(loaded)


def _open_store(options: argparse.Namespace) -> Store:
    from pipeline.store import Store

    return Store(options.store)


def _build(options: argparse.Namespace) -> int:
    from pipeline import report, runner

    loaded, steps = _load(options.recipe)
    store = _open_store(options)
    reporter = report.reporter(options.json)
    try:
        artifacts = runner.build(steps, store, reporter)
        folder = options.out / loaded.name
        fresh = runner.install(artifacts["package"], folder, store)
    except GateError as error:
        reporter.close()
        if not options.json:
            print(report.validation(json.loads(Path(error.where).read_bytes())))
        raise
    finally:
        reporter.close()
    if options.json:
        report.Events().emit("package", path=str(folder), fresh=fresh)
        return 0
    print(report.package(folder))
    if options.prompt and fresh:
        _answer(folder, options.prompt)
    elif options.prompt:
        print("unchanged since the last build, which has answered already")
    print(report.next_steps(folder))
    return 0


def _answer(folder: Path, prompt: str) -> None:
    """Let a package that was just built and verified answer a prompt."""
    from pipeline import chat

    print(f"\n> {prompt}\n")
    _stream(folder, chat.load(folder).encode_chat([{"role": "user", "content": prompt}]), 160)


def _stream(
    folder: Path,
    prompt: Sequence[int],
    limit: int,
    threads: int | None = None,
    sampling: Sampling | None = None,
    as_json: bool = False,
) -> None:
    """Print an answer as it comes; with ``as_json`` one object a token, and one at the end."""
    import time

    from pipeline import chat, generate, session

    opened = session.open_package(folder, threads)
    text = generate.TextStream(chat.load(folder))
    begin = time.perf_counter()
    first, count = 0.0, 0
    for token in generate.stream(opened, prompt, limit, sampling):
        count += 1
        first = first or time.perf_counter() - begin
        piece = text.push(token)
        print(
            json.dumps({"token": token, "text": piece}) if as_json else piece, end="\n" if as_json else "", flush=True
        )
    took = time.perf_counter() - begin - first
    speed = (count - 1) / took if count > 1 and took > 0 else 0.0
    if as_json:
        ended = "length" if count == generate.room(opened, prompt, limit) else "eos"
        facts = {"prompt_tokens": len(prompt), "tokens": count, "ended": ended}
        times = {"seconds_to_first": round(first, 3), "tokens_per_second": round(speed, 1)}
        print(json.dumps({"done": True, "text": text.rest(), **facts, **times}), flush=True)
        return
    print(text.rest(), flush=True)
    rate = f", {speed:.0f} tokens/s" if speed else ""
    print(f"({len(prompt)} + {count} tokens, first after {first:.2f} s{rate})", file=sys.stderr)


def _plan(options: argparse.Namespace) -> int:
    from pipeline import report, runner

    loaded, steps = _load(options.recipe)
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


def _recipe_list(options: argparse.Namespace) -> int:
    from pipeline import recipe, report

    paths = recipe.find(options.folder)
    if not paths:
        raise UsageError(f"there are no recipes below {options.folder}")
    loaded = [recipe.load(path) for path in paths]
    rows = [(str(item.path), item.recipe.target, item.recipe.description) for item in loaded]
    print(report.table(rows, ("RECIPE", "TARGET", "DESCRIPTION")))
    return 0


def _recipe_show(options: argparse.Namespace) -> int:
    import yaml

    from pipeline import recipe

    loaded = recipe.load(options.recipe)
    value = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    print(f"# {loaded.name}")
    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), end="")
    return 0


def _recipe_lint(options: argparse.Namespace) -> int:
    from pipeline import recipe, report

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

    wanted = loaded.recipe
    olive.check_options(wanted.export.exporter, wanted.export.options, f"{loaded.path}: export.options")
    if wanted.quantize.options:
        olive.check_options(wanted.quantize.algorithm, wanted.quantize.options, f"{loaded.path}: quantize.options")


def _recipe_schema(options: argparse.Namespace) -> int:  # noqa: ARG001
    from pipeline import recipe

    print(json.dumps(recipe.json_schema(), indent=1))
    return 0


def _store_list(options: argparse.Namespace) -> int:
    from pipeline import report

    entries = _open_store(options).entries()
    rows = [(entry.stage, entry.key[:16], entry.digest[:16], report.summary(entry)) for entry in entries]
    print(report.table(rows, ("STAGE", "KEY", "DIGEST", "MADE IN")))
    return 0


def _store_check(options: argparse.Namespace) -> int:
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


def _store_gc(options: argparse.Namespace) -> int:
    from pipeline import recipe

    paths = options.keep if options.keep is not None else recipe.find(RECIPES)
    keep: set[str] = set()
    for path in paths:
        try:
            keep.update(step.key for step in _load(path)[1])
        except QwenOnnxError as error:
            if options.keep:
                raise
            print(f"{path}: not kept ({error.what})", file=sys.stderr)
    freed = _open_store(options).collect(keep)
    print(f"{freed / 1e9:.2f} GB freed")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from pipeline import verify

    manifest = verify.package(options.package)
    facts: dict[str, Any] = {"package": str(options.package), "name": manifest.data["name"], "digest": manifest.digest}
    facts["files"] = len(manifest.files) + 2
    if options.replay:
        facts["runtime"] = verify.check_runtime(manifest)
        facts["replay"] = verify.replay(options.package)
    if options.json:
        print(json.dumps(facts))
        return 0
    print(f"{facts['name']}: {facts['files']} files are as built, configuration and external data are safe")
    print(f"digest {facts['digest']}")
    if options.replay:
        result = facts["replay"]
        print(
            f"replay with onnxruntime-genai {facts['runtime']}: {result['identical']} of {result['prompts']} answers "
            f"identical, {result['agreement']:.0%} of tokens before the first difference"
        )
    return 0


def _generate(options: argparse.Namespace) -> int:
    from pipeline import chat, verify
    from pipeline.generate import Sampling

    _positive(options, "max_tokens", "threads")
    sampled = options.temperature != 0  # NaN is not 0 either
    sampling = Sampling(sampled, options.temperature or 1.0, options.top_k, options.top_p, options.seed)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text:
        raise UsageError("the prompt is empty", fix="give some text with --prompt, or through standard input with -")
    if not options.trust:
        verify.check_runtime(verify.package(options.package))
    tokenizer = chat.load(options.package)
    system = [{"role": "system", "content": options.system}] if options.system else []
    prompt = (
        tokenizer.encode(text, special=False)
        if options.raw
        else tokenizer.encode_chat([*system, {"role": "user", "content": text}])
    )
    _stream(options.package, prompt, options.max_tokens, options.threads, sampling, options.json)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from pipeline import bench, report, verify

    _positive(options, "rounds", "prompt_tokens", "threads")
    paths = {path.resolve(): path for path in options.packages}
    names = [path.name for path in paths]
    packages = {str(given) if names.count(path.name) > 1 else path.name: given for path, given in paths.items()}
    if not options.trust:
        for path in packages.values():
            verify.check_runtime(verify.package(path))
    packages |= {name: bench.peer(name, options.packages[0], _open_store(options)) for name in options.against}
    runs = bench.compare(packages, options.rounds, options.prompt_tokens, options.threads)
    figures = bench.summary(runs)
    if options.json:
        print(json.dumps(figures))
        return 0
    rows = [
        (
            name,
            f"{entry['prefill']:.0f}",
            f"{entry['decode']:.1f}",
            f"{entry['peak_memory'] / 1e6:.0f}",
            f"{entry['prefill_ratio']:.2f}" if "prefill_ratio" in entry else "",
            f"{entry['decode_ratio']:.2f}" if "decode_ratio" in entry else "",
        )
        for name, entry in figures.items()
    ]
    first = next(iter(packages))
    print(f"medians of {options.rounds} interleaved runs; ratios are {first} / the other, pair by pair")
    print(report.table(rows, ("PACKAGE", "PREFILL tok/s", "DECODE tok/s", "PEAK MB", "PREFILL ×", "DECODE ×")))
    return 0


def _positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not positive")


def _targets(options: argparse.Namespace) -> int:  # noqa: ARG001
    from pipeline.report import table
    from pipeline.target import TARGETS

    rows = [
        (
            target.name,
            target.provider,
            target.io_dtype,
            "/".join(map(str, target.bits)),
            target.missing or "builds and runs here",
        )
        for target in TARGETS.values()
    ]
    print(table(rows, ("TARGET", "PROVIDER", "IO", "BITS", "STATE")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
