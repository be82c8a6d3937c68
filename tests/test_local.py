"""Local receptive fields: a layer is the dense one whose other weights are 0, in memory and time of its windows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gpudbn import DBN, RBM, load, local
from gpudbn.data import DataSet, Rows
from gpudbn.errors import UserError
from gpudbn.finetune import FinetunePhase
from gpudbn.fit import finetune, pretrain
from gpudbn.local import Local
from gpudbn.loop import largest
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import new_chains
from gpudbn.settings import Settings
from gpudbn.shards import WHOLE
from tests.helpers import assert_close, joint, log_sum_exp, planted
from tests.test_shards import COUNTS, SEED, check_short_run, on_shards

SIZES = [43, 50, 61, 37]
FANS = [13, 0, 29]  # 4 windows over 43, a dense layer, 3 over 61
SETTINGS = Settings(layers=(50, 61, 37), local=tuple(FANS), seed=SEED, batch=13, finetune_batch=13, dropout=0.3,
                    input_dropout=0.2, learning_rate=(0.1,), finetune_learning_rate=0.01)


def table(count=13, seed=9):
    rng = np.random.default_rng(seed)
    return Rows(rng.random((count, SIZES[0]), np.float32), labels=rng.integers(0, 3, count).astype(np.int32))


def data():
    return DataSet("made up", table(39), table(11, 1), table(11, 2), image_shape=None, classes=3)


def mask(n, m, fan):
    """Where a local layer has weights: array (n, m) of 0 and 1."""
    found, one = np.zeros((n, m), np.float32), Local(n, m, fan)
    for window, units in one._windows:
        found[window, units] = 1
    return found


def spread(W, n):
    """The dense weights of local ones: array (fan, m) -> (n, m)."""
    dense, one = np.zeros((n, W.shape[1]), W.dtype), Local(n, W.shape[1], len(W))
    for window, units in one._windows:
        dense[window, units] = W[:, units]
    return dense


def stack(shards=WHOLE, fans=FANS, classes=3):
    """A DBN of strong asymmetric weights; its shards hold the parts of the whole one."""
    made, rng = DBN(SIZES, shards=shards, local=fans), np.random.default_rng(5)
    shapes = [(fan or n, m) for (n, m), fan in zip(pairwise(SIZES), fans, strict=True)]
    arrays = {}
    for i, (n, shape) in enumerate(zip(SIZES, shapes, strict=False)):
        arrays |= {f"layers.{i}.W": rng.standard_normal(shape), f"layers.{i}.b": rng.standard_normal(n),
                   f"layers.{i}.c": rng.standard_normal(shape[1])}
    for i, shape in enumerate([*shapes, (SIZES[-1], classes)]):
        arrays |= {f"classifier.W{i}": rng.standard_normal(shape), f"classifier.c{i}": rng.standard_normal(shape[1])}
    made.set_arrays({name: (0.4 * array).astype(np.float32) for name, array in arrays.items()})
    return made


def dense_stack():
    """The same function, with weights of 0 where the other has none."""
    arrays = stack().arrays()
    for i, n in enumerate(SIZES[:-1]):
        if FANS[i]:
            arrays[f"layers.{i}.W"] = spread(arrays[f"layers.{i}.W"], n)
            arrays[f"classifier.W{i}"] = spread(arrays[f"classifier.W{i}"], n)
    made = DBN(SIZES)
    made.set_arrays(arrays)
    return made


# ------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(("n", "m", "fan"), [(23, 50, 11), (61, 37, 29), (784, 500, 112), (16, 16, 16), (40, 33, 14),
                                             (7, 5, 7), (100, 320, 5), (9, 160, 3)])
def test_windows_cover_all_and_are_spread_evenly(n, m, fan):
    found = mask(n, m, fan)
    assert (found.sum(axis=0) == fan).all()
    assert (found.sum(axis=1) > 0).all()
    first = found.argmax(axis=0)
    assert (first[0], first[-1]) == (0, n - fan) or m <= 16
    steps = np.diff(first[::16])
    assert steps.size == 0 or steps.max() - steps.min() <= 1
    assert all(len(set(first[lo : lo + 16])) == 1 for lo in range(0, m, 16))


@pytest.mark.parametrize(("n", "m", "fan", "least"), [(23, 50, 5, 6), (23, 50, 24, 6), (100, 37, 33, 34)])
def test_windows_that_leave_gaps_or_are_too_large_are_refused(n, m, fan, least):
    with pytest.raises(UserError, match=rf"--local: must be from {least} to {n} for {n} visible and {m} hidden units, "
                                        rf"whose \d windows have to cover all; got {fan}"):
        DBN([n, m], local=[fan])


def test_weights_are_those_of_the_windows_alone():
    made = stack()
    assert [layer.W.shape for layer in made.layers] == [(13, 50), (50, 61), (29, 37)]
    assert made.count() == sum(layer.parameters.size for layer in made.layers)
    s = replace(SETTINGS, finetune_epochs=0)
    assert largest(s, data()) == max(made.layers[1].parameters.size, made.classifier.size)


# ------------------------------------------------------------------------------------- as the dense one of zeros


def said(dbn):
    """What a stack says of rows, by name."""
    v = np.random.default_rng(1).random((11, SIZES[0]), np.float32)
    first = dbn.layers[0]
    seen = first.see(v)
    h = first.sample_hidden(seen, seed=SEED, update=3, site=77, row=5)
    below = first.sample_visible(h, seed=SEED, update=3, site=78, row=5)
    return {"sampled": dbn.shards.gather(h, first.m), "sampled below": first.whole(below),
            "energy": first.energy(seen, h), "free energy": first.free_energy(seen),
            "reconstruction": first.whole(first.reconstruct(seen)),
            "errors": first.squared_errors(seen, first.reconstruct(seen)),
            "transformed": dbn.transform(v), "to the second layer": dbn.transform(v, 2),
            "reconstructed": dbn.reconstruct(v), "probabilities": dbn.predict_probabilities(v),
            "samples": dbn.sample(5, steps=4, seed=3), "samples from data": dbn.sample(11, steps=3, seed=4, start=v),
            "filters": dbn.filters(0), "filters of the top": dbn.filters(2, 20)}


def check_alike(found, expected):
    for name, array in expected.items():
        assert_close(found[name], array, rtol=1e-5, atol=2e-5 if "energy" in name else 4e-6)
        if name.startswith("sampled"):
            assert np.array_equal(found[name], array), name


def check_said():
    check_alike(said(stack()), said(dense_stack()))


def test_a_stack_says_what_the_dense_one_says():
    check_said()


def an_update(dbn, method, k, layer):
    """Parameters after one update of a layer, by name, with what was measured of it before."""
    s = replace(SETTINGS, method=method, k=k, decay=0.1)
    chains = new_chains(13, dbn.layers[layer], seed=SEED, layer=layer) if method == "pcd" else None
    phase = LayerPhase(dbn, layer, s, rows=13, chains=chains)
    phase.begin_epoch(0)
    measured = phase.measure(table(), np.arange(13))
    phase.update(table(), Piece(np.arange(13), 7, 3, slice(0, 13), 3, 1.0))
    return dbn.arrays(), measured


def check_update(method, k, layer):
    found, measured = an_update(stack(), method, k, layer)
    expected, means = an_update(dense_stack(), method, k, layer)
    for name in "Wbc":
        array, other = found[f"layers.{layer}.{name}"], expected[f"layers.{layer}.{name}"]
        if name == "W" and FANS[layer]:  # the dense layer has a gradient elsewhere, too
            array, other = spread(array, SIZES[layer]), other * mask(SIZES[layer], SIZES[layer + 1], FANS[layer])
        assert_close(array, other, atol=2e-6)
    assert_close(np.array(measured), np.array(means), rtol=1e-5)


@pytest.mark.parametrize(("method", "k", "layer"), [("cd", 1, 0), ("cd", 3, 2), ("pcd", 5, 0), ("cd", 1, 1)])
def test_one_update_is_that_of_the_dense_layer_where_there_are_weights(method, k, layer):
    check_update(method, k, layer)


def a_gradient(dbn):
    phase = FinetunePhase(dbn, 3, SETTINGS, rows=13)
    phase.begin_epoch(0)
    sums = np.empty_like(phase.parameters)
    phase.sums(sums, table(), Piece(np.arange(13), 7, 3, slice(0), 0, 1.0))
    phase.net.flat[...] = sums  # so that ``arrays`` puts it together
    return {name: array for name, array in dbn.arrays().items() if name.startswith("classifier")}


def check_gradient():
    found, expected = a_gradient(stack()), a_gradient(dense_stack())
    for name, array in found.items():
        other, i = expected[name], int(name[-1])
        if array.shape != other.shape:
            array, other = spread(array, SIZES[i]), other * mask(SIZES[i], SIZES[i + 1], FANS[i])
        assert_close(array, other, atol=1e-5 * np.abs(other).max())


def test_the_gradient_of_fine_tuning_is_that_of_the_dense_network_where_there_are_weights():
    check_gradient()


def test_the_gradient_of_fine_tuning_is_the_slope_of_the_loss():
    s = replace(SETTINGS, dropout=0.0, input_dropout=0.0)
    gradient = a_gradient_of(s)
    for name, place in (("W0", (3, 17)), ("W0", (12, 49)), ("W2", (28, 36)), ("c0", (5,)), ("W1", (4, 3))):
        slopes = []
        for step in (1e-2, -1e-2):
            dbn = stack()
            dbn.classifier[name][place] += np.float32(step)
            slopes.append(FinetunePhase(dbn, 3, s, rows=13).measure(table(), np.arange(13))[0])
        assert_close(-(slopes[0] - slopes[1]) / 2e-2, gradient[name][place], atol=2e-3)


def a_gradient_of(s):
    phase = FinetunePhase(stack(), 3, s, rows=13)
    phase.begin_epoch(0)
    phase.sums(phase.gradient.flat, table(), Piece(np.arange(13), 7, 3, slice(0), 0, 1.0))
    return phase.gradient


def test_energies_are_those_by_enumeration():
    rbm, rng = RBM(5, 18, fan=3), np.random.default_rng(2)  # two blocks
    rbm.parameters.flat[...] = rng.normal(size=rbm.parameters.size)
    log_p = joint(spread(rbm.W, 5), rbm.b, rbm.c)  # of all states
    states = (np.arange(32)[:, None] >> np.arange(5)[::-1] & 1).astype(np.float32)
    expected = np.logaddexp.reduce(log_p, axis=1)
    found = -rbm.free_energy(states).astype(np.float64)
    assert_close(found - log_sum_exp(found), expected, atol=1e-4)


@pytest.mark.parametrize(("line", "fault", "check"), [
    ("v[:, window] @ whole(W[:, units])", "v[:, window] @ whole(W[::-1, units])", check_said),
    ("out[:, window] += h[:, units]", "out[:, window] = h[:, units]", check_said),
    ("(h[:, units].T @ v[:, window]).T", "(h[:, units].T @ v[:, : self.fan]).T", lambda: check_update("cd", 1, 0)),
    ("(h[:, units].T @ v[:, window]).T", "(h[:, units].T @ v[:, : self.fan]).T", check_gradient),
    ("signs[rows:] = -model_weight", "pass", lambda: check_update("cd", 1, 0)),
    ("dc[...] = signed.sum(axis=0)", "dc[...] = h.sum(axis=0)", lambda: check_update("pcd", 5, 0)),
])
def test_a_fault_is_noticed(line, fault, check):
    with planted(local, line, fault), pytest.raises(AssertionError):
        check()


# --------------------------------------------------------------------------------------------------- in parts


ALL = pytest.mark.parametrize("fans", [FANS, [13, 23, 29], [43, 13, 61]])


def check_parts(count, fans=FANS):
    whole = said(stack(fans=fans))
    for found in on_shards(count, lambda shards: said(stack(shards, fans))):
        check_alike(found, whole)


def check_layers_in_parts(count, fans=FANS):
    for method, k, layer in (("cd", 1, 0), ("pcd", 5, 2), ("cd", 1, 1)):
        arrays, measured = an_update(stack(fans=fans), method, k, layer)
        before = stack(fans=fans).arrays()
        parts = on_shards(count, lambda shards: an_update(stack(shards, fans), method, k, layer))  # noqa: B023
        for found, means in parts:
            for name, array in arrays.items():
                step = max(np.abs(array - before[name]).max(), 1e-3)
                assert_close(found[name], array, atol=1e-5 * step)
            assert_close(np.array(means), np.array(measured), rtol=1e-5)


def check_gradient_in_parts(count, fans=FANS):
    whole = a_gradient(stack(fans=fans))
    for found in on_shards(count, lambda shards: a_gradient(stack(shards, fans))):
        for name, array in whole.items():
            assert_close(found[name], array, atol=1e-5 * np.abs(array).max())


@COUNTS
@ALL
def test_parts_say_and_learn_what_the_whole_does(count, fans):
    check_parts(count, fans)
    check_layers_in_parts(count, fans)
    check_gradient_in_parts(count, fans)


@COUNTS
def test_files_do_not_depend_on_the_number_of_parts(count, tmp_path):
    stack().save(tmp_path / "whole")
    on_shards(count, lambda shards: stack(shards).save(tmp_path / "parts"))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    check_alike(said(load(tmp_path / "whole")), said(stack()))
    for found in on_shards(count, lambda shards: said(load(tmp_path / "whole", shards=shards))):
        check_alike(found, said(stack()))


def test_each_part_holds_its_windows_and_only_borders_cross():
    sizes, fan, rows = [320, 320], 40, 13

    def one(shards):
        dbn = DBN(sizes, shards=shards, local=[fan])
        rbm = dbn.layers[0]
        v = rbm.see(np.random.default_rng(1).random((rows, 320), np.float32))
        before = shards.crossed
        rbm.reconstruct(v)
        return rbm.height, rbm.parameters.size, shards.crossed - before

    found = on_shards(2, one)
    # 20 blocks, 10 a shard, whose windows begin every 280 / 19: the first shard sees 173 units, the second those from
    # 147 on; in whole blocks of 16: to 176 and from 144
    assert found == [(176, fan * 160 + 176 + 160, rows * 32), (176, fan * 160 + 176 + 160, rows * 32)]


@pytest.mark.parametrize(("line", "fault", "check"), [
    ("self._add_borders(out)", "pass", check_parts),
    ("into += part", "into[...] = part", check_parts),
    ("out[:, self.owned] = part", "out[:, self.owned] = 0", check_layers_in_parts),
    ("self.shards.swap(give, take)\n        return out", "return out", check_gradient_in_parts),
])
def test_a_border_left_open_is_noticed(line, fault, check):
    with planted(local, line, fault), pytest.raises(AssertionError):
        check(2)


# --------------------------------------------------------------------------------------------------- whole runs


@COUNTS
def test_a_short_run_in_parts_ends_where_the_whole_one_ends(count):
    check_short_run(SETTINGS, data(), count)


def test_from_python(tmp_path):
    centres = np.random.default_rng(4).integers(5, 35, 120)
    x = (np.abs(np.subtract.outer(centres, np.arange(40))) < 5).astype(np.float32)
    y = (centres > 20).astype(np.int64)
    dbn = DBN([40, 64], local=[12])
    found = pretrain(dbn, x, epochs=10, batch=10, learning_rate=0.1, initial_weights=0.1)
    assert found[-1]["reconstruction_train"] < 0.5 * found[0]["reconstruction_train"]
    finetune(dbn, x, y, finetune_epochs=10, batch=10, finetune_learning_rate=0.01)
    dbn.save(tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.about["local"] == [12]
    assert np.array_equal(back.predict(x), dbn.predict(x))
    assert np.mean(back.predict(x) != y) < 0.1


@pytest.mark.parametrize(("options", "message"), [
    ({"local": (3, 4)}, "--local: must be one number, or one for each of the 3 layers; got 2"),
    ({"local": (-1,)}, "--local: must be at least 0; got -1"),
    ({"local": (0, 9, 0), "centring": "data"}, "--centring: must be off with --local 0 9 0; got data"),
    ({"local": (9,), "sparsity_target": 0.1}, "--sparsity-target: must be left out with --local 9; got 0.1"),
    ({"local": (9,), "precision": "bf16"}, "--precision: must be auto or fp32 with --local 9; got bf16"),
    ({"local": (9,), "kernels": "graph"}, "--kernels: must be auto or predicted or unfused with --local 9; got graph"),
    ({"local": (9,), "order": "fixed"}, "--order: must be fast with --local 9; got fixed"),
    ({"local": (9,), "push": "factored"}, "--push: must be dense or float16 or bfloat16 with --local 9; got factored"),
    ({"local": (9,), "finetune": "autoencoder"}, "--finetune: must be classifier with --local 9; got autoencoder"),
])
def test_what_local_layers_cannot_do_is_refused(options, message):
    with pytest.raises(UserError) as error:
        Settings(**options)
    assert str(error.value) == message
