"""Local receptive fields: a hidden unit sees a window of the visible units, and W holds nothing else.

    places    hidden units come in blocks of 16, whose windows of ``fan`` visible units are spread evenly from the
              first to the last: of rows of images, in which pixels stand row by row, a window is a band of rows
    W         (fan, m): column j has the weights of hidden unit j to the visible units of its block's window, so that
              memory and arithmetic are fan / n of those of a dense layer
    shards    hold blocks that are neighbours, and what those see: only the borders of visible units cross
        sum       a shard adds what others give to the visible units that it sees as well
        gather    the hidden values that the next layer's windows want, no others

Such layers are those of Dean et al. (2012), section 3 and figure 3, after Le et al., "Building high-level features
using large scale unsupervised learning" (2012). Plain operations of NumPy or CuPy, a product for each block.
"""

from __future__ import annotations

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.errors import UserError
from gpudbn.shards import EDGE, WHOLE, Shards


class Local:
    """Which visible units each hidden unit of a layer sees, and the products over them.

    Parameters
    ----------
    n, m : int
        Visible and hidden units of the whole layer.
    fan : int
        Visible units of a window.
    shards : Shards

    Attributes
    ----------
    seen : slice
        The visible units that are here: those of the windows, and those that this shard owns. Wherever n is a size
        of an array below, it is the number of those.
    owned : slice
        Within ``seen``, those that no other shard owns: its share of the layer below.

    Raises
    ------
    UserError
        If windows are larger than the layer, or too small to cover it.
    """

    def __init__(self, n: int, m: int, fan: int, shards: Shards = WHOLE) -> None:
        blocks = -(-m // EDGE)
        if not -(-n // blocks) <= fan <= n:
            raise UserError(f"--local: must be from {-(-n // blocks)} to {n} for {n} visible and {m} hidden units, "
                            f"whose {blocks} windows have to cover all; got {fan}")
        self.fan, self.shards = fan, shards
        room, gaps = n - fan, blocks - 1
        start = [(2 * room * block + gaps) // (2 * gaps) for block in range(blocks)] if gaps else [room // 2]
        everyone = range(shards.count)
        self._own = [shards.mine(n, index) for index in everyone] if shards.count > 1 else [slice(0, n)]
        self._see = []  # of each shard, in whole blocks of draws
        for own, columns in zip(self._own, (shards.mine(m, index) for index in everyone), strict=True):
            first, last = columns.start // EDGE, (columns.stop - 1) // EDGE
            low, high = min(own.start, start[first]), max(own.stop, start[last] + fan)
            self._see.append(slice(low // EDGE * EDGE, min(-(-high // EDGE) * EDGE, n)))
        self.seen, own, mine = self._see[shards.index], self._own[shards.index], shards.mine(m)
        self.owned = slice(own.start - self.seen.start, own.stop - self.seen.start)
        self._windows = []  # of each block here: its visible and its hidden units, as they are numbered here
        for lo in range(mine.start, mine.stop, EDGE):
            low = start[lo // EDGE] - self.seen.start
            units = slice(lo - mine.start, min(lo + EDGE, mine.stop) - mine.start)
            self._windows.append((slice(low, low + fan), units))

    # -- products -----------------------------------------------------------------------------------

    def product(self, out: Array, v: Array, W: Array) -> None:
        """out <- v W: arrays (B, m), (B, n), (fan, m)."""
        whole = module_of(W).ascontiguousarray  # 16 columns far apart take a BLAS five times as long
        for window, units in self._windows:
            out[:, units] = v[:, window] @ whole(W[:, units])

    def product_back(self, out: Array, h: Array, W: Array) -> None:
        """out <- h W^T, of all shards: arrays (B, n), (B, m), (fan, m)."""
        out.fill(0)
        for window, units in self._windows:
            out[:, window] += h[:, units] @ W[:, units].T
        self._add_borders(out)

    def gradient(self, dW: Array, v: Array, h: Array) -> None:
        """dW <- v^T h where there are weights: arrays (fan, m), (K, n), (K, m)."""
        for window, units in self._windows:
            dW[:, units] = (h[:, units].T @ v[:, window]).T

    def cd_sums(self, dW: Array, db: Array, dc: Array, v: Array, h: Array, rows: int, *,
                model_weight: float = 1.0) -> None:
        """The sums of ``reference.cd_sums`` where there are weights; of b (n,) the same bits on all that see a unit."""
        xp = module_of(v, h)
        signs = xp.ones(len(v), np.float32)
        signs[rows:] = -model_weight
        signed = h * signs[:, None]
        self.gradient(dW, v, signed)
        db[...] = signs @ v
        dc[...] = signed.sum(axis=0)
        if self.shards.count > 1:
            self.gather(db[None, self.owned].copy(), db[None])

    # -- what crosses ---------------------------------------------------------------------------------

    def see(self, v: Array) -> Array:
        """What is here of all visible units: array (B, all) -> (B, n)."""
        return v if self.shards.count == 1 else module_of(v).ascontiguousarray(v[:, self.seen])

    def own(self, v: Array) -> Array:
        """Of what is here, what this shard owns: array (B, n) -> (B, owned)."""
        return v if self.shards.count == 1 else module_of(v).ascontiguousarray(v[:, self.owned])

    def gather(self, part: Array, out: Array) -> Array:
        """out (B, n) <- the visible units that are seen here, of which each shard brings its own, (B, owned)."""
        mine, me = self._own[self.shards.index], self.shards.index
        out[:, self.owned] = part
        give = [None if t == me else _cut(part, mine, _common(mine, see)) for t, see in enumerate(self._see)]
        take = [None if t == me else _cut(out, self.seen, _common(self.seen, own)) for t, own in enumerate(self._own)]
        self.shards.swap(give, take)
        return out

    def _add_borders(self, out: Array) -> None:
        """out (B, n) <- its sum over shards, each of which has the units that it sees, in their order."""
        if self.shards.count == 1:
            return
        xp, me = module_of(out), self.shards.index
        common = [None if t == me else _common(self.seen, see) for t, see in enumerate(self._see)]
        give = [_cut(out, self.seen, units) for units in common]
        take = [None if part is None else xp.empty(part.shape, part.dtype) for part in give]
        self.shards.swap(give, take)
        mine = out.copy()
        out.fill(0)
        for t, part in enumerate(take):
            if t == me:
                out += mine
            elif part is not None:
                into = _cut(out, self.seen, common[t])
                into += part


def _common(a: slice, b: slice) -> slice | None:
    """The units of both."""
    low, high = max(a.start, b.start), min(a.stop, b.stop)
    return slice(low, high) if low < high else None


def _cut(array: Array, units: slice, wanted: slice | None) -> Array | None:
    """The columns of the wanted units, of an array of ``units``: a view."""
    return None if wanted is None else array[:, wanted.start - units.start : wanted.stop - units.start]
