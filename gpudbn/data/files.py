"""Arrays in ``.npy`` and ``.npz`` files, memory-mapped: only what is asked for is read. No pickle.

A member that a ``.npz`` stores uncompressed is mapped where it lies in the zip. A large compressed one is unpacked
once, in chunks, into the cache folder, and mapped there.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from gpudbn.data.checks import Table, missing
from gpudbn.errors import UserError

SMALL = 1 << 26  # what is compressed and unpacks to at most this many bytes is kept in memory, not in the cache folder
_ROWS, _LABELS = ("x", "images", "data"), ("y", "labels", "target", "targets")
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def cache_folder() -> Path:
    """Where downloads, unpacked files and times of paths are kept: ``GPUDBN_DATA``, or the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("GPUDBN_DATA") or f"{cache}/gpudbn").expanduser()


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes its name only when it is complete; left as nothing by an exception."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("xb")
    except OSError as error:
        raise UserError(f"GPUDBN_DATA: must be a folder that can be written; got {error}. "
                        "Set it to a folder of yours") from error
    try:
        with file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def unpacked(path: Path, member: str, stream: IO[bytes]) -> Path:
    """The content of ``stream``, part ``member`` of the file ``path``, as a file in the cache folder.

    The name says which version of ``path`` it is of; those of earlier versions are removed.
    """
    key = hashlib.sha256(f"{path.resolve()}\0{member}".encode()).hexdigest()[:16]
    status = path.stat()
    target = cache_folder() / "unpacked" / f"{key}-{status.st_size:x}-{status.st_mtime_ns:x}"
    if not target.exists():
        with written(target) as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        for old in target.parent.glob(f"{key}-*"):
            if old != target and not old.name.endswith(".part"):
                old.unlink(missing_ok=True)
    return target


class _Header(NamedTuple):
    """What stands before the numbers of an array in NumPy's format, and how long it is."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def _header(file: IO[bytes], source: str) -> _Header:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    except Exception as error:  # a header is Python text, and NumPy raises whatever parsing it raises
        raise UserError(f"{source}: must be an array as numpy.save writes it; got something else "
                        f"({' '.join(str(error).split()) or type(error).__name__})") from error
    if dtype.hasobject:
        raise UserError(f"{source}: must hold numbers; got Python objects, which are never unpickled. "
                        "Rows of different lengths?")
    return _Header(shape, "F" if fortran else "C", dtype, file.tell())


def _mapped(path: Path, header: _Header, start: int, length: int, source: str) -> np.ndarray:
    """The array whose header begins at byte ``start`` of the file and which fills ``length`` bytes with it."""
    got = min(length, path.stat().st_size - start) - header.offset
    if got != header.size:
        raise UserError(f"{source}: must hold {header.size} bytes after its header; got {got}. "
                        f"{'It is cut short' if got < header.size else 'It has something appended'}: write it again")
    if header.size == 0:
        return np.empty(header.shape, header.dtype)
    # a plain array: those of the class memmap are slow to index
    return np.asarray(np.memmap(path, header.dtype, "r", start + header.offset, header.shape, header.order))


def open_npy(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, memory-mapped."""
    if not path.is_file():
        raise missing(path)
    with path.open("rb") as file:
        header = _header(file, str(path))
    return _mapped(path, header, 0, path.stat().st_size, str(path))


def read_npy(path: Path, labels: Path | None) -> Table:
    """Rows from one ``.npy`` file, labels from another."""
    rows = open_npy(path)
    return Table(rows, None, str(path)) if labels is None else Table(rows, open_npy(labels), str(path), str(labels))


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: str) -> np.ndarray:
    """One array of an ``.npz`` file."""
    with archive.open(info) as stream:
        header = _header(stream, source)
        if info.compress_type != zipfile.ZIP_STORED:
            if info.file_size > SMALL:
                stream.seek(0)
                return open_npy(unpacked(path, info.filename, stream))
            content = stream.read()
            if len(content) != header.size:
                raise UserError(f"{source}: must hold {header.size} bytes after its header; got {len(content)}. "
                                "Write it again")
            return np.frombuffer(content, header.dtype).reshape(header.shape, order=header.order)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # in its local header: 30 bytes, a name, an extra field
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return _mapped(path, header, start, info.file_size, source)


def read_npz(path: Path) -> tuple[Table, Table | None]:
    """The training and test tables of an ``.npz`` file; the test table is None if it has none."""
    if not path.is_file():
        raise missing(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

            def pick(names: tuple[str, ...], *patterns: str) -> tuple[str, np.ndarray | None]:
                wanted = {pattern.format(name) for name in names for pattern in patterns}
                found = [member for member in members if member.lower() in wanted]
                if len(found) > 1:
                    raise UserError(f"{path}: must hold one array of a kind; got {' and '.join(found)}. Rename one")
                if not found:
                    return "", None
                source = f"{path} [{found[0]}]"
                return source, _member(path, archive, members[found[0]], source)

            tables: list[Table | None] = []
            for patterns in (("{}", "{}_train", "train_{}"), ("{}_test", "test_{}")):
                source, rows = pick(_ROWS, *patterns)
                labels_source, labels = pick(_LABELS, *patterns)
                tables.append(None if rows is None else Table(rows, labels, source, labels_source))
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"{path}: must be a whole .npz file, a zip of arrays; got: {' '.join(str(error).split())}. "
                        "Write it again with numpy.savez") from error
    train, test = tables
    if train is None:
        raise UserError(f"{path}: must hold arrays x and y, or x_train, y_train, x_test and y_test (images and labels "
                        f"will do); got {', '.join(members) or 'nothing'}. Name them: numpy.savez(file, x=..., y=...)")
    return train, test
