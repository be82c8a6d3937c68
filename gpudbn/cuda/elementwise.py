"""Launches of ``kernels/elementwise.cu``: passes over flat arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.cuda.door import POINTER, Door, Unit

UNITS: Mapping[str, Unit] = {
    "elementwise": Unit("elementwise.cu", {
        "sigmoid": (POINTER, np.int64),
        "momentum_step": (POINTER, POINTER, POINTER, np.int64, np.int64, np.float32, np.float32, np.float32, POINTER),
    }),
}


class Elementwise(Door):
    """One pass over arrays, entry by entry."""

    def sigmoid(self, x):
        """See ``reference.sigmoid``."""
        self._check("sigmoid", "x", x, *getattr(x, "shape", ()))
        if x.size:
            self._launch_elementwise("elementwise", "sigmoid", x.size, x, x.size)
        return x

    def momentum_step(self, parameters, velocity, gradient, *, weights, scale, rate, momentum, decay, rates=None):
        """See ``reference.momentum_step``."""
        size = getattr(parameters, "size", 0)
        self._check("momentum_step", "parameters", parameters, size)
        self._check("momentum_step", "velocity", velocity, size)
        self._check("momentum_step", "gradient", gradient, size)
        if not 0 <= weights <= size:
            raise ValueError(f"momentum_step: weights must lie between 0 and the {size} parameters; got {weights}")
        if size:
            self._check_apart("momentum_step", {"parameters": parameters}, {"velocity": velocity, "gradient": gradient})
            self._check_apart("momentum_step", {"velocity": velocity}, {"gradient": gradient})
            self._launch_elementwise("elementwise", "momentum_step", size, parameters, velocity, gradient, size,
                                     weights, rate * scale, momentum, rate * decay, self._rates("momentum_step", rates))
