"""Launches of the products of one large layer on Hopper's tensor cores: ``half_step_wgmma.cu``, ``cd_update_wgmma.cu``.

And of ``bf16.cu``, which makes their matrices.

Matrices of bf16 are arrays of uint16 (see ``precision.round_to_bf16``) whose rows begin at
multiples of 16 bytes, as the copy engine demands; ``padded`` makes them. The engine is told where
a matrix lies by a tensor map, which the driver encodes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.cuda.door import ADDRESS, NOWHERE, POINTER, Door, Kinds, Unit

ARCHITECTURE = "sm_90"  # of devices that have wgmma; code for it is compiled for sm_90a
ROW_BYTES = 16  # rows begin at multiples
SPAN = 64  # columns of a box: 128 bytes, as far as the swizzle goes

# A tile as large as its sums fit the registers of two warpgroups, and as many stages of it as fit the shared memory;
# behind them a block of ones and two barriers a stage, and before them the way to a multiple of 1024.
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, STAGES = 128, 256, SPAN, 4
THREADS = 384
SHARED_BYTES = 1024 + STAGES * (TILE_ROWS + TILE_COLUMNS) * TILE_DEPTH * 2 + 1024 + STAGES * 16
CONSTANTS = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS, "TILE_DEPTH": TILE_DEPTH, "STAGES": STAGES,
             "ROW_GROUP": 16,  # rows of tiles that are gone through together: with 132 processors about square
             "THREADS": THREADS, "SHARED_BYTES": SHARED_BYTES}

TENSOR_MAP = np.atleast_1d  # an array of one 128-byte value, which CuPy passes by value
_I4, _F4 = np.int32, np.float32
_HALF_STEP: Kinds = (*(POINTER,) * 4, *(TENSOR_MAP,) * 3, POINTER, *(_I4,) * 6, *ADDRESS)
_CD_UPDATE: Kinds = (*(POINTER,) * 4, *(TENSOR_MAP,) * 4, *(_I4,) * 5, *(_F4,) * 4, POINTER)
_HOPPER: dict[str, Any] = {"constants": CONSTANTS, "options": ("-arch=sm_90a",), "architectures": ("sm_90a",)}

UNITS: Mapping[str, Unit] = {
    "half_step_wgmma": Unit("half_step_wgmma.cu", {"half_step_wgmma": _HALF_STEP,
                                                   "half_step_wgmma_transposed": _HALF_STEP}, **_HOPPER),
    "cd_update_wgmma": Unit("cd_update_wgmma.cu", {"cd_update_wgmma": _CD_UPDATE}, **_HOPPER),
    "bf16": Unit("bf16.cu", {"to_bf16": (*(POINTER,) * 3, *(_I4,) * 3), "to_float": (*(POINTER,) * 2, *(_I4,) * 3)}),
}

_UINT16, _FLOAT32 = np.dtype(np.uint16), np.dtype(np.float32)


def padded(xp: Any, rows: int, columns: int, dtype: Any = np.uint16) -> Array:
    """An array (rows, columns) of zeros whose rows begin at multiples of 16 bytes; bf16 unless said otherwise."""
    wide = ROW_BYTES // np.dtype(dtype).itemsize
    return xp.zeros((rows, -(-columns // wide) * wide), dtype)[:, :columns]


def tiles(rows: int, columns: int) -> int:
    """Tiles of a product of this shape: what a processor works on at once."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)


# ------------------------------------------------------------------------------------------------- tensor maps


@dataclass(frozen=True)
class TensorMap:
    """Where a matrix of bf16 lies, and how large the boxes are that are copied of it: ``box_rows`` x 64.

    Raises
    ------
    ValueError
        If the copy engine cannot do it.
    """

    address: int
    rows: int
    columns: int
    pitch: int  # bytes from row to row
    box_rows: int

    def __post_init__(self) -> None:
        if self.address % ROW_BYTES or self.pitch % ROW_BYTES:
            raise ValueError(f"tensor map: address and pitch must be multiples of {ROW_BYTES}; "
                             f"got {self.address} and {self.pitch}")
        if not (0 < self.rows <= 1 << 32 and 0 < self.columns <= 1 << 32):
            raise ValueError(f"tensor map: rows and columns must lie between 1 and 2**32; "
                             f"got {self.rows} and {self.columns}")
        if not 2 * self.columns <= self.pitch < 1 << 40:
            raise ValueError(f"tensor map: pitch must lie between the {2 * self.columns} bytes of a row and 2**40; "
                             f"got {self.pitch}")
        if not 0 < self.box_rows <= 256:
            raise ValueError(f"tensor map: box_rows must lie between 1 and 256; got {self.box_rows}")


# cuda.h of CUDA 12 and 13
_BFLOAT16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_ZEROS_OUTSIDE = 0  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
MAP_BYTES, MAP_ALIGNMENT = 128, 64


def aligned_map() -> tuple[np.ndarray, int]:
    """Room for an encoded map, an array of one 128-byte value; and its address, a multiple of 64."""
    room = np.zeros(MAP_BYTES + MAP_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % MAP_ALIGNMENT
    encoded = room[start : start + MAP_BYTES].view(f"V{MAP_BYTES}")
    return encoded, encoded.ctypes.data


@cache
def _driver_call() -> Any:
    """``cuTensorMapEncodeTiled`` of the driver."""
    call = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    number, list_of = ctypes.c_int, ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, number, ctypes.c_uint32, ctypes.c_void_p, list_of, list_of, list_of, list_of,
                     number, number, number, number]
    call.restype = number
    return call


@lru_cache(maxsize=4096)
def encode(tensor_map: TensorMap) -> np.ndarray:
    """The map as the copy engine reads it. The same for equal maps, whatever lies there.

    Raises
    ------
    RuntimeError
        If the driver refuses it.
    """
    encoded, address = aligned_map()
    error = _driver_call()(address, _BFLOAT16, 2, tensor_map.address,
                           (ctypes.c_uint64 * 2)(tensor_map.columns, tensor_map.rows),
                           (ctypes.c_uint64 * 1)(tensor_map.pitch),
                           (ctypes.c_uint32 * 2)(SPAN, tensor_map.box_rows), (ctypes.c_uint32 * 2)(1, 1),
                           _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_256B, _ZEROS_OUTSIDE)
    if error:
        raise RuntimeError(f"tensor map: the driver must accept it; got CUDA error {error} for {tensor_map}")
    return encoded


# --------------------------------------------------------------------------------------------------- launches


class Wgmma(Door):
    """The half-step and the gradient of a large layer, on devices of compute capability 9.0."""

    encode: Callable[[TensorMap], np.ndarray] = staticmethod(encode)

    def half_step_wgmma(self, sample, mean, x, W, bias, *, W_low=None, transpose=False, seed=0, update=0, site=0,
                        row=0, column=0, columns=None, clock=None):
        """See ``reference.half_step_wgmma``."""
        self._demand("half_step_wgmma")
        if transpose:
            m, n = self._check_rows("half_step_wgmma", "W", W, "m", "n")
        else:
            n, m = self._check_rows("half_step_wgmma", "W", W, "n", "m")
        B, _ = self._check_rows("half_step_wgmma", "x", x, "B", n)
        self._check("half_step_wgmma", "bias", bias, m)
        if n == 0:
            raise ValueError("half_step_wgmma: n must be positive; got 0")
        if sample is None and mean is None:
            raise ValueError("half_step_wgmma: one of sample and mean must be given; got None for both")
        inputs, outputs = {"x": x, "W": W, "bias": bias}, {"sample": sample, "mean": mean}
        if W_low is not None:
            self._check_rows("half_step_wgmma", "W_low", W_low, *W.shape)
            inputs["W_low"] = W_low
        where = NOWHERE
        if sample is not None:
            where = self._address("half_step_wgmma", B, m, seed, update, site, row, column, columns, clock)
            if column % 4:
                raise ValueError(f"half_step_wgmma: column must be a multiple of 4; got {column}")
        pitches = {_UINT16: 0, _FLOAT32: 0}
        for name, array in outputs.items():
            if array is not None:
                dtype = _FLOAT32 if getattr(array, "dtype", None) == _FLOAT32 else _UINT16
                self._check_rows("half_step_wgmma", name, array, B, m, dtype=dtype)
                pitch = array.strides[0] // dtype.itemsize
                if pitches[dtype] not in (0, pitch):
                    raise ValueError(f"half_step_wgmma: sample and mean of one type must have rows equally far apart; "
                                     f"got {pitches[dtype]} and {pitch}")
                pitches[dtype] = pitch
        if B == 0 or m == 0:
            return
        self._check_apart("half_step_wgmma", outputs, inputs)
        if sample is not None and mean is not None:
            self._check_apart("half_step_wgmma", {"mean": mean}, {"sample": sample})

        def of_type(array: Array | None, dtype: np.dtype) -> Array | None:
            return array if array is not None and array.dtype == dtype else None

        box_rows = TILE_COLUMNS if transpose else TILE_DEPTH
        self._launch("half_step_wgmma", "half_step_wgmma_transposed" if transpose else "half_step_wgmma",
                     self._blocks(B, m), THREADS,
                     of_type(sample, _UINT16), of_type(mean, _UINT16),
                     of_type(sample, _FLOAT32), of_type(mean, _FLOAT32),
                     self._map(x, TILE_ROWS), self._map(W, box_rows),
                     self._map(W if W_low is None else W_low, box_rows), bias,
                     B, n, m, pitches[_UINT16], pitches[_FLOAT32], W_low is not None, *where, shared=SHARED_BYTES)

    def cd_update_wgmma(self, parameters, velocity, W, v0, h0, vk, hk, *, W_low=None, model_weight=1.0, rate, momentum,
                        decay, rates=None):
        """See ``reference.cd_update_wgmma``."""
        self._demand("cd_update_wgmma")
        n, m = self._check_rows("cd_update_wgmma", "W", W, "n", "m")
        rows, _ = self._check_rows("cd_update_wgmma", "v0", v0, "rows", n)
        C, _ = self._check_rows("cd_update_wgmma", "vk", vk, "C", n)
        self._check_rows("cd_update_wgmma", "h0", h0, rows, m)
        self._check_rows("cd_update_wgmma", "hk", hk, C, m)
        self._check("cd_update_wgmma", "parameters", parameters, n * m + n + m)
        self._check("cd_update_wgmma", "velocity", velocity, n * m + n + m)
        if 0 in (rows, n, m):
            raise ValueError(f"cd_update_wgmma: rows, n and m must be positive; got {rows}, {n}, {m}")
        inputs = {"v0": v0, "h0": h0, "vk": vk, "hk": hk}
        outputs = {"parameters": parameters, "velocity": velocity, "W": W}
        if W_low is not None:
            self._check_rows("cd_update_wgmma", "W_low", W_low, n, m)
            if W_low.strides[0] != W.strides[0]:
                raise ValueError(f"cd_update_wgmma: W and W_low must have rows equally far apart; "
                                 f"got {W.strides[0]} and {W_low.strides[0]} bytes")
            outputs["W_low"] = W_low
        self._check_apart("cd_update_wgmma", outputs, inputs)
        for i, name in enumerate(outputs):
            self._check_apart("cd_update_wgmma", {name: outputs[name]}, dict(list(outputs.items())[:i]))
        model = (vk, hk) if C else (v0, h0)  # a map must be of something
        maps = [self._map(array, TILE_DEPTH) for array in (v0, h0, *model)]
        self._launch("cd_update_wgmma", "cd_update_wgmma", self._blocks(n, m), THREADS, parameters, velocity, W, W_low,
                     *maps, n, m, rows, C, W.strides[0] // 2, model_weight, rate * (1 / rows), momentum, rate * decay,
                     self._rates("cd_update_wgmma", rates), shared=SHARED_BYTES)

    def to_bf16(self, high, x, *, low=None):
        """See ``reference.to_bf16``. Of any device."""
        rows, m = self._check("to_bf16", "x", x, "rows", "m")
        outputs = {"high": high} if low is None else {"high": high, "low": low}
        for name, array in outputs.items():
            self._check_rows("to_bf16", name, array, rows, m)
        if low is not None:
            if low.strides[0] != high.strides[0]:
                raise ValueError(f"to_bf16: high and low must have rows equally far apart; "
                                 f"got {high.strides[0]} and {low.strides[0]} bytes")
            self._check_apart("to_bf16", {"low": low}, {"high": high})
        if x.size:
            self._check_apart("to_bf16", outputs, {"x": x})
            self._launch_elementwise("bf16", "to_bf16", rows * -(-m // 4), high, low, x, rows, m, high.strides[0] // 2)

    def to_float(self, x, high):
        """See ``reference.to_float``. Of any device."""
        rows, m = self._check("to_float", "x", x, "rows", "m")
        self._check_rows("to_float", "high", high, rows, m)
        if x.size:
            self._check_apart("to_float", {"x": x}, {"high": high})
            self._launch_elementwise("bf16", "to_float", rows * -(-m // 4), x, high, rows, m, high.strides[0] // 2)

    def _demand(self, function: str) -> None:
        if self.architecture != ARCHITECTURE:
            raise RuntimeError(f"{function}: the device must be of compute capability 9.0 (H100, H200); "
                               f"got {self.architecture}")

    def _blocks(self, rows: int, columns: int) -> tuple[int]:
        """Blocks stay and take tiles in turn: one for each processor, or for each tile."""
        return (min(self.processors, tiles(rows, columns)),)

    def _map(self, array: Array, box_rows: int) -> np.ndarray:
        rows, columns = array.shape
        return self.encode(TensorMap(self.address_of(array), rows, columns, array.strides[0], box_rows))

    def _check_rows(self, function: str, name: str, array: Array, *shape: int | str,
                    dtype: np.dtype = _UINT16) -> tuple[int, ...]:
        """The shape of a matrix that the copy engine can read, and whose rows can be written in pieces of 16 bytes."""
        return self._check(function, name, array, *shape, dtype=dtype, rows_at=ROW_BYTES)
