"""A parameter server: takes changes out of mailboxes as they arrive, publishes what comes of them.

There may be several, each with its shard of the parameters (``cuts``): they know nothing of one another.
A change is applied once in each shard, whatever dies: ``ledger.py``.

It knows vectors and a step rule (``rules.py``), not what they mean; how changes and parameters travel is the
business of ``staged.py``, and how a change is packed that of ``changes.py``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import numpy as np

from gpudbn.arrays import module_of
from gpudbn.errors import LostError
from gpudbn.mpi import changes
from gpudbn.mpi.hub import Hub, pack
from gpudbn.mpi.ledger import Epoch, Ledger
from gpudbn.mpi.rules import Compensated, Rule, add, state_of
from gpudbn.mpi.staged import ANSWER, ASK, ServerEnd
from gpudbn.mpi.wire import AgreedError, RanksLostError, Wire
from gpudbn.tracing import span

# tags of what replicas tell a server; all but FAIL and FINISH are answered
BEGIN = 11  # the values to begin with
LOST = 12  # the numbers of replicas that are lost
FAIL = 13  # an error that the replicas agreed on
FINISH = 14  # the run is over for me
REPORT = 19  # tell what you did
KEEP, RESTORE = 20, 21  # tell what your rule keeps; and take it back
# the first server only
MEET, COLLECT = 15, 16  # what I bring to a meeting; for all, or for the chief
MORE = 17  # my turns are done: first turn and turns of a shard in this epoch
LEAVE = 18  # I cannot go on, and why
GO = 22  # may I begin a turn of my own? First turn and turns of a shard, turns I have done, ``ahead``, ``warm``
NO_MORE = -1  # in the place of a turn

LONGEST_PAUSE = 0.25e-3  # seconds; where MPI needs the server to move data, each step of a push may wait that long
LINE = 16  # float32 of a cache line
STALENESS = 32  # entries of the histogram, and two for each replica; the last counts all that are staler


def cuts(size: int, servers: int) -> list[slice]:
    """The shards of a vector: one for each server, in order, at multiples of a cache line; the last may be empty."""
    part = -(-size // servers // LINE) * LINE
    return [slice(min(i * part, size), min((i + 1) * part, size)) for i in range(servers)]


class Header:
    """What a server publishes together with parameters: views of ``words``, an array of int64.

    Attributes
    ----------
    version : array (1,)
        How many changes were applied.
    applied : array (replicas,)
        The sequence number of the last change of each replica that was.
    staleness : array (STALENESS + 2 replicas,)
        Histogram: entry s counts changes that were applied s versions late, the last one that many or more.
    epoch : array (1,)
        The first turn of the epoch of ``limit``.
    limit : array (replicas,)
        How many turns of its own shard each replica does: see ``ledger.Epoch``. From the first server.
    """

    def __init__(self, replicas: int) -> None:
        sizes = np.array([1, replicas, STALENESS + 2 * replicas, 1, replicas])
        self.words = np.zeros(sizes.sum(), np.int64)
        self.version, self.applied, self.staleness, self.epoch, self.limit = np.split(
            self.words, np.cumsum(sizes)[:-1])
        self.epoch[0] = -1


class Server:
    """One server: rank 0 of its wire, on which the other ranks are the replicas.

    The first server is also where replicas meet (``hub.py``) and get turns of others (``ledger.py``). It decides who is
    lost; the other servers are told by the replicas, after every meeting that somebody missed.

    Parameters
    ----------
    world : Wire
        All ranks: other servers, too.
    wire : Wire
        This server and all replicas. Collective: the replicas make their ends at the same time.
    size : int
        Entries of this server's shard of the largest parameter vector of the run.
    rule : callable (parameters, change, staleness), optional
        Applies a change (float32, not modified) to the parameters (float32, in place). Staleness: how many
        changes of other replicas came in since the parameters on which the change was computed.
    end : callable (wire, size, header_words)
        Makes this end of the transport, a ``ServerEnd``.
    """

    transport = ""  # which, and why so, in a few words

    def __init__(self, world: Wire, wire: Wire, size: int, rule: Rule | None = None, end: Any = ServerEnd) -> None:
        self.world, self.wire = world, wire
        self.replicas = wire.size - 1
        self.rule = rule or add
        servers = world.size - self.replicas
        world.label = "server" if servers == 1 else f"server {world.rank} of {servers}"
        self._header = Header(self.replicas)  # as it will be published next
        self._end = end(wire, size, self._header.words.size)
        self._parameters = self._end.empty(0)
        self._asked = 0
        self._first = 0
        self._ledger = Ledger()
        self._refused = np.zeros(self.replicas, np.int64)  # changes of turns that were done already
        self._lost: list[int] = []
        self._finished: set[int] = set()
        # of the first server
        self._hub = Hub(self.replicas)
        self._chief_only = False  # whether what is brought to this meeting is for the chief only
        self._epoch: Epoch | None = None
        self._idle: list[int] = []  # replicas that wait for a turn
        self._held: dict[int, list[int]] = {}  # those that have turns and must wait; turns done, ``ahead``, ``warm``
        self._left: list[int] = []  # replicas that gave up, and wait for the end

    def agree(self, error: str | None) -> None:
        """Before ``serve``: raise on all ranks if one has an error; see ``Exchange.agree``."""
        self.world.agree(error)

    def serve(self) -> dict[str, Any]:
        """Serve until all replicas say that the run is over, or are lost.

        Returns
        -------
        dict
            See ``report``.

        Raises
        ------
        UserError
            If the replicas agreed on an error.
        LostError
            If no replica is left.
        """
        self.wire.tally.enter("waiting")
        pause = self.wire.pause(LONGEST_PAUSE)
        while len(self._finished) + len(self._lost) < self.replicas:
            if self._receive() + self._take() + self._settle():
                pause.reset()
            else:
                pause()
        if not self._finished:
            raise LostError("replicas: at least one must live; got all lost")
        for replica in self._left:
            self._send(replica, b"")
        report = self.report()
        self.world.close()
        return report

    def report(self) -> dict[str, Any]:
        """What this server did so far.

        Returns
        -------
        dict
            ``role``, ``number``, and what ``Tally.about`` tells; ``applied`` (changes of each replica), ``refused``
            (those among them of turns that others had done), ``version``, ``staleness`` (histogram), ``asked`` (reads
            by message), ``lost`` (replicas).
        """
        header = self._header
        return {"role": "server", "number": self.world.rank, **self.wire.tally.about(),
                "applied": header.applied.tolist(), "refused": self._refused.tolist(),
                "version": int(header.version[0]), "staleness": header.staleness.tolist(), "asked": self._asked,
                "lost": self._lost}

    def _take(self) -> bool:
        """Apply what lies in the mailboxes, then publish once. Whether there was anything."""
        full = self._end.full()
        if not full:
            return False
        with self.wire.tally.timing("applying"):
            order = sorted(full, key=lambda replica: (replica - self._first) % self.replicas)
            self._first = order[0] + 1  # of several that are full at once, another goes first next time
            bad = [replica for replica in order if not self._apply(replica)]
            self._publish()
        for replica in bad:
            self._lose(replica, "sent NaN or infinity")
        return True

    def _apply(self, replica: int) -> bool:
        """Apply the change in a mailbox, if its turn is not done. False if it is not finite: nothing is done then."""
        header, label = self._header, self._end.label(replica)
        self._end.taken(replica)
        header.applied[replica] += 1
        turn = int(label[changes.TURN])
        if turn != changes.NO_TURN and self._ledger.done(turn, 1)[0]:
            self._refused[replica] += 1
            return True
        staleness = int(header.version[0] - label[changes.BASE])
        with span("apply"):
            rule = partial(self.rule, replica=replica) if isinstance(self.rule, Compensated) else self.rule
            if not changes.apply(rule, self._parameters, label, self._end.payload(replica), staleness):
                self._end.shut(replica)
                return False
            self.wire.worked("apply", self._parameters.nbytes)
        if turn != changes.NO_TURN:
            self._ledger.add(turn)
        header.version += 1
        header.staleness[min(staleness, header.staleness.size - 1)] += 1
        return True

    def _publish(self) -> None:
        self._end.publish(self._header.words, self._parameters)

    def _receive(self) -> bool:
        """Do as a message says, if there is one. The call by which MPI makes progress for the replicas, too."""
        message = None
        try:
            message = self.wire.incoming()
            if message:
                self._answer(*message)
        except RanksLostError as error:
            for rank in error.ranks:
                self._lose(rank - 1, "died")
        return message is not None

    def _answer(self, source: int, tag: int) -> None:
        """Receive a message and do as it says."""
        replica, content = source - 1, self.wire.recv_bytes(source, tag)
        if tag == ASK:
            self._asked += 1
            if isinstance(self.rule, Compensated):
                self._take()  # what this replica has pushed is in what it gets
                self.rule.pulled(replica, self._parameters)
            self._end.answer(replica, self._header.words, self._parameters)
        elif tag == FAIL:
            raise AgreedError(content.decode())
        elif tag == LOST:
            for other in np.frombuffer(content, np.int64).tolist():
                self._lose(other, "")
            self._send(replica, b"")
        elif tag == REPORT:
            self._send(replica, json.dumps(self.report()).encode())
        elif tag == LEAVE:
            self._leave(replica, content.decode())
        elif replica in self._lost:
            self._send(replica, b"")  # it may not know yet
        elif tag == BEGIN:
            self._begin(replica, content)
        elif tag == FINISH:
            self._finished.add(replica)
        elif tag in (KEEP, RESTORE):
            self._tell_rule(replica, tag)
        elif tag == MORE:
            self._open(*np.frombuffer(content, np.int64).tolist())
            self._idle.append(replica)
        elif tag == GO:
            first, each, *self._held[replica] = np.frombuffer(content, np.int64).tolist()
            self._open(first, each)
        else:
            self._chief_only = tag == COLLECT
            self._hub.come(replica, content)

    def _begin(self, replica: int, content: bytes) -> None:
        self._parameters = self._end.empty(len(content) // 4)
        self._parameters[...] = module_of(self._parameters).asarray(np.frombuffer(content, np.float32))
        if isinstance(self.rule, Compensated):
            self.rule.begin(self._parameters, self.replicas)
        self._publish()
        self._send(replica, b"")

    def _tell_rule(self, replica: int, tag: int) -> None:
        """What the rule keeps, to a replica (KEEP) or from it (RESTORE): the names first, then the arrays."""
        state = state_of(self.rule, self._parameters)
        self._send(replica, " ".join(state).encode())
        for array in state.values():
            if tag == KEEP:
                self.wire.send(array, replica + 1, ANSWER)
            else:
                self.wire.recv(array, replica + 1, RESTORE)

    def _open(self, first: int, each: int) -> None:
        """Begin the epoch of which a message speaks, if it has not begun."""
        if self._epoch is None or self._epoch.first != first:
            self._epoch = Epoch(self._ledger, first, each, self._header.limit, self._lost)
            self._header.epoch[0] = first

    def _settle(self) -> bool:
        """Answer those that wait for each other: at a meeting, or for a turn. Whether there was anything."""
        parts, did = self._hub.complete(), False
        if parts:
            did, chief = True, next(iter(parts))
            everything, empty = pack(parts), pack(dict.fromkeys(parts, b""))
            for replica in parts:
                self._send(replica, everything if replica == chief or not self._chief_only else empty)
        for replica in self._idle.copy():
            assert self._epoch is not None
            turn = NO_MORE if self._epoch.over() else self._epoch.next(replica)
            if turn is not None:
                did = True
                self._idle.remove(replica)
                self._send(replica, np.int64(turn).tobytes())
        for replica in list(self._held):
            if replica not in self._held:
                continue  # lost since
            assert self._epoch is not None
            done, ahead, warm = self._held[replica]
            allowed = self._epoch.allowed(replica, self._hub.living, ahead, warm)
            if done < allowed:
                did = True
                del self._held[replica]
                self._send(replica, np.int64(allowed).tobytes())
        return did

    def _send(self, replica: int, content: bytes) -> None:
        try:
            self.wire.send_bytes(content, replica + 1, ANSWER)
        except RanksLostError:
            self._lose(replica, "died")

    def _lose(self, replica: int, why: str) -> None:
        """Go on without a replica. What it gave whole counts; nothing that it sends from now on does."""
        if replica in self._lost or replica in self._finished:
            return
        self._take()
        if replica in self._lost:
            return
        self._lost.append(replica)
        self.world.whole = False
        self._end.shut(replica)
        self._hub.lose(replica)
        if self._epoch:
            self._epoch.lose(replica)
        if replica in self._idle:
            self._idle.remove(replica)
        self._held.pop(replica, None)
        if self.world.rank == 0:
            sys.stderr.write(f"{self.wire.peers[replica + 1]} {why}; {len(self._hub.living)} of {self.replicas} "
                             "replicas go on, with its rows\n")
            sys.stderr.flush()

    def _leave(self, replica: int, why: str) -> None:
        """One that cannot go on asks whether the others do without it."""
        if self._hub.living in ([], [replica]):
            self._send(replica, b"")
            return
        self._lose(replica, f"gave up ({why})")
        self._left.append(replica)
        self._send(replica, b"left")
