"""Device memory as messages, with server and replicas in one process over an MPI that is late.

A message of device memory is copied when the test's MPI comes to it, not before: what is changed or used too early
shows. The arrays are of a pretended GPU, whose kernels run on the CPU.
"""

from __future__ import annotations

import ctypes
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpudbn import optimiser
from gpudbn.arrays import to_cpu
from gpudbn.errors import NonFiniteError
from gpudbn.mpi import direct
from gpudbn.mpi.replica import Asynchronous, Link
from gpudbn.mpi.rules import Steps
from gpudbn.mpi.server import Server, Store
from gpudbn.mpi.wire import Staging, Wire
from tests.helpers import assert_close, planted
from tests.pretend_cupy import installed

SIZE = 48


def memory_of(array):
    """The bytes that MPI takes for a buffer; and whether they are the device's."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8), False
    given = array.__cuda_array_interface__
    count = int(np.prod(given["shape"])) * np.dtype(given["typestr"]).itemsize
    return np.frombuffer((ctypes.c_ubyte * count).from_address(given["data"][0]), np.uint8), True


class Request:
    """A message on its way, or a place for one."""

    def __init__(self, network, memory):
        self.network, self.memory, self.done = network, memory, False

    def Test(self):  # noqa: N802 - MPI's name
        if not self.done:
            self.network.go_on()
        return self.done

    def Cancel(self):  # noqa: N802
        self.done = True


class Comm:
    """One rank of a communicator, as far as a ``Wire`` uses it."""

    def __init__(self, network, rank, size):
        self.network, self.rank, self.size = network, rank, size

    def Get_rank(self):  # noqa: N802
        return self.rank

    def Get_size(self):  # noqa: N802
        return self.size

    def Ibarrier(self):  # noqa: N802 - barriers are the test's business
        return SimpleNamespace(Test=lambda: True)

    def Split_type(self, kind, key):  # noqa: ARG002, N802
        return SimpleNamespace(Get_rank=lambda: self.rank, Free=lambda: None)

    def Isend(self, array, to, tag):  # noqa: N802
        memory, late = memory_of(array)
        request = Request(self.network, memory if late else memory.copy())
        request.done = not late
        self.network.sent.setdefault((self.rank, to, tag), []).append(request)
        return request

    def Irecv(self, array, source, tag):  # noqa: N802
        request = Request(self.network, memory_of(array)[0])
        self.network.places.setdefault((source, self.rank, tag), []).append(request)
        return request

    def Iprobe(self, source, tag, status):  # noqa: N802
        if self.rank:
            self.network.go_on()
        for key, sent in self.network.sent.items():
            wanted = source in (Library.ANY_SOURCE, key[0]) and tag in (Library.ANY_TAG, key[2])
            if wanted and key[1] == self.rank and sent and not self.network.places.get(key):
                status.found = *key, sent[0].memory.size
                return True
        return False


class Status:
    def Get_source(self):  # noqa: N802
        return self.found[0]

    def Get_tag(self):  # noqa: N802
        return self.found[2]

    def Get_count(self, kind):  # noqa: ARG002, N802
        return self.found[3]


class Library:
    """Stands for the module MPI."""

    ANY_SOURCE = ANY_TAG = -1
    COMM_TYPE_SHARED, BYTE = "shared", "byte"
    Status = Status
    Exception = ZeroDivisionError  # nobody dies here


class Hasty(Wire):
    """A wire that does not sleep."""

    def pause(self, longest=0.0):  # noqa: ARG002
        return lambda: None


class Network:
    """Delivers messages, and lets the server act, at random times."""

    def __init__(self, seed):
        self.sent, self.places = {}, {}
        self.generator = np.random.default_rng(seed)
        self.server = None
        self.inside = False
        self.idle = 0

    def ready(self):
        return [key for key, sent in self.sent.items() if sent and self.places.get(key)]

    def go_on(self):
        """One thing happens, or nothing."""
        self.idle += 1
        assert self.idle < 1000, "this waits for ever"
        ready = self.ready()
        if ready and self.generator.random() < 0.5:
            key = ready[self.generator.integers(len(ready))]
            message, place = self.sent[key].pop(0), self.places[key].pop(0)
            place.memory[: message.memory.size] = message.memory
            message.done = place.done = True
            self.idle = 0
        if self.server and not self.inside and self.generator.random() < 0.3:
            self.inside = True
            self.server._receive(self.server.stores[0])
            self.server._take()
            self.inside = False


class Job:
    """A server and its replicas on one pretended GPU."""

    def __init__(self, replicas, xp, rule=None, seed=0):
        self.network, self.xp, ranks = Network(seed), xp, replicas + 1

        def wire(rank, size=ranks, network=self.network):
            return Hasty(Library, Comm(network, rank, size))

        self.store = Store(wire(0), SIZE, rule, partial(direct.ServerEnd, xp=xp))
        self.server = Server(wire(0), [self.store])
        self.network.server = self.server
        self.replicas = [Asynchronous(wire(rank), wire(rank - 1, replicas, Network(0)),
                                      [Link(wire(rank), SIZE, partial(direct.ReplicaEnd, xp=xp))])
                         for rank in range(1, ranks)]
        for one in self.replicas:  # as if all had come, and brought the same
            one._gather = lambda content=b"", tag=0: [content] * replicas  # noqa: ARG005

    def begin(self):
        """All replicas begin with zeros; their parameters and copies of them."""
        parameters = [self.xp.zeros(SIZE, np.float32) for _ in self.replicas]
        for one, own in zip(self.replicas, parameters, strict=True):
            one.begin(own)
        return parameters, [own.copy() for own in parameters]


@pytest.fixture
def cupy():
    with installed() as device:
        import cupy

        cupy.pretended = device
        yield cupy


def random_pushes(job, pushes=60):
    """Replica r adds 1 to entries of its own: it must see all of them at any moment, and nobody a torn read."""
    parameters, before = job.begin()
    generator = np.random.default_rng(1)
    part = SIZE // len(job.replicas)
    mine = [np.zeros(part) for _ in job.replicas]
    for _ in range(pushes):
        r = int(generator.integers(len(job.replicas)))
        own = slice(r * part, (r + 1) * part)
        parameters[r][own] += 1
        mine[r] += 1
        job.replicas[r].exchange(parameters[r], before[r], fetch=generator.random() < 0.7)
        found = to_cpu(parameters[r])
        assert (found[own] == mine[r]).all(), "my own changes are not in"
        assert all(len(set(found[i * part : (i + 1) * part])) == 1 for i in range(len(job.replicas))), "torn"
    for one in job.replicas:
        one._drain()
    for one, own in zip(job.replicas, parameters, strict=True):
        one._pull_together(own)
        assert (to_cpu(own) == np.concatenate(mine)).all(), "lost or doubled"
    assert job.store.header.applied.sum() == pushes
    assert [one.links[0].end.sequence for one in job.replicas] == job.store.header.applied.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_doubled_or_torn_however_late_messages_are(cupy, seed):
    job = Job(3, cupy, seed=seed)
    random_pushes(job)
    assert cupy.pretended.taken > 0
    assert cupy.pretended.unsettled == 0, "MPI got memory on which the stream still worked"


@pytest.mark.parametrize(("line", "fault"), [
    ("        copy[...] = parameters\n", "        copy = parameters\n"),
    ("copy[...] = payload.reshape", "copy = payload.reshape"),
    ('        self.drain()\n        with span("push")', '        with span("push")'),
    ("            if not requests and replica not in self._taken:\n", "            if len(requests) < 2:\n"),
], ids=["parameters sent while they change", "change sent while it changes", "mailbox not waited for",
        "label read without its payload"])
def test_faults_are_seen(cupy, line, fault):
    def some(seeds):
        for seed in range(seeds):
            random_pushes(Job(3, cupy, seed=seed))

    with planted(direct, line, fault), pytest.raises((AssertionError, NonFiniteError)):
        some(seeds=20)


def test_a_replica_that_sends_nan_is_refused_and_told(cupy):
    job = Job(3, cupy)
    parameters, before = job.begin()
    for one, own, old in zip(job.replicas, parameters, before, strict=True):
        own += float("nan") if one.replica == 1 else 1.0
        one.exchange(own, old, fetch=False)
    for one in (job.replicas[0], job.replicas[2]):
        one._drain()
    with pytest.raises(NonFiniteError, match="the server refused"):
        job.replicas[1]._drain()
    job.replicas[0]._pull(parameters[0])
    assert (to_cpu(parameters[0]) == 2).all()
    assert job.server.lost == [1]


def test_a_missing_synchronise_is_noticed(cupy, monkeypatch):
    monkeypatch.setattr(Staging, "settle", staticmethod(lambda _: None))
    random_pushes(Job(2, cupy))
    assert cupy.pretended.unsettled > 0


@pytest.mark.parametrize("make", [partial(optimiser.Adagrad, decay=0),
                                  partial(optimiser.Momentum, momentum=0.5, decay=0)])
def test_the_server_steps_by_the_fused_kernels_on_its_own_device(cupy, make):
    """As the same rule in NumPy; what the rule keeps never leaves the device."""
    changes = np.random.default_rng(3).standard_normal((4, SIZE)).astype(np.float32)
    rule, expected = Steps(make, rate=0.25), np.zeros(SIZE, np.float32)
    rule.begin(expected, 1)
    for change in changes:
        rule(expected, change, 0)
    cupy.pretended.late_kernels = True
    job = Job(1, cupy, Steps(make, rate=0.25))
    (parameters,), (before,) = job.begin()
    for change in changes:
        parameters += cupy.asarray(change)
        job.replicas[0].exchange(parameters, before, fetch=False)
        before[...] = parameters
    cupy.pretended.copied.clear()
    job.replicas[0].meet(parameters)
    assert cupy.pretended.copied == []
    assert_close(to_cpu(parameters), expected, atol=1e-6)
    assert {"adagrad_step", "momentum_step"} & set(cupy.pretended.launched)
    assert cupy.pretended.unsettled == 0
