"""The unrolled stack: gradients against finite differences in float64, where it begins, what it learns, its files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpudbn import autoencoder, draws, finetune
from gpudbn.autoencoder import AutoencoderPhase
from gpudbn.data import Rows
from gpudbn.data import load as load_data
from gpudbn.dbn import DBN, load
from gpudbn.draws import Purpose, site
from gpudbn.errors import NonFiniteError, UserError
from gpudbn.finetune import FinetunePhase
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.pretrain import Piece
from gpudbn.settings import Settings

from .helpers import assert_close, assert_notices

SIZES, COUNT = [11, 7, 3], 13
WIDTHS = [11, 7, 3, 7, 11]
SETTINGS = Settings(layers=tuple(SIZES[1:]), seed=2**33 + 7, finetune="autoencoder", dropout=0.3, input_dropout=0.2)
PLAIN = replace(SETTINGS, dropout=0.0, input_dropout=0.0)
WAYS = {"plain": PLAIN, "dropout": SETTINGS, "linear": replace(PLAIN, code="linear"),
        "linear and dropout": replace(SETTINGS, code="linear"), "threshold": replace(PLAIN, binarise="threshold")}
POSITIONS = np.arange(28, 28 - 2 * COUNT, -2)


def rows():
    rng = np.random.default_rng(5)
    return Rows(rng.integers(0, 256, (29, SIZES[0]), np.uint8), 1 / 255, rng.integers(0, 3, 29).astype(np.int32))


def piece(positions=POSITIONS, row=2**32 + 3):
    return Piece(positions, 41, row, slice(0), 0, 1.0)


def phase(settings, count=COUNT + 2, kind=AutoencoderPhase):
    """A phase with strong, asymmetric parameters."""
    made = kind(DBN(SIZES), settings, rows=count) if kind is AutoencoderPhase else kind(DBN(SIZES), 3, settings,
                                                                                      rows=count)
    made.parameters[...] = 0.7 * np.random.default_rng(6).standard_normal(made.parameters.size) + 0.1
    made.begin_epoch(0)
    return made


def values(settings, positions=POSITIONS):
    x = rows().array[positions] / 255
    return (x >= 0.5).astype(float) if settings.binarise == "threshold" else x


def masks(settings, count):
    """[u < keep] / keep of every level that feeds another; a linear code is whole."""
    found = []
    for level, width in enumerate(WIDTHS[:-1]):
        keep = 1 - (settings.dropout if level else settings.input_dropout)
        keep = 1.0 if settings.code == "linear" and level == 2 else keep
        u = draws.uniforms(np.empty((count, width), np.float32), seed=settings.seed, update=41, row=2**32 + 3,
                           site=site(Purpose.DROPOUT, level))
        found.append((u < keep) / keep)
    return found


def outputs(settings, net, v, kept):
    """Pre-activations of the rows that come back, by the formulas at the head of autoencoder.py."""
    x = v * kept[0]
    for i in range(3):
        x = x @ net[f"W{i}"] + net[f"c{i}"]
        x = x if i == 1 and settings.code == "linear" else 1 / (1 + np.exp(-x))
        x = x * kept[i + 1]
    return x @ net["W3"] + net["c3"]


def losses(settings, net, v, kept):
    x = outputs(settings, net, v, kept)
    return (np.logaddexp(0, x) - v * x).sum(axis=1)


def by_differences(of, loss, eps=1e-6):
    """d loss / d parameters by central differences in float64."""
    flat, found = of.net.flat.astype(np.float64), np.empty(of.net.size)

    def at(vector):
        net, start = {}, 0
        for name, shape in of.net.shapes.items():
            net[name] = vector[start : (start := start + int(np.prod(shape)))].reshape(shape)
        return loss(net)

    for i in range(flat.size):
        step = np.zeros_like(flat)
        step[i] = eps
        found[i] = (at(flat + step) - at(flat - step)) / (2 * eps)
    return found


def check_gradient(settings):
    of, v = phase(settings), values(settings)
    kept = masks(settings, COUNT)
    expected = -by_differences(of, lambda net: losses(settings, net, v, kept).sum())
    out, found = np.full_like(of.parameters, np.nan), np.empty(COUNT, np.float32)
    of.sums(out, rows(), piece(), found)
    assert_close(out, expected, atol=3e-6 * np.abs(expected).max())
    net = {name: of.net[name].astype(np.float64) for name in of.net}
    assert_close(found, losses(settings, net, v, kept), rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_finite_differences(way):
    check_gradient(WAYS[way])


@pytest.mark.parametrize(("way", "line", "fault"), [
    ("plain", "xp.subtract(targets, p, out=delta)", "xp.subtract(p, targets, out=delta)"),
    ("plain", "terms -= targets * x", "terms -= x"),
    ("plain", "x += self.net[f\"c{self.depth}\"]", "pass"),
    ("dropout", "targets[: len(x)] = x\n        return targets[: len(x)]", "return x"),
    ("linear", "return delta if level == self.code and self.linear else", "return"),
    ("linear", "out += self.net[f\"c{level - 1}\"]", "pass"),
    ("linear and dropout", "return 1.0 if level == self.code and self.linear else", "return"),
])
def test_a_wrong_gradient_is_noticed(way, line, fault):
    assert_notices(lambda: check_gradient(WAYS[way]), autoencoder, line, fault)


@pytest.mark.parametrize("way", ["plain", "linear", "threshold"])
def test_measures_are_sums_of_the_plain_formulas(way):
    settings = replace(WAYS[way], dropout=0.5)
    of, v = phase(settings), values(settings)
    net = {name: of.net[name].astype(np.float64) for name in of.net}
    ones = [1.0] * 4
    loss, squares = of.measure(rows(), POSITIONS)
    assert of.measures == ("loss", "squared_error")
    assert loss == pytest.approx(losses(settings, net, v, ones).sum(), rel=1e-5)
    p = 1 / (1 + np.exp(-outputs(settings, net, v, ones)))
    assert squares == pytest.approx(((v - p) ** 2).sum(), rel=1e-5)


# Batch optimisers


def check_objective(kind, monkeypatch):
    """Mean loss with its decay, and the gradient of that, when rows go through in blocks."""
    monkeypatch.setattr(finetune, "AT_ONCE_ROWS", 5)
    settings = replace(SETTINGS, optimiser="lbfgs", finetune_decay=0.03)
    of = phase(settings, kind=kind)
    of._given = rows(), piece()
    value = of._objective()
    plain = phase(replace(settings, optimiser="sgd"), kind=kind)
    out, found = np.empty_like(of.parameters), np.empty(COUNT, np.float32)
    plain.sums(out, rows(), piece(), found)
    weights = of.parameters.astype(np.float64).copy()
    weights[of.weights :] = 0
    assert value == pytest.approx(found.mean(dtype=np.float64) + 0.03 / 2 * weights @ weights, rel=1e-5)
    assert_close(of.total, -out / COUNT + 0.03 * weights, atol=2e-6)


@pytest.mark.parametrize("kind", [AutoencoderPhase, FinetunePhase])
def test_the_objective_of_a_batch_is_summed_block_by_block(kind, monkeypatch):
    check_objective(kind, monkeypatch)


@pytest.mark.parametrize(("line", "fault"), [
    ("row=piece.row + lo)", "row=piece.row)"),
    ("xp.add(self.total, self.gradient.flat, out=self.total)", "self.total[...] = self.gradient.flat"),
    ("np.float32(-1 / count)", "np.float32(1 / count)"),
    ("loss += decay / 2", "loss += decay"),
    ("self.total[: self.weights] -= np.float32(decay) * weights", "pass"),
])
def test_a_wrong_objective_is_noticed(line, fault, monkeypatch):
    assert_notices(lambda: check_objective(AutoencoderPhase, monkeypatch), finetune, line, fault)


@pytest.mark.parametrize("optimiser", ["lbfgs", "cg"])
def test_an_update_of_a_batch_optimiser_goes_downhill(optimiser):
    of, table = phase(replace(PLAIN, optimiser=optimiser, line_searches=7)), rows()
    before = of.measure(table, POSITIONS)[0]
    of.update(table, piece())
    assert of.measure(table, POSITIONS)[0] < 0.9 * before
    assert of.state() == {}


# From the stack to the autoencoder


def stack(seed=2):
    dbn = DBN(SIZES)
    rng = np.random.default_rng(seed)
    for rbm in dbn.layers:
        rbm.parameters.flat[...] = rng.standard_normal(rbm.parameters.size)
    return dbn


def test_it_begins_as_the_reconstruction_by_the_layers():
    dbn, v = stack(), np.random.default_rng(1).random((9, SIZES[0]), np.float32)
    dbn.new_autoencoder()
    assert_close(dbn.decode(dbn.encode(v)), dbn.reconstruct(v), atol=1e-6)
    assert dbn.encode(v).shape == (9, 3)


def test_a_linear_code_begins_as_the_tangent():
    dbn, v = stack(), np.random.default_rng(1).random((9, SIZES[0]), np.float32)
    top = dbn.layers[-1]
    top.W[...] *= np.float32(1e-2)
    top.c[...] = 0
    dbn.new_autoencoder("linear")
    assert_close(dbn.decode(dbn.encode(v)), dbn.reconstruct(v), atol=1e-5)
    assert dbn.encode(v).min() < 0
    top.W[...] *= np.float32(300)
    dbn.new_autoencoder("linear")
    assert np.abs(dbn.decode(dbn.encode(v)) - dbn.reconstruct(v)).max() > 1e-3, "no tangent any more"


def test_codes_of_another_shape_and_a_stack_that_was_not_fine_tuned_are_refused():
    dbn = stack()
    with pytest.raises(UserError, match="autoencoder: must be a model fine-tuned as one; got one that was not"):
        dbn.encode(np.zeros((2, SIZES[0]), np.float32))
    dbn.new_autoencoder()
    with pytest.raises(UserError, match=r"decode: codes must have shape \(B, 3\); got \(2, 4\)"):
        dbn.decode(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("code", ["logistic", "linear"])
def test_a_model_file_keeps_it(code, tmp_path):
    dbn, v = stack(), np.random.default_rng(1).random((9, SIZES[0]), np.float32)
    dbn.new_autoencoder(code).flat[...] += np.float32(0.1)
    dbn.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert np.array_equal(again.encode(v), dbn.encode(v))
    assert np.array_equal(again.decode(again.encode(v)), dbn.decode(dbn.encode(v)))
    assert again.classifier is None


# Whole runs


def train(stop=None, state=None, **options):
    settings = Settings(**{"layers": (24, 5), "epochs": (2,), "finetune_epochs": 3, "finetune": "autoencoder",
                           "dropout": 0.0, "seed": 3, **options})
    data = load_data("digits", validation=200, test=200, quiet=True)
    dbn = DBN([data.train.n, *settings.layers])
    training = Training(dbn, data, settings, Alone())
    if state is not None:
        training.restore(*state)
    records = []
    for record in training.run():
        records.append(record)
        if len(records) == stop:
            return training.state()
    return dbn, records


@pytest.mark.parametrize("options", [
    {"finetune_epochs": 8}, {"optimiser": "cg", "code": "linear", "finetune_batch": 400},
    {"optimiser": "lbfgs", "finetune_batch": 2000, "line_searches": 40, "finetune_epochs": 1},
])
def test_it_learns_to_give_digits_back(options):
    dbn, records = train(**options, epochs=(15,))
    last = records[-1]
    assert last["phase"] == "test"
    data = load_data("digits", validation=200, test=200, quiet=True)
    v = np.empty((200, 64), np.float32)
    data.test.take(np.arange(200), v)
    by_layers = ((v - dbn.reconstruct(v)) ** 2).sum(axis=1).mean()
    back = ((v - dbn.decode(dbn.encode(v))) ** 2).sum(axis=1).mean()
    assert last["squared_error"] == pytest.approx(back, rel=1e-5)
    assert back < 0.75 * by_layers
    tuned = [r for r in records if r["phase"] == "autoencoder"]
    assert len(tuned) == options.get("finetune_epochs", 3)
    assert all({"loss_train", "squared_error_validation", "learning_rate"} <= r.keys() for r in tuned)


@pytest.mark.parametrize("options", [{}, {"optimiser": "lbfgs", "finetune_batch": 300}])
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(options):
    whole, _ = train(**options)
    again, records = train(state=train(stop=6, **options), **options)
    assert len(records) == 2
    for name, array in whole.arrays().items():
        assert np.array_equal(array, again.arrays()[name]), name


def test_a_classifier_by_lbfgs():
    _, records = train(finetune="classifier", optimiser="lbfgs", finetune_batch=1397, line_searches=30,
                       finetune_epochs=2, finetune_decay=1e-4, layers=(50,), epochs=(8,))
    assert records[-1]["error"] < 0.1


def test_several_replicas_and_a_fixed_order_are_refused():
    class Two(Alone):
        replicas = 2

    data = load_data("digits", quiet=True)
    with pytest.raises(UserError, match="--optimiser: must be adam, adagrad or sgd with several replicas in --mode "
                                        "async; got cg and 2"):
        Training(DBN([64, 5]), data, Settings(layers=(5,), optimiser="cg"), Two())
    with pytest.raises(UserError, match="--optimiser: must be adam, adagrad or sgd with --order fixed; got lbfgs"):
        Settings(optimiser="lbfgs", order="fixed")


def test_parameters_that_are_not_finite_end_a_batch():
    of = phase(replace(PLAIN, optimiser="lbfgs"))
    of.parameters[3] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteError, match="lbfgs: objective and gradient must be"):
        of.update(rows(), piece())
