"""Imports point down. The table is the whole rule: a file imports only from lines above its own.

Files that are not in the table are commands and other faces: they may import whatever there is, and nobody imports
them. Imports inside functions and for type checking count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpudbn

FLOORS = """
    compiled
    errors draws scratch tracing mpi/launch mpi/watch mpi/hub mpi/ledger
    arrays mpi/library exact paths precision settings mpi/costs mpi/tally
    factors parameters shards
    local
    reference cuda/door checkpoint data/rows mpi/wire mpi/alone
    mpi/nccl
    mpi/parts
    cuda/draws cuda/elementwise cuda/exact cuda/offsets cuda/rows cuda/persistent cuda/turns cuda/wgmma data/checks
    cuda/layers
    cuda/__init__ data/files
    data/idx data/mnist
    data/__init__
    unfused
    twins
    batch offsets optimiser rbm feed graphs mpi/collective mpi/machine
    mpi/rules mpi/virtual
    mpi/changes
    mpi/staged mpi/sandblaster
    mpi/direct
    mpi/transport mpi/server
    mpi/replica
    mpi/overlap
    mpi/__init__
    dbn memory trials
    pretrain
    finetune large
    autoencoder
    loop runs plots
    _command
    mpi/calibrate mpi/simulate
"""
FLOOR = {name: number for number, line in enumerate(FLOORS.strip().splitlines()) for name in line.split()}
FACE = len(FLOORS)
PACKAGE = Path(gpudbn.__file__).parent

# who may import what is not everywhere
FENCES = {"cupy": {"arrays", "cuda/__init__", "mpi/nccl"}, "mpi4py": {"mpi/library"}}


def sources():
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text("utf-8")
            for path in sorted(PACKAGE.rglob("*.py"))}


def modules(name, source):
    """The modules that a file names in import statements, or in calls that import by name, with dots."""
    parents = ["gpudbn", *name.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def file_of(module, files):
    """The file of gpudbn that a dotted name means, or lies in; None for the package itself and for others."""
    parts = module.split(".")
    while parts[0] == "gpudbn" and len(parts) > 1:
        path = "/".join(parts[1:])
        for name in (path, f"{path}/__init__"):
            if name in files:
                return name
        parts.pop()
    return None


def breaches(files):
    """Every import that does not point down, as text."""
    found = []
    for name, source in files.items():
        for module in modules(name, source):
            other = file_of(module, files)
            if other not in (None, name) and FLOOR.get(other, FACE) >= FLOOR.get(name, FACE):
                found.append(f"{name} imports {other}")
    return found


def trespasses(files):
    """Every import of a fenced package from outside its fence, as text."""
    return [f"{name} imports {module}" for name, source in files.items() for module in modules(name, source)
            if name not in FENCES.get(module.split(".")[0], {name})]


def test_every_file_imports_only_from_floors_below_its_own():
    assert breaches(sources()) == []


def test_the_table_names_files_that_are_there():
    assert set(FLOOR) <= set(sources())


@pytest.mark.parametrize(("name", "line", "found"), [
    ("rbm", "from gpudbn.dbn import DBN", "rbm imports dbn"),
    ("rbm", "from gpudbn import dbn", "rbm imports dbn"),
    ("rbm", "from .dbn import DBN", "rbm imports dbn"),
    ("rbm", "import gpudbn.loop as loop", "rbm imports loop"),
    ("rbm", "def f():\n    import gpudbn.optimiser", "rbm imports optimiser"),  # the same floor
    ("loop", "from gpudbn.train import main", "loop imports train"),
    ("draws", "from gpudbn.arrays import Array", "draws imports arrays"),
    ("data/rows", "from . import checks", "data/rows imports data/checks"),
    ("data/rows", "from gpudbn.data import load", "data/rows imports data/__init__"),
    ("mpi/server", "from ..dbn import DBN", "mpi/server imports dbn"),
    ("arrays", "importlib.import_module('gpudbn.rbm')", "arrays imports rbm"),
    ("train", "from gpudbn import fit", "train imports fit"),
])
def test_an_import_that_points_up_or_sideways_is_noticed(name, line, found):
    files = sources()
    assert breaches({**files, name: files[name] + "\n" + line + "\n"}) == [found]


def test_cupy_and_mpi_stay_behind_their_doors():
    files = sources()
    assert trespasses(files) == []
    found = {name: {module.split(".")[0] for module in modules(name, source)} for name, source in files.items()}
    for package, inside in FENCES.items():
        assert {name for name in files if package in found[name]} == inside & set(files), package


@pytest.mark.parametrize(("name", "line", "found"), [
    ("rbm", "import cupy as cp", "rbm imports cupy"),
    ("dbn", "def f():\n    from cupy.cuda import runtime", "dbn imports cupy.cuda.runtime"),
    ("mpi/server", "from mpi4py import MPI", "mpi/server imports mpi4py.MPI"),
    ("loop", "xp = importlib.import_module('cupy')", "loop imports cupy"),
])
def test_a_trespass_is_noticed(name, line, found):
    files = sources()
    assert trespasses({**files, name: files[name] + "\n" + line + "\n"}) == [found]


# What importing really loads

LOADS = {
    "gpudbn": ("numpy", "cupy", "mpi4py", "gpudbn.settings", "gpudbn.arrays"),
    "gpudbn.settings": ("numpy", "cupy", "mpi4py", "gpudbn.arrays"),
    "gpudbn.mpi": ("numpy", "cupy", "mpi4py", "gpudbn.mpi.wire"),
    "gpudbn.train": ("numpy", "cupy", "mpi4py"),  # the number of BLAS threads is not known yet
    "gpudbn.loop": ("cupy", "mpi4py", "gpudbn.mpi", "matplotlib"),
    "gpudbn.dbn": ("cupy", "mpi4py", "gpudbn.mpi", "matplotlib"),
    "gpudbn.mpi.wire": ("cupy", "mpi4py.MPI", "gpudbn.rbm", "gpudbn.loop"),
}


def loaded(statement, unwanted):
    """Which of the unwanted modules a fresh Python has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", LOADS)
def test_importing_loads_nothing_that_has_to_wait(module):
    assert loaded(f"import {module}", LOADS[module]) == []


def test_a_module_that_was_loaded_is_noticed():
    assert loaded("import gpudbn.loop", ("numpy", "gpudbn.finetune", "gpudbn.mpi")) == ["numpy", "gpudbn.finetune"]


def test_the_face_of_the_package_loads_on_first_use():
    program = ("import sys, gpudbn\nassert 'numpy' not in sys.modules\nassert gpudbn.RBM(2, 3).m == 3\n"
               "assert {'DBN', 'RBM', 'load'} <= set(dir(gpudbn))\nassert not hasattr(gpudbn, 'nothing')")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_table_with_two_files_in_another_order_is_noticed(monkeypatch):
    monkeypatch.setitem(FLOOR, "dbn", FLOOR["rbm"])
    assert "dbn imports rbm" in breaches(sources())
