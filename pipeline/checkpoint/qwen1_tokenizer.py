"""Qwen 1.0's tokenizer: ``qwen.tiktoken``, one line a token with its bytes in base64 and its rank.

tiktoken merges whatever pair of neighbours has the lowest rank as a token; transformers' fast tokenizers want the pairs
themselves, which are recovered here. The file comes from outside: it is read with limits on its size and on the work.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.runtime import byte_level

FILE = "qwen.tiktoken"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, START, END, *(f"<|extra_{number}|>" for number in range(205)))
"""The control tokens, whose ids follow the ranks."""
# Qwen's file has 151,643 tokens of up to 128 bytes and 2.6 MB; the squares of their lengths add up to 10 million.
_MAX_FILE = 16_000_000
_MAX_WORK = 100_000_000
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9][0-9]{0,8})")

# What the published code writes around a conversation (make_context): ChatML, always with a system message.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def read(path: Path, vocabulary: int) -> list[bytes]:
    """The bytes of each token, by rank.

    Args:
        vocabulary: how many ids the model has.

    Raises:
        CheckpointError: it is too large or damaged, has ranks twice or gaps between them, lacks a byte, or has more
            tokens than the model.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise ValueError(f"it has {size} bytes; more than {_MAX_FILE} are not read")
        found = _parse(path.read_bytes())
        if len(found) + len(SPECIALS) > vocabulary:
            raise ValueError(
                f"its {len(found)} tokens and {len(SPECIALS)} control tokens are more than the model's {vocabulary} ids"
            )
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from None
    return found


def _parse(data: bytes) -> list[bytes]:
    ranks: dict[int, bytes] = {}
    work = 0
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is no token in base64 and its rank: {line[:60]!r}")
        try:
            token, rank = base64.b64decode(match[1], validate=True), int(match[2])
        except binascii.Error as error:
            raise ValueError(f"line {number} is no base64: {error}") from None
        if rank in ranks:
            raise ValueError(f"line {number} has the rank {rank} a second time")
        ranks[rank] = token
        work += len(token) ** 2
        if work > _MAX_WORK:
            raise ValueError(f"its tokens are too long: up to line {number} their squared lengths exceed {_MAX_WORK}")
    if gaps := [rank for rank in range(len(ranks)) if rank not in ranks]:
        raise ValueError(f"it has {len(ranks)} tokens, but none of rank {gaps[0]}")
    tokens = [ranks[rank] for rank in range(len(ranks))]
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token appears twice")
    if absent := sorted({bytes([byte]) for byte in range(256)} - set(tokens)):
        raise ValueError(f"it has no token for {len(absent)} bytes, such as {absent[0]!r}")
    return tokens


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name} cannot be read", where=str(path), why=why, fix="fetch it again")


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged from, in the order of ranks.

    Raises:
        ValueError: tokens of lower ranks do not lead to a token.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = _merged(token, ranks, rank)
            if len(parts) != 2:
                raise ValueError(f"the token {token[:40]!r} of rank {rank} is not merged from two of lower ranks")
            found.append((parts[0], parts[1]))
    return found


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """What tiktoken makes of the bytes of a token with the tokens of ranks ``below`` its own."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = ((ranks.get(parts[at] + parts[at + 1], below), at) for at in range(len(parts) - 1))
        rank, at = min(pairs)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write(source: Path, out_dir: Path, vocabulary: int, context: int, eos: str) -> dict[str, int]:
    """Write ``tokenizer.json`` and what belongs to it, with a ChatML template; returns the ids of the control tokens.

    Args:
        source: the ``qwen.tiktoken``.
        vocabulary, context: ids and tokens of the model.
        eos: the control token that ends an answer.

    Raises:
        CheckpointError: the file is damaged, or no byte-level BPE.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2TokenizerFast
    from transformers.convert_slow_tokenizer import Qwen2Converter

    tokens = read(source, vocabulary)
    try:
        pairs = merges(tokens)
    except ValueError as error:
        raise _refused(source, str(error)) from None
    named = {byte_level.written(token): rank for rank, token in enumerate(tokens)}
    # Normal form (NFC), pre-tokenization and bytes are those of Qwen2.
    backend: Any = Qwen2Converter(None).converted(
        named, [(byte_level.written(left), byte_level.written(right)) for left, right in pairs]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    ids = {token: len(tokens) + index for index, token in enumerate(SPECIALS)}
    if wrong := [token for token, number in ids.items() if backend.token_to_id(token) != number]:
        raise _refused(source, f"it has the control token {wrong[0]} among its tokens")
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=END_OF_TEXT,
        unk_token=None,
        bos_token=None,
        additional_special_tokens=[START, END],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out_dir)
    return ids
