"""Costs of a simulation, measured on this machine: on the run's own layers, and by a job of a server and a replica.

Each measurement is a process, or a job, of its own, with as many BLAS threads as a rank has:

    python -m gpudbn.mpi.calibrate compute SETTINGS.toml          seconds of updates, sums, steps and measures
    mpirun -n 2 python -m gpudbn.mpi.calibrate job SETTINGS.toml  of copies, messages and what server and replica do

What is linear in rows or bytes is measured at two sizes. A figure is the median of several.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpudbn._command import load_data
from gpudbn.errors import UserError
from gpudbn.mpi import chosen, join, launch
from gpudbn.mpi.costs import Compute, Costs, Hop
from gpudbn.settings import BATCH_OPTIMISERS, Settings, from_toml

if TYPE_CHECKING:
    import numpy as np

    from gpudbn.loop import Training
    from gpudbn.pretrain import Phase, Piece

SECONDS = 0.2  # of one measurement, at least
LEAST = 7  # repetitions
STARTING = 4.0  # in which processes have started and loaded the data
PUSHES = 200
SMALL = 1000  # entries of the smaller of two vectors
COLD = 1 << 25  # bytes, more than a core's share of the caches


def calibrate(settings: Settings, costs: Costs | None = None, *, known: Sequence[str] = ()) -> Costs:
    """Costs on a node like this machine.

    Parameters
    ----------
    settings : Settings
        Of the run to be simulated: its layers, data and server rule.
    costs : Costs, optional
        What is not measured is taken from it: the network, for instance.
    known : sequence of str
        Names of costs that are to be left as they are.

    Notes
    -----
    Without an mpirun the costs of copies, messages and servers are left as they are, too.

    Raises
    ------
    UserError
        If a measurement fails.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, Any] = {"cores": cores, "oversleep": oversleep()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.toml"
        file.write_text(settings.to_toml())
        if not {"phases", "crowding", "jitter"} <= set(known):
            (alone,) = _all_at_once([[sys.executable]], "compute", file)
            phases = tuple(Compute(**phase) for phase in alone["phases"])
            together = _all_at_once([[sys.executable]] * cores, "compute", file) if cores > 1 else [alone]
            slower = statistics.mean(_updates(one) for one in together) / _updates(alone)
            found |= {"phases": phases, "crowding": max(0.0, slower - 1), "jitter": alone["jitter"]}
        mpirun = _mpirun()
        if mpirun and not {"copy", "message", "apply", "publish", "exchange"} <= set(known):
            (measured,) = _all_at_once([[mpirun, "-n", "2", sys.executable]], "job", file)
            found |= {name: Hop(*hop) for name, hop in measured.items()}
    return replace(costs or Costs(), **{name: value for name, value in found.items() if name not in known})


def _updates(measured: dict[str, Any]) -> float:
    """What an update of 100 rows takes, over all phases."""
    return sum(Compute(**phase).seconds("update", 100) for phase in measured["phases"])


def _mpirun() -> str | None:
    """The mpirun beside this Python, or the first on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _all_at_once(starts: list[list[str]], what: str, settings: Path) -> list[Any]:
    """What measurements that run side by side print."""
    begin = time.time() + STARTING if len(starts) > 1 else 0
    running = [subprocess.Popen([*start, "-m", "gpudbn.mpi.calibrate", what, str(settings), str(begin)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for start in starts]
    said = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, said, strict=True):
        if process.returncode:
            raise UserError(f"calibration: must be able to run; got {errors.strip().splitlines()[-1:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


# -- in the processes that measure ----------------------------------------------------------------


def median(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter,
           first: Callable[[], object] | None = None) -> float:
    """Seconds that the action takes."""
    return statistics.median(repeated(action, clock, first))


def repeated(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter,
             first: Callable[[], object] | None = None) -> list[float]:
    """Seconds that it takes each time, without those of what is done ``first``."""
    found: list[float] = []
    action()
    until = time.perf_counter() + SECONDS
    while len(found) < LEAST or time.perf_counter() < until:
        if first:
            first()
        begun = clock()
        action()
        found.append(clock() - begun)
    return found


def spread(times: list[float]) -> float:
    """Standard deviation of the logarithms, if they are normal; a few that were disturbed do not count."""
    logarithms = sorted(math.log(t) for t in times)
    below, above = (logarithms[round(share * (len(logarithms) - 1))] for share in (0.1587, 0.8413))
    return (above - below) / 2


def line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(at 0, for each) of the line through two points (size, seconds); neither below 0."""
    (n0, t0), (n1, t1) = small, large
    each = max(0.0, (t1 - t0) / (n1 - n0)) if n1 > n0 else 0.0
    return max(0.0, t1 - each * n1), each


def oversleep() -> float:
    """How much longer than asked a process sleeps, in seconds."""
    return max(0.0, median(lambda: time.sleep(100e-6)) - 100e-6)


def compute(settings: Settings) -> dict[str, Any]:
    """``phases``, the ``Compute`` of each as a table, and the ``jitter`` of their updates.

    With one thread seconds are those of the processor, so that what else runs on the machine does not count.
    """
    import numpy as np

    from gpudbn.dbn import DBN
    from gpudbn.feed import feed_of
    from gpudbn.loop import MEASURED, Training
    from gpudbn.memory import AT_ONCE_ROWS
    from gpudbn.mpi.alone import Alone

    if settings.optimiser in BATCH_OPTIMISERS:  # made of sums, as those of any other
        settings = replace(settings, optimiser="sgd", finetune_batch=min(settings.finetuning_batch, AT_ONCE_ROWS))
    data, labelled = load_data(settings, quiet=True)
    dbn = DBN([data.train.n, *settings.layers], local=settings.local)
    training = Training(dbn, data, settings, Alone(), labelled=labelled)
    clock = time.perf_counter if (settings.threads or 1) > 1 else time.process_time
    phases, jitters = [], []
    for index in range(training.phases):
        training.index = index
        phase = training._make_phase()
        phase.begin_epoch(0)
        phase.begin_turn()
        rows = training._set(index).train
        feed, order = feed_of(rows, np, phase.batch), np.arange(len(rows))
        (sums,) = training._buffers(phase, 1)
        positions = feed.begin(training._order(len(rows), 0))
        whole = min(phase.batch, len(rows))
        noting = median(lambda: training._note(phase), clock) / training._turn()  # noqa: B023 - called here
        times: dict[str, list[tuple[float, float]]] = {"update": [], "sums": []}
        for count in (max(1, whole // 4), whole):
            pieces = _pieces(training, phase, positions, count)
            updates = repeated(lambda: phase.update(feed, next(pieces)), clock)  # noqa: B023
            times["update"].append((count, statistics.median(updates) + noting))
            times["sums"].append((count, median(lambda: phase.sums(sums, feed, next(pieces)), clock) + noting))  # noqa: B023
        block = order[:MEASURED]
        jitters.append(spread(updates))
        phases.append({name: line(*points) for name, points in times.items()} | {
            "step": (median(lambda: phase.step(sums, whole), clock), 0.0),  # noqa: B023
            "measure": (0.0, median(lambda: phase.measure(rows, block), clock) / len(block))})  # noqa: B023
    return {"phases": phases, "jitter": statistics.mean(jitters)}


def _pieces(training: Training, phase: Phase, positions: np.ndarray, count: int) -> Iterator[Piece]:
    """Pieces of so many rows, over and over: other rows each time, so that they come from memory as in training."""
    while True:
        for start in range(0, len(positions) - count + 1, count):
            yield from training._pieces(phase, positions[start : start + count])


def job(settings: Settings) -> dict[str, tuple[float, float]]:
    """Latency and bandwidth of what ``Costs`` has of them, by rank 1; rank 0 serves."""
    import numpy as np

    from gpudbn.loop import largest
    from gpudbn.mpi.server import Server
    from gpudbn.mpi.wire import Window, Wire

    class Processor(Wire):
        """Its tally counts seconds of the processor: what else runs on the machine takes none."""

        def clock(self) -> float:
            return time.process_time()

    wire = Processor.start()
    size = largest(settings, *load_data(settings, quiet=True))
    arrays = [np.zeros(n, np.float32) for n in (SMALL, size)]
    others = np.zeros(COLD, np.int8)

    def cold() -> None:
        """What is moved next is no longer in the cache, as after an update."""
        others[...] += 1

    window = Window(wire, 4 * size)
    points: dict[str, list[tuple[float, float]]] = {}
    for array in arrays:
        if wire.rank:
            there = median(lambda: window.put(array, 0), wire.clock, cold)  # noqa: B023 - called here
            back = median(lambda: window.get(array, 0), wire.clock, cold)  # noqa: B023
            points.setdefault("copy", []).append((array.nbytes, (there + back) / 2))
        wire.barrier()
        rounds = []
        for _ in range(PUSHES):
            begun = time.perf_counter()  # two wait for each other: no time of one processor
            for sender in (0, 1):
                (wire.send if wire.rank == sender else wire.recv)(array, 1 - wire.rank)
            rounds.append(time.perf_counter() - begun)
        points.setdefault("message", []).append((array.nbytes, statistics.median(rounds) / 2))
        published = array.copy()
        copying = median(lambda: np.copyto(published, array), wire.clock, cold)  # noqa: B023
        plan = replace(chosen(settings, 2), mode="async", servers=1, transport="staged")
        exchange = join(wire.split(0), plan, array.size)
        mine, tally = np.zeros(1), wire.tally  # shared by the wires split off
        if isinstance(exchange, Server):
            busy = tally.seconds()["applying"]
            exchange.serve()
            mine[0] = (tally.seconds()["applying"] - busy) / PUSHES
        else:
            before = array.copy()
            exchange.begin(array)
            tally.enter("starting")
            spent = -tally.seconds()["computing"]
            for _ in range(PUSHES):
                cold()  # and the server is ready
                array += np.float32(1e-3)
                tally.enter("computing")
                exchange.exchange(array, before)
                tally.enter("starting")
            mine[0] = (spent + tally.seconds()["computing"]) / PUSHES
            exchange.meet(array)
            exchange.close()
        busy, passes = wire.allgather(mine)[:, 0].tolist()
        points.setdefault("publish", []).append((array.nbytes, copying))
        points.setdefault("apply", []).append((array.nbytes, max(busy - copying, 0.0)))
        points.setdefault("exchange", []).append((array.nbytes, passes))
    wire.close()
    lines = {name: line(*two) for name, two in points.items()} if wire.rank else {}
    return {name: (once, 1 / max(each, 1e-12)) for name, (once, each) in lines.items()}


def main(what: str, settings: Settings, begin: float) -> int:
    """One of the measurements, at that time or later; prints a line of JSON."""
    from gpudbn.mpi.wire import guarded

    def measure() -> None:
        if begin:
            load_data(settings, quiet=True)  # into the cache of the disk
            time.sleep(max(0.0, begin - time.time()))
        found = compute(settings) if what == "compute" else job(settings)
        if found:
            print(json.dumps(found), flush=True)

    return guarded(measure)


if __name__ == "__main__":
    given = Settings(**from_toml(sys.argv[2]))
    launch.limit_threads(given.threads or 1, 1)
    sys.exit(main(sys.argv[1], given, float(sys.argv[3])))
