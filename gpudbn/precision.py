"""What the operands of a matrix product are rounded to before they are multiplied; sums are float32.

    fp32      as they are
    bf16      to 8 significant bits: at most 2^-8 of an operand is lost
    bf16x2    to the sum of two bf16, high and low: 2^-17, and 2^-16 of a product, that of the low parts
    tf32      to 11 significant bits: 2^-11
    exact     to integers, and sums are of integers: see ``gpudbn.exact``
    blocks    as they are, but products are made 16 columns at a time, and sums over hidden units added up in blocks of
              16 in their order: on CPUs, for ``--order fixed``. A BLAS gives a column other last bits when it has
              other neighbours, so only thus does a layer in parts come to the bits of the whole one

Tensor cores multiply such numbers exactly; 0 and 1 lose nothing. Weights themselves stay float32.
GPU twin: ``kernels/mma.cuh``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TENSOR_CORES = ("bf16", "bf16x2", "tf32")  # what only these multiply, on a GPU
PRECISIONS = ("fp32", *TENSOR_CORES, "exact")  # of --precision
BLOCKS = "blocks"  # of --order fixed
BLOCK = 16  # columns; parts of a layer are cut at multiples of it


def chosen(asked: str, *, tensor_cores: bool, blocks: bool = False) -> str:
    """The precision for ``--precision``: auto is bf16x2 where tensor cores multiply, and fp32, or blocks, elsewhere."""
    if asked == "auto":
        asked = "bf16x2" if tensor_cores else "fp32"
    return BLOCKS if asked == "fp32" and blocks else asked


def check_precision(function: str, precision: str, known: Sequence[str] = PRECISIONS) -> None:
    """Refuse a precision that a function does not have."""
    if precision not in known:
        raise ValueError(f"{function}: precision must be one of {', '.join(known)}; got {precision!r}")


def round_to_bf16(x):
    """The upper halves of float32, rounded to nearest, ties to even: bf16, kept as uint16. NaN stays NaN.

    Of any array module.
    """
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[x != x] = 0x7FFF
    return rounded


def from_bf16(bits):
    """The values of bf16, float32: they are all exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to 8 significant bits, to nearest, ties to even. Array of float32."""
    return from_bf16(round_to_bf16(x))


def tf32(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to 11 significant bits, to nearest, ties away from zero. Array of float32."""
    rounded = (x.view(np.uint32) + 0x1000) & 0xFFFFE000
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def bf16_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low: x is their sum but for 2^-17 of it. An infinity is inf and NaN. Arrays of float32."""
    high = bf16(x)
    with np.errstate(invalid="ignore"):
        return high, bf16(x - high)
