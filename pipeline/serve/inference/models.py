"""The packages that are served, as the process before them knows them: tokenizer, facts and engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, Manifest, read_manifest
from pipeline.errors import PackageError
from pipeline.package import adapter_files, retrieval_config
from pipeline.runtime import chat, template
from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.thinking import VARIABLE
from pipeline.serve.inference import worker
from pipeline.serve.inference.engine import Engine, Limits
from pipeline.serve.refusals import UnknownModel
from pipeline.task import GENERATE

_ADAPTER = ":"


@dataclass(frozen=True)
class Model:
    """A package that is served.

    Attributes:
        name: what clients call it.
        task: what it is for (`pipeline.task`).
        created: when it was laid here, in seconds since 1970.
        search: how its authors would have tokens chosen: the ``search`` of its ``genai_config.json``.
        sees: whether it takes images.
        thinks: whether its answers may begin with thoughts; ``switch``: whether it can be told to think or not.
        adapters: names of its LoRA adapters.
        manifest: what it says of itself; None of a folder that is no package.
    """

    name: str
    package: Path
    task: str
    tokenizer: Tokenizer
    engine: Engine
    created: int
    context_length: int
    vocabulary: int
    eos: tuple[int, ...]
    search: dict[str, Any]
    sees: bool
    thinks: bool
    switch: bool
    adapters: tuple[str, ...]
    manifest: Manifest | None

    @property
    def generates(self) -> bool:
        """Whether it generates text."""
        return self.task == GENERATE

    @property
    def ids(self) -> list[str]:
        """All names that requests may give: its own, and one for each adapter."""
        return [self.name, *(f"{self.name}{_ADAPTER}{adapter}" for adapter in self.adapters)]


class Models:
    """The packages of a server, by the names that requests give."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._models = list(models)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    def find(self, name: str) -> tuple[Model, str]:
        """A model and the name of one of its adapters, which may be empty.

        Raises:
            UnknownModel: nothing of that name is served.
        """
        for model in self._models:
            if name == model.name:
                return model, ""
            if name.startswith(model.name + _ADAPTER) and name in model.ids:
                return model, name.removeprefix(model.name + _ADAPTER)
        known = ", ".join(known for model in self._models for known in model.ids)
        raise UnknownModel(f"there is no model `{name}`", why=f"served are: {known}", parameter="model")


def load(
    package: Path,
    name: str = "",
    options: worker.Options | None = None,
    limits: Limits | None = None,
) -> Model:
    """A package as a server knows it; its engine is not started.

    Raises:
        PackageError: its configuration or tokenizer cannot be read.
        RuntimeMissing: a library of the tokenizer or the template is not installed.
    """
    manifest = read_manifest(package) if (package / MANIFEST).is_file() else None
    task = manifest.task if manifest else GENERATE
    tokenizer = chat.load(package)
    tokenizer = replace(tokenizer, renderer=template.Renderer())
    shared: dict[str, Any] = {
        "name": name or package.resolve().name,
        "package": package,
        "task": task,
        "tokenizer": tokenizer,
        "engine": Engine(package, replace(options or worker.Options(), task=task), limits),
        "created": int(package.stat().st_mtime),
        "manifest": manifest,
    }
    if task != GENERATE:
        config = retrieval_config.read_config(package)
        return Model(
            **shared,
            context_length=int(config["context_length"]),
            vocabulary=tokenizer.trusted.get_vocab_size(),
            eos=(),
            search={},
            sees=False,
            thinks=False,
            switch=False,
            adapters=(),
        )
    try:
        config = json.loads((package / "genai_config.json").read_bytes())
        model, eos = config["model"], config["model"]["eos_token_id"]
        return Model(
            **shared,
            context_length=int(model["context_length"]),
            vocabulary=int(model["vocab_size"]),
            eos=tuple(eos) if isinstance(eos, list) else (int(eos),),
            search=dict(config.get("search", {})),
            sees="vision" in model and "speech" not in model,
            thinks=tokenizer.thinks,
            switch=tokenizer.takes(VARIABLE),
            adapters=tuple(adapter_files.names(package)),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{package} has no readable genai_config.json", why=repr(error)) from None
