"""Data sets: rows with values in [0, 1], split into training, validation and test rows.

    data = load("digits")        8 x 8 digits that come with the package
    data = load("mnist")         downloaded once
    data = load("folder")        IDX files, gzipped or not
    data = load("file.npz")      or .npy: arrays, memory-mapped

``digits.npz`` holds the 1797 test digits of E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository (1998), doi:10.24432/C50P49, licence CC BY 4.0: values 0..16, unchanged, as bytes.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from gpudbn import draws
from gpudbn.data import checks, files, idx, mnist
from gpudbn.data.rows import DataSet, Rows
from gpudbn.errors import UserError

__all__ = ["DataSet", "Rows", "load", "load_rows"]

NAMES = ("digits", "mnist")
_SPLIT = {"update": 2**32 - 1, "site": draws.site(draws.Purpose.ORDER)}  # no epoch has this number


def load(name: str | Path, *, labels: str | Path | None = None, validation: float | None = None,
         test: float | None = None, seed: int = 0, need_labels: bool = True, quiet: bool = False) -> DataSet:
    """The data set of this name, or in this file or folder.

    Parameters
    ----------
    name : str or path
        ``digits``, ``mnist``, a folder of IDX files, an ``.npz`` or an ``.npy`` file.
    labels : path, optional
        An ``.npy`` file with the labels of the rows in an ``.npy`` file.
    validation : int or float, optional
        How many training rows are held back: a count, or a fraction below 1. By default a sixth, 10,000 at most; 0
        for none.
    test : int or float, optional
        The same for data that come without test rows.
    seed : int
        Chooses the rows that are drawn. Where test rows are given nothing is drawn: the validation rows are the last
        training rows.
    need_labels : bool
        Whether rows without labels are refused.
    quiet : bool
        Whether a download says nothing about its progress.

    Raises
    ------
    UserError
        If the data cannot be trained on; one line that says what is wrong and where.

    Notes
    -----
    Every value is looked at once, a few MB at a time: a file larger than memory is read through before training.
    """
    try:
        title, given, given_test, scale = _read(str(name), labels, quiet)
    except OSError as error:
        raise UserError(f"{error.filename or name}: must be readable; got: {error.strerror or error}") from error
    if need_labels:
        for part in (given, given_test):
            if part is not None and part.labels is None:
                raise UserError(f"labels: must be there for fine-tuning; got none for {part.source}. "
                                "Give them, or pretrain only")
    first = checks.table(given, scale)
    if not first.varies.any():
        raise UserError(f"{given.source}: rows must differ; got {len(first.array)} with the same values. "
                        "There is nothing to learn")
    rows = Rows(first.array, first.scale, first.labels)
    known = [] if first.labels is None else [first.labels.max()]
    if given_test is not None:
        if test is not None:
            raise UserError(f"test: must not be set for data with test rows of their own; got {test} for {title}")
        tested = _tested(given_test, first)
        known += [] if tested.labels is None else [tested.labels.max()]
        count = _count("validation", validation, len(rows))
        _room(len(rows), count, 0, title)
        train, held = rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))
    else:
        count, count_test = _count("validation", validation, len(rows)), _count("test", test, len(rows))
        _room(len(rows), count, count_test, title)
        order = draws.permutation(len(rows), seed=seed, **_SPLIT)
        # in the order of the file: an epoch shuffles anyway, and a disk reads forwards best
        parts = np.split(order, (len(rows) - count - count_test, len(rows) - count_test))
        train, held, tested = (rows.select(np.sort(part)) for part in parts)
    return DataSet(title, train, held, tested, first.image_shape, 1 + int(max(known)) if known else 0,
                   int(np.count_nonzero(~first.varies)))


def load_rows(name: str | Path, *, labels: str | Path | None = None) -> tuple[str, Rows, Rows | None]:
    """Title, rows and test rows (if they come apart) of data that nothing is to be learned from.

    As ``load``, but one row, or rows that are all the same, will do, and nothing is split.
    """
    title, given, given_test, scale = _read(str(name), labels, False)
    first = checks.table(given, scale)
    return (title, Rows(first.array, first.scale, first.labels),
            None if given_test is None else _tested(given_test, first))


def _tested(given: checks.Table, first: checks.Checked) -> Rows:
    """Test rows that come with training rows."""
    # bytes are bits or grey values, and a few test rows may not show which
    second = checks.table(given, first.scale if given.array.dtype == first.array.dtype else None)
    if second.array.shape[1] != first.array.shape[1]:
        raise UserError(f"{given.source}: test rows must have {first.array.shape[1]} columns as the training rows; "
                        f"got {second.array.shape[1]}")
    return Rows(second.array, second.scale, second.labels)


def _count(what: str, asked: float | None, rows: int) -> int:
    """How many of the rows are meant by a count, a fraction, or nothing."""
    if asked is None:
        return min(10_000, round(rows / 6))
    if isinstance(asked, bool) or not 0 <= asked < 2**63 or (asked >= 1 and asked != int(asked)):
        raise UserError(f"{what}: must be a count of rows or a fraction below 1; got {asked}")
    return int(asked) if asked >= 1 else round(asked * rows)


def _room(rows: int, validation: int, test: int, title: str) -> None:
    if validation + test >= rows:
        raise UserError(f"validation, test: must leave at least one training row of the {rows} in {title}; "
                        f"got {validation} and {test}")


def _read(name: str, labels: str | Path | None,
          quiet: bool) -> tuple[str, checks.Table, checks.Table | None, float | None]:
    """Title, training table, test table, and the scale if it is known beforehand."""
    path = Path(name).expanduser()
    if labels is not None and (name in NAMES or path.suffix != ".npy"):
        raise UserError(f"labels: must be given only with an .npy file of rows; got {labels} with {name}. "
                        "Other data bring their own")
    if name == "digits":
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            return name, checks.Table(file["x"], file["y"], name), None, 1 / 16
    if name == "mnist":
        return name, *idx.read_folder(mnist.fetch(quiet=quiet)), None
    if path.is_dir():
        return path.resolve().name, *idx.read_folder(path), None
    if path.suffix == ".npy":
        return path.stem, files.read_npy(path, None if labels is None else Path(labels).expanduser()), None, None
    if path.suffix == ".npz":
        return path.stem, *files.read_npz(path), None
    if path.exists():
        hint = "Give the folder it is in" if "idx" in path.name else "Save the array with numpy.save"
        raise UserError(f"{path}: must be a folder of IDX files, or an .npz or .npy file; got another kind. {hint}")
    if path.suffix or len(path.parts) > 1:
        raise checks.missing(path)
    near = difflib.get_close_matches(name, NAMES, n=1)
    raise UserError(f"data: must be {', '.join(NAMES)}, a folder of IDX files, or an .npz or .npy file; got {name}. "
                    f"{f'Did you mean {near[0]}?' if near else 'There is no such file here'}")
