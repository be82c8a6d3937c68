"""A parameter server: takes changes out of mailboxes as they arrive, publishes what comes of them.

There may be several, each with its shard of the parameters (``cuts``): they know nothing of one another, but for a
batch optimiser at the first (``sandblaster.py``). A server has a ``Store`` for each part of a replica of whose
parameters it holds some: for one, where replicas are whole.
A change is applied once in each store, whatever dies: ``ledger.py``.

It knows vectors and a step rule (``rules.py``), not what they mean; how changes and parameters travel is the
business of ``staged.py``, and how a change is packed that of ``changes.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpudbn.arrays import module_of
from gpudbn.errors import LostError
from gpudbn.mpi import changes
from gpudbn.mpi.hub import Hub, pack
from gpudbn.mpi.ledger import Epoch, Ledger
from gpudbn.mpi.rules import Rule
from gpudbn.mpi.sandblaster import COMMAND, RESULT, Coordinator, Shard
from gpudbn.mpi.staged import ANSWER, ASK, ServerEnd
from gpudbn.mpi.wire import AgreedError, RanksLostError, Wire
from gpudbn.tracing import span

# tags of what replicas tell a server; all but FAIL and FINISH are answered
BEGIN = 11  # the values to begin with
LOST = 12  # the numbers of replicas that are lost
FAIL = 13  # an error that the replicas agreed on
FINISH = 14  # the run is over for me
REPORT = 19  # tell what you did
KEEP, RESTORE = 20, 21  # tell what your rule keeps; and take it back
# the first server only
MEET, COLLECT = 15, 16  # what I bring to a meeting; for all, or for the chief
MORE = 17  # my turns are done: first turn and turns of a shard in this epoch
LEAVE = 18  # I cannot go on, and why
GO = 22  # may I begin a turn of my own? First turn and turns of a shard, turns I have done, ``ahead``, ``warm``
NO_MORE = -1  # in the place of a turn
CLAIM = 23  # give me a portion of this batch: see ``sandblaster.py``

LONGEST_PAUSE = 0.25e-3  # seconds; where MPI needs the server to move data, each step of a push may wait that long
LINE = 16  # float32 of a cache line
STALENESS = 32  # entries of the histogram, and two for each replica; the last counts all that are staler


def rooms(size: int, servers: int, parts: int = 1, part: int = 0) -> dict[int, int]:
    """By server, in order, the most entries it gets of a part's vectors of at most ``size``: those it gets any of.

    The vectors of a replica's parts lie end to end, and servers share them out evenly: at multiples of a cache line.
    """
    found = {}
    for server in range(part * servers // parts, -(-(part + 1) * servers // parts)):
        share = min((server + 1) * parts, (part + 1) * servers) - max(server * parts, part * servers)
        found[server] = -(-size * share // servers // LINE) * LINE  # share / servers of the part's
    return found


def cuts(size: int, servers: int, parts: int = 1, part: int = 0) -> list[slice]:
    """What each of the servers in ``rooms`` gets of a part's vector, in order; the last ones may get nothing."""
    ends = np.minimum(np.cumsum(list(rooms(size, servers, parts, part).values())), size).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class Header:
    """What a server publishes together with parameters: views of ``words``, an array of int64.

    Attributes
    ----------
    version : array (1,)
        How many changes were applied.
    applied : array (replicas,)
        The sequence number of the last change of each replica that was.
    staleness : array (STALENESS + 2 replicas,)
        Histogram: entry s counts changes that were applied s versions late, the last one that many or more.
    epoch : array (1,)
        The first turn of the epoch of ``limit``.
    limit : array (replicas,)
        How many turns of its own shard each replica does: see ``ledger.Epoch``. From the first server.
    """

    def __init__(self, replicas: int) -> None:
        sizes = np.array([1, replicas, STALENESS + 2 * replicas, 1, replicas])
        self.words = np.zeros(sizes.sum(), np.int64)
        self.version, self.applied, self.staleness, self.epoch, self.limit = np.split(
            self.words, np.cumsum(sizes)[:-1])
        self.epoch[0] = -1


class Store:
    """One vector of parameters at a server: its mailboxes, its rule, and what is published of it.

    Parameters
    ----------
    wire : Wire
        The server, rank 0, and replicas, or the same part of each. Collective: these make their ends at the same time.
    size : int
        The most entries of a vector of the run.
    rule : Rule, optional
        Applies a change (float32, not modified) to the parameters (float32, in place): this store's own.
    end : callable (wire, size, header_words)
        Makes this end of the transport, a ``ServerEnd``.

    Attributes
    ----------
    header : Header
        As it will be published next.
    ledger : Ledger
    refused : array (replicas,), int64
        Changes of turns, or portions, that were done already.
    shard : Shard or None
        In a phase of a batch optimiser: takes portions of gradients in the place of changes.
    asked : int
        Reads by message.
    finished : set of int
        Replicas for which the run is over.
    """

    def __init__(self, wire: Wire, size: int, rule: Rule | None = None, end: Any = ServerEnd) -> None:
        self.wire, self.replicas, self.rule = wire, wire.size - 1, rule or Rule()
        self.header = Header(self.replicas)
        self.end = end(wire, size, self.header.words.size)
        self.parameters = self.end.empty(0)
        self.ledger = Ledger()
        self.refused = np.zeros(self.replicas, np.int64)
        self.asked = 0
        self.finished: set[int] = set()
        self.shard: Shard | None = None
        self._first = 0

    def begin(self, content: bytes) -> None:
        """Publish the values to begin with."""
        self.parameters = self.end.empty(len(content) // 4)
        self.parameters[...] = module_of(self.parameters).asarray(np.frombuffer(content, np.float32))
        self.rule.begin(self.parameters, self.replicas)
        self.shard = None
        self.publish()

    def publish(self) -> None:
        """Let all read the parameters as they are now."""
        self.end.publish(self.header.words, self.parameters)

    def take(self) -> list[int] | None:
        """Apply what lies in the mailboxes, then publish once: the replicas that sent NaN or infinity.

        None if there was nothing.
        """
        full = self.end.full()
        if not full:
            return None
        with self.wire.tally.timing("applying"):
            order = sorted(full, key=lambda replica: (replica - self._first) % self.replicas)
            self._first = order[0] + 1  # of several that are full at once, another goes first next time
            bad = [replica for replica in order if not self._apply(replica)]
            if self.shard:
                self.end.free()
            else:
                self.publish()
        return bad

    def _apply(self, replica: int) -> bool:
        """Apply the change in a mailbox, if its turn is not done. False if it is not finite: nothing is done then."""
        header, label = self.header, self.end.label(replica)
        self.end.taken(replica)
        header.applied[replica] += 1
        if self.shard:
            self.refused[replica] += not self.shard.take(label, self.end.payload(replica))
            return True
        turn = int(label[changes.TURN])
        if turn != changes.NO_TURN and self.ledger.done(turn, 1)[0]:
            self.refused[replica] += 1
            return True
        staleness = int(header.version[0] - label[changes.BASE])
        with span("apply"):
            if not changes.apply(self.rule, self.parameters, label, self.end.payload(replica), staleness, replica):
                self.end.shut(replica)
                return False
            self.wire.worked("apply", self.parameters.nbytes)
        if turn != changes.NO_TURN:
            self.ledger.add(turn)
        header.version += 1
        header.staleness[min(staleness, header.staleness.size - 1)] += 1
        return True

    def answer(self, replica: int) -> None:
        """Send header and parameters to a replica that asks for them."""
        self.asked += 1
        self.rule.pulled(replica, self.parameters)
        self.end.answer(replica, self.header.words, self.parameters)

    def tell_rule(self, replica: int, tag: int) -> None:
        """What the rule keeps, to a replica (KEEP) or from it (RESTORE): the names first, then the arrays."""
        state = self.rule.state()
        self.wire.send_bytes(" ".join(state).encode(), replica + 1, ANSWER)
        for array in state.values():
            if tag == KEEP:
                self.wire.send(array, replica + 1, ANSWER)
            else:
                self.wire.recv(array, replica + 1, RESTORE)


class Server:
    """One server.

    The first server is also where replicas meet (``hub.py``) and get turns of others (``ledger.py``): at its first
    store. It decides who is lost; the other servers are told by the replicas, after every meeting that somebody missed.

    Parameters
    ----------
    world : Wire
        All ranks: other servers, too.
    stores : sequence of Store
    peers : Wire, optional
        The servers, where there are several.
    """

    transport = ""  # which, and why so, in a few words

    def __init__(self, world: Wire, stores: Sequence[Store], peers: Wire | None = None) -> None:
        self.world, self.stores, self.peers = world, stores, peers
        self.replicas = stores[0].replicas
        world.label = world.peers[world.rank].role
        self.lost: list[int] = []
        self._left: list[tuple[Store, int]] = []  # replicas that gave up, and wait for the end
        # of the first server
        self._hub = Hub(self.replicas)
        self._chief_only = False  # whether what is brought to this meeting is for the chief only
        self._epoch: Epoch | None = None
        self._idle: list[int] = []  # replicas that wait for a turn
        self._held: dict[int, list[int]] = {}  # those that have turns and must wait; turns done, ``ahead``, ``warm``
        self._coordinator: Coordinator | None = None  # in a phase of a batch optimiser

    def agree(self, error: str | None) -> None:
        """Before ``serve``: raise on all ranks if one has an error; see ``Exchange.agree``."""
        self.world.agree(error)

    def serve(self) -> dict[str, Any]:
        """Serve until all replicas say that the run is over, or are lost.

        Returns
        -------
        dict
            See ``report``.

        Raises
        ------
        UserError
            If the replicas agreed on an error.
        LostError
            If no replica is left.
        """
        self.world.tally.enter("waiting")
        self._until(lambda: all(len(store.finished.union(self.lost)) == self.replicas for store in self.stores))
        for store, replica in self._left:
            self._send(store, replica, b"")
        report = self.report()
        self.world.close()
        return report

    def _until(self, done: Callable[[], bool]) -> None:
        """Do as messages say and take what is pushed, until a condition holds."""
        pause = self.world.pause(LONGEST_PAUSE)
        while not done():
            if self.look():
                pause.reset()
            else:
                pause()
            if len(self.lost) == self.replicas:
                raise LostError("replicas: at least one must live; got all lost")

    def look(self) -> bool:
        """Do what there is to do. Whether there was anything."""
        found = sum(map(self._receive, self.stores)) + self._obey() + self._take() + self._settle()
        self.world.worked("look", 0)
        return bool(found)

    def report(self) -> dict[str, Any]:
        """What this server did so far, in all its stores.

        Returns
        -------
        dict
            ``role``, ``number``, and what ``Tally.about`` tells; ``applied`` (changes of each replica), ``refused``
            (those among them of turns or portions that others had done), ``version``, ``staleness`` (histogram),
            ``asked`` (reads by message), ``evaluations`` (of a batch optimiser), ``lost`` (replicas).
        """
        def total(values: Any) -> Any:
            return np.sum([values(store) for store in self.stores], axis=0).tolist()

        return {"role": "server", "number": self.world.rank, **self.world.tally.about(),
                "applied": total(lambda store: store.header.applied), "refused": total(lambda store: store.refused),
                "version": total(lambda store: store.header.version[0]),
                "staleness": total(lambda store: store.header.staleness), "asked": total(lambda store: store.asked),
                "evaluations": self.stores[0].shard.evaluation if self.stores[0].shard else 0, "lost": self.lost}

    def _take(self) -> bool:
        """Apply what lies in all mailboxes. Whether there was anything."""
        found = [store.take() for store in self.stores]
        for replica in [replica for bad in found for replica in bad or ()]:
            self._lose(self.stores[0], replica, "sent NaN or infinity")
        return any(bad is not None for bad in found)

    def _receive(self, store: Store) -> bool:
        """Do as a message says, if there is one. The call by which MPI makes progress for the replicas, too."""
        message = None
        try:
            message = store.wire.incoming()
            if message:
                self._answer(store, *message)
        except RanksLostError as error:
            for rank in error.ranks:
                self._lose(store, rank - 1, "died")
        return message is not None

    def _obey(self) -> bool:
        """Do as the coordinator at the first server says, if it says something."""
        if self.peers is None or self.peers.rank == 0 or not self.peers.incoming():
            return False
        command = json.loads(self.peers.recv_bytes(0, COMMAND))
        self.peers.send_bytes(json.dumps(self._shard().do(command)).encode(), 0, RESULT)
        return True

    def _shard(self) -> Shard:
        """My part of the vectors of a batch optimiser: replicas are whole."""
        store = self.stores[0]
        if store.shard is None:
            store.shard = Shard(store.parameters, store.wire, store.publish, self._until)
            self._coordinator = None
        return store.shard

    def _answer(self, store: Store, source: int, tag: int) -> None:
        """Receive a message and do as it says."""
        replica, content = source - 1, store.wire.recv_bytes(source, tag)
        if tag == ASK:
            if store.rule.asks:
                self._take()  # what this replica has pushed is in what it gets
            store.answer(replica)
        elif tag == FAIL:
            raise AgreedError(content.decode())
        elif tag == LOST:
            for other in np.frombuffer(content, np.int64).tolist():
                self._lose(store, other, "")
            self._send(store, replica, b"")
        elif tag == REPORT:
            self._send(store, replica, json.dumps(self.report()).encode())
        elif tag == LEAVE:
            self._leave(store, replica, content.decode())
        elif replica in self.lost:
            self._send(store, replica, b"")  # it may not know yet
        elif tag == BEGIN:
            store.begin(content)
            self._send(store, replica, b"")
        elif tag == FINISH:
            store.finished.add(replica)
        elif tag in (KEEP, RESTORE):
            store.tell_rule(replica, tag)
        elif tag in (MORE, GO, CLAIM):
            self._wants(replica, tag, content)
        else:
            self._chief_only = tag == COLLECT
            self._hub.come(replica, content)

    def _wants(self, replica: int, tag: int, content: bytes) -> None:
        """A replica asks for work: ``_settle`` answers."""
        if tag == CLAIM:
            self._take()  # what it has pushed is counted
            shard = self._shard()
            if self._coordinator is None:
                self._coordinator = Coordinator(shard, self.peers, self._until, self.world.clock,
                                                partial(self._send, self.stores[0]))
            self._coordinator.come(replica, content)
            return
        first, each, *held = np.frombuffer(content, np.int64).tolist()
        self._open(first, each)
        if tag == MORE:
            self._idle.append(replica)
        else:
            self._held[replica] = held

    def _open(self, first: int, each: int) -> None:
        """Begin the epoch of which a message speaks, if it has not begun."""
        if self._epoch is None or self._epoch.first != first:
            store = self.stores[0]
            self._epoch = Epoch(store.ledger, first, each, store.header.limit, self.lost)
            store.header.epoch[0] = first

    def _settle(self) -> bool:
        """Answer those that wait for each other: at a meeting, or for a turn. Whether there was anything."""
        first, parts, did = self.stores[0], self._hub.complete(), False
        if parts:
            did, chief = True, next(iter(parts))
            everything, empty = pack(parts), pack(dict.fromkeys(parts, b""))
            for replica in parts:
                self._send(first, replica, everything if replica == chief or not self._chief_only else empty)
        for replica in self._idle.copy():
            assert self._epoch is not None
            turn = NO_MORE if self._epoch.over() else self._epoch.next(replica)
            if turn is not None:
                did = True
                self._idle.remove(replica)
                self._send(first, replica, np.int64(turn).tobytes())
        for replica in list(self._held):
            if replica not in self._held:
                continue  # lost since
            assert self._epoch is not None
            done, ahead, warm = self._held[replica]
            allowed = self._epoch.allowed(replica, self._hub.living, ahead, warm)
            if done < allowed:
                did = True
                del self._held[replica]
                self._send(first, replica, np.int64(allowed).tobytes())
        return bool(self._coordinator and self._coordinator.settle()) or did

    def _send(self, store: Store, replica: int, content: bytes) -> None:
        try:
            store.wire.send_bytes(content, replica + 1, ANSWER)
        except RanksLostError:
            self._lose(store, replica, "died")

    def _lose(self, store: Store, replica: int, why: str) -> None:
        """Go on without a replica. What it gave whole counts; nothing that it sends from now on does."""
        if replica in self.lost or replica in store.finished:
            return
        self._take()
        if replica in self.lost:
            return
        self.lost.append(replica)
        self.world.whole = False
        for each in self.stores:
            each.end.shut(replica)
        self._hub.lose(replica)
        if self._epoch:
            self._epoch.lose(replica)
        if replica in self._idle:
            self._idle.remove(replica)
        self._held.pop(replica, None)
        if self._coordinator:
            self._coordinator.lose(replica)
        if self.world.rank == 0:
            sys.stderr.write(f"{store.wire.peers[replica + 1]} {why}; {len(self._hub.living)} of {self.replicas} "
                             "replicas go on, with its rows\n")
            sys.stderr.flush()

    def _leave(self, store: Store, replica: int, why: str) -> None:
        """One that cannot go on asks whether the others do without it."""
        if self._hub.living in ([], [replica]):
            self._send(store, replica, b"")
            return
        self._lose(store, replica, f"gave up ({why})")
        self._left.append((store, replica))
        self._send(store, replica, b"left")
