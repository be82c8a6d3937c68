"""What a server does with a change: the step rules. They know vectors, not what these mean.

A rule is called as rule(parameters, change, staleness) and changes the parameters in place; staleness counts the
changes of other replicas that came in since the parameters on which the change was computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpudbn.arrays import Array

Rule = Callable[[Array, Array, int], None]


def add(parameters: Array, change: Array, staleness: int) -> None:  # noqa: ARG001
    """parameters += change: the plain rule, when replicas send differences of parameters."""
    parameters += change


class Steps:
    """Step rules at a server: every change counts as a gradient of its own.

    What the rule keeps, such as a velocity, is made anew for every new vector of parameters. Dean et al., "Large scale
    distributed deep networks" (2012), section 4.1, have Adagrad at the servers.

    Parameters
    ----------
    make : callable
        From parameters to one of the step rules in ``optimiser.py`` that leave a gradient as it is: for instance
        ``partial(Adagrad, decay=0)``.
    rate : float
    by_staleness : bool
        Divide the rate by max(1, staleness).
    """

    def __init__(self, make: Callable[[Array], Any], *, rate: float = 1.0, by_staleness: bool = False) -> None:
        self.make, self.rate, self.by_staleness = make, rate, by_staleness
        self._parameters: Array | None = None
        self._rule: Any = None

    def _rate(self, parameters: Array, staleness: int) -> float:
        """The rate of one step, for which the rule of these parameters is ready."""
        if parameters is not self._parameters:
            self._parameters, self._rule = parameters, self.make(parameters)
        return self.rate / max(1, staleness) if self.by_staleness else self.rate

    def __call__(self, parameters: Array, change: Array, staleness: int) -> None:
        """One step with a change (size,), on the CPU or the GPU: a server's ``rule``."""
        rate = self._rate(parameters, staleness)
        self._rule.step(parameters, change, weights=0, scale=1.0, rate=rate)

    def activations(self, parameters: Array, v: Array, h: Array, rows: int, staleness: int, *,
                    model_weight: float = 1.0) -> None:
        """One step with the change of an RBM that came as its activations: see ``reference.cd_sums``."""
        rate = self._rate(parameters, staleness)
        self._rule.step_with_activations(parameters, v, h, rows, model_weight=model_weight, rate=rate)
