"""The command that answers a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pipeline.commands import arguments
from pipeline.commands.shared import check_package, check_positive
from pipeline.errors import UsageError
from pipeline.task import GENERATE


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(root, "generate", generate, "answer a prompt with a package")
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt", required=True, help="the text, or - for standard input")
    text = "a PNG or JPEG that the prompt is about, for a model that sees; may be given several times"
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help=text)
    parser.add_argument("--system", help="system message")
    text = "a WAV file (16 kHz, at most 30 s) for a package that hears; may be given again"
    parser.add_argument("--audio", type=Path, action="append", default=[], metavar="FILE", help=text)
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without chat template")
    text = "let the model think before it answers, or not, where its chat template has that switch (default: its own)"
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=text)
    text = "end its thoughts after N tokens; they are shown on standard error, and apart with --json"
    parser.add_argument("--thinking-budget", type=int, metavar="N", help=text)
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top-p", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int)
    text = "look drafts up in the prompt and verify many tokens at once: fast where an answer repeats it (greedy only)"
    parser.add_argument("--lookup", action="store_true", help=text)
    text = "answer with a LoRA adapter of the package, by name, or with a file (….onnx_adapter) that `adapter` wrote"
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    arguments.provider(parser)
    parser.add_argument("--trust", action="store_true", help="skip the digests of a package that was verified before")
    arguments.json(parser)


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
