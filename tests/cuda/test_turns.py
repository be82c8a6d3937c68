"""``gather.cu`` and ``turns.cu``: rows in the order of an epoch, counters, the first number that is not finite."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import reference
from gpudbn.arrays import to_cpu, to_gpu
from tests.cuda.checks import ONE_SCHEDULE, SMALL_TILES, Arrays, sees_fault

ONES = np.uint64(2**64 - 1)
DTYPES = ["float32", "float16", "uint8", "bool"]


def rows_of(dtype, N, n):
    """Random rows of this dtype."""
    numbers = np.random.default_rng(N + n)
    if dtype == "uint8":
        return numbers.integers(0, 256, (N, n), np.uint8)
    return (numbers.random((N, n)) ** 9).astype(dtype) if dtype != "bool" else numbers.random((N, n)) < 0.3


def there(arrays, values):
    """A copy where the launcher's arrays are, of any dtype."""
    return values.copy() if arrays.on_cpu else to_gpu(values)


def check_gather(launcher, dtype, N=53, n=37, B=11, first=17, scale=1 / 255, ordered=True, offset=None, odd=0):
    data, arrays = rows_of(dtype, N, n), Arrays(launcher, odd)
    order = np.random.default_rng(5).permutation(N) if ordered else None
    out = arrays.empty(B, n)
    got = launcher.gather(out, there(arrays, data), None if order is None else there(arrays, order), first=first,
                          scale=scale, offset=None if offset is None else arrays.number(offset))
    assert got is out
    position = first + (offset or 0) + np.arange(B)
    expected = (data[position] if order is None else data[order[position]]).astype(np.float32) * np.float32(scale)
    assert np.array_equal(arrays.get(out), expected)
    twin = np.full((B, n), 7, np.float32)
    reference.gather(twin, data, order, first=first, scale=scale,
                     offset=None if offset is None else np.array([offset], np.uint32))
    assert np.array_equal(twin, expected)
    arrays.passed({"float32": "gather_floats", "float16": "gather_halves"}.get(dtype, "gather_bytes"))


@SMALL_TILES
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_is_indexing(launcher, dtype):
    check_gather(launcher, dtype)
    check_gather(launcher, dtype, n=40, offset=13)
    check_gather(launcher, dtype, n=40, odd=1, ordered=False, scale=1.0)
    check_gather(launcher, dtype, B=1, n=3, first=0, ordered=False, offset=52)


@ONE_SCHEDULE
@SMALL_TILES
def test_every_half_in_the_unit_interval_is_read_exactly(launcher):
    arrays = Arrays(launcher)
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16)[:, None]
    out = arrays.empty(len(halves), 1)
    launcher.gather(out, there(arrays, halves), None)
    assert halves[-1] == 1
    assert np.array_equal(arrays.get(out), halves.astype(np.float32))


@ONE_SCHEDULE
@SMALL_TILES
def test_rows_that_are_not_there_are_nan_and_nothing_else_is_read(launcher):
    data, order = rows_of("float32", 7, 5), np.array([6, 7, -1, 2**40, 0])
    expected = np.full((7, 5), np.nan, np.float32)
    expected[[0, 4]] = data[[6, 0]]
    arrays = Arrays(launcher)
    out = arrays.empty(7, 5)
    launcher.gather(out, there(arrays, data), there(arrays, order), offset=arrays.number(0))
    assert np.array_equal(arrays.get(out), expected, equal_nan=True)
    twin = np.empty((7, 5), np.float32)
    reference.gather(twin, data, order, offset=np.zeros(1, np.uint32))
    assert np.array_equal(twin, expected, equal_nan=True)
    out = arrays.empty(3, 5)
    launcher.gather(out, there(arrays, data), None, first=1, offset=arrays.number(4))
    assert np.array_equal(arrays.get(out)[:2], data[5:])
    assert np.isnan(arrays.get(out)[2]).all()


def check_advance(launcher):
    arrays = Arrays(launcher)
    counters = there(arrays, np.array([2**32 - 3, 20], np.uint32))
    launcher.advance(counters, updates=50, rows=5000)
    assert to_cpu(counters).tolist() == [47, 5020], "as the addresses of draws, modulo 2^32"
    twin = np.array([2**32 - 3, 20], np.uint32)
    reference.advance(twin, updates=50, rows=5000)
    assert twin.tolist() == [47, 5020]
    arrays.passed("advance")


@SMALL_TILES
def test_advance(launcher):
    check_advance(launcher)


def check_flag(launcher, size=1009, at=(1008,), value=np.nan, flag=ONES, phase=3, update=41, clock=None):
    """The flag after a look at numbers with ``value`` in some places, from the kernel; the twin's is the same."""
    arrays, x = Arrays(launcher), np.random.default_rng(size).normal(size=size).astype(np.float32)
    x[:2] = 1e-41, 3e38  # a subnormal, and what overflows in a square
    x[list(at)] = value
    kept = there(arrays, np.array([flag], np.uint64))
    launcher.note_not_finite(kept, arrays.put(x), phase=phase, update=update,
                             clock=None if clock is None else arrays.number(clock))
    twin = np.array([flag], np.uint64)
    reference.note_not_finite(twin, x, phase=phase, update=update,
                              clock=None if clock is None else np.array([clock], np.uint32))
    assert to_cpu(kept) == twin
    arrays.passed("note_not_finite")
    return int(twin[0])


@SMALL_TILES
def test_the_first_time_that_a_number_is_not_finite_is_kept(launcher):
    when = 3 << 32 | 41
    assert check_flag(launcher, at=()) == ONES
    for value in (np.nan, np.inf, -np.inf):
        assert check_flag(launcher, value=value) == when
    assert check_flag(launcher, at=(2, 500, 1008)) == when
    assert check_flag(launcher, clock=1000) == when + 1000
    assert check_flag(launcher, flag=when - 1) == when - 1, "it was so before"
    assert check_flag(launcher, flag=when + 1) == when
    assert check_flag(launcher, flag=1 << 32, at=()) == 1 << 32, "and is not forgotten"


@ONE_SCHEDULE
@SMALL_TILES
def test_what_is_refused(launcher):
    arrays = Arrays(launcher)
    data, out, order = arrays.empty(7, 5), arrays.empty(3, 5), there(arrays, np.arange(7))
    for error, message, call in [
            (TypeError, "gather: data must be float32, float16, uint8 or bool; got float64",
             lambda: launcher.gather(out, there(arrays, np.zeros((7, 5))), order)),
            (TypeError, r"gather: order must be C-contiguous int64 of shape \(count,\); got int32 \(7,\)",
             lambda: launcher.gather(out, data, there(arrays, np.arange(7, dtype=np.int32)))),
            (ValueError, "gather: rows 5 to 8 must lie in the order; it has 7",
             lambda: launcher.gather(out, data, order, first=5)),
            (ValueError, "gather: out must not share memory with data", lambda: launcher.gather(data[:3], data, None)),
            (ValueError, r"advance: updates and rows must lie in \[0, 2147482624\]; got -1 and 0",
             lambda: launcher.advance(there(arrays, np.zeros(2, np.uint32)), updates=-1, rows=0)),
            (TypeError, "note_not_finite: flag must be C-contiguous uint64", lambda: launcher.note_not_finite(
                arrays.number(0), arrays.empty(3), phase=0, update=0))]:
        with pytest.raises(error, match=message):
            call()


FAULTS = {
    "an offset that does not count": ("(offset ? *offset : 0u)", "0u", lambda launch: check_gather(
        launch, "float32", offset=13)),
    "rows in the order of the file": ("order ? order[position] : position", "position", lambda launch: check_gather(
        launch, "uint8")),
    "data without their scale": ("value_of(data[row * n + j]) * scale", "value_of(data[row * n + j])",
                                 lambda launch: check_gather(launch, "uint8")),
    "subnormal halves as normal ones": ("bits < 0x400u ?", "bits == 0u ?", lambda launch: check_gather(
        launch, "float16")),
    "only NaN": ("!= 0x7f800000u;", "!= 0x7fc00000u;", lambda launch: check_flag(launch, value=np.inf)),
    "only the first entries": ("i < size;", "i < size - 1;", check_flag),
    "the last time": ("atomicMin(", "atomicMax(", lambda launch: check_flag(launch, flag=(3 << 32) + 7)),
    "no clock": ("(update + (clock ? *clock : 0u))", "update", lambda launch: check_flag(launch, clock=5)),
    "no phase": ("(u64)phase << 32 | ", "", check_flag),
    "a counter that stands": ("counters[1] += rows;", "", check_advance),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    text, becomes, check = FAULTS[fault]
    assert sees_fault(text, becomes, check)
