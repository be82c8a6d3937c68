"""The only door to MPI: start, waits that sleep, staging of GPU arrays, windows, ends.

It moves arrays and text between ranks and knows nothing of what they mean. Importing this file
does not load mpi4py; ``Wire.start`` does.

Every wait polls and soon sleeps: MPI's own blocking calls spin, and a spinning rank takes the
core on which a neighbour computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpudbn.arrays import Array, is_gpu, module_of
from gpudbn.errors import LostError, NonFiniteError, UserError
from gpudbn.mpi import launch, library, watch
from gpudbn.mpi.tally import Tally

TEXT = 9  # tag of send_text; arrays take 0 unless the caller says otherwise
NOTHING = 10  # a tag that no message has
GRACE = 2.0  # seconds that ranks other than 0 hold back an error that all of them are likely to have
MOVES_AT_ONCE = 1 << 14  # bytes; a call with so few that takes its time waits for other ranks
LONGEST_PAUSE = 1e-3  # seconds between two looks of a rank that has waited for long
DRAIN = 0.3  # seconds for the launcher to pass on what a rank has printed, before the job is ended

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108

_wire: Wire | None = None  # the one that Wire.start made, while it is open
_bereft = False  # ranks have died, and this one has outlived them to its end


class AgreedError(UserError):
    """A UserError that every rank raises together: rank 0 prints it, nobody aborts."""


@dataclass
class Peer:
    """A rank of the job, for messages and metrics. ``started`` in clock ticks: see ``watch.state``."""

    rank: int
    host: str = ""
    pid: int = 0
    started: int = 0
    role: str = "rank"

    def about(self) -> dict[str, Any]:
        """For the metrics."""
        return {"rank": self.rank, "role": self.role, "host": self.host, "pid": self.pid}

    def __str__(self) -> str:
        return f"{self.role} on {self.host} (rank {self.rank}, process {self.pid})"


class RanksLostError(LostError):
    """Ranks of a wire have died, and MPI goes on: ``ranks``, those of the wire. See ``Wire.lost``."""

    def __init__(self, wire: Wire) -> None:
        self.ranks = wire.lost()
        names = ", ".join(str(wire.peers[rank]) for rank in self.ranks) or "a rank that another has seen die"
        super().__init__(f"{names}: must live as long as the job; got lost")


class Backoff:
    """A pause that grows while nothing happens: none, then a turn for others, then 20 us up to ``longest`` seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        seconds = self.seconds(self.count)
        if seconds:
            time.sleep(seconds)
        elif self.count > 10:
            os.sched_yield()

    def seconds(self, count: int) -> float:
        """How long the pause of that number sleeps; the first has number 1."""
        return 0.0 if count <= 30 else min(20e-6 * 2.0 ** min((count - 30) // 8, 10), self.longest)

    def reset(self) -> None:
        """Something happened: be quick again."""
        self.count = 0


class Staging:
    """Host memory through which GPU arrays pass, and the one place that synchronises the stream for MPI."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    @contextlib.contextmanager
    def host(self, array: Array, *, read: bool = False, write: bool = False) -> Iterator[np.ndarray]:
        """The memory that MPI may use in place of the array.

        Parameters
        ----------
        array : contiguous array
            A NumPy array stands for itself.
        read : bool
            MPI reads it: a GPU array is copied to the host first.
        write : bool
            MPI writes it: a GPU array is copied back afterwards.

        Notes
        -----
        All GPU arrays use the same host memory, so blocks cannot be nested.
        """
        _refuse_gaps(array)
        if not is_gpu(array):
            yield array
            return
        xp = module_of(array)
        host = self._pinned(xp, array.nbytes).view(array.dtype).reshape(array.shape)
        if read:
            array.get(out=host)
        self.settle(array)
        yield host
        if write:
            array.set(host)
            self.settle(array)  # before the next user of this memory

    @staticmethod
    def settle(array: Array) -> None:
        """Wait until the stream has done what it was given, so that MPI may read or write a GPU array, or its copy."""
        if is_gpu(array):
            module_of(array).cuda.get_current_stream().synchronize()

    def _pinned(self, xp: Any, nbytes: int) -> np.ndarray:
        if self._bytes.nbytes < nbytes:
            self._bytes = np.frombuffer(xp.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
        return self._bytes[:nbytes]


class Wire:
    """Some ranks and what they can tell each other. Arrays are NumPy or GPU arrays, C-contiguous.

    Attributes
    ----------
    rank, size : int
        My number on this wire, from 0, and how many there are.
    label : str
        What error messages call this rank.
    tally : Tally
        Shared with the wires split off this one.
    peers : list of Peer
        Its ranks.
    whole : bool
        To be set to False where a rank is known to be lost, so that ``close`` frees nothing.

    Notes
    -----
    Where MPI outlives the death of a rank (``mpirun --with-ft ulfm`` of Open MPI), messages from and to the dead, and
    ``incoming`` once after a death, raise RanksLostError. No collective call is possible from then on. Elsewhere the
    launcher ends the job.
    """

    def __init__(self, mpi: Any, comm: Any, parent: Wire | None = None) -> None:
        self.mpi = mpi
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.label = f"rank {self.rank} of {self.size}"
        self.tally: Tally = parent.tally if parent else Tally(self.clock, "starting")
        self.staging: Staging = parent.staging if parent else Staging()
        self.whole = True
        self._owned: list[Any] = []  # to be freed before this one
        self.peers = [Peer(rank) for rank in range(self.size)]
        if parent:
            parent.own(self)

    @classmethod
    def start(cls) -> Wire:
        """Start MPI and return the wire of all ranks, with a communicator of its own.

        Raises
        ------
        UserError
            If MPI is missing or of two kinds, or the launcher belongs to another MPI than the one
            that is loaded, so that there would be N jobs of one rank instead of one of N.
        """
        global _wire
        if _wire is not None:
            raise RuntimeError("Wire.start: must be called once; got a wire that is still open")
        world = launch.world()
        library.refuse_two_wheels()
        mpi = library.load()
        library.refuse_other_launcher(world, mpi.Get_library_version())
        if not mpi.Is_initialized():
            mpi.Init_thread(mpi.THREAD_SERIALIZED)
        library.refuse_singletons(world, mpi.COMM_WORLD.Get_size())
        _wire = cls(mpi, mpi.COMM_WORLD.Dup())
        sys.excepthook = _excepthook
        me = f"{socket.gethostname()} {os.getpid()} {watch.state(os.getpid())[1]}"
        for peer, text in zip(_wire.peers, _wire.allgather_text(me), strict=True):
            peer.host, pid, started = text.split()
            peer.pid, peer.started = int(pid), int(started)
        return _wire

    # what lets a rank live in virtual time, where one process runs many: see ``virtual.py``

    @property
    def threads(self) -> bool:
        """Whether threads may call MPI, one at a time."""
        return bool(self.mpi.Query_thread() >= self.mpi.THREAD_SERIALIZED)

    def clock(self) -> float:
        """Seconds since some time in the past. All that this rank reports of time is by this clock."""
        return time.perf_counter()

    def pause(self, longest: float = LONGEST_PAUSE) -> Backoff:
        """What a loop that polls calls whenever it saw nothing new; it sleeps up to ``longest`` seconds."""
        return Backoff(longest)

    def worker(self) -> Any:
        """A ``concurrent.futures`` executor with one thread, for what this rank does beside its work."""
        return ThreadPoolExecutor(1)

    def worked(self, what: str, nbytes: int) -> None:
        """I have just worked on so many bytes of my memory: ``apply``, ``publish``, ``exchange`` or ``look``.

        Time goes by without being told. In virtual time it goes by as much as this work costs.
        """

    def library_name(self) -> str:
        """Which MPI this is, for messages: ``Open MPI v5.0.11``."""
        return library.name_of(self.mpi.Get_library_version())

    def cuda_aware(self) -> bool | None:
        """Whether MPI says that it takes device memory; None where it has no word for it."""
        loaded = ctypes.CDLL(self.mpi.__file__)
        if hasattr(loaded, "MPIX_Query_cuda_support"):  # Open MPI's name, which MPICH has, too
            return bool(loaded.MPIX_Query_cuda_support())
        if hasattr(loaded, "MPIX_GPU_query_support"):
            found = ctypes.c_int()
            loaded.MPIX_GPU_query_support(0, ctypes.byref(found))  # 0: CUDA
            return bool(found.value)
        return None

    def split(self, color: int) -> Wire:
        """The wire of those that call with the same color, in the same order; collective."""
        colors = self.allgather(np.array([color]))[:, 0]
        return self._part(self.comm.Split(color, self.rank), np.flatnonzero(colors == color))

    def _part(self, comm: Any, ranks: Sequence[int] | np.ndarray) -> Wire:
        part = type(self)(self.mpi, comm, parent=self)
        part.peers = [self.peers[rank] for rank in ranks]
        return part

    def among(self, ranks: Sequence[int]) -> Wire | None:
        """The wire of these ranks of mine, numbered in this order; None on the others. Collective over all."""
        self.barrier()
        mine = self.rank in ranks
        comm = self.comm.Split(0 if mine else self.mpi.UNDEFINED, ranks.index(self.rank) if mine else 0)
        return self._part(comm, ranks) if mine else None

    def local_rank(self) -> int:
        """My number among the ranks of this wire that share memory with me; collective."""
        self.barrier()
        local = self.comm.Split_type(self.mpi.COMM_TYPE_SHARED, self.rank)
        rank: int = local.Get_rank()
        local.Free()
        return rank

    def own(self, part: Any) -> None:
        """Have the part's ``close()`` called before this wire is freed."""
        self._owned.append(part)

    def _wait(self, *requests: Any) -> None:
        pause = self.pause()
        with self.noticing():
            for request in requests:
                while not request.Test():
                    pause()

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Make RanksLostError of MPI's error that a rank is dead, or the wire revoked."""
        try:
            yield
        except self.mpi.Exception as error:
            if not self.lost() and not (launch.survives() and self.comm.Is_revoked()):
                raise
            raise RanksLostError(self) from error

    def lost(self) -> list[int]:
        """The ranks of this wire that are known to be dead, here and now. ``incoming`` speaks of later ones only."""
        self.comm.Ack_failed()
        failed = self.comm.Get_failed()
        return list(failed.Translate_ranks(None, self.comm.Get_group()))

    def revoke(self) -> None:
        """Let no rank wait for another on this wire any more: each call raises RanksLostError, everywhere."""
        self.comm.Revoke()

    def check(self, rank: int) -> None:
        """Raise RanksLostError if this rank is dead. For waits in which nothing else would notice."""
        with self.noticing():
            self.comm.Iprobe(rank, NOTHING)

    def watch(self, seconds: float) -> None:
        """Kill ranks of this machine that have been stopped for so long; see ``watch.py``."""
        me = self.peers[self.rank]
        watch.watch({peer.pid: (peer.started, str(peer)) for peer in self.peers
                     if peer.host == me.host and peer is not me}, seconds)

    def _moving(self, array: Array) -> AbstractContextManager[None]:
        """The state of a call that moves this array between ranks, and waits for them."""
        return self.tally.timing("waiting" if array.nbytes <= MOVES_AT_ONCE else "transferring")

    def barrier(self) -> None:
        """Wait until all are here."""
        with self.tally.timing("waiting"):
            self._wait(self.comm.Ibarrier())

    def broadcast(self, array: Array, root: int = 0) -> None:
        """array = that of ``root``, in place."""
        mine = self.rank == root
        with self._moving(array), self.staging.host(array, read=mine, write=not mine) as host:
            self._wait(self.comm.Ibcast(host, root))
        self._count(sent=array.nbytes if mine else 0, received=0 if mine else array.nbytes)

    def allreduce_(self, array: Array) -> None:
        """array = sum over ranks of array, in place; the same bits on every rank."""
        with self._moving(array), self.staging.host(array, read=True, write=True) as host:
            self._wait(self.comm.Iallreduce(self.mpi.IN_PLACE, host, self.mpi.SUM))
        self._count(sent=array.nbytes, received=array.nbytes)

    def add_in_order_(self, sums: Array, partials: Sequence[Array]) -> None:
        """sums = ((0 + p0) + p1) + ..., through the partials of rank 0, then of rank 1, ..., on every rank.

        A chain: each rank adds its own, one by one, to what its predecessor hands on.
        """
        if self.rank == 0:
            sums.fill(0)
        else:
            self.recv(sums, self.rank - 1)
        for partial in partials:
            sums += partial
        if self.rank < self.size - 1:
            self.send(sums, self.rank + 1)
        self.broadcast(sums, self.size - 1)

    def allgather(self, array: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, stacked: shape (size, *array.shape), the same shape on every rank."""
        everything = np.empty((self.size, *array.shape), array.dtype)
        with self._moving(array):
            self._wait(self.comm.Iallgather(np.ascontiguousarray(array), everything))
        self._count(sent=array.nbytes, received=everything.nbytes)
        return everything

    def allgather_(self, arrays: Array) -> None:
        """arrays[r] = that of rank r, for all r, in place: shape (size, ...), of which each rank has filled its own."""
        with self._moving(arrays), self.staging.host(arrays, read=True, write=True) as host:
            self._wait(self.comm.Iallgather(self.mpi.IN_PLACE, host))
        self._count(sent=arrays[0].nbytes, received=arrays.nbytes)

    def send(self, array: Array, to: int, tag: int = 0) -> None:
        """Give an array to a rank that calls ``recv``."""
        with self._moving(array), self.staging.host(array, read=True) as host, self.noticing():
            self._wait(self.comm.Isend(host, to, tag))
        self._count(sent=array.nbytes)

    def recv(self, array: Array, source: int, tag: int = 0) -> None:
        """Fill the array, of the shape and type that was sent."""
        with self._moving(array), self.staging.host(array, write=True) as host, self.noticing():
            self._wait(self.comm.Irecv(host, source, tag))
        self._count(received=array.nbytes)

    def isend(self, array: Array, to: int, tag: int = 0) -> Any:
        """Begin to send an array, which must stay as it is until ``wait``; the request.

        GPU memory is given to MPI as it is. So MPI must be CUDA-aware, and the memory not of ``malloc_async``, which
        other processes cannot open.
        """
        _refuse_gaps(array)
        self.staging.settle(array)
        self._count(sent=array.nbytes)
        return self.comm.Isend(array, to, tag)

    def irecv(self, array: Array, source: int, tag: int = 0) -> Any:
        """Begin to fill the array, at least as long as what is sent, and nobody's until ``wait``. As ``isend``."""
        _refuse_gaps(array)
        self.staging.settle(array)
        return self.comm.Irecv(array, source, tag)

    def wait(self, *requests: Any, what: str = "transferring") -> None:
        """Wait until these are done."""
        with self.tally.timing(what):
            self._wait(*requests)

    def incoming(self) -> tuple[int, int] | None:
        """Sender and tag of a message that waits to be received, or None. Lets MPI make progress."""
        status = self.mpi.Status()
        with self.noticing():
            if self.comm.Iprobe(self.mpi.ANY_SOURCE, self.mpi.ANY_TAG, status):
                return status.Get_source(), status.Get_tag()
        return None

    def send_bytes(self, content: bytes, to: int, tag: int = TEXT) -> None:
        """Give bytes to a rank that calls ``recv_bytes``."""
        self.send(np.frombuffer(content, np.uint8), to, tag)

    def recv_bytes(self, source: int, tag: int = TEXT, *, longest: float = LONGEST_PAUSE) -> bytes:
        """The bytes that ``source`` sends, however many; looks for them every ``longest`` seconds, or more often."""
        status, pause = self.mpi.Status(), self.pause(longest)
        with self.tally.timing("waiting"), self.noticing():
            while not self.comm.Iprobe(source, tag, status):
                pause()
        content = np.empty(status.Get_count(self.mpi.BYTE), np.uint8)
        self.recv(content, source, tag)
        return content.tobytes()

    def send_text(self, text: str, to: int, tag: int = TEXT) -> None:
        """Give a text to a rank that calls ``recv_text``."""
        self.send_bytes(text.encode(), to, tag)

    def recv_text(self, source: int, tag: int = TEXT) -> str:
        """The text that ``source`` sends."""
        return self.recv_bytes(source, tag).decode()

    def allgather_text(self, text: str) -> list[str]:
        """The texts of all ranks, in order."""
        mine = np.frombuffer(text.encode(), np.uint8)
        lengths = self.allgather(np.array([mine.size], np.int64))[:, 0]
        padded = np.zeros(max(1, lengths.max()), np.uint8)
        padded[: mine.size] = mine
        return [row[:length].tobytes().decode()
                for row, length in zip(self.allgather(padded), lengths, strict=True)]

    def gather_text(self, text: str) -> list[str] | None:
        """The texts of all ranks, in order, on rank 0; None elsewhere."""
        texts = self.allgather_text(text)
        return texts if self.rank == 0 else None

    def align(self, rounds: int = 5) -> None:
        """Estimate how far the clock of rank 0 is ahead of mine, for ``tally.offset``; collective.

        Its answer is taken to be from the middle between question and answer, of the quickest of some rounds
        (Cristian, "Probabilistic clock synchronization", 1989): off by at most half of what that round took.
        """
        answer, best = np.zeros(1), np.inf
        for rank in range(1, self.size):
            for _ in range(rounds):
                if self.rank == 0:
                    self.recv(answer, rank)
                    self.send(np.array([self.clock()]), rank)
                elif self.rank == rank:
                    asked = self.clock()
                    self.send(answer, 0)
                    self.recv(answer, 0)
                    took = self.clock() - asked
                    if took < best:
                        best, self.tally.offset = took, float(answer[0]) - asked - took / 2

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The arrays of all ranks in order, of any shapes and types, on rank 0; None elsewhere."""
        array = np.ascontiguousarray(array)
        kinds = self.allgather_text(" ".join([array.dtype.str, *map(str, array.shape)]))
        if self.rank:
            self.send(array, 0)
            return None
        arrays = [array]
        for source, kind in enumerate(kinds[1:], 1):
            dtype, *shape = kind.split()
            arrays.append(np.empty([int(length) for length in shape], dtype))
            self.recv(arrays[-1], source)
        return arrays

    def agree(self, error: str | None) -> None:
        """Raise on every rank if one of them has an error; where it is not everyone's, it says whose.

        Raises
        ------
        AgreedError
            Which ``guarded`` prints once; all ranks end with code 2 and MPI is left in good order.
        """
        errors = self.allgather_text(error or "")
        if not any(errors):
            return
        owner = next(rank for rank, text in enumerate(errors) if text)
        where = self.allgather_text(self.where)[owner]
        raise AgreedError(errors[owner] if len(set(errors)) == 1 else f"{where}: {errors[owner]}")

    @property
    def where(self) -> str:
        """Who and where this is, for messages: ``replica 3 of 8 on HOST``."""
        return f"{self.label} on {socket.gethostname()}"

    def abort(self, code: int) -> None:
        """End all ranks at once with this exit code."""
        sys.stdout.flush()
        sys.stderr.flush()
        launch.end_job(code)  # first: after MPI's own abort MPICH's mpirun returns 9 now and then
        if launch.survives() and len(self.lost()) == self.size - 1:
            os._exit(code)  # if all others are dead, Open MPI's mpirun returns 0 after MPI's own abort
        self.comm.Abort(code)

    def close(self) -> None:
        """Free what was made on this wire; collective, if it is whole. MPI itself ends with the process."""
        global _bereft, _wire
        if self.comm == self.mpi.COMM_NULL:
            return  # by its user, before the wire that it was split off
        if self.whole:
            with contextlib.suppress(RanksLostError):  # the dead of the last moment
                self.barrier()
                for owned in reversed(self._owned):
                    owned.close()
                self.comm.Free()
        self._owned.clear()
        if _wire is self:
            _wire = None
            _bereft = not self.whole and launch.survives()
            sys.excepthook = sys.__excepthook__

    def _count(self, sent: int = 0, received: int = 0) -> None:
        self.tally.sent += sent
        self.tally.received += received


class Window:
    """Memory of rank 0 of a wire that all its ranks read and write without its help.

    Offsets are in bytes. ``put`` and ``get`` are complete when they return.

    Notes
    -----
    Allocated by MPI and locked once for ever, without checks: the one combination that makes progress
    while rank 0 computes, under both Open MPI and MPICH, and that outlives a rank killed while putting.
    """

    def __init__(self, wire: Wire, nbytes: int) -> None:
        """Collective. ``nbytes`` matters on rank 0."""
        mpi = wire.mpi
        mine = wire.rank == 0
        wire.agree(_why_no_room(nbytes) if mine else None)
        self.wire = wire
        self._win = mpi.Win.Allocate(nbytes if mine else 0, 1, comm=wire.comm)
        unified = self._win.Get_attr(mpi.WIN_MODEL) == mpi.WIN_UNIFIED
        wire.agree(None if unified else "MPI: windows must have the unified memory model; got the separate one. "
                                        "Use Open MPI 5 or MPICH 4, or mode sync")
        self.memory = np.frombuffer(self._win.tomemory(), np.uint8) if mine else np.empty(0, np.uint8)
        self.memory[:] = 0
        self._nothing, self._word = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._win.Lock_all(mpi.MODE_NOCHECK)
        wire.own(self)
        self.sync()
        wire.barrier()

    def put(self, array: Array, offset: int) -> None:
        """Write the array there."""
        with (self.wire.tally.timing("transferring"), self.wire.staging.host(array, read=True) as host,
              self.wire.noticing()):
            self._win.Put(host, 0, offset)
            self._win.Flush(0)
        self.wire.tally.sent += array.nbytes

    def get(self, array: Array, offset: int) -> None:
        """Fill the array from there. Torn where rank 0 is writing: the caller must be able to tell."""
        with (self.wire.tally.timing("transferring"), self.wire.staging.host(array, write=True) as host,
              self.wire.noticing()):
            self._win.Get(host, 0, offset)
            self._win.Flush(0)
        self.wire.tally.received += array.nbytes

    def read(self, offset: int) -> int:
        """The int64 there, never torn."""
        with self.wire.noticing():
            self._win.Fetch_and_op(self._nothing, self._word, 0, offset, self.wire.mpi.NO_OP)
            self._win.Flush(0)
        return int(self._word[0])

    def sync(self) -> None:
        """On rank 0: order its own loads and stores before this with those after it, for everyone."""
        self._win.Sync()

    def close(self) -> None:
        """Free the memory; collective."""
        self.memory = np.empty(0, np.uint8)
        self._win.Unlock_all()
        self.wire.barrier()
        self._win.Free()


def _refuse_gaps(array: Array) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"wire: array must be C-contiguous; got shape {array.shape}")


def _why_no_room(nbytes: int) -> str | None:
    """Windows of ranks on one machine lie in shared memory; beyond its end a write kills the process."""
    world = launch.world()
    if world is None or world.local_size == 1 or not SHARED_MEMORY.is_dir():
        return None
    free = shutil.disk_usage(SHARED_MEMORY).free
    if nbytes <= free:
        return None
    return (f"{SHARED_MEMORY}: must have room for the server's window, {nbytes / 2**20:.0f} MiB; "
            f"got {free / 2**20:.0f} MiB. In Docker add --ipc=host or --shm-size")


def exit_code(error: BaseException) -> int:
    """What a process that ends by this exception returns."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    for kind, code in ((UserError, 2), (NonFiniteError, 3), (LostError, 4), (KeyboardInterrupt, 130)):
        if isinstance(error, kind):
            return code
    return 1


def guarded(main: Callable[[], int | None]) -> int:
    """Run a command so that all ranks end together, and return its exit code.

    An exception that is not caught ends all ranks within seconds: one line for ``UserError`` (code 2),
    ``NonFiniteError`` (3) and ``LostError`` (4), 130 for an interrupt, a traceback and 1 for the rest. The message
    names the replica and its host. What all ranks raise together, by ``agree``, is printed once.

        sys.exit(guarded(main))
    """
    try:
        code = main() or 0
    except BaseException as error:
        if isinstance(error, SystemExit) and _wire is None:
            if exit_code(error):
                launch.end_job(exit_code(error))
            raise
        code = end(error)
    if _wire is not None:
        _wire.close()
    if _bereft:  # MPI's own end then waits for ever now and then: seen with Open MPI 5.0.11
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def end(error: BaseException) -> int:
    """Say what happened, once if all know it, and end the other ranks if they do not. Returns the exit code.

    Rank 0 goes first where all are likely to have the same to say: the first that ends may end the others unheard.
    """
    code = exit_code(error)
    if isinstance(error, SystemExit):
        text = "" if code == 0 or isinstance(error.code, int) else f"{error.code}\n"
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted\n"
    elif isinstance(error, UserError | NonFiniteError | LostError):
        text = f"{error}\n"
    else:
        text = "".join(traceback.format_exception(error))
    wire = _wire
    if wire is None:
        _end_early(text, code)
    elif isinstance(error, AgreedError):
        if wire.rank == 0:
            _say(text)
        wire.close()
    elif code == 0:
        wire.close()
    else:
        time.sleep(min(2 * DRAIN * wire.rank, GRACE))  # where all fail, the first ends the others in time
        if text:
            _say(f"{wire.where}: {text}")
            time.sleep(DRAIN)
        wire.abort(code)
    return code


def _end_early(text: str, code: int) -> None:
    """Without MPI the ranks cannot agree; but what goes wrong this early mostly goes wrong on all of them."""
    world = launch.world()
    if world is None or world.size == 1:
        _say(text)
        return
    if world.rank == 0:
        _say(text)
    else:
        time.sleep(GRACE)
        _say(f"rank {world.rank} of {world.size} on {socket.gethostname()}: {text}")
    time.sleep(DRAIN)
    launch.end_job(code)


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)  # in one piece, so that ranks do not interleave
    sys.stderr.flush()


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:  # noqa: ARG001
    """For programs that use this package without ``guarded``."""
    mpi = _wire.mpi if _wire else None
    code = end(error)
    if mpi is not None and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    os._exit(code)  # the interpreter would make it 1
