"""Turns as CUDA graphs, on a pretended device: the bits of launches one by one, whatever the options."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from gpudbn import graphs, loop, pretrain, rbm
from gpudbn.errors import NonFiniteError
from gpudbn.loop import Training
from tests.cuda_on_cpu import runtime
from tests.helpers import planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import finished, on_device, strong
from tests.test_loop import Slice

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

# Between them, every value of every option that chooses what is launched for a layer.
OPTIONS = [
    {},
    {"k": 3, "last_hidden": "sample", "up": "mean", "decay": 0.0},
    {"data_hidden": "mean", "binarise": "stochastic", "reconstruction": "mean"},
    {"method": "pcd", "k": 2, "binarise": "threshold", "batch": 7},
    {"method": "pcd", "k": 3, "data_hidden": "mean", "last_hidden": "sample", "momentum": (0.3, 0.8)},
    {"centring": "data", "sparsity_target": 0.1},
    {"precision": "exact"},
]


class Asynchronous(Slice):
    """An asynchronous replica, as far as its own computation goes."""

    cuts_batches, shards_rows = False, True

    def __init__(self):
        super().__init__(1, 2)


def trained(monkeypatch, options, *, by_graphs, exchange=None, turn=2):
    """All arrays after pretraining, and how many graphs were launched."""
    monkeypatch.setattr("gpudbn.loop.TURN", turn)
    with installed() as device, monkeypatch.context() as patch:
        if not by_graphs:
            patch.setattr(Training, "_make_graphs", lambda *_: None)
        run, _ = finished(on_device(strong(**{"epochs": 3, "finetune_epochs": 0, **options}), exchange))
        return run.dbn.arrays(), device.graphs


def same(one, other):
    return all(np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize("options", OPTIONS)
def test_graphs_give_the_bits_of_launches_one_by_one(options, monkeypatch):
    """51 rows: turns of two full batches, and a short batch that no graph has."""
    expected, none = trained(monkeypatch, options, by_graphs=False)
    found, launched = trained(monkeypatch, options, by_graphs=True)
    assert same(found, expected)
    assert max(np.abs(array).max() for array in found.values()) > 0.3, "nothing was learned, nothing was shown"
    assert none == 0
    turns = 51 // options.get("batch", 8) // 2
    assert launched == 2 * (3 * turns - 1), "all turns of three epochs of two layers but the first"


def test_the_turns_of_an_asynchronous_replica_are_graphs_too(monkeypatch):
    options = {"method": "pcd", "n_push": 2, "batch": 5}
    expected, _ = trained(monkeypatch, options, by_graphs=False, exchange=Asynchronous())
    found, launched = trained(monkeypatch, options, by_graphs=True, exchange=Asynchronous())
    assert same(found, expected)
    assert launched == 2 * (3 * 2 - 1), "25 rows are two turns of two full batches and a batch that is empty"


def test_turns_of_other_lengths_are_other_graphs(monkeypatch):
    """Six full batches as turns of four and of two."""
    expected, _ = trained(monkeypatch, {}, by_graphs=False, turn=4)
    found, launched = trained(monkeypatch, {}, by_graphs=True, turn=4)
    assert same(found, expected)
    assert launched == 2 * 2 * 2, "each from the second epoch on"


def test_a_replayed_turn_is_a_range_of_the_profile(monkeypatch):
    names = []

    def told(name):
        names.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr("gpudbn.graphs.span", told)
    _, launched = trained(monkeypatch, {}, by_graphs=True, turn=4)
    assert names.count("graph of 4 updates") + names.count("graph of 2 updates") == launched


FAULTS = [
    (graphs, "if self.there != (update, row):", "if False:", {}),  # counters of the turn before
    (graphs, "self.counters, updates=count, rows=rows)", "self.counters, updates=count, rows=0)", {}),
    (graphs, "self.counters, updates=count, rows=rows)", "self.counters, updates=1, rows=rows)", {}),
    (graphs, "key = count, side", "key = side", {}),  # the graph of a turn of another length
    (loop, "piece._replace(update=update, clock=clock)", "piece._replace(update=0, clock=clock)", {}),
    (loop, "Span(update * phase.batch, phase.batch, turn)", "Span(0, phase.batch, turn)", {}),
    (pretrain, "rates=None if piece.clock is None else self.rates,", "rates=None,", {}),  # those of the first epoch
    (pretrain, "self.rate * (1 / self.batch), self.momentum", "self.rate, self.momentum", {}),
    (pretrain, "chain_row=piece.chain_row, clock=piece.clock)", "chain_row=piece.chain_row)", {}),
    (pretrain, "\"row\": piece.row, \"clock\": piece.clock}", "\"row\": piece.row}", {"binarise": "stochastic"}),
    (rbm, "\"update\": update, \"clock\": clock}", "\"update\": update}", {"method": "pcd"}),
]


@pytest.mark.parametrize("case", range(len(FAULTS)))
def test_a_graph_that_repeats_something_else_is_noticed(case, monkeypatch):
    module, line, fault, options = FAULTS[case]
    expected, _ = trained(monkeypatch, options, by_graphs=False, turn=4)
    with planted(module, line, fault):
        try:
            found, launched = trained(monkeypatch, options, by_graphs=True, turn=4)
        except NonFiniteError:  # rows that are not there are NaN
            return
    assert launched
    assert not same(found, expected)


def test_what_makes_an_array_must_not_stand_in_a_graph(monkeypatch):
    with (planted(pretrain, "            threshold(x)", "            x[...] = x >= np.float32(0.5)"),
          pytest.raises(AssertionError, match="only what makes no new array")):
        trained(monkeypatch, {"binarise": "threshold"}, by_graphs=True)
