"""Run packages that embed texts or rank documents, with onnxruntime and tokenizers alone.

What is given is text: control tokens in it are the characters that they are written with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import PackageError, RuntimeMissing, UsageError
from pipeline.package import retrieval_replay
from pipeline.package.retrieval_config import CONFIG, NAMED, read_config
from pipeline.runtime import chat
from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.session import available_threads

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Retriever:
    """A loaded package; ``config`` is its ``retrieval.json``."""

    package: Path
    session: Any
    tokenizer: Tokenizer
    config: Mapping[str, Any]

    def ids(self, form: str, truncate: bool = False, **texts: str) -> list[int]:
        """Token ids of texts put together, with what the model expects around them.

        Args:
            form: a key of ``config["forms"]``.
            truncate: cut what does not fit the context, from the end.
            texts: for each name in the form its text; the package's own instruction when it is left out.

        Raises:
            UsageError: a text is empty, is not valid Unicode, or does not fit.
        """
        return encode(self.tokenizer, self.config, form, truncate, texts)

    def embed(self, rows: Sequence[Sequence[int]], dimensions: int | None = None) -> Floats:
        """Vectors ``[B, D]`` of length 1 of rows of ids (`ids`).

        Args:
            dimensions: how many of the first ones to keep, for models that were trained for it; all when left out.

        Raises:
            UsageError: the vectors have not so many.
        """
        most = int(self.config["dimensions"])
        if dimensions is not None and not 1 <= dimensions <= most:
            raise UsageError(f"{dimensions} dimensions are not in [1, {most}]", why=f"the model has {most}")
        found = self.run(rows)[:, :dimensions]
        result: Floats = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return result

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """For each row of ids of a query and a document (`ids`) how relevant the document is, in [0, 1]."""
        return [float(score) for score in retrieval_replay.scores(self.run(rows))]

    def run(self, rows: Sequence[Sequence[int]]) -> Floats:
        """Results ``[B, D]`` of rows of ids, as the graph gives them.

        They are computed one after the other: in a batch all would be as long as the longest.
        """
        return np.concatenate([retrieval_replay.run(self.session, self.config["output"], [row]) for row in rows])


def encode(
    tokenizer: Tokenizer, config: Mapping[str, Any], form: str, truncate: bool, texts: Mapping[str, str]
) -> list[int]:
    """Token ids, as `Retriever.ids` gives them; raises as it does."""
    return framed(config, body(tokenizer, config, form, texts), truncate)


def body(tokenizer: Tokenizer, config: Mapping[str, Any], form: str, texts: Mapping[str, str]) -> list[int]:
    """Token ids of texts put together, without what stands around them.

    Raises:
        UsageError: a text is empty or is not valid Unicode.
    """
    given = {"instruction": str(config["instruction"]), **texts}
    if empty := [name for name, text in given.items() if not text.strip()]:
        raise UsageError(f"the {empty[0]} is empty")
    return tokenizer.encode(NAMED.sub(lambda match: given[match[1]], config["forms"][form]), special=False)


def room(config: Mapping[str, Any]) -> int:
    """Most tokens of a text, those around it not counted."""
    return int(config["context_length"]) - len(config["before"]) - len(config["after"])


def framed(config: Mapping[str, Any], ids: Sequence[int], truncate: bool) -> list[int]:
    """The ids of a text (`body`) with those that the model expects around them.

    Raises:
        UsageError: they do not fit, and are not to be cut.
    """
    most = room(config)
    if len(ids) > most and not truncate:
        raise UsageError(
            f"the text has {len(ids)} tokens; the model takes {most}",
            fix="shorten it, cut it with --truncate, or rebuild with a larger generation.context_length",
        )
    return [*config["before"], *ids[:most], *config["after"]]


def open_package(package: Path, threads: int | None = None) -> Retriever:
    """Load a package.

    Raises:
        PackageError: its configuration, tokenizer or graph cannot be loaded.
        RuntimeMissing: onnxruntime is not installed.
    """
    config = read_config(package)
    tokenizer = chat.load(package)
    try:
        session = retrieval_replay.load(package, config, threads or available_threads())
    except ImportError as error:
        raise RuntimeMissing("onnxruntime cannot be loaded", why=str(error), fix="pip install '.[serve]'") from None
    except Exception as error:  # the binding raises bare exceptions of the C++ side
        raise PackageError(f"{package} cannot be loaded by onnxruntime", why=str(error).split("\n")[0]) from None
    outputs = [value.name for value in session.get_outputs()]
    if outputs != [config["output"]]:
        raise PackageError(f"{package} has another output than its {CONFIG} says", why=", ".join(outputs))
    return Retriever(package, session, tokenizer, config)
