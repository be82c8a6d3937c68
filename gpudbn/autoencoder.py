"""Fine-tuning of the unrolled stack as a deep autoencoder: rows to a code, and back to the rows.

    a_0 = v,   a_l = sigmoid(a_{l-1} W_l + c_l),   p = sigmoid(a_{2L-1} W_{2L} + c_{2L})
    loss = sum_i softplus(x_i) - v_i x_i     the cross-entropy of a row, in nats; x = pre-activations of p

Layer l of the stack begins both the l-th way up and, transposed, the l-th way down; then the two go their own ways.
Level L is the code: sigmoid units as pretrained (``--code logistic``), or linear ones (``linear``), which
begin as the tangent of those at 0. Hinton & Salakhutdinov (2006), "Reducing the dimensionality of data with neural
networks": their code units are linear, their optimiser is ``--optimiser cg`` with three line searches on each
batch of 1000 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.dbn import DBN, product
from gpudbn.feed import Source
from gpudbn.finetune import FinetunePhase
from gpudbn.settings import Settings


class AutoencoderPhase(FinetunePhase):
    """Fine-tuning of the stack, unrolled.

    Parameters
    ----------
    dbn : DBN
        Its ``autoencoder`` is trained; made from the layers if there is none.
    rows : int
        The most rows of one piece.
    """

    name = "autoencoder"
    better = ("loss",)
    measures = ("loss", "squared_error")

    def __init__(self, dbn: DBN, settings: Settings, *, rows: int) -> None:
        net = dbn.autoencoder if dbn.autoencoder is not None else dbn.new_autoencoder(settings.code)
        self._build(dbn, settings, net, [*dbn.sizes, *reversed(dbn.sizes[:-1])], rows)
        self.code = len(dbn.layers)  # its level
        self.linear = dbn.about["code"] == "linear"
        self.targets = self.xp.empty_like(self.activations[0])

    def _targets(self, rows: Source, positions: Any, x: Array) -> Array:  # noqa: ARG002
        """The rows as they are before anything is dropped out."""
        targets = self.targets if len(x) <= len(self.targets) else self.xp.empty_like(x)
        targets[: len(x)] = x
        return targets[: len(x)]

    def _compare(self, delta: Array | None, loss: Array | None, second: Array | None, x: Array, targets: Array) -> None:
        """delta <- v - p;  loss <- the cross-entropy;  second <- |v - p|^2, of each row. ``x`` becomes p."""
        xp = self.xp
        x += self.net[f"c{self.depth}"]
        if loss is not None:
            terms = xp.logaddexp(np.float32(0), x)
            terms -= targets * x
            loss[: len(x)] = terms.sum(axis=1, dtype=np.float64)
        p = self.twins.sigmoid(x)
        if second is not None:
            self.twins.squared_errors(second, targets, p)
        if delta is not None:
            xp.subtract(targets, p, out=delta)

    def _keep(self, level: int) -> float:
        return 1.0 if level == self.code and self.linear else super()._keep(level)

    def _activate(self, level: int, out: Array, inputs: Array) -> None:
        if level == self.code and self.linear:
            product(out, inputs, self.net[f"W{level - 1}"], self.precision)
            out += self.net[f"c{level - 1}"]
        else:
            super()._activate(level, out, inputs)

    def _backward(self, delta: Array, a: Array, level: int) -> Array:
        return delta if level == self.code and self.linear else super()._backward(delta, a, level)
