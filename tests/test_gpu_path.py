"""The trainer's GPU path, whole, on a machine without a GPU: CuPy is pretended and the kernels run on the CPU.

Against the NumPy run of the same settings: same draws, so parameters that differ by rounding only.
What this cannot show is in ``test_training_gpu.py``, for a machine that has a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernels, transports
from gpudbn import arrays, dbn, finetune, optimiser, predict, sample, shards, train
from gpudbn.cuda import door
from gpudbn.dbn import DBN
from gpudbn.errors import NonFiniteError
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.mpi.rules import Steps
from gpudbn.mpi.wire import Staging
from tests import pretend_cupy
from tests.conftest import why_no_mpi
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close, planted
from tests.pretend_cupy import installed
from tests.test_loop import small_data, small_settings

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

ROOT = Path(__file__).parent.parent
LARGE_TILES, SMALL_TILES = 1, 10**9

# Between them, every value of every option that chooses what the device computes.
OPTIONS = [
    {},
    {"method": "pcd", "k": 2, "data_hidden": "mean", "binarise": "threshold"},
    {"k": 3, "data_hidden": "mean", "last_hidden": "sample", "up": "mean", "optimiser": "sgd", "decay": 0.0},
    {"method": "pcd", "last_hidden": "sample", "binarise": "stochastic", "order": "fixed", "input_dropout": 0.0},
    {"reconstruction": "mean", "patience": 1, "dropout": 0.0, "finetune_decay": 0.01, "optimiser": "adagrad"},
    {"precision": "bf16x2"},
    {"centring": "data", "sparsity_target": 0.2, "method": "pcd"},
]
# Equal draws, and in these runs no u within rounding of its p: so the two runs differ by the rounding of sums alone,
# which some 50 updates do not grow beyond 2e-5 (seen). One sample that differs moves some parameter by 1e-2 and more.
TOLERANCE = 1e-4


@pytest.fixture
def device():
    """The pretended device; ``import cupy`` gives what belongs to it."""
    with installed() as device:
        yield device


def training(xp, settings, exchange=None):
    data = small_data()
    data = replace(data, train=data.train.to(xp), validation=data.validation.to(xp), test=data.test.to(xp))
    return Training(DBN([data.n, *settings.layers], xp, local=settings.local), data, settings, exchange or Alone())


def on_device(settings, exchange=None):
    import cupy

    return training(cupy, settings, exchange)


def finished(run):
    return run, list(run.run())


def strong(**options):
    """Settings under which weights grow enough for samples to depend on them."""
    base = {"learning_rate": 0.5, "epochs": 2, "finetune_epochs": 3, "kernels": "predicted"}
    return small_settings(**{**base, **options})


# ------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("processors", [LARGE_TILES, SMALL_TILES], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("options", [*OPTIONS, {"precision": "bf16x2"}, {"precision": "tf32"}])
def test_a_whole_run_ends_where_the_numpy_run_ends(options, processors):
    here, expected = finished(training(np, strong(**options)))
    with installed(processors) as device:
        there, records = finished(on_device(strong(**options)))
        found = there.dbn.arrays()
    for name, array in here.dbn.arrays().items():
        assert_close(found[name], array, atol=TOLERANCE)
    assert max(np.abs(array).max() for array in found.values()) > 0.3, "nothing was learned, nothing was shown"
    assert [set(record) for record in records] == [set(record) for record in expected]
    for record, other in zip(records, expected, strict=True):
        assert record["phase"] == other["phase"]
        for key in set(other) - {"phase", "seconds", "path"}:
            assert (other[key] is None) == (record[key] is None)
            if other[key] is not None:
                assert_close(record[key], other[key], rtol=1e-5, atol=1e-6)
    used = {"half_step", "half_step_transposed"} | (
        {"cd_sums", "momentum_step"} if options.get("order") == "fixed" else {"cd_update"})
    used |= {"normals", "free_energy", "squared_errors", "cross_entropy", "sigmoid_backward"}
    used |= {"momentum_step"} if options.get("optimiser") == "sgd" else {f"{options.get('optimiser', 'adam')}_step"}
    used |= {"dropout"} if options.get("dropout") != 0 else set()
    assert used <= set(device.launched)


@pytest.mark.parametrize("method", ["cd", "pcd"])
def test_local_layers_end_where_the_numpy_run_ends(method, device):
    settings = strong(layers=(33, 7), local=(7, 0), method=method)
    here, _ = finished(training(np, settings))
    there, records = finished(on_device(settings))
    for name, array in here.dbn.arrays().items():
        assert_close(there.dbn.arrays()[name], array, atol=TOLERANCE)
    assert {record["path"] for record in records if "path" in record} == {"unfused (local layers have no kernels)"}
    assert "half_step" not in device.launched


def test_a_difference_in_one_draw_would_be_seen():
    here, _ = finished(training(np, strong()))
    with installed(), planted(door, "return seed, update, site, row, column, blocks, clock",
                              "return seed, update, site, row + (update == 20), column, blocks, clock"):
        found = finished(on_device(strong()))[0].dbn.arrays()
    worst = max(np.abs(found[name] - array).max() for name, array in here.dbn.arrays().items())
    assert worst > 100 * TOLERANCE


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2]])
def test_a_stopped_run_goes_on_with_the_same_bits_on_the_device(options, device):
    settings = strong(**options)
    whole, _ = finished(on_device(settings))
    for stop in (1, 5):
        first = on_device(settings)
        list(itertools.islice(first.run(), stop))
        state, about = first.state()
        assert all(type(array) is np.ndarray for array in state.values()), "a checkpoint holds arrays of the host"
        second = on_device(settings)
        second.restore(state, json.loads(json.dumps(about)))
        list(second.run())
        for name, array in whole.dbn.arrays().items():
            assert np.array_equal(array, second.dbn.arrays()[name]), f"stopped after {stop} epochs: {name}"
    assert device.launched


def test_a_run_begun_on_the_device_goes_on_with_numpy():
    settings = strong(method="pcd")
    here, _ = finished(training(np, settings))
    with installed():
        first = on_device(settings)
        list(itertools.islice(first.run(), 3))
        state = first.state()
    second = training(np, settings)
    second.restore(*state)
    list(second.run())
    for name, array in here.dbn.arrays().items():
        assert_close(second.dbn.arrays()[name], array, atol=TOLERANCE)


def test_parameters_that_are_not_finite_end_the_run(device, monkeypatch):
    monkeypatch.setattr("gpudbn.loop.TURN", 1)
    with pytest.raises(NonFiniteError, match="layer 1: parameters must stay finite; got NaN or infinity by update 2"):
        finished(on_device(small_settings(learning_rate=1e30)))
    assert device.launched


def test_a_model_from_a_file_does_on_the_device_what_it_does_here(device, tmp_path):
    import cupy

    run, _ = finished(training(np, strong(binarise="threshold")))
    run.dbn.about |= {"binarise": "threshold"}
    run.dbn.save(tmp_path / "model.safetensors")
    here, there = dbn.load(tmp_path), dbn.load(tmp_path, cupy)
    rows = np.random.default_rng(3).random((31, 13), np.float32)
    top = here.transform(rows)
    for name, *options in (("transform", "v"), ("transform", "v", 1), ("reconstruct", "v"), ("down", "h"),
                           ("predict_probabilities", "v")):
        result, expected = (getattr(model, name)(*({"v": v, "h": h}.get(option, option) for option in options))
                            for model, v, h in ((there, cupy.asarray(rows), cupy.asarray(top)), (here, rows, top)))
        assert_close(arrays.to_cpu(result), expected, atol=1e-5)
    assert_close(there.layers[0].free_energy(cupy.asarray(rows)).get(), here.layers[0].free_energy(rows), rtol=1e-5)
    v, h = here.transform(rows, 1), top
    assert_close(there.layers[1].energy(cupy.asarray(v), cupy.asarray(h)).get(), here.layers[1].energy(v, h), atol=1e-5)
    assert np.array_equal(there.predict(rows).get(), here.predict(rows)), "rows of the host are taken along"
    assert_close(there.sample(17, steps=20, seed=5).get(), here.sample(17, steps=20, seed=5), atol=1e-5)
    assert_close(arrays.to_cpu(there.sample(31, start=rows, steps=3)), here.sample(31, start=rows, steps=3), atol=1e-5)
    there.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert device.launched


def test_the_commands(tmp_path, capsys):
    small = ["--layers", "24", "13", "--epochs", "1", "--finetune-epochs", "2", "--batch", "200", "--plots", "off"]
    assert train.main([*small, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0
    with installed(SMALL_TILES) as device:
        assert train.main([*small, "--device", "gpu", "--out", str(tmp_path / "gpu")]) == 0
        assert "GPU 0 of 1 (pretended, kernels on the CPU)" in capsys.readouterr().out
        assert {"half_step", "cd_update", "dropout"} <= set(device.launched)
        device.launched.clear()
        assert predict.main([str(tmp_path / "gpu"), "--data", "digits", "--device", "gpu"]) == 0
        assert device.launched
        device.launched.clear()
        assert sample.main([str(tmp_path / "gpu"), "--count", "5", "--steps", "3", "--device", "gpu",
                            "--out", str(tmp_path / "samples.npy")]) == 0
        assert device.launched
    here, there = (dbn.load(tmp_path / place).arrays() for place in ("cpu", "gpu"))
    for name, array in here.items():
        assert_close(there[name], array, atol=TOLERANCE)


def test_the_tests_for_a_gpu_themselves(monkeypatch):
    """Those of ``test_training_gpu.py`` that compare single updates: so that a GPU finds no mistake of theirs."""
    from tests import test_training_gpu as there

    with installed(SMALL_TILES):
        there.test_the_sums_of_one_update_differ_by_rounding({"method": "pcd", "k": 2})
        there.test_steps_of_fine_tuning_differ_by_rounding("adam", 0.004)
        there.test_steps_of_fine_tuning_differ_by_rounding("sgd", 0.3)
        there.test_staging_waits_for_the_kernels()
        there.test_other_paths_differ_by_rounding("persistent", {"method": "pcd", "k": 2})
        there.test_graphs_and_streams_give_the_bits_of_launches_one_by_one({"method": "pcd"}, monkeypatch)


@pytest.mark.parametrize("make", [partial(optimiser.SGD, decay=0.1), partial(optimiser.Adagrad, decay=0.1),
                                  partial(optimiser.Momentum, momentum=0.5, decay=0.1)])
def test_a_server_that_keeps_its_parameters_on_the_device(make, device):
    """Two changes; nothing comes to the host. Those that are activations are in mpi/test_changes.py."""
    import cupy

    change, start = np.random.default_rng(0).standard_normal((2, 47)).astype(np.float32)
    found = []
    for put in (np.copy, cupy.asarray):
        steps, p = Steps(make, rate=0.1, by_staleness=True), put(start)
        steps.begin(p, 1)
        for staleness in (0, 3):
            steps(p, put(change), staleness)
        found.append(p)
    assert not device.copies("to host")
    assert_close(found[1].get(), found[0], atol=1e-5)
    assert np.abs(found[0] - start).max() > 0.05
    assert len(device.launched) == 2


# ------------------------------------------------------------------------ what crosses, and who waits for whom


@pytest.mark.parametrize("options", [*OPTIONS, {"kernels": "auto", "precision": "bf16x2"}])
def test_an_epoch_takes_its_order_along_and_waits_only_to_measure(options, device, monkeypatch):
    """Every copy of an epoch is named here: rates, order and counters at its beginning, a look and the measures at
    its end. Between them lie all updates, and the host waits for nothing."""
    monkeypatch.setattr("gpudbn.loop.TURN", 3)
    monkeypatch.setattr("gpudbn.loop.MEASURED", 30)
    run = on_device(strong(**options, finetune_patience=0))
    records = run.run()
    there, here = "to device", "to host"
    i8, f4, f8, u4, u8 = map(np.dtype, (np.int64, np.float32, np.float64, np.uint32, np.uint64))
    first = True
    for record in records:
        if record["phase"] == "test":
            break
        layer = record["phase"] == "pretrain"
        beginning = [(there, f4, 3)] * layer + [(there, i8, 51)]
        if layer and run.graphs:
            beginning.append((there, u4, 2))
        # two blocks of training rows and one of validation rows; fine-tuning wants their labels too
        measures = [(there, i8, size) for size in (30, 21, 10) for _ in range(1 if layer else 2)]
        if not first:  # before the first epoch of a layer its initial values go there
            assert device.copied == [*beginning, (here, u8, 1), *measures, (here, f8, 6)], record
            assert device.waited == 0
            assert device.synchronised == 0
        first = record["epoch"] == (run.settings.epochs[0] if layer else run.settings.finetune_epochs)
        device.copied.clear()
    assert (device.graphs > 0) == (options.get("order") != "fixed")


class Staged(Alone):
    """A synchronous replica whose sums go through host memory, as they do to MPI; the others add nothing."""

    cuts_batches = True

    def __init__(self, device):
        super().__init__()
        self.device, self.staging, self.times = device, Staging(), 0

    def add_(self, sums):
        assert self.device.busy, "kernels are on their way"
        with self.staging.host(sums, read=True, write=True) as host:
            assert not self.device.busy, "MPI would read before the kernels are done"
            assert type(host) is np.ndarray
            assert np.isfinite(host).all()
        host[...] = np.nan  # the next user's: the copy back must be over
        self.times += 1


def test_sums_on_their_way_through_the_host_arrive(device):
    here, _ = finished(training(np, strong()))
    exchange = Staged(device)
    there, _ = finished(on_device(strong(), exchange))
    for name, array in here.dbn.arrays().items():
        assert_close(there.dbn.arrays()[name], array, atol=TOLERANCE)
    assert exchange.times == there.updates > 0


def test_a_staging_that_does_not_wait_is_seen(device, monkeypatch):
    monkeypatch.setattr(pretend_cupy.Stream, "synchronize", lambda _: None)
    with pytest.raises((AssertionError, NonFiniteError)):
        finished(on_device(strong(), Staged(device)))


# ------------------------------------------------------------------------------- the pretended CuPy itself


def test_host_and_device_do_not_mix(device):  # noqa: ARG001
    import cupy

    there, here = cupy.asarray(np.ones((3, 2), np.float32)), np.ones((3, 2), np.float32)
    for mixture in (
            lambda: there + here, lambda: here + there, lambda: here @ there.T, lambda: there.T @ here,
            lambda: np.exp(there), lambda: np.sum(there), lambda: np.asarray(there), lambda: np.concatenate([there]),
            lambda: np.add(here, 1, out=there), lambda: np.copyto(here, there), lambda: here.__iadd__(there) + 0,
            lambda: cupy.add(here, here), lambda: cupy.add(there, here), lambda: cupy.exp(there, out=here),
            lambda: cupy.matmul(there.T, there, out=np.ones((2, 2), np.float32)), lambda: cupy.sum(here),
            lambda: there[np.array([0])], lambda: here[there], lambda: list(there), lambda: there.fill(here),
            lambda: np.float32(there), lambda: cupy.matmul(there.T, here), lambda: cupy.copyto(there, here)):
        with pytest.raises((TypeError, IndexError)):
            mixture()
    for place, value in ((here, there), (there, here)):
        with pytest.raises(TypeError):
            place[...] = value
    assert (np.float32(2) * there).sum().item() == 12


def test_outputs_are_as_strict_as_cupys(device):  # noqa: ARG001
    import cupy

    a = cupy.asarray(np.ones((3, 3), np.float32))
    with pytest.raises(TypeError, match="Wrong arguments"):
        cupy.exp(a, where=a)
    with pytest.raises(TypeError, match="same_kind"):
        cupy.add(a, a, out=cupy.zeros((3, 3), np.int32))
    with pytest.raises(ValueError, match="C-contiguous"):
        cupy.matmul(a, a, out=a.T.copy().T[:, ::-1])
    with pytest.raises(ValueError, match="dtype"):
        cupy.matmul(a, a, out=cupy.zeros((3, 3)))
    with pytest.raises(AttributeError):
        cupy.einsum  # noqa: B018


def test_views_share_and_crossings_are_counted(device):
    import cupy

    a = cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    view = a[1:].T
    view += 1
    a[cupy.arange(2), cupy.asarray(np.array([0, 2]))] += 10
    assert device.copies("to device") == [(np.float32, 6), (np.int64, 2)]
    assert device.busy
    assert a.get().tolist() == [[10, 1, 2], [4, 5, 16]]
    assert not device.busy
    total = a.sum()
    assert (total.shape, device.waited) == ((), 0)
    assert (float(total), device.waited) == (38, 1)
    assert device.copies("to host") == [(np.float32, 6)]
    assert np.isnan(cupy.empty(3, np.float32).get()).all(), "memory that was not written is seen"


def test_a_copy_from_the_host_is_late(device):
    import cupy

    there, host = cupy.zeros(3, np.float32), np.ones(3, np.float32)
    there.set(host)
    host[...] = 7  # too early
    assert there.get().tolist() == [7, 7, 7]
    there.set(host)
    cupy.cuda.get_current_stream().synchronize()
    host[...] = 8
    assert there.get().tolist() == [7, 7, 7]
    assert device.synchronised == 1


@pytest.mark.parametrize(("module", "line", "fault"), [
    (shards, "xp.matmul(a, b, out=out)", "np.matmul(a, b, out=out)"),
    (finetune, "self.xp.asarray(rows.take_labels(", "np.asarray(rows.take_labels("),
    (finetune, "xp.sum(delta, axis=0, out=gradient[f\"c{i}\"])", "xp.sum(delta, axis=0, out=np.zeros(7))"),
])
def test_what_real_cupy_refuses_ends_a_run(module, line, fault, device):  # noqa: ARG001
    with planted(module, line, fault), pytest.raises(TypeError):
        finished(on_device(small_settings(epochs=0)))


def test_the_pretended_cupy_has_nothing_that_cupy_has_not():
    """Names, and parameters by name, order and default; the pretended ones may end earlier."""
    real = pytest.importorskip("cupy")
    fake = pretend_cupy.module()
    for name in (*pretend_cupy.FUNCTIONS, *pretend_cupy.UFUNCS):
        theirs, ours = getattr(real, name), getattr(fake, name)
        if name in pretend_cupy.UFUNCS:
            assert type(theirs).__name__ == "ufunc", name
            assert theirs.nin == ours.nin, name
        else:
            assert parameters(ours) == parameters(theirs)[: len(parameters(ours))], name
    for name, thing in vars(fake.ndarray).items():
        if name.startswith("__r") or name in ("_memory", "__slots__"):
            continue
        assert hasattr(real.ndarray, name), name
        if inspect.isfunction(thing) and not name.startswith("__") and parameters(getattr(real.ndarray, name)):
            assert parameters(thing) == parameters(getattr(real.ndarray, name))[: len(parameters(thing))], name
    assert callable(real.random.random)
    for name in vars(fake.cuda):
        assert hasattr(real.cuda, name), name
    for name in vars(fake.cuda.runtime):
        assert hasattr(real.cuda.runtime, name), name
    for kind in ("Stream", "Event", "Device"):
        for name in set(vars(getattr(fake.cuda, kind))) - {"__module__", "__dict__", "__weakref__"}:
            if name.startswith("_") and not name.startswith("__"):
                continue
            assert hasattr(getattr(real.cuda, kind), name), (kind, name)


def parameters(function):
    """Names and defaults; dtypes that are equal compare equal."""
    return [(name, "float" if default is float or default is np.float64 else default)
            for name, default in pretend_cupy.signature(function) or []]


# ------------------------------------------------------------------------------------------ benchmarks/on_gpu.sh


STEPS = ("environment", "tests", "updates", "training", "mpi", "kernels", "large", "sanitizer")


def rehearsal(out, **variables):
    """The script at toy sizes."""
    given = {"GPUDBN_REHEARSE": "1", "GPUDBN_PATIENCE": "5", "PYTHON": sys.executable, **variables}
    return subprocess.run([ROOT / "benchmarks" / "on_gpu.sh", out], capture_output=True, text=True, check=False,
                          env=os.environ | given)


def test_the_script_for_a_gpu_machine_runs_here_at_toy_sizes(tmp_path):
    out = tmp_path / "results"
    done = rehearsal(out)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = json.loads((out / "environment.json").read_text())
    assert environment["rehearsal"] is True
    assert {"numpy", "cupy", "driver", "commit", "gpu"} <= set(environment)
    found = json.loads((out / "kernels.json").read_text())
    assert {(row["what"], row["by"]) for row in found["rows"]} >= {
        (what, by) for what in ("half_step", "cd_sums", "cd_update", "CD-1 update") for by in ("kernels", "CuPy")}
    assert {row["by"] for row in found["rows"] if row["what"] == "half_step"} >= {
        f"kernels, {precision}" for precision in ("bf16", "bf16x2", "tf32")}
    assert all(row["min_us"] <= row["median_us"] <= row["max_us"] for row in found["rows"])
    updates = json.loads((out / "updates.json").read_text())
    assert {(row["what"], row["by"]) for row in updates["rows"]} >= {
        (what, f"{path}, last h mean") for what in ("CD-1", "PCD-1", "CD-10")
        for path in ("unfused, fp32", "fused, bf16x2", "graph, bf16x2", "graph, bf16", "persistent, bf16x2")}
    assert [reason.partition(" ")[0] for reason in updates["refused"]] == ["CD-1", "PCD-1", "CD-10"], "wgmma"
    assert set(updates["latency"]) >= {"graph node", "grid barrier"}
    everything = json.loads((out / "results.json").read_text())
    assert everything["updates"] == updates
    assert everything["kernels"] == found
    assert everything["training"][-1]["phase"] == "report"
    if why_no_mpi() is None:
        moved = json.loads((out / "mpi.json").read_text())
        assert moved["equal"]
        assert {(row["what"], row["bytes"]) for row in moved["transfers"]} == {
            (what, nbytes) for what in ("push", "push together", "pull", "pull together") for nbytes in (2**14, 2**18)}
        assert all(row[t]["GB/s"] > 0 for row in moved["transfers"] for t in ("staged", "direct"))
    table = (out / "table.md").read_text()
    assert table in done.stdout
    assert "rehearsal" in table
    assert not found["failures"]
    assert not updates["failures"]
    for step in STEPS:
        assert f"| {step} | passed |" in table
    assert "skipped: the device is sm_80" in (out / "large.log").read_text()
    assert "skipped: " in (out / "sanitizer.log").read_text()
    limits = re.findall(r"step \w+ (\d+) ", (ROOT / "benchmarks" / "on_gpu.sh").read_text())
    assert sum(map(int, limits)) < 600, "under ten minutes"


@pytest.mark.parametrize(("add", "adagrad", "equal"), [(0, 0, True), (0, 1e-7, True), (1e-7, 0, False),
                                                       (0, 1e-5, False)])
def test_transports_that_differ_are_told(add, adagrad, equal):
    def found(by, adagrad):
        return {"parameters": {"add": [1.0, -2 + 2 * by], "Adagrad": [4.0 + 4 * adagrad, 3.0]}}

    result = transports.compared({"staged": found(0, 0), "direct": found(add, adagrad)})
    assert result["equal"] == equal
    assert result["apart"] == pytest.approx({"add": add, "Adagrad": adagrad})
    assert ("agree" if equal else "DIFFER") in transports.table(result | {"transfers": []})[-1]


def test_a_wrong_kernel_is_told_and_not_timed(tmp_path, device, monkeypatch):
    import cupy

    monkeypatch.setattr(kernels, "repeats", 1)
    results = kernels.Results(tmp_path / "kernels.json", {})
    with planted(door, "return seed, update, site, row, column, blocks, clock",
                 "return seed, update, site, row + 1, column, blocks, clock"):
        kernels.run(results, [(13, 7, 5)], cupy, None, toy=True)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["what"] for row in rows if row["by"].startswith("kernels")} == {"cd_sums", "cd_update"}
    assert {row["what"] for row in rows if row["by"] == "CuPy"} > {"half_step", "half_step, transposed"}
    ours = {failure["by"] for failure in results.content["failures"]}
    assert {"kernels", "kernels, exact", "kernels, tf32"} <= ours
    assert results.failed == 3 * len(ours), "both half-steps and the update, of each of ours and no other"
    assert device.launched


@pytest.mark.parametrize("fault", [None, "row + 1"])
def test_large_layers_are_held_to_float64_before_they_are_timed(tmp_path, monkeypatch, fault):
    """As on a device with wgmma, at toy sizes; a wrong draw is told and not timed."""
    from benchmarks import large
    from gpudbn import cuda
    from gpudbn.cuda import wgmma

    monkeypatch.setattr(kernels, "repeats", 1)
    monkeypatch.setattr(wgmma.Wgmma, "encode", staticmethod(runtime.encode))
    results = kernels.Results(tmp_path / "kernels.json", {})
    text = "return seed, update, site, row, column, blocks, clock"
    with installed(processors=3), contextlib.ExitStack() as stack:
        import cupy

        launcher = cuda.gpu()
        launcher.architecture = wgmma.ARCHITECTURE
        if fault:
            stack.enter_context(planted(door, text, text.replace("row", fault)))
        large.run(results, large.TOY, cupy, launcher)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    found = {row["what"] for row in rows if row["by"] == "kernels, wgmma, bf16"}
    assert found == ({"cd_update"} if fault else {"half_step", "half_step, transposed", "cd_update", "CD-1 update"})
    assert results.failed == (3 if fault else 0), results.content["failures"]
    assert {row["what"] for row in rows if row["by"].startswith("CuPy")} > {"half_step", "CD-1 update"}


@pytest.mark.parametrize("fault", [None, "update + 1"])
def test_runs_on_the_chip_are_held_to_numpy_before_they_are_timed(tmp_path, monkeypatch, fault):
    from benchmarks import persistent
    from gpudbn import cuda
    from gpudbn.cuda import persistent as launches

    monkeypatch.setattr(kernels, "repeats", 1)
    results = kernels.Results(tmp_path / "kernels.json", {})
    text = "last_mean, seed, update,"
    with installed(processors=3), contextlib.ExitStack() as stack:
        import cupy

        if fault:
            stack.enter_context(planted(launches, text, text.replace("update", fault)))
        persistent.run(results, persistent.TOY, cupy, cuda.gpu(), 2)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert len(rows) == (0 if fault else 4), results.content["failures"]
    assert results.failed == (4 if fault else 0)


def test_the_counts_of_a_run_on_the_chip():
    """Of 784x500 and B = 100, by hand: 1 octet of units a block, 50 and 32 steps of inputs, 99 tiles of a gradient."""
    from benchmarks import persistent

    found = persistent.counts(784, 500, 100, last_hidden="sample")
    instructions = 2 * 50 * 2 * 8 + 32 * 2 * 8 + 99 * 4 * 4
    assert found["GFLOP issued"] == pytest.approx(instructions * 4096 * 132e-9)
    assert found["GFLOP"] == pytest.approx(10 * 784 * 500 * 100e-9)
    assert found["MB read"] == pytest.approx((784 * 4 + 500) * 16 * 132e-6 + (784 + 500) * 32e-6
                                             + 4 * 784 * 500e-6)
    assert found["barriers"] == 2
    means = persistent.counts(784, 500, 100)
    assert means["MB read"] - found["MB read"] == pytest.approx(500 * (208 - 16) * 1e-6)
    assert "| 784x2000, 128 | mean | greys |" in persistent.table()


def test_a_failing_step_is_told_and_does_not_stop_the_others(tmp_path):
    out = tmp_path / "results"
    done = rehearsal(out, GPUDBN_WHEELS=str(tmp_path / "none"), GPUDBN_STEPS="environment training large")
    assert done.returncode == 1
    table = (out / "table.md").read_text()
    assert "| wheels | failed: exit 1 |" in table
    assert "GPUDBN_WHEELS: must be a folder of wheels" in done.stdout
    for step in STEPS:
        assert (f"| {step} | passed |" in table) == (step in ("environment", "training", "large"))
