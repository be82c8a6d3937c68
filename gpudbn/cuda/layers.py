"""Launches of the products of one layer: half-steps and gradients, in float32, rounded or exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gpudbn.arrays import Array
from gpudbn.cuda import exact
from gpudbn.cuda.door import ADDRESS, MOST_IN_Y, NOWHERE, POINTER, RATES, Door, Kinds, Unit
from gpudbn.exact import check_terms
from gpudbn.precision import PRECISIONS, TENSOR_CORES, check_precision
from gpudbn.reference import decoupled


@dataclass(frozen=True)
class Tile:
    """How a product in float32 is cut among threads; the constants of ``product_fp32.cuh``.

    A block makes ``rows`` x ``columns`` sums, a thread ``thread_rows`` x 4; ``depth`` terms are
    in shared memory at a time, and ``slices`` groups of threads share them out.
    """

    rows: int
    columns: int
    depth: int
    thread_rows: int
    slices: int

    shared: ClassVar[int] = 0  # bytes of dynamic shared memory of a block

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.thread_rows * (self.columns // 4) * self.slices

    def blocks(self, rows: int, columns: int) -> int:
        """Blocks of a whole product."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def constants(self) -> dict[str, int]:
        """The constants as the kernels see them."""
        return {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "TILE_DEPTH": self.depth,
                "THREAD_ROWS": self.thread_rows, "SLICES": self.slices, "THREADS": self.threads,
                "BLOCKS_PER_PROCESSOR": 2, "TENSOR_CORES": 0}


@dataclass(frozen=True)
class TensorTile:
    """How a product on tensor cores is cut among warps; the constants of ``product_mma.cuh``.

    A block makes ``rows`` x ``columns`` sums, a warp ``warp_rows`` x ``warp_columns``; ``slices`` groups of warps
    share out the ``depth`` terms of a piece, of which ``stages`` are in shared memory or on their way.
    """

    rows: int
    columns: int
    depth: int
    warp_rows: int
    warp_columns: int
    slices: int
    stages: int
    blocks_per_processor: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.rows // self.warp_rows) * (self.columns // self.warp_columns) * self.slices

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block."""
        return 4 * self.stages * (self.rows + self.columns) * self.depth

    def constants(self, precision: str) -> dict[str, int]:
        """The constants as the kernels see them."""
        return {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "TILE_DEPTH": self.depth,
                "WARP_ROWS": self.warp_rows, "WARP_COLUMNS": self.warp_columns, "SLICES": self.slices,
                "STAGES": self.stages, "THREADS": self.threads, "BLOCKS_PER_PROCESSOR": self.blocks_per_processor,
                "TENSOR_CORES": 1, "TF32": int(precision == "tf32"), "PARTS": 2 if precision == "bf16x2" else 1}

    def reads(self, rows: int, columns: int, processors: int) -> int:
        """What the busiest multiprocessor reads for a product, in operands' lines."""
        blocks = -(-rows // self.rows) * -(-columns // self.columns)
        return -(-blocks // processors) * (self.rows + self.columns)


# Small tiles for small layers: half_step makes 112 blocks of 784x500 at B = 100, about one for each of the 132
# multiprocessors of an H200, with eight slices of the depth in each; cd_update makes 400, with four. Large tiles read
# less for each sum, where products fill the chip anyway: as large as registers allow two blocks a multiprocessor.
TILES = {
    "half_step small": Tile(rows=16, columns=32, depth=128, thread_rows=4, slices=8),
    "half_step large": Tile(rows=64, columns=64, depth=32, thread_rows=4, slices=1),
    "cd_update small": Tile(rows=32, columns=32, depth=64, thread_rows=4, slices=4),
    "cd_update large": Tile(rows=128, columns=64, depth=32, thread_rows=8, slices=1),
}
TILES |= {f"cd_decoupled {size}": TILES[f"cd_update {size}"] for size in ("small", "large")}

# Tensor cores multiply faster than operands come: the larger a tile, the less it reads for each sum, but the fewer
# multiprocessors have one. All have eight warps. A multiprocessor of sm_86 has room for one block of the small two.
TENSOR_TILES = {
    "small": TensorTile(rows=32, columns=32, depth=128, warp_rows=32, warp_columns=32, slices=8, stages=3,
                        blocks_per_processor=2),
    "medium": TensorTile(rows=64, columns=64, depth=64, warp_rows=32, warp_columns=32, slices=2, stages=3,
                         blocks_per_processor=2),
    "large": TensorTile(rows=128, columns=256, depth=32, warp_rows=64, warp_columns=64, slices=1, stages=3,
                        blocks_per_processor=1),
}

_I4, _F4 = np.int32, np.float32
_HALF_STEP: Kinds = (POINTER,) * 5 + (_I4, _I4, _I4, *ADDRESS)  # sample, mean, x, W, bias, B, n, m
_CD: Kinds = (POINTER,) * 4 + (_I4, _I4, _I4, _I4, _F4)  # moved, v, h, ones, n, m, K, rows, model_weight
KERNELS: dict[str, dict[str, Kinds]] = {
    "half_step": {"half_step": _HALF_STEP, "half_step_transposed": _HALF_STEP},
    "cd_update": {"cd_sums": (POINTER, POINTER, POINTER, *_CD), "cd_update": (POINTER, POINTER, *_CD, *RATES)},
    "cd_decoupled": {"cd_sgd": (POINTER, *_CD, *RATES), "cd_adagrad": (POINTER, POINTER, *_CD, _F4, _F4, *RATES)},
}

UNITS: Mapping[str, Unit] = {
    **{name: Unit(f"{name.split()[0]}.cu", KERNELS[name.split()[0]], tile.constants()) for name, tile in TILES.items()},
    **{f"{file} {precision} {size}": Unit(f"{file}.cu", kernels, tile.constants(precision))
       for file, kernels in KERNELS.items() if file != "cd_decoupled"
       for precision in TENSOR_CORES for size, tile in TENSOR_TILES.items()},
    **exact.UNITS,
}


def kernel_of(function: str, precision: str, what: str, terms: int, known: Sequence[str] = ("fp32", "exact")) -> str:
    """The name of the kernel that has this precision, which must be ``known``; ``terms`` are those of its sums."""
    check_precision(function, precision, known)
    if precision == "exact":
        check_terms(function, what, terms)
        return f"{function}_exact"
    return function


class Layers(Door):
    """The half-step and the gradient of contrastive divergence."""

    tensor_tiles: Mapping[str, TensorTile] = TENSOR_TILES  # to choose from

    def _choose(self, name: str, rows: int, columns: int,
                precision: str = "fp32") -> tuple[str, Tile | exact.Tile | TensorTile]:
        """The tile for a product.

        The large one where it makes enough blocks for half the chip, since each does twice the work a read. Where
        operands are rounded, that with which the busiest multiprocessor reads least; of equals the largest, with which
        all of them together read least.
        """
        if precision in TENSOR_CORES:
            sizes = [size for size, tile in self.tensor_tiles.items() if tile.shared <= self.shared_memory]
            if not sizes:
                raise ValueError(f"{name}: precision must be fp32 on this GPU; got {precision}. "
                                 f"A block has {self.shared_memory} bytes of shared memory, too few")
            size = min(reversed(sizes), key=lambda size: self.tensor_tiles[size].reads(rows, columns, self.processors))
            return f"{name} {precision} {size}", self.tensor_tiles[size]
        tiles = TILES if f"{name} large" in TILES else exact.TILES
        size = "large" if 2 * tiles[f"{name} large"].blocks(rows, columns) >= self.processors else "small"
        return f"{name} {size}", tiles[f"{name} {size}"]

    def half_step(self, sample, mean, x, W, bias, *, transpose=False, precision="fp32", seed=0, update=0, site=0,
                  row=0, column=0, columns=None, clock=None):
        """See ``reference.half_step``."""
        if transpose:
            m, n = self._check("half_step", "W", W, "m", "n")
        else:
            n, m = self._check("half_step", "W", W, "n", "m")
        B, _ = self._check("half_step", "x", x, "B", n)
        kernel = kernel_of("half_step", precision, "n", n, PRECISIONS)
        self._check("half_step", "bias", bias, m)
        if sample is None and mean is None:
            raise ValueError("half_step: one of sample and mean must be given; got None for both")
        if mean is not None:
            self._check("half_step", "mean", mean, B, m)
        where, shift = NOWHERE, 0
        if sample is not None:
            self._check("half_step", "sample", sample, B, m)
            where = self._address("half_step", B, m, seed, update, site, row, column, columns, clock)
            shift = column % 4
        if B == 0 or m == 0:
            return
        self._check_apart("half_step", {"sample": sample, "mean": mean}, {"x": x, "W": W, "bias": bias})
        unit, tile = self._choose(kernel, B, m + shift, precision)
        grid = -(-B // tile.rows), -(-(m + shift) // tile.columns)
        if grid[1] > MOST_IN_Y:
            raise ValueError(f"half_step: m must be at most {MOST_IN_Y * tile.columns - 3}; got {m}")
        self._launch(unit, f"{kernel}_transposed" if transpose else kernel, grid, tile.threads,
                     sample, mean, x, W, bias, B, n, m, *where, shared=tile.shared)

    def cd_sums(self, dW, db, dc, v, h, rows, *, model_weight=1.0, ones=None, moved=None, precision="fp32"):
        """See ``reference.cd_sums``."""
        K, n, m = self._cd_sizes("cd_sums", v, h, rows)
        kernel = kernel_of("cd_sums", precision, "rows", max(rows, K - rows), PRECISIONS)
        self._check("cd_sums", "dW", dW, n, m)
        self._check("cd_sums", "db", db, n)
        self._check("cd_sums", "dc", dc, m)
        self._check_apart("cd_sums", {"dW": dW, "db": db, "dc": dc}, {"v": v, "h": h})
        self._check_centred(kernel, {"dW": dW, "db": db, "dc": dc}, v, h, ones, moved)
        unit, grid, tile = self._cd_grid(kernel, n, m, moved, precision)
        units = (v, h) if precision == "exact" else (moved, v, h, ones)
        self._launch(unit, kernel, grid, tile.threads, dW, db, dc, *units, n, m, K, rows, model_weight,
                     shared=tile.shared)

    def cd_update(self, parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
                  rate, momentum, decay, rates=None, precision="fp32"):
        """See ``reference.cd_update``. ``gradient`` is not touched and may be None: the sums stay in registers."""
        _ = gradient
        self._cd_step("cd_update", {"parameters": parameters, "velocity": velocity}, n, m, v, h, rows, model_weight,
                      ones, moved, lambda scale: (rate * scale, momentum, rate * decay), rates, precision)

    def cd_sgd(self, parameters, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate, decay,
               rates=None):
        """See ``reference.cd_sgd``. ``gradient`` is not touched and may be None."""
        _ = gradient
        self._cd_step("cd_sgd", {"parameters": parameters}, n, m, v, h, rows, model_weight, ones, moved,
                      lambda scale: decoupled(scale, rate, decay), rates)

    def cd_adagrad(self, parameters, squares, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
                   rate, decay, fade=0.0, eps=1e-8, rates=None):
        """See ``reference.cd_adagrad``. ``gradient`` is not touched and may be None."""
        _ = gradient
        self._cd_step("cd_adagrad", {"parameters": parameters, "squares": squares}, n, m, v, h, rows, model_weight,
                      ones, moved, lambda scale: (eps, fade, *decoupled(scale, rate, decay)), rates)

    def _cd_step(self, function: str, changed: Mapping[str, Array], n: int, m: int, v: Array, h: Array, rows: int,
                 model_weight: float, ones: Array | None, moved: Array | None,
                 numbers: Callable[[float], tuple[float, ...]], rates: Array | None, precision: str = "fp32") -> None:
        """Launch a step with the gradient.

        ``changed`` are the parameters and what the rule keeps for each, in order; ``numbers`` makes the kernel's last
        scalars of 1 / rows.
        """
        K, _, _ = self._cd_sizes(function, v, h, rows, n, m)
        kernel = kernel_of(function, precision, "rows", max(rows, K - rows), PRECISIONS)
        if rows == 0:
            raise ValueError(f"{function}: rows must be positive; got 0")
        for name, array in changed.items():
            self._check(function, name, array, n * m + n + m)
        self._check_apart(function, changed, {"v": v, "h": h})
        parameters, *state = changed.items()
        self._check_apart(function, dict(state), dict([parameters]))
        self._check_centred(kernel, changed, v, h, ones, moved)
        unit, grid, tile = self._cd_grid(kernel, n, m, moved, precision)
        units = (v, h) if precision == "exact" else (moved, v, h, ones)
        self._launch(unit, kernel, grid, tile.threads, *changed.values(), *units, n, m, K, rows, model_weight,
                     *numbers(1 / rows), self._rates(function, rates), shared=tile.shared)

    def _cd_sizes(self, function: str, v: Array, h: Array, rows: int, n: int | str = "n", m: int | str = "m"):
        K, n = self._check(function, "v", v, "rows + C", n)
        _, m = self._check(function, "h", h, K, m)
        if not 0 <= rows <= K:
            raise ValueError(f"{function}: rows must lie between 0 and the {K} rows of v; got {rows}")
        return K, n, m

    def _check_centred(self, kernel: str, written: Mapping[str, Array], v: Array, h: Array, ones: Array | None,
                       moved: Array | None) -> None:
        if ones is not None:
            if kernel.endswith("_exact"):
                raise ValueError(f"{kernel.removesuffix('_exact')}: ones must be None where precision is exact, since "
                                 "centred units are no whole numbers; got an array")
            self._check(kernel, "ones", ones, 2 * len(v))
            self._check_apart(kernel, written, {"ones": ones})
        if moved is not None:
            if ones is None:
                raise ValueError(f"{kernel}: moved must be given with ones; got ones None")
            self._check(kernel, "moved", moved, v.shape[1] + h.shape[1])
            self._check_apart(kernel, {"moved": moved}, {"v": v, "h": h, "ones": ones, **written})

    def _cd_grid(self, kernel: str, n: int, m: int, moved: Array | None,
                 precision: str) -> tuple[str, tuple[int, int], Tile | exact.Tile | TensorTile]:
        name = ("cd_update_exact" if kernel.endswith("_exact") else
                "cd_update" if kernel in KERNELS["cd_update"] else "cd_decoupled")
        units = 1 if moved is None else 2  # more of each, for the biases and for `moved`
        unit, tile = self._choose(name, n + units, m + units, precision)
        grid = -(-(m + units) // tile.columns), -(-(n + units) // tile.rows)
        if grid[1] > MOST_IN_Y:
            raise ValueError(f"{kernel}: n must be below {MOST_IN_Y * tile.rows - units + 1}; got {n}")
        return unit, grid, tile
