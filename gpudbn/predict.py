"""``python -m gpudbn.predict``: classes and their probabilities, by a fine-tuned model.

Rows go through the network in blocks and results to the disk as they come, so data and output may be larger than
memory. Files take their names when they are whole. Under ``mpirun`` the ranks take blocks in turn, and the first one
writes them in order: the same bytes as from one process with as many BLAS threads. With ``--shards`` so many ranks
hold the model together, and what is then added up between them changes the last bits, but for ``--order fixed``.
"""

from __future__ import annotations

import argparse
import io
import itertools
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
from gpudbn.mpi import check_ranks

if TYPE_CHECKING:  # these load NumPy, which must not happen before the threads are set
    import numpy as np

    from gpudbn.dbn import DBN
    from gpudbn.mpi.alone import Exchange

Block: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray]"  # row numbers, classes, probabilities
FORMATS = (".npy", ".npz", ".csv")
FEW = 12  # classes of which a table of confusions is printed

DESCRIPTION = """\
Predict the class of every row of some data with a fine-tuned model: print a summary and, if the data have
labels, the error; with --out, write all predictions. Under mpirun the ranks share the rows out, and with --shards
the model."""

EPILOG = """\
examples:
  python -m gpudbn.predict runs/digits --data digits                     the test rows of that run
  python -m gpudbn.predict runs/digits --data digits --out test.csv      and a table of the predictions
  python -m gpudbn.predict model.safetensors --data new.npy --out classes.npz
  python -m gpudbn.predict runs/mnist --data x.npy --labels y.npy        other data, all of them
  mpirun -n 4 python -m gpudbn.predict runs/mnist --data x.npy --out y.csv      the same file from four processes
  mpirun -n 4 python -m gpudbn.predict runs/large --data x.npy --shards 2        each pair of ranks holds the model

what --out FILE holds:
  FILE.npy   predicted classes (rows,) int32; FILE.probabilities.npy beside it, (rows, classes) float32
  FILE.npz   rows int64, labels int32, probabilities float32
  FILE.csv   a line a row: row, label, p0, p1, ...
The label is the predicted class; row is the number of the row in its file, from 0. In --part all, test
rows from a file of their own are counted on after the training rows. The number of ranks changes no bit; that of
BLAS threads may change the last ones of probabilities.

exit codes: 0 done, 2 a mistake in what was asked (one line says which), 130 interrupted, 1 a fault of gpudbn"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _command.command_line("python -m gpudbn.predict", "MODEL --data DATA [options]", DESCRIPTION, EPILOG)
    parser.add_argument("--data", help="digits, mnist, a folder of IDX files, FILE.npz or FILE.npy")
    parser.add_argument("--labels", metavar="FILE.npy", help="labels for --data FILE.npy, only to tell the error")
    parser.add_argument("--part", metavar="{" + ",".join(_command.PARTS) + "}",
                        help="which rows, split as in training (default: test for the data of the run, all for others)")
    parser.add_argument("--out", metavar="FILE", help="write the predictions: .npy, .npz or .csv says how, see below")
    _command.add_shards(parser)
    return _command.run(parser, arguments, _check, predict)


def _check(found: argparse.Namespace, ranks: int) -> None:
    check_ranks(found.shards, ranks)
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
    from gpudbn.shards import unlike

    exchange = _command.join(found)
    model, part = _command.together(exchange, lambda: _load(found, exchange))
    dbn = model.dbn
    exchange.agree(unlike(exchange.shards, dbn.xp))
    classes = _classes(dbn)
    tally = _Tally(classes, part.labelled)
    out = _command.output(found.out, FORMATS) if found.out is not None and exchange.chief else Path()
    with _command.Progress("predict", part.size) as progress:
        paths = _WRITERS[out.suffix](out, _blocks(dbn, part, exchange, tally, progress), part.size, classes)
    if exchange.chief:
        parts = exchange.shards.count
        ranks = f"; {exchange.replicas * parts} ranks" if exchange.replicas * parts > 1 else ""
        ranks += f", the model in {parts} parts" if parts > 1 else ""
        lines = [f"network    {dbn.describe()}", f"data       {part.size:,} {part.what}",
                 f"compute    {model.place}{ranks}", *tally.lines()]
        if paths:
            lines.append(f"wrote      {', '.join(map(str, paths))}")
        if part.labelled and part.trained_on:
            lines.append("note       the model was trained on rows that are among these: this is no test error")
        if part.labelled:
            lines.append(f"error: {100 * tally.wrong / tally.rows:.2f} %")
        _command.say(lines)
    exchange.close()
    return 0


def _load(found: argparse.Namespace, exchange: Exchange) -> tuple[_command.Model, _command.Part]:
    """A model that can predict, and the rows."""
    model = _command.load_model(found, exchange)
    if model.dbn.classifier is None:
        raise UserError(f"{found.model}: must be a fine-tuned model; got one that was only pretrained. "
                        "Train with --finetune-epochs above 0 on labelled data")
    return model, _command.part_of(model, found.data, found.labels, found.part)


def _classes(dbn: DBN) -> int:
    assert dbn.classifier is not None
    return len(dbn.classifier[f"c{len(dbn.layers)}"])


def _blocks(dbn: DBN, part: _command.Part, exchange: Exchange, tally: _Tally,
            progress: _command.Progress) -> Iterator[Block]:
    """Every block of rows: their numbers in the file, their predicted classes, and P(class | row).

    In a round every replica computes a block, and the first one collects these and yields them in order; on the others
    nothing comes. So the first one holds a round at a time and the others a block, and while it writes they compute.
    """
    import numpy as np

    from gpudbn.arrays import to_cpu

    pieces = ((rows, first, np.arange(start, min(start + _command.BLOCK, len(rows)))) for rows, first in part.tables
              for start in range(0, len(rows), _command.BLOCK))
    while turn := list(itertools.islice(pieces, exchange.replicas)):
        mine = np.empty((0, _classes(dbn)), np.float32)  # the last round may leave nothing for this one
        if exchange.replica < len(turn):
            rows, _, positions = turn[exchange.replica]
            v = np.empty((len(positions), rows.n), np.float32)
            rows.take(positions, v)
            mine = to_cpu(dbn.predict_probabilities(v))
        for (rows, first, positions), probabilities in zip(turn, exchange.collect(mine) or [], strict=False):
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
    """A file written piece by piece that takes its name when it is whole; of one that is not, nothing is left.

    Not even by a process that is killed, as a launcher does to all ranks when one ends badly, where files can be
    without a name: on the file systems of Linux, NFS excepted.
    """

    def __init__(self, path: Path) -> None:
        from gpudbn.checkpoint import TEMPORARY

        self.path, self.target = path, Path(os.path.realpath(path))  # through a link, so that it stays one
        self.temporary = self.target.parent / TEMPORARY.replace("*", f"{os.getpid()}-{secrets.token_hex(4)}")
        nameless = _nameless(self.target.parent)
        self.named = nameless is None
        with self.refusing():
            self.file = self.temporary.open("x+b") if nameless is None else os.fdopen(nameless, "w+b")

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

    def settle(self) -> None:
        """Give the file its name."""
        with self.refusing():
            if not self.named:  # a link cannot replace a file, so it takes two steps
                fd = self.file.fileno()
                os.link(f"/proc/self/fd/{fd}", self.temporary, src_dir_fd=fd)  # the directory only makes it follow
            self.temporary.replace(self.target)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):  # after the renaming there is nothing of that name
            self.temporary.unlink()


def _nameless(folder: Path) -> int | None:
    """Descriptor of a new file without a name in the folder; None where there is no such thing, or no such folder."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        with suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    return None


def _finished(*streams: _Stream) -> list[Path]:
    """Give the files their names, once all of them are on the disk."""
    for stream in streams:
        with stream.refusing():
            stream.file.flush()
            os.fsync(stream.file.fileno())
    for stream in streams:
        stream.settle()
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
