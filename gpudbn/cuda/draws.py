"""Launches of ``kernels/draws.cu``: uniforms and samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpudbn.cuda.door import ADDRESS, NOWHERE, POINTER, Door, Unit, quads

_SIZES = (np.int32, np.int32)

UNITS: Mapping[str, Unit] = {
    "draws": Unit("draws.cu", {
        "uniforms": (POINTER, *_SIZES, *ADDRESS),
        "bernoulli": (POINTER, POINTER, *_SIZES, *ADDRESS),
        "activate": (POINTER, POINTER, POINTER, POINTER, *_SIZES, *ADDRESS),
    }),
}


class Draws(Door):
    """Random numbers and samples."""

    def uniforms(self, out, *, seed, update, site, row=0, column=0, columns=None, clock=None):
        """See ``reference.uniforms``."""
        B, m = self._check("uniforms", "out", out, "B", "m")
        where = self._address("uniforms", B, m, seed, update, site, row, column, columns, clock)
        if out.size:
            self._launch_elementwise("draws", "uniforms", B * quads(m, column), out, B, m, *where)
        return out

    def bernoulli(self, sample, mean, *, seed, update, site, row=0, column=0, columns=None, clock=None):
        """See ``reference.bernoulli``."""
        B, m = self._check("bernoulli", "mean", mean, "B", "m")
        self._check("bernoulli", "sample", sample, B, m)
        where = self._address("bernoulli", B, m, seed, update, site, row, column, columns, clock)
        if mean.size:
            if sample is not mean and self.address_of(sample) != self.address_of(mean):
                self._check_apart("bernoulli", {"sample": sample}, {"mean": mean})
            self._launch_elementwise("draws", "bernoulli", B * quads(m, column), sample, mean, B, m, *where)
        return sample

    def activate(self, sample, mean, x, bias, *, seed=0, update=0, site=0, row=0, column=0, columns=None, clock=None):
        """See ``reference.activate``."""
        B, m = self._check("activate", "x", x, "B", "m")
        self._check("activate", "bias", bias, m)
        if sample is None and mean is None:
            raise ValueError("activate: one of sample and mean must be given; got None for both")
        where = NOWHERE
        if sample is not None:
            self._check("activate", "sample", sample, B, m)
            where = self._address("activate", B, m, seed, update, site, row, column, columns, clock)
        if mean is not None:
            self._check("activate", "mean", mean, B, m)
        if x.size:
            for name, array in (("sample", sample), ("mean", mean)):
                if array is not None:
                    same = self.address_of(array) == self.address_of(x)
                    self._check_apart("activate", {name: array}, {"bias": bias} if same else {"x": x, "bias": bias})
            self._launch_elementwise("draws", "activate", B * quads(m, where[4]), sample, mean, x, bias, B, m, *where)
