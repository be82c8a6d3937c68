"""The schedule: stopping and going on, cut batches, early stopping, runs that diverge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpudbn import loop
from gpudbn.data import DataSet, Rows
from gpudbn.dbn import DBN
from gpudbn.draws import Purpose, permutation, replica_row, site
from gpudbn.errors import NonFiniteError, UserError
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.settings import Settings
from tests.helpers import assert_close, assert_notices


def small_data(rows=71, n=13, classes=3, seed=0):
    """Rows with a class each that shifts their pattern; asymmetric, sizes prime."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows).astype(np.int32)
    means = rng.uniform(0.05, 0.95, (classes, n))
    x = (rng.uniform(size=(rows, n)) < means[labels]).astype(np.float32)
    table = Rows(x, 1.0, labels)
    return DataSet("small", table.select(range(rows - 20)), table.select(range(rows - 20, rows - 10)),
                   table.select(range(rows - 10, rows)), None, classes, 0)


def small_settings(**changes):
    base = {"layers": (11, 7), "epochs": 3, "batch": 8, "finetune_epochs": 4, "finetune_batch": 10,
            "momentum_epochs": 1, "input_dropout": 0.1, "finetune_patience": 2, "learning_rate": 0.1,
            "precision": "fp32"}
    return Settings(**{**base, **changes})


def training(settings, data=None, exchange=None):
    data = data or small_data()
    return Training(DBN([data.n, *settings.layers]), data, settings, exchange or Alone())


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


ESTIMATORS = [{}, {"method": "pcd", "k": 2}, {"optimiser": "sgd", "last_hidden": "sample", "up": "mean"},
              {"binarise": "stochastic", "order": "fixed", "method": "pcd"},
              {"centring": "data", "sparsity_target": 0.2, "method": "pcd"},
              {"centring": "data", "sparsity_target": 0.2, "order": "fixed"}, {"data_hidden": "mean", "patience": 1}]


@pytest.mark.parametrize("options", ESTIMATORS)
def test_a_run_stopped_after_any_epoch_ends_with_the_bits_of_one_that_never_stopped(options):
    settings = small_settings(**options)
    whole = training(settings)
    records = list(whole.run())
    for stop in range(len(records)):
        first = training(settings)
        before = list(itertools.islice(first.run(), stop))
        second = training(settings)
        second.restore(*first.state())
        assert timeless(before + list(second.run())) == timeless(records)
        for name, array in whole.dbn.arrays().items():
            assert np.array_equal(array, second.dbn.arrays()[name]), f"stopped after {stop} epochs: {name}"


@pytest.mark.parametrize("options", ESTIMATORS)
def test_an_interrupt_in_the_middle_of_an_epoch_changes_no_bit(options, monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 2)
    settings = small_settings(**{**options, "patience": 0, "finetune_patience": 0})
    whole = training(settings)
    list(whole.run())
    for turns in (1, 5, 22, 31):
        first = training(settings)

        def stop(done, total, first=first, count=[turns]):  # noqa: B006, ARG001
            count[0] -= 1
            first.interrupt = first.interrupt or count[0] <= 0

        first.progress = stop
        list(first.run())
        assert first.position > 0, "stopped within an epoch"
        second = training(settings)
        second.restore(*first.state())
        list(second.run())
        for name, array in whole.dbn.arrays().items():
            assert np.array_equal(array, second.dbn.arrays()[name]), f"stopped after {turns} turns: {name}"


@pytest.mark.parametrize("lost", ["velocity", "chains", "updates", "means", "offsets"])
def test_forgetting_any_part_of_the_state_is_noticed(lost):
    settings = small_settings(method="pcd", learning_rate=0.5, centring="data")
    whole, first, second = (training(settings) for _ in range(3))
    list(whole.run())
    list(itertools.islice(first.run(), 2))
    arrays, meta = first.state()
    for name in arrays:
        if lost in name:
            arrays[name] = np.zeros_like(arrays[name])
    second.restore(arrays, meta | ({"updates": 0} if lost == "updates" else {}))
    list(second.run())
    assert any(not np.array_equal(a, second.dbn.arrays()[name]) for name, a in whole.dbn.arrays().items())


class Slice(Alone):
    """One of several synchronous replicas, as far as the cutting of batches goes."""

    cuts_batches = True

    def __init__(self, replica, replicas):
        super().__init__()
        self.replica, self.replicas, self.living = replica, replicas, tuple(range(replicas))


@pytest.mark.parametrize("order", ["fast", "fixed"])
@pytest.mark.parametrize(("method", "conditions"), [("cd", {}), ("pcd", {}), ("pcd", {"centring": "data"}),
                                                    ("cd", {"centring": "data", "sparsity_target": 0.2})])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("present", [8, 7, 2, 1])
def test_one_update_is_the_same_on_any_cut_of_the_batch(order, method, conditions, index, present):
    """Sums agree to rounding, and so every sample is the same; also for a short last batch and chains."""
    settings = small_settings(order=order, method=method, k=2, finetune_batch=8, **conditions)
    positions = np.arange(3, 3 + present)
    results = []
    for replicas in (1, 2, 3, 5):
        total, chains = 0.0, []
        for replica in range(replicas):
            run = training(settings, exchange=Slice(replica, replicas) if replicas > 1 else Alone())
            run.index, run.updates = index, 77
            phase = run._make_phase()
            phase.begin_epoch(0)
            if index < 2:  # weights strong enough that samples matter
                phase.parameters *= 50
            for piece in run._pieces(phase, positions):
                sums = np.full(phase.exchanged, np.nan, np.float32)
                phase.sums(sums, run.data.train, piece)
                total = total + sums
            chains.append(phase.chains)
        results.append((total, np.concatenate(chains) if method == "pcd" and index < 2 else np.zeros(1)))
    for total, chains in results[1:]:
        assert_close(total, results[0][0], atol=1e-5, rtol=1e-5)
        assert np.array_equal(chains, results[0][1])


def test_blocks_of_a_fixed_order_do_not_depend_on_the_number_of_replicas():
    settings = small_settings(order="fixed", method="pcd", batch=21)
    def blocks(replicas):
        found = []
        for replica in range(replicas):
            run = training(settings, exchange=Slice(replica, replicas))
            phase = run._make_phase()
            found += [(p.positions.tolist(), p.row, p.chain_row, p.chains.stop - p.chains.start)
                      for p in run._pieces(phase, np.arange(17))]
        return found
    assert blocks(1) == blocks(2) == blocks(3) == blocks(4) == blocks(7)
    assert [row for block in blocks(3) for row in block[0]] == list(range(17))


def test_the_best_epoch_on_the_validation_rows_is_kept_and_training_stops_without_progress():
    settings = small_settings(epochs=1, finetune_epochs=60, finetune_patience=3, finetune_learning_rate=0.05)
    run = training(settings)
    kept = {}
    records = []
    for record in run.run():
        records.append(record)
        if record["phase"] == "finetune":
            kept[record["epoch"]] = run.dbn.classifier.flat.copy()
    tuned = [r for r in records if r["phase"] == "finetune"]
    best = min(tuned, key=lambda r: (r["error_validation"], r["loss_validation"], r["epoch"]))
    assert len(tuned) == best["epoch"] + 3 < 60
    assert np.array_equal(run.dbn.classifier.flat, kept[best["epoch"]])


def test_a_layer_ends_when_held_out_rows_are_no_longer_reconstructed_better():
    run = training(small_settings(layers=(11,), epochs=200, patience=2, finetune_epochs=0, learning_rate=0.5))
    records = [r for r in run.run() if r["phase"] == "pretrain"]
    best = min(records, key=lambda r: r["reconstruction_validation"])["epoch"]
    assert len(records) == best + 2 < 200


def test_each_layer_has_its_own_number_of_epochs():
    records = list(training(small_settings(epochs=(1, 2), finetune_epochs=0)).run())
    assert [(r.get("layer"), r["epoch"]) for r in records[:-1]] == [(1, 1), (2, 1), (2, 2)]


def test_without_labels_only_the_layers_are_trained():
    data = small_data()
    bare = [Rows(part.array, 1.0, None, part.index) for part in (data.train, data.validation, data.test)]
    run = training(small_settings(), DataSet("bare", *bare, None, 0, 0))
    records = list(run.run())
    assert {r["phase"] for r in records} == {"pretrain", "test"}
    assert "reconstruction" in records[-1]
    assert run.dbn.classifier is None


def test_without_validation_rows_all_epochs_run():
    data = small_data()
    data = DataSet("all", data.train, data.train.select(range(0)), data.test, None, 3, 0)
    records = list(training(small_settings(patience=1, finetune_patience=1), data).run())
    assert len(records) == 3 + 3 + 4 + 1
    assert records[0]["free_energy_validation"] is None


@pytest.mark.parametrize(("options", "where"), [
    ({"learning_rate": 1e30}, "layer 1: parameters must stay finite; got NaN or infinity by update 2"),
    ({"learning_rate": (0.1, 1e30)}, "layer 2: parameters must stay finite; got NaN or infinity by update 23"),
    ({"finetune_learning_rate": 1e30, "optimiser": "sgd"}, "fine-tuning: parameters must stay finite; .* update 44"),
])
def test_parameters_that_are_not_finite_end_the_run_naming_layer_and_update(options, where, monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 1)
    with pytest.raises(NonFiniteError, match=where):
        list(training(small_settings(decay=1e-3, finetune_decay=1e-3, **options)).run())


def test_more_asynchronous_replicas_than_rows_are_refused():
    exchange = Slice(60, 61)
    exchange.cuts_batches, exchange.shards_rows = False, True
    with pytest.raises(UserError, match="at least one training row a replica; got 51 rows for 61 replicas"):
        training(small_settings(), exchange=exchange)


def test_asynchronous_shards_cover_every_row_once():
    seen = []
    for replica in range(3):
        exchange = Slice(replica, 3)
        exchange.cuts_batches, exchange.shards_rows = False, True
        run = training(small_settings(), exchange=exchange)
        shard = run._shard(0)
        rows = np.empty((len(shard), 13), np.float32)
        shard.take(np.arange(len(shard)), rows)
        seen.append(rows)
    whole = np.empty((51, 13), np.float32)
    small_data().train.take(np.arange(51), whole)
    seen = np.concatenate(seen)
    assert sorted(map(bytes, seen)) == sorted(map(bytes, whole))


class Helper(Alone):
    """Replica 1 of 3: does its own turns, then those of the others, one of whom it has lost and one of whom is slow."""

    replica, replicas, living, shards_rows = 1, 3, (1,), True

    def __init__(self):
        super().__init__()
        self.refreshed = 0

    def turns(self, each, warm=0):  # noqa: ARG002
        yield from ((1, number) for number in range(each))
        yield from ((0, number) for number in range(each))
        yield from ((2, number) for number in reversed(range(each)))

    def refresh(self, parameters, before):
        self.refreshed += 1
        before[...] = parameters


def check_rows_of_others():
    """Every row is seen once an epoch, and no address of draws comes twice."""
    exchange = Helper()
    run = training(small_settings(layers=(11,), finetune_epochs=2, finetune_patience=0, n_push=2, n_fetch=2),
                   exchange=exchange)
    seen, addresses = [], []

    def noting(phase):
        update = phase.update

        def noted(feed, piece):
            seen.extend(feed.rows.places(piece.positions).tolist())
            addresses.append((piece.update, piece.row))
            update(feed, piece)

        phase.update = noted
        return phase

    make = run._make_phase
    run._make_phase = lambda: noting(make())
    rows = run.data.train.shard(0, 3)  # 17 rows, as the others: a turn of 16, and one of the last row
    order = permutation(17, seed=1, update=0, row=replica_row(0), site=site(Purpose.ORDER, 0))
    for record in run.run():
        if record["phase"] != "test":
            assert sorted(seen) == list(range(51))
            if record["phase"] == "pretrain" and record["epoch"] == 1:
                assert seen[17:34] == rows.places(order).tolist()
            seen.clear()
    assert len(set(addresses)) == len(addresses)
    assert all(row == replica_row(1) for _, row in addresses)
    assert exchange.refreshed > 0


def test_turns_of_other_shards_are_those_of_their_owners():
    check_rows_of_others()


@pytest.mark.parametrize(("line", "fault"), [
    ("train.shard(owner, self.exchange.replicas)", "train.shard(self.exchange.replica, self.exchange.replicas)"),
    ("row = replica_row(owner) if", "row = replica_row(owner + 1) if"),
    ("first = start + number * turn", "first = self.position"),
    ("if self._lent is None or self._lent[0] != owner", "if self._lent is None"),
])
def test_turns_of_other_shards_done_wrong_are_noticed(line, fault):
    assert_notices(check_rows_of_others, loop, line, fault)
