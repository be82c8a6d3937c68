"""The whole command under mpirun: what it learns, the promise of equal bits, and how it ends when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from gpudbn import checkpoint, load
from tests.conftest import mpi_wheels
from tests.mpi import job

pytestmark = pytest.mark.mpi
SMALL = ["--layers", 20, 12, "--epochs", 2, "--finetune-epochs", 3, "--batch", 40, "--plots", "off"]


MPICH = any("mpich" in wheel for wheel in mpi_wheels())
ulfm = pytest.mark.skipif(MPICH, reason="MPICH ends a job of which a rank dies; Open MPI goes on with --with-ft ulfm")


def start(ranks, *arguments, **options):
    return job.start(ranks, "-m", "gpudbn.train", *arguments, **options)


def finish(process, timeout=90):
    """Exit code, output and errors."""
    done = job.finish(process, timeout)
    return done.returncode, done.stdout, done.stderr


def train(ranks, *arguments):
    code, out, err = finish(start(ranks, *arguments))
    assert code == 0, f"{out}\n{err}"
    return out


def records(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(folder, epochs):
    """Until the run has recorded so many epochs; a launcher may hold back what is printed."""
    deadline = time.monotonic() + 30
    while not (folder / "metrics.jsonl").exists() or sum("epoch" in r for r in records(folder)) < epochs:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def error_of(folder):
    return next(r["error"] for r in records(folder) if r["phase"] == "test")


@pytest.mark.parametrize("options", [
    [], ["--method", "pcd", "--k", 2, "--up", "mean", "--optimiser", "sgd"],
    ["--centring", "data", "--sparsity-target", 0.2]])
def test_with_a_fixed_order_one_two_and_four_replicas_end_a_whole_run_with_the_same_bits(options, tmp_path):
    models = []
    for ranks in (0, 2, 4):
        out = tmp_path / str(ranks)
        train(ranks, *SMALL, *options, "--mode", "sync", "--order", "fixed", "--out", out)
        models.append((load(out).arrays(), [{k: v for k, v in r.items() if k != "seconds"}
                                            for r in records(out) if r["phase"] not in ("ranks", "report")]))
    for arrays, seen in models[1:]:
        assert seen == models[0][1]
        for name, array in models[0][0].items():
            assert np.array_equal(array, arrays[name]), name


@pytest.mark.parametrize("options", [[], ["--k", 2, "--last-hidden", "sample", "--up", "mean"]])
def test_in_exact_mode_replicas_pretrain_to_the_same_bits_in_any_order(options, tmp_path):
    """One factor of each product is a sample: sums are of multiples of 2^-14, which float32 adds without rounding."""
    models = []
    for ranks in (0, 2, 3):
        out = tmp_path / str(ranks)
        train(ranks, *SMALL, *options, "--mode", "sync", "--precision", "exact", "--finetune-epochs", 0, "--out", out)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]


def test_without_a_fixed_order_replicas_start_alike_and_learn_as_much(tmp_path):
    train(0, "--mode", "sync", "--out", tmp_path / "alone", "--plots", "off", "--finetune-epochs", 20)
    train(3, "--mode", "sync", "--out", tmp_path / "three", "--plots", "off", "--finetune-epochs", 20)
    alone, three = records(tmp_path / "alone"), records(tmp_path / "three")
    assert abs(alone[0]["free_energy_train"] - three[1]["free_energy_train"]) < 0.05
    assert error_of(tmp_path / "alone") < 0.07
    assert error_of(tmp_path / "three") < 0.07


@pytest.mark.parametrize("outer", ["average", "nesterov", "elastic"])
def test_replicas_that_meet_now_and_then_learn_the_digits(outer, tmp_path):
    """Their changes are averaged, not added, so they may be larger than one's alone."""
    said = train(3, "--mode", "local", "--outer", outer, "--layers", 200, 100, "--learning-rate", 0.06,
                 "--finetune-learning-rate", 0.01, "--finetune-epochs", 20, "--plots", "off", "--out", tmp_path / "run")
    assert f"3 replicas that meet every 10 updates ({outer})" in said
    assert error_of(tmp_path / "run") < 0.1
    assert records(tmp_path / "run")[-1]["ranks"][0]["meetings"] == (2 * 20 + 20) * 2, "of 20 updates each"


def test_replicas_that_meet_now_and_then_go_on_with_the_bits_of_a_run_that_never_stopped(tmp_path):
    options = [*SMALL, "--mode", "local", "--outer", "elastic", "--period", 4, "--checkpoint-seconds", 0,
               "--epochs", 20]
    train(3, *options, "--out", tmp_path / "whole")
    process = start(3, *options, "--out", tmp_path / "cut")
    wait_for(tmp_path / "cut", epochs=24)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    train(3, "--resume", tmp_path / "cut")
    for name, array in load(tmp_path / "whole").arrays().items():
        assert np.array_equal(array, load(tmp_path / "cut").arrays()[name]), name


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory):
    """A run of a server and two replicas with the defaults."""
    out = tmp_path_factory.mktemp("async") / "run"
    return out, train(3, "--out", out, "--finetune-epochs", 30)


def test_a_server_and_two_replicas_learn_the_digits(asynchronous):
    out, said = asynchronous
    assert "2 asynchronous replicas around a parameter server" in said
    assert error_of(out) < 0.07
    assert load(out).predict(np.zeros((2, 64))).shape == (2,)


def test_replicas_that_exchange_while_they_compute_learn_the_digits(tmp_path):
    train(3, "--overlap", "on", "--layers", 200, 100, "--epochs", 10, "--finetune-epochs", 20, "--out",
          tmp_path / "run", "--plots", "off")
    assert error_of(tmp_path / "run") < 0.1
    report = next(r for r in records(tmp_path / "run") if r["phase"] == "report")
    assert all(rank["beside"]["transferring"] > 0 for rank in report["ranks"] if rank["role"] == "replica")


def test_replicas_that_wait_for_each_other_and_begin_with_one_alone_learn_the_digits(tmp_path):
    train(4, "--max-staleness", 1, "--warm-start", 30, "--layers", 200, 100, "--epochs", 10, "--finetune-epochs", 20,
          "--out", tmp_path / "run", "--plots", "off")
    assert error_of(tmp_path / "run") < 0.1


def test_two_servers_and_two_replicas_learn_the_digits(tmp_path):
    said = train(4, "--servers", 2, "--out", tmp_path / "run", "--plots", "off", "--finetune-epochs", 30)
    assert "2 asynchronous replicas around 2 parameter servers" in said
    assert error_of(tmp_path / "run") < 0.07


def test_an_asynchronous_run_tells_what_it_did(asynchronous):
    out, _ = asynchronous
    server, *replicas = next(r for r in records(out) if r["phase"] == "report")["ranks"]
    assert [(rank["role"], rank["number"]) for rank in (server, *replicas)] == [
        ("server", 0), ("replica", 0), ("replica", 1)]
    assert len({rank["pid"] for rank in (server, *replicas)}) == 3
    pushes = [replica["pushes"] for replica in replicas]
    assert min(pushes) > 100
    assert server["applied"] == pushes
    assert sum(server["staleness"]) == server["version"] == sum(pushes) - sum(server["refused"])
    assert server["seconds"]["applying"] > 0
    for replica in replicas:
        assert replica["pulls"] >= replica["pushes"]
        assert replica["bytes"]["sent"] > 0
        seconds = replica["seconds"]
        assert min(seconds[state] for state in ("computing", "measuring", "transferring", "waiting", "starting")) > 0
        assert abs(sum(seconds.values()) - sum(server["seconds"].values())) < 1
    assert {"timeline.png", "staleness.png"} <= {path.name for path in (out / "plots").iterdir()}


def test_adagrad_at_servers_that_get_activations(tmp_path):
    """Two servers, of which the lower has half of W, b and c."""
    options = ["--server-rule", "adagrad", "--push", "factored", "--n-push", 1, "--n-fetch", 1,
               "--schedule", "constant", "--layers", 256, "--epochs", 5, "--finetune-epochs", 10,
               "--finetune-schedule", "constant"]
    said = train(4, "--servers", 2, *options, "--plots", "off", "--out", tmp_path / "run")
    assert "finetune  pushes dense: " in said
    assert [r["push"] for r in records(tmp_path / "run") if "push" in r] == ["factored"] * 5 + ["dense"] * 10
    assert error_of(tmp_path / "run") < 0.1


def process_of(folder, role):
    """The process that the metrics name."""
    return next(rank["pid"] for r in records(folder) if r["phase"] == "ranks" for rank in r["ranks"]
                if rank["role"] == role)


def started(ranks, out, *options, **more):
    """A run that has recorded some epochs of the first layer, and a checkpoint."""
    process = start(ranks, "--out", out, "--epochs", 30, "--finetune-epochs", 3, "--plots", "off", "--layers", 50,
                    "--checkpoint-seconds", 0, *options, **more)
    wait_for(out, epochs=5)
    return process


def check_it_can_go_on(ranks, out):
    _, meta = checkpoint.read(out / "checkpoint.safetensors", "checkpoint")
    assert meta["epoch"] >= 4
    said = train(ranks, "--resume", out)
    assert "layer 1   epoch   1/" not in said
    check_epochs(out)


def check_epochs(out):
    """Every epoch is recorded once."""
    assert [r["epoch"] for r in records(out) if r["phase"] == "pretrain"] == list(range(1, 31))


@pytest.mark.parametrize(("mode", "role"), [
    ("sync", "replica 0 of 3"), ("async", "server"), ("async", "replica 1 of 2")])
def test_a_rank_that_is_killed_ends_the_job_and_the_run_can_go_on(mode, role, tmp_path):
    out = tmp_path / "run"
    process = started(3, out, "--mode", mode)
    os.kill(process_of(out, role), signal.SIGKILL)
    begun = time.monotonic()
    code, _, _ = finish(process, timeout=30)
    assert code != 0
    assert time.monotonic() - begun < 20
    check_it_can_go_on(3, out)


def test_a_launcher_that_is_interrupted_ends_the_job_and_the_run_can_go_on(tmp_path):
    process = started(3, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    code, _, _ = finish(process, timeout=30)
    assert code != 0
    assert time.monotonic() - begun < 20
    check_it_can_go_on(3, tmp_path / "run")


@ulfm
def test_a_server_that_dies_ends_the_run_with_the_command_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = started(4, out, "--servers", 2, survive=True)
    os.kill(process_of(out, "server 1 of 2"), signal.SIGKILL)
    code, _, err = finish(process, timeout=30)
    assert code == 4
    assert "server 1 of 2 on" in err
    assert f"mpirun --with-ft ulfm -n 4 python -m gpudbn.train --resume {out}" in err
    check_it_can_go_on(4, out)


@ulfm
def test_a_run_goes_on_without_its_chief(tmp_path):
    out = tmp_path / "run"
    process = started(4, out, survive=True)
    os.kill(process_of(out, "replica 0 of 3"), signal.SIGKILL)
    code, said, err = finish(process, timeout=60)
    assert code == 0, err
    assert "2 of 3 replicas go on" in err
    assert "everything is in" in said
    check_epochs(out)
    assert error_of(out) < 0.5
    assert load(out).predict(np.zeros((2, 64))).shape == (2,)
    _, meta = checkpoint.read(out / "checkpoint.safetensors", "checkpoint")
    assert meta["index"] == 2
    report = next(r for r in records(out) if r["phase"] == "report")["ranks"]
    assert [(rank["role"], rank["number"]) for rank in report] == [("server", 0), ("replica", 1), ("replica", 2)]


def test_a_synchronous_run_resumed_ends_with_the_bits_of_one_that_never_stopped(tmp_path):
    options = [*SMALL, "--mode", "sync", "--method", "pcd", "--checkpoint-seconds", 0, "--order", "fixed"]
    train(3, *options, "--out", tmp_path / "whole")
    process = start(3, *options, "--epochs", 40, "--out", tmp_path / "cut")
    wait_for(tmp_path / "cut", epochs=43)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    _, meta = checkpoint.read(tmp_path / "cut/checkpoint.safetensors", "checkpoint")
    assert meta["index"] == 1
    train(3, "--resume", tmp_path / "cut")
    train(3, *options, "--epochs", 40, "--out", tmp_path / "again")
    for name, array in load(tmp_path / "again").arrays().items():
        assert np.array_equal(array, load(tmp_path / "cut").arrays()[name]), name


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--data", "digit"], 2, "data: must be digits, mnist"),
    (["--layers", "0"], 2, "--layers: must be at least 1; got 0"),
    (["--out", "/proc/gpudbn"], 2, "must be a folder that can be made"),
    (["--learning-rate", "1e30", "--decay", "1e-3"], 3, "layer 1: parameters must stay finite"),
    (["--resume", "nowhere"], 2, "--resume: must be a run folder"),
])
def test_what_is_wrong_ends_all_ranks_within_seconds_and_is_said(mode, arguments, code, message, tmp_path):
    extra = [*SMALL, "--mode", mode] if "--resume" not in arguments else []
    out = ["--out", str(tmp_path / "run")] if not {"--out", "--resume"} & set(arguments) else []
    begun = time.monotonic()
    got, _, err = finish(start(3, *extra, *arguments, *out), timeout=30)
    assert time.monotonic() - begun < 20
    assert got == code, err
    assert message in err
    assert "Traceback" not in err
    if code == 2:
        assert err.count(message) == 1, "said once, not by every rank"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)], capture_output=True,
                             text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_ends_all_ranks_and_leaves_the_earlier_checkpoint_whole(mode, small_disk):
    begun = time.monotonic()
    code, _, err = finish(start(3, "--mode", mode, "--layers", 64, 128, "--epochs", 1, "--finetune-epochs", 3,
                                "--plots", "off", "--checkpoint-seconds", 0, "--out", small_disk / "run"), timeout=40)
    assert time.monotonic() - begun < 25
    assert code == 2, err
    assert "No space left on device" in err
    assert "Traceback" not in err
    arrays, meta = checkpoint.read(small_disk / "run/checkpoint.safetensors", "checkpoint")
    assert meta["updates"] >= 0
    assert np.isfinite(arrays["layers.0.W"]).all()


def test_more_replicas_than_rows_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(5, dtype=np.float32))
    got, _, err = finish(start(4, "--data", tmp_path / "x.npy", "--finetune-epochs", 0, "--validation", 1, "--test", 2,
                               "--out", tmp_path / "run"), timeout=30)
    assert got == 2
    assert "must have at least one training row a replica; got 2 rows for 3 replicas" in err


def test_asynchronous_needs_a_replica_and_refuses_a_fixed_order(tmp_path):
    got, _, err = finish(start(3, "--order", "fixed", "--out", tmp_path / "run"), timeout=30)
    assert got == 2
    assert "--order: must be fast with --mode async" in err
    got, _, err = finish(start(2, "--mode", "local", "--order", "fixed", "--out", tmp_path / "run"), timeout=30)
    assert got == 2
    assert "--order: must be fast with --mode local, whose replicas cut no batch" in err
    assert train(1, *SMALL, "--out", tmp_path / "one"), "one rank is a single process"
