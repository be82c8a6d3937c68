"""Batch optimisers, L-BFGS and conjugate gradient, on vectors that they never see.

They work with names: ``x`` (parameters), ``g`` (gradient at x), ``d`` (direction), and so on. Whoever holds the
vectors (``Vectors``) carries out four small commands: copy, combine, several dot products at once, and an
evaluation of the objective. So the same code drives arrays of one process, and shards on many servers of which no
process ever holds the whole: Dean et al., "Large scale distributed deep networks" (2012), section 4.2, where
the coordinator sends such commands and sees only numbers.

For that L-BFGS is written with dot products alone (Chen, Wang & Zhou, "Large-scale L-BFGS using MapReduce", 2014): the
direction is a combination of the s, y and g whose coefficients follow from their products with one another. An
iteration sends three commands and its line search two for each step it tries, whatever the length of the history.

Everything minimises. Sources: Nocedal & Wright, "Numerical optimization" (2006), algorithms 7.4 (L-BFGS), 3.5 and 3.6
(line search); Gilbert & Nocedal (1992) for PR+; Hinton & Salakhutdinov (2006) trained deep autoencoders with
conjugate gradient, three line searches on each large batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpudbn.arrays import Array, module_of, to_cpu
from gpudbn.errors import NonFiniteError

SUFFICIENT = 1e-4  # of the decrease that the slope promises: the first Wolfe condition
CURVATURE = {"lbfgs": 0.9, "cg": 0.1}  # of the slope that may remain: the second; conjugate gradient wants it sharper
LEAST_CURVATURE = 1e-10  # of s.y against |s| |y|, below which a pair is left out
EXPAND = 4.0  # how much farther a line search goes that has not seen a minimum yet


class Vectors(Protocol):
    """Whoever holds the vectors. Names are short texts; a name comes to be when it is first written.

    All vectors have the length of ``x``, which is there from the start.
    """

    def combine(self, to: str, terms: Sequence[tuple[float, str]]) -> None:
        """to = sum of factor * name over the terms; ``to`` may be among them."""
        ...

    def dots(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The dot products of these pairs, summed in float64."""
        ...

    def evaluate(self) -> float:
        """The objective at ``x``; its gradient goes to ``g``."""
        ...


@dataclass(frozen=True)
class Iteration:
    """What one iteration came to.

    Attributes
    ----------
    value : float
        The objective afterwards.
    gradient : float
        The length of its gradient.
    step : float
        How far along the direction, 1 being the direction itself; 0 if nothing better was found.
    evaluations : int
        Of the objective, since the start.
    ended : str or None
        Why this was the last one: ``gradient``, ``progress``, ``evaluations``, ``line search``.
    """

    value: float
    gradient: float
    step: float
    evaluations: int
    ended: str | None = None


class Minimiser:
    """L-BFGS or conjugate gradient.

    Parameters
    ----------
    vectors : Vectors
    method : "lbfgs" or "cg"
    history : int
        Pairs (s, y) that L-BFGS keeps.
    gradient : float
        Stop when the gradient is no longer than this.
    progress : float
        Stop when an iteration lowers the objective by no more than this times max(1, |objective|).
    tries : int
        Evaluations of one line search, at most.

    Notes
    -----
    ``run`` may be called again, on the same objective or, between batches, on another: then call ``forget``
    first, since pairs of another objective are no curvature of this one.
    """

    def __init__(self, vectors: Vectors, method: str = "lbfgs", *, history: int = 10, gradient: float = 1e-6,
                 progress: float = 1e-9, tries: int = 20) -> None:
        if method not in CURVATURE:
            raise ValueError(f"method: must be one of {', '.join(CURVATURE)}; got {method}")
        self.vectors, self.method, self.history = vectors, method, history
        self.gradient, self.progress, self.tries = gradient, progress, tries
        self.evaluations = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew, along the gradient: the objective is another now."""
        self._pairs: list[int] = []  # numbers of the slots that hold (s, y), oldest first
        self._products: dict[tuple[str, str], float] = {}  # known dot products among s, y and g
        self._value: float | None = None  # of the objective at x, where g is its gradient
        self._before: tuple[float, float] | None = None  # cg: g.g and g.d of the last iteration

    def run(self, iterations: int, evaluations: int | None = None) -> Iterator[Iteration]:
        """Iterate; yields each iteration. Ends by itself when one of the stopping rules holds.

        Parameters
        ----------
        iterations : int
            At most so many.
        evaluations : int, optional
            Begin no iteration after so many evaluations in this call.

        Raises
        ------
        NonFiniteError
            If the objective or its gradient is not finite where the iterations begin. In a line search such a point
            only counts as too far.
        """
        first = self.evaluations
        if self._value is None:
            self._value = self._evaluate()
        gg = self._dot("g", "g")
        if not math.isfinite(self._value + gg):
            raise NonFiniteError(f"{self.method}: objective and gradient must be finite; got {self._value} and a "
                                 f"squared gradient of {gg}. Lower the weights it begins with")
        for _ in range(iterations):
            if math.sqrt(gg) <= self.gradient:
                yield Iteration(self._value, math.sqrt(gg), 0.0, self.evaluations, "gradient")
                return
            value, slope, guess = self._value, self._direct(gg), self._guess(gg)
            if slope >= 0:  # no descent: what is remembered misleads
                self._restart()
                slope, guess = self._direct(gg), self._guess(gg)
            found = self._search(value, slope, guess)
            if found is None and self._remembers():
                self._restart()
                found = self._search(value, self._direct(gg), self._guess(gg))
            if found is None:
                yield Iteration(value, math.sqrt(gg), 0.0, self.evaluations, "line search")
                return
            step, self._value = found
            gg = self._learn(step, gg)
            ended = ("gradient" if math.sqrt(gg) <= self.gradient else
                     "progress" if value - self._value <= self.progress * max(1.0, abs(self._value)) else
                     "evaluations" if evaluations is not None and self.evaluations - first >= evaluations else None)
            yield Iteration(self._value, math.sqrt(gg), step, self.evaluations, ended)
            if ended:
                return

    # -- the direction ----------------------------------------------------------------------------

    def _direct(self, gg: float) -> float:
        """Make ``d`` from what is remembered, and keep x and g as ``x0`` and ``g0``; returns the slope g.d."""
        v = self.vectors
        v.combine("x0", [(1.0, "x")])
        v.combine("g0", [(1.0, "g")])
        if self.method == "lbfgs":
            terms = self._lbfgs()
            v.combine("d", terms)
            return sum(factor * self._products[_pair("g", name)] for factor, name in terms)
        if self._before is None:
            v.combine("d", [(-1.0, "g")])
            return -gg
        before, mixed = self._before  # g.g of the last iteration, and g.g' with its gradient
        beta = max(0.0, (gg - mixed) / before)
        v.combine("d", [(-1.0, "g"), (beta, "d")])
        return self._dot("g", "d")

    def _lbfgs(self) -> list[tuple[float, str]]:
        """-H g as a combination of g, s and y: the two loops of algorithm 7.4, on coefficients."""
        names = ["g"] + [f"{letter}{slot}" for slot in self._pairs for letter in "sy"]
        if len(names) == 1:
            self._products[_pair("g", "g")] = self._dot("g", "g")
        q = dict.fromkeys(names, 0.0)
        q["g"] = 1.0

        def dot(name: str) -> float:
            return sum(factor * self._products[_pair(name, other)] for other, factor in q.items() if factor)

        alphas = {}
        for slot in reversed(self._pairs):
            s, y = f"s{slot}", f"y{slot}"
            alphas[slot] = dot(s) / self._products[_pair(s, y)]
            q[y] -= alphas[slot]
        if self._pairs:
            s, y = f"s{self._pairs[-1]}", f"y{self._pairs[-1]}"
            gamma = self._products[_pair(s, y)] / self._products[_pair(y, y)]
            q = {name: gamma * factor for name, factor in q.items()}
        for slot in self._pairs:
            s, y = f"s{slot}", f"y{slot}"
            q[s] += alphas[slot] - dot(y) / self._products[_pair(s, y)]
        return [(-factor, name) for name, factor in q.items() if factor]

    def _learn(self, step: float, gg: float) -> float:
        """Remember what the step showed; returns g.g at the new x."""
        v = self.vectors
        if self.method == "cg":
            mixed, new = v.dots([("g", "g0"), ("g", "g")])
            self._before = (gg, mixed)
            return new
        slot = next(i for i in range(self.history + 1) if i not in self._pairs)
        s, y = f"s{slot}", f"y{slot}"
        v.combine(s, [(step, "d")])
        v.combine(y, [(1.0, "g"), (-1.0, "g0")])
        kept = [f"{letter}{i}" for i in self._pairs for letter in "sy"]
        pairs = [("g", "g"), (s, y), (s, s), (y, y), ("g", s), ("g", y)]
        pairs += [(a, b) for a in ("g", s, y) for b in kept]
        self._products |= dict(zip((_pair(*p) for p in pairs), v.dots(pairs), strict=True))
        sy, ss, yy = (self._products[_pair(*p)] for p in ((s, y), (s, s), (y, y)))
        if sy > LEAST_CURVATURE * math.sqrt(ss * yy):
            self._pairs.append(slot)
            if len(self._pairs) > self.history:
                self._pairs.pop(0)
        return self._products[_pair("g", "g")]

    def _remembers(self) -> bool:
        return bool(self._pairs) or self._before is not None

    def _restart(self) -> None:
        """Forget the curvature, not where we are: x and g as they were when the direction was made."""
        value = self._value
        self.vectors.combine("x", [(1.0, "x0")])
        self.vectors.combine("g", [(1.0, "g0")])
        self.forget()
        self._value = value

    # -- the line search --------------------------------------------------------------------------

    def _guess(self, gg: float) -> float:
        """The first step to try."""
        if self.method == "lbfgs" and self._pairs:
            return 1.0
        if self._before is not None:  # the same decrease to first order as the last time
            return min(1.0, self._last * self._before[0] / gg)
        return min(1.0, 1.0 / math.sqrt(gg))

    _last = 1.0  # cg: the last step

    def _search(self, value: float, slope: float, step: float) -> tuple[float, float] | None:
        """A step that satisfies the strong Wolfe conditions, and the objective there; x and g are left there.

        None, with x and g as they were, if no step lowers the objective.
        """
        low, low_value, low_slope = 0.0, value, slope  # the best step so far
        high, high_value, high_slope = math.inf, math.inf, math.inf  # beyond it there is no need to look
        at_low = True  # whether x and g are those of ``low``
        for _ in range(self.tries):
            here, here_slope = self._try(step)
            at_low = False
            if here > value + SUFFICIENT * step * slope or (here >= low_value and low > 0) or not math.isfinite(here):
                high, high_value, high_slope = step, here, here_slope
            else:
                if abs(here_slope) <= -CURVATURE[self.method] * slope:
                    self._last = step
                    return step, here
                if here_slope * (high - low) >= 0:
                    high, high_value, high_slope = low, low_value, low_slope
                low, low_value, low_slope, at_low = step, here, here_slope, True
                self.vectors.combine("g1", [(1.0, "g")])
            step = _between(low, low_value, low_slope, high, high_value, high_slope)
            if abs(step - low) <= 1e-12 * max(step, low):
                break
        if low == 0.0:
            self.vectors.combine("x", [(1.0, "x0")])
            self.vectors.combine("g", [(1.0, "g0")])
            return None
        if not at_low:  # lower, though the slope is still steep
            self.vectors.combine("x", [(1.0, "x0"), (low, "d")])
            self.vectors.combine("g", [(1.0, "g1")])
        self._last = low
        return low, low_value

    def _try(self, step: float) -> tuple[float, float]:
        """Objective and slope at x0 + step d."""
        self.vectors.combine("x", [(1.0, "x0"), (step, "d")])
        value = self._evaluate()
        return value, self._dot("g", "d") if math.isfinite(value) else math.nan

    def _evaluate(self) -> float:
        self.evaluations += 1
        return self.vectors.evaluate()

    def _dot(self, a: str, b: str) -> float:
        return self.vectors.dots([(a, b)])[0]


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a <= b else (b, a)


def _between(low: float, f: float, slope: float, high: float, f_high: float, slope_high: float) -> float:
    """The next step to try: the minimum of a cubic through both ends, well inside; farther on if there is no end."""
    if math.isinf(high):
        return low * EXPAND
    middle = (low + high) / 2
    if not (math.isfinite(f_high) and math.isfinite(slope_high)):
        return low + (high - low) / 10
    a = slope + slope_high - 3 * (f - f_high) / (low - high)
    root = a * a - slope * slope_high
    if root < 0:
        return middle
    b = math.copysign(math.sqrt(root), high - low)
    bottom = slope_high - slope + 2 * b
    step = high - (high - low) * (slope_high + b - a) / bottom if bottom else middle
    edge = 0.1 * abs(high - low)
    inside = min(low, high) + edge <= step <= max(low, high) - edge
    return step if inside else middle


class Arrays:
    """Vectors that are arrays of this process: on the CPU or a GPU.

    Parameters
    ----------
    x, g : array (size,), float32
        Parameters and gradient. Modified in place, so that an objective may keep views of them.
    objective : callable
        Returns the objective at ``x`` and leaves its gradient in ``g``.
    """

    def __init__(self, x: Array, g: Array, objective: Callable[[], float]) -> None:
        self._arrays = {"x": x, "g": g}
        self._objective = objective
        self._work = module_of(x, g).empty_like(x)

    def combine(self, to: str, terms: Sequence[tuple[float, str]]) -> None:
        """See ``Vectors``."""
        xp = module_of(self._work)
        if to not in self._arrays:
            self._arrays[to] = xp.zeros_like(self._work)
        out = self._arrays[to]
        among = [factor for factor, name in terms if name == to]
        if among:
            xp.multiply(out, np.float32(sum(among)), out=out)
        else:
            out.fill(0)
        for factor, name in terms:
            if name != to:
                xp.multiply(self._arrays[name], np.float32(factor), out=self._work)
                xp.add(out, self._work, out=out)

    def dots(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See ``Vectors``."""
        xp = module_of(self._work)
        found = xp.empty(len(pairs))
        for i, (a, b) in enumerate(pairs):
            xp.multiply(self._arrays[a], self._arrays[b], out=self._work)
            found[i] = self._work.sum(dtype=np.float64)
        return [float(value) for value in to_cpu(found)]

    def evaluate(self) -> float:
        """See ``Vectors``."""
        return self._objective()
