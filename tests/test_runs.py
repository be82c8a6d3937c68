"""The run folder: what is refused, what survives a crash, and that resuming leaves no trace in the metrics."""

from __future__ import annotations

import json
import os
import subprocess
import time

import numpy as np
import pytest

from gpudbn import checkpoint
from gpudbn.errors import UserError
from gpudbn.runs import RECORDS, Run

SETTINGS = "seed = 7\n[layer]\nsizes = [784, 500]\n# Grüße\n"
ARRAYS = {"W": np.arange(21, dtype=np.float32).reshape(3, 7)}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", SETTINGS)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder],
                          check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# Making and opening


def test_create_makes_the_folder_and_keeps_the_settings(tmp_path):
    run = Run.create(tmp_path / "a/b/run", SETTINGS)
    assert [entry.name for entry in run.path.iterdir()] == ["settings.toml"]
    assert run.settings.read_text(encoding="utf-8") == SETTINGS
    assert run.records() == []
    (tmp_path / "empty").mkdir()
    assert Run.create(str(tmp_path / "empty"), SETTINGS).settings.is_file()


def test_create_refuses_what_is_there(tmp_path, run):
    with pytest.raises(UserError, match=r"run: must be a new or empty folder; got one that holds settings\.toml\. "
                                        r"Choose another --out"):
        Run.create(run.path, SETTINGS)
    run.save_checkpoint(ARRAYS, {})
    with pytest.raises(UserError) as error:
        Run.create(run.path, "other = 1\n")
    assert one_line(error) == (f"{run.path}: must be a new or empty folder; got a run that can go on. "
                               f"Use --resume {run.path}, or choose another --out")
    assert run.settings.read_text(encoding="utf-8") == SETTINGS
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: must be a new or empty folder; got a file\. Choose another --out"):
        Run.create(tmp_path / "file", SETTINGS)
    with pytest.raises(UserError, match=r"file/run: must be a folder that can be made; got 'Not a directory'"):
        Run.create(tmp_path / "file/run", SETTINGS)


def test_open_says_what_is_missing(tmp_path, run):
    with pytest.raises(UserError) as error:
        Run.open(tmp_path / "rum")
    assert one_line(error) == (f"{tmp_path}/rum: must be the folder of a run; got no such folder. "
                               f"Did you mean {tmp_path}/run?")
    with pytest.raises(UserError, match=r"stopped before its first checkpoint\. Start it again with another --out"):
        Run.open(run.path)
    run.save_checkpoint(ARRAYS, {})
    with pytest.raises(UserError, match=r"must be the folder of a run; got a file\. Did you mean .*/run\?"):
        Run.open(run.checkpoint)
    with pytest.raises(UserError, match=r"must be readable; got 'File name too long'"):
        Run.open(tmp_path / ("x" * 300))
    run.settings.unlink()
    with pytest.raises(UserError, match=r"must be the folder of a run; got one without settings\.toml"):
        Run.open(run.path)


def test_open_clears_away_what_a_killed_writer_left(run):
    run.save_checkpoint(ARRAYS, {})
    (run.path / checkpoint.TEMPORARY.replace("*", "123-ab")).write_bytes(b"half")
    assert Run.open(run.path).load_checkpoint()[0].keys() == {"W"}
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoint.safetensors", "settings.toml"]


def test_default_path_is_named_after_data_and_time_and_never_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "20270131-235959"))
    monkeypatch.chdir(tmp_path)
    first = Run.default_path("mnist")
    assert str(first) == "runs/mnist-20270131-235959"
    assert not first.exists()
    Run.create(first, SETTINGS)
    assert str(Run.default_path("mnist")) == "runs/mnist-20270131-235959-2"
    Run.create(Run.default_path("mnist"), SETTINGS)
    assert str(Run.default_path("mnist")) == "runs/mnist-20270131-235959-3"
    for data, name in (("/data/my spins.v2.npy", "my-spins"), ("folder/", "folder"), ("..", "data"), ("", "data")):
        assert Run.default_path(data, root="r").name == f"{name}-20270131-235959"


def test_the_folder_of_plots_is_made_when_it_is_needed(run):
    assert not (run.path / "plots").exists()
    assert run.plot("curves") == run.path / "plots/curves.png"
    assert (run.path / "plots").is_dir()
    (run.path / "plots").rmdir()
    (run.path / "plots").write_text("x")
    with pytest.raises(UserError, match=r"plots: must be a folder that can be made; got 'File exists'"):
        run.plot("curves")


# Metrics


def test_records_come_back_as_valid_json(run):
    run.record(phase="pretrain", layer=np.int64(1), epoch=3, free_energy=np.float32(-51.25), ok=np.bool_(True),
               none=None)
    run.record(loss=float("nan"), worst=np.inf, each=np.array([0.5, -np.inf]), deep={"a": (1, np.float64("nan"))})
    run.record(name="two\nlines \r \u2028", zero_d=np.array(3))
    assert run.records() == [
        {"phase": "pretrain", "layer": 1, "epoch": 3, "free_energy": -51.25, "ok": True, "none": None},
        {"loss": None, "worst": None, "each": [0.5, None], "deep": {"a": [1, None]}},
        {"name": "two\nlines \r \u2028", "zero_d": 3}]

    def refuse(constant):
        raise AssertionError(constant)

    lines = run.metrics.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line, parse_constant=refuse) for line in lines] == run.records()


def test_a_half_written_last_line_is_left_out(run):
    run.record(epoch=1)
    run.record(epoch=2)
    whole = run.metrics.read_bytes()
    for cut in range(len(whole) // 2, len(whole)):
        run.metrics.write_bytes(whole[:cut])
        assert run.records() == [{"epoch": 1}]
    run.metrics.write_bytes(b'{"epoch": 1}\nnonsense\n{"epoch": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 must be a JSON object; got b'nonsense"):
        run.records()


def test_a_record_after_a_crash_starts_a_line_of_its_own(run):
    run.record(epoch=1)
    with run.metrics.open("ab") as file:
        file.write(b'{"epoch": 2, "lo')
    run.record(epoch=3)
    assert run.records() == [{"epoch": 1}, {"epoch": 3}]


def test_a_full_disk_loses_no_earlier_record_and_no_checkpoint(small_disk):
    run = Run.create(small_disk / "run", SETTINGS)
    run.record(epoch=0)
    run.save_checkpoint(ARRAYS, {"epoch": 0})
    count = 1

    def fill():
        nonlocal count
        while count < 1000:
            run.record(epoch=count, filler="x" * 700)
            count += 1

    with pytest.raises(UserError, match=r"metrics\.jsonl: must be writable; got 'No space left on device'") as error:
        fill()
    one_line(error)
    assert 10 < count < 100
    assert [record["epoch"] for record in run.records()] == list(range(count))
    assert run.metrics.read_bytes().endswith(b"\n")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: must be writable; got 'No space left on device'"):
        run.save_checkpoint({"W": np.zeros(9000, np.float32)}, {"epoch": 9})
    again = Run.open(run.path)
    arrays, meta = again.load_checkpoint()
    assert np.array_equal(arrays["W"], ARRAYS["W"])
    assert meta == {"kind": "checkpoint", "epoch": 0, RECORDS: 1}
    again.rewind(meta)
    again.record(epoch=1)
    assert [record["epoch"] for record in again.records()] == [0, 1]


def test_a_write_that_fails_half_way_leaves_no_half_line(run, monkeypatch):
    run.record(epoch=1)
    before = run.metrics.read_bytes()
    opened = type(run.metrics).open

    class Short:
        """A file that takes five bytes, then no more."""

        def __init__(self, file, error):
            self.file, self.error, self.taken = file, error, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if self.taken:
                raise self.error
            self.taken = self.file.write(data[:5])
            return self.taken

    for error, seen in ((OSError(28, "full"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr(type(run.metrics), "open", lambda *a, error=error, **k: Short(opened(*a, **k), error))
        with pytest.raises(seen):
            run.record(epoch=2)
        monkeypatch.undo()
        assert run.metrics.read_bytes() == before
    run.record(epoch=2)
    assert [record["epoch"] for record in run.records()] == [1, 2]


# Stop and resume


def test_resumed_metrics_equal_those_of_a_run_that_never_stopped(tmp_path):
    def train(run, epochs):
        for epoch in epochs:
            run.record(epoch=epoch, loss=1 / epoch)
            if epoch % 3 == 0:
                run.save_checkpoint({"x": np.array([epoch])}, {"epoch": epoch})

    through = Run.create(tmp_path / "through", SETTINGS)
    train(through, range(1, 11))
    stopped = Run.create(tmp_path / "stopped", SETTINGS)
    train(stopped, range(1, 9))
    with stopped.metrics.open("ab") as file:
        file.write(b'{"epoch": 9, "lo')  # killed here
    resumed = Run.open(stopped.path)
    arrays, meta = resumed.load_checkpoint()
    assert (arrays["x"][0], meta["epoch"], meta[RECORDS]) == (6, 6, 6)
    assert resumed.rewind(meta) == 0
    train(resumed, range(meta["epoch"] + 1, 11))
    assert resumed.metrics.read_bytes() == through.metrics.read_bytes()
    assert resumed.checkpoint.read_bytes() == through.checkpoint.read_bytes()


def test_rewind_counts_what_is_missing(run):
    run.save_checkpoint(ARRAYS, {})
    assert run.rewind(run.load_checkpoint()[1]) == 0
    for epoch in range(3):
        run.record(epoch=epoch)
    run.save_checkpoint(ARRAYS, {})
    meta = run.load_checkpoint()[1]
    assert run.rewind(meta) == 0
    assert len(run.records()) == 3
    run.metrics.write_bytes(b'{"epoch": 0}\n')
    assert run.rewind(meta) == 2
    run.metrics.unlink()
    assert run.rewind(meta) == 3
    assert run.records() == []


def test_the_checkpoint_never_outlives_the_records_it_counts(run, monkeypatch):
    run.record(epoch=1)
    order, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(os.fstat(file).st_ino), fsync(file)))
    run.save_checkpoint(ARRAYS, {})
    assert order[0] == run.metrics.stat().st_ino


def test_the_kinds_are_set_and_the_callers_metadata_left_alone(run):
    meta = {"seed": 7}
    run.save_model(ARRAYS, meta)
    run.save_checkpoint(ARRAYS, meta)
    assert meta == {"seed": 7}
    assert checkpoint.read(run.model, "model")[1] == {"seed": 7, "kind": "model"}
    assert run.load_checkpoint()[1] == {"seed": 7, "kind": "checkpoint", RECORDS: 0}
    # what was loaded may be saved again
    run.record(epoch=1)
    run.save_checkpoint(*run.load_checkpoint())
    assert run.load_checkpoint()[1][RECORDS] == 1
    run.save_model(*run.load_checkpoint())
    run.save_checkpoint(*checkpoint.read(run.model, "model"))
    assert run.load_checkpoint()[1]["kind"] == "checkpoint"
