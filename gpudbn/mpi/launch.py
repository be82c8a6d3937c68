"""What the launcher said before MPI starts: how many ranks, which am I, how many share this machine.

Standard library only: it is read before NumPy is imported, because the number of BLAS threads
can be set only until then.

    world = launch.world()
    launch.limit_threads(None, sharing=world.local_size if world else 1)
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

# launcher: its variables for (rank, size), in the order in which they are believed. A launcher may
# itself have been started by srun, so Slurm comes last. SLURM_NTASKS is set in a batch script too,
# where one process runs; SLURM_STEP_NUM_TASKS only under srun.
LAUNCHERS = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "pmi": ("PMI_RANK", "PMI_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")
LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")


@dataclass(frozen=True)
class World:
    """The job as the launcher describes it. ``local``: among the ranks of this machine.

    ``launcher`` is ``openmpi`` (its mpirun), ``pmi`` (the mpirun of MPICH and its kin) or ``slurm``.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def world(environ: Mapping[str, str] | None = None) -> World | None:
    """The job this process belongs to, or None where no launcher started it."""
    environ = os.environ if environ is None else environ
    for launcher, (rank, size) in LAUNCHERS.items():
        if environ.get(rank, "").isdecimal() and environ.get(size, "").isdecimal():
            return World(int(environ[rank]), int(environ[size]),
                         _first(environ, LOCAL_RANK, int(environ[rank])),
                         _first(environ, LOCAL_SIZE, _slurm_local_size(environ) or int(environ[size])), launcher)
    return None


def _first(environ: Mapping[str, str], names: tuple[str, ...], otherwise: int) -> int:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), otherwise)


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """Tasks on this node out of, for instance, ``SLURM_STEP_TASKS_PER_NODE=4(x2),3``."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeat or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None


def survives() -> bool:
    """Whether ranks outlive the death of one: Open MPI's ``mpirun --with-ft ulfm``."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112


def limit_threads(threads: int | None, sharing: int) -> int:
    """Set the number of BLAS threads of this process; call before NumPy is imported.

    Ranks that share cores and each use all of them are several times slower than with one thread each.

    Parameters
    ----------
    threads : int or None
        Threads wanted; None: usable cores / sharing, at least 1.
    sharing : int
        Processes among which this machine's cores are divided.

    Returns
    -------
    int
        The number set. A variable that the user has set is left as it is.

    Raises
    ------
    RuntimeError
        If NumPy is loaded already: its BLAS would not hear of it.
    """
    if "numpy" in sys.modules:
        raise RuntimeError("limit_threads: must be called before NumPy is imported; got it loaded already")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, cores // max(1, sharing)) if threads is None else threads
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, str(count))
    return count


def end_job(code: int) -> None:
    """Make the launcher end the other ranks, with this exit code: works before MPI has started, too.

    There the others may already wait in MPI for this rank. Open MPI's mpirun ends them when a rank exits
    with a code that is not 0. MPICH's has to be told, in a line of the protocol by which it starts ranks.
    Slurm's srun does it if given --kill-on-bad-exit.
    """
    if "MPI_LOCALNRANKS" in os.environ and os.environ.get("PMI_FD", "").isdecimal():
        with contextlib.suppress(OSError):
            os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
