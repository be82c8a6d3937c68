"""A cluster in virtual time: ranks that run one after another in one process, each when its time has come.

A rank is a thread, but one of them runs at a time: where its time goes by it hands over to the rank whose time
comes next. So what happens is a function of the arguments: the same bits every time. What takes time:

    own work         on the cores of its node, which the busy ranks of the node share (``Node``)
    between nodes    a node's link carries one transfer after another, in the order in which they were asked for:
                     where all want the same server, they queue (``Machine.carry``)
    polling          nothing, until something changes that the rank could have seen; then it looks when its next
                     pause would have ended (``Pause``)
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpudbn.draws import Purpose, normals, site
from gpudbn.mpi.costs import Costs
from gpudbn.mpi.wire import Backoff

PACKET = 4096  # bytes; what is no longer goes between the packets of others, and does not queue
LOOK = 1e-6  # seconds that a look takes at least
BEAT = 1.0  # seconds after which a pause ends in any case: a loop that polls may watch the clock
PATIENCE = 600.0  # seconds of nothing but such ends of pauses: the ranks wait for one another


class Stopped(BaseException):
    """Ends a rank's thread after another rank has failed."""


class Rank:
    """One rank: where it runs, and what it waits for."""

    def __init__(self, number: int, node: Node) -> None:
        self.number, self.node = number, node
        self.turn = threading.Lock()  # released to let it run
        self.turn.acquire()
        self.news = 0  # messages, ends of requests, writes into its memory by others
        self.heard = 0
        self.pause: Pause | None = None  # where it is in one
        self.memories: list[Memory] = []  # its own
        self.looks: dict[tuple[Memory, int, int], bytes] = {}  # what it has read of others' since its last pause
        self.pieces = 0  # of work so far


class Node:
    """The cores and the link of a node.

    Of k busy ranks each gets min(1, cores / k) of a core: no rank is preferred. ``done`` is what a rank that has
    been busy all the time has got so far; a rank's work ends when ``done`` reaches what it was at its begin and the
    work itself.
    """

    def __init__(self, machine: Machine, cores: int, crowding: float) -> None:
        self.machine, self.cores, self.crowding = machine, cores, crowding
        self.sending = self.receiving = 0.0  # until when the link is taken
        self.done = self.since = 0.0
        self.busy: list[tuple[float, int, Rank]] = []
        self.plan = 0

    def rate(self, busy: int) -> float:
        """Seconds of work that each of so many busy ranks gets done in a second."""
        crowd = self.crowding * (min(busy, self.cores) - 1) / max(1, self.cores - 1)
        return min(1.0, self.cores / busy) / (1 + crowd)

    def _forward(self) -> None:
        now = self.machine.now
        self.done = self.done + (now - self.since) * self.rate(len(self.busy)) if self.busy else 0.0
        self.since = now

    def work(self, rank: Rank, seconds: float) -> None:
        """Let the rank be resumed when it has done so much."""
        self._forward()
        heapq.heappush(self.busy, (self.done + seconds, next(self.machine.numbers), rank))
        self._replan()

    def _replan(self) -> None:
        self.plan += 1
        if self.busy:
            ahead = max(0.0, self.busy[0][0] - self.done) / self.rate(len(self.busy))
            self.machine.at(self.machine.now + ahead, partial(self._finish, self.plan))

    def _finish(self, plan: int) -> Rank | None:
        if plan != self.plan:
            return None  # others came since
        self._forward()
        self.done, _, rank = heapq.heappop(self.busy)
        self._replan()
        return rank


class Pause(Backoff):
    """A pause of a rank in virtual time: the looks that would see nothing new are left out.

    The look after something has changed comes when it would have come, had the rank looked all the time.
    """

    def __init__(self, machine: Machine, rank: Rank, longest: float) -> None:
        super().__init__(longest)
        self.machine, self.rank = machine, rank
        self.ended = machine.now  # the last one
        self.begun = self.look = 0.0

    def __call__(self) -> None:
        self.begun = self.machine.now
        self.look = max(LOOK, self.begun - self.ended)
        self.machine.pause(self)
        self.ended = self.machine.now

    def reset(self) -> None:
        super().reset()
        self.ended = self.machine.now

    def end(self, change: float) -> float:
        """When the pause ends after which the rank sees what changed at that time."""
        time, asked, oversleep = self.begun, 0.0, self.machine.costs.oversleep
        while True:
            self.count += 1
            asked = self.seconds(self.count)
            time += asked + (oversleep if asked else 0.0)
            if time >= change:
                return time
            time += self.look
            if asked == self.longest:  # from here on all are equal
                time += max(0, int((change - time) / (asked + oversleep + self.look))) * (asked + oversleep + self.look)


class Machine:
    """Nodes, ranks, and what is to happen, in order of time.

    Parameters
    ----------
    ranks : int
    costs : Costs
    seed : int
        Of the jitter.

    Attributes
    ----------
    now : float
        Seconds since the start.
    """

    def __init__(self, ranks: int, costs: Costs, seed: int = 0) -> None:
        self.costs, self.seed = costs, seed
        self.now = 0.0
        self.numbers = itertools.count()  # of events, so that those of one time have an order
        self.events: list[tuple[float, int, Callable[[], Rank | None]]] = []
        per_node = costs.node or ranks
        self.nodes = [Node(self, costs.cores or per_node, costs.crowding) for _ in range(-(-ranks // per_node))]
        self.ranks = [Rank(i, self.nodes[i // per_node]) for i in range(ranks)]
        self.factors = [*costs.slow, *[1.0] * ranks][:ranks]
        self._error: BaseException | None = None
        self._alive = ranks
        self._ended = threading.Event()
        self._heard = 0.0  # when a rank last had news

    def run(self, program: Callable[[Rank], Any]) -> list[Any]:
        """What ``program`` returns for each rank.

        Raises
        ------
        BaseException
            Of the first rank that fails.
        RuntimeError
            If all ranks wait, and nothing will ever happen.
        """
        results: list[Any] = [None] * len(self.ranks)

        def live(rank: Rank) -> None:
            rank.turn.acquire()
            try:
                if self._error is None:
                    results[rank.number] = program(rank)
            except Stopped:
                pass
            except BaseException as error:
                self._error = self._error or error
            self._alive -= 1
            following = None
            if self._alive and self._error is None:
                try:
                    following = self._next(rank)
                except RuntimeError as error:
                    self._error = error
            if following:
                following.turn.release()
            else:
                self._ended.set()

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in self.ranks]
        for thread, rank in zip(threads, self.ranks, strict=True):
            thread.start()
            self.at(0.0, partial(_itself, rank))
        self.at(BEAT, self._beat)
        self._next(None).turn.release()
        self._ended.wait()
        for thread, rank in zip(threads, self.ranks, strict=True):
            if thread.is_alive():
                rank.turn.release()
                thread.join()
        if self._error is not None:
            raise self._error
        return results

    def at(self, time: float, action: Callable[[], Rank | None]) -> None:
        """Let this happen then. An action may return a rank, whose time has come."""
        heapq.heappush(self.events, (time, next(self.numbers), action))

    def _next(self, running: Rank | None) -> Rank:
        """Let things happen until the time of a rank has come. What the running one has written can be seen now."""
        for memory in running.memories if running else ():
            memory.look()
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            rank = action()
            if rank is not None:
                return rank
        raise RuntimeError(f"simulation: must get on; got {self._alive} ranks that wait for one another")

    def give_up(self, rank: Rank) -> None:
        """Let the others run until something resumes this rank."""
        if self._error is None:
            following = self._next(rank)
            if following is not rank:
                following.turn.release()
                rank.turn.acquire()
        if self._error is not None:
            raise Stopped

    def _beat(self) -> None:
        waiting = [rank for rank in self.ranks if rank.pause and rank.pause.begun <= self.now - BEAT]
        if len(waiting) == self._alive and self.now - self._heard > PATIENCE:
            return  # and nothing will happen any more
        for rank in waiting:
            self.wake(rank)
        self.at(self.now + BEAT, self._beat)

    def sleep(self, rank: Rank, until: float) -> None:
        """The rank's time goes on to then."""
        self.at(until, partial(_itself, rank))
        self.give_up(rank)

    def work(self, rank: Rank, seconds: float) -> None:
        """The rank's time goes on by so much work of its own, on its node's cores."""
        seconds *= self.factors[rank.number]
        if self.costs.jitter and seconds:
            z = normals(np.empty((1, 2), np.float32), seed=self.seed, update=rank.pieces % 2**32,
                        site=site(Purpose.JITTER), row=rank.number)
            seconds *= math.exp(self.costs.jitter * float(z[0, 0]))
            rank.pieces += 1
        if seconds:
            rank.node.work(rank, seconds)
            self.give_up(rank)

    def carry(self, source: Node, to: Node, nbytes: int, begin: float) -> float:
        """When a transfer between two nodes, asked for at ``begin``, has left the sender's link."""
        hop = self.costs.network
        if nbytes <= PACKET:
            return begin + nbytes / hop.bandwidth
        end = max(begin, source.sending, to.receiving) + nbytes / hop.bandwidth
        source.sending = to.receiving = end
        return end

    # -- ranks that poll

    def pause(self, pause: Pause) -> None:
        """Nothing, if something has changed since the rank looked; or else until something does."""
        rank = pause.rank
        if rank.heard == rank.news and not any(memory.changed(lo, hi, seen)
                                               for (memory, lo, hi), seen in rank.looks.items()):
            memories = {memory for memory, _, _ in rank.looks}
            for memory in memories:
                memory.watchers[rank] = None
            rank.pause = pause
            self.give_up(rank)
            for memory in memories:
                del memory.watchers[rank]
        else:
            pause.count += 1
        rank.heard = rank.news
        rank.looks.clear()

    def tell(self, rank: Rank) -> None:
        """Something happened that the rank can see."""
        rank.news += 1
        self._heard = self.now
        self.wake(rank)

    def wake(self, rank: Rank) -> None:
        """End its pause, if it is in one."""
        if rank.pause:
            self.at(rank.pause.end(self.now), partial(_itself, rank))
            rank.pause = None


def _itself(rank: Rank) -> Rank:
    return rank


class Memory:
    """What a rank gives to a window."""

    def __init__(self, machine: Machine, owner: Rank, nbytes: int) -> None:
        self.machine, self.owner = machine, owner
        self.bytes = np.zeros(nbytes, np.uint8)
        self.watchers: dict[Rank, None] = {}  # ranks in a pause that have read some of it; in order
        owner.memories.append(self)

    def changed(self, lo: int, hi: int, seen: bytes) -> bool:
        return self.bytes[lo:hi].tobytes() != seen

    def look(self) -> None:
        """End the pauses of those who could see that something is written."""
        for rank in self.watchers:
            if rank.pause and any(memory is self and self.changed(lo, hi, seen)
                                  for (memory, lo, hi), seen in rank.looks.items()):
                self.machine.tell(rank)
