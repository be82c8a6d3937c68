"""A replica of asynchronous training: gives its changes to parameter servers, takes what is there.

The other half of ``server.py``; ``staged.py`` says how changes and parameters travel and why nothing is lost,
doubled or torn. ``Link`` is the traffic with one server, which has a shard of the parameters;
``Asynchronous`` has one to each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.factors import Factors
from gpudbn.mpi import changes
from gpudbn.mpi.collective import Together
from gpudbn.mpi.server import BEGIN, FAIL, FINISH, KEEP, REPORT, RESTORE, Header, cuts
from gpudbn.mpi.staged import ANSWER, CONTROL, ReplicaEnd
from gpudbn.mpi.wire import AgreedError, Wire
from gpudbn.tracing import span


class Link:
    """To one server. Arrays are shards of parameters and changes.

    Parameters
    ----------
    wire : Wire
        The server, rank 0, and all replicas. Collective over these.
    size : int
        Entries of the server's shard of the largest parameter vector of the run.
    end : callable (wire, size, header_words)
        Makes this end of the transport, a ``ReplicaEnd``.
    push : str
        See ``changes.Packing``.
    """

    def __init__(self, wire: Wire, size: int, end: Any, *, push: str = "dense") -> None:
        self.wire, self.replica = wire, wire.rank - 1
        self.header = Header(wire.size - 1)  # as of the last pull
        self.end = end(wire, size, self.header.words.size)
        self.packing = changes.Packing(push)
        self.base = 0  # versions contained in my parameters before local steps, my own pushes among them

    def begin(self, shard: Array) -> None:
        """The chief gives the server the values to begin with."""
        message = np.array([BEGIN, shard.size], np.int64)
        self.wire.send(message, 0, CONTROL)
        self.wire.send(shard, 0, CONTROL)
        self.wire.recv(message, 0, ANSWER)  # published

    def tell(self, kind: int) -> None:
        """A control message without a size."""
        self.wire.send(np.array([kind, 0], np.int64), 0, CONTROL)

    def state(self, size: int) -> dict[str, np.ndarray]:
        """What a checkpoint keeps of the server's rule: arrays of its shard's size. For one replica to ask."""
        self.tell(KEEP)
        state = {name: np.empty(size, np.float32) for name in self.wire.recv_text(0).split()}
        for array in state.values():
            self.wire.recv(array, 0, ANSWER)
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Give the server's rule back what ``state`` gave."""
        self.tell(RESTORE)
        self.wire.send_text(" ".join(state), 0)
        for array in state.values():
            self.wire.send(array, 0, CONTROL)
        self.wire.recv(np.zeros(2, np.int64), 0, ANSWER)

    def report(self) -> dict[str, Any]:
        """What the server did so far: see ``Server.report``. For one replica to ask."""
        self.tell(REPORT)
        report: dict[str, Any] = json.loads(self.wire.recv_text(0))
        return report

    def packed(self, change: Array, factors: Factors | None) -> tuple[np.ndarray, Array]:
        """Label and payload of a change; it becomes what the server will make of it."""
        return self.packing.encode(change, base=self.base, factors=factors)

    def push(self, change: Array, factors: Factors | None) -> None:
        """Give a change to the server; see ``packed``."""
        self.end.push(*self.packed(change, factors))

    def pull(self, shard: Array) -> None:
        """The latest parameters, and the header that belongs to them."""
        self.end.pull(self.header.words, shard)

    def exchange(self, shard: Array, change: Array, fetch: bool) -> None:
        """After a push of ``change``: what the server has, and my change where that does not contain it yet."""
        if fetch:
            self.pull(shard)
            self.add_missing(shard, change)
        else:
            self.base += 1

    def add_missing(self, shard: Array, change: Array) -> None:
        """After a pull into ``shard``: add my last change where that does not contain it yet."""
        missing = self.end.sequence - int(self.header.applied[self.replica])  # 0 or 1
        if missing:
            shard += change
        self.base = int(self.header.version[0]) + missing


class Asynchronous(Together):
    """One of the replicas around one or several servers.

    Parameters
    ----------
    world : Wire
        All ranks.
    replicas : Wire
        The replicas.
    servers : sequence of Wire
        For each server the wire of it and all replicas. Collective over these.
    size : int
        Entries of the largest parameter vector of the run, as told to the servers.
    end : callable (wire, size, header_words)
        Makes my end of the transport to one server, a ``ReplicaEnd``.
    push : str
        See ``changes.Packing``.
    """

    shards_rows = True

    def __init__(self, world: Wire, replicas: Wire, servers: Sequence[Wire], size: int, end: Any = ReplicaEnd, *,
                 push: str = "dense") -> None:
        super().__init__(replicas)
        self.world = world
        world.label = self.wire.label
        self._size = size
        self.wants_factors = push == "factored"
        self.links = [Link(wire, part.stop - part.start, end, push=push)
                      for wire, part in zip(servers, cuts(size, len(servers)), strict=True)]
        self._cuts: list[slice] = []  # of the phase's parameters
        self._pulls = 0

    def begin(self, parameters: Array) -> None:
        if parameters.dtype != np.float32 or parameters.ndim != 1 or parameters.size > self._size:
            raise ValueError(f"begin: parameters must be a float32 vector of at most {self._size}; "
                             f"got {parameters.dtype} {parameters.shape}")
        self._drain()
        self.wire.barrier()
        self._cuts = cuts(parameters.size, len(self.links))
        for link, part in zip(self.links, self._cuts, strict=True):
            link.packing.begin(part.start)
        if self.chief:
            for link, part in zip(self.links, self._cuts, strict=True):
                link.begin(parameters[part])
        self._pull_together(parameters)

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the servers' rules keep. The chief gets it; what 16 bits have rounded away of changes is let go."""
        found: dict[str, Array] = {}
        if self.chief:
            for link, part in zip(self.links, self._cuts, strict=True):
                for name, array in link.state(part.stop - part.start).items():
                    found.setdefault(f"server.{name}", np.zeros(self._cuts[-1].stop, np.float32))[part] = array
        self.wire.barrier()
        return found, {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        state = {name.removeprefix("server."): array for name, array in arrays.items() if name.startswith("server.")}
        if self.chief and state:
            for link, part in zip(self.links, self._cuts, strict=True):
                link.restore({name: array[part] for name, array in state.items()})
        self.wire.barrier()  # nobody pushes before

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:
        change = before  # its memory: the old values are needed no more
        module_of(parameters, before).subtract(parameters, before, out=change)
        for link, part in zip(self.links, self._cuts, strict=True):
            link.push(change[part], self.factors)
        self._pulls += fetch
        for link, part in zip(self.links, self._cuts, strict=True):
            link.exchange(parameters[part], change[part], fetch)
        before[...] = parameters
        self.wire.worked("exchange", parameters.nbytes)

    @property
    def packed(self) -> str:
        return " and ".join(sorted({link.packing.last for link in self.links}))

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
                for link in self.links:
                    link.tell(FAIL)
                    link.wire.send_text(str(agreed), 0)
            raise

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "pushes": self.links[0].end.sequence, "pulls": self._pulls,
            "reads_retried": sum(link.end.retried for link in self.links),
            "reads_asked": sum(link.end.asked for link in self.links)}

    def reports(self) -> list[dict[str, Any]] | None:
        replicas = super().reports()
        return None if replicas is None else [*(link.report() for link in self.links), *replicas]

    def close(self) -> None:
        self._drain()
        self.wire.barrier()
        if self.chief:
            for link in self.links:
                link.tell(FINISH)
        self.world.close()

    def _drain(self) -> None:
        for link in self.links:
            link.end.drain()

    def _pull_together(self, parameters: Array) -> None:
        """All pull while nobody pushes."""
        self.wire.barrier()
        self._pulls += 1
        for link, part in zip(self.links, self._cuts, strict=True):
            link.pull(parameters[part])
            link.base = int(link.header.version[0])
        self.wire.barrier()
