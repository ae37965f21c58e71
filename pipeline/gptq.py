"""GPTQ: round a weight's columns one after the other, and let later columns make up for each error.

The algorithm is that of Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), with the scales of `pipeline.blockwise`, fitted to the columns as they are when their block's turn
comes. Shapes: N output channels, K input channels, B block size.
"""

from __future__ import annotations

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
_ROWS = 8192


def quantize(
    weight: npt.NDArray[Any], hessian: torch.Tensor, bits: int, block_size: int, symmetric: bool
) -> BlockQuantized:
    """Quantize ``weight`` (``[N, K]``, float32 or float16) so that ``weight @ x`` changes least for the inputs seen.

    Args:
        weight: K is a multiple of the block size.
        hessian: ``sum(x xᵀ)`` over the inputs, ``[K, K]`` float32.
        bits, block_size, symmetric: of the blocks along K.

    Raises:
        ValueError: K is no multiple of the block size, or a value is NaN or infinite.
    """
    import torch

    rows, columns = weight.shape
    if columns % block_size:
        raise ValueError(f"{columns} input channels are no multiple of the block size {block_size}")
    correction = _correction(hessian)
    codes = np.empty((rows, columns // block_size, block_size), np.uint8)
    scale = np.empty(codes.shape[:2], np.float32)
    zero = np.empty(codes.shape[:2], np.uint8)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        values = torch.from_numpy(np.array(weight[part], np.float32))
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the weight has NaN or infinite values")
        _quantize_rows(
            values, correction, bits, symmetric, weight.dtype == np.float16, codes[part], scale[part], zero[part]
        )
    return blockwise.assemble(codes, scale, None if symmetric else zero, bits, weight)


def _quantize_rows(
    rest: torch.Tensor,
    correction: torch.Tensor,
    bits: int,
    symmetric: bool,
    half: bool,
    codes: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.uint8],
) -> None:
    """Fill codes ``[N, G, B]``, scales and zero points ``[N, G]`` for ``rest`` (``[N, K]``), which is used up."""
    import torch

    top = float((1 << bits) - 1)
    block_size = codes.shape[2]
    for block in range(codes.shape[1]):
        start, stop = block * block_size, (block + 1) * block_size
        s, z = blockwise.fit(rest[:, start:stop].contiguous(), bits, symmetric, half)
        inverse = torch.where(s != 0, 1.0 / s, torch.zeros_like(s))
        here = correction[start:stop, start:stop]
        channels = rest[:, start:stop].t().contiguous()  # [B, N]: one channel after the other, each contiguous
        rounded, errors = torch.empty_like(channels), torch.empty_like(channels)
        for index in range(block_size):
            channel = channels[index]
            torch.addcmul(z, channel, inverse, out=rounded[index])
            rounded[index].round_().clamp_(0.0, top)
            error = (channel - (rounded[index] - z) * s) / here[index, index]
            errors[index] = error
            channels[index + 1 :].addr_(here[index, index + 1 :], error, alpha=-1.0)
        rest[:, stop:].addmm_(errors.t(), correction[start:stop, stop:], alpha=-1.0)
        codes[:, block] = rounded.t().to(torch.uint8).numpy()
        scale[:, block], zero[:, block] = s.numpy(), z.to(torch.uint8).numpy()


def _correction(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, ``[K, K]``."""
    import torch

    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # a channel that was always zero
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
