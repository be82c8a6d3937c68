"""Counter-based random numbers: a draw is a function of its address, and nothing has state.

    u(seed, update, site, row, column) = (word >> 8) * 2**-24          in [0, 1), exact in float32
    key     = (seed low, seed high)
    counter = (index low, index high, update, site),  index = row * ceil(columns / 4) + column // 4
    word    = output[column % 4]

with Philox4x32-10 of Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). The address says where and when a number is used: so a cut batch, another number of
ranks, a stopped and resumed run or a GPU all see the same chance. GPU twin: ``kernels/philox.cuh``.

- ``update`` counts parameter updates over a whole run, or stands for the epoch, temperature or
  chain step where that is the clock.
- ``row`` is the position in the global batch, or the chain's number. An asynchronous replica r
  uses rows ``replica_row(r)`` + i.
- ``column`` is the unit's number in the whole layer, ``columns`` the layer's size. Of a group of units of which one is
  on, which draws once, it is the group's number, and ``columns`` counts groups.
- ``site`` = purpose (8 bits) | layer (8 bits) | half-step (16 bits): see ``site``.
"""

from __future__ import annotations

import threading
from enum import IntEnum

import numpy as np
from randomgen import Philox

from gpudbn import compiled

_LOW = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a draw is for; the top eight bits of a site. Numbers are part of the file format."""

    INITIALISATION = 0
    ORDER = 1
    BINARISATION = 2
    UP = 3
    CD = 4
    CHAIN = 5
    TEMPERING = 6
    DROPOUT = 7
    AIS = 8
    SAMPLING = 9
    JITTER = 10


def site(purpose: Purpose, layer: int = 0, half_step: int = 0) -> int:
    """The site number: purpose << 24 | layer << 16 | half_step."""
    if not (0 <= layer < 1 << 8 and 0 <= half_step < 1 << 16):
        raise ValueError(f"site: layer must be below 256 and half_step below 65536; got {layer}, {half_step}")
    return int(purpose) << 24 | layer << 16 | half_step


def replica_row(replica: int) -> int:
    """The first row of an asynchronous replica, which has no place in a global batch: replica * 2**32."""
    return replica << 32


def philox4x32(counter, key):
    """Philox4x32-10 on arrays of counters: the specification, as the paper has it; and what CuPy alone draws with.

    Parameters
    ----------
    counter : four arrays of uint64, of any array module, or integers; below 2**32
        Shapes that broadcast.
    key : two integers below 2**32

    Returns
    -------
    four arrays of uint64, below 2**32
    """
    (c0, c1, c2, c3), (k0, k1) = counter, (int(k) for k in key)
    low, half = np.uint64(_LOW), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _check(seed: int, update: int, site: int, index: int, blocks: int) -> None:
    """Whether there are such an address and so many blocks behind it."""
    if not (0 <= seed < 1 << 64 and 0 <= update < 1 << 32 and 0 <= site < 1 << 32
            and 0 <= index <= (1 << 64) - blocks):  # behind the last index lies the next update
        raise ValueError("draws: seed and index must lie in [0, 2**64), update and site in [0, 2**32); "
                         f"got seed {seed}, index {index} and {blocks} blocks, update {update}, site {site}")


class _Stream(threading.local):
    """One generator a thread, set to an address before every use; its own state is never read."""

    def __init__(self) -> None:
        self.bits = Philox(number=4, width=32, key=0, counter=0)
        self.numbers = np.random.Generator(self.bits)
        self.state = self.bits.state

    def at(self, seed: int, update: int, site: int, index: int, blocks: int) -> np.random.Generator:
        """The generator, about to give ``blocks`` blocks from this counter on."""
        _check(seed, update, site, index, blocks)
        # randomgen increments the counter before each block
        before = ((site << 96 | update << 64 | index) - 1) & ((1 << 128) - 1)
        state = self.state
        state["state"]["counter"][:] = (before & _LOW, before >> 32 & _LOW, before >> 64 & _LOW, before >> 96)
        state["state"]["key"][:] = (seed & _LOW, seed >> 32)
        state["buffer_pos"] = 4
        state["has_uint32"] = 0
        self.bits.state = state
        return self.numbers


_stream = _Stream()


def uniforms(out, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """Fill ``out`` with u(seed, update, site, row + i, column + j).

    Parameters
    ----------
    out : array (B, m), float32
        Overwritten.
    seed, update, site, row, column : int
        The address of ``out[0, 0]``; see the head of this file.
    columns : int, optional
        Size of the whole layer; ``column + m`` if not given.
    clock : array (1,), uint32, optional
        Added to ``update``: where launches are repeated as they are in a CUDA graph.

    Returns
    -------
    array (B, m), float32
        ``out``.

    Notes
    -----
    GPU twin: ``cuda/draws.py``.
    """
    rows, m = out.shape
    columns = column + m if columns is None else columns
    update += 0 if clock is None else int(clock[0])
    if not 0 <= column <= columns - m:  # it would take the draws of the next row
        raise ValueError(f"uniforms: column + {m} must be at most columns; got {column} of {columns}")
    blocks = -(-columns // 4)
    whole_blocks = column == 0 and m == columns == 4 * blocks and out.flags.c_contiguous
    fill = compiled.quick(compiled.fill) if whole_blocks and out.size >= compiled.MANY else None
    if fill is not None:
        _check(seed, update, site, row * blocks, rows * blocks)
        fill(out.reshape(-1), np.uint64(row * blocks), update, site, np.uint64(seed & _LOW), np.uint64(seed >> 32))
    elif whole_blocks:
        _stream.at(seed, update, site, row * blocks, rows * blocks).random(out=out, dtype=np.float32)
    elif column == 0 and columns == m:
        numbers = _stream.at(seed, update, site, row * blocks, rows * blocks)
        whole = numbers.random((rows, 4 * blocks), dtype=np.float32)
        out[...] = whole[:, :m]
    else:  # part of a layer: its blocks are not neighbours from row to row
        first, last = column // 4, -(-(column + m) // 4)
        for i in range(rows):
            numbers = _stream.at(seed, update, site, (row + i) * blocks + first, last - first)
            out[i] = numbers.random(4 * (last - first), dtype=np.float32)[column - 4 * first :][:m]
    return out


def words(count: int, *, seed: int, update: int, site: int, row: int = 0) -> np.ndarray:
    """The ``count`` uint32 words of one row: what ``uniforms`` is made of."""
    blocks = -(-count // 4)
    numbers = _stream.at(seed, update, site, row * blocks, blocks)
    return numbers.integers(0, 1 << 32, count, dtype=np.uint32)


def permutation(count: int, *, seed: int, update: int, site: int, row: int = 0) -> np.ndarray:
    """An order of ``count`` rows: the stable argsort of their words. Array (count,), int64."""
    return np.argsort(words(count, seed=seed, update=update, site=site, row=row), kind="stable")


def normals(out, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """Fill ``out`` (B, m), float32, with standard normals: Box-Muller on neighbouring uniforms.

        z[2j], z[2j+1] = r cos(2 pi u[2j+1]), r sin(2 pi u[2j+1]),  r = sqrt(-2 log(1 - u[2j]))

    Parameters as of ``uniforms``; ``column`` must be even. Returns ``out``.

    Notes
    -----
    Computed in float64; the GPU twin computes in float32, and agrees to 4e-7 of the value.
    """
    rows, m = out.shape
    if column % 2:
        raise ValueError(f"normals: column must be even; got {column}")
    u = np.empty((rows, m + m % 2), np.float32)
    columns = column + m if columns is None else columns
    uniforms(u, seed=seed, update=update, site=site, row=row, column=column, columns=columns + columns % 2, clock=clock)
    return box_muller(out, u)


def box_muller(out, u, xp=np):
    """``out`` (B, m) <- the normals of ``normals`` from uniforms ``u`` (B, m or m + 1), of an array module."""
    radius = xp.sqrt(-2 * xp.log1p(-u[:, 0::2].astype(np.float64)))
    angle = 2 * np.pi * u[:, 1::2].astype(np.float64)
    out[:, 0::2] = radius * xp.cos(angle)
    out[:, 1::2] = (radius * xp.sin(angle))[:, : out.shape[1] // 2]
    return out
