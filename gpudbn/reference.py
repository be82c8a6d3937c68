"""The mathematics of one layer in NumPy: the specification of every kernel.

``cuda`` has the same names and signatures for arrays on a GPU. Notation, everywhere:

    v  (B, n)  visible units      b  (n,)    visible biases       B, n, m  rows, visible, hidden
    h  (B, m)  hidden units       c  (m,)    hidden biases
    W  (n, m)  weights

    E(v, h) = -b.v - c.h - v W h
    P(h_j = 1 | v) = sigmoid(c_j + (v W)_j)        P(v_i = 1 | h) = sigmoid(b_i + (W h)_i)

(Bengio 2009 and Fischer & Igel 2012 index W the other way; Hinton's guide calls the biases a, b.)
All arrays are float32. Outputs come first and are overwritten; nothing else is modified.
"""

from __future__ import annotations

import numpy as np

from gpudbn import compiled, exact
from gpudbn.draws import Purpose, normals, site, uniforms
from gpudbn.precision import BLOCK, BLOCKS, bf16, bf16_parts, check_precision, from_bf16, round_to_bf16, tf32
from gpudbn.scratch import PIECE, Scratch

__all__ = ["activate", "adagrad_step", "adam_step", "advance", "bernoulli", "categorical", "cd_adagrad", "cd_run",
           "cd_sgd", "cd_sums", "cd_update", "cd_update_wgmma", "centre", "cross_entropy", "dropout", "free_energy",
           "gather", "gaussian", "half_step", "half_step_wgmma", "momentum_step", "normals", "note_not_finite",
           "offsets_step", "sgd_step", "sigmoid", "sigmoid_backward", "squared_errors", "to_bf16", "to_float",
           "uniforms"]

_scratch = Scratch()


def sigmoid(x, *, precision="fp32"):
    """x <- 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2, in place; without overflow.

    Absolute error at most 1.2e-7. ``precision`` as in ``half_step``. Returns ``x``.
    """
    if precision == "exact":
        return exact.sigmoid(x)
    half = np.float32(0.5)
    np.multiply(x, half, out=x)
    np.tanh(x, out=x)
    np.multiply(x, half, out=x)
    return np.add(x, half, out=x)


def bernoulli(sample, mean, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """sample[r, j] <- 1 if u(r, j) < mean[r, j] else 0.

    Parameters
    ----------
    sample : array (B, m), float32
        Overwritten. May be ``mean`` itself.
    mean : array (B, m), float32
        Probabilities in [0, 1].
    seed, update, site, row, column, columns, clock
        Address of the draws, see ``draws``.
    """
    u = uniforms(_scratch.get("u", mean.shape), seed=seed, update=update, site=site, row=row, column=column,
                 columns=columns, clock=clock)
    np.less(u, mean, out=sample, casting="unsafe")
    return sample


def activate(sample, mean, x, bias, *, seed=0, update=0, site=0, row=0, column=0, columns=None, clock=None):
    """mean <- sigmoid(x + bias), sample ~ Bernoulli(mean): a half-step from its product on, where parts were summed.

    Parameters
    ----------
    sample : array (B, m), float32, or None
        Overwritten with 0 and 1. None: not wanted, nothing is drawn. May be ``x`` itself.
    mean : array (B, m), float32, or None
        Overwritten with the probabilities. None: not wanted. May be ``x`` itself.
    x : array (B, m), float32
        The product.
    bias : array (m,), float32
    seed, update, site, row, column, columns, clock
        Address of ``sample[0, 0]``, see ``draws``.
    """
    out = sample if mean is None else mean
    address = {"seed": seed, "update": update, "site": site, "row": row, "column": column, "columns": columns,
               "clock": clock}
    halve = _quick(compiled.halve, out, x, bias)
    if halve is None:
        np.add(x, bias, out=out)
        sigmoid(out)
    else:  # the same bits in fewer passes
        halve(out, x, bias)
        np.tanh(out, out=out)
        if mean is None:
            u = uniforms(_scratch.get("u", out.shape), **address)
            compiled.quick(compiled.toss)(out.reshape(-1), u.reshape(-1))
            return
        compiled.quick(compiled.lift)(out.reshape(-1))
    if sample is not None:
        bernoulli(sample, out, **address)


def product(out, a, b, precision="fp32"):
    """out <- a b, of operands rounded as ``precision`` says: the twin of ``kernels/product.cuh``.

    Parameters
    ----------
    out : array (rows, columns), float32
        Overwritten.
    a, b : arrays (rows, depth), (depth, columns), float32
    precision : str
        ``fp32``, or what tensor cores multiply: see ``gpudbn.precision``.
    """
    if precision == "fp32":
        np.matmul(a, b, out=out)
    elif precision == BLOCKS:
        for lo in range(0, b.shape[1], BLOCK):
            out[:, lo : lo + BLOCK] = a @ np.ascontiguousarray(b[:, lo : lo + BLOCK])  # a BLAS looks at strides, too
    elif precision == "bf16x2":
        (a_high, a_low), (b_high, b_low) = bf16_parts(a), bf16_parts(b)
        np.matmul(a_high, b_high, out=out)
        np.add(out, a_high @ b_low, out=out)
        np.add(out, a_low @ b_high, out=out)
    else:
        rounded = {"bf16": bf16, "tf32": tf32}[precision]
        np.matmul(rounded(a), rounded(b), out=out)


def half_step(sample, mean, x, W, bias, *, transpose=False, precision="fp32", seed=0, update=0, site=0, row=0,
              column=0, columns=None, clock=None):
    """mean <- sigmoid(x W + bias), sample ~ Bernoulli(mean): half a Gibbs step.

    Parameters
    ----------
    sample : array (B, m), float32, or None
        Overwritten with 0 and 1. None: not wanted, nothing is drawn.
    mean : array (B, m), float32, or None
        Overwritten with the probabilities. None: not wanted.
    x : array (B, n), float32
        Units of the layer that is given.
    W : array (n, m), float32; or (m, n) with ``transpose``
        Weights. ``transpose`` multiplies by W^T: the step from hidden to visible.
    bias : array (m,), float32
    precision : str
        What x and W are rounded to for their product, or ``exact``, see ``gpudbn.precision``.
    seed, update, site, row, column, columns, clock
        Address of ``sample[0, 0]``, see ``draws``.

    Notes
    -----
    Hinton, "A practical guide to training restricted Boltzmann machines" (2012), section 3.
    """
    if precision != BLOCKS:
        check_precision("half_step", precision)
    if precision == "exact":
        out = exact.half_step(sample if mean is None else mean, x, W, bias, transpose=transpose)
        if sample is not None:
            address = {"update": update, "site": site, "row": row, "column": column, "columns": columns}
            bernoulli(sample, out, seed=seed, **address, clock=clock)
        return
    out = sample if mean is None else mean
    product(out, x, W.T if transpose else W, precision)
    activate(sample, mean, out, bias, seed=seed, update=update, site=site, row=row, column=column, columns=columns,
             clock=clock)


def centre(v, h, ones, offsets, rows):
    """v <- v - mu,  h <- h - lambda_k;  ones[k] <- 1 - h_k.lambda,  ones[K + k] <- 1 - v_k.mu.

    Before ``cd_sums``, which then makes the centred gradient.

    Parameters
    ----------
    v, h : arrays (K, n), (K, m), float32
        Modified.
    ones : array (2 K,), float32
        Overwritten, from what has become of v and h: what the biases b, then c, are weights to.
    offsets : array (n + 2 m,), float32
        mu, lambda0, lambda end to end: of visible units, of hidden units in the data phase, in the model phase.
    rows : int
        The first rows are the data phase, whose lambda_k is lambda0.

    Notes
    -----
    Montavon & Mueller, "Deep Boltzmann machines and the centering trick" (2012), write the RBM with centred
    units; Melchior, Fischer & Wiskott, "How to center deep Boltzmann machines" (2016), section 3, take its
    gradient back to W, b, c. With signs s_k, 1 in the data phase and -w in the model phase, which add up to 0:

        dW = sum s (v - mu)(h - lambda)^T
        db = sum s v - dW lambda = sum s (v - mu) (1 - (h - lambda).lambda)
        dc = sum s h - dW^T mu   = sum s (h - lambda) (1 - (v - mu).mu)

    Each is one sum over rows, so that the parts of a cut batch may be added. That lambda0 may differ from
    lambda is the sparsity of ``offsets_step``.
    """
    (K, n), m = v.shape, h.shape[1]
    mu, data, model = np.split(offsets, (n, n + m))
    np.subtract(v, mu, out=v)
    np.subtract(h[:rows], data, out=h[:rows])
    np.subtract(h[rows:], model, out=h[rows:])
    np.matmul(h, model, out=ones[:K])
    np.matmul(v, mu, out=ones[K:])
    np.subtract(np.float32(1), ones, out=ones)


def offsets_step(means, offsets, moved, n, m, *, scale, keep, centring, target, cost):
    """means <- keep means + (1 - keep) means of the data rows; the offsets of the next update follow from them.

        mu = round(mean v),  lambda = round(mean h)  with centring, 0 without
        lambda0 = lambda + cost (mean h - target)

    Parameters
    ----------
    means : array (n + m,), float32
        Modified: moving averages over the data rows of v and h.
    offsets : array (n + 2 m,), float32
        Modified; as in ``centre``.
    moved : array (n + m,), float32
        Sums over all data rows of v - mu and h - lambda0, from ``cd_sums``.
    n, m : int
    scale : float
        One over the number of data rows.
    keep : float
        How much of the averages is kept.
    centring : bool
    target, cost : float
        Sparsity; a cost of 0 turns it off.

    Notes
    -----
    Any offsets are right: they change which way is uphill, not where the top is. They are rounded to
    multiples of 1/256, so that v - mu and h - lambda are exact in bfloat16 for samples.

    Sparsity is that of Hinton (2012), section 11: the derivative cost (q - p) of the cross-entropy between
    target p and moving average q, with respect to the input of a hidden unit, for its bias and its weights
    alike. In each data row it is subtracted from h0.
    """
    mu, data, model = np.split(offsets, (n, n + m))
    now = np.multiply(moved, np.float32(scale))
    now[:n] += mu
    now[n:] += data
    means += np.float32(1 - keep) * (now - means)
    steps = np.float32(256)
    np.divide(np.rint(means * steps), steps, out=now) if centring else now.fill(0)
    mu[...], model[...] = now[:n], now[n:]
    np.add(model, np.float32(cost) * (means[n:] - np.float32(target)), out=data)


def cd_sums(dW, db, dc, v, h, rows, *, model_weight=1.0, ones=None, moved=None, precision="fp32"):
    """dW <- v0^T h0 - w vk^T hk,  db <- sum v0 - w sum vk,  dc <- sum h0 - w sum hk.

    Divided by the number of rows, this is the CD-k estimate of the gradient of the mean
    log-likelihood.

    Parameters
    ----------
    dW, db, dc : arrays (n, m), (n,), (m,), float32
        Overwritten with sums, not means, so that the parts of a cut batch may be added.
    v, h : arrays (rows + C, n), (rows + C, m), float32
        The first ``rows`` rows are the data phase, the other C the model phase: for CD C = rows,
        for PCD the number of chains.
    rows : int
        B, the rows of the data phase.
    model_weight : float
        w: 1 for CD; for PCD the rows of the global batch divided by all chains.
    ones : array (2 (rows + C),), float32, optional
        With v and h from ``centre``: what b and c are weights to. None: all 1. Not with ``precision`` 'exact'.
    moved : array (n + m,), float32
        With ``ones`` only: overwritten with the sums over the data rows of v and h, for ``offsets_step``.
    precision : str
        What v, h with its sign and weight, and ``ones`` are rounded to, or ``exact``, see ``gpudbn.precision``. 0 and 1
        lose nothing, also when ``centre`` has subtracted its offsets from them. For sparsity, a small part of
        the offsets, bf16 is too coarse.

    Notes
    -----
    Both products are one, with K = B + C. Hinton (2012), section 2; Hinton (2002), "Training
    products of experts by minimizing contrastive divergence". (Algorithm 1 of the talk this
    project comes from has the signs the other way.)
    """
    if precision != BLOCKS:
        check_precision("cd_sums", precision)
    if precision == "exact":
        if ones is not None:
            raise ValueError("cd_sums: ones must be None where precision is exact, since centred units are no whole "
                             "numbers; got an array")
        exact.cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight)
        return
    signs = _scratch.get("signs", (len(v),))
    signs[:rows] = 1
    signs[rows:] = -model_weight
    signed = np.multiply(h, signs[:, None], out=_scratch.get("signed", h.shape))
    K, n = v.shape
    product(dW, v.T, signed, precision)
    if precision in ("fp32", BLOCKS) and ones is None:
        np.matmul(signs, v, out=db)
        np.sum(signed, axis=0, out=dc)
    else:
        of_b, of_c = (1, np.ones(K, np.float32)) if ones is None else (ones[:K], ones[K:])
        product(db[:, None], v.T, np.multiply(signs, of_b, out=signs)[:, None], precision)
        product(dc[None], of_c[None], signed, precision)
    if moved is not None:
        data = np.ones(rows, np.float32)
        product(moved[:n, None], v[:rows].T, data[:, None], precision)
        product(moved[None, n:], data[None], h[:rows], precision)


def momentum_step(parameters, velocity, gradient, *, weights, scale, rate, momentum, decay, rates=None):
    """velocity <- momentum velocity + rate (scale gradient - decay W);  parameters <- parameters + velocity.

    Parameters
    ----------
    parameters, velocity : arrays (size,), float32
        Modified.
    gradient : array (size,), float32
        Sums over rows, pointing uphill.
    weights : int
        The first ``weights`` entries are weights and decay; the biases behind them do not.
    scale : float
        One over the number of rows that were summed.
    rate, momentum, decay : float
    rates : array (3,), float32, optional
        rate scale, momentum and rate decay, which then count instead: where launches are repeated as they
        are in a CUDA graph.

    Notes
    -----
    Hinton (2012), sections 9 and 10: L2 decay is multiplied by the learning rate.
    """
    rate_scale, momentum, rate_decay = (rate * scale, momentum, rate * decay) if rates is None else rates
    if _in_one_pass(compiled.momentum, weights, (parameters, velocity, gradient), (rate_scale, momentum),
                    rate_decay, 0):
        return
    for decaying, t, p, u, g in _pieces(weights, parameters, velocity, gradient):
        np.multiply(u, np.float32(momentum), out=u)
        np.multiply(g, np.float32(rate_scale), out=t)
        np.add(u, t, out=u)
        if rate_decay and decaying:
            np.multiply(p[:decaying], np.float32(rate_decay), out=t[:decaying])
            np.subtract(u[:decaying], t[:decaying], out=u[:decaying])
        np.add(p, u, out=p)


def sgd_step(parameters, gradient, *, weights, scale, rate, decay, rates=None):
    """W <- (1 - rate decay) W;  parameters <- parameters + rate scale gradient.

    Parameters
    ----------
    parameters : array (size,), float32
        Modified.
    gradient, weights, scale
        As in ``momentum_step``.
    rate, decay : float
    rates : array (3,), float32, optional
        What ``decoupled`` gives, which then counts instead of scale, rate and decay.
    """
    scale, rate, shrink = decoupled(scale, rate, decay) if rates is None else rates
    if _in_one_pass(compiled.sgd, weights, (parameters, gradient), (rate * scale,), shrink, 1):
        return
    for decaying, t, p, g in _pieces(weights, parameters, gradient):
        np.multiply(g, np.float32(rate * scale), out=t)
        _shrink(p[:decaying], shrink)
        np.add(p, t, out=p)


def adagrad_step(parameters, squares, gradient, *, weights, scale, rate, decay, eps=1e-8, rates=None):
    """g = scale gradient;  squares <- squares + g^2;  parameters <- parameters + rate g / (sqrt(squares) + eps).

    Before that, W <- (1 - rate decay) W.

    Parameters
    ----------
    parameters, squares : arrays (size,), float32
        Modified. ``squares`` begins as zeros.
    gradient, weights, scale
        As in ``momentum_step``.
    rate, decay, eps : float
    rates : array (3,), float32, optional
        What ``decoupled`` gives, which then counts instead of scale, rate and decay.

    Notes
    -----
    Duchi, Hazan & Singer, "Adaptive subgradient methods" (2011), with the diagonal matrix; the rule of the servers of
    Dean et al., "Large scale distributed deep networks" (2012), section 4.1.
    """
    scale, rate, shrink = decoupled(scale, rate, decay) if rates is None else rates
    if _in_one_pass(compiled.adagrad, weights, (parameters, squares, gradient), (scale, eps, rate), shrink, 1):
        return
    for decaying, step, p, q, g in _pieces(weights, parameters, squares, gradient):
        if scale != 1:
            g = np.multiply(g, np.float32(scale), out=_scratch.get("scaled", p.shape))
        np.multiply(g, g, out=step)
        np.add(q, step, out=q)
        np.sqrt(q, out=step)
        np.add(step, np.float32(eps), out=step)
        np.divide(g, step, out=step)
        np.multiply(step, np.float32(rate), out=step)
        _shrink(p[:decaying], shrink)
        np.add(p, step, out=p)


def adam_step(parameters, mean, square, gradient, *, weights, scale, rate, decay, steps, b1=0.9, b2=0.999, eps=1e-8,
              rates=None):
    """Adam with decoupled decay.

        g = scale gradient;  mean <- b1 mean + (1 - b1) g;  square <- b2 square + (1 - b2) g^2
        W <- (1 - rate decay) W
        parameters <- parameters + rate sqrt(1 - b2^steps) / (1 - b1^steps) mean / (sqrt(square) + eps)

    Parameters
    ----------
    parameters, mean, square : arrays (size,), float32
        Modified. ``mean`` and ``square`` begin as zeros.
    gradient : array (size,), float32
        As in ``momentum_step``. Work space of the NumPy twin; its content afterwards is not specified.
    weights, scale
        As in ``momentum_step``.
    steps : int
        The number of this step, from 1.
    rate, decay, b1, b2, eps : float
    rates : array (3,), float32, optional
        What ``adam_rates`` gives, which then counts instead of scale, rate, decay and steps.

    Notes
    -----
    Kingma & Ba, "Adam" (2015), algorithm 1, epsilon as in its section 2's last paragraph; decay as in Loshchilov &
    Hutter, "Decoupled weight decay regularization" (2019).
    """
    scale, rate, shrink = adam_rates(scale, rate, decay, steps, b1, b2) if rates is None else rates
    if _in_one_pass(compiled.adam, weights, (parameters, mean, square, gradient), (scale, 1 - b1, 1 - b2, eps, rate),
                    shrink, 1):
        return
    for decaying, t, p, m, s, g in _pieces(weights, parameters, mean, square, gradient):
        # m += (1 - b1) (scale g - m): one pass fewer than the formula above
        np.multiply(g, np.float32(scale), out=g)
        np.multiply(g, g, out=t)
        np.subtract(g, m, out=g)
        np.multiply(g, np.float32(1 - b1), out=g)
        np.add(m, g, out=m)
        np.subtract(t, s, out=t)
        np.multiply(t, np.float32(1 - b2), out=t)
        np.add(s, t, out=s)
        np.sqrt(s, out=t)
        np.add(t, np.float32(eps), out=t)
        np.divide(m, t, out=t)
        np.multiply(t, np.float32(rate), out=t)
        _shrink(p[:decaying], shrink)
        np.add(p, t, out=p)


def decoupled(scale, rate, decay):
    """(scale, rate, 1 - rate decay): the numbers of a step whose decay stands apart from its gradient."""
    return scale, rate, 1 - rate * decay


def adam_rates(scale, rate, decay, steps, b1=0.9, b2=0.999):
    """(scale, rate sqrt(1 - b2^steps) / (1 - b1^steps), 1 - rate decay): the numbers of an Adam step."""
    return scale, rate * np.sqrt(1 - b2**steps) / (1 - b1**steps), 1 - rate * decay


def _quick(function, *arrays):
    """A function of ``compiled`` as machine code for these arrays; None if there is none, or the first is small."""
    many = arrays[0].size >= compiled.MANY and all(array.flags.carray for array in arrays)
    return compiled.quick(function) if many else None


def _in_one_pass(step, weights, arrays, numbers, of_weights, of_biases):
    """Take a step as machine code, the same bits in one pass over memory, if there is any; whether it was taken.

    The last number of ``step`` is ``of_weights`` for the first ``weights`` entries and ``of_biases`` for the others.
    """
    quick = _quick(step, *arrays)
    if quick is None:
        return False
    for part, last in ((slice(weights), of_weights), (slice(weights, None), of_biases)):
        quick(*(array[part] for array in arrays), *map(np.float32, (*numbers, last)))
    return True


def _pieces(weights, *arrays):
    """The arrays in pieces: how many entries of the piece are weights, work space for it, and its parts."""
    for start in range(0, arrays[0].size, PIECE):
        parts = [array[start : start + PIECE] for array in arrays]
        yield min(max(weights - start, 0), parts[0].size), _scratch.get("step", parts[0].shape), *parts


def _shrink(W, shrink):
    """W <- shrink W, where that is something else."""
    if shrink != 1:
        np.multiply(W, np.float32(shrink), out=W)


def cd_update(parameters, velocity, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate,
              momentum, decay, rates=None, precision="fp32"):
    """One CD-k update of an RBM: ``cd_sums`` and ``momentum_step`` in one.

    Parameters
    ----------
    parameters, velocity : arrays (n m + n + m,), float32
        W, b, c end to end. Modified.
    gradient : array (n m + n + m,), float32
        Work space of the NumPy twin; its content afterwards is not specified.
    n, m : int
        Visible and hidden units.
    v, h, rows, model_weight, ones, moved, precision
        As in ``cd_sums``.
    rate, momentum, decay, rates
        As in ``momentum_step``.
    """
    _cd_gradient(gradient, n, m, v, h, rows, model_weight, ones, moved, precision)
    momentum_step(parameters, velocity, gradient, weights=n * m, scale=1 / rows, rate=rate, momentum=momentum,
                  decay=decay, rates=rates)


def cd_sgd(parameters, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate, decay, rates=None):
    """``cd_sums`` and ``sgd_step`` in one: applies activations without writing their gradient.

    Parameters as in ``cd_update`` and ``sgd_step``.
    """
    _cd_gradient(gradient, n, m, v, h, rows, model_weight, ones, moved)
    sgd_step(parameters, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, rates=rates)


def cd_adagrad(parameters, squares, gradient, n, m, v, h, rows, *, model_weight=1.0, ones=None, moved=None, rate, decay,
               fade=0.0, eps=1e-8, rates=None):
    """``cd_sums`` and ``adagrad_step`` in one: applies activations without writing their gradient.

    Parameters as in ``cd_update`` and ``adagrad_step``; and ``fade``: W times this is taken from the sums of W, a decay
    that is in the gradient.
    """
    _cd_gradient(gradient, n, m, v, h, rows, model_weight, ones, moved)
    if fade:
        gradient[: n * m] -= np.float32(fade) * parameters[: n * m]
    adagrad_step(parameters, squares, gradient, weights=n * m, scale=1 / rows, rate=rate, decay=decay, eps=eps,
                 rates=rates)


def _cd_gradient(gradient, n, m, v, h, rows, model_weight, ones, moved, precision="fp32"):
    """``cd_sums`` end to end in ``gradient`` (n m + n + m,)."""
    weights = n * m
    dW, db, dc = gradient[:weights].reshape(n, m), gradient[weights : weights + n], gradient[weights + n :]
    cd_sums(dW, db, dc, v, h, rows, model_weight=model_weight, ones=ones, moved=moved, precision=precision)


def as_half(p):
    """p as float16 and as a multiple of 2^-16, so that sums of up to 256 of them are exact in float32.

    Array of probabilities, float32 -> a new one: error at most 2^-11 p + 2^-17.
    """
    return (np.rint(p * np.float32(2**16)) * np.float32(2**-16)).astype(np.float16).astype(np.float32)


def cd_run(parameters, velocity, v, n, m, *, batch, chains=None, k=1, last_hidden="mean", levels=None, seed, update,
           layer=0, row=0, chain_row=0, rate, momentum, decay):
    """A run of CD-k or PCD-k updates, one after the other: half-steps and ``cd_update``.

    Parameters
    ----------
    parameters, velocity : arrays (n m + n + m,), float32
        W, b, c end to end. Modified.
    v : array (rows, n), float32
        Visible units in [0, 1], minibatch after minibatch.
    n, m : int
        Visible and hidden units.
    batch : int
        Rows of a minibatch; the last one may be short.
    chains : array (C, m), float32, or None
        PCD: hidden states of the persistent chains, all of which go along with every minibatch. Modified.
    k : int
        Gibbs steps an update.
    last_hidden : 'sample' or 'mean'
        Hidden units after the last step. Means are rounded as ``as_half`` says. Hidden units of the data
        and visible units of the steps are always samples.
    levels : int, optional
        v is rounded to multiples of 1 / levels: 1 for samples, 255 for greys of eight bits; not more.
        None: as ``as_half`` says.
    seed, update, layer, row, chain_row : int
        Address of the draws of the first update, as in ``rbm.Contrast``: the number of the update, the layer,
        the position of a minibatch's first row in its global batch, the number of the first chain.
    rate, momentum, decay : float
        As in ``momentum_step``.

    Notes
    -----
    Hinton (2002); Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood
    gradient" (2008).
    """
    W, b, c = parameters[: n * m].reshape(n, m), parameters[n * m : n * m + n], parameters[n * m + n :]
    gradient = np.empty_like(parameters)
    purpose, first = (Purpose.CD, row) if chains is None else (Purpose.CHAIN, chain_row)
    for number, lo in enumerate(range(0, len(v), batch)):
        v0 = v[lo : lo + batch]
        v0 = as_half(v0) if levels is None else np.rint(v0 * np.float32(levels)) / np.float32(levels)
        rows, clock = len(v0), {"seed": seed, "update": update + number}
        h0 = np.empty((rows, m), np.float32)
        half_step(h0, None, v0, W, c, **clock, site=site(Purpose.CD, layer), row=row)
        state = h0.copy() if chains is None else chains
        vk, last = np.empty((len(state), n), np.float32), np.empty_like(state)
        for step in range(k):
            down, up = site(purpose, layer, 2 * step + 1), site(purpose, layer, 2 * step + 2)
            half_step(vk, None, state, W, b, transpose=True, **clock, site=down, row=first)
            half_step(state, None, vk, W, c, **clock, site=up, row=first)
        if last_hidden == "mean":
            half_step(None, last, vk, W, c)
            last = as_half(last)
        else:
            last = state
        cd_update(parameters, velocity, gradient, n, m, np.concatenate([v0, vk]), np.concatenate([h0, last]), rows,
                  model_weight=1.0 if chains is None else rows / len(chains), rate=rate, momentum=momentum, decay=decay)


def gather(out, data, order, *, first=0, scale=1.0, offset=None):
    """out[r] <- scale data[order[first + offset + r]]: the rows of a minibatch, in the order of the epoch.

    Parameters
    ----------
    out : array (B, n), float32
        Overwritten. A row that is not there, beyond the end of ``order`` or of ``data``, becomes NaN.
    data : array (N, n), float32, float16, uint8 or bool
        Values that, scaled, lie in [0, 1].
    order : array (count,), int64, or None
        Which rows of the data; None: the rows as they stand.
    first : int
    scale : float
    offset : array (1,), uint32, optional
        Added to ``first``: where launches are repeated as they are in a CUDA graph.

    Returns
    -------
    out
    """
    first += 0 if offset is None else int(offset[0])
    rows = np.arange(first, min(first + len(out), len(data))) if order is None else order[first : first + len(out)]
    there = np.flatnonzero((rows >= 0) & (rows < len(data)))
    out[...] = np.nan
    out[there] = data[rows[there]]
    return np.multiply(out, np.float32(scale), out=out)


def advance(counters, *, updates, rows):
    """counters[0] += updates, counters[1] += rows: how far a CUDA graph has come, for its next launch.

    Parameters
    ----------
    counters : array (2,), uint32
        The ``clock`` of draws and the ``offset`` of ``gather``.
    updates, rows : int
    """
    counters += np.array((updates, rows), np.uint32)


def note_not_finite(flag, x, *, phase, update, clock=None):
    """flag <- min(flag, phase 2^32 + update) if an entry of x is NaN or infinite: the first time is kept.

    Parameters
    ----------
    flag : array (1,), uint64
        All ones as long as everything was finite.
    x : array (size,), float32
    phase, update : int
        When this is, below 2^32 each.
    clock : array (1,), uint32, optional
        Added to ``update``: where launches are repeated as they are in a CUDA graph.
    """
    # the sum of products is finite unless an entry is not, or it overflows; only then is every entry looked at
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(x @ x) or np.isfinite(x).all()
    if not finite:
        flag[0] = min(int(flag[0]), phase << 32 | (update + (0 if clock is None else int(clock[0]))))


# ------------------------------------------------------------------------------------------ large layers, in bf16


def half_step_wgmma(sample, mean, x, W, bias, *, W_low=None, transpose=False, seed=0, update=0, site=0, row=0, column=0,
                    columns=None, clock=None):
    """``half_step`` of units and weights in bf16, for large layers: sums stay in float32.

    Parameters
    ----------
    sample, mean : array (B, m), uint16 (bf16) or float32, or None
        As in ``half_step``. On a GPU the rows of all matrices begin at multiples of 16 bytes, and what pads them
        is overwritten.
    x : array (B, n), uint16 (bf16)
    W, W_low : array (n, m), uint16 (bf16); or (m, n) with ``transpose``
        Weights; with ``W_low`` they are W + W_low, twice as long and 256 times as near to float32.
    bias : array (m,), float32
    transpose, seed, update, site, row, column, columns, clock
        As in ``half_step``. On a GPU ``column`` is a multiple of 4.
    """
    weights = from_bf16(W) if W_low is None else from_bf16(W) + from_bf16(W_low)
    shape = len(x), weights.shape[0 if transpose else 1]
    p = _scratch.get("mean", shape)
    s = None if sample is None else _scratch.get("sample", shape)
    half_step(s, p, from_bf16(x), weights, bias, transpose=transpose, seed=seed, update=update, site=site, row=row,
              column=column, columns=columns, clock=clock)
    for out, values in ((mean, p), (sample, s)):
        if out is not None:
            out[:] = round_to_bf16(values) if out.dtype == np.uint16 else values


def cd_update_wgmma(parameters, velocity, W, v0, h0, vk, hk, *, W_low=None, model_weight=1.0, rate, momentum, decay,
                    rates=None):
    """``cd_update`` of units in bf16, for large layers; and the weights in bf16 for the half-steps that follow.

    Parameters
    ----------
    parameters, velocity : arrays (n m + n + m,), float32
        As in ``cd_update``: steps are taken in float32.
    W, W_low : array (n, m), uint16 (bf16)
        Overwritten with the weights rounded to bf16 and, unless None, with what rounding took from them.
    v0, h0 : arrays (rows, n), (rows, m), uint16 (bf16)
        Data phase.
    vk, hk : arrays (C, n), (C, m), uint16 (bf16)
        Model phase.
    model_weight, rate, momentum, decay, rates
        As in ``cd_update``.
    """
    n, m = W.shape
    v, h = (from_bf16(np.concatenate(both)) for both in ((v0, vk), (h0, hk)))
    cd_update(parameters, velocity, _scratch.get("gradient", parameters.shape), n, m, v, h, len(v0),
              model_weight=model_weight, rate=rate, momentum=momentum, decay=decay, rates=rates)
    weights = parameters[: n * m].reshape(n, m)
    W[:] = round_to_bf16(weights)
    if W_low is not None:
        W_low[:] = round_to_bf16(weights - from_bf16(W))


def to_bf16(high, x, *, low=None):
    """high <- x rounded to bf16, low <- what rounding took from it, rounded too.

    Parameters
    ----------
    high, low : array (rows, m), uint16 (bf16); low may be None
        On a GPU their rows begin at multiples of 16 bytes, and what pads them is overwritten.
    x : array (rows, m), float32
    """
    high[:] = round_to_bf16(x)
    if low is not None:
        with np.errstate(invalid="ignore"):  # an infinity leaves NaN
            low[:] = round_to_bf16(x - from_bf16(high))


def to_float(x, high):
    """x <- the values of bf16: array (rows, m), float32, of high (rows, m), uint16, as ``to_bf16`` makes it."""
    x[:] = from_bf16(high)


def gaussian(sample, mean, sd, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """sample[r, j] <- mean[r, j] + sd[j] z(r, j), with standard normals z.

    Parameters
    ----------
    sample : array (B, m), float32
        Overwritten. May be ``mean`` itself.
    mean : array (B, m), float32
    sd : array (m,), float32
        Standard deviations.
    seed, update, site, row, column, columns, clock
        Address of the draws, see ``draws``; ``column`` must be even.
    """
    z = normals(_scratch.get("u", mean.shape), seed=seed, update=update, site=site, row=row, column=column,
                columns=columns, clock=clock)
    np.multiply(z, sd, out=z)
    return np.add(mean, z, out=sample)


def categorical(sample, mean, x, bias, units, *, seed=0, update=0, site=0, row=0, column=0, columns=None, clock=None):
    """Groups of units of which one is on: mean <- softmax(x + bias) in each group, sample ~ mean.

    Softmax, label and Potts units. A group draws one u, and its first unit with u < mean[0] + ... + mean[k] is on.

    Parameters
    ----------
    sample : array (B, groups units), float32, or None
        Overwritten with 0 and a single 1 in each group. None: not wanted, nothing is drawn. May be ``x`` itself.
    mean : array (B, groups units), float32, or None
        Overwritten with the probabilities. None: not wanted. May be ``x`` itself.
    x : array (B, groups units), float32
        Pre-activations, group by group. -infinity is a probability of 0.
    bias : array (groups units,), float32
    units : int
        Units of one group.
    seed, update, site, row, column, columns, clock
        Address of the draws, see ``draws``: here a column is a group, and ``columns`` the groups of the whole layer.

    Notes
    -----
    Welling, Rosen-Zvi & Hinton, "Exponential family harmoniums" (2005).
    """
    groups = len(bias) // units
    grouped = (len(x), groups, units)
    e = np.add(x, bias, out=_scratch.get("e", x.shape)).reshape(grouped)
    np.subtract(e, e.max(axis=2, keepdims=True), out=e)
    np.exp(e, out=e)
    up_to = e.cumsum(axis=2, dtype=np.float64)
    if mean is not None:
        np.divide(e, up_to[:, :, -1:].astype(np.float32), out=mean.reshape(grouped))
    if sample is not None:
        u = uniforms(_scratch.get("u", (len(x), groups)), seed=seed, update=update, site=site, row=row, column=column,
                     columns=columns, clock=clock)
        chosen = (up_to <= u[:, :, None] * up_to[:, :, -1:]).sum(axis=2, keepdims=True)
        np.equal(np.arange(units), chosen, out=sample.reshape(grouped), casting="unsafe")


def cross_entropy(delta, loss, wrong, x, bias, labels):
    """delta <- onehot(label) - p,  loss <- -log p(label),  wrong <- 0 if p(label) is largest else 1.

    Here p = softmax(x + bias), along a row.

    Parameters
    ----------
    delta : array (B, K), float32, or None
        Overwritten with the gradient of log p(label) in x. None: not wanted. May be ``x`` itself.
    loss, wrong : arrays (B,), float32, or None
        Overwritten with nats, and with 0 and 1 (of several largest p the first counts). None: not wanted.
    x : array (B, K), float32
        Pre-activations.
    bias : array (K,), float32
    labels : array (B,), int32
        In [0, K).
    """
    log_p = np.add(x, bias, out=_scratch.get("log p", x.shape))
    log_p -= log_p.max(axis=1, keepdims=True)
    if wrong is not None:
        np.not_equal(log_p.argmax(axis=1), labels, out=wrong, casting="unsafe")
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    each = np.arange(len(x))
    if loss is not None:
        np.negative(log_p[each, labels], out=loss)
    if delta is not None:
        np.exp(log_p, out=delta)
        np.negative(delta, out=delta)
        delta[each, labels] += 1


def free_energy(out, x, c, v=None, b=None):
    """out <- -v b - sum_j log(1 + exp(x_j + c_j)), for each row, with x = v W.

    Parameters
    ----------
    out : array (B,), float32
        Overwritten.
    x : array (B, m), float32
        Pre-activations of the hidden units.
    c : array (m,), float32
    v, b : arrays (B, n), (n,), float32, optional
        Left out where a layer is cut into shards and another one has the visible biases: the parts add up.

    Returns
    -------
    out
    """
    t = np.add(x, c, out=_scratch.get("t", x.shape))
    np.negative(np.logaddexp(np.float32(0), t, out=t).sum(axis=1), out=out)
    return out if v is None else np.subtract(out, v @ b, out=out)


def squared_errors(out, v, w):
    """out <- sum_i (v_i - w_i)^2 for each row. Arrays (B,), (B, n), (B, n), float32. Returns ``out``."""
    difference = np.subtract(v, w, out=_scratch.get("difference", v.shape))
    np.multiply(difference, difference, out=difference)
    out[...] = difference.sum(axis=1, dtype=np.float64)
    return out


def dropout(x, keep, *, seed, update, site, row=0, column=0, columns=None, clock=None):
    """x[r, j] <- x[r, j] / keep if u(r, j) < keep else 0, in place. Returns ``x``.

    Parameters
    ----------
    x : array (B, m), float32
        Modified.
    keep : float
        The probability with which a unit takes part.
    seed, update, site, row, column, columns, clock
        Address of the draws, see ``draws``.

    Notes
    -----
    Srivastava et al., "Dropout" (2014), section 4; scaled in training, so that prediction needs no change.
    """
    u = uniforms(_scratch.get("u", x.shape), seed=seed, update=update, site=site, row=row, column=column,
                 columns=columns, clock=clock)
    np.multiply(x, u < np.float32(keep), out=x)
    return np.multiply(x, np.float32(1 / keep), out=x)


def sigmoid_backward(delta, a, *, keep=1.0):
    """delta <- delta a (1 - keep a), in place: through the sigmoid, and the dropout behind it. Returns ``delta``.

    With a = s [kept] / keep, where s is the sigmoid's value, the factor [kept] / keep s (1 - s) is a (1 - keep a).

    Parameters
    ----------
    delta, a : arrays of one shape, float32
    keep : float
    """
    factor = np.multiply(a, np.float32(-keep), out=_scratch.get("factor", a.shape))
    factor += np.float32(1)
    delta *= a
    return np.multiply(delta, factor, out=delta)
