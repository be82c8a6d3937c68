"""Centring and sparsity: the gradient of the same RBM written otherwise, what they promise, and what they do."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import offsets, pretrain, reference
from gpudbn.data import Rows, load
from gpudbn.dbn import DBN
from gpudbn.errors import UserError
from gpudbn.offsets import Offsets
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.settings import Settings
from tests.helpers import all_states, assert_close, assert_notices, joint, log_likelihood, planted

N, M = 5, 3
RNG = np.random.default_rng(3)
W, B, C = RNG.normal(0, 1, (N, M)), RNG.normal(0, 1, N), RNG.normal(0, 1, M)
MU, LAMBDA, PULL = RNG.random(N), RNG.random(M), RNG.normal(0, 0.3, M)
DATA = (RNG.random((7, N)) < [0.9, 0.2, 0.7, 0.4, 0.6]).astype(np.float32)


def sums_of(v, h, rows, weight, mu, lambda0, model):
    """dW, db, dc and moved of ``centre`` and ``cd_sums``; what is given stays as it is."""
    v, h = v.astype(np.float32), h.astype(np.float32)
    n, m = v.shape[1], h.shape[1]
    ones, moved = np.full(2 * len(v), np.nan, np.float32), np.full(n + m, np.nan, np.float32)
    out = [np.full(shape, np.nan, np.float32) for shape in ((n, m), (n,), (m,))]
    reference.centre(v, h, ones, np.concatenate([mu, lambda0, model]).astype(np.float32), rows)
    reference.cd_sums(*out, v, h, rows, model_weight=weight, ones=ones, moved=moved)
    return [*out, moved]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def differences(function, x, step=1e-4):
    """The gradient of a function of an array, by central differences."""
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


# The gradient


def check_sums():
    """Those of the plain sums: dW of centred units; db, dc as what b' = b + W lambda, c' = c + W^T mu move b, c by."""
    rng, rows, model = np.random.default_rng(1), 11, 3
    v, h, w = rng.random((rows + model, N)), rng.random((rows + model, M)), rows / model
    signs = np.where(np.arange(rows + model) < rows, 1, -w)
    dW, db, dc, moved = sums_of(v, h, rows, w, MU, LAMBDA + PULL, LAMBDA)
    weights = sum(s * np.outer(a - MU, b - LAMBDA) for s, a, b in zip(signs, v, h, strict=True))
    weights -= np.outer((v[:rows] - MU).sum(axis=0), PULL)
    assert_close(dW, weights, atol=1e-5)
    assert_close(db, signs @ v - weights @ LAMBDA, atol=2e-5)
    assert_close(dc, signs @ h - rows * PULL - weights.T @ MU, atol=2e-5)
    expected = (v[:rows] - MU).sum(axis=0), (h[:rows] - LAMBDA - PULL).sum(axis=0)
    assert_close(moved, np.concatenate(expected), atol=1e-5)


def test_sums_are_those_of_centred_units_taken_back_to_ordinary_parameters():
    check_sums()


@pytest.mark.parametrize(("line", "fault"), [
    ("np.subtract(h[:rows], data, out=h[:rows])", "np.subtract(h[:rows], model, out=h[:rows])"),
    ("np.subtract(h[rows:], model, out=h[rows:])", "np.subtract(h[rows:], data, out=h[rows:])"),
    ("np.matmul(h, model, out=ones[:K])", "np.matmul(h, data, out=ones[:K])"),
    ("np.matmul(v, mu, out=ones[K:])", "np.sum(v, axis=1, out=ones[K:])"),
    ("of_b, of_c = (1, np.ones(K, np.float32)) if ones is None else (ones[:K], ones[K:])",
     "of_c, of_b = (1, 1) if ones is None else (ones[:K], ones[K:])"),
    ("product(dc[None], of_c[None], signed, precision)", "product(dc[None], of_c[None], h, precision)"),
    ("product(moved[:n, None], v[:rows].T, data[:, None], precision)",
     "product(moved[:n, None], v[-rows:].T, data[:, None], precision)"),
    ("product(moved[None, n:], data[None], h[:rows], precision)",
     "product(moved[None, n:], data[None], h[-rows:], precision)"),
])
def test_wrong_sums_are_noticed(line, fault):
    assert_notices(check_sums, reference, line, fault)


def test_the_expected_sums_are_the_gradient_of_the_likelihood_in_centred_parameters():
    """By enumeration and finite differences; one state at a time, since the sums of parts add."""
    total = sums_of(DATA, sigmoid(DATA @ W + C), len(DATA), 1, MU, LAMBDA, LAMBDA)[:3]
    for state, p in zip(all_states(N), np.exp(joint(W, B, C)).sum(axis=1), strict=True):
        h = sigmoid(state[None] @ W + C)
        parts = sums_of(state[None], h, 0, len(DATA) * p, MU, LAMBDA, LAMBDA)
        total = [a + b for a, b in zip(total, parts, strict=False)]

    def likelihood(flat):
        weights, b, c = flat[: N * M].reshape(N, M), flat[N * M : N * M + N], flat[N * M + N :]
        return log_likelihood(weights, b - weights @ LAMBDA, c - weights.T @ MU, DATA)

    gradient = differences(likelihood, np.concatenate([W.ravel(), B + W @ LAMBDA, C + W.T @ MU]))
    dW, db, dc = gradient[: N * M].reshape(N, M), gradient[N * M : N * M + N], gradient[N * M + N :]
    for got, expected in zip(total, (dW, db - dW @ LAMBDA, dc - dW.T @ MU), strict=True):
        assert_close(got / len(DATA), expected, atol=1e-5)
    plain = np.zeros(N), np.zeros(M), np.zeros(M)
    uncentred = sums_of(DATA, sigmoid(DATA @ W + C), len(DATA), 1, *plain)[0]
    assert np.abs(uncentred - total[0]).max() > 0.1, "centring changes nothing, nothing was shown"


def test_sparsity_is_the_gradient_of_the_cross_entropy_with_the_target():
    """For one row, whose mean is its own probability: of the bias and the weights alike, and of b not at all."""
    row, target, cost = DATA[:1], 0.1, 0.7
    q = sigmoid(row @ W + C)[0]
    none = np.zeros(N), np.zeros(M), np.zeros(M)
    without = sums_of(row, q[None], 1, 1, *none)
    found = sums_of(row, q[None], 1, 1, none[0], cost * (q - target), none[2])

    def penalty(W_, c_):
        p = sigmoid(row @ W_ + c_)[0]
        return -cost * (target * np.log(p) + (1 - target) * np.log(1 - p)).sum()

    assert_close(without[0] - found[0], differences(lambda x: penalty(x, C), W), atol=1e-5)
    assert_close(without[2] - found[2], differences(lambda x: penalty(W, x), C), atol=1e-5)
    assert np.array_equal(found[1], without[1])


# The offsets


def check_step(centring, target):
    rng, count, cost = np.random.default_rng(5), 13, 0.3 if target else 0.0
    of = Offsets(N, M, 8, centring=centring, target=target, cost=cost, xp=np)
    of.begin(MU.astype(np.float32), target or 0.5)
    means = np.concatenate([MU, np.full(M, target or 0.5)])
    for _ in range(3):
        rounded = np.round(means * 256) / 256 * centring
        pull = cost * (means[N:] - (target or 0))
        assert_close(of.means, means, atol=1e-6)
        assert_close(of.offsets, np.concatenate([rounded[:N], rounded[N:] + pull, rounded[N:]]), atol=1e-6)
        now = rng.random(N + M)
        moved = count * (now - np.concatenate([rounded[:N], rounded[N:] + pull]))
        of.step(moved.astype(np.float32), count)
        means = 0.99 * means + 0.01 * now


@pytest.mark.parametrize(("centring", "target"), [(True, None), (False, 0.1), (True, 0.1)])
def test_offsets_follow_moving_averages_of_the_data_rows(centring, target):
    check_step(centring, target)


@pytest.mark.parametrize(("module", "line", "fault"), [
    (reference, "now[:n] += mu", "pass"),
    (reference, "now[n:] += data", "now[n:] += model"),
    (reference, "np.float32(1 - keep) * (now - means)", "np.float32(keep) * (now - means)"),
    (reference, "np.divide(np.rint(means * steps), steps, out=now)", "np.copyto(now, means)"),
    (reference, "mu[...], model[...] = now[:n], now[n:]", "mu[...] = now[:n]"),
    (reference, "np.float32(cost) * (means[n:] - np.float32(target))", "np.float32(cost) * means[n:]"),
    (offsets, "scale=1 / count, keep=KEEP", "scale=1, keep=KEEP"),
])
def test_a_wrong_step_of_the_offsets_is_noticed(module, line, fault):
    assert_notices(lambda: check_step(True, 0.1), module, line, fault)


def test_centred_samples_are_exact_in_eight_bits():
    """What subtracts from 0 and 1 is a multiple of 1/256, so that bfloat16 holds every difference."""
    of = Offsets(N, M, 8, centring=True, target=None, cost=0.0, xp=np)
    of.begin(MU.astype(np.float32), 0.37)
    for unit in (0, 1):
        centred = unit - of.offsets
        assert np.array_equal((centred.view(np.uint32) & 0xFFFF), np.zeros(N + 2 * M))


# Whole updates


def layer(settings, n, *, parameters):
    dbn = DBN([n, *settings.layers])
    for name, array in parameters.items():
        dbn.layers[0].parameters[name][...] = array
    return LayerPhase(dbn, 0, settings, rows=settings.batch, chains=None)


def learn(data, updates, settings, **parameters):
    """The phase after so many updates; the data go round."""
    table = Rows(data.astype(np.uint8))
    phase = layer(settings, data.shape[1], parameters=parameters)
    if phase.offsets:
        phase.offsets.begin(phase.visible_means(table), 0.5)
    phase.begin_epoch(0)
    for update in range(updates):
        positions = np.arange(update * settings.batch, (update + 1) * settings.batch) % len(table)
        phase.update(table, Piece(positions, update, 0, slice(0), 0, 1.0))
    return phase


def mirrored(centring):
    """How far the RBM learned from 1 - v is from the mirror image of that learned from v, and how far that has come."""
    rng = np.random.default_rng(2)
    data = (rng.random((60, 11)) < rng.uniform(0.02, 0.5, 11)).astype(np.float32)
    data[:, 3] = data[:, 7]
    W0, b0, c0 = rng.normal(0, 0.1, (11, 7)), rng.normal(0, 0.5, 11), rng.normal(0, 0.5, 7)
    settings = Settings(layers=(7,), batch=20, learning_rate=0.1, momentum=0.5, decay=0, reconstruction="mean",
                        centring=centring)
    of = learn(data, 60, settings, W=W0, b=b0, c=c0).rbm
    other = learn(1 - data, 60, settings, W=-W0, b=-b0, c=c0 + W0.sum(axis=0)).rbm
    pairs = (other.W, -of.W), (other.b, -of.b), (other.c, of.c + of.W.sum(axis=0))
    return max(np.abs(a - b).max() for a, b in pairs), np.abs(of.W - W0).max()


def test_centred_learning_does_not_mind_which_state_is_called_1():
    """Melchior et al. (2016), section 4: flipping the data mirrors the whole course of learning."""
    apart, learned = mirrored("data")
    assert learned > 0.3
    assert apart < 1e-4
    assert mirrored("off")[0] > 0.1


def test_a_gradient_that_is_not_taken_back_is_not_mirrored():
    with planted(reference, "product(dc[None], of_c[None], signed, precision)", "np.sum(signed, axis=0, out=dc)"):
        assert mirrored("data")[0] > 0.01


def activity(**options):
    """Mean activities of the hidden units after training on the digits with these options."""
    data = load("digits", validation=0, test=0, seed=3).train
    settings = Settings(layers=(40,), batch=20, learning_rate=0.1, momentum=0.5, **options)
    phase = LayerPhase(DBN([64, 40]), 0, settings, rows=20, chains=None)
    phase.initialise(data)
    phase.begin_epoch(0)
    for update in range(600):
        positions = np.arange(update * 20, (update + 1) * 20) % len(data)
        phase.update(data, Piece(positions, update, 0, slice(0), 0, 1.0))
    x = np.empty((len(data), 64), np.float32)
    data.take(np.arange(len(data)), x)
    return phase.rbm.hidden_given_visible(x).mean(axis=0)


@pytest.mark.parametrize(("centring", "apart"), [("off", 0.25), ("data", 0.05)])
def test_sparsity_brings_the_units_to_the_target(centring, apart):
    found = activity(sparsity_target=0.1, sparsity_cost=1.0, centring=centring)
    assert abs(found.mean() - 0.1) < 0.03, found
    assert np.abs(found - 0.1).max() < apart, found
    assert np.abs(activity(centring=centring) - 0.1).max() > 0.5


def test_sparsity_is_refused_where_it_would_be_rounded_away():
    with pytest.raises(UserError, match=r"--precision: must not be bf16 with --sparsity-target.*got bf16. Use bf16x2"):
        Settings(precision="bf16", sparsity_target=0.1)
    assert Settings(precision="bf16x2", sparsity_target=0.1).sparsity_target == 0.1
    with pytest.raises(UserError, match=r"--sparsity-target: must lie between 0 and 1; got 1"):
        Settings(sparsity_target=1)


def test_without_options_there_are_no_offsets():
    phase = layer(Settings(layers=(7,)), 5, parameters={})
    assert phase.offsets is None
    assert list(phase.state()) == ["velocity"]
    assert phase.exchanged == phase.parameters.size


def test_sums_and_a_step_are_an_update():
    """On W, b, c and the offsets, to the bit."""
    settings = Settings(layers=(7,), batch=13, centring="data", sparsity_target=0.2, sparsity_cost=0.5, decay=0.3)
    data = Rows((np.random.default_rng(1).random((29, 11)) < 0.3).astype(np.uint8))
    one, other = (LayerPhase(DBN([11, 7]), 0, settings, rows=13, chains=None) for _ in range(2))
    for phase in (one, other):
        phase.initialise(data)
        phase.begin_epoch(0)
    start = one.state()["offsets"].copy()
    for update in range(3):
        piece = Piece(np.arange(update, update + 13 - update), update, 0, slice(0), 0, 1.0)
        sums = np.full(one.exchanged, np.nan, np.float32)
        one.sums(sums, data, piece)
        one.step(sums, 13 - update)
        other.update(data, piece)
    for name, array in (one.state() | {"parameters": one.parameters}).items():
        assert np.array_equal(array, (other.state() | {"parameters": other.parameters})[name]), name
    assert not np.array_equal(start, one.state()["offsets"])


@pytest.mark.parametrize(("line", "fault"), [
    ("self.offsets.step(sums[size:], count)", "pass"),
    ("self.offsets.step(self.offsets.moved, count)", "pass"),
])
def test_offsets_that_stay_behind_are_noticed(line, fault):
    assert_notices(test_sums_and_a_step_are_an_update, pretrain, line, fault)
