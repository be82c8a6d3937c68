"""NVTX ranges while no profiler listens: how long one takes, how many an update opens, which part of its time that is.

    python -m benchmarks.tracing [--out FILE]

On a GPU a launch stands in a range, which is left out while no profiler listens. Here an update goes through the
launcher, with all its checks, to kernels that do nothing: no update that is launched can be faster, so the part of the
ranges in it is an upper bound. Training replays CUDA graphs of many updates, in which no range is opened.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import nvtx

from benchmarks.mnist import machine
from gpudbn import cuda
from gpudbn.data import DataSet, Rows
from gpudbn.dbn import DBN
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.settings import Settings
from gpudbn.tracing import span

N, M, B = 784, 500, 100


def shortest(action: Callable[[], object], count: int, samples: int = 100) -> float:
    """Seconds that ``action`` takes: the shortest of some means over ``count`` of them in a row.

    A sample of about a millisecond is likely to pass undisturbed, also on a busy machine.
    """
    found = []
    for _ in range(samples):
        begun = time.perf_counter()
        for _ in range(count):
            action()
        found.append((time.perf_counter() - begun) / count)
    return min(found)


def ranges_of(action: Callable[[], object]) -> int:
    """How many ranges ``action`` opens."""
    opened = 0
    enter = nvtx.annotate.__enter__

    def counting(this):
        nonlocal opened
        opened += 1
        return enter(this)

    with mock.patch.object(nvtx.annotate, "__enter__", counting):
        action()
    return opened


def one_range() -> None:
    with span("a range"):
        pass


def launched_update() -> Callable[[], None]:
    """A CD-1 update of one layer, launched to kernels that do nothing."""
    class Module:
        def __init__(self, **_):
            pass

        def get_function(self, _):
            return lambda grid, block, arguments, *, shared_mem=0: None  # noqa: ARG005

    gpu = cuda.Launcher(Module, np.ndarray, address_of=lambda array: array.ctypes.data, processors=132,
                        device_of=lambda _: 0, current_device=lambda: 0)
    v, h = np.zeros((2 * B, N), np.float32), np.zeros((2 * B, M), np.float32)
    W, b, c = np.zeros((N, M), np.float32), np.zeros(N, np.float32), np.zeros(M, np.float32)
    parameters, velocity = np.zeros(N * M + N + M, np.float32), np.zeros(N * M + N + M, np.float32)

    def update() -> None:
        gpu.half_step(h[B:], h[:B], v[:B], W, c, seed=1, update=2, site=3)
        gpu.half_step(v[B:], None, h[B:], W, b, transpose=True, seed=1, update=2, site=4)
        gpu.half_step(None, h[B:], v[B:], W, c)
        gpu.cd_update(parameters, velocity, None, N, M, v, h, B, rate=0.1, momentum=0.5, decay=0.0)

    update()  # compiles
    return update


def numpy_epoch(updates: int = 100) -> Callable[[], None]:
    """An epoch of pretraining on random rows: alone, NumPy."""
    x = np.random.default_rng(0).uniform(size=(updates * B, N)).astype(np.float32)
    rows = Rows(x, 1.0, None)
    data = DataSet("random", rows, rows.select(range(0)), rows.select(range(0)), None, 0, 0)
    settings = Settings(layers=(M,), epochs=(1,), batch=B, finetune_epochs=0)

    def epoch() -> None:
        list(Training(DBN([N, M]), data, settings, Alone()).run())

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    each = shortest(one_range, 5000)
    print(f"a range: {1e9 * each:.0f} ns")
    updates, epoch, launched = 100, numpy_epoch(100), launched_update()
    found = {}
    for name, opened, seconds in (
            ("NumPy", ranges_of(epoch) / updates, shortest(epoch, 1, samples=3) / updates),
            ("launched, kernels that do nothing", ranges_of(launched), shortest(launched, 10))):
        found[name] = {"ranges_per_update": opened, "update_us": round(1e6 * seconds, 1),
                       "part_percent": round(100 * opened * each / seconds, 4)}
        print(f"{name}: {opened} ranges an update of {1e6 * seconds:.0f} us, {100 * opened * each / seconds:.4f} %")
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), "layer": f"{N}x{M} B={B}, CD-1",
                                         "range_ns": round(1e9 * each, 1), "updates": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
