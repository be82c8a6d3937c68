"""IDX files, the format of MNIST: a magic number, the sizes, then the bytes; gzipped or not.

    0x00 0x00 0x08 d,  d sizes as 32-bit big-endian integers,  product of the sizes bytes

Files that are not gzipped are memory-mapped. Source: Y. LeCun, C. Cortes & C. Burges, "The MNIST database".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from gpudbn.data.checks import Table, missing
from gpudbn.data.files import SMALL, unpacked
from gpudbn.errors import UserError

_GZIP = b"\x1f\x8b"


def _header(start: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    """The sizes in a file's first bytes."""
    if len(start) < 4 + 4 * dimensions:
        raise UserError(f"{path}: must be an IDX file; got only {len(start)} bytes. Fetch it again")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", start[: 4 + 4 * dimensions])
    if magic != 0x800 + dimensions:
        kind = "labels" if dimensions == 1 else "images"
        hint = {0x801: "It holds labels", 0x803: "It holds images"}.get(magic, "It is no IDX file of bytes")
        raise UserError(f"{path}: must start with the magic number 0x{0x800 + dimensions:08x} of {kind}; "
                        f"got 0x{magic:08x}. {hint}")
    return tuple(shape)


def read(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file, uint8, with this many dimensions: 3 for images, 1 for labels."""
    if not path.is_file():
        raise missing(path)
    with path.open("rb") as file:
        start = file.read(4 + 4 * dimensions)
    if start[:2] == _GZIP:
        return _read_gzipped(path, dimensions)
    shape = _header(start, dimensions, path)
    size, got = math.prod(shape), path.stat().st_size - len(start)
    if got != size:
        raise _wrong_size(path, size, got)
    if size == 0:
        return np.empty(shape, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r", len(start), shape))


def _read_gzipped(path: Path, dimensions: int) -> np.ndarray:
    """The same, unpacked into memory or, if it is large, into the cache folder."""
    content = bytearray()
    try:
        with gzip.open(path, "rb") as file:
            start = file.read(4 + 4 * dimensions)
            shape = _header(start, dimensions, path)
            size = math.prod(shape)
            if size > SMALL:
                file.seek(0)
                return read(unpacked(path, "", cast(IO[bytes], file)), dimensions)
            # chunk by chunk: a damaged header may ask for more memory than there is
            while chunk := file.read(min(1 << 24, size + 1 - len(content))):
                content += chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: must be a whole gzip file; got: {error}. Fetch it again") from error
    if len(content) != size:
        raise _wrong_size(path, size, len(content))
    array = np.frombuffer(content, np.uint8).reshape(shape)
    array.flags.writeable = False
    return array


def _wrong_size(path: Path, size: int, got: int) -> UserError:
    return UserError(f"{path}: must hold {size} bytes after its header; got {'more' if got > size else got}. "
                     f"{'It has something appended' if got > size else 'It is cut short'}: fetch it again")


def _find(folder: Path, part: str, kind: str, dimensions: int) -> Path | None:
    """The file of one part and kind under any of its usual names."""
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):  # the last two as torchvision leaves them
        for dash in "-.":
            for end in ("", ".gz"):
                path = place / f"{part}-{kind}{dash}idx{dimensions}-ubyte{end}"
                if path.is_file():
                    return path
    return None


def read_folder(folder: Path) -> tuple[Table, Table | None]:
    """The training and test tables of a folder of IDX files; the test table is None if it has none."""
    tables: list[Table | None] = []
    for part in ("train", "t10k"):
        images, labels = (_find(folder, part, kind, d) for kind, d in (("images", 3), ("labels", 1)))
        if images is None:
            tables.append(None)
            continue
        tables.append(Table(read(images, 3), None if labels is None else read(labels, 1), str(images), str(labels)))
    train, test = tables
    if train is None:
        names = sorted(p.name for p in folder.iterdir())
        listing = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(f"{folder}: must hold train-images-idx3-ubyte, or the same with .gz; "
                        f"got {listing or 'an empty folder'}. A file of arrays is given by its own name")
    return train, test
