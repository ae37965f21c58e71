"""Serving packages: an engine with the model in a process of its own, an API of Python, and a server like OpenAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serve.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    """`Generator`, whose module takes what most of this package does without."""
    if name == "Generator":
        from pipeline.serve.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
