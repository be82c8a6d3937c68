"""Exact mode in NumPy: sums of integers, and float32 operations that round once, in a fixed order.

A sum of floating-point numbers depends on its order, so a CPU and a GPU, or two BLAS libraries, differ in
its last bits, and now and then a sample flips. Here nothing is left to an order:

    weights   are read as multiples of 2^-18, up to 31 in size: integers of 24 bits
    units     are read as multiples of 2^-14, up to 1 in size: integers of 16 bits, for 0 and 1 exactly
    products  are then sums of integers, which round nothing
    the rest  is + - * / of float32, each rounded once (IEEE 754), in the order written here

so half-steps, gradients and whole runs have the same bits on every GPU, with every BLAS and number of
threads, and under every cut of a layer into tiles or shards. Weights and units are rounded to nearest, ties
to even; what is larger counts as the largest. A GPU cuts the integers into signed bytes, "limbs", 3 of a
weight and 2 of a unit, since bytes are what its tensor cores multiply; here a float64 product is as
exact, below 2^53, and fast.

The step is fixed, not fitted to the largest weight of a matrix: then W, its transpose and every shard of
it are read alike, nothing must be found out before a product can start, and one large weight does not
coarsen all others. What two limbs of a weight would cost and lose: four products of bytes instead of six where units
are probabilities, and two instead of three where they are samples, whose lower limbs are 0 and left out; for the
same range of weights the step would be 2^-10, which misses a weight by up to 5e-4 instead of 2e-6. Then one sample in
2000 would not be that of float32, instead of one in 500 000 (784 units below, a test). So a run in exact mode is
almost the run in float32; two limbs would learn as well, but be another run.

GPU twins: ``kernels/limbs.cuh``, ``kernels/rounded.cuh``, ``kernels/sigmoid.cuh``.
"""

from __future__ import annotations

import numpy as np

from gpudbn.scratch import PIECE, Scratch

WEIGHT_STEPS, LARGEST_WEIGHT = 2.0**18, 31.0  # steps: in 1
UNIT_STEPS, LARGEST_UNIT = 2.0**14, 1.0
MOST_TERMS = 1 << 16  # of a sum: float64 stays below 2^53, and the GPU's sums of products of limbs below 2^31

LARGEST_ARGUMENT = np.float32(80)
MINUS_LOG2_E = np.float32(-1.44269504)
TO_WHOLE = np.float32(3 << 22)  # a sum with it is rounded to a whole number, which is in its lowest bits
# 2^f = 1 + f (C1 + f (C2 + ...)) for |f| <= 1/2, with the smallest relative error of its degree, 9.2e-8; C5 to C1
POWER = tuple(map(np.float32, (0.00132647, 0.00967151, 0.05550734, 0.24022242, 0.69314698)))

_scratch = Scratch()


def integers(name, x, steps, largest):
    """round(x steps), clipped: work space, float64, of x's shape. Ties go to even.

    Parameters
    ----------
    name : str
        Which work space.
    x : array, float32, C-contiguous
    steps, largest : float
        Steps in 1, a power of two; the largest x.
    """
    out = _scratch.get(name, x.shape, np.float64)
    flat, whole = x.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        t = np.clip(piece, -largest, largest, out=_scratch.get("piece", piece.shape))
        np.multiply(t, np.float32(steps), out=t)
        whole[start : start + PIECE] = np.rint(t, out=t)
    return out


def check_terms(function: str, what: str, terms: int) -> None:
    """Refuse sums that might not be exact."""
    if terms > MOST_TERMS:
        raise ValueError(f"{function}: {what} must be at most {MOST_TERMS} in exact mode; got {terms}")


def sigmoid(x):
    """x <- 1 / (1 + 2^y), y = -x log2 e, in place. Absolute error below 1e-7. Returns ``x``.

    2^y is 2^n 2^f with n = y rounded to a whole number and f = y - n: a polynomial, whose exponent is raised by n.
    """
    flat = x.reshape(-1)
    for start in range(0, flat.size, PIECE):
        f = flat[start : start + PIECE]
        whole, power = _scratch.get("whole", f.shape), _scratch.get("power", f.shape)
        np.clip(f, -LARGEST_ARGUMENT, LARGEST_ARGUMENT, out=f)
        np.multiply(f, MINUS_LOG2_E, out=f)
        np.add(f, TO_WHOLE, out=whole)
        np.subtract(whole, TO_WHOLE, out=power)
        np.subtract(f, power, out=f)
        np.multiply(f, POWER[0], out=power)
        for coefficient in POWER[1:]:
            np.add(power, coefficient, out=power)
            np.multiply(power, f, out=power)
        np.add(power, np.float32(1), out=power)
        exponent, bits = whole.view(np.int32), power.view(np.int32)
        np.left_shift(exponent, 23, out=exponent)
        np.add(bits, exponent, out=bits)
        np.add(power, np.float32(1), out=power)
        np.divide(np.float32(1), power, out=f)
    return x


def half_step(mean, x, W, bias, *, transpose):
    """mean <- sigmoid(x W + bias). Arrays as of ``reference.half_step``; n at most 65536. Returns ``mean``."""
    check_terms("half_step", "n", x.shape[1])
    a = integers("a", x, UNIT_STEPS, LARGEST_UNIT)
    b = integers("b", W, WEIGHT_STEPS, LARGEST_WEIGHT)
    mean[...] = np.matmul(a, b.T if transpose else b, out=_scratch.get("sums", mean.shape, np.float64))
    np.multiply(mean, np.float32(1 / (UNIT_STEPS * WEIGHT_STEPS)), out=mean)
    np.add(mean, bias, out=mean)
    return sigmoid(mean)


def cd_sums(dW, db, dc, v, h, rows, *, model_weight):
    """Gradient sums. Arrays as of ``reference.cd_sums``, C-contiguous; at most 65536 rows in either phase.

    The sum over each phase is rounded to float32 before the model's is weighted and subtracted. Where v or h
    are samples and no sum is above 1024, float32 holds it exactly: then, with a weight of 1, the parts of a
    cut batch add to the whole batch's sums to the bit.
    """
    check_terms("cd_sums", "rows", max(rows, len(v) - rows))
    a, b = integers("a", v, UNIT_STEPS, LARGEST_UNIT), integers("b", h, UNIT_STEPS, LARGEST_UNIT)
    for out, sums, step in ((dW, lambda part: a[part].T @ b[part], 1 / UNIT_STEPS**2),
                            (db, lambda part: a[part].sum(axis=0), 1 / UNIT_STEPS),
                            (dc, lambda part: b[part].sum(axis=0), 1 / UNIT_STEPS)):
        model = _scratch.get("model", out.shape)
        out[...], model[...] = sums(slice(rows)), sums(slice(rows, None))
        np.multiply(out, np.float32(step), out=out)
        np.multiply(model, np.float32(step), out=model)
        np.multiply(model, np.float32(model_weight), out=model)
        np.subtract(out, model, out=out)
