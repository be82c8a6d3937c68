"""Many updates in one launch, with the parameters on the chip: rows of ``kernels.py``, and what they can be held to.

    python -m benchmarks.persistent      the counts of an update, without a GPU
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import kernels
from benchmarks.kernels import DECAY, MOMENTUM, RATE, Work

CASES = [(784, 500, 100), (784, 2000, 128)]  # n, m, B
TOY = [(13, 7, 5)]
UPDATES = 50  # in a launch, as training has between two looks at the world
GREYS = 255
PROCESSORS = 132  # of an H100 or H200
TFLOPS = 790  # bf16 and float16 by cuBLAS there
BARRIER = 1.2  # us, an estimate: none has been measured
AGREE = 1e-5  # entries of W that no differing sample has touched


def counts(n: int, m: int, B: int, k: int = 1, *, last_hidden: str = "mean", levels: int | None = 1,
           momentum: bool = True, processors: int = PROCESSORS) -> dict[str, float]:
    """What one update of CD-k takes, counted from how ``kernels/persistent.cu`` goes about it.

    Returns
    -------
    dict
        barriers, launches; MB that all multiprocessors together read through the L2 cache; GFLOP of the formula
        and of the instructions, which are padded and take weights as two float16; KB of shared memory a block;
        microseconds of both at the best rate, and of the barriers.
    """
    from gpudbn.cuda import persistent

    blocks = persistent.blocks_of(n, m, processors)
    bits, halves = persistent.ROWS // 8, 16 * math.ceil(B / 8)  # bytes of a unit
    v0 = {1: bits, None: halves}.get(levels, halves // 2)
    last = halves if last_hidden == "mean" else bits
    # every block: v0 going up and for the step, vk k times and for the step, h0 and hk k times in all going down
    states = n * (2 * v0 + (k + 1) * bits) + m * k * bits
    # one block each: its units' states for the step, and its rows of W
    own = m * (bits + last) + n * (v0 + bits) + 4 * n * m

    def products(units: int, inputs: int, half_steps: int) -> int:
        """Instructions of the busiest block for half-steps, in tiles of 8 units and 64 rows."""
        return half_steps * math.ceil(math.ceil(units / blocks) / 8) * (inputs // 16 + 1) * math.ceil(B / 64) * 8

    gradient = math.ceil(math.ceil(m / blocks) / 16) * (n // 8 + 1) * math.ceil(B / 32) * 4
    instructions = products(m, n, k + 1) + products(n, m, k) + gradient
    flop = (6 + 4 * k) * B * n * m
    issued = instructions * 4096 * processors
    return {"barriers": 2 * k, "launches": 1 / UPDATES, "MB read": 1e-6 * (states * blocks + own), "GFLOP": 1e-9 * flop,
            "GFLOP issued": 1e-9 * issued,
            "KB shared": persistent.shared_bytes(n, m, processors, momentum=momentum) / 1024,
            "us of the formula": 1e-6 * flop / TFLOPS, "us of the instructions": 1e-6 * issued / TFLOPS,
            "us of barriers": 2 * k * BARRIER}


def table() -> str:
    """The counts of the two layers, as a page."""
    settings = [(sizes, last, levels) for sizes in CASES for last, levels in
                (("sample", 1), ("mean", 1), ("mean", GREYS))]
    found = [counts(*sizes, last_hidden=last, levels=levels) for sizes, last, levels in settings]
    lines = ["| n x m, B | last h | data | " + " | ".join(found[0]) + " |", "|---" * (3 + len(found[0])) + "|"]
    for (sizes, last, levels), row in zip(settings, found, strict=True):
        n, m, B = sizes
        values = " | ".join(f"{value:.3g}" for value in row.values())
        lines.append(f"| {n}x{m}, {B} | {last} | {'bits' if levels == 1 else 'greys'} | {values} |")
    return "\n".join(lines)


class Long(kernels.Case):
    """A layer and batch, with data for a whole launch."""

    product = "float16 TFLOP/s"

    def __init__(self, n: int, m: int, B: int, updates: int) -> None:
        super().__init__(n, m, B)
        self.updates = updates
        self.data = np.random.default_rng([n, m, B, updates]).random((updates * B, n), np.float32) ** 3

    def rows(self, levels: int) -> np.ndarray:
        """The data in so many levels."""
        return np.rint(self.data * np.float32(levels)) / np.float32(levels)


def by_run(case: Long, xp: Any, launcher: Any, levels: int, momentum: float, **estimator: Any) -> Iterator[Work]:
    """All updates in a launch."""
    from gpudbn import reference

    n, m, B = case.n, case.m, case.B
    rows = case.rows(levels)
    v, parameters, velocity = (xp.asarray(a) for a in (rows, case.p, case.u))
    options = {"batch": B, "levels": levels, "seed": 7, "update": 3, "rate": RATE, "momentum": momentum, "decay": DECAY,
               **estimator}

    def check() -> None:
        """One update against NumPy: all of W but what a sample on the edge may have touched, a row or a column."""
        p, u = case.p.copy(), case.u.copy()
        parameters[...], velocity[...] = xp.asarray(p), xp.asarray(u)
        reference.cd_run(p, u, rows[:B], n, m, **options)
        launcher.cd_run(parameters, velocity, v[:B], n, m, **options)
        off = np.abs(parameters.get() - p)
        if not (off <= AGREE).mean() >= 1 - 3 / min(n, m) or not off.max() <= 4 * RATE:
            raise ArithmeticError(f"parameters: must be those of NumPy; got {(off > AGREE).mean():.2%} others, "
                                  f"by up to {off.max():.3g}")

    yield Work("CD-1 update", lambda: launcher.cd_run(parameters, velocity, v, n, m, **options), check)


def run(results: kernels.Results, cases: list[tuple[int, int, int]], xp: Any, launcher: Any,
        updates: int = UPDATES) -> None:
    """Every case that fits: with samples and means at the end, bits and greys, with and without momentum."""
    for sizes in cases:
        case = Long(*sizes, updates)
        for last_hidden, levels, momentum in (("sample", 1, MOMENTUM), ("mean", 1, MOMENTUM), ("mean", GREYS, MOMENTUM),
                                              ("sample", 1, 0.0)):
            by = (f"kernels, persistent, last h {last_hidden}, {'bits' if levels == 1 else 'greys'}"
                  + ("" if momentum else ", no momentum"))
            with results.attempt(by=by, case=sizes):
                if not launcher.cd_run_fits(case.n, case.m, case.B, momentum=momentum != 0):
                    continue
                for work in by_run(case, xp, launcher, levels, momentum, last_hidden=last_hidden):
                    work.check()
                    results.add(case, by, work.what, kernels.timed(xp, work.call, divided=updates))


if __name__ == "__main__":
    print(table())
