"""What an update takes on each path: launches, barriers, bytes and flops, and the time that follows, without a GPU.

    python -m benchmarks.counts

A prediction for the first GPU to confirm or refute: each path is counted from what it launches (tests/test_counts.py
holds the launches to a run), and set against the floors of an H200: the products at the rate of bf16. CD-1 by the
default estimator, rows resident. The table is in benchmarks/README.md.
"""

from __future__ import annotations

from benchmarks import persistent

CASES = [(784, 500, 100), (784, 2000, 128), (4096, 4096, 1024), (16384, 16384, 4096)]  # n, m, B
TURN = 50  # updates that one graph or one launch holds

BANDWIDTH = 4.3e6  # bytes a microsecond: measured elsewhere on an H200
RATES = {"fp32": 60e6, "tf32": 400e6, "bf16": 790e6}  # flops a microsecond; fp32 without tensor cores
LAUNCH = 5.0  # us from Python, an estimate
NODE = 1.3  # us of a node of a CUDA graph, as published for an H100
OWN = {"fp32": 1, "bf16x2": 2, "bf16": 1}  # products that are made of one; samples have no low part


def launches(path: str, k: int = 1) -> int:
    """Launches of an update: a gather, 1 + 2 k half-steps and the gradient with its step.

    Without kernels a half-step is six launches and the draw of its sample 109, of which each round of Philox is ten;
    the gather is three, and gradient and step are sixteen.
    """
    if path == "unfused":
        return 3 + (6 + 109) * 2 * k + 6 + 16
    return 1 + (1 + 2 * k) + 1


def megabytes(path: str, n: int, m: int, B: int, k: int = 1) -> float:
    """MB that have to move between memory and chip if each launch reads its inputs and writes its outputs once."""
    weights, v, h = 4 * n * m, 4 * B * n, 4 * B * m
    if path == "wgmma":  # operands in bf16; the masters and velocities only in the step, which also writes the copy
        half = (weights + v + h) / 2
        return 1e-6 * (v + (1 + 2 * k) * half + v + h + 4 * weights + weights / 2)
    products = (1 + 2 * k) * (weights + v + h)
    step = 2 * (v + h) + 4 * weights
    if path == "unfused":  # passes over what a kernel keeps in registers
        drawn, mean = 140, 9  # with a sample: the rounds of Philox read and write integers of 64 bits
        return 1e-6 * (2 * v + products + drawn * k * (v + h) + mean * h + step + 6 * weights + 4 * h)
    return 1e-6 * (2 * v + products + step)


def prediction(path: str, precision: str, n: int, m: int, B: int, k: int = 1) -> dict[str, float]:
    """Counts of an update and microseconds: of launches and barriers, of bytes, of products; all together, at least."""
    flops = (6 + 4 * k) * B * n * m
    rate = RATES["fp32" if precision == "fp32" else "bf16"] / OWN[precision]
    if path == "persistent":
        found = persistent.counts(n, m, B, k)
        moved, count, barriers = found["MB read"], 1 / TURN, found["barriers"]
        waits, products = found["us of barriers"] + LAUNCH / TURN, found["us of the instructions"]
    else:
        moved, count, barriers = megabytes(path, n, m, B, k), launches(path, k), 0
        waits = count * NODE if path in ("graph", "wgmma") else count * LAUNCH
        products = flops / rate
    memory, floor = 1e6 * moved / BANDWIDTH, flops / RATES["bf16"]
    all_in_all = waits + max(memory, products)
    return {"launches": count, "barriers": barriers, "MB": moved, "GFLOP": 1e-9 * flops, "us of launches": waits,
            "us of bytes": memory, "us of products": products, "us": all_in_all, "floor": floor,
            "in floors": all_in_all / floor}


def rows() -> list[tuple[str, str, tuple[int, int, int]]]:
    """Path, precision, sizes: what is worth a row."""
    small = [(path, precision, sizes) for sizes in CASES[:2] for path, precision in
             (("unfused", "fp32"), ("fused", "fp32"), ("graph", "fp32"), ("graph", "bf16x2"), ("persistent", "bf16x2"))]
    return small + [(path, precision, sizes) for sizes in CASES[2:] for path, precision in
                    (("unfused", "fp32"), ("graph", "bf16x2"), ("graph", "bf16"), ("wgmma", "bf16"))]


def table() -> str:
    """All predictions, as a page."""
    lines = []
    for path, precision, (n, m, B) in rows():
        found = prediction(path, precision, n, m, B)
        if not lines:
            lines += ["| n x m, B | path | precision | " + " | ".join(found) + " |", "|---" * (3 + len(found)) + "|"]
        values = " | ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in found.values())
        lines.append(f"| {n}x{m}, {B} | {path} | {precision} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
