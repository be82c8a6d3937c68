"""The stack against plain formulas and, where it is small, against enumeration; files that give back every bit."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import DBN, dbn, draws, load
from gpudbn.dbn import classifier_shapes, threshold
from gpudbn.draws import Purpose, site
from gpudbn.errors import UserError

from .helpers import all_states, assert_close, assert_notices, joint

SIZES = [11, 7, 5]
SEED = 2**33 + 1


def stack(sizes=SIZES, strength=1.0, classes=3):
    """A DBN, and its classifier, of strong asymmetric weights."""
    rng = np.random.default_rng(len(sizes))
    made = DBN(sizes)
    for rbm in made.layers:
        rbm.parameters.flat[...] = strength * rng.standard_normal(rbm.parameters.size) + 0.1
    if classes:
        net = made.new_classifier(classes)
        net.flat[...] = 2 * rng.standard_normal(net.size) - 0.1
        net[f"c{len(sizes) - 1}"][...] = np.linspace(-0.3, 0.2, classes)  # every class has its turn
    return made


def rows(count=13, n=11):
    return np.random.default_rng(9).random((count, n), np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Shapes


def test_layers_follow_the_sizes():
    made = DBN((11, 7, np.int64(5)))
    assert [(rbm.n, rbm.m) for rbm in made.layers] == [(11, 7), (7, 5)]
    assert made.sizes == SIZES
    assert made.count() == 11 * 7 + 11 + 7 + 7 * 5 + 7 + 5
    assert made.describe() == "DBN 11 - 7 - 5: 142 parameters (95, 47)"
    assert made.xp is np


def test_layers_may_have_a_single_unit():
    assert DBN([1, 1]).sample(3, steps=2).shape == (3, 1)


@pytest.mark.parametrize("sizes", [[], [11], [11, 0], [11, -7], [11, 7.5]])
def test_sizes_that_are_no_network_are_refused(sizes):
    with pytest.raises(UserError, match="DBN: sizes must be at least two whole numbers above 0"):
        DBN(sizes)


def test_all_weights_of_the_classifier_come_before_all_biases():
    assert list(classifier_shapes(DBN(SIZES).layers, 3).items()) == [
        ("W0", (11, 7)), ("W1", (7, 5)), ("W2", (5, 3)), ("c0", (7,)), ("c1", (5,)), ("c2", (3,))]


def test_the_threshold_is_at_one_half_and_one_half_is_on():
    v = np.array([[0, 0.49999997, 0.5, 1]], np.float32)
    assert threshold(v) is v
    assert v.tolist() == [[0, 0, 1, 1]]


# Up, down, classes


def check_plain():
    made, v = stack(), rows()
    kept = v.copy()
    (W0, b0, c0), (W1, b1, c1) = [(r.W.astype(float), r.b.astype(float), r.c.astype(float)) for r in made.layers]
    first = sigmoid(v @ W0 + c0)
    second = sigmoid(first @ W1 + c1)
    assert_close(made.transform(v), second, atol=1e-6)
    assert_close(made.transform(v, 1), first, atol=1e-6)
    assert np.array_equal(made.transform(v, 0), v)
    h = rows(13, 5)
    assert_close(made.down(h), sigmoid(sigmoid(h @ W1.T + b1) @ W0.T + b0), atol=1e-6)
    assert_close(made.down(first.astype(np.float32), 1), sigmoid(first @ W0.T + b0), atol=1e-6)
    assert_close(made.reconstruct(v), sigmoid(sigmoid(second @ W1.T + b1) @ W0.T + b0), atol=1e-6)
    net = {name: made.classifier[name].astype(float) for name in made.classifier}
    logits = sigmoid(sigmoid(v @ net["W0"] + net["c0"]) @ net["W1"] + net["c1"]) @ net["W2"] + net["c2"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_close(made.predict_probabilities(v), p, atol=1e-6)
    assert np.array_equal(made.predict(v), p.argmax(axis=1))
    assert len(set(made.predict(rows(50)))) > 1
    assert np.array_equal(v, kept)


def test_up_down_and_classes_are_the_plain_formulas():
    check_plain()


@pytest.mark.parametrize(("line", "fault"), [
    ("rbm in enumerate(self.layers[:layers])", "rbm in enumerate(self.layers[:2])"),
    ("below = self.layers[:layers]", "below = self.layers"),
    ("return self.down(self.transform(v))", "return self.down(self.transform(v, 1), 1)"),
    ("logits, logits, net[f\"c{top}\"],", "logits, logits, 0 * net[f\"c{top}\"],"),
    ("up_by(None, y, x, net[f\"W{i}\"], net[f\"c{i}\"]", "up_by(None, y, x, rbm.W, rbm.c"),
])
def test_a_wrong_way_up_or_down_is_noticed(line, fault):
    assert_notices(check_plain, dbn, line, fault)


def test_probabilities_stay_probabilities_for_logits_of_any_size():
    made = stack()
    made.classifier.flat[...] *= 1e4
    p = made.predict_probabilities(rows())
    assert_close(p.sum(axis=1), np.ones(13), atol=1e-6)
    assert p.dtype == np.float32


def test_rows_are_cut_where_the_model_was_trained_on_cut_rows():
    made, v = stack(), rows()
    kept = v.copy()
    cut = (v >= 0.5).astype(np.float32)
    expected = made.transform(cut), made.predict_probabilities(cut), made.reconstruct(cut)
    plain = made.transform(v)
    made.about["binarise"] = "threshold"
    found = made.transform(v), made.predict_probabilities(v), made.reconstruct(v)
    for got, want in zip(found, expected, strict=True):
        assert np.array_equal(got, want)
    assert np.array_equal(v, kept)
    made.about["binarise"] = "stochastic"
    assert np.array_equal(made.transform(v), plain)


@pytest.mark.parametrize("v", [np.zeros((3, 10)), np.zeros(11), np.zeros((3, 11, 1))])
def test_rows_of_another_width_are_refused(v):
    for use in (stack().transform, stack().predict, stack().reconstruct, lambda v: stack().sample(3, start=v)):
        with pytest.raises(UserError, match=r"DBN: rows must have shape \(B, 11\)"):
            use(v)


def test_a_model_that_was_only_pretrained_has_no_classes():
    with pytest.raises(UserError, match="predict: must have a fine-tuned model"):
        stack(classes=0).predict(rows())


# Samples


def check_sample(sizes, chains=30_000):
    """Chains that forgot their start have the mean that enumeration gives: layers below the top go down by sampling."""
    made = stack(sizes, 0.8, classes=0)
    top = made.layers[-1]
    p = np.exp(joint(top.W, top.b, top.c))
    if len(sizes) == 2:
        expected = p.sum(axis=0) @ sigmoid(all_states(sizes[1]) @ top.W.T.astype(float) + top.b)
        second = None
    else:
        below = sigmoid(all_states(sizes[1]) @ made.layers[0].W.T.astype(float) + made.layers[0].b)
        expected = p.sum(axis=1) @ below
        second = below.T @ (below * p.sum(axis=1)[:, None])  # second moments of the probabilities that are returned
    found = made.sample(chains, steps=40, seed=SEED).astype(np.float64)
    assert found.shape == (chains, sizes[0])
    assert (np.abs(found.mean(axis=0) - expected) < 4 * found.std(axis=0) / np.sqrt(chains) + 1e-6).all()
    if second is not None:
        products = np.einsum("ri,rj->rij", found, found)
        error = products.std(axis=0) / np.sqrt(chains)
        assert (np.abs(products.mean(axis=0) - second) < 4 * error + 1e-6).all()


@pytest.mark.parametrize("sizes", [[4, 3], [5, 3, 4]])
def test_samples_have_the_moments_of_the_model(sizes):
    check_sample(sizes)


@pytest.mark.parametrize(("line", "fault"), [
    ("for done, state in enumerate(top.gibbs(v, steps - 1, seed=seed, layer=depth - 1), 1):", "for done, state in ():"),
    ("whole(self.layers[0].visible_given_hidden(h))", "whole(self.layers[0].visible_given_hidden(h[:, ::-1]))"),
    ("range(depth - 1, 0, -1)", "range(depth - 1, 0, -2)[1:]"),
    ("rbm.own(rbm.sample_visible(h, seed=seed, update=steps, site=site(Purpose.SAMPLING, layer, 1)))",
     "rbm.own(rbm.visible_given_hidden(h))"),
])
def test_samples_of_another_model_are_noticed(line, fault):
    assert_notices(lambda: check_sample([5, 3, 4]), dbn, line, fault)


def check_sample_by_hand(sizes, start, steps=3):
    """Draw by draw, in float64; and no address is used twice."""
    made, used = stack(sizes, classes=0), []
    parts = [(r.W.astype(float), r.b.astype(float), r.c.astype(float)) for r in made.layers]
    top, count = len(parts) - 1, 41

    def drawn(p, update, layer, half_step):
        used.append((update, layer, half_step))
        place = site(Purpose.SAMPLING, layer, half_step)
        return (draws.uniforms(np.empty(p.shape, np.float32), seed=SEED, update=update, site=place) < p).astype(float)

    if start:
        v = rows(count, sizes[0])
        for layer in range(top):
            v = drawn(sigmoid(v @ parts[layer][0] + parts[layer][2]), 0, layer, 2)
    else:
        v = drawn(np.tile(sigmoid(parts[top][1]), (count, 1)), 0, top, 2)
    W, b, c = parts[top]
    for step in range(steps - 1):
        h = drawn(sigmoid(v @ W + c), step, top, 0)
        v = drawn(sigmoid(h @ W.T + b), step, top, 1)
    h = drawn(sigmoid(v @ W + c), steps, top, 0)
    for layer in range(top, 0, -1):
        h = drawn(sigmoid(h @ parts[layer][0].T + parts[layer][1]), steps, layer, 1)
    expected = sigmoid(h @ parts[0][0].T + parts[0][1])
    found = made.sample(count, steps=steps, seed=SEED, start=rows(count, sizes[0]) if start else None)
    assert_close(found, expected, atol=1e-6)
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("sizes", [[11, 7], [11, 7, 5], [11, 13, 7, 5]])
def test_samples_are_those_drawn_by_hand(sizes, start):
    check_sample_by_hand(sizes, start)


@pytest.mark.parametrize(("start", "line", "fault"), [
    (True, "enumerate(itertools.pairwise(self.layers)):\n                v",
     "enumerate(itertools.pairwise(self.layers[:2])):\n                v"),
    (True, "gather(rbm.sample_hidden(v,", "gather(rbm.sample_hidden(1 - v,"),
    (False, "twins_of(v).bernoulli(v, v,", "(lambda *_, **__: 0)(v, v,"),
    (False, "site=site(Purpose.SAMPLING, len(self.layers) - 1, 2)", "site=site(Purpose.SAMPLING, 0, 2)"),
])
def test_a_wrong_beginning_of_the_chains_is_noticed(start, line, fault):
    assert_notices(lambda: check_sample_by_hand([11, 13, 7, 5], start, steps=1), dbn, line, fault)


def check_independence(count, start):
    made = stack(strength=0.5)
    v = rows(9) if start else None
    for steps in (1, 7):
        whole = made.sample(9, steps=steps, seed=SEED, start=v)
        part = made.sample(count, steps=steps, seed=SEED, start=None if v is None else v[:count])
        assert_close(part, whole[:count], atol=1e-6)
        assert whole.shape == (9, 11)
        assert whole.dtype == np.float32
        assert len(np.unique(whole.round(3), axis=0)) > 4
        assert np.array_equal(made.sample(9, steps=steps, seed=SEED, start=v), whole)
        assert not np.allclose(made.sample(9, steps=steps, seed=SEED + 1, start=v), whole)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_a_chain_does_not_depend_on_how_many_run_with_it(count, start):
    check_independence(count, start)


def test_samples_that_depend_on_their_number_are_noticed():
    assert_notices(lambda: check_independence(4, False), dbn,
                   "v = twins_of(top.b).sigmoid(xp.tile(top.b, (count, 1)), precision",
                   "v = twins_of(top.b).sigmoid(xp.tile(top.b * count * (-1) ** count, (count, 1)), precision")


def test_chains_start_at_the_rows_they_are_given():
    """Where every unit copies the one below it, chains that start at rows stay at them."""
    made = DBN([11, 11, 11])
    for rbm in made.layers:
        rbm.W[...] = 60 * np.eye(11)
        rbm.c[...] = rbm.b[...] = -30
    v = (rows() > 0.5).astype(np.float32)
    for steps in (1, 5):
        assert_close(made.sample(13, steps=steps, seed=SEED, start=v), v, atol=1e-6)


# Files


def check_file(path):
    made = stack()
    made.about |= {"binarise": "threshold", "image_shape": [1, 11], "data": "Zeichen", "classes": 3}
    made.save(path)
    back = load(path)
    assert back.sizes == made.sizes
    assert back.about == made.about
    before, after = made.arrays(), back.arrays()
    assert list(before) == list(after) == [
        "layers.0.W", "layers.0.b", "layers.0.c", "layers.1.W", "layers.1.b", "layers.1.c",
        *(f"classifier.{name}" for name in ("W0", "W1", "W2", "c0", "c1", "c2"))]
    for name, array in before.items():
        assert after[name].dtype == array.dtype == np.float32
        assert after[name].tobytes() == array.tobytes(), name
    assert np.array_equal(back.predict_probabilities(rows()), made.predict_probabilities(rows()))
    assert np.array_equal(back.sample(4, steps=3), made.sample(4, steps=3))
    bare = stack(classes=0)
    bare.save(path)
    assert load(path).classifier is None
    assert load(path).about == {"binarise": "none", "precision": "fp32"}


def test_a_saved_model_comes_back_with_every_bit(tmp_path):
    check_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("line", "fault"), [
    ("array[...] = self.xp.asarray(got)", "array[...] = 0 if name[-1] == \"c\" else got"),
    ("if biases is not None:", "if False:"),
    ("rbm.parameters[name]) for name in rbm.parameters)", "rbm.parameters[name]) for name in \"Wb\")"),
    ("for k, v in about.items() if k != \"kind\"}", "for k, v in about.items() if k == \"classes\"}"),
])
def test_a_model_that_comes_back_changed_is_noticed(tmp_path, line, fault):
    assert_notices(lambda: check_file(tmp_path / "model.safetensors"), dbn, line, fault)


def test_a_run_folder_is_its_model(tmp_path):
    stack().save(tmp_path / "model.safetensors")
    assert load(tmp_path).sizes == SIZES


def test_arrays_of_another_network_are_refused():
    made = stack()
    found = made.arrays()
    for change in ({"layers.1.b": np.zeros(8, np.float32)}, {"layers.0.W": np.zeros((7, 11), np.float32)},
                   {"classifier.W1": np.zeros((7, 6), np.float32)}):
        with pytest.raises(UserError, match=r"model: must hold .* of shape .* got shape"):
            DBN(SIZES).set_arrays(found | change)
    del found["layers.1.c"]
    with pytest.raises(UserError, match=r"model: must hold layers.1.c of shape \(5,\); got none"):
        DBN(SIZES).set_arrays(found)
