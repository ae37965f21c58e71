"""What the weights of a decoder see while it reads the calibration text: one Hessian for each kind of input.

Layers are walked one at a time, each in the order in which its projections are computed. A projection that has been
quantized may be given back, and all that follow then see what they will see in the quantized model: errors do not pile
up unseen (Frantar et al., 2022, quantize layers in sequence for this reason).

Shapes in this module:
    W: windows, T: tokens of each, K: input channels of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.facts import texts
from pipeline.facts.scheme import WeightScheme
from pipeline.quantization import blockwise, decoder, gptq
from pipeline.quantization.blockwise import BlockQuantized

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

WINDOW_TOKENS = 512

# Projections that read the same input, by the last part of their path; `qkv_proj` is how the genai builder fuses three.
_INPUT = {
    "qkv_proj": "attention",
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "gated",
    "lm_head": "head",
}

# GPTQ of an expert sees only the tokens that go to it. With the damping of the paper, fewer tokens than channels lose
# up to twice what rounding loses on other text. With this one, two layers' projections of Qwen2.5-Coder-0.5B that read
# the residual stream lost 0.83 of what rounding does from 64 tokens and 0.64 from 1024; those behind the gate up to 1.3
# from 256, but 0.4 and 0.93 from 512. Experts with fewer tokens take least-squares scales.
_EXPERT_DAMPING = 1.0
_FEWEST, _FEWEST_INNER = 64, 512


class Hessians:
    """Hessians of the projections, to be asked for in the order in which the model computes them.

    Args:
        checkpoint: directory of the reference.
        windows: how many windows of `WINDOW_TOKENS` to read, the domains taking turns.
        rotate: whether the weights are those of the rotated model.
    """

    def __init__(self, checkpoint: Path, windows: int, rotate: bool = False) -> None:
        self._decoder = decoder.Decoder(checkpoint, rotate)
        ids = _windows(checkpoint, windows)
        self._order = [
            *((layer, kind) for layer in range(self._decoder.count) for kind in self._decoder.kinds(layer)),
            (self._decoder.count, "head"),
        ]
        self._steps = self._walk(ids)
        self._at = -1
        self._layer: Any = None
        self._now: torch.Tensor | None = None
        self._routing: tuple[torch.Tensor, torch.Tensor] | None = None
        self._key = ""
        self._kept: tuple[torch.Tensor, ...] = ()
        self._factor: tuple[gptq.Factor, ...] = ()

    def of(self, path: str) -> tuple[torch.Tensor, ...]:
        """The Hessian (`gptq.hessian`) of the inputs of a weight.

        It is empty where there is none: of the embedding, and of an expert that hardly any token went to.

        Raises:
            StageError: what comes after the weight has been asked for already.
        """
        step = self._step(path)
        if step is None:
            return ()
        self._advance(path, step)
        key = _key(path)
        if key != self._key or not self._kept:
            inputs = self._inputs(path)
            self._kept = gptq.hessian(inputs) if inputs is not None else ()
            self._key, self._factor = key, ()
        return self._kept

    def _inputs(self, path: str) -> torch.Tensor | None:
        """The inputs ``[S, K]`` of a weight; of an expert's those of its tokens, as large as the router weighs them."""
        import torch

        assert self._now is not None
        if ".experts." not in path:
            return self._now
        with torch.inference_mode():
            if self._routing is None:
                self._routing = _routed(self._layer.mlp, self._now)
            weights, chosen = self._routing
            rows, places = torch.where(chosen == decoder.expert_of(path))
            inner = path.endswith("down_proj")
            if len(rows) < (_FEWEST_INNER if inner else _FEWEST):
                return None
            inputs = self._now[rows]
            if inner:
                expert = self._layer.mlp.experts[decoder.expert_of(path)]
                inputs = expert.act_fn(expert.gate_proj(inputs)) * expert.up_proj(inputs)
            return inputs * weights[rows, places, None]

    def factor(self, path: str) -> tuple[gptq.Factor, ...]:
        """The factors of the Hessian `of` a weight."""
        hessian = self.of(path)
        if hessian and not self._factor:
            self._factor = gptq.factor(hessian, _EXPERT_DAMPING) if ".experts." in path else gptq.factor(hessian)
        return self._factor if hessian else ()

    def quantize(self, path: str, values: npt.NDArray[Any], scheme: WeightScheme) -> BlockQuantized:
        """A weight (``[N, K]``) by GPTQ; 8 bits and the embedding by least-squares scales."""
        factor = self.factor(path) if scheme.bits == 4 else ()
        if not factor:
            return blockwise.quantize(values, scheme.bits, scheme.block_size, scheme.symmetric)
        return gptq.quantize(values, factor, scheme.bits, scheme.block_size, scheme.symmetric)

    def replace(self, path: str, weight: Callable[[], npt.NDArray[np.float32]]) -> None:
        """Let the walk go on with another weight, if anything follows that sees it.

        Args:
            weight: gives it: ``[N, K]``, the rows of fused projections one after the other.

        Raises:
            StageError: what comes after the weight has been asked for already.
        """
        import torch

        step = self._step(path)
        if step is None:
            return
        self._advance(path, step)
        if self._layer is None:
            return
        modules = decoder.projections(self._layer, path)
        values = torch.from_numpy(weight())
        if path.endswith("gate_up_proj"):
            rows: Any = (values[0::2].contiguous(), values[1::2].contiguous())
        else:
            rows = values.split([module.out_features for module in modules])
        for module, part in zip(modules, rows, strict=True):
            module.weight.data = part

    def _advance(self, path: str, step: int) -> None:
        if step < self._at:
            layer, kind = self._order[self._at]
            why = f"the graph's weights are not in the order in which layer {layer} computes them ({kind})"
            raise StageError(f"{path} comes too late", why=why)
        while self._at < step:
            self._now = next(self._steps)
            self._kept, self._factor, self._routing = (), (), None
            self._at += 1

    def _step(self, path: str) -> int | None:
        kind = "experts" if ".experts." in path else _INPUT.get(path.rpartition(".")[2])
        if kind is None:
            return None
        layer = decoder.layer_of(path)
        return self._order.index((self._decoder.count if layer is None else layer, kind))

    def _walk(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """The inputs ``[W * T, K]`` of each step; between two of them weights may be replaced."""
        import torch

        with torch.inference_mode():
            hidden = self._decoder.embed(ids)
            rotary = self._decoder.rotary(hidden, ids.shape[1])
        for layer in self._decoder.layers():
            self._layer = layer
            with torch.inference_mode():
                normed = layer.input_layernorm(hidden)
            yield normed.flatten(0, 1)
            with torch.inference_mode():
                heads = _input_of(layer.self_attn.o_proj, layer.self_attn, normed, position_embeddings=rotary)
            yield heads.flatten(0, 1)
            with torch.inference_mode():
                hidden = hidden + layer.self_attn.o_proj(heads)
                normed = layer.post_attention_layernorm(hidden)
            mixed = hasattr(layer.mlp, "experts")
            mlp: Any = getattr(layer.mlp, "shared_expert", None) if mixed else layer.mlp
            if mlp is not None:
                yield normed.flatten(0, 1)
                with torch.inference_mode():
                    gated = _input_of(mlp.down_proj, mlp, normed)
                yield gated.flatten(0, 1)
            if mixed:
                yield normed.flatten(0, 1)
            with torch.inference_mode():
                hidden += torch.cat([layer.mlp(row[None])[0] for row in normed]) if mixed else mlp.down_proj(gated)
        self._layer = None
        with torch.inference_mode():
            normed = self._decoder.last_norm(hidden)
        yield normed.flatten(0, 1)


def _key(path: str) -> str:
    """The same for weights that read the same input, within a step."""
    return path.rpartition(".")[0] + path.endswith("down_proj") * ".inner" if ".experts." in path else ""


def _routed(mixture: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token (``[S, H]``) the weights of its experts and their indices, both ``[S, C]``."""
    share = mixture.gate(inputs).softmax(-1)
    weights, chosen = share.topk(mixture.top_k, -1)
    return (weights / weights.sum(-1, keepdim=True) if mixture.norm_topk_prob else weights), chosen


def windows(checkpoint: Path, count: int) -> list[list[int]]:
    """Token ids of ``count`` windows of calibration text, the domains taking turns."""
    found: list[list[int]] = _windows(checkpoint, count).tolist()
    return found


def _windows(checkpoint: Path, count: int) -> torch.Tensor:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True).get_text_config(decoder=True)
    return _read(tokenizer, count, min(WINDOW_TOKENS, config.max_position_embeddings))


def _read(tokenizer: Any, count: int, length: int = WINDOW_TOKENS) -> torch.Tensor:
    """Token ids ``[W, T]``; the text is short, so there may be fewer windows.

    Raises:
        StageError: it is too short for one window.
    """
    import torch

    corpus = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.CALIBRATION.read().values()]
    rows: list[list[int]] = []
    for turn in range(count):
        start = turn * length
        rows += [ids[start : start + length] for ids in corpus if len(ids) >= start + length]
    if not rows:
        raise StageError(f"the calibration text is too short for a window of {length} tokens of this tokenizer")
    return torch.tensor(rows[:count])


class _Reached(Exception):  # noqa: N818 - it is no error
    """Ends a module's computation where what was wanted of it is known."""


def _input_of(inner: Any, outer: Any, inputs: torch.Tensor, **more: Any) -> torch.Tensor:
    """What ``outer``, given ``inputs`` (``[W, T, H]``), gives to ``inner``: ``[W, T, K]``; row by row, for memory."""
    import torch

    found: list[torch.Tensor] = []

    def stop(module: Any, arguments: tuple[Any, ...]) -> None:  # noqa: ARG001
        found.append(arguments[0])
        raise _Reached

    hook = inner.register_forward_pre_hook(stop)
    try:
        for row in inputs:
            try:
                outer(row[None], **({**more, "attention_mask": None} if more else {}))
            except _Reached:
                continue
    finally:
        hook.remove()
    return torch.cat(found)
