"""Models and checkpoints: one file of named arrays and JSON metadata, in the safetensors format.

No pickle: reading a file never runs code from it. Writes are atomic: whatever happens in the
middle (a full disk, Ctrl-C, kill -9, a power cut), the file under its name is the old one or the
new one, whole.

The safetensors header holds one string, ``gpudbn``, a JSON object

    {"format": 1, "kind": "model" or "checkpoint", "crc32": ..., "meta": {...}}

whose sum covers the metadata and every array's name, type, shape and bytes.

Arrays go to the disk and come from it a piece at a time: of one that is cut among ranks (``shards.Pieces``) nobody
holds more than that, and a reader keeps only the part it asked for, though it checks the sum of all.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from gpudbn.arrays import Array, all_finite, to_cpu
from gpudbn.errors import UserError
from gpudbn.shards import Pieces

FORMAT = 1
KINDS = {"model": "gpudbn.predict, gpudbn.sample and gpudbn.evaluate read models",
         "checkpoint": "gpudbn.train --resume reads checkpoints"}
_TYPES = {"BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64",  # what safetensors calls them
          **{f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint"))
             for bits in (8, 16, 32, 64)}}
_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}
TYPES = tuple(_NAMES)
Table = list[tuple[str, np.dtype, tuple[int, ...]]]  # name, type and shape of every array, in order of name
Part = Callable[[str, tuple[int, ...]], tuple[slice, ...] | None]  # what to keep of an array, by name and shape
AT_ONCE = 1 << 22  # bytes of a piece
TEMPORARY = ".gpudbn-*.tmp"  # what a killed process may leave in a folder

_HINTS = {
    errno.ENOSPC: "Free some space there or write elsewhere",
    errno.EDQUOT: "Free some of your quota there or write elsewhere",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
    errno.ENOENT: "Make the folder first",
    errno.ENOTDIR: "A part of the path is a file; choose another",
    errno.EISDIR: "It is a folder; name a file",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


def why_not(path: Path | str, rule: str, error: OSError) -> UserError:
    """The one line for an OSError: path, rule, the system's reason and what to do about it."""
    hint = _HINTS.get(error.errno or 0, "Check its permissions, or choose another place")
    return UserError(f"{path}: must be {rule}; got '{os.strerror(error.errno or errno.EIO)}'. {hint}")


def nearest(path: Path) -> str:
    """`` did you mean ...?`` with the name in the same folder most like this one, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1)
    return f". Did you mean {path.parent / close[0]}?" if close else ""


@contextmanager
def written_atomically(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to that takes the name ``path`` at the end, or leaves what is there as it was.

    Raises
    ------
    UserError
        If the system refuses; nothing is left behind.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, so that the link stays one
    # A name of its own: two writers never share a temporary file. Not tempfile: its files are private (0600).
    temporary = target.parent / TEMPORARY.replace("*", f"{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:  # also on KeyboardInterrupt; after the rename there is nothing of that name
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise why_not(path, "writable", error) from error
    with suppress(OSError):  # the rename itself survives a power cut; some file systems cannot promise it
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path | str, data: bytes) -> None:
    """Put ``data`` into the file ``path``, or leave it as it was. Errors as in ``written_atomically``."""
    with written_atomically(path) as file:
        file.write(data)


def write(path: Path | str, arrays: Mapping[str, Array | Pieces], meta: Mapping[str, Any]) -> None:
    """Write named arrays and metadata to one file, atomically.

    Parameters
    ----------
    path : path
        The folder must exist.
    arrays : mapping from name to array, or to pieces of one
        Numbers of any shape, NumPy or CuPy; see ``TYPES``. Not modified. Taken in order of name.
    meta : mapping
        ``meta["kind"]`` is "model" or "checkpoint"; the rest is whatever JSON can hold. NumPy
        scalars and arrays become numbers and lists, tuples become lists. Not modified.

    Raises
    ------
    UserError
        If the file cannot be written; the old one, if any, is untouched.
    """
    kind = meta.get("kind")
    if kind not in KINDS:
        raise ValueError(f"checkpoint.write: meta['kind'] must be one of {', '.join(KINDS)}; got {kind!r}")
    table = []
    for name in sorted(arrays):
        dtype = np.dtype(arrays[name].dtype)
        if dtype.name not in TYPES:
            raise TypeError(f"checkpoint.write: {name} must be an array of numbers; got {dtype}")
        table.append((name, dtype, tuple(arrays[name].shape)))
    # once there and back, so that what is summed is what a reader will sum
    text = json.loads(json.dumps(dict(meta), default=_plain))
    head = {"format": FORMAT, "kind": kind, "crc32": 0xFFFFFFFF, "meta": text}
    total = _begin_sum(table, text)
    with written_atomically(path) as file:
        room = len(_header(table, head, 0))
        file.write(bytes(room))  # until the sum is known
        for name, dtype, _ in table:
            for piece in _pieces(arrays[name], dtype):
                total = zlib.crc32(piece, total)
                file.write(piece)
        file.seek(0)
        file.write(_header(table, {**head, "crc32": total}, room))


def _pieces(array: Array | Pieces, dtype: np.dtype) -> Iterator[memoryview]:
    """The bytes of an array, little-endian and row by row."""
    for piece in array.pieces() if isinstance(array, Pieces) else (to_cpu(array),):
        flat = np.ascontiguousarray(piece, dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        for lo in range(0, len(flat), AT_ONCE):
            yield flat[lo : lo + AT_ONCE].data


def _header(table: Table, head: Mapping[str, Any], room: int) -> bytes:
    """The beginning of a file: at least ``room`` bytes, which spaces fill, and a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"gpudbn": json.dumps(head)}}
    at = 0
    for name, dtype, shape in table:
        end = at + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = max(room - 8, -(-len(text) // 8) * 8)
    return size.to_bytes(8, "little") + text.ljust(size)


class Reader:
    """A file made by ``write``, to be read whole or in part.

    Attributes
    ----------
    meta : dict
    shapes : dict from name to shape
        Of the whole arrays, in order of name.

    Raises
    ------
    UserError
        If there is no such file, or it is cut short, damaged, of another kind or of a newer format.
    """

    def __init__(self, path: Path | str, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"checkpoint.read: kind must be one of {', '.join(KINDS)}; got {kind!r}")
        self.path, self.kind = Path(path), kind
        _refuse_unreadable(self.path, kind)
        with self._refusing():
            with safetensors.safe_open(self.path, framework="np") as checked:  # its header is that of such a file
                head = _head(self.path, kind, checked.metadata())
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(size))
        self.meta, self._sum = head["meta"], head.get("crc32")
        self._start = 8 + size
        self._entries = {name: entries[name] for name in sorted(entries) if name != "__metadata__"}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What a damaged file leads to in here becomes one line."""
        try:
            yield
        except UserError:
            raise
        # KeyError and its like: a damaged header that names a type or shape NumPy does not have
        except (safetensors.SafetensorError, OSError, TypeError, KeyError, OverflowError, ValueError) as error:
            raise UserError(f"{self.path}: must be a whole safetensors file; got one that is cut short or damaged "
                            f"({str(error).splitlines()[0]}). Use another copy, or train again") from error

    def read(self, part: Part | None = None) -> dict[str, np.ndarray]:
        """The arrays by name, or parts of them; the file is read through once, whatever is kept.

        Parameters
        ----------
        part : callable, optional
            Gives for a name and a shape the slices to keep, of the first dimensions or none; None if it is not wanted.

        Returns
        -------
        dict from name to numpy.ndarray
            In order of name. Writable and yours.

        Raises
        ------
        UserError
            If the file is cut short or its sum differs, or if what is kept of a model holds NaN or infinity.
        """
        arrays = {}
        with self._refusing(), self.path.open("rb") as file:
            table = [(name, np.dtype(_TYPES[entry["dtype"]]), self.shapes[name])
                     for name, entry in self._entries.items()]
            total = _begin_sum(table, self.meta)
            for name, dtype, shape in table:
                file.seek(self._start + self._entries[name]["data_offsets"][0])
                array, total = _take(file, dtype, shape, () if part is None else part(name, shape), total)
                if array is not None:
                    arrays[name] = array
        if self._sum != total:
            raise UserError(f"{self.path}: must be as it was written; got a file whose check sum differs. "
                            "It is damaged: use another copy, or train again")
        if self.kind == "model":
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not all_finite(array):
                    raise UserError(f"{self.path}: must hold finite numbers; got NaN or infinity in {name}. "
                                    "Train again with a lower learning rate")
        return arrays


def read(path: Path | str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a file made by ``write``: as ``Reader`` gives them, and with its errors.

    Parameters
    ----------
    path : path
    kind : str
        "model" or "checkpoint".
    """
    reader = Reader(path, kind)
    return reader.read(), reader.meta


def _take(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], part: tuple[slice, ...] | None,
          total: int) -> tuple[np.ndarray | None, int]:
    """The array that begins here, or the part of it that is wanted; and the sum, continued."""
    rows, *rest = shape or (1,)
    out = None
    if part is not None:
        kept = [range(size)[cut] for size, cut in zip(shape, part, strict=False)]
        out = np.empty([*map(len, kept), *shape[len(kept):]], dtype)
    each = dtype.itemsize * prod(rest)
    step = max(1, AT_ONCE // max(1, each))
    for lo in range(0, rows if each else 0, step):
        count = min(step, rows - lo)
        data = file.read(count * each)
        if len(data) < count * each:
            raise ValueError("the file ends too early")
        total = zlib.crc32(data, total)
        if out is None:
            continue
        block = np.frombuffer(data, dtype.newbyteorder("<")).reshape(count, *rest)
        if part:
            first, end = max(lo, kept[0].start), min(lo + count, kept[0].stop)
            if first < end:
                out[first - kept[0].start : end - kept[0].start] = block[(slice(first - lo, end - lo), *part[1:])]
        else:
            out.reshape(rows, *rest)[lo : lo + count] = block
    return out, total


def _refuse_unreadable(path: Path, kind: str) -> None:
    """Say why nothing can be read, before safetensors says it worse."""
    try:
        with path.open("rb"):
            pass
    except IsADirectoryError:
        inside = path / f"{kind}.safetensors"
        hint = f". Did you mean {inside}?" if inside.is_file() else ""
        raise UserError(f"{path}: must be a {kind} file; got a folder{hint}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: must be a {kind} file; got no such file{nearest(path)}") from None
    except OSError as error:
        raise why_not(path, "readable", error) from error


def _head(path: Path, kind: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What ``write`` put into the header, if it is something this version can read."""
    try:
        head = json.loads((metadata or {})["gpudbn"])
        version, found = head["format"], head["kind"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: must be a {kind} written by gpudbn; "
                        "got a safetensors file of another origin") from None
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{path}: must be a {kind} of format 1 to {FORMAT}; got format {version!r}. "
                        "The file is damaged")
    if version > FORMAT:
        raise UserError(f"{path}: must be of a format known here; got one written by a newer gpudbn "
                        f"(format {version}; this one reads up to {FORMAT}). Upgrade gpudbn")
    if found != kind:
        hint = f". {KINDS[found]}" if found in KINDS else ""
        raise UserError(f"{path}: must be a {kind}; got a {found}{hint}")
    if not isinstance(head.get("meta"), dict):
        raise UserError(f"{path}: must hold metadata; got none. The file is damaged")
    return head


def _begin_sum(table: Table, meta: Mapping[str, Any]) -> int:
    """CRC-32 over the metadata and what is known of the arrays; their bytes follow in order of name."""
    known = [[name, dtype.name, list(shape)] for name, dtype, shape in table]
    return zlib.crc32(json.dumps([known, meta], sort_keys=True).encode())


def _plain(value: Any) -> Any:
    """NumPy and CuPy scalars and arrays as numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"checkpoint.write: metadata must be plain values; got {type(value).__name__}")
