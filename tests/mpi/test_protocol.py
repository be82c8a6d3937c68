"""Server and replicas in one process, without MPI: every step of the protocol is chosen by the test.

The window is plain memory. What a reader may see of it while the server writes is modelled by the
states between the server's calls of ``sync``: there any part of its stores may be visible.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from gpudbn.errors import NonFiniteError
from gpudbn.mpi import staged
from gpudbn.mpi.hub import pack
from gpudbn.mpi.replica import Asynchronous, Link
from gpudbn.mpi.rules import Rule
from gpudbn.mpi.server import LEAVE, MEET, Server, Store, cuts, rooms
from gpudbn.mpi.staged import ANSWER
from gpudbn.mpi.wire import Peer, Tally


class FakeWindow:
    """The server's memory, as the server sees it; ``states`` keeps a copy at each ``sync`` if it is a list."""

    def __init__(self, wire, nbytes):
        if wire.rank == 0:
            wire.job.memory = np.zeros(nbytes, np.uint8)
        self.job = wire.job
        assert self.job.memory.nbytes == nbytes, "the ranks disagree about the layout"

    @property
    def memory(self):
        return self.job.memory

    def put(self, array, offset):
        self.memory[offset : offset + array.nbytes] = array.view(np.uint8)

    def get(self, array, offset):
        array.view(np.uint8)[...] = self.memory[offset : offset + array.nbytes]

    def read(self, offset):
        return int(self.memory[offset : offset + 8].view(np.int64)[0])

    def sync(self):
        if self.job.states is not None:
            self.job.states.append(self.memory.copy())


class FakeWire:
    """Messages between the server and the replicas; meetings are the test's business."""

    def __init__(self, job, rank):
        self.job, self.rank, self.size = job, rank, job.ranks
        self.label, self.tally, self.whole = "", Tally(), True
        self.peers = [Peer(number, "here", 100 + number, 0, f"rank {number}") for number in range(job.ranks)]

    def split(self, color):
        wire = FakeWire(self.job, self.rank - color)
        wire.size = self.job.ranks - 1 if color else 1
        return wire

    def local_rank(self):
        return self.rank

    def barrier(self):
        pass

    def clock(self):
        return 0.0

    def pause(self, longest=0.0):  # noqa: ARG002
        return lambda: pytest.fail("waits for what does not come")

    def worked(self, what, nbytes):
        pass

    def worker(self):
        return ThreadPoolExecutor(1)

    def check(self, rank):
        pass

    def send(self, array, to, tag=0):
        self.job.messages[self.rank, to, tag].append(array.tobytes())

    def recv(self, array, source, tag=0):
        array.view(np.uint8)[...] = np.frombuffer(self.recv_bytes(source, tag), np.uint8)

    def send_bytes(self, content, to, tag=0):
        if tag == MEET:  # as if all had brought the same
            to, tag, content = self.rank, ANSWER, pack(dict.fromkeys(range(self.size - 1), content))
            self.job.messages[0, to, tag].append(content)
        else:
            self.job.messages[self.rank, to, tag].append(content)

    def recv_bytes(self, source, tag=0, *, longest=0.0):  # noqa: ARG002
        if source == 0:
            self.job.answer()
        return self.job.messages[source, self.rank, tag].popleft()


class Job:
    """A server and its replicas. ``lazy``: the server takes changes only when the test says so."""

    def __init__(self, monkeypatch, replicas, size, rule=None, push="dense"):
        monkeypatch.setattr(staged, "Window", FakeWindow)
        self.ranks = replicas + 1
        self.messages = defaultdict(deque)  # by sender, receiver and tag
        self.states = None
        self.store = Store(FakeWire(self, 0), size, rule)
        self.server = Server(FakeWire(self, 0), [self.store])
        end = partial(staged.ReplicaEnd, asking=self.store.rule.asks)
        self.replicas = [Asynchronous(FakeWire(self, rank), FakeWire(self, rank).split(1),
                                      [Link(FakeWire(self, rank), size, end, push=push)])
                         for rank in range(1, self.ranks)]

    def answer(self):
        for source, _, tag in [address for address, queue in self.messages.items() if queue and address[1] == 0]:
            self.server._answer(self.store, source, tag)
            self.server._settle()

    def begin(self, size):
        """All replicas begin with zeros; their parameters and copies of them."""
        parameters = [np.zeros(size, np.float32) for _ in self.replicas]
        for one, own in zip(self.replicas, parameters, strict=True):
            one.begin(own)
        return parameters, [own.copy() for own in parameters]

    def staleness(self):
        staleness = self.store.header.staleness
        return np.flatnonzero(staleness).tolist(), staleness.sum()


def test_my_change_is_added_only_while_the_server_has_not_published_it(monkeypatch):
    job = Job(monkeypatch, 1, 8)
    (one,), ((p,), (before,)) = job.replicas, job.begin(8)
    p += 5
    one.exchange(p, before)  # the server sleeps: the pull does not contain it
    assert (p == 5).all()
    assert (before == 5).all()
    assert job.server._take()
    assert not job.server._take()
    assert (job.store.parameters == 5).all()

    put = FakeWindow.put
    monkeypatch.setattr(FakeWindow, "put", lambda self, array, offset: (put(self, array, offset), job.server._take()))
    p += 2
    one.exchange(p, before)  # the server is quick: the pull contains it
    assert (p == 7).all()
    assert (before == 7).all()
    assert (job.store.parameters == 7).all()


def test_staleness_counts_the_changes_of_others(monkeypatch):
    job = Job(monkeypatch, 2, 8)
    (a, b), (p, before) = job.replicas, job.begin(8)

    def give(one, fetch):
        p[one.replica] += 1
        one.exchange(p[one.replica], before[one.replica], fetch=fetch)
        assert job.server._take()

    for fetch in (True, False, False, True, True):
        give(a, fetch)  # alone so far: never stale
    assert job.staleness() == ([0], 5)
    give(b, True)  # computed on version 0
    assert job.staleness() == ([0, 5], 6)
    give(b, True)  # on 5, its own added to it
    give(a, True)  # has not seen the two of b
    assert job.staleness() == ([0, 2, 5], 8)


def test_several_full_mailboxes_are_taken_in_turns_and_published_once(monkeypatch):
    order = []

    def note(parameters, change, staleness):  # noqa: ARG001
        order.append(int(change[0]))

    job = Job(monkeypatch, 3, 8, Rule(note))
    p, before = job.begin(8)
    for _ in range(3):
        for one, own, old in zip(job.replicas, p, before, strict=True):
            own[:] = old + np.float32(10 + one.replica)
            one.exchange(own, old, fetch=False)
        turn = int(job.store.end._turn[0])
        assert job.server._take()
        assert job.store.end._turn[0] == turn + 2
    assert order == [10, 11, 12, 11, 12, 10, 12, 10, 11]


def test_a_rule_gets_parameters_change_and_staleness(monkeypatch):
    def halve(parameters, change, staleness):
        parameters += change / (1 + staleness)

    job = Job(monkeypatch, 2, 4, rule=Rule(halve))
    (a, b), (p, before) = job.replicas, job.begin(4)
    for one in (a, b):
        p[one.replica] += 1
        one.exchange(p[one.replica], before[one.replica])
    job.server._take()
    assert (job.store.parameters == 1.5).all()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4_099])
@pytest.mark.parametrize("servers", [1, 2, 3, 7])
def test_servers_share_out_a_vector_at_multiples_of_a_cache_line(size, servers):
    parts = cuts(size, servers)
    assert len(parts) == servers
    assert np.concatenate([np.arange(size)[part] for part in parts]).tolist() == list(range(size))
    assert all(part.start % 16 == 0 or part.start == size for part in parts)


@pytest.mark.parametrize(("servers", "parts", "holders"), [
    (1, 1, [[0]]), (3, 1, [[0, 1, 2]]), (1, 3, [[0], [0], [0]]), (2, 2, [[0], [1]]), (4, 2, [[0, 1], [2, 3]]),
    (2, 3, [[0], [0, 1], [1]]), (3, 2, [[0, 1], [1, 2]]), (5, 3, [[0, 1], [1, 2, 3], [3, 4]])])
def test_a_part_is_shared_out_among_the_servers_whose_range_meets_its_own(servers, parts, holders):
    assert [list(rooms(1_000, servers, parts, part)) for part in range(parts)] == holders
    total = dict.fromkeys(range(servers), 0)
    for part in range(parts):
        room = rooms(100_003, servers, parts, part)
        for server, most in room.items():
            total[server] += most
        for size in (1, 17, 481, 99_999, 100_000, 100_002):  # smaller vectors never need more room
            pieces = cuts(size, servers, parts, part)
            assert sum(piece.stop - piece.start for piece in pieces) == size
            assert all(piece.stop - piece.start <= most for piece, most in zip(pieces, room.values(), strict=True))
    share = 100_003 * parts / servers
    assert all(share <= most < share + 16 * (parts + 1) for most in total.values())


def visible(states, generator):
    """States of memory that others may see, in order: at each sync, and mixtures of two neighbours."""
    for old, new in itertools.pairwise(states):
        yield old
        cut = 8 * int(generator.integers(old.size // 8))
        yield np.concatenate([new[:cut], old[cut:]])
        yield np.concatenate([old[:cut], new[cut:]])
        words = generator.random(old.size // 8) < 0.5
        yield np.where(np.repeat(words, 8), new, old)
    yield states[-1]


class Asked(Exception):  # noqa: N818
    """A reader was too slow three times."""


def test_whatever_is_read_is_whole_and_contains_what_was_freed(monkeypatch):
    """Readers are stopped anywhere for as long as one likes, the values read in two halves."""
    schedules = 20_000
    job = Job(monkeypatch, 1, 16)
    (one,), ((p,), (before,)) = job.replicas, job.begin(16)
    job.states = [job.memory.copy()]
    for _ in range(4):
        p += 1
        one.exchange(p, before, fetch=False)
        assert job.server._take()
    job.states.append(job.memory.copy())
    generator = np.random.default_rng(3)
    seen = list(visible(job.states, generator))

    class Reader(FakeWindow):
        """Time goes on between any two accesses."""

        def look(self):
            self.now = min(self.now + int(generator.choice([0, 0, 0, 1, 2, 5, 12])), len(seen) - 1)
            job.memory = seen[self.now]

        def read(self, offset):
            self.look()
            return super().read(offset)

        def get(self, array, offset):
            for half in np.array_split(np.arange(array.size), 2):
                if half.size:
                    self.look()
                    super().get(array[half[0] : half[-1] + 1], offset + array.itemsize * int(half[0]))

    def answer():
        raise Asked

    monkeypatch.setattr(job, "answer", answer)
    (link,) = one.links
    link.end.window = window = Reader(FakeWire(job, 1), job.memory.nbytes)
    accepted, freed = 0, np.zeros(1, np.int64)
    for _ in range(schedules):
        window.now = int(generator.integers(len(seen)))
        window.get(freed, link.end.layout.freed)
        try:
            link.pull(p)
        except Asked:
            continue
        accepted += 1
        assert (p == p[0]).all(), "torn"
        assert link.header.version[0] == p[0], "parameters and header of different versions"
        assert link.header.applied[0] >= freed[0], "freed before it was published"
    assert accepted > schedules / 2


def push(job, replica, value, turn):
    """A change of this value from a replica, of this turn of the run; not taken."""
    job.replicas[replica].links[0].push(np.full(8, value, np.float32), None, turn)


def test_a_turn_is_applied_once_whoever_sends_it(monkeypatch):
    job = Job(monkeypatch, 2, 8)
    job.begin(8)
    for replica, value, turn in ((0, 1, 7), (1, 2, 7), (1, 4, 8), (0, 8, 8), (0, 16, -1), (1, 32, -1)):
        push(job, replica, value, turn)
        assert job.server._take()
    assert (job.store.parameters == 1 + 4 + 16 + 32).all()
    assert job.store.header.version[0] == 4
    assert job.store.refused.tolist() == [1, 1]
    p = np.empty(8, np.float32)
    for one in job.replicas:  # consumed all the same: nobody waits, or adds its own change to what is there
        one.links[0].end.drain()
        one.links[0].pull(p)
        assert one.links[0].header.applied.tolist() == [3, 3]


def test_of_one_that_is_lost_a_whole_change_counts_and_nothing_afterwards(monkeypatch, capsys):
    job = Job(monkeypatch, 3, 8)
    job.begin(8)
    push(job, 0, 1, 0)
    push(job, 1, 2, 5)
    link = job.replicas[2].links[0]
    put, parts = FakeWindow.put, iter([True, True, False])  # the number that says that it is there never comes
    monkeypatch.setattr(FakeWindow, "put", lambda self, array, offset: next(parts) and put(self, array, offset))
    link.push(np.full(8, 64, np.float32), None, 9)
    monkeypatch.setattr(FakeWindow, "put", put)
    for replica in (2, 1):
        job.server._lose(job.store, replica, "died")
    assert (job.store.parameters == 3).all()
    assert "rank 2 on here (rank 2, process 102) died; 1 of 3 replicas go on" in capsys.readouterr().err
    put(link.end.window, np.ones(1, np.int64), link.end.layout.sequence + 8 * 2)  # it comes after all
    assert not job.server._take()
    with pytest.raises(NonFiniteError, match="goes on without this replica"):
        link.end.drain()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_that_sends_nan_is_refused_and_finds_out(monkeypatch, bad):
    job = Job(monkeypatch, 2, 8)
    (a, b), (p, before) = job.replicas, job.begin(8)
    p[0][3] = bad
    p[1] += 1
    a.exchange(p[0], before[0], fetch=False)
    b.exchange(p[1], before[1], fetch=False)
    assert job.server._take()
    assert (job.store.parameters == 1).all()
    assert job.server._hub.living == [1]
    with pytest.raises(NonFiniteError):
        a.links[0].end.drain()
    p[1] += 1e30  # its square is not finite, but the change is
    b.exchange(p[1], before[1], fetch=False)
    assert job.server._take()
    assert (job.store.parameters > 9e29).all()


def test_the_last_one_cannot_leave(monkeypatch):
    job = Job(monkeypatch, 2, 8)
    job.begin(8)
    link = job.replicas[0].links[0]
    job.server._lose(job.store, 1, "died")
    assert link.ask(LEAVE, b"NaN") == b""
    assert job.server._hub.living == [0]
