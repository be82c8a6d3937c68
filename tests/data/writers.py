"""Files of data for the tests, small and asymmetric."""

from __future__ import annotations

import gzip
import struct

import numpy as np


def idx_bytes(array, magic=None):
    """An array of bytes in IDX format."""
    array = np.asarray(array, np.uint8)
    magic = 0x800 + array.ndim if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def pictures(count, height=5, width=3, seed=0):
    """Grey pictures (count, height, width), uint8, and their classes 0..3 (count,), int64."""
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, 256, (count, height, width), np.uint8), numbers.integers(0, 4, count)


def write_idx(folder, *, train=61, test=23, zipped=False, dash="-", labels=True):
    """A folder as MNIST's: the pictures and classes of its training and test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        if not count:
            continue
        written[part] = x, y = pictures(count, seed=seed)
        for kind, array in (("images", x), ("labels", y))[: 2 if labels else 1]:
            content = idx_bytes(array)
            name = f"{part}-{kind}{dash}idx{array.ndim}-ubyte"
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return written


def rows_of(rows):
    """All of a table's rows: array (len, n), float32."""
    out = np.empty((len(rows), rows.n), np.float32)
    rows.take(np.arange(len(rows)), out)
    return out


def labels_of(rows):
    """All of a table's labels."""
    return rows.take_labels(np.arange(len(rows)))
