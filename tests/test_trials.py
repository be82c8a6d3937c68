"""The quickest path is taken, by a clock that is pretended; trials change no bit of the run, and are remembered."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from gpudbn import loop, trials
from gpudbn.cuda import persistent
from gpudbn.loop import Training
from gpudbn.paths import Case, choose_path, quickest
from tests.cuda_on_cpu import runtime
from tests.helpers import planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import finished, on_device, strong, training
from tests.test_loop import Slice

NO_KERNELS = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")
SAMPLES = {"precision": "bf16x2", "binarise": "stochastic"}  # so that persistent is a rival
PLAIN = {"precision": "fp32"}  # so that unfused is


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Each test begins without what others have timed, and tries two updates at a time."""
    monkeypatch.setattr(trials, "_known", {})
    monkeypatch.setattr(trials, "WORK", 1.0)


@contextmanager
def timing(*order):
    """A pretended device on which trials find these paths slower and slower; yields it and the paths that are tried."""
    tried, true = [], Training.trial

    def trial(self, path, *rest):
        tried.append(path.name)
        return true(self, path, *rest)

    with installed() as device, pytest.MonkeyPatch.context() as patch:
        now = itertools.count()  # each event is so many microseconds after the one before it
        device.clock = lambda: next(now) * 2e-6 * (1 + order.index(tried[-1]))
        patch.setattr(Training, "trial", trial)
        yield device, tried


def settings(**options):
    return strong(**{"kernels": "auto", "finetune_epochs": 0, "epochs": 2, **options})


def same(one, other):
    return all(np.array_equal(array, other[name]) for name, array in one.items())


def forced(path, options, state=None):
    with installed():
        run = on_device(settings(**options, kernels=path))
        if state:
            run.restore(*state)
        return finished(run)[0].dbn.arrays()


# ------------------------------------------------------------------------------------------------ the choice

LAYER = Case("layer 1", precision="bf16x2", updates=600)


@pytest.mark.parametrize(("changes", "rivals"), [
    ({}, ["graph", "persistent", "fused"]),
    ({"last_means": True}, ["graph", "persistent", "fused"]),
    ({"rounded": "--up mean"}, ["graph", "fused"]),
    ({"fits": False}, ["graph", "fused"]),
    ({"precision": "fp32"}, ["graph", "fused", "unfused"]),
    ({"precision": "exact"}, ["graph", "fused", "unfused"]),
    ({"precision": "bf16"}, ["graph", "fused"]),
    ({"precision": "bf16", "architecture": "sm_90"}, ["wgmma", "graph", "fused"]),
    ({"architecture": "sm_90"}, ["graph", "persistent", "fused"]),
    ({"updates": 1}, ["persistent", "fused"]),
    ({"host_between": "other replicas", "precision": "fp32"}, []),
    ({"finetune": True, "precision": "fp32"}, ["fused", "unfused"]),
    ({"finetune": True, "precision": "fp32", "host_between": "other replicas"}, []),
    ({"gpu": False}, []),
])
def test_rivals_are_those_that_can_be_taken_and_are_as_exact_as_promised(changes, rivals):
    case = Case(**{**vars(LAYER), **changes})
    assert [path.name for path in choose_path("auto", case).rivals] == rivals
    assert choose_path("predicted", case).rivals == ()
    assert str(choose_path("predicted", case)) == str(choose_path("auto", case))


def test_reasons_tell_times_and_failures():
    path = choose_path("auto", LAYER)
    found = quickest(path, {"graph": 12.3456, "fused": 5.0}, {"persistent": "it broke"})
    assert str(found) == "fused (timed, us an update: fused 5, graph 12.35; persistent failed: it broke)"
    assert not found.graph
    assert quickest(path, {"graph": 1.0, "fused": 2.0}, {}).graph
    assert str(quickest(path, {}, {"fused": "no"})) == "graph (the first choice; fused failed: no)"
    path = choose_path("auto", replace(LAYER, last_means=True))
    assert str(quickest(path, {"graph": 2.0, "persistent": 1.0}, {"fused": "no"})) == (
        "persistent (timed, us an update: persistent 1, graph 2; last hidden means as float16; fused failed: no)")


@NO_KERNELS
def test_a_run_tells_what_would_be_rounded(monkeypatch):
    with installed():
        told = []
        monkeypatch.setattr(loop, "choose_path", lambda asked, case: told.append(case) or choose_path(asked, case))
        for options, rounded in [(SAMPLES, [None, None]),
                                 ({"up": "mean", "last_hidden": "sample"}, ["data of any numbers", "--up mean"])]:
            on_device(settings(**options))
            assert [case.rounded for case in told] == rounded
            assert {case.last_means for case in told} == {"last_hidden" not in options}
            told.clear()


# -------------------------------------------------------------------------------------------------- whole runs


@NO_KERNELS
@pytest.mark.parametrize(("path", "options"), [
    ("graph", {**SAMPLES, "method": "pcd"}), ("persistent", SAMPLES),
    ("persistent", {**SAMPLES, "last_hidden": "sample"}), ("fused", {**PLAIN, "centring": "data"}),
    ("unfused", PLAIN)])
def test_the_quickest_path_is_taken_and_the_run_is_its(path, options):
    rivals = ["graph", "persistent", "fused"] if options["precision"] == "bf16x2" else ["graph", "fused", "unfused"]
    order = sorted(rivals, key=lambda name: name != path)
    with timing(*order) as (_, tried):
        run, records = finished(on_device(settings(**options)))
        found = run.dbn.arrays()
    assert tried == rivals * 2, "each once a layer"
    assert same(found, forced(path, options))
    told = ", ".join(f"{name} {time}" for name, time in zip(order, (1, 2, 3), strict=True))
    means = "; last hidden means as float16" if path == "persistent" and "last_hidden" not in options else ""
    assert {record["path"] for record in records[:-1]} == {f"{path} (timed, us an update: {told}{means})"}


def check_continued(options):
    """A run goes on from parameters, velocity and chains of another device, where a path has to be found first."""
    first = training(np, settings(**options, kernels="auto"))
    list(itertools.islice(first.run(), 1))
    state = first.state()
    assert "phase.path" not in state[0]
    with timing("graph", "persistent", "fused") as (_, tried):
        run = on_device(settings(**options))
        run.restore(*state)
        found = finished(run)[0].dbn.arrays()
    assert tried
    assert same(found, forced("graph", options, state))


@NO_KERNELS
def test_a_trial_changes_nothing_of_a_run_that_goes_on():
    check_continued({**SAMPLES, "method": "pcd", "k": 2})


@NO_KERNELS
@pytest.mark.parametrize(("line", "fault"), [
    ("scratch = RBM(rbm.n, rbm.m, self.dbn.xp, rbm.shards)", "scratch = rbm"),
    ("other = copy.copy(self)", "other = self"),
])
def test_a_trial_that_changes_something_is_noticed(line, fault):
    with planted(loop, line, fault), pytest.raises((AssertionError, IndexError)):
        check_continued(SAMPLES)


TUNED = {"layers": (11,), "epochs": 1, "finetune_epochs": 3, "optimiser": "sgd"}


@NO_KERNELS
@pytest.mark.parametrize("options", [TUNED, {**TUNED, "finetune": "autoencoder", "optimiser": "cg", "code": "linear"}])
@pytest.mark.parametrize("path", ["fused", "unfused"])
def test_fine_tuning_takes_the_quicker_too(path, options):
    with timing(*sorted(["fused", "unfused", "graph"], key=lambda name: name != path)) as (_, tried):
        run, records = finished(on_device(settings(**options)))
        found = run.dbn.arrays()
    assert tried[-2:] == ["fused", "unfused"]
    assert records[-2]["path"].startswith(f"{path} (timed, us an update: {path} 1, ")
    assert same(found, forced(path, options))


def check_tuned_on():
    """From a network of NumPy's, whose path has to be found."""
    first = training(np, settings(**TUNED, kernels="auto"))
    list(itertools.islice(first.run(), 2))
    state = first.state()
    with timing("fused", "unfused") as (_, tried):
        run = on_device(settings(**TUNED))
        run.restore(*state)
        found = finished(run)[0].dbn.arrays()
    assert tried == ["fused", "unfused"]
    assert same(found, forced("fused", TUNED, state))


@NO_KERNELS
def test_a_trial_changes_nothing_of_a_network_that_is_tuned_on():
    check_tuned_on()
    with planted(loop, "self.dbn.classifier = self.dbn.autoencoder = None", "pass"), pytest.raises(AssertionError):
        check_tuned_on()


@NO_KERNELS
def test_a_stopped_run_goes_on_by_the_path_it_had():
    options = {**SAMPLES, "epochs": 3}
    with timing("persistent", "graph", "fused"):
        whole, expected = finished(on_device(settings(**options)))
        first = on_device(settings(**options))
        before = list(itertools.islice(first.run(), 2))
        state, about = first.state()
    trials._known.clear()
    with timing("fused", "graph", "persistent") as (_, tried):
        second = on_device(settings(**options))
        second.restore(state, json.loads(json.dumps(about)))
        going = second.run()
        after = [next(going)]
        assert tried == [], "the layer goes on"
        assert [r["path"] for r in before + after] == [r["path"] for r in expected[:3]]
        list(going)
        assert set(tried) == {"graph", "persistent", "fused"}, "the next layer is another case"
    assert whole.updates == second.updates
    assert np.array_equal(second.dbn.layers[0].parameters.flat.get(), whole.dbn.layers[0].parameters.flat.get())


@NO_KERNELS
@pytest.mark.parametrize(("options", "exchange"), [
    ({"kernels": "predicted"}, None), ({"kernels": "graph"}, None), ({"order": "fixed"}, None), ({"epochs": 0}, None),
    ({}, Slice(0, 2)), ({"batch": 60}, None)])
def test_where_there_is_nothing_to_choose_nothing_is_tried(options, exchange):
    with timing() as (_, tried):
        finished(on_device(settings(**options), exchange))
    assert tried == []


@NO_KERNELS
def test_a_path_that_fails_is_left_out_and_tried_again():
    line = "rows, _ = self._check(\"cd_run\", \"v\", v, \"rows\", n)"
    with timing("persistent", "graph", "fused") as (_, tried), planted(persistent, line, "raise OSError('it broke')"):
        for _ in range(2):
            _, records = finished(on_device(settings(**SAMPLES, layers=(11,))))
            assert records[0]["path"] == ("graph (timed, us an update: graph 2, fused 3; "
                                          "persistent failed: OSError: it broke)")
    assert tried == ["graph", "persistent", "fused"] * 2


@NO_KERNELS
def test_where_all_fail_the_prediction_holds(monkeypatch):
    monkeypatch.setattr(trials, "timed", lambda *_: 1 // 0)
    with installed():
        _, records = finished(on_device(settings(layers=(11,))))
    assert records[0]["path"].startswith("graph (the first choice; graph failed: ZeroDivisionError: integer ")


# ---------------------------------------------------------------------------------------------- what is remembered


def tried_in(options, *, process="another"):
    """What a run tries: of this process, or of another, which knows what is in the file."""
    if process == "another":
        trials._known.clear()
    with timing("fused", "graph", "unfused") as (_, tried):
        _, records = finished(on_device(settings(layers=(11,), epochs=1, **options)))
        assert records[0]["path"] == "fused (timed, us an update: fused 1, graph 2, unfused 3)"
        return tried


@NO_KERNELS
def test_equal_cases_are_timed_once(tmp_path, monkeypatch):
    file = tmp_path / "of" / "paths.json"
    monkeypatch.setenv("GPUDBN_PATHS", str(file))
    assert tried_in({})
    assert tried_in({}, process="this") == []
    assert tried_in({}) == []
    (times,) = json.loads(file.read_text()).values()
    assert times == pytest.approx({"graph": 2.0, "fused": 1.0, "unfused": 3.0})
    assert tried_in({"seed": 5, "learning_rate": 0.1}) == []
    for other in ({"k": 2}, {"batch": 9}, {"method": "pcd"}, {"momentum": 0.0}, {"centring": "data"}):
        assert tried_in(other), other
    assert len(json.loads(file.read_text())) == 6
    assert tried_in({}) == []
    monkeypatch.setenv("GPUDBN_PATHS", "")
    assert tried_in({}), "no file"


@NO_KERNELS
@pytest.mark.parametrize("times", [
    None, [], {}, {"graph": 2.0, "fused": 1.0}, {"graph": 2.0, "fused": "1", "unfused": 3.0},
    {"graph": 2.0, "fused": float("nan"), "unfused": 3.0}, {"graph": 2.0, "fused": True, "unfused": 3.0}])
def test_times_that_cannot_be_are_taken_anew(tmp_path, monkeypatch, times):
    file = tmp_path / "paths.json"
    monkeypatch.setenv("GPUDBN_PATHS", str(file))
    tried_in({})
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: times}))
    assert tried_in({})
    assert tried_in({}) == []


@NO_KERNELS
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_file_that_is_none_is_written_anew(tmp_path, monkeypatch, content):
    file = tmp_path / "paths.json"
    file.write_bytes(content)
    monkeypatch.setenv("GPUDBN_PATHS", str(file))
    assert tried_in({})
    assert tried_in({}) == []


@NO_KERNELS
def test_a_file_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GPUDBN_PATHS", str(tmp_path / "file" / "paths.json"))
    assert tried_in({})
    assert tried_in({})


def test_the_file_is_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.delenv("GPUDBN_PATHS")
    monkeypatch.delenv("GPUDBN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(trials._file()) == "/somewhere/gpudbn/paths.json"
    monkeypatch.setenv("GPUDBN_DATA", "/elsewhere")
    assert str(trials._file()) == "/elsewhere/paths.json"


def test_a_turn_of_a_trial_is_shorter_for_large_layers(monkeypatch):
    monkeypatch.setattr(trials, "WORK", 1e13)
    assert [trials.updates_of(10 * B * n * m, 50) for n, m, B in
            ((784, 500, 100), (4096, 4096, 1024), (16384, 16384, 4096), (8192, 8192, 2048))] == [50, 50, 2, 7]


@NO_KERNELS
def test_a_replica_alone_measures_too():
    """An asynchronous replica times its own turns, which are short."""
    class Asynchronous(Slice):
        cuts_batches = False

        def __init__(self):
            super().__init__(1, 2)

    with timing("graph", "fused", "unfused") as (_, tried):
        run, _ = finished(on_device(settings(n_push=2, batch=5), Asynchronous()))
    assert tried == ["graph", "fused", "unfused"] * 2
    assert run.paths[0].graph
