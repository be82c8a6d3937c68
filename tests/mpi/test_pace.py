"""Who may begin a turn: replicas that are too far ahead wait, and the first one may begin alone.

The rule by itself, and epochs of real servers and replicas in virtual time.
"""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.mpi import Plan, join, ledger, server
from gpudbn.mpi.ledger import Epoch, Ledger
from gpudbn.mpi.server import Server
from tests.helpers import assert_notices
from tests.mpi.test_collective import together

FIRST, EACH = 40, 6


class Race:
    """Replicas of any speed around a first server, which alone knows who has done what."""

    def __init__(self, replicas, *, ahead=EACH, warm=0):
        self.ledger, self.limit = Ledger(), np.zeros(replicas, np.int64)
        self.epoch = Epoch(self.ledger, FIRST, EACH, self.limit)
        self.living, self.done = list(range(replicas)), [0] * replicas
        self.ahead, self.warm = ahead, warm

    def may(self, replica):
        """Whether it may begin another of its own turns."""
        return self.done[replica] < min(
            self.limit[replica], self.epoch.allowed(replica, self.living, self.ahead, self.warm))

    def turn(self, *replicas):
        for replica in replicas:
            assert self.may(replica)
            self.ledger.add(FIRST + replica * EACH + self.done[replica])
            self.done[replica] += 1

    def all_may(self):
        return [replica for replica in self.living if self.may(replica)]

    def lose(self, replica):
        self.epoch.lose(replica)
        self.living.remove(replica)


def test_a_fast_replica_waits_for_the_slowest_that_has_work():
    race = Race(3, ahead=2)
    race.turn(0, 0, 0)
    assert race.all_may() == [1, 2], "replica 0 is 3 ahead of both"
    race.turn(1)
    assert race.all_may() == [1, 2], "of one"
    race.turn(2)
    assert race.all_may() == [0, 1, 2]
    race.turn(0, 1, 1, 1)
    assert race.all_may() == [2]
    race.turn(2, 2, 2, 2, 2)
    assert race.all_may() == [0, 1], "replica 2 is through"


def test_none_ahead_is_a_turn_after_the_other():
    race = Race(2, ahead=0)
    for _ in range(EACH):
        race.turn(1)
        assert race.all_may() == [0]
        race.turn(0)


def test_the_lost_and_those_whose_turns_were_handed_on_are_not_waited_for():
    race = Race(3, ahead=0)
    race.turn(0, 1)
    assert race.all_may() == [2]
    race.lose(2)
    assert race.all_may() == [0, 1]
    race.turn(1)
    assert race.all_may() == [0]
    race.limit[0] = 1
    race.turn(1, 1, 1, 1)
    assert race.all_may() == []


def test_the_first_begins_alone_and_that_does_not_count_as_ahead():
    race = Race(3, warm=4, ahead=1)
    for _ in range(4):
        assert race.all_may() == [0]
        race.turn(0)
    assert race.all_may() == [0, 1, 2]
    race.turn(1, 1)
    assert race.all_may() == [0, 2]
    race.turn(0, 0)
    assert race.all_may() == [2]
    race.lose(0)
    assert race.all_may() == [2], "nobody begins alone once more"


def test_if_the_first_dies_alone_the_next_begins():
    race = Race(3, warm=2)
    race.turn(0)
    race.lose(0)
    assert race.all_may() == [1]
    race.turn(1)
    assert race.all_may() == [1]
    race.turn(1)
    assert race.all_may() == [1, 2]


def test_more_than_there_is_to_do_is_done_alone_and_no_more():
    race = Race(2, warm=EACH + 1)
    race.turn(*[0] * EACH)
    assert race.all_may() == [1]


@pytest.mark.parametrize("seed", range(100))
def test_whoever_dies_somebody_may_go_on(seed):
    rng = np.random.default_rng(seed)
    race = Race(int(rng.integers(1, 5)), ahead=int(rng.integers(0, 3)), warm=int(rng.integers(0, EACH + 1)))
    while left := [replica for replica in race.living if race.done[replica] < race.limit[replica]]:
        ready = race.all_may()
        assert ready, "all wait for one another"
        if race.warm == 0:
            slowest = min(race.done[replica] for replica in left)
            assert all(race.done[replica] <= slowest + race.ahead for replica in ready)
        race.turn(int(rng.choice(ready)))
        if len(race.living) > 1 and rng.random() < 0.05:
            race.lose(int(rng.choice(race.living)))


def epochs(ahead, warm, seconds, each=8, servers=1):
    """Two epochs of replicas whose turns take so long; what each saw when it began its turns, and all it did.

    Entry r of the parameters counts the turns of shard r, so parameters tell what they contain.
    """
    def program(wire):
        exchange = join(wire, Plan("async", servers=servers, max_staleness=ahead), 100)
        if isinstance(exchange, Server):
            return exchange.serve()
        parameters = np.zeros(100, np.float32)
        exchange.begin(parameters)
        before, seen = parameters.copy(), []
        for number in range(2):
            start = parameters[: len(seconds)].copy()
            for owner, turn in exchange.turns(each, warm if number == 0 else 0):
                exchange.refresh(parameters, before)
                seen.append((number, owner, turn, *(parameters[: len(seconds)] - start).astype(int)))
                wire.compute(seconds[exchange.replica])
                parameters[owner] += 1
                exchange.exchange(parameters, before)
            exchange.meet(parameters)
            before[...] = parameters
        assert parameters[: len(seconds)].tolist() == [2 * each] * len(seconds)
        exchange.close()
        return seen

    return together(servers + len(seconds), program)[servers:]


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_in_a_real_epoch_nobody_is_further_ahead_and_all_is_done_once(ahead, servers):
    found = epochs(ahead, 0, [0.001, 0.01, 0.002], servers=servers)
    for replica, seen in enumerate(found):
        own = [row for row in seen if row[1] == replica]
        for _, _, turn, *counts in own:
            slowest = min(count for other, count in enumerate(counts) if other != replica)
            assert turn - slowest <= ahead or slowest == 8


@pytest.mark.parametrize(("line", "fault"), [
    ("default=self.each) + ahead + 1", "default=self.each) + ahead + 2"),
    ("if done < allowed:", "if True:"),
])
def test_one_that_goes_on_too_soon_is_noticed(line, fault):
    module = server if "done" in line else ledger
    assert_notices(lambda: test_in_a_real_epoch_nobody_is_further_ahead_and_all_is_done_once(1, 1), module, line, fault)


def test_without_a_bound_a_fast_replica_does_not_wait():
    fast, _ = epochs(None, 0, [0.001, 0.05])
    turn, _, slow = fast[7][2:]
    assert (turn, slow) == (7, 0)


def test_in_a_real_epoch_the_first_begins_alone():
    first, second, third = epochs(None, 5, [0.01, 0.001, 0.001])
    assert [row[3:] for row in first[:5]] == [(done, 0, 0) for done in range(5)]
    for other in (second, third):
        assert other[0][3] >= 5, "they begin with what it made"
        assert [row[0] for row in other].count(1) >= 8, "only in the first epoch"
