"""The command predict under mpirun: the file of one process, byte for byte, or a clear end and no file."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

from gpudbn import DBN
from gpudbn.predict import _nameless
from tests.mpi.job import finish, job, start
from tests.test_predict import make_run

pytestmark = pytest.mark.mpi
HOST = socket.gethostname()
ROWS = 8_321  # nine blocks, the last one short; two files, so that they are split between blocks, too


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, and with labelled rows that it has not seen."""
    folder = tmp_path_factory.mktemp("predict")
    make_run(folder / "run")
    rng = np.random.default_rng(8)
    x, y = rng.random((ROWS, 64), np.float32), rng.integers(0, 10, ROWS)
    np.savez(folder / "rows.npz", x=x[:5_007], y=y[:5_007], x_test=x[5_007:], y_test=y[5_007:])
    np.save(folder / "two.npy", x[:2])
    return folder


def predict(ranks, made, out, data="rows.npz"):
    """What is printed, without the lines about the machine and the files."""
    done = finish(start(ranks, "-m", "gpudbn.predict", made / "run", "--data", made / data, "--out", out))
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in done.stdout.splitlines() if not line.startswith(("compute ", "wrote "))]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_several_ranks_write_and_say_what_one_process_does(made, tmp_path, suffix):
    said = []
    for name, ranks in (("alone", 0), ("together", 3)):
        (tmp_path / name).mkdir()
        said.append(predict(ranks, made, tmp_path / name / f"x{suffix}"))
    assert said[0] == said[1]
    assert said[0][-1].startswith("error: ")
    assert f"data       {ROWS:,} rows of rows" in said[0]
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "together").iterdir())
    for file in files:
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "together" / file).read_bytes()


def test_there_may_be_more_ranks_than_rows(made, tmp_path):
    for ranks in (0, 3):
        predict(ranks, made, tmp_path / f"{ranks}.csv", "two.npy")
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()


@pytest.mark.parametrize(("kind", "code", "text"), [
    ("fault", 1, f"replica 2 of 3 on {HOST}: Traceback (most recent call last):"),
    ("full", 2, "x.probabilities.npy: must be writable; got 'File too large'. Raise the limit on file sizes"),
    ("killed", None, ""),
])
def test_when_a_rank_fails_all_end_and_the_old_file_is_all_there_is(made, tmp_path, kind, code, text):
    (tmp_path / "x.npy").write_bytes(b"old")
    begun = time.monotonic()
    done = job(3, "predicting", kind, made / "run", "--data", made / "rows.npz", "--out", tmp_path / "x.npy")
    assert time.monotonic() - begun < 20
    assert done.returncode == code if code else done.returncode != 0
    assert text in done.stderr
    assert done.stderr.count("must be writable") == (kind == "full")
    assert "error: " not in done.stdout
    assert (tmp_path / "x.npy").read_bytes() == b"old"
    if _nameless(tmp_path) is not None:
        assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A fine-tuned model that can be cut in three, and rows."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(3)
    dbn = DBN([23, 50, 37])
    dbn.new_classifier(4)
    for parameters in (dbn.layers[0].parameters, dbn.layers[1].parameters, dbn.classifier):
        parameters.flat[...] = rng.normal(size=parameters.size)
    dbn.save(folder / "model")
    np.save(folder / "rows.npy", rng.random((2_345, 23), np.float32))
    return folder


@pytest.mark.parametrize(("ranks", "shards"), [(3, 3), (4, 2)])
def test_ranks_that_hold_a_model_together_write_the_bytes_of_one_process(large, tmp_path, ranks, shards):
    for name, count, parts in (("alone.npz", 0, 1), ("parts.npz", ranks, shards)):
        done = finish(start(count, "-m", "gpudbn.predict", large / "model", "--data", large / "rows.npy", "--out",
                            tmp_path / name, "--shards", parts, "--order", "fixed"))
        assert (done.returncode, done.stderr) == (0, "")
    assert f"; {ranks} ranks, the model in {shards} parts" in done.stdout
    assert (tmp_path / "alone.npz").read_bytes() == (tmp_path / "parts.npz").read_bytes()


def test_so_do_they_when_they_draw_samples(large, tmp_path):
    for name, count in (("alone.npy", 0), ("parts.npy", 2)):
        done = finish(start(count, "-m", "gpudbn.sample", large / "model", "--count", 30, "--steps", 20, "--out",
                            tmp_path / name, "--shards", max(1, count), "--order", "fixed"))
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "alone.npy").read_bytes() == (tmp_path / "parts.npy").read_bytes()


def test_a_mistake_of_all_ranks_is_said_once(made):
    done = finish(start(3, "-m", "gpudbn.predict", made / "run", "--data", made / "non.npy"))
    assert done.returncode == 2
    assert done.stderr.count(f"{made / 'non.npy'}: must be a file or folder; got nothing there") == 1
    assert "Traceback" not in done.stderr
