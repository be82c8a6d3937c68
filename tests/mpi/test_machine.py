"""Virtual time against schedules worked out by hand, and MPI's promises between ranks of one process."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from gpudbn.mpi import machine as machine_module
from gpudbn.mpi import virtual
from gpudbn.mpi.costs import Costs, Hop
from gpudbn.mpi.machine import LOOK, Machine, Pause
from gpudbn.mpi.virtual import run
from gpudbn.mpi.wire import Window
from tests.helpers import assert_close, assert_notices

NET = {"node": 1, "network": Hop(1e-3, 1e6), "oversleep": 0.0}  # 1 ms, 1 byte a microsecond
FREE = {"copy": Hop(0.0, math.inf), "message": Hop(0.0, math.inf)}
BIG = np.arange(50_000, dtype=np.uint8)  # 50 ms


def times(costs, *programs):
    """When each rank's program ends; each gets the wire and a window in the memory of rank 0."""
    def rank(wire):
        window = Window(wire, 100_000)
        wire.barrier()
        begun = wire.machine.now
        programs[wire.rank](wire, window)
        return wire.clock() - begun

    return run(Machine(len(programs), costs), rank)


def nothing(wire, window):
    pass


def check_one_sided():
    def ends(action):
        return times(Costs(**NET), nothing, lambda _, window: action(window))[1]

    assert_close(ends(lambda w: w.put(BIG, 0)), 1e-3 + 50e-3 + 1e-3, atol=1e-9)  # there, and the answer back
    assert_close(ends(lambda w: w.get(np.empty_like(BIG), 0)), 1e-3 + 50e-3 + 1e-3, atol=1e-9)
    assert_close(ends(lambda w: w.read(0)), 2e-3 + 8e-6, atol=1e-9)


def check_queue():
    """Three puts, asked for at the same time, follow one another; words pass between them."""
    def put(_, window):
        window.put(BIG, 0)

    def words(_, window):
        window.put(BIG[:1000], 50_000)

    found = times(Costs(**NET), nothing, put, put, words, put)[1:]
    assert_close(sorted(found), [3e-3, 52e-3, 102e-3, 152e-3], atol=1e-9)
    assert found[2] == min(found)


def check_two_servers_do_not_queue():
    """What goes to different nodes does not meet."""
    def rank(wire):
        wires = [wire.among([server, 2, 3]) for server in (0, 1)]
        windows = [Window(w, 100_000) for w in wires if w is not None]
        wire.barrier()
        begun = wire.clock()
        if wire.rank >= 2:
            windows[wire.rank - 2].put(BIG, 0)
        return wire.clock() - begun

    assert_close(run(Machine(4, Costs(**NET)), rank)[2:], [52e-3, 52e-3], atol=1e-9)


def check_cores():
    """Works of 1, 2 and 4 s on two cores: each gets 2/3 until 1.5 s, then a core."""
    def work(seconds):
        return lambda wire, _: wire.compute(seconds)

    assert_close(times(Costs(cores=2, **FREE), work(1.0), work(2.0), work(4.0)), [1.5, 2.5, 4.5], atol=1e-9)
    # both cores at work: a quarter slower
    assert_close(times(Costs(cores=2, crowding=0.25, **FREE), work(1.0), work(2.0)), [1.25, 2.25], atol=1e-9)
    assert_close(times(Costs(node=1, cores=1, **FREE), work(1.0), work(2.0)), [1.0, 2.0], atol=1e-9)
    # the first node has one rank more than the others
    assert_close(times(Costs(node=1, extra=1, cores=1, **FREE), work(1.0), work(2.0), work(3.0)), [2.0, 3.0, 3.0],
                 atol=1e-9)
    assert_close(times(Costs(node=1, extra=1, **FREE), work(1.0), work(2.0), work(3.0)), [1.0, 2.0, 3.0], atol=1e-9)


def check_crowding():
    """Each kind of work on three cores is slowed by its own share: at two of three busy cores by half of it."""
    def work(seconds, crowding=None, then=0.0):
        def program(wire, _):
            wire.compute(seconds, crowding)
            wire.compute(then, 0.25)
        return program

    costs = Costs(cores=3, crowding=0.5, **FREE)
    # until 1.5 s all three are at work, at rates 1 / 1.5, 1 / 1.2 and 1; then two; the last alone
    assert_close(times(costs, work(1.0), work(3.0, 0.2), work(9.0, 0.0)), [1.5, 1.5 + (3 - 1.25) * 1.1, 9.0], atol=1e-9)
    # one goes on with another kind of work: until 1.44 s rates are 1 / 1.2 and 1, then 1 / 1.2 and 1 / 1.25
    costs = Costs(cores=2, crowding=0.2, **FREE)
    assert_close(times(costs, work(3.0), work(1.2, 0.0, then=0.4)), [1.7 + 3 - 1.7 / 1.2, 1.7], atol=1e-9)
    # four on two cores: half a core each; then three, then two; the last alone
    four = [work(1.0, crowding) for crowding in (0.0, 0.1, 0.2, 0.3)]
    assert_close(times(Costs(cores=2, **FREE), *four), [2.0, 2.15, 2.25, 2.25 + 0.1 / 1.3], atol=1e-9)


def check_jitter():
    """Works of 1 s: those that begin in the same 5 s on the same rank take equally long; or else each its own time."""
    def rank(wire):
        begun = [wire.clock()]
        for _ in range(12):
            wire.compute(1.0)
            begun.append(wire.clock())
        return list(zip(np.floor(np.array(begun[:-1]) / 5), np.diff(begun).round(9), strict=True))

    def found(**costs):
        return [(number, *work) for number, works in enumerate(run(Machine(2, Costs(**costs)), rank)) for work in works]

    assert {took for _, _, took in found()} == {1.0}
    steady = found(jitter=0.05, steady=5.0)
    assert len(set(steady)) == len({(number, stretch) for number, stretch, _ in steady}) >= 6
    assert len({took for _, _, took in steady}) == len(set(steady))
    assert len({took for _, _, took in found(jitter=0.05)}) == 24


def check_looks():
    """Looks take the processor from what another rank computes on it, until pauses are long. 30 at once, then after
    sleeps of 20 us, doubled every 8: of 1 ms the first after 78 looks."""
    def look(wire, _):
        pause, begun, looks = wire.pause(), wire.clock(), []
        while wire.clock() < begun + 0.2:
            wire.worked("look", 0)
            looks.append(wire.clock() - begun)
            pause()
        ends.append(looks)

    ends: list[list[float]] = []
    costs = Costs(cores=1, look=Hop(100e-6, math.inf), oversleep=0.0, **FREE)
    assert_close(times(costs, look, lambda wire, _: wire.compute(0.1))[1], 0.1 + 78 * 100e-6, atol=1e-9)
    ((*looks,),) = ends
    assert_close(looks[:31], np.arange(1, 32) * 200e-6, atol=1e-9)  # half the core
    assert_close(np.diff(looks)[30:39], [220e-6] * 7 + [240e-6] * 2, atol=1e-9)


def check_straggler():
    def work(wire, _):
        wire.compute(0.5)
        wire.barrier()

    assert_close(times(Costs(slow=(1, 10), **FREE), work, work), [5.0, 5.0], atol=2e-3)  # a pause is 1 ms


def check_messages(late=0.0):
    def give(wire, _):
        wire.send(BIG, 1, tag=5)
        wire.send(BIG[:10], 1, tag=6)

    def take(wire, _):
        wire.compute(late)
        small, big = np.empty(10, np.uint8), np.empty_like(BIG)
        wire.recv(small, 0, tag=6)
        wire.recv(big, 0, tag=5)
        assert (big == BIG).all()
        assert (small == BIG[:10]).all()

    sent, taken = times(Costs(**NET), give, take)
    assert_close(sent, 50e-3, atol=2e-3)  # off its hands; seen at the end of a pause of 1 ms at most
    assert_close(taken, max(late, 51e-3), atol=2e-3)
    assert taken > sent


@pytest.mark.parametrize(("check", "module", "line", "fault"), [
    (check_one_sided, virtual, "self.machine.at(time + self.machine.costs.network.latency, answered.come)",
     "self.machine.at(time, answered.come)"),
    (check_queue, machine_module, "source.sending = to.receiving = end", "pass"),
    (check_queue, machine_module, "if nbytes <= PACKET:", "if False:"),
    (check_two_servers_do_not_queue, machine_module, "end = max(begin, source.sending, to.receiving)",
     "end = max(begin, *(node.sending for node in self.nodes))"),
    (check_cores, machine_module, "return min(1.0, self.cores / self.busy) / (1 + crowd)", "return 1.0"),
    (check_cores, machine_module, "return None  # others came since", "pass"),
    (check_crowding, machine_module, "(now - self.since) * self.rate(lane.crowding)",
     "(now - self.since) * self.rate(max(self.lanes))"),
    (check_crowding, machine_module, "ahead, _, lane = min(", "ahead, _, lane = max("),
    (check_crowding, machine_module, "self.costs.crowding if crowding is None else crowding", "crowding or 0.0"),
    (check_jitter, machine_module, "int(self.now / steady) if steady else rank.pieces", "rank.pieces"),
    (check_jitter, machine_module, "int(self.now / steady) if steady else rank.pieces", "0"),
    (check_looks, machine_module, "if me.looked and asked < self.longest:", "if False:"),
    (check_looks, machine_module, "self.machine.sleep(asked +", "self.machine.sleep(0 * asked -"),
    (check_looks, virtual, '|= what == "look" and seconds > 0', "= False"),
    (check_straggler, machine_module, "seconds *= self.factors[rank.number]", "pass"),
    (check_messages, virtual, "if receive.fits(self.rank, tag):", "if True:"),
    (partial(check_messages, late=0.2), virtual, "if receive.fits(*message[:2]):", "if True:"),
])
def test_schedules_worked_out_by_hand(check, module, line, fault):
    assert_notices(check, module, line, fault)


def check_pause():
    """Pauses of 0 until the 30th look, then of 20 us, doubled every 8; a look takes LOOK."""
    machine = Machine(1, Costs(oversleep=0.0))
    for change in (0.0, 29.5 * LOOK, 30.5 * LOOK, 40e-6, 3e-3, 0.1, 1.7):
        pause = Pause(machine, 0.25e-3)
        pause.look, time, count = LOOK, 0.0, 0
        while True:  # look by look
            count += 1
            time += pause.seconds(count)
            if time >= change:
                break
            time += LOOK
        assert_close(pause.end(change), time, atol=1e-9)


def test_a_rank_that_polls_looks_when_it_would_have_looked():
    assert_notices(check_pause, machine_module, "time += self.look\n", "pass\n")


def test_a_pause_ends_with_what_the_rank_could_have_seen():
    """Of two words that others write, one is looked at; a beat ends a pause in any case."""
    def write(offset):
        def program(wire, window):
            wire.compute(0.25 * wire.rank)
            window.put(np.array([7], np.int64), offset)
        return program

    def wait(wire, window):
        pause, looks = wire.pause(), 0
        while window.read(8) != 7:
            looks += 1
            pause()
        assert looks == 1

    def watch_the_clock(wire, window):
        pause, begun = wire.pause(), wire.clock()
        while wire.clock() < begun + 5:
            window.read(0)
            pause()

    found = times(Costs(**FREE), nothing, write(0), write(8), wait)
    assert 0.5 <= found[3] < 0.502
    assert 5 <= times(Costs(**FREE), nothing, watch_the_clock)[1] < 6.1


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_collective_calls_give_what_mpi_gives(ranks):
    def rank(wire):
        own = np.arange(3, dtype=np.float64) + 10 * wire.rank
        total, first = own.copy(), own.copy()
        wire.allreduce_(total)
        wire.broadcast(first, root=ranks - 1)
        half = wire.split(wire.rank % 2)
        mine = wire.among([ranks - 1, 0]) if ranks > 1 else None
        return (total.tolist(), first.tolist(), wire.allgather(own).tolist(), wire.allgather_text("x" * wire.rank),
                (half.rank, half.size), mine and (mine.rank, mine.size), wire.local_rank())

    for number, (total, first, every, texts, half, mine, local) in enumerate(run(Machine(ranks, Costs(node=2)), rank)):
        assert total == [ranks * j + 10 * sum(range(ranks)) for j in range(3)]
        assert first == [10 * (ranks - 1) + j for j in range(3)]
        assert every == [[10 * r + j for j in range(3)] for r in range(ranks)]
        assert texts == ["x" * r for r in range(ranks)]
        assert half == (number // 2, len(range(number % 2, ranks, 2)))
        assert mine == (None if ranks == 1 or 0 < number < ranks - 1 else (int(number == 0), 2))
        assert local == number % 2


def test_a_collective_takes_as_long_as_the_cheaper_of_a_tree_and_a_ring():
    def seconds(what, ranks, nbytes, **costs):
        costs = Costs(apply=Hop(0.0, math.inf), **costs)
        return virtual.collective(what, Machine(ranks, costs).ranks, nbytes, costs)

    net = {"node": 1, "network": Hop(1e-3, 1e6)}
    assert_close(seconds("allreduce", 8, 8_000_000, **net), 2 * 7 * (1e-3 + 1.0), rtol=1e-12)  # rings of eighths
    assert_close(seconds("allreduce", 8, 8, **net), 3 * (1e-3 + 8e-6), rtol=1e-12)  # a tree
    assert_close(seconds("barrier", 5, 0, **net), 3e-3, rtol=1e-12)
    assert_close(seconds("broadcast", 4, 4_000_000, **net), 5e-3 + 6.0, rtol=1e-12)
    assert_close(seconds("allgather", 4, 1000, **net), 3 * 2e-3, rtol=1e-12)
    assert_close(seconds("barrier", 4, 0, message=Hop(1e-6, 1e9)), 2e-6, rtol=1e-12)  # one node
    assert seconds("allreduce", 1, 100, **net) == 0


def check_beside():
    """What a rank does beside its work shares the node's core with it, and is waited for."""
    def rank(wire):
        begun, seen = wire.clock(), []

        def work():
            wire.compute(1.0)
            seen.append(wire.clock() - begun)
            return 7

        doing = wire.worker().submit(work)
        wire.compute(0.2)
        seen.append(wire.clock() - begun)
        assert doing.result() == 7
        seen.append(wire.clock() - begun)
        failing = wire.worker().submit(lambda: 1 // 0)
        assert isinstance(failing.exception(), ZeroDivisionError)
        return seen

    assert_close(run(Machine(1, Costs(cores=1)), rank)[0], [0.4, 1.2, 1.2], atol=1e-9)
    assert_close(run(Machine(1, Costs(cores=2)), rank)[0], [0.2, 1.0, 1.0], atol=1e-9)


def test_work_beside_work():
    assert_notices(check_beside, machine_module, "self.at(self.now, partial(_itself, fiber.waiting))",
                   "self.at(self.now + 1, partial(_itself, fiber.waiting))")


def test_the_first_error_ends_all_ranks():
    def rank(wire):
        wire.compute(1.0 + wire.rank)
        if wire.rank == 1:
            raise ArithmeticError("rank 1")
        wire.barrier()

    with pytest.raises(ArithmeticError, match="rank 1"):
        run(Machine(3, Costs()), rank)


def test_ranks_that_wait_for_one_another_are_told():
    def rank(wire):
        wire.recv(np.empty(1), 1 - wire.rank)

    with pytest.raises(RuntimeError, match="2 ranks that wait for one another"):
        run(Machine(2, Costs()), rank)


def test_a_message_that_does_not_fit_is_refused():
    def rank(wire):
        if wire.rank:
            wire.send(np.zeros(3), 0)
        else:
            wire.recv(np.zeros(2), 1)

    with pytest.raises(RuntimeError, match="24 bytes for 16"):
        run(Machine(2, Costs()), rank)
