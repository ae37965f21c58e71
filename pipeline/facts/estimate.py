"""What each step of a build needs, from the sizes of the weights: rough, and rather too much than too little."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifact import Estimate
from pipeline.facts import sizes
from pipeline.facts.family import HELD_WHOLE, Shape
from pipeline.facts.recipe import Checkpoint, Recipe, exporter_of
from pipeline.facts.sizes import Tower
from pipeline.facts.target import TARGETS

_GB = 1_000_000_000


@dataclass(frozen=True)
class Pace:
    """What a tool takes on two cores: measured on Qwen2.5-0.5B, rounded up.

    Attributes:
        held: bytes of memory for each byte of the model's float32 weights.
        layer: the same for one layer's; a pass that streams holds no more than that.
        vocabulary: the same for one vocabulary matrix, the largest single weight of most models.
        spare: bytes of memory besides.
        seconds: for each gigabyte of float32 weights.
        start: seconds besides.
    """

    held: float
    seconds: float
    layer: float = 0.0
    vocabulary: float = 0.0
    spare: int = _GB
    start: int = 8


# By how a checkpoint comes: a GGUF file is dequantized as a whole, an adapter is merged into the whole, a directory of
# safetensors is copied.
FETCHING: dict[str, Pace] = {
    "file": Pace(1.5, 22, spare=_GB // 2, start=10),
    "adapter": Pace(1.5, 22, spare=_GB // 2, start=10),
    "directory": Pace(0.0, 8, spare=_GB // 2, start=10),
}
EXPORTING: dict[str, Pace] = {
    "genai": Pace(1.5, 10, spare=_GB // 2),
    "optimum": Pace(1.5, 10, spare=_GB // 2),
    "static": Pace(1.5, 10, spare=_GB // 2),
    "openvino": Pace(1.5, 10, spare=_GB // 2),
    "native": Pace(0.0, 10, vocabulary=2, spare=_GB // 2),  # a weight or an expert at a time
}
# Our own passes stream: they hold a few copies of the largest weight or expert, and GPTQ a layer in float32.
QUANTIZING: dict[str, Pace] = {
    "none": Pace(0.0, 6, vocabulary=1.2),
    "min_error": Pace(0.0, 14, vocabulary=1.2),
    "gptq": Pace(0.0, 58, layer=2, vocabulary=1.2, spare=3 * _GB // 2),
    "w8a8": Pace(0.0, 14, vocabulary=1.2),
    "rtn": Pace(1.6, 20),
    "k_quant": Pace(4.0, 100),
    "dynamic": Pace(4.0, 60),
    "static": Pace(2.4, 60),
    "nncf": Pace(1.2, 12),
}


def of(stage: str, recipe: Recipe, shape: Shape | None, tower: Tower | None = None) -> Estimate:
    """What a step of a recipe is expected to need.

    Args:
        shape: of the model; without it, the recipe's ``size`` says how large it is, or nothing does.
        tower: of a model that has an encoder in front.
    """
    sized = _Sized.of(recipe, shape, tower)
    gigabytes = sized.floats / _GB
    if stage == "checkpoint":
        pace = FETCHING[_way(recipe.checkpoint)]
        # What is fetched is kept until the store is cleaned, beside what the step makes of it. A directory's weights
        # are linked; of a local one on another disk they are copied, which a build finds out.
        linked = sized.fetched if any(source.type == "hub" for source in recipe.checkpoint.sources) else 0
        disk = linked if pace is FETCHING["directory"] else sized.floats + 2 * sized.fetched
        return Estimate(sized.memory(pace), disk, pace.start + int(pace.seconds * gigabytes))
    if stage == "export":
        # A model is rotated as a whole, whoever writes its graph.
        pace = EXPORTING["genai" if recipe.export.rotate else exporter_of(recipe, shape)]
        return Estimate(sized.memory(pace), sized.floats, pace.start + int(pace.seconds * gigabytes))
    if stage == "quantize":
        pace = QUANTIZING[recipe.quantize.algorithm]
        return Estimate(sized.memory(pace), sized.packed, pace.start + int(pace.seconds * gigabytes))
    if stage == "validate":
        # The reference computes in float32, a large one layer by layer, and beside it the package and its twin for
        # whole prompts, whose weights the runtime packs anew; an emulated NPU takes minutes for what a processor does
        # in seconds.
        reference = sized.floats if sized.floats <= HELD_WHOLE else sized.layer + 2 * sized.vocabulary
        logits = recipe.validation.window_tokens * sized.vocabulary // sized.hidden
        # A long text takes 10 ms a token and gigabyte, and a cache of each of the two models.
        long = recipe.validation.long_tokens or 0
        caches = 16 * long * shape.layers * shape.kv_heads * shape.head_dim if shape else long * _GB // 20_000
        seconds = 20 + int(((600 if recipe.npu else 50 + 30 * len(recipe.adapters or ())) + 0.01 * long) * gigabytes)
        return Estimate(reference + 2 * sized.packed + 6 * logits + caches + 13 * _GB // 10, 0, seconds)
    others = {
        "compile": Estimate(3 * sized.packed + 2 * _GB, 3 * sized.packed, 20 + int(40 * gigabytes)),
        # Weights are linked where the disk can; a skeleton of the model and an adapter at a time are in memory.
        "adapters": Estimate(_GB, sized.packed, 10 + 5 * len(recipe.adapters or ())),
        "package": Estimate(_GB, 2 * sized.packed + sizes.FILES, 5),
    }
    return others[stage]


def packed(recipe: Recipe, shape: Shape, tower: Tower | None = None) -> int:
    """Bytes of the weights of the package that a recipe makes."""
    return sizes.package_bytes(shape, recipe.quantize, floats(recipe), tower)


def floats(recipe: Recipe) -> int:
    """Bits of activations, and of what is not quantized."""
    dtype = recipe.export.dtype or TARGETS[recipe.target].dtypes[0]
    return 32 if dtype == "float32" else 16


def _way(checkpoint: Checkpoint) -> str:
    if checkpoint.adapter:
        return "adapter"
    if any(source.type == "hub" and not source.file for source in checkpoint.sources):
        return "directory"
    local = [source.path for source in checkpoint.sources if source.type == "local"]
    return "directory" if local and not any(path.endswith(".gguf") for path in local) else "file"


@dataclass(frozen=True)
class _Sized:
    """Bytes: of a model's float32 weights, of one layer's and one vocabulary matrix' among them, of what is fetched and
    of the package's weights; and the hidden size."""

    floats: int
    layer: int
    vocabulary: int
    fetched: int
    packed: int
    hidden: int

    @staticmethod
    def of(recipe: Recipe, shape: Shape | None, tower: Tower | None) -> _Sized:
        size = recipe.checkpoint.size
        if shape is None:
            whole = 4 * (size or _GB)
            return _Sized(whole, whole // 24, whole // 8, size or 0, whole // 4, 1000)
        whole = sizes.float_bytes(shape, tower)
        # Publishers store 16 bits a weight.
        fetched = size or (2 * sizes.parameters(shape, tower) if _way(recipe.checkpoint) == "directory" else 0)
        layer, vocabulary = 4 * sizes.largest_layer(shape), 4 * shape.vocabulary_parameters
        return _Sized(whole, layer, vocabulary, fetched, packed(recipe, shape, tower), shape.hidden)

    def memory(self, pace: Pace) -> int:
        held = pace.held * self.floats + pace.layer * self.layer + pace.vocabulary * self.vocabulary
        return int(held) + pace.spare
