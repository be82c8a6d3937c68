"""The one door to the kernels: reads ``kernels/``, checks arguments, computes grids, launches.

Same names and signatures as ``reference.py``, for arrays on the current GPU. A kernel believes
what it is told, so everything is checked here: type, shape, contiguity, device and overlap of
arrays, range of numbers; every scalar is cast to the exact type of the kernel's parameter.

    Launcher(...)    the checks and launches, over any maker of modules and any type of array
    uniforms, ...    the same, bound to CuPy, which is imported at the first use
    compile_all()    compiles every kernel at start rather than at first use

Launches go to CuPy's current stream and do not wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.tracing import span

__all__ = ["bernoulli", "cd_sums", "cd_update", "half_step", "momentum_step", "sigmoid", "uniforms"]

PLACES = (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "kernels")  # wheel, editable install
THREADS = 256  # a block of an elementwise kernel
BLOCKS_PER_PROCESSOR = 16  # at most, for elementwise kernels: their threads go on to further entries
LARGEST = 2**31 - 1024  # sizes are int32 in the kernels, and a tile may hang over
MOST_IN_Y = 65535  # blocks of a grid in y


@dataclass(frozen=True)
class Tile:
    """How a product is cut among threads; the constants of ``product.cuh``.

    A block makes ``rows`` x ``columns`` sums, a thread ``thread_rows`` x 4; ``depth`` terms are
    in shared memory at a time, and ``slices`` groups of threads share them out.
    """

    rows: int
    columns: int
    depth: int
    thread_rows: int
    slices: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.thread_rows * (self.columns // 4) * self.slices

    def blocks(self, rows: int, columns: int) -> int:
        """Blocks of a whole product."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def defines(self) -> str:
        """The constants as the kernels see them."""
        values = {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "TILE_DEPTH": self.depth,
                  "THREAD_ROWS": self.thread_rows, "SLICES": self.slices, "THREADS": self.threads}
        return "".join(f"#define {name} {value}\n" for name, value in values.items())


# Small tiles for small layers: half_step makes 112 blocks of 784x500 at B = 100, about one for each of the 132
# multiprocessors of an H200, with eight slices of the depth in each; cd_update makes 400, with four. Large tiles read
# less for each sum, where products fill the chip anyway: as large as registers allow two blocks a multiprocessor.
TILES = {
    "half_step small": Tile(rows=16, columns=32, depth=128, thread_rows=4, slices=8),
    "half_step large": Tile(rows=64, columns=64, depth=32, thread_rows=4, slices=1),
    "cd_update small": Tile(rows=32, columns=32, depth=64, thread_rows=4, slices=4),
    "cd_update large": Tile(rows=128, columns=64, depth=32, thread_rows=8, slices=1),
}

# What is compiled at once: a file, and once for each of its tiles if it has products.
UNITS = {"draws": "draws.cu", "elementwise": "elementwise.cu"} | {unit: unit.split()[0] + ".cu" for unit in TILES}

# The parameters of every kernel, in order: POINTER for an array or None, else the exact type of a scalar.
POINTER = None
_I4, _I8, _U4, _U8, _F4 = np.int32, np.int64, np.uint32, np.uint64, np.float32
_ADDRESS = (_U8, _U4, _U4, _U8, _U8, _U8)  # seed, update, site, row, column, blocks
_CD = (POINTER, POINTER, _I4, _I4, _I4, _I4, _F4)  # v, h, n, m, K, rows, model_weight

KERNELS: dict[str, tuple[str, tuple[type[np.generic] | None, ...]]] = {
    "uniforms": ("draws.cu", (POINTER, _I4, _I4, *_ADDRESS)),
    "bernoulli": ("draws.cu", (POINTER, POINTER, _I4, _I4, *_ADDRESS)),
    "sigmoid": ("elementwise.cu", (POINTER, _I8)),
    "momentum_step": ("elementwise.cu", (POINTER, POINTER, POINTER, _I8, _I8, _F4, _F4, _F4)),
    "half_step": ("half_step.cu", (POINTER,) * 5 + (_I4, _I4, _I4, *_ADDRESS)),
    "half_step_transposed": ("half_step.cu", (POINTER,) * 5 + (_I4, _I4, _I4, *_ADDRESS)),
    "cd_sums": ("cd_update.cu", (POINTER, POINTER, POINTER, *_CD)),
    "cd_update": ("cd_update.cu", (POINTER, POINTER, *_CD, _F4, _F4, _F4)),
}
_FLOAT32 = np.dtype(np.float32)
_NULL = np.uint64(0)  # what a kernel takes for an absent array


def kernels_folder() -> Path:
    """Where the kernels are: inside an installed package, beside it in a source tree."""
    for place in PLACES:
        if place.is_dir():
            return place
    raise RuntimeError(f"cuda: the kernels must be in {PLACES[0]} or {PLACES[1]}; neither is there. "
                       "Was the package copied without its data?")


def source(unit: str) -> str:
    """The whole text of a unit: constants first, every header pasted in at its first mention.

    Headers are pasted because CuPy's cache on disk is keyed by this text and does not look into
    included files. ``#line`` keeps the compiler's messages in the terms of the files.
    """
    folder, pasted = kernels_folder(), set()

    def text_of(name: str) -> str:
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
            include = re.fullmatch(r'#include "(\w+\.cuh)"', line)
            if line == "#pragma once":
                lines.append("")
            elif include is None:
                lines.append(line)
            elif include[1] not in pasted:
                pasted.add(include[1])
                lines += [text_of(include[1]), f'#line {number + 1} "{name}"']
            else:
                lines.append("")
        return "\n".join(lines)

    return (TILES[unit].defines() if unit in TILES else "") + text_of(UNITS[unit]) + "\n"


class Launcher:
    """Checks and launches.

    Parameters
    ----------
    make_module : callable
        From CUDA source to an object whose ``get_function(name)`` is called as
        ``(grid, block, arguments)``: ``cupy.RawModule``, or a stand-in.
    array_type : type
        The one type of array that is let through.
    address_of : callable
        From an array to the address of its first byte.
    processors : int
        Multiprocessors of the device.
    device_of, current_device : callables
        The number of an array's device, and of the device that launches go to.
    """

    def __init__(self, make_module: Callable[[str], Any], array_type: type, address_of: Callable[[Array], int],
                 processors: int, device_of: Callable[[Array], int], current_device: Callable[[], int]) -> None:
        self.make_module = make_module
        self.array_type = array_type
        self.address_of = address_of
        self.processors = processors
        self.device_of = device_of
        self.current_device = current_device
        self._functions: dict[tuple[str, str], tuple[Any, Any]] = {}  # of a unit's kernel: function, NVTX range

    # ------------------------------------------------------------------------------------ compiling and launching

    def compile_all(self) -> None:
        """Compile every kernel."""
        for unit in UNITS:
            self._compile(unit)

    def _compile(self, unit: str) -> None:
        with span(f"compile {unit}"):
            module = self.make_module(source(unit))
            for kernel, (file, _) in KERNELS.items():
                if file == UNITS[unit]:
                    self._functions[unit, kernel] = module.get_function(kernel), span(kernel)

    def _launch(self, unit: str, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        if (unit, kernel) not in self._functions:
            self._compile(unit)
        cast = tuple([(_NULL if value is None else value) if to is POINTER else to(value)
                      for to, value in zip(KERNELS[kernel][1], arguments, strict=True)])
        function, named = self._functions[unit, kernel]
        with named:
            function(grid, (threads,), cast)

    def _launch_elementwise(self, unit: str, kernel: str, threads: int, *arguments: Any) -> None:
        """Launch for so many threads, or fewer that go round."""
        blocks = min(-(-threads // THREADS), BLOCKS_PER_PROCESSOR * self.processors)
        self._launch(unit, kernel, (blocks,), THREADS, *arguments)

    def _choose(self, name: str, rows: int, columns: int) -> tuple[str, Tile]:
        """The large tile where it makes enough blocks for half the chip, since each does twice the work a read."""
        size = "large" if 2 * TILES[f"{name} large"].blocks(rows, columns) >= self.processors else "small"
        return f"{name} {size}", TILES[f"{name} {size}"]

    # ------------------------------------------------------------------------------------------------- checking

    def _check(self, function: str, name: str, array: Array, *shape: int | str) -> tuple[int, ...]:
        """The shape of an array that a kernel will not misread. A size given by name is free, up to an int32."""
        if (issubclass(type(array), self.array_type) and array.dtype == _FLOAT32 and array.flags.c_contiguous
                and self.device_of(array) == self.current_device() and len(array.shape) == len(shape)):
            for have, want in zip(array.shape, shape, strict=True):
                if have != want and (not isinstance(want, str) or have > LARGEST):
                    break
            else:
                return array.shape
        raise self._refusal(function, name, array, shape)

    def _refusal(self, function: str, name: str, array: Array, shape: tuple[int | str, ...]) -> Exception:
        """Why ``_check`` refuses."""
        if not issubclass(type(array), self.array_type):
            return TypeError(f"{function}: {name} must be a {_kind(self.array_type)}; got {_kind(type(array))}")
        here, there = self.current_device(), self.device_of(array)
        if here != there:
            return ValueError(f"{function}: {name} must be on the current device, {here}; "
                              f"got an array on device {there}")
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        if max(array.shape, default=0) > LARGEST:
            wanted += f", each size at most {LARGEST}"
        layout, hint = "", ""
        if not array.flags.c_contiguous:
            layout, hint = "a view of ", ". Strides are not followed: make a copy"
        return (ValueError if array.dtype == _FLOAT32 else TypeError)(
            f"{function}: {name} must be C-contiguous float32 of shape {wanted}; "
            f"got {layout}{array.dtype} {array.shape}{hint}")

    def _check_apart(self, function: str, written: dict[str, Array], read: dict[str, Array]) -> None:
        """Refuse outputs that overlap inputs: blocks run in no order, so an input might be overwritten before use."""
        inputs = [(name, start := self.address_of(array), start + array.nbytes) for name, array in read.items()]
        for name, array in written.items():
            if array is not None:
                start = self.address_of(array)
                end = start + array.nbytes
                for other, other_start, other_end in inputs:
                    if start < other_end and other_start < end:
                        raise ValueError(f"{function}: {name} must not share memory with {other}")

    # ------------------------------------------------------------------------------------------------- the twins

    def uniforms(self, out, *, seed, update, site, row=0, column=0, columns=None):
        """See ``reference.uniforms``."""
        B, m = self._check("uniforms", "out", out, "B", "m")
        address = _address("uniforms", B, m, seed, update, site, row, column, columns)
        if out.size:
            self._launch_elementwise("draws", "uniforms", B * _quads(m, column), out, B, m, *address)
        return out

    def bernoulli(self, sample, mean, *, seed, update, site, row=0, column=0, columns=None):
        """See ``reference.bernoulli``."""
        B, m = self._check("bernoulli", "mean", mean, "B", "m")
        self._check("bernoulli", "sample", sample, B, m)
        address = _address("bernoulli", B, m, seed, update, site, row, column, columns)
        if mean.size:
            if sample is not mean and self.address_of(sample) != self.address_of(mean):
                self._check_apart("bernoulli", {"sample": sample}, {"mean": mean})
            self._launch_elementwise("draws", "bernoulli", B * _quads(m, column), sample, mean, B, m, *address)
        return sample

    def sigmoid(self, x):
        """See ``reference.sigmoid``."""
        self._check("sigmoid", "x", x, *getattr(x, "shape", ()))
        if x.size:
            self._launch_elementwise("elementwise", "sigmoid", x.size, x, x.size)
        return x

    def half_step(self, sample, mean, x, W, bias, *, transpose=False, seed=0, update=0, site=0, row=0, column=0,
                  columns=None):
        """See ``reference.half_step``."""
        if transpose:
            m, n = self._check("half_step", "W", W, "m", "n")
        else:
            n, m = self._check("half_step", "W", W, "n", "m")
        B, _ = self._check("half_step", "x", x, "B", n)
        self._check("half_step", "bias", bias, m)
        if sample is None and mean is None:
            raise ValueError("half_step: one of sample and mean must be given; got None for both")
        if mean is not None:
            self._check("half_step", "mean", mean, B, m)
        address, shift = (0, 0, 0, 0, 0, 0), 0  # where nothing is drawn
        if sample is not None:
            self._check("half_step", "sample", sample, B, m)
            address, shift = _address("half_step", B, m, seed, update, site, row, column, columns), column % 4
        if B == 0 or m == 0:
            return
        self._check_apart("half_step", {"sample": sample, "mean": mean}, {"x": x, "W": W, "bias": bias})
        unit, tile = self._choose("half_step", B, m + shift)
        grid = -(-B // tile.rows), -(-(m + shift) // tile.columns)
        if grid[1] > MOST_IN_Y:
            raise ValueError(f"half_step: m must be at most {MOST_IN_Y * tile.columns - 3}; got {m}")
        self._launch(unit, "half_step_transposed" if transpose else "half_step", grid, tile.threads,
                     sample, mean, x, W, bias, B, n, m, *address)

    def cd_sums(self, dW, db, dc, v, h, rows, *, model_weight=1.0):
        """See ``reference.cd_sums``."""
        K, n, m = self._cd_sizes("cd_sums", v, h, rows)
        self._check("cd_sums", "dW", dW, n, m)
        self._check("cd_sums", "db", db, n)
        self._check("cd_sums", "dc", dc, m)
        self._check_apart("cd_sums", {"dW": dW, "db": db, "dc": dc}, {"v": v, "h": h})
        unit, grid, threads = self._cd_grid("cd_sums", n, m)
        self._launch(unit, "cd_sums", grid, threads, dW, db, dc, v, h, n, m, K, rows, model_weight)

    def cd_update(self, parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, rate, momentum, decay):
        """See ``reference.cd_update``. ``gradient`` is not touched and may be None: the sums stay in registers."""
        _ = gradient
        K, _, _ = self._cd_sizes("cd_update", v, h, rows, n, m)
        if rows == 0:
            raise ValueError("cd_update: rows must be positive; got 0")
        self._check("cd_update", "parameters", parameters, n * m + n + m)
        self._check("cd_update", "velocity", velocity, n * m + n + m)
        self._check_apart("cd_update", {"parameters": parameters, "velocity": velocity}, {"v": v, "h": h})
        self._check_apart("cd_update", {"velocity": velocity}, {"parameters": parameters})
        unit, grid, threads = self._cd_grid("cd_update", n, m)
        self._launch(unit, "cd_update", grid, threads, parameters, velocity, v, h, n, m, K, rows, model_weight,
                     rate * (1 / rows), momentum, rate * decay)

    def _cd_sizes(self, function: str, v: Array, h: Array, rows: int, n: int | str = "n", m: int | str = "m"):
        K, n = self._check(function, "v", v, "rows + C", n)
        _, m = self._check(function, "h", h, K, m)
        if not 0 <= rows <= K:
            raise ValueError(f"{function}: rows must lie between 0 and the {K} rows of v; got {rows}")
        return K, n, m

    def _cd_grid(self, function: str, n: int, m: int) -> tuple[str, tuple[int, int], int]:
        unit, tile = self._choose("cd_update", n + 1, m + 1)  # one more of each for the biases
        grid = -(-(m + 1) // tile.columns), -(-(n + 1) // tile.rows)
        if grid[1] > MOST_IN_Y:
            raise ValueError(f"{function}: n must be below {MOST_IN_Y * tile.rows}; got {n}")
        return unit, grid, tile.threads

    def momentum_step(self, parameters, velocity, gradient, *, weights, scale, rate, momentum, decay):
        """See ``reference.momentum_step``."""
        size = getattr(parameters, "size", 0)
        self._check("momentum_step", "parameters", parameters, size)
        self._check("momentum_step", "velocity", velocity, size)
        self._check("momentum_step", "gradient", gradient, size)
        if not 0 <= weights <= size:
            raise ValueError(f"momentum_step: weights must lie between 0 and the {size} parameters; got {weights}")
        if size:
            self._check_apart("momentum_step", {"parameters": parameters}, {"velocity": velocity, "gradient": gradient})
            self._check_apart("momentum_step", {"velocity": velocity}, {"gradient": gradient})
            self._launch_elementwise("elementwise", "momentum_step", size, parameters, velocity, gradient, size,
                                     weights, rate * scale, momentum, rate * decay)


def _kind(array_type: type) -> str:
    return f"{array_type.__module__.partition('.')[0]}.{array_type.__name__}"


def _quads(m: int, column: int) -> int:
    """Philox blocks that the columns [column, column + m) touch."""
    return (column % 4 + m + 3) // 4


def _address(function: str, B: int, m: int, seed: int, update: int, site: int, row: int, column: int,
             columns: int | None) -> tuple[int, int, int, int, int, int]:
    """The six numbers of ``Address`` in philox.cuh, of which none may wrap round."""
    columns = column + m if columns is None else columns
    blocks = -(-columns // 4)
    if not (0 <= seed < 1 << 64 and 0 <= update < 1 << 32 and 0 <= site < 1 << 32
            and row >= 0 and (row + B) * blocks <= 1 << 64):
        raise ValueError(f"{function}: seed and index must lie in [0, 2**64), update and site in [0, 2**32); "
                         f"got seed {seed}, row {row} of {blocks} blocks, update {update}, site {site}")
    if column < 0 or column + m > columns:
        raise ValueError(f"{function}: columns {column} to {column + m} must lie in the layer; it has {columns}")
    return seed, update, site, row, column, blocks


# ------------------------------------------------------------------------------------------------------- CuPy


@cache
def _gpu() -> Launcher:
    """The launcher of this process."""
    import cupy

    return Launcher(lambda code: cupy.RawModule(code=code), cupy.ndarray, address_of=lambda array: array.data.ptr,
                    processors=cupy.cuda.Device().attributes["MultiProcessorCount"],
                    device_of=lambda array: array.data.device_id, current_device=cupy.cuda.runtime.getDevice)


def compile_all() -> None:
    """Compile every kernel for the current device, or load it from CuPy's cache."""
    _gpu().compile_all()


def uniforms(out, *, seed, update, site, row=0, column=0, columns=None):
    """GPU twin of ``reference.uniforms``: fill ``out`` (B, m) with draws."""
    return _gpu().uniforms(out, seed=seed, update=update, site=site, row=row, column=column, columns=columns)


def bernoulli(sample, mean, *, seed, update, site, row=0, column=0, columns=None):
    """GPU twin of ``reference.bernoulli``: sample[r, j] <- 1 if u(r, j) < mean[r, j] else 0."""
    return _gpu().bernoulli(sample, mean, seed=seed, update=update, site=site, row=row, column=column, columns=columns)


def sigmoid(x):
    """GPU twin of ``reference.sigmoid``: x <- 1 / (1 + exp(-x)), in place."""
    return _gpu().sigmoid(x)


def half_step(sample, mean, x, W, bias, *, transpose=False, seed=0, update=0, site=0, row=0, column=0, columns=None):
    """GPU twin of ``reference.half_step``: mean <- sigmoid(x W + bias), sample ~ Bernoulli(mean), in one launch."""
    _gpu().half_step(sample, mean, x, W, bias, transpose=transpose, seed=seed, update=update, site=site, row=row,
                     column=column, columns=columns)


def cd_sums(dW, db, dc, v, h, rows, *, model_weight=1.0):
    """GPU twin of ``reference.cd_sums``: dW, db, dc in one launch."""
    _gpu().cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight)


def momentum_step(parameters, velocity, gradient, *, weights, scale, rate, momentum, decay):
    """GPU twin of ``reference.momentum_step``."""
    _gpu().momentum_step(parameters, velocity, gradient, weights=weights, scale=scale, rate=rate, momentum=momentum,
                         decay=decay)


def cd_update(parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, rate, momentum, decay):
    """GPU twin of ``reference.cd_update``: gradient and step in one launch; ``gradient`` is not touched."""
    _gpu().cd_update(parameters, velocity, gradient, n, m, v, h, rows, model_weight=model_weight, rate=rate,
                     momentum=momentum, decay=decay)
