"""Launches of ``kernels/gather.cu`` and ``kernels/turns.cu``: what a run of updates needs besides the updates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.cuda.door import LARGEST, POINTER, Door, Kinds, Unit

_GATHER: Kinds = (POINTER, POINTER, POINTER, np.int64, np.int64, np.int32, np.int32, np.int64, POINTER, np.float32)
_BY_DTYPE = {np.dtype(np.float32): "gather_floats", np.dtype(np.float16): "gather_halves",
             np.dtype(np.uint8): "gather_bytes", np.dtype(np.bool_): "gather_bytes"}
_INT64, _UINT32, _UINT64 = np.dtype(np.int64), np.dtype(np.uint32), np.dtype(np.uint64)

UNITS: Mapping[str, Unit] = {
    "gather": Unit("gather.cu", dict.fromkeys(("gather_floats", "gather_halves", "gather_bytes"), _GATHER)),
    "turns": Unit("turns.cu", {
        "advance": (POINTER, np.uint32, np.uint32),
        "note_not_finite": (POINTER, POINTER, np.int64, np.uint32, np.uint32, POINTER),
    }),
}


class Turns(Door):
    """Rows in the order of an epoch, counters, and the flag of numbers that are not finite."""

    def gather(self, out, data, order, *, first=0, scale=1.0, offset=None):
        """See ``reference.gather``."""
        kernel = _BY_DTYPE.get(getattr(data, "dtype", None))
        if kernel is None:
            raise TypeError(f"gather: data must be float32, float16, uint8 or bool; got {getattr(data, 'dtype', data)}")
        N, n = self._check("gather", "data", data, "N", "n", dtype=data.dtype)
        B, _ = self._check("gather", "out", out, "B", n)
        count = N
        if order is not None:
            (count,) = self._check("gather", "order", order, "count", dtype=_INT64)
        if offset is not None:
            self._check("gather", "offset", offset, 1, dtype=_UINT32)
        if not 0 <= first <= count or (offset is None and first + B > count):
            raise ValueError(f"gather: rows {first} to {first + B} must lie in the order; it has {count}")
        if out.size:
            read = {"data": data} if order is None else {"data": data, "order": order}
            self._check_apart("gather", {"out": out}, read)
            view = data if data.dtype in (np.float32, np.uint8) else data.view(
                np.uint8 if data.dtype == np.bool_ else np.uint16)
            self._launch_elementwise("gather", kernel, B * -(-n // 4), out, view, order, N, count, B, n, first, offset,
                                     scale)
        return out

    def advance(self, counters, *, updates, rows):
        """See ``reference.advance``."""
        self._check("advance", "counters", counters, 2, dtype=_UINT32)
        if not (0 <= updates <= LARGEST and 0 <= rows <= LARGEST):
            raise ValueError(f"advance: updates and rows must lie in [0, {LARGEST}]; got {updates} and {rows}")
        self._launch("turns", "advance", (1,), 1, counters, updates, rows)

    def note_not_finite(self, flag, x, *, phase, update, clock=None):
        """See ``reference.note_not_finite``."""
        self._check("note_not_finite", "flag", flag, 1, dtype=_UINT64)
        self._check("note_not_finite", "x", x, getattr(x, "size", 0))
        if not (0 <= phase < 1 << 32 and 0 <= update < 1 << 32):
            raise ValueError(f"note_not_finite: phase and update must lie in [0, 2**32); got {phase} and {update}")
        if clock is not None:
            self._check("note_not_finite", "clock", clock, 1, dtype=_UINT32)
        if x.size:
            self._launch_elementwise("turns", "note_not_finite", x.size, flag, x, x.size, phase, update, clock)
