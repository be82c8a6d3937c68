"""``softmax.cu`` and ``rows.cu``: groups of units, cross-entropy, free energies and errors against float64."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import reference
from tests.cuda.checks import (
    EPS,
    FAR,
    NEAR,
    ON_GPU,
    ONE_SCHEDULE,
    SMALL_TILES,
    SURE,
    Arrays,
    host_uniforms,
    sees_fault,
)
from tests.helpers import assert_close

# B, groups, units: one, label units, Potts units, a warp and its neighbours, many
GROUPS = [(1, 1, 1), (7, 1, 10), (5, 13, 3), (3, 5, 21), (4, 2, 32), (3, 3, 33), (2, 2, 131), (1, 1, 1000)]
CLASSES = [(1, 1), (7, 2), (37, 10), (5, 32), (3, 33), (4, 131)]


def softmax64(x, bias, units):
    z = (x.astype(np.float64) + bias).reshape(len(x), -1, units)
    e = np.exp(z - z.max(axis=2, keepdims=True))
    return e / e.sum(axis=2, keepdims=True)


def logits(B, m, spread=2.0):
    rng = np.random.default_rng([B, m])
    return (spread * rng.standard_normal((B, m), np.float32), rng.standard_normal(m, np.float32) - np.float32(0.3))


def check_categorical(launcher, B, groups, units, *, address=FAR, column=0, columns=None, offset=0, spread=2.0):
    """Probabilities to rounding; one unit a group is on, and where u is not near an edge it is the right one."""
    x, bias = logits(B, groups * units, spread)
    exact = softmax64(x, bias, units)
    error = 4 * EPS * (2 + spread * 4 + np.abs(bias).max())  # of an exponent, which is the relative one of its exp
    arrays, where = Arrays(launcher, offset), {**address, "column": column, "columns": columns}
    on_device = arrays.put(x), arrays.put(bias)
    sample, mean = arrays.empty(B, groups * units), arrays.empty(B, groups * units)
    launcher.categorical(sample, mean, *on_device, units, **where)
    here = np.empty((2, B, groups * units), np.float32)
    reference.categorical(*here, x, bias, units, **where)
    u = host_uniforms(B, groups, address, column, columns)[:, :, None].astype(np.float64)
    up_to = exact.cumsum(axis=2)
    expected = (up_to > u) & ((up_to - exact) <= u)
    sure = (np.abs(u - up_to[:, :, :-1]) > SURE).all(axis=2)
    assert sure.mean() > 0.9
    for got, p in (here, (arrays.get(sample), arrays.get(mean))):
        assert_close(p.reshape(exact.shape), exact, rtol=error, atol=1e-30)
        got = got.reshape(exact.shape)
        assert np.isin(got, (0, 1)).all()
        assert (got.sum(axis=2) == 1).all()
        assert np.array_equal(got[sure], expected[sure])
    for one in (0, 1):  # one output alone, and in the place of x
        place = arrays.put(x)
        launcher.categorical(*((place, None) if one == 0 else (None, place)), place, on_device[1], units, **where)
        assert np.array_equal(arrays.get(place), arrays.get((sample, mean)[one]))
    assert np.array_equal(arrays.get(on_device[0]), x)
    arrays.passed("categorical")


def check_cross_entropy(launcher, B, K, *, offset=0, spread=2.0):
    x, bias = logits(B, K, spread)
    labels = np.random.default_rng(B).integers(0, K, B).astype(np.int32)
    p, each = softmax64(x, bias, K)[:, 0], np.arange(B)
    exact_delta = (np.arange(K) == labels[:, None]) - p
    z = x.astype(np.float64) + bias
    exact_loss = np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)) + z.max(axis=1) - z[each, labels]
    exact_wrong = z.argmax(axis=1) != labels
    arrays = Arrays(launcher, offset)
    on_device = arrays.put(x), arrays.put(bias), arrays.integers(labels)
    delta, loss, wrong = arrays.empty(B, K), arrays.empty(B), arrays.empty(B)
    launcher.cross_entropy(delta, loss, wrong, *on_device)
    twin = np.empty((B, K), np.float32), np.empty(B, np.float32), np.empty(B, np.float32)
    reference.cross_entropy(*twin, x, bias, labels)
    error = 4 * EPS * (4 + np.abs(z).max())
    for d, lost, bad in (twin, tuple(map(arrays.get, (delta, loss, wrong)))):
        assert_close(d, exact_delta, atol=error)
        assert_close(lost, exact_loss, atol=error)
        assert np.array_equal(bad, exact_wrong)
    alone, in_place = (arrays.empty(B), arrays.empty(B)), arrays.put(x)
    launcher.cross_entropy(None, alone[0], alone[1], *on_device)
    launcher.cross_entropy(in_place, None, None, in_place, *on_device[1:])
    for one, other in ((alone[0], loss), (alone[1], wrong), (in_place, delta)):
        assert np.array_equal(arrays.get(one), arrays.get(other))
    assert np.array_equal(arrays.get(on_device[0]), x)
    arrays.passed("cross_entropy")


def check_free_energy(launcher, B, n, m, *, offset=0):
    rng, arrays = np.random.default_rng([B, n, m]), Arrays(launcher, offset)
    x, c, v, b = (a.astype(np.float32) for a in (60 * rng.normal(size=(B, m)), rng.normal(size=m), rng.random((B, n)),
                                                 rng.normal(size=n)))
    hidden = np.logaddexp(0, x.astype(np.float64) + c).sum(axis=1)
    visible = (v.astype(np.float64) * b).sum(axis=1)
    out, part = arrays.empty(B), arrays.empty(B)
    on_device = [arrays.put(a) for a in (x, c, v, b)]
    assert launcher.free_energy(out, *on_device) is out
    launcher.free_energy(part, *on_device[:2])
    bound = 2 * EPS * (np.logaddexp(0, np.abs(x)).sum(axis=1) + np.abs(v * b).sum(axis=1))
    for whole, hidden_alone in ((arrays.get(out), arrays.get(part)),
                                (reference.free_energy(np.empty(B, np.float32), x, c, v, b),
                                 reference.free_energy(np.empty(B, np.float32), x, c))):
        assert_close(whole / bound, (-visible - hidden) / bound, atol=1.0)
        assert_close(hidden_alone / bound, -hidden / bound, atol=1.0)
    arrays.passed("free_energy")


def check_squared_errors(launcher, B, n, *, offset=0):
    rng, arrays = np.random.default_rng([B, n]), Arrays(launcher, offset)
    v, w = rng.random((2, B, n), np.float32)
    out = arrays.empty(B)
    assert launcher.squared_errors(out, arrays.put(v), arrays.put(w)) is out
    exact = ((v.astype(np.float64) - w) ** 2).sum(axis=1)
    for found in (arrays.get(out), reference.squared_errors(np.empty(B, np.float32), v, w)):
        assert_close(found, exact, rtol=4 * EPS, atol=1e-15)
    arrays.passed("squared_errors")


# -------------------------------------------------------------------------------------------------- groups of units


@SMALL_TILES
def test_categorical(launcher):
    for sizes in GROUPS:
        check_categorical(launcher, *sizes)


@ONE_SCHEDULE
@SMALL_TILES
@pytest.mark.parametrize(("column", "columns"), [(3, 157), (6, None), (16, 1001)])
def test_categorical_of_a_shard(launcher, column, columns):
    """A column of the draws is a group, wherever the layer was cut."""
    for sizes in [(5, 13, 3), (2, 7, 40)]:
        check_categorical(launcher, *sizes, address=NEAR, column=column, columns=columns, offset=1)


@ONE_SCHEDULE
@SMALL_TILES
def test_units_that_are_impossible_are_never_on(launcher):
    """-infinity is a probability of 0, at either end and between; and logits may be as large as floats are."""
    x = np.array([[-np.inf, 1e38, -1e38], [-np.inf, -np.inf, -5], [2, -np.inf, -np.inf], [90, 0, -90]] * 50, np.float32)
    arrays = Arrays(launcher)
    sample, mean = arrays.empty(200, 3), arrays.empty(200, 3)
    launcher.categorical(sample, mean, arrays.put(x), arrays.put(np.zeros(3)), 3, **NEAR)
    expected = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]] * 50)
    assert np.array_equal(arrays.get(sample), expected)
    assert_close(arrays.get(mean), expected, atol=1e-38)
    twin = np.empty((2, 200, 3), np.float32)
    reference.categorical(*twin, x, np.zeros(3, np.float32), 3, **NEAR)
    assert np.array_equal(twin[0], expected)


@ONE_SCHEDULE
@SMALL_TILES
def test_numbers_that_are_not_numbers_stay_in_their_group(launcher):
    arrays, x = Arrays(launcher), np.zeros((1, 9), np.float32)
    x[0, 4], x[0, 8] = np.nan, np.inf
    sample, mean = arrays.empty(1, 9), arrays.empty(1, 9)
    launcher.categorical(sample, mean, arrays.put(x), arrays.put(np.zeros(9)), 3, **NEAR)
    assert arrays.get(sample)[0].sum() == 1
    mean = arrays.get(mean)[0]
    assert_close(mean[:3], [1 / 3] * 3, atol=1e-7)
    assert np.isnan(mean[3:6]).all()
    assert np.isnan(mean[8])


# ---------------------------------------------------------------------------------------------- one number for a row


@SMALL_TILES
def test_cross_entropy(launcher):
    for sizes in CLASSES:
        check_cross_entropy(launcher, *sizes)


@ONE_SCHEDULE
@SMALL_TILES
def test_cross_entropy_of_large_logits(launcher):
    check_cross_entropy(launcher, 37, 10, spread=1000.0)
    check_cross_entropy(launcher, 5, 8, offset=1)


@ONE_SCHEDULE
@SMALL_TILES
def test_of_equal_classes_the_first_is_the_answer_and_a_label_that_is_none_is_seen(launcher):
    arrays = Arrays(launcher)
    delta, loss, wrong = arrays.empty(4, 70), arrays.empty(4), arrays.empty(4)
    x = np.zeros((4, 70), np.float32)
    x[:, [3, 40]] = 5
    launcher.cross_entropy(delta, loss, wrong, arrays.put(x), arrays.put(np.zeros(70)),
                           arrays.integers([3, 40, 70, -1]))
    assert arrays.get(wrong).tolist() == [0, 1, 1, 1]
    assert np.isnan(arrays.get(loss)).tolist() == [False, False, True, True]
    assert_close(arrays.get(delta).sum(axis=1), [0, 0, -1, -1], atol=1e-6)


@SMALL_TILES
def test_free_energy(launcher):
    for sizes in [(1, 1, 1), (5, 37, 131), (17, 64, 32), (3, 200, 7)]:
        check_free_energy(launcher, *sizes)
    check_free_energy(launcher, 5, 8, 8, offset=1)


@SMALL_TILES
def test_squared_errors(launcher):
    for sizes in [(1, 1), (5, 37), (17, 200)]:
        check_squared_errors(launcher, *sizes)
    check_squared_errors(launcher, 5, 8, offset=1)


@ON_GPU
@SMALL_TILES
def test_rows_of_real_sizes(launcher):
    check_categorical(launcher, 1000, 50, 21)
    check_cross_entropy(launcher, 10_007, 10)
    check_free_energy(launcher, 1009, 784, 2000)
    check_squared_errors(launcher, 10_007, 784)


# -------------------------------------------------------------------------------------------------- planted faults


def categorical_check(launcher):
    check_categorical(launcher, 5, 3, 40, column=3, columns=157)


def cross_entropy_check(launcher):
    check_cross_entropy(launcher, 37, 40, spread=20.0)


FAULTS = {  # text, what it becomes, the check that must see it
    "categorical: bias of the first group": ("bias + (long long)g * K", "bias", categorical_check),
    "categorical: draw of the first group": ("address.draw_one(r, g) *", "address.draw_one(r, 0) *", categorical_check),
    "categorical: draw of a shard": ("(j + shift()) / 4", "j / 4", categorical_check),
    "categorical: threshold": ("address.draw_one(r, g) * group.total", "address.draw_one(r, g)", categorical_check),
    "categorical: edge": ("threshold < up_to", "threshold > up_to", categorical_check),
    "categorical: sum before": ("if (lane >= by) value += before", "value += before", categorical_check),
    "categorical: 32 units at a time": ("before = __shfl_sync(EVERY_LANE, up_to, 31)", "before = 0", categorical_check),
    "categorical: two units on": ("!found && lane", "lane", categorical_check),
    "largest not taken off": ("x[k] + bias[k] - largest", "x[k] + bias[k]",
                              lambda launcher: check_cross_entropy(launcher, 37, 10, spread=1000.0)),
    "cross_entropy: sign": ("(k == label ? 1.0f : 0.0f) - e", "(k == label ? 1.0f : 0.0f) + e", cross_entropy_check),
    "cross_entropy: loss": ("logf((float)group.total) - own", "own - logf((float)group.total)", cross_entropy_check),
    "cross_entropy: answers": ("a < b ? a : b", "a < b ? b : a", cross_entropy_check),
    "warp: not all lanes": ("int by = 16; by > 0", "int by = 8; by > 0", cross_entropy_check),
    "free_energy: overflow": ("fmaxf(t, 0.0f) + log1pf(expf(-fabsf(t)))", "log1pf(expf(t))",
                              lambda launcher: check_free_energy(launcher, 5, 37, 131)),
    "free_energy: visible biases": ("b[i] * v[r * n + i]", "b[i] * v[i]",
                                    lambda launcher: check_free_energy(launcher, 5, 37, 131)),
    "squared_errors: tail": ("j < size; j += 32", "j < size - 1; j += 32",
                             lambda launcher: check_squared_errors(launcher, 5, 37)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
