"""Fine-tuning by back-propagation through mean-field layers; here with a softmax on top, for labels.

    a_0 = v,  a_l = sigmoid(a_{l-1} W_l + c_l),  p = softmax(a_L W + c)

Bengio et al. (2007), section 2.3 and algorithm 3 of the talk; dropout as in Srivastava et al.
(2014), section 4, scaled in training so that prediction needs no change. Gradients point uphill,
towards lower cross-entropy. Generic over NumPy and CuPy, and over layers in one or several parts
(``shards.py``): activations are gathered on the way up, logits and errors summed. Of what follows the stack (a
softmax layer, or an autoencoder's way down) a shard has the rows of its units: there sums cross on the way up, and
errors are gathered.

With ``--optimiser lbfgs`` or ``cg`` an update is some line searches on its batch (``batch.py``), which is large and
goes through the network block by block; what is dropped out stays the same within an update. Around parameter servers
replicas compute portions of it instead (``mpi/sandblaster.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.batch import Arrays, Iteration, Minimiser
from gpudbn.dbn import DBN, threshold
from gpudbn.draws import Purpose, site
from gpudbn.feed import Source
from gpudbn.memory import AT_ONCE_ROWS
from gpudbn.optimiser import Adagrad, Adam, Momentum, StepRule, schedule
from gpudbn.parameters import Parameters
from gpudbn.precision import BLOCKS
from gpudbn.pretrain import Phase, Piece
from gpudbn.rbm import RBM, product
from gpudbn.settings import BATCH_OPTIMISERS, Settings
from gpudbn.twins import twins_of


def step_rule(settings: Settings, parameters: Array) -> StepRule | None:
    """The step rule of ``--optimiser``; None where it is a batch optimiser."""
    if settings.optimiser in BATCH_OPTIMISERS:
        return None
    if settings.optimiser == "adam":
        return Adam(parameters, decay=settings.finetune_decay)
    if settings.optimiser == "adagrad":
        return Adagrad(parameters, decay=settings.finetune_decay)
    return Momentum(parameters, momentum=settings.finetune_momentum, decay=settings.finetune_decay)


class FinetunePhase(Phase):
    """Fine-tuning of the whole network.

    Parameters
    ----------
    dbn : DBN
        Its ``classifier`` is trained; made from the layers if there is none for so many classes.
    classes : int
    rows : int
        The most rows of one piece.
    """

    name = "finetune"
    layer = None
    chains = None
    factors = None
    keeps_best = True
    better: tuple[str, ...] = ("error", "loss")
    measures: tuple[str, ...] = ("loss", "error")

    def __init__(self, dbn: DBN, classes: int, settings: Settings, *, rows: int) -> None:
        fits = dbn.classifier is not None and dbn.classifier[f"c{len(dbn.layers)}"].size == classes
        net = dbn.classifier if dbn.classifier is not None and fits else dbn.new_classifier(classes)
        self._build(dbn, settings, net, [*dbn.sizes, classes], rows)

    def _build(self, dbn: DBN, settings: Settings, net: Parameters, units: list[int], rows: int) -> None:
        """Room for a network with these units a level: level 0 is the data, the last the output."""
        self.dbn, self.settings, self.xp, self.shards = dbn, settings, dbn.xp, dbn.shards
        self.net, self.units, self.depth = net, units, len(units) - 2  # levels 1 to depth are hidden
        self.stack = len(dbn.layers)  # levels up to this one are those of the stack
        self.parameters = self.net.flat
        self.exchanged = self.parameters.size
        self.weights = sum(self.net[f"W{i}"].size for i in range(self.depth + 1))
        self.epochs, self.patience = settings.finetune_epochs, settings.finetune_patience
        self.batch = settings.finetuning_batch
        self.rule = step_rule(settings, self.parameters)
        self.gradient = Parameters(self.net.shapes, self.xp)
        if self.rule is None:
            rows = min(rows, AT_ONCE_ROWS)
            self.total = self.xp.empty_like(self.parameters)
            self.minimiser = Minimiser(Arrays(self.parameters, self.total, self._objective), settings.optimiser,
                                       history=settings.history)
        # in the levels of the stack there are a shard's own units, in those behind it all
        widths = [units[0], *(rbm.width for rbm in dbn.layers), *units[self.stack + 1 :]]
        self.activations = [self.xp.empty((rows, width), np.float32) for width in widths]
        self.deltas = [self.xp.empty((rows, width), np.float32) for width in widths[1:]]
        self.crossing = self._crossing(rows)
        self.losses = self.xp.empty(rows, np.float32)
        self.twins = twins_of(self.parameters)
        self.precision = dbn.sums
        self.rate = 0.0

    def _crossing(self, rows: int) -> dict[int, Array]:
        """Where layers are cut, by level: what feeds the next one, all units in the stack and a shard's own behind it.

        Or those that a local layer sees. On the way back the errors that come down to them. Level ``stack`` has its own
        and feeds by them.
        """
        levels = [level for level in range(1, self.depth + 1) if level != self.stack] if self.shards.count > 1 else []
        return {level: self.xp.empty((rows, self.dbn.layers[level].height if level < self.stack else
                                      self._below(level).width), np.float32) for level in levels}

    def _below(self, level: int) -> RBM:
        """The layer whose hidden units a level has."""
        return self.dbn.layers[level - 1 if level <= self.stack else 2 * self.stack - 1 - level]

    def state(self) -> dict[str, Array]:
        """What a checkpoint keeps besides the parameters. A batch optimiser begins anew with every batch."""
        return self.rule.state if self.rule else {}

    def begin_epoch(self, epoch: int) -> dict[str, float]:
        """Set the rate of epoch ``epoch`` (from 0)."""
        s = self.settings
        self.rate = schedule(s.finetune_schedule, s.finetune_learning_rate, s.finetune_learning_rate_end, epoch,
                             self.epochs)
        return {"learning_rate": self.rate}

    def _keep(self, level: int) -> float:
        return 1 - (self.settings.dropout if level else self.settings.input_dropout)

    def _drop(self, x: Array, level: int, piece: Piece) -> None:
        """x <- x [u < keep] / keep: the units of level ``level`` (0: data) that take part in this update."""
        keep = self._keep(level)
        if keep < 1:
            self.twins.dropout(x, keep, seed=self.settings.seed, update=piece.update,
                               site=site(Purpose.DROPOUT, level), row=piece.row,
                               **(self._columns(level) if level else {}))

    def _columns(self, level: int) -> dict[str, int]:
        """Which units of a hidden level are here, for their draws."""
        return self.dbn.layers[level - 1].columns if level <= self.stack else {}

    def _forward(self, a: list[Array], crossing: dict[int, Array], piece: Piece | None) -> list[Array]:
        """Fill a[1:] from a[0]; the last become the output without its bias. Dropout only if there is a piece.

        Returns what feeds each layer, in ``crossing`` where layers are cut.
        """
        if piece is not None:
            self._drop(a[0], 0, piece)
        inputs = [self.dbn.layers[0].see(a[0])]
        for level in range(1, self.depth + 1):
            self._activate(level, a[level], inputs[-1])
            if piece is not None:
                self._drop(a[level], level, piece)
            if level < self.stack:
                inputs.append(self.dbn.layers[level].gather(a[level], out=crossing.get(level)))
            elif level in crossing:
                crossing[level][...] = a[level][:, self._below(level).mine]
                inputs.append(crossing[level])
            else:
                inputs.append(a[level])
        self.shards.product_(a[-1], inputs[-1], self.net[f"W{self.depth}"], self.precision)
        return inputs

    def begin_turn(self) -> None:
        """Updates use the parameters where they are."""

    def align(self) -> None:
        """Biases of what is not cut, of the first shard: of the softmax; of an autoencoder on its way down."""
        self.shards.first_(self.parameters[self.net.offsets[f"c{len(self.dbn.layers)}"] :])

    def sums(self, out: Array, rows: Source, piece: Piece, losses: Array | None = None) -> None:
        """``out`` (size,) <- the sum over rows of the gradient of minus the loss; ``losses`` (rows,) <- those."""
        count, xp = len(piece.positions), self.xp
        if not count:
            out[...] = 0
            return
        gradient = self.gradient if out is self.gradient.flat else Parameters(self.net.shapes, flat=out)
        a = [x[:count] for x in self.activations]
        rows.take(piece.positions, a[0])
        if self.settings.binarise == "threshold":
            threshold(a[0])
        crossing = {level: x[:count] for level, x in self.crossing.items()}
        targets = self._targets(rows, piece.positions, a[0])
        inputs = self._forward(a, crossing, piece)
        delta = self.deltas[-1][:count]
        self._compare(delta, losses, None, a[-1], targets)
        for i in range(self.depth, -1, -1):
            W, dW, by_rows = self.net[f"W{i}"], gradient[f"W{i}"], i >= self.stack
            if by_rows and self.precision == BLOCKS:
                product(dW.T, delta.T, inputs[i], BLOCKS)
            elif by_rows:
                product(dW, inputs[i].T, delta, self.precision)
            else:
                self.dbn.layers[i].gradient(dW, inputs[i], delta, self.precision)
            xp.sum(delta, axis=0, out=gradient[f"c{i}"])
            if i:
                below = self.deltas[i - 1][:count]
                if not by_rows:
                    self.dbn.layers[i].product_back(crossing.get(i, below), delta, W, self.precision)
                    if i in crossing:
                        below[...] = self.dbn.layers[i].own(crossing[i])
                else:  # the errors of the units here
                    product(crossing.get(i, below), delta, W.T, self.precision)
                    if i in crossing:
                        self.shards.gather(crossing[i], self.units[i], out=below)
                delta = self._backward(below, a[i], i)

    def _targets(self, rows: Source, positions: Any, x: Array) -> Array:  # noqa: ARG002
        """What the output is compared with, of rows whose data are ``x``: here their labels."""
        return self.xp.asarray(rows.take_labels(positions))

    def _compare(self, delta: Array | None, loss: Array | None, second: Array | None, x: Array, targets: Array) -> None:
        """delta <- minus the gradient of the loss in the pre-activations x; loss and the second measure of each row."""
        self.twins.cross_entropy(delta, loss, second, x, self.net[f"c{self.depth}"], targets)

    def _activate(self, level: int, out: Array, inputs: Array) -> None:
        """out <- the units of a level, from those below."""
        W, c = self.net[f"W{level - 1}"], self.net[f"c{level - 1}"]
        if level > self.stack and (self.crossing or self.precision == BLOCKS):
            self.shards.product_(out, inputs, W, self.precision)
            self.twins.activate(None, out, out, c)
        elif level > self.stack:
            self.twins.half_step(None, out, inputs, W, c, precision=self.precision)
        else:
            self.dbn.layers[level - 1].up_by(None, out, inputs, W, c, self.precision)

    def _backward(self, delta: Array, a: Array, level: int) -> Array:
        """delta, in place, from behind the units of a level to before them."""
        return self.twins.sigmoid_backward(delta, a, keep=self._keep(level))

    def step(self, sums: Array, count: int) -> None:
        """One step of the optimiser with sums over ``count`` rows."""
        assert self.rule is not None
        self.rule.step(self.parameters, sums, weights=self.weights, scale=1 / count, rate=self.rate)

    def update(self, rows: Source, piece: Piece) -> None:
        """``sums`` and ``step`` in one; or the line searches on this batch."""
        if self.rule is None:
            for _ in self.search(rows, piece):
                pass
            return
        self.sums(self.gradient.flat, rows, piece)
        self.step(self.gradient.flat, len(piece.positions))

    def search(self, rows: Source, piece: Piece) -> Iterator[Iteration]:
        """The line searches of a batch optimiser on one batch."""
        self._given = rows, piece
        self.minimiser.forget()
        yield from self.minimiser.run(self.settings.line_searches)

    def _objective(self) -> float:
        """Mean loss of the batch with its decay; the gradient of that goes to ``total``."""
        rows, piece = self._given
        count = len(piece.positions)
        loss = self.portion(rows, piece, 0, count)
        self.xp.multiply(self.total, np.float32(-1 / count), out=self.total)
        return loss / count

    def portion(self, rows: Source, piece: Piece, first: int, end: int) -> float:
        """``total`` <- as ``sums``, of the rows from ``first`` to before ``end`` of a piece, each with its decay.

        Returns the sum of their losses.
        """
        loss = 0.0
        self.total.fill(0)
        for lo in range(first, end, len(self.losses)):
            part = piece._replace(positions=piece.positions[lo : min(lo + len(self.losses), end)], row=piece.row + lo)
            losses = self.losses[: len(part.positions)]
            self.sums(self.gradient.flat, rows, part, losses)
            self.xp.add(self.total, self.gradient.flat, out=self.total)
            loss += float(losses.sum(dtype=np.float64))
        decay, weights = (end - first) * self.settings.finetune_decay, self.parameters[: self.weights]
        if decay:
            self.total[: self.weights] -= np.float32(decay) * weights
            loss += decay / 2 * float((weights * weights).sum(dtype=np.float64))
        return loss

    def measure(self, rows: Source, positions: np.ndarray) -> list[Any]:
        """Sums over the rows of both ``measures``: nats, and wrong answers; no dropout."""
        x = self.xp.empty((len(positions), self.dbn.sizes[0]), np.float32)
        rows.take(positions, x)
        if self.settings.binarise == "threshold":
            threshold(x)
        a = [x] + [self.xp.empty((len(x), d.shape[1]), np.float32) for d in self.deltas]
        self._forward(a, self._crossing(len(x)), None)
        loss, second = (self.xp.empty(len(x), np.float32) for _ in range(2))
        self._compare(None, loss, second, a[-1], self._targets(rows, positions, x))
        return [loss.sum(dtype=np.float64), second.sum(dtype=np.float64)]
