"""A deep autoencoder of MNIST by L-BFGS, conjugate gradient, Adam and SGD, at equal gradient evaluations.

    python -m benchmarks.autoencoder --data FOLDER --rows 10000 --passes 30 --budget 4

784-1000-500-250-30 with linear code units, as in Hinton & Salakhutdinov (2006), pretrained once; from there each
optimiser has the same number of settings (``SETTINGS``, of which ``--budget`` takes the first), and for each of them as
many gradients of rows: ``--passes`` times the training rows, those of line searches included. The setting with the
least loss on validation rows is the one whose test rows count. All runs are printed. The file is written after every
run, and a run that is in it already is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mnist import machine
from gpudbn.autoencoder import AutoencoderPhase
from gpudbn.data import DataSet, Rows, load
from gpudbn.dbn import DBN
from gpudbn.draws import Purpose, permutation, site
from gpudbn.feed import Feed, feed_of
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.pretrain import Piece
from gpudbn.settings import Settings

HERE = Path(__file__).parent
# in the order in which --budget takes them
SEARCHES = [{"finetune_batch": batch, "line_searches": searches}
            for batch, searches in ((1000, 3), (500, 3), (250, 3), (100, 3))]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lbfgs": SEARCHES,
    "cg": SEARCHES,
    "adam": [{"finetune_batch": 100, "finetune_learning_rate": rate} for rate in (1e-3, 3e-4, 3e-3, 1e-4)],
    "sgd": [{"finetune_batch": 100, "finetune_learning_rate": rate} for rate in (0.01, 0.03, 0.003, 0.1)],
}
CURVE = 10  # how often the loss on validation rows is looked at in a run


def pretrained(data: DataSet, settings: Settings) -> DBN:
    """The stack, layer by layer."""
    dbn = DBN([data.train.n, *settings.layers])
    for _ in Training(dbn, data, dataclasses.replace(settings, finetune_epochs=0), Alone()).run():
        pass
    return dbn


def batches(settings: Settings, rows: Rows) -> Iterator[Piece]:
    """The batches of one epoch after another, shuffled."""
    update = 0
    for epoch in range(1 << 31):
        order = permutation(len(rows), seed=settings.seed, update=epoch, row=0, site=site(Purpose.ORDER, 0))
        for first in range(0, len(rows), settings.finetuning_batch):
            yield Piece(order[first : first + settings.finetuning_batch], update, 0, slice(0), 0, 1.0)
            update += 1


def measured(phase: AutoencoderPhase, rows: Rows) -> list[float]:
    """Mean cross-entropy and squared error of rows."""
    blocks = [phase.measure(rows, np.arange(first, min(first + 250, len(rows)))) for first in range(0, len(rows), 250)]
    return [float(value) / len(rows) for value in np.sum(blocks, axis=0)]


def stepped(phase: AutoencoderPhase, feed: Feed, piece: Piece, spent: int) -> int:
    """One step; how many gradients of rows are spent then."""
    phase.update(feed, piece)
    return spent + len(piece.positions)


def searched(phase: AutoencoderPhase, feed: Feed, piece: Piece, spent: int, total: int) -> int:
    """The line searches on a batch, or as many of them as there are gradients for; how many are spent then."""
    rows, before, kept = len(piece.positions), phase.minimiser.evaluations, phase.parameters.copy()
    for record in phase.search(feed, piece):
        now = spent + rows * (record.evaluations - before)
        if now > total:
            phase.parameters[...] = kept
            return total
        kept[...] = phase.parameters
    return now


def run(dbn: DBN, data: DataSet, settings: Settings, passes: float) -> dict[str, Any]:
    """One fine-tuning from the pretrained stack, until its gradients of rows are spent."""
    dbn.autoencoder = None
    phase = AutoencoderPhase(dbn, settings, rows=settings.finetuning_batch)
    feed, spent, total, curve = feed_of(data.train, np, 0), 0, round(passes * len(data.train)), []
    begun, measuring = time.perf_counter(), 0.0
    for piece in batches(settings, data.train):
        rows = len(piece.positions)
        if spent >= len(curve) / CURVE * total:
            start = time.perf_counter()
            curve.append([round(spent / len(data.train), 2), measured(phase, data.validation)[0]])
            measuring += time.perf_counter() - start
        if spent + rows > total or not np.isfinite(phase.parameters).all():
            break
        phase.begin_epoch(spent // len(data.train))
        spent = searched(phase, feed, piece, spent, total) if phase.rule is None else stepped(phase, feed, piece, spent)
    seconds = time.perf_counter() - begun - measuring
    names = [f"{part}_{name}" for part in ("validation", "test") for name in phase.measures]
    values = [*measured(phase, data.validation), *measured(phase, data.test)]
    return {"passes": round(spent / len(data.train), 2), "seconds": round(seconds, 1),
            **{name: value if np.isfinite(value) else None for name, value in zip(names, values, strict=True)},
            "curve": curve}


def table(runs: list[dict[str, Any]]) -> str:
    """All runs, the best of each optimiser marked, as Markdown."""
    lines = ["| optimiser | settings | passes | validation nats | test nats | test squared error | seconds |",
             "|---|---|---|---|---|---|---|"]
    for optimiser in SETTINGS:
        mine = [r for r in runs if r["optimiser"] == optimiser]
        losses = [r["validation_loss"] for r in mine if r["validation_loss"] is not None]
        for r in mine:
            words = ", ".join(f"{name.removeprefix('finetune_').replace('_', ' ')} {value}"
                              for name, value in r["settings"].items())
            values = [r["validation_loss"], r["test_loss"], r["test_squared_error"]]
            shown = ["diverged" if value is None else f"{value:.2f}" for value in values]
            if losses and r["validation_loss"] == min(losses):
                shown = [f"**{value}**" for value in shown]
            lines.append(f"| {optimiser} | {words} | {r['passes']} | {' | '.join(shown)} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoencoder", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows")
    parser.add_argument("--validation", type=int, default=2_000, help="validation rows")
    parser.add_argument("--layers", type=int, nargs="+", default=[1000, 500, 250, 30])
    parser.add_argument("--epochs", type=int, default=10, help="of pretraining, of each layer")
    parser.add_argument("--passes", type=int, default=30, help="gradients of a run, by training rows")
    parser.add_argument("--budget", type=int, default=4, help="settings of each optimiser")
    parser.add_argument("--optimisers", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "autoencoder.json")
    given = parser.parse_args()
    what = {name: getattr(given, name) for name in ("rows", "validation", "layers", "epochs", "passes")}
    results = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), **what, "runs": []}
    if {name: results[name] for name in what} != what:
        parser.error(f"--out: must be of runs with the same options; got {given.out}, which is of others")
    data = load(given.data, validation=given.validation)
    data = dataclasses.replace(data, train=data.train.select(range(given.rows)))
    base = Settings(layers=tuple(given.layers), epochs=(given.epochs,), batch=50, learning_rate=(0.05,), up="mean",
                    finetune="autoencoder", code="linear", finetune_epochs=given.passes, dropout=0.0, precision="fp32")
    begun = time.perf_counter()
    dbn = pretrained(data, base)
    print(f"pretrained in {time.perf_counter() - begun:.0f} s", flush=True)
    for place in range(given.budget):
        for optimiser in given.optimisers:
            settings = SETTINGS[optimiser][place]
            if any((r["optimiser"], r["settings"]) == (optimiser, settings) for r in results["runs"]):
                continue
            with np.errstate(over="ignore", invalid="ignore"):  # a run may diverge
                found = run(dbn, data, dataclasses.replace(base, optimiser=optimiser, **settings), given.passes)
            results["runs"].append({"optimiser": optimiser, "settings": settings, **found})
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{optimiser:6} {settings} {found['passes']} passes  validation {found['validation_loss']} nats  "
                  f"{found['seconds']} s", flush=True)
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
