"""What the commands share: the data of a run; of those on a trained model the options, the model and its run's split.

Imports neither NumPy nor MPI, so that the command line can be read before the number of BLAS threads is fixed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpudbn.errors import UserError
from gpudbn.mpi import launch
from gpudbn.settings import FIELDS, Parser, Settings, checked, flag, from_toml, nearest, parse, reader

if TYPE_CHECKING:  # these load NumPy, which must not happen before the threads are set
    from gpudbn.data import DataSet, Rows
    from gpudbn.dbn import DBN
    from gpudbn.mpi.alone import Exchange

PARTS = ("test", "validation", "train", "all")
BLOCK = 1000  # rows that go through the network at once


# -- the command line -----------------------------------------------------------------------------


def command_line(prog: str, arguments: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with MODEL; ``run`` adds --device and --threads behind the command's own options."""
    parser = Parser(prog=prog, usage=f"{prog} {arguments}", description=description, epilog=epilog,
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    # not required here: argparse would name what is missing before an option that is misspelt
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder of a run, or its model.safetensors")
    return parser


def add_number(parser: argparse.ArgumentParser, name: str, text: str, default: int | None = None) -> None:
    """An option that takes a whole number; what is none is refused by ``whole`` or the Settings' rule."""
    parser.add_argument(flag(name), type=reader(int), default=default, metavar="N",
                        help=text + ("" if default is None else f" (default: {default})"))


def add_shards(parser: argparse.ArgumentParser) -> None:
    """--shards and --order, of commands that a model in several parts may serve."""
    add_number(parser, "shards", "ranks that hold the model together, each a part of every layer", 1)
    parser.add_argument("--order", default="fast", metavar="{fast,fixed}",
                        help="fixed: sums in blocks of constant order, so that any number of shards gives the same "
                             "bits on CPUs (slower; default: fast)")


def whole(name: str, value: object, least: int, below: int | None = None) -> None:
    """Refuse what is not a whole number from ``least`` on."""
    if not isinstance(value, int):
        raise UserError(f"{flag(name)}: must be a whole number; got {value!r}")
    if value < least:
        raise UserError(f"{flag(name)}: must be at least {least}; got {value}")
    if below is not None and value >= below:
        raise UserError(f"{flag(name)}: must be below {below}; got {value}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices, with the nearest that is."""
    if value not in choices:
        raise UserError(f"{flag(name)}: must be one of {', '.join(choices)}; got {value}.{nearest(value, choices)}")


def output(out: str, suffixes: Sequence[str]) -> Path:
    """The path after ``--out``, its ending one of those that say the format."""
    path = Path(out).expanduser()
    if path.suffix not in suffixes:
        raise UserError(f"--out: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, which says the format; "
                        f"got {out}")
    if path.is_dir():
        raise UserError(f"--out: must name a file; got {out}, a folder")
    return path


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None,
        check: Callable[[argparse.Namespace, int], None], action: Callable[[argparse.Namespace], int]) -> int:
    """Read and check the command line and the number of ranks, fix the BLAS threads, act; returns the exit code."""
    parser.add_argument("--device", default="auto", metavar="{auto,cpu,gpu}",
                        help="where to compute (default: auto, the GPU if there is one)")
    add_number(parser, "threads", "BLAS threads of a process (default: the cores it may use, shared out among the "
                                  "ranks of a machine)")
    world = launch.world()
    try:
        found = parse(parser, arguments)
        if found.model is None:
            raise UserError(f"{parser.prog}: must be given MODEL, the folder of a run or its model.safetensors; "
                            "got none. See --help")
        for name in ("device", "threads", "seed", "shards", "order"):
            if hasattr(found, name):
                setattr(found, name, checked(FIELDS[name], getattr(found, name)))
        check(found, world.size if world else 1)
    except UserError as error:
        from gpudbn.mpi.wire import end

        return end(error)
    if "numpy" not in sys.modules:  # a program that calls main() has made its own choice
        # a fixed order of sums includes those inside BLAS, which depend on the number of threads
        launch.limit_threads(1 if found.order == "fixed" else found.threads, world.local_size if world else 1)
    from gpudbn.mpi.wire import guarded

    return guarded(lambda: action(found))


# -- what is printed ------------------------------------------------------------------------------


def say(lines: Sequence[str]) -> int:
    """Print the lines, once all files are written. A reader who has gone needs no answer: 0 all the same."""
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again as it ends
        if not isinstance(error, BrokenPipeError):
            from gpudbn.checkpoint import why_not

            raise why_not("standard output", "writable", error) from error
    return 0


class Progress:
    """A bar on a terminal (standard error), nothing elsewhere or where a launcher started several."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.drawn = label, total, time.monotonic()
        self.bar = sys.stderr.isatty() and launch.world() is None

    def at(self, done: int) -> None:
        """``done`` of the total are done. Nothing is drawn in the first half second, so short runs stay quiet."""
        if self.bar and time.monotonic() - self.drawn > 0.5:
            self.drawn = time.monotonic() - 0.4
            filled = 30 * done // self.total
            print(f"\r\x1b[K{self.label} [{'#' * filled}{'.' * (30 - filled)}] {done:,}/{self.total:,}", end="",
                  file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# -- the data of a run ----------------------------------------------------------------------------


def load_data(settings: Settings, quiet: bool) -> tuple[DataSet, DataSet | None]:
    """The data, and other labelled data for fine-tuning if there are any."""
    from gpudbn.data import load

    split: dict[str, Any] = {"validation": settings.validation, "test": settings.test, "seed": settings.seed,
                             "quiet": quiet}
    other = settings.finetune_data if settings.finetune_epochs else None
    need_labels = settings.finetune_epochs > 0 and settings.finetune == "classifier" and not other
    data = load(settings.data, labels=settings.labels, need_labels=need_labels, **split)
    if other is None:
        return data, None
    labelled = load(other, **split)
    if labelled.n != data.n:
        raise UserError(f"--finetune-data: must have the {data.n} columns of --data; got {labelled.n}")
    return data, labelled


# -- the model and its rows -----------------------------------------------------------------------


def join(found: argparse.Namespace) -> Exchange:
    """The other ranks: some for the rows, --shards for the model."""
    from gpudbn.mpi import Plan, connect
    from gpudbn.mpi.alone import Exchange

    exchange = connect(Plan("sync", shards=found.shards), 0)
    assert isinstance(exchange, Exchange)  # no server
    return exchange


def together(exchange: Exchange, action: Callable[[], Any]) -> Any:
    """What the action returns: on the chief before the others, so that it may download. An error of one ends all."""
    from gpudbn.mpi import alone

    first = alone.together(exchange.agree, lambda: action() if exchange.chief else None)
    return alone.together(exchange.agree, lambda: first if exchange.chief else action())


class Model(NamedTuple):
    """A trained model, the settings of its run if they are known, the run's folder, and a word on the device."""

    dbn: DBN
    settings: Settings | None
    folder: Path
    place: str


def load_model(found: argparse.Namespace, exchange: Exchange) -> Model:
    """MODEL, a run folder or a file, on the device; of a shard, its part. The settings are those beside it.

    Raises
    ------
    UserError
        If there is none, or it is damaged, or the device is not there.
    """
    from gpudbn import dbn
    from gpudbn.arrays import choose_module
    from gpudbn.precision import BLOCKS

    path = Path(found.model).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / "model.safetensors").exists():
        if (path / "checkpoint.safetensors").exists():
            raise UserError(f"{path}: must be a finished run; got one without its model.safetensors yet. "
                            f"Finish it: python -m gpudbn.train --resume {path}")
        raise UserError(f"{path}: must be the folder of a run, or a model file; got a folder without model.safetensors")
    xp, place = choose_module(found.device, exchange.local_replica)
    model = dbn.load(path, xp, exchange.shards)
    if found.order == "fixed":
        if xp.__name__ != "numpy":
            raise UserError("--order: must be fast on a GPU; got fixed. Use --device cpu")
        model.set_precision(BLOCKS)
    file = folder / "settings.toml"
    beside = (path.is_dir() or path.name == "model.safetensors") and file.is_file()
    return Model(model, Settings(**from_toml(file)) if beside else None, folder, place)


class Part(NamedTuple):
    """Rows in order, from one table or two, each with the number of its first row in the file; and what they are."""

    tables: list[tuple[Rows, int]]
    what: str
    trained_on: bool

    @property
    def size(self) -> int:
        """How many rows."""
        return sum(len(rows) for rows, _ in self.tables)

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return all(rows.labels is not None for rows, _ in self.tables)


def part_of(model: Model, data: str, labels: str | None, part: str | None) -> Part:
    """Rows of data, split as they were when the model was trained on them.

    ``part`` None is ``test`` for the data of the model's run, ``all`` for other data.

    Raises
    ------
    UserError
        If the data cannot be read, have other columns than the model, or no such part.
    """
    from gpudbn.data import Rows, load, load_rows

    s = model.settings
    # by name: the run knows its files by paths from another working directory
    own = s is not None and any(_last(data) == _last(d) for d in (s.data, s.finetune_data) if d)
    if s is not None and own:
        if labels is None and _last(data) == _last(s.data):
            labels = s.labels
        found = load(data, labels=labels, validation=s.validation, test=s.test, seed=s.seed, need_labels=False)
        name, tables = found.name, {"train": found.train, "validation": found.validation, "test": found.test}
        base, one_table = found.train, found.train.array is found.test.array
    else:
        try:
            name, base, tested = load_rows(data, labels=labels)
        except OSError as error:
            raise UserError(f"{error.filename or data}: must be readable; "
                            f"got: {error.strerror or error}") from error
        tables, one_table = {"train": base} | ({} if tested is None else {"test": tested}), tested is None
    wanted = part or ("test" if own else "all")
    everything = Rows(base.array, base.scale, base.labels)
    if wanted == "all":
        chosen = [(everything, 0)] + ([] if one_table else [(tables["test"], len(everything))])
    elif wanted in tables and (own or not one_table) and len(tables[wanted]):
        chosen = [(tables[wanted], 0)]
    elif own or not one_table:
        raise UserError(f"--part: must be rows that are there; got {wanted}, of which {name} has none. Use --part all")
    else:
        raise UserError(f"--part: must be all where it is not known how the rows were split; got {wanted}. "
                        "Give the folder of the run that was trained on them, or --part all")
    if base.n != model.dbn.sizes[0]:
        raise UserError(f"--data: must have the {model.dbn.sizes[0]} columns of the model; got {base.n} in {name}")
    word = {"all": "", "train": "training "}.get(wanted, f"{wanted} ")
    trained_on = wanted in ("train", "all") and (own or model.dbn.about.get("data") == name)
    return Part(chosen, f"{word}rows of {name}", trained_on)


def _last(data: str) -> str:
    """The last part of a path, or the name of built-in data."""
    return Path(data).expanduser().resolve().name
