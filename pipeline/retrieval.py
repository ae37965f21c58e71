"""Run packages that embed texts or rank documents, with onnxruntime and tokenizers alone.

What is given is text: control tokens in it are the characters that they are written with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import chat, retrieval_replay
from pipeline.artifact import is_file_name, read_json
from pipeline.chat import Tokenizer
from pipeline.errors import PackageError, RuntimeMissing, UsageError
from pipeline.retrieval_replay import CONFIG
from pipeline.session import available_threads
from pipeline.task import TASKS

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Keys of retrieval.json and the type of each; every other one is refused.
_KEYS: dict[str, type] = {
    "task": str,
    "filename": str,
    "output": str,
    "context_length": int,
    "dimensions": int,
    "labels": dict,
    "before": list,
    "after": list,
    "forms": dict,
    "instruction": str,
}

_NAMED = re.compile(r"\{(\w+)\}")


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
    given = {"instruction": str(config["instruction"]), **texts}
    if empty := [name for name, text in given.items() if not text.strip()]:
        raise UsageError(f"the {empty[0]} is empty")
    whole = _NAMED.sub(lambda match: given[match[1]], config["forms"][form])
    body = tokenizer.encode(whole, special=False)
    before, after = config["before"], config["after"]
    room = int(config["context_length"]) - len(before) - len(after)
    if len(body) > room and not truncate:
        raise UsageError(
            f"the text has {len(body)} tokens; the model takes {room}",
            fix="shorten it, cut it with --truncate, or rebuild with a larger generation.context_length",
        )
    return [*before, *body[:room], *after]


def read_config(package: Path) -> dict[str, Any]:
    """The content of ``retrieval.json``.

    Raises:
        PackageError: it cannot be read, or has other keys or values than it should.
    """
    path = package / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{CONFIG} cannot be read", where=str(path), why=str(error)) from None
    if problems := _problems(config):
        raise PackageError(
            f"{CONFIG} does not follow its schema", where=str(path), why="; ".join(problems), fix="do not load it"
        )
    found: dict[str, Any] = config
    return found


def _problems(config: Any) -> list[str]:
    if not isinstance(config, dict):
        return ["it is no object"]
    found = [f"unknown key `{name}`" for name in config if name not in _KEYS]
    found += [f"`{name}` is missing" for name in _KEYS if name not in config]
    found += [
        f"`{name}` has the wrong type"
        for name, kind in _KEYS.items()
        if name in config and type(config[name]) is not kind
    ]
    if found:
        return found
    if not is_file_name(config["filename"]) or not config["filename"].endswith(".onnx"):
        found.append(f"`filename` is no graph of the package: {config['filename']!r}")
    for name in ("before", "after"):
        if not all(type(token) is int and token >= 0 for token in config[name]):
            found.append(f"`{name}` is no list of token ids")
    if not all(type(token) is int for token in config["labels"].values()):
        found.append("`labels` does not map to token ids")
    task = TASKS.get(config["task"])
    if task is None or task.generates:
        return [*found, f"`task` is {config['task']!r}"]
    forms = config["forms"]
    if forms.keys() != task.forms.keys() or not all(isinstance(form, str) for form in forms.values()):
        found.append(f"`forms` does not map {', '.join(task.forms)} to texts")
    else:
        pairs = ((form, set(_NAMED.findall(forms[name]))) for name, form in task.forms.items())
        unknown = sorted(name for form, names in pairs for name in names.difference(_NAMED.findall(form)))
        found += [f"`forms` names {{{name}}}, which nobody gives" for name in unknown]
    if list(config["labels"]) != list(task.labels):
        found.append(f"`labels` are not those of task {task.name}: {', '.join(task.labels) or 'none'}")
    if config["dimensions"] < 1 or config["context_length"] <= len(config["before"]) + len(config["after"]):
        found.append("`dimensions` or `context_length` is too small")
    return found


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
