"""What data must hold before a run starts, and the one line that says what does not.

Whole tables are read in chunks, so that a file larger than memory can be checked.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpudbn.data.rows import CHUNK
from gpudbn.errors import UserError

CLASSES = 1 << 16


class Table(NamedTuple):
    """A table as a file gives it: rows (N, ...) of any dtype, labels (N, ...) or None, their names in messages."""

    array: np.ndarray
    labels: np.ndarray | None
    source: str
    labels_source: str = ""


class Checked(NamedTuple):
    """A table to train on: array (N, n), its scale, labels (N,) int32, image shape, which columns vary (n,) bool."""

    array: np.ndarray
    scale: float
    labels: np.ndarray | None
    image_shape: tuple[int, int] | None
    varies: np.ndarray


def missing(path: Path) -> UserError:
    """The error for a path that is not there; suggests the nearest name in its folder."""
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"{path}: must be a file or folder; got nothing there, nor a folder {folder}. "
                         "Relative paths start at the working directory")
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    hint = f"Did you mean {folder / near[0]}?" if near else f"{folder} holds no name like it"
    return UserError(f"{path}: must be a file or folder; got nothing there. {hint}")


def extremes(array: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of every column: arrays (n,). Refuses floating values outside [0, 1].

    Parameters
    ----------
    array : array (N, n), N >= 1, uint8, bool or floating
        Read once, in chunks.
    """
    step = max(1, CHUNK // max(1, array.shape[1] * array.itemsize))
    low, high = array[0].copy(), array[0].copy()
    for first in range(0, len(array), step):
        chunk = array[first : first + step]
        least, most = chunk.min(axis=0), chunk.max(axis=0)  # NaN if there is one
        if array.dtype.kind == "f" and not ((least >= 0) & (most <= 1)).all():
            row, column = np.argwhere(~((chunk >= 0) & (chunk <= 1)))[0]
            value = chunk[row, column]
            hint = ("Replace or drop such rows" if not np.isfinite(value) else
                    "Scale them: (x - x.min()) / (x.max() - x.min()), or save whole numbers 0..255 as uint8")
            raise UserError(f"{source}: values must lie in [0, 1]; got {value:g} at row {first + row}, "
                            f"column {column}. {hint}")
        np.minimum(low, least, out=low)
        np.maximum(high, most, out=high)
    return low, high


def whole_labels(labels: np.ndarray, count: int, source: str) -> np.ndarray:
    """The labels as classes 0, 1, ...: array (count,), int32."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f"{source}: labels must be one whole number a row; got shape {labels.shape}. "
                        "One-hot labels: save labels.argmax(axis=1)")
    if len(labels) != count:
        raise UserError(f"{source}: labels must be as many as the rows, {count}; got {len(labels)}")
    if labels.dtype.kind not in "iufb":
        raise UserError(f"{source}: labels must be whole numbers 0, 1, 2, ...; got dtype {labels.dtype}. "
                        "Names: save numpy.unique(names, return_inverse=True)[1]")
    if labels.dtype.kind in "if":
        bad = ~(labels >= 0) | (labels >= CLASSES)
        if labels.dtype.kind == "f":
            bad |= labels != np.floor(labels)
    else:
        bad = labels >= CLASSES
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{source}: labels must be whole numbers 0, 1, 2, ... below {CLASSES}; "
                        f"got {labels[row]:g} at row {row}")
    return labels.astype(np.int32)


def flat(array: np.ndarray, source: str) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The rows as array (N, n), a view, and the (height, width) of those that were pictures."""
    if array.dtype.kind not in "fb" and array.dtype != np.uint8:
        hint = ("Whole numbers 0..255: save x.astype(numpy.uint8); others: scale to [0, 1] and save as float32"
                if array.dtype.kind in "iu" else "Save x.astype(numpy.float32)")
        raise UserError(f"{source}: must hold uint8, bool or floating numbers; got dtype {array.dtype}. {hint}")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3):
        hint = {0: "One array, not a number", 1: "One row: save x[None, :]",
                4: "Colour: save one channel, or x.reshape(len(x), -1)"}.get(array.ndim, "Save x.reshape(len(x), -1)")
        raise UserError(f"{source}: must have shape (rows, columns) or (rows, height, width); got {array.shape}. "
                        f"{hint}")
    if 0 in array.shape:
        raise UserError(f"{source}: must hold at least one row and one column; got shape {array.shape}")
    if array.ndim == 2:
        return array, None
    if not array.flags.c_contiguous:
        raise UserError(f"{source}: pictures must be stored row by row; got Fortran order. "
                        "Save numpy.ascontiguousarray(x)")
    return array.reshape(len(array), -1), (array.shape[1], array.shape[2])


def byte_scale(high: int, source: str) -> float:
    """What bytes with this largest value are multiplied by: 1 for bits, 1/255 for grey values."""
    if high <= 1:
        return 1.0
    if high < 32:  # no picture is that dark: a count, a class or another scale
        raise UserError(f"{source}: whole numbers must use the range 0..255, or be 0 and 1; got 0..{high}. "
                        f"Save (x / {high}).astype(numpy.float32)")
    return 1 / 255


def table(given: Table, scale: float | None = None) -> Checked:
    """The table, checked: dtype, shape, values, labels.

    ``scale`` if it is known, as that of test rows is from the training rows; otherwise it follows from the values.
    """
    array, image_shape = flat(given.array, given.source)
    labels = None if given.labels is None else whole_labels(given.labels, len(array), given.labels_source)
    low, high = extremes(array, given.source)
    most = float(high.max())
    if scale is None:
        scale = byte_scale(int(most), given.source) if array.dtype == np.uint8 else 1.0
    elif most * scale > 1:
        raise UserError(f"{given.source}: values must lie in 0..{1 / scale:g} as those of the training rows; "
                        f"got {most:g}")
    return Checked(array, scale, labels, image_shape, low != high)
