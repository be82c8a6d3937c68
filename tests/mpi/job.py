"""Starts one of ``programs/`` under the mpirun of this environment and gives back what it said."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
TOP = Path(__file__).parents[2]

ENVIRONMENT = {
    # The Open MPI wheel refuses root and more ranks than cores unless told, and warns for each window.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_osc": "^ucx",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TOP),
}
NOT_BEGUN = "listener thread failed to start"  # Open MPI's mpirun now and then, before it starts any rank


def mpirun():
    """The mpirun beside this Python, else the first on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun beside this Python or on the path"
    return found


def start(ranks, *command, env=None, survive=False):
    """This Python with these arguments on that many ranks (0: without mpirun): a process group of its own.

    ``survive``: the job is to go on when a rank dies, which Open MPI alone does.
    """
    launcher = [mpirun(), *(["--with-ft", "ulfm"] if survive else []), "-n", str(ranks)] if ranks else []
    return subprocess.Popen([*launcher, sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT | (env or {}),
                            start_new_session=True)


def finish(process, timeout=90):
    """subprocess.CompletedProcess with text. A job that outlasts the timeout is killed with all its ranks and fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{process.args}: not done in {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def job(ranks, program, *arguments, timeout=60, **options):
    """Run ``programs/program.py`` on that many ranks: what ``finish`` returns."""
    for _ in range(3):
        done = finish(start(ranks, PROGRAMS / f"{program}.py", *arguments, **options), timeout)
        if NOT_BEGUN not in done.stderr:
            break
    return done


def good_job(ranks, program, *arguments, **options):
    """``job`` that must end with code 0; its output."""
    done = job(ranks, program, *arguments, **options)
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{program} {arguments} on {ranks} ranks: code {done.returncode}\n{said}"
    return done.stdout
