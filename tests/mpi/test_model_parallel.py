"""The benchmark of replicas in parts: its formula and its prediction, and all of it at toy size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import model_parallel
from gpudbn.local import Local
from gpudbn.mpi.costs import Costs, Hop
from gpudbn.shards import Shards
from tests.mpi.job import TOP


@pytest.mark.parametrize(("n", "fan"), [(320, 40), (331, 77), (96, 96), (4096, 256)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_formula_cuts_as_the_layers_do(n, fan, parts):
    for index in range(parts):
        class One(Shards):
            pass

        shards = One()
        shards.index, shards.count = index, parts
        layer, mine = Local(n, n, fan, shards), shards.mine(n)
        assert model_parallel.cut(n, parts, index) == (mine.start, mine.stop)
        if parts > 1:
            assert model_parallel.seen(n, fan, parts, index) == (layer.seen.start, layer.seen.stop)


def test_bytes_by_hand():
    assert model_parallel.crossing(320, 10, 1, 40) == {"sum": 0, "gather": 0, "biases": 0}
    # 20 blocks: 6, 7 and 7 of them
    assert model_parallel.crossing(320, 10, 3, 0) == {"sum": 4 * 10 * 320, "gather": 4 * 10 * 112, "biases": 0}
    # windows begin every 280 / 19: parts see 0 to 176 and 144 to 320, and own 0 to 160 and 160 to 320
    assert model_parallel.crossing(320, 10, 2, 40) == {"sum": 4 * 10 * 32, "gather": 4 * 10 * 16, "biases": 4 * 16}


def test_a_prediction_by_hand():
    costs, given = Costs(network=Hop(0.5, 100.0)), {"sum": 1200, "gather": 600, "biases": 10}
    assert model_parallel.predicted(3.0, given, 1, 0, costs) == 3.0
    # two steps each way and 3/4 of the bytes twice; two steps and what three others give
    assert model_parallel.predicted(3.0, given, 4, 0, costs) == pytest.approx(3 + 2 + 18 + 1 + 18)
    assert model_parallel.predicted(3.0, given, 4, 40, costs) == pytest.approx(3 + 12.5 + 6.5 + 0.6)


@pytest.mark.mpi
def test_toy(tmp_path):
    file = tmp_path / "x.json"
    options = ["--units=331", "--rows=7", "--local=77", "--updates=2", "--parts", "1", "3", "--predict=5"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.model_parallel", *options, "--out", file],
                          capture_output=True, text=True, check=False, cwd=TOP, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())
    for kind in ("dense", "local"):
        assert list(results[kind]) == ["1", "3", "5"]
        for parts in ("1", "3"):
            row = results[kind][parts]
            assert row["bytes"] == row["formula"]
            assert row["milliseconds"] > 0
        assert "bytes" not in results[kind]["5"]
    assert results["local"]["3"]["bytes"] < results["dense"]["3"]["bytes"]
    assert "2.2 times" in done.stdout
    assert len(results["dense"]["5"]["gains"]) == len(results["quicker"])
