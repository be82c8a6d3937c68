"""A replica in parts equals the whole: sums to rounding, samples and draws exactly, whatever the number of shards.

The shards are threads of this process that meet at a barrier for every sum and gather.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

from gpudbn import DBN, checkpoint, finetune, load, offsets, pretrain, rbm, reference
from gpudbn import shards as shards_module
from gpudbn.autoencoder import AutoencoderPhase
from gpudbn.data import DataSet, Rows
from gpudbn.errors import UserError
from gpudbn.finetune import FinetunePhase
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import new_chains
from gpudbn.settings import Settings
from gpudbn.shards import WHOLE, Shards

from .helpers import assert_close, planted

SIZES = [23, 50, 61, 37]  # 4, 4 and 3 pieces of 16 hidden units, the last of 2, 13 and 5
SEED = 2**33 + 1
COUNTS = pytest.mark.parametrize("count", [2, 3])
SETTINGS = Settings(layers=(50, 61, 37), seed=SEED, batch=13, finetune_batch=13, dropout=0.3, input_dropout=0.2,
                    learning_rate=(0.1,), finetune_learning_rate=0.01)


class Threads(Shards):
    """One of several shards in one process."""

    class Meeting:
        def __init__(self, count):
            self.barrier, self.brought = threading.Barrier(count, timeout=60), [None] * count
            self.sent = [queue.Queue() for _ in range(count)]

    def __init__(self, index, count, meeting):
        self.index, self.count, self.meeting, self.crossed = index, count, meeting, 0

    def _all(self, array):
        """What each shard brought, copied: they may go on and change theirs."""
        assert array.flags.c_contiguous
        self.crossed += 1
        self.meeting.brought[self.index] = array.copy()
        self.meeting.barrier.wait()
        found = list(self.meeting.brought)
        self.meeting.barrier.wait()
        return found

    def sum_(self, array):
        found = self._all(array)
        assert all(other.shape == array.shape for other in found)
        array[...] = sum(found[1:], found[0])

    def add_in_order_(self, out, partials):
        self.meeting.brought[self.index] = [partial.copy() for partial in partials]
        self.meeting.barrier.wait()
        out.fill(0)
        for partial in (partial for each in self.meeting.brought for partial in each):
            out += partial
        self.meeting.barrier.wait()

    def gather(self, part, m, out=None):
        whole = np.concatenate(self._all(part), axis=-1)
        assert whole.shape[-1] == m
        if out is None:
            return whole
        out[...] = whole
        return out

    def swap(self, give, take):
        copies = [None if array is None else array.copy() for array in give]
        self.crossed += sum(array.size for array in copies if array is not None)
        self.meeting.brought[self.index] = copies
        self.meeting.barrier.wait()
        for other, out in zip(self.meeting.brought, take, strict=True):
            assert (other[self.index] is None) == (out is None)
            if out is not None:
                out[...] = other[self.index]
        self.meeting.barrier.wait()

    def collect(self, array):
        found = self._all(array)
        return None if self.index else found

    def send(self, array):
        self.meeting.sent[self.index].put(array.copy())

    def receive(self, array, index):
        array[...] = self.meeting.sent[index].get(timeout=60)


def on_shards(count, work):
    """What ``work(shards)`` returns on each of ``count`` shards."""
    meeting = Threads.Meeting(count)

    def one(index):
        try:
            return work(Threads(index, count, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(one, index) for index in range(count)]
        errors = [future.exception() for future in futures]
        causes = [e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)]
        if any(errors):
            raise (causes or [e for e in errors if e])[0]
        return [future.result() for future in futures]


def stack(shards=WHOLE, classes=3):
    """A DBN of strong asymmetric weights; its shards hold the parts of the whole one."""
    made, rng = DBN(SIZES, shards=shards), np.random.default_rng(5)
    whole = {f"layers.{i}.{name}": 0.4 * rng.standard_normal(shape) + 0.02
             for i, (n, m) in enumerate(pairwise(SIZES))
             for name, shape in (("W", (n, m)), ("b", n), ("c", m))}
    sizes = [*SIZES, classes]
    whole |= {f"classifier.W{i}": 0.4 * rng.standard_normal(pair)
              for i, pair in enumerate(pairwise(sizes))}
    whole |= {f"classifier.c{i}": 0.4 * rng.standard_normal(m) for i, m in enumerate(sizes[1:])}
    sizes = [*SIZES, *SIZES[-2::-1]]
    whole |= {f"autoencoder.W{i}": 0.4 * rng.standard_normal(pair) for i, pair in enumerate(pairwise(sizes))}
    whole |= {f"autoencoder.c{i}": 0.4 * rng.standard_normal(m) for i, m in enumerate(sizes[1:])}
    made.set_arrays({name: np.asarray(array, np.float32) for name, array in whole.items()})
    return made


def table(count=13):
    rng = np.random.default_rng(9)
    return Rows(rng.random((count, SIZES[0]), np.float32), labels=rng.integers(0, 3, count).astype(np.int32))


def data():
    rng = np.random.default_rng(10)
    parts = [Rows(rng.random((rows, SIZES[0]), np.float32), labels=rng.integers(0, 3, rows).astype(np.int32))
             for rows in (39, 11, 11)]
    return DataSet("made up", *parts, image_shape=None, classes=3)


# ------------------------------------------------------------------------------------------------- the cut


@pytest.mark.parametrize("m", [1, 15, 16, 17, 37, 500, 2000])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_share_out_the_units_at_multiples_of_16(m, count):
    class One(Shards):
        def __init__(self, index):
            self.index, self.count = index, count

    if -(-m // 16) < count:
        with pytest.raises(UserError, match=rf"shards: a layer must have at least {16 * (count - 1) + 1} hidden units "
                                            rf"for {count} shards; got {m}. Take fewer"):
            One(0).mine(m)
        return
    parts = [One(index).mine(m) for index in range(count)]
    assert np.concatenate([np.arange(m)[part] for part in parts]).tolist() == list(range(m))
    assert all(part.start % 16 == 0 and part.stop > part.start for part in parts)
    sizes = [-(-(part.stop - part.start) // 16) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@COUNTS
def test_parts_on_unlike_devices_are_refused(count):
    def said(shards, gpus):
        return shards_module.unlike(shards, ModuleType("cupy") if shards.index < gpus else np)

    assert on_shards(count, lambda shards: said(shards, 0)) == [None] * count
    assert on_shards(count, lambda shards: said(shards, count)) == [None] * count
    for problem in on_shards(count, lambda shards: said(shards, 1)):
        assert problem.startswith(f"--device: must be the same for all parts of a replica; got a GPU for 1 of {count}.")


def test_one_shard_is_the_whole_and_nothing_crosses():
    array = np.arange(6.0).reshape(2, 3)
    assert WHOLE.gather(array, 3) is array
    WHOLE.sum_(array)
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert WHOLE.mine(37) == slice(0, 37)


# --------------------------------------------------------------------------------------- one layer and the stack


def what_a_stack_says(dbn):
    """Everything that can be asked of a model, by name."""
    v = np.random.default_rng(1).random((11, SIZES[0]), np.float32)
    first = dbn.layers[0]
    h = first.sample_hidden(v, seed=SEED, update=3, site=77, row=5)
    down = first.sample_visible(h, seed=SEED, update=3, site=78, row=5)
    return {"hidden": dbn.shards.gather(first.hidden_given_visible(v), first.m),
            "sampled": dbn.shards.gather(h, first.m), "visible": first.visible_given_hidden(h),
            "sampled below": down, "energy": first.energy(v, h),
            "free energy": first.free_energy(v), "reconstruction": first.reconstruct(v),
            "transformed": dbn.transform(v), "to the second layer": dbn.transform(v, 2),
            "reconstructed": dbn.reconstruct(v), "probabilities": dbn.predict_probabilities(v),
            "code": dbn.encode(v), "decoded": dbn.decode(dbn.encode(v)),
            "samples": dbn.sample(5, steps=4, seed=3), "samples from data": dbn.sample(11, steps=3, seed=4, start=v),
            "filters": dbn.filters(0), "of some units": dbn.filters(2, 20),
            "parameters": np.array([dbn.count()])}


def check_stack(count):
    whole = what_a_stack_says(stack())
    for said in on_shards(count, lambda shards: what_a_stack_says(stack(shards))):
        for name, expected in whole.items():
            assert_close(said[name], expected, rtol=1e-5, atol=1e-5 if "energy" in name else 2e-6)
            if name.startswith("sampled"):
                assert np.array_equal(said[name], expected), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stack_in_parts_says_what_the_whole_one_says(count):
    check_stack(count)


@COUNTS
def test_a_model_does_not_depend_on_the_number_of_shards(count):
    whole = stack().arrays()
    for found in on_shards(count, lambda shards: stack(shards).arrays()):
        assert list(found) == list(whole)
        assert all(np.array_equal(found[name], array) for name, array in whole.items())


@COUNTS
def test_a_file_has_the_same_bytes_and_each_shard_takes_its_part_of_it(count, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "AT_ONCE", 1000)  # several pieces an array, the last ones shorter
    monkeypatch.setattr(checkpoint, "AT_ONCE", 900)
    stack().save(tmp_path / "whole")
    on_shards(count, lambda shards: stack(shards).save(tmp_path / "parts"))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()

    def back(shards):
        made, found = stack(shards), load(tmp_path / "whole", shards=shards)
        return all(np.array_equal(a.flat, b.flat) for a, b in zip(everything(found), everything(made), strict=True))

    assert on_shards(count, back) == [True] * count


def test_a_file_of_other_sizes_is_refused(tmp_path):
    arrays = DBN([23, 60, 61, 37]).arrays()
    checkpoint.write(tmp_path / "m", arrays, stack().about_file())
    with pytest.raises(UserError, match=r"model: must hold layers\.0\.W of 50 units; got shape \(23, 60\)"):
        on_shards(2, lambda shards: load(tmp_path / "m", shards=shards))


def everything(dbn):
    return [*(layer.parameters for layer in dbn.layers), dbn.classifier, dbn.autoencoder]


@COUNTS
def test_a_linear_code_begins_alike_in_parts(count):
    def begun(shards):
        dbn = stack(shards)
        dbn.new_autoencoder("linear")
        return {name: array for name, array in dbn.arrays().items() if name.startswith("autoencoder")}

    whole = begun(WHOLE)
    for found in on_shards(count, begun):
        for name, array in whole.items():
            assert_close(found[name], array, atol=2e-6)


@COUNTS
def test_each_shard_holds_its_part_and_no_more(count):
    whole = stack()
    held = on_shards(count, lambda shards: [layer.parameters.size for layer in stack(shards).layers])
    for i, layer in enumerate(whole.layers):
        shared = (count - 1) * layer.n  # visible biases are on every shard
        assert sum(sizes[i] for sizes in held) == layer.parameters.size + shared


@COUNTS
def test_initial_weights_are_those_of_the_whole_layer(count):
    def initial(shards):
        dbn = DBN(SIZES, shards=shards)
        dbn.layers[1].initialise(sd=0.1, seed=SEED, layer=1, visible_means=np.linspace(0, 1, 50, dtype=np.float32))
        return dbn.arrays()

    whole = initial(WHOLE)
    for found in on_shards(count, initial):
        assert all(np.array_equal(found[name], array) for name, array in whole.items())


# ------------------------------------------------------------------------------------------------- one update


def a_layer_update(shards, method, k, up="sample", layer=2, **options):
    """Parameters after one update of the third layer, and what was drawn."""
    dbn = stack(shards)
    s = replace(SETTINGS, method=method, k=k, up=up, decay=0.1, **options)
    chains = new_chains(13, dbn.layers[layer], seed=SEED, layer=layer) if method == "pcd" else None
    phase = LayerPhase(dbn, layer, s, rows=13, chains=chains)
    if phase.offsets:
        phase.offsets.begin(np.linspace(0.1, 0.9, phase.rbm.n, dtype=np.float32), 0.3)
    phase.begin_epoch(0)
    phase.update(table(), Piece(np.arange(13), 7, 3, slice(0, 13), 3, 1.0))
    drawn = {"v": phase.contrast.v.copy(), "h": dbn.shards.gather(phase.contrast.h, phase.rbm.m)}
    return dbn.arrays(), drawn, phase.measure(table(), np.arange(13))


def check_layer_update(count, method, k, up="sample", layer=2, **options):
    arrays, drawn, measured = a_layer_update(WHOLE, method, k, up, layer, **options)
    before = stack().arrays()
    for found, seen, means in on_shards(count, lambda shards: a_layer_update(shards, method, k, up, layer, **options)):
        for name in drawn:  # samples are the same; the last hidden units, and inputs that are means, to rounding
            assert_close(seen[name], drawn[name], atol=2e-6)
        for name, array in arrays.items():
            step = max(np.abs(array - before[name]).max(), 1e-3)
            assert_close(found[name], array, atol=1e-5 * step)
        assert_close(np.array(means), np.array(measured), rtol=1e-5)


@COUNTS
@pytest.mark.parametrize(("method", "k"), [("cd", 1), ("cd", 3), ("pcd", 5)])
def test_one_pretraining_update_is_that_of_the_whole_layer(count, method, k):
    check_layer_update(count, method, k)


@COUNTS
def test_one_centred_update_is_that_of_the_whole_layer(count):
    check_layer_update(count, "pcd", 1, centring="data", sparsity_target=0.1)


@COUNTS
def test_one_pretraining_update_on_means_and_of_the_first_layer(count):
    check_layer_update(count, "cd", 1, up="mean")
    check_layer_update(count, "cd", 1, layer=0)


def a_finetuning_update(shards, kind="classifier", code="logistic"):
    def begun():
        dbn = stack(shards)
        dbn.about["code"] = code
        return dbn, (FinetunePhase(dbn, 3, SETTINGS, rows=13) if kind == "classifier" else
                     AutoencoderPhase(dbn, SETTINGS, rows=13))

    dbn, phase = begun()
    phase.begin_epoch(0)
    sums = np.empty_like(phase.parameters)
    phase.sums(sums, table(), Piece(np.arange(13), 7, 3, slice(0), 0, 1.0))
    phase.net.flat[...] = sums  # so that ``arrays`` puts it together
    gradient = {name: array for name, array in dbn.arrays().items() if name.startswith(kind)}
    return gradient, begun()[1].measure(table(), np.arange(13))


def check_finetuning_update(count, *kind):
    whole, measured = a_finetuning_update(WHOLE, *kind)
    for found, means in on_shards(count, lambda shards: a_finetuning_update(shards, *kind)):
        for name, array in whole.items():
            assert_close(found[name], array, atol=1e-5 * np.abs(array).max())
        assert_close(np.array(means), np.array(measured), rtol=1e-5)


@COUNTS
@pytest.mark.parametrize("kind", [("classifier",), ("autoencoder",), ("autoencoder", "linear")])
def test_one_finetuning_gradient_is_that_of_the_whole_network(count, kind):
    check_finetuning_update(count, *kind)


# --------------------------------------------------------------------------------------------------- whole runs


def in_a_fixed_order(shards, **options):
    """Long enough for sums in another order to show themselves; odd batches, ends of parts, all kinds of sums."""
    s = replace(SETTINGS, epochs=(3,), finetune_epochs=3, initial_weights=0.3, order="fixed", method="pcd", k=2,
                sparsity_target=0.2, learning_rate=(0.05,))
    s = replace(s, **options)
    training = Training(DBN(SIZES, shards=shards), data(), s, Alone())
    return list(training.run()), training.dbn.arrays()


def check_fixed_order(count, **options):
    records, arrays = in_a_fixed_order(WHOLE, **options)
    for found, trained in on_shards(count, lambda shards: in_a_fixed_order(shards, **options)):
        for record, other in zip(found, records, strict=True):
            assert {**record, "seconds": 0} == {**other, "seconds": 0}
        for name, array in arrays.items():
            assert np.array_equal(trained[name], array), name


@COUNTS
@pytest.mark.parametrize("options", [{}, {"finetune": "autoencoder", "code": "linear", "method": "cd", "k": 1}])
def test_in_a_fixed_order_parts_come_to_the_bits_of_the_whole(count, options):
    check_fixed_order(count, **options)


def said_in_a_fixed_order(shards):
    dbn = stack(shards)
    dbn.set_precision("blocks")
    return what_a_stack_says(dbn)


@COUNTS
def test_in_a_fixed_order_a_stack_in_parts_says_the_bits_of_the_whole_one(count):
    whole = said_in_a_fixed_order(WHOLE)
    for said in on_shards(count, said_in_a_fixed_order):
        for name, expected in whole.items():
            assert name in ("energy", "filters", "of some units") or np.array_equal(said[name], expected), name


def check_short_run(settings, rows, count):
    """A run in parts ends where the whole one ends.

    So short that no sample that flips by rounding has been met: then all is equal to rounding.
    """
    s = replace(settings, epochs=(1,), finetune_epochs=2, initial_weights=0.3, learning_rate=(0.01,), up="mean")

    def run(shards):
        training = Training(DBN([rows.n, *s.layers], shards=shards, local=s.local), rows, s, Alone())
        return list(training.run()), training.dbn.arrays()

    records, arrays = run(WHOLE)
    for found, trained in on_shards(count, run):
        for record, other in zip(found, records, strict=True):
            assert record.keys() == other.keys()
            for key in set(other) - {"seconds", "phase", "path"}:
                assert_close(record[key], other[key], rtol=1e-4, atol=1e-6)
        for name, array in arrays.items():
            assert_close(trained[name], array, atol=2e-4)


@COUNTS
def test_a_short_run_ends_where_the_whole_one_ends(count):
    check_short_run(SETTINGS, data(), count)


def test_gradients_need_nothing_from_others():
    """Up to the last half-step nothing crosses, and after it nothing but what was counted here."""
    def crossings(shards):
        dbn = stack(shards)
        phase = LayerPhase(dbn, 2, replace(SETTINGS, k=3), rows=13, chains=None)
        phase.begin_epoch(0)
        phase.update(table(), Piece(np.arange(13), 7, 3, slice(0), 0, 1.0))
        return shards.crossed

    assert on_shards(2, crossings) == [2 + 3, 2 + 3]  # two gathers on the way up, a sum in each of k steps down


# ------------------------------------------------------------------------------------------------ planted faults


@pytest.mark.parametrize(("module", "line", "fault", "check"), [
    (shards_module, "xp.matmul(a, b, out=out)\n            self.sum_(out)", "xp.matmul(a, b, out=out)", check_stack),
    (shards_module, "xp.matmul(a, b, out=out)\n            self.sum_(out)", "xp.matmul(a, b, out=out)",
     check_finetuning_update),
    (rbm, '"columns": m}', '"columns": m + 16 * shards.count}', check_stack),
    (rbm, '{"column": self.mine.start', '{"column": 0', check_stack),
    (rbm, "self.shards.sum_(of_hidden)", "pass", check_stack),
    (pretrain, "x = above.gather(h, out=y)", "x = y; x[...] = 0; x[:, : h.shape[1]] = h",
     lambda count: check_layer_update(count, "cd", 1)),
    (offsets, "self.shards.sum_(of_b)", "pass", lambda count: check_layer_update(count, "cd", 1, centring="data")),
    (finetune, "self.dbn.layers[i].own(crossing[i])", "crossing[i][:, : below.shape[1]]", check_finetuning_update),
    (finetune, "a[level][:, self._below(level).mine]", "a[level][:, : self._below(level).width]",
     lambda count: check_finetuning_update(count, "autoencoder")),
    (finetune, "self.shards.gather(crossing[i], self.units[i], out=below)",
     "below[:, : crossing[i].shape[1]] = crossing[i]", lambda count: check_finetuning_update(count, "autoencoder")),
    (finetune, "return self.dbn.layers[level - 1].columns if level <= self.stack else {}", "return {}",
     check_finetuning_update),
    (shards_module, "if precision == BLOCKS:", "if False:", check_fixed_order),
    (reference, 'if precision == "fp32":\n        np.matmul(a, b, out=out)',
     'if precision in ("fp32", BLOCKS):\n        np.matmul(a, b, out=out)', check_fixed_order),
    (rbm, "and self.precision != BLOCKS:  # in one launch", ":", check_fixed_order),
])
def test_a_seam_left_open_is_noticed(module, line, fault, check):
    with planted(module, line, fault), pytest.raises(AssertionError):
        check(2)
