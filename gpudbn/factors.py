"""What a turn of plain CD steps did to an RBM, as the activations from which it was computed.

A step adds rate / B (v0^T h0 - w vk^T hk) to W, which decays before, and the sums over rows to b and c. So a turn of
steps adds one product over the rows of all its minibatches, each with a weight s of its own:

    W += v^T s h - (1 - kept) W        b += sum s v        c += sum s h

and 2 B (n + m) activations an update say as much as n m numbers. Values that are all 0 or 1 take a bit, bytes of the
data a byte, others a float32, so that nothing is lost but the rounding of sums. Chilimbi et al., "Project Adam:
Building an efficient and scalable deep learning training system" (2014), section 3.3, send activations and errors of
fully connected layers.

A message is an array of bytes: words of float64, which are exact for these whole numbers, then the four blocks v0, vk,
h0, hk with the rows of all updates; each part begins at a multiple of 8 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpudbn.arrays import Array, module_of, to_cpu

WORDS = 11  # n, m, first, from and to of the columns of v, levels, updates; the kinds of the four blocks
PER_UPDATE = 5  # rows, chains, rate / rows, w, 1 - rate decay
BITS, BYTES, FLOATS = range(3)


class Factors:
    """Collects the updates of a turn.

    Parameters
    ----------
    n, m : int
        Visible and hidden units.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.clear()

    def __len__(self) -> int:
        """How many updates."""
        return len(self._updates)

    def clear(self) -> None:
        """A new turn begins."""
        self._updates: list[tuple[float, ...]] = []
        self._blocks: list[tuple[Array, ...]] = []
        self._levels = 1

    def add(self, v: Array, h: Array, rows: int, *, model_weight: float, rate: float, decay: float,
            levels: int | None = None) -> None:
        """One update with ``reference.cd_update``, without momentum.

        Parameters
        ----------
        v, h : arrays (rows + C, n), (rows + C, m), float32
            As in ``reference.cd_sums``. Copied.
        rows, model_weight, rate, decay
            As there and in ``reference.momentum_step``.
        levels : int, optional
            The data rows of v are multiples of 1 / levels, see ``Rows.levels``; of all updates alike.
        """
        self._updates.append((rows, len(v) - rows, rate / rows, model_weight, 1 - rate * decay))
        self._blocks.append(tuple(x.copy() for x in (v[:rows], v[rows:], h[:rows], h[rows:])))
        self._levels = levels or 1

    def pack(self, first: int, size: int) -> Array:
        """The message for the shard of the parameters, W, b and c end to end, that begins at ``first``: uint8."""
        n, m, xp = self.n, self.m, module_of(*(block[0] for block in self._blocks))
        low, high = _columns(n, m, first, size)
        kinds, parts = [], []
        for number in range(4):
            block = xp.concatenate([update[number] for update in self._blocks])
            kind, packed = _pack(block[:, low:high] if number < 2 else block, self._levels)
            kinds.append(kind)
            parts += [packed, xp.zeros(-len(packed) % 8, np.uint8)]
        words = np.array([n, m, first, low, high, self._levels, len(self._updates), *kinds,
                          *(word for update in self._updates for word in update)])
        return xp.concatenate([xp.asarray(words.view(np.uint8)), *parts])


def _overlap(first: int, size: int, begin: int, count: int) -> tuple[int, int]:
    """Which of the ``count`` entries that begin at ``begin`` are among the ``size`` from ``first`` on: from, to."""
    return max(first - begin, 0), min(first + size - begin, count)


def _columns(n: int, m: int, first: int, size: int) -> tuple[int, int]:
    """Which columns of v make the entries of a shard of W, b and c: from, to."""
    (a, b), (c, d) = _overlap(first, size, 0, n * m), _overlap(first, size, n * m, n)
    found = [(a // m, -(-b // m))] * (a < b) + [(c, d)] * (c < d)
    return min((low for low, _ in found), default=0), max((high for _, high in found), default=0)


def _pack(x: Array, levels: int) -> tuple[int, Array]:
    """The kind and the bytes, array of uint8, of a block of float32."""
    xp, flat = module_of(x), x.ravel()
    ones = flat == 1
    if bool((ones | (flat == 0)).all()):
        return BITS, xp.packbits(ones)
    steps = xp.rint(flat * np.float32(levels))
    if 1 < levels < 256 and bool((steps * np.float32(1 / levels) == flat).all() and (abs(steps - 127.5) < 128).all()):
        return BYTES, steps.astype(np.uint8)
    return FLOATS, flat.view(np.uint8)


def _unpack(kind: int, message: Array, count: int, levels: int) -> tuple[Array, int]:
    """``count`` values, float32, that are packed at the begin of the message, and how many bytes they take there."""
    xp = module_of(message)
    if kind == BITS:
        used = -(-count // 8)
        values = xp.unpackbits(message[:used])[:count].astype(np.float32)
    elif kind == BYTES:
        used = count
        values = message[:used].astype(np.float32)
        values *= np.float32(1 / levels)
    else:
        used = 4 * count
        values = message[:used].view(np.float32)
    return values, used + -used % 8


class Activations(NamedTuple):
    """What a message says: W <- kept W + v^T (s later h);  b += v^T s;  c += h^T s.

    K rows: those of the data of all updates, then those of the model. ``v`` has only the columns from ``low`` on that
    a shard wants, which begins at entry ``first`` of W, b and c end to end.
    """

    n: int
    m: int
    first: int
    low: int
    v: Array  # (K, columns), float32
    h: Array  # (K, m), float32
    s: Array  # (K,), float32: rate / rows; of the model negative, and times w
    later: Array  # (K,), float32: what the updates that follow leave of weights
    kept: float  # what all updates leave of them

    def change(self, parameters: Array, out: Array) -> None:
        """out <- the change of the shard, arrays (size,), float32; its parameters are not modified."""
        (n, m, first, low, v, h, s), xp = self[:7], module_of(self.v, out)
        a, b = _overlap(first, out.size, 0, n * m)
        if a < b:
            top, bottom = a // m, -(-b // m)
            dW = xp.matmul(v[:, top - low : bottom - low].T, h * (s * self.later)[:, None])
            out[: b - a] = dW.ravel()[a - top * m : b - top * m]
            out[: b - a] -= parameters[: b - a] * np.float32(1 - self.kept)
        a, b = _overlap(first, out.size, n * m, n)
        if a < b:
            out[n * m + a - first : n * m + b - first] = xp.matmul(s, v[:, a - low : b - low])
        a, b = _overlap(first, out.size, n * m + n, m)
        if a < b:
            out[n * m + n + a - first : n * m + n + b - first] = xp.matmul(s, h[:, a:b])

    def whole(self, size: int) -> bool:
        """Whether a shard of so many entries is all of W, b and c."""
        return self.first == 0 and size == self.n * self.m + self.n + self.m

    def factors(self) -> tuple[Array, Array, Array]:
        """v, h and ``ones`` for ``reference.cd_sums``: of one data row and others with weight -1, so that all count and
        nothing is divided, they make the change of W, b and c but for its decay."""
        xp = module_of(self.v, self.h)
        return self.v, self.h * (self.s * self.later)[:, None], xp.concatenate([self.s, np.float32(1) / self.later])


def read(message: Array) -> Activations:
    """What a message of ``Factors.pack`` says.

    Parameters
    ----------
    message : array (bytes,), uint8
        Begins at a multiple of 8 bytes in memory.
    """
    xp = module_of(message)
    words = to_cpu(message[: 8 * WORDS]).view(np.float64).astype(np.int64)
    n, m, first, low, high, levels, updates = (int(word) for word in words[:7])
    start, end = 8 * WORDS, 8 * (WORDS + PER_UPDATE * updates)
    table = to_cpu(message[start:end]).view(np.float64).reshape(updates, PER_UPDATE)
    counts, (rate, model_weight, kept) = table[:, :2].astype(np.int64), table[:, 2:].T
    blocks = []
    for number, kind in enumerate(words[7:WORDS].tolist()):
        rows, columns = int(counts[:, number % 2].sum()), high - low if number < 2 else m
        values, used = _unpack(kind, message[end:], rows * columns, levels)
        blocks.append(values.reshape(rows, columns))
        end += used
    v, h = xp.concatenate(blocks[:2]), xp.concatenate(blocks[2:])
    later = np.append(np.cumprod(kept[::-1])[::-1][1:], 1)  # what later updates leave of an update's weights
    s, kept_of_row = (xp.asarray(np.concatenate([np.repeat(x, count) for x, count in zip(pair, counts.T, strict=True)])
                                 .astype(np.float32)) for pair in ((rate, -rate * model_weight), (later, later)))
    return Activations(n, m, first, low, v, h, s, kept_of_row, float(np.prod(kept)))
