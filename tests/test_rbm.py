"""One RBM against enumeration: energies, conditionals, chains that start exact and must stay exact, gradients.

A sampler that is right leaves the model's distribution where it is. So chains are started with exact samples from
p(v, h), found by enumeration, and what they become is compared with p(v, h) in total variation; the unit is the
distance that exact samples have on average, so that about 0.8 is right and 2 is not chance.
"""

from __future__ import annotations

import warnings
from itertools import pairwise, product

import numpy as np
import pytest

from gpudbn import draws, rbm, reference
from gpudbn.draws import Purpose, normals, site
from gpudbn.rbm import RBM, Contrast, Estimator, new_chains

from .helpers import all_states, assert_close, assert_notices, joint, log_likelihood, number_of

SEED = 2**35 + 5


def model(n=4, m=3, seed=0, strength=1.0):
    """An RBM with strong, asymmetric weights and biases."""
    rng = np.random.default_rng(seed)
    made = RBM(n, m)
    made.parameters.flat[...] = strength * rng.standard_normal(made.parameters.size) + 0.1
    return made


def parts(of):
    """W, b, c in float64."""
    return of.W.astype(np.float64), of.b.astype(np.float64), of.c.astype(np.float64)


def exact_pairs(of, count, seed=1):
    """``count`` exact samples of (v, h): arrays (count, n), (count, m), float32."""
    p = np.exp(joint(of.W, of.b, of.c))
    chosen = np.random.default_rng(seed).choice(p.size, count, p=p.ravel())
    v, h = np.unravel_index(chosen, p.shape)
    return all_states(of.n)[v], all_states(of.m)[h]


def distance(states, p):
    """Total variation between binary rows and probabilities of all states, in units of that of exact samples."""
    found = np.bincount(number_of(states), minlength=p.size) / len(states)
    return np.abs(found - p).sum() / np.sqrt(p * (1 - p) / len(states)).sum()


# Energies and conditionals


def check_energy():
    of = model()
    W, b, c = parts(of)
    v, h = all_states(of.n), all_states(of.m)
    energies = np.array([[-sum(b[i] * x[i] for i in range(4)) - sum(c[j] * y[j] for j in range(3))
                          - sum(x[i] * W[i, j] * y[j] for i in range(4) for j in range(3)) for y in h] for x in v])
    pairs = list(product(range(len(v)), range(len(h))))
    assert_close(of.energy(v[[i for i, _ in pairs]], h[[j for _, j in pairs]]), energies.ravel(), atol=2e-6)
    assert_close(of.free_energy(v), -np.log(np.exp(-energies).sum(axis=1)), atol=2e-6)
    p = np.exp(-energies) / np.exp(-energies).sum()
    assert_close(np.exp(joint(of.W, of.b, of.c)), p, atol=1e-12)  # the yardstick of the other tests
    on_h = (p @ h) / p.sum(axis=1, keepdims=True)
    on_v = (p.T @ v) / p.sum(axis=0)[:, None]
    assert_close(of.hidden_given_visible(v), on_h, atol=1e-6)
    assert_close(of.visible_given_hidden(h), on_v, atol=1e-6)
    mean_field = 1 / (1 + np.exp(-(1 / (1 + np.exp(-(v @ W + c))) @ W.T + b)))
    assert_close(of.reconstruct(v), mean_field, atol=1e-6)


def test_energies_and_conditionals_are_those_of_enumeration():
    check_energy()


@pytest.mark.parametrize(("module", "line", "fault"), [
    (rbm, "h @ self.c + (self._input(v)", "h @ self.c - (self._input(v)"),
    (rbm, "of_hidden = h @ self.c + (", "of_hidden = v @ self.b + h @ self.c + ("),
    (reference, "np.negative(np.logaddexp(", "np.positive(np.logaddexp("),
    (reference, "t = np.add(x, c,", "t = np.subtract(x, c,"),
    (reference, "np.subtract(out, v @ b, out=out)", "np.add(out, v @ b, out=out)"),
    (rbm, "energies, self._input(v), self.c, *visible)", "energies, self._input(v), self.c)"),
    (rbm, "self.up(None, mean, v)", "self.up(None, mean, 1 - v)"),
    (rbm, "half_step(sample, mean, h, self.W, self.b, transpose=True",
     "half_step(sample, mean, h, self.W, self.b[::-1], transpose=True"),
])
def test_a_wrong_energy_or_conditional_is_noticed(module, line, fault):
    assert_notices(check_energy, module, line, fault)


def test_the_free_energy_of_strong_units_does_not_overflow():
    of = RBM(2, 3)
    of.W[...] = 500
    assert_close(of.free_energy(np.ones((1, 2), np.float32)), np.array([-3000.0]), rtol=1e-6)
    of.W[...] = -500
    assert_close(of.free_energy(np.ones((1, 2), np.float32)), np.array([0.0]))


def test_flags_that_a_blas_raises_are_not_warned_of():
    of = RBM(2, 3)
    of.b[...] = np.inf, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also for what pyproject.toml lets pass
        assert np.isnan(of.free_energy(np.ones((1, 2), np.float32))).all()
        assert np.isnan(of.energy(np.ones((1, 2), np.float32), np.ones((1, 3), np.float32))).all()


# Initial values


def check_initial():
    of = RBM(7, 5)
    means = np.array([0, 1, 0.5, 0.25, 1e-9, 0.9, 0.0005], np.float32)
    of.initialise(sd=0.02, seed=SEED, layer=3, visible_means=means)
    z = normals(np.empty((7, 5), np.float32), seed=SEED, update=0, site=site(Purpose.INITIALISATION, 3))
    assert_close(of.W, 0.02 * z.astype(np.float64), atol=1e-8)
    assert not of.c.any()
    p = np.array([0.001, 0.999, 0.5, 0.25, 0.001, 0.9, 0.001])
    assert_close(of.b, np.log(p / (1 - p)), atol=2e-4)
    of.c[...] = 7
    of.initialise(sd=0, seed=SEED)
    assert not of.parameters.flat.any()


def test_initial_weights_are_small_normals_and_biases_those_of_independent_units():
    check_initial()


@pytest.mark.parametrize(("line", "fault"), [
    ("xp.multiply(self.W, np.float32(sd)", "xp.multiply(self.W, np.float32(sd * sd)"),
    ("np.log(p / (1 - p))", "np.log(p)"),
    ("1e-3, 1 - 1e-3)", "1e-2, 1 - 1e-2)"),
    ("site(Purpose.INITIALISATION, layer)", "site(Purpose.INITIALISATION)"),
    ("self.c[...] = np.log(hidden_mean / (1 - hidden_mean))", "pass"),
])
def test_wrong_initial_values_are_noticed(line, fault):
    assert_notices(check_initial, rbm, line, fault)


def test_new_chains_are_fair_coins_at_their_own_address():
    chains = new_chains(20_011, RBM(1, 5), seed=SEED, layer=2, row=3)
    assert distance(chains, np.full(32, 1 / 32)) < 2
    assert np.array_equal(new_chains(11, RBM(1, 5), seed=SEED, layer=2, row=20), chains[17:28])
    address = {"seed": SEED, "update": 0, "site": site(Purpose.CHAIN, 2, 0), "row": 3}  # half-step 0: no update uses it
    assert np.array_equal(chains, draws.uniforms(np.empty((20_011, 5), np.float32), **address) < 0.5)
    assert not np.array_equal(new_chains(20_011, RBM(1, 5), seed=SEED, layer=1, row=3), chains)


# Chains that start exact stay exact

CHAINS = 60_000


def check_gibbs(n, m):
    of = model(n, m)
    p = np.exp(joint(of.W, of.b, of.c))
    start, _ = exact_pairs(of, CHAINS)
    kept, states = start.copy(), list(of.gibbs(start, 4, seed=SEED, layer=2, row=7, first=3))
    assert np.array_equal(start, kept)
    assert len(states) == 4
    for v in states:
        assert distance(v, p.sum(axis=1)) < 2
    # from here to there and back: p(v) K(v, v') is symmetric for v -> h -> v'
    flow = np.bincount(number_of(states[2]) << n | number_of(states[3]), minlength=4**n).reshape(2**n, 2**n)
    v, h = all_states(n), all_states(m)
    kernel = (p / p.sum(axis=1, keepdims=True)) @ (p / p.sum(axis=0)).T
    expected = p.sum(axis=1)[:, None] * kernel
    assert_close(expected, expected.T, atol=1e-12)
    floor = np.sqrt(expected * (1 - expected) / CHAINS).sum()
    assert np.abs(flow / CHAINS - expected).sum() / floor < 1.5
    # drawn pairs are pairs of the model
    h = of.sample_hidden(v := states[3], seed=SEED, update=99, site=1)
    assert distance(np.hstack([v, h]), p.ravel()) < 2
    v = of.sample_visible(h, seed=SEED, update=99, site=2)
    assert distance(np.hstack([v, h]), p.ravel()) < 2


@pytest.mark.parametrize(("n", "m"), [(4, 3), (3, 3), (2, 5)])
def test_gibbs_sampling_leaves_the_exact_distribution_where_it_is(n, m):
    check_gibbs(n, m)


@pytest.mark.parametrize(("line", "fault"), [
    ("half_step(sample, mean, h, self.W, self.b, transpose=True",
     "half_step(sample, mean, h, self.W, self.b[::-1], transpose=True"),
    ("half_step(sample, mean, h, self.W, self.b, transpose=True",
     "half_step(sample, mean, h, self.W, self.b, transpose=False"),  # W instead of its transpose
    ("self.up_by(sample, mean, v, self.W, self.c,", "self.up_by(sample, mean, v, -self.W, self.c,"),
    ("self.up_by(sample, mean, v, self.W, self.c,", "self.up_by(sample, mean, v, self.W, 0 * self.c,"),
    ("site=site(Purpose.SAMPLING, layer, 1)", "site=site(Purpose.SAMPLING, layer, 0)"),  # the same numbers again
    ("h = self.sample_hidden(v, seed=seed, update=step,", "h = self.sample_hidden(v, seed=seed, update=first,"),
])
def test_a_wrong_gibbs_step_is_noticed(line, fault):
    assert_notices(lambda: check_gibbs(3, 3), rbm, line, fault)


def check_address_of_gibbs():
    """Chain i of a step depends on its own number only; steps go on where they stopped."""
    of, v = model(7, 5), all_states(7)[::5]
    whole = np.stack(list(of.gibbs(v, 6, seed=SEED, layer=1)))
    cut = [np.stack(list(of.gibbs(v[lo:hi], 6, seed=SEED, layer=1, row=lo))) for lo, hi in ((0, 7), (7, len(v)))]
    assert np.array_equal(np.concatenate(cut, axis=1), whole)
    assert np.array_equal(np.stack(list(of.gibbs(whole[2], 3, seed=SEED, layer=1, first=3))), whole[3:])
    assert not np.array_equal(np.stack(list(of.gibbs(v, 6, seed=SEED, layer=2))), whole)


def test_a_chain_does_not_depend_on_the_others_or_on_where_it_was_stopped():
    check_address_of_gibbs()


@pytest.mark.parametrize(("line", "fault"), [
    ("for step in range(first, first + steps):", "for step in range(steps):"),
    ("site=site(Purpose.SAMPLING, layer, 1), row=row)", "site=site(Purpose.SAMPLING, layer, 1))"),
])
def test_a_wrong_number_of_chain_or_step_is_noticed(line, fault):
    assert_notices(check_address_of_gibbs, rbm, line, fault)


def check_persistent_chains(n, m, k):
    """PCD with parameters that do not move: after each update (v, h) of the model phase are exact pairs."""
    of = model(n, m)
    p = np.exp(joint(of.W, of.b, of.c)).ravel()
    v, chains = exact_pairs(of, CHAINS)
    contrast = Contrast(of, 5, Estimator("pcd", k, last_hidden="sample"), seed=SEED, layer=1, chains=chains)
    contrast.v[:5] = 1
    cut = CHAINS // 3 + 1
    for update in range(3):
        both = []
        for rows, part in ((5, slice(0, cut)), (0, slice(cut, CHAINS))):
            v, h = contrast.fill(rows, update=update, row=0, chains=part, chain_row=part.start)
            assert np.array_equal(h[rows:], chains[part])
            both.append(np.hstack([v[rows:], h[rows:]]))
        assert distance(np.vstack(both), p) < 2


@pytest.mark.parametrize(("n", "m", "k"), [(4, 3, 1), (3, 3, 2), (3, 4, 3)])
def test_persistent_chains_stay_exact_while_parameters_stand_still(n, m, k):
    check_persistent_chains(n, m, k)


@pytest.mark.parametrize(("line", "fault"), [
    ("rbm.up(chains, h if last else None, v,",
     "rbm.up(chains, h if last else None, 1 - v,"),
    ("self.up_by(sample, mean, v, self.W, self.c,",
     "self.up_by(sample, mean, v, self.W, self.c[::-1],"),
    ("twins.half_step(sample, mean, h, self.W, self.b, transpose=True",
     "twins.half_step(sample, mean, h, self.W, self.b, transpose=False"),
    ("twins.half_step(sample, mean, h, self.W, self.b, transpose=True",
     "twins.half_step(sample, mean, h, self.W, 0 * self.b, transpose=True"),
    ("Purpose.CHAIN, 2 * step + 1,", "Purpose.CHAIN, 2 * step + 2,"),  # the same again
    ("if e.last_hidden == \"sample\":\n            h[...] = chains", "if False:\n            h[...] = chains"),
])
def test_persistent_chains_that_go_wrong_are_noticed(line, fault):
    assert_notices(lambda: check_persistent_chains(3, 3, 2), rbm, line, fault)


# Gradients


def gradient_by_differences(of, rows, eps=1e-5):
    """d mean log p(v) / d (W, b, c) by central differences of the enumerated likelihood, float64; end to end."""
    W, b, c = parts(of)
    flat = np.concatenate([W.ravel(), b, c])
    found = np.empty_like(flat)
    for i in range(flat.size):
        ends = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[i] += sign * eps
            split = np.split(moved, [W.size, W.size + b.size])
            ends.append(log_likelihood(split[0].reshape(W.shape), split[1], split[2], rows))
        found[i] = (ends[0] - ends[1]) / (2 * eps)
    return found


def statistics(of, v, h, rows, weight):
    """The estimate of the gradient, end to end, and its standard error."""
    out = of.parameters.zeros_like()
    reference.cd_sums(out["W"], out["b"], out["c"], v, h, rows, model_weight=weight)
    errors = []
    for lo, hi in ((0, rows), (rows, len(v))):
        products = np.einsum("ri,rj->rij", v[lo:hi], h[lo:hi]).reshape(hi - lo, -1)
        each = np.concatenate([products, v[lo:hi], h[lo:hi]], axis=1)
        errors.append(each.var(axis=0, dtype=np.float64) / (hi - lo))
    return out.flat / rows, np.sqrt(errors[0] + errors[1])


DATA = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0]],
                np.float32)


def check_gradient(method, k, rows, chains):
    """The mean of the statistics is the gradient of the likelihood: from an exact start, or after many steps."""
    of = model(seed=4, strength=0.7)
    truth = gradient_by_differences(of, DATA)
    start = exact_pairs(of, chains, seed=6)[1] if method == "pcd" else None
    contrast = Contrast(of, rows, Estimator(method, k), seed=SEED, layer=0, chains=start)
    contrast.v[:rows] = np.tile(DATA, (rows // len(DATA), 1))
    v, h = contrast.fill(rows, update=2, row=0, chains=slice(0, chains))
    found, error = statistics(of, v, h, rows, rows / (len(v) - rows))
    assert np.abs(truth).max() > 0.1
    assert (np.abs(found - truth) < 4 * error + 1e-5).all(), np.abs((found - truth) / error).max()


CASES = {"exact chains": ("pcd", 1, 42_000, 60_000), "long chains from the data": ("cd", 50, 42_000, 42_000)}


@pytest.mark.parametrize("case", CASES)
def test_the_statistics_have_the_gradient_of_the_likelihood_as_their_mean(case):
    check_gradient(*CASES[case])


@pytest.mark.parametrize(("case", "module", "line", "fault"), [
    ("exact chains", reference, "signs[rows:] = -model_weight", "signs[rows:] = -1"),
    ("exact chains", reference, "signs[rows:] = -model_weight", "signs[rows:] = model_weight"),
    ("exact chains", rbm, "rbm.up(h[:rows], None, v[:rows], site",
     "rbm.up(h[:rows], None, 0 * v[:rows], site"),
    ("long chains from the data", rbm, "for step in range(e.k):\n            self._visible(v, start,",
     "for step in range(1):\n            self._visible(v, start,"),
    ("long chains from the data", rbm, "            start = h\n", "            pass\n"),  # each step anew from the data
    ("long chains from the data", rbm, "rbm.up(None, h, v)\n            start",
     "rbm.up(None, h, 1 - v)\n            start"),
])
def test_statistics_that_are_not_the_gradient_are_noticed(case, module, line, fault):
    assert_notices(lambda: check_gradient(*CASES[case]), module, line, fault)


# The estimator, value by value


def u(shape, update, place, row):
    return draws.uniforms(np.empty(shape, np.float32), seed=SEED, update=update, site=place, row=row)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(of, e, v0, *, layer, update, row, chains=None, chain_row=0):
    """v, h of both phases, and the chains afterwards, by the definition of CD-k and PCD, in float64."""
    W, b, c = parts(of)

    def hidden(v, purpose, half_step, first):
        p = sigmoid(v @ W + c)
        return p, (u(p.shape, update, site(purpose, layer, half_step), first) < p).astype(float)

    def visible(h, purpose, half_step, first):
        p = sigmoid(h @ W.T + b)
        drawn = (u(p.shape, update, site(purpose, layer, half_step), first) < p).astype(float)
        return p if e.reconstruction == "mean" else drawn

    p0, s0 = hidden(v0, Purpose.CD, 0, row)
    purpose, first, state = (Purpose.CD, row, s0) if chains is None else (Purpose.CHAIN, chain_row, chains)
    for t in range(e.k):
        v = visible(state, purpose, 2 * t + 1, first)
        p, state = hidden(v, purpose, 2 * t + 2, first)
    h0, hk = p0 if e.data_hidden == "mean" else s0, p if e.last_hidden == "mean" else state
    return np.vstack([v0, v]), np.vstack([h0, hk]), state


def check_estimator(e, rows=11, count=7):
    of = model(7, 5, seed=2, strength=0.6)
    v0 = np.random.default_rng(8).random((rows, 7), np.float32)
    chains = new_chains(count, of, seed=SEED, layer=3) if e.method == "pcd" else None
    expected = by_hand(of, e, v0, layer=3, update=6, row=2**32 + 4, chains=chains, chain_row=2**32 + 9)
    contrast = Contrast(of, rows + 2, e, seed=SEED, layer=3, chains=chains)
    contrast.v[:rows] = v0
    before = of.parameters.flat.copy()
    v, h = contrast.fill(rows, update=6, row=2**32 + 4, chains=slice(0, count), chain_row=2**32 + 9)
    assert_close(v, expected[0], atol=2e-6)
    assert_close(h, expected[1], atol=2e-6)
    if chains is not None:
        assert np.array_equal(chains, expected[2])
    assert np.array_equal(of.parameters.flat, before)
    for name, part in (("data_hidden", h[:rows]), ("last_hidden", h[rows:]), ("reconstruction", v[rows:])):
        assert np.isin(part, (0, 1)).all() == (getattr(e, name) == "sample"), name


WAYS = ("sample", "mean")


@pytest.mark.parametrize("method", ["cd", "pcd"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("data", "last", "reconstruction"), list(product(WAYS, WAYS, WAYS)))
def test_every_option_of_the_estimator_has_its_value(method, k, data, last, reconstruction):
    check_estimator(Estimator(method, k, data, last, reconstruction))


@pytest.mark.parametrize(("e", "line", "fault"), [
    (Estimator("cd", 1, "mean"), "start = h0 if e.data_hidden == \"sample\" else h", "start = h0"),
    (Estimator("cd", 1), "if e.data_hidden == \"sample\":\n", "if False:\n"),
    (Estimator("cd", 3), "if step < e.k - 1 or e.last_hidden == \"sample\":", "if e.last_hidden == \"sample\":"),
    (Estimator("cd", 1), "if step < e.k - 1 or e.last_hidden == \"sample\":", "if True:"),
    (Estimator("cd", 2), "Purpose.CD, self.layer, 2 * step + 2)", "Purpose.CD, self.layer, 2 * step + 1)"),
    (Estimator("cd", 1), "_data_phase(v, h, rows, {**address, \"row\": row})",
     "_data_phase(v, h, rows, {**address, \"row\": 0})"),
    (Estimator("cd", 1), "Purpose.CD, self.layer, 0)", "Purpose.CD, 0, 0)"),
    (Estimator("cd", 2), "Purpose.CD, 2 * step + 1,", "Purpose.CD, 1,"),  # the same numbers in every step
    (Estimator("pcd", 2), "Purpose.CHAIN, 2 * step + 1,", "Purpose.CHAIN, 1,"),
    (Estimator("pcd", 1), "Purpose.CHAIN, 2 * step + 1, address)",
     "Purpose.CHAIN, 2 * step + 1, {**address, \"update\": 0})"),
    (Estimator("pcd", 1), "\"row\": chain_row}", "\"row\": row}"),
    (Estimator("pcd", 1), "Purpose.CHAIN, self.layer, 2 * step + 2), **address)",
     "Purpose.CHAIN, self.layer, 2 * step + 2), **{**address, \"row\": 0})"),
    (Estimator("pcd", 2), "h if last else None, v,", "None if last else h, v,"),
    (Estimator("pcd", 1, reconstruction="mean"), "if self.estimator.reconstruction == \"mean\":", "if False:"),
])
def test_an_option_that_is_not_followed_is_noticed(e, line, fault):
    assert_notices(lambda: check_estimator(e), rbm, line, fault)


# Cut batches


def check_cuts(e, rows, cuts, chains=0, chain_cuts=None):
    """Pieces of a batch, with their pieces of the chains, add up to the whole, and draw what the whole draws."""
    of = model(13, 11, seed=5, strength=0.5)
    v0 = np.random.default_rng(9).random((rows, 13), np.float32)

    def run(bounds, chain_bounds):
        moving = new_chains(chains, of, seed=SEED, layer=1) if chains else None
        weight = rows / chains if chains else 1.0
        sums, seen = of.parameters.zeros_like(), {"data": [], "model": []}
        for (lo, hi), (first, last) in zip(pairwise(bounds), pairwise(chain_bounds or bounds), strict=True):
            own = None if moving is None else moving[first:last].copy()  # a replica holds its own chains only
            contrast = Contrast(of, max(hi - lo, 1), e, seed=SEED, layer=1, chains=own)
            contrast.v[: hi - lo] = v0[lo:hi]
            v, h = contrast.fill(hi - lo, update=4, row=lo, chains=slice(0, last - first), chain_row=first)
            out = of.parameters.zeros_like()
            reference.cd_sums(out["W"], out["b"], out["c"], v, h, hi - lo, model_weight=weight)
            sums.flat += out.flat
            seen["data"].append(np.hstack([v[: hi - lo], h[: hi - lo]]))
            seen["model"].append(np.hstack([v[hi - lo :], h[hi - lo :]]))
        return sums.flat, np.vstack(seen["data"]), np.vstack(seen["model"])

    whole = run([0, rows], [0, chains] if chains else None)
    cut = run(cuts, chain_cuts)
    assert_close(cut[0], whole[0], atol=1e-4)
    for a, b in zip(cut[1:], whole[1:], strict=True):
        assert a.shape == b.shape
        assert_close(a, b, atol=1e-6)  # samples are the same, probabilities to rounding


CUTS = [(Estimator("cd", 1), 17, [0, 5, 17]), (Estimator("cd", 1), 17, [0, 2, 2, 13, 17]),
        (Estimator("cd", 3, "mean", "sample"), 17, list(range(18))),
        (Estimator("pcd", 1), 17, [0, 6, 11, 17], 23, [0, 8, 15, 23]),
        (Estimator("pcd", 2, last_hidden="sample"), 7, [0, 2, 5, 7], 19, [0, 6, 12, 19]),  # the last, short batch
        (Estimator("pcd", 1), 2, [0, 0, 1, 2], 19, [0, 6, 12, 19]),  # a replica without rows still moves its chains
        (Estimator("pcd", 1), 7, [0, 4, 7], 3, [0, 3, 3])]  # and one without chains still has rows


@pytest.mark.parametrize("case", CUTS)
def test_a_cut_batch_is_the_whole_batch(case):
    check_cuts(*case)


@pytest.mark.parametrize(("case", "line", "fault"), [
    (CUTS[0], "_data_phase(v, h, rows, {**address, \"row\": row})",
     "_data_phase(v, h, rows, {**address, \"row\": 0})"),
    (CUTS[0], "site=site(purpose, self.layer, half_step), **address)",
     "site=site(purpose, self.layer, half_step), **{**address, \"row\": 0})"),
    (CUTS[3], "\"row\": chain_row}", "\"row\": row}"),
    (CUTS[5], "if moving is not None:\n   ", "if rows and moving is not None:\n   "),
    (CUTS[6], "if rows:\n            self._data_phase", "if rows and end > rows:\n            self._data_phase"),
])
def test_a_cut_that_shows_is_noticed(case, line, fault):
    assert_notices(lambda: check_cuts(*case), rbm, line, fault)
