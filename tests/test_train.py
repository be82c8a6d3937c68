"""The command ``gpudbn.train``: what it makes, what it prints, what it refuses, what survives."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from gpudbn import checkpoint, load
from gpudbn.loop import Training
from gpudbn.train import main

SMALL = ["--layers", "17", "11", "--epochs", "2", "--finetune-epochs", "3", "--batch", "50", "--plots", "off"]


def run(capsys, *arguments):
    code = main([*SMALL, *map(str, arguments)] if "--resume" not in arguments else list(map(str, arguments)))
    return code, *capsys.readouterr()


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start(*arguments, **options):
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "gpudbn.train", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, **options)


def test_a_run_leaves_settings_metrics_checkpoint_model_and_pictures_and_says_what_to_try_next(tmp_path, capsys):
    out = tmp_path / "run"
    code, said, err = run(capsys, "--out", out, "--plots", "on")
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert "DBN 64 - 17 - 11: 1,384 parameters (1,169, 215)" in lines[0]
    assert {p.name for p in out.iterdir()} == {"settings.toml", "metrics.jsonl", "checkpoint.safetensors",
                                               "model.safetensors", "plots"}
    assert {p.stem for p in (out / "plots").iterdir()} == {"filters-1", "filters-2", "samples", "reconstructions",
                                                           "curves", "confusion"}
    assert [r["phase"] for r in records(out)] == ["pretrain"] * 4 + ["finetune"] * 3 + ["test", "report"]
    error = next(r["error"] for r in records(out) if r["phase"] == "test")
    assert lines[-3].startswith(f"test error: {100 * error:.2f} %")
    assert lines[-2] == f"try next: python -m gpudbn.sample {out}"
    assert lines[-1].strip() == f"python -m gpudbn.predict {out} --data digits"
    model = load(out)
    assert model.sizes == [64, 17, 11]
    assert model.about["image_shape"] == [8, 8]


def test_the_settings_of_a_run_make_the_same_run_again(tmp_path, capsys):
    run(capsys, "--out", tmp_path / "a", "--method", "pcd", "--k", 2, "--seed", 5)
    assert main(["--config", str(tmp_path / "a/settings.toml"), "--out", str(tmp_path / "b")]) == 0
    for name, array in load(tmp_path / "a").arrays().items():
        assert np.array_equal(array, load(tmp_path / "b").arrays()[name])


def test_an_interrupt_leaves_a_checkpoint_and_the_resumed_run_ends_with_the_same_bits(tmp_path):
    options = ["--layers", 200, 100, "--epochs", 12, "--finetune-epochs", 8, "--plots", "off", "--threads", 1]
    whole = start(*options, "--out", tmp_path / "whole")
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    process = start(*options, "--out", tmp_path / "cut", "--checkpoint-seconds", 1000)
    for line in process.stdout:
        if line.startswith("layer 1   epoch   4"):
            process.send_signal(signal.SIGINT)
            break
    said, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"go on with: python -m gpudbn.train --resume {tmp_path / 'cut'}".lower() in said.lower()
    assert "stopping; Ctrl-C again to stop at once" in err
    assert not (tmp_path / "cut/model.safetensors").exists()
    resumed = start("--resume", tmp_path / "cut")
    said, err = resumed.communicate(timeout=300)
    assert (resumed.returncode, err) == (0, "")
    for name, array in load(tmp_path / "whole").arrays().items():
        assert np.array_equal(array, load(tmp_path / "cut").arrays()[name]), name

    def timeless(folder):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder) if r["phase"] != "report"]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    options = ["--layers", 100, "--epochs", 40, "--finetune-epochs", 3, "--plots", "off", "--checkpoint-seconds", 0]
    process = start(*options, "--out", tmp_path / "run")
    for line in process.stdout:
        if line.startswith("layer 1   epoch  10"):
            process.kill()
            break
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    resumed = start("--resume", tmp_path / "run")
    said, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0
    assert "layer 1   epoch   1/" not in said, "it did not begin anew"
    epochs = [r["epoch"] for r in records(tmp_path / "run") if r["phase"] == "pretrain"]
    assert epochs == list(range(1, 41)), "each epoch is recorded once"


def test_a_resumed_run_keeps_its_checkpoint_until_it_has_another(tmp_path, capsys, monkeypatch):
    """The one it has knows velocities and chains, which the run takes up only when it goes on."""
    training_run, left = Training.run, iter([2, 0])

    def stopped(training):
        yield from itertools.islice(training_run(training), next(left))
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", stopped)
    assert run(capsys, "--out", tmp_path / "run", "--checkpoint-seconds", 0)[0] == 130
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    assert run(capsys, "--resume", tmp_path / "run")[0] == 130
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before


def test_a_finished_run_may_be_resumed_and_says_the_same(tmp_path, capsys):
    _, said, _ = run(capsys, "--out", tmp_path / "run")
    code, again, _ = run(capsys, "--resume", tmp_path / "run")
    assert code == 0
    assert [s for s in said.splitlines() if s.startswith("test error")] == \
           [s for s in again.splitlines() if s.startswith("test error")]


def test_a_full_disk_ends_the_run_with_one_line_and_the_earlier_checkpoint_whole(tmp_path):
    def limit():  # room for the settings and the first checkpoint, not for those of a larger later phase
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    process = start("--layers", 64, 256, "--epochs", 1, "--finetune-epochs", 3, "--optimiser", "adam", "--plots", "off",
                    "--checkpoint-seconds", 0, "--out", tmp_path / "run", preexec_fn=limit)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert "checkpoint.safetensors: must be writable; got 'File too large'" in err
    arrays, meta = checkpoint.read(tmp_path / "run/checkpoint.safetensors", "checkpoint")
    assert meta["epoch"] >= 0
    assert "layers.0.W" in arrays
    resumed = start("--resume", tmp_path / "run")
    resumed.communicate(timeout=300)
    assert resumed.returncode == 0


def test_parameters_that_are_not_finite_end_with_code_3_and_keep_the_checkpoint(tmp_path, capsys):
    code, said, err = run(capsys, "--out", tmp_path / "run", "--learning-rate", 0.1, 1e30, "--decay", 1e-3)
    assert code == 3
    assert err.startswith("layer 2: parameters must stay finite; got NaN or infinity by update ")
    assert len(err.splitlines()) == 1
    assert f"--resume {tmp_path / 'run'}" in said
    _, meta = checkpoint.read(tmp_path / "run/checkpoint.safetensors", "checkpoint")
    assert meta["index"] in (0, 1)


@pytest.fixture
def bad(tmp_path):
    """Files that are wrong, each in its own way."""
    x = np.random.default_rng(0).uniform(size=(30, 6)).astype(np.float32)
    y = np.arange(30) % 3
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "short.npy", y[:-1])
    np.save(tmp_path / "nan.npy", np.where(x > 0.99, np.nan, x) if (x > 0.99).any() else x * np.nan)
    np.save(tmp_path / "wide.npy", x * 3)
    np.save(tmp_path / "constant.npy", np.full((30, 6), 0.5, np.float32))
    np.savez(tmp_path / "two.npz", x=x, y=y)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    (tmp_path / "idx").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
                 "t10k-labels-idx1-ubyte"):
        (tmp_path / "idx" / name).write_bytes(b"\0\0\x0d\x03" + bytes(12))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), [
    ("--data {}/x.np", "must be a file or folder; got nothing there. Did you mean"),
    ("--data digit", "Did you mean digits"),
    ("--data {}/cut.npy", "cut.npy"),
    ("--data {}/idx", "magic"),
    ("--data {}/nan.npy --finetune-epochs 0", "must lie in [0, 1]; got nan"),
    ("--data {}/wide.npy --finetune-epochs 0", "must lie in [0, 1]; got"),
    ("--data {}/constant.npy --finetune-epochs 0", "rows must differ; got 30 with the same values"),
    ("--data {}/x.npy", "labels: must be there for fine-tuning"),
    ("--data {0}/x.npy --labels {0}/short.npy", "29"),
    ("--data {0}/x.npy --labels {0}/none.npy", "none.npy"),
    ("--data {}/two.npz --finetune-data digits", "--finetune-data: must have the 6 columns of --data; got 64"),
    ("--validation 5000", "must leave at least one training row"),
    ("--out {}/full", "must be a new or empty folder; got one that holds note.txt"),
    ("--out {}/file", "must be a new or empty folder; got a file"),
    ("--out {}/file/run", "must be a folder that can be made"),
    ("--out /proc/gpudbn", "must be a folder that can be made"),
    ("--resume {}/full", "has no settings.toml"),
    ("--resume {}/nowhere", "must be a run folder"),
    ("--device gpu", "--device: must be one that is there; got gpu"),
    ("--layers 0", "--layers: must be at least 1; got 0"),
])
def test_what_is_wrong_is_one_line_and_code_2(arguments, message, bad, capsys):
    if arguments == "--device gpu":
        from gpudbn.arrays import why_no_gpu
        if why_no_gpu() is None:
            pytest.skip("there is a GPU")
    given = arguments.format(bad).split()
    extra = ["--out", str(bad / "run")] if not {"--out", "--resume"} & set(given) else []
    code, _, err = run(capsys, *given, *extra)
    assert code == 2, err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "newer", "other"])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(damage, tmp_path, capsys):
    run(capsys, "--out", tmp_path / "run")
    file = tmp_path / "run/checkpoint.safetensors"
    whole = file.read_bytes()
    changed = {"cut": whole[:-100], "newer": whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
               "other": (tmp_path / "run/model.safetensors").read_bytes()}[damage]
    assert changed != whole
    file.write_bytes(changed)
    code, _, err = run(capsys, "--resume", tmp_path / "run")
    assert code == 2
    assert {"cut": "cut short or damaged", "newer": "newer", "other": "model"}[damage] in err
    assert len(err.splitlines()) == 1
    assert file.read_bytes() == changed


def test_the_number_of_blas_threads_is_set_before_numpy_loads(tmp_path):
    code = ("import os, sys; from gpudbn.train import main; assert 'numpy' not in sys.modules;"
            f"main({[*SMALL, '--threads', '1', '--out', str(tmp_path / 'run')]!r});"
            "print('threads', os.environ['OPENBLAS_NUM_THREADS'])")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, timeout=60,
                          check=True)
    assert done.stdout.endswith("threads 1\n")


def test_the_defaults_learn_the_digits(tmp_path):
    process = start("--out", tmp_path / "run", "--plots", "off")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    error = next(r["error"] for r in records(tmp_path / "run") if r["phase"] == "test")
    assert error < 0.05, said
