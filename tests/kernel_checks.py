"""What is demanded of every kernel, run on the CPU (NumPy arrays) or on a GPU (CuPy arrays)."""

from __future__ import annotations

import numpy as np

from gpudbn import draws, reference
from gpudbn.arrays import to_cpu, to_gpu
from tests.helpers import assert_close
from tests.kernel_report import record

EPS = 2.0**-24  # half a unit in the last place of 1
SURE = 1e-6  # samples are demanded where u and p are farther apart than this
PADDING = 64
LARGE_TILES, SMALL_TILES = 1, 10**9  # processors of a chip for which the launcher chooses them

NEAR = {"seed": 7, "update": 3, "site": draws.site(draws.Purpose.CD, 1, 2), "row": 0}
FAR = {"seed": 2**63 + 12345, "update": 2**32 - 1, "site": 2**32 - 2, "row": 2**33 + 5}

# B, n, m: one, primes, whole tiles, multiples of 4 with tails
SIZES = [(1, 1, 1), (5, 3, 2), (17, 131, 37), (37, 67, 131), (16, 128, 32), (70, 200, 92)]
# n, m, rows, C: one, primes, whole tiles, multiples of 4 with tails, one phase alone
CD_SIZES = [(1, 1, 1, 1), (3, 2, 5, 4), (37, 131, 17, 17), (131, 67, 41, 7), (64, 32, 32, 32), (92, 60, 70, 70),
            (31, 31, 3, 0), (5, 7, 0, 3)]
# column, columns: a whole layer, a shard, shards that begin in the middle of a Philox block
COLUMNS = [(0, None), (16, 1001), (3, 157), (6, None)]


class Arrays:
    """Makes the launcher's arrays between NaNs: what a kernel reads beyond poisons it, what it writes beyond is seen.

    ``offset`` floats more lie before each array: 1 makes addresses that are no multiples of 16 bytes.
    """

    def __init__(self, launcher, offset=0):
        self.on_cpu = launcher.array_type is np.ndarray
        self.before = PADDING + offset
        self.buffers = []

    def put(self, values):
        """A copy of the values, float32."""
        values = np.asarray(values, np.float32)
        buffer = np.full(self.before + values.size + PADDING, np.nan, np.float32)
        buffer[self.before : self.before + values.size] = values.ravel()
        buffer = buffer if self.on_cpu else to_gpu(buffer)
        self.buffers.append((buffer, values.size))
        return buffer[self.before : self.before + values.size].reshape(values.shape)

    def empty(self, *shape):
        """NaNs."""
        return self.put(np.full(shape, np.nan))

    def get(self, array):
        """The values, after a look at the NaNs around all arrays."""
        for buffer, size in self.buffers:
            buffer = to_cpu(buffer)
            assert np.isnan(buffer[: self.before]).all(), "wrote before an array"
            assert np.isnan(buffer[self.before + size :]).all(), "wrote behind an array"
        return to_cpu(array)

    def passed(self, kernel):
        record(kernel, "on CPU" if self.on_cpu else "on GPU")


def host_uniforms(B, m, address, column, columns):
    return draws.uniforms(np.empty((B, m), np.float32), **address, column=column, columns=columns)


def check_uniforms(launcher, B, m, address, column, columns, offset=0):
    arrays = Arrays(launcher, offset)
    out = arrays.empty(B, m)
    assert launcher.uniforms(out, **address, column=column, columns=columns) is out
    assert np.array_equal(arrays.get(out), host_uniforms(B, m, address, column, columns))
    arrays.passed("uniforms")


def check_bernoulli(launcher, B, m, address, column, columns, in_place=False):
    arrays, u = Arrays(launcher), host_uniforms(B, m, address, column, columns)
    p = np.random.default_rng(B + m).random((B, m), np.float32)
    p[-1, -1] = np.nextafter(u[-1, -1], np.float32(2))  # u < p by a hair
    p[0, 0] = u[0, 0]  # and not u < p
    mean = arrays.put(p)
    sample = mean if in_place else arrays.empty(B, m)
    assert launcher.bernoulli(sample, mean, **address, column=column, columns=columns) is sample
    assert np.array_equal(arrays.get(sample), u < p)
    assert in_place or np.array_equal(arrays.get(mean), p)
    arrays.passed("bernoulli")


def check_half_step(launcher, B, n, m, *, transpose=False, address=FAR, column=0, columns=None, sample=True, mean=True,
                    offset=0):
    """Means to the rounding of a float32 sum, samples where they are sure, both against float64."""
    rng = np.random.default_rng([B, n, m])
    x, W, bias = (a.astype(np.float32) for a in (rng.random((B, n)), rng.normal(0, 0.3, (n, m)), rng.normal(0, 1, m)))
    arrays = Arrays(launcher, offset)
    inputs = [arrays.put(x), arrays.put(W.T if transpose else W), arrays.put(bias)]
    s, p = arrays.empty(B, m) if sample else None, arrays.empty(B, m) if mean else None
    launcher.half_step(s, p, *inputs, transpose=transpose, **address, column=column, columns=columns)

    W64 = W.astype(np.float64)
    exact = 1 / (1 + np.exp(-(x @ W64 + bias)))
    if mean:
        rounding = EPS * (2 + x @ np.abs(W64) + np.abs(bias))
        assert_close(arrays.get(p) / rounding, exact / rounding, atol=1.0)
    if sample:
        u, got = host_uniforms(B, m, address, column, columns), arrays.get(s)
        assert np.isin(got, (0, 1)).all()
        assert (got == (u < exact))[np.abs(u - exact) > SURE].all(), "samples differ"
    for given, before in zip(inputs, (x, W.T if transpose else W, bias), strict=True):
        assert np.array_equal(arrays.get(given), before), "an input was changed"
    arrays.passed("half_step_transposed" if transpose else "half_step")


def cd_case(n, m, rows, C, binary=False):
    rng = np.random.default_rng([n, m, rows])
    v, h = rng.random((rows + C, n), np.float32), rng.random((rows + C, m), np.float32)
    return ((v < 0.5).astype(np.float32), (h < 0.5).astype(np.float32)) if binary else (v, h)


def exact_sums(v, h, rows, w):
    """dW, db, dc end to end, in float64; and what float32 may err: half a unit a term, as a random walk."""
    v, h = v.astype(np.float64), h.astype(np.float64)
    sign = np.where(np.arange(len(v)) < rows, 1.0, -float(np.float32(w)))[:, None]
    sums = v.T @ (sign * h), (sign * v).sum(0), (sign * h).sum(0)
    size = np.abs(v).T @ np.abs(sign * h), np.abs(sign * v).sum(0), np.abs(sign * h).sum(0)
    flat_sums, flat_size = (np.concatenate([part.ravel() for part in parts]) for parts in (sums, size))
    return flat_sums, EPS * (2 + np.sqrt(len(v))) * flat_size + 1e-30


def check_cd_sums(launcher, n, m, rows, C, *, w=0.7, offset=0, binary=False):
    arrays, (v, h) = Arrays(launcher, offset), cd_case(n, m, rows, C, binary)
    out = arrays.empty(n, m), arrays.empty(n), arrays.empty(m)
    launcher.cd_sums(*out, arrays.put(v), arrays.put(h), rows, model_weight=w)
    got = np.concatenate([arrays.get(part).ravel() for part in out])
    exact, error = exact_sums(v, h, rows, w)
    assert_close(got / error, exact / error, atol=1.0)
    if binary:
        assert np.array_equal(got, exact), "sums of zeros and ones must be exact"
        twin = np.empty((n, m), np.float32), np.empty(n, np.float32), np.empty(m, np.float32)
        reference.cd_sums(*twin, v, h, rows, model_weight=w)
        assert np.array_equal(got, np.concatenate([part.ravel() for part in twin]))
    arrays.passed("cd_sums")


def check_step(launch, arrays, size, weights, gradient, error, *, rate=0.3, scale=1.0, momentum=0.9, decay=0.01):
    """velocity and parameters to rounding against float64; the gradient may err by ``error``."""
    rng = np.random.default_rng(size)
    p, u = rng.normal(size=size).astype(np.float32), rng.normal(size=size).astype(np.float32)
    parameters, velocity = arrays.put(p), arrays.put(u)
    launch(parameters, velocity, rate=rate, momentum=momentum, decay=decay)
    p, u = p.astype(np.float64), u.astype(np.float64)
    new_u = momentum * u + rate * scale * gradient - rate * decay * np.where(np.arange(size) < weights, p, 0)
    error = rate * scale * error + 4 * EPS * (np.abs(u) + np.abs(rate * scale * gradient) + np.abs(p))
    assert_close(arrays.get(velocity) / error, new_u / error, atol=1.0)
    assert_close(arrays.get(parameters) / error, (p + new_u) / error, atol=1.5)


def check_cd_update(launcher, n, m, rows, C, *, w=0.7, offset=0, **step):
    arrays, (v, h) = Arrays(launcher, offset), cd_case(n, m, rows, C)
    on_device = arrays.put(v), arrays.put(h)

    def launch(parameters, velocity, **numbers):
        launcher.cd_update(parameters, velocity, None, n, m, *on_device, rows, model_weight=w, **numbers)

    check_step(launch, arrays, n * m + n + m, n * m, *exact_sums(v, h, rows, w), scale=1 / rows, **step)
    arrays.passed("cd_update")


def check_momentum_step(launcher, size, weights, **step):
    arrays, g = Arrays(launcher), np.random.default_rng(1).normal(size=size).astype(np.float32)
    gradient = arrays.put(g)

    def launch(parameters, velocity, **numbers):
        launcher.momentum_step(parameters, velocity, gradient, weights=weights, scale=0.25, **numbers)

    check_step(launch, arrays, size, weights, g.astype(np.float64), 0.0, scale=0.25, **step)
    arrays.passed("momentum_step")


def check_sigmoid(launcher):
    x = np.concatenate([np.linspace(-120, 120, 4999), [-1e38, 1e38, 0]]).astype(np.float32)
    exact = 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, 700)))
    arrays = Arrays(launcher)
    on_device = arrays.put(x.reshape(2, -1))
    assert launcher.sigmoid(on_device) is on_device
    y = arrays.get(on_device).ravel()
    assert_close(y, exact, atol=1.5e-7)
    assert_close(y[x > -80], exact[x > -80], rtol=4e-7)
    arrays.passed("sigmoid")
