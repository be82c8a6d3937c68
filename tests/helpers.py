"""What many tests need: comparison, all states, small asymmetric models."""

from __future__ import annotations

import itertools

import numpy as np


def assert_close(actual, expected, *, atol=0.0, rtol=0.0):
    """|actual - expected| <= atol + rtol |expected| everywhere; NaN and inf always fail."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape}, {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    assert np.isfinite(expected).all(), "the expected value is not finite"
    excess = np.abs(actual - expected) - (atol + rtol * np.abs(expected))
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.ndim else ()
    assert (excess <= 0).all(), f"worst at {worst}: {actual[worst]} against {expected[worst]}"


def all_states(n):
    """Every binary vector of length n: array (2**n, n), float32."""
    return np.array(list(itertools.product((0, 1), repeat=n)), np.float32)
