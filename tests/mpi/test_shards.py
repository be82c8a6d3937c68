"""Replicas in several parts under mpirun: what they learn, where they stop, what they refuse."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from gpudbn import checkpoint, load
from tests.mpi import job
from tests.mpi.test_survive import ulfm

pytestmark = pytest.mark.mpi
SMALL = ["--layers", 40, 37, "--epochs", 2, "--finetune-epochs", 3, "--batch", 40, "--plots", "off", "--shards", 2]


def train(ranks, *arguments, code=0):
    done = job.finish(job.start(ranks, "-m", "gpudbn.train", *arguments), timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize(("options", "whole", "cuts"), [
    ([], 0, [(2, 2), (4, 2)]),
    (["--method", "pcd", "--k", 3, "--centring", "data"], 0, [(3, 3)]),
    (["--mode", "local"], 2, [(4, 2)]),
    (["--local", 24, 0], 0, [(2, 2)]),
])
def test_an_update_of_a_replica_in_parts_is_that_of_a_whole_one(options, whole, cuts, tmp_path):
    options = ["--mode", "sync", *SMALL[:-2], "--batch", 1000, "--epochs", 1, "--finetune-epochs", 1,
               "--optimiser", "sgd", *options]
    train(whole, *options, "--out", tmp_path / "whole")
    expected = load(tmp_path / "whole").arrays()
    for ranks, parts in cuts:
        out = tmp_path / f"{ranks}-{parts}"
        assert f"each in {parts} parts" in train(ranks, *options, "--shards", parts, "--out", out)
        found = load(out).arrays()
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].shape == array.shape
            assert np.abs(found[name] - array).max() < 1e-5 * max(1, np.abs(array).max()), name


def test_in_a_fixed_order_parts_and_replicas_come_to_the_bits_of_one_process(tmp_path):
    options = ["--mode", "sync", *SMALL[:-2], "--order", "fixed", "--method", "pcd"]
    train(0, *options, "--out", tmp_path / "whole")
    train(4, *options, "--shards", 2, "--out", tmp_path / "parts")
    for name, array in load(tmp_path / "whole").arrays().items():
        assert np.array_equal(array, load(tmp_path / "parts").arrays()[name]), name


def test_two_replicas_in_two_parts_each_learn_digits(tmp_path):
    out = tmp_path / "run"
    train(4, "--mode", "sync", "--shards", 2, "--layers", 100, 80, "--epochs", 10, "--finetune-epochs", 25,
          "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert next(r for r in records if r["phase"] == "test")["error"] < 0.08
    (ranks,) = [r["ranks"] for r in records if r["phase"] == "report"]
    assert len(ranks) == 4
    assert {path.stem for path in (out / "plots").iterdir()} == {
        "curves", "timeline", "filters-1", "filters-2", "samples", "reconstructions", "confusion"}
    assert load(out).layers[0].W.shape == (64, 100)


def test_two_asynchronous_replicas_in_two_parts_each_learn_digits(tmp_path):
    out = tmp_path / "run"
    assert "around a parameter server, each in 2 parts" in train(
        5, "--shards", 2, "--layers", 80, "--epochs", 5, "--finetune-epochs", 12, "--out", out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert next(r for r in records if r["phase"] == "test")["error"] < 0.15
    (ranks,) = [r["ranks"] for r in records if r["phase"] == "report"]
    assert [rank["role"] for rank in ranks] == ["server"] + 4 * ["replica"]
    assert [rank["part"] for rank in ranks[1:]] == [0, 1, 0, 1]
    assert ranks[0]["version"] == sum(ranks[0]["applied"]) - sum(ranks[0]["refused"])


@pytest.mark.parametrize("survive", [pytest.param(True, marks=ulfm), False])
def test_a_part_that_is_killed(survive, tmp_path):
    """The other replica learns all that there is, or the job ends within seconds and the launcher says whose rank."""
    out = tmp_path / "run"
    process = job.start(5, "-m", "gpudbn.train", *SMALL, "--epochs", 60, "--out", out, survive=survive)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 9):
        time.sleep(0.02)
    (ranks,) = [json.loads(line)["ranks"] for line in metrics.read_text().splitlines() if '"ranks"' in line]
    assert ranks[2]["role"] == "replica 0 of 2, part 1 of 2"
    os.kill(ranks[2]["pid"], signal.SIGKILL)  # the second part of the chief's replica
    begun = time.monotonic()
    done = job.finish(process)
    if not survive:
        assert done.returncode != 0
        assert time.monotonic() - begun < 10
        return
    assert done.returncode == 0, done.stderr
    assert "replica 0 of 2, part 1 of 2 on" in done.stderr
    assert "1 of 2 replicas go on, with its rows" in done.stderr
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["epoch"] for r in records if r["phase"] == "pretrain"] == 2 * list(range(1, 61))
    assert load(out).layers[1].W.shape == (40, 37)


def test_a_run_in_parts_resumed_ends_with_the_bits_of_one_that_never_stopped(tmp_path):
    options = [*SMALL, "--mode", "sync", "--method", "pcd", "--epochs", 30, "--checkpoint-seconds", 0]
    process = job.start(4, "-m", "gpudbn.train", *options, "--out", tmp_path / "cut")
    metrics = tmp_path / "cut/metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 35):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    job.finish(process)
    arrays, meta = checkpoint.read(tmp_path / "cut/checkpoint.safetensors", "checkpoint")
    assert (meta["index"], meta["shards"]) == (1, 2)
    assert arrays["phase.velocity#0"].size == 40 * 16 + 40 + 16
    assert arrays["phase.velocity#1"].size == 40 * 21 + 40 + 21
    train(4, "--resume", tmp_path / "cut")
    train(4, *options, "--out", tmp_path / "whole")
    for name, array in load(tmp_path / "whole").arrays().items():
        assert np.array_equal(array, load(tmp_path / "cut").arrays()[name]), name


@pytest.mark.parametrize(("ranks", "arguments", "message"), [
    (3, ["--mode", "sync"], "--shards: must divide the number of ranks; got 2 and 3. Start it with mpirun -n 2"),
    (4, [], "--shards: must divide the number of ranks, less 1 that serves; got 2 and 4. Start it with mpirun -n 3"),
    (5, ["--overlap", "on"], "--overlap: must be off with --shards 2; got on"),
    (3, ["--transport", "direct"], "--transport: must be one that works here; got direct, but what crosses between"),
    (2, ["--mode", "sync", "--order", "fixed", "--centring", "data"], "--centring: must be off with --shards 2; got"),
    (2, ["--mode", "sync", "--optimiser", "lbfgs"], "--optimiser: must be adam or adagrad or sgd with --shards 2; got"),
    (2, ["--mode", "sync", "--layers", 16, 40], "shards: a layer must have at least 17 hidden units for 2 shards; got"),
    (0, [], "--shards: must divide the number of ranks; got 2 and 1. Start it with mpirun -n 2"),
])
def test_what_parts_cannot_do_is_refused(ranks, arguments, message, tmp_path):
    said = train(ranks, *SMALL, *arguments, "--out", tmp_path / "run", code=2)
    assert said.count(message) == 1
