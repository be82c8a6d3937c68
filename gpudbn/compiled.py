"""Draws as machine code where numba is installed: the same bits as by randomgen, in a seventh of the time.

    pip install 'gpudbn[fast]'

numba compiles at the first use, in about two seconds, and keeps what it compiled for later processes where it can.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

SIGNATURE = "void(float32[::1], uint64, uint64, uint64, uint64, uint64)"


def fill(out, index, update, site, k0, k1):
    """out[4 i + j] <- word j of Philox4x32-10 of counter (index + i, update, site), as in ``draws``.

    Parameters
    ----------
    out : array (4 blocks,), float32
        Overwritten.
    index, update, site : uint64
        The counter of the first block; update and site are below 2**32.
    k0, k1 : uint64
        The key, both below 2**32.
    """
    low, half, unit = np.uint64(0xFFFFFFFF), np.uint64(32), np.float32(2**-24)
    for block in range(out.size // 4):
        at, a, b = index + np.uint64(block), k0, k1
        c0, c1, c2, c3 = at & low, at >> half, update, site
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1 = (p1 >> half) ^ c1 ^ a, p1 & low
            c2, c3 = (p0 >> half) ^ c3 ^ b, p0 & low
            a, b = (a + np.uint64(0x9E3779B9)) & low, (b + np.uint64(0xBB67AE85)) & low
        for j, word in enumerate((c0, c1, c2, c3)):
            out[4 * block + j] = np.float32(word >> np.uint64(8)) * unit


@cache
def quick() -> Callable[..., Any] | None:
    """``fill`` as machine code; None without numba, or where it is told not to compile."""
    try:
        from numba import config, njit
    except ImportError:  # or it does not take this NumPy
        return None
    if config.DISABLE_JIT:
        return None
    with suppress(RuntimeError):  # there is nowhere to keep it
        return njit(SIGNATURE, cache=True, nogil=True)(fill)
    return njit(SIGNATURE, nogil=True)(fill)
