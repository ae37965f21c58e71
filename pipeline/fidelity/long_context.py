"""Agreement far into a context: over the last tokens of one text that is longer than the windows of a validation.

Its tokens are those of the evaluation text, over and over where they must be. What follows can then be read off from an
earlier copy, thousands of tokens before, which a model with wrong positions cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import Progress
from pipeline.checkpoint.reference import Reference
from pipeline.facts import texts
from pipeline.fidelity import metrics
from pipeline.fidelity.agreement import Tally
from pipeline.runtime import generate
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

LAST = 64
"""How many tokens at the end are compared; they take the decode path, the others before them the prefill path."""
_CHUNK = 512  # tokens a forward: the scores of attention would else need the square of the text's length


def measure(torch_model: Reference, session: Session, tokens: int, progress: Progress) -> dict[str, Any]:
    """Figures (`Tally.figures`) over the last `LAST` of ``tokens`` tokens, and ``tokens``.

    Args:
        tokens: fewer than the package's context holds.

    Raises:
        ValueError: the logits have NaN or infinite values.
    """
    ids = text(torch_model.tokenizer, tokens)
    progress(0.0, f"{tokens} tokens through the reference")
    wanted = reference_logits(torch_model, ids)
    progress(0.5, f"{tokens} tokens through the package")
    tally = Tally()
    tally.add("long", metrics.log_softmax(wanted), package_logits(session, ids), ids[-LAST:])
    return {"tokens": tokens, **tally.figures()}


def text(tokenizer: Any, tokens: int) -> list[int]:
    """So many ids of the evaluation text, which is repeated."""
    joined = "\n\n".join(texts.EVALUATION.read().values())
    once = tokenizer(f"{joined}\n\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = (once * -(-tokens // len(once)))[:tokens]
    return ids


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]


def reference_logits(torch_model: Reference, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The reference's logits ``[LAST, V]`` after the last ids."""
    import torch

    cache = None
    with torch.inference_mode():
        for chunk in (*_chunks(ids[:-LAST]), ids[-LAST:]):
            given = torch.tensor([list(chunk)])
            out = torch_model.model(given, past_key_values=cache, use_cache=True, logits_to_keep=LAST)
            cache = out.past_key_values
    found: npt.NDArray[np.float32] = out.logits[0].float().numpy()
    return found


def package_logits(session: Session, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The package's logits ``[LAST, V]`` after the last ids, which are fed one by one."""
    generator = generate.start(session, len(ids) + 1)
    for chunk in _chunks(ids[:-LAST]):
        generator.append_tokens(np.asarray(chunk, np.int32))
    rows = np.empty((LAST, session.vocabulary), np.float32)
    for index, token in enumerate(ids[-LAST:]):
        generator.append_tokens(np.asarray([token], np.int32))
        rows[index] = np.asarray(generator.get_logits(), np.float32).reshape(-1)[: session.vocabulary]
    return rows
