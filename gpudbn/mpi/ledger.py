"""Which turns of a run are done, and who does what is left of an epoch.

A turn is a few minibatches of the shard of one replica, its owner. Turns are numbered through the run, so that a
server applies the change of each turn once, whoever sends it and however often: ``Ledger``. Replicas push to the first
server last: what is done there has arrived at all servers, and it alone hands turns on: ``Epoch``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np


class Ledger:
    """The turns whose change is applied at one server."""

    def __init__(self) -> None:
        self._done = np.zeros(1024, bool)

    def add(self, turn: int) -> None:
        """It is done."""
        while turn >= self._done.size:
            self._done = np.concatenate([self._done, np.zeros_like(self._done)])
        self._done[turn] = True

    def done(self, first: int, count: int) -> np.ndarray:
        """Which of the turns ``first``, ``first + 1``, ... are done: array (count,), bool."""
        found = np.zeros(count, bool)
        known = self._done[first : first + count]
        found[: known.size] = known
        return found


class Epoch:
    """Who does the turns of one epoch.

    Each replica does those of its own shard in order, without asking, up to its limit. One that is through asks for
    more and gets turns of those that are lost, or else the last turn of the slowest: its limit falls. The slowest may
    have begun that very turn; then both do it, and the ledger takes the first. (Sandblaster hands out small portions
    and duplicates the last ones for the same reason: Dean et al., "Large scale distributed deep networks" (2012), 4.2.)

    Parameters
    ----------
    ledger : Ledger
        Of the first server.
    first : int
        Number of the first turn. Replica r owns first + r * each, ..., first + (r + 1) * each - 1.
    each : int
        Turns of a shard.
    limit : array (replicas,), int64
        Overwritten: how many of its own turns each replica does. A view of what the server publishes.
    lost : iterable of int
        Replicas that are lost already.
    """

    def __init__(self, ledger: Ledger, first: int, each: int, limit: np.ndarray, lost: Iterable[int] = ()) -> None:
        self.ledger, self.first, self.each, self.limit = ledger, first, each, limit
        self._free: deque[int] = deque()  # turns of nobody; those done in the meantime among them
        self._holder: dict[int, int] = {}  # of turns that were given out
        self._warm, self._before = False, np.zeros_like(limit)  # turns that one did alone, once it has
        limit[:] = each
        for replica in lost:
            self.lose(replica)

    def lose(self, replica: int) -> None:
        """Its turns are free, and those it was given."""
        start = self.first + replica * self.each
        self._free += range(start, start + int(self.limit[replica]))
        self._free += [turn for turn, holder in self._holder.items() if holder == replica]
        self.limit[replica] = 0

    def next(self, replica: int) -> int | None:
        """A turn for one that is through with its own, or None as long as there is none to give."""
        while self._free:
            turn = self._free.popleft()
            if not self.ledger.done(turn, 1)[0]:
                self._holder[turn] = replica
                return turn
        left = [self._unstarted(owner) for owner in range(self.limit.size)]
        slowest = int(np.argmax(left))
        if left[slowest] <= 0:
            return None
        self.limit[slowest] -= 1
        turn = self.first + slowest * self.each + int(self.limit[slowest])
        self._holder[turn] = replica
        return turn

    def allowed(self, replica: int, living: Sequence[int], ahead: int, warm: int) -> int:
        """How many of its own turns a replica may have begun by now: it waits before it begins another.

        Parameters
        ----------
        living : sequence of int
            Those that are waited for.
        ahead : int
            It may have done so many more than the slowest that has some left. Ho et al., "More effective distributed ML
            via a stale synchronous parallel parameter server" (2013), section 3.
        warm : int
            So many turns the first of the living does while the others wait; they do not count for ``ahead``. Dean et
            al. (2012), section 4.1: warmstarting.
        """
        first = living[0]
        alone = min(warm, int(self.limit[first]))
        if not self._warm and self._finished(first) >= alone:
            self._warm, self._before[first] = True, alone
        if not self._warm:
            return alone if replica == first else 0
        counts = [self._finished(other) - self._before[other] for other in living
                  if other != replica and self._finished(other) < self.limit[other]]
        return int(self._before[replica]) + min(map(int, counts), default=self.each) + ahead + 1

    def over(self) -> bool:
        """Whether all turns are done."""
        return bool(self.ledger.done(self.first, self.limit.size * self.each).all())

    def _unstarted(self, owner: int) -> int:
        """How many of its own turns an owner has not begun: it is in the one behind the last that is done."""
        return int(self.limit[owner]) - self._finished(owner) - 1

    def _finished(self, owner: int) -> int:
        """How many of the turns that are its own to do are done."""
        return int(self.ledger.done(self.first + owner * self.each, int(self.limit[owner])).sum())
