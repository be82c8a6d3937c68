"""Which transport replicas and servers take: ``direct``, where this MPI moves device memory, or ``staged``.

An MPI that is not CUDA-aware takes device memory for its own and ends by a segmentation fault. So it is asked, and then
held to its word: a job of two ranks, a child of this process, sends arrays from one GPU to another and back. That has
to be before MPI starts here, which is why nothing of MPI but its name is looked at.

``GPUDBN_CUDA_AWARE=1`` is believed without asking or trying, for an MPI that cannot be asked or a place where no job
can be started; with ``GPUDBN_CUDA_AWARE=0`` device memory is never given to MPI.

    python -m gpudbn.mpi.transport          the job of two ranks: to be started by ``mpirun -n 2``
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpudbn.arrays import choose_module, to_cpu, why_no_gpu
from gpudbn.errors import UserError
from gpudbn.mpi import direct, launch, library, staged
from gpudbn.mpi.wire import Wire, guarded

TRANSPORTS = ("auto", "staged", "direct")
VARIABLE = "GPUDBN_CUDA_AWARE"
PATIENCE = 60.0  # seconds for the job of two ranks
SIZES = (1, 1_000, 1 << 20)  # float32 of a message: a few bytes go another way than many
PROOF, DENIAL = "device memory arrived", "device memory is not for it: "

# what makes a process one of a launcher's ranks; what users set to choose or tune MPI's parts is not among it
OF_A_JOB = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "MPI_LOCAL", "SLURM_", "OPAL_USER_PARAMS_GIVEN")
KEPT = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "PMIX_PREFIX", "PRTE_PREFIX")
OF_A_JOB_TOO = ("OMPI_MCA_ess", "OMPI_MCA_orte", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs",
                "PRTE_MCA_ess", "PRTE_MCA_prte")


def why_not_direct(device: str) -> str | None:
    """One sentence why this process must not give device memory to MPI, or None. Call before MPI starts.

    Parameters
    ----------
    device : str
        The setting of that name.

    Notes
    -----
    The first rank of each machine makes the trial; what it finds, all hear by ``agreed``.

    Raises
    ------
    UserError
        If ``GPUDBN_CUDA_AWARE`` is neither 0 nor 1.
    """
    reason = "--device is cpu" if device == "cpu" else why_no_gpu()
    if reason:
        return reason
    if launch.survives():
        return "--with-ft ulfm is for jobs that outlive their ranks, which messages of device memory do not"
    said = os.environ.get(VARIABLE, "")
    if said:
        if said not in ("0", "1"):
            raise UserError(f"{VARIABLE}: must be 0 or 1; got {said}")
        return None if said == "1" else f"{VARIABLE}=0 says that it cannot take device memory"
    world = launch.world()
    return trial() if world is None or world.local_rank == 0 else None


def agreed(wire: Wire, wanted: str, reason: str | None) -> tuple[str, str]:
    """The transport of all ranks, and why it is not direct where it is not; collective.

    Parameters
    ----------
    wanted : "auto", "staged" or "direct"
    reason : str or None
        What ``why_not_direct`` found on this rank.

    Raises
    ------
    UserError
        On all ranks, if ``direct`` is wanted and one of them cannot.
    """
    if wanted == "staged":
        return "staged", ""
    found = next(filter(None, wire.allgather_text(reason or "")), "")
    if found and wanted == "direct":
        wire.agree(f"--transport: must be one that works here; got direct, but {found}. Use auto or staged")
    return ("staged", found) if found else ("direct", "")


def ends(transport: str, peers: Wire) -> tuple[Any, Any]:
    """What makes the ends of a server and of a replica: callables (wire, size, header_words).

    Parameters
    ----------
    transport : "staged" or "direct"
    peers : Wire
        The ranks of this one's kind, among whom those of a machine share out its GPUs. Collective over them.
    """
    if transport == "staged":
        return staged.ServerEnd, staged.ReplicaEnd
    xp, _ = choose_module("gpu", peers.local_rank())
    return partial(direct.ServerEnd, xp=xp), partial(direct.ReplicaEnd, xp=xp)


def trial() -> str | None:
    """Let two ranks of a job of its own send device memory to each other: why that went wrong, or None."""
    launcher = mpirun()
    if launcher is None:
        return f"there is no mpirun to try it with (python -m gpudbn.doctor; {VARIABLE}=1 takes its word)"
    child = subprocess.Popen([launcher, "-n", "2", sys.executable, "-m", "gpudbn.mpi.transport"], text=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=outside(os.environ), start_new_session=True)
    try:
        said, _ = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"a trial with two ranks was not done in {PATIENCE:.0f} s"
    lines = said.splitlines()
    denial = next((line.removeprefix(DENIAL) for line in lines if line.startswith(DENIAL)), None)
    if child.returncode == 0 and PROOF in lines:
        return None
    return denial or f"a trial with two ranks failed with code {child.returncode}"


def mpirun() -> str | None:
    """The mpirun of the MPI library that mpi4py finds, else that on the path, or None."""
    _, file = library.found()
    folders = [parent / "bin" for parent in file.parents[1:3]] if file else []
    found = (folder / "mpirun" for folder in [*folders, Path(sys.executable).parent])
    return next((str(path) for path in found if os.access(path, os.X_OK)), None) or shutil.which("mpirun")


def outside(environ: Mapping[str, str]) -> dict[str, str]:
    """These variables without those by which a launcher makes a process one of its ranks."""
    kept = {name: value for name, value in environ.items()
            if not name.startswith(OF_A_JOB) or (name.startswith(KEPT) and not name.startswith(OF_A_JOB_TOO))}
    # two ranks on one core are enough, and whoever is root here has been allowed to
    return kept | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                   "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def main() -> int:
    """What each of the two ranks does."""
    wire = Wire.start()
    if wire.cuda_aware() is False:
        if wire.rank == 0:
            print(f"{DENIAL}{wire.library_name()} says it is not CUDA-aware ({VARIABLE}=1 overrules it)", flush=True)
        return 0
    other = 1 - wire.rank
    xp, _ = choose_module("gpu", wire.local_rank())
    for size in SIZES:
        sent = xp.arange(size, dtype=np.float32)
        sent += 3 * wire.rank
        found = xp.empty(size, np.float32)
        wire.wait(wire.irecv(found, other), wire.isend(sent, other))
        right = (to_cpu(found) == np.arange(size, dtype=np.float32) + np.float32(3 * other)).all()
        wire.agree(None if right else "device memory arrived changed")
    if wire.rank == 0:
        print(PROOF, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
