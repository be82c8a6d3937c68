"""``persistent.cu``: a run of updates in one launch is the same function as the updates one by one."""

from __future__ import annotations

import copy
import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest

from benchmarks.persistent import counts
from gpudbn import cuda, reference
from gpudbn.cuda import persistent
from gpudbn.draws import Purpose, site, uniforms
from gpudbn.rbm import RBM, Contrast, Estimator
from tests.cuda.checks import ON_CPU, ON_GPU, ONE_SCHEDULE, Arrays, sees_fault
from tests.cuda.test_compile import BUDGET
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close

H200 = {"processors": 132, "shared_memory": 227 << 10}
SURE = 1e-5  # a draw that is as far from its probability is the same whatever the rounding


@pytest.fixture
def tiles():
    """The kernel has one size of tiles."""
    return "small"


@dataclass(frozen=True)
class Case:
    """A run: sizes, estimator, step."""

    n: int = 37
    m: int = 29
    batch: int = 10
    rows: int = 25  # two minibatches and a short one
    C: int = 0  # chains; 0 for CD
    k: int = 1
    last_hidden: str = "mean"
    levels: int | None = 1
    momentum: float = 0.9
    decay: float = 1e-2
    rate: float = 0.25
    seed: int = 2**40 + 7

    def start(self):
        """Parameters, velocity, v, chains."""
        rng = np.random.default_rng([self.n, self.m, self.batch])
        p = np.concatenate([rng.normal(0, 1 / np.sqrt(self.n), self.n * self.m), rng.normal(0, 0.5, self.n + self.m)])
        v = rng.random((self.rows, self.n))
        if self.levels:
            v = np.rint(self.levels * np.where(v < 0.5, v, v**3)) / self.levels
        chains = (rng.random((self.C, self.m)) < 0.4).astype(np.float32) if self.C else None
        return p.astype(np.float32), rng.normal(0, 1e-2, p.size).astype(np.float32), v.astype(np.float32), chains

    def options(self):
        """The keywords of ``cd_run`` but ``chains``."""
        return {"batch": self.batch, "k": self.k, "last_hidden": self.last_hidden, "levels": self.levels,
                "seed": self.seed, "update": 2**32 - 9, "layer": 3, "row": 2**33 + 3, "chain_row": 11,
                "rate": self.rate, "momentum": self.momentum, "decay": self.decay}


def exact(case, p, u, v, chains):
    """The same by float64 and from the formulas: parameters, velocity, chains, and how sure the draws were."""
    n, m, B, o = case.n, case.m, case.batch, case.options()
    p, u, sure = p.astype(np.float64), u.astype(np.float64), 1.0
    v = np.rint(v * case.levels) / case.levels if case.levels else reference.as_half(v).astype(np.float64)

    def half_step(x, W, bias, number, purpose, half, row):
        nonlocal sure
        mean = 1 / (1 + np.exp(-(x @ W + bias)))
        drawn = uniforms(np.empty(mean.shape, np.float32), seed=case.seed, update=o["update"] + number,
                         site=site(purpose, o["layer"], half), row=row)
        sure = min(sure, np.abs(drawn - mean).min())
        return (drawn < mean).astype(np.float64), mean

    for number, lo in enumerate(range(0, len(v), B)):
        W, b, c = p[: n * m].reshape(n, m), p[n * m : n * m + n], p[n * m + n :]
        v0 = v[lo : lo + B]
        h0, _ = half_step(v0, W, c, number, Purpose.CD, 0, o["row"])
        purpose, row = (Purpose.CD, o["row"]) if chains is None else (Purpose.CHAIN, o["chain_row"])
        h = h0 if chains is None else chains
        for step in range(case.k):
            vk, _ = half_step(h, W.T, b, number, purpose, 2 * step + 1, row)
            h, mean = half_step(vk, W, c, number, purpose, 2 * step + 2, row)
        if chains is not None:
            chains = h
        hk = reference.as_half(mean.astype(np.float32)) if case.last_hidden == "mean" else h
        w = 1 if chains is None else len(v0) / len(chains)
        gradient = np.concatenate([(v0.T @ h0 - w * vk.T @ hk).ravel(), v0.sum(0) - w * vk.sum(0),
                                   h0.sum(0) - w * hk.sum(0)]) / len(v0)
        decaying = np.where(np.arange(p.size) < n * m, p, 0)
        u = case.momentum * u + case.rate * (gradient - case.decay * decaying)
        p = p + u
    return p, u, chains, sure


def sure_case(case):
    """The case with a seed of which no draw is close to its probability, and what is right then."""
    for seed in range(case.seed, case.seed + 100):
        case = replace(case, seed=seed)
        *right, sure = exact(case, *case.start())
        if sure > SURE:
            return case, right
    raise AssertionError("no seed is sure")


def with_blocks(launcher, blocks):
    """The launcher, believing in so many multiprocessors."""
    launcher = copy.copy(launcher)
    launcher.processors, launcher.shared_memory = blocks, H200["shared_memory"]
    return launcher


def run(launcher, case, p, u, v, chains, **options):
    """What ``cd_run`` makes of copies: parameters, velocity, chains."""
    arrays = Arrays(launcher)
    p, u, v = (arrays.put(a) for a in (p, u, v))
    chains = None if chains is None else arrays.put(chains)
    launcher.cd_run(p, u, v, case.n, case.m, chains=chains, **case.options() | options)
    return arrays.get(p), arrays.get(u), None if chains is None else arrays.get(chains)


def check(launcher, blocks=5, **sizes):
    case, (p, u, chains) = sure_case(Case(**sizes))
    got = run(with_blocks(launcher, blocks) if blocks else launcher, case, *case.start())
    # a mean that is close to the middle of two float16 may become the one or the other: they are 2^-11 apart at most
    rounding = 2e-6 + (case.last_hidden == "mean") * case.rate / case.batch * 2.0**-11
    assert_close(got[1], u, atol=rounding)
    assert_close(got[0], p, atol=2 * rounding)
    if chains is not None:
        assert np.array_equal(got[2], chains)
    Arrays(launcher).passed("cd_run")


# --------------------------------------------------------------------------------------------- the specification

CASES = [
    {"last_hidden": "sample"},
    {"k": 3},
    {"C": 13, "k": 2},
    {"C": 7, "last_hidden": "sample"},
    {"levels": 255},
    {"levels": None, "last_hidden": "sample"},
    {"momentum": 0.0, "decay": 0.0},
    {"n": 3, "m": 53, "batch": 37, "rows": 37},  # more blocks than visible units
    {"n": 131, "m": 16, "batch": 101, "rows": 202, "levels": 255},  # a tile and more in a block; whole minibatches
    {"levels": None, "n": 67, "batch": 70, "rows": 70},
    {"n": 7, "m": 900, "batch": 3, "rows": 5},  # more inputs than are fetched at once
    {"n": 301, "m": 5, "batch": 3, "rows": 5, "levels": 255},
    {"n": 1, "m": 1, "batch": 1, "rows": 2},
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_twin_is_the_formulas(sizes):
    case, (p, u, chains) = sure_case(Case(**sizes))
    *got, v, chain = case.start()
    reference.cd_run(*got, v, case.n, case.m, chains=chain, **case.options())
    assert_close(got[1], u, atol=1e-4 * case.rate)
    assert_close(got[0], p, atol=2e-4 * case.rate)
    if chains is not None:
        assert np.array_equal(chain, chains)


@pytest.mark.parametrize("C", [0, 13])
def test_the_twin_is_what_training_does(C):
    """The same bits as an update after the other, where no mean is rounded."""
    case = Case(C=C, k=2, last_hidden="sample")
    p, u, v, chains = case.start()
    o = case.options()
    twin = p.copy(), u.copy()
    twin_chains = None if chains is None else chains.copy()
    reference.cd_run(*twin, v, case.n, case.m, chains=twin_chains, **o)

    rbm = RBM(case.n, case.m)
    rbm.parameters.flat[...] = p
    contrast = Contrast(rbm, case.batch, Estimator("pcd" if C else "cd", case.k, "sample", "sample", "sample"),
                        seed=case.seed, layer=o["layer"], chains=chains)
    for number, lo in enumerate(range(0, case.rows, case.batch)):
        rows = min(case.batch, case.rows - lo)
        contrast.v[:rows] = v[lo : lo + rows]
        both = contrast.fill(rows, update=o["update"] + number, row=o["row"], chains=slice(C), chain_row=o["chain_row"])
        reference.cd_update(rbm.parameters.flat, u, np.empty_like(p), case.n, case.m, *both, rows,
                            model_weight=rows / C if C else 1.0, rate=case.rate, momentum=case.momentum,
                            decay=case.decay)
    assert np.array_equal(rbm.parameters.flat, twin[0])
    assert np.array_equal(u, twin[1])
    assert C == 0 or np.array_equal(chains, twin_chains)


def test_as_half():
    p = np.random.default_rng(0).random(1000, np.float32) ** 4
    rounded = reference.as_half(p)
    assert (rounded * 2**16 == np.rint(rounded * 2**16)).all()
    assert (np.abs(rounded - p) <= 2.0**-11 * p + 2.0**-17).all()
    every = reference.as_half(np.arange(257, dtype=np.float32) / 256)
    assert np.array_equal(every, np.arange(257) / 256)


# -------------------------------------------------------------------------------------------------- the kernel


@ONE_SCHEDULE
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_cd_run(launcher, sizes):
    check(launcher, **sizes)


@pytest.mark.parametrize("blocks", [1, 8])
def test_cd_run_whatever_the_order_of_threads(launcher, blocks):
    check(launcher, blocks, k=2)
    check(launcher, blocks, C=11, rows=10)


@ONE_SCHEDULE
@pytest.mark.parametrize("sizes", [{}, {"C": 13, "k": 2}, {"momentum": 0.0, "levels": 255}], ids=str)
def test_two_launches_are_one(launcher, sizes):
    """To the last bit, also on another number of blocks: nothing is kept on the chip that is not in the arrays."""
    case = replace(Case(**sizes), rows=60)
    p, u, v, chains = case.start()
    whole = run(with_blocks(launcher, 5), case, p, u, v, chains)
    half = run(with_blocks(launcher, 5), case, p, u, v[:30], chains)
    update = case.options()["update"] + 3
    for blocks in (5, 7):
        both = run(with_blocks(launcher, blocks), case, *half[:2], v[30:], half[2], update=update)
        for a, b in zip(whole, both, strict=True):
            assert (a is b is None) or np.array_equal(a, b)


@ON_GPU
@pytest.mark.parametrize("sizes", [{}, {"last_hidden": "sample"}, {"levels": 255}, {"C": 100, "k": 3},
                                   {"m": 2000, "batch": 128}, {"m": 2000, "batch": 128, "momentum": 0.0}], ids=str)
def test_cd_run_of_real_layers(launcher, sizes):
    """On all multiprocessors; one update, since in a long run some draw is close to its probability."""
    rows, launcher.processors = sizes.get("batch", 100), cuda.gpu().processors
    if not launcher.cd_run_fits(784, sizes.get("m", 500), rows, momentum=sizes.get("momentum", 0.9) != 0):
        pytest.skip("the layer does not fit on this device")
    check(launcher, None, **{"n": 784, "m": 500, "batch": 100, "rows": rows} | sizes)


# ------------------------------------------------------------------------------------------------ what fits


def fits(n, m, momentum, processors, shared_memory):
    return persistent.shared_bytes(n, m, processors, momentum=momentum) <= shared_memory


def largest(n, momentum, device):
    """The most hidden units that fit beside n visible ones."""
    m = 0
    while fits(n, m + 1, momentum, **device):
        m += 1
    return m


def test_what_fits():
    a100, small = {"processors": 108, "shared_memory": 163 << 10}, {"processors": 46, "shared_memory": 99 << 10}
    assert fits(784, 500, True, **H200)
    assert fits(784, 2000, True, **H200)
    assert fits(784, 1500, True, **a100)
    assert not fits(4096, 4096, False, **H200)
    table = {(784, True): 2959, (784, False): 4488, (2000, True): 1151, (500, True): 4620}
    assert {key: largest(*key, H200) for key in table} == table
    assert (largest(784, True, a100), largest(784, True, small)) == (1620, 414)


def test_shared_memory_of_the_kernel_itself_is_counted():
    assert BUDGET["persistent"]["cd_run"]["shared"] <= persistent.OWN


@ON_CPU
def test_refusals(launcher):
    case = Case()
    p, u, v, _ = case.start()
    launcher = with_blocks(launcher, 5)

    def refused(message, *, what=ValueError, p=p, u=u, v=v, **options):
        with pytest.raises(what, match=message):
            launcher.cd_run(p, u, v, case.n, case.m, **case.options() | {"chains": None} | options)

    refused("cd_run: batch and chains must be at most 128; got 129 and 129", batch=129)
    refused("cd_run: batch and chains must be at most 128; got 10 and 130", chains=np.zeros((130, case.m), np.float32))
    refused("must be positive", k=0)
    refused("must be positive", v=v[:0])
    refused("last_hidden must be sample or mean; got maybe", last_hidden="maybe")
    refused("levels must lie between 1 and 255; got 256", levels=256)
    refused("seed and index must lie in", update=2**32 - 2)
    refused("half_step below 65536", k=2**15)
    refused("v must be C-contiguous", v=v[:, :-1])
    refused("parameters must not share memory with velocity", u=p)
    launcher.shared_memory = 15_000
    refused(r"a layer of 37 x 29 with momentum must fit the chip; got \d+ bytes of shared memory for each of 5")


@ON_CPU
def test_another_grid_is_refused_by_the_kernel(launcher):
    """CuPy makes a cooperative grid smaller where it does not fit, and only warns."""
    case = Case()
    launcher = with_blocks(launcher, 5)
    launch = launcher._launch
    launcher._launch = lambda unit, kernel, _, *rest, **more: launch(unit, kernel, (4,), *rest, **more)
    with pytest.raises(runtime.KernelError, match="stopped itself"):
        run(launcher, case, *case.start())


COUNTED = 'extern "C" __attribute__((visibility("default"))) int barriers = 0;\n'
COUNTING = "{ grid.sync(); if (blockIdx.x + threadIdx.x == 0) barriers++; }"


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
@pytest.mark.parametrize("sizes", [{}, {"k": 3, "last_hidden": "sample"}, {"k": 2, "C": 7}], ids=str)
def test_a_minibatch_has_two_barriers_of_the_grid_a_step(sizes, monkeypatch):
    """And there is one more before the first; benchmarks/counts.py counts with that."""
    counters, true = [], runtime.Module

    def module(*args, **options):
        made = true(*args, **options)
        counters.append(ctypes.c_int.in_dll(made.library, "barriers"))
        counters[-1].value = 0  # the library is that of the case before
        return made

    monkeypatch.setattr(runtime, "Module", module)
    launcher = runtime.launcher(change=lambda code: COUNTED + code.replace("grid.sync();", COUNTING))
    case = Case(**sizes)
    run(with_blocks(launcher, 5), case, *case.start())
    assert [one.value for one in counters] == [1 + 3 * 2 * case.k]
    assert counts(case.n, case.m, case.batch, case.k)["barriers"] == 2 * case.k


# -------------------------------------------------------------------------------------------- planted faults


def fault_check(launcher):
    check(launcher, k=2, rows=20)


def short_check(launcher):
    check(launcher, last_hidden="sample")


FAULTS = {  # name: text, what it becomes, the check that must see it
    "no barrier before vk is read": ("grid.sync();  // vk is there", "", fault_check),
    "no barrier before h0 is read":
        ("grid.sync();  // h0 is there, and so are the weights of the minibatch before", "", fault_check),
    "no barrier between step and product":
        ("__syncthreads();  // the weights are there, the slots have been read", "", fault_check),
    "slab: other weights": ("unit * stride + input + 8 * i", "unit * stride + input + 4 * i", fault_check),
    "slab: biases of the first block": ("biases + first + unit;", "biases + unit;", fault_check),
    "counter: next update": ("first_update + minibatch,", "first_update + minibatch + 1,", fault_check),
    "old weights of the rows": ("if (t > 0) visible.fetch", "if (t > 1) visible.fetch", fault_check),
    "weights are used before they are there": ("        cp_async_wait<0>();", "", fault_check),
    "a short minibatch as a whole one": ("row < rows && u[i] < p", "u[i] < p", short_check),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(fault):
    assert sees_fault(*FAULTS[fault])
