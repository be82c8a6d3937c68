"""Units of exact mode: ``kernels/half_step_exact.cu`` and ``kernels/cd_update_exact.cu``. Launched by ``layers.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gpudbn.cuda.door import ADDRESS, POINTER, Kinds, Unit


@dataclass(frozen=True)
class Tile:
    """How a product of integers is cut among warps; the constants of ``limbs.cuh``.

    A block makes ``rows`` x ``columns`` sums, a warp 16 x 32; ``depth`` terms are in shared memory at a
    time, and ``slices`` groups of warps share them out.
    """

    rows: int
    columns: int
    depth: int
    slices: int

    shared: ClassVar[int] = 0  # bytes of dynamic shared memory of a block

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // 16 * (self.columns // 32) * 32 * self.slices

    def blocks(self, rows: int, columns: int) -> int:
        """Blocks of a whole product."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def constants(self) -> dict[str, int]:
        """The constants as the kernels see them."""
        return {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "TILE_DEPTH": self.depth, "SLICES": self.slices,
                "THREADS": self.threads}


TILES = {f"{kernel} {size}": tile for kernel in ("half_step_exact", "cd_update_exact")
         for size, tile in (("small", Tile(rows=32, columns=32, depth=128, slices=4)),
                            ("large", Tile(rows=64, columns=64, depth=64, slices=1)))}

_I4, _F4 = np.int32, np.float32
_HALF_STEP: Kinds = (POINTER,) * 5 + (_I4, _I4, _I4, *ADDRESS)  # sample, mean, x, W, bias, B, n, m
_CD: Kinds = (POINTER, POINTER, _I4, _I4, _I4, _I4, _F4)  # v, h, n, m, K, rows, model_weight
KERNELS: dict[str, dict[str, Kinds]] = {
    "half_step_exact": {"half_step_exact": _HALF_STEP, "half_step_exact_transposed": _HALF_STEP},
    "cd_update_exact": {"cd_sums_exact": (POINTER, POINTER, POINTER, *_CD),
                        "cd_update_exact": (POINTER, POINTER, *_CD, _F4, _F4, _F4, POINTER)},
}

UNITS: Mapping[str, Unit] = {name: Unit(f"{name.split()[0]}.cu", KERNELS[name.split()[0]], tile.constants())
                             for name, tile in TILES.items()}
