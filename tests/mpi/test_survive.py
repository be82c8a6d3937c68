"""Replicas that die, are stopped, send NaN or are slow, and servers that die: what is survived, and how the rest ends.

What must hold is in ``programs/survive.py``: that every turn's change is applied once at every server, that changes
and reads are whole, and that all living replicas have the same parameters in the end.
"""

from __future__ import annotations

import json

import pytest

from tests.conftest import mpi_wheels
from tests.mpi.job import job

pytestmark = pytest.mark.mpi
MPICH = any("mpich" in wheel for wheel in mpi_wheels())
ulfm = pytest.mark.skipif(MPICH, reason="MPICH ends a job of which a rank dies; Open MPI goes on with --with-ft ulfm")


def survive(ranks=4, survivors=True, **options):
    """A job of ``survive.py``: what it said, and the reports of its servers and of its replicas by number."""
    done = job(ranks, "survive", json.dumps(options), survive=survivors)
    found = {"server": {}, "replica": {}}
    for line in done.stdout.splitlines():
        kind, _, report = line.partition(" ")
        if kind in found:
            found[kind][json.loads(report)["number" if kind == "server" else "replica"]] = json.loads(report)
    assert not any(report.get("torn") for reports in found.values() for report in reports.values())
    return done, found["server"], found["replica"]


def check_survived(lost, servers=1, replicas=3, epochs=3, each=12, **options):
    """A job that loses these replicas and ends well; what ``survive`` gives."""
    done, *found = survive(servers + replicas, servers=servers, epochs=epochs, each=each, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert sorted(found[0]) == list(range(servers))
    assert sorted(found[1]) == [replica for replica in range(replicas) if replica not in lost]
    for server in found[0].values():
        assert sorted(server["lost"]) == sorted(lost)
        assert server["version"] == sum(server["applied"]) - sum(server["refused"]) == epochs * each * replicas
    for report in found[1].values():
        assert report["living"] == sorted(found[1])
        assert report["chief"] == (report["replica"] == min(found[1]))
    for replica in lost:
        assert f"replica {replica} of {replicas}" in done.stderr
    return done, *found


@ulfm
@pytest.mark.parametrize(("where", "turn"), [
    ("compute", 1), ("compute", 17), ("push", 8), ("number", 13), ("pull", 6), ("meet", 4)])
def test_a_replica_that_is_killed_is_survived(where, turn):
    check_survived([1], kill={1: [where, turn]})


@ulfm
def test_the_chief_and_another_are_killed():
    check_survived([0, 2], kill={0: ["push", 9], 2: ["pull", 20]})


@ulfm
def test_one_killed_between_two_servers_leaves_a_change_that_is_not_made_twice():
    _, servers, _ = check_survived([0], servers=2, replicas=2, kill={0: ["between", 6]})
    assert sum(servers[1]["refused"]) >= 1


@ulfm
def test_one_that_is_stopped_is_killed_by_its_neighbours():
    done, _, replicas = check_survived([1], stop={1: 6}, stopped_seconds=1)
    assert "was stopped for 1 s: killed" in done.stderr
    assert 1 < replicas[0]["times"][0] < 8
