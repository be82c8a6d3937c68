"""Where a kernel's tests run: on the CPU under three schedules, and on a GPU where there is one.

A test that takes ``launcher`` is run in every place and with small and large tiles. One that need
not be takes fewer: ``@ONE_SCHEDULE``, ``@SMALL_TILES`` and the like, from ``checks.py``.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from gpudbn import cuda
from tests.cuda.checks import GPU, PROCESSORS
from tests.cuda_on_cpu import runtime


@cache
def _on_cpu(tiles):
    with ThreadPoolExecutor(2) as pool:  # the text of a unit is compiled once, for all launchers
        list(pool.map(lambda unit: runtime.Module(unit.source()),
                      [unit for unit in cuda.UNITS.values() if not unit.architectures]))
    return runtime.launcher(PROCESSORS[tiles])


@pytest.fixture(params=[*runtime.SCHEDULES, GPU])
def place(request):
    """A schedule on the CPU, or ``gpu``."""
    return request.param


@pytest.fixture(params=list(PROCESSORS))
def tiles(request):
    """``small`` or ``large``, where a kernel has both."""
    return request.param


@pytest.fixture
def launcher(place, tiles):
    """The project's launcher in that place, choosing these tiles."""
    if place == "gpu":
        found = copy.copy(cuda.gpu())
        found.processors = PROCESSORS[tiles]
        yield found
    elif runtime.why_not():
        pytest.skip(f"kernels on the CPU: {runtime.why_not()}")
    else:
        with runtime.scheduled(place):
            yield _on_cpu(tiles)
