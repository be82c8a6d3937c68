"""Exact mode: the kernels have the bits of their NumPy twins, and these are right; nothing is allowed for rounding."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gpudbn import exact, reference
from tests.cuda.checks import (
    COLUMNS,
    FAR,
    NEAR,
    ON_CPU,
    ON_GPU,
    ONE_SCHEDULE,
    SMALL_TILES,
    Arrays,
    barriers,
    host_uniforms,
    sees_fault,
)
from tests.cuda.test_layers import CD_SIZES, REAL_SIZES, SIZES
from tests.helpers import assert_close, assert_notices

EXACT = {"precision": "exact"}
STEP = {"rate": 0.3, "momentum": 0.9, "decay": 0.01}

both_ways = pytest.mark.parametrize("transpose", [False, True])
both_kinds = pytest.mark.parametrize("grey", [False, True])


def units(rng, rows, size, grey):
    """Probabilities, 0 and 1 among them; or samples."""
    x = rng.random((rows, size), np.float32)
    return np.clip(1.4 * x - np.float32(0.2), 0, 1) if grey else (x < 0.3).astype(np.float32)


def layer(B, n, m, grey, sd=0.3):
    """x (B, n), W (n, m), bias (m,), a few weights as large as can be."""
    rng = np.random.default_rng([B, n, m, grey])
    W = rng.normal(0, sd, (n, m)).astype(np.float32)
    W.flat[::101] = rng.choice([-40, -31, 31, 1e-9, 2.0**-19, 3 * 2.0**-19], W.flat[::101].shape)
    return units(rng, B, n, grey), W, rng.normal(0, 1, m).astype(np.float32)


def turned(W, transpose):
    return np.ascontiguousarray(W.T) if transpose else W


def twin_half_step(x, W, bias, transpose, address):
    sample, mean = np.empty((2, len(x), len(bias)), np.float32)
    reference.half_step(sample, mean, x, turned(W, transpose), bias, transpose=transpose, **address, **EXACT)
    return sample, mean


def check_half_step(launcher, B, n, m, *, transpose=False, grey=False, column=0, columns=None, offset=0, address=FAR):
    address = address | {"column": column, "columns": columns}
    x, W, bias = layer(B, n, m, grey)
    arrays = Arrays(launcher, offset)
    on_device = arrays.put(x), arrays.put(turned(W, transpose)), arrays.put(bias)
    s, p = arrays.empty(B, m), arrays.empty(B, m)
    launcher.half_step(s, p, *on_device, transpose=transpose, **address, **EXACT)
    sample, mean = twin_half_step(x, W, bias, transpose, address)
    assert np.array_equal(arrays.get(p), mean), "probabilities"
    assert np.array_equal(arrays.get(s), sample), "samples"
    alone = arrays.empty(B, m)
    launcher.half_step(alone, None, *on_device, transpose=transpose, **address, **EXACT)
    assert np.array_equal(arrays.get(alone), sample), "samples without probabilities"
    arrays.passed("half_step_exact_transposed" if transpose else "half_step_exact")


def cd_case(n, m, rows, C, grey):
    rng = np.random.default_rng([n, m, rows, grey])
    return units(rng, rows + C, n, grey), units(rng, rows + C, m, grey)


def parts(flat, n, m):
    return flat[: n * m].reshape(n, m), flat[n * m : n * m + n], flat[n * m + n :]


def check_cd(launcher, n, m, rows, C, *, grey=False, w=0.7, offset=0):
    v, h = cd_case(n, m, rows, C, grey)
    arrays = Arrays(launcher, offset)
    on_device, out = (arrays.put(v), arrays.put(h)), (arrays.empty(n, m), arrays.empty(n), arrays.empty(m))
    launcher.cd_sums(*out, *on_device, rows, model_weight=w, **EXACT)
    sums = np.empty(n * m + n + m, np.float32)
    reference.cd_sums(*parts(sums, n, m), v, h, rows, model_weight=w, **EXACT)
    assert np.array_equal(np.concatenate([arrays.get(a).ravel() for a in out]), sums), "sums"
    arrays.passed("cd_sums_exact")
    if rows == 0:
        return
    p, u = np.random.default_rng(n).normal(size=(2, sums.size)).astype(np.float32)
    parameters, velocity = arrays.put(p), arrays.put(u)
    launcher.cd_update(parameters, velocity, None, n, m, *on_device, rows, model_weight=w, **STEP, **EXACT)
    reference.cd_update(p, u, sums, n, m, v, h, rows, model_weight=w, **STEP, **EXACT)
    assert np.array_equal(arrays.get(velocity), u), "velocity"
    assert np.array_equal(arrays.get(parameters), p), "parameters"
    arrays.passed("cd_update_exact")


# ------------------------------------------------------------------------------------- the twins against float64


def rounded(x, steps, largest):
    return np.rint(np.clip(x.astype(np.float64), -largest, largest) * steps) / steps


def check_twin(grey, transpose):
    x, W, bias = layer(23, 300, 41, grey)
    address = {**NEAR, "column": 5, "columns": 100}
    sample, mean = twin_half_step(x, W, bias, transpose, address)
    exact_mean = 1 / (1 + np.exp(-(rounded(x, 2**14, 1) @ rounded(W, 2**18, 31) + bias)))
    assert_close(mean, exact_mean, atol=1.1e-7 + 2.0**-22)  # of the sigmoid, and of a float32 argument up to 8
    assert np.array_equal(sample, host_uniforms(23, 41, NEAR, 5, 100) < mean)


@both_kinds
@both_ways
def test_the_twin_is_the_product_of_rounded_operands(grey, transpose):
    check_twin(grey, transpose)


@pytest.mark.parametrize(("line", "fault"), [
    ("np.rint(t, out=t)", "np.floor(t, out=t)"),
    ("np.clip(piece, -largest, largest,", "np.clip(piece, -30, 30,"),
    ("np.add(mean, bias, out=mean)", "np.add(mean, bias[::-1], out=mean)"),
    ("b.T if transpose else b", "b"),
    ("np.left_shift(exponent, 23, out=exponent)", "np.left_shift(exponent, 22, out=exponent)"),
])
def test_a_wrong_twin_is_noticed(line, fault):
    assert_notices(lambda: check_twin(True, True), exact, line, fault)


@pytest.mark.parametrize(("n", "sd", "most"), [(784, 0.1, 2e-5), (4096, 0.05, 4e-5)])
def test_the_argument_of_the_sigmoid_errs_less_than_a_fifth_of_that_of_tf32(n, sd, most):
    """rms over samples; it grows with the root of the units that are on."""
    rng = np.random.default_rng(1)
    x, W = (rng.random((256, n)) < 0.2).astype(np.float32), rng.normal(0, sd, (n, 256)).astype(np.float32)
    sums = x @ exact.integers("b", W, exact.WEIGHT_STEPS, exact.LARGEST_WEIGHT) / exact.WEIGHT_STEPS
    tf32 = ((W.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)

    def error(y):
        return np.sqrt(((y - x @ W.astype(np.float64)) ** 2).mean())

    assert error(sums) < most
    assert error(sums) < error(x @ tf32.astype(np.float64)) / 5


def test_twin_of_the_gradient_is_exact_for_samples_and_for_probabilities_of_one_side():
    for grey_v, grey_h in ((False, False), (True, False), (False, True)):
        rng = np.random.default_rng([grey_v, grey_h])
        v, h = units(rng, 37, 29, grey_v), units(rng, 37, 31, grey_h)
        v64, h64 = rounded(v, 2**14, 1), rounded(h, 2**14, 1)
        dW, db, dc = np.empty((29, 31), np.float32), np.empty(29, np.float32), np.empty(31, np.float32)
        reference.cd_sums(dW, db, dc, v, h, 20, **EXACT)
        assert np.array_equal(dW, v64[:20].T @ h64[:20] - v64[20:].T @ h64[20:])
        assert np.array_equal(db, v64[:20].sum(0) - v64[20:].sum(0))
        assert np.array_equal(dc, h64[:20].sum(0) - h64[20:].sum(0))


# ------------------------------------------------------------------------------------------------------ sigmoid


def arguments(count, seed=0):
    """Of every size and sign, and where the twins might part: halves of the rounding, ends of the range, subnormals."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, count // 4, dtype=np.uint32).view(np.float32)
    ties = (np.arange(-120, 120) + 0.5) / 1.44269504
    near = np.nextafter(ties.astype(np.float32), np.float32(np.inf))
    ends = [0, -0.0, 80, -80, np.nextafter(np.float32(80), 0), 1e-45, -1e-40, 3e38, -3e38, np.inf, -np.inf]
    return np.concatenate([bits[np.isfinite(bits)], rng.uniform(-90, 90, count // 4), rng.normal(0, 4, count // 2),
                           ties, near, ends]).astype(np.float32)


def check_sigmoid(launcher, count):
    x = arguments(count)
    arrays = Arrays(launcher)
    got = arrays.get(launcher.sigmoid(arrays.put(x), **EXACT))
    assert np.array_equal(got, reference.sigmoid(x.copy(), **EXACT))
    arrays.passed("sigmoid_exact")


def test_the_twin_of_the_sigmoid_is_within_its_bound():
    x = np.concatenate([arguments(4_000_000), np.linspace(-81, 81, 2_000_001, dtype=np.float32)])
    y = reference.sigmoid(x.copy(), **EXACT)
    wide = np.clip(x.astype(np.float64), -700, None)
    assert_close(y, 1 / (1 + np.exp(-wide)), atol=1e-7)
    inside = np.abs(x) <= 80
    assert_close(y[inside], 1 / (1 + np.exp(-wide[inside])), rtol=5e-6)
    assert (np.diff(y[-2_000_001:]) >= 0).all()
    assert np.isnan(reference.sigmoid(np.array([np.nan], np.float32), **EXACT)).all()


@SMALL_TILES
def test_sigmoid(launcher):
    check_sigmoid(launcher, 1_000_000)


@ON_GPU
@SMALL_TILES
def test_sigmoid_of_every_float_there_is(launcher):
    import cupy

    for start in range(0, 1 << 32, 1 << 24):
        x = np.arange(start, start + (1 << 24), dtype=np.uint64).astype(np.uint32).view(np.float32)
        x = x[np.isfinite(x)]
        got = launcher.sigmoid(cupy.asarray(x), **EXACT).get()
        assert np.array_equal(got, reference.sigmoid(x, **EXACT))


# --------------------------------------------------------------------------------------------------- half-steps


@both_kinds
@both_ways
def test_half_step(launcher, transpose, grey):
    for sizes in SIZES:
        check_half_step(launcher, *sizes, transpose=transpose, grey=grey)


@ONE_SCHEDULE
@both_ways
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_half_step_of_a_shard(launcher, column, columns, transpose):
    check_half_step(launcher, 17, 31, 37, transpose=transpose, column=column, columns=columns)


@ONE_SCHEDULE
@both_ways
def test_half_step_at_odd_addresses(launcher, transpose):
    check_half_step(launcher, 17, 32, 36, transpose=transpose, offset=1)


@ONE_SCHEDULE
@both_ways
@both_kinds
def test_any_cut_of_rows_or_columns_has_the_bits_of_the_whole(launcher, transpose, grey):
    B, n, m = 29, 67, 53
    x, W, bias = layer(B, n, m, grey)
    sample, mean = twin_half_step(x, W, bias, transpose, NEAR)
    arrays = Arrays(launcher)
    for rows in (slice(0, 11), slice(11, 29)):
        for columns in (slice(0, 7), slice(7, 32), slice(32, 53)):
            part = mean[rows, columns].shape
            s, p = arrays.empty(*part), arrays.empty(*part)
            launcher.half_step(s, p, arrays.put(x[rows]), arrays.put(turned(W[:, columns], transpose)),
                               arrays.put(bias[columns]), transpose=transpose, **NEAR | {"row": rows.start},
                               column=columns.start, columns=m, **EXACT)
            assert np.array_equal(arrays.get(p), mean[rows, columns])
            assert np.array_equal(arrays.get(s), sample[rows, columns])


@ONE_SCHEDULE
def test_half_step_of_the_bias_alone(launcher):
    arrays, bias = Arrays(launcher), arguments(300)
    p = arrays.empty(2, bias.size)
    launcher.half_step(None, p, arrays.empty(2, 0), arrays.empty(0, bias.size), arrays.put(bias), **EXACT)
    assert (arrays.get(p) == reference.sigmoid(bias, **EXACT)).all()


@ONE_SCHEDULE
@both_kinds
def test_the_largest_sums_do_not_wrap_round(launcher, grey):
    """As many terms as there may be, all of them as large as can be, with the limbs that add up to most."""
    n, m = exact.MOST_TERMS, 2
    x = np.full((1, n), 16255 / 16384 if grey else 1, np.float32)  # limbs 63, 127
    W = np.full((n, m), 31, np.float32)
    W[:, 1] = -31 + 127.5 * 2.0**-18
    arrays = Arrays(launcher)
    p = arrays.empty(1, m)
    bias = -np.float32([n * 31 * x[0, 0], -n * 31 * x[0, 0]])
    launcher.half_step(None, p, arrays.put(x), arrays.put(W), arrays.put(bias), **EXACT)
    mean = np.empty((1, m), np.float32)
    reference.half_step(None, mean, x, W, bias, **EXACT)
    assert np.array_equal(arrays.get(p), mean)
    q, whole = np.rint(x[0].astype(np.float64) * 2**14).astype(int), np.rint(W * 2.0**18).astype(int)
    sums = [sum(int(a) * int(b) for a, b in zip(q, whole[:, j], strict=True)) for j in range(m)]
    total = np.array([np.float32(s) * np.float32(2.0**-32) for s in sums]) + bias
    assert_close(mean[0], 1 / (1 + np.exp(-np.clip(total, -80, 80))), atol=1e-7)


# --------------------------------------------------------------------------------------- gradient and the step


@both_kinds
def test_gradient_and_step(launcher, grey):
    for sizes in CD_SIZES:
        check_cd(launcher, *sizes, grey=grey)
    check_cd(launcher, 32, 36, 17, 17, grey=grey, offset=1, w=1.0)


@ONE_SCHEDULE
@SMALL_TILES
def test_sums_of_parts_of_a_batch_add_to_those_of_the_whole(launcher):
    """With real-valued data, samples, and probabilities at the end, as CD has it."""
    n, m, B = 29, 31, 100
    rng = np.random.default_rng(0)
    v = np.concatenate([units(rng, B, n, True), units(rng, B, n, False)])
    h = np.concatenate([units(rng, B, m, False), units(rng, B, m, True)])
    whole, total = np.empty(n * m + n + m, np.float32), np.zeros(n * m + n + m, np.float32)
    reference.cd_sums(*parts(whole, n, m), v, h, B, **EXACT)
    for lo, hi in ((0, 37), (37, 41), (41, 100)):
        arrays, rows = Arrays(launcher), np.r_[lo:hi, B + lo : B + hi]
        out = arrays.empty(n * m + n + m)
        launcher.cd_sums(*parts(out, n, m), arrays.put(v[rows]), arrays.put(h[rows]), hi - lo, **EXACT)
        total += arrays.get(out)
    assert np.array_equal(total, whole)


def check_momentum_step(launcher):
    size, rng, arrays = 10007, np.random.default_rng(0), Arrays(launcher)
    p, u, g = rng.normal(size=(3, size)).astype(np.float32) * np.float32(10) ** rng.uniform(-44, 3, (3, size))
    p, u, g = (a.astype(np.float32) for a in (p, u, g))
    parameters, velocity, gradient = (arrays.put(a) for a in (p, u, g))
    for _ in range(3):
        launcher.momentum_step(parameters, velocity, gradient, weights=9000, scale=1 / 7, **STEP)
        reference.momentum_step(p, u, g, weights=9000, scale=1 / 7, **STEP)
        assert np.array_equal(arrays.get(velocity), u)
        assert np.array_equal(arrays.get(parameters), p)


@ONE_SCHEDULE
@SMALL_TILES
def test_momentum_step_has_the_bits_of_its_twin(launcher):
    check_momentum_step(launcher)


# ------------------------------------------------------------------------------------------------- what is refused


@ONE_SCHEDULE
@SMALL_TILES
def test_more_terms_than_are_exact_are_refused(launcher):
    arrays, n = Arrays(launcher), exact.MOST_TERMS + 1
    x, W, b, p = arrays.empty(1, n), arrays.empty(n, 1), arrays.empty(1), arrays.empty(1, 1)
    v, c = arrays.empty(n, 1), arrays.empty(1)
    places = [launcher] + [reference] * arrays.on_cpu
    for place in places:
        with pytest.raises(ValueError, match="half_step: n must be at most 65536 in exact mode; got 65537"):
            place.half_step(None, p, x, W, b, **EXACT)
        with pytest.raises(ValueError, match="rows must be at most 65536 in exact mode; got 65537"):
            place.cd_sums(p, b, c, v, v, n, **EXACT)
    with pytest.raises(ValueError, match="half_step: precision must be"):
        launcher.half_step(None, p, x, W, b, precision="exakt")


# ---------------------------------------------------------------------------------------------------- real sizes


@ON_CPU
def test_the_size_of_a_real_layer(launcher):
    check_half_step(launcher, 100, 784, 500)
    check_half_step(launcher, 100, 500, 784, transpose=True)
    check_cd(launcher, 784, 500, 100, 100)


@ON_GPU
@both_ways
@both_kinds
def test_half_step_of_real_layers(launcher, transpose, grey):
    for sizes in REAL_SIZES:
        check_half_step(launcher, *sizes, transpose=transpose, grey=grey)


@ON_GPU
@both_kinds
def test_gradients_of_real_layers(launcher, grey):
    for sizes in [(784, 500, 100, 100), (1031, 1009, 500, 300)]:
        check_cd(launcher, *sizes, grey=grey)


def bits_of(variables):
    """A digest of half-steps and sums, by another process with these environment variables."""
    code = """
import hashlib, sys
import numpy as np
from gpudbn import reference
from tests.cuda.test_exact import EXACT, layer, parts
digest = hashlib.sha256()
for B, n, m in [(37, 301, 203), (100, 784, 500)]:
    x, W, bias = layer(B, n, m, True)
    p = np.empty((B, m), np.float32)
    reference.half_step(None, p, x, W, bias, **EXACT)
    sums = np.empty(n * m + n + m, np.float32)
    reference.cd_sums(*parts(sums, n, m), x, p, B // 2, **EXACT)
    digest.update(p.tobytes() + sums.tobytes())
print(digest.hexdigest())
"""
    return subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True,
                          check=True).stdout


def test_numpy_has_the_same_bits_with_other_blas_kernels_and_threads():
    """And without the wider vector instructions of NumPy itself. (Where BLAS is not OpenBLAS, only its threads.)"""
    narrow = {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"}
    usual = bits_of({})
    assert usual == bits_of(narrow)
    assert usual == bits_of({"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX"})


# -------------------------------------------------------------------------------------------- planted faults


def half_step_check(launcher):
    check_half_step(launcher, 17, 131, 37)
    check_half_step(launcher, 17, 131, 37, transpose=True, grey=True)


def shard_check(launcher):
    check_half_step(launcher, 17, 31, 37, column=7, columns=157)


def cd_check(launcher):
    check_cd(launcher, 37, 37, 141, 17, grey=True)


def sigmoid_check(launcher):
    check_sigmoid(launcher, 20_000)


FAULTS = {  # text, what it becomes, the check that must see it, tiles
    "limbs: truncated": ("__float2int_rn(", "(int)(", half_step_check, "small"),
    "limbs: a carry left out": ("return ((unsigned)q + half) ^ half;", "return (unsigned)q;", half_step_check, "small"),
    "limbs: the lowest of a weight left out": (
        "if (j == 0 && !lowest_b) continue;", "if (j == 0) continue;", half_step_check, "small"),
    "limbs: the lowest of a unit left out": ("if (i > 0 || lowest_a)", "if (i > 0)", half_step_check, "large"),
    "limbs: a product at the wrong power": ("sums[part][i + j]", "sums[part][i + j - (i * j == 2)]", half_step_check,
                                            "small"),
    "limbs: totals of 32 bits": ("long long total = sums", "int total = sums", half_step_check, "small"),
    "limbs: no limit": ("fminf(fmaxf(x, -Kind::LARGEST), Kind::LARGEST)", "x", half_step_check, "small"),
    "limbs: a slice left out": ("for (int s = 0; s < SLICES; s++)", "for (int s = 1; s < SLICES; s++)", cd_check,
                                "small"),
    "limbs: depth of one term more": ("row >= rows) return", "row > rows) return", cd_check, "small"),
    "half_step: bias one off": ("load_quad(bias, j, m, false)", "load_quad(bias, j + 1, m, false)", half_step_check,
                                "large"),
    "half_step: fused": ("add(multiply(__ll2float_rn(total), 1 / (UnitLimbs::STEPS * WeightLimbs::STEPS)), bias)",
                         "(float)((double)total * 0x1p-32 + bias)", half_step_check, "small"),
    "counter: next block": ("(column / 4 + (u64)q)", "(column / 4 + (u64)q + 1)", half_step_check, "small"),
    "counter: start of a shard": ("(column / 4 + (u64)q)", "((u64)q)", shard_check, "small"),
    "sigmoid: fused": ("power = multiply(add(power, 0.00967151f), f);",
                       "power = std::fma(power, f, 0.00967151f * f);", sigmoid_check, "small"),
    "sigmoid: library": ("return divide(1.0f, add(power, 1.0f));", "return 1.0f / (1.0f + expf(-x));", sigmoid_check,
                         "small"),
    "gradient: weighted too early": ("subtract(data[q][s], multiply(model_weight, value(totals[s])))",
                                     "std::fma(-model_weight, value(totals[s]), data[q][s])", cd_check, "small"),
    "step: fused": ("add(multiply(r.momentum, velocity), multiply(r.rate_scale, gradient))",
                    "std::fma(r.momentum, velocity, r.rate_scale * gradient)", cd_check, "small"),
    "step: subnormal numbers made 0": (
        "multiply(r.momentum, velocity)",
        "(std::fabs(r.momentum * velocity) < 0x1p-126f ? 0.0f : r.momentum * velocity)", check_momentum_step, "small"),
    "gradient: biases exchanged": ("(visible ? p.b : p.c)[i]", "(visible ? p.c : p.b)[i]", cd_check, "large"),
}
FAULTS |= {f"limbs: no barrier, {line.partition('// ')[2]}": (line, "", half_step_check, "small")
           for line in barriers("limbs.cuh") if line.startswith("__syncthreads();")}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
