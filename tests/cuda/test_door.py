"""The launcher: one face with reference.py, what it refuses, and what it hands to a kernel."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpudbn import cuda, reference
from gpudbn.cuda import door
from gpudbn.cuda.layers import TENSOR_TILES, TILES
from tests.cuda_on_cpu import runtime

ADDRESS = {"seed": 1, "update": 2, "site": 3}


def f32(*shape):
    return np.zeros(shape, np.float32)


def refused(error, message, call):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


class Recorder:
    """A launcher over NumPy arrays whose kernels only note how they were called."""

    def __init__(self, processors=132):
        self.calls, self.compiled, self.shared = [], 0, []
        self.launcher = cuda.Launcher(self.module, np.ndarray, address_of=lambda array: array.ctypes.data,
                                      processors=processors, device_of=lambda array: int(array.ndim == 4),
                                      current_device=lambda: 0, shared_memory=227 << 10)

    def module(self, code, options, enable_cooperative_groups):
        _ = options, enable_cooperative_groups
        self.compiled += 1

        def function(name):
            assert re.search(rf"\b{name}\(", code)

            def launch(grid, block, arguments, *, shared_mem):
                assert launch.max_dynamic_shared_size_bytes >= shared_mem
                self.calls.append((name, grid, block, arguments))
                self.shared.append(shared_mem)

            launch.max_dynamic_shared_size_bytes = 48 << 10
            return launch

        return SimpleNamespace(get_function=function)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def launcher(recorder):
    return recorder.launcher


# ------------------------------------------------------------------------------------------------------ the face


def test_names_and_signatures_are_those_of_the_reference():
    for name in reference.__all__:
        expected = inspect.signature(getattr(reference, name))
        parameters = list(inspect.signature(getattr(cuda.Launcher, name)).parameters.values())
        assert parameters[1:] == list(expected.parameters.values()), name


def test_cupy_is_not_imported_before_it_is_needed():
    code = "import sys, gpudbn.cuda as cuda; cuda.UNITS['draws'].source(); sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_are_looked_for_in_both_places(monkeypatch, tmp_path):
    installed, beside = tmp_path / "gpudbn" / "kernels", tmp_path / "kernels"
    monkeypatch.setattr(door, "PLACES", (installed, beside))
    refused(RuntimeError, f"cuda: the kernels must be in {installed} or {beside}; neither is there",
            door.kernels_folder)
    beside.mkdir()
    assert door.kernels_folder() == beside
    installed.mkdir(parents=True)
    assert door.kernels_folder() == installed


@pytest.mark.parametrize("unit", cuda.UNITS)
def test_source_holds_every_header_once_and_its_lines_keep_their_numbers(unit):
    source, files, file, number = cuda.UNITS[unit].source(), {}, None, 0
    assert not re.search(r'^#include "', source, re.MULTILINE)
    for line in source.splitlines():
        mark = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if mark:
            file, number = mark[2], int(mark[1])
            files.setdefault(file, {})
        elif file is None:
            assert line.startswith("#define ")
        else:
            assert number not in files[file], "a line came twice"
            files[file][number] = line
            number += 1
    for name, lines in files.items():
        text = (door.kernels_folder() / name).read_text().splitlines()
        for number, line in enumerate(text, 1):
            if not line.startswith(("#include", "#pragma once")):
                assert lines[number] == line, f"{name}:{number}"


def test_constants_reach_the_source_from_the_tile():
    tile = TILES["half_step small"]
    assert tile.threads == 256
    assert cuda.UNITS["half_step small"].source().startswith(f"#define TILE_ROWS {tile.rows}\n#define TILE_COLUMNS ")
    assert "#define" not in cuda.UNITS["draws"].source()


@pytest.mark.parametrize("unit", TILES)
def test_tiles_make_blocks_a_gpu_can_run(unit):
    tile = TILES[unit]
    assert tile.threads % 32 == 0
    assert tile.threads <= 1024
    assert (tile.rows + tile.columns) * tile.depth * 4 <= 48 << 10


@pytest.mark.parametrize(("size", "shared"), [("small", 96), ("medium", 96), ("large", 144)])
def test_tensor_tiles_make_blocks_a_gpu_can_run(size, shared):
    """Of sm_90, with 228 KB a multiprocessor, and of sm_80, with 164; the small two also of sm_86, with 99 a block."""
    tile = TENSOR_TILES[size]
    assert tile.threads == 256
    assert tile.shared == shared << 10
    assert tile.blocks_per_processor * (tile.shared + 1024) <= 228 << 10


# ------------------------------------------------------------------------------------- what is handed to a kernel


@pytest.mark.skipif(runtime.why_not() is not None, reason=f"kernels on the CPU: {runtime.why_not()}")
def test_parameters_are_what_the_launcher_casts_to():
    for name, unit in cuda.UNITS.items():
        if not unit.architectures:  # what runs on the CPU
            module = runtime.Module(unit.source())
            for kernel, kinds in unit.kernels.items():
                expected = [None if to is door.POINTER else f"{np.dtype(to).kind}{np.dtype(to).itemsize}"
                            for to in kinds]
                found = [None if code[0] == "*" else code for code in module.get_function(kernel).parameters]
                assert found == expected, (name, kernel)


def test_each_unit_is_compiled_once(recorder, launcher):
    for _ in range(3):
        launcher.sigmoid(f32(5))
        launcher.momentum_step(f32(5), f32(5), f32(5), weights=2, scale=1, rate=1, momentum=0, decay=0)
    assert recorder.compiled == 1
    launcher.compile_all()
    everywhere = [unit for unit in cuda.UNITS.values() if not unit.architectures]
    assert recorder.compiled == 1 + len(everywhere)


def test_scalars_have_the_exact_types_and_absent_arrays_are_null(recorder, launcher):
    sample, x, W, bias = f32(7, 5), f32(7, 3), f32(3, 5), f32(5)
    launcher.half_step(sample, None, x, W, bias, seed=2**64 - 1, update=2**32 - 1, site=4, row=2**33, column=6,
                       columns=77)
    (name, grid, block, arguments), = recorder.calls
    assert (name, grid, block) == ("half_step", (1, 1), (256,))
    assert arguments[0] is sample
    assert arguments[2:5] == (x, W, bias)
    scalars = (arguments[1], *arguments[5:])
    assert [type(s) for s in scalars] == [np.uint64, *[np.int32] * 3, np.uint64, np.uint32, np.uint32, *[np.uint64] * 4]
    assert [int(s) for s in scalars] == [0, 7, 3, 5, 2**64 - 1, 2**32 - 1, 4, 2**33, 6, 20, 0]


def test_numbers_of_the_step_are_made_in_double_and_rounded_once(recorder, launcher):
    launcher.cd_update(f32(11), f32(11), None, 3, 2, f32(9, 3), f32(9, 2), 7, model_weight=0.3, rate=0.1, momentum=0.9,
                       decay=0.01)
    expected = 0.3, 0.1 * (1 / 7), 0.9, 0.1 * 0.01  # model_weight, rate_scale, momentum, rate_decay
    assert recorder.calls[0][3][-5:] == (*map(np.float32, expected), np.uint64(0))


@pytest.mark.parametrize("precision", ["bf16", "bf16x2", "tf32"])
@pytest.mark.parametrize(("B", "n", "m", "size"), [(100, 784, 500, "small"), (128, 784, 2000, "medium"),
                                                   (128, 4096, 4096, "medium"), (1024, 4096, 4096, "large"),
                                                   (1, 1, 1, "small")])
@pytest.mark.parametrize("column", [0, 3])
def test_grids_of_tensor_tiles_cover_the_result(recorder, launcher, B, n, m, size, precision, column):
    launcher.half_step(f32(B, m), None, f32(B, n), f32(n, m), f32(m), column=column, precision=precision)
    tile, (_, grid, block, _) = TENSOR_TILES[size], recorder.calls[0]
    assert block == (tile.threads,)
    assert (grid[0] - 1) * tile.rows < B <= grid[0] * tile.rows
    assert (grid[1] - 1) * tile.columns < m + column <= grid[1] * tile.columns
    assert recorder.shared == [tile.shared]
    assert list(launcher._functions) == [(f"half_step {precision} {size}", kernel)
                                         for kernel in ("half_step", "half_step_transposed")]


def test_the_large_tensor_tile_is_not_chosen_where_it_does_not_fit(recorder, launcher):
    launcher.shared_memory = 99 << 10
    launcher.half_step(f32(1024, 4096), None, f32(1024, 3), f32(3, 4096), f32(4096), precision="bf16")
    assert recorder.shared == [TENSOR_TILES["medium"].shared]


@pytest.mark.parametrize(("B", "n", "m", "tiles"),
                         [(100, 784, 500, "small"), (1024, 4096, 4096, "large"), (1, 1, 1, "small")])
@pytest.mark.parametrize("column", [0, 3])
def test_grids_cover_the_result(recorder, launcher, B, n, m, tiles, column):
    launcher.half_step(f32(B, m), None, f32(B, n), f32(n, m), f32(m), column=column)
    tile, (_, grid, block, _) = TILES[f"half_step {tiles}"], recorder.calls[0]
    assert block == (tile.threads,)
    assert (grid[0] - 1) * tile.rows < B <= grid[0] * tile.rows
    assert (grid[1] - 1) * tile.columns < m + column <= grid[1] * tile.columns
    launcher.cd_sums(f32(n, m), f32(n), f32(m), f32(B, n), f32(B, m), B // 2)
    tile, (_, grid, block, _) = TILES[f"cd_update {tiles}"], recorder.calls[1]
    assert block == (tile.threads,)
    assert (grid[0] - 1) * tile.columns < m + 1 <= grid[0] * tile.columns
    assert (grid[1] - 1) * tile.rows < n + 1 <= grid[1] * tile.rows


def test_elementwise_grids_stop_growing(recorder, launcher):
    launcher.sigmoid(f32(257))
    launcher.sigmoid(f32(10**7))
    assert [call[1] for call in recorder.calls] == [(2,), (16 * 132,)]


def test_nothing_is_launched_for_nothing(recorder, launcher):
    launcher.uniforms(f32(0, 5), **ADDRESS)
    launcher.bernoulli(f32(5, 0), f32(5, 0), **ADDRESS)
    launcher.sigmoid(f32(0))
    launcher.half_step(f32(0, 5), None, f32(0, 3), f32(3, 5), f32(5))
    launcher.momentum_step(f32(0), f32(0), f32(0), weights=0, scale=1, rate=1, momentum=0, decay=0)
    assert not recorder.calls


# ------------------------------------------------------------------------------------------------ what is refused


def test_arrays_of_the_wrong_kind_are_refused(launcher):
    half_step, W, bias = launcher.half_step, f32(784, 5), f32(5)
    refused(ValueError, "half_step: x must be C-contiguous float32 of shape (B, 784); got float32 (7, 783)",
            lambda: half_step(f32(7, 5), None, f32(7, 783), W, bias))
    refused(TypeError, "half_step: x must be C-contiguous float32 of shape (B, 784); got float64 (7, 784)",
            lambda: half_step(f32(7, 5), None, np.zeros((7, 784)), W, bias))
    refused(ValueError, "half_step: x must be C-contiguous float32 of shape (B, 784); got a view of float32 (7, 784). "
            "Strides are not followed: make a copy", lambda: half_step(f32(7, 5), None, f32(784, 7).T, W, bias))
    refused(TypeError, "half_step: x must be a numpy.ndarray; got builtins.list",
            lambda: half_step(f32(7, 5), None, [1], W, bias))
    refused(TypeError, "momentum_step: parameters must be a numpy.ndarray; got builtins.list",
            lambda: launcher.momentum_step([1], f32(1), f32(1), weights=1, scale=1, rate=1, momentum=0, decay=0))
    refused(TypeError, "half_step: W must be a numpy.ndarray; got builtins.NoneType",
            lambda: half_step(f32(7, 5), None, f32(7, 784), None, bias))
    refused(ValueError, "half_step: W must be C-contiguous float32 of shape (n, m); got float32 (784,)",
            lambda: half_step(f32(7, 5), None, f32(7, 784), f32(784), bias))
    refused(ValueError, "half_step: W must be C-contiguous float32 of shape (m, n); got a view of float32 (5, 784)",
            lambda: half_step(f32(7, 5), None, f32(7, 784), W.T, bias, transpose=True))
    refused(ValueError, "half_step: bias must be C-contiguous float32 of shape (5,); got float32 (6,)",
            lambda: half_step(f32(7, 5), None, f32(7, 784), W, f32(6)))
    refused(ValueError, "half_step: sample must be C-contiguous float32 of shape (7, 5); got float32 (8, 5)",
            lambda: half_step(f32(8, 5), None, f32(7, 784), W, bias))
    refused(ValueError, "half_step: mean must be C-contiguous float32 of shape (7, 5); got float32 (5, 7)",
            lambda: half_step(None, f32(5, 7), f32(7, 784), W, bias))
    refused(ValueError, "half_step: one of sample and mean must be given; got None for both",
            lambda: half_step(None, None, f32(7, 784), W, bias))


def test_other_precisions_are_refused(launcher):
    arrays = f32(7, 5), None, f32(7, 3), f32(3, 5), f32(5)
    for function in (launcher.half_step, reference.half_step):
        refused(ValueError, "half_step: precision must be one of fp32, bf16, bf16x2, tf32, exact; got 'fp16'",
                lambda function=function: function(*arrays, precision="fp16"))
    launcher.shared_memory = 64 << 10
    refused(ValueError, "half_step: precision must be fp32 on this GPU; got tf32. A block has 65536 bytes of shared "
            "memory, too few", lambda: launcher.half_step(*arrays, precision="tf32"))


def test_arrays_on_another_device_are_refused(launcher):
    refused(ValueError, "sigmoid: x must be on the current device, 0; got an array on device 1",
            lambda: launcher.sigmoid(f32(1, 1, 1, 2)))


def test_other_shapes_are_refused(launcher):
    numbers = {"rate": 0.1, "momentum": 0, "decay": 0}
    for message, call in {
        "uniforms: out must be C-contiguous float32 of shape (B, m); got float32 (5,)":
            lambda: launcher.uniforms(f32(5), **ADDRESS),
        "bernoulli: sample must be C-contiguous float32 of shape (3, 5); got float32 (5, 3)":
            lambda: launcher.bernoulli(f32(5, 3), f32(3, 5), **ADDRESS),
        "sigmoid: x must be C-contiguous float32 of shape (5, 3); got a view of float32 (5, 3)":
            lambda: launcher.sigmoid(f32(3, 5).T),
        "cd_sums: h must be C-contiguous float32 of shape (9, m); got float32 (8, 2)":
            lambda: launcher.cd_sums(f32(3, 2), f32(3), f32(2), f32(9, 3), f32(8, 2), 5),
        "cd_sums: dW must be C-contiguous float32 of shape (3, 2); got float32 (2, 3)":
            lambda: launcher.cd_sums(f32(2, 3), f32(3), f32(2), f32(9, 3), f32(9, 2), 5),
        "cd_sums: rows must lie between 0 and the 9 rows of v; got 10":
            lambda: launcher.cd_sums(f32(3, 2), f32(3), f32(2), f32(9, 3), f32(9, 2), 10),
        "cd_update: v must be C-contiguous float32 of shape (rows + C, 4); got float32 (9, 3)":
            lambda: launcher.cd_update(f32(11), f32(11), None, 4, 2, f32(9, 3), f32(9, 2), 5, **numbers),
        "cd_update: velocity must be C-contiguous float32 of shape (11,); got float32 (12,)":
            lambda: launcher.cd_update(f32(11), f32(12), None, 3, 2, f32(9, 3), f32(9, 2), 5, **numbers),
        "cd_update: rows must be positive; got 0":
            lambda: launcher.cd_update(f32(11), f32(11), None, 3, 2, f32(9, 3), f32(9, 2), 0, **numbers),
        "momentum_step: gradient must be C-contiguous float32 of shape (11,); got float32 (10,)":
            lambda: launcher.momentum_step(f32(11), f32(11), f32(10), weights=6, scale=1, **numbers),
        "momentum_step: weights must lie between 0 and the 11 parameters; got 12":
            lambda: launcher.momentum_step(f32(11), f32(11), f32(11), weights=12, scale=1, **numbers),
        "adam_step: square must be C-contiguous float32 of shape (11,); got float32 (10,)":
            lambda: launcher.adam_step(f32(11), f32(11), f32(10), f32(11), weights=6, scale=1, rate=1, decay=0,
                                       steps=1),
        "cd_adagrad: squares must be C-contiguous float32 of shape (11,); got float32 (12,)":
            lambda: launcher.cd_adagrad(f32(11), f32(12), None, 3, 2, f32(9, 3), f32(9, 2), 5, rate=1, decay=0),
        "cd_sgd: rows must be positive; got 0":
            lambda: launcher.cd_sgd(f32(11), None, 3, 2, f32(9, 3), f32(9, 2), 0, rate=1, decay=0),
        "normals: column must be even; got 3": lambda: launcher.normals(f32(3, 4), **ADDRESS, column=3),
        "dropout: keep must lie in (0, 1]; got 0": lambda: launcher.dropout(f32(3, 4), 0, **ADDRESS),
        "gaussian: sd must be C-contiguous float32 of shape (4,); got float32 (3,)":
            lambda: launcher.gaussian(f32(3, 4), f32(3, 4), f32(3), **ADDRESS),
        "categorical: units must divide the 10 columns of x; got 3":
            lambda: launcher.categorical(f32(5, 10), None, f32(5, 10), f32(10), 3, **ADDRESS),
        "categorical: one of sample and mean must be given; got None for both":
            lambda: launcher.categorical(None, None, f32(5, 10), f32(10), 5),
        "cross_entropy: wrong must be C-contiguous float32 of shape (5,); got float32 (5, 1)":
            lambda: launcher.cross_entropy(None, None, f32(5, 1), f32(5, 10), f32(10), np.zeros(5, np.int32)),
        "free_energy: b must be C-contiguous float32 of shape (7,); got float32 (8,)":
            lambda: launcher.free_energy(f32(5), f32(5, 3), f32(3), f32(5, 7), f32(8)),
        "squared_errors: w must be C-contiguous float32 of shape (5, 7); got float32 (5, 8)":
            lambda: launcher.squared_errors(f32(5), f32(5, 7), f32(5, 8)),
        "sigmoid_backward: a must be C-contiguous float32 of shape (5, 7); got float32 (7, 5)":
            lambda: launcher.sigmoid_backward(f32(5, 7), f32(7, 5)),
    }.items():
        refused(ValueError, message, call)


def test_overlapping_arrays_are_refused(launcher):
    flat, numbers = f32(100), {"rate": 0.1, "momentum": 0, "decay": 0}
    a, b = flat[:25].reshape(5, 5), flat[20:45].reshape(5, 5)
    for message, call in {
        "half_step: sample must not share memory with x": lambda: launcher.half_step(a, None, a, f32(5, 5), f32(5)),
        "half_step: mean must not share memory with W": lambda: launcher.half_step(None, a, f32(5, 5), b, f32(5)),
        "bernoulli: sample must not share memory with mean": lambda: launcher.bernoulli(a, b, **ADDRESS),
        "cd_sums: dW must not share memory with v": lambda: launcher.cd_sums(a, f32(5), f32(5), b, f32(5, 5), 2),
        "cd_update: velocity must not share memory with parameters":
            lambda: launcher.cd_update(flat[:35], flat[30:65], None, 5, 5, f32(4, 5), f32(4, 5), 2, **numbers),
        "sgd_step: parameters must not share memory with gradient":
            lambda: launcher.sgd_step(flat[:9], flat[8:17], weights=1, scale=1, rate=1, decay=0),
        "adam_step: mean must not share memory with square":
            lambda: launcher.adam_step(f32(9), flat[:9], flat[8:17], f32(9), weights=1, scale=1, rate=1, decay=0,
                                       steps=1),
        "cd_adagrad: parameters must not share memory with h":
            lambda: launcher.cd_adagrad(flat[:35], f32(35), None, 5, 5, f32(4, 5), flat[30:50].reshape(4, 5), 2, rate=1,
                                        decay=0),
        "gaussian: sample must not share memory with mean": lambda: launcher.gaussian(a, b, f32(5), **ADDRESS),
        "categorical: sample must not share memory with mean":
            lambda: launcher.categorical(a, a, f32(5, 5), f32(5), 5, **ADDRESS),
        "cross_entropy: delta must not share memory with x":
            lambda: launcher.cross_entropy(a, None, None, b, f32(5), np.zeros(5, np.int32)),
        "free_energy: out must not share memory with x": lambda: launcher.free_energy(flat[:5], a, f32(5)),
        "squared_errors: out must not share memory with w":
            lambda: launcher.squared_errors(flat[:5], f32(5, 5), a),
        "sigmoid_backward: delta must not share memory with a": lambda: launcher.sigmoid_backward(a, b),
        "momentum_step: velocity must not share memory with gradient":
            lambda: launcher.momentum_step(f32(9), flat[:9], flat[8:17], weights=1, scale=1, **numbers),
    }.items():
        refused(ValueError, message, call)
    launcher.bernoulli(a, a, **ADDRESS)
    launcher.half_step(a, a, f32(5, 5), f32(5, 5), f32(5))


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**64}, {"update": 2**32}, {"site": -1}, {"row": -1},
                                   {"row": 2**64 - 10, "columns": 77}])
def test_addresses_that_would_wrap_are_refused(launcher, wrong):
    refused(ValueError, "bernoulli: seed and index must lie in [0, 2**64), update and site in [0, 2**32); got ",
            lambda: launcher.bernoulli(f32(5, 5), f32(5, 5), **{**ADDRESS, **wrong}))


@pytest.mark.parametrize(("column", "columns"), [(-1, None), (7, 11), (0, 4)])
def test_columns_outside_the_layer_are_refused(launcher, column, columns):
    """Their draws would be those of the next row."""
    refused(ValueError, f"uniforms: columns {column} to {column + 5} must lie in the layer; it has ",
            lambda: launcher.uniforms(f32(5, 5), **ADDRESS, column=column, columns=columns))


def test_a_clock_or_rates_of_another_kind_are_refused(launcher):
    refused(TypeError, "uniforms: clock must be C-contiguous uint32 of shape (1,); got int64 (1,)",
            lambda: launcher.uniforms(f32(5, 5), **ADDRESS, clock=np.zeros(1, np.int64)))
    refused(ValueError, "momentum_step: rates must be C-contiguous float32 of shape (3,); got float32 (2,)",
            lambda: launcher.momentum_step(f32(5), f32(5), f32(5), weights=2, scale=1, rate=1, momentum=0, decay=0,
                                           rates=f32(2)))


def test_sizes_beyond_the_kernels_integers_are_refused(launcher):
    refused(ValueError, "uniforms: out must be C-contiguous float32 of shape (B, m), each size at most 2147482624; "
            "got float32 (2147483648, 0)",
            lambda: launcher.uniforms(f32(2**31, 0), **ADDRESS))
    small = Recorder(processors=10**9).launcher
    refused(ValueError, "half_step: m must be at most 2097117; got 3000000",
            lambda: small.half_step(None, f32(1, 3_000_000), f32(1, 0), f32(0, 3_000_000), f32(3_000_000)))
    refused(ValueError, "cd_sums: n must be below 2097120; got 3000000",
            lambda: small.cd_sums(f32(3_000_000, 0), f32(3_000_000), f32(0), f32(0, 3_000_000), f32(0, 0), 0))
