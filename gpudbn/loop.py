"""The schedule of a run: layers, epochs, turns, evaluations. Prints nothing and knows no MPI.

A replica computes and exchanges in turns:

    run `count` updates on parameters that are local for so long
    exchange: push what changed, take what the others changed

On a GPU nothing in a turn copies or waits: rows come from a ``feed``, a turn of equal updates is a CUDA
graph, and a flag on the device keeps the first update whose parameters were not finite.

Alone, a turn is a reporting interval and the exchange does nothing; an asynchronous replica's turn
is ``n_push`` updates, that of replicas which meet every so often ``period``; synchronous replicas add
their sums within every update. At the end of an epoch all replicas meet with equal parameters,
measure together, and may save.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpudbn import __version__, cuda, trials
from gpudbn.arrays import Array, device_versions, is_gpu, to_cpu
from gpudbn.autoencoder import AutoencoderPhase
from gpudbn.cuda.wgmma import tiles
from gpudbn.data import DataSet, Rows
from gpudbn.dbn import DBN
from gpudbn.draws import Purpose, permutation, replica_row, site
from gpudbn.errors import NonFiniteError, UserError
from gpudbn.factors import Factors
from gpudbn.feed import AT_ONCE, Feed, Span, feed_of
from gpudbn.finetune import FinetunePhase
from gpudbn.graphs import Graphs
from gpudbn.large import LargeLayerPhase
from gpudbn.memory import BLOCKS, MEASURED, TURN
from gpudbn.paths import Case, Path, choose_path, quickest
from gpudbn.precision import chosen
from gpudbn.pretrain import LayerPhase, Phase, Piece
from gpudbn.rbm import RBM, new_chains
from gpudbn.settings import BATCH_OPTIMISERS, Settings
from gpudbn.shards import Pieces, go_along, widest
from gpudbn.tracing import span
from gpudbn.twins import twins_of, without_kernels

if TYPE_CHECKING:
    from gpudbn.mpi.alone import Exchange

PROBE = 2000  # rows on which a layer is measured
TIMED_BY = ("batch", "method", "k", "binarise", "data_hidden", "last_hidden", "reconstruction", "up", "momentum",
            "centring", "sparsity_target")  # settings on which the time of a layer's update depends
TUNED_BY = ("finetune", "finetuning_batch", "optimiser", "line_searches", "dropout", "input_dropout", "code")
FINITE = 2**64 - 1  # the flag as long as everything was finite


def largest(settings: Settings, data: DataSet, labelled: DataSet | None = None) -> int:
    """Entries of the largest parameter vector of a run; where layers are cut, of a shard."""
    sizes = [data.train.n, *settings.layers]
    own = [widest(m, settings.shards) for m in settings.layers]
    seen = [settings.of_layer("local", i) or n for i, n in enumerate(sizes[:-1])]  # by a hidden unit
    layers = [f * m + n + m for f, n, m in zip(seen, sizes[:-1], own, strict=True)]
    if settings.finetune == "autoencoder":
        return sum(2 * n * m + n + m for n, m in zip(sizes[:-1], own, strict=True))
    classes = (labelled or data).classes
    network = sum(f * m + m for f, m in zip([*seen, own[-1]], [*own, classes], strict=True))
    return max([*layers, network])


class Training:
    """One run over all phases: each layer of the stack, then fine-tuning.

    Parameters
    ----------
    dbn : DBN
        Modified.
    data : DataSet
        For pretraining, and for fine-tuning unless ``labelled`` is given.
    settings : Settings
    exchange : Exchange
        The other replicas: ``mpi.alone.Alone()`` for a single process.
    labelled : DataSet, optional
        Other data for fine-tuning, with the same columns.
    progress : callable, optional
        Called with (updates done, updates of the epoch) after every turn.

    Attributes
    ----------
    interrupt : bool
        Set it, for instance from a signal handler, to end after the current turn. Only alone: replicas
        can stop together only where they meet.
    """

    def __init__(self, dbn: DBN, data: DataSet, settings: Settings, exchange: Exchange, *,
                 labelled: DataSet | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        self.dbn, self.data, self.settings, self.exchange = dbn, data, settings, exchange
        self.labelled = labelled or data
        dbn.about["binarise"] = settings.binarise  # measures and the finished model see rows as training does
        local = any(rbm.local for rbm in dbn.layers)
        kernels = dbn.xp is not np and settings.kernels != "unfused" and not local
        dbn.set_precision(chosen(settings.precision, tensor_cores=kernels,
                                 blocks=dbn.xp is np and settings.order == "fixed"))
        self.progress = progress
        self.interrupt = False
        self.depth = len(dbn.layers)
        if (settings.optimiser in BATCH_OPTIMISERS and settings.finetune_epochs and exchange.replicas > 1
                and not exchange.gives_portions):
            raise UserError(f"--optimiser: must be adam, adagrad or sgd with several replicas in --mode {settings.mode}"
                            f"; got {settings.optimiser} and {exchange.replicas}. Use --mode async")
        finetune = settings.finetune_epochs > 0 and (settings.finetune == "autoencoder" or
                                                     self.labelled.train.labels is not None)
        self.phases = self.depth + finetune
        # where the run stands: what a checkpoint keeps
        self.index = 0  # number of the phase
        self.epoch = 0  # epochs of the phase that are complete
        self.position = 0  # updates done of the epoch that is not
        self.updates = 0  # updates of the whole run: the clock of the draws
        self.best: dict[str, Any] = {"value": None, "epoch": 0}
        self.best_parameters: Array | None = None
        self.seconds = 0.0
        self.phase: Phase | None = None
        self.graphs: Graphs | None = None
        self._lent: tuple[int, Feed, Any] | None = None  # of another's shard, in this epoch
        self.flag = dbn.xp.full(1, FINITE, np.uint64)  # see ``reference.note_not_finite``
        self._phase_arrays: dict[str, np.ndarray] = {}  # of a checkpoint, until the phase is made
        self._vectors: list[Array] = []
        smallest = min(len(self._shard(i)) for i in (0, self.phases - 1))
        if smallest < 1:
            raise UserError(f"--data: must have at least one training row a replica; got {len(data.train)} rows for "
                            f"{exchange.replicas} replicas. Start fewer ranks")
        self.paths = [self._path(index) for index in range(self.phases)]  # of the phases

    # -- the run ----------------------------------------------------------------------------------

    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end, or to the next interrupt; yields one record after each epoch and at the end.

        The caller may call ``state`` between records, on all replicas.

        Raises
        ------
        NonFiniteError
            If parameters became NaN or infinite; names layer and update.
        """
        while self.index < self.phases:
            with span(f"phase {self.index}"):
                feed = feed_of(self._shard(self.index), self.dbn.xp, self._turn() * self._batch())
                self.paths[self.index] = self._settled(feed)
                plain = self.paths[self.index].name == "unfused"
                kept = self._phase_arrays
                with without_kernels(plain):
                    phase = self.phase = self._make_phase()
                self.graphs = self._make_graphs(phase, feed)
                self.exchange.begin(phase.parameters)
                if kept:
                    self.exchange.restore(kept)
                while self.epoch < phase.epochs and not self._enough(phase):
                    with without_kernels(plain), span(f"epoch {self.epoch + 1}"):
                        record = self._run_epoch(phase, feed)
                    if record is None:
                        return  # interrupted
                    yield record
            if phase.keeps_best and self.best_parameters is not None:
                phase.parameters[...] = self.best_parameters
            self.index, self.epoch, self.phase = self.index + 1, 0, None
            self.best, self.best_parameters = {"value": None, "epoch": 0}, None
        with without_kernels(self.paths[-1].name == "unfused"):
            record = self._test()
        yield record

    def _enough(self, phase: Phase) -> bool:
        return bool(phase.patience) and self.epoch - self.best["epoch"] >= phase.patience and self.best["epoch"] > 0

    def _make_phase(self) -> Phase:
        s, kept = self.settings, self._phase_arrays
        phase: Phase
        if self.index < self.depth:
            rows, low, high = self._widest(s.batch), *self._chain_range(s.batch)
            chains = None
            if s.method == "pcd":
                chains = self.dbn.xp.asarray(kept["chains"] if kept else new_chains(
                    high - low, self.dbn.layers[self.index], seed=s.seed, layer=self.index,
                    row=self._first_row() + low))
            layer = self._kind()(self.dbn, self.index, s, rows=rows, chains=chains)
            if not kept:
                layer.initialise(self.data.train)
            if self.exchange.wants_factors and layer.offsets is None:
                layer.factors = Factors(layer.rbm.n, layer.rbm.width)
            phase = layer
        else:
            phase = self._finetuning(self._widest(s.finetuning_batch))
        for name, array in phase.state().items():
            if kept:
                array[...] = self.dbn.xp.asarray(kept[name]) if not isinstance(array, np.ndarray) else kept[name]
        self.exchange.factors, self.exchange.align = phase.factors, phase.align
        if "best" in kept:
            self.best_parameters = self.dbn.xp.asarray(kept["best"])
        self._phase_arrays = {}
        return phase

    def _finetuning(self, rows: int) -> Phase:
        """The phase of fine-tuning, for pieces of at most so many rows."""
        if self.settings.finetune == "autoencoder":
            return AutoencoderPhase(self.dbn, self.settings, rows=rows)
        return FinetunePhase(self.dbn, self.labelled.classes, self.settings, rows=rows)

    def _kind(self) -> type[LayerPhase]:
        return LargeLayerPhase if self.paths[self.index].name == "wgmma" else LayerPhase

    def _batch(self) -> int:
        """Rows of an update of the current phase."""
        return self.settings.batch if self.index < self.depth else self.settings.finetuning_batch

    def _turn(self) -> int:
        """Updates of a turn."""
        if self._own_rows:
            return self.settings.period if self.settings.mode == "local" else self.settings.n_push
        rows = self._set(self.index).train
        streamed = self.dbn.xp is not np and not is_gpu(rows.array)
        return max(1, min(TURN, AT_ONCE // (self._batch() * rows.n * rows.kept.itemsize))) if streamed else TURN

    def _run_epoch(self, phase: Phase, feed: Feed) -> dict[str, Any] | None:
        started = self.exchange.clock()
        rates = phase.begin_epoch(self.epoch)
        # the same number of updates on every replica, also where shards differ by a row
        all_rows = len(self._set(self.index).train)
        longest = -(-all_rows // self.exchange.replicas) if self._own_rows else all_rows
        count, turn = -(-longest // phase.batch), self._turn()
        positions = feed.begin(self._order(len(feed.rows), self.exchange.replica))
        self._lent = None
        before = phase.parameters.copy() if self._own_rows else None
        self.exchange.part(phase.parameters)
        start = self.position
        # an overflow shows itself as a parameter that is not finite, at the end of the turn
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            each = -(-(count - start) // turn)
            warm = max(0, -(-self.settings.warm_start // turn) - self.epoch * each)
            turns = self.exchange.turns(each, min(warm, each)) if self._own_rows else (
                (self.exchange.replica, number) for number in range(each))
            for owner, number in turns:
                first = start + number * turn
                end, own = min(first + turn, count), owner == self.exchange.replica
                if before is not None:
                    self.exchange.refresh(phase.parameters, before)
                with span("compute"):
                    if own:
                        self._run_turn(phase, feed, positions, first, end, self.graphs)
                        feed.ahead(end * phase.batch, self._rows(positions, phase, end, min(end + turn, count)))
                    else:
                        self._run_turn(phase, *self._others(owner, phase, turn), first, end, None)
                self._note(phase)
                if before is not None:
                    with span("exchange"):
                        self.exchange.exchange(phase.parameters, before,
                                               fetch=end % self.settings.n_fetch == 0 or end == count or not own)
                if own:
                    self.position = end
                if self.progress:
                    self.progress(end, count)
                if self.interrupt and self.exchange.alone and end < count:
                    self.seconds += self.exchange.clock() - started
                    return None
        self.exchange.meet(phase.parameters)
        self._note(phase)
        self._look()
        self.updates = self._latest()
        self.epoch, self.position = self.epoch + 1, 0
        record = {"phase": phase.name, **({"layer": self.index + 1} if phase.layer is not None else {}),
                  "epoch": self.epoch, "update": self.updates, "path": str(self.paths[self.index]), **rates,
                  **({"push": self.exchange.packed} if self.exchange.packed and self._own_rows else {}),
                  **self._measure(phase)}
        self.seconds += self.exchange.clock() - started
        self._remember(phase, record)
        return record | {"best_epoch": self.best["epoch"], "seconds": round(self.seconds, 3)}

    def _order(self, count: int, owner: int) -> np.ndarray:
        """The order of a shard's rows in this epoch. Array (count,), int64."""
        row = replica_row(owner) if self._own_rows else 0
        return permutation(count, seed=self.settings.seed, update=self.epoch, row=row,
                           site=site(Purpose.ORDER, self.index))

    def _others(self, owner: int, phase: Phase, turn: int) -> tuple[Feed, Any]:
        """Feed and positions of another replica's shard, for turns that it does not come to."""
        if self._lent is None or self._lent[0] != owner:
            rows = self._set(self.index).train.shard(owner, self.exchange.replicas)
            feed = feed_of(rows, self.dbn.xp, turn * phase.batch)
            self._lent = owner, feed, feed.begin(self._order(len(rows), owner))
        return self._lent[1:]

    def _latest(self) -> int:
        """The clock of the draws at the end of an epoch: where replicas did different numbers of updates, the most."""
        if not self._own_rows:
            return self.updates
        each = np.zeros((self.exchange.replicas, 1))
        each[self.exchange.replica] = self.updates
        return int(self.exchange.total(each).max())

    @staticmethod
    def _rows(positions: Any, phase: Phase, first: int, end: int) -> int:
        """How many rows the updates from ``first`` to ``end`` have."""
        return len(positions[first * phase.batch : end * phase.batch])

    def _run_turn(self, phase: Phase, feed: Feed, positions: Any, first: int, end: int, graphs: Graphs | None) -> None:
        """The updates of the epoch from ``first`` to ``end``: the full batches as one graph, if there are graphs."""
        batch = phase.batch
        feed.turn(first * batch, self._rows(positions, phase, first, end))
        phase.begin_turn()
        if self.paths[self.index].name == "persistent" and isinstance(phase, LayerPhase):
            (piece,) = self._pieces(phase, positions[first * batch : first * batch + batch])
            phase.run(feed, positions[first * batch : end * batch], piece)
            self.updates += end - first
            return
        equal = min(end, len(positions) // batch) - first
        if graphs and equal > 1 and graphs.run(equal, equal * batch, update=self.updates, row=first * batch,
                                               side=feed.side):
            self.updates += equal
            first += equal
        for i in range(first, end):
            self._update(phase, feed, positions[i * batch : (i + 1) * batch])

    def _path(self, index: int) -> Path:
        """Which way the updates of a phase take."""
        s, layer = self.settings, index < self.depth
        if self.dbn.xp is not np and any(rbm.local for rbm in self.dbn.layers):
            return Path("unfused", "local layers have no kernels")
        host = ("--order fixed" if s.order == "fixed" else "other replicas" if self.exchange.cuts_batches else
                "--push factored" if self.exchange.wants_factors else
                "servers" if self._in_portions(index) else
                "other shards" if self.dbn.shards.count > 1 else None)
        batch = s.batch if layer else s.finetuning_batch
        return choose_path(s.kernels, Case(
            f"layer {index + 1}" if layer else "fine-tuning", gpu=self.dbn.xp is not np, finetune=not layer,
            host_between=host, updates=len(self._shard(index)) // batch,
            precision=self.dbn.about["precision"] if layer else "fp32",
            means=("--data-hidden mean" if s.data_hidden == "mean" else
                   "--reconstruction mean" if s.reconstruction == "mean" else None),
            rounded=("--up mean" if index and s.up == "mean" else
                     None if index or s.binarise != "none" or self.data.train.levels else "data of any numbers"),
            last_means=s.last_hidden == "mean",
            offsets=s.centring != "off" or s.sparsity_target is not None,
            fits=layer and s.kernels in ("auto", "persistent") and self._fits(index), **self._large(index)))

    def _settled(self, feed: Feed) -> Path:
        """The path of the phase that begins: as before a stop, or the quickest of those to be timed."""
        s, path, layer = self.settings, self.paths[self.index], self.index < self.depth
        if not path.rivals or self.epoch >= (s.of_layer("epochs", self.index) if layer else s.finetune_epochs):
            return path
        kept = bytes(self._phase_arrays.get("path", np.empty(0, np.uint8))).decode()
        for rival in path.rivals:
            if kept.startswith(f"{rival.name} ("):
                return replace(rival, why=kept[len(rival.name) + 2 : -1], rivals=path.rivals)
        sizes, batch = self.dbn.sizes[: self.index + 2], self._batch()
        flops = (6 + 4 * s.k) * sizes[-2] * sizes[-1] if layer else 6 * sum(map(math.prod, itertools.pairwise(sizes)))
        count = min(trials.updates_of(flops * batch, self._turn()), len(feed.rows) // batch)
        case = {"sizes": sizes, "updates": count, "rows": type(feed).__name__, "kept": str(feed.rows.kept),
                **({"precision": self.dbn.layers[0].precision} if layer else {"classes": self.labelled.classes}),
                **{name: getattr(s, name) for name in (TIMED_BY if layer else TUNED_BY)},
                **device_versions(self.dbn.xp), "gpudbn": __version__}
        times = trials.recalled(case, [rival.name for rival in path.rivals])
        failed: dict[str, str] = {}
        if times is None and count:
            times, failed = self._times(path.rivals, feed, count)
            if not failed:
                trials.remember(case, times)
        return quickest(path, times or {}, failed)

    def _times(self, rivals: tuple[Path, ...], feed: Feed, count: int) -> tuple[dict[str, float], dict[str, str]]:
        """Microseconds an update by each path, by its name; and of those that fail, why."""
        times: dict[str, float] = {}
        failed: dict[str, str] = {}
        positions = feed.begin(np.arange(len(feed.rows)))
        for path in rivals:
            try:
                with span(f"trial of {path.name}"), self.trial(path, feed, positions, count) as turn:
                    times[path.name] = trials.timed(self.dbn.xp, turn) / count
            except Exception as error:  # whatever it is, the others may do
                failed[path.name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        return times, failed

    @contextmanager
    def trial(self, path: Path, feed: Feed, positions: Any, count: int) -> Iterator[Callable[[], None]]:
        """A turn of so many updates of the current phase by a path, on parameters and chains that are thrown away.

        To be called again and again: for each buffer of the feed the first is launched one by one, the second captured.
        """
        other = copy.copy(self)  # a run like this one
        other.dbn, other.paths, other.position = copy.copy(self.dbn), [path] * self.phases, 0
        with without_kernels(path.name == "unfused"):
            phase = other._layer_to_try() if self.index < self.depth else other._network_to_try()
            phase.begin_epoch(0)
            other.graphs = other._make_graphs(phase, feed)
            try:
                yield lambda: other._run_turn(phase, feed, positions, 0, count, other.graphs)
            finally:
                other.graphs = None  # it knows the run that has it: their memory would wait for the collector

    def _layer_to_try(self) -> Phase:
        """The phase of the current layer, with new parameters in this run's stack."""
        s, rbm = self.settings, self.dbn.layers[self.index]
        scratch = RBM(rbm.n, rbm.m, self.dbn.xp, rbm.shards)
        scratch.precision = rbm.precision
        scratch.initialise(sd=s.initial_weights, seed=s.seed, layer=self.index)
        self.dbn.layers = [*self.dbn.layers[: self.index], scratch]
        low, high = self._chain_range(s.batch)
        chains = self.dbn.xp.zeros((high - low, rbm.width), np.float32) if s.method == "pcd" else None
        return self._kind()(self.dbn, self.index, s, rows=self._widest(s.batch), chains=chains)

    def _network_to_try(self) -> Phase:
        """The phase of fine-tuning, with a new network in this run's stack."""
        self.dbn.classifier = self.dbn.autoencoder = None
        return self._finetuning(self._widest(self._batch()))

    def _fits(self, index: int) -> bool:
        """Whether the parameters of a layer fit on the chip of this GPU."""
        rbm = self.dbn.layers[index]
        return self.dbn.xp is not np and cuda.gpu().cd_run_fits(
            rbm.n, rbm.m, self.settings.batch, momentum=any(self.settings.momentum))

    def _large(self, index: int) -> dict[str, Any]:
        """What decides whether a layer is large for this GPU."""
        if self.dbn.xp is np or index >= self.depth:
            return {}
        rbm, rows, gpu = self.dbn.layers[index], self.settings.batch, cuda.gpu()
        return {"architecture": gpu.architecture, "processors": gpu.processors,
                "tiles": min(tiles(rows, rbm.n), tiles(rows, rbm.m), tiles(rbm.n, rbm.m))}

    def _make_graphs(self, phase: Phase, feed: Feed) -> Graphs | None:
        """What repeats turns, if this phase's path is that."""
        if not self.paths[self.index].graph:
            return None

        def launch(count: int, clock: Array, turn: Array) -> None:
            for update in range(count):
                (piece,) = self._pieces(phase, Span(update * phase.batch, phase.batch, turn))
                phase.update(feed, piece._replace(update=update, clock=clock))

        return Graphs(self.dbn.xp, launch)

    def _update(self, phase: Phase, feed: Feed, positions: Any) -> None:
        """One update with the rows of one batch: the global one, or an asynchronous replica's."""
        pieces = self._pieces(phase, positions)
        if self.settings.order == "fixed":
            for piece, partial in zip(pieces, self._buffers(phase, len(pieces)), strict=True):
                phase.sums(partial, feed, piece)
            sums = self._buffers(phase, len(pieces) + 1)[-1]
            self.exchange.add_in_order_(sums, self._buffers(phase, len(pieces)))
            phase.step(sums, len(positions))
        elif self.exchange.cuts_batches:
            (sums,) = self._buffers(phase, 1)
            phase.sums(sums, feed, pieces[0])
            self.exchange.add_(sums)
            phase.step(sums, len(positions))
        elif self._in_portions(self.index):
            assert isinstance(phase, FinetunePhase)
            s, portion, (piece,) = self.settings, phase.portion, pieces
            self.exchange.search(phase.parameters, phase.total, lambda first, end: portion(feed, piece, first, end),
                                 len(positions), method=s.optimiser, history=s.history, searches=s.line_searches,
                                 portions=s.portions)
        elif len(positions):
            phase.update(feed, pieces[0])
        self.updates += 1

    def _buffers(self, phase: Phase, count: int) -> list[Array]:
        """Vectors for the phase's sums, allocated once."""
        if not self._vectors or self._vectors[0].size != phase.exchanged:
            self._vectors = []
        while len(self._vectors) < count:
            self._vectors.append(self.dbn.xp.empty(phase.exchanged, np.float32))
        return self._vectors[:count]

    # -- who takes which rows ---------------------------------------------------------------------

    def _set(self, index: int) -> DataSet:
        return self.data if index < self.depth else self.labelled

    def _in_portions(self, index: int) -> bool:
        """Whether replicas compute portions of batches in a phase, whose optimiser is somewhere else."""
        return index >= self.depth and self.settings.optimiser in BATCH_OPTIMISERS and self.exchange.gives_portions

    @property
    def _own_rows(self) -> bool:
        """Whether each replica learns from rows of its own in the current phase."""
        return self.exchange.shards_rows and not self._in_portions(self.index)

    def _shard(self, index: int) -> Rows:
        """The rows this replica learns from in a phase: its shard, or all of them where batches are cut."""
        rows, own = self._set(index).train, self.exchange.shards_rows and not self._in_portions(index)
        return rows.shard(self.exchange.replica, self.exchange.replicas) if own else rows

    def _first_row(self) -> int:
        """Row number of the first row of a batch, for the draws."""
        return replica_row(self.exchange.replica) if self._own_rows else 0

    def _chain_range(self, batch: int) -> tuple[int, int]:
        """Which of the ``batch`` persistent chains are this replica's: from, to."""
        pieces = self._cut(batch, batch)
        return (pieces[0][0], pieces[-1][1]) if pieces else (0, 0)

    def _widest(self, batch: int) -> int:
        """The most rows of one piece; a short batch may cut a row more for a replica than a full one does."""
        if self.settings.order == "fixed":
            return -(-batch // BLOCKS)
        return -(-batch // self.exchange.replicas) if self.exchange.cuts_batches else batch

    def _cut(self, batch: int, rows: int) -> list[tuple[int, int]]:
        """This replica's pieces of a batch of size ``batch`` of which only ``rows`` rows are there."""
        r, of = self.exchange.replica, self.exchange.replicas
        if self.settings.order == "fixed":  # blocks of constant size, whatever the number of replicas
            size = -(-batch // BLOCKS)
            count = -(-batch // size)
            return [(min(i * size, rows), min((i + 1) * size, rows))
                    for i in range(count * r // of, count * (r + 1) // of)]
        return [(rows * r // of, rows * (r + 1) // of)] if self.exchange.cuts_batches else [(0, rows)]

    def _pieces(self, phase: Phase, positions: Any) -> list[Piece]:
        base, weight = self._first_row(), 1.0
        data = self._cut(phase.batch, len(positions))
        chains = data
        if phase.chains is not None:
            chains = self._cut(phase.batch, phase.batch)
            weight = len(positions) / phase.batch
        start = chains[0][0] if chains else 0
        return [Piece(positions[lo:hi], self.updates, base + lo, slice(first - start, last - start), base + first,
                      weight) for (lo, hi), (first, last) in zip(data, chains, strict=True)]

    # -- looking at it ----------------------------------------------------------------------------

    def _note(self, phase: Phase) -> None:
        """Note if the parameters are not finite; look at once where it costs nothing, or others would get them."""
        twins_of(phase.parameters).note_not_finite(self.flag, phase.parameters, phase=self.index, update=self.updates)
        if self.dbn.xp is np or self.exchange.replicas > 1:
            self._look()

    def _look(self) -> None:
        """Raise NonFiniteError if parameters were not finite at the end of a turn. Waits for a GPU."""
        found = self.dbn.shards.least(int(to_cpu(self.flag)[0]))
        if found != FINITE:
            index, update = found >> 32, found % 2**32
            where = f"layer {index + 1}" if index < self.depth else "fine-tuning"
            raise NonFiniteError(f"{where}: parameters must stay finite; got NaN or infinity by update {update}. "
                                 "Lower the learning rate; the last checkpoint is from before")

    def _totals(self, phase: Phase, sets: list[tuple[Rows, int]]) -> list[np.ndarray]:
        """The phase's measures, averaged over the first rows of each set: computed by all replicas together.

        Blocks are of constant size and their sums are added in their order: the same bits for any
        number of replicas.
        """
        blocks = [(i, rows, np.arange(lo, min(lo + MEASURED, count)))
                  for i, (rows, count) in enumerate(sets) for lo in range(0, count, MEASURED)]
        while True:
            sums = self.dbn.xp.zeros((len(blocks), len(phase.measures)))
            living = self.exchange.living
            with self.exchange.tally.timing("measuring"):
                for number in range(living.index(self.exchange.replica), len(blocks), len(living)):
                    _, rows, positions = blocks[number]
                    for i, value in enumerate(phase.measure(rows, positions)):
                        sums[number, i] = value
                table = self.exchange.total(to_cpu(sums))
            if self.exchange.living == living:  # or else the blocks of one that was lost are missing
                break
        means = []
        for i, (_, count) in enumerate(sets):
            total = np.zeros(len(phase.measures))
            for number, (of_set, _, _) in enumerate(blocks):
                if of_set == i:
                    total += table[number]
            means.append(total / max(count, 1))
        return means

    def _measure(self, phase: Phase) -> dict[str, float | None]:
        data = self._set(self.index)
        held = len(data.validation) if phase.layer is None else min(len(data.validation), PROBE)
        sets = [("train", data.train, min(len(data.train), PROBE)), ("validation", data.validation, held)]
        found = self._totals(phase, [(rows, count) for _, rows, count in sets])
        return {f"{name}_{part}": float(mean[i]) if count else None
                for (part, _, count), mean in zip(sets, found, strict=True) for i, name in enumerate(phase.measures)}

    def _remember(self, phase: Phase, record: dict[str, Any]) -> None:
        """Whether this epoch was the best so far on the validation rows."""
        value = [record[f"{name}_validation"] for name in phase.better]
        if None in value or not phase.patience:
            return
        if self.best["value"] is None or value < self.best["value"]:
            self.best = {"value": value, "epoch": self.epoch}
            if phase.keeps_best:
                self.best_parameters = phase.parameters.copy()

    def _test(self) -> dict[str, Any]:
        """The last record: errors of the classifier on the test rows, or the reconstruction by the top layer."""
        s = self.settings
        test = self._set(self.phases - 1).test
        phase: Phase
        if self.phases > self.depth:
            phase = self._finetuning(rows=1)
        else:
            phase = LayerPhase(self.dbn, self.depth - 1, s, rows=1, chains=None)
        (mean,) = self._totals(phase, [(test, len(test))])
        values = dict(zip(phase.measures, mean.tolist(), strict=True)) if len(test) else {}
        return {"phase": "test", "update": self.updates, "rows": len(test), **values, "seconds": round(self.seconds, 3)}

    # -- stopping and going on --------------------------------------------------------------------

    def state(self) -> tuple[dict[str, np.ndarray | Pieces], dict[str, Any]] | None:
        """Everything needed to go on as if never stopped: arrays and metadata. All replicas call it; the chief gets it.

        Parameters and, between synchronous replicas, velocities are the same everywhere; chains, and
        the velocities of replicas on rows of their own, are collected from each. What shards hold comes in pieces,
        which the other shards of the chief's replica give in here: it has to write them before all else.
        """
        self._look()
        own: dict[str, np.ndarray] = {}
        if self.phase is not None:
            own = {f"phase.{name}": to_cpu(array) for name, array in self.phase.state().items()}
            if self.paths[self.index].rivals or self.exchange.shards_rows:  # collected from each, whatever its device
                own["phase.path"] = np.frombuffer(f"{self.paths[self.index]}".encode(), np.uint8)
            if self.exchange.shards_rows:
                common, separate = self.exchange.state()
                own = self._collected(own | {f"phase.{name}": to_cpu(array) for name, array in separate.items()})
                own |= {f"phase.{name}": to_cpu(array) for name, array in common.items()}
            if self.phase.chains is not None:
                own |= self._collected({"phase.chains": to_cpu(self.phase.chains)})
            if self.best_parameters is not None:
                own["phase.best"] = to_cpu(self.best_parameters)
        shards = self.dbn.shards
        if not self.exchange.first:
            return None
        found = self.dbn.pieces()
        for name, array in own.items():
            found |= {f"{name}#{part}": each for part, each in enumerate(shards.each(array))
                      } if shards.count > 1 else {name: array}
        if shards.index:
            go_along(found)
            return None
        return found, {"index": self.index, "epoch": self.epoch, "position": self.position,
                       "updates": self.updates, "best": self.best, "seconds": self.seconds,
                       "replicas": self.exchange.replicas, "shards_rows": self.exchange.shards_rows,
                       "shards": shards.count}

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """Which part of a checkpoint's array is for this shard, or None: see ``checkpoint.Reader.read``."""
        if not name.startswith("phase."):
            return self.dbn.part(name, shape)
        return () if name.partition("#")[2] in ("", str(self.dbn.shards.index)) else None

    def _collected(self, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, array in own.items():
            arrays = self.exchange.collect(array) or []
            found |= {f"{name}@{replica}": a for replica, a in zip(self.exchange.living, arrays, strict=False)}
        return found

    def restore(self, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        """Take up what ``state`` gave, on every replica, before ``run``. One that was lost then takes another's part.

        Of replicas that are cut, each shard is given what ``part`` says.

        Raises
        ------
        UserError
            If the run had another number of replicas on rows of their own, whose velocities and chains are their own.
        """
        shards, part = self.exchange.shards_rows, self.dbn.shards
        if (meta["shards_rows"], meta.get("shards", 1)) != (shards, part.count) or (
                shards and meta["replicas"] != self.exchange.replicas):
            was = (f"{meta['replicas']} replicas" + (" on rows of their own" if meta["shards_rows"] else "") +
                   (f" in {meta['shards']} parts each" if meta.get("shards", 1) > 1 else ""))
            raise UserError(f"--resume: must have the ranks it was started with; got {self.exchange.replicas} "
                            f"replicas for a run with {was}. Use the same mpirun -n")
        self.index, self.epoch, self.position = meta["index"], meta["epoch"], meta["position"]
        self.updates, self.best, self.seconds = meta["updates"], meta["best"], meta["seconds"]
        self.dbn.set_arrays({name: a for name, a in arrays.items() if not name.startswith("phase.")}, whole=False)
        kept: dict[str, np.ndarray] = {}
        arrays = {name.partition("#")[0]: array for name, array in arrays.items()}
        kept_of = {int(name.partition("@")[2]) for name in arrays if "@" in name}
        one = self.exchange.replica if self.exchange.replica in kept_of else min(kept_of, default=0)
        for name in sorted(arrays):
            if not name.startswith("phase."):
                continue
            base, _, replica = name[len("phase."):].partition("@")
            if not replica or (shards and int(replica) == one):
                kept[base] = arrays[name]
        if "phase.chains@0" in arrays and not shards:
            every = [arrays[f"phase.chains@{r}"] for r in range(meta["replicas"])]
            low, high = self._chain_range(self.settings.batch)
            kept["chains"] = np.concatenate(every)[low:high]
        self._phase_arrays = kept
