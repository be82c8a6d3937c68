"""A layer of the stack as a phase: what it is trained on, that it learns, how far, and that it is worth the trouble."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from gpudbn import draws, pretrain, rbm, reference
from gpudbn.data import DataSet, Rows, load
from gpudbn.dbn import DBN
from gpudbn.draws import Purpose, site
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.parameters import Parameters
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import RBM, new_chains
from gpudbn.settings import Settings

from .helpers import Watched, all_states, assert_close, assert_notices, joint, log_likelihood, planted

SIZES, COUNT = [11, 7, 5, 3, 2], 13
SETTINGS = Settings(layers=tuple(SIZES[1:]), seed=2**34 + 9, k=2)


def rows():
    return Rows(np.random.default_rng(5).integers(0, 256, (29, SIZES[0]), np.uint8), 1 / 255)


def piece(count=COUNT, chains=0):
    return Piece(np.arange(28, 28 - 2 * count, -2), 41, 2**32 + 3, slice(0, chains), 2**32 + 1,
                 count / chains if chains else 1.0)


def phase(layer=2, settings=SETTINGS, chains=None):
    dbn = DBN(SIZES)
    for number, each in enumerate(dbn.layers):
        each.parameters.flat[...] = np.random.default_rng(number).standard_normal(each.parameters.size) + 0.1
    return LayerPhase(dbn, layer, settings, rows=COUNT + 2, chains=chains)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def u(count, width, place):
    out = np.empty((count, width), np.float32)
    return draws.uniforms(out, seed=SETTINGS.seed, update=41, site=place, row=2**32 + 3)


# What a layer is trained on


def check_inputs(layer, binarise, up):
    """The data phase's visible units: rows, made binary, taken up by samples or means at their addresses."""
    of, table, p = phase(layer, replace(SETTINGS, binarise=binarise, up=up)), rows(), piece()
    x = table.array[p.positions] / np.float64(255)
    if binarise == "threshold":
        x = (x >= 0.5).astype(float)
    elif binarise == "stochastic":
        x = (u(COUNT, 11, site(Purpose.BINARISATION)) < x).astype(float)
    for below in range(layer):
        each = of.dbn.layers[below]
        x = sigmoid(x @ each.W.astype(float) + each.c)
        if up == "sample":
            x = (u(COUNT, SIZES[below + 1], site(Purpose.UP, below)) < x).astype(float)
    of.sums(np.empty_like(of.parameters), table, p)
    assert_close(of.contrast.v[:COUNT], x, atol=1e-6)
    if layer and up == "sample":
        assert np.array_equal(of.contrast.v[:COUNT], x)
        assert 0 < x.mean() < 1


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("binarise", ["none", "threshold", "stochastic"])
@pytest.mark.parametrize("up", ["sample", "mean"])
def test_a_layer_is_trained_on_rows_taken_up_through_the_layers_below(layer, binarise, up):
    check_inputs(layer, binarise, up)


@pytest.mark.parametrize(("binarise", "up", "line", "fault"), [
    ("none", "sample", "site=site(Purpose.UP, layer), **address)", "site=site(Purpose.UP, 0), **address)"),
    ("none", "sample", "\"update\": piece.update, \"row\": piece.row,", "\"update\": piece.update, \"row\": 0,"),
    ("none", "sample", "\"update\": piece.update, \"row\": piece.row,", "\"update\": 0, \"row\": piece.row,"),
    ("none", "sample", "if s.up == \"sample\":", "if False:"),
    ("none", "mean", "if s.up == \"sample\":", "if True:"),
    ("none", "mean", "x = above.gather(h, out=y)", "pass"),
    ("none", "mean", "rbm.up(None, h, x)", "rbm.up(None, h, 1 - x)"),
    ("threshold", "mean", "if s.binarise == \"threshold\":", "if False:"),
    ("stochastic", "mean", "elif s.binarise == \"stochastic\":", "elif False:"),
    ("stochastic", "mean", "site=site(Purpose.BINARISATION), **address)", "site=site(Purpose.UP), **address)"),
])
def test_other_inputs_are_noticed(binarise, up, line, fault):
    assert_notices(lambda: check_inputs(2, binarise, up), pretrain, line, fault)


# Updates


def check_update(method, last_rows):
    """``update`` is ``sums``, which are cd_sums of the contrast, and ``step``, on W, b, c end to end; twice."""
    s = replace(SETTINGS, method=method, decay=0.3, learning_rate=(0.05, 0.07, 0.2, 0.3), momentum=(0.6,))
    made = [phase(settings=s, chains=new_chains(8, RBM(1, 3), seed=1, layer=2) if method == "pcd" else None)
            for _ in range(2)]
    table = rows()
    for of in made:
        assert of.begin_epoch(0) == {"learning_rate": 0.2, "momentum": 0.6}
    for count in (COUNT, last_rows):
        p, out = piece(count, 8 if method == "pcd" else 0), np.empty_like(made[0].parameters)
        made[0].sums(out, table, p)
        v, h = (x[: count + (8 if method == "pcd" else count)] for x in (made[0].contrast.v, made[0].contrast.h))
        sums = Parameters(made[0].rbm.parameters.shapes)
        reference.cd_sums(sums["W"], sums["b"], sums["c"], v, h, count, model_weight=p.model_weight)
        assert np.array_equal(out, sums.flat)
        start, velocity = (x.astype(float) for x in (made[0].parameters, made[0].state()["velocity"]))
        made[0].step(out, count)
        decays = np.arange(out.size) < 5 * 3
        velocity = 0.6 * velocity + 0.2 * (sums.flat / count - 0.3 * start * decays)
        assert_close(made[0].parameters, start + velocity, atol=1e-6)
        made[1].update(table, p)
        assert np.array_equal(made[0].parameters, made[1].parameters)
        assert np.array_equal(made[0].state()["velocity"], made[1].state()["velocity"])
    if method == "pcd":
        assert np.array_equal(made[0].chains, made[1].chains)


@pytest.mark.parametrize("method", ["cd", "pcd"])
def test_an_update_is_sums_and_a_step(method):
    check_update(method, 5)


@pytest.mark.parametrize(("line", "fault"), [
    ("scale=1 / count,", "scale=1 / self.settings.batch,"),
    ("model_weight=piece.model_weight, **centred,\n", "model_weight=1, **centred,\n"),
    ("model_weight=piece.model_weight, **centred, rate", "model_weight=1, **centred, rate"),
    ("momentum=self.momentum, decay=self.settings.decay)", "momentum=self.momentum, decay=0)"),
    ("parts = Parameters(shapes, flat=out[:size])", "parts = Parameters(shapes, flat=out[:size][::-1])"),
    ("s.of_layer(\"learning_rate\", self.layer)", "s.of_layer(\"learning_rate\", 0)"),
    ("weights=self.rbm.W.size,", "weights=out.size if (out := sums) is not None else 0,"),
])
def test_a_wrong_update_is_noticed(line, fault):
    assert_notices(lambda: check_update("pcd", 5), pretrain, line, fault)


@pytest.mark.parametrize("name", ["bf16", "bf16x2", "tf32"])
def test_gradients_have_the_precision_of_the_layer(name):
    """The sums of an update, and the update, are those of ``cd_sums`` in it; and not those in float32."""
    s = replace(SETTINGS, precision=name, learning_rate=0.1, momentum=0.0, decay=0.0)
    made, out = [phase(settings=s) for _ in range(2)], np.empty(phase().parameters.size, np.float32)
    found, plain = (Parameters(made[0].rbm.parameters.shapes) for _ in range(2))
    for of in made:
        of.dbn.set_precision(name)
        of.begin_epoch(0)
    start = made[0].parameters.copy()
    made[0].sums(out, rows(), piece())
    v, h = made[0].contrast.v[: 2 * COUNT], made[0].contrast.h[: 2 * COUNT]
    for parts, precision in ((found, name), (plain, "fp32")):
        reference.cd_sums(parts["W"], parts["b"], parts["c"], v, h, COUNT, precision=precision)
    assert np.array_equal(out, found.flat)
    assert not np.array_equal(out, plain.flat)
    made[1].update(rows(), piece())
    assert_close(made[1].parameters - start, 0.1 / COUNT * found.flat, atol=1e-6)


def check_begin():
    s = replace(SETTINGS, epochs=(7,), momentum=(0.5, 0.9), momentum_epochs=3, schedule="exponential",
                learning_rate=0.2, learning_rate_end=0.01)
    of = phase(settings=s)
    began = [of.begin_epoch(epoch) for epoch in range(7)]
    assert [x["momentum"] for x in began] == [0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9]
    assert [x["learning_rate"] for x in began] == pytest.approx([0.2 * 0.01 ** (t / 6) for t in range(7)])
    assert (of.rate, of.momentum) == (pytest.approx(0.002), 0.9)


def test_rate_and_momentum_follow_the_epochs():
    check_begin()


@pytest.mark.parametrize(("line", "fault"), [
    ("if epoch < s.momentum_epochs", "if epoch <= s.momentum_epochs"),
    ("s.learning_rate_end, epoch, self.epochs)", "s.learning_rate_end, epoch + 1, self.epochs)"),
])
def test_another_rate_or_momentum_is_noticed(line, fault):
    assert_notices(check_begin, pretrain, line, fault)


# Beginning and measuring


def check_begin_and_measure(binarise):
    of, table = phase(1, replace(SETTINGS, binarise=binarise, initial_weights=0.03)), rows()
    x = table.array / np.float64(255)
    if binarise == "threshold":
        of.dbn.about["binarise"] = "threshold"
        x = (x >= 0.5).astype(float)
    below, of_layer = of.dbn.layers[0], of.rbm
    v = sigmoid(x @ below.W.astype(float) + below.c)
    assert_close(of.visible_means(table), v.mean(axis=0), atol=1e-6)
    assert_close(of.visible_means(table, at_most=17, at_once=5), v[:17].mean(axis=0), atol=1e-6)
    W, b, c = (a.astype(float) for a in (of_layer.W, of_layer.b, of_layer.c))
    h = sigmoid(v @ W + c)
    expected = [(-(v @ b) - np.log1p(np.exp(v @ W + c)).sum(axis=1)), ((sigmoid(h @ W.T + b) - v) ** 2).sum(axis=1)]
    positions = np.array([3, 28, 0, 11, 12])
    assert of.measures == ("free_energy", "reconstruction")
    assert_close(of.measure(table, positions), [e[positions].sum() for e in expected], rtol=1e-5)
    of.initialise(table)
    p = v.mean(axis=0).clip(1e-3, 1 - 1e-3)
    assert_close(of_layer.b, np.log(p / (1 - p)), atol=1e-4)
    assert not of_layer.c.any()
    assert 0.015 < of_layer.W.std() < 0.05


@pytest.mark.parametrize("binarise", ["none", "threshold"])
def test_a_layer_begins_at_the_means_of_its_inputs_and_is_measured_by_the_plain_formulas(binarise):
    check_begin_and_measure(binarise)


@pytest.mark.parametrize(("line", "fault"), [
    ("return self.dbn.transform(x, self.layer)", "return self.dbn.transform(x, 0)[:, :self.rbm.n]"),
    ("visible_means=means, hidden", "visible_means=None, hidden"),
    ("(total / count / float", "(total / len(rows) / float"),
    ("min(lo + at_once, count)", "min(lo + at_once - 1, count)"),
    ("sd=self.settings.initial_weights", "sd=0.01"),
    ("v, self.rbm.reconstruct(v))", "v, self.rbm.reconstruct(1 - v))"),
    ("self.rbm.free_energy(v)", "self.rbm.energy(v, self.rbm.hidden_given_visible(v))"),
])
def test_a_wrong_beginning_or_measure_is_noticed(line, fault):
    assert_notices(lambda: check_begin_and_measure("none"), pretrain, line, fault)


# Learning


def data_of_a_teacher():
    """Rows in the proportions of a small, strong, asymmetric RBM; the largest possible mean log-likelihood."""
    W = np.array([[4, -1], [-3, 2], [1, 4], [-1, -4], [3, 2]])
    b, c = np.array([0.3, -0.2, 0.4, -0.1, 0.2]) - W.sum(axis=1) / 2, np.array([0.5, -0.3]) - W.sum(axis=0) / 2
    counts = np.round(np.exp(joint(W, b, c)).sum(axis=1) * 400).astype(int)
    shares = counts[counts > 0] / counts.sum()
    return np.repeat(all_states(5), counts, axis=0).astype(np.uint8), float((shares * np.log(shares)).sum())


def learn(data, method):
    """The exact log-likelihood before training, which begins as independent units, and after every epoch."""
    table = Rows(np.tile(data, (10, 1)))
    s = Settings(layers=(3,), method=method, k=1, batch=40, epochs=25, learning_rate=0.1, schedule="linear",
                 learning_rate_end=0.02, momentum=0.5, decay=0, initial_weights=0.3, seed=2, finetune_epochs=0)
    dbn = DBN([5, 3])
    nothing = table.select(range(0))
    training = Training(dbn, DataSet("teacher", table, nothing, nothing, None, 0), s, Alone())
    return [log_likelihood(*(dbn.layers[0].parameters[name] for name in "Wbc"), data) for _ in training.run()]


def check_learning(method):
    data, best = data_of_a_teacher()
    mean = data.mean(axis=0)
    independent = float((mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum())
    assert best - independent > 0.35
    found = learn(data, method)
    assert found[-1] > independent + 0.3, (found[0], found[-1], independent)
    assert found[-1] > found[0] + 0.2
    assert found[-1] < best
    if method == "pcd":
        assert found[-1] > best - 0.05, (found[-1], best)


@pytest.mark.parametrize("method", ["cd", "pcd"])
def test_training_raises_the_exact_likelihood_and_persistent_chains_come_close_to_the_maximum(method):
    check_learning(method)


@pytest.mark.parametrize(("method", "module", "line", "fault"), [
    ("cd", reference, "np.float32(rate_scale)", "np.float32(-rate_scale)"),
    ("cd", rbm, "rbm.up(None, h, v)\n            start",
     "rbm.up(None, h, 1 - v)\n            start"),
    ("cd", reference, "np.sum(signed, axis=0, out=dc)", "np.negative(np.sum(signed, axis=0), out=dc)"),
    ("pcd", reference, "signs[rows:] = -model_weight", "signs[rows:] = model_weight"),
    ("pcd", rbm, "moving = None if self.chains is None else self.chains[chains]",
     "moving = None if self.chains is None else self.chains[chains] * 0"),  # chains that begin anew
])
def test_learning_that_goes_wrong_is_noticed(method, module, line, fault):
    assert_notices(lambda: check_learning(method), module, line, fault)


def test_uphill_taken_for_downhill_makes_the_likelihood_fall():
    with planted(reference, "np.float32(rate_scale)", "np.float32(-rate_scale)"):
        found = learn(data_of_a_teacher()[0], "cd")
    assert found[-1] < found[0] - 0.5


# What it is for


@functools.cache
def errors(seed, epochs, rate=0.1):
    """The test error of a network fine-tuned on 200 labelled digits, its layers trained before or, in 0 epochs, not."""
    data = load("digits", validation=0, test=597, seed=3)
    few = data.train.select(np.random.default_rng(seed).permutation(len(data.train))[:200])
    labelled = DataSet("few", few, few.select(range(0)), data.test, data.image_shape, data.classes)
    s = Settings(layers=(60, 60, 60), method="cd", k=1, batch=20, epochs=epochs, learning_rate=rate, schedule="linear",
                 momentum=0.9, decay=2e-4, initial_weights=0.15, seed=seed, finetune_epochs=20, optimiser="adam",
                 finetune_learning_rate=0.005, finetune_schedule="constant", finetune_patience=0, dropout=0)
    *_, last = Training(DBN([64, 60, 60, 60]), data, s, Alone(), labelled=labelled).run()
    return last["error"]


def check_worth(**changed):
    """Over 5 pairs: always better, by a clear mean and by more than 4 of its standard errors."""
    seeds = range(5)
    pretrained = np.array([errors(seed, 4, **changed) for seed in seeds])
    random = np.array([errors(seed, 0) for seed in seeds])
    gains = random - pretrained
    assert gains.min() > 0, gains
    assert gains.mean() > 0.12, gains
    assert gains.mean() > 4 * gains.std(ddof=1) / np.sqrt(len(gains)), gains
    assert pretrained.mean() < 0.25, pretrained


def test_pretrained_layers_beat_random_ones_where_labels_are_few():
    check_worth()


def test_layers_that_learn_nothing_are_noticed():
    with pytest.raises(AssertionError):
        check_worth(rate=1e-9)


# Types


def check_types():
    for method, binarise in (("cd", "stochastic"), ("pcd", "threshold")):
        chains = new_chains(8, RBM(1, 3), seed=1, layer=2) if method == "pcd" else None
        of, table = phase(settings=replace(SETTINGS, method=method, binarise=binarise), chains=chains), rows()
        of.begin_epoch(0)
        of.parameters = of.parameters.view(Watched)
        of.rbm.parameters = Parameters(of.rbm.parameters.shapes, flat=of.parameters)
        of.gradient, of.velocity = of.gradient.view(Watched), of.velocity.view(Watched)
        of.contrast.v, of.contrast.h = of.contrast.v.view(Watched), of.contrast.h.view(Watched)
        of.lower[:] = [x.view(Watched) for x in of.lower]
        Watched.doubles.clear()
        for count in (COUNT, 5):
            of.update(table, piece(count, 8 if method == "pcd" else 0))
            of.sums(of.gradient, table, piece(count, 8 if method == "pcd" else 0))
        of.measure(table, np.arange(COUNT))
        assert not Watched.doubles
        for array in (of.parameters, of.velocity, of.gradient, of.contrast.v, of.contrast.h, *of.lower):
            assert array.dtype == np.float32
        if chains is not None:
            assert of.chains.dtype == np.float32


def test_a_pretraining_update_computes_in_float32():
    check_types()


@pytest.mark.parametrize(("module", "line", "fault"), [
    (reference, "signed = np.multiply(h, signs[:, None], out=_scratch.get(\"signed\", h.shape))",
     "signed = h * signs[:, None].astype(np.float64)"),
    (reference, "np.add(x, bias, out=out)", "np.add(x, bias * np.float64(1), out=out, casting='unsafe')"),
    (reference, "np.add(x, c, out=_scratch.get(\"t\", x.shape))", "np.add(x, c, dtype=np.float64)"),
])
def test_a_pretraining_update_in_float64_is_noticed(module, line, fault):
    assert_notices(check_types, module, line, fault)
