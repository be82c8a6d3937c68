"""Which transport is taken, and whole jobs with device memory: the host's in truth, or one that faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpudbn.errors import UserError
from gpudbn.mpi import launch, transport
from tests.mpi import pretend_driver
from tests.mpi.job import ENVIRONMENT, PROGRAMS, TOP, good_job
from tests.pretend_cupy import installed

PRETENDED = str(Path(pretend_driver.__file__).parent)  # on Python's path it makes a pretended GPU


def said(lines):
    """What the ranks reported: those of servers, those of replicas."""
    found = [line.partition(" ") for line in lines.splitlines() if line.startswith(("Server {", "Asynchronous {"))]
    return [[json.loads(text) for name, _, text in found if name == kind] for kind in ("Server", "Asynchronous")]


@pytest.mark.mpi
@pytest.mark.parametrize("servers", [1, 2])
def test_in_a_job_with_device_memory_that_is_the_hosts(servers):
    """Every MPI can move it; the stream must have been waited for whenever MPI gets it."""
    serving, replicas = said(good_job(servers + 2, "direct", "direct", servers, env={transport.VARIABLE: "1"}))
    assert [len(serving), len(replicas)] == [servers, 2]
    for server in serving:
        assert server["applied"] == [60 + 40 + 4, 60 + 40 + 12]
        assert sum(server["staleness"]) == server["version"] == 216
    for rank in serving + replicas:
        assert rank["transport"] == "direct"
        assert rank["taken"] > 0
        assert rank["unsettled"] == 0


@pytest.mark.mpi
def test_an_mpi_that_is_not_cuda_aware_is_found_out_and_not_given_device_memory():
    output = good_job(3, "direct", "auto", 1, env={"PYTHONPATH": f"{PRETENDED}{os.pathsep}{TOP}"})
    serving, replicas = said(output)
    for rank in serving + replicas:
        assert rank["transport"].startswith("staged: ")
        assert "says it is not CUDA-aware" in rank["transport"]
        assert rank["taken"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts a job of a CUDA-aware Open MPI whose device memory faults when the CPU touches it."""
    folder = tmp_path_factory.mktemp("driver")
    pretend_driver.build(folder, cuda_headers())
    env = os.environ | ENVIRONMENT | {
        "PYTHONPATH": f"{PRETENDED}{os.pathsep}{TOP}", "LD_LIBRARY_PATH": str(folder), "PRETEND_DRIVER": "1",
        "PRETEND_DRIVER_REPORT": "1"}
    del env["OMPI_MCA_osc"]

    def run(ranks, *command, **more):
        mpirun = f"{os.environ['GPUDBN_CUDA_MPI']}/mpirun"
        return subprocess.run([mpirun, "-n", str(ranks), sys.executable, *map(str, command)], env=env | more,
                              capture_output=True, text=True, timeout=120, check=False, cwd=folder)

    return run


@pytest.mark.cuda_mpi
@pytest.mark.parametrize("servers", [1, 2])
def test_it_is_found_and_used(run, servers):
    done = run(servers + 2, PROGRAMS / "direct.py", "auto", servers)
    assert done.returncode == 0, done.stdout + done.stderr
    serving, replicas = said(done.stdout)
    for rank in serving + replicas:
        assert rank["transport"] == "direct"
        assert rank["taken"] > 0
        assert rank["unsettled"] == 0
    copies = [line for line in done.stderr.splitlines() if line.startswith("pretend driver: ")]
    assert len(copies) == servers + 2
    for line in copies:
        *_, on_device, others = map(int, re.findall("[0-9]+", line))
        assert others == on_device > 1_000_000, "from process to process, without the host"


@pytest.mark.cuda_mpi
def test_the_whole_command(run, tmp_path):
    done = run(3, "-m", "gpudbn.train", "--device", "gpu", "--kernels", "unfused", "--layers", "16", "8",
               "--epochs", "1", "--finetune-epochs", "1", "--batch", "100", "--plots", "off",
               "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changes  direct\n" in done.stdout
    assert "test error: " in done.stdout


@pytest.mark.cuda_mpi
def test_an_mpi_that_takes_it_for_its_own_ends_by_a_fault(run):
    """That the memory does fault: the same MPI, told to leave CUDA alone, and believed to be aware."""
    done = run(3, PROGRAMS / "direct.py", "direct", 1, OMPI_MCA_opal_cuda_support="0", **{transport.VARIABLE: "1"})
    assert done.returncode != 0
    assert "Segmentation fault" in done.stderr
    trial = run(3, PROGRAMS / "direct.py", "auto", 1, OMPI_MCA_opal_cuda_support="0")
    assert trial.returncode == 0, trial.stdout + trial.stderr
    assert all(rank["transport"].startswith("staged: ") for ranks in said(trial.stdout) for rank in ranks)


# ------------------------------------------------------------------------------------------ the choice


@pytest.fixture
def gpu():
    with installed():
        yield


def test_the_childs_variables_are_those_of_no_rank():
    ranks = {"OMPI_COMM_WORLD_RANK": "0", "PMI_RANK": "1", "PMIX_RANK": "0", "SLURM_PROCID": "3",
             "MPI_LOCALRANKID": "0", "OMPI_MCA_ess_base_vpid": "0", "OMPI_MCA_orte_hnp_uri": "x", "PRTE_LAUNCHED": "1"}
    chosen = {"OMPI_MCA_pml": "ob1", "PMIX_PREFIX": "/mpi", "OPAL_PREFIX": "/mpi", "CUDA_VISIBLE_DEVICES": "2"}
    found = transport.outside(ranks | chosen)
    assert launch.world(found) is None
    assert not set(ranks) & set(found)
    assert chosen.items() <= found.items()


def test_reasons_against_device_memory(monkeypatch, gpu):  # noqa: ARG001
    monkeypatch.setattr(transport, "trial", lambda: "it failed")
    monkeypatch.delenv(transport.VARIABLE, raising=False)
    assert transport.why_not_direct("cpu") == "--device is cpu"
    assert transport.why_not_direct("gpu") == "it failed"
    monkeypatch.setenv(transport.VARIABLE, "1")
    assert transport.why_not_direct("auto") is None
    monkeypatch.setenv(transport.VARIABLE, "0")
    assert "GPUDBN_CUDA_AWARE=0" in transport.why_not_direct("auto")
    monkeypatch.setenv(transport.VARIABLE, "yes")
    with pytest.raises(UserError, match=r"GPUDBN_CUDA_AWARE: must be 0 or 1; got yes"):
        transport.why_not_direct("auto")
    monkeypatch.delenv(transport.VARIABLE)
    ranks = {"OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert transport.why_not_direct("auto") == "it failed"
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert transport.why_not_direct("auto") is None, "the first rank of the machine asks for all"
    monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", "1")
    monkeypatch.setenv(transport.VARIABLE, "1")
    assert "ulfm" in transport.why_not_direct("auto")


def test_one_rank_that_cannot_decides_for_all():
    def wire(*reasons):
        return SimpleNamespace(allgather_text=lambda _: list(reasons), agree=refused.append)

    refused = []
    assert transport.agreed(wire("", "no GPU"), "staged", None) == ("staged", "")
    assert transport.agreed(wire("", ""), "auto", None) == ("direct", "")
    assert transport.agreed(wire("", "no GPU", "--device is cpu"), "auto", None) == ("staged", "no GPU")
    assert not refused
    transport.agreed(wire("", "no GPU"), "direct", None)
    assert refused == ["--transport: must be one that works here; got direct, but no GPU. Use auto or staged"]


# ------------------------------------------------------------------------------------------ the pretend driver


def cuda_headers():
    """Where cuda.h is: with the toolkit, or in the wheel of its runtime."""
    folders = [Path("/usr/local/cuda/include"), *(Path(folder) / "nvidia/cu13/include" for folder in sys.path)]
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


@pytest.mark.skipif(cuda_headers() is None, reason="there is no cuda.h")
def test_the_pretend_drivers_memory_is_the_devices_alone(tmp_path):
    library = pretend_driver.build(tmp_path, cuda_headers())
    program = """
import ctypes, sys, numpy as np
from tests.mpi.pretend_driver import Driver
driver = Driver(sys.argv[1])
memory = driver.allocate(5000)
memory[:] = 7
copy = np.empty(10, np.uint8)
address = driver.address(memory[4990:])
here, there = ctypes.c_uint64(copy.ctypes.data), ctypes.c_uint64(address)
driver.succeed(driver.library.cuMemcpy(here, there, ctypes.c_size_t(10)))
assert (copy == 7).all()
assert driver.library.cuMemcpy(there, here, ctypes.c_size_t(8000)) != 0, "beyond the end"
print("copied", flush=True)
ctypes.string_at(address, 1)
print("touched", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True, check=False,
                          cwd=TOP, env=os.environ | {"PYTHONPATH": str(TOP)})
    assert done.stdout == "copied\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
