"""Sandblaster: L-BFGS and conjugate gradient over servers that hold the vectors, and replicas that compute gradients.

Dean et al., "Large scale distributed deep networks" (2012), section 4.2.

    Coordinator    at the first server: runs ``batch.Minimiser``, sends commands, gives out portions; sees numbers only
    Shard          at every server: its part of x, g, d and of the history, and the arithmetic on it
    Portions       who computes which portion of a batch; ``Sum``: what came of them

For each evaluation all servers publish x. A replica asks the first server for a portion, much smaller than its share of
the batch, pulls x if it has not yet, pushes the portion's gradient to every server, and asks for the next. So fast ones
do more. When all portions are out, one that is free gets one that another has and would be longer about.

Counted once: a push says of which evaluation and portion it is, and each server takes the first of these, of the
current evaluation only. Replicas push to the first server last: what it has taken has arrived at, or is on its way to,
all. Two answers for a portion are computed from the same x on the same rows; servers may take either.

The same bits: portions are the same rows whoever computes them, and are added in pairs, neighbours first, whatever
the order in which they arrive; losses are added exactly. What a batch comes to depends on the number of portions and
(dot products, to rounding in float64) of servers, not on how many replicas there are, which are slow and which die. A
chain of sums in order would have to keep all that arrives early; in pairs these merge, so that a server keeps no more
than log2(portions) vectors for each portion that is missing. So portions are also pushed one by one: sums of
those that one replica happened to do would save traffic and lose both.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.batch import Arrays, Minimiser
from gpudbn.mpi import changes
from gpudbn.mpi.wire import Wire

COMMAND, RESULT = 31, 32  # tags between servers
OVER = b"over"  # in the place of a portion: the batch is done
EACH = 8  # portions of a batch for each replica, unless it is said how many


class Batch(NamedTuple):
    """What every replica tells the first server of a batch; the first one to come opens it.

    Attributes
    ----------
    number : int
        Of the batch in the job.
    rows, portions : int
        How many rows, and into how many portions they are cut.
    method, history, searches
        See ``Minimiser``; iterations of this batch.
    """

    number: int
    rows: int
    portions: int
    method: str
    history: int
    searches: int

    def pack(self) -> bytes:
        """For a message."""
        return json.dumps(self).encode()

    @classmethod
    def unpack(cls, content: bytes) -> Batch:
        """From a message."""
        return cls(*json.loads(content))

    def span(self, portion: int) -> tuple[int, int]:
        """First row of a portion, and the one behind its last."""
        return self.rows * portion // self.portions, self.rows * (portion + 1) // self.portions


class Ticket(NamedTuple):
    """A portion of an evaluation, as given to a replica."""

    evaluation: int
    portion: int

    def label(self, loss: float, nbytes: int) -> np.ndarray:
        """Of the push of its gradient; see ``changes.py``."""
        label = np.zeros(changes.WORDS, np.int64)
        label[changes.BYTES], label[changes.TURN] = nbytes, self.evaluation << 32 | self.portion
        label[changes.LOSS] = struct.unpack("q", struct.pack("d", loss))[0]
        return label

    @classmethod
    def of(cls, label: np.ndarray) -> tuple[Ticket, float]:
        """The ticket and the loss that are in a label."""
        turn, loss = int(label[changes.TURN]), struct.pack("q", int(label[changes.LOSS]))
        return cls(turn >> 32, turn & 0xFFFFFFFF), struct.unpack("d", loss)[0]

    def pack(self) -> bytes:
        """For a message."""
        return np.array(self, np.int64).tobytes()

    @classmethod
    def unpack(cls, content: bytes) -> Ticket:
        """From a message."""
        return cls(*np.frombuffer(content, np.int64).tolist())


class Sum:
    """Gradients of the portions of an evaluation, added in pairs in an order that depends on their number alone.

    Attributes
    ----------
    done : list of bool
        Which portions are in it.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], Array] = {}  # by level and place: sums that wait for their neighbours
        self._spare: list[Array] = []
        self.begin(0)

    def begin(self, portions: int) -> None:
        """A new sum, of so many."""
        self._spare += self._nodes.values()
        self._nodes.clear()
        self.done = [False] * portions
        self._losses = [0.0] * portions
        self._left = portions

    def add(self, portion: int, gradient: Array, loss: float) -> bool:
        """Count a portion, if it is not counted yet. The gradient is not modified, nor kept."""
        if self.done[portion]:
            return False
        self.done[portion], self._losses[portion] = True, loss
        self._left -= 1
        level, place, width, node, mine = 0, portion, len(self.done), gradient, False
        while width > 1:
            if place ^ 1 < width:  # the last of a level may have no neighbour
                other = self._nodes.pop((level, place ^ 1), None)
                if other is None:
                    break
                other += node
                if mine:
                    self._spare.append(node)
                node, mine = other, True
            level, place, width = level + 1, place // 2, (width + 1) // 2
        if not mine:
            node = self._spare.pop() if self._spare else module_of(gradient).empty_like(gradient)
            node[...] = gradient
        self._nodes[level, place] = node
        return True

    def whole(self) -> bool:
        """Whether all portions are in it."""
        return not self._left

    @property
    def total(self) -> Array:
        """Of a sum that is whole."""
        (total,) = self._nodes.values()
        return total

    @property
    def loss(self) -> float:
        """Of a sum that is whole; NaN if one is not finite."""
        return math.fsum(self._losses) if all(map(math.isfinite, self._losses)) else math.nan


class Portions:
    """Who computes which portion of an evaluation.

    Given out in order. When all are out, one that is free gets a portion that another has, if it is likely to be
    through with it earlier: backup tasks, as in Dean & Ghemawat, "MapReduce" (2004), section 3.6. How long each takes
    is taken to be what it took the last time; of one that is dead, overdue or new nothing is expected.

    Parameters
    ----------
    done : sequence of bool
        Which portions are counted; the caller keeps it up to date.
    seconds : dict of int to float, optional
        What each took for a portion, kept from one evaluation to the next; modified.
    """

    def __init__(self, done: Sequence[bool], seconds: dict[int, float] | None = None) -> None:
        self._done = done
        self._seconds = {} if seconds is None else seconds
        self._out: list[dict[int, float]] = []  # of each portion given out: who has it, and when it is expected

    def claim(self, worker: int, now: float) -> int | None:
        """A portion for one that is free, or None as long as there is none to give."""
        expected = now + self._seconds.get(worker, math.inf)
        if len(self._out) < len(self._done):
            self._out.append({worker: expected})
            return len(self._out) - 1
        ends = {portion: min((end for end in holders.values() if end >= now), default=math.inf)
                for portion, holders in enumerate(self._out) if not self._done[portion] and worker not in holders}
        latest = max(ends, key=lambda portion: ends[portion], default=None)
        if latest is None or ends[latest] <= now + self._seconds.get(worker, 0.0):
            return None
        self._out[latest][worker] = expected
        return latest

    def lose(self, worker: int) -> None:
        """What it has, others may do."""
        for holders in self._out:
            holders.pop(worker, None)


class Shard:
    """A server's part of the vectors. What the coordinator commands is done by ``do``.

    Parameters
    ----------
    x : array (size,), float32
        The parameters of this server. Modified.
    wire : Wire
        For its tally and its clock.
    publish : callable
        Let the replicas read x from now on.
    until : callable
        Takes a condition and returns when it holds; takes pushes in the meantime.
    """

    def __init__(self, x: Array, wire: Wire, publish: Callable[[], None],
                 until: Callable[[Callable[[], bool]], None]) -> None:
        self._g = module_of(x).zeros_like(x)
        self._vectors = Arrays(x, self._g, _not_here)
        self._wire, self._publish, self._until = wire, publish, until
        self.evaluation = 0  # number of the current one
        self.sum = Sum()

    def take(self, label: np.ndarray, payload: Array) -> bool:
        """Count what a replica has pushed; False if it comes too late, or another has done it."""
        ticket, loss = Ticket.of(label)
        if ticket.evaluation != self.evaluation or not self.sum.add(ticket.portion, payload.view(np.float32), loss):
            return False
        self._wire.worked("apply", payload.nbytes)
        return True

    def do(self, command: Sequence[Any]) -> list[float]:
        """Obey; the numbers that come of it.

        ["combine", to, [[factor, name], ...]] and ["dots", [[a, b], ...]]: see ``batch.Vectors``
        ["publish"]: x
        ["open", evaluation, portions]: publish x, and add up gradients from now on
        ["close", rows]: when all are there, g = minus their sum by the number of rows
        """
        found: list[float] = []
        with self._wire.tally.timing("applying"), np.errstate(over="ignore", invalid="ignore"):
            match command:
                case "combine", to, terms:
                    self._vectors.combine(to, terms)
                    self._wire.worked("apply", self._g.nbytes * len(terms))
                case "dots", pairs:
                    found = self._vectors.dots(pairs)
                    self._wire.worked("apply", self._g.nbytes * len(pairs))
                case ["publish"]:
                    self._publish()
                case "open", evaluation, portions:
                    self.evaluation = evaluation
                    self.sum.begin(portions)
                    self._publish()
                case "close", rows:
                    with self._wire.tally.timing("waiting"):
                        self._until(self.sum.whole)
                    module_of(self._g).multiply(self.sum.total, np.float32(-1 / rows), out=self._g)
                case _:
                    raise ValueError(f"sandblaster: must be a command; got {command}")
        return found


def _not_here() -> float:
    raise RuntimeError("sandblaster: a shard has no objective; the coordinator evaluates")


class Coordinator:
    """Batch optimisation, as the first server runs it: ``Vectors`` of which it never sees an entry.

    Parameters
    ----------
    shard : Shard
        This server's.
    servers : Wire or None
        All servers, if there are others.
    until : callable
        As of ``Shard``; receives and settles in the meantime.
    clock : callable
        Seconds.
    answer : callable (replica, bytes)
        To one that has asked for a portion.
    """

    def __init__(self, shard: Shard, servers: Wire | None, until: Callable[[Callable[[], bool]], None],
                 clock: Callable[[], float], answer: Callable[[int, bytes], None]) -> None:
        self._shard, self._servers, self._until, self._clock, self._answer = shard, servers, until, clock, answer
        self._minimiser: Minimiser | None = None
        self._batch: Batch | None = None  # the current one, or the next
        self._running = self._open = False  # a batch; an evaluation of it
        self._over = -1  # number of the last batch that is done
        self._asking: dict[int, int] = {}  # replicas that wait for a portion, of which batch
        self._begun: dict[int, float] = {}  # when each was given its last
        self._seconds: dict[int, float] = {}  # what each took for it
        self._portions = Portions(())

    def come(self, replica: int, content: bytes) -> None:
        """A replica asks for a portion of a batch."""
        batch = Batch.unpack(content)
        if replica in self._begun:
            self._seconds[replica] = self._clock() - self._begun.pop(replica)
        self._asking[replica] = batch.number
        if batch.number > self._over and not self._running:
            self._batch = batch

    def lose(self, replica: int) -> None:
        """Expect nothing of it any more."""
        self._asking.pop(replica, None)
        self._portions.lose(replica)

    def settle(self) -> bool:
        """Run a batch that has been asked for; answer those that ask. Whether there was anything."""
        did = False
        if self._batch and self._batch.number > self._over and not self._running:
            did = True
            self._run(self._batch)
        for replica, number in list(self._asking.items()):
            content = OVER
            if number > self._over:
                portion = self._portions.claim(replica, self._clock()) if self._open else None
                if portion is None:
                    continue
                self._begun[replica] = self._clock()
                content = Ticket(self._shard.evaluation, portion).pack()
            did = True
            del self._asking[replica]
            self._answer(replica, content)
        return did

    def _run(self, batch: Batch) -> None:
        self._running = True
        if self._minimiser is None:
            self._minimiser = Minimiser(self, batch.method, history=batch.history)
        self._minimiser.forget()
        for _ in self._minimiser.run(batch.searches):
            pass
        self._all("publish")
        self._running, self._over = False, batch.number

    # -- Vectors

    def combine(self, to: str, terms: Sequence[tuple[float, str]]) -> None:
        """See ``batch.Vectors``."""
        self._all("combine", to, terms)

    def dots(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See ``batch.Vectors``: sums over the servers, in their order."""
        return [sum(parts) for parts in zip(*self._all("dots", pairs), strict=True)]

    def evaluate(self) -> float:
        """See ``batch.Vectors``."""
        assert self._batch is not None
        self._all("open", self._shard.evaluation + 1, self._batch.portions)
        self._portions = Portions(self._shard.sum.done, self._seconds)
        self._open = True
        self._until(self._shard.sum.whole)
        self._open = False
        self._all("close", self._batch.rows)
        return self._shard.sum.loss / self._batch.rows

    def _all(self, *command: Any) -> list[list[float]]:
        """Have all servers obey: what each found."""
        wire, text = self._servers, json.dumps(command).encode()
        if wire is None:
            return [self._shard.do(command)]
        for other in range(1, wire.size):
            wire.send_bytes(text, other, COMMAND)
        return [self._shard.do(command), *(json.loads(wire.recv_bytes(other, RESULT)) for other in range(1, wire.size))]
