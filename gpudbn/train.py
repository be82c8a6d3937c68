"""``python -m gpudbn.train``: train a deep belief network, alone or under ``mpirun``.

Thin: reads the command line, fixes the BLAS threads before NumPy loads, joins the other ranks,
runs ``loop.Training`` and writes what it yields into a run folder.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gpudbn import __version__
from gpudbn.errors import LostError, NonFiniteError, PartLostError, UserError
from gpudbn.mpi import launch
from gpudbn.settings import Settings, command_line, parse, settings_of

if TYPE_CHECKING:  # these load NumPy, which must not happen before the threads are set
    import numpy as np

    from gpudbn.data import DataSet
    from gpudbn.dbn import DBN
    from gpudbn.loop import Training
    from gpudbn.mpi.alone import Exchange
    from gpudbn.runs import Run

DESCRIPTION = """\
Train a deep belief network: restricted Boltzmann machines layer by layer, then, with labels, the
whole network by back-propagation. Without arguments: the built-in digits, in under a minute."""

EPILOG = """\
examples:
  python -m gpudbn.train                                        the built-in 8x8 digits
  mpirun -n 3 python -m gpudbn.train                            a parameter server and two replicas
  mpirun -n 4 python -m gpudbn.train --mode sync --order fixed  the same bits as alone
  mpirun -n 4 python -m gpudbn.train --mode local --period 50   replicas that are averaged now and then
  python -m gpudbn.train --data mnist --layers 500 500 2000     MNIST, downloaded once
  python -m gpudbn.train --data images.npz --method pcd --k 5 --finetune-epochs 0
  python -m gpudbn.train --resume runs/digits-20260101-120000   go on after an interrupt

exit codes: 0 done, 2 a mistake in what was asked (one line says which), 3 parameters became NaN or
infinite, 4 a parameter server was lost (resumable), 130 interrupted (resumable), 1 a fault of gpudbn"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_line("python -m gpudbn.train", DESCRIPTION, EPILOG)
    world = launch.world()
    try:
        found = parse(parser, arguments)
        settings = settings_of(found)
    except UserError as error:
        from gpudbn.mpi.wire import end

        return end(error)
    ranks = world.size if world else 1
    serving = settings.servers if ranks > 1 and settings.mode == "async" else 0  # ranks that do not compute
    if "numpy" not in sys.modules:  # a program that calls main() has made its own choice
        # a fixed order of sums includes those inside BLAS, which depend on the number of threads
        threads = 1 if settings.order == "fixed" else settings.threads
        sharing = max(1, world.local_size - serving * (world.rank == world.local_rank)) if world else 1
        launch.limit_threads(threads, sharing)
    from gpudbn.mpi.wire import guarded

    return guarded(lambda: train(settings, out=found.out, resume=found.resume))


def train(settings: Settings, *, out: str | None = None, resume: str | None = None) -> int:
    """Train as the settings say; on the server's rank, serve. Returns the exit code."""
    from gpudbn._command import load_data
    from gpudbn.loop import largest
    from gpudbn.mpi import chosen, connect
    from gpudbn.mpi.server import Server
    from gpudbn.twins import without_kernels

    world = launch.world()
    ranks = world.size if world else 1
    plan = chosen(settings, ranks)
    loaded: list[tuple[DataSet, DataSet | None]] = []

    def prepare() -> int:
        data, labelled = load_data(settings, quiet=world is not None and world.rank > plan.serving)
        loaded.append((data, labelled))
        return largest(settings, data, labelled)

    exchange = connect(plan, prepare)
    with without_kernels(settings.kernels == "unfused"):  # for servers and pictures, too
        if isinstance(exchange, Server):
            exchange.serve()
            return 0
        return _replica(settings, *loaded[0], exchange, out, resume)


def _replica(settings: Settings, data: DataSet, labelled: DataSet | None, exchange: Exchange, out: str | None,
             resume: str | None) -> int:
    """What every replica does; the chief also prints and writes."""
    from gpudbn.arrays import choose_module
    from gpudbn.dbn import DBN
    from gpudbn.loop import Training
    from gpudbn.memory import settle
    from gpudbn.mpi import alone
    from gpudbn.runs import Run
    from gpudbn.shards import unlike

    together = partial(alone.together, exchange.agree)
    xp, place = together(lambda: choose_module(settings.device, exchange.local_replica))
    exchange.agree(unlike(exchange.shards, xp))
    sums = exchange.choose_collectives(settings.collectives, xp)
    dbn = together(lambda: DBN([data.train.n, *settings.layers], xp, exchange.shards, settings.local))
    dbn.about |= {"image_shape": data.image_shape, "data": data.name}
    show = _Show(settings, exchange)
    rows, labelled_rows, where = together(lambda: settle(settings, data, labelled, xp,
                                                            shards_rows=exchange.shards_rows))
    training = together(lambda: Training(dbn, rows, settings, exchange, progress=show.progress,
                                         labelled=labelled_rows))
    if resume:
        run = together(lambda: Run.open(resume))
        arrays, meta = together(lambda: run.load_checkpoint(training.part))
        together(lambda: training.restore(arrays, meta))
        if exchange.chief:
            run.rewind(meta)
    else:
        run = Run(exchange.told(str(out or Run.default_path(settings.data))))
        together(lambda: Run.create(run.path, settings.to_toml()) if exchange.chief else None)
    show.beginning(dbn, data, labelled, "; ".join(filter(None, (place, where, sums))), run)
    book = _Book(run, exchange)
    if ranks := exchange.ranks():
        book.record({"phase": "ranks", "ranks": ranks})

    saver = _Saver(training, exchange, run, settings.checkpoint_seconds)
    again = f"{show.launch} --resume {run.path}"
    try:
        if not resume:  # which has one, of more than is taken up so far
            saver.save()
        last: dict[str, Any] = {}
        with _interruptible(training) if exchange.alone else nullcontext():
            for last in training.run():
                book.record(last)
                show.record(last)
                saver.save_if_due()
            saver.save()
        if training.interrupt and training.index < training.phases:
            show.say(f"interrupted; everything is saved. Go on with: {again}")
            return 130
        _finish(settings, run, book, dbn, labelled or data, exchange, show, last)
    except (NonFiniteError, PartLostError) as error:
        if not exchange.leave(str(error)):
            show.say(f"go on from the last checkpoint: {again}")
            raise
    except KeyboardInterrupt:
        show.say(f"go on from the last checkpoint: {again}")
        raise
    except LostError as error:
        raise LostError(f"{error}. Go on from the last checkpoint: {again}") from error
    exchange.close()
    return 0


def _finish(settings: Settings, run: Run, book: _Book, dbn: DBN, data: DataSet, exchange: Exchange, show: _Show,
            last: dict[str, Any]) -> None:
    """What the chief writes at the end, or the next one if it dies of it."""
    import numpy as np

    while True:
        reports = exchange.reports()
        chief = exchange.living[0]
        if exchange.chief:
            book.write()
        seen = None
        if exchange.replica == chief:  # all shards of it
            dbn.save(run.model)
            seen = _look(dbn, data, np) if settings.plots == "on" else None
        if reports is not None:
            run.record_reports(reports)
            show.ending(run, last, _draw(run, seen, data, reports) if settings.plots == "on" else [])
        exchange.agree(None)
        if chief in exchange.living:
            return


@contextmanager
def _interruptible(training: Training) -> Iterator[None]:
    """While it lasts, the first Ctrl-C ends the run after the current turn, a second one at once."""
    def stop(number: int, frame: Any) -> None:  # noqa: ARG001
        training.interrupt = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping; Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)  # which does not keep the run, and its memory, alive


class _Book:
    """Records of the run, which the chief writes. One that becomes chief adds what the last one may have left out."""

    def __init__(self, run: Run, exchange: Exchange) -> None:
        self.run, self.exchange = run, exchange
        self.writes = exchange.chief
        self.unsure: list[dict[str, Any]] = []  # whether they are written: the latest two at most

    def record(self, record: dict[str, Any]) -> None:
        """Called on all replicas, with the same records."""
        self.unsure = [*self.unsure[-1:], record]
        self.write()

    def write(self) -> None:
        """Write what is not written, if I am the chief."""
        if self.exchange.chief:
            there = [] if self.writes else list(map(self._key, self.run.records()))
            for record in self.unsure:
                if self._key(record) not in there:
                    self.run.record(**record)
            self.unsure, self.writes = [], True

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["phase"], record.get("layer"), record.get("epoch")


class _Saver:
    """Checkpoints at the ends of epochs, when the last one is old enough; the replicas decide together."""

    def __init__(self, training: Training, exchange: Exchange, run: Run, seconds: float) -> None:
        self.training, self.exchange, self.run, self.seconds = training, exchange, run, seconds
        self.last = time.monotonic()

    def save(self) -> None:
        with self.exchange.tally.timing("saving"):
            state = self.training.state()
            if state is not None:
                self.run.save_checkpoint(*state)
        self.last = time.monotonic()

    def save_if_due(self) -> None:
        if self.exchange.any(self.exchange.chief and time.monotonic() - self.last >= self.seconds):
            self.save()


class _Show:
    """What the chief prints: one line an epoch, and a progress bar on a terminal."""

    def __init__(self, settings: Settings, exchange: Exchange) -> None:
        self.settings, self.exchange = settings, exchange
        world = launch.world()
        # Open MPI gives each rank a terminal of its own, whatever its output goes to
        self.bar = exchange.chief and sys.stdout.isatty() and world is None
        survive = "--with-ft ulfm " if launch.survives() else ""
        self.launch = (f"mpirun {survive}-n {world.size} " if world else "") + "python -m gpudbn.train"
        self.label, self.what, self.drawn = "", "", 0.0

    def say(self, text: str = "") -> None:
        if self.exchange.chief:
            print(("\r\x1b[K" if self.bar else "") + text, flush=True)

    def progress(self, done: int, total: int) -> None:
        if self.bar and (time.monotonic() - self.drawn > 0.1 or done == total):
            self.drawn = time.monotonic()
            filled = 30 * done // total
            print(f"\r\x1b[K{self.label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end="", flush=True)

    def beginning(self, dbn: DBN, data: DataSet, labelled: DataSet | None, place: str, run: Run) -> None:
        from gpudbn.arrays import is_gpu

        e, s = self.exchange, self.settings
        how = "one process" if e.alone else f"{e.replicas} " + {
            "sync": "synchronous replicas",
            "async": "asynchronous replicas around " + (
                "a parameter server" if s.servers == 1 else f"{s.servers} parameter servers"),
            "local": f"replicas that meet every {s.period} updates ({s.outer})"}[s.mode]
        if e.shards.count > 1:
            how += f", each in {e.shards.count} parts"
        self.say(f"network  {dbn.describe()}")
        self.say(f"data     {data.describe()}")
        if labelled is not None:
            self.say(f"         fine-tuned on {labelled.describe()}")
        self.say(f"compute  gpudbn {__version__} on {place}; {how}")
        if e.transport and is_gpu(dbn.layers[0].W):
            self.say(f"changes  {e.transport}")
        self.say(f"run      {run.path}")

    def record(self, r: dict[str, Any]) -> None:
        def pair(name: str, form: str) -> str:
            values = [r.get(f"{name}_{part}") for part in ("train", "validation")]
            return " | ".join(format(v, form) for v in values if v is not None)

        s = self.settings
        what = f"layer {r['layer']}  " if "layer" in r else r["phase"]
        if what != self.what and r.get("path") and not r["path"].startswith("numpy"):
            self.say(f"{what}  updates by path {r['path']}")
        if what != self.what and s.push == "factored" and r.get("push", "factored") != "factored":
            self.say(f"{what}  pushes {r['push']}: activations would be more bytes, or do not make its changes")
        self.what = what
        if r["phase"] == "pretrain":
            of = s.of_layer("epochs", r["layer"] - 1)
            self.label = f"layer {r['layer']}"
            self.say(f"layer {r['layer']}   epoch {r['epoch']:>3}/{of}   free energy {pair('free_energy', '9.2f')}   "
                     f"reconstruction {pair('reconstruction', '7.3f')}   {r['seconds']:7.1f} s")
        elif r["phase"] == "autoencoder":
            self.label = "autoencoder"
            self.say(f"autoencoder  epoch {r['epoch']:>3}/{s.finetune_epochs}   loss {pair('loss', '8.3f')}   "
                     f"squared error {pair('squared_error', '7.3f')}   {r['seconds']:7.1f} s")
        elif r["phase"] == "finetune":
            self.label = "finetune"
            self.say(f"finetune  epoch {r['epoch']:>3}/{s.finetune_epochs}   loss {pair('loss', '.4f')}   "
                     f"error {pair('error', '7.2%')}   {r['seconds']:7.1f} s")

    def ending(self, run: Run, last: dict[str, Any], pictures: list[str]) -> None:
        self.say()
        if "reconstruction" in last:
            self.say(f"test reconstruction: {last['reconstruction']:.3f} per row")
        if "squared_error" in last:
            self.say(f"test squared error: {last['squared_error']:.3f} per row, cross-entropy {last['loss']:.2f} nats")
        self.say(f"everything is in {run.path}: model.safetensors, metrics.jsonl, settings.toml, checkpoint.safetensors"
                 + (f", plots/ ({', '.join(pictures)})" if pictures else ""))
        if last.get("error") is not None:
            self.say(f"test error: {100 * last['error']:.2f} %  "
                     f"({last['rows']:,} rows, {last['seconds']:.1f} s of training)")
        self.say(f"try next: python -m gpudbn.sample {run.path}")
        if last.get("error") is not None:
            self.say(f"          python -m gpudbn.predict {run.path} --data {self.settings.data}")


class _Seen(NamedTuple):
    """What a model learned and makes of test rows, as arrays on the CPU: what pictures are of."""

    filters: list[np.ndarray]  # of each layer, see ``DBN.filters``
    rows: np.ndarray
    samples: np.ndarray
    reconstructions: np.ndarray
    labels: np.ndarray | None  # of all rows, with what was predicted
    predicted: np.ndarray | None


def _look(dbn: DBN, data: DataSet, np: Any) -> _Seen | None:
    """What there is to draw; None without Matplotlib. Collective over the shards of a replica."""
    from gpudbn import plots
    from gpudbn.arrays import to_cpu

    if dbn.shards.count == 1 and plots.available():
        return None
    rows = data.test if len(data.test) else data.train
    shown = np.empty((min(64, len(rows)), rows.n), np.float32)
    rows.take(np.arange(len(shown)), shown)
    predicted = None
    if dbn.classifier is not None and rows.labels is not None:
        predicted = np.concatenate([to_cpu(dbn.predict(_block(rows, lo, np))) for lo in range(0, len(rows), 1000)])
    return _Seen([to_cpu(dbn.filters(layer)) for layer in range(len(dbn.layers))], shown,
                 to_cpu(dbn.sample(len(shown), steps=200, start=shown)), to_cpu(_back(dbn, shown[:20])),
                 None if predicted is None else rows.take_labels(np.arange(len(rows))), predicted)


def _draw(run: Run, seen: _Seen | None, data: DataSet, reports: list[dict[str, Any]]) -> list[str]:
    """The pictures of a run; their names. Without Matplotlib none, and a line that says so."""
    from gpudbn import plots

    missing = plots.available()
    if missing or seen is None:
        print(f"no pictures: {missing}", flush=True)
        return []
    shape, names = data.image_shape, []
    for i, fields in enumerate(seen.filters, 1):
        names.append(f"filters-{i}")
        plots.filters(run.plot(names[-1]), fields, shape, f"Layer {i}: what its hidden units respond to")
    plots.samples(run.plot("samples"), seen.samples, seen.rows, shape,
                  "Samples: 200 Gibbs steps in the top layer, from the data")
    plots.reconstructions(run.plot("reconstructions"), seen.rows[:20], seen.reconstructions, shape)
    names += ["samples", "reconstructions"]
    if seen.predicted is not None:
        plots.confusion(run.plot("confusion"), seen.labels, seen.predicted, data.classes)
        names.append("confusion")
    plots.curves(run.plot("curves"), [r for r in run.records() if "epoch" in r])
    return [*names, "curves", *plots.ranks(run.plot, reports)]


def _back(dbn: DBN, rows: Any) -> Any:
    """Rows as the model gives them back: by the autoencoder if it was fine-tuned to one, else by the layers."""
    return dbn.reconstruct(rows) if dbn.autoencoder is None else dbn.decode(dbn.encode(rows))


def _block(rows: Any, start: int, np: Any) -> Any:
    positions = np.arange(start, min(start + 1000, len(rows)))
    out = np.empty((len(positions), rows.n), np.float32)
    rows.take(positions, out)
    return out


if __name__ == "__main__":
    sys.exit(main())
