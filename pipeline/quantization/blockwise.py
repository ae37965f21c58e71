"""Block-wise weight quantization: error-minimizing scales, and the layout of ONNX Runtime's kernels.

Shapes in this module:
    N: output channels, K: input channels, B: block size, G: blocks a row, ``ceil(K / B)``.

A weight ``w`` of block ``g`` is stored as ``q`` in ``[0, 2**bits)`` and read back as
``scale[g] * (q - zero_point[g])``; symmetric blocks have the constant zero point ``2**(bits-1)``.
The packed layout is that of the ``com.microsoft`` operators ``MatMulNBits`` and
``GatherBlockQuantized`` (ONNX Runtime, docs/ContribOperators.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Elements worked on at once: a few such float32 tensors stay in a core's cache, and peak memory
# does not grow with the weight.
_CHUNK = 1 << 20

# Fractions of the min-max range that are tried. A range somewhat larger than the weights' own wins often, since zero
# points are whole codes. More of them, or other zero points, moved the squared error of Qwen2.5 weights by under 1 %.
_SHRINK = (1.06, 1.0, 0.95, 0.9, 0.84)


@dataclass(frozen=True)
class BlockQuantized:
    """One quantized weight.

    Attributes:
        packed: ``[N, G, B * bits / 8]`` uint8; of two 4-bit values the first is the low half.
        scale: ``[N, G]`` of the weight's dtype, float32 or float16.
        zero_point: ``[N, ceil(G * bits / 8)]`` uint8, packed like the weight, or ``None`` when symmetric.
        relative_error: ``||w - dequantized||² / ||w||²``.
    """

    packed: npt.NDArray[np.uint8]
    scale: npt.NDArray[Any]
    zero_point: npt.NDArray[np.uint8] | None
    relative_error: float


def sizes(
    rows: int, columns: int, bits: int, block_size: int, symmetric: bool, scale_bytes: int = 4
) -> tuple[int, ...]:
    """Bytes of the codes, the scales and, unless symmetric, the zero points of a weight ``[rows, columns]``."""
    groups = -(-columns // block_size)
    zero = () if symmetric else (rows * -(-groups * bits // 8),)
    return (rows * groups * block_size * bits // 8, rows * groups * scale_bytes, *zero)


def quantize(
    weight: npt.NDArray[Any],
    bits: int,
    block_size: int,
    symmetric: bool,
    importance: npt.NDArray[np.float32] | None = None,
) -> BlockQuantized:
    """Quantize ``weight`` (``[N, K]``, float32 or float16) block by block along K.

    For every block a few clipped ranges are tried; for each the scale is refitted by least squares,
    ``s = <w, q - z> / <q - z, q - z>``, and the candidate with the smallest squared error is kept
    (the idea of llama.cpp's k-quants, vectorized over blocks). 8-bit blocks take the min-max range.
    Scales are rounded to the weight's dtype before anything is rounded to them.

    Args:
        importance: ``[K]``, how much an error of each column counts, such as the mean square of what it is multiplied
            with; all alike when left out.

    Raises:
        ValueError: ``bits`` is not 4 or 8, ``block_size`` is not a power of two of at least 16, or
            ``weight`` has NaN or infinite values.
    """
    import torch

    if bits not in (4, 8) or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"bits {bits} and block size {block_size}: MatMulNBits takes 4 or 8 and a power of 2 >= 16")
    rows, columns = weight.shape
    groups = -(-columns // block_size)
    padding = groups * block_size - columns
    codes = np.empty((rows, groups, block_size), np.uint8)
    scale = np.empty((rows, groups), np.float32)
    zero = np.empty((rows, groups), np.uint8)
    error = total = 0.0
    step = max(1, _CHUNK // (groups * block_size))
    counts = None
    if importance is not None:
        padded = torch.from_numpy(np.pad(importance, (0, padding)).reshape(groups, block_size).T.copy())
    for start in range(0, rows, step):
        part = np.array(weight[start : start + step], np.float32, order="C")  # a copy: torch takes no read-only map
        if padding:
            part = np.pad(part, ((0, 0), (0, padding)))
        blocks = torch.from_numpy(part).view(-1, block_size).t().contiguous()
        if importance is not None:
            counts = padded.repeat(1, len(part))
        energy = float(blocks.double().square_().sum())
        if not np.isfinite(energy):
            raise ValueError("the weight has NaN or infinite values")
        s, z = fit(blocks, bits, symmetric, weight.dtype == np.float16, counts)
        q = encode(blocks, s, z, bits)
        stop = start + len(part)
        codes[start:stop] = q.to(torch.uint8).t().reshape(-1, groups, block_size).numpy()
        scale[start:stop] = s.view(-1, groups).numpy()
        zero[start:stop] = z.to(torch.uint8).view(-1, groups).numpy()
        error += float(q.sub_(z).mul_(s).sub_(blocks).double().square_().sum())
        total += energy
    return BlockQuantized(
        packed=pack(codes, bits),
        scale=scale.astype(weight.dtype),
        zero_point=None if symmetric else pack(zero, bits),
        relative_error=error / total if total else 0.0,
    )


def fit(
    blocks: torch.Tensor, bits: int, symmetric: bool, half: bool = False, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (``[M]`` float32 each) that round blocks with the least squared error.

    Args:
        blocks: ``[B, M]``, a block a column, so that sums over a block are sums of rows.
        half: whether scales are float16 values.
        importance: of an error, ``[B, 1]`` or ``[B, M]``; all alike when left out.
    """
    import torch

    top = float((1 << bits) - 1)
    weighted = blocks if importance is None else blocks * importance

    def refit(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scale of the codes that a scale yields, and by how much that lowers the squared error."""
        shifted = encode(blocks, scale, zero, bits).sub_(zero)
        projection = (shifted * weighted).sum(0)
        shifted.square_()
        norm = shifted.sum(0) if importance is None else shifted.mul_(importance).sum(0)
        fitted = torch.where(norm > 0, projection / norm, torch.zeros_like(norm))
        fitted = fitted.half().float() if half else fitted
        return fitted, fitted * (2.0 * projection - fitted * norm)

    low, high = blocks.amin(0), blocks.amax(0)
    shrinks = _SHRINK if bits == 4 else (1.0,)
    if symmetric:
        middle = torch.full_like(low, float(1 << (bits - 1)))
        # The code range is lopsided, [-8, 7]: give the longer side to the value of larger magnitude.
        reach = torch.where(high > -low, high, low) / -float(1 << (bits - 1))
        candidates = [(reach * shrink, middle) for shrink in shrinks]
        candidates += [(-reach * shrink, middle) for shrink in shrinks] if bits == 4 else []
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        span = (high - low) / top
        candidates = []
        for shrink in shrinks:
            scale = span * shrink
            zero = torch.where(scale > 0, -low * shrink / scale, torch.zeros_like(scale)).round_().clamp_(0.0, top)
            candidates.append((scale, zero))
    best = torch.full_like(low, -torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    for scale, zero in candidates:
        fitted, gain = refit(scale, zero)
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    # Rounding to the refitted scale and refitting can only lower the error.
    for _ in range(2 if bits == 4 else 1):
        fitted, gain = refit(best_scale, best_zero)
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, fitted, best_scale)
    return best_scale, best_zero


def encode(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (float32, like ``blocks``: ``[B, M]``) for the scales and zero points ``[M]``."""
    import torch

    inverse = torch.where(scale != 0, 1.0 / scale, torch.zeros_like(scale))
    return torch.addcmul(zero, blocks, inverse).round_().clamp_(0.0, float((1 << bits) - 1))


def dequantize(quantized: BlockQuantized, bits: int, columns: int) -> npt.NDArray[np.float32]:
    """The float32 weight ``[N, columns]`` that the kernels compute with."""
    codes = unpack(quantized.packed, bits).astype(np.float32)
    rows, groups, _ = codes.shape
    if quantized.zero_point is None:
        zero = np.full((rows, groups), float(1 << (bits - 1)), np.float32)
    else:
        zero = unpack(quantized.zero_point, bits)[:, :groups].astype(np.float32)
    blocks = (codes - zero[..., None]) * quantized.scale[..., None].astype(np.float32)
    return blocks.reshape(rows, -1)[:, :columns]


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack 4-bit codes pairwise along the last axis, the first in the low half; 8-bit codes stay."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    high = np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return np.bitwise_or(codes[..., 0::2], high, dtype=np.uint8)


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
