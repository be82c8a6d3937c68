"""A parameter server: takes changes out of mailboxes as they arrive, publishes what comes of them.

There may be several, each with its shard of the parameters (``cuts``): they know nothing of one another.

It knows vectors and a step rule (``rules.py``), not what they mean; how changes and parameters travel is the
business of ``staged.py``, and how a change is packed that of ``changes.py``.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np

from gpudbn.mpi import changes
from gpudbn.mpi.rules import Compensated, Rule, add, state_of
from gpudbn.mpi.staged import ANSWER, ASK, CONTROL, ServerEnd
from gpudbn.mpi.wire import AgreedError, Wire
from gpudbn.tracing import span

BEGIN, FINISH, FAIL, REPORT, KEEP, RESTORE = 1, 2, 3, 4, 5, 6  # first word of a control message; the second is a size
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
    """

    def __init__(self, replicas: int) -> None:
        self.words = np.zeros(1 + replicas + STALENESS + 2 * replicas, np.int64)
        self.version, self.applied, self.staleness = np.split(self.words, [1, 1 + replicas])


class Server:
    """One server: rank 0 of its wire, on which the other ranks are the replicas.

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

    def agree(self, error: str | None) -> None:
        """Before ``serve``: raise on all ranks if one has an error; see ``Exchange.agree``."""
        self.world.agree(error)

    def serve(self) -> dict[str, Any]:
        """Serve until replica 0 says that the run is over.

        Returns
        -------
        dict
            See ``report``.

        Raises
        ------
        UserError
            If the replicas agreed on an error.
        """
        self.wire.tally.enter("waiting")
        pause = self.wire.pause(LONGEST_PAUSE)
        while True:
            message = self.wire.incoming()  # also the call by which MPI makes progress for the replicas
            if message and self._answer(*message):
                break
            if self._take() or message:
                pause.reset()
            else:
                pause()
        report = self.report()
        self.world.close()
        return report

    def report(self) -> dict[str, Any]:
        """What this server did so far.

        Returns
        -------
        dict
            ``role``, ``number``, and what ``Tally.about`` tells; ``applied`` (changes of each replica), ``version``,
            ``staleness`` (histogram), ``asked`` (reads by message).
        """
        header = self._header
        return {"role": "server", "number": self.world.rank, **self.wire.tally.about(),
                "applied": header.applied.tolist(), "version": int(header.version[0]),
                "staleness": header.staleness.tolist(), "asked": self._asked}

    def _take(self) -> bool:
        """Apply what lies in the mailboxes, then publish once. Whether there was anything."""
        full = self._end.full()
        if not full:
            return False
        with self.wire.tally.timing("applying"):
            self._apply(full)
            self._publish()
        return True

    def _apply(self, full: list[int]) -> None:
        order = sorted(full, key=lambda replica: (replica - self._first) % self.replicas)
        self._first = order[0] + 1  # of several that are full at once, another goes first next time
        header = self._header
        for replica in order:
            label = self._end.label(replica)
            staleness = int(header.version[0] - label[changes.BASE])
            with span("apply"):
                rule = partial(self.rule, replica=replica) if isinstance(self.rule, Compensated) else self.rule
                changes.apply(rule, self._parameters, label, self._end.payload(replica), staleness)
                self.wire.worked("apply", self._parameters.nbytes)
            self._end.taken(replica)
            header.version += 1
            header.applied[replica] += 1
            header.staleness[min(staleness, header.staleness.size - 1)] += 1

    def _publish(self) -> None:
        self._end.publish(self._header.words, self._parameters)

    def _answer(self, source: int, tag: int) -> bool:
        """Receive a message and do as it says. Whether it was the last."""
        message = np.zeros(2, np.int64)
        self.wire.recv(message, source, tag)
        if tag == ASK:
            self._asked += 1
            if isinstance(self.rule, Compensated):
                self._take()  # what this replica has pushed is in what it gets
                self.rule.pulled(source - 1, self._parameters)
            self._end.answer(source - 1, self._header.words, self._parameters)
            return False
        kind, size = message.tolist()
        if kind == BEGIN:
            self._parameters = self._end.empty(size)
            self.wire.recv(self._parameters, source, CONTROL)
            if isinstance(self.rule, Compensated):
                self.rule.begin(self._parameters, self.replicas)
            self._publish()
            self.wire.send(message, source, ANSWER)
        elif kind == REPORT:
            self.wire.send_text(json.dumps(self.report()), source)
        elif kind == KEEP:
            state = state_of(self.rule, self._parameters)
            self.wire.send_text(" ".join(state), source)
            for array in state.values():
                self.wire.send(array, source, ANSWER)
        elif kind == RESTORE:
            state = state_of(self.rule, self._parameters)
            for name in self.wire.recv_text(source).split():
                self.wire.recv(state[name], source, CONTROL)
            self.wire.send(message, source, ANSWER)
        elif kind == FAIL:
            raise AgreedError(self.wire.recv_text(source))
        return kind == FINISH
