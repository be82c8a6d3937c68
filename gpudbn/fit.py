"""Pretraining and fine-tuning from Python, on arrays: what ``gpudbn.train`` does, without a run folder.

    from gpudbn import DBN
    from gpudbn.fit import finetune, pretrain

    dbn = DBN([784, 500, 500, 2000])
    pretrain(dbn, images, epochs=10)
    finetune(dbn, labelled_images, labels, finetune_epochs=30)

The two are separate: rows without labels for one, labelled ones for the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpudbn.data import DataSet, Rows, checks
from gpudbn.dbn import DBN
from gpudbn.errors import UserError
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.settings import Settings

Report = Callable[[dict[str, Any]], None]


def pretrain(dbn: DBN, x: np.ndarray, *, validation: np.ndarray | None = None, report: Report | None = None,
             **settings: Any) -> list[dict[str, Any]]:
    """Train the layers of ``dbn`` one after the other on rows without labels.

    Parameters
    ----------
    dbn : DBN
        Its layers are initialised and trained.
    x : array (N, n) or (N, height, width)
        Rows in [0, 1], or bytes 0..255.
    validation : array (V, n), optional
        Held-out rows for ``patience`` and for the records.
    report : callable, optional
        Called with each record, once an epoch.
    **settings
        Any of ``settings.Settings`` for pretraining: ``epochs``, ``batch``, ``learning_rate``, ``method``, ....

    Returns
    -------
    list of dict
        One record an epoch: layer, free energies, reconstruction errors, seconds.

    Raises
    ------
    UserError
        If rows or settings are not right; NonFiniteError if training diverges.
    """
    chosen = _settings(dbn, settings, finetune_epochs=0)
    return _run(Training(dbn, _data_set(dbn, (x, None), (validation, None)), chosen, Alone()), report)


def finetune(dbn: DBN, x: np.ndarray, labels: np.ndarray, *, validation: tuple[np.ndarray, np.ndarray] | None = None,
             report: Report | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Train a classifier that starts as the layers of ``dbn``; ``dbn.predict`` uses it.

    Parameters
    ----------
    dbn : DBN
        Its layers are not modified; its ``classifier`` is made anew.
    x : array (N, n)
        Rows in [0, 1], or bytes 0..255.
    labels : array (N,), integers from 0
    validation : (array (V, n), array (V,)), optional
        Held-out rows: the epoch with the fewest errors on them is kept.
    report, **settings
        As for ``pretrain``: ``finetune_epochs``, ``finetune_learning_rate``, ``dropout``, ....

    Returns
    -------
    list of dict
        One record an epoch: loss, error, seconds.
    """
    chosen = _settings(dbn, settings)
    if chosen.finetune_epochs < 1:
        raise UserError("finetune: finetune_epochs must be at least 1; got 0")
    dbn.classifier = None
    training = Training(dbn, _data_set(dbn, (x, labels), validation or (None, None)), chosen, Alone())
    training.index = training.depth  # the layers are there already
    return _run(training, report)


def _settings(dbn: DBN, given: dict[str, Any], **fixed: Any) -> Settings:
    try:
        kept = {name: dbn.about[name] for name in ("binarise", "precision", "local") if name in dbn.about}
        return Settings(**(kept | given | {"layers": tuple(dbn.sizes[1:])} | fixed))
    except TypeError as error:
        raise UserError(f"settings: must be names that gpudbn.train has as options; got {error}") from None


def _data_set(dbn: DBN, train: tuple, validation: tuple) -> DataSet:
    """A DataSet over arrays in memory, checked; without test rows."""
    first = checks.table(checks.Table(np.asarray(train[0]), train[1], "x", "labels"), None)
    rows = Rows(first.array, first.scale, first.labels)
    held = rows.select(range(0))
    if validation[0] is not None:
        given = checks.Table(np.asarray(validation[0]), validation[1], "validation", "labels")
        second = checks.table(given, first.scale)
        held = Rows(second.array, second.scale, second.labels)
    for name, part in (("x", rows), ("validation", held)):
        if part.n != dbn.sizes[0]:
            raise UserError(f"{name}: rows must have {dbn.sizes[0]} columns to fit the network; got {part.n}")
    known = [int(part.labels.max()) for part in (rows, held) if part.labels is not None and len(part)]
    data = DataSet("arrays", rows, held, rows.select(range(0)), first.image_shape, 1 + max(known) if known else 0,
                   int(np.count_nonzero(~first.varies)))
    return data.to(dbn.xp)


def _run(training: Training, report: Report | None) -> list[dict[str, Any]]:
    records = []
    for record in training.run():
        if record["phase"] != "test":
            records.append(record)
            if report:
                report(record)
    return records
