"""Launches of ``kernels/softmax.cu`` and ``kernels/rows.cu``: groups of units, and one number for each row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.cuda.door import ADDRESS, NOWHERE, POINTER, Door, Unit

_INT32 = np.dtype(np.int32)
_WARP = 32

UNITS: Mapping[str, Unit] = {
    "softmax": Unit("softmax.cu", {
        "categorical": (POINTER,) * 4 + (np.int32, np.int32, np.int32, *ADDRESS),
        "cross_entropy": (POINTER,) * 6 + (np.int32, np.int32),
    }),
    "rows": Unit("rows.cu", {
        "free_energy": (POINTER,) * 5 + (np.int32, np.int32, np.int32),
        "squared_errors": (POINTER,) * 3 + (np.int32, np.int32),
    }),
}


class RowByRow(Door):
    """Reductions along rows, one warp each."""

    def categorical(self, sample, mean, x, bias, units, *, seed=0, update=0, site=0, row=0, column=0, columns=None,
                    clock=None):
        """See ``reference.categorical``."""
        B, m = self._check("categorical", "x", x, "B", "m")
        self._check("categorical", "bias", bias, m)
        if units < 1 or m % units:
            raise ValueError(f"categorical: units must divide the {m} columns of x; got {units}")
        if sample is None and mean is None:
            raise ValueError("categorical: one of sample and mean must be given; got None for both")
        if mean is not None:
            self._check("categorical", "mean", mean, B, m)
        groups, where = m // units, NOWHERE
        if sample is not None:
            self._check("categorical", "sample", sample, B, m)
            where = self._address("categorical", B, groups, seed, update, site, row, column, columns, clock)
        if x.size:
            outputs = {"sample": sample, "mean": mean}
            self._check_apart_or_same("categorical", outputs, {"x": x})
            self._check_apart("categorical", outputs, {"bias": bias})
            if sample is not None and mean is not None:
                self._check_apart("categorical", {"sample": sample}, {"mean": mean})
            self._launch_elementwise("softmax", "categorical", B * groups * _WARP, sample, mean, x, bias, B, groups,
                                     units, *where)

    def cross_entropy(self, delta, loss, wrong, x, bias, labels):
        """See ``reference.cross_entropy``."""
        B, K = self._check("cross_entropy", "x", x, "B", "K")
        self._check("cross_entropy", "bias", bias, K)
        self._check("cross_entropy", "labels", labels, B, dtype=_INT32)
        for name, array, shape in (("delta", delta, (B, K)), ("loss", loss, (B,)), ("wrong", wrong, (B,))):
            if array is not None:
                self._check("cross_entropy", name, array, *shape)
        if x.size:
            self._check_apart_or_same("cross_entropy", {"delta": delta}, {"x": x})
            self._check_apart("cross_entropy", {"delta": delta}, {"bias": bias, "labels": labels})
            self._check_apart("cross_entropy", {"loss": loss, "wrong": wrong}, {"x": x, "bias": bias, "labels": labels})
            self._launch_elementwise("softmax", "cross_entropy", B * _WARP, delta, loss, wrong, x, bias, labels, B, K)

    def free_energy(self, out, x, c, v=None, b=None):
        """See ``reference.free_energy``."""
        B, m = self._check("free_energy", "x", x, "B", "m")
        self._check("free_energy", "out", out, B)
        self._check("free_energy", "c", c, m)
        n, read = 0, {"x": x, "c": c}
        if v is not None:
            _, n = self._check("free_energy", "v", v, B, "n")
            self._check("free_energy", "b", b, n)
            read |= {"v": v, "b": b}
        if B:
            self._check_apart("free_energy", {"out": out}, read)
            self._launch_elementwise("rows", "free_energy", B * _WARP, out, x, c, v, b, B, m, n)
        return out

    def squared_errors(self, out, v, w):
        """See ``reference.squared_errors``."""
        B, n = self._check("squared_errors", "v", v, "B", "n")
        self._check("squared_errors", "w", w, B, n)
        self._check("squared_errors", "out", out, B)
        if B:
            self._check_apart("squared_errors", {"out": out}, {"v": v, "w": w})
            self._launch_elementwise("rows", "squared_errors", B * _WARP, out, v, w, B, n)
        return out
