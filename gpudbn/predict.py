"""``python -m gpudbn.predict``: classes and their probabilities, by a fine-tuned model.

Rows go through the network in blocks and results to the disk as they come, so data and output may be larger than
memory. Files take their names when they are whole.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gpudbn import _command
from gpudbn.errors import UserError

if TYPE_CHECKING:  # these load NumPy, which must not happen before the threads are set
    import numpy as np

    from gpudbn.dbn import DBN

Block: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray]"  # row numbers, classes, probabilities
FORMATS = (".npy", ".npz", ".csv")
FEW = 12  # classes of which a table of confusions is printed

DESCRIPTION = """\
Predict the class of every row of some data with a fine-tuned model: print a summary and, if the data have
labels, the error; with --out, write all predictions."""

EPILOG = """\
examples:
  python -m gpudbn.predict runs/digits --data digits                     the test rows of that run
  python -m gpudbn.predict runs/digits --data digits --out test.csv      and a table of the predictions
  python -m gpudbn.predict model.safetensors --data new.npy --out classes.npz
  python -m gpudbn.predict runs/mnist --data x.npy --labels y.npy        other data, all of them

what --out FILE holds:
  FILE.npy   predicted classes (rows,) int32; FILE.probabilities.npy beside it, (rows, classes) float32
  FILE.npz   rows int64, labels int32, probabilities float32
  FILE.csv   a line a row: row, label, p0, p1, ...
The label is the predicted class; row is the number of the row in its file, from 0. In --part all, test
rows from a file of their own are counted on after the training rows.

exit codes: 0 done, 2 a mistake in what was asked (one line says which), 130 interrupted, 1 a fault of gpudbn"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _command.command_line("python -m gpudbn.predict", "MODEL --data DATA [options]", DESCRIPTION, EPILOG)
    parser.add_argument("--data", help="digits, mnist, a folder of IDX files, FILE.npz or FILE.npy")
    parser.add_argument("--labels", metavar="FILE.npy", help="labels for --data FILE.npy, only to tell the error")
    parser.add_argument("--part", metavar="{" + ",".join(_command.PARTS) + "}",
                        help="which rows, split as in training (default: test for the data of the run, all for others)")
    parser.add_argument("--out", metavar="FILE", help="write the predictions: .npy, .npz or .csv says how, see below")
    return _command.run(parser, arguments, _check, predict)


def _check(found: argparse.Namespace) -> None:
    if found.data is None:
        raise UserError("--data: must say what to predict: digits, mnist, a folder, FILE.npz or FILE.npy; got nothing")
    if found.part is not None:
        _command.one_of("part", found.part, _command.PARTS)
    if found.out is not None:
        out = _command.output(found.out, FORMATS)
        for path in (out, _probabilities_beside(out)):
            for read in (found.data, found.labels):
                if read is not None and path.exists() and Path(read).exists() and path.samefile(read):
                    raise UserError(f"--out: must not replace what is read; got {path}. Choose another name")


def predict(found: argparse.Namespace) -> int:
    """Predict as the command line says. Returns the exit code."""
    model = _command.load_model(found.model, found.device)
    dbn = model.dbn
    if dbn.classifier is None:
        raise UserError(f"{found.model}: must be a fine-tuned model; got one that was only pretrained. "
                        "Train with --finetune-epochs above 0 on labelled data")
    part = _command.part_of(model, found.data, found.labels, found.part)
    classes = len(dbn.classifier[f"c{len(dbn.layers)}"])
    tally = _Tally(classes, part.labelled)
    out = Path() if found.out is None else _command.output(found.out, FORMATS)
    with _command.Progress("predict", part.size) as progress:
        paths = _WRITERS[out.suffix](out, _blocks(dbn, part, tally, progress), part.size, classes)
    lines = [f"network    {dbn.describe()}", f"data       {part.size:,} {part.what}", f"compute    {model.place}",
             *tally.lines()]
    if paths:
        lines.append(f"wrote      {', '.join(map(str, paths))}")
    if part.labelled and part.trained_on:
        lines.append("note       the model was trained on rows that are among these: this is no test error")
    if part.labelled:
        lines.append(f"error: {100 * tally.wrong / tally.rows:.2f} %")
    return _command.say(lines)


def _blocks(dbn: DBN, part: _command.Part, tally: _Tally, progress: _command.Progress) -> Iterator[Block]:
    """Every block of rows: their numbers in the file, their predicted classes, and P(class | row)."""
    import numpy as np

    from gpudbn.arrays import to_cpu

    for rows, first in part.tables:
        for start in range(0, len(rows), _command.BLOCK):
            positions = np.arange(start, min(start + _command.BLOCK, len(rows)))
            v = np.empty((len(positions), rows.n), np.float32)
            rows.take(positions, v)
            probabilities = to_cpu(dbn.predict_probabilities(v))
            labels = probabilities.argmax(axis=1).astype(np.int32)
            tally.add(labels, rows.take_labels(positions) if part.labelled else None)
            places = positions if rows.index is None else np.asarray(rows.index[positions[0] : positions[-1] + 1])
            yield first + places, labels, probabilities
            progress.at(tally.rows)


class _Tally:
    """Counts of what was predicted, and of what was right."""

    def __init__(self, classes: int, labelled: bool) -> None:
        import numpy as np

        self.rows = self.wrong = 0
        self.classes, self.labelled = classes, labelled
        self.predicted = np.zeros(classes, np.int64)
        self.confusion = np.zeros((FEW, FEW), np.int64)
        self.few = classes <= FEW

    def add(self, labels: np.ndarray, truth: np.ndarray | None) -> None:
        """One block: predicted and true classes."""
        import numpy as np

        self.rows += len(labels)
        self.predicted += np.bincount(labels, minlength=self.classes)
        if truth is not None:
            self.wrong += int(np.count_nonzero(labels != truth))
            self.few = self.few and int(truth.max()) < FEW
            if self.few:
                np.add.at(self.confusion, (truth, labels), 1)

    def lines(self) -> list[str]:
        """How many rows of each class; a table of confusions if the classes are few."""
        import numpy as np

        if not (self.labelled and self.few):
            return [f"predicted  {', '.join(f'{n:,} of class {k}' for k, n in enumerate(self.predicted) if n)}"]
        true = max(self.classes, 1 + int(np.flatnonzero(self.confusion.sum(axis=1)).max()))
        width = max(5, len(str(self.confusion.max())) + 2)
        table = ["", "true class, and how many of its rows were predicted to be",
                 " " * 5 + "".join(f"{k:>{width}}" for k in range(self.classes))]
        table += [f"{k:>5}" + "".join(f"{n or '.':>{width}}" for n in self.confusion[k, :self.classes])
                  for k in range(true)]
        return [*table, "total" + "".join(f"{n:>{width}}" for n in self.predicted), ""]


# -- files ----------------------------------------------------------------------------------------


class _Stream:
    """A file written piece by piece that takes its name when it is whole; of one that is not, nothing is left."""

    def __init__(self, path: Path) -> None:
        from gpudbn.checkpoint import TEMPORARY

        self.path, self.target = path, Path(os.path.realpath(path))  # through a link, so that it stays one
        self.temporary = self.target.parent / TEMPORARY.replace("*", f"{os.getpid()}-{secrets.token_hex(4)}")
        with self.refusing():
            self.file = self.temporary.open("x+b")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What the system refuses in here becomes one line."""
        from gpudbn.checkpoint import why_not

        try:
            yield
        except OSError as error:
            raise why_not(self.path, "writable", error) from error

    def write(self, data: bytes) -> None:
        """Append."""
        with self.refusing():
            self.file.write(data)

    def head(self, kind: str, *shape: int) -> None:
        """The beginning of an array in NumPy's format."""
        import numpy as np

        text = io.BytesIO()
        np.lib.format.write_array_header_1_0(text, {"descr": kind, "fortran_order": False, "shape": shape})
        self.write(text.getvalue())

    def append(self, array: np.ndarray, kind: str) -> None:
        """The next rows of that array."""
        import numpy as np

        self.write(np.asarray(array, kind).tobytes())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):  # after the renaming there is nothing of that name
            self.temporary.unlink()


def _finished(*streams: _Stream) -> list[Path]:
    """Give the files their names, once all of them are on the disk."""
    for stream in streams:
        with stream.refusing():
            stream.file.flush()
            os.fsync(stream.file.fileno())
    for stream in streams:
        with stream.refusing():
            stream.temporary.replace(stream.target)
    return [stream.path for stream in streams]


def _probabilities_beside(path: Path) -> Path:
    """For x.npy: x.probabilities.npy."""
    return path.with_suffix(".probabilities.npy")


def _write_npy(path: Path, blocks: Iterable[Block], rows: int, classes: int) -> list[Path]:
    """Classes in one file, probabilities in another."""
    with _Stream(path) as labels, _Stream(_probabilities_beside(path)) as probabilities:
        labels.head("<i4", rows)
        probabilities.head("<f4", rows, classes)
        for _, some_labels, some_probabilities in blocks:
            labels.append(some_labels, "<i4")
            probabilities.append(some_probabilities, "<f4")
        return _finished(labels, probabilities)


def _write_npz(path: Path, blocks: Iterable[Block], rows: int, classes: int) -> list[Path]:
    """A zip of arrays, not compressed. A zip takes one after the other, so they first go to files without a name."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {
        "rows": ("<i8", (rows,)), "labels": ("<i4", (rows,)), "probabilities": ("<f4", (rows, classes))}
    with ExitStack() as stack:
        whole, *streams = [stack.enter_context(_Stream(path)) for _ in range(1 + len(kinds))]
        for stream, (kind, shape) in zip(streams, kinds.values(), strict=True):
            stream.head(kind, *shape)
        for block in blocks:
            for stream, (kind, _), array in zip(streams, kinds.values(), block, strict=True):
                stream.append(array, kind)
        with whole.refusing(), zipfile.ZipFile(whole.file, "w") as archive:
            for stream, name in zip(streams, kinds, strict=True):
                stream.file.seek(0)
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    shutil.copyfileobj(stream.file, member, 1 << 20)
        return _finished(whole)


def _write_csv(path: Path, blocks: Iterable[Block], rows: int, classes: int) -> list[Path]:  # noqa: ARG001
    """A line a row; nine digits give back every float32."""
    line = ",".join(["%d", "%d"] + ["%.9g"] * classes) + "\n"
    with _Stream(path) as table:
        table.write((",".join(["row", "label", *(f"p{k}" for k in range(classes))]) + "\n").encode())
        for block in blocks:
            table.write("".join(line % (row, label, *p) for row, label, p in zip(*block, strict=True)).encode())
        return _finished(table)


def _write_nothing(path: Path, blocks: Iterable[Block], rows: int, classes: int) -> list[Path]:  # noqa: ARG001
    """Without --out."""
    for _ in blocks:
        pass
    return []


_WRITERS = {".npy": _write_npy, ".npz": _write_npz, ".csv": _write_csv, "": _write_nothing}


if __name__ == "__main__":
    sys.exit(main())
