"""The rows of an epoch, minibatch after minibatch, where the model is.

    feed = feed_of(rows, xp, at_once)
    positions = feed.begin(order)               once an epoch: its order goes to the device, whole
    feed.turn(first, count)                     the rows that the next updates want
    feed.take(positions[lo:hi], out)            a minibatch, without the host
    feed.ahead(first, count)                    the rows of the turn after: on their way while this one computes

On a CPU that is ``Rows`` itself, and positions are what they are there. On a GPU positions are a
``Span`` of the epoch's order; the data are resident, or stream through two pairs of buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from gpudbn.arrays import Array, is_gpu, module_of
from gpudbn.data import Rows
from gpudbn.twins import twins_of

AT_ONCE = 1 << 26  # bytes of a buffer of streamed rows, unless one minibatch is more


@dataclass(frozen=True)
class Span:
    """Positions ``first``, ``first + 1``, ... in the order of the epoch; stands where NumPy has an array of positions.

    In a CUDA graph, which is launched for many turns, ``first`` counts from where the turn begins: ``turn``,
    array (1,), uint32, in device memory. None: from where the epoch begins.
    """

    first: int
    count: int
    turn: Array | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Span:
        start, stop, _ = part.indices(self.count)
        return Span(self.first + start, max(stop - start, 0), self.turn)


class Source(Protocol):
    """What rows are taken from: a ``Feed``, or ``Rows`` themselves, with the positions that belong to it."""

    def take(self, positions: Any, out: Array) -> None:
        """Fill ``out``, array (B, n), float32, with the rows at ``positions``, scaled."""
        ...

    def take_labels(self, positions: Any) -> Array:
        """The classes of these rows: array (B,), int32."""
        ...

    @property
    def levels(self) -> int | None:
        """See ``Rows.levels``."""
        ...


class Feed:
    """Rows for a model in the host's memory.

    Attributes
    ----------
    side : int
        Which of the feed's buffers the current turn is in. Launches that a graph repeats are for one of them.
    """

    side: int = 0

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @property
    def levels(self) -> int | None:
        """See ``Rows.levels``."""
        return self.rows.levels

    def begin(self, order: np.ndarray) -> Any:
        """The epoch has this order, array (count,), int64; returns the positions whose slices ``take`` wants."""
        return order

    def turn(self, first: int, count: int) -> None:
        """Until the next call, rows of these positions are taken and no others."""

    def ahead(self, first: int, count: int) -> None:
        """The work of this turn is launched; the next turn is this. Nothing if ``count`` is 0."""

    def take(self, positions: Any, out: Array) -> None:
        """Fill ``out``, array (B, n), float32, with the rows at ``positions``, scaled."""
        self.rows.take(positions, out)

    def take_labels(self, positions: Any) -> Array:
        """The classes of these rows: array (B,), int32. Not to be modified."""
        return self.rows.take_labels(positions)


class Resident(Feed):
    """Rows that are on the device: an epoch sends its order, and nothing else."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        xp = module_of(rows.array)
        self.xp = xp
        self.order = xp.empty(len(rows), np.int64)
        self.labels = None if rows.labels is None else xp.empty(len(rows), rows.labels.dtype)

    def begin(self, order: np.ndarray) -> Span:
        self.order[...] = self.xp.asarray(self.rows.places(order))  # in place: graphs know where it is
        if self.labels is not None:
            self.labels[...] = self.rows.labels[self.order]  # type: ignore[index]
        return Span(0, len(order))

    def take(self, positions: Span, out: Array) -> None:
        twins_of(out, self.rows.array).gather(out, self.rows.array, self.order, first=positions.first,
                                              scale=self.rows.scale, offset=positions.turn)

    def take_labels(self, positions: Span) -> Array:
        if self.labels is None:
            raise ValueError("feed: the rows must have labels; got none")
        return self.labels[positions.first : positions.first + positions.count]


class Side:
    """Memory for the rows of one turn, page-locked on the host and on the device.

    ``copied`` is recorded behind each copy, ``used`` behind the last launch that reads the device's.
    """

    def __init__(self, xp: ModuleType, count: int, rows: Rows) -> None:
        self.arrays = [(self._pinned(xp, (count, rows.n), rows.kept), xp.empty((count, rows.n), rows.kept))]
        if rows.labels is not None:
            self.arrays.append((self._pinned(xp, (count,), rows.labels.dtype), xp.empty(count, rows.labels.dtype)))
        self.copied, self.used = xp.cuda.Event(disable_timing=True), xp.cuda.Event(disable_timing=True)
        self.first = self.count = 0

    @staticmethod
    def _pinned(xp: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape))
        return np.frombuffer(xp.cuda.alloc_pinned_memory(size * dtype.itemsize), dtype, size).reshape(shape)


class Streamed(Feed):
    """Rows in the host's memory or on its disk, for a model on a GPU that has no room for them.

    While the device computes a turn on one pair of buffers, the host gathers the rows of the next in
    the other pair and a stream of its own copies them. Bytes travel as bytes.

    Parameters
    ----------
    at_once : int
        The most rows of a turn.
    """

    def __init__(self, rows: Rows, xp: ModuleType, at_once: int) -> None:
        super().__init__(rows)
        self.xp: Any = xp
        self.sides = [Side(xp, at_once, rows) for _ in range(2)]
        self.copying = self.xp.cuda.Stream(non_blocking=True)
        self.order = np.empty(0, np.int64)

    def begin(self, order: np.ndarray) -> Span:
        self.order = order
        for side in self.sides:
            side.count = 0  # of another epoch
        return Span(0, len(order))

    def turn(self, first: int, count: int) -> None:
        computing = self.xp.cuda.get_current_stream()
        self.sides[self.side].used.record(computing)
        self.side = 1 - self.side
        side = self.sides[self.side]
        if (side.first, side.count) != (first, count):
            self._send(side, first, count)
        computing.wait_event(side.copied)

    def ahead(self, first: int, count: int) -> None:
        if count:
            self._send(self.sides[1 - self.side], first, count)

    def _send(self, side: Side, first: int, count: int) -> None:
        side.copied.synchronize()  # the host's buffer is free when its last copy is over
        positions = self.order[first : first + count]
        self.rows.copy(positions, side.arrays[0][0][:count])
        for host, _ in side.arrays[1:]:
            host[:count] = self.rows.take_labels(positions)
        self.copying.wait_event(side.used)  # the device's, when what was launched on it is
        for host, there in side.arrays:
            there[:count].set(host[:count], stream=self.copying)
        side.copied.record(self.copying)
        side.first, side.count = first, count

    def take(self, positions: Span, out: Array) -> None:
        there = self.sides[self.side].arrays[0][1]
        twins_of(out, there).gather(out, there, None, first=self._within(positions), scale=self.rows.scale)

    def take_labels(self, positions: Span) -> Array:
        arrays, first = self.sides[self.side].arrays, self._within(positions)
        if len(arrays) == 1:
            raise ValueError("feed: the rows must have labels; got none")
        return arrays[1][1][first : first + positions.count]

    def _within(self, positions: Span) -> int:
        """Where they are in the buffer, which begins where the turn does."""
        return positions.first - (self.sides[self.side].first if positions.turn is None else 0)


def feed_of(rows: Rows, xp: ModuleType, at_once: int) -> Feed:
    """The feed for a model where ``xp`` is, from rows where they are; a turn has at most ``at_once`` rows."""
    if xp is np:
        return Feed(rows)
    return Resident(rows) if is_gpu(rows.array) else Streamed(rows, xp, min(at_once, len(rows)))
