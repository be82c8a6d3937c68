"""Runs in exact mode end with the same bits: with NumPy and on a device, whatever the tiles, however a batch is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpudbn import data, exact, train
from gpudbn.dbn import DBN, load
from gpudbn.errors import UserError
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.precision import PRECISIONS
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import RBM
from gpudbn.settings import FIELDS, Settings
from gpudbn.shards import Shards
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_notices
from tests.pretend_cupy import installed
from tests.test_loop import small_data, small_settings

LARGE_TILES, SMALL_TILES = 1, 10**9

needs_kernels = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

RUNS = [  # between them, every estimator, and some hundreds of updates
    (SMALL_TILES, {"epochs": 15}),
    (LARGE_TILES, {"k": 3, "data_hidden": "mean", "last_hidden": "sample", "up": "mean", "decay": 0.0}),
    (SMALL_TILES, {"method": "pcd", "k": 2, "binarise": "stochastic"}),
    (LARGE_TILES, {"reconstruction": "mean", "order": "fixed", "epochs": 1}),
]


def run(xp, **options):
    """A run of two layers without fine-tuning, finished."""
    rows = small_data()
    rows = replace(rows, train=rows.train.to(xp), validation=rows.validation.to(xp), test=rows.test.to(xp))
    settings = small_settings(**{"precision": "exact", "learning_rate": 0.5, "finetune_epochs": 0, **options})
    training = Training(DBN([rows.n, *settings.layers], xp), rows, settings, Alone())
    list(training.run())
    return training


def bits(training):
    return {name: array.tobytes() for name, array in training.dbn.arrays().items()}


@needs_kernels
@pytest.mark.parametrize(("processors", "options"), RUNS)
def test_a_whole_run_on_a_device_has_the_bits_of_numpy(processors, options):
    here = run(np, **options)
    assert max(np.abs(array).max() for array in here.dbn.arrays().values()) > 0.3, "nothing was learned"
    with installed(processors) as device:
        import cupy

        there = run(cupy, **options)
        assert bits(there) == bits(here)
        assert {"half_step_exact", "half_step_exact_transposed"} <= set(device.launched)
        assert not {"half_step", "half_step_transposed", "cd_update", "cd_sums"} & set(device.launched)
        samples = there.dbn.sample(5, steps=20, seed=3).get()
    assert np.array_equal(samples, here.dbn.sample(5, steps=20, seed=3))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [options for _, options in RUNS])
def test_a_whole_run_on_a_gpu_has_the_bits_of_numpy(options):
    import cupy

    assert bits(run(cupy, **options)) == bits(run(np, **options))


@needs_kernels
def test_in_float32_the_bits_differ():
    """So that the tests above show something."""
    here = run(np, precision="fp32", epochs=3)
    with installed():
        import cupy

        assert bits(run(cupy, precision="fp32", epochs=3, kernels="graph")) != bits(here)


@needs_kernels
def test_the_command_writes_the_same_model_on_both_devices(tmp_path):
    options = ["--precision", "exact", "--layers", "24", "13", "--epochs", "1", "--finetune-epochs", "0", "--batch",
               "200", "--plots", "off"]
    assert train.main([*options, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0
    with installed(SMALL_TILES):
        assert train.main([*options, "--device", "gpu", "--out", str(tmp_path / "gpu")]) == 0
    models = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("cpu", "gpu")]
    assert models[0] == models[1]
    assert load(tmp_path / "cpu").layers[1].precision == "exact", "samples of the model are drawn as it was trained"


def check_cut(**options):
    """The sums over a batch, whole and in parts, of the second layer: the draws of a part are those of its rows."""
    settings = small_settings(precision="exact", **options)
    training = run(np, epochs=2, **options)
    phase = LayerPhase(training.dbn, 1, settings, rows=37, chains=None)
    rows, positions = small_data().train, np.arange(37)

    def sums(low, high):
        out = np.empty_like(phase.parameters)
        phase.sums(out, rows, Piece(positions[low:high], 5, low, slice(0), 0, 1.0))
        return out

    parts = sums(20, 37) + sums(0, 3) + sums(3, 20)
    assert parts.tobytes() == sums(0, 37).tobytes()


@pytest.mark.parametrize("options", [{}, {"k": 3, "up": "mean"}, {"data_hidden": "mean", "last_hidden": "sample"}])
def test_a_batch_may_be_cut_anywhere(options):
    check_cut(**options)


def test_sums_that_are_not_of_integers_are_noticed():
    assert_notices(check_cut, exact, "np.rint(t, out=t)", "t")


def reconstruction(precision, seed):
    """Squared error of held-out digits after two epochs of a layer."""
    settings = Settings(precision=precision, seed=seed, layers=(64,), epochs=2, finetune_epochs=0)
    digits = data.load("digits", seed=0)
    training = Training(DBN([digits.n, 64]), digits, settings, Alone())
    return [record["reconstruction_validation"] for record in training.run() if record["phase"] == "pretrain"][-1]


def test_it_learns_as_well_as_float32():
    """Seed by seed the two runs begin with the same draws; they end within the spread of the seeds."""
    fp32, exactly = (np.array([reconstruction(name, seed) for seed in range(4)]) for name in ("fp32", "exact"))
    assert abs(exactly.mean() - fp32.mean()) < 2 * fp32.std(ddof=1)


def other_samples(steps):
    """The share of samples that differ from those of the same weights unrounded: the mean error of a probability."""
    rng = np.random.default_rng(3)
    W, c = rng.normal(0, 0.1, (784, 500)).astype(np.float32), rng.normal(-1, 1, 500).astype(np.float32)
    v, mean = (rng.random((100, 784)) < 0.2).astype(np.float32), np.empty((100, 500), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WEIGHT_STEPS", steps)
        exact.half_step(mean, v, W, c, transpose=False)
    return np.abs(mean - 1 / (1 + np.exp(-(v.astype(np.float64) @ W + c)))).mean()


def test_three_limbs_of_a_weight_make_the_samples_of_float32_and_two_would_not():
    """31 is the largest weight either way: 2^10 steps make it 16 bits, 2^18 make it 24."""
    assert 1 / 5000 < other_samples(2.0**10) < 1 / 1000
    assert other_samples(exact.WEIGHT_STEPS) < 1 / 500_000


def test_the_choices_are_the_precisions_there_are():
    assert set(FIELDS["precision"].metadata["choices"]) == {"auto", *PRECISIONS}


def test_centred_units_are_refused():
    for options in ({"centring": "data"}, {"sparsity_target": 0.1}):
        with pytest.raises(UserError, match="--precision: must not be exact with --centring or --sparsity-target"):
            small_settings(precision="exact", **options)


def test_layers_that_are_cut_into_shards_are_refused():
    shards = Shards()
    shards.count = 2
    rbm = RBM(5, 40, shards=shards)
    rbm.precision = "exact"
    with pytest.raises(UserError, match="--precision exact: must have whole layers; got layers cut into 2 shards"):
        rbm.visible_given_hidden(np.zeros((3, rbm.width), np.float32))
