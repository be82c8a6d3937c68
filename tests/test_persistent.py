"""A turn of updates as one launch, on a pretended device: what the twin does in NumPy, whatever the options."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from gpudbn import loop, pretrain
from gpudbn.data import Rows
from gpudbn.paths import Path
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close, planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import finished, on_device, strong, training
from tests.test_graphs import Asynchronous

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

TOLERANCE = 1e-4  # as in test_gpu_path: no sample differs, so the runs differ by the rounding of sums
OPTIONS = [
    {},
    {"k": 3, "last_hidden": "sample", "up": "mean", "decay": 0.0, "momentum": 0.0},
    {"binarise": "stochastic", "batch": 7},
    {"method": "pcd", "k": 2, "binarise": "threshold"},
]


def settings(**options):
    return strong(**{"precision": "auto", "kernels": "persistent", "finetune_epochs": 0, "epochs": 2, **options})


def by_the_twin(options, exchange=None):
    """The run in NumPy, with ``reference.cd_run`` in the place of the launch."""
    made = training(np, settings(**options, kernels="auto"), exchange)
    made.paths = [Path("persistent", "a test")] * len(made.paths)
    return finished(made)[0].dbn.arrays()


def check(options, exchange=None):
    expected = by_the_twin(options, exchange)
    with installed() as device:
        run, records = finished(on_device(settings(**options), exchange))
        found, launched = run.dbn.arrays(), list(device.launched)
    means = "" if options.get("last_hidden") == "sample" else "; last hidden means as float16"
    assert {record["path"] for record in records[:-1]} == {f"persistent (--kernels{means})"}
    assert "cd_run" in launched
    assert not {"cd_update", "momentum_step"} & set(launched)
    for name, array in expected.items():
        assert_close(found[name], array, atol=TOLERANCE)
    return launched


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_of_turns_ends_where_the_twin_ends(options):
    check(options)


def test_the_turns_of_an_asynchronous_replica(monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 2)
    check({"method": "pcd", "n_push": 2, "batch": 5}, Asynchronous())


def test_a_turn_of_the_first_layer_is_two_launches(monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 3)
    launched = check({"layers": (11,), "up": "mean", "epochs": 1})
    turns = 3  # 51 rows: six full batches and a short one
    assert launched.count("cd_run") == turns
    assert launched.count("half_step") + launched.count("half_step_transposed") < 10, "only measures have half-steps"


def test_a_stopped_run_goes_on_with_the_same_bits():
    options = {"method": "pcd", "epochs": 3}
    with installed():
        whole = finished(on_device(settings(**options)))[0].dbn.arrays()
        first = on_device(settings(**options))
        list(itertools.islice(first.run(), 2))
        state, about = first.state()
        second = on_device(settings(**options))
        second.restore(state, json.loads(json.dumps(about)))
        list(second.run())
        found = second.dbn.arrays()
    assert all(np.array_equal(found[name], array) for name, array in whole.items())


SAMPLES = [{"last_hidden": "sample"},
           {"method": "pcd", "k": 2, "last_hidden": "sample", "binarise": "stochastic", "batch": 7}]


def check_beside_launches(options):
    """The run by launches one by one; turns of four updates and of three, the last with a short batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TURN", 4)
        arrays = []
        for kernels in ("fused", "persistent"):
            with installed() as device:
                run, _ = finished(on_device(strong(**{**options, "finetune_epochs": 0}, kernels=kernels)))
                arrays.append(run.dbn.arrays())
                assert ("cd_run" in device.launched) == (kernels == "persistent")
                assert ("cd_update" in device.launched) == (kernels == "fused")
                assert run.updates == 2 * 2 * -(-51 // run.settings.batch)
    for name, array in arrays[0].items():
        assert_close(arrays[1][name], array, atol=TOLERANCE)


@pytest.mark.parametrize("options", SAMPLES)
def test_turns_in_one_launch_end_where_launches_one_by_one_end(options):
    """Samples alone cross the chip here, so that nothing is rounded that would not be otherwise."""
    check_beside_launches(options)


@pytest.mark.parametrize(("line", "fault"), [
    ("update=first.update + lo // self.batch", "update=first.update"),
    ("positions=positions[lo:hi],", "positions=positions[: hi - lo],"),
    ("chain_row=first.chain_row, rate=", "chain_row=1, rate="),
])
def test_a_turn_of_other_updates_is_noticed(line, fault):
    with pytest.raises(AssertionError), planted(pretrain, line, fault):
        check_beside_launches(SAMPLES[1])


@pytest.mark.parametrize(("array", "scale", "levels"), [
    (np.zeros((2, 3), np.uint8), 1 / 255, 255), (np.zeros((2, 3), np.uint8), 1 / 16, 16),
    (np.zeros((2, 3), np.uint8), 0.3, None), (np.zeros((2, 3), bool), 1.0, 1),
    (np.zeros((2, 3), np.float32), 1.0, None), (np.zeros((2, 3), np.uint8), 1.0, 1)])
def test_whole_numbers_are_known_as_such(array, scale, levels):
    assert Rows(array, scale).levels == levels


@pytest.mark.parametrize(("module", "line", "fault"), [
    (loop, "self.updates += end - first\n", "self.updates += 1\n"),
    (pretrain, "levels = 1 if samples else", "levels = 1 if rows else"),
])
def test_a_turn_that_does_something_else_is_noticed(module, line, fault, monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 2)
    options = {"momentum": 0.8, "up": "mean"}
    expected = by_the_twin(options)
    monkeypatch.setattr("tests.test_persistent.by_the_twin", lambda *_: expected)
    with planted(module, line, fault), pytest.raises(AssertionError):
        check(options)
