"""The one prefill/decode loop, which validation, benchmark and serving share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.package.replay import Media, feed, prepare
from pipeline.runtime import audio_prompt, session as sessions
from pipeline.runtime.images import Picture
from pipeline.runtime.sampling import Sampler, Sampling
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


# Tokens of a prompt that are fed at a time: what one who gives up has to wait for at most, and what bounds the memory
# of activations. Kernels of one token sum in another order, so that none is fed alone.
_CHUNK = 512


class Reader:
    """A sequence of tokens that the model has read, and what it expects after them.

    Args:
        length: room for so many tokens in all, those that fill up a window included.
    """

    def __init__(self, session: Session, length: int) -> None:
        self.session, self.length = session, length
        self.ids: list[int] = []
        self._started: Any = None

    @property
    def _generator(self) -> Any:
        if self._started is None:  # its cache takes memory and time
            self._started = start(self.session, self.length)
        return self._started

    def feed(self, ids: Sequence[int], media: Media | None = None) -> Iterator[int]:
        """Read ``ids`` after what was read before, some at a time: yields how many of them have been.

        Leave it and the rest is not read. Models compiled for fixed lengths, and prompts with pictures or sounds, are
        read at once.
        """
        if media is not None or not self.session.rewinds:
            feed(self._generator, ids, media)
            self.ids.extend(ids)
            yield len(ids)
            return
        done = 0
        while done < len(ids):
            size = min(_CHUNK, len(ids) - done)
            if len(ids) - done - size == 1:
                size -= 1
            self._generator.append_tokens(np.asarray(ids[done : done + size], np.int32))
            self.ids.extend(ids[done : done + size])
            done += size
            yield done

    def append(self, ids: Sequence[int], output: str) -> npt.NDArray[Any]:
        """Read ``ids`` at once, and return an output of the graph for the last of them, ``[N, V]``."""
        self._generator.append_tokens(np.asarray(ids, np.int32))
        self.ids.extend(ids)
        rows: npt.NDArray[Any] = np.asarray(self._generator.get_output(output))[0]
        return rows

    def logits(self) -> Floats:
        """Logits ``[V]`` of the next token."""
        logits = np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
        return logits[-self.session.vocabulary :]

    def take(self, token: int) -> None:
        """Read one token of an answer."""
        if self.session.rewinds:
            self._generator.append_tokens(np.asarray([token], np.int32))
        else:  # what is compiled for fixed lengths takes no second append: it is made the only choice
            logits = np.asarray(self._generator.get_logits(), np.float32)
            logits[:] = -1e9
            logits[..., token] = 0.0
            self._generator.set_logits(logits)
            self._generator.generate_next_token()
        self.ids.append(token)

    def grow(self, length: int) -> Iterator[int]:
        """Make room for ``length`` tokens in all. The runtime cannot: all is read again, and told as by `feed`."""
        ids, self.ids = self.ids, []
        self._started, self.length = None, length
        yield from self.feed(ids)

    def rewind(self, count: int) -> None:
        """Forget all but the first ``count`` tokens; the model must be one that `Session.rewinds`."""
        if count < len(self.ids):
            self._generator.rewind_to(count)
            del self.ids[count:]


def start(session: Session, length: int) -> Any:
    """A runtime generator with room for ``length`` tokens in all, those that fill up a window included.

    It has the session's adapter, if there is one, before it has seen a token. What it would choose itself is the most
    likely token.
    """
    og = sessions.runtime()
    parameters = og.GeneratorParams(session.model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(session.model, parameters)
    if session.adapter:
        generator.set_active_adapter(session.adapters, session.adapter)
    return generator


def attach(
    session: Session, prompt: Sequence[int], pictures: Sequence[Picture] = (), clips: Sequence[Floats] = ()
) -> tuple[list[int], Media | None]:
    """A prompt that has room for each feature of its pictures or sounds, and these as the model takes them.

    Args:
        prompt: with one token for each picture or sound, in their order.
        clips: mono samples at 16 kHz, as `wav.read` returns them.

    Raises:
        UsageError: the package takes none of the kind, or the prompt has not as many places for them.
        PackageError: it does not say what its tower is like.
    """
    token, given, kind = session.image_token, len(pictures), "images"
    if clips:
        tower = audio_prompt.read_tower(session.package)
        token, given, kind = tower.token, len(clips), "sounds"
    if token is None:
        if pictures:
            raise UsageError(f"{session.package} takes no images", fix="use a package of a model that sees")
        return list(prompt), None
    if (places := list(prompt).count(token)) != given or (clips and pictures):
        raise UsageError(f"the prompt has places for {places} {kind}, and {given} are given")
    if not given:
        return list(prompt), None
    try:
        media = audio_prompt.prepare(tower, clips) if clips else prepare(session.model, [one.data for one in pictures])
    except RuntimeError as error:
        raise UsageError("an image cannot be decoded", why=str(error).split("\n")[0], fix="save it again") from None
    rest = iter(media.tokens)
    return [one for id_ in prompt for one in ([id_] * next(rest) if id_ == token else [id_])], media


def stream(
    session: Session,
    prompt: Sequence[int],
    limit: int,
    sampling: Sampling | None = None,
    interrupt: Callable[[int], Sequence[int]] | None = None,
    media: Media | None = None,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, one by one, until an end-of-answer token (not yielded) or ``limit`` tokens.

    Args:
        interrupt: called with each token; what it returns follows then, whatever the model would say
            (`pipeline.runtime.thinking.Budget`).
        media: the pictures or sounds that the prompt has room for (`attach`).

    Raises:
        UsageError: the prompt is empty, has ids outside the vocabulary, or leaves no room in the context;
            or the limit is not positive.
    """
    check_prompt(session, prompt, media)
    if limit < 1:
        raise UsageError(f"a limit of {limit} tokens is not positive")
    limit = room(session, len(prompt), limit)
    reader = Reader(session, session.padded(len(prompt)) + limit)
    for _ in reader.feed(prompt, media):
        pass
    sampler = Sampler(sampling or Sampling(), prompt, session.repetition_penalty)
    forced: deque[int] = deque()
    for index in range(limit):
        if forced:
            sampler.note(token := forced.popleft())
        else:
            token = sampler.choose(reader.logits())
        if token in session.eos:
            return
        yield token
        if interrupt is not None:
            forced.extend(interrupt(token))
        if index < limit - 1:
            reader.take(token)


def room(session: Session, prompt: int, limit: int) -> int:
    """How many tokens can follow ``prompt`` tokens: ``limit``, or fewer where the context ends."""
    return min(limit, session.context_length - session.padded(prompt))


def check_prompt(session: Session, prompt: Sequence[int], media: Media | None = None) -> None:
    """Refuse a prompt that the model cannot take.

    Raises:
        UsageError: it is empty, has ids outside the vocabulary, leaves no room in the context, or does not fit its
            pictures or sounds.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    _check_ids(session, prompt, "prompt")
    if session.window > 1 and session.config["model"]["pad_token_id"] in prompt:
        raise UsageError("the prompt has the id that the runtime fills up windows with")
    _check_media(session, prompt, media)
    if session.padded(len(prompt)) >= session.context_length:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; the context holds {session.context_length}",
            fix="shorten the prompt, or rebuild with a larger generation.context_length",
        )


def _check_media(session: Session, prompt: Sequence[int], media: Media | None) -> None:
    """The runtime trusts that as many features come as a prompt has tokens for them."""
    if media and media.heard:
        try:
            audio_prompt.check(media.arrays, prompt, audio_prompt.read_tower(session.package))
        except ValueError as error:
            raise UsageError("the sounds do not fit the prompt", why=str(error)) from None
        return
    if session.image_token is None:
        if media:
            raise UsageError(f"{session.package} takes no images")
        return
    if session.config["model"]["pad_token_id"] in prompt:
        raise UsageError("the prompt has the id that the runtime takes for padding")
    features = sum(media.tokens) if media else 0
    if (places := list(prompt).count(session.image_token)) != features:
        raise UsageError(f"the prompt has {places} tokens of images, and the images have {features} features")


def check_answer(session: Session, prompt: Sequence[int], answer: Sequence[int], media: Media | None = None) -> None:
    """Refuse a prompt and its answer that the model cannot be fed; raises `UsageError` as `check_prompt` does."""
    check_prompt(session, prompt, media)
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
    session: Session, prompt: Sequence[int], answer: Sequence[int], media: Media | None = None
) -> npt.NDArray[np.float32]:
    """Logits ``[T, V]`` float32 before each of ``answer`` (``[T]``), which is fed one token at a time."""
    generator = start(session, len(prompt) + len(answer))
    rows = np.empty((len(answer), session.vocabulary), np.float32)
    feed(generator, prompt, media)
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
