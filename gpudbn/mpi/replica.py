"""A replica of asynchronous training: gives its changes to a parameter server, takes what is there.

The other half of ``server.py``, which says how changes and parameters travel and why nothing is
lost, doubled or torn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.mpi.collective import Together
from gpudbn.mpi.server import ANSWER, ASK, BEGIN, CONTROL, FAIL, FINISH, Layout
from gpudbn.mpi.wire import AgreedError, Backoff, Window, Wire
from gpudbn.tracing import span

ATTEMPTS = 3  # torn reads before a replica asks by message


class Asynchronous(Together):
    """One of the ranks 1, 2, ... of a wire whose rank 0 is a ``Server``.

    Parameters
    ----------
    everyone : Wire
        The server and all replicas. Collective.
    size : int
        Entries of the largest parameter vector of the run, as told to the server.
    """

    def __init__(self, everyone: Wire, size: int) -> None:
        super().__init__(everyone.split(1))
        self.everyone = everyone
        everyone.label = self.wire.label
        self._size = size
        self._layout = Layout(size, self.replicas)
        self._window = Window(everyone, self._layout.nbytes)
        self._header = np.zeros(self._layout.header_words, np.int64)
        self._sequence = 0  # of my last push
        self._base = 0  # versions contained in my parameters before local steps, my own pushes among them
        self._pulls = self._retried = self._asked = 0

    def begin(self, parameters: Array) -> None:
        if parameters.dtype != np.float32 or parameters.ndim != 1 or parameters.size > self._size:
            raise ValueError(f"begin: parameters must be a float32 vector of at most {self._size}; "
                             f"got {parameters.dtype} {parameters.shape}")
        self._drain()
        self.wire.barrier()
        if self.chief:
            message = np.array([BEGIN, parameters.size], np.int64)
            self.everyone.send(message, 0, CONTROL)
            self.everyone.send(parameters, 0, CONTROL)
            self.everyone.recv(message, 0, ANSWER)  # published
        self._pull_together(parameters)

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:
        change = before  # its memory: the old values are needed no more
        module_of(parameters, before).subtract(parameters, before, out=change)
        self._push(change)
        if fetch:
            self._pull(parameters)
            if self._contained() < self._sequence:
                parameters += change
            self._base = int(self._header[0]) + self._sequence - self._contained()
        else:
            self._base += 1
        before[...] = parameters

    def meet(self, parameters: Array) -> None:
        with span("meet"):
            self._drain()
            self.wire.barrier()
            self._pull_together(parameters)

    def agree(self, error: str | None) -> None:
        try:
            super().agree(error)
        except AgreedError as agreed:
            if self.chief:
                self.everyone.send(np.array([FAIL, 0], np.int64), 0, CONTROL)
                self.everyone.send_text(str(agreed), 0)
            raise

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "pushes": self._sequence, "pulls": self._pulls, "reads_retried": self._retried,
            "reads_asked": self._asked, "staleness": self._header[1 + self.replicas :].tolist()}

    def close(self) -> None:
        self._drain()
        self.wire.barrier()
        if self.chief:
            self.everyone.send(np.array([FINISH, 0], np.int64), 0, CONTROL)
        self.everyone.close()

    def _contained(self) -> int:
        """The sequence number of my last push that is in what was pulled."""
        return int(self._header[1 + self.replica])

    def _drain(self) -> None:
        """Wait until my last push is published, so that my mailbox is free and a pull contains it."""
        freed, pause = np.zeros(1, np.int64), Backoff()
        with self.wire.tally.timing("waiting"):
            while True:
                self._window.get(freed, self._layout.freed + 8 * self.replica)
                if freed[0] == self._sequence:
                    return
                pause()

    def _push(self, change: Array) -> None:
        """Put a change into my mailbox: first the change, then the number that says it is there."""
        self._drain()
        with span("push"):
            self._window.put(change, self._layout.mailboxes[self.replica])
            self._window.put(np.array([self._base], np.int64), self._layout.base + 8 * self.replica)
            self._sequence += 1
            self._window.put(np.array([self._sequence], np.int64), self._layout.sequence + 8 * self.replica)

    def _pull(self, parameters: Array) -> None:
        """The latest published parameters and their header, not torn."""
        with span("pull"):
            self._pulls += 1
            for _ in range(ATTEMPTS):
                published = self._window.read(self._layout.turn) // 2
                header, values = self._layout.copies[published % 2]
                self._window.get(self._header, header)
                self._window.get(parameters, values)
                if self._window.read(self._layout.turn) <= 2 * published + 2:
                    return
                self._retried += 1
            self._asked += 1
            self.everyone.send(np.zeros(2, np.int64), 0, ASK)
            self.everyone.recv(self._header, 0, ANSWER)
            self.everyone.recv(parameters, 0, ANSWER)

    def _pull_together(self, parameters: Array) -> None:
        """All pull while nobody pushes."""
        self.wire.barrier()
        self._pull(parameters)
        self._base = int(self._header[0])
        self.wire.barrier()
