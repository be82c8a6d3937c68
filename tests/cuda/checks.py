"""What the tests of kernels share: places to run in, guarded arrays, addresses, planted faults."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import draws
from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.cuda.door import kernels_folder
from tests.cuda.report import record
from tests.cuda_on_cpu import runtime

EPS = 2.0**-24  # half a unit in the last place of 1
SURE = 1e-6  # samples are demanded where u and p are farther apart than this
PADDING = 64

NEAR = {"seed": 7, "update": 3, "site": draws.site(draws.Purpose.CD, 1, 2), "row": 0}
FAR = {"seed": 2**63 + 12345, "update": 2**32 - 1, "site": 2**32 - 2, "row": 2**33 + 5}

# column, columns: a whole layer, a shard, shards that begin in the middle of a Philox block
COLUMNS = [(0, None), (16, 1001), (3, 157), (6, None)]

PROCESSORS = {"small": 10**9, "large": 1}  # of a chip for which the launcher chooses such tiles
GPU = pytest.param("gpu", marks=pytest.mark.gpu)

# the places and tiles of a test that need not have all of them
ONE_SCHEDULE = pytest.mark.parametrize("place", ["forward", GPU], indirect=True)
ON_CPU = pytest.mark.parametrize("place", ["forward"], indirect=True)
ON_GPU = pytest.mark.parametrize("place", [GPU], indirect=True)
SMALL_TILES = pytest.mark.parametrize("tiles", ["small"], indirect=True)


class Arrays:
    """Makes the launcher's arrays between NaNs: what a kernel reads beyond poisons it, what it writes beyond is seen.

    ``offset`` floats more lie before each array: 1 makes addresses that are no multiples of 16 bytes.
    """

    def __init__(self, launcher, offset=0):
        self.on_cpu = launcher.array_type is np.ndarray
        self.before = PADDING + offset
        self.buffers = []

    def number(self, value):
        """A number in device memory, as a clock is: array (1,), uint32."""
        return np.array([value], np.uint32) if self.on_cpu else to_gpu(np.array([value], np.uint32))

    def integers(self, values):
        """A copy of the values, int32, as labels are."""
        values = np.array(values, np.int32)
        return values if self.on_cpu else to_gpu(values)

    def put(self, values):
        """A copy of the values, float32."""
        values = np.asarray(values, np.float32)
        buffer = np.full(self.before + values.size + PADDING, np.nan, np.float32)
        buffer[self.before : self.before + values.size] = values.ravel()
        buffer = buffer if self.on_cpu else to_gpu(buffer)
        self.buffers.append((buffer, values.size))
        return buffer[self.before : self.before + values.size].reshape(values.shape)

    def empty(self, *shape):
        """NaNs."""
        return self.put(np.full(shape, np.nan))

    def get(self, array):
        """The values, after a look at the NaNs around all arrays."""
        for buffer, size in self.buffers:
            buffer = to_cpu(buffer)
            assert np.isnan(buffer[: self.before]).all(), "wrote before an array"
            assert np.isnan(buffer[self.before + size :]).all(), "wrote behind an array"
        return to_cpu(array)

    def passed(self, kernel):
        record(kernel, "on CPU", runtime.schedule()) if self.on_cpu else record(kernel, "on GPU")


def host_uniforms(B, m, address, column, columns):
    return draws.uniforms(np.empty((B, m), np.float32), **address, column=column, columns=columns)


def sees_fault(text, becomes, check, tiles="small", **of_launcher):
    """Whether ``check(launcher)`` fails, under some schedule on the CPU, where the kernels have this fault planted.

    ``text`` must occur once in the kernels that the check compiles.
    """
    found = []

    def change(code):
        found.append(code.count(text))
        return code.replace(text, becomes)

    launcher = runtime.launcher(PROCESSORS[tiles], change, **of_launcher)

    def fails(schedule):
        with runtime.scheduled(schedule):
            try:
                check(launcher)
            except (AssertionError, runtime.KernelError):
                return True
        return False

    seen = any(fails(schedule) for schedule in runtime.SCHEDULES)
    assert sum(found) == 1, f"the text of a fault must occur once; got {found}: {text}"
    return seen


def barriers(file):
    """The lines of a kernel file that have a barrier: faults to plant. Their comments tell them apart."""
    return [line.strip() for line in (kernels_folder() / file).read_text().splitlines() if "__syncthreads" in line]
