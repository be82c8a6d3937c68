"""Rounding of operands against float64 arithmetic, and products of rounded operands."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import precision, reference
from tests.helpers import assert_close, assert_notices, nearest


def numbers():
    """Of all sizes, ties, neighbours of ties, special ones."""
    rng = np.random.default_rng(0)
    ties = np.concatenate([rng.integers(0, 1 << 15, 300, dtype=np.uint32) << 16 | 0x8000,
                           rng.integers(0, 1 << 18, 300, dtype=np.uint32) << 13 | 0x1000])
    bits = np.concatenate([rng.integers(0, 1 << 32, 4000, dtype=np.uint32), ties - 1, ties, ties + 1,
                           np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])])  # NaNs that rounding would make 0 or inf
    x = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, 1, -1, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan])])
    return x[(np.abs(x) > 2.0**-100) | (x == 0) | np.isnan(x)]


def check_rounding():
    x = numbers()
    for rounded, bits, even in ((precision.bf16, 8, True), (precision.tf32, 11, False)):
        found, expected = rounded(x), nearest(x, bits, ties_to_even=even)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected, equal_nan=True)
        assert np.array_equal(np.signbit(found)[x == x], np.signbit(x)[x == x])
        wide = np.stack([x, x])
        assert np.array_equal(rounded(wide.T), rounded(wide).T, equal_nan=True)  # strides are followed


def check_parts():
    x = numbers()
    x = x[np.abs(x) < 3e38].astype(np.float64)
    high, low = precision.bf16_parts(x.astype(np.float32))
    assert np.array_equal(high, precision.bf16(high))
    assert np.array_equal(low, precision.bf16(low))
    error = np.abs(x - high - low)
    assert (error <= 2.0**-17 * np.abs(x)).all()
    assert (error > 2.0**-18 * np.abs(x)).any()  # the bound is no idle one


def check_product(name="bf16x2"):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(5, 211)).astype(np.float32), rng.normal(size=(211, 7)).astype(np.float32)
    out = np.empty((5, 7), np.float32)
    reference.product(out, a, np.asfortranarray(b), name)
    if name == "bf16x2":
        a_high, b_high = (nearest(x, 8, ties_to_even=True).astype(np.float64) for x in (a, b))
        a_low, b_low = (nearest(x - high, 8, ties_to_even=True).astype(np.float64)
                        for x, high in ((a, a_high), (b, b_high)))
        expected = a_high @ b_high + a_high @ b_low + a_low @ b_high
    else:
        bits = {"fp32": 24, "bf16": 8, "tf32": 11}[name]
        a_high, b_high = (nearest(x, bits, ties_to_even=name != "tf32").astype(np.float64) for x in (a, b))
        expected = a_high @ b_high
    assert_close(out, expected, atol=2e-6 * np.sqrt(211))
    return out


@pytest.mark.parametrize("check", [check_rounding, check_parts, *(lambda name=name: check_product(name)
                                                                   for name in ("fp32", *precision.TENSOR_CORES))])
def test_operands_are_rounded(check):
    check()


def test_a_half_step_rounds_as_it_is_told():
    rng = np.random.default_rng(5)
    x, W, bias = rng.random((5, 211), np.float32), rng.normal(size=(7, 211)).astype(np.float32), np.zeros(7, np.float32)
    for name in ("fp32", *precision.TENSOR_CORES):
        expected, mean = np.empty((2, 5, 7), np.float32)
        reference.product(expected, x, W.T, name)
        reference.half_step(None, mean, x, W, bias, transpose=True, precision=name)
        assert np.array_equal(mean, reference.sigmoid(expected)), name


def check_gradient():
    """Of centred units: v, h with its sign and weight, and what the biases are weights to, rounded one by one."""
    rng, (n, m, rows, K) = np.random.default_rng(6), (7, 5, 53, 101)
    v, h = rng.random((K, n), np.float32), rng.random((K, m), np.float32)
    ones = rng.normal(1, 0.5, 2 * K).astype(np.float32)
    signs = np.where(np.arange(K) < rows, np.float32(1), np.float32(-0.7))
    signed = h * signs[:, None]
    for name in precision.TENSOR_CORES:
        dW, db, dc, moved = (np.empty(shape, np.float32) for shape in ((n, m), n, m, n + m))
        reference.cd_sums(dW, db, dc, v, h, rows, model_weight=0.7, ones=ones, moved=moved, precision=name)
        expected = np.empty((n + 2, m + 2), np.float32)
        data = np.arange(K) < rows
        reference.product(expected, np.column_stack([v, ones[K:], data]).astype(np.float32).T,
                          np.column_stack([signed, ones[:K] * signs, data]).astype(np.float32), name)
        for got, part in ((dW, expected[:n, :m]), (db, expected[:n, m]), (dc, expected[n, :m]),
                          (moved[:n], expected[:n, m + 1]), (moved[n:], expected[n + 1, :m])):
            assert_close(got, part, atol=1e-5)
        assert np.abs(dW - v.T @ signed).max() > (1e-5 if name == "bf16x2" else 1e-3), "nothing was rounded"


def test_a_gradient_rounds_as_it_is_told():
    check_gradient()


def spread_and_error(sd, rounding):
    """Of the change of parameters by one update of ``cd_run``: how much chance moves it, and how much the rounding of
    its last means, which changes no draw; root mean squares."""
    n, m, rows = 67, 41, 100
    rng = np.random.default_rng(1)
    start = np.concatenate([rng.normal(0, sd, n * m), rng.normal(0, 1, n + m)]).astype(np.float32)
    v = (rng.random((rows, n)) < 0.3).astype(np.float32)

    def change(seed, rounded):
        velocity = np.zeros_like(start)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "as_half", rounded)
            reference.cd_run(start.copy(), velocity, v, n, m, batch=rows, levels=1, seed=seed, update=0, rate=1.0,
                             momentum=0.5, decay=0.0)
        return velocity

    many = np.array([change(seed, rounding) for seed in range(20)])
    return np.sqrt(many.var(axis=0).mean()), np.sqrt(np.square(many[0] - change(0, np.copy)).mean())


@pytest.mark.parametrize("sd", [0.01, 1.0, 3.0])
def test_float16_for_means_is_little_beside_chance_and_less_than_bf16(sd):
    """What the persistent path rounds and others do not: up to 3e-4 of what differs between seeds, bf16 2e-3."""
    chance, error = spread_and_error(sd, reference.as_half)
    assert 5e-5 * chance < error < 4e-4 * chance
    assert spread_and_error(sd, precision.bf16)[1] > 5 * error


@pytest.mark.parametrize(("module", "line", "fault", "check"), [
    (precision, "bits >> 16 & 1", "1", check_rounding),
    (precision, "rounded[x != x] = 0x7FFF", "pass", check_rounding),
    (precision, "+ 0x1000)", "+ 0x0FFF)", check_rounding),
    (precision, "np.where(np.isnan(x), x, rounded", "np.where(False, x, rounded", check_rounding),
    (precision, "bf16(x - high)", "bf16(x) - high", check_parts),
    (reference, "a_high @ b_low", "a_low @ b_low", check_product),
    (reference, "a_low @ b_high", "0 * a_low @ b_high", check_product),
    (reference, "product(dW, v.T, signed, precision)", "product(dW, v.T, signed)", check_gradient),
    (reference, "product(dc[None], of_c[None], signed, precision)", "product(dc[None], of_c[None], signed)",
     check_gradient),
    (reference, "product(moved[:n, None], v[:rows].T, data[:, None], precision)",
     "product(moved[:n, None], v.T, np.ones((K, 1), np.float32), precision)", check_gradient),
])
def test_other_rounding_is_noticed(module, line, fault, check):
    assert_notices(check, module, line, fault)
