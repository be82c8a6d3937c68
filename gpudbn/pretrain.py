"""Greedy layer-wise pretraining: one layer of the stack as a phase of training.

Layer l is trained as an RBM on the activations of layer l - 1, which are computed batch by batch
on the way up and never held for the whole data set. Hinton, Osindero & Teh (2006), section 4;
Bengio et al. (2007), algorithm 2.

A phase is what ``loop.py`` repeats: it owns flat parameters, computes the sums of gradients over
some rows (``sums``), takes a step with them (``step``), does both at once where nothing has to be
exchanged between (``update``), and measures itself on rows it is given (``measure``).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpudbn.arrays import Array
from gpudbn.data import Rows
from gpudbn.dbn import DBN, threshold
from gpudbn.draws import Purpose, site
from gpudbn.factors import Factors
from gpudbn.feed import Source
from gpudbn.offsets import Offsets
from gpudbn.optimiser import schedule
from gpudbn.parameters import Parameters
from gpudbn.rbm import Contrast, Estimator
from gpudbn.settings import Settings
from gpudbn.twins import twins_of


class Piece(NamedTuple):
    """The rows of one update that one computation takes, and where they stand in the global batch."""

    positions: Any  # which rows of the training data: array (B,), or a ``feed.Span``
    update: int  # number of the update
    row: int  # position of the first row in the global batch: address of its draws
    chains: slice  # PCD: which of this replica's chains go along
    chain_row: int  # PCD: the number of the first of them
    model_weight: float  # PCD: rows of the global batch over chains in all; 1 for CD
    clock: Array | None = None  # in a CUDA graph: array (1,), uint32, in device memory, to be added to ``update``


class Phase(Protocol):
    """What ``loop.py`` knows of a phase."""

    name: str
    layer: int | None
    epochs: int
    batch: int
    patience: int
    keeps_best: bool
    better: tuple[str, ...]  # the measures whose fall on the validation rows is progress; ties go to the next
    parameters: Array
    exchanged: int  # entries of ``sums``
    chains: Array | None
    factors: Factors | None  # where the updates of a turn are noted as what made them, if somebody wants that
    measures: tuple[str, ...]

    def state(self) -> dict[str, Array]:
        """What a checkpoint keeps besides parameters and chains."""
        ...

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Set the rates of epoch ``epoch`` (from 0); returns them for the record."""
        ...

    def begin_turn(self) -> None:
        """Updates follow; since the last ones others may have changed the parameters."""
        ...

    def align(self) -> None:
        """Parameters that several shards have, of one of which they are: make them its on all."""
        ...

    def sums(self, out: Array, rows: Source, piece: Piece) -> None:
        """``out`` (exchanged,) <- sums over the rows of a piece: the gradient, uphill, and what more ``step`` needs."""
        ...

    def step(self, sums: Array, count: int) -> None:
        """Change the parameters by sums over ``count`` rows."""
        ...

    def update(self, rows: Source, piece: Piece) -> None:
        """``sums`` and ``step`` in one."""
        ...

    def measure(self, rows: Source, positions: np.ndarray) -> list[Any]:
        """Sums of each of ``measures`` over these rows; no draws."""
        ...


class LayerPhase(Phase):
    """Pretraining of one layer.

    Parameters
    ----------
    dbn : DBN
        Its layers below ``layer`` are trained; the parameters of ``layer`` are modified.
    layer : int
        From 0.
    rows : int
        The most rows of one piece.
    chains : array (C, m), float32, or None
        PCD: this replica's persistent chains.
    """

    name = "pretrain"
    keeps_best = False
    better = ("reconstruction",)
    measures = ("free_energy", "reconstruction")

    def __init__(self, dbn: DBN, layer: int, settings: Settings, *, rows: int, chains: Array | None) -> None:
        self.dbn, self.layer, self.settings, self.chains = dbn, layer, settings, chains
        self.rbm = dbn.layers[layer]
        self.parameters = self.rbm.parameters.flat
        self.epochs = settings.of_layer("epochs", layer)
        self.batch, self.patience = settings.batch, settings.patience
        estimator = Estimator(settings.method, settings.k, settings.data_hidden, settings.last_hidden,
                              settings.reconstruction)
        self.contrast = self._contrast(rows, estimator)
        n, m = self.rbm.height, self.rbm.width
        centring, target = settings.centring != "off", settings.sparsity_target
        self.offsets = Offsets(n, m, len(self.contrast.v), centring=centring, target=target,
                               cost=settings.sparsity_cost, xp=dbn.xp, shards=dbn.shards
                               ) if centring or target else None
        self.exchanged = self.parameters.size + (n + m if self.offsets else 0)
        self.velocity = dbn.xp.zeros_like(self.parameters)
        # kernels keep it in registers
        self.gradient = dbn.xp.empty_like(self.parameters) if dbn.xp is np or self.rbm.local else None
        # rows of data, where they are not the visible units themselves
        whole = layer == 0 and self.rbm.height == self.rbm.n
        self.rows = None if whole else dbn.xp.empty((rows, dbn.sizes[0]), np.float32)
        # values of the layers below on the way up: visible units; and, where layers are cut, the hidden units here
        self.lower = [dbn.xp.empty((rows, rbm.height), np.float32) for rbm in dbn.layers[1:layer]]
        self.parts = [dbn.xp.empty((rows, rbm.width), np.float32) for rbm in dbn.layers[:layer] if rbm.width < rbm.m]
        self.twins = twins_of(self.parameters)
        self.factors: Factors | None = None
        self.rate = self.momentum = 0.0
        self.turn = dbn.xp.empty((0, n), np.float32)  # visible units of the updates of one launch
        self.rates = dbn.xp.zeros(3, np.float32)  # of updates that a CUDA graph repeats: of full batches

    def _contrast(self, rows: int, estimator: Estimator) -> Contrast:
        return Contrast(self.rbm, rows, estimator, seed=self.settings.seed, layer=self.layer, chains=self.chains)

    def state(self) -> dict[str, Array]:
        """What a checkpoint keeps besides parameters and chains."""
        return {"velocity": self.velocity, **(self.offsets.state if self.offsets else {})}

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Set rate and momentum of epoch ``epoch`` (from 0)."""
        s = self.settings
        rate = s.of_layer("learning_rate", self.layer)
        self.rate = schedule(s.schedule, rate, s.learning_rate_end, epoch, self.epochs)
        self.momentum = s.momentum[0] if epoch < s.momentum_epochs else s.momentum[-1]
        self.rates[...] = self.dbn.xp.asarray(
            np.array([self.rate * (1 / self.batch), self.momentum, self.rate * s.decay], np.float32))
        return {"learning_rate": self.rate, "momentum": self.momentum}

    def begin_turn(self) -> None:
        """Updates use the parameters where they are."""
        if self.factors is not None:
            self.factors.clear()

    def align(self) -> None:
        """b of the first shard, on all; of a local layer, of the one that owns the unit."""
        b, local = self.rbm.b, self.rbm.local
        if local is None:
            self.dbn.shards.first_(b)
        elif self.dbn.shards.count > 1:
            local.gather(b[None, local.owned].copy(), b[None])

    def _visible(self, out: Array, rows: Source, piece: Piece) -> None:
        """Fill ``out`` with the visible units of this layer: data, binarised, and taken up by sampling."""
        s, count, layers = self.settings, len(out), self.dbn.layers
        x = out if self.rows is None else self.rows[:count]
        rows.take(piece.positions, x)
        address = {"seed": s.seed, "update": piece.update, "row": piece.row, "clock": piece.clock}
        if s.binarise == "threshold":
            threshold(x)
        elif s.binarise == "stochastic":
            self.twins.bernoulli(x, x, site=site(Purpose.BINARISATION), **address)
        x = layers[0].see(x)
        for layer, (rbm, above) in enumerate(itertools.pairwise(layers[: self.layer + 1])):
            y = self.lower[layer][:count] if layer + 1 < self.layer else out
            h = self.parts[layer][:count] if self.parts else y
            if s.up == "sample":
                rbm.up(h, None, x, site=site(Purpose.UP, layer), **address)
            else:
                rbm.up(None, h, x)
            x = above.gather(h, out=y)
        if x is not out:
            out[...] = x

    def _fill(self, rows: Source, piece: Piece) -> tuple[Array, Array]:
        count = len(piece.positions)
        if count:
            self._visible(self.contrast.data[:count], rows, piece)
        return self.contrast.fill(count, update=piece.update, row=piece.row, chains=piece.chains,
                                  chain_row=piece.chain_row, clock=piece.clock)

    def sums(self, out: Array, rows: Source, piece: Piece) -> None:
        """``out`` (exchanged,) <- the sums of ``cd_sums`` over one piece: W, b, c; with offsets also ``moved``."""
        v, h = self._fill(rows, piece)
        shapes, size, count = self.rbm.parameters.shapes, self.parameters.size, len(piece.positions)
        parts = Parameters(shapes, flat=out[:size])
        dW, db, dc = (parts[name] for name in shapes)
        if self.rbm.local is not None:
            self.rbm.local.cd_sums(dW, db, dc, v, h, count, model_weight=piece.model_weight)
            return
        centred = self.offsets.centre(v, h, count, out[size:]) if self.offsets else {}
        self.twins.cd_sums(dW, db, dc, v, h, count, model_weight=piece.model_weight, **centred,
                           precision=self.rbm.precision)

    def step(self, sums: Array, count: int) -> None:
        """One momentum step with sums over ``count`` rows."""
        size = self.parameters.size
        self.twins.momentum_step(self.parameters, self.velocity, sums[:size], weights=self.rbm.W.size,
                                 scale=1 / count, rate=self.rate, momentum=self.momentum, decay=self.settings.decay)
        if self.offsets:
            self.offsets.step(sums[size:], count)

    def update(self, rows: Source, piece: Piece) -> None:
        """``sums`` and ``step`` in one: a single kernel on a GPU."""
        if self.rbm.local is not None:
            self.sums(self.gradient, rows, piece)
            self.step(self.gradient, len(piece.positions))
            return
        v, h = self._fill(rows, piece)
        count = len(piece.positions)
        if self.factors is not None:
            self.factors.add(v, h, count, model_weight=piece.model_weight, rate=self.rate, decay=self.settings.decay,
                             levels=None if self.layer else rows.levels)
        centred = self.offsets.centre(v, h, count) if self.offsets else {}
        self.twins.cd_update(self.parameters, self.velocity, self.gradient, self.rbm.n, self.rbm.width, v, h, count,
                             model_weight=piece.model_weight, **centred, rate=self.rate, momentum=self.momentum,
                             decay=self.settings.decay, rates=None if piece.clock is None else self.rates,
                             precision=self.rbm.precision)
        if self.offsets:
            self.offsets.step(self.offsets.moved, count)

    def run(self, rows: Source, positions: Any, first: Piece) -> None:
        """The updates of a turn in one launch (``reference.cd_run``); ``first`` is the piece of the first of them.

        Parameters
        ----------
        positions : array (count,), or a ``feed.Span``
            Which rows: minibatch after minibatch, the last of which may be short.
        """
        s, count = self.settings, len(positions)
        if count == 0:
            return
        if len(self.turn) < count:
            self.turn = self.dbn.xp.empty((count, self.rbm.n), np.float32)
        v = self.turn[:count]
        for lo in range(0, count, self.batch):  # what is drawn on the way up has its update's address
            hi = min(lo + self.batch, count)
            self._visible(v[lo:hi], rows, first._replace(positions=positions[lo:hi],
                                                         update=first.update + lo // self.batch))
        samples = s.up == "sample" if self.layer else s.binarise != "none"
        levels = 1 if samples else None if self.layer else rows.levels
        self.twins.cd_run(self.parameters, self.velocity, v, self.rbm.n, self.rbm.m, batch=self.batch,
                          chains=self.chains, k=s.k, last_hidden=s.last_hidden, levels=levels, seed=s.seed,
                          update=first.update, layer=self.layer, row=first.row, chain_row=first.chain_row,
                          rate=self.rate, momentum=self.momentum, decay=s.decay)

    def _inputs(self, rows: Source, positions: np.ndarray) -> Array:
        """Mean-field visible units of this layer for evaluation: no draws. Array (B, n)."""
        x = self.dbn.xp.empty((len(positions), self.dbn.sizes[0]), np.float32)
        rows.take(positions, x)
        return self.dbn.transform(x, self.layer)

    def measure(self, rows: Source, positions: np.ndarray) -> list[Any]:
        """Sums over the rows of the free energy, and of |v - reconstruction|^2, both mean-field; nats, units."""
        v = self.rbm.see(self._inputs(rows, positions))
        errors = self.rbm.squared_errors(v, self.rbm.reconstruct(v))
        return [self.rbm.free_energy(v).sum(dtype=np.float64), errors.sum(dtype=np.float64)]

    def visible_means(self, rows: Rows, at_most: int = 10_000, at_once: int = 500) -> Array:
        """Means of the visible units over the first rows of the data: for the initial biases. Array (n,).

        Sums are of multiples of 2^-24, exact in float64: the same bits in any order.
        """
        count, xp, steps = min(len(rows), at_most), self.dbn.xp, np.float32(2**24)
        total = sum(xp.rint(self._inputs(rows, np.arange(lo, min(lo + at_once, count))) * steps)
                    .sum(axis=0, dtype=np.float64) for lo in range(0, count, at_once))
        return (total / count / float(steps)).astype(np.float32)

    def initialise(self, rows: Rows) -> None:
        """Initial parameters: small weights, biases for the means of the units. The same on every replica."""
        means, hidden_mean = self.visible_means(rows), self.settings.sparsity_target or 0.5
        self.rbm.initialise(sd=self.settings.initial_weights, seed=self.settings.seed, layer=self.layer,
                            visible_means=means, hidden_mean=hidden_mean)
        if self.offsets:
            self.offsets.begin(means, hidden_mean)
