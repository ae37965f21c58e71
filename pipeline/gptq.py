"""GPTQ: round a weight's columns one after the other, and let later columns make up for each error.

The algorithm is that of Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), written as LDLQ (Chee et al., "QuIP", 2023, who show that the two are the same): with the Hessian
``H = L D Lᵀ``, L unit upper triangular, column k is rounded after adding the errors of the columns before it, weighted
by column k of L. One Cholesky factor does, where GPTQ takes two and an inverse. A block's scales are fitted, when its
turn comes, to the columns as they are then, and an error of column k counts as much as ``D[k]``, which is what it costs
once all later columns have made up for it.

Shapes in this module:
    N: output channels, K: input channels, B: block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import blockwise
from pipeline.blockwise import BlockQuantized

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Share of the mean diagonal added to the Hessian, as in the paper: channels that hardly ever fire carry no information.
_DAMPING = 0.01

# Output channels worked on at once: they do not depend on one another, and a head has very many.
_ROWS = 16384

# Columns after which all later ones take up the errors: products of this width are fast, and few.
_SPAN = 512


@dataclass(frozen=True)
class Factor:
    """``H = L D Lᵀ`` of a damped Hessian: ``lower`` is Lᵀ (``[K, K]``, unit lower triangular), ``diagonal`` D."""

    lower: torch.Tensor
    diagonal: torch.Tensor


def factor(hessian: torch.Tensor) -> Factor:
    """Factorize ``sum(x xᵀ)`` over the inputs of a weight (``[K, K]`` float32), which is not changed."""
    import torch

    damped = hessian.flip(0, 1)  # a copy; in this order a lower Cholesky factor is an upper one of the Hessian
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # a channel that was always zero
    diagonal += _DAMPING * diagonal.mean()
    upper = torch.linalg.cholesky(damped).flip(0, 1)
    scale = upper.diagonal().clone()
    return Factor((upper / scale).t().contiguous(), scale.square())


def quantize(weight: npt.NDArray[Any], given: Factor, bits: int, block_size: int, symmetric: bool) -> BlockQuantized:
    """Quantize ``weight`` (``[N, K]``, float32 or float16) so that ``weight @ x`` changes least for the inputs seen.

    Args:
        weight: K is a multiple of the block size.
        given: of the Hessian of its inputs.
        bits, block_size, symmetric: of the blocks along K.

    Raises:
        ValueError: K is no multiple of the block size, or a value is NaN or infinite.
    """
    import torch

    rows, columns = weight.shape
    if columns % block_size:
        raise ValueError(f"{columns} input channels are no multiple of the block size {block_size}")
    codes = np.empty((rows, columns // block_size, block_size), np.uint8)
    scale = np.empty(codes.shape[:2], np.float32)
    zero = np.empty(codes.shape[:2], np.uint8)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        values = torch.from_numpy(np.array(weight[part], np.float32)).t().contiguous()
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the weight has NaN or infinite values")
        q, s, z = _quantize_columns(values, given, bits, block_size, symmetric, weight.dtype == np.float16)
        codes[part] = q.t().reshape(-1, *codes.shape[1:]).numpy()
        scale[part], zero[part] = s.t().numpy(), z.t().numpy()
    return blockwise.assemble(codes, scale, None if symmetric else zero, bits, weight)


def _quantize_columns(
    values: torch.Tensor, given: Factor, bits: int, block_size: int, symmetric: bool, half: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[K, N]`` uint8, scales ``[K / B, N]`` float32, zero points ``[K / B, N]`` uint8 of ``[K, N]`` values."""
    import torch

    top = float((1 << bits) - 1)
    columns, rows = values.shape
    lower = given.lower
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scale = torch.empty(columns // block_size, rows)
    zero = torch.empty(columns // block_size, rows, dtype=torch.uint8)
    target = values.clone()  # what is rounded: the values, and the errors that they make up for
    error = torch.empty(min(_SPAN, columns), rows)
    code = torch.empty(rows)
    for span in range(0, columns, _SPAN):
        end = min(span + _SPAN, columns)
        for start in range(span, end, block_size):
            stop = start + block_size
            here = target[start:stop]
            if start > span:
                here.addmm_(lower[start:stop, span:start], error[: start - span])
            s, z = blockwise.fit(here, bits, symmetric, half, given.diagonal[start:stop, None])
            inverse = torch.where(s != 0, 1.0 / s, torch.zeros_like(s))
            for index in range(block_size):
                column = start + index
                torch.addcmul(z, here[index], inverse, out=code)
                code.round_().clamp_(0.0, top)
                codes[column] = code
                code.sub_(z).mul_(s)
                torch.sub(values[column], code, out=error[column - span])
                here[index + 1 :].addr_(lower[column + 1 : stop, column], error[column - span])
            scale[start // block_size], zero[start // block_size] = s, z
        target[end:].addmm_(lower[end:, span:end], error[: end - span])
    return codes, scale, zero
