"""The commands that build: plan and build a recipe, and the page of all packages."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.commands.shared import aside, load, open_store
from pipeline.errors import GateError, QwenOnnxError, ResourceError, UsageError
from pipeline.task import GENERATE

if TYPE_CHECKING:
    from pipeline.builds.summary import Recorder


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "build", build, "build, validate and package a recipe")
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--out", type=Path, default=arguments.ARTIFACTS, help="folder of packages (default: %(default)s)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="then let a package that is new answer TEXT")
    text = "write what the build came to, good or bad, as one JSON object"
    parser.add_argument("--summary", type=Path, metavar="FILE", help=text)
    text = "write its steps and gates as JUnit's XML, which CI systems show"
    parser.add_argument("--junit", type=Path, metavar="FILE", help=text)
    arguments.locked(parser)
    arguments.store(parser)
    arguments.json(parser)

    parser = arguments.command(root, "plan", plan, "show the steps of a recipe, what is cached and what they need")
    parser.add_argument("recipe", type=Path)
    arguments.locked(parser)
    arguments.store(parser)
    arguments.json(parser)

    parser = arguments.command(root, "report", report, "write index.html, which shows all packages of a folder")
    parser.add_argument("folder", type=Path, nargs="?", default=arguments.ARTIFACTS, help="(default: %(default)s)")


def build(options: argparse.Namespace) -> int:
    from pipeline.builds import summary

    recorder = summary.Recorder()
    try:
        folder = _build(options, recorder)
    except QwenOnnxError as error:
        try:
            _summarize(options, recorder, None, error)
        except ResourceError as second:  # what ended the build says more
            aside(str(second))
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

    loaded, steps = load(options.recipe, options)
    if options.prompt and loaded.recipe.task != GENERATE:
        raise UsageError(f"a package that can {loaded.recipe.task} answers no --prompt", fix="leave out --prompt")
    store = open_store(options)
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


def plan(options: argparse.Namespace) -> int:
    from pipeline.builds import report, runner

    loaded, steps = load(options.recipe, options)
    store = open_store(options)
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


def report(options: argparse.Namespace) -> int:
    from pipeline.documents import index

    print(index.write(options.folder))
    return 0
