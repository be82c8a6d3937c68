"""Launches of ``kernels/offsets.cu``: centring and sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.cuda.door import POINTER, THREADS, Door, Unit

_I4, _F4 = np.int32, np.float32

UNITS: Mapping[str, Unit] = {
    "offsets": Unit("offsets.cu", {
        "centre": (POINTER,) * 4 + (_I4,) * 4,
        "offsets_step": (POINTER,) * 3 + (_I4, _I4, _F4, _F4, _I4, _F4, _F4),
    }, {"THREADS": THREADS}),
}


class Offsets(Door):
    """What is subtracted from units before their products."""

    def centre(self, v, h, ones, offsets, rows):
        """See ``reference.centre``."""
        K, n = self._check("centre", "v", v, "K", "n")
        _, m = self._check("centre", "h", h, K, "m")
        self._check("centre", "ones", ones, 2 * K)
        self._check("centre", "offsets", offsets, n + 2 * m)
        if not 0 <= rows <= K:
            raise ValueError(f"centre: rows must lie between 0 and the {K} rows of v; got {rows}")
        self._check_apart("centre", {"v": v, "h": h}, {"ones": ones, "offsets": offsets})
        self._check_apart("centre", {"v": v, "ones": ones}, {"h": h, "offsets": offsets})
        if K:
            self._launch("offsets", "centre", (K,), THREADS, v, h, ones, offsets, n, m, K, rows)

    def offsets_step(self, means, offsets, moved, n, m, *, scale, keep, centring, target, cost):
        """See ``reference.offsets_step``."""
        self._check("offsets_step", "means", means, n + m)
        self._check("offsets_step", "offsets", offsets, n + 2 * m)
        self._check("offsets_step", "moved", moved, n + m)
        self._check_apart("offsets_step", {"means": means, "offsets": offsets}, {"moved": moved})
        self._check_apart("offsets_step", {"means": means}, {"offsets": offsets})
        self._launch_elementwise("offsets", "offsets_step", n + m, means, offsets, moved, n, m, scale, 1 - keep,
                                 centring, target, cost)
