"""GPTQ: round a weight's columns one after the other, and let later columns make up for each error.

The algorithm is that of Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), written as LDLQ (Chee et al., "QuIP", 2023, who show that the two are the same): with the Hessian
``H = L D Lᵀ``, L unit upper triangular, column k is rounded after adding the errors of the columns before it, weighted
by column k of L. One Cholesky factor does, where GPTQ takes two and an inverse. A block's scales are fitted, when its
turn comes, to the columns as they are then, and an error of column k counts as much as ``D[k]``, which is what it costs
once all later columns have made up for it.

Of a Hessian only diagonal blocks are kept: channels far apart do not make up for one another's errors. Time and memory
then grow with the number of weights, not with the cube and the square of their width, and nothing measurable is lost:
thousands of tokens say little of how two of thousands of channels go together.

Shapes in this module:
    N: output channels, K: input channels, B: block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.quantization import blockwise
from pipeline.quantization.blockwise import BlockQuantized

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Input channels of a diagonal block: a multiple of every block size.
_WIDTH = 1280

# Share of the mean diagonal added to the Hessian. Channels that hardly ever fire carry no information, and few
# tokens say little of the rest: ten times what the paper adds fits texts better that were not calibrated on.
_DAMPING = 0.1

# Output channels worked on at once: they do not depend on one another, and a head has very many.
_ROWS = 16384


@dataclass(frozen=True)
class Factor:
    """``H = L D Lᵀ`` of a damped diagonal block: ``lower`` is Lᵀ (unit lower triangular), ``diagonal`` D."""

    lower: torch.Tensor
    diagonal: torch.Tensor


def spans(columns: int) -> list[slice]:
    """The input channels of each diagonal block."""
    return [slice(start, min(start + _WIDTH, columns)) for start in range(0, columns, _WIDTH)]


def hessian(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The diagonal blocks of ``sum(x xᵀ)`` over inputs ``[S, K]``, float32."""
    import torch

    with torch.inference_mode():
        return tuple(inputs[:, span].t() @ inputs[:, span] for span in spans(inputs.shape[1]))


def loss(given: Sequence[torch.Tensor], difference: npt.NDArray[np.float32]) -> float:
    """``sum |d x|²`` over the inputs behind a Hessian, for a difference ``d`` of weights (``[N, K]``)."""
    import torch

    parts = zip(given, spans(difference.shape[1]), strict=True)
    rows = ((block, torch.from_numpy(np.ascontiguousarray(difference[:, span]))) for block, span in parts)
    return sum(float(torch.mm(part, block).mul_(part).sum(dtype=torch.float64)) for block, part in rows)


def factor(given: Sequence[torch.Tensor], damping: float = _DAMPING) -> tuple[Factor, ...]:
    """Factorize the blocks of a Hessian, which are not changed.

    Args:
        damping: share of the mean diagonal added to it; the more, the fewer inputs it is of.
    """
    return tuple(_factor(block, damping) for block in given)


def _factor(block: torch.Tensor, damping: float) -> Factor:
    import torch

    damped = block.flip(0, 1)  # a copy; in this order a lower Cholesky factor is an upper one of the Hessian
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # a channel that was always zero
    diagonal += damping * diagonal.mean()
    upper = torch.linalg.cholesky(damped).flip(0, 1)
    scale = upper.diagonal().clone()
    return Factor((upper / scale).t().contiguous(), scale.square())


def quantize(
    weight: npt.NDArray[Any], given: Sequence[Factor], bits: int, block_size: int, symmetric: bool
) -> BlockQuantized:
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
    scale = np.empty(codes.shape[:2], weight.dtype)
    zero = np.empty(codes.shape[:2], np.uint8)
    error = total = 0.0
    half = weight.dtype == np.float16
    with torch.inference_mode():
        for start in range(0, rows, _ROWS):
            part = slice(start, start + _ROWS)
            # A column after the other; graphs store weights so, and then this is a plain copy.
            values = torch.from_numpy(np.array(weight[part].T, np.float32, order="C"))
            energy = float(values.square().sum(dtype=torch.float64))
            if not np.isfinite(energy):
                raise ValueError("the weight has NaN or infinite values")
            total += energy
            for span, one in zip(spans(columns), given, strict=True):
                q, s, z, lost = _quantize_columns(values[span], one, bits, block_size, symmetric, half)
                blocks = slice(span.start // block_size, span.stop // block_size)
                codes[part, blocks] = q.t().reshape(-1, len(s), block_size).numpy()
                scale[part, blocks], zero[part, blocks] = s.t().numpy(), z.t().numpy()
                error += lost
    return BlockQuantized(
        packed=blockwise.pack(codes, bits),
        scale=scale,
        zero_point=None if symmetric else blockwise.pack(zero, bits),
        relative_error=error / total if total else 0.0,
    )


def _quantize_columns(
    values: torch.Tensor, given: Factor, bits: int, block_size: int, symmetric: bool, half: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Codes ``[K, N]`` uint8, scales ``[K / B, N]`` float32, zero points ``[K / B, N]`` uint8, and the squared error.

    Args:
        values: ``[K, N]``, the channels of one diagonal block.
    """
    import torch

    top = float((1 << bits) - 1)
    columns, rows = values.shape
    lower = given.lower
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scale = torch.empty(columns // block_size, rows)
    zero = torch.empty(columns // block_size, rows, dtype=torch.uint8)
    error = torch.empty(columns, rows)
    code = torch.empty(rows)
    for start in range(0, columns, block_size):
        stop = start + block_size
        # What is rounded: the values, and the errors that they make up for.
        here = torch.addmm(values[start:stop], lower[start:stop, :start], error[:start])
        s, z = blockwise.fit(here, bits, symmetric, half, given.diagonal[start:stop, None])
        inverse = torch.where(s != 0, 1.0 / s, torch.zeros_like(s))
        for index in range(block_size):
            column = start + index
            torch.addcmul(z, here[index], inverse, out=code)
            code.round_().clamp_(0.0, top)
            codes[column] = code
            code.sub_(z).mul_(s)
            torch.sub(values[column], code, out=error[column])
            here[index + 1 :].addr_(lower[column + 1 : stop, column], error[column])
        scale[start // block_size], zero[start // block_size] = s, z
    return codes, scale, zero, float(error.square_().sum(dtype=torch.float64))
