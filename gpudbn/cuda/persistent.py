"""Launches of ``kernels/persistent.cu``: many updates of one layer with its parameters on the chip.

What fits is computed from the device. A block, one a multiprocessor, holds its columns and its rows
of W in float32, the columns with their velocity unless there is no momentum: with G multiprocessors
about 12 n m / G bytes of shared memory, or 8 n m / G.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.arrays import module_of
from gpudbn.cuda.door import POINTER, Door, Kinds, Unit
from gpudbn.draws import Purpose, site

THREADS = 384  # with 168 registers each, which the gradient needs
ROWS = 128  # the most rows of a minibatch, and the most chains
MOST_LEVELS = 255  # of numbers that are kept as bytes

_I4, _U4, _U8, _F4 = np.int32, np.uint32, np.uint64, np.float32
_CD_RUN: Kinds = (*(POINTER,) * 5, *(_I4,) * 9, _U8, _U4, _U4, _U4, _U8, _U8, *(_F4,) * 4)

UNITS: Mapping[str, Unit] = {
    "persistent": Unit("persistent.cu", {"cd_run": _CD_RUN}, {"THREADS": THREADS, "ROWS": ROWS}, cooperative=True),
}

OWN = 128  # bytes of shared memory that the kernel declares by itself
_SLOTS = 4 * (THREADS // 32 // (ROWS // 64) // 2) * 8 * ROWS  # bytes for the sums of half-steps


def blocks_of(n: int, m: int, processors: int) -> int:
    """Blocks of a launch: one a multiprocessor, unless there are fewer units than that."""
    return min(processors, max(n, m))


def shared_bytes(n: int, m: int, processors: int, *, momentum: bool) -> int:
    """Shared memory of a block for a layer of n visible and m hidden units: what ``side`` of the kernel uses."""
    blocks = blocks_of(n, m, processors)

    def slab(units: int, inputs: int) -> int:
        return -(-units // blocks) * (inputs // 16 * 16 + 24)

    return OWN + _SLOTS + 4 * (slab(m, n) * (2 if momentum else 1) + slab(n, m) + -(-n // blocks))


def work_words(n: int, m: int, updates: int, *, levels: int | None, last_mean: bool) -> int:
    """Words of the room for the states of units: what ``Work`` of the kernel uses."""
    bits = ROWS // 32
    width = 16 if levels is None else 1 if levels == 1 else 8  # bits of a state of the data
    return bits * (m * (2 + 16 * last_mean) + n * (1 + updates * width))


class Persistent(Door):
    """Many updates in one launch."""

    def cd_run_fits(self, n: int, m: int, rows: int, *, momentum: bool) -> bool:
        """Whether ``cd_run`` takes a layer of this size, and so many rows or chains, on this device."""
        return rows <= ROWS and shared_bytes(n, m, self.processors, momentum=momentum) <= self.shared_memory

    def cd_run(self, parameters, velocity, v, n, m, *, batch, chains=None, k=1, last_hidden="mean", levels=None, seed,
               update, layer=0, row=0, chain_row=0, rate, momentum, decay):
        """See ``reference.cd_run``.

        Raises
        ------
        ValueError
            If there are too many rows, or the layer does not fit: see ``cd_run_fits``.
        """
        rows, _ = self._check("cd_run", "v", v, "rows", n)
        self._check("cd_run", "parameters", parameters, n * m + n + m)
        self._check("cd_run", "velocity", velocity, n * m + n + m)
        model_rows = batch
        if chains is not None:
            model_rows, _ = self._check("cd_run", "chains", chains, "C", m)
        if min(n, m, rows, batch, model_rows, k) < 1:
            raise ValueError("cd_run: n, m, rows, batch, chains and k must be positive; "
                             f"got {n}, {m}, {rows}, {batch}, {model_rows}, {k}")
        if max(batch, model_rows) > ROWS:
            raise ValueError(f"cd_run: batch and chains must be at most {ROWS}; got {batch} and {model_rows}")
        if last_hidden not in ("sample", "mean"):
            raise ValueError(f"cd_run: last_hidden must be sample or mean; got {last_hidden}")
        if levels is not None and not 1 <= levels <= MOST_LEVELS:
            raise ValueError(f"cd_run: levels must lie between 1 and {MOST_LEVELS}; got {levels}")
        needed = shared_bytes(n, m, self.processors, momentum=momentum != 0)
        if needed > self.shared_memory:
            layer = f"a layer of {n} x {m}" + " with momentum" * (momentum != 0)
            raise ValueError(f"cd_run: {layer} must fit the chip; got {needed} bytes of shared memory for each of "
                             f"{self.processors} multiprocessors, which have {self.shared_memory}. "
                             "Use half_step and cd_update")
        written = {"parameters": parameters, "velocity": velocity, "chains": chains}
        self._check_apart("cd_run", written, {"v": v})
        self._check_apart("cd_run", {"parameters": parameters}, {"velocity": velocity})
        self._check_apart("cd_run", {"chains": chains}, {"parameters": parameters, "velocity": velocity})

        updates = -(-rows // batch)
        data_site = site(Purpose.CD, layer)
        model_site = data_site if chains is None else site(Purpose.CHAIN, layer)
        site(Purpose.CD, layer, 2 * k)  # refused if k is too large for an address
        for first_row, count in ((row, batch), (chain_row, model_rows)):
            self._address("cd_run", count, max(n, m), seed, update + updates - 1, data_site, first_row, 0, None, None)
        last_rows = rows - (updates - 1) * batch
        last_mean = last_hidden == "mean"
        work = module_of(v).empty(work_words(n, m, updates, levels=levels, last_mean=last_mean), np.uint32)
        blocks = blocks_of(n, m, self.processors)
        self._launch("persistent", "cd_run", (blocks,), THREADS, parameters, velocity, chains, work, v, n, m, blocks,
                     rows, batch, model_rows, k, levels or 0, last_mean, seed, update, data_site, model_site, row,
                     chain_row, rate * (1 / batch), rate * (1 / last_rows), momentum, rate * decay, shared=needed - OWN)
