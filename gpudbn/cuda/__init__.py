"""The GPU twins of ``reference.py``: same names and signatures, for arrays on the current GPU.

    gpu()          the launcher of this process: ``gpu().half_step(...)``
    Launcher       the same over any maker of modules and any type of array
    UNITS          what is compiled, KERNELS what is in it

    door.py        reads ``kernels/``, compiles, checks, launches: the only way in
    draws.py       uniforms and samples
    layers.py      half-step and gradient of one layer
    exact.py       the tiles of exact mode for these
    wgmma.py       the same of a large layer, in bf16 on Hopper's tensor cores
    elementwise.py passes over flat arrays
    persistent.py  many updates of a layer that fits on the chip
    rows.py        softmax groups, cross-entropy, free energy
    turns.py       rows in the order of an epoch, counters, numbers that are not finite
    offsets.py     centring and sparsity

CuPy is imported at the first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from gpudbn.cuda import draws, elementwise, layers, offsets, persistent, rows, turns, wgmma
from gpudbn.cuda.door import Unit

UNITS: Mapping[str, Unit] = {**draws.UNITS, **elementwise.UNITS, **layers.UNITS, **offsets.UNITS, **rows.UNITS,
                             **persistent.UNITS, **turns.UNITS, **wgmma.UNITS}
KERNELS = list(dict.fromkeys(kernel for unit in UNITS.values() for kernel in unit.kernels))


class Launcher(draws.Draws, elementwise.Elementwise, layers.Layers, offsets.Offsets, rows.RowByRow,
               persistent.Persistent, turns.Turns,
               wgmma.Wgmma):
    """Every kernel. Parameters as of ``door.Door``."""

    units = UNITS


@cache
def gpu() -> Launcher:
    """The launcher of this process, for its current GPU."""
    import cupy

    device = cupy.cuda.Device()
    return Launcher(cupy.RawModule, cupy.ndarray, address_of=lambda array: array.data.ptr,
                    processors=device.attributes["MultiProcessorCount"],
                    device_of=lambda array: array.data.device_id, current_device=cupy.cuda.runtime.getDevice,
                    shared_memory=device.attributes["MaxSharedMemoryPerBlockOptin"],
                    architecture=f"sm_{device.compute_capability}")
