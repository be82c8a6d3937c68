"""The two ends of a transport between replicas and a server: messages of device memory, for a CUDA-aware MPI.

As ``staged.py``, but nothing passes through the host: mailboxes, parameters and what the step rule keeps are in the
memory of the server's GPU. A push is two messages, its label and its payload, for which the server has receives
posted all the time; once the change is applied the server posts them anew and says so (``FREED``).
A pull is a question, answered by the header and a copy of the parameters.

Nothing is taken twice or lost: a message arrives once, and a replica sends its next change only after that word.

Nothing read is torn: the server copies its parameters between two changes, for each replica into memory of that
replica's own, so that one which is slow to receive holds up neither the server nor another.

A window of device memory would be the shorter way, but works with no MPI that is spread.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.errors import NonFiniteError
from gpudbn.mpi.changes import BYTES, WORDS
from gpudbn.mpi.staged import ANSWER, ASK, REFUSED
from gpudbn.mpi.wire import RanksLostError, Wire
from gpudbn.tracing import span

LABEL, PAYLOAD, FREED = 4, 5, 6  # tags
GO_ON, SHUT = np.zeros(1, np.int64), np.ones(1, np.int64)  # what a server answers to a push


class ServerEnd:
    """Mailboxes, and answers to pulls, as their server has them.

    Parameters
    ----------
    wire : Wire
        This server, rank 0, and all replicas.
    size : int
        Entries of this server's shard of the largest parameter vector of the run.
    header_words : int
        int64 words that go along with the parameters.
    xp : module
        Of the arrays: CuPy, on the device that is current.
    """

    def __init__(self, wire: Wire, size: int, header_words: int, *, xp: Any) -> None:
        self.wire, self.xp = wire, xp
        replicas = wire.size - 1
        self._labels = np.zeros((replicas, WORDS), np.int64)
        self._payloads = [xp.empty(4 * size, np.uint8) for _ in range(replicas)]
        self._headers = np.zeros((replicas, header_words), np.int64)
        self._copies = [xp.empty(size, np.float32) for _ in range(replicas)]
        self._arriving: list[list[Any]] = [[] for _ in range(replicas)]  # requests of label and payload
        self._leaving: list[list[Any]] = [[] for _ in range(replicas)]  # of the answers to a push and to a pull
        self._taken: list[int] = []  # replicas, since the last ``publish``
        self._shut: set[int] = set()
        for replica in range(replicas):
            self._post(replica)
        wire.own(self)

    def _post(self, replica: int) -> None:
        self._arriving[replica] = [self.wire.irecv(self._labels[replica], replica + 1, LABEL),
                                   self.wire.irecv(self._payloads[replica], replica + 1, PAYLOAD)]

    def _reply(self, replica: int, *messages: tuple[Array, int]) -> None:
        """Begin to send arrays by their tags. A replica that asks for more has received what it was sent before."""
        self._leaving[replica] = [request for request in self._leaving[replica] if not request.Test()]
        self._leaving[replica] += [self.wire.isend(array, replica + 1, tag) for array, tag in messages]

    def empty(self, size: int) -> Array:
        """Where the parameters are to be: array (size,), float32."""
        return self.xp.empty(size, np.float32)

    def full(self) -> list[int]:
        """Replicas whose mailbox holds a change that is not taken."""
        found = []
        for replica, requests in enumerate(self._arriving):
            if replica in self._shut:
                continue
            with self.wire.noticing():
                requests[:] = [request for request in requests if not request.Test()]
            if not requests and replica not in self._taken:
                found.append(replica)
        return found

    def label(self, replica: int) -> np.ndarray:
        """The label of its change: array (WORDS,), int64; see ``changes.py``."""
        return self._labels[replica]

    def payload(self, replica: int) -> Array:
        """The bytes of its change: array, uint8."""
        return self._payloads[replica][: int(self.label(replica)[BYTES])]

    def taken(self, replica: int) -> None:
        """Its change is applied: the mailbox becomes free with the next ``publish``."""
        self._taken.append(replica)

    def publish(self, header: np.ndarray, parameters: Array) -> None:  # noqa: ARG002 - ``answer`` copies them
        """Free the mailboxes of what was taken. Parameters are copied when somebody asks."""
        with span("publish"):
            self.free()

    def free(self) -> None:
        """Free the mailboxes of what was taken."""
        for replica in self._taken:
            if replica not in self._shut:
                self._post(replica)
                self._reply(replica, (GO_ON, FREED))
        self._taken.clear()

    def shut(self, replica: int) -> None:
        """Take nothing more from it: it is lost, or what it sends is no good."""
        self._shut.add(replica)
        with contextlib.suppress(RanksLostError), self.wire.noticing():
            self._reply(replica, (SHUT, FREED))

    def answer(self, replica: int, header: np.ndarray, parameters: Array) -> None:
        """Give these to a replica that pulls. They may change as soon as this returns."""
        self._headers[replica] = header
        copy = self._copies[replica][: parameters.size]
        copy[...] = parameters
        self._reply(replica, (self._headers[replica], ANSWER), (copy, ANSWER))

    def close(self) -> None:
        """Take back the receives that wait for pushes; the replicas make none any more."""
        for requests in self._arriving:
            for request in requests:
                request.Cancel()
            self.wire.wait(*requests)
        for requests in self._leaving:
            self.wire.wait(*requests)


class ReplicaEnd:
    """One mailbox, and pulls, as a replica sees them. Parameters as for ``ServerEnd``.

    Parameters
    ----------
    asking : bool
        The server must know what I have pulled: a pull waits until my last push is in it.

    Attributes
    ----------
    sequence : int
        Of my last push.
    retried, asked : int
        Reads that were torn: none; reads that went by message: all.
    """

    def __init__(self, wire: Wire, size: int, header_words: int, *, xp: Any,  # noqa: ARG002 - as the server's
                 asking: bool = False) -> None:
        self.wire, self.asking = wire, asking
        self._label = np.zeros(WORDS, np.int64)
        self._payload = xp.empty(4 * size, np.uint8)
        self._freed = GO_ON.copy()
        self._requests: list[Any] = []  # of the last push and of its answer
        self.sequence = self.retried = self.asked = 0

    def drain(self) -> None:
        """Wait until my last push is applied, so that my mailbox is free and a pull contains it."""
        self.wire.wait(*self._requests, what="waiting")
        self._requests.clear()
        if self._freed[0] == SHUT[0]:
            raise NonFiniteError(REFUSED)

    def push(self, label: np.ndarray, payload: Array) -> None:
        """Send a change, once my mailbox is free. It is copied first and may change as soon as this returns."""
        self.drain()
        with span("push"):
            self._label[:] = label
            copy = self._payload[: payload.nbytes]
            copy[...] = payload.reshape(-1).view(np.uint8)
            self.sequence += 1
            self._requests = [self.wire.irecv(self._freed, 0, FREED), self.wire.isend(self._label, 0, LABEL),
                              self.wire.isend(copy, 0, PAYLOAD)]

    def pull(self, header: np.ndarray, shard: Array) -> None:
        """The server's header and parameters, between two changes."""
        if self.asking:
            self.drain()
        with span("pull"):
            self.asked += 1
            answers = self.wire.irecv(header, 0, ANSWER), self.wire.irecv(shard, 0, ANSWER)
            self.wire.send(np.zeros(2, np.int64), 0, ASK)
            self.wire.wait(*answers)
            self.wire.tally.received += header.nbytes + shard.nbytes
