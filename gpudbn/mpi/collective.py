"""Replicas that act together: sums, tables and answers over all of them; and training in step.

``Together`` is what any kind of replica needs of the others outside the updates; ``Synchronous``
adds the updates: each replica computes a slice of every batch, and the sums are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.mpi.alone import Exchange
from gpudbn.mpi.wire import Wire
from gpudbn.tracing import span


class Together(Exchange):
    """Replicas on a wire on which there is nobody else."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        super().__init__()
        self.replica, self.replicas = wire.rank, wire.size
        self.local_replica = wire.local_rank()
        wire.label = f"replica {self.replica} of {self.replicas}"

    def clock(self) -> float:
        return self.wire.clock()

    def total(self, values: np.ndarray) -> np.ndarray:
        table = np.array(values, np.float64, order="C")
        self.wire.allreduce_(table)
        return table

    def any(self, flag: bool) -> bool:
        count = np.array([flag], np.int64)
        self.wire.allreduce_(count)
        return bool(count[0])

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        array = np.ascontiguousarray(array)
        kinds = self.wire.allgather_text(" ".join([array.dtype.str, *map(str, array.shape)]))
        if not self.chief:
            self.wire.send(array, 0)
            return None
        arrays = [array]
        for source, kind in enumerate(kinds[1:], 1):
            dtype, *shape = kind.split()
            arrays.append(np.empty([int(length) for length in shape], dtype))
            self.wire.recv(arrays[-1], source)
        return arrays

    def agree(self, error: str | None) -> None:
        self.wire.agree(error)

    def report(self) -> dict[str, Any]:
        report = super().report()
        tally = self.wire.tally
        elapsed = self.clock() - self._started
        report["seconds"] = {"computing": elapsed - tally.waiting - tally.transferring,
                             "waiting": tally.waiting, "transferring": tally.transferring}
        report["bytes"] = {"sent": tally.sent, "received": tally.received}
        return report


class Synchronous(Together):
    """Replicas in step, each on its slice of every batch. All ranks of the wire are replicas."""

    cuts_batches = True

    def begin(self, parameters: Array) -> None:
        with span("broadcast"):
            self.wire.broadcast(parameters, 0)

    def add_(self, sums: Array) -> None:
        with span("allreduce"):
            self.wire.allreduce_(sums)

    def add_in_order_(self, sums: Array, partials: list[Array]) -> None:
        """A chain: each replica adds its blocks, one by one, to what its predecessor hands on."""
        with span("chain"):
            if self.replica == 0:
                sums.fill(0)
            else:
                self.wire.recv(sums, self.replica - 1)
            for partial in partials:
                sums += partial
            if self.replica < self.replicas - 1:
                self.wire.send(sums, self.replica + 1)
            self.wire.broadcast(sums, self.replicas - 1)

    def close(self) -> None:
        self.wire.close()
