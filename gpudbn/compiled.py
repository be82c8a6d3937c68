"""Draws, samples and step rules as machine code where numba is installed: the same bits as without it, sooner.

    pip install 'gpudbn[fast]'

Draws take a seventh of the time, and a step is one pass over memory, not three to fourteen. Every operation is rounded
as NumPy rounds it and stands in the same order, and none is contracted into another: so with and without numba a run
has the same bits. numba compiles at the first use, in seconds, and keeps that for later processes where it can.

What is specified in ``draws`` and ``reference``: there are the formulas, sources and meanings of what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

MANY = 1 << 13  # entries that are worth machine code


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


def halve(out, x, bias):
    """out <- (x + bias) / 2, whose tanh ``reference.sigmoid`` takes. Arrays (rows, m), (rows, m), (m,), float32."""
    for i in range(x.shape[0]):
        o, row = out[i], x[i]
        for j in range(bias.size):
            o[j] = (row[j] + bias[j]) * np.float32(0.5)


def lift(t):
    """t <- (t + 1) / 2, the sigmoid from its tanh. Array (size,), float32."""
    for i in range(t.size):
        t[i] = t[i] * np.float32(0.5) + np.float32(0.5)


def toss(t, u):
    """t <- 1 if u < (t + 1) / 2 else 0: samples from the tanh. Arrays (size,), float32."""
    for i in range(t.size):
        t[i] = np.float32(u[i] < t[i] * np.float32(0.5) + np.float32(0.5))


def momentum(p, u, g, scale, keep, decay):
    """u <- keep u + scale g - decay p;  p <- p + u. Arrays (size,), float32; numbers float32."""
    for i in range(p.size):
        t = u[i] * keep + g[i] * scale
        u[i] = t - p[i] * decay if decay else t  # 0 times infinity is NaN
        p[i] += u[i]


def sgd(p, g, rate, shrink):
    """p <- shrink p + rate g. Arrays (size,), float32; numbers float32."""
    for i in range(p.size):
        p[i] = p[i] * shrink + g[i] * rate


def adagrad(p, q, g, scale, eps, rate, shrink):
    """q <- q + (scale g)^2;  p <- shrink p + rate scale g / (sqrt(q) + eps).

    Arrays (size,), float32; numbers float32.
    """
    for i in range(p.size):
        x = g[i] * scale
        q[i] += x * x
        p[i] = p[i] * shrink + x / (np.sqrt(q[i]) + eps) * rate


def adam(p, m, s, g, scale, a1, a2, eps, rate, shrink):
    """m <- m + a1 (scale g - m);  s <- s + a2 ((scale g)^2 - s);  p <- shrink p + rate m / (sqrt(s) + eps).

    Arrays (size,), float32; numbers float32.
    """
    for i in range(p.size):
        x = g[i] * scale
        m[i] += (x - m[i]) * a1
        s[i] += (x * x - s[i]) * a2
        p[i] = p[i] * shrink + m[i] / (np.sqrt(s[i]) + eps) * rate


def _signature(arrays: int, numbers: int, kind: str = "float32") -> str:
    return f"void({', '.join(['float32[::1]'] * arrays + [kind] * numbers)})"


SIGNATURES = {fill: _signature(1, 5, "uint64"), halve: "void(float32[:, ::1], float32[:, ::1], float32[::1])",
              lift: _signature(1, 0), toss: _signature(2, 0), momentum: _signature(3, 3),
              sgd: _signature(2, 2), adagrad: _signature(3, 4), adam: _signature(4, 6)}


@cache
def quick(function: Callable[..., None]) -> Any:
    """A function of this file as machine code; None without numba, or where it is told not to compile."""
    try:
        from numba import config, njit
    except ImportError:  # or it does not take this NumPy
        return None
    if config.DISABLE_JIT:
        return None
    how = {"nogil": True, "error_model": "numpy"}  # what is divided by 0 is infinite, or NaN
    with suppress(RuntimeError):  # there is nowhere to keep it
        return njit(SIGNATURES[function], cache=True, **how)(function)
    return njit(SIGNATURES[function], **how)(function)
