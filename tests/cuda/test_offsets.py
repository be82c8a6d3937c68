"""``offsets.cu``: centring and sparsity."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import reference
from tests.cuda.checks import EPS, ONE_SCHEDULE, SMALL_TILES, Arrays, barriers, sees_fault
from tests.helpers import assert_close

SIZES = [(1, 1, 1, 1), (3, 2, 5, 0), (131, 37, 7, 3), (300, 517, 3, 2), (64, 32, 0, 4)]  # n, m, rows, C


def check_centre(launcher, n, m, rows, C):
    rng, K, arrays = np.random.default_rng([n, m]), rows + C, Arrays(launcher)
    v, h, offsets = (rng.random(shape).astype(np.float32) for shape in ((K, n), (K, m), n + 2 * m))
    on_device = arrays.put(v), arrays.put(h), arrays.empty(2 * K), arrays.put(offsets)
    launcher.centre(*on_device, rows)
    got_v, got_h, ones = (arrays.get(array) for array in on_device[:3])
    assert np.array_equal(arrays.get(on_device[3]), offsets)
    mu, data, model = np.split(offsets, (n, n + m))
    assert np.array_equal(got_v, v - mu)
    assert np.array_equal(got_h, np.concatenate([h[:rows] - data, h[rows:] - model]))
    for size, got, x, weight in ((m, ones[:K], got_h, model), (n, ones[K:], got_v, mu)):
        x, weight = x.astype(np.float64), weight.astype(np.float64)
        assert_close(got, 1 - x @ weight, atol=EPS * (2 + size**0.5) * (1 + np.abs(x) @ weight).max(initial=1))
    arrays.passed("centre")


def check_offsets_step(launcher, n, m, **rule):
    rng, arrays = np.random.default_rng([n, m]), Arrays(launcher)
    means, offsets, moved = (rng.normal(0.5, 0.3, size).astype(np.float32) for size in (n + m, n + 2 * m, n + m))
    given = [arrays.put(x) for x in (means, offsets, moved)]
    numbers = {"scale": 1 / 7, "keep": 0.9, "target": 0.1, "cost": 0.3, "centring": True, **rule}
    launcher.offsets_step(*given, n, m, **numbers)
    got_means, got = arrays.get(given[0]), arrays.get(given[1])
    assert np.array_equal(arrays.get(given[2]), moved)
    reference.offsets_step(means, offsets, moved, n, m, **numbers)
    assert_close(got_means, means, atol=4 * EPS)
    # from its own means: where one lies between two multiples of 1/256, rounding may take either
    rounded = np.rint(256 * got_means) / np.float32(256) * numbers["centring"]
    assert np.array_equal(got[:n], rounded[:n])
    assert np.array_equal(got[n + m :], rounded[n:])
    assert_close(got[n : n + m], rounded[n:] + numbers["cost"] * (got_means[n:] - numbers["target"]), atol=4 * EPS)
    arrays.passed("offsets_step")


@SMALL_TILES
def test_centre(launcher):
    for sizes in SIZES:
        check_centre(launcher, *sizes)


@SMALL_TILES
def test_offsets_step(launcher):
    for n, m in [(1, 1), (131, 37), (7, 2001)]:
        check_offsets_step(launcher, n, m)
        check_offsets_step(launcher, n, m, centring=False, keep=1)
        check_offsets_step(launcher, n, m, cost=0.0)


@ONE_SCHEDULE
@SMALL_TILES
def test_what_cannot_be_centred_is_refused(launcher):
    arrays = Arrays(launcher)
    v, h, ones, offsets = (arrays.put(np.zeros(shape)) for shape in ((5, 3), (5, 2), 10, 7))
    with pytest.raises(ValueError, match=r"centre: rows must lie between 0 and the 5 rows of v; got 6"):
        launcher.centre(v, h, ones, offsets, 6)
    with pytest.raises(ValueError, match=r"centre: ones must be C-contiguous float32 of shape \(10,\); got .* \(7,\)"):
        launcher.centre(v, h, offsets, offsets, 5)
    with pytest.raises(ValueError, match=r"cd_sums: moved must be given with ones; got ones None"):
        launcher.cd_sums(arrays.empty(3, 2), arrays.empty(3), arrays.empty(2), v, h, 5, moved=arrays.empty(5))


def centre_check(launcher):
    check_centre(launcher, 131, 37, 7, 3)
    check_centre(launcher, 300, 517, 3, 2)


def step_check(launcher):
    check_offsets_step(launcher, 131, 37)


FAULTS = {  # name: text, what it becomes, the check that must see it
    "phase": ("k < rows ? data : model", "k <= rows ? data : model", centre_check),
    "what is summed": ("sum += centred * weight[i]", "sum += x[i] * offset[i]", centre_check),
    "a thread left out": ("half > 0; half /= 2", "half > 1; half /= 2", centre_check),
    "half of the sums": ("int half = THREADS / 2", "int half = THREADS / 4", centre_check),
    "ones exchanged": ("ones[K + k] = of_c", "ones[K + k] = of_b", centre_check),
    "step: no rounding": ("rintf(256.0f * mean) / 256.0f", "mean", step_check),
    "step: offset of the other phase": ("moved[i] + offsets[i]", "moved[i] + offsets[i < n ? i : i + m]", step_check),
    "step: lambda forgotten": ("if (i >= n) offsets[m + i] = offset;", "", step_check),
}
FAULTS |= {f"no barrier, {line.partition('// ')[2]}": (line, "", centre_check) for line in barriers("offsets.cu")}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
