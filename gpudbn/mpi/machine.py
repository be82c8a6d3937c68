"""A cluster in virtual time: ranks that run one after another in one process, each when its time has come.

A rank is a thread, or two, but one of all runs at a time: where its time goes by it hands over to the one whose time
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
    """One rank: where it runs, and what is its own."""

    def __init__(self, number: int, node: Node) -> None:
        self.number, self.node = number, node
        self.memories: list[Memory] = []
        self.fibers: list[Fiber] = []
        self.pieces = 0  # of work so far


class Fiber:
    """A thread of a rank, what it runs and what it waits for. Asked for its result like a future."""

    def __init__(self, machine: Machine, rank: Rank, program: Callable[[], Any]) -> None:
        self.machine, self.rank, self.program = machine, rank, program
        self.turn = threading.Lock()  # released to let it run
        self.turn.acquire()
        self.thread = threading.Thread(target=machine.live, args=(self,), daemon=True)
        self.news = 0  # messages, ends of requests, writes into the rank's memory by others
        self.heard = 0
        self.looked = False  # since its last pause, in a way that takes the processor
        self.pause: Pause | None = None  # where it is in one
        self.looks: dict[tuple[Memory, int, int], bytes] = {}  # what it has read of others' since its last pause
        self.ended = False
        self.waiting: Fiber | None = None  # for the end of this one
        self.value: Any = None
        self.error: BaseException | None = None

    def exception(self) -> BaseException | None:
        """Wait until it has ended; what it has raised."""
        if not self.ended:
            self.waiting = self.machine.running
            self.machine.give_up()
        return self.error

    def result(self) -> Any:
        """Wait until it has ended; what it has returned, or raises what it has raised."""
        if self.exception():
            raise self.error  # type: ignore[misc]
        return self.value


class Node:
    """The cores and the link of a node.

    Of k busy threads each gets min(1, cores / k) of a core: none is preferred. What they get done in that time depends
    on how much their kind of work is slowed by others (``Lane``).
    """

    def __init__(self, machine: Machine, cores: int) -> None:
        self.machine, self.cores = machine, cores
        self.sending = self.receiving = 0.0  # until when the link is taken
        self.lanes: dict[float, Lane] = {}
        self.busy = 0
        self.since = 0.0
        self.plan = 0

    def rate(self, crowding: float) -> float:
        """Seconds of such work that each of the busy gets done in a second."""
        crowd = crowding * (min(self.busy, self.cores) - 1) / max(1, self.cores - 1)
        return min(1.0, self.cores / self.busy) / (1 + crowd)

    def _forward(self) -> None:
        now = self.machine.now
        for lane in self.lanes.values():
            lane.done = lane.done + (now - self.since) * self.rate(lane.crowding) if lane.busy else 0.0
        self.since = now

    def work(self, fiber: Fiber, seconds: float, crowding: float) -> None:
        """Let it be resumed when it has done so much, which all cores at work slow by ``crowding``."""
        self._forward()
        lane = self.lanes.setdefault(crowding, Lane(crowding))
        heapq.heappush(lane.busy, (lane.done + seconds, next(self.machine.numbers), fiber))
        self.busy += 1
        self._replan()

    def _replan(self) -> None:
        self.plan += 1
        if self.busy:
            ahead, _, lane = min((lane.ahead / self.rate(lane.crowding), lane.busy[0][1], lane)
                                 for lane in self.lanes.values() if lane.busy)
            self.machine.at(self.machine.now + ahead, partial(self._finish, self.plan, lane))

    def _finish(self, plan: int, lane: Lane) -> Fiber | None:
        if plan != self.plan:
            return None  # others came since
        self._forward()
        lane.done, _, fiber = heapq.heappop(lane.busy)
        self.busy -= 1
        self._replan()
        return fiber


class Lane:
    """Works on a node that others slow equally.

    ``done`` is what one that has been busy all the time has got so far; work ends when ``done`` reaches what it was at
    its begin and the work itself.
    """

    def __init__(self, crowding: float) -> None:
        self.crowding = crowding
        self.done = 0.0
        self.busy: list[tuple[float, int, Fiber]] = []

    @property
    def ahead(self) -> float:
        """What its next to end has still to do."""
        return max(0.0, self.busy[0][0] - self.done)


class Pause(Backoff):
    """A pause of a rank in virtual time: looks that would see nothing new are left out, unless they take the processor.

    The look after something has changed comes when it would have come, had the rank looked all the time.
    """

    def __init__(self, machine: Machine, longest: float) -> None:
        super().__init__(longest)
        self.machine = machine
        self.ended = machine.now  # the last one
        self.begun = self.look = 0.0

    def __call__(self) -> None:
        self.begun = self.machine.now
        self.look = max(LOOK, self.begun - self.ended)
        me, asked = self.machine.running, self.seconds(self.count + 1)
        if me.looked and asked < self.longest:  # the next look takes the processor as the last did: it is not left out
            self.count += 1
            self.machine.sleep(asked + self.machine.costs.oversleep if asked else 0.0)
        else:
            self.machine.pause(self)
        me.looked = False
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
        self.events: list[tuple[float, int, Callable[[], Fiber | None]]] = []
        per_node = costs.node or ranks
        places = [max(0, i - costs.extra) // per_node for i in range(ranks)]
        self.nodes = [Node(self, costs.cores or per_node + (0 if i else costs.extra)) for i in range(places[-1] + 1)]
        self.ranks = [Rank(i, self.nodes[place]) for i, place in enumerate(places)]
        self.factors = [*costs.slow, *[1.0] * ranks][:ranks]
        self.running: Fiber
        self._alive: dict[Fiber, None] = {}  # in order
        self._error: BaseException | None = None
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
        fibers = [self.begin(rank, partial(program, rank)) for rank in self.ranks]
        self.at(BEAT, self._beat)
        self._next(None).turn.release()
        self._ended.wait()
        for fiber in list(self._alive):
            fiber.turn.release()
            fiber.thread.join()
        if self._error is not None:
            raise self._error
        return [fiber.value for fiber in fibers]

    def begin(self, rank: Rank, program: Callable[[], Any]) -> Fiber:
        """Let a rank run this beside what it runs already."""
        fiber = Fiber(self, rank, program)
        rank.fibers.append(fiber)
        self._alive[fiber] = None
        fiber.thread.start()
        self.at(self.now, partial(_itself, fiber))
        return fiber

    def live(self, fiber: Fiber) -> None:
        """What a fiber's thread does: run its program, when its time has come, and hand over."""
        fiber.turn.acquire()
        following = None
        try:
            if self._error is None:
                self.running = fiber
                fiber.value = fiber.program()
        except Stopped:
            pass
        except BaseException as error:
            fiber.error = error
            if fiber is fiber.rank.fibers[0]:
                self._error = self._error or error
        fiber.ended = True
        fiber.rank.fibers.remove(fiber)
        del self._alive[fiber]
        if self._alive and self._error is None:
            if fiber.waiting:
                self.at(self.now, partial(_itself, fiber.waiting))
            try:
                following = self._next(fiber)
            except RuntimeError as error:
                self._error = error
        if following:
            following.turn.release()
        else:
            self._ended.set()

    def at(self, time: float, action: Callable[[], Fiber | None]) -> None:
        """Let this happen then. An action may return a fiber, whose time has come."""
        heapq.heappush(self.events, (time, next(self.numbers), action))

    def _next(self, running: Fiber | None) -> Fiber:
        """Let things happen until the time of a fiber has come. What the running one has written can be seen now."""
        for memory in running.rank.memories if running else ():
            memory.look()
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            fiber = action()
            if fiber is not None:
                return fiber
        raise RuntimeError(f"simulation: must get on; got {len(self._alive)} ranks that wait for one another")

    def give_up(self) -> None:
        """Let the others run until something resumes the running fiber."""
        me = self.running
        if self._error is None:
            following = self._next(me)
            if following is not me:
                following.turn.release()
                me.turn.acquire()
                self.running = me
        if self._error is not None:
            raise Stopped

    def _beat(self) -> None:
        waiting = [fiber for fiber in self._alive if fiber.pause and fiber.pause.begun <= self.now - BEAT]
        if len(waiting) == len(self._alive) and self.now - self._heard > PATIENCE:
            return  # and nothing will happen any more
        for fiber in waiting:
            self.wake(fiber)
        self.at(self.now + BEAT, self._beat)

    def work(self, seconds: float, crowding: float | None = None) -> None:
        """The running fiber's time goes on by so much work of its own, on its node's cores.

        All of them at work slow it by ``crowding``; default: that of the costs.
        """
        rank = self.running.rank
        seconds *= self.factors[rank.number]
        if self.costs.jitter and seconds:
            steady = self.costs.steady
            stretch = int(self.now / steady) if steady else rank.pieces
            z = normals(np.empty((1, 2), np.float32), seed=self.seed, update=stretch % 2**32,
                        site=site(Purpose.JITTER), row=rank.number)
            seconds *= math.exp(self.costs.jitter * float(z[0, 0]))
            rank.pieces += 1
        if seconds:
            rank.node.work(self.running, seconds, self.costs.crowding if crowding is None else crowding)
            self.give_up()

    def sleep(self, seconds: float) -> None:
        """The running fiber's time goes on, and nothing wakes it before."""
        if seconds:
            self.at(self.now + seconds, partial(_itself, self.running))
            self.give_up()

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
        """Nothing, if something has changed since the running fiber looked; or else until something does."""
        me = self.running
        if me.heard == me.news and not any(memory.changed(lo, hi, seen) for (memory, lo, hi), seen in me.looks.items()):
            memories = dict.fromkeys(memory for memory, _, _ in me.looks)
            for memory in memories:
                memory.watchers[me] = None
            me.pause = pause
            self.give_up()
            for memory in memories:
                del memory.watchers[me]
        else:
            pause.count += 1
        me.heard = me.news
        me.looks.clear()

    def tell(self, rank: Rank) -> None:
        """Something happened that the rank can see."""
        for fiber in rank.fibers:
            self.tell_one(fiber)

    def tell_one(self, fiber: Fiber) -> None:
        """Something happened that this one can see."""
        fiber.news += 1
        self._heard = self.now
        self.wake(fiber)

    def wake(self, fiber: Fiber) -> None:
        """End its pause, if it is in one."""
        if fiber.pause:
            self.at(fiber.pause.end(self.now), partial(_itself, fiber))
            fiber.pause = None


def _itself(fiber: Fiber) -> Fiber:
    return fiber


class Memory:
    """What a rank gives to a window."""

    def __init__(self, machine: Machine, owner: Rank, nbytes: int) -> None:
        self.machine, self.owner = machine, owner
        self.bytes = np.zeros(nbytes, np.uint8)
        self.watchers: dict[Fiber, None] = {}  # those in a pause that have read some of it; in order
        owner.memories.append(self)

    def changed(self, lo: int, hi: int, seen: bytes) -> bool:
        return self.bytes[lo:hi].tobytes() != seen

    def look(self) -> None:
        """End the pauses of those who could see that something is written."""
        for fiber in self.watchers:
            if fiber.pause and any(memory is self and self.changed(lo, hi, seen)
                                   for (memory, lo, hi), seen in fiber.looks.items()):
                self.machine.tell_one(fiber)
