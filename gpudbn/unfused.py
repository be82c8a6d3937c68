"""The mathematics by CuPy's own operations and cuBLAS: what kernels are compared with, and timed beside.

It stands in the place of a ``cuda.Launcher``: the same names and signatures, the same draws, results that differ by
rounding, and in exact mode the same bits. One launch for each operation, and the sums of gradients go through memory;
a draw, which a kernel makes on the way, is some hundred. Whole turns in one launch (``cd_run``), graphs with their
counters, and operands in bf16 are kernels' alone.
"""

from __future__ import annotations

import numpy as np

from gpudbn import exact
from gpudbn.arrays import module_of
from gpudbn.draws import box_muller, philox4x32
from gpudbn.precision import check_precision
from gpudbn.reference import adam_rates

PRECISIONS = ("fp32", "exact")
AT_ONCE = 1 << 21  # numbers that are drawn at once: work space is some 30 bytes for each


def uniforms(out, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """See ``draws.uniforms``; ``clock`` cannot be given."""
    _no("uniforms", "clock", clock)
    xp, m, low = module_of(out), out.shape[1], np.uint64(0xFFFFFFFF)
    columns = column + m if columns is None else columns
    if not 0 <= column <= columns - m:
        raise ValueError(f"uniforms: column + {m} must be at most columns; got {column} of {columns}")
    blocks = -(-columns // 4)
    for part, first in _strips(out, row):
        index = xp.arange(len(part), dtype=np.uint64)[:, None] * np.uint64(blocks) + np.uint64(first * blocks)
        index = index + xp.arange(column // 4, -(-(column + m) // 4), dtype=np.uint64)
        words = philox4x32((index & low, index >> np.uint64(32), np.uint64(update), np.uint64(site)),
                           (seed & 0xFFFFFFFF, seed >> 32))
        words = xp.stack(words, axis=2).reshape(len(part), -1)[:, column % 4 : column % 4 + m]
        xp.multiply((words >> np.uint64(8)).astype(np.float32), np.float32(2**-24), out=part)
    return out


def normals(out, *, row=0, column=0, columns=None, **address):
    """See ``draws.normals``."""
    xp, m = module_of(out), out.shape[1]
    columns = column + m if columns is None else columns
    for part, first in _strips(out, row):
        u = uniforms(xp.empty((len(part), m + m % 2), np.float32), row=first, column=column,
                     columns=columns + columns % 2, **address)
        box_muller(part, u, xp)
    return out


def _strips(out, row):
    """Some rows of an array after the other, with the number of the first of them."""
    step = max(1, AT_ONCE // max(1, out.shape[1]))
    for first in range(0, len(out), step):
        yield out[first : first + step], row + first


def sigmoid(x, *, precision="fp32"):
    """See ``reference.sigmoid``; in float32 or exact."""
    check_precision("sigmoid", precision, PRECISIONS)
    if precision == "exact":
        return _sigmoid_exact(x)
    xp, half = module_of(x), np.float32(0.5)
    xp.multiply(x, half, out=x)
    xp.tanh(x, out=x)
    xp.multiply(x, half, out=x)
    return xp.add(x, half, out=x)


def _sigmoid_exact(x):
    """See ``exact.sigmoid``."""
    xp = module_of(x)
    f = xp.clip(x, -exact.LARGEST_ARGUMENT, exact.LARGEST_ARGUMENT)
    f *= exact.MINUS_LOG2_E
    whole = f + exact.TO_WHOLE
    f -= whole - exact.TO_WHOLE
    power = f * exact.POWER[0]
    for coefficient in exact.POWER[1:]:
        power += coefficient
        power *= f
    power += np.float32(1)
    bits = power.view(np.int32)
    bits += whole.view(np.int32) << np.int32(23)
    power += np.float32(1)
    return xp.divide(np.float32(1), power, out=x)


def bernoulli(sample, mean, **address):
    """See ``reference.bernoulli``."""
    xp = module_of(sample, mean)
    u = uniforms(xp.empty_like(mean), **address)
    return xp.less(u, mean, out=sample)


def gaussian(sample, mean, sd, **address):
    """See ``reference.gaussian``."""
    xp = module_of(sample, mean, sd)
    z = normals(xp.empty_like(mean), **address)
    return xp.add(mean, xp.multiply(z, sd, out=z), out=sample)


def categorical(sample, mean, x, bias, units, **address):
    """See ``reference.categorical``."""
    xp, groups = module_of(sample, mean, x, bias), len(bias) // units
    e = (x + bias).reshape(len(x), groups, units)
    xp.exp(xp.subtract(e, e.max(axis=2, keepdims=True), out=e), out=e)
    up_to = e.cumsum(axis=2, dtype=np.float64)
    if mean is not None:
        xp.divide(e, up_to[:, :, -1:].astype(np.float32), out=mean.reshape(e.shape))
    if sample is not None:
        u = uniforms(xp.empty((len(x), groups), np.float32), **address)
        chosen = (up_to <= u[:, :, None] * up_to[:, :, -1:]).sum(axis=2, keepdims=True)
        xp.equal(xp.arange(units), chosen, out=sample.reshape(e.shape))


def dropout(x, keep, **address):
    """See ``reference.dropout``."""
    xp = module_of(x)
    u = uniforms(xp.empty_like(x), **address)
    xp.multiply(x, u < np.float32(keep), out=x)
    return xp.multiply(x, np.float32(1 / keep), out=x)


def sigmoid_backward(delta, a, *, keep=1.0):
    """See ``reference.sigmoid_backward``."""
    factor = a * np.float32(-keep)
    factor += np.float32(1)
    factor *= a
    return module_of(delta, a).multiply(delta, factor, out=delta)


def cross_entropy(delta, loss, wrong, x, bias, labels):
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


def free_energy(out, x, c, v=None, b=None):
    """See ``reference.free_energy``."""
    xp = module_of(out, x, c)
    xp.negative(xp.logaddexp(np.float32(0), x + c).sum(axis=1), out=out)
    return out if v is None else xp.subtract(out, v @ b, out=out)


def squared_errors(out, v, w):
    """See ``reference.squared_errors``."""
    difference = v - w
    difference *= difference
    out[...] = difference.sum(axis=1, dtype=np.float64)
    return out


def centre(v, h, ones, offsets, rows):
    """See ``reference.centre``."""
    (K, n), m = v.shape, h.shape[1]
    mu, data, model = offsets[:n], offsets[n : n + m], offsets[n + m :]
    v -= mu
    h[:rows] -= data
    h[rows:] -= model
    ones[:K] = np.float32(1) - h @ model
    ones[K:] = np.float32(1) - v @ mu


def offsets_step(means, offsets, moved, n, m, *, scale, keep, centring, target, cost):
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


def activate(sample, mean, x, bias, **address):
    """See ``reference.activate``."""
    out = sample if mean is None else mean
    module_of(out, x, bias).add(x, bias, out=out)
    _decide(sample, out, "fp32", address)


def half_step(sample, mean, x, W, bias, *, transpose=False, precision="fp32", **address):
    """See ``reference.half_step``; in float32 or exact."""
    check_precision("half_step", precision, PRECISIONS)
    xp, out = module_of(x, W, bias), sample if mean is None else mean
    if precision == "exact":
        exact.check_terms("half_step", "n", x.shape[1])
        a, b = _whole_units(x), _integers(W, exact.WEIGHT_STEPS, exact.LARGEST_WEIGHT)
        sums = (a @ (b.T if transpose else b)).astype(np.float32)
        xp.multiply(sums, np.float32(1 / (exact.UNIT_STEPS * exact.WEIGHT_STEPS)), out=out)
    else:
        xp.matmul(x, W.T if transpose else W, out=out)
    xp.add(out, bias, out=out)
    _decide(sample, out, precision, address)


def _decide(sample, x, precision, address):
    """x <- its sigmoid; sample ~ Bernoulli(x) unless it is None."""
    sigmoid(x, precision=precision)
    if sample is not None:
        bernoulli(sample, x, **address)


def cd_sums(dW, db, dc, v, h, rows, *, model_weight=1.0, ones=None, moved=None, precision="fp32"):
    """See ``reference.cd_sums``; in float32 or exact."""
    check_precision("cd_sums", precision, PRECISIONS)
    if precision == "exact":
        _cd_sums_exact(dW, db, dc, v, h, rows, model_weight)
        return
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


def _cd_sums_exact(dW, db, dc, v, h, rows, model_weight):
    """See ``exact.cd_sums``."""
    exact.check_terms("cd_sums", "rows", max(rows, len(v) - rows))
    a, b = _whole_units(v), _whole_units(h)
    for out, sums, step in ((dW, lambda part: a[part].T @ b[part], 1 / exact.UNIT_STEPS**2),
                            (db, lambda part: a[part].sum(axis=0), 1 / exact.UNIT_STEPS),
                            (dc, lambda part: b[part].sum(axis=0), 1 / exact.UNIT_STEPS)):
        data, model = (sums(part).astype(np.float32) for part in (slice(rows), slice(rows, None)))
        data *= np.float32(step)
        model *= np.float32(step)
        model *= np.float32(model_weight)
        module_of(out).subtract(data, model, out=out)


def momentum_step(parameters, velocity, gradient, *, weights, scale, rate, momentum, decay, rates=None):
    """See ``reference.momentum_step``; ``rates`` cannot be given."""
    _no("momentum_step", "rates", rates)
    velocity *= np.float32(momentum)
    velocity += gradient * np.float32(rate * scale)
    if rate * decay:
        velocity[:weights] -= parameters[:weights] * np.float32(rate * decay)
    parameters += velocity


def sgd_step(parameters, gradient, *, weights, scale, rate, decay, rates=None):
    """See ``reference.sgd_step``; ``rates`` cannot be given."""
    _no("sgd_step", "rates", rates)
    _decay(parameters, weights, rate * decay)
    parameters += gradient * np.float32(rate * scale)


def adagrad_step(parameters, squares, gradient, *, weights, scale, rate, decay, eps=1e-8, rates=None):
    """See ``reference.adagrad_step``; ``rates`` cannot be given."""
    _no("adagrad_step", "rates", rates)
    g = gradient * np.float32(scale)
    squares += g * g
    _decay(parameters, weights, rate * decay)
    parameters += np.float32(rate) * g / (module_of(squares).sqrt(squares) + np.float32(eps))


def adam_step(parameters, mean, square, gradient, *, weights, scale, rate, decay, steps, b1=0.9, b2=0.999,
              eps=1e-8, rates=None):
    """See ``reference.adam_step``; ``rates`` cannot be given. ``gradient`` stays as it is."""
    _no("adam_step", "rates", rates)
    _, step, _ = adam_rates(scale, rate, decay, steps, b1, b2)
    g = gradient * np.float32(scale)
    mean += np.float32(1 - b1) * (g - mean)
    square += np.float32(1 - b2) * (g * g - square)
    _decay(parameters, weights, rate * decay)
    parameters += np.float32(step) * mean / (module_of(square).sqrt(square) + np.float32(eps))


def cd_update(parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
              rate, momentum, decay, rates=None, precision="fp32"):
    """See ``reference.cd_update``. ``gradient`` may be None, and ``rates`` cannot be given."""
    gradient = _gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, precision, gradient)
    momentum_step(parameters, velocity, gradient, weights=n * m, scale=1 / rows, rate=rate,
                  momentum=momentum, decay=decay, rates=rates)


def cd_sgd(parameters, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate, decay,
           rates=None):
    """See ``reference.cd_sgd``. ``gradient`` may be None, and ``rates`` cannot be given."""
    gradient = _gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, "fp32", gradient)
    sgd_step(parameters, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, rates=rates)


def cd_adagrad(parameters, squares, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None,
               rate, decay, fade=0.0, eps=1e-8, rates=None):
    """See ``reference.cd_adagrad``. ``gradient`` may be None, and ``rates`` cannot be given."""
    gradient = _gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, "fp32", gradient)
    if fade:
        gradient[: n * m] -= parameters[: n * m] * np.float32(fade)
    adagrad_step(parameters, squares, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, eps=eps,
                 rates=rates)


def _gradient(parameters, n, m, v, h, rows, model_weight, ones, moved, precision, out):
    """``cd_sums`` end to end, in ``out`` (n m + n + m,) if there is one."""
    out, weights = module_of(parameters).empty_like(parameters) if out is None else out, n * m
    dW, db, dc = out[:weights].reshape(n, m), out[weights : weights + n], out[weights + n :]
    cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight, ones=ones, moved=moved, precision=precision)
    return out


def gather(out, data, order, *, first=0, scale=1.0, offset=None):
    """See ``reference.gather``; of rows that are there, and ``offset`` cannot be given."""
    _no("gather", "offset", offset)
    xp, rows = module_of(out, data, order), slice(first, first + len(out))
    xp.copyto(out, data[rows if order is None else order[rows]])
    return xp.multiply(out, np.float32(scale), out=out)


def note_not_finite(flag, x, *, phase, update, clock=None):
    """See ``reference.note_not_finite``; ``clock`` cannot be given."""
    _no("note_not_finite", "clock", clock)
    xp = module_of(flag, x)
    xp.minimum(flag, xp.where(xp.isfinite(x).all(), flag, np.uint64(phase << 32 | update)), out=flag)


def _integers(x, steps, largest):
    """See ``exact.integers``."""
    xp = module_of(x)
    return xp.rint(xp.clip(x, -largest, largest) * np.float32(steps)).astype(np.float64)


def _whole_units(x):
    """Units as integers."""
    return _integers(x, exact.UNIT_STEPS, exact.LARGEST_UNIT)


def _no(function, name, given):
    """Refuse what stands in device memory for CUDA graphs, and only a kernel reads."""
    if given is not None:
        raise ValueError(f"{function}: {name} must be None without kernels; got an array")


def _decay(parameters, weights, part):
    """W <- (1 - part) W, where that is something else."""
    if part:
        parameters[:weights] *= np.float32(1 - part)
