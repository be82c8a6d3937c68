"""MPI in virtual time: as much of mpi4py's interface as ``wire.py`` uses, between the ranks of a ``machine.Machine``.

On it stands ``VirtualWire``, a ``Wire`` like any other: so servers and replicas are the real ones, with real numbers,
and only how long things take is imagined (``costs.py``).

    within a node    a copy by the rank that asks for it: its own work
    between nodes    through both nodes' links. One-sided transfers need no help from the other side, as with RDMA
    collective       when the last rank has come and as long as the formula says that fits best (``collective``)
"""

# ruff: noqa: N802 - names are those of mpi4py

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpudbn.mpi.costs import Costs
from gpudbn.mpi.machine import Fiber, Machine, Memory, Pause, Rank
from gpudbn.mpi.wire import LONGEST_PAUSE, Backoff, Wire

FEW = 64  # bytes; what a rank reads of another's memory and is no longer is what it may be waiting for


class Library:
    """Stands for the module."""

    ANY_SOURCE = ANY_TAG = -1
    UNDEFINED = -2
    COMM_TYPE_SHARED, COMM_NULL = "shared", None
    SUM, NO_OP, IN_PLACE, BYTE = "sum", "no-op", "in place", "byte"
    WIN_MODEL = WIN_UNIFIED = "unified"
    MODE_NOCHECK = "no check"
    Exception = FloatingPointError  # what no call raises: ranks do not die here

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.Status, self.Win = Status, Win  # as classes of the module


class Status:
    """Of a message."""

    def __init__(self) -> None:
        self.source = self.tag = self.nbytes = 0

    def Get_source(self) -> int:
        return self.source

    def Get_tag(self) -> int:
        return self.tag

    def Get_count(self, kind: str) -> int:  # noqa: ARG002
        return self.nbytes


class Request:
    """What a rank waits for."""

    def __init__(self, machine: Machine, rank: Rank) -> None:
        self.machine, self.rank, self.done = machine, rank, False

    def Test(self) -> bool:
        return self.done

    def finish(self) -> None:
        self.done = True
        self.machine.tell(self.rank)


class Receive(Request):
    """A message that is waited for."""

    def __init__(self, machine: Machine, rank: Rank, into: np.ndarray, source: int, tag: int) -> None:
        super().__init__(machine, rank)
        self.into, self.source, self.tag = into, source, tag

    def fits(self, source: int, tag: int) -> bool:
        return self.source in (Library.ANY_SOURCE, source) and self.tag in (Library.ANY_TAG, tag)

    def fill(self, data: bytes) -> None:
        if len(data) > self.into.nbytes:
            raise RuntimeError(f"MPI: a message must fit; got {len(data)} bytes for {self.into.nbytes}")
        self.into.reshape(-1).view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        self.finish()


class Meeting:
    """One collective operation: what each rank brought, and who waits for the end."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.brought: dict[int, Any] = {}
        self.requests: list[Request] = []


class Group:
    """What all ends of a communicator share."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self.arrived: dict[int, deque[tuple[int, int, bytes]]] = defaultdict(deque)  # at each rank: source, tag, data
        self.receives: dict[int, list[Receive]] = defaultdict(list)
        self.meetings: dict[int, Meeting] = {}
        self.made: dict[tuple[int, Any], Any] = {}  # new groups and windows, by the meeting and its part


class Comm:
    """One rank's end of a communicator."""

    def __init__(self, machine: Machine, group: Group, me: Rank) -> None:
        self.machine, self.group, self.me = machine, group, me
        self.rank = group.ranks.index(me)
        self.met = 0
        self.free = False

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return len(self.group.ranks)

    def Free(self) -> None:
        self.free = True

    def __eq__(self, other: object) -> bool:
        return self is other or (other is Library.COMM_NULL and self.free)

    __hash__ = object.__hash__

    def Abort(self, code: int) -> None:
        raise SystemExit(code)

    def Isend(self, data: np.ndarray, to: int, tag: int) -> Request:
        request, target = Request(self.machine, self.me), self.group.ranks[to]
        text, costs = data.tobytes(), self.machine.costs

        def arrive() -> None:
            for receive in self.group.receives[to]:
                if receive.fits(self.rank, tag):
                    self.group.receives[to].remove(receive)
                    receive.fill(text)
                    return
            self.group.arrived[to].append((self.rank, tag, text))
            self.machine.tell(target)

        if target.node is self.me.node:
            self.machine.work(costs.message.seconds(len(text)))
            request.finish()
            arrive()
        else:
            end = self.machine.carry(self.me.node, target.node, len(text), self.machine.now)
            self.machine.at(end, request.finish)
            self.machine.at(end + costs.network.latency, arrive)
        return request

    def Irecv(self, into: np.ndarray, source: int, tag: int) -> Request:
        receive = Receive(self.machine, self.me, into, source, tag)
        for message in self.group.arrived[self.rank]:
            if receive.fits(*message[:2]):
                self.group.arrived[self.rank].remove(message)
                receive.fill(message[2])
                return receive
        self.group.receives[self.rank].append(receive)
        return receive

    def Iprobe(self, source: int, tag: int, status: Status) -> bool:
        wanted = Receive(self.machine, self.me, np.empty(0, np.uint8), source, tag)
        for from_, with_, data in self.group.arrived[self.rank]:
            if wanted.fits(from_, with_):
                status.source, status.tag, status.nbytes = from_, with_, len(data)
                return True
        return False

    # collectives

    def Ibarrier(self) -> Request:
        return self._meet("barrier", None, 0, _nothing)

    def Ibcast(self, array: np.ndarray, root: int) -> Request:
        def finish(brought: dict[int, np.ndarray]) -> None:
            for rank, mine in brought.items():
                if rank != root:
                    mine[...] = brought[root]

        return self._meet("broadcast", array, array.nbytes, finish)

    def Iallreduce(self, send: str, array: np.ndarray, operation: str) -> Request:
        if send != Library.IN_PLACE or operation != Library.SUM:
            raise NotImplementedError("Iallreduce: must be a sum in place")

        def finish(brought: dict[int, np.ndarray]) -> None:
            total = brought[0].copy()
            for rank in range(1, len(brought)):
                total += brought[rank]
            for mine in brought.values():
                mine[...] = total

        return self._meet("allreduce", array, array.nbytes, finish)

    def Iallgather(self, array: np.ndarray | str, everything: np.ndarray) -> Request:
        array = everything[self.rank] if isinstance(array, str) else array  # in place

        def finish(brought: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
            for _, into in brought.values():
                for rank, (mine, _) in brought.items():
                    into[rank] = mine

        return self._meet("allgather", (array, everything), array.nbytes, finish)

    def Split(self, color: int, key: int) -> Comm | None:
        return self._split(color, key)

    def Split_type(self, kind: str, key: int) -> Comm | None:  # noqa: ARG002
        return self._split(self.machine.nodes.index(self.me.node), key)

    def _split(self, color: int, key: int) -> Comm | None:
        every = self.share((color, key, self.rank))
        if color == Library.UNDEFINED:
            return None
        ranks = [self.group.ranks[rank] for of, _, rank in sorted(every) if of == color]
        return Comm(self.machine, self.group.made.setdefault((self.met, color), Group(ranks)), self.me)

    def share(self, mine: Any) -> list[Any]:
        """What all ranks brought, in order. Waits for them."""
        found: list[Any] = []
        request = self._meet("share", (mine, found), 0, _exchange)
        pause = Pause(self.machine, LONGEST_PAUSE)
        while not request.Test():
            pause()
        return found

    def _meet(self, what: str, mine: Any, nbytes: int, finish: Callable[[dict[int, Any]], None]) -> Request:
        """Join the next collective operation: it ends some time after the last has come."""
        self.met += 1
        meeting = self.group.meetings.setdefault(self.met, Meeting(what))
        if meeting.what != what:
            raise RuntimeError(f"MPI: ranks must meet for the same; got {meeting.what} and {what}")
        request = Request(self.machine, self.me)
        meeting.brought[self.rank] = mine
        meeting.requests.append(request)
        if len(meeting.requests) == len(self.group.ranks):
            del self.group.meetings[self.met]

            def end() -> None:
                finish(dict(sorted(meeting.brought.items())))
                for waiting in meeting.requests:
                    waiting.finish()

            self.machine.at(self.machine.now + collective(what, self.group.ranks, nbytes, self.machine.costs), end)
        return request


def _nothing(brought: dict[int, Any]) -> None:
    pass


def _exchange(brought: dict[int, Any]) -> None:
    for _, into in brought.values():
        into += [mine for mine, _ in brought.values()]


def collective(what: str, ranks: Sequence[Rank], nbytes: int, costs: Costs) -> float:
    """Seconds from the coming of the last rank to the end.

    With P ranks, L = ceil(log2 P), hops by messages or, if the ranks are on several nodes, through the network
    (Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH", 2005):

        barrier     L latencies
        broadcast   a tree, L hops; or scattered and gathered: L + P - 1 latencies, 2 (P - 1) / P of the bytes
        allreduce   a tree, L hops; or two rings: 2 (P - 1) latencies, 2 (P - 1) / P of the bytes; and the adding
        allgather   a ring, P - 1 hops

    The cheaper one of two. All ranks are taken to do their share at the same time; links are not queued for.
    """
    count = len(ranks)
    if count == 1:
        return 0.0
    hop = costs.message if len({id(rank.node) for rank in ranks}) == 1 else costs.network
    tree = math.ceil(math.log2(count))
    bytes_in_turn = 2 * (count - 1) / count * nbytes / hop.bandwidth
    if what == "broadcast":
        return min(tree * hop.seconds(nbytes), (tree + count - 1) * hop.latency + bytes_in_turn)
    if what == "allreduce":
        adding = nbytes / costs.apply.bandwidth
        return min(tree * (hop.seconds(nbytes) + adding),
                   2 * (count - 1) * hop.latency + bytes_in_turn + (count - 1) / count * adding)
    if what == "allgather":
        return (count - 1) * hop.seconds(nbytes)
    return tree * hop.latency


class Win:
    """One rank's end of a window."""

    def __init__(self, comm: Comm, memories: list[Memory]) -> None:
        self.comm, self.memories = comm, memories
        self.machine, self.me = comm.machine, comm.me
        self.open: list[Answer] = []  # operations since the last Flush

    @staticmethod
    def Allocate(nbytes: int, unit: int, comm: Comm) -> Win:  # noqa: ARG004
        memories = comm.share(Memory(comm.machine, comm.me, nbytes))
        return Win(comm, memories)

    def Get_attr(self, name: str) -> str:
        return name

    def tomemory(self) -> memoryview:
        return self.memories[self.comm.rank].bytes.data

    def Lock_all(self, assertion: str) -> None:
        """All may always read and write."""

    def Unlock_all(self) -> None:
        """See ``Lock_all``."""

    def Sync(self) -> None:
        """A rank's stores are seen in the order in which they are made."""

    def Free(self) -> None:
        mine = self.memories[self.comm.rank]
        self.me.memories.remove(mine)

    def Put(self, data: np.ndarray, target: int, offset: int) -> None:
        memory = self.memories[target]

        def arrive() -> None:
            memory.bytes[offset : offset + data.nbytes] = data.reshape(-1).view(np.uint8)
            memory.look()
            self.machine.tell(memory.owner)

        network = self.machine.costs.network
        self._go(memory, data.nbytes, arrive,
                 lambda now: self.machine.carry(self.me.node, memory.owner.node, data.nbytes, now) + network.latency)

    def Get(self, into: np.ndarray, target: int, offset: int) -> None:
        memory, fiber = self.memories[target], self.machine.running

        def read() -> None:
            seen = memory.bytes[offset : offset + into.nbytes]
            into.reshape(-1).view(np.uint8)[:] = seen
            if into.nbytes <= FEW:
                fiber.looks[memory, offset, offset + into.nbytes] = seen.tobytes()

        network = self.machine.costs.network
        self._go(memory, into.nbytes, read, lambda now: self.machine.carry(
            memory.owner.node, self.me.node, into.nbytes, now + network.latency))

    def Fetch_and_op(self, nothing: np.ndarray, into: np.ndarray, target: int, offset: int,  # noqa: ARG002
                     operation: str) -> None:
        if operation != Library.NO_OP:
            raise NotImplementedError("Fetch_and_op: must change nothing")
        self.Get(into, target, offset)

    def Flush(self, target: int) -> None:  # noqa: ARG002
        while self.open:
            self.open.pop().wait()

    def _go(self, memory: Memory, nbytes: int, action: Callable[[], None], there: Callable[[float], float]) -> None:
        """Do it within the node, at once; or send it on its way, to be there at a time and answered."""
        if memory.owner.node is self.me.node:
            self.machine.work(self.machine.costs.copy.seconds(nbytes))
            action()
            return
        answered = Answer(self.machine)
        self.open.append(answered)
        time = there(self.machine.now)
        self.machine.at(time, action)
        self.machine.at(time + self.machine.costs.network.latency, answered.come)


class Answer:
    """The end of a one-sided transfer between nodes: waited for without looking at anything else."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.fiber = machine, machine.running
        self.there = self.awaited = False

    def come(self) -> Fiber | None:
        self.there = True
        return self.fiber if self.awaited else None

    def wait(self) -> None:
        if not self.there:
            self.awaited = True
            self.machine.give_up()


class Worker:
    """Stands for an executor with one thread, on the cores of a rank's node like the rank itself."""

    def __init__(self, machine: Machine, rank: Rank) -> None:
        self.machine, self.rank = machine, rank

    def submit(self, work: Callable[[], Any]) -> Fiber:
        """Begin with it now; the last work has ended."""
        return self.machine.begin(self.rank, work)

    def shutdown(self) -> None:
        """Nothing is left of it."""


class VirtualWire(Wire):
    """A wire between ranks of a ``Machine``."""

    def __init__(self, mpi: Library, comm: Comm, parent: Wire | None = None) -> None:
        self.machine = mpi.machine
        super().__init__(mpi, comm, parent)

    def clock(self) -> float:
        return self.machine.now

    def pause(self, longest: float = LONGEST_PAUSE) -> Backoff:
        return Pause(self.machine, longest)

    def worked(self, what: str, nbytes: int) -> None:
        seconds = getattr(self.machine.costs, what).seconds(nbytes)
        self.machine.work(seconds)
        self.machine.running.looked |= what == "look" and seconds > 0

    def check(self, rank: int) -> None:
        """Ranks do not die here."""

    def compute(self, seconds: float, crowding: float | None = None) -> None:
        """Own work that takes so long on a core of its own; see ``Machine.work``."""
        self.machine.work(seconds, crowding)

    def worker(self) -> Worker:
        return Worker(self.machine, self.comm.me)

    @property
    def place(self) -> dict[str, object]:
        """In the place of host and process, in reports."""
        return {"host": f"node {self.machine.nodes.index(self.comm.me.node)}", "pid": self.comm.me.number}

    @property
    def where(self) -> str:
        return f"{self.label} on {self.place['host']}"


def run(machine: Machine, program: Callable[[VirtualWire], Any]) -> list[Any]:
    """What ``program`` returns on each rank, given its wire to all of them: see ``Machine.run``."""
    group = Group(machine.ranks)
    return machine.run(lambda rank: program(VirtualWire(Library(machine), Comm(machine, group, rank))))
