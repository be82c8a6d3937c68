"""What a rank did when: kept in bounded memory, and told by the clock of rank 0. No MPI is needed."""

from __future__ import annotations

import json
from contextlib import suppress
from queue import Queue
from threading import Thread

import numpy as np

from gpudbn.mpi import tally as module
from gpudbn.mpi.costs import Costs, Hop
from gpudbn.mpi.machine import Machine
from gpudbn.mpi.tally import STATES, Tally
from gpudbn.mpi.virtual import run
from gpudbn.mpi.wire import Wire
from tests.helpers import assert_close, assert_notices


class Clock:
    """Stands still until told."""

    def __init__(self, now=50.0):
        self.now = now

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def spent(tally):
    return {state: seconds for state, seconds in tally.seconds().items() if seconds}


def test_every_second_is_in_one_state_and_a_wait_or_transfer_is_whole():
    def check():
        clock = Clock()
        tally = Tally(clock, "starting")
        clock.sleep(1)
        tally.enter("computing")
        clock.sleep(2)
        with tally.timing("measuring"):
            clock.sleep(4)
            with tally.timing("waiting"):
                clock.sleep(8)
                with tally.timing("transferring"):
                    clock.sleep(16)
            clock.sleep(32)
        with tally.timing("transferring"), tally.timing("waiting"):
            clock.sleep(64)
        clock.sleep(128)
        assert spent(tally) == {"starting": 1, "computing": 130, "measuring": 36, "waiting": 24, "transferring": 64}

    assert_notices(check, module, "self._stack.append(state)", "self._stack.append(self._stack[-1])")
    assert_notices(check, module, "if before in WHOLE", "if False and before in WHOLE")


def test_what_a_server_does_between_its_waits():
    def check():
        clock = Clock()
        tally = Tally(clock, "waiting")
        clock.sleep(1)
        with tally.timing("applying"):
            clock.sleep(2)
        with tally.timing("transferring"):
            clock.sleep(4)
        assert spent(tally) == {"waiting": 1, "applying": 2, "transferring": 4}

    assert_notices(check, module, "before in WHOLE and len(self._stack) > 1", "before in WHOLE")


def test_an_error_within_ends_the_state():
    clock = Clock()
    tally = Tally(clock)
    with suppress(ValueError), tally.timing("saving"):
        clock.sleep(1)
        raise ValueError("x")
    clock.sleep(2)
    assert spent(tally) == {"saving": 1, "computing": 2}


def live(tally, clock, entries, rng):
    """A life of many entries; an independent account of it: state, from, to."""
    account = []
    for kind in rng.integers(0, 3, entries):
        for state in ("computing", ("waiting", "transferring", "applying")[kind]):
            start = clock.now
            if state == "computing":
                clock.sleep(rng.exponential(3e-3))
            else:
                with tally.timing(state):
                    clock.sleep(rng.exponential(1e-3))
            account.append((state, start, clock.now))
    return account


def told(account, state, low, high):
    """Seconds in a state within a window."""
    return sum(max(0, min(end, high) - max(start, low)) for name, start, end in account if name == state)


def test_stretches_of_the_whole_run_and_its_beginning_one_by_one():
    def check():
        clock = Clock()
        tally = Tally(clock)
        account = live(tally, clock, 3_000, np.random.default_rng(5))
        about = json.loads(json.dumps(tally.about()))
        line, begun = about["timeline"], 50.0
        assert (line["start"], line["end"]) == (begun, clock.now - begun)
        bins = np.array(line["bins"])
        assert bins.shape[0] == len(STATES)
        assert 256 < bins.shape[1] <= 512
        assert_close(bins.sum(axis=1), list(about["seconds"].values()), atol=1e-3)
        for number in (0, 17, bins.shape[1] - 1):
            low = begun + number * line["width"]
            for at, state in enumerate(STATES):
                assert_close(bins[at, number], told(account, state, low, low + line["width"]), atol=2e-6)
        times = np.append(line["times"], line["until"])
        assert len(times) == module.MOST + 1 == len(line["states"]) + 1
        for at in range(0, module.MOST, 53):
            start, end, state = times[at], times[at + 1], line["states"][at]
            wrong = end - start - told(account, STATES[state], begun + start, begun + end)
            assert -1e-5 < wrong < 20 * module.SHORTEST, "more than a few entries that are too short to be told"

    assert_notices(check, module, "self._bins[:, BINS // 2 :] = 0", "pass")
    assert_notices(check, module, "np.where(states == state, spent, 0)", "spent")


def test_memory_stays_as_it_is():
    clock = Clock()
    tally = Tally(clock)
    live(tally, clock, 30_000, np.random.default_rng(1))
    assert sum(times.nbytes + states.nbytes for times, states in tally._first) < 300_000
    assert len(tally._times) <= module.FOLD + 1
    assert tally.about()["timeline"]["until"] < tally.about()["timeline"]["end"]


def test_who_comes_first_to_a_small_meeting_waits_and_much_is_a_transfer():
    def seconds(entries):
        def rank(wire):
            wire.worked("apply", 1_000_000_000 * wire.rank)  # the second one comes a second later
            wire.allreduce_(np.zeros(entries))
            return wire.tally.seconds()

        return run(Machine(2, Costs(apply=Hop(0.0, 1e9), oversleep=0.0)), rank)[0]

    def check():
        few, many = seconds(5), seconds(5_000)
        assert_close([few["waiting"], many["transferring"]], [1, 1], atol=2e-3)
        assert few["transferring"] == many["waiting"] == 0

    from gpudbn.mpi import wire

    assert_notices(check, wire, "array.nbytes <= MOVES_AT_ONCE", "False")


def test_clocks_are_aligned_by_the_quickest_answer():
    """Two ranks in threads whose clocks are an hour apart; the first questions are kept waiting."""
    def check():
        ways = {0: Queue(), 1: Queue()}

        class End:
            size = 2
            align = Wire.align

            def __init__(self, rank, ahead):
                self.rank, self.ahead, self.travelled = rank, ahead, 0
                self.tally = Tally(Clock())

            def clock(self):
                return shared.now + self.ahead

            def travel(self):
                if self.rank == 1:
                    shared.sleep([0.5, 0.5, 0.004, 0.004, 0.3, 0.4, 0.001, 0.001, 0.2, 0.2][self.travelled])
                    self.travelled += 1

            def send(self, array, to):
                self.travel()
                ways[to].put(array.copy())

            def recv(self, array, _):
                array[:] = ways[self.rank].get(timeout=10)
                self.travel()

        shared = Clock(0.0)
        ends = [End(0, 3600.0), End(1, -7.0)]
        threads = [Thread(target=end.align) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert ends[0].tally.offset == 0
        assert_close(ends[1].tally.offset, 3607.0, atol=1e-9)

    from gpudbn.mpi import wire

    assert_notices(check, wire, "if took < best:", "if took > 0.5:")
    assert_notices(check, wire, "float(answer[0]) - asked - took / 2", "float(answer[0]) - asked + took / 2")
