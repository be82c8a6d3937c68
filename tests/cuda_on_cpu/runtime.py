"""Runs the text of a .cu file on the CPU, called as CuPy's ``RawModule`` is.

    Module(code=text).get_function("half_step")(grid, block, arguments)

Arrays are NumPy arrays and go by pointer; scalars are NumPy scalars and go by value. Unlike a
GPU, it holds the type of every argument to the kernel's parameter, and it raises ``KernelError``
where threads wait for one another in vain. See ``cuda_on_cpu.h`` for what it can show and what not.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from gpudbn.cuda import Launcher
from gpudbn.cuda.wgmma import SPAN, TensorMap, aligned_map

HERE = Path(__file__).parent
HEADER = HERE / "cuda_on_cpu.h"
SCHEDULES = ("forward", "reverse", "random")

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-w", "-x", "c++",
         "-fvisibility=hidden", "-fno-gnu-unique",  # two modules may have a variable of the same name and other sizes
         "-ffp-contract=off",  # no fused multiply-add where the text has none
         "-fno-strict-aliasing",  # kernels read floats as float4
         "-fno-stack-protector", "-U_FORTIFY_SOURCE",  # fibers have stacks of their own
         "-I", str(HERE), "-include", str(HEADER)]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ["-mtls-dialect=gnu2", "-fcf-protection=none"]  # fast thread_local; switching fibers by hand

_schedule = ("forward", 0)


class KernelError(RuntimeError):
    """A kernel went wrong in a way that would hang a GPU or is undefined there."""


@contextlib.contextmanager
def scheduled(name: str, seed: int = 0):
    """Launches inside run the threads of a block in this order: forward, reverse or random."""
    global _schedule
    before, _schedule = _schedule, (name, seed)
    try:
        yield
    finally:
        _schedule = before


def schedule() -> str:
    """The name of the schedule of launches here."""
    return _schedule[0]


def why_not() -> str | None:
    """One sentence why kernels cannot run here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


class Module:
    """A compiled source; the same text is compiled once on a machine."""

    def __init__(self, code: str, options: tuple[str, ...] = (), enable_cooperative_groups: bool = False) -> None:
        _ = options  # the compiler is another
        self.cooperative = enable_cooperative_groups
        names = re.findall(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)', code)
        text = code + "\n" + "".join(f"CUDA_ON_CPU_EXPORT({name})\n" for name in names)
        self.library = ctypes.CDLL(str(_compiled(text)))

    def get_function(self, name: str) -> Function:
        return Function(self.library, name, self.cooperative)


class Function:
    """A kernel of a module."""

    def __init__(self, library: ctypes.CDLL, name: str, cooperative: bool) -> None:
        self.name, self.cooperative = name, cooperative
        self.max_dynamic_shared_size_bytes = 48 << 10
        self._launch = getattr(library, f"{name}_launch")
        parameters = getattr(library, f"{name}_parameters")
        parameters.restype = ctypes.c_char_p
        self.parameters = parameters().decode().split()  # for instance ["*f4", "i4"]

    def __call__(self, grid, block, arguments, *, shared_mem: int = 0) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise KernelError(f"{self.name}: {shared_mem} bytes of shared memory were not asked for")
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name}: takes {len(self.parameters)} arguments; got {len(arguments)}")
        values = [self._pass(i, *pair) for i, pair in enumerate(zip(arguments, self.parameters, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        order, seed = _schedule
        message = ctypes.create_string_buffer(600)
        failed = self._launch(_three(grid), _three(block), int(self.cooperative), SCHEDULES.index(order),
                              ctypes.c_uint(seed), ctypes.c_size_t(shared_mem), pointers, message,
                              ctypes.c_size_t(len(message)))
        if failed:
            raise KernelError(f"{self.name}: {message.value.decode()}")

    def _pass(self, position: int, argument, parameter: str) -> np.ndarray:
        """The bytes a parameter gets: of a pointer, or of a number."""
        if isinstance(argument, np.ndarray) and argument.dtype.kind == "V" and argument.size == 1:  # by value
            if parameter != f"V{argument.itemsize}":
                raise TypeError(f"{self.name}: argument {position} is {parameter}; got {argument.dtype}")
            return argument
        if isinstance(argument, np.ndarray):
            if parameter != f"*{argument.dtype.kind}{argument.dtype.itemsize}":
                raise TypeError(f"{self.name}: argument {position} is {parameter}; got an array of {argument.dtype}")
            return np.array(argument.ctypes.data, np.uint64)
        if not isinstance(argument, np.generic):
            raise TypeError(f"{self.name}: argument {position} must be an array or a NumPy scalar; got {argument!r}")
        null = parameter[0] == "*" and argument.dtype == np.uint64 and argument == 0
        if not null and parameter != f"{argument.dtype.kind}{argument.dtype.itemsize}":
            raise TypeError(f"{self.name}: argument {position} is {parameter}; got {argument.dtype}")
        return np.array(argument)


def _three(sizes) -> ctypes.Array:
    return (ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3])


def _compiled(text: str) -> Path:
    """The shared library of a text, from the cache or made now."""
    key = hashlib.sha256()
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    for part in (text, headers, " ".join(FLAGS), platform.platform()):
        key.update(part.encode())
    folder = Path(tempfile.gettempdir()) / f"cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise KernelError(f"{folder} must belong to this user: code is loaded from it")
    library = folder / f"{key.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "kernel.cu").write_text(text)
            made = Path(work) / "kernel.so"
            done = subprocess.run(["g++", *FLAGS, str(Path(work) / "kernel.cu"), "-o", str(made)],
                                  capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelError(f"g++ does not compile the kernels: {done.stderr[:3000]}")
            made.replace(library)  # whole or not at all, even with two of us
    return library


def encode(tensor_map: TensorMap) -> np.ndarray:
    """The tensor map that wgmma.h takes for the driver's."""
    encoded, _ = aligned_map()
    numbers = encoded.view(np.uint64)
    numbers[:6] = (tensor_map.address, tensor_map.columns, tensor_map.rows, tensor_map.pitch, SPAN, tensor_map.box_rows)
    return encoded


def launcher(processors: int = 1, change=None, architecture: str = "sm_80") -> Launcher:
    """The project's launcher over NumPy arrays and this machine.

    Parameters
    ----------
    processors : int
        What it believes the chip has: 1 chooses the large tiles, 10**9 the small ones.
    change : callable, optional
        Applied to every source before it is compiled: to plant a fault.
    architecture : str
        What it believes the chip to be: ``sm_90`` lets wgmma through.
    """
    def make_module(code: str, **options) -> Module:
        return Module(code if change is None else change(code), **options)

    found = Launcher(make_module, np.ndarray, address_of=lambda array: array.ctypes.data, processors=processors,
                     device_of=lambda _: 0, current_device=lambda: 0, shared_memory=227 << 10,
                     architecture=architecture)
    found.encode = encode
    return found
