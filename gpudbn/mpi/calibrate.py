"""Costs of a simulation, measured on this machine: on the run's own layers, and by a job of a server and a replica.

Each measurement is done by processes, or a job, of its own, with as many BLAS threads as a rank has:

    python -m gpudbn.mpi.calibrate compute SETTINGS.toml          seconds of updates, sums, steps and measures
    mpirun -n 2 python -m gpudbn.mpi.calibrate job SETTINGS.toml  of copies, messages and what server and replica do

What is linear in rows or bytes is measured at two sizes. Messages are measured by what most of them are for, sums over
ranks: MPI gets on with these only while both look, and ranks that wait sleep between two looks.

Cores at work slow each other, by how much depends on what they do: arithmetic in the cache hardly, passes over memory
more. So it is measured for each phase, by updates of one process alone and of one on every core at the same time, in
turns. And none of it stays as it is. On the virtual cores of a cloud two busy ones shared a physical core for a second
now and then, and each was 1.6 times slower; and neighbours take caches and memory. A run goes on through all of that,
so measurements are short and go round for ``SECONDS``, and a figure is how long something takes in all that time: the
harmonic mean over slots of time that are equally long.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpudbn._command import load_data
from gpudbn.errors import UserError
from gpudbn.mpi import chosen, join, launch
from gpudbn.mpi.costs import Compute, Costs, Hop
from gpudbn.settings import BATCH_OPTIMISERS, Settings, from_toml

if TYPE_CHECKING:
    import numpy as np

    from gpudbn.data import Rows
    from gpudbn.feed import Feed
    from gpudbn.pretrain import Phase, Piece

SECONDS = 20.0  # of all measurements of updates
PARTS = 4  # of these, with a job behind each
SLOT = 0.05  # seconds of one measurement, at least
LEAST = 7  # repetitions of what is measured in one go, for GO seconds at least
GO = 0.2
TRIES = 5  # of a slot, until nothing else had much of the cores
OWN = 0.9  # of a core, which a process has then
STEADY = 0.5  # seconds: about as long as a core was seen to be as quick as it is
ASKED = (("update", 4), ("update", 1), ("sums", 4), ("sums", 1), ("step", 1), ("measure", 1))  # in parts of a batch
CREW = {"phases", "crowding", "jitter", "steady"}  # what processes side by side find
JOB = {"copy", "message", "apply", "publish", "exchange", "look"}  # and a job
PUSHES = 200
SUMS = 100
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
    with Calibration(settings, known=known) as calibration:
        for _ in range(PARTS):
            calibration.measure(SECONDS / PARTS)
        return calibration.costs(costs or Costs())


class Calibration:
    """Measurements that go on as long as they are told to; what they have found so far. A context manager.

    Parameters
    ----------
    settings, known
        See ``calibrate``.
    """

    def __init__(self, settings: Settings, *, known: Sequence[str] = ()) -> None:
        self.settings, self.known = settings, set(known)
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._mpirun = None if self.known >= JOB else _mpirun()
        self._jobs: list[dict[str, tuple[float, float]]] = []
        self._crew: Crew | None = None

    def __enter__(self) -> Calibration:
        with contextlib.ExitStack() as stack:
            self._file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "settings.toml"
            self._file.write_text(self.settings.to_toml())
            if CREW - self.known:
                self._crew = stack.enter_context(Crew(self.cores, self._file))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, seconds: float) -> None:
        """Updates for so long, once at least; then a job."""
        if self._crew:
            self._crew.measure(seconds)
        if self._mpirun:
            self._jobs.append(_job(self._mpirun, self._file))

    def costs(self, costs: Costs) -> Costs:
        """These, with all that is not known as it was measured."""
        found: dict[str, Any] = {"cores": self.cores, "oversleep": oversleep()}
        if self._crew:
            found |= self._crew.found()
            if "crowding" in self.known:
                found["phases"] = tuple(replace(phase, crowding=None) for phase in found["phases"])
        if self._jobs:
            found |= {name: _mean([Hop(*one[name]) for one in self._jobs]) for name in self._jobs[0]}
        return replace(costs, **{name: value for name, value in found.items() if name not in self.known})


def _mean(hops: list[Hop]) -> Hop:
    """What takes their mean time, for any number of bytes."""
    return Hop(statistics.mean(hop.latency for hop in hops), statistics.harmonic_mean(hop.bandwidth for hop in hops))


def _job(mpirun: str, settings: Path) -> dict[str, Any]:
    """What ``job`` finds."""
    done = subprocess.run([mpirun, "-n", "2", *_command("job", settings)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _failed(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(what: str, settings: Path) -> list[str]:
    return [sys.executable, "-m", "gpudbn.mpi.calibrate", what, str(settings)]


def _failed(errors: str) -> UserError:
    return UserError(f"calibration: must be able to run; got {errors.strip().splitlines()[-1:]}")


def _mpirun() -> str | None:
    """The mpirun beside this Python, or the first on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


class Measured(NamedTuple):
    """Mean seconds of something with so many rows, in a slot of time, and the share of a core that it had."""

    rows: int
    seconds: float
    share: float


class Crew:
    """Processes that measure what they are asked to, one alone or all at the same time. A context manager.

    Parameters
    ----------
    size : int
    settings : Path
        Of the run, a TOML file.
    """

    def __init__(self, size: int, settings: Path) -> None:
        self.size = size
        self._slots: dict[tuple[int, str, int], list[Measured]] = defaultdict(list)  # of one alone: by what was asked
        self._together: dict[int, list[list[Measured]]] = defaultdict(list)  # updates of all of them, by phase
        self._running = [subprocess.Popen(_command("compute", settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, text=True) for _ in range(size)]

    def __enter__(self) -> Crew:
        (self.phases, *_) = self._answers(self._running)
        for index in range(self.phases):
            self.ask(self.size, index, "update", 1)  # so that all are ready
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.communicate()

    def measure(self, seconds: float) -> None:
        """Go round all that is measured for so long, once at least."""
        until = time.perf_counter() + seconds
        while True:
            for index in range(self.phases):
                for asked in ASKED:
                    self._slots[(index, *asked)] += self.ask(1, index, *asked)
                self._together[index].append(self.ask(self.size, index, "update", 1))
            if time.perf_counter() >= until:
                break

    def found(self) -> dict[str, Any]:
        """``phases``, ``crowding``, ``jitter`` and ``steady`` of ``Costs``."""
        phases = []
        for index in range(self.phases):
            points = {asked: (self._slots[(index, *asked)][0].rows, _long_run(self._slots[(index, *asked)]))
                      for asked in ASKED}
            together = _long_run(itertools.chain(*self._together[index]))
            rows, seconds = points["measure", 1]
            phases.append(Compute(
                update=line(points["update", 4], points["update", 1]),
                sums=line(points["sums", 4], points["sums", 1]), step=(points["step", 1][1], 0.0),
                measure=(0.0, seconds / rows), crowding=max(0.0, together / points["update", 1][1] - 1)))
        return {"phases": tuple(phases), "crowding": statistics.mean(phase.crowding or 0.0 for phase in phases),
                "jitter": apart([[one.seconds for one in slot] for slots in self._together.values() for slot in slots]),
                "steady": STEADY}

    def ask(self, count: int, phase: int, what: str, part: int) -> list[Measured]:
        """Let the first so many do this, see ``Bench.times``: again where others had a share of their cores."""
        for _ in range(TRIES):
            for process in self._running[:count]:
                assert process.stdin
                with contextlib.suppress(OSError):  # it has ended: its answer is missing
                    process.stdin.write(json.dumps([phase, what, part]) + "\n")
                    process.stdin.flush()
            found = [Measured(*answer) for answer in self._answers(self._running[:count])]
            if min(one.share for one in found) > OWN:
                break
        return found

    def _answers(self, processes: list[subprocess.Popen[str]]) -> list[Any]:
        answers = [process.stdout.readline() for process in processes if process.stdout]
        for process, answer in zip(processes, answers, strict=True):
            if not answer:
                errors = process.communicate()[1]
                self.__exit__()
                raise _failed(errors)
        return [json.loads(answer) for answer in answers]


def _long_run(slots: Iterable[Measured]) -> float:
    """Seconds that one takes of many, done one after another through slots of time that are equally long."""
    return statistics.harmonic_mean(one.seconds for one in slots)


def apart(slots: list[list[float]]) -> float:
    """Standard deviation of the logarithm of what cores take, by how far they are apart at the same time.

    What slows them all does not count. Unbiased; 0 for one core.
    """
    if len(slots[0]) < 2:
        return 0.0
    return math.sqrt(statistics.mean(statistics.variance(map(math.log, slot)) for slot in slots))


# -- in the processes that measure ----------------------------------------------------------------


def median(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter,
           first: Callable[[], object] | None = None) -> float:
    """Seconds that the action takes, without those of what is done ``first``."""
    found: list[float] = []
    action()
    until = time.perf_counter() + GO
    while len(found) < LEAST or time.perf_counter() < until:
        if first:
            first()
        begun = clock()
        action()
        found.append(clock() - begun)
    return statistics.median(found)


def line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """(at 0, for each) of the line through two points (size, seconds); neither below 0."""
    (n0, t0), (n1, t1) = small, large
    each = max(0.0, (t1 - t0) / (n1 - n0)) if n1 > n0 else 0.0
    return max(0.0, t1 - each * n1), each


def oversleep() -> float:
    """How much longer than asked a process sleeps, in seconds."""
    return max(0.0, median(lambda: time.sleep(100e-6)) - 100e-6)


class Ready(NamedTuple):
    """A phase of which parts can be timed: its rows, a vector for sums, and what a look for NaN takes of an update."""

    phase: Phase
    rows: Rows
    feed: Feed
    positions: np.ndarray
    sums: np.ndarray
    noting: float


class Bench:
    """The phases of a run, on which parts of updates are timed.

    With one thread seconds are those of the processor, so that what else runs on the machine does not count.

    Parameters
    ----------
    settings : Settings
        A batch optimiser's update is made of sums, which are those of any other.
    """

    def __init__(self, settings: Settings) -> None:
        import numpy as np

        from gpudbn.dbn import DBN
        from gpudbn.feed import feed_of
        from gpudbn.loop import Training
        from gpudbn.memory import AT_ONCE_ROWS
        from gpudbn.mpi.alone import Alone

        if settings.optimiser in BATCH_OPTIMISERS:
            settings = replace(settings, optimiser="sgd", finetune_batch=min(settings.finetuning_batch, AT_ONCE_ROWS))
        data, labelled = load_data(settings, quiet=True)
        dbn = DBN([data.train.n, *settings.layers], local=settings.local)
        training = self.training = Training(dbn, data, settings, Alone(), labelled=labelled)
        self.clock = time.perf_counter if (settings.threads or 1) > 1 else time.process_time
        self.phases: list[Ready] = []
        self.pieces: dict[tuple[int, int], Iterator[Piece]] = {}  # by phase and rows
        for index in range(training.phases):
            training.index = index
            phase, rows = training._make_phase(), training._set(index).train
            phase.begin_epoch(0)
            phase.begin_turn()
            feed = feed_of(rows, np, phase.batch)
            positions = feed.begin(training._order(len(rows), 0))
            noting = median(partial(training._note, phase), self.clock) / training._turn()
            self.phases.append(Ready(phase, rows, feed, positions, np.zeros(phase.exchanged, np.float32), noting))

    def times(self, index: int, what: str, part: int) -> Measured:
        """What something takes, again and again for a slot of time.

        Parameters
        ----------
        index : int
            The phase.
        what : "update", "sums", "step" or "measure"
        part : int
            With the rows of a batch, or of a block that is measured, divided by this.
        """
        import numpy as np

        from gpudbn.loop import MEASURED

        self.training.index = index
        phase, rows, feed, _, sums, noting = self.phases[index]
        count = max(1, min(MEASURED if what == "measure" else phase.batch, len(rows)) // part)
        pieces, block = self.pieces.setdefault((index, count), self._pieces(index, count)), np.arange(count)
        action: Callable[[], object] = {
            "update": lambda: phase.update(feed, next(pieces)), "sums": lambda: phase.sums(sums, feed, next(pieces)),
            "step": lambda: phase.step(sums, count), "measure": lambda: phase.measure(rows, block)}[what]
        action()
        done, began = 0, time.perf_counter()
        begun, worked = self.clock(), time.process_time()
        while not done or time.perf_counter() < began + SLOT:
            action()
            done += 1
        seconds, share = (self.clock() - begun) / done, (time.process_time() - worked) / (time.perf_counter() - began)
        return Measured(count, seconds + (noting if what in ("update", "sums") else 0.0), share)

    def _pieces(self, index: int, count: int) -> Iterator[Piece]:
        """Pieces of so many rows: other rows each time, so that they come from memory as in training."""
        phase, positions = self.phases[index].phase, self.phases[index].positions
        while True:
            for start in range(0, len(positions) - count + 1, count):
                yield from self.training._pieces(phase, positions[start : start + count])


def job(settings: Settings) -> dict[str, tuple[float, float]]:
    """Latency and bandwidth of what ``Costs`` has of them, by rank 1; rank 0 serves."""
    import numpy as np

    from gpudbn.loop import largest
    from gpudbn.mpi.server import Server
    from gpudbn.mpi.wire import Window, Wire

    class Processor(Wire):
        """Its tally counts seconds of the processor: what else runs on the machine takes none."""

        looks = 0

        def clock(self) -> float:
            return time.process_time()

        def worked(self, what: str, nbytes: int) -> None:  # noqa: ARG002
            self.looks += what == "look"

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
        sums = []
        for _ in range(SUMS):
            array[...] = 0  # as in training: these are in the cache, and one comes a little later than the other
            wire.barrier()
            begun = time.perf_counter()  # two wait for each other: no time of one processor
            wire.allreduce_(array)
            sums.append(time.perf_counter() - begun)
        points.setdefault("sum", []).append((array.nbytes, statistics.median(sums)))
        published = array.copy()
        copying = median(lambda: np.copyto(published, array), wire.clock, cold)  # noqa: B023
        plan = replace(chosen(settings, 2), mode="async", servers=1, transport="staged")
        exchange = join(wire.split(0), plan, array.size)
        mine, tally = np.zeros(2), wire.tally  # shared by the wires split off
        if isinstance(exchange, Server):
            begun, busy = wire.clock(), tally.seconds()["applying"]
            exchange.serve()
            serving, busy = wire.clock() - begun, tally.seconds()["applying"] - busy
            assert isinstance(exchange.world, Processor)
            mine[:] = busy / PUSHES, (serving - busy) / exchange.world.looks
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
        (busy, looking), (passes, _) = wire.allgather(mine).tolist()
        points.setdefault("look", []).append((0, looking))
        points.setdefault("publish", []).append((array.nbytes, copying))
        points.setdefault("apply", []).append((array.nbytes, max(busy - copying, 0.0)))
        points.setdefault("exchange", []).append((array.nbytes, passes))
    wire.close()
    if not wire.rank:
        return {}
    lines = {name: line(*two) for name, two in points.items()}
    once, each = lines.pop("sum")
    lines["message"] = once / 2, each - lines["apply"][1] / 2  # as ``virtual.collective`` makes a sum of them
    return {name: (once, 1 / max(each, 1e-12)) for name, (once, each) in lines.items()}


def main(what: str, settings: Settings) -> int:
    """Answers questions, or measures by a job; prints lines of JSON."""
    from gpudbn.mpi.wire import guarded

    def measure() -> None:
        if what == "compute":
            bench = Bench(settings)
            print(bench.training.phases, flush=True)
            for question in sys.stdin:
                print(json.dumps(bench.times(*json.loads(question))), flush=True)
        else:
            found = job(settings)
            if found:
                print(json.dumps(found), flush=True)

    return guarded(measure)


if __name__ == "__main__":
    given = Settings(**from_toml(sys.argv[2]))
    launch.limit_threads(given.threads or 1, 1)
    sys.exit(main(sys.argv[1], given))
