"""``python -m gpudbn.sample``: rows drawn from a trained model, as numbers or as a picture."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpudbn import _command
from gpudbn.errors import UserError
from gpudbn.settings import reader

if TYPE_CHECKING:  # these load NumPy, which must not happen before the threads are set
    import numpy as np

    from gpudbn.mpi.alone import Exchange

FORMATS = (".npy", ".png")
STARTS = ("random", "data")

DESCRIPTION = """\
Draw samples from a trained model: Gibbs chains between the two top layers, then one pass down to the data."""

EPILOG = """\
examples:
  python -m gpudbn.sample runs/digits                         100 samples, a picture in the run's folder
  python -m gpudbn.sample runs/digits --start data            chains that start at its test rows
  python -m gpudbn.sample runs/digits --count 10000 --binary --out samples.npy
  python -m gpudbn.sample model.safetensors --steps 10000 --seed 3 --out three.png
  mpirun -n 2 python -m gpudbn.sample runs/large --shards 2   two ranks hold the model together

what --out FILE holds:
  FILE.png   the first 100 samples, beside the rows they started at with --start data
  FILE.npy   all of them, (count, columns) float32: the probability of each value being 1,
             or 0 and 1 with --binary

The same seed gives the same samples. Chains that have not forgotten where they started show too little
of the model: more --steps come closer to it.

exit codes: 0 done, 2 a mistake in what was asked (one line says which), 130 interrupted, 1 a fault of gpudbn"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _command.command_line("python -m gpudbn.sample", "MODEL [options]", DESCRIPTION, EPILOG)
    _command.add_number(parser, "count", "how many samples, each from a chain of its own", 100)
    _command.add_number(parser, "steps", "Gibbs steps of every chain", 1000)
    parser.add_argument("--start", default="random", metavar="{random,data}",
                        help="where the chains start: at the biases, or at rows of data (default: random)")
    parser.add_argument("--data", help="the rows of --start data, as for gpudbn.predict (default: the test rows of the "
                                       "data of the run)")
    parser.add_argument("--seed", type=reader(int), default=0, metavar="N",
                        help="number behind every random draw (default: 0)")
    parser.add_argument("--binary", action="store_true", help="0 and 1, drawn by the probabilities")
    parser.add_argument("--out", metavar="FILE", help="FILE.npy or FILE.png (default: samples.png in the run's folder)")
    _command.add_shards(parser)
    return _command.run(parser, arguments, _check, sample)


def _check(found: argparse.Namespace, ranks: int) -> None:
    if ranks != found.shards:
        raise UserError(f"--shards: must be the number of ranks, which draw all samples together; got {found.shards} "
                        f"and {ranks}. Start it " + (f"with mpirun -n {found.shards}" if found.shards > 1 else
                                                     "without mpirun, or with -n 1"))
    _command.whole("count", found.count, 1)
    _command.whole("steps", found.steps, 1, 1 << 32)
    _command.one_of("start", found.start, STARTS)
    if found.data is not None and found.start != "data":
        raise UserError(f"--data: must stand with --start data; got --start {found.start}")
    if found.out is not None:
        out = _command.output(found.out, FORMATS)
        if found.data is not None and out.exists() and Path(found.data).exists() and out.samefile(found.data):
            raise UserError(f"--out: must not replace what is read; got {out}. Choose another name")


def sample(found: argparse.Namespace) -> int:
    """Draw samples as the command line says. Returns the exit code."""
    from gpudbn.arrays import to_cpu
    from gpudbn.draws import Purpose, site
    from gpudbn.shards import unlike
    from gpudbn.twins import twins_of

    exchange = _command.join(found)
    model, out, start, title = _command.together(exchange, lambda: _prepared(found, exchange))
    exchange.agree(unlike(exchange.shards, model.dbn.xp))
    try:
        with _command.Progress("sample", found.steps) as progress:
            samples = model.dbn.sample(found.count, steps=found.steps, seed=found.seed, start=start,
                                       progress=progress.at)
        if found.binary:  # half-step 3 of layer 0: DBN.sample draws 0, 1 and 2
            twins_of(samples).bernoulli(samples, samples, seed=found.seed, update=found.steps,
                                        site=site(Purpose.SAMPLING, 0, 3))
    except MemoryError:
        raise UserError(f"--count: must be chains that fit into memory together; got {found.count}. "
                        "Draw fewer at a time, each time with another --seed") from None
    if exchange.chief:
        _write(found, model, out, to_cpu(samples), start, title)
    exchange.close()
    return 0


def _prepared(found: argparse.Namespace,
              exchange: Exchange) -> tuple[_command.Model, Path, np.ndarray | None, str]:
    """The model, where the samples go, and where the chains start, in words too."""
    model = _command.load_model(found, exchange)
    out = model.folder / "samples.png" if found.out is None else _command.output(found.out, FORMATS)
    if out.suffix == ".png":
        from gpudbn import plots

        missing = plots.available()
        if missing:
            raise UserError(f"--out: must be an .npy file, for no picture can be drawn; got {out}. {missing}")
    return model, out, *(_starts(model, found) if found.start == "data" else (None, "the biases"))


def _write(found: argparse.Namespace, model: _command.Model, out: Path, numbers: np.ndarray,
           start: np.ndarray | None, title: str) -> None:
    """The file, and what is said of it."""
    if out.suffix == ".npy":
        _write_npy(out, numbers)
    else:
        _draw(out, numbers, start, model.dbn.about.get("image_shape"),
              f"Samples: {found.steps:,} Gibbs steps in the top layer, from {title}")
    what = "samples of 0 and 1" if found.binary else "samples, as probabilities"
    parts = f"; the model in {found.shards} parts" if found.shards > 1 else ""
    _command.say([f"network    {model.dbn.describe()}", f"compute    {model.place}{parts}",
                  f"chains     {found.count:,} of {found.steps:,} Gibbs steps from {title}, seed {found.seed}",
                  f"wrote      {out}: {_shown(out, found.count)} {what}"])


def _shown(out: Path, count: int) -> str:
    from gpudbn.plots import MOST

    return f"the first {MOST} of {count:,}" if out.suffix == ".png" and count > MOST else f"{count:,}"


def _starts(model: _command.Model, found: argparse.Namespace) -> tuple[np.ndarray, str]:
    """A row of data for each chain, over again where there are fewer; and what they are."""
    import numpy as np

    data = found.data or (model.settings.data if model.settings else None)
    if data is None:
        raise UserError("--data: must say at which rows to start, as the run of the model is not known here; "
                        "got nothing. Give the folder of the run as MODEL, or --data")
    part = _command.part_of(model, data, None, None)
    rows = part.tables[0][0]
    start = np.empty((found.count, rows.n), np.float32)
    rows.take(np.arange(found.count) % len(rows), start)
    return start, f"the {part.what}"


def _write_npy(path: Path, array: np.ndarray) -> None:
    import numpy as np

    from gpudbn.checkpoint import write_atomically

    file = io.BytesIO()
    np.save(file, array)
    write_atomically(path, file.getvalue())


def _draw(path: Path, samples: np.ndarray, start: np.ndarray | None, shape: Any, title: str) -> None:
    """The samples, beside the rows they started at if they did."""
    from gpudbn import plots

    image_shape = tuple(shape) if shape and shape[0] * shape[1] == samples.shape[1] else None
    plots.samples(path, samples, start, image_shape, title)


if __name__ == "__main__":
    sys.exit(main())
