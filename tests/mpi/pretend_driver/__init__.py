"""Memory of a pretended GPU that faults when the CPU touches it: ``driver.c``, and what stands on it.

``sitecustomize.py`` gives it to every Python that starts with this folder on its path.
"""

from __future__ import annotations

import ctypes
import subprocess
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def build(folder, include):
    """Compile ``driver.c`` with the header cuda.h of that folder; the library in the other one."""
    library = Path(folder) / "libcuda.so.1"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-I", str(include),
                    "-o", str(library), str(HERE / "driver.c"), f"-Wl,-soname,{library.name}"], check=True)
    return library


class Driver:
    """The device memory of this process. What is given back is kept for the next array, as CuPy's pool does."""

    def __init__(self, library="libcuda.so.1"):
        self.library = driver = ctypes.CDLL(library)
        driver.pretend_host_address.restype = ctypes.c_void_p
        driver.pretend_device_address.restype = ctypes.c_uint64
        context = ctypes.c_void_p()
        self.succeed(driver.cuInit(0))
        self.succeed(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self.succeed(driver.cuCtxSetCurrent(context))
        self.free = defaultdict(list)

    @staticmethod
    def succeed(code):
        assert code == 0, f"the pretend driver: error {code}"

    def allocate(self, nbytes):
        """New memory: where kernels reach it, as an array of bytes."""
        room = 1 << max(12, (nbytes - 1).bit_length())
        if self.free[room]:
            address = self.free[room].pop()
        else:
            pointer = ctypes.c_uint64()
            self.succeed(self.library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(room)))
            address = self.library.pretend_host_address(pointer)
        buffer = (ctypes.c_ubyte * room).from_address(address)
        weakref.finalize(buffer, self.free[room].append, address)
        return np.frombuffer(buffer, np.uint8)[:nbytes]

    def address(self, memory):
        """What the device calls the first byte of this memory."""
        return self.library.pretend_device_address(ctypes.c_void_p(memory.ctypes.data))
