"""One replica in several parts: the hidden units of each layer are cut among shards, and two seams join them.

    shard s holds   W[:, mine], c[mine]   of every layer, and all of b
    upward          h[:, mine] = f(v W[:, mine] + c[mine])                   nothing crosses
    gather          hidden values of all shards become the next layer's visible units
    downward        v = f(sum over shards of h[:, mine] W[:, mine]^T + b)    the sum crosses
    draws           depend on nothing but their address, so after a sum every shard draws the same

Sums cross for the visible input, logits, free energies and the errors of back-propagation;
gradients of a shard's own parameters need nothing from others. Dean et al. (2012), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.errors import UserError
from gpudbn.precision import BLOCK, BLOCKS

EDGE = BLOCK  # shards are cut at multiples of so many units: whole Philox blocks, and aligned rows


class Shards:
    """The seams of a replica that is whole: nothing crosses, and both seams are the identity.

    Attributes
    ----------
    index, count : int
        Which shard this is, of how many.
    """

    index = 0
    count = 1

    def mine(self, m: int, index: int | None = None) -> slice:
        """Which of a layer's ``m`` hidden units this shard holds, or the one of that index.

        Raises
        ------
        UserError
            If there are fewer pieces of 16 units than shards.
        """
        pieces = -(-m // EDGE)
        if pieces < self.count:
            raise UserError(f"shards: a layer must have at least {EDGE * (self.count - 1) + 1} hidden units for "
                            f"{self.count} shards; got {m}. Take fewer shards or larger layers")
        index = self.index if index is None else index
        low, high = (EDGE * (pieces * i // self.count) for i in (index, index + 1))
        return slice(low, min(high, m))

    def sum_(self, array: Array) -> None:
        """array <- its sum over all shards: the same array on each. C-contiguous, of one shape everywhere."""

    def product_(self, out: Array, a: Array, b: Array, precision: str = "fp32") -> None:
        """out <- sum over shards of a b, the same on each: arrays (rows, n), (rows, own), (own, n).

        With ``precision`` 'blocks' the sum is over blocks of units in their order, whatever the number of shards.
        """
        xp = module_of(out)
        if precision == BLOCKS:
            # copies, since a BLAS looks at strides, too
            whole = xp.ascontiguousarray
            self.add_in_order_(out, [whole(a[:, lo : lo + BLOCK]) @ whole(b[lo : lo + BLOCK])
                                     for lo in range(0, a.shape[1], BLOCK)])
        else:
            xp.matmul(a, b, out=out)
            self.sum_(out)

    def add_in_order_(self, out: Array, partials: Sequence[Array]) -> None:
        """out <- ((0 + p0) + p1) + ..., through the partials of the first shard, then of the next, ...."""
        out.fill(0)
        for partial in partials:
            out += partial

    def gather(self, part: Array, m: int, out: Array | None = None) -> Array:
        """All shards' columns side by side: arrays (..., own) -> (..., m), the same on each shard.

        Parameters
        ----------
        part : array (..., own)
            This shard's columns, those of ``mine(m)``.
        m : int
        out : array (..., m), optional
            Where to put them, if they have to be put together; not used by a shard that has all.

        Returns
        -------
        array (..., m)
            ``part`` itself if there is one shard.
        """
        _ = m, out
        return part

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The arrays of all shards in order, of any shapes, on the first; None elsewhere."""
        return [array]


WHOLE = Shards()
