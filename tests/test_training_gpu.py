"""Training on a real GPU: what ``test_gpu_path.py`` shows of a pretended one, and a run that learns."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpudbn import cuda, dbn, runs
from gpudbn.arrays import to_cpu
from gpudbn.cuda import wgmma
from gpudbn.data import DataSet, load
from gpudbn.dbn import DBN
from gpudbn.finetune import FinetunePhase
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.mpi.wire import Staging
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import new_chains
from gpudbn.settings import Settings
from tests.helpers import assert_close
from tests.test_gpu_path import OPTIONS, TOLERANCE, finished, strong, training

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("options", OPTIONS)
def test_a_whole_run_ends_where_the_numpy_run_ends(options):
    """A draw within 1e-7 of its probability may fall the other way: a chance of about 1 in 100 for a run."""
    import cupy

    here, expected = finished(training(np, strong(**options)))
    there, records = finished(training(cupy, strong(**options)))
    for name, array in here.dbn.arrays().items():
        assert_close(there.dbn.arrays()[name], array, atol=TOLERANCE)
    assert_close(records[-1]["loss"], expected[-1]["loss"], rtol=1e-4)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "bf16x2", "k": 3},
                                     {"precision": "bf16", "method": "pcd", "k": 2}])
def test_large_layers_by_wgmma_end_where_the_numpy_run_ends(options):
    """All units are samples, from which bf16 takes nothing."""
    import cupy

    if cuda.gpu().architecture != wgmma.ARCHITECTURE:
        pytest.skip(f"wgmma: the device is {cuda.gpu().architecture}")
    options = {"finetune_epochs": 0, "last_hidden": "sample", **options}
    here, _ = finished(training(np, strong(**options)))
    there, records = finished(training(cupy, strong(**options, kernels="wgmma")))
    for name, array in here.dbn.arrays().items():
        assert_close(there.dbn.arrays()[name], array, atol=TOLERANCE)
    assert all(record["path"] == "wgmma (--kernels)" for record in records[:-1])


def test_a_stopped_run_goes_on_with_the_same_bits():
    import cupy

    settings = strong(method="pcd", k=2)
    whole, _ = finished(training(cupy, settings))
    first, second = training(cupy, settings), training(cupy, settings)
    list(itertools.islice(first.run(), 3))
    second.restore(*first.state())
    list(second.run())
    for name, array in whole.dbn.arrays().items():
        assert np.array_equal(array, second.dbn.arrays()[name]), name


def pretrained(xp, rows, **options):
    """Parameters of two layers after some epochs, of which some turns are graphs; rows may be on the host."""
    settings = strong(**{"layers": (61, 47), "epochs": 3, "finetune_epochs": 0, **options})
    net = DBN([rows.n, *settings.layers], xp)
    data = DataSet("rows", rows, *[rows.select(range(0))] * 2, None, 0)
    _, records = finished(Training(net, data, settings, Alone()))
    return net.arrays(), {record["path"].partition(" ")[0] for record in records[:-1]}


def same(one, other):
    return all(np.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize("options", [{}, {"k": 3, "binarise": "threshold"}, {"method": "pcd", "last_hidden": "sample"},
                                     {"binarise": "stochastic", "data_hidden": "mean", "up": "mean"}])
def test_graphs_and_streams_give_the_bits_of_launches_one_by_one(options, monkeypatch):
    """Grey rows, as bytes: gathered from the device's memory, and streamed to it."""
    import cupy

    monkeypatch.setattr("gpudbn.loop.TURN", 7)
    rows = load("digits").train.select(range(211))
    expected, path = pretrained(cupy, rows.to(cupy), kernels="fused", **options)
    assert path == {"fused"}
    found, path = pretrained(cupy, rows.to(cupy), **options)
    assert path == {"graph"}
    assert same(found, expected)
    streamed, path = pretrained(cupy, rows, **options)
    assert path == {"graph"}
    assert same(streamed, expected)


@pytest.mark.parametrize("options", [{}, {"method": "pcd", "binarise": "stochastic", "k": 2}])
@pytest.mark.parametrize("kernels", ["persistent", "unfused"])
def test_other_paths_differ_by_rounding(kernels, options):
    """Samples alone cross the chip, so that nothing is rounded that would not be otherwise."""
    import cupy

    options = {"last_hidden": "sample", "finetune_epochs": 0, **options}
    there, expected = (finished(training(cupy, strong(**options, kernels=path)))[0].dbn.arrays()
                       for path in (kernels, "fused"))
    for name, array in expected.items():
        assert_close(there[name], array, atol=TOLERANCE)


ESTIMATORS = [{}, {"method": "pcd", "k": 3}, {"reconstruction": "mean", "last_hidden": "sample"}]


@pytest.mark.parametrize("options", ESTIMATORS)
def test_the_sums_of_one_update_differ_by_rounding(options):
    """Digits at the size of real layers; weights at which samples depend on them, and so must agree.

    A draw within rounding of its probability may fall the other way, in about 1 of 100 such updates: one of five may.
    """
    import cupy

    settings, rows = Settings(layers=(500, 300), **options), load("digits").train
    results: list[list[np.ndarray]] = []
    for xp in (np, cupy):
        net = DBN([rows.n, *settings.layers], xp)
        for layer, rbm in enumerate(net.layers):
            rbm.initialise(sd=0.3, seed=3, layer=layer)
        there, found = rows.to(xp), []
        for update in range(5):
            chains = None
            if "k" in options:
                chains = xp.asarray(new_chains(20, net.layers[1], seed=3, layer=1, row=20 * update))
            phase = LayerPhase(net, 1, settings, rows=20, chains=chains)
            sums = xp.empty_like(phase.parameters)
            phase.sums(sums, there, Piece(np.arange(20) + 20 * update, update, 0, slice(0, 20), 0, 1.0))
            found.append(to_cpu(sums))
        results.append(found)
    apart = [float(np.abs(there - here).max()) for here, there in zip(*results, strict=True)]
    assert sorted(apart)[-2] < 1e-4, apart  # sums of 40 terms; one sample that differs makes 1


@pytest.mark.parametrize(("optimiser", "rate"), [("adam", 0.004), ("adagrad", 0.01), ("sgd", 0.3)])
def test_steps_of_fine_tuning_differ_by_rounding(optimiser, rate):
    import cupy

    settings = Settings(layers=(500, 300), dropout=0.3, input_dropout=0.2, optimiser=optimiser,
                        finetune_learning_rate=rate)
    rows = load("digits").train
    results = []
    for xp in (np, cupy):
        net = DBN([rows.n, *settings.layers], xp)
        for layer, rbm in enumerate(net.layers):
            rbm.initialise(sd=0.3, seed=3, layer=layer)
        phase = FinetunePhase(net, 10, settings, rows=100)
        phase.net["W2"][...] = xp.asarray(np.linspace(-0.1, 0.1, 3000, dtype=np.float32).reshape(300, 10))
        phase.begin_epoch(0)
        there = rows.to(xp)
        sums = xp.empty_like(phase.parameters)
        phase.sums(sums, there, Piece(np.arange(100), 5, 0, slice(0), 0, 1.0))
        before = phase.measure(there, np.arange(200))
        for update in range(10):
            phase.update(there, Piece(np.arange(100), update, 0, slice(0), 0, 1.0))
        after = phase.measure(there, np.arange(200))
        results.append((to_cpu(sums), [float(x) for x in before + after]))
    assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    assert_close(results[1][1][0::2], results[0][1][0::2], rtol=1e-3)
    assert abs(results[1][1][2] / results[1][1][0] - 1) > 0.01, "nothing was learned, nothing was shown"


def test_staging_waits_for_the_kernels():
    """Host memory holds the end of a long chain of launches when MPI is let at it, and the device gets it back."""
    import cupy

    x = cupy.zeros(1 << 22, np.float32)
    staging = Staging()
    for _ in range(3):
        x.fill(0)
        for _ in range(200):
            x += 1
        with staging.host(x, read=True, write=True) as host:
            assert (host == 200).all()
            host += 1
        assert bool((x == 201).all())


def test_the_command_learns_the_digits(tmp_path):
    options = ["--device", "gpu", "--plots", "off", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "gpudbn.train", *options], cwd=tmp_path, capture_output=True,
                          text=True, check=False, timeout=170,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU 0 of" in done.stdout
    (test,) = (r for r in runs.Run.open(tmp_path / "run").records() if r["phase"] == "test")
    assert test["error"] < 0.05
    model = dbn.load(tmp_path / "run")
    rows = load("digits").test
    x = np.empty((len(rows), rows.n), np.float32)
    rows.take(np.arange(len(rows)), x)
    wrong = float(np.mean(model.predict(x) != rows.take_labels(np.arange(len(rows)))))
    assert abs(wrong - test["error"]) <= 2 / len(rows), "the model does with NumPy what it did on the GPU"
