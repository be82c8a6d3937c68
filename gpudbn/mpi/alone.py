"""What a training loop may ask of the other replicas, and the answers where there are none.

``Exchange`` is the whole of what a loop knows of distribution. Its methods do what is right for
a replica on its own; ``collective.Synchronous`` and ``replica.Asynchronous`` override them.
This file imports no MPI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from gpudbn.arrays import Array
from gpudbn.errors import UserError
from gpudbn.factors import Factors
from gpudbn.mpi.tally import Tally
from gpudbn.shards import WHOLE, Shards

Result = TypeVar("Result")


def together(agree: Callable[[str | None], None], action: Callable[[], Result]) -> Result:
    """What the action returns, if no rank's raises UserError: then all do, with one line.

    Parameters
    ----------
    agree : callable
        ``Exchange.agree``, or ``Wire.agree``: of the ranks that act.
    action : callable
    """
    try:
        result = action()
    except UserError as error:
        agree(str(error))
        raise  # what agrees has raised already
    agree(None)
    return result


class Exchange:
    """The other replicas, as seen by the training loop of one.

    Attributes
    ----------
    replica, replicas : int
        My number among the replicas, from 0, and how many there were at the start: so many shards the data have.
    living : tuple of int
        The replicas that took part in the last call that is collective. Only asynchronous ones can be survived.
    local_replica : int
        My number among the replicas of this machine: chooses the GPU.
    chief : bool
        Whether I print and write files: the first of the living, of which shard 0.
    shards : Shards
        The parts of my replica, if it is cut.
    cuts_batches : bool
        Whether each replica computes a slice of every global batch.
    shards_rows : bool
        Whether each replica learns from rows of its own, and calls ``exchange`` between its updates.
    wants_factors : bool
        Whether changes are to be pushed as what made them, where that is known.
    gives_portions : bool
        Whether a batch optimiser runs somewhere else and has replicas compute portions of a batch: see ``search``.
    factors : Factors or None
        Where the phase notes the updates of a turn, for ``exchange``; the loop sets it.
    align : callable
        Makes parameters that several parts of a replica have the same on all of them; the loop sets it.
    tally : Tally
        What this replica does when: ``with exchange.tally.timing("measuring"): ...``
    transport : str
        How changes travel to servers, and why so, in a few words; empty where there are none.

    Notes
    -----
    Every method but ``exchange``, ``refresh``, ``leave`` and ``report`` is collective: all replicas call it, in the
    same order.
    """

    shards: Shards = WHOLE
    replica = 0
    replicas = 1
    living: tuple[int, ...] = (0,)
    local_replica = 0
    cuts_batches = False
    shards_rows = False
    wants_factors = False
    gives_portions = False
    factors: Factors | None = None
    transport = ""

    def __init__(self, tally: Tally | None = None) -> None:
        self.align: Callable[[], None] = lambda: None
        self.tally = tally or Tally(time.perf_counter)  # not self.clock: a circle would keep phases, and their memory
        self.tally.enter("computing")

    @property
    def first(self) -> bool:
        """Whether my replica is the first of the living."""
        return self.replica in self.living[:1]

    @property
    def chief(self) -> bool:
        return self.first and self.shards.index == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank to wait for."""
        return self.replicas == 1 and self.shards.count == 1

    def clock(self) -> float:
        """Seconds since some time in the past: the clock of the records."""
        return time.perf_counter()

    def choose_collectives(self, wanted: str, xp: Any) -> str:  # noqa: ARG002
        """Before the first ``begin``: by what arrays of module ``xp`` are added up; collective.

        Parameters
        ----------
        wanted : str
            ``--collectives``.

        Returns
        -------
        str
            A word for the log; empty where there is nothing to choose.
        """
        return ""

    def begin(self, parameters: Array) -> None:
        """Start of a phase (a layer, a fine-tuning): all leave with the values of replica 0.

        Parameters
        ----------
        parameters : array (size,), float32
            Modified, except on replica 0. The size may differ from phase to phase.
        """

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """What a checkpoint keeps of the exchange: arrays that all replicas have alike, and this replica's own.

        To be asked after ``meet``. Names are the same on every replica.
        """
        return {}, {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """After ``begin``: take up what ``state`` gave, which is among these."""

    def part(self, parameters: Array) -> None:
        """Start of an epoch: each goes on from parameters of its own, if those it left ``meet`` with are not."""

    def add_(self, sums: Array) -> None:
        """sums = sum over replicas of sums, in place, where batches are cut. Same bits on every replica."""

    def add_in_order_(self, sums: Array, partials: list[Array]) -> None:
        """sums = ((0 + p0) + p1) + ..., through the partials of replica 0, then of replica 1, ...

        Blocks of constant size thus give the same bits whatever the number of replicas.

        Parameters
        ----------
        sums : array of any shape
            Overwritten.
        partials : list of arrays of that shape and place
            My blocks, in order; may be empty. Not modified.
        """
        sums.fill(0)
        for partial in partials:
            sums += partial

    @property
    def packed(self) -> str:
        """How the last change was pushed: see ``changes.Packing``; empty where there is no server."""
        return ""

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:
        """Give my change, parameters - before, to the server or to all, and take what has come of everyone's.

        Parameters
        ----------
        parameters : array (size,), float32
            Modified if ``fetch``: the server's parameters, plus my change where it is not yet in them.
        before : array (size,), float32
            What the parameters were at the last exchange. Afterwards equal to ``parameters``.
        fetch : bool
            False: only give, where there is a server.

        Notes
        -----
        Does nothing, to ``before`` as well, unless the replicas have rows of their own. Changes are not looked
        at here: the loop checks at intervals that its parameters are finite.
        """

    def turns(self, each: int, warm: int = 0) -> Iterator[tuple[int, int]]:  # noqa: ARG002
        """The turns of an epoch that this replica does, as (replica whose shard it is, number of the turn in it).

        Parameters
        ----------
        each : int
            Turns of a shard: 0, ..., each - 1. The same on all replicas.
        warm : int
            Asynchronous: so many the chief does before the others begin.

        Notes
        -----
        After each of them and before the next, call ``exchange``. Alone or in step: one's own, in order. Asynchronous
        replicas begin with these and do those of others when they are through: of lost ones, and of slow ones.
        """
        for number in range(each):
            yield self.replica, number

    def refresh(self, parameters: Array, before: Array) -> None:
        """Before a turn: take the latest parameters, into both, if ``turns`` made this replica wait."""

    def search(self, parameters: Array, gradient: Array, compute: Callable[[int, int], float], rows: int, *,
               method: str, history: int, searches: int, portions: int | None = None) -> None:
        """Where the exchange ``gives_portions``: what a batch optimiser makes of a batch, see ``sandblaster.py``.

        Parameters
        ----------
        parameters : array (size,), float32
            Afterwards what the batch has come to, or one of the points that the next batch tries.
        gradient : array (size,), float32
            Work space.
        compute : callable
            Given two rows of the batch, leaves in ``gradient`` the sum over the rows from the first to before the
            second of minus the gradient of the loss at ``parameters``; returns the sum of the loss.
        rows : int
            Of the batch, which is the same on all replicas.
        method, history, searches
            See ``batch.Minimiser``; iterations of this batch.
        portions : int, optional
            Into how many the batch is cut; default: some for each replica.
        """
        raise NotImplementedError

    def meet(self, parameters: Array) -> None:
        """End of an epoch: every change is in, and all leave with equal parameters: those to be measured and saved.

        Changes since the last ``exchange`` are lost: exchange first. ``before`` is the caller's to renew.
        """

    def total(self, values: np.ndarray) -> np.ndarray:
        """The whole table, on all replicas, of which each of the living has filled some rows and left zeros elsewhere.

        If a replica is lost meanwhile, its rows are missing, and ``living`` is another than before.

        Parameters
        ----------
        values : ndarray (blocks, k), float64
            Not modified. Rows summed in order give the same bits everywhere.
        """
        return values

    def any(self, flag: bool) -> bool:
        """Whether any replica says so; all get the answer."""
        return bool(flag)

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The arrays of all the living in order, of any shapes, on the first; None elsewhere.

        Of replicas that are cut, those of the same part.
        """
        return [array]

    def told(self, text: str) -> str:
        """The chief's text, on all replicas."""
        return text

    def agree(self, error: str | None) -> None:
        """Raise UserError on every replica if one of them has an error to tell; it is printed once."""
        if error:
            raise UserError(error)

    def report(self) -> dict[str, Any]:
        """What this replica did so far.

        Returns
        -------
        dict
            ``role``, ``number``, and what ``Tally.about`` tells; ``pushes``, ``pulls``, ``reads_retried``,
            ``reads_asked``: 0 unless asynchronous.
        """
        return {"role": "replica", "number": self.replica, "part": self.shards.index, **self.tally.about(),
                "pushes": 0, "pulls": 0, "reads_retried": 0, "reads_asked": 0}

    def reports(self) -> list[dict[str, Any]] | None:
        """The reports of all ranks, servers first, on the chief; None elsewhere."""
        return [self.report()]

    def leave(self, why: str) -> bool:
        """I cannot go on. If others can, return True when their run is over, for ``close``; False if none can."""
        del why
        return False

    def ranks(self) -> list[dict[str, Any]]:
        """Role, host and process of every rank of the job, to find the one that a launcher names."""
        return []

    def close(self) -> None:
        """End of the run. Nothing may be asked afterwards but ``report``."""


class Alone(Exchange):
    """One replica, no MPI."""
