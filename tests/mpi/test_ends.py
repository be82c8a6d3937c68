"""However a job goes wrong, all its ranks end within seconds, with a code and, where it helps, one line."""

from __future__ import annotations

import socket
import time

import pytest

from gpudbn.mpi import launch
from tests.mpi.job import job

pytestmark = pytest.mark.mpi
HOST = socket.gethostname()


def failing(mode, kind, where, ranks=3):
    start = time.perf_counter()
    done = job(ranks, "failing", mode, kind, where, timeout=40)
    assert time.perf_counter() - start < 20
    return done


@pytest.mark.parametrize(("mode", "ranks", "name"), [("sync", 3, "replica 1 of 3"), ("async", 3, "replica 1 of 2")])
@pytest.mark.parametrize(("kind", "code", "text"), [
    ("user", 2, "data: must be there; got nothing. Look for it"),
    ("finite", 3, "layer 0: not finite at update 7"),
    ("fault", 1, "Traceback (most recent call last):"),
])
def test_one_replica_fails(mode, ranks, name, kind, code, text):
    done = failing(mode, kind, "one", ranks)
    assert done.returncode == code
    assert done.stderr.count(f"{name} on {HOST}: {text}\n") == 1
    assert ("ZeroDivisionError: a fault of ours" in done.stderr) == (kind == "fault")
    assert ("Traceback" in done.stderr) == (kind == "fault")


@pytest.mark.parametrize(("kind", "code"), [("interrupt", 130), ("exit", 5), ("unguarded", 1)])
def test_other_ends_of_one_replica(kind, code):
    done = failing("sync", kind, "one")
    assert done.returncode == code
    assert ("interrupted" in done.stderr) == (kind == "interrupt")


def test_a_replica_dies():
    assert failing("async", "dead", "one").returncode != 0


def test_all_replicas_fail_alike():
    done = failing("sync", "finite", "all")
    assert done.returncode == 3
    assert done.stderr.count("not finite") == 1


@pytest.mark.parametrize(("mode", "name"), [("sync", "replica 1 of 3"), ("async", "replica 1 of 2")])
def test_agreed_errors_are_told_once(mode, name):
    done = failing(mode, "agree", "one")
    assert done.returncode == 2
    assert done.stderr.count(f"{name} on {HOST}: data: must be there; got nothing\n") == 1
    assert done.stderr.count("data:") == 1
    assert "Abort" not in done.stderr
    assert "ABORT" not in done.stderr


def test_an_error_of_all_names_nobody():
    done = failing("async", "agree", "all")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "data:" in line] == ["data: must be there; got nothing"]


def test_failing_before_mpi():
    """One rank never comes to MPI_Init, where the others wait for it."""
    done = failing("early", "user", "one")
    assert done.returncode == 2
    assert done.stderr.count(f"rank 1 of 3 on {HOST}: data: must be there") == 1


def test_all_fail_before_mpi():
    done = failing("early", "user", "all")
    assert done.returncode == 2
    assert done.stderr.count("data: must be there") == 1


def test_singletons_are_refused():
    """A launcher that speaks another tongue: each rank is told that it is one of four and finds nobody."""
    rank, size = launch.LAUNCHERS["slurm"]
    done = job(0, "wire", env={rank: "0", size: "4"})
    assert done.returncode == 2
    assert done.stderr.count("MPI: ranks must find each other; got 4 from the launcher and 1 from MPI") == 1


def test_a_launcher_of_another_mpi_is_refused():
    from tests.conftest import mpi_wheels

    ours = "pmi" if any("mpich" in wheel for wheel in mpi_wheels()) else "openmpi"
    rank, size = launch.LAUNCHERS[{"pmi": "openmpi", "openmpi": "pmi"}[ours]]
    done = job(0, "wire", env={rank: "0", size: "4"})
    assert done.returncode == 2
    assert done.stderr.count("MPI: mpirun and library must belong together") == 1
    assert "Traceback" not in done.stderr
