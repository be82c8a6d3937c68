"""The benchmark of an exchange: its judgement, and all of its jobs at toy size, whose times mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import exchange
from tests.helpers import assert_notices
from tests.mpi.job import TOP


def test_medians_are_held_to_goals():
    def check():
        samples = {"pull": [0.1, 0.7, 0.5], "push": [0.7, 0.61, 0.1], "step": [2.0], "first try": [0.95, 0.9, 0.1, 1.0],
                   "adagrad": [1.1], "waiting": [0.06]}
        rows = exchange.summary([samples, samples])
        assert [name for name, row in rows.items() if row["reached"]] == ["pull", "step", "first try", "adagrad"]
        assert rows["push"]["median"] == 0.61
        assert rows["first try"]["goal"] == "at least 0.9"
        assert exchange.table(rows).count(" NO") == 2

    assert_notices(check, exchange, 'if which == "at most"', "if True")


def test_figures_are_compared_with_those_beside_them():
    found = {"transfers": {"pull": [1.0, 6.0], "push": [3.0, 2.0], "message": [2.0, 3.0]},
             "contention": {"step": [5.0], "parts": [4.0], "first try": [0.75]},
             "adagrad": {"adagrad": [3.0], "passes": [2.0]}, "overlap": {"waiting": [0.01], "compute": [1.0]}}
    assert exchange.measures(found) == {"pull": [0.5, 2.0], "push": [1.5, 2 / 3], "step": [1.25], "first try": [0.75],
                                        "adagrad": [1.5], "waiting": [0.01]}


@pytest.mark.mpi
def test_toy(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"another MPI": 5}')
    done = subprocess.run([sys.executable, "-m", "benchmarks.exchange", "--repetitions", "1", "--size", "5003",
                           "--calls", "3", "--out", file], capture_output=True, text=True, check=False, cwd=TOP,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    assert results.pop("another MPI") == 5
    ((mpi, result),) = results.items()
    assert done.stdout.startswith(mpi)
    assert set(result["measures"]) == set(exchange.GOALS)
    for name, row in result["measures"].items():
        assert row["samples"] >= 5
        assert row["median"] > 0 or name in ("first try", "waiting")
    assert {"commit", "numpy", "OPENBLAS_CORETYPE", "load before"} <= set(result["machine"])
