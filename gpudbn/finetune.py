"""Discriminative fine-tuning: softmax on top, back-propagation through mean-field layers.

    a_0 = v,  a_l = sigmoid(a_{l-1} W_l + c_l),  p = softmax(a_L W + c)

Bengio et al. (2007), section 2.3 and algorithm 3 of the talk; dropout as in Srivastava et al.
(2014), section 4, scaled in training so that prediction needs no change. Gradients point uphill,
towards lower cross-entropy. Generic over NumPy and CuPy, and over layers in one or several parts
(``shards.py``): activations are gathered on the way up, logits and errors summed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.dbn import DBN, threshold
from gpudbn.draws import Purpose, site
from gpudbn.feed import Source
from gpudbn.optimiser import Adagrad, Adam, Momentum, StepRule, schedule
from gpudbn.parameters import Parameters
from gpudbn.pretrain import Phase, Piece
from gpudbn.settings import Settings
from gpudbn.twins import twins_of


def step_rule(settings: Settings, parameters: Array) -> StepRule:
    """The step rule of ``--optimiser``."""
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
    keeps_best = True
    better = ("error", "loss")
    measures = ("loss", "error")

    def __init__(self, dbn: DBN, classes: int, settings: Settings, *, rows: int) -> None:
        self.dbn, self.settings, self.xp, self.shards = dbn, settings, dbn.xp, dbn.shards
        self.depth = len(dbn.layers)
        fits = dbn.classifier is not None and dbn.classifier[f"c{self.depth}"].size == classes
        self.net = dbn.classifier if dbn.classifier is not None and fits else dbn.new_classifier(classes)
        self.parameters = self.net.flat
        self.exchanged = self.parameters.size
        self.weights = sum(self.net[f"W{i}"].size for i in range(self.depth + 1))
        self.epochs, self.patience = settings.finetune_epochs, settings.finetune_patience
        self.batch = settings.finetune_batch or settings.batch
        self.rule = step_rule(settings, self.parameters)
        self.gradient = Parameters(self.net.shapes, self.xp)
        # level 0 is the data, level l the hidden units of layer l that are here, the last the logits
        widths = [dbn.sizes[0], *(rbm.width for rbm in dbn.layers), classes]
        self.activations = [self.xp.empty((rows, width), np.float32) for width in widths]
        self.deltas = [self.xp.empty((rows, width), np.float32) for width in widths[1:]]
        # where layers are cut: all units of the levels that feed a layer, and errors that come down to them
        cut = dbn.sizes[1:-1] if self.shards.count > 1 else []
        self.wholes = [self.xp.empty((rows, size), np.float32) for size in cut]
        self.twins = twins_of(self.parameters)
        self.rate = 0.0

    def state(self) -> dict[str, Array]:
        """What a checkpoint keeps besides the parameters."""
        return self.rule.state

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
                               **(self.dbn.layers[level - 1].columns if level else {}))

    def _forward(self, a: list[Array], wholes: list[Array], piece: Piece | None) -> list[Array]:
        """Fill a[1:] from a[0]; the last become the logits without their bias. Dropout only if there is a piece.

        Returns what feeds each layer: all units of the level below, in ``wholes`` where layers are cut.
        """
        net, inputs = self.net, [a[0]]
        if piece is not None:
            self._drop(a[0], 0, piece)
        for i in range(self.depth):
            self.twins.half_step(None, a[i + 1], inputs[i], net[f"W{i}"], net[f"c{i}"])
            if piece is not None:
                self._drop(a[i + 1], i + 1, piece)
            if i + 1 < self.depth:
                inputs.append(self.shards.gather(a[i + 1], out=wholes[i] if wholes else None))
        self.xp.matmul(a[-2], net[f"W{self.depth}"], out=a[-1])
        self.shards.sum_(a[-1])
        return [*inputs, a[-2]]

    def begin_turn(self) -> None:
        """Updates use the parameters where they are."""

    def sums(self, out: Array, rows: Source, piece: Piece) -> None:
        """``out`` (size,) <- the sum over rows of the gradient of log p(label)."""
        count, xp = len(piece.positions), self.xp
        if not count:
            out[...] = 0
            return
        gradient = self.gradient if out is self.gradient.flat else Parameters(self.net.shapes, flat=out)
        a = [x[:count] for x in self.activations]
        rows.take(piece.positions, a[0])
        if self.settings.binarise == "threshold":
            threshold(a[0])
        wholes = [x[:count] for x in self.wholes]
        inputs = self._forward(a, wholes, piece)
        delta = self.deltas[-1][:count]
        labels = xp.asarray(rows.take_labels(piece.positions))
        self.twins.cross_entropy(delta, None, None, a[-1], self.net[f"c{self.depth}"], labels)
        for i in range(self.depth, -1, -1):
            xp.matmul(inputs[i].T, delta, out=gradient[f"W{i}"])
            xp.sum(delta, axis=0, out=gradient[f"c{i}"])
            if i:
                below = self.deltas[i - 1][:count]
                if i == self.depth or not wholes:  # the softmax layer is cut by rows: its errors come to the units here
                    xp.matmul(delta, self.net[f"W{i}"].T, out=below)
                else:
                    xp.matmul(delta, self.net[f"W{i}"].T, out=wholes[i - 1])
                    self.shards.sum_(wholes[i - 1])
                    below[...] = wholes[i - 1][:, self.dbn.layers[i - 1].mine]
                delta = self.twins.sigmoid_backward(below, a[i], keep=self._keep(i))

    def step(self, sums: Array, count: int) -> None:
        """One step of the optimiser with sums over ``count`` rows."""
        self.rule.step(self.parameters, sums, weights=self.weights, scale=1 / count, rate=self.rate)

    def update(self, rows: Source, piece: Piece) -> None:
        """``sums`` and ``step`` in one."""
        self.sums(self.gradient.flat, rows, piece)
        self.step(self.gradient.flat, len(piece.positions))

    def measure(self, rows: Source, positions: np.ndarray) -> list[Any]:
        """Sums over the rows of the cross-entropy in nats, and of the wrong answers; no dropout."""
        x = self.xp.empty((len(positions), self.dbn.sizes[0]), np.float32)
        rows.take(positions, x)
        if self.settings.binarise == "threshold":
            threshold(x)
        a = [x] + [self.xp.empty((len(x), d.shape[1]), np.float32) for d in self.deltas]
        self._forward(a, [self.xp.empty((len(x), w.shape[1]), np.float32) for w in self.wholes], None)
        loss, wrong = (self.xp.empty(len(x), np.float32) for _ in range(2))
        labels = self.xp.asarray(rows.take_labels(positions))
        self.twins.cross_entropy(None, loss, wrong, a[-1], self.net[f"c{self.depth}"], labels)
        return [loss.sum(dtype=np.float64), wrong.sum(dtype=np.float64)]
