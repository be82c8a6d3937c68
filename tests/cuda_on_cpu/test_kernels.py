"""Every kernel, run on the CPU by the project's launcher, equals its NumPy twin; and planted faults do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpudbn import cuda, draws
from tests.cuda_on_cpu import runtime
from tests.kernel_checks import (
    CD_SIZES,
    COLUMNS,
    EPS,
    FAR,
    LARGE_TILES,
    NEAR,
    SIZES,
    SMALL_TILES,
    check_bernoulli,
    check_cd_sums,
    check_cd_update,
    check_half_step,
    check_momentum_step,
    check_sigmoid,
    check_uniforms,
)

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")


@pytest.fixture(scope="module")
def launchers():
    """Launchers that choose small and large tiles, compiled."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda unit: runtime.Module(cuda.source(unit)), cuda.UNITS))
    both = {"small": runtime.launcher(SMALL_TILES), "large": runtime.launcher(LARGE_TILES)}
    for launcher in both.values():
        launcher.compile_all()
    return both


def test_parameters_are_what_the_launcher_casts_to(launchers):
    for (unit, kernel), (function, _) in launchers["small"]._functions.items():
        codes = ["*f4" if to is cuda.POINTER else f"{np.dtype(to).kind}{np.dtype(to).itemsize}"
                 for to in cuda.KERNELS[kernel][1]]
        assert function.parameters == codes, (unit, kernel)


# ------------------------------------------------------------------------------------------------------- draws

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


def test_philox_gives_the_published_words():
    rng = np.random.default_rng(0)
    counters = np.concatenate([[v[0] for v in VECTORS], rng.integers(0, 1 << 32, (29, 4))]).astype(np.uint32)
    keys = np.concatenate([[v[1] for v in VECTORS], rng.integers(0, 1 << 32, (29, 2))]).astype(np.uint32)
    out = np.zeros((32, 4), np.uint32)
    module = runtime.Module((cuda.kernels_folder() / "philox.cuh").read_text() + WORDS)
    module.get_function("words")((1,), (32,), (out, counters, keys))
    assert out[:3].tolist() == [list(v[2]) for v in VECTORS]
    for counter, key, words in zip(counters, keys, out, strict=True):
        assert [int(word) for word in draws.philox4x32(counter, key)] == words.tolist()


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_uniforms_at_the_published_vectors(launchers, counter, key, words):
    """The index is counter words 0 and 1, the seed is the key: low and high halves are in their places."""
    out = np.empty((1, 4), np.float32)
    launchers["small"].uniforms(out, seed=key[1] << 32 | key[0], row=counter[1] << 32 | counter[0], update=counter[2],
                                site=counter[3])
    assert out.tolist() == [[(word >> 8) * EPS for word in words]]


@pytest.mark.parametrize("schedule", runtime.SCHEDULES)
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_uniforms(launchers, column, columns, schedule):
    with runtime.scheduled(schedule):
        for B, m in [(1, 1), (3, 2), (37, 131), (70, 92), (2, 2048)]:
            for address in (NEAR, FAR):
                if columns is None or column + m <= columns:
                    check_uniforms(launchers["small"], B, m, address, column, columns)
        check_uniforms(launchers["small"], 5, 8, FAR, column, columns, offset=1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
def test_bernoulli(launchers, column, columns, in_place):
    for B, m in [(1, 1), (37, 131), (70, 92)]:
        check_bernoulli(launchers["small"], B, m, FAR, column, columns, in_place)


# --------------------------------------------------------------------------------------------------- half_step


@pytest.mark.parametrize("schedule", runtime.SCHEDULES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_half_step(launchers, tiles, transpose, schedule):
    with runtime.scheduled(schedule):
        for sizes in SIZES:
            check_half_step(launchers[tiles], *sizes, transpose=transpose)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("column", "columns"), COLUMNS)
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_half_step_of_a_shard(launchers, tiles, column, columns, transpose):
    """A shard of a layer draws what the whole layer would, wherever it was cut."""
    for sizes in [(17, 31, 37), (9, 20, 64)]:
        check_half_step(launchers[tiles], *sizes, transpose=transpose, column=column, columns=columns)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_half_step_without_one_output(launchers, tiles, transpose):
    check_half_step(launchers[tiles], 17, 31, 37, transpose=transpose, sample=False)
    check_half_step(launchers[tiles], 17, 31, 37, transpose=transpose, mean=False)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_half_step_at_odd_addresses(launchers, tiles, transpose):
    """Rows are multiples of 16 bytes but do not begin at one: nothing may be read as a quad."""
    check_half_step(launchers[tiles], 17, 32, 36, transpose=transpose, offset=1)


def test_half_step_into_one_array(launchers):
    """sample and mean may be one array: the sample wins, as in the twin."""
    rng = np.random.default_rng(0)
    x, W, bias = (rng.random(shape, np.float32) for shape in ((17, 31), (31, 37), 37))
    one, s, p = (np.empty((17, 37), np.float32) for _ in range(3))
    launchers["small"].half_step(one, one, x, W, bias, **NEAR)
    launchers["small"].half_step(s, p, x, W, bias, **NEAR)
    assert np.array_equal(one, s)


def test_half_step_of_nothing(launchers):
    def empty(*shape):
        return np.empty(shape, np.float32)

    for B, m in [(0, 5), (5, 0)]:
        launchers["small"].half_step(empty(B, m), empty(B, m), empty(B, 3), empty(3, m), empty(m), **NEAR)
    p = empty(5, 3)
    launchers["small"].half_step(None, p, empty(5, 0), empty(0, 3), np.zeros(3, np.float32))  # the bias alone
    assert (p == 0.5).all()


# --------------------------------------------------------------------------------------- gradient and the step


@pytest.mark.parametrize("schedule", runtime.SCHEDULES)
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_cd_sums(launchers, tiles, schedule):
    with runtime.scheduled(schedule):
        for sizes in CD_SIZES:
            check_cd_sums(launchers[tiles], *sizes)
    check_cd_sums(launchers[tiles], 32, 36, 17, 17, offset=1)


@pytest.mark.parametrize("tiles", ["small", "large"])
def test_cd_sums_of_samples_are_exact(launchers, tiles):
    check_cd_sums(launchers[tiles], 37, 131, 41, 41, w=1.0, binary=True)


@pytest.mark.parametrize("schedule", runtime.SCHEDULES)
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_cd_update(launchers, tiles, schedule):
    with runtime.scheduled(schedule):
        for sizes in CD_SIZES[:-1]:
            check_cd_update(launchers[tiles], *sizes)
    check_cd_update(launchers[tiles], 32, 36, 17, 17, offset=1)
    check_cd_update(launchers[tiles], 37, 31, 17, 17, momentum=0.0, decay=0.0)


def test_momentum_step(launchers):
    for size, weights in [(1, 1), (1009, 900), (10007, 0), (4096, 4096)]:
        check_momentum_step(launchers["large"], size, weights)
    check_momentum_step(launchers["large"], 1009, 900, decay=0.0)


def test_momentum_step_leaves_infinite_parameters_alone_without_decay(launchers):
    parameters, velocity = np.array([np.inf, 1], np.float32), np.zeros(2, np.float32)
    launchers["large"].momentum_step(parameters, velocity, np.ones(2, np.float32), weights=2, scale=1, rate=0.5,
                                     momentum=0, decay=0)
    assert velocity.tolist() == [0.5, 0.5]


def test_sigmoid(launchers):
    check_sigmoid(launchers["small"])


@pytest.mark.parametrize("tiles", ["small", "large"])
def test_the_size_of_a_real_layer(launchers, tiles):
    check_half_step(launchers[tiles], 100, 784, 500)
    check_half_step(launchers[tiles], 100, 500, 784, transpose=True)
    check_cd_update(launchers[tiles], 784, 500, 100, 100)


# -------------------------------------------------------------------------------------------- planted faults

PRODUCT = (cuda.kernels_folder() / "product.cuh").read_text().splitlines()
BARRIERS = [line.strip() for line in PRODUCT if "__syncthreads" in line]  # told apart by their comments


def half_step_check(launcher):
    check_half_step(launcher, 17, 131, 37)
    check_half_step(launcher, 17, 131, 37, transpose=True)


def shard_check(launcher):
    check_half_step(launcher, 17, 31, 37, column=7, columns=157)


def bernoulli_check(launcher):
    check_bernoulli(launcher, 37, 131, NEAR, 0, None)


def cd_sums_check(launcher):
    check_cd_sums(launcher, 37, 131, 41, 17)


def cd_update_check(launcher):
    check_cd_update(launcher, 37, 37, 41, 17)


FAULTS = {  # name: text, what it becomes, the check that must see it, processors
    "counter: next block":
        ("(column / 4 + (u64)q)", "(column / 4 + (u64)q + 1)", half_step_check, SMALL_TILES),
    "counter: upper half of the index":
        ("(u32)(index >> 32)", "0", half_step_check, SMALL_TILES),
    "counter: start of a shard":
        ("(column / 4 + (u64)q)", "((u64)q)", shard_check, SMALL_TILES),
    "draw: <= for <":
        ("u.x < p.x", "u.x <= p.x", bernoulli_check, SMALL_TILES),
    "product: swapped index":
        ("(N == ALONG_DEPTH ? out[j][i] : out[i][j])", "out[i][j]", half_step_check, SMALL_TILES),
    "product: one term too many":
        ("k < depth ?", "k <= depth ?", cd_sums_check, SMALL_TILES),
    "product: a slice left out":
        ("for (int s = 0; s < SLICES; s++)", "for (int s = 1; s < SLICES; s++)", cd_sums_check, SMALL_TILES),
    "product: tail not guarded":
        ("0 <= i && i < size ? row[i] : 0.0f", "row[i]", half_step_check, SMALL_TILES),
    "half_step: bias one off":
        ("load_quad(bias, j, m, false)", "load_quad(bias, j + 1, m, false)", half_step_check, LARGE_TILES),
    "cd_update: sign":
        (": -model_weight", ": model_weight", cd_update_check, SMALL_TILES),
    "cd_update: biases exchanged":
        ("(visible ? p.b : p.c)[i]", "(visible ? p.c : p.b)[i]", cd_update_check, LARGE_TILES),
}
FAULTS |= {f"product: no barrier, {line.partition('// ')[2]}": (line, "", half_step_check, SMALL_TILES)
           for line in BARRIERS}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    text, becomes, check, processors = FAULTS[fault]
    found = []

    def change(code):
        found.append(code.count(text))
        return code.replace(text, becomes)

    launcher = runtime.launcher(processors, change)

    def is_seen(schedule):
        with runtime.scheduled(schedule):
            try:
                check(launcher)
            except (AssertionError, runtime.KernelError):
                return True
        return False

    assert any(is_seen(schedule) for schedule in runtime.SCHEDULES)
    assert found == [1], "the text of the fault must occur once"
