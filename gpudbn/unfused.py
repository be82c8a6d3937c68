"""The mathematics by CuPy's own operations and cuBLAS: what kernels are compared with, and timed beside.

``Unfused`` stands in the place of a ``cuda.Launcher``: the same names and signatures, the same draws, results that
differ by rounding. One launch for each operation, and the sums of gradients go through memory. What is drawn at an
address (``draws``), rows that are gathered and the counters of graphs have no other way than kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import module_of
from gpudbn.precision import check_precision
from gpudbn.reference import adam_rates


class Unfused:
    """Layers, classifiers, measures and steps as plain formulas; draws, and what moves rows, are the launcher's.

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

    def gaussian(self, sample, mean, sd, **address):
        """See ``reference.gaussian``."""
        xp = module_of(sample, mean, sd)
        z = self.launcher.normals(xp.empty_like(mean), **address)
        return xp.add(mean, xp.multiply(z, sd, out=z), out=sample)

    def categorical(self, sample, mean, x, bias, units, **address):
        """See ``reference.categorical``."""
        xp, groups = module_of(sample, mean, x, bias), len(bias) // units
        e = (x + bias).reshape(len(x), groups, units)
        xp.exp(xp.subtract(e, e.max(axis=2, keepdims=True), out=e), out=e)
        up_to = e.cumsum(axis=2, dtype=np.float64)
        if mean is not None:
            xp.divide(e, up_to[:, :, -1:].astype(np.float32), out=mean.reshape(e.shape))
        if sample is not None:
            u = self.launcher.uniforms(xp.empty((len(x), groups), np.float32), **address)
            chosen = (up_to <= u[:, :, None] * up_to[:, :, -1:]).sum(axis=2, keepdims=True)
            xp.equal(xp.arange(units), chosen, out=sample.reshape(e.shape))

    def dropout(self, x, keep, **address):
        """See ``reference.dropout``."""
        xp = module_of(x)
        u = self.launcher.uniforms(xp.empty_like(x), **address)
        xp.multiply(x, u < np.float32(keep), out=x)
        return xp.multiply(x, np.float32(1 / keep), out=x)

    def sigmoid_backward(self, delta, a, *, keep=1.0):
        """See ``reference.sigmoid_backward``."""
        factor = a * np.float32(-keep)
        factor += np.float32(1)
        factor *= a
        return module_of(delta, a).multiply(delta, factor, out=delta)

    def cross_entropy(self, delta, loss, wrong, x, bias, labels):
        """See ``reference.cross_entropy``."""
        xp, log_p, each = module_of(x, bias, labels), x + bias, (module_of(x).arange(len(x)), labels)
        log_p -= log_p.max(axis=1, keepdims=True)
        if wrong is not None:
            xp.not_equal(log_p.argmax(axis=1), labels, out=wrong)
        log_p -= xp.log(xp.exp(log_p).sum(axis=1, keepdims=True))
        if loss is not None:
            xp.negative(log_p[each], out=loss)
        if delta is not None:
            xp.negative(xp.exp(log_p, out=delta), out=delta)
            delta[each] += np.float32(1)

    def free_energy(self, out, x, c, v=None, b=None):
        """See ``reference.free_energy``."""
        xp = module_of(out, x, c)
        xp.negative(xp.logaddexp(np.float32(0), x + c).sum(axis=1), out=out)
        return out if v is None else xp.subtract(out, v @ b, out=out)

    def squared_errors(self, out, v, w):
        """See ``reference.squared_errors``."""
        difference = v - w
        difference *= difference
        out[...] = difference.sum(axis=1, dtype=np.float64)
        return out

    def centre(self, v, h, ones, offsets, rows):
        """See ``reference.centre``."""
        (K, n), m = v.shape, h.shape[1]
        mu, data, model = offsets[:n], offsets[n : n + m], offsets[n + m :]
        v -= mu
        h[:rows] -= data
        h[rows:] -= model
        ones[:K] = np.float32(1) - h @ model
        ones[K:] = np.float32(1) - v @ mu

    def offsets_step(self, means, offsets, moved, n, m, *, scale, keep, centring, target, cost):
        """See ``reference.offsets_step``."""
        xp = module_of(means, offsets, moved)
        now = moved * np.float32(scale)
        now += offsets[: n + m]
        now -= means
        now *= np.float32(1 - keep)
        means += now
        steps = np.float32(256 if centring else 0)
        rounded = xp.rint(means * steps) * np.float32(1 / 256)
        offsets[:n] = rounded[:n]
        offsets[n + m :] = rounded[n:]
        offsets[n : n + m] = rounded[n:] + np.float32(cost) * (means[n:] - np.float32(target))

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
        _no("momentum_step", rates)
        velocity *= np.float32(momentum)
        velocity += gradient * np.float32(rate * scale)
        if rate * decay:
            velocity[:weights] -= parameters[:weights] * np.float32(rate * decay)
        parameters += velocity

    def sgd_step(self, parameters, gradient, *, weights, scale, rate, decay, rates=None):
        """See ``reference.sgd_step``; ``rates`` cannot be given."""
        _no("sgd_step", rates)
        _decay(parameters, weights, rate * decay)
        parameters += gradient * np.float32(rate * scale)

    def adagrad_step(self, parameters, squares, gradient, *, weights, scale, rate, decay, eps=1e-8, rates=None):
        """See ``reference.adagrad_step``; ``rates`` cannot be given."""
        _no("adagrad_step", rates)
        g = gradient * np.float32(scale)
        squares += g * g
        _decay(parameters, weights, rate * decay)
        parameters += np.float32(rate) * g / (module_of(squares).sqrt(squares) + np.float32(eps))

    def adam_step(self, parameters, mean, square, gradient, *, weights, scale, rate, decay, steps, b1=0.9, b2=0.999,
                  eps=1e-8, rates=None):
        """See ``reference.adam_step``; ``rates`` cannot be given. ``gradient`` stays as it is."""
        _no("adam_step", rates)
        _, step, _ = adam_rates(scale, rate, decay, steps, b1, b2)
        g = gradient * np.float32(scale)
        mean += np.float32(1 - b1) * (g - mean)
        square += np.float32(1 - b2) * (g * g - square)
        _decay(parameters, weights, rate * decay)
        parameters += np.float32(step) * mean / (module_of(square).sqrt(square) + np.float32(eps))

    def cd_update(self, parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
                  rate, momentum, decay, rates=None, precision="fp32"):
        """See ``reference.cd_update``; in float32 alone. ``gradient`` may be None, and ``rates`` cannot be given."""
        gradient = self._gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, precision, gradient)
        self.momentum_step(parameters, velocity, gradient, weights=n * m, scale=1 / rows, rate=rate,
                           momentum=momentum, decay=decay, rates=rates)

    def cd_sgd(self, parameters, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate, decay,
               rates=None):
        """See ``reference.cd_sgd``. ``gradient`` may be None, and ``rates`` cannot be given."""
        gradient = self._gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, "fp32", gradient)
        self.sgd_step(parameters, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, rates=rates)

    def cd_adagrad(self, parameters, squares, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
                   rate, decay, eps=1e-8, rates=None):
        """See ``reference.cd_adagrad``. ``gradient`` may be None, and ``rates`` cannot be given."""
        gradient = self._gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, "fp32", gradient)
        self.adagrad_step(parameters, squares, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, eps=eps,
                          rates=rates)

    def _gradient(self, parameters, n, m, v, h, rows, model_weight, ones, moved, precision, out):
        """``cd_sums`` end to end, in ``out`` (n m + n + m,) if there is one."""
        out, weights = module_of(parameters).empty_like(parameters) if out is None else out, n * m
        dW, db, dc = out[:weights].reshape(n, m), out[weights : weights + n], out[weights + n :]
        self.cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight, ones=ones, moved=moved, precision=precision)
        return out


def _no(function, rates):
    """Refuse rates in device memory, which only a kernel reads."""
    if rates is not None:
        raise ValueError(f"{function}: rates must be None without kernels; got an array")


def _decay(parameters, weights, part):
    """W <- (1 - part) W, where that is something else."""
    if part:
        parameters[:weights] *= np.float32(1 - part)
