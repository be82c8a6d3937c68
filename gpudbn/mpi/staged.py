"""The two ends of the transport between replicas and a server: through a window in the server's memory.

All traffic of an update is one-sided: a replica writes its change into its own mailbox, then a sequence number,
and goes on; the server finds it, and writes parameters into one of two copies in turn, from which replicas read
whenever they like. GPU arrays pass through host memory.

Nothing is taken twice or lost: a mailbox holds one change, and the server takes it when its sequence number is
the successor of the last one taken, and frees it (``freed``) once a published copy contains it.

Nothing read is torn: ``turn`` is 2p while copy p % 2 is the latest, and 2p + 1 while the other copy
is being written. A reader notes turn, reads copy p % 2, and looks again: the copy was untouched up
to turn 2p + 2. A reader that is too slow three times asks by message.
"""

from __future__ import annotations

import numpy as np

from gpudbn.arrays import Array
from gpudbn.errors import NonFiniteError
from gpudbn.mpi.changes import BYTES, WORDS
from gpudbn.mpi.wire import Window, Wire
from gpudbn.tracing import span

ASK, ANSWER = 1, 2  # tags of messages
CLOSED = -1  # in the place of ``freed``: this mailbox is never looked at again
REFUSED = "changes: must be finite; got one that the server refused, and it goes on without this replica"
ATTEMPTS = 3  # torn reads before a replica asks by message


class Layout:
    """Where things lie in the server's window, in bytes. The same on every rank.

    ``turn``; then for each replica ``sequence`` (of the change in its mailbox) and ``freed`` (sequence number of
    the last change that is published, or CLOSED); then two copies of a header and parameters; then for each replica its
    mailbox: a label and a payload. All words are int64.
    """

    def __init__(self, size: int, replicas: int, header_words: int) -> None:
        end = 0

        def room(nbytes: int) -> int:  # parts begin at multiples of a cache line
            nonlocal end
            start, end = end, end + -(-nbytes // 64) * 64
            return start

        self.turn = room(8)
        self.sequence, self.freed = room(8 * replicas), room(8 * replicas)
        self.copies = [(room(8 * header_words), room(4 * size)) for _ in range(2)]
        self.mailboxes = [(room(8 * WORDS), room(4 * size)) for _ in range(replicas)]
        self.nbytes = end


class ServerEnd:
    """Mailboxes and published parameters, as their server sees them.

    Parameters
    ----------
    wire : Wire
        This server, rank 0, and all replicas. Collective: the replicas make their ends at the same time.
    size : int
        Entries of this server's shard of the largest parameter vector of the run.
    header_words : int
        int64 words that are published together with the parameters.
    """

    def __init__(self, wire: Wire, size: int, header_words: int) -> None:
        self.wire, self.replicas = wire, wire.size - 1
        self.layout = Layout(size, self.replicas, header_words)
        self.window = Window(wire, self.layout.nbytes)
        self._turn = self._words(self.layout.turn, 1)
        self._sequence = self._words(self.layout.sequence, self.replicas)
        self._freed = self._words(self.layout.freed, self.replicas)
        self._taken = np.zeros(self.replicas, np.int64)
        self._closed = np.zeros(self.replicas, bool)

    def _bytes(self, offset: int, count: int) -> np.ndarray:
        return self.window.memory[offset : offset + count]

    def _words(self, offset: int, count: int) -> np.ndarray:
        return self._bytes(offset, 8 * count).view(np.int64)

    def empty(self, size: int) -> np.ndarray:
        """Where the parameters are to be: array (size,), float32."""
        return np.empty(size, np.float32)

    def full(self) -> list[int]:
        """Replicas whose mailbox holds a change that is not taken."""
        found = np.flatnonzero((self._sequence == self._taken + 1) & ~self._closed)
        if found.size:
            self.window.sync()  # a sequence number was seen: only now look at its change
        return [int(replica) for replica in found]

    def label(self, replica: int) -> np.ndarray:
        """The label of its change: array (WORDS,), int64; see ``changes.py``."""
        return self._words(self.layout.mailboxes[replica][0], WORDS)

    def payload(self, replica: int) -> np.ndarray:
        """The bytes of its change: array, uint8."""
        return self._bytes(self.layout.mailboxes[replica][1], int(self.label(replica)[BYTES]))

    def taken(self, replica: int) -> None:
        """Its change is applied: the mailbox becomes free with the next ``publish``."""
        self._taken[replica] += 1

    def publish(self, header: np.ndarray, parameters: np.ndarray) -> None:
        """Let everyone read these from now on, and free the mailboxes of what was taken."""
        with span("publish"):
            turn = int(self._turn[0])
            words, floats = self.layout.copies[(turn // 2 + 1) % 2]
            self._turn[0] = turn + 1
            self.window.sync()
            self._words(words, header.size)[:] = header
            self._bytes(floats, parameters.nbytes).view(np.float32)[:] = parameters
            self.wire.worked("publish", parameters.nbytes)
            self.window.sync()
            self._turn[0] = turn + 2
            self.window.sync()  # before ``freed`` says so
        self.free()

    def free(self) -> None:
        """Free the mailboxes of what was taken, though nothing is published."""
        self._freed[:] = np.where(self._closed, CLOSED, self._taken)

    def shut(self, replica: int) -> None:
        """Take nothing more from it: it is lost, or what it sends is no good."""
        self._closed[replica] = True
        self._freed[replica] = CLOSED

    def answer(self, replica: int, header: np.ndarray, parameters: np.ndarray) -> None:
        """Give these to a replica that asked for them."""
        self.wire.send(header, replica + 1, ANSWER)
        self.wire.send(parameters, replica + 1, ANSWER)


class ReplicaEnd:
    """One mailbox, and the published parameters, as a replica sees them. Parameters as for ``ServerEnd``.

    Parameters
    ----------
    asking : bool
        Every pull goes by message, where the server must know what a replica works on.

    Attributes
    ----------
    sequence : int
        Of my last push.
    retried, asked : int
        Reads that were torn; reads that went by message.
    """

    def __init__(self, wire: Wire, size: int, header_words: int, *, asking: bool = False) -> None:
        self.wire, self.replica = wire, wire.rank - 1
        self.attempts = 0 if asking else ATTEMPTS
        self.layout = Layout(size, wire.size - 1, header_words)
        self.window = Window(wire, self.layout.nbytes)
        self.sequence = self.retried = self.asked = 0

    def drain(self) -> None:
        """Wait until my last push is published, so that my mailbox is free and a pull contains it."""
        freed, pause = np.zeros(1, np.int64), self.wire.pause()
        with self.wire.tally.timing("waiting"):
            while True:
                self.window.get(freed, self.layout.freed + 8 * self.replica)
                if freed[0] == self.sequence:
                    return
                if freed[0] == CLOSED:
                    raise NonFiniteError(REFUSED)
                self.wire.check(0)
                pause()

    def push(self, label: np.ndarray, payload: Array) -> None:
        """Put a change into my mailbox, once that is free: the payload, its label, then the number that says so."""
        self.drain()
        with span("push"):
            words, floats = self.layout.mailboxes[self.replica]
            self.window.put(payload, floats)
            self.window.put(label, words)
            self.sequence += 1
            self.window.put(np.array([self.sequence], np.int64), self.layout.sequence + 8 * self.replica)

    def pull(self, header: np.ndarray, shard: Array) -> None:
        """The latest published header and parameters, not torn."""
        with span("pull"):
            for _ in range(self.attempts):
                published = self.window.read(self.layout.turn) // 2
                words, floats = self.layout.copies[published % 2]
                self.window.get(header, words)
                self.window.get(shard, floats)
                if self.window.read(self.layout.turn) <= 2 * published + 2:
                    return
                self.retried += 1
            self.asked += 1
            self.wire.send_bytes(b"", 0, ASK)
            self.wire.recv(header, 0, ANSWER)
            self.wire.recv(shard, 0, ANSWER)
