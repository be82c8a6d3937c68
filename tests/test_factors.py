"""Changes of an RBM as activations: the product is the change, for every shard, and takes few bytes."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import factors, reference
from gpudbn.factors import PER_UPDATE, WORDS, Factors, read
from tests.helpers import assert_close, assert_notices

N, M = 13, 5
SIZE = N * M + N + M


def turn(rng, *, counts, chains=None, levels=None, samples=True, n=N, m=M):
    """Updates of a turn: v, h, rows, rate, model weight, decay, each with other numbers."""
    for number, rows in enumerate(counts):
        model = rows if chains is None else chains
        v, h = (rng.integers(0, 2, (rows + model, k)).astype(np.float32) for k in (n, m))
        if levels:
            v[:rows] = rng.integers(0, levels + 1, (rows, n)) * np.float32(1 / levels)
        if not samples:
            v[:rows], h[rows:] = rng.random((rows, n)), rng.random((model, m))
        yield v, h, rows, 0.1 / (number + 1), 1.0 if chains is None else rows / chains, 0.3 * number


def check(counts, first=0, size=SIZE, **kinds):
    """Steps of the reference, against the product of what was packed, on a shard."""
    rng = np.random.default_rng(len(counts) + first)
    start = rng.standard_normal(SIZE).astype(np.float32)
    p, collected = start.copy(), Factors(N, M)
    velocity, work = np.zeros_like(p), np.empty_like(p)
    for v, h, rows, rate, weight, decay in turn(rng, counts=counts, **kinds):
        collected.add(v, h, rows, model_weight=weight, rate=rate, decay=decay, levels=kinds.get("levels"))
        reference.cd_update(p, velocity, work, N, M, v, h, rows, model_weight=weight, rate=rate, momentum=0.0,
                            decay=decay)
        v[...] = h[...] = 0.5  # its memory is used for the next update
    found, part = np.full(size, np.nan, np.float32), slice(first, first + size)
    message = collected.pack(first, size)
    read(message).change(start[part], found)
    assert_close(found, (p - start)[part], atol=2e-6)
    assert np.abs(found).max() > 1e-3
    return message


CASES = [
    {"counts": (7, 7, 3)},
    {"counts": (4,), "levels": 255},
    {"counts": (6, 2), "levels": 16},
    {"counts": (5, 1), "samples": False},
    {"counts": (5, 3), "chains": 5, "levels": 255},
]


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_the_change(case):
    check(**case)


@pytest.mark.parametrize(("first", "size"), [(0, 16), (16, 48), (48, 32), (16, 67), (64, 1), (65, 13), (72, 11),
                                             (78, 5), (80, 3), (60, 7), (2, 2)])
def test_a_shard_gets_what_makes_its_entries(first, size):
    check(first=first, size=size, **CASES[0])
    check(first=first, size=size, **CASES[3])


@pytest.mark.parametrize(("line", "fault"), [
    ("later = np.append(np.cumprod(kept[::-1])[::-1][1:], 1)", "later = np.ones(len(kept))"),
    ("float(np.prod(kept))", "float(kept[0])"),
    ("h * (s * self.later)[:, None]", "h * s[:, None]"),
    ("xp.matmul(s, h[:, a:b])", "xp.matmul(s * self.later, h[:, a:b])"),
    ("(rate, -rate * model_weight)", "(rate, -rate)"),
    ("return values, used + -used % 8", "return values, used"),
    ("tuple(x.copy() for x in", "tuple(x for x in"),
    ("rate / rows, model_weight,", "rate, model_weight,"),
])
def test_another_product_is_noticed(line, fault):
    def every():
        check(**CASES[0])
        check(**CASES[4])

    assert_notices(every, factors, line, fault)


@pytest.mark.parametrize(("line", "fault"), [
    ("ones = flat == 1", "ones = flat > 0"),
    ("bool((steps * np.float32(1 / levels) == flat).all()", "bool(True"),
    ("dW.ravel()[a - top * m : b - top * m]", "dW.ravel()[: b - a]"),
    ("v[:, a - low : b - low]", "v[:, a:b]"),
])
def test_another_packing_is_noticed(line, fault):
    def every():
        check(**CASES[3], levels=255)
        check(first=16, size=67, **CASES[0])
        check(first=72, size=11, **CASES[0])

    assert_notices(every, factors, line, fault)


def test_a_message_takes_the_bytes_that_were_promised():
    """784 x 500 with 64 rows: bytes for the data, bits for samples, float32 for the last probabilities."""
    n, m, rows, rng = 784, 500, 64, np.random.default_rng(0)
    collected = Factors(n, m)
    for v, h, count, rate, weight, decay in turn(rng, counts=(rows,), levels=255, n=n, m=m):
        h[rows:] = rng.random((rows, m))
        collected.add(v, h, count, model_weight=weight, rate=rate, decay=decay, levels=255)
    size = n * m + n + m
    message = collected.pack(0, size)
    assert message.nbytes == 8 * (WORDS + PER_UPDATE) + rows * n + rows * n // 8 + rows * m // 8 + 4 * rows * m
    assert message.nbytes < 0.12 * 4 * size
    columns = -(-size // 2 // m)  # of v, for the upper rows of W; the lower half of W goes with b, which takes all
    upper, lower = (collected.pack(first, size // 2).nbytes for first in (0, size // 2))
    assert upper == message.nbytes - (n - columns) * (rows + rows // 8) + -(columns * rows // 8) % 8
    assert lower == message.nbytes


def test_a_new_turn_begins_with_nothing():
    collected = Factors(N, M)
    assert not collected
    collected.add(np.ones((4, N), np.float32), np.ones((4, M), np.float32), 2, model_weight=1, rate=1, decay=0)
    assert len(collected) == 1
    collected.clear()
    assert not collected
