"""Every kernel compiles for every architecture we name, without a GPU, and stays within its budget.

The compiler is NVRTC as CuPy calls it: same headers, same options. Registers and shared memory are
held to ``budget.json``; nothing may spill. A kernel that needs more than its budget is a
decision: change the file and say why.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from gpudbn import cuda
from gpudbn.cuda.door import kernels_folder
from tests.cuda.report import record

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100")
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())


def why_no_compiler():
    """One sentence why NVRTC cannot be used, or None."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except ImportError:
        return "CuPy is not installed"
    except Exception as error:  # CuPy says in many ways that a library is missing
        return f"NVRTC is not installed ({str(error).splitlines()[0]})"
    return None


def cubin_of(source, architecture, extra=()):
    """The code for an architecture, and what the compiler says.

    CuPy's own entry to NVRTC asks the driver for the architecture, so this goes one step below it.
    """
    from cupy._core import core
    from cupy.cuda import compiler

    options = (*core.assemble_cupy_compiler_options(("--ptxas-options=-v",)), "-ftz=true", f"-arch={architecture}",
               "--device-as-default-execution-space", *extra)
    log = io.StringIO()
    cubin, _ = compiler._NVRTCProgram(source, "kernels.cu", method="cubin").compile(options, log)
    return cubin, log.getvalue()


def compiled(source, architecture, extra=()):
    """The compiler's report on a source: {kernel: {"registers", "shared", "spills"}}."""
    _, log = cubin_of(source, architecture, extra)
    assert "Potential Performance Loss" not in log, log  # products one by one instead of in a row
    report = {}
    for part in log.split("Compiling entry function ")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        spills = re.findall(r"(\d+) bytes spill", part)
        assert spills, "the compiler's report has changed"
        report[re.match(r"'(\w+)'", part)[1]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "shared": int(shared[1]) if shared else 0,
            "spills": sum(map(int, spills)),
        }
    return report


@pytest.mark.skipif(why_no_compiler() is not None, reason=f"kernels are not compiled: {why_no_compiler()}")
@pytest.mark.parametrize(("unit", "architecture"), [(name, architecture) for name, unit in cuda.UNITS.items()
                                                    for architecture in unit.architectures or ARCHITECTURES])
def test_kernels_compile_within_their_budget(unit, architecture):
    report = compiled(cuda.UNITS[unit].source(), architecture, cuda.UNITS[unit].options)
    assert set(report) == set(cuda.UNITS[unit].kernels)
    for kernel, used in report.items():
        budget = BUDGET[unit][kernel]
        assert used["spills"] == 0, f"{kernel} spills {used['spills']} bytes"
        assert used["registers"] <= budget["registers"], f"{kernel} uses {used['registers']} registers"
        assert used["shared"] <= budget["shared"], f"{kernel} uses {used['shared']} bytes of shared memory"
        record(kernel, "compiled", architecture)


@pytest.mark.skipif(why_no_compiler() is not None, reason=f"kernels are not compiled: {why_no_compiler()}")
def test_the_compiler_names_file_and_line():
    from cupy.cuda import compiler

    source = cuda.UNITS["half_step small"].source().replace("u.x < p.x", "u.x < nonsense")
    file = (kernels_folder() / "half_step.cu").read_text().splitlines()
    line = next(number for number, text in enumerate(file, 1) if "u.x < p.x" in text)
    with pytest.raises(compiler.CompileException, match=rf"half_step\.cu\({line}\): error"):
        compiled(source, "sm_90")


def test_the_budget_lists_what_there_is():
    assert {unit: set(kernels) for unit, kernels in BUDGET.items()} == {
        name: set(unit.kernels) for name, unit in cuda.UNITS.items()}


@pytest.mark.parametrize("path", sorted(kernels_folder().glob("*.cu*")), ids=lambda path: path.name)
def test_kernels_include_no_cuda_header(path):
    """So that they compile where only the compiler is installed, and CuPy's cache sees the whole text."""
    for name in re.findall(r"#\s*include\s*([<\"].*?[>\"])", path.read_text()):
        assert name == "<cooperative_groups.h>" or name.endswith('.cuh"')
