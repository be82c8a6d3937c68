"""The command that says what is here: what it tells is what training would find."""

from __future__ import annotations

import pytest

from gpudbn import arrays, doctor
from gpudbn.errors import UserError
from gpudbn.mpi import library, transport, wire
from tests.conftest import why_no_mpi
from tests.pretend_cupy import installed

HAS_MPI = pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))


def told(capsys, *arguments):
    """Exit code, and the lines by their first words; lines that go on are joined."""
    code = doctor.main(list(arguments))
    lines, name = {}, ""
    for line in capsys.readouterr().out.splitlines():
        name = line[:11].strip() or name
        lines[name] = f"{lines[name]}; {line[11:]}" if name in lines else line[11:]
    return code, lines


@HAS_MPI
def test_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(arrays, "why_no_gpu", lambda: "there is none")
    monkeypatch.setattr(transport, "why_no_gpu", lambda: "there is none")
    code, lines = told(capsys)
    assert code == 0
    assert list(lines) == ["gpudbn", "cores", "packages", "device", "kernels", "MPI", "transport"]
    assert "numpy 2." in lines["packages"]
    assert lines["device"] == "CPU (NumPy; there is none)"
    assert lines["transport"] == "staged: there is none"
    name, file = library.found()
    assert name in lines["MPI"]
    assert str(file) in lines["MPI"]
    assert f"started by {transport.mpirun()}" in lines["MPI"]


@HAS_MPI
@pytest.mark.parametrize(("reason", "line"), [("it failed", "staged: it failed"),
                                              (None, "direct: two ranks sent each other arrays of the GPU")])
def test_a_machine_with_a_gpu(capsys, monkeypatch, reason, line):
    monkeypatch.delenv(transport.VARIABLE, raising=False)
    monkeypatch.setattr(transport, "trial", lambda: reason)
    with installed():
        code, lines = told(capsys)
    assert code == 0
    assert lines["device"] == "GPU 0 of 1 (pretended, kernels on the CPU)"
    assert lines["transport"] == line


def test_what_is_wrong_is_told_and_the_rest_as_well(capsys, monkeypatch):
    def refuse():
        raise UserError("MPI: one package must be installed; got two")

    monkeypatch.setattr(library, "refuse_two_wheels", refuse)
    monkeypatch.setattr(transport, "why_no_gpu", lambda: "there is none")
    code, lines = told(capsys)
    assert code == 2
    assert lines["MPI"] == "PROBLEM: MPI: one package must be installed; got two"
    assert lines["transport"] == "staged: there is none"


def test_it_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(wire, "_end_early", print)
    assert doctor.main([]) == 2
    assert "must run as one process; got 2 ranks" in capsys.readouterr().out
