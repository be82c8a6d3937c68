"""Training with servers and replicas in virtual time: the real program, real gradients, real data, one process.

Every rank is what it is under ``mpirun`` (``mpi.join``), on a wire in virtual time (``virtual.py``); updates take
the seconds that ``costs.py`` says, times what the rank's core is slower and busier. What comes out is what would
come out on such a cluster: records with its seconds, staleness, who waited for whom.

    simulate(settings, data, replicas=128, servers=1, costs=Costs.read("cluster.toml")).records

Memory: data are shared; each replica has parameters, velocity, gradient and work space of its own, and a mailbox at
a server. A GPU takes no part: the costs may be those of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from gpudbn.data import DataSet
from gpudbn.dbn import DBN
from gpudbn.errors import UserError
from gpudbn.loop import Training, largest
from gpudbn.mpi import chosen, join
from gpudbn.mpi.alone import Alone, Exchange
from gpudbn.mpi.costs import Costs
from gpudbn.mpi.machine import Machine
from gpudbn.mpi.server import Server
from gpudbn.mpi.virtual import VirtualWire, run
from gpudbn.pretrain import Phase
from gpudbn.settings import BATCH_OPTIMISERS, Settings

ROWS = {"update": 1, "sums": 2, "step": 1, "measure": 1}  # which argument of a phase's method says how many rows


@dataclass
class Simulation:
    """What came of it. Seconds are virtual. If it was ended before its end, what had come of it until then.

    Attributes
    ----------
    records : list of dict
        As ``Training.run`` yields them on replica 0.
    servers, replicas : list of dict
        What each reported at its end: see ``Server.report``, ``Exchange.report``. Their hosts are nodes.
    dbn : DBN
        That of replica 0.
    seconds : float
        Of the whole run, tests included.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    servers: list[dict[str, Any]] = field(default_factory=list)
    replicas: list[dict[str, Any]] = field(default_factory=list)
    dbn: DBN | None = None
    seconds: float = 0.0


def simulate(settings: Settings, data: DataSet, *, replicas: int, costs: Costs, labelled: DataSet | None = None,
             record: Callable[[dict[str, Any]], None] | None = None,
             watch: Callable[[Training], bool] | None = None) -> Simulation:
    """Train as the settings say, with so many replicas, and servers around them in mode async.

    Parameters
    ----------
    settings : Settings
        One replica and ``servers`` 0 is a single process, whatever the mode.
    data, labelled : DataSet
        As for ``Training``.
    costs : Costs
        With as many phases as the run has.
    record : callable, optional
        Called with each record as it comes.
    watch : callable, optional
        Called on replica 0 after each of its updates, or where replicas have rows of their own after each exchange:
        ``training.phase`` has its parameters, ``training.exchange.clock()`` is the time. It takes no time. If it
        returns True the simulation ends there.

    Raises
    ------
    UserError
        If the settings do not fit so many replicas, or the costs not the run.
    """
    if settings.shards > 1:
        raise UserError(f"--shards: must be 1 in a simulation, whose costs are those of whole layers; "
                        f"got {settings.shards}")
    servers = settings.servers if settings.mode == "async" else 0
    plan = replace(chosen(settings, servers + replicas), transport="staged")
    size = largest(settings, data, labelled)
    machine, found = Machine(servers + replicas, costs, settings.seed), Simulation()
    joined: dict[int, tuple[Exchange | Server, VirtualWire]] = {}
    orders: dict[tuple[int, int], np.ndarray] = {}

    def rank(wire: VirtualWire) -> dict[str, Any]:
        exchange = join(wire, plan, size) if wire.size > 1 else _Alone(wire)
        joined[wire.rank] = exchange, wire
        if isinstance(exchange, Server):
            return exchange.serve() | wire.place
        dbn = DBN([data.train.n, *settings.layers], np, local=settings.local)
        training = _Timed(dbn, data, settings, exchange, labelled, wire, orders)
        if exchange.chief:
            found.dbn = dbn
            if watch:
                training.progress = partial(training.show, watch)
        for item in training.run():
            if exchange.chief:
                found.records.append(item)
                if record:
                    record(item)
        report = exchange.report()
        exchange.close()
        return report | wire.place

    try:
        reports = run(machine, rank)
    except _Enough:
        reports = [end.report() | wire.place for _, (end, wire) in sorted(joined.items())]
    found.servers, found.replicas, found.seconds = reports[:servers], reports[servers:], machine.now
    return found


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """Ends a simulation of which enough has been seen."""


class _Alone(Alone):
    """One replica, in virtual time."""

    def __init__(self, wire: VirtualWire) -> None:
        self.wire = wire
        super().__init__(wire.tally)

    def clock(self) -> float:
        return self.wire.clock()


class _Timed(Training):
    """Training whose phases take virtual time."""

    def __init__(self, dbn: DBN, data: DataSet, settings: Settings, exchange: Exchange, labelled: DataSet | None,
                 wire: VirtualWire, orders: dict[tuple[int, int], np.ndarray]) -> None:
        super().__init__(dbn, data, settings, exchange, labelled=labelled)
        self.wire, self.orders, self._inside = wire, orders, False
        costs = wire.machine.costs.phases
        if len(costs) != self.phases:
            raise UserError(f"costs: must have {self.phases} phases, as the run has; got {len(costs)}")

    def show(self, watch: Callable[[Training], bool], *_: int) -> None:
        """Let this training be watched: whatever is computed for that takes no time."""
        self._inside, before = True, self._inside
        enough = watch(self)
        self._inside = before
        if enough:
            raise _Enough

    def _turn(self) -> int:
        return 1 if self.progress and not self._own_rows else super()._turn()  # who watches sees every update

    def _order(self, count: int, owner: int) -> np.ndarray:
        """Where all replicas have the same rows, one array for all of them: it may be larger than all else."""
        if self._own_rows:
            return super()._order(count, owner)
        epoch = self.index, self.epoch
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = super()._order(count, owner)
            self.orders[epoch].flags.writeable = False
        return self.orders[epoch]

    def _make_phase(self) -> Phase:
        phase = super()._make_phase()
        searches = self.index >= self.depth and self.settings.optimiser in BATCH_OPTIMISERS
        for name in ROWS.keys() - ({"update"} if searches else set()):  # whose update is as many sums as it takes
            setattr(phase, name, partial(self._take_time, getattr(phase, name), name))
        return phase

    def _take_time(self, method: Callable[..., Any], name: str, *arguments: Any, **more: Any) -> Any:
        """Call a method of a phase; its time goes by before it returns. A method that it calls costs nothing more."""
        if self._inside:
            return method(*arguments, **more)
        rows = arguments[ROWS[name]]
        count = rows if name == "step" else len(rows if name == "measure" else rows.positions)
        self._inside = True
        result = method(*arguments, **more)
        self._inside = False
        costs = self.wire.machine.costs.phases[self.index]
        self.wire.compute(costs.seconds(name, count), costs.crowding)
        return result
