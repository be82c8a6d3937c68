"""Samples by the command: those of DBN.sample, from the model's distribution, as numbers and as a picture."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from gpudbn import _command, draws, plots, sample
from gpudbn.data import load
from gpudbn.dbn import DBN
from gpudbn.dbn import load as load_model
from gpudbn.mpi import wire
from gpudbn.sample import main
from gpudbn.settings import Settings
from tests.helpers import all_states, assert_notices, joint

SETTINGS = Settings(data="digits", seed=11, validation=101, test=29, layers=(7, 5))


def make_run(folder, sizes=(64, 7, 5), settings=SETTINGS, **about):
    """A run folder with a model of random weights and biases."""
    rng = np.random.default_rng(5)
    dbn = DBN(sizes)
    dbn.about |= {"image_shape": (8, 8), "data": "digits", **about}
    for rbm in dbn.layers:
        for name in rbm.parameters:
            rbm.parameters[name][...] = rng.normal(size=rbm.parameters[name].shape)
    folder.mkdir()
    dbn.save(folder / "model.safetensors")
    (folder / "settings.toml").write_text(settings.to_toml(), "utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def succeed(*arguments):
    assert main([str(a) for a in arguments]) == 0


def fail(capsys, *arguments):
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err[:-1]


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# The distribution


@pytest.mark.parametrize("binary", [False, True])
def test_visible_means_are_those_of_the_model(tmp_path, binary):
    path, out, chains = tmp_path / "tiny.safetensors", tmp_path / "x.npy", 2000
    rng = np.random.default_rng(8)
    dbn = DBN([4, 3])
    rbm = dbn.layers[0]
    rbm.W[...] = rng.normal(size=(4, 3))
    rbm.b[...] = (0.7, -0.4, 0.1, -1.1)
    rbm.c[...] = (-0.3, 0.5, 0.2)
    exact = np.exp(joint(rbm.W, rbm.b, rbm.c)).sum(axis=1) @ all_states(4)

    def check():
        succeed(path, "--count", chains, "--steps", 200, "--seed", 2, "--out", out, *(["--binary"] if binary else []))
        found = np.load(out)
        assert found.shape == (chains, 4)
        assert found.dtype == np.float32
        assert set(np.unique(found)) == {0, 1} if binary else ((found > 0) & (found < 1)).all()
        z = (found.mean(axis=0) - exact) / (found.std(axis=0) / np.sqrt(chains))
        assert (np.abs(z) < 4).all(), z  # chains are independent of each other

    dbn.save(path)
    check()
    rbm.b[2] += 0.4  # a wrong bias in the file
    dbn.save(path)
    with pytest.raises(AssertionError):
        check()


def test_binary_samples_follow_the_probabilities(run, tmp_path):
    def check():
        common = (run, "--count", 500, "--steps", 3, "--seed", 6)
        succeed(*common, "--out", tmp_path / "p.npy")
        succeed(*common, "--out", tmp_path / "x.npy", "--binary")
        p, x = np.load(tmp_path / "p.npy").astype(float), np.load(tmp_path / "x.npy")
        assert set(np.unique(x)) == {0, 1}
        z = (x - p).sum(axis=0) / np.sqrt((p * (1 - p)).sum(axis=0))
        assert (np.abs(z) < 4.5).all()
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / 64)

    assert_notices(check, sample, "bernoulli(samples, samples,", "bernoulli(samples, 1 - samples,")


@pytest.mark.parametrize("sizes", [(64, 7), (64, 7, 5)])
def test_no_draw_is_made_twice(tmp_path, monkeypatch, sizes):
    run = make_run(tmp_path / "run", sizes)
    seen = []
    at = draws._Stream.at

    def watched(self, seed, update, site, index, blocks):
        seen.append((seed, update, site, index))
        return at(self, seed, update, site, index, blocks)

    monkeypatch.setattr(draws._Stream, "at", watched)

    def check():
        seen.clear()
        succeed(run, "--count", 3, "--steps", 4, "--binary", "--out", tmp_path / "x.npy")
        assert len(seen) >= 9
        assert len(set(seen)) == len(seen)

    check()
    if len(sizes) == 2:
        assert_notices(check, sample, "site(Purpose.SAMPLING, 0, 3)", "site(Purpose.SAMPLING, 0, 0)")


# The same as from Python


def test_samples_are_those_of_the_model(run, tmp_path, capsys):
    succeed(run, "--count", 13, "--steps", 17, "--seed", 9, "--out", tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_model(run).sample(13, steps=17, seed=9))
    lines = capsys.readouterr().out.splitlines()
    assert "chains     13 of 17 Gibbs steps from the biases, seed 9" in lines
    assert lines[-1] == f"wrote      {tmp_path / 'x.npy'}: 13 samples, as probabilities"


@pytest.mark.parametrize("more", [(), ("--data", "digits")])
def test_chains_that_start_at_the_test_rows(run, tmp_path, capsys, more):
    succeed(run, "--count", 31, "--steps", 2, "--start", "data", "--out", tmp_path / "x.npy", *more)
    test = load("digits", validation=SETTINGS.validation, test=SETTINGS.test, seed=SETTINGS.seed).test
    rows = np.empty((31, 64), np.float32)
    test.take(np.arange(31) % 29, rows)  # two more chains than rows
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_model(run).sample(31, steps=2, start=rows))
    assert "from the test rows of digits" in capsys.readouterr().out


def test_chains_that_start_at_rows_of_a_file(run, tmp_path):
    rows = np.random.default_rng(0).random((3, 64), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    succeed(run, "--count", 3, "--steps", 1, "--start", "data", "--data", tmp_path / "rows.npy",
            "--out", tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_model(run).sample(3, steps=1, start=rows))


# Pictures


def test_by_default_a_picture_in_the_folder(run, tmp_path, capsys):
    command = ("--count", 7, "--steps", 2)
    succeed(run, *command)
    assert is_picture(run / "samples.png")
    assert f"wrote      {run / 'samples.png'}: 7 samples" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    (run / "model.safetensors").rename(tmp_path / "elsewhere/m.safetensors")
    succeed(tmp_path / "elsewhere/m.safetensors", *command)
    assert is_picture(tmp_path / "elsewhere/samples.png")
    # again, over the old one, and nothing else there
    succeed(tmp_path / "elsewhere/m.safetensors", *command)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["m.safetensors", "samples.png"]


@pytest.mark.parametrize(("start", "about", "drawn"), [
    ("random", {}, ["mosaic"]),
    ("data", {}, ["mosaic", "mosaic"]),
    ("random", {"image_shape": None}, []),
    ("data", {"image_shape": None}, []),
    ("random", {"image_shape": (7, 9)}, []),  # not of these columns
])
def test_pictures_show_the_first_hundred(tmp_path, monkeypatch, capsys, start, about, drawn):
    run = make_run(tmp_path / "run", **about)
    mosaic, shown = plots.mosaic, []

    def watched(images, columns):
        shown.append(images)
        return mosaic(images, columns)

    monkeypatch.setattr(plots, "mosaic", watched)
    succeed(run, "--count", 103, "--steps", 2, "--start", start, "--out", tmp_path / "x.png")
    assert is_picture(tmp_path / "x.png")
    assert [images.shape for images in shown] == [(100, 8, 8)] * len(drawn)
    assert "the first 100 of 103 samples" in capsys.readouterr().out
    succeed(run, "--count", 103, "--steps", 2, "--start", start, "--out", tmp_path / "x.npy")
    if drawn:
        assert np.array_equal(shown[-1].reshape(100, 64), np.load(tmp_path / "x.npy")[:100])


def test_without_matplotlib_numbers_only(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: "Matplotlib cannot be imported")
    assert fail(capsys, run) == (f"--out: must be an .npy file, for no picture can be drawn; got {run / 'samples.png'}."
                                 " Matplotlib cannot be imported")
    succeed(run, "--steps", 1, "--out", tmp_path / "x.npy")


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_drawn_on_a_terminal_only(monkeypatch):
    for stream, expected in ((Terminal(), "\r\x1b[Ksample [####" + "." * 26 + "] 4/30\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with _command.Progress("sample", 30) as progress:
            progress.at(3)  # too early
            progress.drawn -= 1
            progress.at(4)
            progress.at(5)  # too soon
        assert stream.getvalue() == expected


def test_every_step_is_told_and_changes_nothing(run):
    seen = []
    dbn = load_model(run)
    before = dbn.sample(3, steps=6, seed=1)
    assert np.array_equal(dbn.sample(3, steps=6, seed=1, progress=seen.append), before)
    assert seen == [1, 2, 3, 4, 5]


# Errors


@pytest.mark.parametrize(("arguments", "expected"), [
    ([], "python -m gpudbn.sample: must be given MODEL"),
    (["RUN", "--count", "0"], "--count: must be at least 1; got 0"),
    (["RUN", "--count", "ten"], "--count: must be a whole number; got 'ten'"),
    (["RUN", "--count", "1.5"], "--count: must be a whole number; got '1.5'"),
    (["RUN", "--count", "1000000000000"], "--count: must be chains that fit into memory together; got 1000000000000"),
    (["RUN", "--steps", "0"], "--steps: must be at least 1; got 0"),
    (["RUN", "--steps", "4294967296"], "--steps: must be below 4294967296"),
    (["RUN", "--seed", "-1"], "--seed: must lie in [0, 2**64); got -1"),
    (["RUN", "--step", "4"], "got --step. Did you mean --steps?"),
    (["RUN", "--start", "date"], "--start: must be one of random, data; got date. Did you mean data?"),
    (["RUN", "--data", "digits"], "--data: must stand with --start data; got --start random"),
    (["RUN", "--start", "data", "--data", "TMP/wide.npy"], "--data: must have the 64 columns of the model; got 65"),
    (["RUN", "--start", "data", "--data", "TMP/wide.npy", "--out", "TMP/wide.npy"], "--out: must not replace what"),
    (["TMP/alone.safetensors", "--start", "data"], "--data: must say at which rows to start, as the run of the model"),
    (["RUN", "--out", "x.jpg"], "--out: must end in .npy or .png, which says the format; got x.jpg"),
    (["RUN", "--out", "TMP/no/x.png", "--steps", "1"], "no/x.png: must be writable; got 'No such file or directory'"),
    (["RUN", "--out", "TMP/no/x.npy", "--steps", "1"], "no/x.npy: must be writable; got 'No such file or directory'"),
    (["TMP/short.safetensors"], "must be a whole safetensors file; got one that is cut short"),
    (["TMP/runn"], "runn: must be a model file; got no such file. Did you mean RUN?"),
])
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, expected):
    np.save(tmp_path / "wide.npy", np.eye(65, dtype=np.float32))
    model = (run / "model.safetensors").read_bytes()
    (tmp_path / "alone.safetensors").write_bytes(model)
    (tmp_path / "short.safetensors").write_bytes(model[:-9])
    before = sorted(tmp_path.rglob("*"))
    line = fail(capsys, *(a.replace("RUN", str(run)).replace("TMP", str(tmp_path)) for a in arguments))
    assert expected.replace("RUN", str(run)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pretrained_model_is_enough_but_several_ranks_are_too_many(run, capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    assert fail(capsys, run) == (
        "--shards: must be the number of ranks, which draw all samples together; got 1 and 2. Start it without mpirun, "
        "or with -n 1")
    monkeypatch.setattr(wire, "GRACE", 0.0)  # in which rank 0 says it and the job ends
    monkeypatch.setenv("PMI_RANK", "1")
    assert fail(capsys, run).startswith(f"rank 1 of 2 on {socket.gethostname()}: --shards: must be the number")
    monkeypatch.setenv("PMI_RANK", "0")
    assert fail(capsys, run, "--shards", 3).endswith("; got 3 and 2. Start it with mpirun -n 3")
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert main([str(run), "--count", "2", "--steps", "1"]) == 0


def test_as_a_command(run, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI_"))}
    done = subprocess.run([sys.executable, "-m", "gpudbn.sample", run, "--count", "5", "--steps", "3", "--out",
                           tmp_path / "x.npy", "--threads", "1"], check=False, capture_output=True, text=True,
                          env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"wrote      {tmp_path / 'x.npy'}: 5 samples, as probabilities"
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_model(run).sample(5, steps=3))
