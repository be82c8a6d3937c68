"""``half_step.cu`` and ``cd_update.cu``: float64 is the judge, at any size, cut and address."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import reference
from gpudbn.precision import bf16, bf16_parts, tf32
from tests.cuda.checks import (
    COLUMNS,
    EPS,
    FAR,
    NEAR,
    ON_CPU,
    ON_GPU,
    ONE_SCHEDULE,
    SMALL_TILES,
    SURE,
    Arrays,
    barriers,
    host_uniforms,
    sees_fault,
)
from tests.cuda.test_elementwise import check_decoupled, check_step
from tests.helpers import assert_close

# B, n, m: one, primes, whole tiles, multiples of 4 with tails
SIZES = [(1, 1, 1), (5, 3, 2), (17, 131, 37), (37, 67, 131), (16, 128, 32), (70, 200, 92)]
# n, m, rows, C: one, primes, whole tiles, multiples of 4 with tails, one phase alone
CD_SIZES = [(1, 1, 1, 1), (3, 2, 5, 4), (37, 131, 17, 17), (131, 67, 41, 7), (64, 32, 32, 32), (92, 60, 70, 70),
            (31, 31, 3, 0), (5, 7, 0, 3)]
REAL_SIZES = [(100, 784, 500), (128, 784, 2000), (1000, 1031, 1009)]

both_ways = pytest.mark.parametrize("transpose", [False, True])


def exact_product(x, W, precision):
    """In float64, of the operands as they are rounded; and what a product's float32 sums may err.

    A tensor core adds eight products at a time and may cut off what is below 2^-23 of the sum so far, which is about
    as large as the last one, or as a random walk with such steps.
    """
    if precision == "bf16x2":
        (x, x_low), (W, W_low) = bf16_parts(x), bf16_parts(W)
        low = x.astype(np.float64) @ W_low + x_low.astype(np.float64) @ W
    else:
        rounded = {"fp32": np.asarray, "bf16": bf16, "tf32": tf32}[precision]
        x, W, low = rounded(x), rounded(W), 0.0
    x, W = x.astype(np.float64), W.astype(np.float64)
    exact, error = x @ W + low, EPS * np.abs(x) @ np.abs(W)
    if precision != "fp32":
        error += 2 * EPS * (1 + len(W) / 8) * (np.abs(exact) + 3 * np.sqrt(x**2 @ W**2))
    return exact, error


def check_half_step(launcher, B, n, m, *, transpose=False, precision="fp32", x=None, address=FAR, column=0,
                    columns=None, sample=True, mean=True, offset=0):
    """Means to the rounding of a float32 sum, samples where they are sure, both against float64."""
    rng = np.random.default_rng([B, n, m])
    grey, W, bias = (a.astype(np.float32) for a in (rng.random((B, n)), rng.normal(0, 0.3, (n, m)),
                                                    rng.normal(0, 1, m)))
    x = grey if x is None else x
    arrays = Arrays(launcher, offset)
    inputs = [arrays.put(x), arrays.put(W.T if transpose else W), arrays.put(bias)]
    s, p = arrays.empty(B, m) if sample else None, arrays.empty(B, m) if mean else None
    launcher.half_step(s, p, *inputs, transpose=transpose, precision=precision, **address, column=column,
                       columns=columns)

    product, rounding = exact_product(x, W, precision)
    exact, rounding = 1 / (1 + np.exp(-(product + bias))), rounding + EPS * (2 + np.abs(bias))
    if mean:
        assert_close(arrays.get(p) / rounding, exact / rounding, atol=1.0)
    if sample:
        u, got = host_uniforms(B, m, address, column, columns), arrays.get(s)
        assert np.isin(got, (0, 1)).all()
        sure = SURE if precision == "fp32" else rounding
        assert (got == (u < exact))[np.abs(u - exact) > sure].all(), "samples differ"
    for given, before in zip(inputs, (x, W.T if transpose else W, bias), strict=True):
        assert np.array_equal(arrays.get(given), before), "an input was changed"
    arrays.passed("half_step_transposed" if transpose else "half_step")


def cd_case(n, m, rows, C, binary=False):
    rng = np.random.default_rng([n, m, rows])
    v, h = rng.random((rows + C, n), np.float32), rng.random((rows + C, m), np.float32)
    return ((v < 0.5).astype(np.float32), (h < 0.5).astype(np.float32)) if binary else (v, h)


def exact_sums(v, h, rows, w, ones=None, precision="fp32"):
    """dW, db, dc, and ``moved``, end to end, in float64, of operands as they are rounded; and what float32 may err.

    That is half a unit a term, as a random walk; on tensor cores see ``exact_product``.
    """
    (K, n), m = v.shape, h.shape[1]
    data = np.arange(K) < rows
    sign = np.where(data, 1, -np.float32(w)).astype(np.float32)
    of_b, of_c = np.split(np.ones(2 * K, np.float32) if ones is None else ones, 2)
    a = np.ascontiguousarray(np.column_stack([v, of_c, data]).astype(np.float32).T)
    b = np.column_stack([h * sign[:, None], of_b * sign, data]).astype(np.float32)
    if precision == "fp32":
        a, b = a.astype(np.float64), b.astype(np.float64)
        both = a @ b, EPS * (2 + np.sqrt(K)) * np.abs(a) @ np.abs(b)
    else:
        both = exact_product(a, b, precision)
    return [np.concatenate([x[:n, :m].ravel(), x[:n, m], x[n, :m], x[:n, m + 1], x[n + 1, :m]]) + tiny
            for x, tiny in zip(both, (0, 1e-30), strict=True)]


def cd_centred(arrays, v, h):
    """What centring adds: the keywords on the device, and ones on the host."""
    rng, (K, n), m = np.random.default_rng(9), v.shape, h.shape[1]
    ones = rng.normal(1, 0.5, 2 * K).astype(np.float32)
    return {"ones": arrays.put(ones), "moved": arrays.empty(n + m)}, ones


def check_cd_sums(launcher, n, m, rows, C, *, w=0.7, offset=0, binary=False, centred=False, precision="fp32"):
    arrays, (v, h) = Arrays(launcher, offset), cd_case(n, m, rows, C, binary)
    out, (keywords, ones) = [arrays.empty(n, m), arrays.empty(n), arrays.empty(m)], ({}, None)
    if centred:
        keywords, ones = cd_centred(arrays, v, h)
    launcher.cd_sums(*out, arrays.put(v), arrays.put(h), rows, model_weight=w, precision=precision, **keywords)
    got = np.concatenate([arrays.get(part).ravel() for part in [*out, *list(keywords.values())[1:]]])
    exact, error = (x[: got.size] for x in exact_sums(v, h, rows, w, ones, precision))
    assert_close(got / error, exact / error, atol=1.0)
    if binary:
        assert np.array_equal(got, exact), "sums of zeros and ones must be exact"
        twin = np.empty((n, m), np.float32), np.empty(n, np.float32), np.empty(m, np.float32)
        reference.cd_sums(*twin, v, h, rows, model_weight=w, precision=precision)
        assert np.array_equal(got, np.concatenate([part.ravel() for part in twin]))
    arrays.passed("cd_sums")


def check_cd_update(launcher, n, m, rows, C, *, w=0.7, offset=0, centred=False, precision="fp32", **step):
    arrays, (v, h) = Arrays(launcher, offset), cd_case(n, m, rows, C)
    on_device, (keywords, ones) = (arrays.put(v), arrays.put(h)), cd_centred(arrays, v, h) if centred else ({}, None)

    def launch(parameters, velocity, **numbers):
        launcher.cd_update(parameters, velocity, None, n, m, *on_device, rows, model_weight=w, precision=precision,
                           **keywords, **numbers)

    size, (exact, error) = n * m + n + m, exact_sums(v, h, rows, w, ones, precision)
    check_step(launch, arrays, size, n * m, exact[:size], error[:size], scale=1 / rows, **step)
    if centred:
        assert_close(arrays.get(keywords["moved"]) / error[size:], exact[size:] / error[size:], atol=1.0)
    arrays.passed("cd_update")


def check_cd_decoupled(launcher, rule, n, m, rows, C, *, w=0.7, offset=0):
    arrays, (v, h) = Arrays(launcher, offset), cd_case(n, m, rows, C)
    on_device = arrays.put(v), arrays.put(h)

    def launch(*changed, **numbers):
        getattr(launcher, f"cd_{rule}")(*changed, None, n, m, *on_device, rows, model_weight=w, **numbers)

    sums, error = (x[: n * m + n + m] for x in exact_sums(v, h, rows, w))
    check_decoupled(launch, arrays, rule, n * m + n + m, n * m, sums / rows, error / rows)
    arrays.passed(f"cd_{rule}")


def check_fade(launcher, n=37, m=31, rows=11, C=7):
    """A decay in the gradient is that of the twin."""
    arrays, (v, h), rng = Arrays(launcher), cd_case(n, m, rows, C), np.random.default_rng(2)
    p, q = rng.normal(0, 1, n * m + n + m).astype(np.float32), rng.random(n * m + n + m, np.float32)
    changed, numbers = (arrays.put(p), arrays.put(q)), {"rate": 0.1, "decay": 0.2, "fade": 3.0}
    launcher.cd_adagrad(*changed, None, n, m, arrays.put(v), arrays.put(h), rows, **numbers)
    reference.cd_adagrad(p, q, np.empty_like(p), n, m, v, h, rows, **numbers)
    assert_close(arrays.get(changed[0]), p, atol=1e-5)
    assert_close(arrays.get(changed[1]), q, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- half_step


@both_ways
def test_half_step(launcher, transpose):
    for sizes in SIZES:
        check_half_step(launcher, *sizes, transpose=transpose)


@ONE_SCHEDULE
@both_ways
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_half_step_of_a_shard(launcher, column, columns, transpose):
    """A shard of a layer draws what the whole layer would, wherever it was cut."""
    for sizes in [(17, 31, 37), (9, 20, 64)]:
        check_half_step(launcher, *sizes, transpose=transpose, column=column, columns=columns)


@ONE_SCHEDULE
@both_ways
def test_half_step_without_one_output(launcher, transpose):
    check_half_step(launcher, 17, 31, 37, transpose=transpose, sample=False)
    check_half_step(launcher, 17, 31, 37, transpose=transpose, mean=False)


@ONE_SCHEDULE
@both_ways
def test_half_step_at_odd_addresses(launcher, transpose):
    """Rows are multiples of 16 bytes but do not begin at one: nothing may be read as a quad."""
    check_half_step(launcher, 17, 32, 36, transpose=transpose, offset=1)


@ONE_SCHEDULE
@SMALL_TILES
def test_half_step_into_one_array(launcher):
    """sample and mean may be one array: the sample wins, as in the twin."""
    rng, arrays = np.random.default_rng(0), Arrays(launcher)
    x, W, bias = (arrays.put(rng.random(shape)) for shape in ((17, 31), (31, 37), 37))
    one, s, p = (arrays.empty(17, 37) for _ in range(3))
    launcher.half_step(one, one, x, W, bias, **NEAR)
    launcher.half_step(s, p, x, W, bias, **NEAR)
    assert np.array_equal(arrays.get(one), arrays.get(s))


@ONE_SCHEDULE
@SMALL_TILES
def test_half_step_of_nothing(launcher):
    arrays = Arrays(launcher)
    for B, m in [(0, 5), (5, 0)]:
        launcher.half_step(arrays.empty(B, m), arrays.empty(B, m), arrays.empty(B, 3), arrays.empty(3, m),
                           arrays.empty(m), **NEAR)
    p = arrays.empty(5, 3)
    launcher.half_step(None, p, arrays.empty(5, 0), arrays.empty(0, 3), arrays.put(np.zeros(3)))  # the bias alone
    assert (arrays.get(p) == 0.5).all()


@ONE_SCHEDULE
@both_ways
def test_half_step_with_a_clock(launcher, transpose):
    rng, arrays = np.random.default_rng(0), Arrays(launcher)
    x, W, bias = (arrays.put(rng.random(shape)) for shape in ((17, 31), (37, 31) if transpose else (31, 37), 37))
    with_clock, without = arrays.empty(17, 37), arrays.empty(17, 37)
    launcher.half_step(without, None, x, W, bias, transpose=transpose, **{**NEAR, "update": 12})
    launcher.half_step(with_clock, None, x, W, bias, transpose=transpose, **{**NEAR, "update": 5},
                       clock=arrays.number(7))
    assert np.array_equal(arrays.get(with_clock), arrays.get(without))


# --------------------------------------------------------------------------------------- gradient and the step


def test_cd_sums(launcher):
    for sizes in CD_SIZES:
        check_cd_sums(launcher, *sizes)
    check_cd_sums(launcher, 32, 36, 17, 17, offset=1)


def test_cd_sums_of_centred_units(launcher):
    """Sizes at which the two units behind the last one are in one tile and quad, or in the next."""
    for sizes in [*CD_SIZES, (63, 31, 5, 5), (62, 30, 5, 5), (127, 63, 3, 3)]:
        check_cd_sums(launcher, *sizes, centred=True)


@ONE_SCHEDULE
def test_cd_sums_of_samples_are_exact(launcher):
    check_cd_sums(launcher, 37, 131, 41, 41, w=1.0, binary=True)


def test_cd_update(launcher):
    for sizes in CD_SIZES[:-1]:
        check_cd_update(launcher, *sizes)
    check_cd_update(launcher, 32, 36, 17, 17, offset=1)
    check_cd_update(launcher, 37, 31, 17, 17, momentum=0.0, decay=0.0)
    check_cd_update(launcher, 37, 131, 17, 5, centred=True)


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_activations_applied_by_other_rules(launcher, rule):
    for sizes in CD_SIZES[:-1]:
        check_cd_decoupled(launcher, rule, *sizes)
    check_cd_decoupled(launcher, rule, 32, 36, 17, 17, offset=1)


@ONE_SCHEDULE
def test_a_decay_in_the_gradient(launcher):
    check_fade(launcher)


@ONE_SCHEDULE
def test_rates_in_device_memory_count_instead(launcher):
    n, m, rows = 31, 37, 9
    arrays, (v, h) = Arrays(launcher), cd_case(n, m, rows, rows)
    v, h, rates = arrays.put(v), arrays.put(h), arrays.put([0.3 / rows, 0.9, 0.3 * 0.01])
    results = []
    for numbers in ({"rate": 0.3, "momentum": 0.9, "decay": 0.01},
                    {"rate": 7.0, "momentum": 0.1, "decay": 5.0, "rates": rates}):
        start = np.random.default_rng(3).normal(size=n * m + n + m)
        p, u = arrays.put(start), arrays.put(start[::-1])
        launcher.cd_update(p, u, None, n, m, v, h, rows, **numbers)
        launcher.momentum_step(p, u, arrays.put(start), weights=n * m, scale=1 / rows, **numbers)
        results.append((arrays.get(p), arrays.get(u)))
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------- real sizes


@ON_CPU
def test_the_size_of_a_real_layer(launcher):
    check_half_step(launcher, 100, 784, 500)
    check_half_step(launcher, 100, 500, 784, transpose=True)
    check_cd_update(launcher, 784, 500, 100, 100)


@ON_GPU
@both_ways
def test_half_step_of_real_layers(launcher, transpose):
    for sizes in REAL_SIZES:
        check_half_step(launcher, *sizes, transpose=transpose)


@ON_GPU
def test_gradients_of_real_layers(launcher):
    for sizes in [(784, 500, 100, 100), (1031, 1009, 500, 300)]:
        check_cd_sums(launcher, *sizes)
        check_cd_update(launcher, *sizes)
        check_cd_decoupled(launcher, "sgd", *sizes)
        check_cd_decoupled(launcher, "adagrad", *sizes)


@ON_GPU
@pytest.mark.parametrize(("B", "n", "m"), REAL_SIZES)
def test_half_step_errs_at_most_twice_as_much_as_the_plain_formula(launcher, B, n, m):
    import cupy

    rng = np.random.default_rng(0)
    x, W, bias = (rng.random((B, n)) < 0.2, rng.normal(0, 0.1, (n, m)), rng.normal(0, 1, m))
    x, W, bias = (cupy.asarray(a, np.float32) for a in (x, W, bias))
    exact = 1 / (1 + cupy.exp(-(x.astype(np.float64) @ W.astype(np.float64) + bias)))
    mean = cupy.empty((B, m), np.float32)
    launcher.half_step(None, mean, x, W, bias)
    plain = 1 / (1 + cupy.exp(-(x @ W + bias)))
    assert abs(mean - exact).max() <= 2 * abs(plain - exact).max()


@ON_GPU
def test_cd_sums_err_at_most_twice_as_much_as_the_plain_formula(launcher):
    import cupy

    rng, n, m, rows = np.random.default_rng(0), 784, 500, 100
    v, h = (cupy.asarray(rng.random((2 * rows, size)), np.float32) for size in (n, m))
    dW, db, dc = cupy.empty((n, m), np.float32), cupy.empty(n, np.float32), cupy.empty(m, np.float32)
    launcher.cd_sums(dW, db, dc, v, h, rows)
    v64, h64 = v.astype(np.float64), h.astype(np.float64)
    exact = v64[:rows].T @ h64[:rows] - v64[rows:].T @ h64[rows:]
    plain = v[:rows].T @ h[:rows] - v[rows:].T @ h[rows:]
    assert abs(dW - exact).max() <= 2 * abs(plain - exact).max()


# -------------------------------------------------------------------------------------------- planted faults


def half_step_check(launcher):
    check_half_step(launcher, 17, 131, 37)
    check_half_step(launcher, 17, 131, 37, transpose=True)


def shard_check(launcher):
    check_half_step(launcher, 17, 31, 37, column=7, columns=157)


def cd_sums_check(launcher):
    check_cd_sums(launcher, 37, 131, 41, 17)


def cd_centred_check(launcher):
    check_cd_sums(launcher, 37, 31, 5, 5, centred=True)


def cd_update_check(launcher):
    check_cd_update(launcher, 37, 37, 41, 17)


def cd_adagrad_check(launcher):
    check_cd_decoupled(launcher, "adagrad", 37, 37, 41, 17)


FAULTS = {  # name: text, what it becomes, the check that must see it, tiles
    "counter: next block":
        ("(column / 4 + (u64)q)", "(column / 4 + (u64)q + 1)", half_step_check, "small"),
    "counter: upper half of the index":
        ("(u32)(index >> 32)", "0", half_step_check, "small"),
    "counter: start of a shard":
        ("(column / 4 + (u64)q)", "((u64)q)", shard_check, "small"),
    "product: swapped index":
        ("(N == ALONG_DEPTH ? out[j][i] : out[i][j])", "out[i][j]", half_step_check, "small"),
    "product: one term too many":
        ("row >= rows) return", "row > rows) return", cd_sums_check, "small"),
    "product: a slice left out":
        ("for (int s = 0; s < SLICES; s++)", "for (int s = 1; s < SLICES; s++)", cd_sums_check, "small"),
    "product: tail not guarded":
        ("0 <= i && i < size ? row[i] : 0.0f", "row[i]", half_step_check, "small"),
    "half_step: bias one off":
        ("load_quad(bias, j, m, false)", "load_quad(bias, j + 1, m, false)", half_step_check, "large"),
    "cd_update: sign":
        (": -model_weight", ": model_weight", cd_update_check, "small"),
    "cd_update: ones exchanged":
        ("set_ones(quad, line, n, ones, K + k,", "set_ones(quad, line, n, ones, k,", cd_centred_check, "small"),
    "cd_update: a unit forgotten where it begins a quad":
        ("if (first + 3 < size) return;", "if (first < size) return;", cd_centred_check, "small"),
    "cd_update: moved by both phases":
        ("set_ones(quad, line, m, ones, k, k < rows)", "set_ones(quad, line, m, ones, k, k < K)", cd_centred_check,
         "large"),
    "cd_update: moved of h in the place of v":
        ("moved[n + j + s] = sums[s]", "moved[j + s] = sums[s]", cd_centred_check, "small"),
    "cd_update: biases exchanged":
        ("(visible ? p.b : p.c)[i]", "(visible ? p.c : p.b)[i]", cd_update_check, "large"),
    "cd_update: what the rule keeps for biases exchanged":
        ("(visible ? u.b : u.c)[i]", "(visible ? u.c : u.b)[i]", cd_adagrad_check, "small"),
    "cd_update: what the rule keeps not kept":
        ("if (state) store_quad(u_row", "if (!state) store_quad(u_row", cd_adagrad_check, "small"),
    "cd_update: eps and scale exchanged":
        (": sum, eps,", ": sum, scale,", cd_adagrad_check, "large"),
    "step: biases fade":
        ("decays ? sum - fade * p : sum", "sum - fade * p", check_fade, "small"),
}
FAULTS |= {f"product: no barrier, {line.partition('// ')[2]}": (line, "", half_step_check, "small")
           for line in barriers("product_fp32.cuh")}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
