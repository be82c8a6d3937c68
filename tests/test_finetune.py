"""Back-propagation against finite differences of the loss, written anew in float64, with the draws' dropout masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gpudbn import draws, finetune, reference
from gpudbn.data import Rows
from gpudbn.dbn import DBN
from gpudbn.draws import Purpose, site
from gpudbn.finetune import FinetunePhase
from gpudbn.parameters import Parameters
from gpudbn.pretrain import Piece
from gpudbn.settings import Settings

from .helpers import Watched, assert_close, assert_notices

SIZES, CLASSES, COUNT = [11, 7, 5], 3, 13
SETTINGS = Settings(layers=tuple(SIZES[1:]), seed=2**33 + 7, dropout=0.3, input_dropout=0.2)


def rows():
    """COUNT rows of values in [0, 1] with labels, in a table with more of them."""
    rng = np.random.default_rng(5)
    return Rows(rng.integers(0, 256, (29, SIZES[0]), np.uint8), 1 / 255, rng.integers(0, CLASSES, 29).astype(np.int32))


def piece(positions=None, update=41, row=2**32 + 3):
    positions = np.arange(28, 28 - 2 * COUNT, -2) if positions is None else positions
    return Piece(positions, update, row, slice(0), 0, 1.0)


def phase(settings=SETTINGS):
    """A phase whose network, its softmax layer too, is strong and asymmetric."""
    made = FinetunePhase(DBN(SIZES), CLASSES, settings, rows=COUNT + 2)
    made.parameters[...] = np.random.default_rng(6).standard_normal(made.parameters.size) + 0.2
    made.begin_epoch(0)
    return made


def values(table, positions):
    """The rows at these positions and their labels, as the network sees them: float64."""
    x = table.array[positions].astype(np.float64) * table.scale
    return x, table.labels[positions]


def masks(settings, update, row, count):
    """[u < keep] / keep of every level, from the draws' addresses."""
    found = []
    for level, width in enumerate(SIZES):
        keep = 1 - (settings.dropout if level else settings.input_dropout)
        u = draws.uniforms(np.empty((count, width), np.float32), seed=settings.seed, update=update, row=row,
                           site=site(Purpose.DROPOUT, level))
        found.append((u < keep) / keep)
    return found


def log_probabilities(net, x, masks=None):
    """log softmax of the network, in float64, by the formulas at the head of finetune.py."""
    x = x if masks is None else x * masks[0]
    for level in range(len(SIZES) - 1):
        x = 1 / (1 + np.exp(-(x @ net[f"W{level}"] + net[f"c{level}"])))
        x = x if masks is None else x * masks[level + 1]
    logits = x @ net[f"W{len(SIZES) - 1}"] + net[f"c{len(SIZES) - 1}"]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def gradient_by_differences(of, x, labels, kept, eps=1e-6):
    """d sum log p(label) / d parameters by central differences, float64, end to end."""
    flat, found = of.net.flat.astype(np.float64), np.empty(of.net.size)

    def total(vector):
        net, start = {}, 0
        for name, shape in of.net.shapes.items():
            net[name] = vector[start : (start := start + int(np.prod(shape)))].reshape(shape)
        return log_probabilities(net, x, kept)[np.arange(len(x)), labels].sum()

    for i in range(flat.size):
        up, down = flat.copy(), flat.copy()
        up[i] += eps
        down[i] -= eps
        found[i] = (total(up) - total(down)) / (2 * eps)
    return found


# The gradient


def check_gradient(settings):
    of, table, p = phase(settings), rows(), piece()
    x, labels = values(table, p.positions)
    if settings.binarise == "threshold":
        x = (x >= 0.5).astype(float)
    expected = gradient_by_differences(of, x, labels, masks(settings, p.update, p.row, COUNT))
    before, out = of.parameters.copy(), np.full_like(of.parameters, np.nan)
    of.sums(out, table, p)
    scale = np.abs(expected).max()
    assert_close(out, expected, atol=3e-6 * scale)
    assert np.array_equal(of.parameters, before)
    of.sums(of.gradient.flat, table, p)  # its own buffer gives the same
    assert np.array_equal(of.gradient.flat, out)


WAYS = {"no dropout": replace(SETTINGS, dropout=0.0, input_dropout=0.0), "dropout": SETTINGS,
        "half the hidden units": replace(SETTINGS, dropout=0.5, input_dropout=0.0),
        "threshold": replace(SETTINGS, binarise="threshold"), "stochastic": replace(SETTINGS, binarise="stochastic")}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_finite_differences(way):
    check_gradient(WAYS[way])


@pytest.mark.parametrize("sizes", [[11, 7], [11, 7, 5, 3]])
def test_the_gradient_is_right_for_one_and_three_hidden_layers(sizes, monkeypatch):
    monkeypatch.setattr("tests.test_finetune.SIZES", sizes)
    check_gradient(SETTINGS)


@pytest.mark.parametrize(("way", "module", "line", "fault"), [
    ("no dropout", reference, "np.negative(delta, out=delta)", "pass"),
    ("no dropout", reference, "delta *= a\n", "pass\n"),
    ("no dropout", reference, "np.multiply(delta, factor, out=delta)", "delta"),
    ("no dropout", finetune, "for i in range(self.depth, -1, -1)", "for i in range(self.depth, 0, -1)"),
    ("no dropout", finetune, "product_back(crossing.get(i, below), delta, W,",
     "product_back(crossing.get(i, below), delta, 2 * W,"),
    ("no dropout", finetune, "here\n                    product(crossing.get(i, below), delta, W.T",
     "here\n                    product(crossing.get(i, below), delta, 2 * W.T"),
    ("no dropout", finetune, "x, self.net[f\"c{self.depth}\"], targets)", "x, 0 * self.net[\"c2\"], targets)"),
    ("dropout", reference, "np.float32(-keep)", "np.float32(-1)"),
    ("dropout", reference, "np.float32(1 / keep)", "np.float32(1)"),
    ("dropout", reference, "u < np.float32(keep)", "u > np.float32(keep)"),
    ("dropout", finetune, "delta, a, keep=self._keep(level))", "delta, a, keep=self._keep(0))"),
    ("dropout", finetune, "site=site(Purpose.DROPOUT, level), row=piece.row,", "site=site(Purpose.DROPOUT, level),"),
    ("dropout", finetune, "site=site(Purpose.DROPOUT, level)", "site=site(Purpose.DROPOUT, 0)"),
    ("dropout", finetune, "self.settings.dropout if level else", "self.settings.dropout if not level else"),
    ("threshold", finetune, "rows.take(piece.positions, a[0])\n        if self.settings.binarise == \"threshold\":",
     "rows.take(piece.positions, a[0])\n        if False:"),
])
def test_a_wrong_gradient_is_noticed(way, module, line, fault):
    assert_notices(lambda: check_gradient(WAYS[way]), module, line, fault)


def check_pieces():
    of, table, whole = phase(), rows(), piece()
    total, out = np.empty((2, of.parameters.size), np.float32)
    of.sums(total, table, whole)
    for cuts in ((0, 2, 13), (0, 5, 5, 12, 13)):
        added = np.zeros_like(total)
        for lo, hi in pairwise(cuts):
            out[...] = np.nan
            of.sums(out, table, piece(whole.positions[lo:hi], row=whole.row + lo))
            added += out
        assert_close(added, total, atol=1e-5)


def test_pieces_of_a_batch_add_up_even_empty_ones():
    check_pieces()


@pytest.mark.parametrize(("line", "fault"), [
    ("out[...] = 0\n            return", "return"),
    ("site=site(Purpose.DROPOUT, level), row=piece.row,", "site=site(Purpose.DROPOUT, level),"),
])
def test_pieces_that_do_not_add_up_are_noticed(line, fault):
    assert_notices(check_pieces, finetune, line, fault)


def test_logits_of_any_size_give_finite_gradients():
    of, table = phase(replace(SETTINGS, dropout=0.0, input_dropout=0.0)), rows()
    of.parameters *= np.float32(1000)
    out = np.empty_like(of.parameters)
    of.sums(out, table, piece())
    assert np.isfinite(out).all()


# Measures, steps, beginning


def check_measure(settings):
    of, table = phase(settings), rows()
    positions = np.arange(3, 26)
    x, labels = values(table, positions)
    if settings.binarise == "threshold":
        x = (x >= 0.5).astype(float)
    log_p = log_probabilities({name: of.net[name].astype(np.float64) for name in of.net}, x)
    loss, wrong = of.measure(table, positions)
    assert of.measures[0] == "loss"
    assert loss == pytest.approx(-log_p[np.arange(23), labels].sum(), rel=1e-5)
    assert wrong == (log_p.argmax(axis=1) != labels).sum()
    assert 0 < wrong < 23


@pytest.mark.parametrize("way", ["dropout", "threshold"])
def test_measures_are_sums_of_the_plain_formulas_without_dropout(way):
    check_measure(WAYS[way])


@pytest.mark.parametrize(("module", "line", "fault"), [
    (finetune, "self._crossing(len(x)), None)", "self._crossing(len(x)), Piece(positions, 0, 0, slice(0), 0, 1.0))"),
    (finetune, "return [loss.sum(dtype=np.float64), second.sum(", "return [second.sum(dtype=np.float64), loss.sum("),
    (reference, "np.negative(log_p[each, labels], out=loss)", "loss[...] = log_p[each, labels]"),
    (reference, "np.not_equal(log_p.argmax(axis=1), labels", "np.equal(log_p.argmax(axis=1), labels"),
    (reference, "log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))", "pass"),
    (reference, "log_p = np.add(x, bias,", "log_p = np.add(x, 0,"),
])
def test_a_wrong_measure_is_noticed(module, line, fault):
    def check():
        # masks of 25 rows are wanted only under the fault
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.test_finetune.COUNT", 25)
            check_measure(SETTINGS)

    assert_notices(check, module, line, fault)


def check_update(settings):
    """An update is the mean gradient and a step of the chosen rule, in which all weights decay and no bias does."""
    one, two, table, p = phase(settings), phase(settings), rows(), piece()
    assert one.weights == 11 * 7 + 7 * 5 + 5 * 3
    start = one.parameters.astype(np.float64)
    for _ in range(2):
        out = np.empty_like(one.parameters)
        one.sums(out, table, p)
        one.step(out, COUNT)
        two.update(table, p)
    assert np.array_equal(one.parameters, two.parameters)
    again = phase(settings)
    again.sums(out, table, p)
    again.step(out.copy(), COUNT)
    mean = out.astype(np.float64) / COUNT
    s = settings
    decayed = s.finetune_learning_rate * s.finetune_decay * start * (np.arange(start.size) < one.weights)
    if s.optimiser == "sgd":
        expected = start + s.finetune_learning_rate * mean - decayed
    else:  # the first steps of Adam and Adagrad have the size of the rate
        eps = 1e-8 / np.sqrt(1e-3) if s.optimiser == "adam" else 1e-8
        expected = start - decayed + s.finetune_learning_rate * mean / (np.abs(mean) + eps)
    assert_close(again.parameters, expected, atol=1e-5)
    assert set(one.state()) == {"adam": {"mean", "square", "steps"}, "adagrad": {"squares"},
                                "sgd": {"velocity"}}[s.optimiser]


RULES = [replace(SETTINGS, optimiser="adam", finetune_decay=0.2, finetune_learning_rate=0.05),
         replace(SETTINGS, optimiser="adagrad", finetune_decay=0.2, finetune_learning_rate=0.05),
         replace(SETTINGS, optimiser="sgd", finetune_decay=0.2, finetune_learning_rate=0.3)]


@pytest.mark.parametrize("settings", RULES, ids=["adam", "adagrad", "sgd"])
def test_an_update_is_the_mean_gradient_and_a_step(settings):
    check_update(settings)


@pytest.mark.parametrize("settings", RULES, ids=["adam", "adagrad", "sgd"])
@pytest.mark.parametrize(("line", "fault"), [
    ("for i in range(self.depth + 1))\n        self.epochs", "for i in range(self.depth))\n        self.epochs"),
    ("scale=1 / count, rate=self.rate", "scale=1 / count, rate=2 * self.rate"),
])
def test_a_wrong_step_is_noticed(settings, line, fault):
    assert_notices(lambda: check_update(settings), finetune, line, fault)


@pytest.mark.parametrize(("settings", "line", "fault"), [
    (RULES[0], "if settings.optimiser == \"adam\":", "if settings.optimiser == \"sgd\":"),
    (RULES[1], "if settings.optimiser == \"adagrad\":", "if settings.optimiser == \"sgd\":"),
    (RULES[1], "Adagrad(parameters, decay=settings.finetune_decay)", "Adagrad(parameters, decay=0)"),
    (RULES[2], "momentum=settings.finetune_momentum, decay=settings.finetune_decay", "momentum=0.9, decay=0"),
])
def test_another_rule_than_the_chosen_one_is_noticed(settings, line, fault):
    assert_notices(lambda: check_update(settings), finetune, line, fault)


def test_it_begins_as_the_layers_with_an_indifferent_softmax_and_leaves_the_layers_alone():
    dbn = DBN(SIZES)
    for layer, rbm in enumerate(dbn.layers):
        rbm.parameters.flat[...] = np.random.default_rng(layer).standard_normal(rbm.parameters.size)
    before = [rbm.parameters.copy() for rbm in dbn.layers]
    of = FinetunePhase(dbn, CLASSES, SETTINGS, rows=COUNT)
    assert of.net is dbn.classifier
    for layer, rbm in enumerate(dbn.layers):
        assert np.array_equal(of.net[f"W{layer}"], rbm.W)
        assert np.array_equal(of.net[f"c{layer}"], rbm.c)
    loss, _ = of.measure(rows(), np.arange(10))
    assert loss == pytest.approx(10 * np.log(3), rel=1e-6)
    of.begin_epoch(0)
    of.update(rows(), piece())
    for rbm, kept in zip(dbn.layers, before, strict=True):
        assert np.array_equal(rbm.parameters.flat, kept.flat)
    assert FinetunePhase(dbn, CLASSES, SETTINGS, rows=COUNT).net is dbn.classifier  # goes on, where there is one


def test_a_batch_is_that_of_pretraining_unless_it_has_its_own_size():
    assert phase(replace(SETTINGS, batch=31)).batch == 31
    assert phase(replace(SETTINGS, batch=31, finetune_batch=7)).batch == 7


def test_the_rate_of_an_epoch_follows_the_schedule():
    s = replace(SETTINGS, finetune_epochs=5, finetune_schedule="linear", finetune_learning_rate=0.2,
                finetune_learning_rate_end=0.5)
    of = phase(s)
    rates = [of.begin_epoch(epoch)["learning_rate"] for epoch in range(5)]
    assert rates == pytest.approx([0.2, 0.175, 0.15, 0.125, 0.1])
    assert of.rate == pytest.approx(0.1)


# Types


def check_types():
    for settings in RULES:
        of, table = phase(settings), rows()
        of.parameters = of.parameters.view(Watched)
        of.net = Parameters(of.net.shapes, flat=of.parameters)
        for buffers in (of.activations, of.deltas):
            buffers[:] = [buffer.view(Watched) for buffer in buffers]
        Watched.doubles.clear()
        for _ in range(2):
            of.update(table, piece())
        of.measure(table, np.arange(COUNT))
        assert not Watched.doubles
        for array in (of.parameters, of.gradient.flat, *of.activations, *of.deltas):
            assert array.dtype == np.float32
        for name, array in of.state().items():
            assert array.dtype == (np.int64 if name == "steps" else np.float32)


def test_a_fine_tuning_update_computes_in_float32():
    check_types()


@pytest.mark.parametrize(("line", "fault"), [
    ("np.add(x, bias, out=_scratch.get(\"log p\", x.shape))", "x + bias * np.float64(1)"),
    ("np.multiply(x, np.float32(1 / keep), out=x)", "np.multiply(x, x.astype(np.float64), out=x, casting='unsafe')"),
    ("delta *= a\n", "delta[...] = delta * np.float64(1) * a\n"),
])
def test_a_fine_tuning_update_in_float64_is_noticed(line, fault):
    assert_notices(check_types, reference, line, fault)
