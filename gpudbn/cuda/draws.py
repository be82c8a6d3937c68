"""Launches of ``kernels/draws.cu``: uniforms, normals, and what is drawn with them."""

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
        "dropout": (POINTER, *_SIZES, *ADDRESS, np.float32, np.float32),
        "normals": (POINTER, *_SIZES, *ADDRESS),
        "gaussian": (POINTER, POINTER, POINTER, *_SIZES, *ADDRESS),
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
            self._check_apart_or_same("bernoulli", {"sample": sample}, {"mean": mean})
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
            self._check_apart_or_same("activate", {"sample": sample, "mean": mean}, {"x": x})
            self._check_apart("activate", {"sample": sample, "mean": mean}, {"bias": bias})
            self._launch_elementwise("draws", "activate", B * quads(m, where[4]), sample, mean, x, bias, B, m, *where)

    def dropout(self, x, keep, *, seed, update, site, row=0, column=0, columns=None, clock=None):
        """See ``reference.dropout``."""
        B, m = self._check("dropout", "x", x, "B", "m")
        where = self._address("dropout", B, m, seed, update, site, row, column, columns, clock)
        if not 0 < keep <= 1:
            raise ValueError(f"dropout: keep must lie in (0, 1]; got {keep}")
        if x.size:
            self._launch_elementwise("draws", "dropout", B * quads(m, column), x, B, m, *where, keep, 1 / keep)
        return x

    def normals(self, out, *, seed, update, site, row=0, column=0, columns=None, clock=None):
        """See ``reference.normals``."""
        B, m = self._check("normals", "out", out, "B", "m")
        where = self._even_address("normals", B, m, seed, update, site, row, column, columns, clock)
        if out.size:
            self._launch_elementwise("draws", "normals", B * quads(m, column), out, B, m, *where)
        return out

    def gaussian(self, sample, mean, sd, *, seed, update, site, row=0, column=0, columns=None, clock=None):
        """See ``reference.gaussian``."""
        B, m = self._check("gaussian", "mean", mean, "B", "m")
        self._check("gaussian", "sample", sample, B, m)
        self._check("gaussian", "sd", sd, m)
        where = self._even_address("gaussian", B, m, seed, update, site, row, column, columns, clock)
        if mean.size:
            self._check_apart_or_same("gaussian", {"sample": sample}, {"mean": mean})
            self._check_apart("gaussian", {"sample": sample}, {"sd": sd})
            self._launch_elementwise("draws", "gaussian", B * quads(m, column), sample, mean, sd, B, m, *where)
        return sample

    def _even_address(self, function, B, m, seed, update, site, row, column, columns, clock):
        if column % 2:
            raise ValueError(f"{function}: column must be even; got {column}")
        return self._address(function, B, m, seed, update, site, row, column, columns, clock)
