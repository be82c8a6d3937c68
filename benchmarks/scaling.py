"""Time against workers: at a fixed number of iterations, and until a test accuracy is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpudbn.data import DataSet, Rows, load
from gpudbn.errors import NonFiniteError
from gpudbn.settings import Settings

if TYPE_CHECKING:
    from gpudbn.loop import Training
    from gpudbn.mpi.costs import Costs

NETWORK: dict[str, Any] = {"layers": [500], "epochs": [1], "schedule": "constant", "finetune_schedule": "constant",
           "finetune_epochs": 100_000, "finetune_patience": 0, "validation": 0, "threads": 1, "n_push": 1, "n_fetch": 1}
LOOKS = 1.04  # from the updates before a look to those before the next
FIRST = 20  # updates before the first
QUICK = 10  # a first look takes every tenth test row
MEETING = 200  # updates of each worker between two meetings, at least
AT_ONCE = 1000  # rows


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
        Test errors, falling; with the last of them it is enough.
    most : int
        Updates of fine-tuning, of all workers together, after which it is enough, too.

    Attributes
    ----------
    curve : list
        [seconds, updates of all workers in fine-tuning, rows of all workers, test error] of the looks at all test rows.
    quick : list
        The same, of those at some.
    reached : dict
        By target the line of the curve that reached it.
    """

    test: Rows
    targets: Sequence[float]
    most: float
    curve: list[list[float]] = field(default_factory=list)
    quick: list[list[float]] = field(default_factory=list)
    reached: dict[float, list[float]] = field(default_factory=dict)
    pretraining: tuple[float, int] = 0.0, 0  # seconds, updates of a worker

    def __call__(self, training: Training) -> bool:
        """Whether it is enough."""
        seconds = training.exchange.clock()
        assert training.phase is not None
        if training.phase.layer is not None:
            self.pretraining = seconds, training.updates
            return False
        workers = training.exchange.replicas if training.exchange.shards_rows else 1
        updates = (training.updates - self.pretraining[1]) * workers
        if updates < max(FIRST, self.quick[-1][1] * LOOKS if self.quick else 0) and updates < self.most:
            return False
        self.look(training.phase, seconds, updates)
        return len(self.reached) == len(self.targets) or updates >= self.most

    def look(self, phase: Any, seconds: float, updates: int) -> None:
        """At the parameters of a phase of fine-tuning."""
        def error(positions: np.ndarray) -> float:
            return float(sum(phase.measure(self.test, positions[i : i + AT_ONCE])[1]
                             for i in range(0, len(positions), AT_ONCE)) / len(positions))

        line = [round(seconds, 6), updates, updates * phase.batch]
        every = np.arange(len(self.test))
        some = error(every[::QUICK])
        self.quick.append([*line, some])
        target = next(t for t in self.targets if t not in self.reached)
        if some > target + 2 * math.sqrt(target * (1 - target) * QUICK / len(every)):
            return
        self.curve.append([*line, error(every)])
        for target in self.targets:
            if self.curve[-1][-1] <= target:
                self.reached.setdefault(target, self.curve[-1])


def simulated(data: Digits, given: dict[str, Any], costs: Costs, *, workers: int, rows: int, seen: int,
              targets: Sequence[float], most: float, seed: int = 1) -> dict[str, Any]:
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
    targets : sequence of float
        Test errors, falling.
    most : float
        Updates of fine-tuning, of all workers together, after which it is given up.
    """
    from gpudbn.mpi.simulate import simulate

    settings = Settings(**{**NETWORK, **given, "seed": seed})
    pretrain, finetune = data.sets(workers if settings.mode != "sync" else 1, rows=rows, seen=seen,
                                   batch=settings.finetuning_batch)
    watch, begun = Watch(data.test, targets, most), time.process_time()
    found: dict[str, Any] = {"workers": workers, "rows": rows, "seen": seen, "seed": seed, "settings": given}
    try:
        run = simulate(settings, pretrain, labelled=finetune, replicas=workers, costs=costs, watch=watch)
    except NonFiniteError as error:
        return found | {"failed": str(error), "processor": round(time.process_time() - begun, 1)}
    return found | told(watch, run.servers, run.replicas) | {"processor": round(time.process_time() - begun, 1)}


def told(watch: Watch, servers: list[dict[str, Any]], replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run: when targets were reached, and where time went.

    ``share`` is of a worker's time, the mean over all; ``busy`` of the servers'; ``staleness`` the mean number of
    changes of others by which a change came late.
    """
    seconds = {state: float(np.mean([report["seconds"][state] for report in replicas]))
               for state in replicas[0]["seconds"]}
    whole = sum(seconds.values()) - seconds["starting"]
    late = np.sum([server["staleness"] for server in servers], axis=0)
    return {"pretraining": list(watch.pretraining),
            "reached": {f"{100 * (1 - target):g}": line[:3] for target, line in watch.reached.items()},
            "curve": watch.curve, "quick": watch.quick, "end": watch.quick[-1] if watch.quick else None,
            "share": {state: round(spent / whole, 4) for state, spent in seconds.items()
                      if state not in ("starting", "saving", "applying")},
            "busy": [round(server["seconds"]["applying"] / sum(server["seconds"].values()), 4) for server in servers],
            "staleness": round(float(late @ np.arange(len(late)) / max(1, late.sum())), 2) if servers else None}
