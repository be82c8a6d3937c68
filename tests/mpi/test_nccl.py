"""Sums and broadcasts by NCCL, with a pretended library, and when it is taken. Nothing here has run on a GPU."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest

from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.errors import UserError
from gpudbn.mpi import chosen
from gpudbn.mpi import nccl as ours
from gpudbn.mpi.collective import Averaging, Elastic, Synchronous
from gpudbn.settings import Settings
from tests import pretend_cupy
from tests.helpers import assert_notices
from tests.mpi.test_collective import together

NAME = bytes([200, *range(127)])  # also bytes that are negative as chars


class Library:
    """``cupy.cuda.nccl``: constants, names and argument order as in CuPy 14.2 with NCCL 2.32 (read, not guessed)."""

    NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8

    def __init__(self, device, *, as_bytes=True):
        self.available, self.device, self.as_bytes = True, device, as_bytes
        self.here = threading.local()  # ``rank``, and ``wires`` by which the pretended GPUs find each other
        self.calls = []
        self.NcclCommunicator = lambda ndev, commId, rank: Communicator(self, ndev, commId, rank)

    def get_unique_id(self):
        return NAME if self.as_bytes else tuple(np.frombuffer(NAME, np.int8).tolist())

    def get_version(self):
        return 23203


class Communicator:
    def __init__(self, library, size, name, rank):
        assert type(name) is (bytes if library.as_bytes else tuple)
        assert (name if library.as_bytes else np.array(name, np.int8).tobytes()) == NAME
        self.library, self.wire, self.rank = library, library.here.wires.pop(0), rank
        assert (self.wire.size, self.wire.rank) == (size, rank)

    def rank_id(self):
        return self.rank

    def _memory(self, address, count, kind, stream):
        assert stream == self.library.device.stream.ptr, "not on the stream where the array is made ready"
        number = {7: ctypes.c_float, 8: ctypes.c_double}[kind]
        return np.frombuffer((number * count).from_address(address), number)

    def _late(self, what, memory, result):
        """The result is there when the stream comes to it."""
        self.library.calls.append((self.rank, what, memory.dtype, memory.size))
        self.library.device.stream._enqueue(lambda: memory.__setitem__(..., result))
        self.library.device.busy = True

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):  # noqa: N802
        assert op == Library.NCCL_SUM
        assert sendbuf == recvbuf
        memory = self._memory(sendbuf, count, datatype, stream)
        self.library.device.stream._run()  # what was before on the stream
        total = memory.copy()
        self.wire.allreduce_(total)
        self._late("sum", memory, total)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):  # noqa: N802
        mine = self._memory(sendbuf, count, datatype, stream)
        memory = self._memory(recvbuf, count * self.wire.size, datatype, stream)
        assert sendbuf == recvbuf + self.rank * mine.nbytes
        self.library.device.stream._run()
        self._late("gather", memory, self.wire.allgather(mine).ravel())

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        assert sendbuff == recvbuff
        memory = self._memory(sendbuff, count, datatype, stream)
        self.library.device.stream._run()
        value = memory.copy()
        self.wire.broadcast(value, root)
        self._late("broadcast", memory, value)


@contextmanager
def machine(monkeypatch, *, as_bytes=True, shared=()):
    """Three ranks with a pretended GPU each; those in ``shared`` have the first one's."""
    with pretend_cupy.installed() as device:
        library, cuda = Library(device, as_bytes=as_bytes), sys.modules["cupy"].cuda
        device.late_kernels = True
        package = ModuleType("cupy.cuda")
        package.nccl = library
        monkeypatch.setitem(sys.modules, "cupy.cuda", package)
        monkeypatch.setattr(cuda.runtime, "deviceGetPCIBusId", lambda _: (
            "0000:00" if library.here.rank in shared else f"0000:0{library.here.rank}"), raising=False)
        yield library


def replicas(library, make, program):
    """``program(exchange, word)`` on three replicas that may use the library."""
    def run(wire):
        exchange = make(wire)
        library.here.rank, library.here.wires = wire.rank, [wire]
        word = exchange.choose_collectives("auto", sys.modules["cupy"])
        return program(exchange, word)

    return together(3, run)


def meeting(exchange, asarray):
    """Two meetings with changes of its own; what it has, and what is measured."""
    rng = np.random.default_rng([7, exchange.replica])
    parameters = asarray(np.full(13, exchange.replica + 1, np.float32))
    exchange.begin(parameters)
    before = parameters.copy()
    for _ in range(2):
        parameters += asarray(rng.standard_normal(13).astype(np.float32))
        exchange.exchange(parameters, before)
    own = to_cpu(parameters.copy())
    exchange.meet(parameters)
    return own, to_cpu(parameters)


def check_meetings(monkeypatch, make, as_bytes):
    expected = together(3, lambda wire: meeting(make(wire), np.asarray))
    with machine(monkeypatch, as_bytes=as_bytes) as library:
        def program(exchange, word):
            assert word == "sums by NCCL 2.32"
            return meeting(exchange, to_gpu)

        found = replicas(library, make, program)
        assert len(library.device.copies("to host")) == 3 * 2, "only what the test asks for"
        assert library.device.waited == 3, "for the proof"
        assert [call[1:] for call in library.calls if call[0] == 1] == [
            ("sum", np.float32, 1), ("broadcast", np.float32, 13), *2 * [("sum", np.float32, 13)]]
    for pair, other in zip(expected, found, strict=True):
        assert all(map(np.array_equal, pair, other))


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("make", [Averaging, Elastic])
def test_meetings_between_gpus(make, as_bytes, monkeypatch):
    check_meetings(monkeypatch, make, as_bytes)


@pytest.mark.parametrize(("line", "fault"), [
    ("np.array(found, np.int8).view(np.uint8)", "np.abs(np.array(found, np.int8)).view(np.uint8)"),
    ("return array.data.ptr, array.size,", "return array.data.ptr, array.size // 2,"),
    ("self._comm.broadcast(where, where, count, kind, root, stream)", "pass"),
    ("self._kinds[array.dtype], stream.ptr", "self._kinds[array.dtype], 0"),
])
def test_faults_are_noticed(line, fault, monkeypatch):
    assert_notices(lambda: check_meetings(monkeypatch, Elastic, as_bytes=False), ours, line, fault)


def test_the_parts_of_a_replica_have_a_library_of_their_own(monkeypatch):
    """Two parts of 16 and 3 columns: a sum, and a gather in which the narrower one is padded."""
    whole = np.arange(38, dtype=np.float32).reshape(2, 19)

    def program(wire):
        exchange = Synchronous(wire, 2)
        library.here.rank, library.here.wires = wire.rank, [exchange.wire, exchange.shards.wire]
        exchange.choose_collectives("nccl", sys.modules["cupy"])
        part = to_gpu(whole[:, exchange.shards.mine(19)])
        total = part.sum()[None]
        exchange.shards.sum_(total)
        return to_cpu(exchange.shards.gather(part, 19)), to_cpu(total)

    with machine(monkeypatch) as library:
        for gathered, total in together(2, program):
            assert np.array_equal(gathered, whole)
            assert total == whole.sum()
        assert [what for rank, what, *_ in library.calls if rank == 1][-2:] == ["sum", "gather"]


def test_sums_of_batches_are_behind_the_kernels_and_before_the_next(monkeypatch):
    def program(exchange, _):
        xp = sys.modules["cupy"]
        sums = xp.full(5, exchange.replica, np.float64)
        xp.add(sums, np.float64(1), out=sums)
        before = library.device.synchronised
        exchange.add_(sums)
        xp.multiply(sums, np.float64(10), out=sums)
        assert library.device.synchronised == before, "the host waited"
        sent = exchange.report()["bytes"]
        assert sent["sent"] >= 40 <= sent["received"]
        return to_cpu(sums)

    with machine(monkeypatch) as library:
        for sums in replicas(library, Synchronous, program):
            assert sums.tolist() == [60.0] * 5


@pytest.mark.parametrize("array", [np.zeros((4, 6), np.float32)[:, :3], np.zeros(3, np.int32)])
def test_what_cannot_be_sent_is_refused(array, monkeypatch):
    with machine(monkeypatch) as library, pytest.raises(ValueError, match="nccl: array must be C-contiguous, float32"):
        ours.Nccl(library, None, None).allreduce_(pretend_cupy.ndarray(array))


def test_where_it_cannot_be_the_log_says_why_and_mpi_does_it(monkeypatch):
    with machine(monkeypatch, shared=(0, 2)) as library:
        def program(exchange, word):
            assert exchange.arrays is exchange.wire
            return word

        assert replicas(library, Synchronous, program) == 3 * [
            "sums by MPI (ranks 0 and 2 share a GPU, which NCCL refuses)"]
        library.available = False
        (word, *_) = replicas(library, Synchronous, program)
        assert word.startswith("sums by MPI (CuPy finds no NCCL (pip install")
        assert library.calls == []
        xp = sys.modules["cupy"]
        assert together(3, lambda wire: Synchronous(wire).choose_collectives("mpi", xp)) == 3 * ["sums by MPI"]
    assert together(2, lambda wire: Synchronous(wire).choose_collectives("auto", np)) == ["", ""]
    with pytest.raises(UserError, match="--collectives: must be auto or mpi here; got nccl, but arrays are on CPUs"):
        together(2, lambda wire: Synchronous(wire).choose_collectives("nccl", np))


def test_a_library_that_fails_ends_the_run_with_a_word_and_nobody_waits(monkeypatch):
    def fail(*_):
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error\nmore")

    said = "got nccl, which says: NCCL_ERROR_SYSTEM_ERROR: unhandled system error. Use --collectives mpi$"
    for method in ("get_unique_id", "NcclCommunicator"):
        with machine(monkeypatch) as library, pytest.raises(UserError, match=said):  # noqa: PT012
            setattr(library, method, fail)
            replicas(library, Synchronous, None)


def test_a_wrong_sum_is_noticed_before_it_is_used(monkeypatch):
    monkeypatch.setattr(Communicator, "allReduce", lambda *_: None)
    with machine(monkeypatch) as library, pytest.raises(UserError, match="a sum of 1 where 3 ranks have 1 each"):
        replicas(library, Synchronous, None)


def test_asynchronous_replicas_have_nothing_for_it_to_add():
    with pytest.raises(UserError, match="--collectives: must be auto or mpi with --mode async"):
        chosen(Settings(collectives="nccl"), 3)
    assert chosen(Settings(collectives="nccl"), 1).mode == "sync"


@pytest.mark.gpu
def test_one_rank_on_a_gpu():
    """All there is to see with one GPU: the real library is called as it wants to be."""
    import cupy

    if not ours._module().available:
        pytest.skip("CuPy finds no NCCL")

    def program(wire):
        (found,), word = ours.choose(wire, [wire], "nccl", cupy)
        assert word.startswith("sums by NCCL ")
        for dtype in (np.float32, np.float64):
            array = cupy.arange(1_003, dtype=dtype)
            array *= 2
            found.allreduce_(array)
            found.broadcast(array)
            found.allgather_(array[None])
            array += 1
            assert np.array_equal(array.get(), 2 * np.arange(1_003, dtype=dtype) + 1)

    together(1, program)
