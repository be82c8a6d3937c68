"""Tables of training rows and what belongs to them: ``Rows`` (one table) and ``DataSet`` (training, validation, test).

A table is a base array and a selection of its rows. Splits and shards change the selection only, so they copy
nothing, and the base array may be larger than memory: a memory-mapped file is read where it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from gpudbn import arrays
from gpudbn.arrays import Array

CHUNK = 1 << 22  # bytes that go through memory at once when a whole table is read


@dataclass(frozen=True, eq=False)
class Rows:
    """A read-only table of rows: entry [i, j] is array[index[i], j] * scale, in [0, 1].

    Parameters
    ----------
    array : array (N, n), uint8, bool or floating
        The base array, on disk (memory-mapped), in memory or on a GPU. Not modified, never copied here.
    scale : float
        What entries are multiplied by: 1/255 for bytes.
    labels : array (N,), int32, optional
        Classes of the base array's rows.
    index : range or array (count,), int64, optional
        The rows of ``array`` that belong to this table; all if not given. In memory, also where ``array`` is on a GPU.
    """

    array: Array
    scale: float = 1.0
    labels: Array | None = None
    index: range | np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.array) if self.index is None else len(self.index)

    @property
    def n(self) -> int:
        """The number of columns."""
        return self.array.shape[1]

    @property
    def levels(self) -> int | None:
        """L where entries are multiples of 1 / L, for whole numbers kept as bytes or bits; None where they are not."""
        if self.array.dtype == np.bool_:
            return 1
        steps = round(1 / self.scale)
        return steps if self.array.dtype == np.uint8 and abs(steps * self.scale - 1) < 1e-6 else None

    @property
    def kept(self) -> np.dtype:
        """What entries are kept as on a GPU: bytes, bits and halves as they are, all else as float32."""
        return self.array.dtype if self.array.dtype in (np.uint8, np.bool_, np.float16) else np.dtype(np.float32)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the base array. Out of range is refused: it would read rows of another split."""
        positions = np.asarray(positions)
        if positions.size and positions.astype(np.uint64).max() >= len(self):  # as uint64 negative numbers are huge
            raise IndexError(f"Rows: positions must lie in [0, {len(self)}); "
                             f"got {positions.min()} to {positions.max()}")
        if self.index is None:
            return positions
        if isinstance(self.index, range):
            return positions * self.index.step + self.index.start
        return self.index[positions]

    def take(self, positions: np.ndarray, out: Array) -> None:
        """Fill ``out`` with the rows at ``positions``, scaled.

        Parameters
        ----------
        positions : array (B,), integers in [0, len(self))
            Always a NumPy array.
        out : array (B, n), float32
            Overwritten. Where ``array`` is, or on a GPU: rows of the host are taken there.
        """
        if out.shape != (len(positions), self.n) or out.dtype != np.float32:
            raise ValueError(f"Rows.take: out must be ({len(positions)}, {self.n}) float32; "
                             f"got {out.shape} {out.dtype}")
        if arrays.is_gpu(out) and not arrays.is_gpu(self.array):
            host = np.empty(out.shape, np.float32)
            self.take(positions, host)
            out[...] = arrays.to_gpu(host)
            return
        xp = arrays.module_of(self.array, out)
        if xp is np:
            self.copy(positions, out)
        else:
            xp.copyto(out, self.array[xp.asarray(self.places(positions))], casting="unsafe")
        if self.scale != 1:
            xp.multiply(out, np.float32(self.scale), out=out)

    def copy(self, positions: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out``, array (B, n), with the rows at ``positions``, not scaled. All in memory or on disk."""
        places, array = self.places(positions), self.array
        if not array.flags.c_contiguous or not array.flags.aligned:
            out[...] = array[places]  # numpy.take would first copy the whole array
        elif array.dtype == out.dtype:
            # "clip" saves the copy that "raise" makes of out; the places have been checked
            np.take(array, places, axis=0, out=out, mode="clip")
        else:
            out[...] = array.take(places, axis=0, mode="clip")

    def take_labels(self, positions: np.ndarray) -> Array:
        """The classes of the rows at ``positions``: array (B,), int32, in the place where ``array`` is."""
        if self.labels is None:
            raise ValueError("Rows.take_labels: the rows must have labels; got none")
        places = self.places(positions)
        xp = arrays.module_of(self.labels)
        return self.labels[places if xp is np else xp.asarray(places)]

    def select(self, index: range | np.ndarray) -> Rows:
        """The rows at these positions as a table of their own; a view."""
        if self.index is None:
            chosen = index
        elif isinstance(index, range):
            chosen = self.index[index.start : index.stop : index.step]
        else:
            chosen = self.places(index)
        return Rows(self.array, self.scale, self.labels, chosen)

    def shard(self, part: int, parts: int) -> Rows:
        """Rows part, part + parts, part + 2 parts, ...: the shards share no row and together are everything."""
        if not 0 <= part < parts:
            raise ValueError(f"Rows.shard: part must lie in [0, {parts}); got {part}")
        index = range(len(self)) if self.index is None else self.index
        return Rows(self.array, self.scale, self.labels, index[part::parts])

    def to(self, xp: ModuleType) -> Rows:
        """These rows, and no others, resident where ``xp``'s arrays live; self if they are there.

        Bytes stay bytes: the GPU holds a quarter of what float32 would take. Goes through memory in chunks.
        """
        if (xp is np) != arrays.is_gpu(self.array):
            return self
        if xp is np:
            return Rows(arrays.to_cpu(self.array), self.scale,
                        None if self.labels is None else arrays.to_cpu(self.labels), self.index)
        positions = np.arange(len(self))
        there = xp.empty((len(self), self.n), self.kept)
        step = max(1, CHUNK // max(1, self.n * self.array.dtype.itemsize))
        for first in range(0, len(self), step):
            chunk = self.array[self.places(positions[first : first + step])]
            there[first : first + step] = xp.asarray(np.ascontiguousarray(chunk, self.kept))
        labels = None if self.labels is None else xp.asarray(self.take_labels(positions))
        return Rows(there, self.scale, labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training, validation and test rows of one kind.

    ``image_shape`` is the (height, width) of a row that is a picture, ``classes`` the number of classes (0 without
    labels), ``constant`` the number of columns that never vary.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    image_shape: tuple[int, int] | None
    classes: int
    constant: int = 0

    @property
    def n(self) -> int:
        """The number of columns."""
        return self.train.n

    def to(self, xp: ModuleType) -> DataSet:
        """The same data where ``xp`` is, NumPy or CuPy; see ``Rows.to``."""
        return replace(self, train=self.train.to(xp), validation=self.validation.to(xp), test=self.test.to(xp))

    def describe(self) -> str:
        """One line: how many rows of what, and what a reader should know about them."""
        shape = "" if self.image_shape is None else f" ({self.image_shape[0]} x {self.image_shape[1]})"
        text = (f"{self.name}: {len(self.train)} training, {len(self.validation)} validation and {len(self.test)} test "
                f"rows of {self.n} columns{shape}")
        text += f", {self.classes} classes" if self.classes else ", no labels"
        if self.constant:
            text += f"; {self.constant} {'column never varies' if self.constant == 1 else 'columns never vary'}"
        return text
