"""One replica in several parts: the hidden units of each layer are cut among shards, and two seams join them.

    shard s holds   W[:, mine], c[mine]   of every layer, and all of b
    upward          h[:, mine] = f(v W[:, mine] + c[mine])                   nothing crosses
    gather          hidden values of all shards become the next layer's visible units
    downward        v = f(sum over shards of h[:, mine] W[:, mine]^T + b)    the sum crosses
    draws           depend on nothing but their address, so after a sum every shard draws the same

Sums cross for the visible input, logits, free energies and the errors of back-propagation;
gradients of a shard's own parameters need nothing from others. Dean et al. (2012), section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from types import ModuleType
from typing import NamedTuple

import numpy as np

from gpudbn.arrays import Array, module_of, to_cpu
from gpudbn.errors import UserError
from gpudbn.precision import BLOCK, BLOCKS

EDGE = BLOCK  # shards are cut at multiples of so many units: whole Philox blocks, and aligned rows
AT_ONCE = 1 << 22  # bytes of a piece of an array that is put together


class Pieces(NamedTuple):
    """An array that is nowhere whole.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    pieces : callable
        Goes through it once: gives its entries in order, row by row, as arrays of any length, on the first shard.
        The others have to go along and get nothing.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]


def go_along(arrays: Mapping[str, Array | Pieces]) -> None:
    """What the other shards do while the first writes these arrays to a file (``checkpoint.write``)."""
    for name in sorted(arrays):
        if isinstance(array := arrays[name], Pieces):
            for _ in array.pieces():
                pass


def unlike(shards: Shards, xp: ModuleType) -> str | None:
    """What is wrong with the devices of a replica's shards, or None; collective, before anything else crosses.

    A CPU and a GPU round differently, so that after a sum their samples would not be the same.
    """
    gpus = np.array([xp is not np], np.float64)
    shards.sum_(gpus)
    if gpus[0] in (0, shards.count):
        return None
    return (f"--device: must be the same for all parts of a replica; got a GPU for {gpus[0]:g} of {shards.count}. "
            "Use --device cpu, or machines that all have GPUs")


class Shards:
    """The seams of a replica that is whole: nothing crosses, and both seams are the identity.

    Attributes
    ----------
    index, count : int
        Which shard this is, of how many.
    """

    index = 0
    count = 1

    def mine(self, m: int, index: int | None = None) -> slice:
        """Which of a layer's ``m`` hidden units this shard holds, or the one of that index.

        Raises
        ------
        UserError
            If there are fewer pieces of 16 units than shards.
        """
        pieces = -(-m // EDGE)
        if pieces < self.count:
            raise UserError(f"shards: a layer must have at least {EDGE * (self.count - 1) + 1} hidden units for "
                            f"{self.count} shards; got {m}. Take fewer shards or larger layers")
        index = self.index if index is None else index
        low, high = (EDGE * (pieces * i // self.count) for i in (index, index + 1))
        return slice(low, min(high, m))

    def sum_(self, array: Array) -> None:
        """array <- its sum over all shards: the same array on each. C-contiguous, of one shape everywhere."""

    def product_(self, out: Array, a: Array, b: Array, precision: str = "fp32") -> None:
        """out <- sum over shards of a b, the same on each: arrays (rows, n), (rows, own), (own, n).

        With ``precision`` 'blocks' the sum is over blocks of units in their order, whatever the number of shards.
        """
        xp = module_of(out)
        if precision == BLOCKS:
            # copies, since a BLAS looks at strides, too
            whole = xp.ascontiguousarray
            self.add_in_order_(out, [whole(a[:, lo : lo + BLOCK]) @ whole(b[lo : lo + BLOCK])
                                     for lo in range(0, a.shape[1], BLOCK)])
        else:
            xp.matmul(a, b, out=out)
            self.sum_(out)

    def add_in_order_(self, out: Array, partials: Sequence[Array]) -> None:
        """out <- ((0 + p0) + p1) + ..., through the partials of the first shard, then of the next, ...."""
        out.fill(0)
        for partial in partials:
            out += partial

    def gather(self, part: Array, m: int, out: Array | None = None) -> Array:
        """All shards' columns side by side: arrays (..., own) -> (..., m), the same on each shard.

        Parameters
        ----------
        part : array (..., own)
            This shard's columns, those of ``mine(m)``.
        m : int
        out : array (..., m), optional
            Where to put them, if they have to be put together; not used by a shard that has all.

        Returns
        -------
        array (..., m)
            ``part`` itself if there is one shard.
        """
        _ = m, out
        return part

    def swap(self, give: Sequence[Array | None], take: Sequence[Array | None]) -> None:
        """take[s] <- what shard s gives to this one, for all s; None on both sides where nothing is given."""

    def first_(self, array: Array) -> None:
        """array <- that of the first shard: what all shards have one of, and must have alike."""

    def told(self, content: bytes) -> bytes:
        """What the first shard tells, on all."""
        return content

    def texts(self, text: str) -> list[str]:
        """The texts of all shards in order, on each."""
        return [text]

    def least(self, value: int) -> int:
        """The least of all shards' values, whole numbers from 0, on each. None goes on before all have come."""
        return value

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The arrays of all shards in order, of any shapes, on the first; None elsewhere."""
        return [array]

    def send(self, array: np.ndarray) -> None:
        """To the first shard, which calls ``receive``."""

    def receive(self, array: np.ndarray, index: int) -> None:
        """array <- what the shard of that index sends."""

    # -- arrays that are put together on the first shard, a piece at a time ---------------------------

    def columns(self, array: Array, m: int) -> Pieces:
        """All shards' columns side by side: of arrays (..., own) one (..., m)."""
        mine = [self.mine(m, index) for index in range(self.count)]
        rows = array.reshape(-1, array.shape[-1])

        def pieces() -> Iterator[np.ndarray]:
            step = max(1, AT_ONCE // (m * array.dtype.itemsize))
            for lo in range(0, len(rows), step):
                part = to_cpu(rows[lo : lo + step])
                if self.index:
                    self.send(part)
                    continue
                whole = np.empty((len(part), m), array.dtype)
                whole[:, mine[0]] = part
                for index, columns in enumerate(mine[1:], 1):
                    other = np.empty((len(part), columns.stop - columns.start), array.dtype)
                    self.receive(other, index)
                    whole[:, columns] = other
                yield whole

        return Pieces((*array.shape[:-1], m), array.dtype, pieces)

    def rows(self, array: Array, m: int) -> Pieces:
        """All shards' rows, one behind the other: of arrays (own, ...) one (m, ...)."""
        each = [self._of(index, array, (len(range(m)[self.mine(m, index)]), *array.shape[1:]))
                for index in range(self.count)]
        return Pieces((m, *array.shape[1:]), array.dtype,
                      lambda: itertools.chain.from_iterable(part.pieces() for part in each))

    def each(self, array: Array) -> list[Pieces]:
        """The array of every shard by itself, of any shapes. Collective, other than the two above."""
        found = self.collect(np.array(array.shape, np.int64))
        shapes = [array.shape] * self.count if found is None else [tuple(map(int, shape)) for shape in found]
        return [self._of(index, array, shape) for index, shape in enumerate(shapes)]

    def _of(self, index: int, array: Array, shape: tuple[int, ...]) -> Pieces:
        """The array of one shard; of another's the first must know the shape."""
        def pieces() -> Iterator[np.ndarray]:
            if self.index not in (0, index):
                return
            flat, step = array.reshape(-1), AT_ONCE // array.dtype.itemsize
            for lo in range(0, prod(shape), step):
                piece = np.empty(min(step, prod(shape) - lo), array.dtype)
                if self.index == index:
                    piece[...] = to_cpu(flat[lo : lo + step])
                    if index:
                        self.send(piece)
                else:
                    self.receive(piece, index)
                if self.index == 0:
                    yield piece

        return Pieces(shape, array.dtype, pieces)


WHOLE = Shards()


def widest(m: int, count: int) -> int:
    """The most of a layer's ``m`` hidden units that one of so many shards has."""
    pieces = -(-m // EDGE)
    return min(m, EDGE * -(-pieces // count))
