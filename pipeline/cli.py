"""The command line: parse, call, map errors to exit codes (`pipeline.errors`)."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__, bench_loop
from pipeline.commands import (
    adapters as adapter_commands,
    build as build_commands,
    formats as format_commands,
    generate as generate_commands,
    measure as measure_commands,
    models as model_commands,
    recipes as recipe_commands,
    retrieval as retrieval_commands,
    serve as serve_commands,
    store as store_commands,
    trust as trust_commands,
    workflow as workflow_commands,
)
from pipeline.commands.shared import RECIPES
from pipeline.errors import ERRORS, INTERRUPTED, QwenOnnxError
from pipeline.package.provenance import BUILDER

Command = Callable[[argparse.Namespace], int]
ARTIFACTS = Path("artifacts")
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
        from pipeline.builds.report import show_error

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
    root = parser.add_subparsers(required=True, metavar="COMMAND")

    build = _command(root, "build", build_commands.build, "build, validate and package a recipe")
    build.add_argument("recipe", type=Path)
    build.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of packages (default: %(default)s)")
    build.add_argument("--prompt", metavar="TEXT", help="then let a package that is new answer TEXT")
    text = "write what the build came to, good or bad, as one JSON object"
    build.add_argument("--summary", type=Path, metavar="FILE", help=text)
    text = "write its steps and gates as JUnit's XML, which CI systems show"
    build.add_argument("--junit", type=Path, metavar="FILE", help=text)
    _locked_option(build)
    _store_option(build)
    _json_option(build)

    plan = _command(root, "plan", build_commands.plan, "show the steps of a recipe, what is cached and what they need")
    plan.add_argument("recipe", type=Path)
    _locked_option(plan)
    _store_option(plan)
    _json_option(plan)

    tune = _command(root, "tune", measure_commands.tune, "find a scheme for each weight, and write it as a recipe")
    tune.add_argument("recipe", type=Path)
    tune.add_argument(
        "--max-kl", type=float, metavar="NATS", help="the smallest package within this mean KL divergence"
    )
    tune.add_argument(
        "--max-bytes", type=int, metavar="N", help="with weights within N bytes; without --max-kl the most faithful"
    )
    tune.add_argument(
        "--min-decode-ratio", type=float, metavar="R", help="at least R times as fast a token as the fastest scheme"
    )
    tune.add_argument("--out", type=Path, metavar="FILE", help="recipe to write (default: RECIPE with -tuned)")
    _store_option(tune)
    _json_option(tune)

    _workflow_commands(root)
    _model_commands(root)
    _recipe_commands(root)
    _store_commands(root)
    _package_commands(root)
    _format_commands(root)
    return parser


def _workflow_commands(root: Any) -> None:
    text = "write the steps of recipes as a Snakemake workflow, for several machines"
    workflow = _command(root, "workflow", workflow_commands.workflow, text)
    workflow.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    workflow.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the workflow")
    text = "folder of packages (default: %(default)s)"
    workflow.add_argument("--packages", type=Path, default=ARTIFACTS, metavar="DIR", help=text)
    _store_option(workflow)

    step = _command(root, "step", workflow_commands.step, "make one step of a recipe, from steps that are in the store")
    step.add_argument("recipe", type=Path)
    step.add_argument("stage", metavar="STAGE", help="as `qwen-onnx plan` lists them")
    step.add_argument("--key", default="", help="refuse to make another step than the one of this key")
    step.add_argument("--out", type=Path, metavar="DIR", help="put the package there as well")
    _store_option(step)
    _json_option(step)


def _model_commands(root: Any) -> None:
    models = _command(root, "models", model_commands.models, "list the Qwen models, and what each needs")
    models.add_argument(
        "--task", default="", help="what it should be made for: chat, code, math, thinking, vision, ..."
    )
    models.add_argument("--family", default="", help="model type, such as qwen3")
    _device_options(models)
    models.add_argument("--plan", default="", metavar="NAME", help="show what building one would need, step by step")
    models.add_argument("--scheme", default="int4", help="of the build that --plan shows (default: %(default)s)")
    models.add_argument("--exporter", default="", help="of the build that --plan shows (default: the scheme's)")
    _json_option(models)

    choose = _command(root, "choose", model_commands.choose, "propose a model and a scheme that fit, and their recipe")
    choose.add_argument("--task", default="chat", help="what it should be made for (default: %(default)s)")
    text = "what the device has for the model, such as 4GB or 3.5GiB"
    choose.add_argument("--memory", type=model_commands.memory, required=True, metavar="SIZE", help=text)
    choose.add_argument("--family", default="", help="model type, such as qwen3")
    _device_options(choose)
    choose.add_argument("--research", action="store_true", help="also models whose licence allows research only")
    _json_option(choose)

    lock = _command(root, "lock", model_commands.lock, "write the commit and digest of a recipe's checkpoint into it")
    lock.add_argument("recipe", type=Path)
    text = "take this branch, tag or commit instead of the recipe's, and its bytes"
    lock.add_argument("--revision", default="", help=text)
    _json_option(lock)


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="cpu", help="(default: %(default)s)")
    text = "tokens of prompt and answer (default: %(default)s)"
    parser.add_argument("--context", type=model_commands.positive, default=4096, metavar="N", help=text)
    parser.add_argument("--recipes", type=Path, default=RECIPES, metavar="DIR", help="(default: %(default)s)")


def _recipe_commands(root: Any) -> None:
    recipe = root.add_parser("recipe", help="list, show, check recipes").add_subparsers(required=True, metavar="ACTION")
    listing = _command(recipe, "list", recipe_commands.list_all, "all recipes below a folder")
    listing.add_argument("folder", type=Path, nargs="?", default=RECIPES)
    show = _command(recipe, "show", recipe_commands.show, "a recipe with all that it extends resolved")
    show.add_argument("recipe", type=Path)
    lint = _command(recipe, "lint", recipe_commands.lint, "check recipes, options of Olive passes included")
    lint.add_argument("recipes", type=Path, nargs="+")
    _command(recipe, "schema", recipe_commands.schema, "JSON schema of a recipe, for editors")


def _store_commands(root: Any) -> None:
    store = root.add_parser("store", help="list, clean, check the store").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, action, text in (
        ("list", store_commands.list_all, "all artifacts"),
        ("check", store_commands.check, "compare every artifact with its digests, and remove damaged ones"),
        ("gc", store_commands.collect, "remove artifacts that no recipe needs, abandoned work and downloads"),
    ):
        parsed = _command(store, name, action, text)
        _store_option(parsed)
        if name == "gc":
            parsed.add_argument("--keep", type=Path, nargs="*", help="recipes to keep (default: all below recipes/)")


def _trust_commands(root: Any) -> None:
    verify = _command(
        root, "verify", trust_commands.verify, "check a package before it is used; nothing of it is loaded before that"
    )
    verify.add_argument("package", type=Path)
    _key_option(verify)
    verify.add_argument("--replay", action="store_true", help="then load it and replay its golden transcript here")
    _provider_option(verify)
    _json_option(verify)

    sign = _command(root, "sign", trust_commands.sign, "sign a package, and say where it comes from")
    sign.add_argument("package", type=Path)
    text = "private key, P-256 or P-384; the password of an encrypted one is in $QWEN_ONNX_KEY_PASSWORD"
    sign.add_argument("--key", type=Path, required=True, metavar="PEM", help=text)
    default = os.environ.get("QWEN_ONNX_BUILDER", BUILDER)
    text = "URI of what built it, for the provenance (default: $QWEN_ONNX_BUILDER or %(default)s)"
    sign.add_argument("--builder-id", default=default, metavar="URI", help=text)
    _json_option(sign)

    text = "make a package again from its manifest, and compare; ends with 0 equal, 22 a file differs"
    rebuild = _command(root, "rebuild", trust_commands.rebuild, text)
    rebuild.add_argument("package", type=Path)
    text = "an empty folder (default: a temporary one, beside --out or the package)"
    rebuild.add_argument("--store", type=Path, metavar="DIR", help=text)
    rebuild.add_argument("--out", type=Path, metavar="DIR", help="where the new package is put (default: not kept)")
    rebuild.add_argument("--downloads", type=Path, metavar="DIR", help="keep and take what is fetched here")
    rebuild.add_argument("--checkpoint", type=Path, metavar="PATH", help="where a local checkpoint is now")
    text = "where a LoRA adapter is now, of one that was merged the folder alone; may be given again"
    rebuild.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help=text)
    text = "end with this stage, such as quantize, and compare graphs and weights"
    rebuild.add_argument("--until", default="", metavar="STAGE", help=text)
    text = "although tools have other versions than the manifest says"
    rebuild.add_argument("--other-versions", action="store_true", help=text)
    _key_option(rebuild)
    _json_option(rebuild)


def _package_commands(root: Any) -> None:
    _trust_commands(root)

    generate = _command(root, "generate", generate_commands.generate, "answer a prompt with a package")
    generate.add_argument("package", type=Path)
    generate.add_argument("--prompt", required=True, help="the text, or - for standard input")
    text = "a PNG or JPEG that the prompt is about, for a model that sees; may be given several times"
    generate.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help=text)
    generate.add_argument("--system", help="system message")
    text = "a WAV file (16 kHz, at most 30 s) for a package that hears; may be given again"
    generate.add_argument("--audio", type=Path, action="append", default=[], metavar="FILE", help=text)
    generate.add_argument("--raw", action="store_true", help="continue the text as it stands, without chat template")
    text = "let the model think before it answers, or not, where its chat template has that switch (default: its own)"
    generate.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=text)
    text = "end its thoughts after N tokens; they are shown on standard error, and apart with --json"
    generate.add_argument("--thinking-budget", type=int, metavar="N", help=text)
    generate.add_argument("--max-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    generate.add_argument("--top-p", type=float, default=0.8, help="(default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=20, help="(default: %(default)s)")
    generate.add_argument("--seed", type=int)
    text = "look drafts up in the prompt and verify many tokens at once: fast where an answer repeats it (greedy only)"
    generate.add_argument("--lookup", action="store_true", help=text)
    text = "answer with a LoRA adapter of the package, by name, or with a file (….onnx_adapter) that `adapter` wrote"
    generate.add_argument("--adapter", action="append", default=[], metavar="NAME", help=text)
    generate.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    _provider_option(generate)
    generate.add_argument("--trust", action="store_true", help="skip the digests of a package that was verified before")
    _json_option(generate)

    _serve_command(root)
    _retrieval_commands(root)
    _adapter_command(root)
    _bench_command(root)

    report = _command(root, "report", build_commands.report, "write index.html, which shows all packages of a folder")
    report.add_argument("folder", type=Path, nargs="?", default=ARTIFACTS, help="(default: %(default)s)")

    attribute = _command(root, "attribute", measure_commands.attribute, "tell where a package loses what it loses")
    attribute.add_argument("package", type=Path)
    attribute.add_argument("--trust", action="store_true", help="load the package without checking it first")
    _store_option(attribute)
    _json_option(attribute)

    targets = _command(
        root, "targets", model_commands.targets, "what each target is, and what this machine can do for it"
    )
    _json_option(targets)


def _serve_command(root: Any) -> None:
    serve = _command(root, "serve", serve_commands.serve, "answer over HTTP as OpenAI's API does, with packages")
    serve.add_argument("packages", nargs="+", metavar="PACKAGE", help="a folder, or NAME=FOLDER")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    text = "0 takes a free one, and tells which (default: %(default)s)"
    serve.add_argument("--port", type=serve_commands.port, default=8000, help=text)
    text = "a file with one key a line, KEY or NAME:KEY; also $QWEN_ONNX_API_KEYS, apart by commas"
    serve.add_argument("--api-keys", type=Path, metavar="FILE", help=text)
    text = "listen where other machines reach it although there are no keys"
    serve.add_argument("--allow-public-without-key", action="store_true", help=text)
    text = "let web pages of this origin ask; may be given again"
    serve.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=text)
    for name, what in (
        ("requests-per-minute", "of each key, or address without keys"),
        ("tokens-per-minute", "of prompts and answers, of each key or address"),
        ("max-prompt-tokens", "of a prompt"),
        ("max-tokens", "of an answer"),
    ):
        text = f"{what} (default: {'the context' if name.startswith('max') else 'no limit'})"
        serve.add_argument(f"--{name}", type=serve_commands.whole, default=0, metavar="N", help=text)
    text = "largest request, such as 8MB (default: 32MiB)"
    serve.add_argument("--max-body", type=model_commands.memory, default=32 << 20, metavar="SIZE", help=text)
    text = "requests that may wait for a model; more get 503 (default: %(default)s)"
    serve.add_argument("--queue", type=int, default=16, metavar="N", help=text)
    text = "answers that take turns, and conversations whose caches are kept (default: %(default)s)"
    serve.add_argument("--parallel", type=int, default=4, metavar="N", help=text)
    text = "that an answer may take, its wait included (default: %(default)s)"
    serve.add_argument("--timeout", type=serve_commands.seconds, default=600.0, metavar="SECONDS", help=text)
    text = "without a request after which a model is unloaded until the next one (default: never)"
    serve.add_argument("--idle-seconds", type=serve_commands.seconds, default=0.0, metavar="SECONDS", help=text)
    text = "that answers have to come to their end when the server is stopped (default: %(default)s)"
    serve.add_argument("--drain-seconds", type=serve_commands.seconds, default=30.0, metavar="SECONDS", help=text)
    text = "in which a client has to take some of what waits for it (default: %(default)s)"
    serve.add_argument("--write-seconds", type=serve_commands.seconds, default=30.0, metavar="SECONDS", help=text)
    serve.add_argument("--threads", type=int, help="processor threads of each model (default: all cores)")
    _provider_option(serve)
    serve.add_argument("--trust", action="store_true", help="load packages without checking them first")
    text = "do not replay the beginning of the golden answers when a model is loaded"
    lookup = "draft greedy answers (temperature 0) from what was said, and verify many tokens at once"
    serve.add_argument("--lookup", action="store_true", help=lookup)
    serve.add_argument("--no-self-test", dest="self_test", action="store_false", help=text)
    serve.add_argument("--no-page", dest="page", action="store_false", help="no page at /")
    text = "of the lines on standard error: console or json (default: %(default)s)"
    serve.add_argument("--log-format", choices=("console", "json"), default="console", help=text)
    _json_option(serve)


def _retrieval_commands(root: Any) -> None:
    embed = _command(root, "embed", retrieval_commands.embed, "turn texts into vectors with a package that embeds")
    embed.add_argument("package", type=Path)
    text = "a document, as it is, or - for standard input; may be given again"
    embed.add_argument("--text", action="append", default=[], help=text)
    text = "a query, with the instruction before it; may be given again"
    embed.add_argument("--query", action="append", default=[], metavar="TEXT", help=text)
    text = "keep the first N dimensions, of models that were trained for it"
    embed.add_argument("--dimensions", type=int, metavar="N", help=text)
    rerank = _command(
        root, "rerank", retrieval_commands.rerank, "score documents for a query with a package that ranks"
    )
    rerank.add_argument("package", type=Path)
    rerank.add_argument("--query", required=True, metavar="TEXT")
    text = "a document, or - for standard input; may be given again"
    rerank.add_argument("--document", action="append", required=True, metavar="TEXT", help=text)
    for parser in (embed, rerank):
        parser.add_argument("--instruct", metavar="TEXT", help="what queries are for (default: to search the web)")
        parser.add_argument("--truncate", action="store_true", help="cut what is longer than the model takes")
        parser.add_argument("--threads", type=int, help="processor threads (default: all cores)")
        parser.add_argument("--trust", action="store_true", help="skip the digests of a package verified before")
        _json_option(parser)


def _adapter_command(root: Any) -> None:
    adapter = _command(
        root,
        "adapter",
        adapter_commands.convert,
        "convert a LoRA adapter for a package with slots, without building it again",
    )
    adapter.add_argument("package", type=Path)
    adapter.add_argument("adapter", type=Path, metavar="PEFT_DIR", help="directory that peft saved")
    adapter.add_argument("--name", required=True, help="how it is called")
    adapter.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME.onnx_adapter)")
    adapter.add_argument("--license", metavar="SPDX", help="identifier of its licence")
    _json_option(adapter)


def _bench_command(root: Any) -> None:
    bench = _command(
        root, "bench", measure_commands.bench, "time packages against one another, and against other tools"
    )
    bench.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    against = (
        "llama.cpp, llama.cpp-q4_k_m (quantized here by llama.cpp), plain-olive (ModelBuilder's INT4), torch or "
        "torch-bfloat16; may be given again"
    )
    bench.add_argument("--against", action="append", default=[], metavar="PEER", help=against)
    for name, what, usual in (
        ("prefill", "prompt lengths", bench_loop.PREFILL),
        ("decode", "depths of context that answers are timed at", bench_loop.DECODE),
    ):
        text = f"{what}, in tokens (default: {','.join(map(str, usual))})"
        bench.add_argument(f"--{name}", type=_lengths, default=usual, metavar="N,N...", help=text)
    bench.add_argument("--quality", action="store_true", help="also how far each is from the checkpoint; minutes")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    bench.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="(default: PACKAGE.bench.json, beside the first)")
    bench.add_argument("--trust", action="store_true", help="load packages without checking them first")
    _store_option(bench)
    _json_option(bench)


def _format_commands(root: Any) -> None:
    pack = _command(root, "pack", format_commands.pack, "write a package as one file, whose bytes are always the same")
    pack.add_argument("package", type=Path)
    pack.add_argument("-o", "--out", type=Path, metavar="FILE", help="(default: PACKAGE.tar)")

    unpack = _command(root, "unpack", format_commands.unpack, "make a package of an archive, and verify it")
    unpack.add_argument("archive", type=Path, metavar="FILE")
    unpack.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    for name, usual, what in (("bytes", 200 * 10**9, "bytes"), ("files", 1000, "files")):
        text = f"refuse an archive of more {what} (default: %(default)s)"
        unpack.add_argument(f"--max-{name}", type=model_commands.positive, default=usual, metavar="N", help=text)

    oci = root.add_parser("oci", help="packages in OCI registries").add_subparsers(required=True, metavar="ACTION")
    push = _command(oci, "push", format_commands.oci_push, "push a package to a registry")
    push.add_argument("package", type=Path)
    push.add_argument("reference", metavar="HOST/NAME:TAG")
    pull = _command(oci, "pull", format_commands.oci_pull, "pull a package; files that are here are not fetched again")
    pull.add_argument("reference", metavar="HOST/NAME:TAG")
    pull.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    text = f"OCI layout that keeps what was pulled (default: ${format_commands.CACHE} or .oci beside DIR)"
    pull.add_argument("--cache", type=Path, metavar="DIR", help=text)
    for parser in (push, pull):
        parser.add_argument("--plain-http", action="store_true", help="without TLS, for a registry on this machine")
    export = _command(oci, "export", format_commands.oci_export, "put a package into an OCI image layout")
    export.add_argument("package", type=Path)
    export.add_argument("layout", type=Path)
    export.add_argument("--tag", default="latest", help="(default: %(default)s)")
    taken = _command(oci, "import", format_commands.oci_import, "make a package of an artifact in an OCI image layout")
    taken.add_argument("layout", type=Path)
    taken.add_argument("-o", "--out", type=Path, metavar="DIR", required=True)
    taken.add_argument("--tag", default="", help="(default: the only one)")

    layout = _command(root, "layout", format_commands.layout, "lay a package out as another program wants it")
    layout.add_argument("package", type=Path)
    layout.add_argument("out", type=Path)
    text = "Foundry Local's cache, or a repository of a model hub"
    layout.add_argument("--for", dest="kind", choices=("foundry", "hub"), required=True, help=text)

    diff = _command(
        root, "diff", format_commands.diff, "compare two releases; ends with 0 compatible, 20 needs review, 21 breaking"
    )
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)
    diff.add_argument("--all", action="store_true", help="every difference, also of kinds that are found often")
    diff.add_argument("--trust", action="store_true", help="skip the digests of packages that were verified before")
    for parser in (pack, unpack, push, pull, export, taken, layout):
        _key_option(parser)
    for parser in (pack, unpack, push, pull, export, taken, layout, diff):
        _json_option(parser)


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(part) for part in text.split(","))
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a length that is not positive")
    return lengths


def _command(root: Any, name: str, run: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = root.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def _locked_option(parser: argparse.ArgumentParser) -> None:
    text = "refuse a recipe that names a branch or tag, as is done in CI"
    parser.add_argument("--locked", action="store_true", help=text)


def _store_option(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("QWEN_ONNX_STORE", ARTIFACTS / ".store"))
    parser.add_argument("--store", type=Path, default=default, help="(default: $QWEN_ONNX_STORE or %(default)s)")


def _key_option(parser: argparse.ArgumentParser) -> None:
    text = "the public key that the package must be signed with; without one, nobody asks who made it"
    parser.add_argument("--key", type=Path, metavar="PEM", help=text)


def _provider_option(parser: argparse.ArgumentParser) -> None:
    text = "cpu: on the processor, whatever hardware the package is for (default: its own)"
    parser.add_argument("--provider", choices=("cpu",), default="", help=text)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output, one JSON object a line")


if __name__ == "__main__":
    sys.exit(main())
