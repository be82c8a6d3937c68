"""Models and checkpoints: one file of named arrays and JSON metadata, in the safetensors format.

No pickle: reading a file never runs code from it. Writes are atomic: whatever happens in the
middle (a full disk, Ctrl-C, kill -9, a power cut), the file under its name is the old one or the
new one, whole.

The safetensors header holds one string, ``gpudbn``, a JSON object

    {"format": 1, "kind": "model" or "checkpoint", "crc32": ..., "meta": {...}}

whose sum covers the metadata and every array's name, type, shape and bytes.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from gpudbn.arrays import Array, all_finite, to_cpu
from gpudbn.errors import UserError

FORMAT = 1
KINDS = {"model": "gpudbn.predict, gpudbn.sample and gpudbn.evaluate read models",
         "checkpoint": "gpudbn.train --resume reads checkpoints"}
TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "float16", "float32", "float64")
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


def write_atomically(path: Path | str, data: bytes) -> None:
    """Put ``data`` into the file ``path``, or leave it as it was.

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
                file.write(data)
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


def write(path: Path | str, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write named arrays and metadata to one file, atomically.

    Parameters
    ----------
    path : path
        The folder must exist.
    arrays : mapping from name to array
        Numbers of any shape, NumPy or CuPy; see ``TYPES``. Not modified.
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
    ready = {}
    for name, array in arrays.items():
        array = np.asarray(to_cpu(array), order="C")  # safetensors writes the memory as it lies, strides or not
        if array.dtype.name not in TYPES:
            raise TypeError(f"checkpoint.write: {name} must be an array of numbers; got {array.dtype}")
        ready[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # once there and back, so that what is summed is what a reader will sum
    text = json.loads(json.dumps(dict(meta), default=_plain))
    head = {"format": FORMAT, "kind": kind, "crc32": _sum(ready, text), "meta": text}
    write_atomically(path, safetensors.numpy.save(ready, {"gpudbn": json.dumps(head)}))


def read(path: Path | str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a file made by ``write``.

    Parameters
    ----------
    path : path
    kind : str
        "model" or "checkpoint".

    Returns
    -------
    arrays : dict from name to numpy.ndarray
        In order of name. Writable and yours.
    meta : dict

    Raises
    ------
    UserError
        If there is no such file, or it is cut short, damaged, of another kind or of a newer
        format, or if a model holds NaN or infinity.
    """
    if kind not in KINDS:
        raise ValueError(f"checkpoint.read: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    path = Path(path)
    _refuse_unreadable(path, kind)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            head = _head(path, kind, file.metadata())
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    # TypeError and its like: a damaged header that names a type or shape NumPy does not have
    except (safetensors.SafetensorError, OSError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: must be a whole safetensors file; got one that is cut short or damaged "
                        f"({str(error).splitlines()[0]}). Use another copy, or train again") from error
    if head.get("crc32") != _sum(arrays, head["meta"]):
        raise UserError(f"{path}: must be as it was written; got a file whose check sum differs. "
                        "It is damaged: use another copy, or train again")
    if kind == "model":
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not all_finite(array):
                raise UserError(f"{path}: must hold finite numbers; got NaN or infinity in {name}. "
                                "Train again with a lower learning rate")
    return arrays, head["meta"]


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


def _sum(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> int:
    """CRC-32 over the metadata and the arrays in order of name."""
    names = sorted(arrays)
    table = [[name, arrays[name].dtype.name, list(arrays[name].shape)] for name in names]
    total = zlib.crc32(json.dumps([table, meta], sort_keys=True).encode())
    for name in names:
        total = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, total)
    return total


def _plain(value: Any) -> Any:
    """NumPy and CuPy scalars and arrays as numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"checkpoint.write: metadata must be plain values; got {type(value).__name__}")
