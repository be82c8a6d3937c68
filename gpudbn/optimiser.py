"""Step rules: how a sum of gradients changes flat parameters. They know vectors, not models.

Gradients point uphill (towards a better model) and are sums over rows; ``scale`` is one over the
number of rows. The first ``weights`` entries of the vector decay, the biases behind them do not.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.reference import PIECE
from gpudbn.twins import twins_of


class StepRule(Protocol):
    """What training wants of a step rule; ``state`` is what a checkpoint has to keep."""

    state: dict[str, Array]

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """Change ``parameters`` (size,), float32, in place. ``gradient`` may be used as work space."""


class Momentum:
    """Classical momentum with L2 decay: ``reference.momentum_step``. Hinton (2012), sections 9 and 10."""

    def __init__(self, like: Array, *, momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        self.state = {"velocity": module_of(like).zeros_like(like)}

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """velocity <- momentum velocity + rate (scale gradient - decay W);  parameters += velocity."""
        twins_of(parameters).momentum_step(parameters, self.state["velocity"], gradient, weights=weights, scale=scale,
                                           rate=rate, momentum=self.momentum, decay=self.decay)


class Adam:
    """Adam with decoupled decay. Kingma & Ba (2015), algorithm 1, epsilon as in its section 2's last paragraph.

        g = scale gradient;  m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) g^2
        W <- W - rate decay W;  parameters += rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(s) + eps)

    ``state["steps"]`` holds t, as an array of one.
    """

    def __init__(self, like: Array, *, decay: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        xp = module_of(like)
        self.decay, self.b1, self.b2, self.eps = decay, b1, b2, eps
        self.state = {"mean": xp.zeros_like(like), "square": xp.zeros_like(like), "steps": np.zeros(1, np.int64)}
        # the CPU works in pieces that stay in its cache, a GPU on the whole
        self.piece = PIECE if xp is np else like.size
        self.work = xp.empty(min(self.piece, like.size), np.float32)

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """One Adam step; ``gradient`` is used as work space."""
        xp = module_of(parameters, gradient)
        self.state["steps"] += 1
        t = int(self.state["steps"][0])
        step = np.float32(rate * np.sqrt(1 - self.b2**t) / (1 - self.b1**t))
        f = np.float32
        for start in range(0, parameters.size, self.piece):
            p, g, m, s = (a[start : start + self.piece]
                          for a in (parameters, gradient, self.state["mean"], self.state["square"]))
            w = self.work[: p.size]
            # m += (1 - b1) (scale g - m): one pass fewer than the formula above
            xp.multiply(g, f(scale), out=g)
            xp.multiply(g, g, out=w)
            xp.subtract(g, m, out=g)
            xp.multiply(g, f(1 - self.b1), out=g)
            xp.add(m, g, out=m)
            xp.subtract(w, s, out=w)
            xp.multiply(w, f(1 - self.b2), out=w)
            xp.add(s, w, out=s)
            xp.sqrt(s, out=w)
            xp.add(w, f(self.eps), out=w)
            xp.divide(m, w, out=w)
            xp.multiply(w, step, out=w)
            decaying = min(max(weights - start, 0), p.size)
            if self.decay and decaying:
                xp.multiply(p[:decaying], f(1 - rate * self.decay), out=p[:decaying])
            xp.add(p, w, out=p)


def schedule(name: str, rate: float, end: float, epoch: int, epochs: int) -> float:
    """The rate of an epoch: from ``rate`` in the first to ``rate * end`` in the last.

    >>> [schedule("linear", 1.0, 0.5, epoch, 3) for epoch in range(3)]
    [1.0, 0.75, 0.5]
    """
    t = epoch / (epochs - 1) if epochs > 1 else 0.0
    if name == "constant":
        return rate
    if name == "linear":
        return rate * (1 - t * (1 - end))
    if name == "exponential":
        return float(rate * end**t)
    if name == "cosine":
        return float(rate * (end + (1 - end) * (1 + np.cos(np.pi * t)) / 2))
    raise ValueError(f"schedule: must be constant, linear, exponential or cosine; got {name}")
