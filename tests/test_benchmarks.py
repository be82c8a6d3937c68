"""The benchmarks run, at toy sizes: that they measure something is for the machine to say on which they are run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import autoencoder, peers, report, scaling, talk, tracing
from gpudbn.data import load
from gpudbn.mpi.costs import Compute, Costs

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
    assert set(found) == set(samples) - {"five products alone", "five products alone, PyTorch"}
    assert all(value < halves - 0.1 for value in found.values()), (found, halves)


def test_ratios_are_of_the_same_repetition():
    def samples(*seconds):
        return [{"seconds": each, "peak MB": 10 * each, "MB before": 1, "others": each / 100} for each in seconds]

    content = {"samples": {"epoch": {"unset": {"gpudbn": samples(1, 2, 4), "other": samples(3, 4, 4),
                                               "gpudbn, numba": samples(0.5, 1, 4)}}}}
    row = peers.summary(content)["epoch"]["unset"]["other"]
    assert row["of ours"] == [2, 1, 3]
    assert row["of ours, numba"] == [4, 1, 6]
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


@pytest.mark.parametrize(("others", "kept"), [((0.9, 0.1), 0.1), ((0.9, 0.8, 0.7), 0.7)])
def test_a_sample_beside_others_is_taken_again(tmp_path, monkeypatch, others, kept):
    left, out = iter(others), tmp_path / "peers.json"
    monkeypatch.setattr(peers, "PARTS", {"epoch": ({"gpudbn": peers.Program(peers.ours)}, peers.epoch)})
    monkeypatch.setattr(peers, "sample", lambda *_: {"seconds": 1, "others": next(left), "peak MB": 2, "MB before": 1})
    monkeypatch.setitem(peers.TOY, "attempts", 3)
    monkeypatch.setattr(sys, "argv", ["peers", "--toy", "--out", str(out), "--parts", "epoch"])
    assert peers.main() == 0
    (one,) = json.loads(out.read_text())["samples"]["epoch"]["unset"]["gpudbn"]
    assert one["others"] == kept
    assert list(left) == []


def test_a_program_without_its_package_or_gpu_is_not_run():
    assert peers.missing(peers.Program(peers.products, needs=("no_such_package",)), gpu=True) == \
        "no_such_package not installed"
    assert peers.missing(peers.Program(peers.products, device="cuda"), gpu=False) == "no GPU here"
    assert peers.missing(peers.Program(peers.products), gpu=False) is None


# -- the others; those of exchanges and of GPUs are in tests/mpi and in test_gpu_path.py --------------


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


def test_mnist_runs(tmp_path):
    out = tmp_path / "mnist.json"
    toy = ["--layers", 8, "--epochs", 1, "--finetune-epochs", 1]
    printed = run("benchmarks.mnist", "--data", "digits", "--ways", "single", "--seeds", 1, "--out", out, "--", *toy)
    assert "single   seed 1" in printed
    assert 0 < json.loads(out.read_text())["runs"][0]["error"] <= 1


def test_autoencoder_runs_and_is_shown(tmp_path):
    out = tmp_path / "autoencoder.json"
    run("benchmarks.autoencoder", "--data", "digits", "--rows", 100, "--validation", 50, "--layers", 8, 4,
        "--epochs", 1, "--passes", 2, "--budget", 1, "--out", out)
    assert len(json.loads(out.read_text())["runs"]) == 4
    assert "lbfgs" in report.make(tmp_path, tmp_path)


@pytest.mark.mpi
def test_simulation_runs(tmp_path):
    out = tmp_path / "simulation.json"
    run("benchmarks.simulation", "--data", "digits", "--networks", "784-300-10", "--ways", "sync 2", "--times", 1,
        "--tries", 1, "--patience", 0, "--seconds", 1, "--out", out)
    assert json.loads(out.read_text())["networks"][0]["ways"][0]["ratios"]["seconds"] > 0
    assert "| sync 2 |" in report.make(tmp_path, tmp_path)


TOY_COSTS = Costs(phases=(Compute((1e-3, 1e-5), (1e-3, 1e-5), (1e-4, 0), (0, 1e-6)),) * 2, node=2)
TOY_NETWORK = {"layers": [16], "batch": 10, "optimiser": "sgd", "finetune_momentum": 0.0, "momentum": [0.0],
               "finetune_learning_rate": 0.5, "dropout": 0.0}


@pytest.mark.parametrize(("mode", "workers"), [("async", 3), ("sync", 2), ("local", 2), ("async", 1)])
def test_a_simulated_point_ends_with_its_last_target(mode, workers):
    data = scaling.digits("digits", 1000)
    servers = 0 if workers == 1 else 1
    found = scaling.simulated(data, {**TOY_NETWORK, "mode": mode, "servers": max(1, servers)}, TOY_COSTS,
                              workers=workers, rows=1000, seen=300, targets=[0.5, 0.3], most=10_000)
    assert list(found["reached"]) == ["50", "70"]
    (early, fewer, _), (late, more, rows) = found["reached"].values()
    assert found["pretraining"][0] < early < late
    assert fewer < more < 10_000
    assert rows == more * 10
    assert found["curve"][-1][-1] <= 0.3 < found["curve"][-2][-1]
    assert found["curve"][-1][:3] == found["quick"][-1][:3] == [late, more, rows]
    assert 0.9 < sum(found["share"].values()) <= 1.001


def test_a_point_that_does_not_get_there_ends_all_the_same():
    data = scaling.digits("digits", 100)
    found = scaling.simulated(data, TOY_NETWORK | {"mode": "async"}, TOY_COSTS, workers=2, rows=100, seen=100,
                              targets=[0.01], most=100)
    assert found["reached"] == {}
    assert 100 <= found["end"][1] < 105
    rate = {"finetune_learning_rate": 1e30}
    failed = scaling.simulated(data, TOY_NETWORK | {"mode": "async"} | rate, TOY_COSTS, workers=2, rows=100, seen=100,
                               targets=[0.01], most=100)
    assert "must stay finite" in failed["failed"]


def test_partitions_are_of_one_size_and_passed_several_times():
    data = scaling.digits("digits", 100)
    first, second = data.sets(7, rows=100, seen=50, batch=5)
    assert len(first.train) == 56
    shards = [second.train.shard(i, 7).index for i in range(7)]
    assert {len(shard) for shard in shards} == {15 * (scaling.MEETING * 5 * 7 // 100)}
    assert [len(set(shard.tolist())) for shard in shards] == [15] * 7
    assert set(np.concatenate(shards).tolist()) == set(range(100))


def test_more_rows_than_there_are_have_shifted_pictures():
    data = load("digits", validation=0).train
    made = scaling.digits("digits", 2 * len(data) + 5)
    assert len(made.x) == len(made.y) == 2 * len(data) + 5
    own, others = made.x[:5].reshape(-1, 8, 8), made.x[len(data) : len(data) + 5].reshape(-1, 8, 8)
    assert np.array_equal(made.y[: len(data)], made.y[len(data) : 2 * len(data)])
    ways = set()
    for one, other in zip(own, others, strict=True):
        padded = np.pad(one, 2)
        places = [(i, j) for i in range(5) for j in range(5)
                  if np.array_equal(padded[i : i + 8, j : j + 8], other)]
        assert places, "each is a shift of its own"
        ways.update(places[:1])
    assert len(ways) > 2


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """The file of a toy run of ``benchmarks.scaling``, and what it printed."""
    folder = tmp_path_factory.mktemp("scaling")
    costs, out = folder / "costs.toml", folder / "scaling.json"
    costs.write_text(TOY_COSTS.to_toml())
    words = ["--toy", "--costs", costs, "--parts", "search", "goals", "passes", "levers", "--out", out]
    return out, words, run("benchmarks.scaling", *words)


def test_scaling_goes_through_all_points_and_repeats_none(scaled):
    out, words, printed = scaled
    content = json.loads(out.read_text())
    assert [len(content[part]) for part in ("search", "goals", "passes", "levers")] == [3, 9, 2, 8]
    assert len({len(one["trials"]) for one in content["search"].values()}) == 1, "as many trials for each"
    assert all(one["seed"] == 2 for part in ("goals", "levers") for one in content[part].values())
    assert printed.count(" left") == 22
    assert "begun anew" not in printed
    again = run("benchmarks.scaling", *words)
    assert "goes on" in again
    assert " left" not in again
    assert json.loads(out.read_text()) == content


def test_scaling_is_shown(scaled):
    page = report.make(scaled[0].parent, scaled[0].parent)
    for line in ("| one worker, 1 |", "| compensated for delay | 2 |", "Chosen: **bold**"):
        assert line in page
    assert {path.name for path in scaled[0].parent.glob("*.png")} == {"scaling.png", "scaling-parts.png",
                                                                    "scaling-levers.png"}


@pytest.mark.parametrize(("mode", "workers"), [("sync", 4), ("async", 5)])
def test_time_is_updates_one_after_another_times_what_each_takes(mode, workers):
    point = {"workers": workers, "settings": {"mode": mode}, "pretraining": [2.0, 7], "reached": {"90": [8.0, 300, 1]}}
    each, millis = report.parts_of(point, "90")
    assert each == (300 if mode == "sync" else 60)
    assert 2 + each * millis / 1e3 == pytest.approx(8)


def test_the_best_trial_is_the_quickest_or_errs_least():
    def trial(batch, *, last=None, error=0.5):
        return {"settings": {"batch": batch}, "reached": {"97": [last, 1, 1]} if last else {"90": [0.1, 1, 1]},
                "quick": [[1, 1, 1, error]]}

    trials = [trial(1, error=0.2), {"settings": {"batch": 2}, "failed": "infinite"}, trial(3, error=0.1)]
    assert scaling.best({"search": {"x": {"trials": trials}}}, "x") == {"batch": 3}
    trials += [trial(4, last=5.0), trial(5, last=4.0)]
    assert scaling.best({"search": {"x": {"trials": trials}}}, "x") == {"batch": 5}


def test_a_grid_is_simulated_or_what_fits_this_machine_is_run(tmp_path):
    costs, out = tmp_path / "costs.toml", tmp_path / "grid.json"
    costs.write_text(TOY_COSTS.to_toml())
    run("benchmarks.scaling", "--toy", "--costs", costs, "--out", out, "--simulate", "--nodes", 1, 2, "--tasks", 3)
    grid = json.loads(out.read_text())["grid"]
    assert {name: one["workers"] for name, one in grid.items()} == {"sync, 1x3": 3, "sync, 2x3": 6, "async, 1x3": 2,
                                                                    "async, 2x3": 4}
    assert [len(one["busy"]) for one in grid.values() if one["settings"]["mode"] == "async"] == [1, 2]
    run("benchmarks.scaling", "--toy", "--costs", costs, "--out", out, "--nodes", 1, 1000, "--ways", "sync")
    content = json.loads(out.read_text())
    assert content[scaling.MPIRUN]["sync, 1x1"]["workers"] == 1
    assert content["not run"] == {"grid": ["sync, 1000x1"]}


@pytest.mark.mpi
def test_ranks_of_a_job_measure_a_point():
    data = scaling.REAL["async, 2"][1]
    task = scaling.Task("async, 2", scaling.PLAIN | data | scaling.TINY, 2, 300, (0.5,), 300)
    found = scaling.measured(task, "digits")
    assert found["workers"] == 2
    assert found["end"][1] >= 300
    assert 0 < found["pretraining"][0] < found["curve"][0][0]
    assert found["curve"][-1][-1] < found["quick"][0][-1], "it learns"
    assert len(found["busy"]) == 1


def test_the_talk_runs(tmp_path):
    out = tmp_path / "talk.json"
    run("benchmarks.talk", "--toy", "--data", "digits", "--parts", "one", "--out", out)
    content = json.loads(out.read_text())
    assert [run["seed"] for run in content["one"]["1"]] == [2, 3, 4]
    (theirs,) = (point for point in talk.points("theirs") if (point.name, point.seed) == ("2x2", 1))
    found = talk.measure(theirs._replace(given=theirs.given | talk.TOY, rows=200, most=40), "digits")
    assert found["workers"] == 4
    assert 0 < found["pretraining"] < talk.ONE_CORE
    assert len(found["busy"]) == 1


def test_the_talk_is_compared_cell_by_cell_and_seed_by_seed():
    def runs(*seconds):
        return [{"seed": seed, "seconds": one} for seed, one in enumerate(seconds, 1)]

    content = {"theirs": {"1x1": runs(4400.0, 4500.0), "2x2": runs(1413.0, None), "4x2": runs(1000.0, 728.0)},
               "one": {"1": runs(100.0, 90.0)}, "ours": {"16": runs(10.0, None), "64": runs(5.0, 3.0)}}
    found = talk.tables(content)
    assert [(cell["nodes"], cell["tasks"], cell["theirs"][0], cell["ratio"]) for cell in found["2 tasks a node"]] == [
        (2, 2, 1411, [1413 / 1411, None]), (4, 2, 728, [1000 / 728, 1.0])]
    assert found["2 nodes"][0]["speed-up"] == [4400 / 1413, None]
    assert talk.further(content) == {"16": [10.0, None], "64": [20.0, 30.0]}
    assert {cell for part in scaling.TALK.values() for cell, _, _ in part} == {
        tuple(map(int, point.name.split("x"))) for point in talk.points("theirs")} - {(1, 1)}


def test_tracing_runs():
    assert tracing.shortest(tracing.one_range, 10, samples=2) > 0
    assert tracing.ranges_of(tracing.numpy_epoch(2)) > 1
    tracing.launched_update()()


# -- the page ----------------------------------------------------------------------------------------


def test_the_page_shows_every_file_of_results_as_it_is_now(tmp_path):
    assert report.make(report.RESULTS, tmp_path) == (report.RESULTS / "README.md").read_text("utf-8"), \
        "run python -m benchmarks.report"
    for picture in tmp_path.glob("*.png"):
        assert (report.RESULTS / picture.name).exists(), "run python -m benchmarks.report"


def test_a_file_that_the_page_does_not_know_is_an_error(tmp_path):
    (tmp_path / "speed.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"speed.json: must have a section in benchmarks/report.py; got none"):
        report.make(tmp_path, tmp_path)


@pytest.mark.parametrize("content", [{}, {"machine": {"cpu": "one", "date": "today"}}])
def test_a_file_that_does_not_say_where_it_is_from_is_an_error(tmp_path, content):
    (tmp_path / "scaling.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="must say on which machine and from which commit it is"):
        report.make(tmp_path, tmp_path)


def test_the_page_tells_goals_that_are_missed_and_what_was_not_measured(told, tmp_path):
    content = json.loads(told[0].read_text()) | {"not measured": {"rbms": "rbms not installed"}}
    found = content["summary"]["epoch"]["unset"]
    found["five products alone"]["of ours"] = [0.6, 0.5, 0.7]
    found["scikit-learn, float32"] = found["gpudbn"] | {"of ours": [1.9, 1.5, 2], "of ours, numba": [2.1, 2, 3]}
    found["gpudbn, numba"] = found["gpudbn"]
    for row in found.values():
        row.setdefault("of ours, numba", [1, 1, 1])
    (tmp_path / "peers.json").write_text(json.dumps(content))
    page = report.make(tmp_path, tmp_path)
    assert "five products alone: 0.60 of ours; the goal is at least 0.67, **not reached**" in page
    assert "scikit-learn, float32: 1.90 of ours; the goal is at least 1.80, reached" in page
    assert "scikit-learn, float32: 2.10 of ours, numba; the goal is at least 1.80, reached" in page
    assert "Not measured: rbms (rbms not installed)." in page
    assert "## Time against cores\n\n`python -m benchmarks.scaling`\n\nNot measured yet." in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"peers-epoch.png", "peers-error.png", "peers-size.png"}


def test_what_a_doubling_takes_is_told_beside_its_operations():
    sample = {"against": {"k": {"values": [1, 2], "gpudbn": [1.0, 1.5], "products": [0.8, 1.0]},
                          "rows": {"values": [1024, 2048], "gpudbn": [1.0, 3.0], "products": [1.0, 2.0]}}}
    assert list(report.slopes([sample], peers.BASE)) == [["k, 1 to 2", "1.50", "1.25", "1.40"],
                                                         ["rows, 1024 to 2048", "3.00", "2.00", "2.00"]]


def test_measuring_again_replaces_what_ended_well_and_keeps_the_rest(tmp_path, monkeypatch, capfd):
    kept = {"machine": {"commit": "before"}}
    (tmp_path / "scaling.json").write_text(json.dumps(kept))
    (tmp_path / "tracing.json").write_text("{}")
    monkeypatch.setattr(report, "AGAIN", {"tracing": False, "scaling": True})
    monkeypatch.setattr(sys, "argv", ["report", "--measure", "--results", str(tmp_path), "--data", "nowhere.npz"])
    monkeypatch.setattr(report, "SECTIONS", {
        name: report.SECTIONS[name]._replace(show=lambda page, content: page.add(*content))
        for name in ("tracing", "scaling", "mnist")})
    assert report.main() == 1
    assert json.loads((tmp_path / "tracing.json").read_text())["range_ns"] > 0
    assert json.loads((tmp_path / "scaling.json").read_text()) == kept
    printed = capfd.readouterr().out
    assert "FAILED: scaling; the page has its former figures" in printed
    assert "FAILED: tracing" not in printed
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "range_ns" in page
    assert "`python -m benchmarks.mnist` (not by --measure)" in page
