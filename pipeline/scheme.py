"""How weights are quantized: a scheme, and the weight scheme that it gives to each weight."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Bits = Literal[4, 8]
BlockSize = Literal[16, 32, 64, 128, 256]


class Frozen(BaseModel):
    """Base of all recipe values: immutable, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(Frozen):
    """How one weight is stored: integer width, block size along the input channels, zero point or not."""

    bits: Bits
    block_size: BlockSize
    symmetric: bool


class Override(Frozen):
    """A weight scheme for the weights whose path matches a pattern; the last match wins.

    Paths look like ``model.layers.3.mlp.down_proj``; patterns are shell globs.
    """

    match: Annotated[str, Field(min_length=1)]
    scheme: WeightScheme


class Scheme(Frozen):
    """How a model is quantized.

    Attributes:
        algorithm: ``min_error`` (this project's Olive pass: least-squares scales, streamed),
            ``rtn`` and ``k_quant`` (Olive's block-wise passes), ``dynamic`` (Olive's dynamic INT8 pass),
            or ``none`` (weights stay as exported).
        body: the scheme of all projections that nothing else names.
        head: the scheme of the output head.
        embedding: ``shared`` (gather from the quantized head), ``float``, or a scheme.
        overrides: exceptions for single weights.
        exclude: patterns of weights that stay as exported.
        accuracy_level: activations inside MatMulNBits: 0 unset, 1 float32, 4 int8.
        options: more options of the Olive pass, checked against the installed pass.
    """

    algorithm: Literal["min_error", "rtn", "k_quant", "dynamic", "none"]
    body: WeightScheme | None = None
    head: WeightScheme | None = None
    embedding: Literal["shared", "float"] | WeightScheme = "float"
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()
    accuracy_level: Literal[0, 1, 4] = 4
    options: dict[str, Any] = {}

    @property
    def block_wise(self) -> bool:
        """Whether weights are quantized block by block, so that weight schemes apply."""
        return self.algorithm in ("min_error", "rtn", "k_quant")

    def of_weight(self, path: str, role: str) -> WeightScheme | None:
        """The scheme of one weight; ``None`` keeps it as exported (or, for a shared embedding, in the head)."""
        if any(fnmatchcase(path, pattern) for pattern in self.exclude):
            return None
        for override in reversed(self.overrides):
            if fnmatchcase(path, override.match):
                return override.scheme
        if role == "embedding":
            return self.embedding if isinstance(self.embedding, WeightScheme) else None
        return self.head if role == "head" and self.head else self.body

    def problems(self) -> list[tuple[str, str]]:
        """(key, reason) of each combination that no pass or kernel can honour."""
        found = []
        schemes = [self.body, self.head, *(override.scheme for override in self.overrides)]
        if isinstance(self.embedding, WeightScheme):
            schemes.append(self.embedding)
        if self.block_wise and self.body is None:
            found.append(("body", f"algorithm {self.algorithm} needs `body`: {{bits, block_size, symmetric}}"))
        if not self.block_wise:
            for key in ("body", "head", "overrides", "exclude"):
                if getattr(self, key):
                    found.append((key, f"algorithm {self.algorithm} does not quantize block by block: remove `{key}`"))
            if self.embedding != "float":
                found.append(("embedding", f"algorithm {self.algorithm} leaves the embedding in float"))
        if self.algorithm == "k_quant":
            if any(scheme.symmetric for scheme in schemes if scheme):
                found.append(("body", "k_quant is asymmetric by definition: set `symmetric: false`"))
            if isinstance(self.embedding, WeightScheme):
                found.append(("embedding", "Olive's k_quant pass has no embedding: use `shared` or `float`"))
        if self.options and self.algorithm in ("min_error", "none"):
            found.append(("options", f"algorithm {self.algorithm} takes no options"))
        return found
