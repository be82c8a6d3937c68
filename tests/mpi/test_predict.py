"""The command predict under mpirun: the file of one process, byte for byte, or a clear end and no file."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

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


def test_a_mistake_of_all_ranks_is_said_once(made):
    done = finish(start(3, "-m", "gpudbn.predict", made / "run", "--data", made / "non.npy"))
    assert done.returncode == 2
    assert done.stderr.count(f"{made / 'non.npy'}: must be a file or folder; got nothing there") == 1
    assert "Traceback" not in done.stderr
