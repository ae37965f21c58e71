"""How a graph has mixtures of experts: as one operator where target and scheme can, else as plain ones."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.facts.family import FAMILIES, Shape
from pipeline.facts.scheme import Scheme, WeightScheme
from pipeline.facts.target import ExpertKernels, Loc, Target

ALGORITHMS = ("gptq", "min_error", "none")  # Olive's passes know no experts


def form(target: Target, scheme: Scheme, shape: Shape | None, wanted: str | None) -> str | None:
    """``fused`` or ``dense``; ``None`` for a model without experts.

    Args:
        shape: ``None`` when it is not known yet.
        wanted: what the recipe says.
    """
    if shape is None:
        return wanted or ("fused" if target.kernels and target.kernels.experts else "dense")
    if shape.experts is None:
        return None
    return wanted or ("dense" if fused_problem(target, scheme, shape) else "fused")


def fused_problem(target: Target, scheme: Scheme, shape: Shape) -> str:
    """Why the experts of a model cannot be one operator on the target; empty when they can."""
    kernels = target.kernels.experts if target.kernels else None
    if kernels is None or shape.experts is None:
        return f"{target.name} has no fused operator"
    if scheme.algorithm not in ALGORITHMS:
        return f"algorithm {scheme.algorithm} quantizes no fused experts: use {' or '.join(ALGORITHMS)}"
    if not shape.experts.normalized and not kernels.unnormalized:
        return f"the fused operator of {target.name} normalizes the router's weights, and this model does not"
    sizes = (shape.hidden, shape.experts.intermediate)
    if any(size % kernels.multiple for size in sizes):
        return f"{target.name} takes multiples of {kernels.multiple}, the sizes are {sizes[0]} and {sizes[1]}"
    paths = [f"model.layers.{layer}.mlp.experts" for layer in shape.sparse_layers]
    given = {scheme.of_weight(path, "experts") if scheme.block_wise else None for path in paths}
    return next(filter(None, (_experts_problem(target.name, kernels, weight, sizes) for weight in given)), "")


def _experts_problem(name: str, kernels: ExpertKernels, weight: WeightScheme | None, sizes: tuple[int, int]) -> str:
    if weight is None:
        return "" if kernels.whole else f"{name} has no fused operator for float experts"
    if weight.bits not in kernels.bits:
        return f"{name} has no fused operator for {weight.bits}-bit experts"
    if not weight.symmetric and not kernels.zero_points:
        return f"the fused operator of {name} has no zero points: set `symmetric: true`"
    if any(size % weight.block_size for size in sizes):
        return f"blocks of {weight.block_size} do not divide the sizes {sizes[0]} and {sizes[1]}"
    return ""


def problems(
    target: Target, exporter: str, rotate: bool, experts: str | None, scheme: Scheme, shape: Shape
) -> Iterator[tuple[Loc, str]]:
    """(location in the recipe, reason) of each thing that cannot be done with a model of that shape.

    Args:
        exporter, rotate, experts: of the recipe's section ``export``.
    """
    family = FAMILIES[shape.model_type]
    if exporter not in family.exporters:
        known = " or ".join(family.exporters)
        yield ("export", "exporter"), f"{exporter} cannot export {family.model_type}: use {known}"
    if shape.experts is None:
        if experts:
            yield ("export", "experts"), f"{family.model_type} has no experts: remove `experts`"
        return
    if rotate:
        yield (
            ("export", "rotate"),
            "experts are held against PyTorch's, in the checkpoint's own basis: remove `rotate`",
        )
    if scheme.algorithm == "dynamic":
        yield ("quantize", "algorithm"), "dynamic would quantize the routers, too: use gptq or min_error"
    if experts == "fused" and (reason := fused_problem(target, scheme, shape)):
        yield ("export", "experts"), reason
