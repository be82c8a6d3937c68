"""``draws.cu``: the bits of ``draws.py`` on every device, at every address."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import draws, reference
from gpudbn.cuda.door import kernels_folder
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
    host_uniforms,
    sees_fault,
)
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close

VECTORS = [  # of Random123 (kat_vectors): counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]

WORDS = """
extern "C" __global__ void words(unsigned* out, const unsigned* counters, const unsigned* keys)
{
    const unsigned *c = counters + 4 * threadIdx.x, *k = keys + 2 * threadIdx.x;
    uint4 word = philox4x32(make_uint4(c[0], c[1], c[2], c[3]), make_uint2(k[0], k[1]));
    unsigned* o = out + 4 * threadIdx.x;
    o[0] = word.x, o[1] = word.y, o[2] = word.z, o[3] = word.w;
}
"""


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


def check_activate(launcher, B, m, column=0, columns=None, *, sample=True, mean=True, in_place=None, offset=0):
    """Means to the rounding of a float32 sum and sigmoid, samples where they are sure, against float64."""
    rng, arrays = np.random.default_rng([B, m]), Arrays(launcher, offset)
    x, bias = rng.normal(0, 2, (B, m)).astype(np.float32), rng.normal(0, 1, m).astype(np.float32)
    on_device = arrays.put(x)
    s = (on_device if in_place == "sample" else arrays.empty(B, m)) if sample else None
    p = (on_device if in_place == "mean" else arrays.empty(B, m)) if mean else None
    launcher.activate(s, p, on_device, arrays.put(bias), **FAR, column=column, columns=columns)
    exact = 1 / (1 + np.exp(-(x.astype(np.float64) + bias)))
    if mean:
        assert_close(arrays.get(p), exact, atol=1.5e-7 + 4 * EPS)
    if sample:
        u = host_uniforms(B, m, FAR, column, columns)
        got = arrays.get(s)
        assert np.isin(got, (0, 1)).all()
        assert (got == (u < exact))[np.abs(u - exact) > SURE].all()
    arrays.passed("activate")


def exact_normals(B, m, address, column, columns):
    """Box-Muller in float64, written anew: an even column and the one behind it make two normals."""
    last = column + m + m % 2  # the neighbour of the last one, too
    columns = last if columns is None else columns + columns % 2
    u = host_uniforms(B, last - column, address, column, columns).astype(np.float64)
    length, angle = np.sqrt(-2 * np.log1p(-u[:, ::2])), 2 * np.pi * u[:, 1::2]
    return np.stack([length * np.cos(angle), length * np.sin(angle)], axis=2).reshape(B, -1)[:, :m]


def check_normals(launcher, B, m, address, column, columns, offset=0):
    arrays, exact = Arrays(launcher, offset), exact_normals(B, m, address, column, columns)
    out, sample, sampled = (arrays.empty(B, m) for _ in range(3))
    where = {**address, "column": column, "columns": columns}
    assert launcher.normals(out, **where) is out
    assert_close(arrays.get(out), exact, atol=1e-7, rtol=4e-7)
    assert_close(draws.normals(np.empty((B, m), np.float32), **where), exact, atol=1e-7, rtol=6e-8)
    arrays.passed("normals")
    rng = np.random.default_rng(B + m)
    mean, sd = rng.normal(size=(B, m)).astype(np.float32), rng.random(m, np.float32) + np.float32(0.1)
    assert launcher.gaussian(sample, arrays.put(mean), arrays.put(sd), **where) is sample
    assert_close(arrays.get(sample), mean + sd * exact, atol=3e-7, rtol=6e-7)
    sampled[...] = arrays.put(mean)
    launcher.gaussian(sampled, sampled, arrays.put(sd), **where)
    assert np.array_equal(arrays.get(sampled), arrays.get(sample))
    twin = reference.gaussian(np.empty((B, m), np.float32), mean, sd, **where)
    assert_close(twin, mean + sd * exact, atol=3e-7, rtol=3e-7)
    arrays.passed("gaussian")


def check_dropout(launcher, B, m, address, column, columns, keep=0.7, offset=0):
    arrays, u = Arrays(launcher, offset), host_uniforms(B, m, address, column, columns)
    values = np.random.default_rng(m).random((B, m), np.float32)
    x = arrays.put(values)
    assert launcher.dropout(x, keep, **address, column=column, columns=columns) is x
    expected = values * np.where(u < np.float32(keep), np.float32(1 / keep), np.float32(0))
    assert np.array_equal(arrays.get(x), expected)
    assert np.array_equal(reference.dropout(values, keep, **address, column=column, columns=columns), expected)
    arrays.passed("dropout")


def test_philox_gives_the_published_words():
    rng = np.random.default_rng(0)
    counters = np.concatenate([[v[0] for v in VECTORS], rng.integers(0, 1 << 32, (29, 4))]).astype(np.uint32)
    keys = np.concatenate([[v[1] for v in VECTORS], rng.integers(0, 1 << 32, (29, 2))]).astype(np.uint32)
    out = np.zeros((32, 4), np.uint32)
    module = runtime.Module((kernels_folder() / "philox.cuh").read_text() + WORDS)
    module.get_function("words")((1,), (32,), (out, counters, keys))
    assert out[:3].tolist() == [list(v[2]) for v in VECTORS]
    for counter, key, words in zip(counters, keys, out, strict=True):
        assert [int(word) for word in draws.philox4x32(counter, key)] == words.tolist()


@ON_CPU
@SMALL_TILES
@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_uniforms_at_the_published_vectors(launcher, counter, key, words):
    """The index is counter words 0 and 1, the seed is the key: low and high halves are in their places."""
    out = np.empty((1, 4), np.float32)
    launcher.uniforms(out, seed=key[1] << 32 | key[0], row=counter[1] << 32 | counter[0], update=counter[2],
                                site=counter[3])
    assert out.tolist() == [[(word >> 8) * EPS for word in words]]


@SMALL_TILES
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_uniforms(launcher, column, columns):
    for B, m in [(1, 1), (3, 2), (37, 131), (70, 92), (2, 2048)]:
        for address in (NEAR, FAR):
            if columns is None or column + m <= columns:
                check_uniforms(launcher, B, m, address, column, columns)
    check_uniforms(launcher, 5, 8, FAR, column, columns, offset=1)


@ON_GPU
@SMALL_TILES
def test_uniforms_of_more_than_the_threads_of_a_chip(launcher):
    check_uniforms(launcher, 2049, 2047, FAR, 3, 3001)


@SMALL_TILES
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_bernoulli(launcher, column, columns, in_place):
    for B, m in [(1, 1), (37, 131), (70, 92)]:
        check_bernoulli(launcher, B, m, FAR, column, columns, in_place)


@SMALL_TILES
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_activate(launcher, column, columns):
    for B, m in [(1, 1), (37, 131), (70, 92)]:
        check_activate(launcher, B, m, column, columns)
    check_activate(launcher, 17, 37, column, columns, sample=False, in_place="mean")
    check_activate(launcher, 17, 37, column, columns, mean=False, in_place="sample")
    check_activate(launcher, 17, 36, column, columns, offset=1)


@ONE_SCHEDULE
@SMALL_TILES
def test_activate_is_what_half_step_does_with_its_product(launcher):
    arrays, rng = Arrays(launcher), np.random.default_rng(0)
    x, bias = arrays.put(rng.normal(size=(9, 31))), arrays.put(rng.normal(size=31))
    both = [(arrays.empty(9, 31), arrays.empty(9, 31)) for _ in range(2)]
    launcher.half_step(*both[0], x, arrays.put(np.eye(31)), bias, **NEAR)
    launcher.activate(*both[1], x, bias, **NEAR)
    assert all(np.array_equal(arrays.get(one), arrays.get(other)) for one, other in zip(*both, strict=True))


@ONE_SCHEDULE
@SMALL_TILES
def test_a_clock_is_added_to_the_update(launcher):
    arrays, address = Arrays(launcher), {**NEAR, "update": 2**31}
    mean, now = arrays.put(np.full((5, 7), 0.5)), arrays.number(2**31 - 3)
    out, sample = arrays.empty(5, 7), arrays.empty(5, 7)
    launcher.uniforms(out, **address, clock=now)
    launcher.bernoulli(sample, mean, **address, clock=now)
    expected = host_uniforms(5, 7, {**NEAR, "update": 2**32 - 3}, 0, None)
    assert np.array_equal(arrays.get(out), expected)
    assert np.array_equal(arrays.get(sample), expected < 0.5)
    twin = draws.uniforms(np.empty((5, 7), np.float32), **address, clock=np.array([2**31 - 3], np.uint32))
    assert np.array_equal(twin, expected)


@SMALL_TILES
@pytest.mark.parametrize(("column", "columns"), [(0, None), (16, 1001), (6, 157), (6, None)])
def test_normals(launcher, column, columns):
    for B, m in [(1, 1), (3, 2), (37, 131), (70, 92)]:
        check_normals(launcher, B, m, FAR, column, columns)
    check_normals(launcher, 5, 8, NEAR, column, columns, offset=1)


@ON_GPU
@SMALL_TILES
def test_normals_of_a_million_uniforms(launcher):
    check_normals(launcher, 1031, 1009, FAR, 0, None)


@SMALL_TILES
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_dropout(launcher, column, columns):
    for B, m in [(1, 1), (37, 131), (70, 92)]:
        check_dropout(launcher, B, m, FAR, column, columns)
    check_dropout(launcher, 5, 8, NEAR, column, columns, keep=0.25, offset=1)


@ON_CPU
@SMALL_TILES
def test_the_ends_of_the_normals_are_finite(launcher):
    """The largest u makes the smallest 1 - u, 2^-24: sqrt(48 log 2); u = 0 makes a normal of 0."""
    ends = """
extern "C" __global__ void ends(float* out)
{
    float4 z = normal_quad(make_float4(1 - 0x1p-24f, 0.0f, 0.0f, 0.25f));
    out[0] = z.x, out[1] = z.y, out[2] = z.z, out[3] = z.w;
}
"""
    out = np.empty(4, np.float32)
    runtime.Module(launcher.units["draws"].source() + ends).get_function("ends")((1,), (1,), (out,))
    assert_close(out, [np.sqrt(48 * np.log(2)), 0, 0, 0], rtol=2e-7)


FAULTS = {  # text, what it becomes, the check that must see it
    "bernoulli": ("p = load_quad(mean", "p = load_quad(mean + 1",
                  lambda launcher: check_bernoulli(launcher, 37, 131, NEAR, 0, None)),
    "activate: bias": ("c = load_quad(bias, first", "c = load_quad(bias, first + 1",
                       lambda launcher: check_activate(launcher, 37, 131)),
    "activate: rows": ("r * m, first, m, x_aligned", "q * m, first, m, x_aligned",
                       lambda launcher: check_activate(launcher, 37, 131)),
    "normals: log of u": ("logf(1.0f - u.z)", "logf(u.z)",
                          lambda launcher: check_normals(launcher, 7, 13, NEAR, 0, None)),
    "normals: sine and cosine": ("&sin1, &cos1", "&cos1, &sin1",
                                 lambda launcher: check_normals(launcher, 7, 13, NEAR, 0, None)),
    "normals: pairs": ("sincospif(2.0f * u.y", "sincospif(2.0f * u.w",
                       lambda launcher: check_normals(launcher, 7, 13, NEAR, 0, None)),
    "gaussian": ("s.w * z.w", "s.z * z.w", lambda launcher: check_normals(launcher, 7, 13, NEAR, 0, None)),
    "dropout: which": ("draw < keep", "draw > keep", lambda launcher: check_dropout(launcher, 7, 13, NEAR, 0, None)),
    "dropout: scale": ("value * one_over_keep", "value * keep",
                       lambda launcher: check_dropout(launcher, 7, 13, NEAR, 0, None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
