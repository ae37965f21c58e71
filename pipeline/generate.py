"""The one prefill/decode loop, which validation, benchmark and serving share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import session as sessions
from pipeline.errors import UsageError
from pipeline.images import Picture
from pipeline.replay import Prepared, feed, prepare
from pipeline.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.replay import Arrays


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy unless ``sample``."""

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature <= 5.0:  # NaN fails too; the runtime would accept it in silence
            raise UsageError(f"temperature {self.temperature} is not in (0, 5]")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p {self.top_p} is not in (0, 1]")
        if self.top_k < 1:
            raise UsageError(f"top_k {self.top_k} is not positive")
        if self.seed is not None and not 0 <= self.seed < 1 << 31:
            raise UsageError(f"seed {self.seed} is not in [0, 2^31)")


def start(session: Session, length: int, sampling: Sampling | None = None) -> Any:
    """A runtime generator with room for ``length`` tokens in all, those that fill up a window included."""
    og = sessions.runtime()
    sampling = sampling or Sampling()
    options: dict[str, Any] = {"max_length": length, "do_sample": sampling.sample}
    if sampling.sample:
        top_k = min(sampling.top_k, session.vocabulary)
        options |= {"temperature": sampling.temperature, "top_k": top_k, "top_p": sampling.top_p}
        if sampling.seed is not None:
            options["random_seed"] = sampling.seed
    parameters = og.GeneratorParams(session.model)
    parameters.set_search_options(**options)
    return og.Generator(session.model, parameters)


def show(session: Session, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[list[int], Prepared | None]:
    """A prompt that has room for each feature of its pictures, and the pictures as the model takes them.

    Args:
        prompt: with one token for each picture, in their order.

    Raises:
        UsageError: the package takes no pictures, or the prompt has not as many places for them.
    """
    token = session.image_token
    if token is None:
        if pictures:
            raise UsageError(f"{session.package} takes no images", fix="use a package of a model that sees")
        return list(prompt), None
    if (places := list(prompt).count(token)) != len(pictures):
        raise UsageError(f"the prompt has places for {places} images, and {len(pictures)} are given")
    if not pictures:
        return list(prompt), None
    try:
        prepared = prepare(session.model, [picture.data for picture in pictures])
    except RuntimeError as error:
        raise UsageError("an image cannot be decoded", why=str(error).split("\n")[0], fix="save it again") from None
    rest = iter(prepared.features)
    return [one for id_ in prompt for one in ([id_] * next(rest) if id_ == token else [id_])], prepared


def stream(
    session: Session,
    prompt: Sequence[int],
    limit: int,
    sampling: Sampling | None = None,
    prepared: Prepared | Arrays | None = None,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, one by one, until an end-of-answer token (not yielded) or ``limit`` tokens.

    Args:
        prepared: the pictures that the prompt has room for (`show`), or its sounds (`pipeline.audio_prompt`).

    Raises:
        UsageError: the prompt is empty, has ids outside the vocabulary, or leaves no room in the context;
            or the limit is not positive.
    """
    check_prompt(session, prompt, prepared)
    if limit < 1:
        raise UsageError(f"a limit of {limit} tokens is not positive")
    limit = room(session, len(prompt), limit)
    generator = start(session, session.padded(len(prompt)) + limit, sampling)
    feed(generator, prompt, prepared)
    for _ in range(limit):
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token in session.eos:
            return
        yield token
        if generator.is_done():
            return


def room(session: Session, prompt: int, limit: int) -> int:
    """How many tokens can follow ``prompt`` tokens: ``limit``, or fewer where the context ends."""
    return min(limit, session.context_length - session.padded(prompt))


def check_prompt(session: Session, prompt: Sequence[int], prepared: Prepared | Arrays | None = None) -> None:
    """Refuse a prompt that the model cannot take.

    Raises:
        UsageError: it is empty, has ids outside the vocabulary, leaves no room in the context, or has more or fewer
            tokens of an image than its pictures have features.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    _check_ids(session, prompt, "prompt")
    if session.window > 1 and session.config["model"]["pad_token_id"] in prompt:
        raise UsageError("the prompt has the id that the runtime fills up windows with")
    if session.image_token is not None:
        if session.config["model"]["pad_token_id"] in prompt:
            raise UsageError("the prompt has the id that the runtime takes for padding")
        features = sum(prepared.features) if isinstance(prepared, Prepared) else 0
        if (places := list(prompt).count(session.image_token)) != features:
            raise UsageError(f"the prompt has {places} tokens of images, and the images have {features} features")
    if session.padded(len(prompt)) >= session.context_length:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; the context holds {session.context_length}",
            fix="shorten the prompt, or rebuild with a larger generation.context_length",
        )


def check_answer(
    session: Session, prompt: Sequence[int], answer: Sequence[int], prepared: Prepared | Arrays | None = None
) -> None:
    """Refuse a prompt and its answer that the model cannot be fed; raises `UsageError` as `check_prompt` does."""
    check_prompt(session, prompt, prepared)
    if answer:
        _check_ids(session, answer, "answer")
    if room(session, len(prompt), len(answer)) < len(answer):
        raise UsageError(f"the answer of {len(answer)} tokens does not fit the context of {session.context_length}")


def _check_ids(session: Session, ids: Sequence[int], what: str) -> None:
    if min(ids) < 0 or max(ids) >= session.vocabulary:
        raise UsageError(f"the {what} has token ids outside [0, {session.vocabulary})")


def decode_logits(session: Session, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits ``[T, V]`` float32 after each of ``ids`` (``[T]``), fed one at a time: the decode path."""
    generator = start(session, len(ids) + 1)
    rows = np.empty((len(ids), session.vocabulary), np.float32)
    for index, token in enumerate(ids):
        generator.append_tokens(np.asarray([token], np.int32))
        rows[index] = np.asarray(generator.get_logits(), np.float32).reshape(-1)[: session.vocabulary]
    return rows


def answer_logits(
    session: Session, prompt: Sequence[int], answer: Sequence[int], prepared: Prepared | Arrays | None = None
) -> npt.NDArray[np.float32]:
    """Logits ``[T, V]`` float32 before each of ``answer`` (``[T]``), which is fed one token at a time."""
    generator = start(session, len(prompt) + len(answer))
    rows = np.empty((len(answer), session.vocabulary), np.float32)
    feed(generator, prompt, prepared)
    for index, token in enumerate(answer):
        rows[index] = np.asarray(generator.get_logits(), np.float32).reshape(-1)[-session.vocabulary :]
        if index < len(answer) - 1:
            generator.append_tokens(np.asarray([token], np.int32))
    return rows


def prefill_logits(session: Session, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits ``[T, V]`` float32 of all of ``ids`` at once (``T`` is 1 if the head sees the last token only)."""
    generator = start(session, len(ids) + 1)
    generator.append_tokens(np.asarray(ids, np.int32))
    logits = np.asarray(generator.get_output("logits"), np.float32)
    return logits.reshape(-1, logits.shape[-1])


class TextStream:
    """Turns tokens into text piece by piece; bytes of an unfinished character are held back.

    Byte-level BPE decodes token by token, so that what has been shown is never needed again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became final with ``token``."""
        self._held.append(token)
        text = str(self._tokenizer.decode(self._held))
        if text.endswith("\ufffd"):
            return ""
        self._held = []
        return text

    def rest(self) -> str:
        """What was held back when no more tokens came."""
        return str(self._tokenizer.decode(self._held)) if self._held else ""
