"""Where an array lives decides which code runs on it: NumPy on the CPU, CuPy on the GPU.

Together with ``cuda`` (and later ``mpi/nccl.py``) this is the only place that imports CuPy,
and it does so only when a GPU array or a GPU is asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np

from gpudbn.errors import UserError

Array = Any  # numpy.ndarray or cupy.ndarray
OLDEST = 80  # compute capability, times ten: kernels copy asynchronously, and multiply in bf16


def is_gpu(array: Array) -> bool:
    """Whether the array lives on a GPU. Never imports CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def module_of(*arrays: Array) -> ModuleType:
    """The array module of all the arrays: ``numpy`` or ``cupy``.

    Raises
    ------
    TypeError
        If the arrays live in different places: nothing is moved in silence.
    """
    places = {is_gpu(a) for a in arrays if a is not None}
    if len(places) > 1:
        raise TypeError("arrays: all must be in one place; got NumPy and CuPy arrays together. "
                        "Move one with arrays.to_gpu or arrays.to_cpu")
    return sys.modules["cupy"] if places == {True} else np


def to_cpu(array: Array) -> np.ndarray:
    """The array as a NumPy array; itself if it is one."""
    return array.get() if is_gpu(array) else array


def to_gpu(array: Array) -> Array:
    """The array on the current GPU; itself if it is there."""
    import cupy

    return cupy.asarray(array)


def why_no_gpu() -> str | None:
    """One sentence why no GPU can be used here, or None if one can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'gpudbn[cuda13]' or 'gpudbn[cuda12]')"
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        return "CuPy sees no CUDA device"
    except Exception as error:  # CuPy raises many kinds where driver or libraries are missing
        return _why_no_driver() or (
            f"CuPy cannot reach a CUDA device ({(str(error).splitlines() or [type(error).__name__])[0]})")


def _why_no_driver() -> str | None:
    """One sentence if the driver is missing or too old for this CuPy, as far as CuPy can tell."""
    try:
        import cupy

        driver, built_for = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    except Exception:  # as above
        return None
    if driver == 0:
        return "there is no NVIDIA driver (a container must be started with --gpus all)"
    if driver // 1000 < built_for // 1000:  # 13020 is 13.2
        have, want = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, built_for))
        return (f"CuPy is for CUDA {want} and the driver supports {have} (update the driver, or install "
                f"'gpudbn[cuda{driver // 1000}]')")
    return None


def choose_module(device: str, local_rank: int = 0) -> tuple[ModuleType, str]:
    """The array module for ``--device auto|cpu|gpu`` and a word for the log.

    On a GPU machine rank ``local_rank`` of its node takes device ``local_rank`` modulo the
    number of devices it can see.

    Raises
    ------
    UserError
        If ``gpu`` is asked for and there is none, or an older one than the kernels are for.
    """
    if device == "cpu":
        return np, "CPU (NumPy)"
    reason = why_no_gpu()
    if reason is None:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        chosen = local_rank % count
        gpu = cupy.cuda.Device(chosen)
        gpu.use()
        name = cupy.cuda.runtime.getDeviceProperties(chosen)["name"].decode()
        if int(gpu.compute_capability) >= OLDEST:
            return cupy, f"GPU {chosen} of {count} ({name})"
        reason = (f"GPU {chosen} of {count} ({name}) has compute capability {int(gpu.compute_capability) / 10:.1f}, "
                  f"and the kernels are for {OLDEST / 10:.1f} and later")
    if device == "gpu":
        raise UserError(f"--device: must be one that is there; got gpu, but {reason}. Use --device cpu or auto")
    return np, f"CPU (NumPy; {reason})"


def device_versions(xp: Any) -> dict[str, Any]:
    """What decides how fast the current GPU runs the same kernels: its name, the driver's CUDA, CuPy and its CUDA."""
    runtime = xp.cuda.runtime
    name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    return {"device": name, "driver": runtime.driverGetVersion(), "cuda": runtime.runtimeGetVersion(),
            "cupy": xp.__version__}


def free_memory(xp: Any) -> int:
    """Bytes that are free on the current GPU, those that CuPy's pool holds unused among them."""
    return xp.cuda.Device().mem_info[0] + xp.get_default_memory_pool().free_bytes()


def all_finite(array: Array) -> bool:
    """Whether every entry is finite. Synchronises a GPU.

    The sum of products x . x is finite unless an entry is not, or it overflows; only then is
    every entry looked at.
    """
    xp = module_of(array)
    flat = array.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(xp.isfinite(flat @ flat)) or bool(xp.isfinite(flat).all())
