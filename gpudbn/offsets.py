"""Centring and sparsity of one layer: what is subtracted from its units in an update, and how that moves.

The mathematics is in ``reference.centre`` and ``reference.offsets_step``. Offsets stay fixed during an
update, so that its sums add over any cut of the batch; the next ones come from sums over the whole batch.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from gpudbn.arrays import Array
from gpudbn.shards import WHOLE, Shards
from gpudbn.twins import twins_of

KEEP = 0.99  # of a moving average, an update: Melchior et al. (2016) and, between 0.9 and 0.99, Hinton (2012)


class Offsets:
    """The offsets of one layer. Synchronous replicas have the same, asynchronous ones each their own.

    Parameters
    ----------
    n, m : int
        Visible and hidden units: those of this shard, where the layer is cut.
    rows : int
        The most rows of both phases of an update.
    centring : bool
    target : float or None
        Sparsity target; None: no sparsity.
    cost : float
        Of sparsity.
    xp : module
        ``numpy`` or ``cupy``.
    shards : Shards

    Attributes
    ----------
    moved : array (n + m,), float32
        From ``cd_update`` to ``step``.
    state : dict
        What a checkpoint has to keep.
    """

    def __init__(self, n: int, m: int, rows: int, *, centring: bool, target: float | None, cost: float,
                 xp: ModuleType, shards: Shards = WHOLE) -> None:
        self.n, self.m, self.shards = n, m, shards
        self.means = xp.zeros(n + m, np.float32)
        self.moved = xp.zeros(n + m, np.float32)
        self.offsets = xp.zeros(n + 2 * m, np.float32)
        self.ones = xp.empty(2 * rows, np.float32)
        self.state = {"means": self.means, "offsets": self.offsets}
        self.rule = {"centring": centring, "target": target or 0.0, "cost": 0.0 if target is None else cost}
        self.twins = twins_of(self.means)

    def begin(self, visible_means: Array, hidden_mean: float) -> None:
        """Offsets before the first update, from means (n,) of the data and of every hidden unit."""
        self.means[: self.n] = visible_means
        self.means[self.n :] = hidden_mean
        self._step(self.moved, scale=0, keep=1)

    def centre(self, v: Array, h: Array, rows: int, moved: Array | None = None) -> dict[str, Array]:
        """Subtract the offsets from v (K, n) and h (K, m); what ``cd_sums`` or ``cd_update`` has to be given with them.

        ``moved`` (n + m,) is where it puts what ``step`` needs, if not into ``self.moved``.
        """
        ones = self.ones[: 2 * len(v)]
        self.twins.centre(v, h, ones, self.offsets, rows)
        if self.shards.count > 1:  # of 1 - h.lambda each shard has the part of its own hidden units
            of_b = ones[: len(v)]
            of_b -= np.float32(1)
            self.shards.sum_(of_b)
            of_b += np.float32(1)
        return {"ones": ones, "moved": self.moved if moved is None else moved}

    def step(self, moved: Array, count: int) -> None:
        """Offsets of the next update, from the sums (n + m,) that ``cd_sums`` made of ``count`` rows."""
        self._step(moved, scale=1 / count, keep=KEEP)

    def _step(self, moved: Array, *, scale: float, keep: float) -> None:
        self.twins.offsets_step(self.means, self.offsets, moved, self.n, self.m, scale=scale, keep=keep,
                                **self.rule)
