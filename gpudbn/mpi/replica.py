"""A replica of asynchronous training: gives its changes to parameter servers, takes what is there.

The other half of ``server.py``; ``staged.py`` says how changes and parameters travel and why nothing is lost,
doubled or torn. ``Link`` is the traffic with one server, which has a shard of the parameters;
``Asynchronous`` has one to each that has something of its own.

The parts of a replica do the same turns in the same order: the first one talks to the first server and tells the others
what that has said. It gives its change to that server when all parts have given theirs, so that what is done there has
arrived at all servers (``ledger.py``). What several parts have, and must have alike, is made so after
every pull (``align``): servers that know nothing of one another have it in several versions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.errors import NonFiniteError
from gpudbn.factors import Factors
from gpudbn.mpi import changes
from gpudbn.mpi import server as to
from gpudbn.mpi.collective import Together
from gpudbn.mpi.hub import unpack
from gpudbn.mpi.sandblaster import EACH, OVER, Batch, Ticket
from gpudbn.mpi.server import Header, cuts
from gpudbn.mpi.staged import ANSWER, REFUSED, ReplicaEnd
from gpudbn.mpi.wire import LONGEST_PAUSE, AgreedError, Wire
from gpudbn.tracing import span

QUIET = 0.05  # seconds of the pauses of one that waits for the end


class Link:
    """To one server. Arrays are shards of parameters and changes.

    Parameters
    ----------
    wire : Wire
        The server, rank 0, and all replicas, or the same part of each. Collective over these.
    size : int
        The most entries of a vector of the run at the server.
    end : callable (wire, size, header_words)
        Makes this end of the transport, a ``ReplicaEnd``.
    push : str
        See ``changes.Packing``.
    head : bool
        Whether what concerns the server as a whole goes this way: no other part before mine has a link to it.
    """

    def __init__(self, wire: Wire, size: int, end: Any = ReplicaEnd, *, push: str = "dense",
                 head: bool = True) -> None:
        self.wire, self.replica, self.size, self.head = wire, wire.rank - 1, size, head
        self.header = Header(wire.size - 1)  # as of the last pull
        self.end = end(wire, size, self.header.words.size)
        self.packing = changes.Packing(push)
        self.base = 0  # versions contained in my parameters before local steps, my own pushes among them

    def announce(self, part: slice) -> None:
        """What is exchanged from now on is that part of a vector."""
        if part.stop - part.start > self.size:
            raise ValueError(f"parameters: must be of a size for which there is room, at most {self.size} entries a "
                             f"server; got {part.stop - part.start}")
        self.packing.begin(part.start)

    def begin(self, shard: Array) -> None:
        """Give the server the values to begin with; returns when they are published."""
        self.wire.send(shard, 0, to.BEGIN)
        self.wire.recv_bytes(0, ANSWER)

    def ask(self, tag: int, content: bytes = b"", *, longest: float = LONGEST_PAUSE) -> bytes:
        """The server's answer to a message."""
        self.wire.send_bytes(content, 0, tag)
        return self.wire.recv_bytes(0, ANSWER, longest=longest)

    def state(self, size: int) -> dict[str, np.ndarray]:
        """What a checkpoint keeps of the server's rule: arrays of its shard's size. For one replica to ask."""
        state = {name: np.empty(size, np.float32) for name in self.ask(to.KEEP).decode().split()}
        for array in state.values():
            self.wire.recv(array, 0, ANSWER)
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Give the server's rule back what ``state`` gave."""
        for name in self.ask(to.RESTORE).decode().split():
            self.wire.send(state[name], 0, to.RESTORE)

    def report(self) -> dict[str, Any]:
        """What the server did so far: see ``Server.report``. For one replica to ask."""
        report: dict[str, Any] = json.loads(self.ask(to.REPORT))
        return report

    def packed(self, change: Array, factors: Factors | None, turn: int) -> tuple[np.ndarray, Array]:
        """Label and payload of a change; it becomes what the server will make of it."""
        return self.packing.encode(change, base=self.base, turn=turn, factors=factors)

    def push(self, change: Array, factors: Factors | None, turn: int) -> None:
        """Give a change to the server; see ``packed``."""
        self.end.push(*self.packed(change, factors, turn))

    def pull(self, shard: Array) -> None:
        """The latest parameters, and the header that belongs to them."""
        self.end.pull(self.header.words, shard)

    def exchange(self, shard: Array, change: Array, fetch: bool) -> None:
        """After a push of ``change``: what the server has, and my change where that does not contain it yet."""
        if fetch:
            self.pull(shard)
            self.add_missing(shard, change)
        else:
            self.base += 1

    def add_missing(self, shard: Array, change: Array) -> None:
        """After a pull into ``shard``: add my last change where that does not contain it yet."""
        missing = self.end.sequence - int(self.header.applied[self.replica])  # 0 or 1
        if missing:
            shard += change
        self.base = int(self.header.version[0]) + missing


class Asynchronous(Together):
    """One of the replicas around one or several servers, or a part of one.

    Parameters
    ----------
    world : Wire
        All ranks.
    everyone : Wire
        The replicas: all parts of all of them.
    links : sequence of Link
        To the servers that have something of mine, in order.
    parts : int
        How many neighbouring ranks hold a replica together.
    max_staleness : int, optional
        How many turns it may be ahead of the slowest; default: any number.
    """

    shards_rows = True
    gives_portions = True

    def __init__(self, world: Wire, everyone: Wire, links: Sequence[Link], parts: int = 1, *,
                 max_staleness: int | None = None) -> None:
        super().__init__(everyone, parts)
        self.world, self.links, self.max_staleness = world, links, max_staleness
        world.label = everyone.label
        self.wants_factors = links[0].packing.push == "factored"
        self._servers = world.size - everyone.size
        self._cuts: list[slice] = []  # of the phase's parameters
        self._pulls = 0
        self._next_turn = 0  # the first of the next epoch
        self._turn = changes.NO_TURN
        self._behind = False  # whether others had time to go on while I waited
        self._batches = 0  # that a batch optimiser has had

    def begin(self, parameters: Array) -> None:
        if parameters.dtype != np.float32 or parameters.ndim != 1:
            raise ValueError(f"begin: parameters must be a float32 vector; got {parameters.dtype} {parameters.shape}")
        self._settle()
        self._gather()
        self._cuts = cuts(parameters.size, self._servers, self.shards.count, self.shards.index)
        for link, part in self._places():
            link.announce(part)
        while True:
            chief = self.living[0]
            if self.first:
                for link, part in self._places():
                    link.begin(parameters[part])
            self._gather()
            if chief in self.living:  # or else it may have died before all servers had begun
                break
        self._pull_together(parameters)

    def _places(self) -> list[tuple[Link, slice]]:
        """The links, and what of my parameters goes by each."""
        return list(zip(self.links, self._cuts, strict=True))

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the servers' rules keep. The chief gets it; what 16 bits have rounded away of changes is let go."""
        found: dict[str, Array] = {}
        if self.first:
            for link, part in self._places():
                for name, array in link.state(part.stop - part.start).items():
                    found.setdefault(f"server.{name}", np.zeros(self._cuts[-1].stop, np.float32))[part] = array
        self._gather()
        return found, {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        state = {name.removeprefix("server."): array for name, array in arrays.items() if name.startswith("server.")}
        if self.first and state:
            for link, part in self._places():
                link.restore({name: array[part] for name, array in state.items()})
        self._gather()  # nobody pushes before

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:
        change = before  # its memory: the old values are needed no more
        module_of(parameters, before).subtract(parameters, before, out=change)
        places = self._places()
        # the first part's to the first server waits until all parts have given theirs
        last = places[:1] if self.shards.count > 1 and self.shards.index == 0 else []
        with self._in_step():
            for link, part in reversed(places[len(last):]):  # see ``ledger.py``
                link.push(change[part], self.factors, self._turn)
            for link, _ in last:
                link.end.drain()
        with contextlib.suppress(NonFiniteError):  # refused since: the next call says so, to all parts
            for link, part in last:
                link.push(change[part], self.factors, self._turn)
        self._pulls += fetch
        for link, part in places:
            link.exchange(parameters[part], change[part], fetch)
        if fetch:
            self.align()
        before[...] = parameters
        self.wire.worked("exchange", parameters.nbytes)

    @property
    def packed(self) -> str:
        return " and ".join(sorted({link.packing.last for link in self.links}))

    def turns(self, each: int, warm: int = 0) -> Iterator[tuple[int, int]]:
        first = self._next_turn
        self._next_turn += self.replicas * each
        plan = self._plan(first, each, warm)
        while True:
            self._turn, waited = np.frombuffer(self._by_first(lambda: next(plan)), np.int64).tolist()
            if self._turn == to.NO_MORE:
                break
            self._behind |= bool(waited)
            yield divmod(self._turn - first, each)
        self._turn = changes.NO_TURN

    def _plan(self, first: int, each: int, warm: int) -> Iterator[bytes]:
        """The turns of an epoch as the first part has them done, NO_MORE behind them; and before which it has waited.

        Each as two int64.
        """
        header, own = self.links[0].header, 0
        ahead = each if self.max_staleness is None else self.max_staleness
        allowed = each if ahead >= each and not warm else 0
        while own < (header.limit[self.replica] if header.epoch[0] == first else each):
            waits = own >= allowed
            if waits:
                allowed = self._wait_for(to.GO, first, each, own, ahead, warm)
            yield np.array([first + self.replica * each + own, waits and (own > 0 or warm > 0)]).tobytes()
            own += 1
        while True:
            yield np.array([self._wait_for(to.MORE, first, each), True]).tobytes()

    def _wait_for(self, tag: int, *words: int) -> int:
        """The first server's answer to the first part, when it has one."""
        self._drain()
        answer = self.links[0].ask(tag, np.array(words, np.int64).tobytes())
        return int(np.frombuffer(self._admitted(answer), np.int64)[0])

    def refresh(self, parameters: Array, before: Array) -> None:
        if not self._behind:
            return
        self._behind = False
        self._settle()
        self._pull(parameters)
        before[...] = parameters

    def search(self, parameters: Array, gradient: Array, compute: Callable[[int, int], float], rows: int, *,
               method: str, history: int, searches: int, portions: int | None = None) -> None:
        batch = Batch(self._batches, rows, min(portions or EACH * self.replicas, rows), method, history, searches)
        self._batches += 1
        evaluation = -1  # of which I have the parameters
        while True:
            answer = self._admitted(self.links[0].ask(to.CLAIM, batch.pack()))
            if answer == OVER:
                break
            ticket = Ticket.unpack(answer)
            if ticket.evaluation != evaluation:
                evaluation = ticket.evaluation
                self._pull(parameters)
            loss = compute(*batch.span(ticket.portion))
            for link, part in reversed(self._places()):  # see ``sandblaster.py``
                link.end.push(ticket.label(loss, gradient[part].nbytes), gradient[part])
        self._pull(parameters)

    def meet(self, parameters: Array) -> None:
        with span("meet"):
            self._settle()
            self._gather()
            self._pull_together(parameters)

    def total(self, values: np.ndarray) -> np.ndarray:
        tables = self._gather(np.ascontiguousarray(values, np.float64).tobytes())
        return np.sum([np.frombuffer(table).reshape(values.shape) for table in tables], axis=0)

    def any(self, flag: bool) -> bool:
        flag = not self.shards.least(not flag)
        return any(map(any, self._gather(bytes([flag]))))

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        found = None
        for part in range(self.shards.count):  # by way of the first one, which so never has all of them
            theirs = self.shards.collect(array if part == self.shards.index else array.reshape(-1)[:0])
            every = self._gather(_described(theirs[part]) if theirs else b"", to.COLLECT)
            if self.first and part == self.shards.index:
                found = [_array(content) for content in every]
        return found

    def told(self, text: str) -> str:
        return self._gather(text.encode() if self.chief else b"")[0].decode()

    def agree(self, error: str | None) -> None:
        texts = self.shards.texts(error or "")
        part = next((part for part, text in enumerate(texts) if text), 0)
        common = len(set(texts)) == 1
        found = self._gather(json.dumps([part, common, texts[part]]).encode())
        errors = {replica: json.loads(word) for replica, word in zip(self.living, found, strict=True)}
        owner = next((replica for replica, (_, _, text) in errors.items() if text), None)
        if owner is None:
            return
        part, _, text = errors[owner]
        alike = len({text for _, _, text in errors.values()}) == 1 and all(common for _, common, _ in errors.values())
        where = self.everyone.peers[owner * self.shards.count + part]
        agreed = AgreedError(text if alike else f"{where.role} on {where.host}: {text}")
        for link in self._heads():
            link.wire.send_text(str(agreed), 0, to.FAIL)
        raise agreed

    def leave(self, why: str) -> bool:
        with contextlib.suppress(NonFiniteError):  # refused: that is known
            self._drain()
        if not self.links[0].ask(to.LEAVE, why.encode()):
            return False
        self.living, self.world.whole = (), False
        self.links[0].wire.recv_bytes(0, ANSWER, longest=QUIET)
        return True

    def ranks(self) -> list[dict[str, Any]]:
        return [peer.about() for peer in self.world.peers]

    def report(self) -> dict[str, Any]:
        return super().report() | {
            "pushes": self.links[0].end.sequence, "pulls": self._pulls,
            "reads_retried": sum(link.end.retried for link in self.links),
            "reads_asked": sum(link.end.asked for link in self.links)}

    def reports(self) -> list[dict[str, Any]] | None:
        mine = [*(link.report() for link in self._heads()), self.report()]
        every = self._gather("\n".join(self.shards.texts(json.dumps(mine))).encode(), to.COLLECT)
        if not self.chief:
            return None
        found = [report for replica in every for part in replica.splitlines() for report in json.loads(part)]
        return sorted(found, key=lambda report: report["role"] == "replica")

    def _heads(self) -> list[Link]:
        """Of the first replica: the links by which its parts talk to each server once. Of others none."""
        return [link for link in self.links if link.head and self.first]

    def close(self) -> None:
        if self.living:
            self._settle()
            self._gather()
            for link in self.links:
                link.wire.send_bytes(b"", 0, to.FINISH)
        self.world.close()

    def _gather(self, content: bytes = b"", tag: int = to.MEET) -> list[bytes]:
        """Meet the others, when all parts are here: what the first ones bring, in their order. See ``hub.py``."""
        self.shards.least(0)
        parts = unpack(self._by_first(lambda: self.links[0].ask(tag, content)))
        if tuple(parts) != self.living:
            gone = np.setdiff1d(np.arange(self.replicas), list(parts))
            for link in self.links:
                if link.head and link.wire.peers[0].rank:  # the first server knows
                    link.ask(to.LOST, gone.tobytes())
            self.living, self.world.whole = tuple(parts), False
        return list(parts.values())

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        """The parts of a replica go on when all have done this, or all raise NonFiniteError if one is refused."""
        refused = False
        try:
            yield
        except NonFiniteError:
            refused = True
        if not self.shards.least(not refused):
            raise NonFiniteError(REFUSED)

    def _by_first(self, work: Callable[[], bytes]) -> bytes:
        """What this gives on the first part, on all parts; if it is refused there, all raise NonFiniteError."""
        found = b""
        if self.shards.index == 0:
            with contextlib.suppress(NonFiniteError):
                found = work()
        return self._admitted(self.shards.told(found))

    def _admitted(self, answer: bytes) -> bytes:
        """An answer of the first server, which is empty where it goes on without me."""
        if not answer:
            raise NonFiniteError(REFUSED)
        return answer

    def _settle(self) -> None:
        """Wait until all that the parts have given is taken."""
        with self._in_step():
            self._drain()

    def _drain(self) -> None:
        for link in self.links:
            link.end.drain()

    def _pull(self, parameters: Array) -> None:
        """The latest, when nothing of mine is on its way."""
        self._pulls += 1
        for link, part in self._places():
            link.pull(parameters[part])
            link.base = int(link.header.version[0])
        self.align()

    def _pull_together(self, parameters: Array) -> None:
        """All pull while nobody pushes."""
        self._gather()
        self._pull(parameters)
        self._gather()


def _described(array: np.ndarray) -> bytes:
    """An array with its type and shape, for ``_array``."""
    return " ".join([array.dtype.str, *map(str, array.shape)]).encode() + b"\n" + array.tobytes()


def _array(content: bytes) -> np.ndarray:
    kind, _, values = content.partition(b"\n")
    dtype, *shape = kind.decode().split()
    return np.frombuffer(values, dtype).reshape([int(length) for length in shape])
