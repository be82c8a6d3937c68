"""The benchmarks run, at toy sizes: that they measure something is for the machine to say on which they are run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import autoencoder, peers
from gpudbn.data import load

TOP = Path(__file__).parents[1]


def run(*words):
    """What ``python -m benchmarks.WORD ...`` prints, from the top of the tree as its documentation has it."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The file of a toy run of ``benchmarks.peers``, and what it printed."""
    out = tmp_path_factory.mktemp("peers") / "peers.json"
    return out, run("benchmarks.peers", "--toy", "--out", out)


def test_peers_measures_what_is_here_and_names_what_is_not(told):
    out, printed = told
    content = json.loads(out.read_text())
    measured = set(content["samples"]["epoch"]["unset"])
    absent = {name for name in content["not measured"] if name in peers.EPOCH}
    assert measured | absent == set(peers.EPOCH)
    assert measured >= {"gpudbn", "gpudbn, PCD-1", "five products alone"}
    assert content["failed"] == {}
    assert all(name in printed for name in [*measured, *absent])
    for samples in content["samples"]["epoch"]["unset"].values():
        (one,) = samples
        assert 0 < one["seconds"] < 60
        assert one["peak MB"] >= one["MB before"] > 10
    (ours,) = content["samples"]["epoch"]["unset"]["gpudbn"]
    assert ours["with measures"] > ours["seconds"]
    (network,) = content["samples"]["error"]["unset"]["gpudbn"]
    assert len(network["curve"]) == peers.ERROR["gpudbn"].options["epochs"]
    (sizes,) = content["samples"]["size"]["unset"]["gpudbn"]
    assert set(sizes["against"]) == set(peers.DOUBLED)
    assert all(len(one["gpudbn"]) == len(one["values"]) for one in sizes["against"].values())


def test_peers_repeats_nothing_that_is_in_its_file(told):
    out, _ = told
    before = json.loads(out.read_text())
    again = run("benchmarks.peers", "--toy", "--out", out)
    assert "goes on" in again
    assert json.loads(out.read_text()) == before


def test_peers_begins_anew_with_another_size(told, tmp_path):
    out = tmp_path / "peers.json"
    content = json.loads(told[0].read_text())
    content["layer"]["hidden"] += 1
    out.write_text(json.dumps(content))
    results = peers.Results(out, {**json.loads(told[0].read_text()), "samples": {}})
    assert results.content["samples"] == {}


def test_every_program_learns(told):
    """After a few epochs rows are nearer to their reconstructions than to 1/2 everywhere, where all begin."""
    rows = load("digits", validation=0).train
    x = np.empty((peers.TOY["rows"], rows.n), np.float32)
    rows.take(np.arange(len(x)), x)
    halves = float(((x - 0.5) ** 2).sum(axis=1).mean())
    samples = json.loads(told[0].read_text())["samples"]["epoch"]["unset"]
    found = {name: one["reconstruction"] for name, (one,) in samples.items() if one["reconstruction"] is not None}
    assert set(found) == set(samples) - {"five products alone"}
    assert all(value < halves - 0.1 for value in found.values()), (found, halves)


def test_ratios_are_of_the_same_repetition():
    def samples(*seconds):
        return [{"seconds": each, "peak MB": 10 * each, "MB before": 1, "others": each / 100} for each in seconds]

    content = {"samples": {"epoch": {"unset": {"gpudbn": samples(1, 2, 4), "other": samples(3, 4, 4)}}}}
    row = peers.summary(content)["epoch"]["unset"]["other"]
    assert row["of ours"] == [2, 1, 3]
    assert row["seconds"] == [4, 3, 4]
    assert row["others"] == 0.04


def test_a_target_is_reached_by_all_repetitions_or_not():
    curves = [[[1, 0.3], [2, 0.04], [3, 0.021]], [[2, 0.045], [4, 0.02]]]
    content = {"samples": {"error": {"unset": {"one": [{"curve": curve, "peak MB": 1} for curve in curves]}}}}
    row = peers.summary(content)["error"]["unset"]["one"]
    assert row["5 %"] == [2, 2, 2]
    assert row["3 %"] == [3.5, 3, 4]
    assert row["2 %"] is None


def test_a_program_that_fails_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "PARTS", {"epoch": ({"nobody": peers.Program(peers.products)}, peers.epoch)})
    monkeypatch.setattr(sys, "argv", ["peers", "--toy", "--out", str(tmp_path / "peers.json"), "--parts", "epoch"])
    assert peers.main() == 1
    assert "FAILED: epoch: nobody: code 1: KeyError: 'nobody'" in capsys.readouterr().out


def test_a_program_without_its_package_or_gpu_is_not_run():
    assert peers.missing(peers.Program(peers.products, needs=("no_such_package",)), gpu=True) == \
        "no_such_package not installed"
    assert peers.missing(peers.Program(peers.products, device="cuda"), gpu=False) == "no GPU here"
    assert peers.missing(peers.Program(peers.products), gpu=False) is None


def test_autoencoder_spends_no_more_gradients_than_it_has(tmp_path, monkeypatch, capsys):
    """Each optimiser from the same stack; a run that is in the file is not repeated."""
    monkeypatch.setattr(autoencoder, "SETTINGS", {
        "lbfgs": [{"finetune_batch": 70, "line_searches": 3}, {"finetune_batch": 500, "line_searches": 50}],
        "cg": [{"finetune_batch": 70, "line_searches": 3}, {"finetune_batch": 500, "line_searches": 50}],
        "adam": [{"finetune_batch": 10, "finetune_learning_rate": rate} for rate in (1e-3, 1e-2)],
        "sgd": [{"finetune_batch": 10, "finetune_learning_rate": rate} for rate in (1e-2, 1e38)]})
    out = tmp_path / "results.json"
    arguments = ["x", "--data", "digits", "--rows", "200", "--validation", "50", "--layers", "20", "5", "--epochs", "1",
                 "--passes", "6", "--budget", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    autoencoder.main()
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 8
    assert all(3 <= run["passes"] <= 6 for run in runs if run["validation_loss"] is not None)
    assert [run["optimiser"] for run in runs if run["validation_loss"] is None] == ["sgd"]
    assert all(run["curve"][0] == runs[0]["curve"][0] for run in runs), "they begin with the same"
    learned = {run["optimiser"] for run in runs if (run["validation_loss"] or np.inf) < run["curve"][0][1]}
    assert learned == set(autoencoder.SETTINGS)
    said = capsys.readouterr().out
    assert said.count("**") == 2 * 3 * 4
    assert "| sgd | batch 10, learning rate 1e+38 |" in said
    autoencoder.main()
    assert json.loads(out.read_text())["runs"] == runs
    monkeypatch.setattr("sys.argv", [*arguments[:-1], str(out), "--passes", "7"])
    with pytest.raises(SystemExit):
        autoencoder.main()
