"""A mixture of experts as part of a decoder's graph: one fused operator, or plain ones for providers without it.

Shapes in this module:
    B: batch, S: tokens of a call, H: hidden size, E: experts of a layer, C: experts that a token goes to, I: inner size
    of an expert.

``MoE`` (ONNX Runtime, docs/ContribOperators.md) takes the router's logits ``[B * S, E]``, and chooses and weighs by
itself. Its first weights ``[E, 2I, H]`` have the rows of gate and up in turns, its second ones are ``[E, H, I]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph.builder import MICROSOFT, GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt

Read = Callable[[str], "npt.NDArray[Any]"]
Mlp = Callable[[str, str, str], str]  # value, path of the modules, name of the nodes → value


@dataclass(frozen=True)
class Mixture:
    """What the graph of a mixture depends on; ``layers`` are those that have one, the others' MLPs are dense."""

    layers: frozenset[int]
    hidden: int
    inner: int
    experts: int
    chosen: int
    normalized: bool
    shared: bool


def mixture_of(config: Any) -> Mixture | None:
    """The mixture of a transformers configuration; ``None`` where it has none."""
    experts = getattr(config, "num_experts", 0)
    if not experts:
        return None
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return Mixture(
        layers=frozenset(
            layer for layer in range(config.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0
        ),
        hidden=config.hidden_size,
        inner=config.moe_intermediate_size,
        experts=experts,
        chosen=config.num_experts_per_tok,
        normalized=config.norm_topk_prob,
        shared=bool(getattr(config, "shared_expert_intermediate_size", 0)),
    )


def fused(g: GraphBuilder, m: Mixture, x: str, logits: str, path: str, name: str, read: Read, dtype: type) -> str:
    """One ``MoE`` node, whose weights are written an expert at a time.

    Args:
        x: ``[B, S, H]``.
        logits: of the router, ``[B, S, E]``.
        path: of the experts' modules.
        name: of the node.
        read: the values of a tensor of the checkpoint.
    """

    def gate_and_up() -> Iterator[npt.NDArray[Any]]:
        for expert in range(m.experts):
            pair = [read(f"{path}.{expert}.{kind}_proj.weight") for kind in ("gate", "up")]
            yield np.stack(pair, 1).reshape(2 * m.inner, m.hidden)

    down = (read(f"{path}.{expert}.down_proj.weight") for expert in range(m.experts))
    constants = name[1:].replace("/", ".")
    first = g.constant_of_parts(
        f"{constants}.gate_up_proj.weight", dtype, (m.experts, 2 * m.inner, m.hidden), gate_and_up()
    )
    second = g.constant_of_parts(f"{constants}.down_proj.weight", dtype, (m.experts, m.hidden, m.inner), down)
    rows = g.node("Reshape", [logits, g.ints(-1, m.experts)], f"{name}/rows")
    return g.node(
        "MoE",
        [x, rows, first, "", second],
        name,
        domain=MICROSOFT,
        k=m.chosen,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=int(m.normalized),
    )


def dense(g: GraphBuilder, m: Mixture, x: str, logits: str, path: str, name: str, mlp: Mlp, dtype: type) -> str:
    """Every expert for every token, times its weight, which is 0 where it was not chosen: plain operators only.

    Shapes stay static, and each expert's matrices are matrices like all others. What it costs is ``E / C`` times the
    multiplications.
    """
    share = g.node("Softmax", [logits], f"{name}/softmax", axis=-1)
    best, which = f"{name}/best", f"{name}/which"
    g.node("TopK", [share, g.ints(m.chosen)], best, [best, which], axis=-1)
    if m.normalized:
        total = g.node("ReduceSum", [best, g.ints(-1)], f"{name}/total", keepdims=1)
        best = g.node("Div", [best, total], f"{name}/normalized")
    zero = g.constant(f"zero.{np.dtype(dtype)}", np.array(0, dtype))
    zeros = g.node("Mul", [share, zero], f"{name}/zeros")
    weights = g.node("ScatterElements", [zeros, which, best], f"{name}/weights", axis=-1)
    parts = [f"{name}/weights.{expert}" for expert in range(m.experts)]
    g.node("Split", [weights, g.ints(*[1] * m.experts)], f"{name}/split", parts, axis=-1)
    total = ""
    for expert, part in enumerate(parts):
        y = mlp(x, f"{path}.{expert}", f"{name}.{expert}")
        y = g.node("Mul", [y, part], f"{name}.{expert}/weighted")
        total = g.node("Add", [total, y], f"{name}.{expert}/sum") if total else y
    return total
