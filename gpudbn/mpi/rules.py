"""What a server does with a change: the step rules. They know vectors, not what these mean.

A rule is called as rule(parameters, change, staleness, replica) and changes the parameters in place; staleness counts
the changes of other replicas that came in since the parameters on which the change was computed. A change points
uphill, as gradients do here: a replica's plain steps make it the sum of its gradients times the rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpudbn import optimiser
from gpudbn.arrays import Array, module_of
from gpudbn.settings import Settings


def add(parameters: Array, change: Array, staleness: int) -> None:  # noqa: ARG001
    """parameters += change: the plain step, when replicas send differences of parameters."""
    parameters += change


class Rule:
    """A rule that keeps nothing, and what a server asks of any. One rule is for one vector.

    Parameters
    ----------
    step : callable (parameters, change, staleness)

    Attributes
    ----------
    asks : bool
        Whether it must know what replicas pull: pulls then go by message.
    """

    asks = False

    def __init__(self, step: Callable[[Array, Array, int], None] = add) -> None:
        self.step = step

    def begin(self, parameters: Array, replicas: int) -> None:
        """New parameters (size,), float32, which all replicas have; what the rule keeps begins anew."""

    def pulled(self, replica: int, parameters: Array) -> None:
        """The replica works on these from now on."""

    def __call__(self, parameters: Array, change: Array, staleness: int, replica: int = 0) -> None:  # noqa: ARG002
        """Change the parameters by the change of a replica, which is not modified."""
        self.step(parameters, change, staleness)

    def activations(self, parameters: Array, v: Array, h: Array, ones: Array, decay: float,
                    staleness: int) -> bool:  # noqa: ARG002
        """The same with the change of an RBM that came as factors and is not written; False, and not, if it has to be.

        Parameters
        ----------
        v, h, ones : arrays
            Of ``factors.Activations.factors``.
        decay : float
            What the change takes from weights, as a share of them.
        """
        if self.step is not add:
            return False
        _step(optimiser.SGD(parameters, decay=0.0), parameters, v, h, ones, decay, 1.0)
        return True

    def state(self) -> dict[str, Array]:
        """What a checkpoint has to keep: arrays (size,), float32, to be modified in place."""
        return {}


class Steps(Rule):
    """Step rules at a server: every change counts as a gradient of its own.

    Dean et al., "Large scale distributed deep networks" (2012), section 4.1, have Adagrad at the servers; Zhang et al.,
    "Staleness-aware async-SGD for distributed deep learning" (2015), divide by the staleness.

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
        self._rule: Any = None

    def begin(self, parameters: Array, replicas: int) -> None:  # noqa: ARG002
        self._rule = self.make(parameters)

    def state(self) -> dict[str, Array]:
        state: dict[str, Array] = self._rule.state
        return state

    def _rate(self, staleness: int) -> float:
        return self.rate / max(1, staleness) if self.by_staleness else self.rate

    def __call__(self, parameters: Array, change: Array, staleness: int, replica: int = 0) -> None:  # noqa: ARG002
        """One step with a change (size,), on the CPU or the GPU."""
        self._rule.step(parameters, change, weights=0, scale=1.0, rate=self._rate(staleness))

    def activations(self, parameters: Array, v: Array, h: Array, ones: Array, decay: float, staleness: int) -> bool:
        """One step."""
        _step(self._rule, parameters, v, h, ones, decay, self._rate(staleness))
        return True


class Compensated(Rule):
    """Delay compensation in front of a rule: it gets what the change would be at the parameters, to first order.

        square <- 0.95 square + 0.05 change^2
        share = strength change / sqrt(square) (parameters - base), from -1 to 1
        change - share change

    with base the parameters on which the change was computed. A gradient changes by the curvature times the way; the
    squared gradient stands for the curvature, which is negative where a likelihood has its top. Zheng et al.,
    "Asynchronous stochastic gradient descent with delay compensation" (2017), algorithm 2, in its adaptive form: the
    strength is divided by the root mean square of the gradients, and so the scale of a change does not matter.
    No entry is corrected by more than its own size, which the paper does not demand: first order goes no further.
    Without this one of four runs of 16 replicas on MNIST ended in infinity, and the one with a strength of 4, too.

    A server keeps what each replica works on: what that pulled, and the changes that it made to it by itself since.
    For that it must know what is pulled: pulls go by message.

    Parameters
    ----------
    rule : Rule
    strength : float
        lambda_0 of the paper, which takes 2.
    """

    asks = True
    KEEP = 0.95  # of the mean square with each change
    TINY = 1e-30  # below any square that matters: keeps 0 / 0 out

    def __init__(self, rule: Rule, strength: float) -> None:
        self.rule, self.strength = rule, strength

    def begin(self, parameters: Array, replicas: int) -> None:
        self.rule.begin(parameters, replicas)
        xp = module_of(parameters)
        self._bases = [parameters.copy() for _ in range(replicas)]
        self._square, self._work, self._change = (xp.zeros_like(parameters) for _ in range(3))

    def pulled(self, replica: int, parameters: Array) -> None:
        self._bases[replica][...] = parameters

    def activations(self, *_: Any) -> bool:
        """It wants the change itself."""
        return False

    def __call__(self, parameters: Array, change: Array, staleness: int, replica: int = 0) -> None:
        """The rule, with the compensated change of a replica."""
        self.rule(parameters, self._compensated(parameters, change, self._bases[replica]), staleness, replica)
        self._bases[replica] += change  # as the replica has done

    def state(self) -> dict[str, Array]:
        """The mean square, and what the rule keeps."""
        return {"mean_square": self._square, **self.rule.state()}

    def _compensated(self, parameters: Array, change: Array, base: Array) -> Array:
        xp, square, work, out = module_of(parameters, change), self._square, self._work, self._change
        xp.multiply(change, change, out=work)
        square *= self.KEEP
        work *= 1 - self.KEEP
        square += work
        xp.sqrt(xp.add(square, self.TINY, out=work), out=work)
        xp.divide(change, work, out=out)
        out *= xp.subtract(base, parameters, out=work)
        out *= self.strength
        xp.clip(out, -1, 1, out=out)
        out *= change
        out += change
        return out


def _step(rule: Any, parameters: Array, v: Array, h: Array, ones: Array, decay: float, rate: float) -> None:
    """A step with the sum over all rows: one kernel on a GPU."""
    rule.step_with_activations(parameters, v, h, 1, model_weight=-1.0, ones=ones, decay=decay, rate=rate)


def from_settings(settings: Settings) -> Rule:
    """What servers do by ``--server-rule`` and ``--staleness``."""
    s = settings
    rule = Rule()
    if s.server_rule != "sgd" or s.server_rate != 1 or s.staleness == "divide":
        makes: dict[str, Callable[..., Any]] = {
            "sgd": optimiser.SGD, "momentum": partial(optimiser.Momentum, momentum=s.server_momentum),
            "adagrad": optimiser.Adagrad}
        make = makes[s.server_rule]
        rule = Steps(partial(make, decay=0.0), rate=s.server_rate, by_staleness=s.staleness == "divide")
    return Compensated(rule, s.compensation) if s.staleness == "compensate" else rule
