"""What a run needs of a GPU's memory, and whether the training rows have room beside it.

    data, labelled, place = settle(settings, data, labelled, xp)

Sizes are counted as the phases allocate (``pretrain.LayerPhase``, ``finetune.FinetunePhase``), not measured: a
run that does not fit is refused before it starts, with the sizes by name.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from gpudbn.arrays import free_memory
from gpudbn.cuda.persistent import ROWS
from gpudbn.data import DataSet
from gpudbn.errors import UserError
from gpudbn.feed import AT_ONCE
from gpudbn.precision import chosen
from gpudbn.settings import BATCH_OPTIMISERS, Settings
from gpudbn.shards import widest

FLOAT = 4
RESERVE = 128 << 20  # for code, cuBLAS's work space and what allocation rounds up
TURN = 50  # updates between two looks at the world, alone or synchronous
BLOCKS = 8  # --order fixed: pieces of a batch, each with a gradient of its own
AT_ONCE_ROWS = 1000  # of a large batch, that go through the network at once
MEASURED = 250  # rows measured at once: blocks of constant size, whose sums do not depend on the number of replicas


def model_bytes(settings: Settings, sizes: list[int], classes: int, *, shards_rows: bool = False) -> dict[str, int]:
    """Bytes by what they are for, at the phase that needs most. ``sizes`` are the data's columns, then ``--layers``;
    ``shards_rows`` says that replicas have rows of their own, and so parameters of their own for a while."""
    s, depth = settings, len(sizes) - 1
    own = [widest(m, s.shards) for m in sizes[1:]]
    pairs = list(zip(sizes[:-1], own, strict=True))
    weights = [(s.of_layer("local", i) or n) * m for i, (n, m) in enumerate(pairs)]
    layers = [w + n + m for w, (n, m) in zip(weights, pairs, strict=True)]
    kept = FLOAT * sum(layers)
    pieces = BLOCKS if s.order == "fixed" else 1  # of a batch
    precision = chosen(s.precision, tensor_cores=True)
    copies = {"bf16": 2, "bf16x2": 4}.get(precision, 0)  # bytes a weight, by wgmma
    copies *= s.kernels in ("auto", "predicted", "wgmma")
    plain = (s.kernels == "unfused" or (s.kernels == "auto" and precision in ("fp32", "exact"))) * (
        3 if precision == "exact" else 1)  # gradients in memory, and integers as float64
    persistent = s.kernels == "persistent" or (s.kernels == "auto" and precision == "bf16x2" and s.batch <= ROWS)
    # the parameters before a turn, and what it changed; and what a meeting keeps, see mpi/collective.py
    exchanged = FLOAT * shards_rows * (2 + (s.mode == "local") * {"nesterov": 1, "elastic": 2}.get(s.outer, 0))
    phases = []
    for i, (n, m) in enumerate(pairs):
        chains, rows = s.batch * m if s.method == "pcd" else 0, -(-s.batch // pieces)
        # velocity, and two while paths are timed or initial weights are made; or the sums of the pieces, and of all
        vectors = 3 + plain if pieces == 1 else pieces + 2
        phases.append({"parameters": kept, "velocity and gradients": FLOAT * vectors * layers[i],
                       "activations": FLOAT * rows * (2 * (n + m) + sum(sizes[:i])),
                       "chains": FLOAT * chains, "copies in bf16": copies * n * m,
                       "changes": exchanged * layers[i],
                       "rows of a launch": persistent * TURN * n * (FLOAT * s.batch + ROWS)})
    if s.finetune_epochs and (classes or s.finetune == "autoencoder"):
        widths = [*sizes, *reversed(sizes[:-1])] if s.finetune == "autoencoder" else [*sizes, classes]
        network = sum(weights) + sum(own)
        network += sum(n * m + n for n, m in pairs) if s.finetune == "autoencoder" else own[-1] * classes + classes
        # of the step rule, or what a batch optimiser names; then the gradient, and the best parameters
        state = {"adam": 2, "lbfgs": 2 * s.history + 8, "cg": 6}.get(s.optimiser, 1)
        vectors = 2 + state + (1 if pieces == 1 else pieces + 1) + 3 * (s.kernels in ("auto", "unfused"))
        rows = -(-s.finetuning_batch // pieces)
        if s.optimiser in BATCH_OPTIMISERS:
            rows = min(rows, AT_ONCE_ROWS)
        phases.append({"parameters": kept + FLOAT * network, "velocity and gradients": FLOAT * vectors * network,
                       "activations": FLOAT * rows * (3 * sum(widths) + sizes[0]), "chains": 0,
                       "changes": exchanged * network})
    largest = max(phases, key=lambda phase: sum(phase.values()))
    largest["measuring"] = FLOAT * MEASURED * 2 * (sizes[0] + max(sizes[depth - 1 :]))
    return largest


def data_bytes(data: DataSet) -> int:
    """Bytes of all rows where they are resident: rows as they are kept, labels, and the order of an epoch."""
    total = 8 * len(data.train)
    for rows in (data.train, data.validation, data.test):
        total += len(rows) * (rows.n * rows.kept.itemsize + (0 if rows.labels is None else rows.labels.itemsize))
    return total


def settle(settings: Settings, data: DataSet, labelled: DataSet | None, xp: ModuleType,
           free: int | None = None, *, shards_rows: bool = False) -> tuple[DataSet, DataSet | None, str]:
    """The data where the run wants them, and a word for the log: empty on a CPU.

    Parameters
    ----------
    data, labelled : DataSet
        In the host's memory or on its disk; ``labelled`` for fine-tuning, if it has data of its own.
    xp : module
        Where the model will be.
    free : int, optional
        Bytes that are free on the current GPU; asked of it if not given.
    shards_rows : bool
        See ``Exchange``.

    Raises
    ------
    UserError
        If there is too little memory: for the model, or, with ``--resident yes``, for the rows beside it.
    """
    if xp is np:
        return data, labelled, ""
    free = free_memory(xp) if free is None else free
    parts = model_bytes(settings, [data.n, *settings.layers], (labelled or data).classes, shards_rows=shards_rows)
    sets = [data] + ([labelled] if labelled is not None else [])
    rows = sum(map(data_bytes, sets))
    batch = max(settings.batch, settings.finetuning_batch)
    buffers = 2 * max(max(AT_ONCE, batch * part.n * part.train.kept.itemsize) for part in sets)
    needed = sum(parts.values()) + RESERVE
    named = ", ".join(f"{name} {_bytes(size)}" for name, size in {**parts, "reserve": RESERVE}.items() if size)
    if needed + min(rows, buffers) > free:
        raise UserError(f"--device: must have memory for the model; got {_bytes(free)} free for "
                        f"{_bytes(needed + min(rows, buffers))} ({named}, rows {_bytes(min(rows, buffers))}). "
                        "Take smaller --layers or --batch, or --device cpu")
    if settings.resident == "yes" and needed + rows > free:
        raise UserError(f"--resident: must be auto or no where the rows do not fit; got yes, and {_bytes(free)} free "
                        f"for {_bytes(needed + rows)} ({named}, data {_bytes(rows)})")
    if settings.resident == "no" or needed + rows > free:
        return data, labelled, f"rows ({_bytes(rows)}) stream from the host"
    return data.to(xp), None if labelled is None else labelled.to(xp), f"rows ({_bytes(rows)}) resident"


def _bytes(count: int) -> str:
    """A size as people write it: 3.2 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
