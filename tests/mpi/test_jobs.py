"""Jobs under mpirun: messages, replicas in step, replicas around a server. The assertions are in ``programs/``."""

from __future__ import annotations

import json

import pytest

from tests.mpi.job import good_job

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [2, 3])
def test_wire(ranks):
    assert good_job(ranks, "wire", "again").count("done") == ranks


def test_in_step():
    bits = {ranks: good_job(ranks, "collective").strip() for ranks in (1, 2, 4)}
    assert bits[1].startswith("bits ")
    assert len(bits[1]) > 13 * 7 * 8
    assert bits[1] == bits[2] == bits[4]


def served(what, replicas=2):
    """Run a case of ``asynchronous.py``; its lines and the server's statistics."""
    lines = good_job(replicas + 1, "asynchronous", what, replicas).splitlines()
    (server,) = [json.loads(line.removeprefix("server ")) for line in lines if line.startswith("server ")]
    return lines, server


def test_every_change_is_applied_exactly_once():
    _, server = served("exactly_once", replicas=3)
    assert server["applied"] == [200] * 3
    assert server["version"] == 600
    assert sum(server["staleness"]) == 600


def test_reads_by_message():
    _, server = served("ask")
    assert server["asked"] == 2 * 52


def test_a_single_replica_is_never_stale():
    _, server = served("exactly_once", replicas=1)
    assert server["staleness"] == [200, *[0] * 31]


def torn(lines):
    """Torn reads of each replica."""
    return [int(line.split()[1]) for line in lines if line.startswith("torn")]


def test_no_read_is_torn():
    lines, server = served("contention")
    assert torn(lines) == [0, 0]
    assert server["version"] == 240


def test_reads_of_a_single_copy_are_torn():
    """The fault against which there are two copies and a turn to look at: the test above would see it."""
    lines, _ = served("single_copy", replicas=3)
    assert sum(torn(lines)) > 0


@pytest.mark.parametrize("what", ["own_writes", "phases", "pretended_device", "quadratic"])
def test_around_a_server(what):
    served(what)


def test_waiting_ranks_sleep():
    _, server = served("idle")
    assert server["cpu"] < 0.25
    assert server["seconds"]["idle"] > 1.9
