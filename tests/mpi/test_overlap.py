"""Exchanges beside the computation, in one process: what a turn works on, what is staler by one, who may call MPI."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.mpi import Plan, join, overlap
from gpudbn.mpi.overlap import Overlapped
from gpudbn.mpi.server import Server
from gpudbn.mpi.tally import Tally
from tests import pretend_cupy
from tests.helpers import assert_close, assert_notices
from tests.mpi import test_protocol
from tests.mpi.test_collective import together
from tests.mpi.test_protocol import FakeWindow, Job


def overlapped(monkeypatch, replicas, size, **options):
    """A job of such replicas, whose server takes changes only when the test says so."""
    monkeypatch.setattr(test_protocol, "Asynchronous", Overlapped)
    return Job(monkeypatch, replicas, size, **options)


def check_turns(monkeypatch):
    """Two replicas; powers of two tell whose change is in what."""
    with monkeypatch.context() as patch:
        job = overlapped(patch, 2, 40)
        (a, b), (p, before) = job.replicas, job.begin(40)

        def turn(one, value, **options):
            p[one.replica] += value
            one.exchange(p[one.replica], before[one.replica], **options)
            one._join()  # else a matter of luck what it finds
            assert np.array_equal(p[one.replica], before[one.replica])
            assert (p[one.replica] == p[one.replica][0]).all()
            return int(p[one.replica][0])

        assert turn(a, 1) == 1, "nothing is pulled yet"
        assert job.server._take()
        assert turn(b, 2) == 2
        assert job.server._take()
        assert turn(a, 4) == 1 + 4, "the pull behind the first push found zeros: 1 was on its way"
        assert job.server._take()
        assert turn(a, 8) == 1 + 2 + 4 + 8, "the one behind the second found 1 and 2"
        assert job.server._take()
        assert turn(b, 16) == 1 + 2 + 16
        assert job.server._take()
        assert (job.store.parameters == 1 + 2 + 4 + 8 + 16).all()
        # of the others' changes before it 2, 4 and 8 have not seen one, and 16 has not seen three
        assert job.store.header.staleness[:4].tolist() == [1, 3, 0, 1]
        for one in (a, b):
            one.meet(p[one.replica])
            assert (p[one.replica] == 31).all()
            before[one.replica][:] = p[one.replica]
        assert turn(a, 32, fetch=False) == 31 + 32
        assert job.server._take()
        assert turn(a, 64) == 31 + 32 + 64, "nothing was fetched"
        assert job.server._take()
        assert turn(b, 128) == 31 + 128, "what was fetched before the meeting is forgotten"
        assert job.server._take()
        assert turn(a, 256) == 31 + 32 + 64 + 256
        assert a.report()["beside"].keys() == {"transferring", "waiting"}


def test_a_turn_works_on_what_was_pulled_behind_the_last_push_but_one(monkeypatch):
    check_turns(monkeypatch)


@pytest.mark.parametrize(("line", "fault"), [
    ("link.add_missing(self._fetched[part], last[part])", "link.add_missing(self._fetched[part], 0 * last[part])"),
    ("self._fetched += self._change", "pass"),
    ("            link.base += 1\n", "            pass\n"),
    ("        self._pulled = False\n        super()._drain()", "        super()._drain()"),
    ("self._pulled, self._pulls = fetch, self._pulls + fetch", "self._pulled = True"),
])
def test_faults_are_noticed(line, fault, monkeypatch):
    assert_notices(lambda: check_turns(monkeypatch), overlap, line, fault)


def test_the_thread_pushes_while_the_replica_computes_and_no_two_call_mpi_at_once(monkeypatch):
    job = overlapped(monkeypatch, 1, 8)
    (one,), ((p,), (before,)) = job.replicas, job.begin(8)
    inside, computed = threading.Lock(), threading.Event()

    def alone(method):
        def call(*arguments):
            assert inside.acquire(blocking=False), "two at once"
            try:
                return method(*arguments)
            finally:
                inside.release()
        return call

    def put(self, array, offset):
        assert threading.current_thread() is not threading.main_thread()
        assert computed.wait(5), "the replica waits for its own push"
        FakeWindow.memory.fget(self)[offset : offset + array.nbytes] = array.view(np.uint8)

    monkeypatch.setattr(FakeWindow, "put", alone(put))
    monkeypatch.setattr(FakeWindow, "get", alone(FakeWindow.get))
    p += 1
    one.exchange(p, before)  # comes back
    p += 2  # the next turn
    computed.set()
    one._join()
    assert job.server._take()
    one.exchange(p, before)
    one._join()
    assert job.server._take()
    one.meet(p)
    assert (p == 3).all()


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_call(monkeypatch):
    job = overlapped(monkeypatch, 1, 8)
    (one,), ((p,), (before,)) = job.replicas, job.begin(8)

    def fail(*_):
        raise RuntimeError("the network is gone")

    monkeypatch.setattr(FakeWindow, "put", fail)
    one.exchange(p, before)
    with pytest.raises(RuntimeError, match="the network is gone"):
        one.meet(p)
    assert all(link.wire.tally is one.wire.tally for link in one.links)


def test_bytes_count_and_the_threads_time_is_not_the_replicas(monkeypatch):
    job = overlapped(monkeypatch, 1, 8)
    (one,), ((p,), (before,)) = job.replicas, job.begin(8)
    one._beside = Tally()  # by the real clock
    sent = one.wire.tally.sent
    put = FakeWindow.put

    def slow(self, array, offset):
        one.links[0].wire.tally.sent += array.nbytes
        with one.links[0].wire.tally.timing("transferring"):
            threading.Event().wait(0.05)
        put(self, array, offset)

    monkeypatch.setattr(FakeWindow, "put", slow)
    one.exchange(p, before)
    threading.Event().wait(0.3)  # computes
    one._join()
    assert one.wire.tally.sent == sent + 32 + 64 + 8, "change, label, sequence number"
    report = one.report()
    assert report["seconds"]["transferring"] + report["seconds"]["waiting"] < 0.1 < report["beside"]["transferring"]


@pytest.mark.parametrize("push", ["dense", "float16"])
def test_arrays_on_a_gpu_exchange_as_those_on_the_host_do(push, monkeypatch):
    """What the thread does, here between two turns, sees arrays of the host alone."""
    class InTurn(Overlapped):
        def _run(self, work):
            with monkeypatch.context() as patch:
                patch.setattr(pretend_cupy.ndarray, "get", None)
                patch.setattr(pretend_cupy.ndarray, "set", None)
                work()

    monkeypatch.setattr(overlap, "Overlapped", InTurn)

    def program(wire, asarray):
        exchange = join(wire, Plan("async", push=push, overlap=True), 33)
        if isinstance(exchange, Server):
            return exchange.serve()["version"]
        p = asarray(np.zeros(33, np.float32))
        exchange.begin(p)
        before, rng = p.copy(), np.random.default_rng(3)
        for _ in range(4):
            p += asarray(rng.standard_normal(33).astype(np.float32))
            exchange.exchange(p, before)
        worked_on = to_cpu(p.copy())
        exchange.meet(p)
        exchange.close()
        return worked_on, to_cpu(p)

    version, expected = together(2, lambda wire: program(wire, np.asarray))
    assert version == 4
    with pretend_cupy.installed():
        _, found = together(2, lambda wire: program(wire, to_gpu))
    assert all(map(np.array_equal, found, expected))
    assert_close(expected[0], expected[1], atol=1e-2)
