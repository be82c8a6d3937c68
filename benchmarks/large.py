"""Large layers in bf16 on Hopper's tensor cores, beside the products alone by cuBLAS: rows as of ``kernels.py``.

    python -m benchmarks.large --out large.json      needs a GPU of compute capability 9.0 (H100, H200)

What is right is computed in float64 for some rows, from the operands as they are rounded. The larger case
needs 8 GiB on the GPU, 16 GiB on the host and about two minutes there.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernels
from benchmarks.kernels import DECAY, MOMENTUM, NEAR, RATE, SITES, Work, check_sample, close
from gpudbn.cuda.wgmma import ARCHITECTURE

CASES = [(4096, 4096, 1024), (16384, 16384, 4096)]  # n, m, B
TOY = [(131, 70, 67)]
ROWS = 16  # that are looked at
MEAN_ERROR = 2.0**-8  # of a probability in bf16


class Large:
    """One layer and batch: zeros and ones for both phases, parameters and velocity, on the host."""

    product = "float16 TFLOP/s"  # the ceiling that products are compared to

    def __init__(self, n: int, m: int, B: int) -> None:
        self.n, self.m, self.B = n, m, B
        rng = np.random.default_rng([n, m, B])
        self.v0, self.vk = ((rng.random((B, n), np.float32) < 0.3) for _ in range(2))
        self.h0, self.hk = ((rng.random((B, m), np.float32) < 0.4) for _ in range(2))
        self.p = rng.standard_normal(n * m + n + m, np.float32) * np.float32(0.5 / np.sqrt(n))
        self.u = rng.standard_normal(self.p.size, np.float32) * np.float32(1e-3)

    def split(self, flat: Any) -> tuple[Any, Any, Any]:
        """W, b, c as views."""
        n, m = self.n, self.m
        return flat[: n * m].reshape(n, m), flat[n * m : n * m + n], flat[n * m + n :]

    def looked_at(self, rows: int) -> list[int]:
        """Some rows, from the first to the last."""
        return sorted(set(np.linspace(0, rows - 1, ROWS).astype(int).tolist()))

    def cost(self, what: str) -> tuple[int, int]:
        """Floating-point operations, and bytes that must move if everything is read and written once."""
        n, m, B = self.n, self.m, self.B
        half = 2 * B * n * m, 2 * (n * m + B * (n + m)) + 4 * m
        step = 4 * B * n * m, 4 * B * (n + m) + 18 * n * m
        return {"half_step": half, "half_step, transposed": half, "cd_update": step,
                "CD-1 update": (3 * half[0] + step[0], 3 * half[1] + step[1])}[what]


def there(launcher: Any) -> bool:
    """Whether the device has wgmma."""
    return bool(launcher.architecture == ARCHITECTURE)


def by_wgmma(case: Large, xp: Any, launcher: Any) -> Iterator[Work]:
    """Ours: weights in bf16 for the products, in float32 for the steps."""
    from gpudbn.cuda.wgmma import padded
    from gpudbn.draws import uniforms
    from gpudbn.precision import from_bf16, round_to_bf16

    n, m, B = case.n, case.m, case.B
    parameters, velocity = xp.asarray(case.p), xp.asarray(case.u)
    _, b, c = case.split(parameters)
    first, second = {**NEAR, "site": SITES["h0"]}, {**NEAR, "site": SITES["v1"]}

    def put(values: np.ndarray) -> Any:
        there = padded(xp, *values.shape)
        there[...] = xp.asarray(values)
        return there

    W = put(round_to_bf16(case.split(case.p)[0]))
    v0, h0, vk, hk = (put(a * np.uint16(0x3F80)) for a in (case.v0, case.h0, case.vk, case.hk))
    up, down = padded(xp, B, m), padded(xp, B, n)
    weights = from_bf16(W.get())
    visible, hidden = (np.asarray(bias, np.float64) for bias in case.split(case.p)[1:])

    def rows_of(x: Any, rows: list[int]) -> np.ndarray:
        return np.stack([from_bf16(x[r].get()) for r in rows])

    def mean(x: Any, rows: list[int], transpose: bool) -> np.ndarray:
        """In float64, of these rows."""
        sums = rows_of(x, rows) @ (weights.T if transpose else weights).astype(np.float64)
        return np.asarray(1 / (1 + np.exp(-(sums + (visible if transpose else hidden)))))

    def check_half(what: str, sample: Any, x: Any, address: dict[str, int], transpose: bool) -> None:
        rows = case.looked_at(B)
        u = np.concatenate([uniforms(np.empty((1, sample.shape[1]), np.float32),
                                     **address | {"row": address["row"] + r}) for r in rows])
        check_sample(what, rows_of(sample, rows), mean(x, rows, transpose), u)

    def check_step() -> None:
        """Some rows of W, and all biases."""
        v, h = (from_bf16(np.concatenate([a.get() for a in both])) for both in ((v0, vk), (h0, hk)))
        h = h.astype(np.float64)
        signs = np.where(np.arange(2 * B) < B, 1.0, -1.0)
        (p_W, *p_biases), (u_W, *u_biases) = (case.split(a) for a in (case.p, case.u))
        (W_got, *got), (u_got, *v_got) = (case.split(a) for a in (parameters, velocity))
        for i in case.looked_at(n):
            u = MOMENTUM * u_W[i] + RATE * ((signs * v[:, i]) @ h / B - DECAY * p_W[i].astype(np.float64))
            close(f"velocity of row {i}", u_got[i].get(), u, 1e-6)
            close(f"row {i}", W_got[i].get(), p_W[i] + u, 2e-6)
            close(f"row {i} in bf16", from_bf16(W[i].get()), W_got[i].get(), MEAN_ERROR)
        for bias, u_bias, p_new, u_new, x in zip(p_biases, u_biases, got, v_got, (v, h), strict=True):
            u = MOMENTUM * u_bias.astype(np.float64) + RATE * (signs @ x) / B
            close("velocity of a bias", u_new.get(), u, 1e-6)
            close("a bias", p_new.get(), bias + u, 2e-6)

    def step() -> None:
        launcher.cd_update_wgmma(parameters, velocity, W, v0, h0, vk, hk, rate=RATE, momentum=MOMENTUM, decay=DECAY)

    def update() -> None:
        launcher.half_step_wgmma(h0, None, v0, W, c, **first)
        launcher.half_step_wgmma(vk, None, h0, W, b, transpose=True, **second)
        launcher.half_step_wgmma(None, hk, vk, W, c)
        step()

    def check_update() -> None:
        """Link by link; with the biases and weights from which they were made, which the step has changed since."""
        check_half("h0", h0, v0, first, False)
        check_half("v1", vk, h0, second, True)
        rows = case.looked_at(B)
        close("h1", rows_of(hk, rows), mean(vk, rows, False), MEAN_ERROR)
        check_step()

    yield Work("half_step", lambda: launcher.half_step_wgmma(up, None, v0, W, c, **first),
               lambda: check_half("h", up, v0, first, False))
    yield Work("half_step, transposed",
               lambda: launcher.half_step_wgmma(down, None, h0, W, b, transpose=True, **second),
               lambda: check_half("v", down, h0, second, True))
    yield Work("cd_update", step, check_step)
    parameters[...], velocity[...] = xp.asarray(case.p), xp.asarray(case.u)
    W[...] = xp.asarray(round_to_bf16(case.split(case.p)[0]))
    yield Work("CD-1 update", update, check_update)


def by_cublas(case: Large, xp: Any) -> Iterator[Work]:
    """The products alone, in float16, since CuPy has no bf16: the same tensor cores at the same rate."""
    n, m, B = case.n, case.m, case.B
    half = np.float16
    v, h = xp.zeros((2 * B, n), half), xp.zeros((2 * B, m), half)
    v[:B], h[:B] = xp.asarray(case.v0.astype(half)), xp.asarray(case.h0.astype(half))
    W = xp.asarray(case.split(case.p)[0].astype(half))
    up, down, dW = xp.empty((B, m), half), xp.empty((B, n), half), xp.empty((n, m), half)

    def products() -> None:
        xp.matmul(v[:B], W, out=up)
        xp.matmul(h[:B], W.T, out=down)
        xp.matmul(v[:B], W, out=up)
        xp.matmul(v.T, h, out=dW)

    def nothing() -> None:
        """It is cuBLAS's."""

    yield Work("half_step", lambda: xp.matmul(v[:B], W, out=up), nothing)
    yield Work("half_step, transposed", lambda: xp.matmul(h[:B], W.T, out=down), nothing)
    yield Work("cd_update", lambda: xp.matmul(v.T, h, out=dW), nothing)
    yield Work("CD-1 update", products, nothing)


def run(results: kernels.Results, cases: list[tuple[int, int, int]], xp: Any, launcher: Any) -> None:
    """Every case by both."""
    for sizes in cases:
        case = Large(*sizes)
        for by, works in (("kernels, wgmma, bf16", by_wgmma(case, xp, launcher)),
                          ("CuPy, float16 products alone", by_cublas(case, xp))):
            with results.attempt(by=by, case=sizes):
                for work in works:
                    with results.attempt(by=by, what=work.what, case=sizes):
                        work.call()
                        work.check()
                        results.add(case, by, work.what, kernels.timed(xp, work.call))
                        if by.startswith("kernels"):
                            results.add(case, f"{by}, in a graph", work.what, kernels.in_a_graph(xp, work.call))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of results")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--rehearse", action="store_true", help="on a pretended device, which has no wgmma")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if given.rehearse:
            from tests.pretend_cupy import installed

            stack.enter_context(installed())
        import cupy

        from gpudbn import cuda

        if not there(cuda.gpu()):
            print(f"skipped: the device is {cuda.gpu().architecture}, and wgmma is of {ARCHITECTURE} alone")
            return 0
        results = kernels.Results(given.out, {"machine": kernels.environment(False)})
        with results.attempt(what="ceilings"):
            results.content["ceilings"] = kernels.ceilings(cupy, None, False)
            print(results.content["ceilings"], flush=True)
        run(results, CASES[: given.cases], cupy, cuda.gpu())
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
