"""What many tests need: comparison, planted faults, all states, small asymmetric models."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import ClassVar

import numpy as np
import pytest


def assert_close(actual, expected, *, atol=0.0, rtol=0.0):
    """|actual - expected| <= atol + rtol |expected| everywhere; NaN and inf always fail."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape}, {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    assert np.isfinite(expected).all(), "the expected value is not finite"
    excess = np.abs(actual - expected) - (atol + rtol * np.abs(expected))
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.ndim else ()
    assert (excess <= 0).all(), f"worst at {worst}: {actual[worst]} against {expected[worst]}"


def nearest(x, bits, *, ties_to_even):
    """Float32 rounded to so many significant bits, by float64 arithmetic; below 2^-100 it need not be right."""
    with np.errstate(over="ignore", invalid="ignore"):  # NaNs of all kinds
        fraction, exponent = np.frexp(x.astype(np.float64))
        scaled = np.abs(fraction) * 2**bits
        whole = np.rint(scaled) if ties_to_even else np.floor(scaled + 0.5)
        return np.ldexp(np.copysign(whole, fraction), exponent - bits).astype(np.float32)


def assert_notices(check, module, line, fault):
    """``check`` passes as things are, and fails while ``line`` of the module's source reads ``fault``."""
    check()
    with planted(module, line, fault), pytest.raises(Exception):  # noqa: B017, PT011 - whichever, the fault is its cause
        check()


@contextmanager
def planted(module, line, fault):
    """While it lasts, all functions of ``module`` run as if its source had ``fault`` where it has ``line``.

    The line stands inside a function. Code is exchanged inside the functions, so that whoever imported them gets the
    fault.
    """
    source = Path(module.__file__).read_text("utf-8")
    found = source.count(line)
    assert found == 1, f"a fault must have one place; {module.__name__} has {found} times: {line}. Choose another line"
    faulty = dict(vars(module))
    exec(compile(source.replace(line, fault), module.__file__, "exec", dont_inherit=True), faulty)  # noqa: S102
    pairs = list(_functions(vars(module), faulty, module.__name__))
    before = [function.__code__ for function, _ in pairs]
    for function, other in pairs:
        function.__code__ = other.__code__
    try:
        yield
    finally:
        for (function, _), code in zip(pairs, before, strict=True):
            function.__code__ = code


def _functions(names, others, module):
    """Every function defined in a module, methods and properties too, with the one of the same name in ``others``."""
    for name, thing in names.items():
        other = others.get(name)
        if isinstance(thing, property):
            thing, other = thing.fget, other.fget
        if hasattr(thing, "__wrapped__") and hasattr(other, "__wrapped__"):  # by a decorator, whose code is no other
            thing, other = thing.__wrapped__, other.__wrapped__
        if isinstance(thing, FunctionType) and thing.__module__ == module and hasattr(other, "__code__"):
            yield thing, other
        elif isinstance(thing, type) and thing.__module__ == module and thing is not other:
            yield from _functions(dict(vars(thing)), vars(other), module)


class Watched(np.ndarray):
    """An array that passes its kind on to whatever is computed from it, and remembers vectors of float64 among that.

    ``x.view(Watched)``; then look at ``Watched.doubles``.
    """

    doubles: ClassVar[list] = []

    def __array_finalize__(self, obj):
        if self.dtype == np.float64 and self.size > 1:
            Watched.doubles.append(self.shape)


def all_states(n):
    """Every binary vector of length n: array (2**n, n), float32."""
    return np.array(list(itertools.product((0, 1), repeat=n)), np.float32)


def number_of(states):
    """The place of each binary row in ``all_states``: array (B,), int64."""
    return states.astype(np.int64) @ (1 << np.arange(states.shape[1])[::-1])


def log_sum_exp(x):
    """log sum exp(x) over everything, float64."""
    x = np.asarray(x, np.float64)
    return x.max() + np.log(np.exp(x - x.max()).sum())


def joint(W, b, c):
    """log p(v, h) of an RBM for every pair of states, by enumeration: array (2**n, 2**m), float64."""
    W, b, c = (np.asarray(x, np.float64) for x in (W, b, c))
    v, h = all_states(len(b)).astype(np.float64), all_states(len(c)).astype(np.float64)
    minus_energy = (v @ b)[:, None] + (h @ c)[None, :] + v @ W @ h.T
    return minus_energy - log_sum_exp(minus_energy)


def log_likelihood(W, b, c, rows):
    """The mean of log p(v) over binary rows, in nats, exact, float64."""
    return float(np.logaddexp.reduce(joint(W, b, c), axis=1)[number_of(np.asarray(rows))].mean())
