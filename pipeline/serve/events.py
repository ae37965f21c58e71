"""What is asked of the process that has the model, and what it tells while it answers.

These cross a process boundary as JSON: they hold nothing but numbers, texts and bytes.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.runtime.sampling import Sampling

STOP, LENGTH = "stop", "length"
"""Why an answer ended: the model or a stop string ended it; or its limit or the context did."""


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        prompt: token ids, one for each picture's place (`pipeline.runtime.generate.attach`).
        limit: most tokens of the answer; the context may end it sooner.
        stop: texts that end an answer, and are no part of it.
        top_logprobs: how many alternatives to tell with each token's log-probability; neither when None.
        grammar: of llguidance, which the answer follows once it is not inside thoughts.
        reasons: whether the answer may begin with a block of thoughts (`pipeline.runtime.thinking`).
        inside: whether the prompt has opened that block.
        budget: most tokens of the block, which is ended then.
        adapter: name of a LoRA adapter of the package.
        images: encoded pictures, PNG or JPEG, which have been checked.
        cache: whether to take up the cache of a conversation that begins alike.
    """

    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: str = ""
    reasons: bool = False
    inside: bool = False
    budget: int | None = None
    adapter: str = ""
    images: tuple[bytes, ...] = ()
    cache: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For a process boundary; `request_of` is the way back."""
        data = asdict(self)
        data["images"] = [base64.b64encode(image).decode() for image in self.images]
        data["sampling"]["logit_bias"] = [[token, bias] for token, bias in self.sampling.logit_bias.items()]
        return data


def request_of(data: dict[str, Any]) -> Request:
    """The request that `Request.as_dict` described."""
    sampling = Sampling(**{**data["sampling"], "logit_bias": dict(map(tuple, data["sampling"]["logit_bias"]))})
    given = {
        **data,
        "sampling": sampling,
        "prompt": tuple(data["prompt"]),
        "stop": tuple(data["stop"]),
        "images": tuple(base64.b64decode(image) for image in data["images"]),
    }
    return Request(**given)


@dataclass(frozen=True)
class Prefilled:
    """How much of the prompt has been read: ``cached`` tokens of ``total`` were known before."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Piece:
    """A token of the answer, and the text that became final with it, which may be empty.

    Attributes:
        logprob: the token's own, in nats; None unless it was asked for.
        top: the most likely tokens before anything was asked of the choice, with their log-probabilities.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer.

    Attributes:
        reason: `STOP` or `LENGTH`.
        text: what was held back until it was clear that it is no stop string or half a character.
        prompt: tokens of the prompt, those of pictures included.
        cached: how many of them were not read again.
        tokens: of the answer, the one that ended it not counted.
        stopped_by: the stop string that ended it; empty when none did.
    """

    reason: str
    text: str
    prompt: int
    cached: int
    tokens: int
    stopped_by: str = ""


Event = Prefilled | Piece | End
