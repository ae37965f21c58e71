"""Following a grammar token by token, in the process that has the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import PackageError, RuntimeMissing, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

_WORD = 32


class Constraint:
    """What may follow in one answer.

    The tokenizer is read once in a process, which takes a second or two for Qwen's vocabulary (`tokenizer` does it
    ahead); then a constraint takes milliseconds, and a mask of 152k tokens some tenths of one.

    Args:
        grammar: as `pipeline.serve.inference.grammar` writes it.
        tokenizer_json: the package's tokenizer.json, or the text of one.
        vocabulary: how many logits the model has, V; those that are no tokens are never allowed.
        eos: tokens that end an answer, which are allowed where the grammar may end.

    Raises:
        UsageError: the grammar cannot be compiled.
        PackageError: the tokenizer cannot be read.
        RuntimeMissing: llguidance or tokenizers is not installed.
    """

    def __init__(self, grammar: str, tokenizer_json: Path | str, vocabulary: int, eos: Sequence[int]) -> None:
        self._matcher = matcher(tokenizer(tokenizer_json, tuple(eos)), grammar)
        if self._matcher.is_error():
            raise UsageError("the grammar cannot be compiled", why=first_line(self._matcher.get_error()))
        known = tokenizer(tokenizer_json, tuple(eos)).vocab_size
        self._words = np.zeros(-(-known // _WORD), np.uint32)
        self._allowed = np.zeros(max(vocabulary, len(self._words) * _WORD), np.bool_)
        self._vocabulary = vocabulary

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may follow, ``[V]``; the next call writes into the same array.

        Raises:
            UsageError: the grammar is too complex to go on, or allows nothing here.
        """
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        np.copyto(self._allowed[: len(bits)], bits.view(np.bool_))
        allowed = self._allowed[: self._vocabulary]
        if not allowed.any():
            raise UsageError("the grammar allows nothing here", why="a schema of it has no finite value")
        return allowed

    def take(self, token: int) -> None:
        """Go on after ``token``.

        Raises:
            UsageError: it is not allowed here.
        """
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """The tokens that follow in any case, none of which has been taken; empty where there is a choice."""
        return [] if self.done else list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError("the answer cannot follow its grammar", why=first_line(self._matcher.get_error()))


def matcher(tokens: Any, grammar: str) -> Any:
    """A matcher of llguidance; whether it is one, its ``is_error`` tells."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)


def first_line(text: str) -> str:
    """What an error of llguidance's says, without the state that it goes on to tell."""
    return text.strip().partition("\n<state>")[0].replace("\n", " ")


@lru_cache(maxsize=4)
def tokenizer(tokenizer_json: Path | str, eos: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer, made once.

    llguidance takes every token that is written in angle brackets for a control token, and then refuses Qwen's
    ``<tool_call>`` where its grammar has that text. Here a token is one when the tokenizer says so.

    Raises:
        PackageError: the tokenizer cannot be read, or is not byte-level.
        RuntimeMissing: llguidance or tokenizers is not installed.
    """
    try:
        import llguidance
        import tokenizers
    except ImportError as error:
        fix = "pip install '.[serve]'"
        raise RuntimeMissing("llguidance or tokenizers is not installed", why=str(error), fix=fix) from None
    kind = tokenizers.Tokenizer
    try:
        read = (
            kind.from_file(str(tokenizer_json)) if isinstance(tokenizer_json, Path) else kind.from_str(tokenizer_json)
        )
        tokens = _Tokens(read, eos)
    except Exception as error:  # tokenizers raises bare exceptions
        raise PackageError("the tokenizer cannot be read", where="tokenizer.json", why=str(error)) from None
    made: Any = llguidance.LLTokenizer  # it asks for a class of its own, and takes whatever has its attributes
    return made(tokens, eos_token=list(eos))


def bytes_tokenizer() -> Any:
    """A tokenizer of single bytes and an end, for grammars that are checked without a model."""
    import llguidance

    made: Any = llguidance.LLTokenizer
    return made(_Bytes(), eos_token=[256])


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, read: Any, eos: tuple[int, ...]) -> None:
        byte_of = _byte_of()
        self.tokens = [b""] * read.get_vocab_size(with_added_tokens=True)
        for text, index in read.get_vocab(with_added_tokens=False).items():
            self._put(index, bytes(byte_of[char] for char in text))
        self.special_token_ids = []
        for index, token in read.get_added_tokens_decoder().items():
            self._put(index, token.content.encode())
            if token.special or index in eos:
                self.special_token_ids.append(index)
        self.eos_token_id = eos[0]
        read.normalizer = None  # what is forced is written as it is
        read.encode_special_tokens = True
        self._read = read

    def _put(self, index: int, text: bytes) -> None:
        self.tokens += [b""] * (index + 1 - len(self.tokens))
        self.tokens[index] = text

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids: list[int] = self._read.encode(plain, add_special_tokens=False).ids
        return ids


class _Bytes:
    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)

    def __init__(self) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _byte_of() -> dict[str, int]:
    """The byte of each character that byte-level vocabularies are written in (that of GPT-2, Radford et al. 2019).

    Bytes that Latin-1 prints stand for themselves; the others have the characters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
