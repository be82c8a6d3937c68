"""The mathematics of one layer by CuPy's own operations and cuBLAS: what kernels are compared with, and timed beside.

``Unfused`` stands in the place of a ``cuda.Launcher``: the same names and signatures, the same draws, results that
differ by rounding. One launch for each operation, and the sums of gradients go through memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import module_of
from gpudbn.precision import check_precision


class Unfused:
    """Half-steps, gradients and steps as plain formulas; all else, and all draws, are the launcher's.

    Parameters
    ----------
    launcher : cuda.Launcher
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def sigmoid(self, x, *, precision="fp32"):
        """See ``reference.sigmoid``; in float32 alone."""
        check_precision("sigmoid", precision, ("fp32",))
        xp, half = module_of(x), np.float32(0.5)
        xp.multiply(x, half, out=x)
        xp.tanh(x, out=x)
        xp.multiply(x, half, out=x)
        return xp.add(x, half, out=x)

    def bernoulli(self, sample, mean, **address):
        """See ``reference.bernoulli``."""
        xp = module_of(sample, mean)
        u = self.launcher.uniforms(xp.empty_like(mean), **address)
        return xp.less(u, mean, out=sample)

    def activate(self, sample, mean, x, bias, *, seed=0, update=0, site=0, row=0, column=0, columns=None, clock=None):
        """See ``reference.activate``."""
        out = sample if mean is None else mean
        module_of(out, x, bias).add(x, bias, out=out)
        self.sigmoid(out)
        if sample is not None:
            self.bernoulli(sample, out, seed=seed, update=update, site=site, row=row, column=column, columns=columns,
                           clock=clock)

    def half_step(self, sample, mean, x, W, bias, *, transpose=False, precision="fp32", **address):
        """See ``reference.half_step``; in float32 alone."""
        check_precision("half_step", precision, ("fp32",))
        out = sample if mean is None else mean
        module_of(out, x, W).matmul(x, W.T if transpose else W, out=out)
        self.activate(sample, mean, out, bias, **address)

    def cd_sums(self, dW, db, dc, v, h, rows, *, model_weight=1.0, ones=None, moved=None, precision="fp32"):
        """See ``reference.cd_sums``; in float32 alone."""
        check_precision("cd_sums", precision, ("fp32",))
        xp = module_of(dW, db, dc, v, h)
        signs = xp.ones(len(v), np.float32)
        signs[rows:] = -model_weight
        signed = h * signs[:, None]
        xp.matmul(v.T, signed, out=dW)
        (K, n), (to_b, to_c) = v.shape, (signs, xp.ones(len(v), np.float32))
        if ones is not None:
            to_b, to_c = signs * ones[:K], ones[K:]
        db[...] = to_b @ v
        dc[...] = to_c @ signed
        if moved is not None:
            moved[:n] = v[:rows].sum(axis=0)
            moved[n:] = h[:rows].sum(axis=0)

    def momentum_step(self, parameters, velocity, gradient, *, weights, scale, rate, momentum, decay, rates=None):
        """See ``reference.momentum_step``; ``rates`` cannot be given."""
        if rates is not None:
            raise ValueError("momentum_step: rates must be None without kernels; got an array")
        velocity *= np.float32(momentum)
        velocity += gradient * np.float32(rate * scale)
        if rate * decay:
            velocity[:weights] -= parameters[:weights] * np.float32(rate * decay)
        parameters += velocity

    def cd_update(self, parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
                  rate, momentum, decay, rates=None, precision="fp32"):
        """See ``reference.cd_update``; in float32 alone. ``gradient`` may be None, and ``rates`` cannot be given."""
        weights = n * m
        gradient = module_of(parameters).empty_like(parameters) if gradient is None else gradient
        dW, db, dc = gradient[:weights].reshape(n, m), gradient[weights : weights + n], gradient[weights + n :]
        self.cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight, ones=ones, moved=moved, precision=precision)
        self.momentum_step(parameters, velocity, gradient, weights=weights, scale=1 / rows, rate=rate,
                           momentum=momentum, decay=decay, rates=rates)
