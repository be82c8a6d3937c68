"""The MNIST digits, downloaded once into the cache folder: 55 MB there, 11.6 MB on the way.

The checksums are of the unpacked files, so a mirror may have compressed them anew. What has the wrong checksum never
gets its name; the next mirror is asked. Source: Y. LeCun, C. Cortes & C. Burges, "The MNIST database of handwritten
digits" (1998).
"""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.request
import zlib
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit

from gpudbn.data.files import cache_folder, written
from gpudbn.errors import UserError

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
FILES = {  # name: (bytes, SHA-256), unpacked
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
TIMEOUT = 15  # seconds without a byte


class _WrongFileError(Exception):
    """What a mirror sent is not the file."""


def fetch(*, quiet: bool = False) -> Path:
    """The folder with the four files, unpacked; those that are not there are downloaded.

    Raises
    ------
    UserError
        If no mirror gives them; says why, mirror by mirror.
    """
    folder = cache_folder() / "mnist"
    for name, (size, digest) in FILES.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == size:  # it was checked before it got this name
            continue
        reasons = []
        for mirror in MIRRORS:
            host = urlsplit(mirror).netloc or mirror
            try:
                with written(path) as file:
                    _copy(f"{mirror}{name}.gz", file, size, digest, None if quiet else f"mnist: {name} from {host}")
                break
            except (OSError, http.client.HTTPException, zlib.error, _WrongFileError) as error:
                reasons.append(f"{host}: {_reason(error)}")
        else:
            raise UserError(f"mnist: must be downloaded once, and no mirror gave {name}; got {'; '.join(reasons)}. "
                            "Without the internet: --data FOLDER with its four IDX files, or --data digits")
    return folder


def _reason(error: Exception) -> str:
    """Why a mirror failed, on one line."""
    if isinstance(error, HTTPError):
        error.close()
        return f"HTTP {error.code}"
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def _copy(url: str, out: IO[bytes], size: int, digest: str, title: str | None) -> None:
    """Unpack what is at ``url`` into ``out`` and check it; never more than ``size`` bytes."""
    unpack, hashed, done = zlib.decompressobj(wbits=31), hashlib.sha256(), 0  # 31: with gzip's header
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, _Progress(title, size) as progress:  # noqa: S310 - a URL of ours
        while packed := response.read(1 << 16):
            content = unpack.decompress(packed, size - done + 1)
            done += len(content)
            if done > size:
                raise _WrongFileError(f"more than {size} bytes")
            hashed.update(content)
            out.write(content)
            progress.at(done)
    if done != size:
        raise _WrongFileError(f"{done} of {size} bytes")
    if hashed.hexdigest() != digest:
        raise _WrongFileError(f"checksum {hashed.hexdigest()[:12]}... instead of {digest[:12]}...")


class _Progress:
    """A bar on a terminal, one line elsewhere, nothing without a title."""

    def __init__(self, title: str | None, size: int) -> None:
        self.title, self.size, self.shown = title, size, -1
        self.bar = title is not None and sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        if self.title is not None and not self.bar:
            print(f"{self.title} ({self.size / 1e6:.1f} MB)", file=sys.stderr, flush=True)
        return self

    def at(self, done: int) -> None:
        """``done`` bytes are here."""
        percent = 100 * done // self.size
        if self.bar and percent != self.shown:
            self.shown = percent
            filled = percent // 5
            print(f"\r{self.title} [{'#' * filled}{'.' * (20 - filled)}] {percent:3d} %", end="", file=sys.stderr,
                  flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            print(file=sys.stderr)
