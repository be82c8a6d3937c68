"""Step rules: how a sum of gradients changes flat parameters. They know vectors, not models.

Gradients point uphill (towards a better model) and are sums over rows; ``scale`` is one over the
number of rows. The first ``weights`` entries of the vector decay, the biases behind them do not.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gpudbn.arrays import Array, is_gpu, module_of
from gpudbn.scratch import Scratch
from gpudbn.twins import twins_of

_scratch = Scratch()


class StepRule(Protocol):
    """What training wants of a step rule; ``state`` is what a checkpoint has to keep."""

    state: dict[str, Array]

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """Change ``parameters`` (size,), float32, in place. ``Adam`` uses ``gradient`` as work space."""


class SGD:
    """Plain steps: ``reference.sgd_step``."""

    def __init__(self, like: Array, *, decay: float) -> None:  # noqa: ARG002 - all rules are made alike
        self.decay = decay
        self.state: dict[str, Array] = {}

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """W <- (1 - rate decay) W;  parameters += rate scale gradient."""
        twins_of(parameters).sgd_step(parameters, gradient, weights=weights, scale=scale, rate=rate, decay=self.decay)

    def step_with_activations(self, parameters: Array, v: Array, h: Array, rows: int, *, model_weight: float = 1.0,
                              ones: Array | None = None, decay: float | None = None, rate: float) -> None:
        """``step`` with the gradient of an RBM that is not written: ``reference.cd_sgd``."""
        twins = twins_of(parameters, v, h)
        twins.cd_sgd(parameters, _work(parameters), v.shape[1], h.shape[1], v, h, rows,
                     model_weight=model_weight, ones=ones, rate=rate,
                     decay=self.decay if decay is None else decay)


class Momentum:
    """Classical momentum with L2 decay: ``reference.momentum_step``. Hinton (2012), sections 9 and 10."""

    def __init__(self, like: Array, *, momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        self.state = {"velocity": module_of(like).zeros_like(like)}

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """velocity <- momentum velocity + rate (scale gradient - decay W);  parameters += velocity."""
        twins_of(parameters).momentum_step(parameters, self.state["velocity"], gradient, weights=weights, scale=scale,
                                           rate=rate, momentum=self.momentum, decay=self.decay)

    def step_with_activations(self, parameters: Array, v: Array, h: Array, rows: int, *, model_weight: float = 1.0,
                              ones: Array | None = None, decay: float | None = None, rate: float) -> None:
        """``step`` with the gradient of an RBM that is not written: ``reference.cd_update``."""
        twins = twins_of(parameters, v, h)
        twins.cd_update(parameters, self.state["velocity"], _work(parameters), v.shape[1], h.shape[1], v, h, rows,
                        model_weight=model_weight, ones=ones, rate=rate, momentum=self.momentum,
                        decay=self.decay if decay is None else decay)


class Adagrad:
    """Every parameter at a rate of its own, that falls: ``reference.adagrad_step``. Duchi, Hazan & Singer (2011)."""

    def __init__(self, like: Array, *, decay: float) -> None:
        self.decay = decay
        self.state = {"squares": module_of(like).zeros_like(like)}

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """squares += (scale gradient)^2;  parameters += rate scale gradient / sqrt(squares)."""
        twins_of(parameters).adagrad_step(parameters, self.state["squares"], gradient, weights=weights, scale=scale,
                                          rate=rate, decay=self.decay)

    def step_with_activations(self, parameters: Array, v: Array, h: Array, rows: int, *, model_weight: float = 1.0,
                              ones: Array | None = None, decay: float | None = None, rate: float) -> None:
        """``step`` with the gradient of an RBM that is not written: ``reference.cd_adagrad``; a decay is in it."""
        twins = twins_of(parameters, v, h)
        twins.cd_adagrad(parameters, self.state["squares"], _work(parameters), v.shape[1], h.shape[1], v, h, rows,
                         model_weight=model_weight, ones=ones, rate=rate, decay=self.decay, fade=decay or 0.0)


class Adam:
    """Adam with decoupled decay: ``reference.adam_step``. Kingma & Ba (2015).

    ``state["steps"]`` holds the number of steps, as an array of one.
    """

    def __init__(self, like: Array, *, decay: float) -> None:
        xp = module_of(like)
        self.decay = decay
        self.state = {"mean": xp.zeros_like(like), "square": xp.zeros_like(like), "steps": np.zeros(1, np.int64)}

    def step(self, parameters: Array, gradient: Array, *, weights: int, scale: float, rate: float) -> None:
        """One step of ``reference.adam_step``; ``gradient`` is used as work space."""
        self.state["steps"] += 1
        twins_of(parameters).adam_step(parameters, self.state["mean"], self.state["square"], gradient, weights=weights,
                                       scale=scale, rate=rate, decay=self.decay, steps=int(self.state["steps"][0]))


def _work(parameters: Array) -> Array | None:
    """Work space of a NumPy twin, which a kernel does not want."""
    return None if is_gpu(parameters) else _scratch.get("gradient", parameters.shape)


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
