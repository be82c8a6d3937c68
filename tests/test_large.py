"""Large layers by wgmma in the trainer, on a pretended device: what NumPy comes to with the same ``--precision``.

The emulation of wgmma is slow: a few updates are the kernels', whole runs are of their twins in their place
(``tests/cuda/test_wgmma.py`` holds one to the other).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpudbn import large, memory, reference, trials
from gpudbn.cuda.wgmma import Wgmma
from gpudbn.errors import UserError
from gpudbn.loop import Training
from gpudbn.paths import Case, choose_path
from gpudbn.precision import from_bf16, round_to_bf16
from tests import pretend_cupy
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close, planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import finished, on_device, strong, training
from tests.test_loop import Slice
from tests.test_paths import paths
from tests.test_trials import timing

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

WGMMA = ("half_step_wgmma", "cd_update_wgmma")
SAMPLES = {"finetune_epochs": 0, "last_hidden": "sample"}  # all units 0 or 1: bf16 takes nothing from them
RATE = 0.5
BY_TWINS = pytest.mark.usefixtures("twins")


@pytest.fixture(autouse=True)
def encode(monkeypatch):
    monkeypatch.setattr(Wgmma, "encode", staticmethod(runtime.encode))


@pytest.fixture
def twins(monkeypatch):
    """The twins in the place of the kernels: in the stream, and in graphs."""
    def of(name):
        def launch(self, *arrays, **named):
            self._demand(name)
            given = [getattr(a, "_memory", a) for a in arrays]
            by_name = {key: getattr(a, "_memory", a) for key, a in named.items()}

            def kernel():
                pretend_cupy.device.launched.append(name)
                getattr(reference, name)(*given, **by_name)

            pretend_cupy.device.launch(kernel)
        return launch

    for name in WGMMA:
        monkeypatch.setattr(Wgmma, name, of(name))


def trained(options, exchange=None, *, by_graphs=True, turn=2):
    """All arrays after a run by wgmma, and how many graphs were launched."""
    with installed() as device, pytest.MonkeyPatch.context() as patch:
        device.capability = "90"
        patch.setattr("gpudbn.loop.TURN", turn)
        if not by_graphs:
            patch.setattr(Training, "_make_graphs", lambda *_: None)
        run, records = finished(on_device(strong(**{**SAMPLES, "kernels": "wgmma", **options}), exchange))
        assert set(WGMMA) <= set(device.launched)
        assert "cd_update" not in device.launched
        assert all(record["path"].startswith("wgmma") for record in records[:-1])
        return run.dbn.arrays(), device.graphs


def by_numpy(options, exchange=None):
    return finished(training(np, strong(**{**SAMPLES, **options}), exchange))[0].dbn.arrays()


def furthest(one, other):
    return max(np.abs(one[name] - array).max() for name, array in other.items())


# ------------------------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("options", [
    {"precision": "bf16"},
    {"precision": "bf16x2", "last_hidden": "mean", "data_hidden": "mean"},
    {"precision": "bf16x2", "k": 3, "reconstruction": "mean"},
    {"precision": "bf16", "method": "pcd", "last_hidden": "mean"},
])
def test_updates_by_the_kernels_are_those_of_numpy(options):
    """Two updates, the second of a short batch: all samples are the same, and means are rounded to bf16."""
    options = {"layers": (11,), "batch": 26, "epochs": 1, **options}
    found, _ = trained(options)
    expected = by_numpy(options)
    means = "mean" in (options.get("last_hidden"), options.get("data_hidden"), options.get("reconstruction"))
    assert furthest(found, expected) < (2 * RATE * 2.0**-8 if means else 1e-6)  # a sample that differs: 0.5 / 26
    assert max(np.abs(array).max() for array in found.values()) > 0.1, "nothing was learned, nothing was shown"


# ------------------------------------------------------------------------------------------------- whole runs

RUNS = [{"precision": "bf16"}, {"precision": "bf16x2", "k": 3, "decay": 0.0},
        {"precision": "bf16", "method": "pcd", "k": 2}]


@BY_TWINS
@pytest.mark.parametrize("options", RUNS)
def test_a_whole_run_ends_where_the_numpy_run_ends(options):
    found, graphs = trained(options)
    expected = by_numpy(options)
    for name, array in expected.items():
        assert_close(found[name], array, atol=1e-4)
    assert max(np.abs(array).max() for array in found.values()) > 0.3
    assert graphs > 0


@BY_TWINS
@pytest.mark.parametrize("options", [
    *RUNS,
    {"precision": "bf16x2", "data_hidden": "mean", "last_hidden": "mean", "reconstruction": "mean"},
    {"precision": "bf16", "method": "pcd", "data_hidden": "mean", "last_hidden": "mean", "binarise": "stochastic"}])
def test_graphs_give_the_bits_of_launches_one_by_one(options):
    found, graphs = trained(options)
    expected, none = trained(options, by_graphs=False)
    assert furthest(found, expected) == 0
    assert graphs == 2 * (2 * (51 // options.get("batch", 8) // 2) - 1)
    assert none == 0


@BY_TWINS
@pytest.mark.parametrize("options", [{"precision": "bf16x2"}, {"precision": "bf16", "method": "pcd"}])
def test_a_stopped_run_goes_on_with_the_same_bits(options):
    settings = strong(**{**SAMPLES, "kernels": "wgmma", **options})
    with installed() as device:
        device.capability = "90"
        whole, _ = finished(on_device(settings))
        for stop in (1, 3):
            first = on_device(settings)
            list(itertools.islice(first.run(), stop))
            state, about = first.state()
            assert {array.dtype for name, array in state.items() if name.startswith("phase")} == {np.dtype(np.float32)}
            if "phase.chains@0" in state:
                assert set(np.unique(state["phase.chains@0"])) == {0, 1}
            second = on_device(settings)
            second.restore(state, about)
            list(second.run())
            assert furthest(second.dbn.arrays(), whole.dbn.arrays()) == 0


@BY_TWINS
def test_where_wgmma_is_the_quickest_the_run_is_its(monkeypatch):
    monkeypatch.setattr(trials, "_known", {})
    options = {"precision": "bf16", "epochs": 1}
    with timing("wgmma", "graph", "fused") as (device, tried):
        device.capability = "90"
        run, records = finished(on_device(strong(**{**SAMPLES, **options}, kernels="auto")))
        found = run.dbn.arrays()
    assert tried == ["wgmma", "graph", "fused"] * 2
    assert records[0]["path"] == "wgmma (timed, us an update: wgmma 0.3333, graph 0.6667, fused 1)"
    expected, _ = trained(options, turn=50)
    assert furthest(found, expected) == 0


class Halving(Slice):
    """An asynchronous replica whose parameters others halve between its turns."""

    cuts_batches, shards_rows = False, True

    def __init__(self):
        super().__init__(1, 2)

    def exchange(self, parameters, before, *, fetch):  # noqa: ARG002
        parameters *= np.float32(0.5)


def check_halved(options):
    options = {"layers": (11,), "n_push": 2, "batch": 5, **options}
    found, _ = trained(options, Halving())
    assert furthest(found, by_numpy(options, Halving())) < 1e-4


@BY_TWINS
def test_what_others_change_is_in_the_next_update():
    check_halved({"precision": "bf16"})
    check_halved({"precision": "bf16x2", "method": "pcd"})


@BY_TWINS
@pytest.mark.parametrize(("line", "fault", "options"), [
    ("self.copies.renew()", "pass", {}),
    ("self.twins.to_float(*(each[chains] for each in reversed(self.pair)))", "pass", {"method": "pcd"}),
    ("self.twins.to_bf16(self.v[:rows], self.data[:rows])", "pass", {}),
    ("W_low=self.low, **address)", "W_low=self.low, **{**address, 'site': 7})", {}),
    ("W_low=self.low, transpose=True, **address)", "W_low=self.low, transpose=True, **{**address, 'row': 0})", {}),
    ("else self.rates)", "else None)", {"epochs": 3}),
])
def test_faults_are_noticed(line, fault, options):
    with planted(large, line, fault), pytest.raises(AssertionError):
        check_halved({"precision": "bf16", **options})


def check_copies():
    with installed() as device:
        device.capability = "90"
        run = on_device(strong(**SAMPLES, kernels="wgmma", precision="bf16x2"))
        next(run.run())
        W, high, low = (a.get() for a in (run.phase.rbm.W, run.phase.copies.high, run.phase.copies.low))
    assert np.array_equal(high, round_to_bf16(W))
    assert np.array_equal(low, round_to_bf16(W - from_bf16(high)))


@BY_TWINS
def test_the_step_keeps_both_copies():
    check_copies()
    with (planted(large, "W_low=self.copies.low, model_weight=piece", "model_weight=piece"),
          pytest.raises(AssertionError)):
        check_copies()


# ------------------------------------------------------------------------------------------------ the choice

HOPPER = Case("layer 1", precision="bf16", architecture="sm_90", tiles=128, processors=132)


def case(**changes):
    return Case(**{**vars(HOPPER), **changes})


@pytest.mark.parametrize(("asked", "changes", "expected", "graph"), [
    ("auto", {}, "wgmma (the first choice)", True),
    ("auto", {"updates": 1},
     "wgmma (no graph: an epoch has 1 full batches, and nothing repeats)", False),
    ("auto", {"tiles": 66}, "wgmma (the first choice)", True),
    ("auto", {"tiles": 65}, "graph (no wgmma: 65 tiles are too few for 132 processors)", True),
    ("auto", {"architecture": "sm_100"}, "graph (the first choice)", True),
    ("auto", {"precision": "bf16x2"}, "graph (the first choice)", True),
    ("wgmma", {"precision": "bf16x2"}, "wgmma (--kernels)", True),
    ("auto", {"precision": "fp32"}, "graph (the first choice)", True),
    ("auto", {"offsets": True},
     "graph (no wgmma: --centring and --sparsity-target need sums that its step does not make)", True),
    ("auto", {"host_between": "--order fixed"},
     "fused (no wgmma: --order fixed must act within each update; no graph: --order fixed must act within each update)",
     False),
    ("wgmma", {"tiles": 1}, "wgmma (--kernels)", True),
    ("wgmma", {"tiles": 1, "updates": 1},
     "wgmma (--kernels; no graph: an epoch has 1 full batches, and nothing repeats)", False),
    ("wgmma", {"finetune": True, "precision": "fp32"}, "fused (no wgmma: it has no kernels of fine-tuning)", False),
    ("graph", {}, "graph (--kernels)", True),
])
def test_the_rule(asked, changes, expected, graph):
    path = choose_path(asked, case(**changes))
    assert (str(path), path.graph) == (expected, graph)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"precision": "fp32"}, "--precision fp32 is not bf16 or bf16x2"),
    ({"precision": "tf32"}, "--precision tf32 is not bf16 or bf16x2"),
    ({"precision": "exact"}, "--precision exact is not bf16 or bf16x2"),
    ({"architecture": "sm_80"}, "the GPU is sm_80, and sm_90 has it alone"),
    ({"host_between": "other shards"}, "other shards must act within each update"),
    ({"offsets": True}, "--centring and --sparsity-target need sums that its step does not make"),
])
def test_what_is_asked_for_and_cannot_be_is_refused(changes, reason):
    with pytest.raises(UserError, match=f"must be a path that layer 1 can take; got wgmma, but {reason}. Use auto"):
        choose_path("wgmma", case(**changes))


def test_a_run_tells_the_case_as_it_is():
    for processors, capability, options, expected in [
            (2, "90", {"precision": "bf16"}, ["wgmma", "wgmma", "fused"]),
            (3, "90", {"precision": "bf16"}, ["graph", "graph", "fused"]),
            (1, "90", {"precision": "bf16", "batch": 20, "layers": (300, 257)}, ["wgmma", "wgmma", "fused"]),
            (4, "90", {"precision": "bf16", "layers": (300, 257)}, ["graph", "wgmma", "fused"]),
            (1, "80", {"precision": "bf16"}, ["graph", "graph", "fused"]),
            (1, "90", {"precision": "auto"}, ["graph", "graph", "fused"]),
            (1, "90", {"precision": "auto", "kernels": "wgmma"}, ["wgmma", "wgmma", "fused"]),
            (1, "90", {"precision": "bf16x2", "centring": "data"}, ["graph", "graph", "fused"]),
            (1, "90", {"precision": "bf16x2", "sparsity_target": 0.1}, ["graph", "graph", "fused"]),
            (1, "90", {}, ["graph", "graph", "fused"])]:
        with installed(processors) as device:
            import cupy

            device.capability = capability
            assert paths(cupy, **options) == expected, (processors, capability, options)


def test_the_copies_are_counted():
    counted = [memory.model_bytes(strong(finetune_epochs=0, **options), [13, 11, 7], 0).get("copies in bf16")
               for options in ({}, {"precision": "bf16"}, {"precision": "bf16x2"}, {"precision": "auto"},
                               {"precision": "bf16x2", "kernels": "graph"})]
    assert counted == [0, 2 * 13 * 11, 4 * 13 * 11, 4 * 13 * 11, 0]
