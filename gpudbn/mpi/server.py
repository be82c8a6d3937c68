"""A parameter server: takes changes out of mailboxes as they arrive, publishes what comes of them.

There may be several, each with its shard of the parameters (``cuts``): they know nothing of one another.

It knows vectors and a step rule, not what they mean. All traffic of an update is one-sided: a
replica writes its change into its own mailbox in the server's memory, then a sequence number, and
goes on; the server finds it, applies it to parameters that only it sees, and writes them into one
of two copies in turn, from which replicas read whenever they like.

Nothing is applied twice or lost: a mailbox holds one change, and the server takes it when its
sequence number is the successor of the last one taken, and frees it (``freed``) once a published
copy contains it.

Nothing read is torn: ``turn`` is 2p while copy p % 2 is the latest, and 2p + 1 while the other copy
is being written. A reader notes turn, reads copy p % 2, and looks again: the copy was untouched up
to turn 2p + 2. A reader that is too slow three times asks by message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.mpi.wire import AgreedError, Backoff, Window, Wire
from gpudbn.tracing import span

Rule = Callable[[np.ndarray, np.ndarray, int], None]

CONTROL, ASK, ANSWER = 1, 2, 3  # tags
BEGIN, FINISH, FAIL = 1, 2, 3  # first word of a control message; the second is a size
LONGEST_PAUSE = 0.25e-3  # seconds; where MPI needs the server to move data, each step of a push may wait that long
LINE = 16  # float32 of a cache line
STALENESS = 32  # entries of the histogram; the last counts all that are staler


def add(parameters: np.ndarray, change: np.ndarray, staleness: int) -> None:  # noqa: ARG001
    """parameters += change: the plain rule, when replicas send differences of parameters."""
    parameters += change


class Steps:
    """Step rules at a server: every change counts as a gradient of its own.

    What the rule keeps, such as a velocity, is made anew for every new vector of parameters. Dean et al., "Large scale
    distributed deep networks" (2012), section 4.1, have Adagrad at the servers.

    Parameters
    ----------
    make : callable
        From parameters to one of the step rules in ``optimiser.py`` that leave a gradient as it is: for instance
        ``partial(Adagrad, decay=0)``.
    rate : float
    by_staleness : bool
        Divide the rate by max(1, staleness).
    """

    def __init__(self, make: Callable[[Array], Any], *, rate: float = 1.0, by_staleness: bool = False) -> None:
        self.make, self.rate, self.by_staleness = make, rate, by_staleness
        self._parameters: Array | None = None
        self._rule: Any = None

    def _rate(self, parameters: Array, staleness: int) -> float:
        """The rate of one step, for which the rule of these parameters is ready."""
        if parameters is not self._parameters:
            self._parameters, self._rule = parameters, self.make(parameters)
        return self.rate / max(1, staleness) if self.by_staleness else self.rate

    def __call__(self, parameters: Array, change: Array, staleness: int) -> None:
        """One step with a change (size,), on the CPU or the GPU: a server's ``rule``."""
        rate = self._rate(parameters, staleness)
        self._rule.step(parameters, change, weights=0, scale=1.0, rate=rate)

    def activations(self, parameters: Array, v: Array, h: Array, rows: int, staleness: int, *,
                    model_weight: float = 1.0) -> None:
        """One step with the change of an RBM that came as its activations: see ``reference.cd_sums``."""
        rate = self._rate(parameters, staleness)
        self._rule.step_with_activations(parameters, v, h, rows, model_weight=model_weight, rate=rate)


def cuts(size: int, servers: int) -> list[slice]:
    """The shards of a vector: one for each server, in order, at multiples of a cache line; the last may be empty."""
    part = -(-size // servers // LINE) * LINE
    return [slice(min(i * part, size), min((i + 1) * part, size)) for i in range(servers)]


class Layout:
    """Where things lie in the server's window, in bytes. The same on every rank.

    ``turn``; then for each replica ``sequence`` (of the change in its mailbox), ``base`` (the versions
    that change was computed on) and ``freed`` (sequence number of the last change that is published);
    then two copies of a header (version; for each replica the last sequence number contained; the
    histogram of staleness) and parameters; then the mailboxes. All words are int64.
    """

    def __init__(self, size: int, replicas: int) -> None:
        end = 0

        def room(nbytes: int) -> int:  # parts begin at multiples of a cache line
            nonlocal end
            start, end = end, end + -(-nbytes // 64) * 64
            return start

        self.header_words = 1 + replicas + STALENESS
        self.turn = room(8)
        self.sequence, self.base, self.freed = room(8 * replicas), room(8 * replicas), room(8 * replicas)
        self.copies = [(room(8 * self.header_words), room(4 * size)) for _ in range(2)]
        self.mailboxes = [room(4 * size) for _ in range(replicas)]
        self.nbytes = end


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
    """

    def __init__(self, world: Wire, wire: Wire, size: int, rule: Rule | None = None) -> None:
        self.world, self.wire = world, wire
        self.replicas = wire.size - 1
        self.rule = rule or add
        servers = world.size - self.replicas
        world.label = "server" if servers == 1 else f"server {world.rank} of {servers}"
        self._layout = Layout(size, self.replicas)
        self._window = Window(wire, self._layout.nbytes)
        self._turn = self._words(self._layout.turn, 1)
        self._sequence = self._words(self._layout.sequence, self.replicas)
        self._base = self._words(self._layout.base, self.replicas)
        self._freed = self._words(self._layout.freed, self.replicas)
        self._parameters = np.zeros(0, np.float32)
        # the header as it will be published next
        self._header = np.zeros(self._layout.header_words, np.int64)
        self._version = self._header[:1]
        self._applied = self._header[1 : 1 + self.replicas]
        self._staleness = self._header[1 + self.replicas :]
        self._asked = 0
        self._first = 0

    def _words(self, offset: int, count: int) -> np.ndarray:
        return self._window.memory[offset : offset + 8 * count].view(np.int64)

    def _floats(self, offset: int) -> np.ndarray:
        return self._window.memory[offset : offset + 4 * self._parameters.size].view(np.float32)

    def agree(self, error: str | None) -> None:
        """Before ``serve``: raise on all ranks if one has an error; see ``Exchange.agree``."""
        self.world.agree(error)

    def serve(self) -> dict[str, Any]:
        """Serve until replica 0 says that the run is over.

        Returns
        -------
        dict
            ``applied`` (changes of each replica), ``version``, ``staleness`` (histogram), ``asked`` (reads by
            message), ``seconds``: busy, idle.

        Raises
        ------
        UserError
            If the replicas agreed on an error.
        """
        started, busy = time.perf_counter(), 0.0
        pause = Backoff(LONGEST_PAUSE)
        while True:
            start = time.perf_counter()
            message = self.wire.incoming()  # also the call by which MPI makes progress for the replicas
            if message and self._answer(*message):
                break
            if self._take() or message:
                busy += time.perf_counter() - start
                pause.reset()
            else:
                pause()
        self.world.close()
        return {"applied": self._applied.tolist(), "version": int(self._version[0]),
                "staleness": self._staleness.tolist(), "asked": self._asked,
                "seconds": {"busy": busy, "idle": time.perf_counter() - started - busy}}

    def _take(self) -> bool:
        """Apply what lies in the mailboxes, then publish once. Whether there was anything."""
        full = np.flatnonzero(self._sequence == self._applied + 1)
        if full.size == 0:
            return False
        self._window.sync()  # a sequence number was seen: only now look at its change
        order = sorted(full.tolist(), key=lambda replica: (replica - self._first) % self.replicas)
        self._first = order[0] + 1  # of several that are full at once, another goes first next time
        for replica in order:
            staleness = int(self._version[0] - self._base[replica])
            with span("apply"):
                self.rule(self._parameters, self._floats(self._layout.mailboxes[replica]), staleness)
            self._version += 1
            self._applied[replica] += 1
            self._staleness[min(staleness, STALENESS - 1)] += 1
        self._publish()
        self._freed[:] = self._applied
        return True

    def _publish(self) -> None:
        with span("publish"):
            turn = int(self._turn[0])
            header, parameters = self._layout.copies[(turn // 2 + 1) % 2]
            self._turn[0] = turn + 1
            self._window.sync()
            self._words(header, self._header.size)[:] = self._header
            self._floats(parameters)[:] = self._parameters
            self._window.sync()
            self._turn[0] = turn + 2
            self._window.sync()  # before ``freed`` says so

    def _answer(self, source: int, tag: int) -> bool:
        """Receive a message and do as it says. Whether it was the last."""
        message = np.zeros(2, np.int64)
        self.wire.recv(message, source, tag)
        if tag == ASK:
            self._asked += 1
            self.wire.send(self._header, source, ANSWER)
            self.wire.send(self._parameters, source, ANSWER)
            return False
        kind, size = message.tolist()
        if kind == BEGIN:
            self._parameters = np.empty(size, np.float32)
            self.wire.recv(self._parameters, source, CONTROL)
            self._publish()
            self.wire.send(message, source, ANSWER)
        elif kind == FAIL:
            raise AgreedError(self.wire.recv_text(source))
        return kind == FINISH
