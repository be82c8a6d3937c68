"""The one door to the kernels: reads ``kernels/``, compiles, checks arguments, launches.

A kernel believes what it is told, so everything is checked here: type, shape, contiguity, device
and overlap of arrays, range of numbers; every scalar is cast to the exact type of the kernel's
parameter. Launches go to CuPy's current stream and do not wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gpudbn.arrays import Array
from gpudbn.tracing import span

PACKAGE = Path(__file__).parent.parent
PLACES = (PACKAGE / "kernels", PACKAGE.parent / "kernels")  # wheel, editable install
THREADS = 256  # a block of an elementwise kernel
BLOCKS_PER_PROCESSOR = 16  # at most, for elementwise kernels: their threads go on to further entries
LARGEST = 2**31 - 1024  # sizes are int32 in the kernels, and a tile may hang over
MOST_IN_Y = 65535  # blocks of a grid in y
STATIC_SHARED = 48 << 10  # bytes of shared memory that a block gets without being asked

# The parameters of a kernel, in order: POINTER for an array or None, else the exact type of a value.
POINTER = None
Kinds = tuple[Callable[[Any], Any] | None, ...]
ADDRESS: Kinds = (np.uint64, np.uint32, np.uint32, np.uint64, np.uint64, np.uint64, POINTER)  # see ``Door._address``
RATES: Kinds = (np.float32, np.float32, np.float32, POINTER)  # of a step: three numbers, or null and where they stand

NOWHERE = (0, 0, 0, 0, 0, 0, None)  # the address where nothing is drawn

_FLOAT32, _UINT32 = np.dtype(np.float32), np.dtype(np.uint32)
_NULL = np.uint64(0)  # what a kernel takes for an absent array


@dataclass(frozen=True)
class Unit:
    """What is compiled at once: one file of ``kernels/`` with its constants.

    Attributes
    ----------
    file : str
    kernels : mapping from name to the types of its parameters
    constants : mapping
        Written before the text as ``#define``s: here is their one place.
    options : tuple of str
        For the compiler, besides CuPy's.
    architectures : tuple of str
        What it can be compiled for, where that is not everything: ``("sm_90a",)``.
    cooperative : bool
        Its kernels have barriers across the grid.
    """

    file: str
    kernels: Mapping[str, Kinds]
    constants: Mapping[str, int] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    cooperative: bool = False

    def source(self) -> str:
        """The whole text: constants first, every header pasted in at its first mention.

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

        constants = "".join(f"#define {name} {value}\n" for name, value in self.constants.items())
        return constants + text_of(self.file) + "\n"


def kernels_folder() -> Path:
    """Where the kernels are: inside an installed package, beside it in a source tree."""
    for place in PLACES:
        if place.is_dir():
            return place
    raise RuntimeError(f"cuda: the kernels must be in {PLACES[0]} or {PLACES[1]}; neither is there. "
                       "Was the package copied without its data?")


class Door:
    """Checks and launches. What it launches is in the classes built on it, one for each subject.

    Parameters
    ----------
    make_module : callable
        ``cupy.RawModule``, or a stand-in: called with ``code``, ``options`` and ``enable_cooperative_groups``,
        returns an object whose ``get_function(name)`` is called as ``(grid, block, arguments, shared_mem=bytes)``.
    array_type : type
        The one type of array that is let through.
    address_of : callable
        From an array to the address of its first byte.
    processors : int
        Multiprocessors of the device.
    device_of, current_device : callables
        The number of an array's device, and of the device that launches go to.
    shared_memory : int
        Bytes of shared memory that a block can be given.
    architecture : str
        Of the device, as the compiler names it: ``sm_90``.
    """

    units: ClassVar[Mapping[str, Unit]] = {}

    def __init__(self, make_module: Callable[..., Any], array_type: type, address_of: Callable[[Array], int],
                 processors: int, device_of: Callable[[Array], int], current_device: Callable[[], int], *,
                 shared_memory: int = STATIC_SHARED, architecture: str = "sm_80") -> None:
        self.make_module = make_module
        self.array_type = array_type
        self.address_of = address_of
        self.processors = processors
        self.device_of = device_of
        self.current_device = current_device
        self.shared_memory = shared_memory
        self.architecture = architecture
        # of a unit's kernel: itself, and its launch in an NVTX range
        self._functions: dict[tuple[str, str], tuple[Any, Any]] = {}

    # ------------------------------------------------------------------------------------ compiling and launching

    def compile_all(self) -> None:
        """Compile every kernel that this device can run, or load it from CuPy's cache."""
        for name, unit in self.units.items():
            if not unit.architectures or {self.architecture, self.architecture + "a"} & set(unit.architectures):
                self._compile(name)

    def _compile(self, name: str) -> None:
        unit = self.units[name]
        with span(f"compile {name}"):
            module = self.make_module(code=unit.source(), options=unit.options,
                                      enable_cooperative_groups=unit.cooperative)
            for kernel in unit.kernels:
                function = module.get_function(kernel)
                # the range stands around the launch; without a profiler this is the launch itself
                self._functions[name, kernel] = function, span(kernel)(function)

    def function(self, unit: str, kernel: str) -> Any:
        """The compiled kernel, for instance to ask what it needs."""
        if (unit, kernel) not in self._functions:
            self._compile(unit)
        return self._functions[unit, kernel][0]

    def _launch(self, unit: str, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any,
                shared: int = 0) -> None:
        if (unit, kernel) not in self._functions:
            self._compile(unit)
        cast = tuple([(_NULL if value is None else value) if to is POINTER else to(value)
                      for to, value in zip(self.units[unit].kernels[kernel], arguments, strict=True)])
        function, launch = self._functions[unit, kernel]
        if shared > STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        launch(grid, (threads,), cast, shared_mem=shared)

    def _launch_elementwise(self, unit: str, kernel: str, threads: int, *arguments: Any) -> None:
        """Launch for so many threads, or fewer that go round."""
        blocks = min(-(-threads // THREADS), BLOCKS_PER_PROCESSOR * self.processors)
        self._launch(unit, kernel, (blocks,), THREADS, *arguments)

    # ------------------------------------------------------------------------------------------------- checking

    def _check(self, function: str, name: str, array: Array, *shape: int | str, dtype: np.dtype = _FLOAT32,
               rows_at: int = 0) -> tuple[int, ...]:
        """The shape of an array that a kernel will not misread. A size given by name is free, up to an int32.

        It must be contiguous; or, with ``rows_at``, a matrix whose rows are, and begin at multiples of so many bytes.
        """
        if (issubclass(type(array), self.array_type) and array.dtype == dtype
                and self.device_of(array) == self.current_device() and len(array.shape) == len(shape)
                and (self._has_rows_at(array, rows_at) if rows_at else array.flags.c_contiguous)):
            for have, want in zip(array.shape, shape, strict=True):
                if have != want and (not isinstance(want, str) or have > LARGEST):
                    break
            else:
                return array.shape
        raise self._refusal(function, name, array, shape, dtype, rows_at)

    def _has_rows_at(self, array: Array, multiple: int) -> bool:
        pitch, itemsize = array.strides
        return array.size == 0 or (itemsize == array.itemsize and pitch >= array.shape[1] * itemsize
                                   and pitch % multiple == 0 and self.address_of(array) % multiple == 0)

    def _refusal(self, function: str, name: str, array: Array, shape: tuple[int | str, ...], dtype: np.dtype,
                 rows_at: int) -> Exception:
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
        contiguous, layout, hint = "C-contiguous ", "", ""
        if rows_at:
            contiguous, wanted = "", f"{wanted}, with rows that begin at multiples of {rows_at} bytes"
            layout, hint = f"strides {array.strides} in ", ". See gpudbn.cuda.wgmma.padded"
        elif not array.flags.c_contiguous:
            layout, hint = "a view of ", ". Strides are not followed: make a copy"
        return (ValueError if array.dtype == dtype else TypeError)(
            f"{function}: {name} must be {contiguous}{dtype} of shape {wanted}; "
            f"got {layout}{array.dtype} {array.shape}{hint}")

    def _check_apart(self, function: str, written: Mapping[str, Array], read: Mapping[str, Array]) -> None:
        """Refuse outputs that overlap inputs: blocks run in no order, so an input might be overwritten before use."""
        inputs = [(name, start := self.address_of(array), start + _bytes(array)) for name, array in read.items()]
        for name, array in written.items():
            if array is not None:
                start = self.address_of(array)
                end = start + _bytes(array)
                for other, other_start, other_end in inputs:
                    if start < other_end and other_start < end:
                        raise ValueError(f"{function}: {name} must not share memory with {other}")

    def _check_apart_or_same(self, function: str, written: Mapping[str, Array], read: Mapping[str, Array]) -> None:
        """The same, for outputs that may be an input itself: each entry is read by the thread that writes it."""
        for name, array in read.items():
            others = {other: a for other, a in written.items()
                      if a is not None and self.address_of(a) != self.address_of(array)}
            self._check_apart(function, others, {name: array})

    def _address(self, function: str, B: int, m: int, seed: int, update: int, site: int, row: int, column: int,
                 columns: int | None, clock: Array | None) -> tuple[Any, ...]:
        """The arguments of ``Address`` in philox.cuh: seed, update, site, row, column, blocks, clock. None may wrap.

        Raises
        ------
        ValueError
            If a number is out of range, or the columns are not in the layer.
        """
        columns = column + m if columns is None else columns
        blocks = -(-columns // 4)
        if not (0 <= seed < 1 << 64 and 0 <= update < 1 << 32 and 0 <= site < 1 << 32
                and row >= 0 and (row + B) * blocks <= 1 << 64):
            raise ValueError(f"{function}: seed and index must lie in [0, 2**64), update and site in [0, 2**32); "
                             f"got seed {seed}, row {row} of {blocks} blocks, update {update}, site {site}")
        if column < 0 or column + m > columns:
            raise ValueError(f"{function}: columns {column} to {column + m} must lie in the layer; it has {columns}")
        if clock is not None:
            self._check(function, "clock", clock, 1, dtype=_UINT32)
        return seed, update, site, row, column, blocks, clock

    def _rates(self, function: str, rates: Array | None) -> Array | None:
        """The rates of a step in device memory, checked: they stand for the three numbers that are arguments."""
        if rates is not None:
            self._check(function, "rates", rates, 3)
        return rates


def _bytes(array: Array) -> int:
    """From its first entry on, with the padding of its rows."""
    return array.nbytes if array.flags.c_contiguous else array.shape[0] * array.strides[0]


def _kind(array_type: type) -> str:
    return f"{array_type.__module__.partition('.')[0]}.{array_type.__name__}"


def quads(m: int, column: int) -> int:
    """Philox blocks that the columns [column, column + m) touch."""
    return (column % 4 + m + 3) // 4
