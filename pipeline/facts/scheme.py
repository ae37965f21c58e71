"""How weights are quantized: a scheme, and the weight scheme that it gives to each weight."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


# A literal compares by value: without `_whole`, true would pass for 1, and 4.0 for 4.
Whole = BeforeValidator(_whole)
Bits = Annotated[Literal[4, 8], Whole]
BlockSize = Annotated[Literal[-1, 16, 32, 64, 128, 256], Whole]
AccuracyLevel = Annotated[Literal[0, 1, 4], Whole]


class Frozen(BaseModel):
    """Base of all recipe values: immutable, strictly typed, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(Frozen):
    """How one weight is stored: integer width, block size along the input channels, zero point or not.

    Block size -1 is all input channels of an output channel.
    """

    bits: Bits
    block_size: BlockSize
    symmetric: bool


class Override(Frozen):
    """A weight scheme for the weights whose path matches a pattern; the last match wins.

    Paths look like ``model.layers.3.mlp.down_proj``; patterns are shell globs.
    """

    match: Annotated[str, Field(min_length=1)]
    scheme: WeightScheme


def _embedding_kind(value: Any) -> str:
    return "a scheme" if isinstance(value, dict | WeightScheme) else "a word"


# Told apart by kind, so that what is wrong with one alternative is not also reported as not being the other.
Embedding = Annotated[
    Annotated[Literal["shared", "float"], Tag("a word")] | Annotated[WeightScheme, Tag("a scheme")],
    Discriminator(_embedding_kind),
]


Tower = Annotated[
    Annotated[Literal["float"], Tag("a word")] | Annotated[WeightScheme, Tag("a scheme")],
    Discriminator(_embedding_kind),
]


class Scheme(Frozen):
    """How a model is quantized.

    Attributes:
        algorithm: ``gptq`` and ``min_error`` (this project's Olive passes: rounding errors made up for by what the
            calibration text shows, or least-squares scales alone),
            ``rtn`` and ``k_quant`` (Olive's block-wise passes), ``dynamic`` (Olive's dynamic INT8 pass),
            ``static`` (Olive's calibrated QDQ pass for NPUs: 16-bit activations), ``w8a8`` (ours for processors:
            8-bit weights by channel, 8-bit activations by token), ``nncf`` (Olive's pass for OpenVINO: weights only,
            the most sensitive of them and head and embedding in 8 bits), or ``none`` (weights stay as exported).
        body: the scheme of all projections and experts that nothing else names.
        head: the scheme of the output head.
        embedding: ``shared`` (gather from the quantized head), ``float``, or a scheme.
        vision: of a model that sees, the scheme of the products in its vision tower; ``float`` keeps them.
        audio: of a model that hears, the same for its audio tower.
        overrides: exceptions for single weights.
        exclude: patterns of weights that stay as exported.
        calibration_windows: windows of 512 tokens of calibration text that ``gptq`` and ``static`` read.
        accuracy_level: activations inside MatMulNBits: 0 unset, 1 float32, 4 int8.
        options: more options of the Olive pass, checked against the installed pass.
    """

    algorithm: Literal["gptq", "min_error", "rtn", "k_quant", "dynamic", "static", "w8a8", "nncf", "none"]
    body: WeightScheme | None = None
    head: WeightScheme | None = None
    embedding: Embedding = "float"
    vision: Tower = "float"
    audio: Tower = "float"
    overrides: tuple[Override, ...] = ()
    exclude: tuple[str, ...] = ()
    calibration_windows: Annotated[int, Field(ge=1, le=64)] = 16
    accuracy_level: AccuracyLevel = 4
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def block_wise(self) -> bool:
        """Whether weights are quantized block by block, so that weight schemes apply."""
        return self.algorithm in ("gptq", "min_error", "rtn", "k_quant", "w8a8")

    @property
    def by_weight(self) -> bool:
        """Whether each weight has a scheme of its own."""
        return self.block_wise or self.algorithm in ("static", "nncf")

    def of_weight(self, path: str, role: str) -> WeightScheme | None:
        """The scheme of one weight; ``None`` keeps it as exported (or, for a shared embedding, in the head)."""
        if role == "router":
            return None  # it decides who computes: a rounding error would be no small one
        if any(fnmatchcase(path, pattern) for pattern in self.exclude):
            return None
        for override in reversed(self.overrides):
            if fnmatchcase(path, override.match):
                return override.scheme
        if role == "embedding":
            return self.embedding if isinstance(self.embedding, WeightScheme) else None
        return self.head if role == "head" and self.head else self.body

    def weight_schemes(self) -> list[tuple[tuple[str | int, ...], WeightScheme]]:
        """(location in this scheme, weight scheme) of each that is named."""
        found: list[tuple[tuple[str | int, ...], WeightScheme]] = []
        for key, value in (("body", self.body), ("head", self.head), ("embedding", self.embedding)):
            if isinstance(value, WeightScheme):
                found.append(((key,), value))
        found += [(("overrides", index, "scheme"), override.scheme) for index, override in enumerate(self.overrides)]
        return found

    def problems(self) -> list[tuple[tuple[str | int, ...], str]]:
        """(location in this scheme, reason) of each combination that no pass or kernel can honour."""
        found: list[tuple[tuple[str | int, ...], str]] = []
        if self.by_weight and self.body is None:
            found.append((("body",), f"algorithm {self.algorithm} needs `body`: {{bits, block_size, symmetric}}"))
        if not self.block_wise:
            for key in ("head", "overrides", "exclude") if self.by_weight else ("body", "head", "overrides", "exclude"):
                if getattr(self, key) and (self.algorithm, key) != ("nncf", "head"):
                    reason = f"algorithm {self.algorithm} does not quantize block by block: remove `{key}`"
                    found.append(((key,), reason))
            if self.embedding != "float" and not self.by_weight:
                found.append((("embedding",), f"algorithm {self.algorithm} leaves the embedding in float"))
        if self.algorithm == "static" and self.embedding == "shared":
            found.append((("embedding",), "the head is compiled, and cannot be shared: use `float` or a scheme"))
        found += self._towers()
        found += self._whole_channels()
        found += self._share_of_4_bits()
        if self.algorithm == "k_quant":
            for loc, scheme in self.weight_schemes():
                if scheme.symmetric:
                    reason = "k_quant is asymmetric by definition: set `symmetric: false`"
                    found.append(((*loc, "symmetric"), reason))
            if isinstance(self.embedding, WeightScheme):
                found.append((("embedding",), "Olive's k_quant pass has no embedding: use `shared` or `float`"))
        if self.options and self.algorithm in ("gptq", "min_error", "w8a8", "none"):
            found.append((("options",), f"algorithm {self.algorithm} takes no options"))
        return found

    def _towers(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for key in ("vision", "audio"):
            scheme = getattr(self, key)
            if scheme == "float":
                continue
            if not self.block_wise:
                yield (key,), f"algorithm {self.algorithm} leaves the {key} tower in float"
            elif scheme.block_size == -1:
                yield (key, "block_size"), f"the {key} tower is quantized in blocks: give a block size"

    def _share_of_4_bits(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """NNCF's ``ratio``, which Olive looks at only when the pass runs."""
        config = self.options.get("compress_config") if self.algorithm == "nncf" else None
        if not isinstance(config, dict) or "ratio" not in config:
            return
        ratio, key = config["ratio"], ("options", "compress_config", "ratio")
        if type(ratio) not in (int, float) or not 0 < ratio <= 1:
            yield key, f"the share of projections in 4 bits is more than 0 and at most 1, got {ratio!r}"

    def _whole_channels(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        for loc, weight in self.weight_schemes():
            whole = self.algorithm == "nncf" or (self.algorithm in ("static", "w8a8") and loc == ("body",))
            if weight.block_size == -1 and not whole:
                yield (*loc, "block_size"), "whole channels (-1) are for the body of static and w8a8: give a block size"
            elif weight.block_size == -1 and not weight.symmetric:
                yield (*loc, "symmetric"), "whole channels have no zero point: set `symmetric: true`"
        if self.algorithm == "w8a8" and self.body and self.body.block_size != -1:
            yield ("body", "block_size"), "w8a8 has one scale a channel: set `block_size: -1`"
        for key in ("head", "embedding") if self.algorithm == "nncf" else ():
            if getattr(self, key) != WeightScheme(bits=8, block_size=-1, symmetric=True):
                yield (key,), "nncf quantizes it by channel: set {bits: 8, block_size: -1, symmetric: true}"
