"""Launches of ``kernels/elementwise.cu``: passes over flat arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.arrays import Array
from gpudbn.cuda.door import POINTER, RATES, Door, Kinds, Unit
from gpudbn.reference import adam_rates, decoupled

_SIZES: Kinds = (np.int64, np.int64)  # size, weights

UNITS: Mapping[str, Unit] = {
    "elementwise": Unit("elementwise.cu", {
        "sigmoid": (POINTER, np.int64),
        "sigmoid_exact": (POINTER, np.int64),
        "sigmoid_backward": (POINTER, POINTER, np.int64, np.float32),
        "momentum_step": (POINTER, POINTER, POINTER, *_SIZES, *RATES),
        "sgd_step": (POINTER, POINTER, *_SIZES, *RATES),
        "adagrad_step": (POINTER, POINTER, POINTER, *_SIZES, np.float32, *RATES),
        "adam_step": (POINTER, POINTER, POINTER, POINTER, *_SIZES, np.float32, np.float32, np.float32, *RATES),
    }),
}


class Elementwise(Door):
    """One pass over arrays, entry by entry."""

    def sigmoid(self, x, *, precision="fp32"):
        """See ``reference.sigmoid``."""
        self._check("sigmoid", "x", x, *getattr(x, "shape", ()))
        if x.size:
            kernel = "sigmoid_exact" if precision == "exact" else "sigmoid"
            self._launch_elementwise("elementwise", kernel, x.size, x, x.size)
        return x

    def sigmoid_backward(self, delta, a, *, keep=1.0):
        """See ``reference.sigmoid_backward``."""
        self._check("sigmoid_backward", "delta", delta, *getattr(delta, "shape", ()))
        self._check("sigmoid_backward", "a", a, *delta.shape)
        if delta.size:
            self._check_apart("sigmoid_backward", {"delta": delta}, {"a": a})
            self._launch_elementwise("elementwise", "sigmoid_backward", delta.size, delta, a, delta.size, keep)
        return delta

    def momentum_step(self, parameters, velocity, gradient, *, weights, scale, rate, momentum, decay, rates=None):
        """See ``reference.momentum_step``."""
        self._step("momentum_step", {"parameters": parameters, "velocity": velocity}, gradient, weights,
                   (rate * scale, momentum, rate * decay), rates)

    def sgd_step(self, parameters, gradient, *, weights, scale, rate, decay, rates=None):
        """See ``reference.sgd_step``."""
        self._step("sgd_step", {"parameters": parameters}, gradient, weights, decoupled(scale, rate, decay), rates)

    def adagrad_step(self, parameters, squares, gradient, *, weights, scale, rate, decay, eps=1e-8, rates=None):
        """See ``reference.adagrad_step``."""
        self._step("adagrad_step", {"parameters": parameters, "squares": squares}, gradient, weights,
                   (eps, *decoupled(scale, rate, decay)), rates)

    def adam_step(self, parameters, mean, square, gradient, *, weights, scale, rate, decay, steps, b1=0.9, b2=0.999,
                  eps=1e-8, rates=None):
        """See ``reference.adam_step``. ``gradient`` stays as it is."""
        self._step("adam_step", {"parameters": parameters, "mean": mean, "square": square}, gradient, weights,
                   (1 - b1, 1 - b2, eps, *adam_rates(scale, rate, decay, steps, b1, b2)), rates)

    def _step(self, function: str, changed: dict[str, Array], gradient: Array, weights: int,
              numbers: tuple[float, ...], rates: Array | None) -> None:
        """Launch a step over all parameters. ``changed``: these and what the rule keeps for each, in order."""
        size = getattr(changed["parameters"], "size", 0)
        read = {"gradient": gradient}
        for name, array in (changed | read).items():
            self._check(function, name, array, size)
        if not 0 <= weights <= size:
            raise ValueError(f"{function}: weights must lie between 0 and the {size} parameters; got {weights}")
        rates = self._rates(function, rates)
        if size:
            for name, array in changed.items():
                others = {other: a for other, a in changed.items() if other != name}
                self._check_apart(function, {name: array}, others | read)
            self._launch_elementwise("elementwise", function, size, *changed.values(), gradient, size, weights,
                                     *numbers, rates)
