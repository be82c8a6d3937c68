"""The parts of one replica: the two seams of ``shards.py`` over a wire, a sum and a gather.

What crosses are activations and errors of the rows of a minibatch, never weights.

Where MPI outlives the death of a rank, that of a part is the end of its replica: one that notices revokes the wire, so
that all others fall out of what they wait for there, and each raises PartLostError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gpudbn.arrays import Array, module_of, to_cpu
from gpudbn.errors import PartLostError
from gpudbn.mpi.nccl import Nccl
from gpudbn.mpi.wire import RanksLostError, Wire
from gpudbn.shards import Shards
from gpudbn.tracing import span


class Parts(Shards):
    """One of several ranks that hold a replica together.

    Parameters
    ----------
    wire : Wire
        These ranks, in the order of their hidden units.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, self.index, self.count = wire, wire.rank, wire.size
        self.arrays: Wire | Nccl = wire  # what adds and gathers them

    @contextmanager
    def _crossing(self, what: str) -> Iterator[None]:
        """The range of a profile for what crosses between the parts, all of which take part, or fall out of it."""
        try:
            with span(what), self.wire.noticing():
                yield
        except RanksLostError as error:
            self.wire.revoke()
            raise PartLostError(str(error)) from error

    def sum_(self, array: Array) -> None:
        with self._crossing("sum of parts"):
            self.arrays.allreduce_(array)

    def add_in_order_(self, out: Array, partials: Sequence[Array]) -> None:
        with self._crossing("chain of parts"):
            self.wire.add_in_order_(out, partials)

    def gather(self, part: Array, m: int, out: Array | None = None) -> Array:
        """See ``Shards.gather``. Parts are up to 16 columns wider than others: all travel as wide as the widest."""
        xp = module_of(part)
        mine = [self.mine(m, index) for index in range(self.count)]
        widest = max(columns.stop - columns.start for columns in mine)
        if out is None:
            out = xp.empty((*part.shape[:-1], m), part.dtype)
        with self._crossing("gather of parts"):
            padded = xp.zeros((self.count, *part.shape[:-1], widest), part.dtype)
            padded[self.index, ..., : part.shape[-1]] = part
            self.arrays.allgather_(padded)
            for index, columns in enumerate(mine):
                out[..., columns] = padded[index, ..., : columns.stop - columns.start]
        return out

    def swap(self, give: Sequence[Array | None], take: Sequence[Array | None]) -> None:
        with self._crossing("borders of parts"):
            there = [None if array is None else np.empty(array.shape, array.dtype) for array in take]
            requests = [self.wire.irecv(array, part) for part, array in enumerate(there) if array is not None]
            ready = {part: np.ascontiguousarray(to_cpu(array)) for part, array in enumerate(give) if array is not None}
            requests += [self.wire.isend(array, part) for part, array in ready.items()]
            self.wire.wait(*requests)
            for out, array in zip(take, there, strict=True):
                if out is not None:
                    out[...] = module_of(out).asarray(array)

    def first_(self, array: Array) -> None:
        with self._crossing("broadcast to parts"):
            self.arrays.broadcast(array, 0)

    def told(self, content: bytes) -> bytes:
        with self._crossing("word to parts"):
            length = np.array([len(content)], np.int64)
            self.wire.broadcast(length, 0)
            told = np.zeros(length[0], np.uint8)
            if self.index == 0:
                told[:] = np.frombuffer(content, np.uint8)
            self.wire.broadcast(told, 0)
        return told.tobytes()

    def texts(self, text: str) -> list[str]:
        with self._crossing("words of parts"):
            return self.wire.allgather_text(text)

    def least(self, value: int) -> int:
        with self._crossing("words of parts"):
            return int(self.wire.allgather(np.array([value], np.uint64)).min())

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        with self._crossing("arrays of parts"):
            return self.wire.collect(array)

    def send(self, array: np.ndarray) -> None:
        with self._crossing("arrays of parts"):
            self.wire.send(np.ascontiguousarray(array), 0)

    def receive(self, array: np.ndarray, index: int) -> None:
        with self._crossing("arrays of parts"):
            self.wire.recv(array, index)
