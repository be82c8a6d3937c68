"""The kernels on a GPU, beside the same formulas in plain CuPy and in PyTorch: microseconds and what they reach.

    python -m benchmarks.kernels --out kernels.json      needs a GPU; with PyTorch if it is there
    python -m benchmarks.kernels --rehearse --out F      the same code at toy sizes without one: its times mean nothing
    compute-sanitizer python -m benchmarks.kernels --small --out F      at toy sizes on a GPU

Everyone's results are held to a float64 reference first; what fails is not timed. A sample is a stretch
of at least a millisecond of calls one after the other between two CUDA events, divided by their number:
where launching is slower than the kernel, it is the launching that is seen, but for the rows "in a graph",
in which the host has no part. All arithmetic is float32 unless a row names a precision: then its products are
of rounded operands, and what is right is computed from these.

The file is written after every measurement. ``--environment`` and ``--table`` are for ``on_gpu.sh``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import transports
from gpudbn.precision import TENSOR_CORES, bf16, bf16_parts, tf32

ROOT = Path(__file__).parent.parent
CASES = [(784, 500, 100), (784, 2000, 128), (4096, 4096, 1024)]  # n, m, B
TOY = [(13, 7, 5), (37, 67, 11)]
PARTS = ("updates", "mpi", "kernels", "large", "memcheck", "racecheck")  # files of results, in the order of the page
RATE, MOMENTUM, DECAY = 0.05, 0.9, 2e-4
SITES = {"h0": 4 << 24, "v1": 4 << 24 | 1, "h1": 4 << 24 | 2}
NEAR = {"seed": 7, "update": 3, "row": 0}
repeats = 20  # samples of each measurement, and launches in a graph
SURE = 1e-6  # a draw must agree with its probability where they are farther apart
SURE_ROUNDED = 5e-5  # the same of sums by tensor cores


class Work(NamedTuple):
    """Something to be timed: what it is, the call, and a check that is run once after one call."""

    what: str
    call: Callable[[], None]
    check: Callable[[], None]


class Case:
    """One layer and batch: its data on the host, and what is right, in float64, of operands as they are rounded."""

    def __init__(self, n: int, m: int, B: int, precision: str = "fp32") -> None:
        self.n, self.m, self.B, self.precision = n, m, B, precision
        self.product = "float32 TFLOP/s" if precision == "fp32" else "float16 TFLOP/s"  # the ceiling of products
        self.sure = SURE if precision == "fp32" else SURE_ROUNDED
        rng = np.random.default_rng([n, m, B])
        self.v = (rng.random((2 * B, n), np.float32) < 0.3).astype(np.float32)
        self.h = (rng.random((2 * B, m), np.float32) < 0.4).astype(np.float32)
        self.p = np.concatenate([rng.normal(0, 0.5 / np.sqrt(n), n * m), rng.normal(0, 0.5, n + m)]).astype(np.float32)
        self.u = rng.normal(0, 1e-3, self.p.size).astype(np.float32)
        _, b, c = self.split(self.p.astype(np.float64))
        W = self.weights()
        self.up = 1 / (1 + np.exp(-(self.v[:B] @ W + c)))
        self.down = 1 / (1 + np.exp(-(self.h[:B] @ W.T + b)))
        self.sums = self.exact_sums(self.v, self.h)

    def split(self, flat: Any) -> tuple[Any, Any, Any]:
        """W, b, c as views."""
        n, m = self.n, self.m
        return flat[: n * m].reshape(n, m), flat[n * m : n * m + n], flat[n * m + n :]

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """What is multiplied with zeros and ones, in float64."""
        if self.precision == "bf16x2":
            high, low = bf16_parts(x)
            return high.astype(np.float64) + low
        rounded = {"bf16": bf16, "tf32": tf32}.get(self.precision, np.asarray)
        return rounded(x).astype(np.float64)

    def weights(self) -> np.ndarray:
        """W as it is rounded."""
        return self.rounded(self.split(self.p)[0])

    def exact_sums(self, v: np.ndarray, h: np.ndarray) -> np.ndarray:
        """dW, db, dc end to end."""
        v, h, B = self.rounded(v), self.rounded(h), self.B
        return np.concatenate([(v[:B].T @ h[:B] - v[B:].T @ h[B:]).ravel(), v[:B].sum(0) - v[B:].sum(0),
                               h[:B].sum(0) - h[B:].sum(0)])

    def check_step(self, parameters: np.ndarray, velocity: np.ndarray, sums: np.ndarray) -> None:
        """Parameters and velocity after one step from p and u with these sums."""
        p, u = self.p.astype(np.float64), self.u.astype(np.float64)
        decaying = np.where(np.arange(p.size) < self.n * self.m, p, 0)
        u = MOMENTUM * u + RATE * (sums / self.B - DECAY * decaying)
        close("velocity", velocity, u, 1e-6)
        close("parameters", parameters, p + u, 2e-6)

    def check_update(self, v: np.ndarray, h: np.ndarray, parameters: np.ndarray, velocity: np.ndarray,
                     draws: tuple[np.ndarray | None, np.ndarray | None] = (None, None)) -> None:
        """A whole update from p and u, link by link: h0 of v0, v1 of h0, h1 of v1, the step of all four."""
        B, W, (_, b, c) = self.B, self.weights(), self.split(self.p.astype(np.float64))
        check_sample("h0", h[:B], self.up, draws[0], self.sure)
        check_sample("v1", v[B:], 1 / (1 + np.exp(-(h[:B] @ W.T + b))), draws[1], self.sure)
        close("h1", h[B:], 1 / (1 + np.exp(-(v[B:] @ W + c))), max(1e-5, self.sure))
        self.check_step(parameters, velocity, self.exact_sums(v, h))

    def cost(self, what: str) -> tuple[int, int]:
        """Floating-point operations, and bytes that must move if everything is read and written once."""
        n, m, B = self.n, self.m, self.B
        half = 2 * B * n * m, 4 * (n * m + B * (n + m) + m)
        sums = 4 * B * n * m, 4 * (2 * B * (n + m) + n * m + n + m)
        step = 4 * B * n * m, 4 * (2 * B * (n + m) + 4 * (n * m + n + m))
        return {"half_step": half, "half_step, transposed": half, "cd_sums": sums, "cd_update": step,
                "CD-1 update": (3 * half[0] + step[0], 3 * half[1] + step[1])}[what]


def close(what: str, got: np.ndarray, expected: np.ndarray, error: float) -> None:
    """|got - expected| <= error (1 + |expected|), everywhere."""
    worst = float(np.max(np.abs(got - expected) / (1 + np.abs(expected))))
    if not worst <= error:  # also NaN
        raise ArithmeticError(f"{what}: must be within {error:.1g}; got {worst:.3g}")


def check_sample(what: str, sample: np.ndarray, p: np.ndarray, u: np.ndarray | None = None,
                 sure: float = SURE) -> None:
    """Zeros and ones, by these draws, or at least in such numbers as these probabilities make."""
    if not np.isin(sample, (0, 1)).all():
        raise ArithmeticError(f"{what}: must be 0 and 1")
    if u is not None:
        wrong = int(((sample != (u < p)) & (np.abs(u - p) > sure)).sum())
        if wrong:
            raise ArithmeticError(f"{what}: must be the draws'; got {wrong} others")
    elif abs(float(sample.sum()) - p.sum()) > 6 * np.sqrt((p * (1 - p)).sum()) + 1:
        raise ArithmeticError(f"{what}: must have mean {p.mean():.4f}; got {sample.mean():.4f}")


# --------------------------------------------------------------------------------------------- the contenders


def by_kernels(case: Case, xp: Any, launcher: Any) -> Iterator[Work]:
    """Ours. What is rounded is multiplied by tensor cores."""
    from gpudbn.draws import uniforms

    n, m, B, precision = case.n, case.m, case.B, case.precision
    v, h, parameters, velocity = (xp.asarray(a) for a in (case.v, case.h, case.p, case.u))
    (W, b, c), first, second = case.split(parameters), {**NEAR, "site": SITES["h0"]}, {**NEAR, "site": SITES["v1"]}
    up, down = xp.empty((B, m), np.float32), xp.empty((B, n), np.float32)

    def drawn(shape: tuple[int, int], address: dict[str, int]) -> np.ndarray:
        return uniforms(np.empty(shape, np.float32), **address)

    yield Work("half_step", lambda: launcher.half_step(up, None, v[:B], W, c, precision=precision, **first),
               lambda: check_sample("h", up.get(), case.up, drawn(up.shape, first), case.sure))
    yield Work("half_step, transposed",
               lambda: launcher.half_step(down, None, h[:B], W, b, transpose=True, precision=precision, **second),
               lambda: check_sample("v", down.get(), case.down, drawn(down.shape, second), case.sure))

    def step() -> None:
        launcher.cd_update(parameters, velocity, None, n, m, v, h, B, rate=RATE, momentum=MOMENTUM, decay=DECAY,
                           precision=precision)

    sums = xp.empty_like(parameters)
    parts = case.split(sums)
    yield Work("cd_sums", lambda: launcher.cd_sums(*parts, v, h, B, precision=precision),
               lambda: close("sums", sums.get(), case.sums, 1e-5))
    yield Work("cd_update", step, lambda: case.check_step(parameters.get(), velocity.get(), case.sums))
    parameters[...], velocity[...] = xp.asarray(case.p), xp.asarray(case.u)

    def update() -> None:
        launcher.half_step(h[:B], None, v[:B], W, c, precision=precision, **first)
        launcher.half_step(v[B:], None, h[:B], W, b, transpose=True, precision=precision, **second)
        launcher.half_step(None, h[B:], v[B:], W, c, precision=precision)
        step()

    yield Work("CD-1 update", update,
               lambda: case.check_update(v.get(), h.get(), parameters.get(), velocity.get(),
                                         (drawn(up.shape, first), drawn(down.shape, second))))


def by_exact(case: Case, xp: Any, launcher: Any) -> Iterator[Work]:
    """Ours in exact mode: held to the bits of the NumPy twins, nothing less."""
    from gpudbn import reference

    n, m, B = case.n, case.m, case.B
    exact, step = {"precision": "exact"}, {"rate": RATE, "momentum": MOMENTUM, "decay": DECAY}
    names = "v", "h", "parameters", "velocity", "sums"

    def up(f: Any, v: Any, h: Any, p: Any, *_: Any) -> None:
        f.half_step(h[:B], None, v[:B], case.split(p)[0], case.split(p)[2], **NEAR, site=SITES["h0"], **exact)

    def down(f: Any, v: Any, h: Any, p: Any, *_: Any) -> None:
        f.half_step(v[B:], None, h[:B], *case.split(p)[:2], transpose=True, **NEAR, site=SITES["v1"], **exact)

    def add_up(f: Any, v: Any, h: Any, *others: Any) -> None:
        f.cd_sums(*case.split(others[-1]), v, h, B, **exact)

    def apply(f: Any, v: Any, h: Any, p: Any, u: Any, sums: Any) -> None:
        f.cd_update(p, u, sums, n, m, v, h, B, **step, **exact)

    def update(f: Any, v: Any, h: Any, p: Any, u: Any, sums: Any) -> None:
        up(f, v, h, p)
        down(f, v, h, p)
        f.half_step(None, h[B:], v[B:], case.split(p)[0], case.split(p)[2], **exact)
        apply(f, v, h, p, u, sums)

    for what, call in {"half_step": up, "half_step, transposed": down, "cd_sums": add_up, "cd_update": apply,
                       "CD-1 update": update}.items():
        here = [a.copy() for a in (case.v, case.h, case.p, case.u, np.zeros_like(case.p))]
        there = [xp.asarray(a) for a in here]

        def same(call: Any = call, here: Any = here, there: Any = there) -> None:
            call(reference, *here)
            written = names[:-1] if call in (apply, update) else names  # those two have their sums in registers
            for name, a, b in zip(written, here, there, strict=False):
                if not np.array_equal(a, b.get()):
                    raise ArithmeticError(f"{name}: must have the bits of the NumPy twin; got others")

        yield Work(what, lambda call=call, there=there: call(launcher, *there), same)  # type: ignore[misc]


def by_cupy(case: Case, xp: Any) -> Iterator[Work]:
    """Plain CuPy: cuBLAS and elementwise kernels, outputs allocated beforehand."""
    n, m, B = case.n, case.m, case.B
    v, h, parameters, velocity = (xp.asarray(a) for a in (case.v, case.h, case.p, case.u))
    W, b, c = case.split(parameters)
    up, down, p_up, p_down = (xp.empty((B, size), np.float32) for size in (m, n, m, n))
    sums, work = xp.empty_like(parameters), xp.empty((n, m), np.float32)
    dW, db, dc = case.split(sums)

    def half(sample: Any, mean: Any, x: Any, weights: Any, bias: Any) -> None:
        xp.matmul(x, weights, out=mean)
        mean += bias
        xp.negative(mean, out=mean)
        xp.exp(mean, out=mean)
        xp.add(mean, np.float32(1), out=mean)
        xp.divide(np.float32(1), mean, out=mean)
        if sample is not None:
            xp.less(xp.random.random(mean.shape, dtype=np.float32), mean, out=sample)

    def add_up() -> None:
        xp.matmul(v[:B].T, h[:B], out=dW)
        xp.matmul(v[B:].T, h[B:], out=work)
        xp.subtract(dW, work, out=dW)
        for out, x in ((db, v), (dc, h)):
            xp.sum(x[:B], axis=0, out=out)
            out -= xp.sum(x[B:], axis=0)

    def step() -> None:
        add_up()
        xp.multiply(velocity, np.float32(MOMENTUM), out=velocity)
        xp.multiply(sums, np.float32(RATE / B), out=sums)
        xp.add(velocity, sums, out=velocity)
        xp.multiply(W, np.float32(RATE * DECAY), out=work)
        weights = velocity[: n * m].reshape(n, m)
        weights -= work
        xp.add(parameters, velocity, out=parameters)

    def update() -> None:
        half(h[:B], p_up, v[:B], W, c)
        half(v[B:], p_down, h[:B], W.T, b)
        half(None, h[B:], v[B:], W, c)
        step()

    def check_half(mean: Any, sample: Any, expected: np.ndarray) -> None:
        close("probabilities", mean.get(), expected, 1e-5)
        check_sample("sample", sample.get(), expected)

    yield Work("half_step", lambda: half(up, p_up, v[:B], W, c), lambda: check_half(p_up, up, case.up))
    yield Work("half_step, transposed", lambda: half(down, p_down, h[:B], W.T, b),
               lambda: check_half(p_down, down, case.down))
    yield Work("cd_sums", add_up, lambda: close("sums", sums.get(), case.sums, 1e-5))
    yield Work("cd_update", step, lambda: case.check_step(parameters.get(), velocity.get(), case.sums))
    parameters[...], velocity[...] = xp.asarray(case.p), xp.asarray(case.u)
    yield Work("CD-1 update", update,
               lambda: case.check_update(v.get(), h.get(), parameters.get(), velocity.get()))


def by_torch(case: Case, torch: Any, device: str) -> Iterator[Work]:
    """PyTorch by hand, eager, in place where it can be."""
    n, m, B = case.n, case.m, case.B
    v, h, parameters, velocity = (torch.tensor(a, device=device) for a in (case.v, case.h, case.p, case.u))
    W, b, c = case.split(parameters)
    uW = case.split(velocity)[0]
    up, down, p_up, p_down = (torch.empty((B, size), device=device) for size in (m, n, m, n))
    sums = torch.empty_like(parameters)
    dW, db, dc = case.split(sums)

    def half(sample: Any, mean: Any, x: Any, weights: Any, bias: Any) -> None:
        torch.addmm(bias, x, weights, out=mean).sigmoid_()
        if sample is not None:
            torch.bernoulli(mean, out=sample)

    def add_up() -> None:
        torch.mm(v[:B].T, h[:B], out=dW)
        dW.addmm_(v[B:].T, h[B:], alpha=-1)
        for out, x in ((db, v), (dc, h)):
            torch.sum(x[:B], 0, out=out)
            out.sub_(x[B:].sum(0))

    def step() -> None:
        add_up()
        velocity.mul_(MOMENTUM).add_(sums, alpha=RATE / B)
        uW.add_(W, alpha=-RATE * DECAY)
        parameters.add_(velocity)

    def update() -> None:
        half(h[:B], p_up, v[:B], W, c)
        half(v[B:], p_down, h[:B], W.T, b)
        half(None, h[B:], v[B:], W, c)
        step()

    def get(x: Any) -> np.ndarray:
        found: np.ndarray = x.cpu().numpy()
        return found

    def check_half(mean: Any, sample: Any, expected: np.ndarray) -> None:
        close("probabilities", get(mean), expected, 1e-5)
        check_sample("sample", get(sample), expected)

    yield Work("half_step", lambda: half(up, p_up, v[:B], W, c), lambda: check_half(p_up, up, case.up))
    yield Work("half_step, transposed", lambda: half(down, p_down, h[:B], W.T, b),
               lambda: check_half(p_down, down, case.down))
    yield Work("cd_sums", add_up, lambda: close("sums", get(sums), case.sums, 1e-5))
    yield Work("cd_update", step, lambda: case.check_step(get(parameters), get(velocity), case.sums))
    parameters.copy_(torch.tensor(case.p))
    velocity.copy_(torch.tensor(case.u))
    yield Work("CD-1 update", update,
               lambda: case.check_update(get(v), get(h), get(parameters), get(velocity)))


# ------------------------------------------------------------------------------------------------ measuring


def timed(xp: Any, call: Callable[[], None], *, stream: Any = None, least: float = 1.0,
          divided: int = 1) -> dict[str, float]:
    """Microseconds of one call: median, smallest and largest of ``repeats`` samples of at least ``least`` ms."""
    start, end = xp.cuda.Event(), xp.cuda.Event()

    def sample(calls: int) -> float:
        start.record(stream)
        for _ in range(calls):
            call()
        end.record(stream)
        end.synchronize()
        return float(xp.cuda.get_elapsed_time(start, end))

    sample(3)
    calls = max(1, min(1000, int(least / max(sample(3) / 3, 1e-4)) + 1))
    sample(calls)
    found = sorted(1000 * sample(calls) / calls / divided for _ in range(repeats))
    return {"median_us": statistics.median(found), "min_us": found[0], "max_us": found[-1], "samples": repeats,
            "calls": calls * divided}


def in_a_graph(xp: Any, call: Callable[[], None]) -> dict[str, float]:
    """The same with the calls in a CUDA graph, so that the host has no part in it."""
    xp.cuda.Device().synchronize()  # that stream does not wait for what others have to do
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        for _ in range(repeats):
            call()
        graph = stream.end_capture()
        found = timed(xp, lambda: graph.launch(stream), stream=stream, divided=repeats)
        stream.synchronize()
    return found


def ceilings(xp: Any, torch: Any, toy: bool) -> dict[str, float]:
    """What this GPU reaches through libraries: TFLOP/s of a large product, TB/s of a large copy (read and written)."""
    size, entries = (64, 1 << 12) if toy else (8192, 1 << 28)
    rng = np.random.default_rng(0)
    a, b = (xp.asarray(rng.random((size, size), np.float32)) for _ in range(2))
    out = xp.empty_like(a)
    flops = 2e-6 * size**3
    found = {"float32 TFLOP/s": flops / timed(xp, lambda: xp.matmul(a, b, out=out))["median_us"]}
    half_a, half_b, half_out = (x.astype(np.float16) for x in (a, b, out))
    found["float16 TFLOP/s"] = flops / timed(xp, lambda: xp.matmul(half_a, half_b, out=half_out))["median_us"]
    source, target = xp.zeros(entries, np.float32), xp.empty(entries, np.float32)
    found["copy TB/s"] = 8e-6 * entries / timed(xp, lambda: xp.copyto(target, source))["median_us"]
    if torch is not None and not toy:
        x, y = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        z = torch.empty_like(x)
        found["bfloat16 TFLOP/s (PyTorch)"] = flops / timed(xp, lambda: torch.mm(x, y, out=z))["median_us"]
    return found


class Results:
    """The file: written anew after every measurement."""

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        self.out, self.content, self.failed = out, {**head, "ceilings": {}, "rows": [], "failures": []}, 0

    def write(self) -> None:
        self.out.write_text(json.dumps(self.content, indent=1) + "\n")

    @contextlib.contextmanager
    def attempt(self, **what: Any) -> Iterator[None]:
        """What fails is noted, and the rest goes on."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            self.content["failures"].append({**what, "error": f"{type(error).__name__}: {error}"[:2000]})
            print(f"FAILED {what}: {error}", file=sys.stderr, flush=True)
        self.write()

    def add(self, case: Any, by: str, what: str, times: dict[str, float], **more: Any) -> None:
        flops, nbytes = case.cost(what)
        tflops, tbs = 1e-6 * flops / times["median_us"], 1e-6 * nbytes / times["median_us"]
        best = self.content["ceilings"]
        row = {"what": what, "n": case.n, "m": case.m, "B": case.B, "by": by, **times, "tflops": tflops, "tb_s": tbs,
               "of_product": tflops / best[case.product] if best else None,
               "of_copy": tbs / best["copy TB/s"] if best else None, **more}
        self.content["rows"].append(row)
        print(f"{what:22} {case.n}x{case.m} B={case.B:<5} {by:24} {times['median_us']:9.2f} us "
              f"({times['min_us']:.2f} to {times['max_us']:.2f})  {tflops:7.2f} TFLOP/s", flush=True)


def tile_of(launcher: Any, case: Case, what: str) -> str:
    """Which tiles the launcher chooses."""
    n, m, B, precision = case.n, case.m, case.B, case.precision
    suffix = "_exact" if precision == "exact" else ""
    up, down = (f"half_step{suffix}", B, m, precision), (f"half_step{suffix}", B, n, precision)
    gradient = (f"cd_update{suffix}", n + 1, m + 1, precision)
    units = {"half_step": [up], "half_step, transposed": [down], "cd_sums": [gradient], "cd_update": [gradient]}
    chosen = units.get(what) or [up, down, gradient]
    return ", ".join(launcher._choose(*unit)[0] for unit in chosen)


def run(results: Results, cases: list[tuple[int, int, int]], xp: Any, torch: Any, toy: bool) -> None:
    """Every case by everyone."""
    from gpudbn import cuda

    launcher = cuda.gpu()
    with results.attempt(what="compile"):
        launcher.compile_all()
    with results.attempt(what="ceilings"):
        results.content["ceilings"] = ceilings(xp, torch, toy)
        print(results.content["ceilings"], flush=True)
    for sizes in cases:
        cases_in = {precision: Case(*sizes, precision) for precision in ("fp32", *TENSOR_CORES)}
        case = cases_in["fp32"]
        contenders: list[tuple[str, Any, Case, Iterator[Work]]] = []

        choices = [("kernels", "fp32", {}), ("kernels, small tiles", "fp32", {"processors": 10**9}),
                   ("kernels, large tiles", "fp32", {"processors": 1}),
                   *((f"kernels, {precision}", precision, {}) for precision in TENSOR_CORES),
                   *((f"kernels, bf16x2, {size} tiles", "bf16x2", {"tensor_tiles": {size: tile}})
                     for size, tile in launcher.tensor_tiles.items() if tile.shared <= launcher.shared_memory)]
        for by, precision, changed in choices:
            other = copy.copy(launcher)
            vars(other).update(changed)
            contenders.append((by, other, cases_in[precision], by_kernels(cases_in[precision], xp, other)))
        contenders.append(("kernels, exact", launcher, Case(*sizes, "exact"), by_exact(case, xp, launcher)))
        contenders.append(("CuPy", None, case, by_cupy(case, xp)))
        if torch is not None:
            contenders.append(("PyTorch", None, case, by_torch(case, torch, "cpu" if toy else "cuda")))
        for by, its_launcher, its_case, works in contenders:
            with results.attempt(by=by, case=sizes):
                for work in works:
                    with results.attempt(by=by, what=work.what, case=sizes):
                        work.call()
                        work.check()
                        tiles = {"tiles": tile_of(its_launcher, its_case, work.what)} if its_launcher else {}
                        results.add(its_case, by, work.what, timed(xp, work.call), **tiles)
                        if its_launcher:
                            results.add(its_case, f"{by}, in a graph", work.what, in_a_graph(xp, work.call), **tiles)


# ------------------------------------------------------------------------------------------- what it ran on


def environment(rehearsal: bool) -> dict[str, Any]:
    """GPU, driver, versions, commit: nothing that names the machine."""
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "rehearsal": rehearsal,
                             "python": platform.python_version(), "cores": os.cpu_count(), "numpy": np.__version__,
                             "gpu": None, "driver": None, "cupy": None, "torch": None}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy", "torch", "nvidia-cuda-nvrtc", "nvidia-cublas", "randomgen"):
        with contextlib.suppress(PackageNotFoundError):
            found["cupy" if name.startswith("cupy") else name] = version(name)
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True, timeout=30).stdout.strip().splitlines()
        found["nvidia-smi"] = [dict(zip(query.split(","), map(str.strip, line.split(",")), strict=False))
                               for line in told]
        found |= {"gpu": found["nvidia-smi"][0]["name"], "driver": found["nvidia-smi"][0]["driver_version"]}
    if not rehearsal:
        try:
            import cupy
            from cupy_backends.cuda.libs import nvrtc

            runtime = cupy.cuda.runtime
            found |= {"CUDA runtime": runtime.runtimeGetVersion(), "CUDA of the driver": runtime.driverGetVersion(),
                      "NVRTC": ".".join(map(str, nvrtc.getVersion())),
                      "multiprocessors": cupy.cuda.Device().attributes["MultiProcessorCount"],
                      "compute capability": cupy.cuda.Device().compute_capability}
        except Exception as error:  # what there is, is told
            found["cupy error"] = f"{type(error).__name__}: {error}"[:500]
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True,
                            check=False).stdout.strip()
    return found | {"commit": commit or os.environ.get("GPUDBN_COMMIT", "unknown")}


def table(out: Path) -> str:
    """What ``on_gpu.sh`` found so far, as a page; and all of it in ``results.json``."""
    def read(name: str) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((out / name).read_text())
        return {}

    machine, parts = read("environment.json"), {name: read(f"{name}.json") for name in PARTS}
    title = "A rehearsal without a GPU: no time here means anything" if machine.get("rehearsal") else "On a GPU"
    lines = [f"# {title}", "",
             ", ".join(f"{key} {machine[key]}" for key in ("gpu", "driver", "NVRTC", "cupy", "torch", "numpy", "commit",
                                                           "date") if machine.get(key)), "",
             "| step | result | seconds |", "|---|---|---|"]
    for line in (out / "steps.tsv").read_text().splitlines():
        name, code, seconds = line.split("\t")
        known = {"0": "passed", "124": "failed: out of time", "137": "failed: killed"}
        result = known.get(code, f"failed: exit {code}")
        lines.append(f"| {name} | {result} | {seconds} |")
    records: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    with contextlib.suppress(KeyError, ValueError, StopIteration):
        test = next(r for r in records if r["phase"] == "test")
        pretraining = max(r["seconds"] for r in records if r["phase"] == "pretrain")
        told = f"test error {100 * test['error']:.2f} % ({test['rows']} rows), {test['seconds']:.1f} s"
        lines += ["", f"Training: {told}, of which pretraining {pretraining:.1f} s; {test['update']} updates"]
        paths = {r.get("layer", "fine-tuning"): r["path"] for r in records if "path" in r}
        lines += [f"- {f'layer {layer}' if layer != 'fine-tuning' else layer}: {path}" for layer, path in paths.items()]
    for name, part in parts.items():
        lines += _page(name, part)
    everything = {"environment": machine, **parts, "training": records}
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    return "\n".join(lines) + "\n"


def _page(name: str, part: dict[str, Any]) -> list[str]:
    """The lines of one file of results."""
    lines = ["", f"## {name}"] if part else []
    if part.get("ceilings"):
        reached = "; ".join(f"{key} {value:.4g}" for key, value in part["ceilings"].items())
        lines += ["", f"Ceilings measured: {reached}"]
    if part.get("latency"):
        lines += ["", "Microseconds: " + "; ".join(f"{key} {value:.3g}" for key, value in part["latency"].items())]
    if part.get("rows") and not name.endswith("check"):  # times under a sanitizer are not told
        lines += ["", "| what | n x m, B | by | median us | min | max | TFLOP/s | of product | of copy | tiles |",
                  "|---|---|---|---|---|---|---|---|---|---|"]
        for r in part["rows"]:
            of = [f"{r[key]:.0%}" if r[key] is not None else "" for key in ("of_product", "of_copy")]
            lines.append(f"| {r['what']} | {r['n']}x{r['m']}, {r['B']} | {r['by']} | {r['median_us']:.2f} | "
                         f"{r['min_us']:.2f} | {r['max_us']:.2f} | {r['tflops']:.2f} | {' | '.join(of)} | "
                         f"{r.get('tiles', '')} |")
    if part.get("transfers"):
        lines += ["", *transports.table(part)]
    lines += [f"\nNot taken: {reason}" for reason in part.get("refused", [])]
    return lines + [f"\nFAILED: {failure}" for failure in part.get("failures", [])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, without a GPU: only to see that it runs")
    parser.add_argument("--small", action="store_true", help="toy sizes on the GPU: for a tool that slows it down")
    parser.add_argument("--environment", type=Path, metavar="FILE", help="only write what this machine is")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only print a page on what on_gpu.sh found")
    given = parser.parse_args()
    if given.table:
        print(table(given.table), end="")
        return 0
    if given.environment:
        given.environment.write_text(json.dumps(environment(given.rehearse), indent=1) + "\n")
        print(given.environment.read_text(), end="")
        return 0
    if given.out is None:
        parser.error("--out: must be the file of results")
    torch: Any = None
    with contextlib.suppress(ImportError):
        import torch
    with contextlib.ExitStack() as stack:
        global repeats
        repeats = 2 if given.rehearse or given.small else repeats
        if given.rehearse:
            from tests.pretend_cupy import installed

            stack.enter_context(installed(processors=132))
        import cupy

        toy = given.rehearse or given.small
        results = Results(given.out, {"machine": environment(given.rehearse)})
        run(results, TOY if toy else CASES, cupy, None if given.small else torch, toy)

        from benchmarks import large, persistent
        from gpudbn import cuda

        persistent.run(results, persistent.TOY if toy else persistent.CASES, cupy, cuda.gpu(),
                       1 if toy else persistent.UPDATES)
        if given.small and large.there(cuda.gpu()):
            large.run(results, large.TOY, cupy, cuda.gpu())
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
