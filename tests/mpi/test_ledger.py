"""Who does which turn, and who meets whom, with every death where the test wants it. No MPI."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn.mpi.hub import Hub, pack, unpack
from gpudbn.mpi.ledger import Epoch, Ledger


def test_turns_that_are_done():
    ledger = Ledger()
    for turn in (3, 5000, 3, 0):
        ledger.add(turn)
    assert np.flatnonzero(ledger.done(2, 4_999)).tolist() == [1, 4998]
    assert not ledger.done(1 << 20, 3).any()


def epoch(replicas=3, each=5, first=20, lost=()):
    ledger, limit = Ledger(), np.full(replicas, -1, np.int64)
    return ledger, limit, Epoch(ledger, first, each, limit, lost)


def test_one_that_is_through_gets_the_last_turn_of_the_slowest():
    ledger, limit, turns = epoch()
    assert limit.tolist() == [5, 5, 5]
    for turn in (20, 21, 22, 23, 24, 25, 26, 30):  # replica 0 is through, 1 did two, 2 did one
        ledger.add(turn)
    assert turns.next(0) == 34
    assert limit.tolist() == [5, 5, 4]
    assert [turns.next(0) for _ in range(4)] == [29, 33, 28, 32]  # in turns, as both have two left
    assert limit.tolist() == [5, 3, 2]
    assert turns.next(0) is None  # 27 and 31 are being done
    assert not turns.over()
    for turn in range(27, 35):
        ledger.add(turn)
    assert turns.over()


def test_turns_of_the_lost_come_first_and_what_they_were_given_comes_back():
    ledger, limit, turns = epoch(lost=[1])
    assert limit.tolist() == [5, 0, 5]
    for turn in (*range(30, 35), 26, 20):
        ledger.add(turn)
    assert [turns.next(2) for _ in range(3)] == [25, 27, 28]
    ledger.add(27)
    turns.lose(2)
    ledger.add(28)  # it had been pushed before
    for turn in range(21, 25):
        ledger.add(turn)
    assert [turns.next(0) for _ in range(3)] == [29, 25, None]
    assert not turns.over()
    ledger.add(29)
    ledger.add(25)
    assert turns.over()


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_every_turn_is_done_and_nobody_waits_for_ever(seed):
    """Replicas of any speed, deaths and changes of limits that are seen late."""
    generator = np.random.default_rng(seed)
    replicas, each, first = int(generator.integers(1, 6)), int(generator.integers(1, 9)), 7
    ledger, limit, turns = epoch(replicas, each, first)
    speed = generator.random(replicas) ** 3 + 0.01
    applied = np.zeros(first + replicas * each, int)
    living, number = list(range(replicas)), np.zeros(replicas, int)
    seen = np.full(replicas, each)  # the limit as an owner last saw it
    asked: dict[int, int] = {}  # a turn that was given
    for _step in range(20_000):
        if turns.over():
            break
        one = int(generator.choice(living, p=speed[living] / speed[living].sum()))
        if generator.random() < 0.02 and len(living) > 1:
            living.remove(one)
            turns.lose(one)
            continue
        if generator.random() < 0.5:
            seen[one] = limit[one]
        if number[one] < seen[one]:
            turn, number[one] = first + one * each + number[one], number[one] + 1
        else:
            turn = turns.next(one) if one not in asked else asked.pop(one)
            if turn is None:
                continue
            if generator.random() < 0.5:
                asked[one] = turn  # later
                continue
        applied[turn] += not ledger.done(turn, 1)[0]
        ledger.add(turn)
    assert turns.over()
    assert (applied[first:] == 1).all()


def test_a_meeting_is_complete_when_all_the_living_are_there():
    hub = Hub(3)
    hub.come(2, b"two")
    hub.come(0, b"")
    assert hub.complete() is None
    hub.come(1, b"one")
    assert hub.complete() == {0: b"", 1: b"one", 2: b"two"}
    assert hub.complete() is None
    assert list(unpack(pack({0: b"", 3: b"one", 1: bytes(range(256))})).items()) == [
        (0, b""), (3, b"one"), (1, bytes(range(256)))]


def test_a_death_completes_a_meeting_and_what_the_dead_brought_is_gone():
    hub = Hub(3)
    hub.come(0, b"a")
    hub.come(1, b"b")
    hub.lose(2)
    assert hub.complete() == {0: b"a", 1: b"b"}
    hub.come(0, b"c")
    hub.lose(0)
    assert hub.complete() is None
    hub.come(1, b"d")
    assert hub.complete() == {1: b"d"}
    with pytest.raises(RuntimeError, match="replica 1 must leave before it comes again"):
        hub.come(1, b""), hub.come(1, b"")
    hub.lose(1)
    assert hub.complete() is None
