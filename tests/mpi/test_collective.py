"""Replicas that meet every so often, in one process: formulas, whole runs, and runs that stop and go on."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.errors import UserError
from gpudbn.mpi import collective
from gpudbn.mpi.collective import Averaging, Elastic
from gpudbn.mpi.costs import Costs
from gpudbn.mpi.machine import Machine
from gpudbn.mpi.virtual import run
from tests import pretend_cupy
from tests.helpers import assert_close, assert_notices
from tests.test_loop import small_settings, timeless, training

OUTERS = {"average": Averaging, "nesterov": partial(Averaging, rate=0.7, momentum=0.9), "elastic": Elastic}


def together(ranks, program):
    """``program(wire)`` on each of the ranks; what they return, in order."""
    return run(Machine(ranks, Costs()), program)


def plain(outer, steps):
    """The formulas in float64: steps (meetings, replicas, size) -> what each replica has after each meeting; what is
    measured."""
    replicas = steps.shape[1]
    common, velocity = np.ones(steps.shape[2]), 0.0
    own, found = [common] * replicas, []
    for step in steps:
        own = [x + s for x, s in zip(own, step, strict=True)]
        mean = sum(x - common for x in own) / replicas
        if outer == "elastic":  # alpha = 0.9 / replicas; Zhang et al., equations 2.3 and 2.4
            own = [x - 0.9 / replicas * (x - common) for x in own]
            common = (1 - 0.9) * common + 0.9 * (mean + common)
        elif outer == "nesterov":  # as torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True) on minus the mean
            velocity = 0.9 * velocity + mean
            common = common + 0.7 * (mean + 0.9 * velocity)
            own = [common] * replicas
        else:
            common = np.mean(own, axis=0)
            own = [common] * replicas
        found.append(own)
    return np.array(found), common


def check_formulas(outer):
    steps = np.random.default_rng(5).standard_normal((7, 3, 11)).astype(np.float32)

    def replica(wire):
        exchange = OUTERS[outer](wire)
        parameters = np.full(11, 1.0 if exchange.chief else -7.0, np.float32)
        exchange.begin(parameters)
        before, found = parameters.copy(), []
        for step in steps[:, wire.rank]:
            parameters += step
            exchange.exchange(parameters, before)
            found.append(parameters.copy())
        exchange.meet(parameters)
        measured = parameters.copy()
        exchange.part(parameters)
        assert np.array_equal(parameters, found[-1]), "where it goes on"
        assert exchange.report()["meetings"] == 7
        exchange.close()
        return np.array(found), measured

    found = together(3, replica)
    expected, common = plain(outer, steps)
    for rank, (values, measured) in enumerate(found):
        assert_close(values, expected[:, rank], atol=2e-5)
        assert np.array_equal(measured, found[0][1]), "the same bits are measured everywhere"
        assert_close(measured, common, atol=2e-5)


@pytest.mark.parametrize("outer", OUTERS)
def test_meetings_are_those_of_the_papers(outer):
    check_formulas(outer)


@pytest.mark.parametrize(("outer", "line", "fault"), [
    ("average", "change *= np.float32(1 / self.replicas)", "change *= np.float32(1)"),
    ("nesterov", "change += self._velocity * np.float32(self.momentum)", "change[...] = self._velocity"),
    ("elastic", "self._centre += pull", "self._centre += pull * np.float32(0.5)"),
])
def test_another_formula_is_noticed(outer, line, fault):
    assert_notices(lambda: check_formulas(outer), collective, line, fault)


@pytest.mark.parametrize("outer", OUTERS)
def test_arrays_on_a_gpu_meet_as_those_on_the_host_do(outer):
    """The copies to the host that MPI wants are the wire's."""
    steps = np.random.default_rng(6).standard_normal((3, 11)).astype(np.float32)

    def replica(wire, asarray):
        exchange = OUTERS[outer](wire)
        parameters = asarray(np.full(11, 2, np.float32))
        exchange.begin(parameters)
        exchange.restore({name: np.full(11, 3, np.float32) for part in exchange.state() for name in part})
        exchange.part(parameters)
        before = parameters.copy()
        for step in steps:
            parameters += asarray(step)
            exchange.exchange(parameters, before)
        exchange.meet(parameters)
        return to_cpu(parameters), to_cpu(before)

    (expected,) = together(1, lambda wire: replica(wire, np.asarray))
    with pretend_cupy.installed() as device:
        (found,) = together(1, lambda wire: replica(wire, to_gpu))
        assert len(device.copies("to host")) == 1 + len(steps) + 2, "the wire's, and what the test asks for"
    assert all(map(np.array_equal, found, expected))


def finished(outer, stop=None, **options):
    """Records and arrays of each replica of a run of three; ``stop``: after so many epochs, to be resumed by others."""
    settings = small_settings(mode="local", outer=outer, period=2, **options)

    def whole(wire):
        run = training(settings, exchange=OUTERS[outer](wire))
        return list(run.run()), run.dbn.arrays()

    def begun(wire):
        run = training(settings, exchange=OUTERS[outer](wire))
        return list(itertools.islice(run.run(), stop)), run.state()

    def ended(wire, before):
        run = training(settings, exchange=OUTERS[outer](wire))
        run.restore(*before[0][1])
        return before[wire.rank][0] + list(run.run()), run.dbn.arrays()

    if stop is None:
        return together(3, whole)
    before = together(3, begun)
    return together(3, lambda wire: ended(wire, before))


@pytest.mark.parametrize("outer", OUTERS)
def test_a_run_stopped_after_any_epoch_ends_with_the_bits_of_one_that_never_stopped(outer):
    options = {"method": "pcd", "centring": "data", "optimiser": "sgd"}
    expected = finished(outer, **options)
    records, arrays = expected[0]
    assert sum(r["phase"] == "finetune" for r in records) >= 3
    for other, others in expected[1:]:
        assert timeless(other) == timeless(records), "all measure the same"
        assert all(np.array_equal(array, others[name]) for name, array in arrays.items())
    for stop in range(1, len(records)):
        for found, others in finished(outer, stop, **options):
            assert timeless(found) == timeless(records), f"stopped after {stop} epochs"
            for name, array in arrays.items():
                assert np.array_equal(array, others[name]), f"stopped after {stop} epochs: {name}"


@pytest.mark.parametrize(("outer", "lost"), [("elastic", "own"), ("nesterov", "outer_velocity")])
def test_what_an_exchange_keeps_is_needed_to_go_on(outer, lost, monkeypatch):
    expected = finished(outer)
    kind = Elastic if outer == "elastic" else Averaging
    restore = kind.restore
    monkeypatch.setattr(kind, "restore", lambda self, arrays: restore(self, arrays | {lost: arrays[lost] * 0}))
    (_, arrays), *_ = finished(outer, stop=2)
    assert any(not np.array_equal(array, arrays[name]) for name, array in expected[0][1].items())


def test_one_replica_that_is_averaged_is_one_alone():
    settings = small_settings(mode="local", period=3)
    (arrays,) = together(1, lambda wire: _arrays(training(settings, exchange=Averaging(wire))))
    alone = _arrays(training(settings))
    for name, array in alone.items():
        assert_close(arrays[name], array, atol=1e-6)


def _arrays(run):
    list(run.run())
    return run.dbn.arrays()


def test_a_run_cannot_go_on_with_another_number_of_replicas():
    settings = small_settings(mode="local")

    def begun(wire):
        run = training(settings, exchange=Averaging(wire))
        next(run.run())
        return run.state()

    state, _, _ = together(3, begun)
    with pytest.raises(UserError, match="got 1 replicas for a run with 3 replicas on rows of their own"):
        training(settings).restore(*state)
