"""Serving packages: an engine with the model in a process of its own, an API of Python, and a server like OpenAI's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serve.generator import Generator
    from pipeline.serve.inference.engine import Limits
    from pipeline.serve.inference.worker import Options

__all__ = ["Generator", "Limits", "Options"]
_PLACES = {"Generator": "generator", "Limits": "inference.engine", "Options": "inference.worker"}


def __getattr__(name: str) -> Any:
    """What a program in Python needs, from modules that take what most of this package does without."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
