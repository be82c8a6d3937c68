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


def served(what, replicas=2, servers=1, overlap="off"):
    """Run a case of ``asynchronous.py``; its lines and the statistics of each server."""
    lines = good_job(replicas + servers, "asynchronous", what, replicas, servers, overlap).splitlines()
    found = [json.loads(line.removeprefix("server ")) for line in lines if line.startswith("server ")]
    assert len(found) == servers
    return lines, *found


def test_every_change_is_applied_exactly_once():
    _, server = served("exactly_once", replicas=3)
    assert server["applied"] == [200] * 3
    assert server["version"] == 600
    assert sum(server["staleness"]) == 600


def test_every_server_applies_every_change_to_its_shard_exactly_once():
    _, *servers = served("exactly_once", servers=3)
    for server in servers:
        assert server["applied"] == [200] * 2
        assert sum(server["staleness"]) == server["version"] == 400


@pytest.mark.parametrize("servers", [1, 2])
def test_reads_by_message(servers):
    _, *found = served("ask", servers=servers)
    assert [server["asked"] for server in found] == servers * [2 * 52]


def test_a_single_replica_is_never_stale():
    _, server = served("exactly_once", replicas=1)
    assert server["staleness"] == [200, *[0] * 33]


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
@pytest.mark.parametrize("servers", [1, 2])
def test_around_servers(what, servers):
    served(what, servers=servers)


@pytest.mark.parametrize("what", ["exactly_once", "own_writes"])
def test_a_thread_that_exchanges_loses_nothing(what):
    served(what, servers=2, overlap="on")


def test_with_turns_longer_than_an_exchange_a_replica_hardly_waits():
    """4 MB there and back in 50 ms of another's work."""
    lines, _ = served("waits", replicas=1, overlap="on")
    (share,) = [float(line.split()[1]) for line in lines if line.startswith("waits")]
    assert share < 0.05


def test_waiting_ranks_sleep():
    _, server = served("idle")
    assert server["cpu"] < 0.25
    assert server["seconds"]["waiting"] > 1.9
