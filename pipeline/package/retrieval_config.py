"""What a package that embeds or ranks says of itself: ``retrieval.json``, read without trust and without a runtime."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.artifact import is_file_name, read_json
from pipeline.errors import PackageError
from pipeline.task import TASKS

CONFIG = "retrieval.json"
NAMED = re.compile(r"\{(\w+)\}")
"""The place of a text in a form."""

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
        pairs = ((form, set(NAMED.findall(forms[name]))) for name, form in task.forms.items())
        unknown = sorted(name for form, names in pairs for name in names.difference(NAMED.findall(form)))
        found += [f"`forms` names {{{name}}}, which nobody gives" for name in unknown]
    if list(config["labels"]) != list(task.labels):
        found.append(f"`labels` are not those of task {task.name}: {', '.join(task.labels) or 'none'}")
    if config["dimensions"] < 1 or config["context_length"] <= len(config["before"]) + len(config["after"]):
        found.append("`dimensions` or `context_length` is too small")
    return found
