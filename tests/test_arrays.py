"""Where arrays live, with a stand-in for CuPy: one place, never a silent move; and what is finite."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from gpudbn import arrays, reference, twins
from gpudbn.errors import UserError

from .helpers import assert_notices


class OnGPU(np.ndarray):
    """An array that says it is CuPy's."""

    def get(self):
        return np.array(self)


@pytest.fixture
def cupy(monkeypatch):
    """A module that says it is CuPy, with three devices."""
    module = types.ModuleType("cupy")
    module.ndarray = OnGPU
    module.asarray = lambda a: np.asarray(a).view(OnGPU) if not isinstance(a, OnGPU) else a
    used = []

    class Device:
        def __init__(self, number):
            self.number = number
            self.compute_capability = module.capability

        def use(self):
            used.append(self.number)

    runtime = types.SimpleNamespace(getDeviceCount=lambda: 3, getDeviceProperties=lambda i: {"name": b"H%d" % i})
    module.cuda = types.SimpleNamespace(runtime=runtime, Device=Device)
    module.used, module.capability = used, "80"
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: module)  # noqa: ARG005
    return module


def test_numpy_arrays_are_numpys():
    x = np.ones(3)
    assert arrays.module_of(x, None, x) is np
    assert arrays.module_of() is np
    assert arrays.module_of(None) is np
    assert arrays.to_cpu(x) is x
    assert not arrays.is_gpu(x)
    assert twins.twins_of(x) is reference


def test_arrays_on_a_gpu_are_cupys(cupy, monkeypatch):
    x = arrays.to_gpu(np.ones(3))
    assert arrays.is_gpu(x)
    assert arrays.module_of(x, None) is cupy
    assert arrays.to_gpu(x) is x
    assert type(arrays.to_cpu(x)) is np.ndarray
    launcher = object()
    monkeypatch.setattr(twins.cuda, "gpu", lambda: launcher)
    assert twins.twins_of(x) is launcher


@pytest.mark.usefixtures("cupy")
def test_mixtures_are_refused():
    x = np.ones(3)
    with pytest.raises(TypeError, match="arrays: all must be in one place"):
        arrays.module_of(x, arrays.to_gpu(x))
    with pytest.raises(TypeError, match="arrays: all must be in one place"):
        twins.twins_of(arrays.to_gpu(x), None, x)


def test_ranks_of_a_node_share_its_devices_in_turn(cupy):
    chosen = [arrays.choose_module("auto", rank) for rank in range(5)]
    assert {module for module, _ in chosen} == {cupy}
    assert cupy.used == [0, 1, 2, 0, 1]
    assert chosen[4][1] == "GPU 1 of 3 (H1)"
    assert arrays.choose_module("cpu", 2) == (np, "CPU (NumPy)")


@pytest.mark.parametrize("capability", ["75", "80", "100"])
def test_a_gpu_that_the_kernels_are_not_for_is_none(cupy, capability):
    cupy.capability = capability
    reason = "GPU 0 of 3 (H0) has compute capability 7.5, and the kernels are for 8.0 and later"
    if capability == "75":
        assert arrays.choose_module("auto") == (np, f"CPU (NumPy; {reason})")
        with pytest.raises(UserError) as caught:
            arrays.choose_module("gpu")
        assert f"got gpu, but {reason}. Use --device cpu or auto" in str(caught.value)
    else:
        assert arrays.choose_module("gpu") == (cupy, "GPU 0 of 3 (H0)")


def test_without_a_gpu_auto_says_why_and_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(arrays, "why_no_gpu", lambda: "CuPy sees no CUDA device")
    assert arrays.choose_module("auto") == (np, "CPU (NumPy; CuPy sees no CUDA device)")
    with pytest.raises(UserError, match="--device: must be one that is there; got gpu, but CuPy sees no CUDA device"):
        arrays.choose_module("gpu")


def test_the_reason_for_no_gpu_is_one_sentence(cupy, monkeypatch):
    assert arrays.why_no_gpu() is None
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert arrays.why_no_gpu() == "CuPy sees no CUDA device"

    def fail():
        raise OSError("libcuda.so.1: cannot open\nand more")

    cupy.cuda.runtime.getDeviceCount = fail
    assert arrays.why_no_gpu() == "CuPy cannot reach a CUDA device (libcuda.so.1: cannot open)"

    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    assert arrays.why_no_gpu().startswith("CuPy is not installed")


def test_an_error_without_words_is_a_reason_too(cupy):
    def fail():
        raise ImportError

    cupy.cuda.runtime.getDeviceCount = fail
    assert arrays.why_no_gpu().startswith("CuPy cannot reach a CUDA device")


@pytest.mark.parametrize(("driver", "built_for", "reason"), [
    (0, 13020, "there is no NVIDIA driver (a container must be started with --gpus all)"),
    (12080, 13020, ("CuPy is for CUDA 13.2 and the driver supports 12.8 (update the driver, or install "
                    "'gpudbn[cuda12]')")),
    (13000, 13020, "CuPy cannot reach a CUDA device (no)"),  # within a major version all is well: it is something else
])
def test_a_driver_that_is_missing_or_too_old_is_the_reason(cupy, driver, built_for, reason):
    def fail():
        raise RuntimeError("no")

    cupy.cuda.runtime.getDeviceCount = fail
    cupy.cuda.runtime.driverGetVersion, cupy.cuda.runtime.runtimeGetVersion = lambda: driver, lambda: built_for
    assert arrays.why_no_gpu() == reason
    with pytest.raises(UserError, match="--device: must be one that is there; got gpu, but "):
        arrays.choose_module("gpu")


def check_finite():
    x = np.ones((7, 5), np.float32)
    assert arrays.all_finite(x)
    assert arrays.all_finite(np.empty(0, np.float32))
    assert arrays.all_finite(x[:, ::2])
    assert arrays.all_finite(np.full(1000, 3e38, np.float32))  # the sum of squares overflows
    for value in (np.nan, np.inf, -np.inf):
        for place in ((0, 0), (6, 4), (3, 2)):
            y = x.copy()
            y[place] = value
            assert arrays.all_finite(y) is False


def test_a_single_entry_that_is_not_finite_is_found():
    check_finite()


@pytest.mark.parametrize(("line", "fault"), [
    (" or bool(xp.isfinite(flat).all())", ""),
    ("bool(xp.isfinite(flat @ flat)) or ", "True or "),
    ("bool(xp.isfinite(flat @ flat))", "not bool(xp.isnan(flat @ flat))"),
])
def test_a_check_that_misses_one_is_noticed(line, fault):
    assert_notices(check_finite, arrays, line, fault)
