"""The rule that chooses a path, as a table; the path without kernels against the one with them."""

from __future__ import annotations

import numpy as np
import pytest

from gpudbn import loop, reference, train, unfused
from gpudbn.dbn import DBN
from gpudbn.errors import UserError
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from gpudbn.paths import CHOICES, Case, choose_path
from gpudbn.settings import FIELDS
from gpudbn.twins import twins_of, without_kernels
from tests.cuda_on_cpu import runtime
from tests.helpers import assert_close, planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import OPTIONS, TOLERANCE, finished, on_device, strong, training
from tests.test_loop import Slice, small_data, small_settings

ON_CPU = Case("layer 1", gpu=False)
LAYER = Case("layer 1", updates=600)
SLICED = Case("layer 2", host_between="other replicas")
FIXED = Case("layer 1", host_between="--order fixed")
SMALL = Case("layer 1", updates=1)
EXACT = Case("layer 1", precision="exact")
ROUNDED = Case("layer 1", precision="bf16x2")
FINETUNE = Case("fine-tuning", finetune=True)


@pytest.mark.parametrize(("asked", "case", "name", "why"), [
    ("auto", ON_CPU, "numpy", "no GPU"),
    ("auto", LAYER, "graph", "the first choice"),
    ("auto", SLICED, "fused", "no graph: other replicas must act within each update"),
    ("auto", FIXED, "fused", "no graph: --order fixed must act within each update"),
    ("auto", SMALL, "fused", "no graph: an epoch has 1 full batches, and nothing repeats"),
    ("auto", FINETUNE, "fused", "no graph: its products are cuBLAS's, which a CUDA graph cannot hold"),
    ("graph", LAYER, "graph", "--kernels"),
    ("graph", FINETUNE, "fused", "no graph: its products are cuBLAS's, which a CUDA graph cannot hold"),
    ("fused", LAYER, "fused", "--kernels"),
    ("fused", SLICED, "fused", "--kernels"),
    ("persistent", LAYER, "persistent", "--kernels"),
    ("persistent", FINETUNE, "fused", "no persistent: it is no CD"),
    ("unfused", LAYER, "unfused", "--kernels"),
    ("unfused", FINETUNE, "unfused", "--kernels"),
    ("auto", EXACT, "graph", "the first choice"),
    ("unfused", EXACT, "unfused", "--kernels"),
])
def test_the_rule(asked, case, name, why):
    path = choose_path(asked, case)
    assert (path.name, path.why) == (name, why)
    assert str(path) == f"{name} ({why})"


@pytest.mark.parametrize(("asked", "case", "message"), [
    ("graph", ON_CPU, "--kernels: must be auto without a GPU; got graph"),
    ("unfused", ON_CPU, "--kernels: must be auto without a GPU; got unfused"),
    ("graph", SLICED, "must be a path that layer 2 can take; got graph, but other replicas must act within each"),
    ("unfused", ROUNDED, "must be a path that layer 1 can take; got unfused, but --precision bf16x2 is kernels'"),
    ("persistent", SLICED, "got persistent, but other replicas must act within each update. Use auto"),
    ("persistent", EXACT, "got persistent, but --precision exact is not its arithmetic. Use auto"),
    ("persistent", Case("layer 1", means="--data-hidden mean"), "but --data-hidden mean lets means cross the chip"),
    ("persistent", Case("layer 1", offsets=True), "but --centring and --sparsity-target need each update's units"),
    ("persistent", Case("layer 1", fits=False), "but the layer or the minibatch does not fit on the chip. Use auto"),
    ("graph", SMALL, "got graph, but an epoch has 1 full batches, and nothing repeats. Use auto"),
])
def test_what_is_asked_for_and_cannot_be_is_refused(asked, case, message):
    with pytest.raises(UserError) as caught:
        choose_path(asked, case)
    assert message in str(caught.value)


def test_the_setting_has_these_choices():
    assert FIELDS["kernels"].metadata["choices"] == CHOICES


def paths(xp, exchange=None, **options):
    data, settings = small_data(), small_settings(**options)
    return [path.name for path in
            Training(DBN([data.n, *settings.layers], xp), data, settings, exchange or Alone()).paths]


def test_a_run_tells_the_case_as_it_is():
    assert paths(np) == ["numpy"] * 3
    with installed():
        import cupy

        assert paths(cupy) == ["graph", "graph", "fused"]
        assert paths(cupy, order="fixed") == ["fused"] * 3
        assert paths(cupy, Slice(1, 2)) == ["fused"] * 3
        assert paths(cupy, kernels="unfused") == ["unfused"] * 3
        assert paths(cupy, kernels="fused") == ["fused"] * 3
        assert paths(cupy, kernels="persistent") == ["persistent", "persistent", "fused"]
        with pytest.raises(UserError, match="layer 1 can take; got persistent, but --reconstruction mean lets means"):
            paths(cupy, kernels="persistent", reconstruction="mean")
        with pytest.raises(UserError, match="does not fit on the chip"):
            paths(cupy, kernels="persistent", batch=500)
        assert paths(cupy, batch=26) == ["fused"] * 3, "51 rows are one full batch"
        assert paths(cupy, finetune_epochs=0) == ["graph", "graph"]
        with pytest.raises(UserError, match="but --order fixed must act within each update"):
            paths(cupy, order="fixed", kernels="graph")
    with pytest.raises(UserError, match="--kernels: must be auto without a GPU; got graph"):
        paths(np, kernels="graph")


# ------------------------------------------------------------------------------------------- without kernels

NO_KERNELS = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")


@NO_KERNELS
@pytest.mark.parametrize("options", [*(options for options in OPTIONS if "precision" not in options),
                                     {"centring": "data", "sparsity_target": 0.1, "learning_rate": 0.1}])
def test_a_run_without_kernels_ends_where_one_with_them_ends(options):
    with installed():
        expected = finished(on_device(strong(**options)))[0].dbn.arrays()
    with installed() as device:
        run, records = finished(on_device(strong(**options, kernels="unfused")))
        found = run.dbn.arrays()
        assert device.launched == []
        assert device.graphs == 0
    for name, array in expected.items():
        assert_close(found[name], array, atol=TOLERANCE)
    assert {record["path"] for record in records[:-1]} == {"unfused (--kernels)"}


@NO_KERNELS
@pytest.mark.parametrize(("module", "line", "fault"), [
    (unfused, "signs[rows:] = -model_weight", "signs[rows:] = -1.01 * model_weight"),
    (unfused, "velocity += gradient * np.float32(rate * scale)", "velocity += gradient * np.float32(rate)"),
    (unfused, "delta[each] += np.float32(1)", "delta[each] += np.float32(2)"),
    (unfused, "parameters += np.float32(step) * mean", "parameters += np.float32(rate) * mean"),
    (unfused, "velocity[:weights] -=", "velocity[:weights] +="),
    (unfused, "W.T if transpose else W", "W.T if transpose else -W"),
    (unfused, "return xp.less(u, mean, out=sample)", "return xp.less_equal(mean, u, out=sample)"),
    (loop, "with without_kernels(plain):\n                        record",
     "with without_kernels(False):\n                        record"),
])
def test_other_formulas_are_noticed(module, line, fault):
    with pytest.raises(AssertionError), planted(module, line, fault):
        test_a_run_without_kernels_ends_where_one_with_them_ends({"method": "pcd", "batch": 7, "epochs": 1})


def formulas():
    """Name, arrays and options of calls that have a formula; sizes prime, nothing symmetric."""
    rng, f4 = np.random.default_rng(5), np.float32
    n, m, K, rows, size = 7, 5, 13, 8, 7 * 5 + 7 + 5

    def real(*shape):
        return rng.normal(0, 0.5, shape).astype(f4)

    def zeros(*shape):
        return np.zeros(shape, f4)

    drawn = {"seed": 3 + (5 << 32), "update": 2, "site": 1 << 24, "row": 4 + (1 << 33)}
    step = {"weights": n * m, "scale": 1 / 8, "rate": 0.1, "decay": 0.2}
    cd = {"model_weight": 0.7, "rate": 0.1, "decay": 0.2}
    v, h = rng.random((K, n), f4), rng.random((K, m), f4)
    labels = rng.integers(0, m, K).astype(np.int32)
    for part in ({}, {"columns": 11}, {"column": 4, "columns": 11}):
        yield "normals", (zeros(K, m),), {**drawn, **part}
        yield "bernoulli", (zeros(K, m), h), {**drawn, **part}
    yield "uniforms", (zeros(K, m),), {**drawn, "column": 3, "columns": 11}
    yield "gather", (zeros(K, n), rng.random((29, n), f4), rng.permutation(29)), {"first": 5, "scale": 0.3}
    yield "gather", (zeros(K, n), rng.integers(0, 255, (29, n)).astype(np.uint8), None), {"first": 16, "scale": 1 / 255}
    for value in (1.0, np.nan, -np.inf):
        yield "note_not_finite", (np.full(1, 5 << 32, np.uint64), f4([0, value, 1])), {"phase": 3, "update": 7}
    yield "gaussian", (zeros(K, m), h, real(m)), drawn
    yield "categorical", (zeros(K, 6), zeros(K, 6), real(K, 6), real(6), 3), drawn
    yield "dropout", (h.copy(), 0.7), drawn
    yield "sigmoid_backward", (real(K, m), h.copy()), {"keep": 0.7}
    yield "cross_entropy", (zeros(K, m), zeros(K), zeros(K), real(K, m), real(m), labels), {}
    yield "free_energy", (zeros(K), real(K, m), real(m), v, real(n)), {}
    yield "free_energy", (zeros(K), real(K, m), real(m)), {}
    yield "squared_errors", (zeros(K), v, real(K, n)), {}
    yield "centre", (v.copy(), h.copy(), zeros(2 * K), real(n + 2 * m), rows), {}
    for centring in (True, False):
        yield "offsets_step", (real(n + m), real(n + 2 * m), real(n + m), n, m), {
            "scale": 0.3, "keep": 0.9, "centring": centring, "target": 0.2, "cost": 0.4}
    yield "momentum_step", (real(size), real(size), real(size)), {**step, "momentum": 0.8}
    yield "sgd_step", (real(size), real(size)), step
    yield "adagrad_step", (real(size), rng.random(size, f4), real(size)), step
    yield "adam_step", (real(size), real(size), rng.random(size, f4), real(size)), {**step, "steps": 3}
    yield "cd_update", (real(size), real(size), zeros(size), n, m, v, h, rows), {**cd, "momentum": 0.8}
    W, b = (30 * real(n, m)), real(m)
    yield "half_step", (zeros(K, m), zeros(K, m), v, W, b), {**drawn, "precision": "exact"}
    yield "half_step", (None, zeros(K, n), h, W, real(n)), {"precision": "exact", "transpose": True}
    yield "cd_update", (real(size), real(size), zeros(size), n, m, v, h, rows), {
        **cd, "momentum": 0.8, "precision": "exact"}
    yield "cd_sgd", (real(size), zeros(size), n, m, v, h, rows), cd
    yield "cd_adagrad", (real(size), rng.random(size, f4), zeros(size), n, m, v, h, rows), {**cd, "fade": 0.3}


WORK = {"adam_step": 3, "cd_update": 2, "cd_sgd": 1, "cd_adagrad": 2}  # which array of a call is work space
EXACTLY = {"normals", "bernoulli", "uniforms", "gather", "note_not_finite"}


def check_formulas():
    with installed() as device:
        import cupy

        for name, given, options in formulas():
            here = [a.copy() if isinstance(a, np.ndarray) else a for a in given]
            there = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in given]
            if name in WORK and name.startswith("cd"):
                there[WORK[name]] = None
            getattr(reference, name)(*here, **options)
            getattr(unfused, name)(*there, **options)
            exactly = name in EXACTLY or options.get("precision") == "exact"
            for place, (one, other) in enumerate(zip(here, there, strict=True)):
                if isinstance(one, np.ndarray) and place != WORK.get(name):
                    if exactly:
                        np.testing.assert_array_equal(other.get(), one, name)
                    else:
                        assert_close(other.get(), one, atol=2e-6, rtol=2e-6)
    assert device.launched == []


def test_each_formula_is_its_twin():
    check_formulas()


def test_all_twins_have_a_formula_but_those_of_graphs_and_of_whole_paths():
    assert set(reference.__all__) - set(vars(unfused)) == {
        "advance", "cd_run", "cd_update_wgmma", "half_step_wgmma", "to_bf16", "to_float"}


@pytest.mark.parametrize(("line", "fault"), [
    ("xp.add(mean, xp.multiply(z, sd, out=z)", "xp.add(mean, xp.multiply(z, z, out=z)"),
    ("(up_to <= u[:, :, None]", "(up_to >= u[:, :, None]"), ("u < np.float32(keep)", "u < np.float32(1 - keep)"),
    ("factor = a * np.float32(-keep)", "factor = a * np.float32(-1)"),
    ("xp.not_equal(log_p.argmax", "xp.equal(log_p.argmax"), ("xp.subtract(out, v @ b", "xp.add(out, v @ b"),
    ("out[...] = difference.sum", "out[...] = -difference.sum"), ("h[rows:] -= model", "h[rows:] -= data"),
    ("now += offsets[: n + m]", "pass"), ("256 if centring else 0", "256"),
    ("offsets[n : n + m] = rounded[n:] +", "offsets[n : n + m] = rounded[n:] -"),
    ("squares += g * g", "squares += g"), ("np.float32(1 - b2) * (g * g", "np.float32(1 - b1) * (g * g"),
    ("parameters[:weights] *= np.float32(1 - part)", "parameters *= np.float32(1 - part)"),
    ("np.uint64(row * blocks)", "np.uint64(row)"), ("column % 4 : column % 4 + m", ": m"),
    ("(seed & 0xFFFFFFFF, seed >> 32)", "(seed & 0xFFFFFFFF, 0)"), ("index >> np.uint64(32)", "0 * index"),
    ("columns=columns + columns % 2", "columns=columns + 4 * (columns % 2)"),
    ("xp.stack(words, axis=2)", "xp.stack(words, axis=1)"), ("slice(first, first + len(out))", "slice(0, len(out))"),
    ("xp.isfinite(x).all(), flag", "xp.isfinite(x).any(), flag"),
    ("xp.rint(xp.clip(x, -largest, largest)", "(xp.clip(x, -largest, largest)"), ("<< np.int32(23)", "<< np.int32(22)"),
    ("f -= whole - exact.TO_WHOLE", "f = f - (whole - exact.TO_WHOLE) * np.float32(1.0000002)"),
    ("model *= np.float32(model_weight)", "pass"),
])
def test_another_formula_is_noticed(line, fault):
    with pytest.raises(AssertionError), planted(unfused, line, fault):
        check_formulas()


def test_what_unfused_formulas_do_not_do_is_refused():
    x = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match="half_step: precision must be one of fp32, exact; got 'bf16'"):
        unfused.half_step(None, x, x, x, x[0], precision="bf16")
    with pytest.raises(ValueError, match="momentum_step: rates must be None without kernels; got an array"):
        unfused.momentum_step(x[0], x[0], x[0], weights=1, scale=1, rate=1, momentum=0, decay=0, rates=x[0])
    with pytest.raises(ValueError, match=r"uniforms: column \+ 3 must be at most columns; got 1 of 3"):
        unfused.uniforms(x, seed=0, update=0, site=0, column=1, columns=3)


@pytest.mark.parametrize("options", [
    {"epochs": 3}, {"method": "pcd", "k": 2, "data_hidden": "mean", "last_hidden": "sample"}])
def test_an_exact_run_without_kernels_has_the_bits_of_numpy(options):
    options = {**options, "precision": "exact", "finetune_epochs": 0}
    expected = finished(training(np, strong(**{**options, "kernels": "auto"})))[0].dbn.arrays()
    with installed() as device:
        found = finished(on_device(strong(**options, kernels="unfused")))[0].dbn.arrays()
        assert device.launched == []
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


ALL = ["--layers", "16", "8", "--epochs", "1", "--finetune-epochs", "1", "--batch", "200", "--device", "gpu",
       "--kernels", "unfused"]


@pytest.mark.parametrize("options", [["--resident", "no", "--input-dropout", "0.2"], ["--finetune", "autoencoder"]])
def test_a_whole_command_without_kernels_launches_none(options, tmp_path):
    """Streaming, pictures and samples, too."""
    with installed() as device:
        assert train.main([*ALL, *options, "--out", str(tmp_path / "run")]) == 0
        assert device.launched == []
    assert (tmp_path / "run" / "plots" / "samples.png").exists()


def test_kernels_come_back_after_them():
    with installed():
        import cupy

        x = cupy.zeros(3, np.float32)
        with without_kernels():
            assert twins_of(x) is unfused
            with without_kernels(False):
                assert twins_of(x) is not unfused
            assert twins_of(np.zeros(3)).__name__ == "gpudbn.reference"
        assert twins_of(x) is not unfused
