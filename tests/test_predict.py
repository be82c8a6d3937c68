"""Predictions by the command: the classes of DBN.predict, of the right rows, in files that are whole or not there."""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from gpudbn import _command, mpi, predict
from gpudbn.data import load
from gpudbn.dbn import DBN
from gpudbn.dbn import load as load_model
from gpudbn.errors import UserError
from gpudbn.mpi.alone import Exchange
from gpudbn.predict import main
from gpudbn.settings import Settings
from tests.helpers import assert_close, assert_notices

SETTINGS = Settings(data="digits", seed=11, validation=101, test=97, layers=(17, 13))


def make_run(folder, settings=SETTINGS, sizes=(64, 17, 13), classes=10, **about):
    """A run folder with a model of random weights, strong enough for all classes to be predicted."""
    rng = np.random.default_rng(3)
    dbn = DBN(sizes)
    dbn.about |= {"image_shape": (8, 8), "data": settings.data, **about}
    for rbm in dbn.layers:
        rbm.W[...] = rng.normal(size=rbm.W.shape)
        rbm.c[...] = -rbm.W.sum(axis=0) / 2
    if classes:
        net = dbn.new_classifier(classes)
        top = len(dbn.layers)
        net[f"W{top}"][...] = rng.normal(size=net[f"W{top}"].shape)
        net[f"c{top}"][...] = -net[f"W{top}"].sum(axis=0) / 2
    folder.mkdir()
    dbn.save(folder / "model.safetensors")
    (folder / "settings.toml").write_text(settings.to_toml(), "utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def digits(part):
    """Rows and labels of a part, split as in training."""
    rows = getattr(load("digits", validation=SETTINGS.validation, test=SETTINGS.test, seed=SETTINGS.seed), part)
    out = np.empty((len(rows), rows.n), np.float32)
    rows.take(np.arange(len(rows)), out)
    return out, rows.take_labels(np.arange(len(rows)))


def whole_digits():
    data = load("digits", validation=0, test=0)
    out = np.empty((1797, 64), np.float32)
    data.train.take(np.arange(1797), out)
    return out, data.train.take_labels(np.arange(1797))


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


# What is predicted


def test_classes_and_probabilities_are_those_of_the_model_for_the_test_rows(run, tmp_path, capsys):
    def check():
        capsys.readouterr()
        succeed(run, "--data", "digits", "--out", tmp_path / "x.npy")
        rows, labels = digits("test")
        dbn = load_model(run)
        found, probabilities = np.load(tmp_path / "x.npy"), np.load(tmp_path / "x.probabilities.npy")
        assert (found.dtype, found.shape) == (np.int32, (97,))
        assert len(np.unique(found)) > 4
        assert probabilities.dtype == np.float32
        assert np.array_equal(found, dbn.predict(rows))
        assert np.array_equal(probabilities, dbn.predict_probabilities(rows))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"error: {100 * np.mean(found != labels):.2f} %"
        assert "data       97 test rows of digits" in lines
        counts = np.zeros((10, 10), int)
        np.add.at(counts, (labels, found), 1)
        table = [line.split() for line in lines[lines.index("") + 3:-2]]
        assert table[:10] == [[str(k), *(str(n or ".") for n in counts[k])] for k in range(10)]
        assert table[10] == ["total", *map(str, counts.sum(axis=0))]

    assert_notices(check, _command, "test=s.test, seed=s.seed,", "test=s.test, seed=1,")
    assert_notices(check, predict, "(truth, labels), 1)", "(labels, truth), 1)")


def test_parts_are_those_of_training_and_together_everything(run, tmp_path, capsys):
    rows, labels = whole_digits()
    seen = []
    for part, count in (("test", 97), ("validation", 101), ("train", 1599), ("all", 1797)):
        capsys.readouterr()
        succeed(run, "--data", "digits", "--part", part, "--out", tmp_path / "x.npz")
        assert ("this is no test error" in capsys.readouterr().out) == (part in ("train", "all"))
        with np.load(tmp_path / "x.npz") as file:
            assert sorted(file) == ["labels", "probabilities", "rows"]
            places, found, probabilities = file["rows"], file["labels"], file["probabilities"]
        assert (places.dtype, found.dtype, probabilities.dtype) == (np.int64, np.int32, np.float32)
        assert len(places) == len(found) == len(probabilities) == count
        assert_close(probabilities, load_model(run).predict_probabilities(rows[places]), atol=1e-5)
        if part == "all":
            assert np.array_equal(places, np.arange(1797))
        else:
            assert np.array_equal(rows[places], digits(part)[0])
            assert np.array_equal(labels[places], digits(part)[1])
            seen.append(places)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1797))


def test_a_table_parses_back_to_the_same_numbers(run, tmp_path):
    succeed(run, "--data", "digits", "--out", tmp_path / "x.csv")
    succeed(run, "--data", "digits", "--out", tmp_path / "x.npz")
    with (tmp_path / "x.csv").open(newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["row", "label", *(f"p{k}" for k in range(10))]
    with np.load(tmp_path / "x.npz") as file:
        assert [int(line[0]) for line in lines] == file["rows"].tolist()
        assert [int(line[1]) for line in lines] == file["labels"].tolist()
        assert np.array_equal(np.array([line[2:] for line in lines], np.float32), file["probabilities"])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_the_size_of_the_blocks_does_not_matter(run, tmp_path, monkeypatch, suffix):
    def read():
        if suffix == ".csv":
            return [np.loadtxt(tmp_path / "x.csv", delimiter=",", skiprows=1)]
        if suffix == ".npz":
            with np.load(tmp_path / "x.npz") as file:
                return list(file.values())
        return [np.load(tmp_path / "x.npy"), np.load(tmp_path / "x.probabilities.npy")]

    command = (run, "--data", "digits", "--out", tmp_path / f"x{suffix}")
    succeed(*command)
    once = read()
    monkeypatch.setattr(_command, "BLOCK", 13)
    succeed(*command)
    for before, after in zip(once, read(), strict=True):
        assert_close(after, before, atol=1e-6)


def test_other_data_are_predicted_whole_one_row_too(run, tmp_path, capsys):
    rows, labels = whole_digits()
    dbn = load_model(run)
    for count in (1, 23):
        np.save(tmp_path / "new.npy", rows[:count])
        np.save(tmp_path / "y.npy", labels[:count])
        for more in ((), ("--labels", tmp_path / "y.npy")):
            capsys.readouterr()
            succeed(run, "--data", tmp_path / "new.npy", "--out", tmp_path / "x.npy", *more)
            assert np.array_equal(np.load(tmp_path / "x.npy"), dbn.predict(rows[:count]))
            text = capsys.readouterr().out
            if more:
                wrong = np.mean(dbn.predict(rows[:count]) != labels[:count])
                assert text.endswith(f"\nerror: {100 * wrong:.2f} %\n")
            else:
                assert "error" not in text
                assert "predicted  " in text


def test_test_rows_of_their_own(run, tmp_path):
    rows, labels = whole_digits()
    dbn = load_model(run)
    np.savez(tmp_path / "d.npz", x=rows[:50], y=labels[:50], x_test=rows[50:79], y_test=labels[50:79])
    for part, chosen, first in (("all", slice(0, 79), 0), ("train", slice(0, 50), 0), ("test", slice(50, 79), 50)):
        succeed(run, "--data", tmp_path / "d.npz", "--part", part, "--out", tmp_path / "x.npz")
        with np.load(tmp_path / "x.npz") as file:
            assert np.array_equal(file["labels"], dbn.predict(rows[chosen]))
            assert np.array_equal(file["rows"], np.arange(79)[chosen] - first)
    # the same file as the data of a run: its validation rows are the last of the training rows
    other = make_run(tmp_path / "other", Settings(data="d.npz", validation=7))
    for part, chosen in (("test", slice(50, 79)), ("validation", slice(43, 50)), ("all", slice(79))):
        more = () if part == "test" else ("--part", part)
        succeed(other, "--data", tmp_path / "d.npz", "--out", tmp_path / "x.npy", *more)
        assert np.array_equal(np.load(tmp_path / "x.npy"), dbn.predict(rows[chosen]))


def test_a_run_knows_the_labels_of_its_own_rows(tmp_path, capsys):
    rows, labels = whole_digits()
    np.save(tmp_path / "a.npy", rows[:60])
    np.save(tmp_path / "y.npy", labels[:60])
    settings = Settings(data=str(tmp_path / "a.npy"), labels=str(tmp_path / "y.npy"), validation=5, test=11, seed=4)
    run = make_run(tmp_path / "run", settings)
    succeed(run, "--data", tmp_path / "a.npy")
    lines = capsys.readouterr().out.splitlines()
    assert "data       11 test rows of a" in lines
    assert lines[-1].startswith("error: ")


def test_a_model_file_predicts_as_its_run_and_elsewhere_everything(run, tmp_path, capsys):
    succeed(run / "model.safetensors", "--data", "digits")
    assert "97 test rows" in capsys.readouterr().out
    (run / "model.safetensors").rename(tmp_path / "moved.safetensors")
    succeed(tmp_path / "moved.safetensors", "--data", "digits")
    text = capsys.readouterr().out
    assert "1,797 rows of digits" in text
    assert "this is no test error" in text
    assert "--part: must be all where it is not known how the rows were split; got test. Give the folder" in fail(
        capsys, tmp_path / "moved.safetensors", "--data", "digits", "--part", "test")


def test_rows_are_cut_for_a_model_that_was_trained_on_cut_rows(tmp_path):
    run = make_run(tmp_path / "run", binarise="threshold")
    succeed(run, "--data", "digits", "--out", tmp_path / "x.npy")
    rows, _ = digits("test")
    dbn = load_model(run)
    dbn.about["binarise"] = "none"
    assert np.array_equal(np.load(tmp_path / "x.npy"), dbn.predict((rows >= 0.5).astype(np.float32)))
    assert not np.array_equal(dbn.predict(rows), dbn.predict((rows >= 0.5).astype(np.float32)))


def test_classes_the_model_does_not_know_are_errors(tmp_path, capsys):
    run = make_run(tmp_path / "run", classes=3)
    rows, labels = whole_digits()
    np.savez(tmp_path / "d.npz", x=rows[:40], y=labels[:40])
    succeed(run, "--data", tmp_path / "d.npz")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"error: {100 * np.mean(load_model(run).predict(rows[:40]) != labels[:40]):.2f} %"
    assert [line.split()[0] for line in lines[lines.index("") + 3:-3]] == [str(k) for k in range(10)]
    np.savez(tmp_path / "d.npz", x=rows[:40], y=labels[:40] + 5)  # up to 14: too many for a table
    succeed(run, "--data", tmp_path / "d.npz")
    text = capsys.readouterr().out
    assert "true class" not in text
    assert text.endswith("error: 100.00 %\n")


# Files


def test_an_interrupt_leaves_the_old_file_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x.npz").write_bytes(b"old")
    predicted, calls = DBN.predict_probabilities, []

    def interrupted(self, v):
        calls.append(len(v))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predicted(self, v)

    monkeypatch.setattr(_command, "BLOCK", 13)
    monkeypatch.setattr(DBN, "predict_probabilities", interrupted)
    for suffix in (".npz", ".npy", ".csv"):
        calls.clear()
        assert main([str(run), "--data", "digits", "--out", str(folder / f"x{suffix}")]) == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert [path.name for path in folder.iterdir()] == ["x.npz"]
    assert (folder / "x.npz").read_bytes() == b"old"


def test_a_link_stays_one(run, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")
    succeed(run, "--data", "digits", "--out", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "there.csv").read_text().startswith("row,label,p0")


def start(*arguments, **more):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI_"))}
    return subprocess.Popen([sys.executable, "-m", "gpudbn.predict", *map(str, arguments)], text=True, env=environment,
                            stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **more})


def test_as_a_command_for_a_reader_who_leaves(run, tmp_path):
    process = start(run, "--data", "digits", "--out", tmp_path / "x.npy", "--threads", 1)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), load_model(run).predict(digits("test")[0]))


def test_a_disk_that_is_full_is_one_line(run, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    (tmp_path / "out").mkdir()
    out, err = start(run, "--data", "digits", "--out", tmp_path / "out/x.csv", preexec_fn=limit).communicate()
    assert out == ""
    assert err.startswith(f"{tmp_path / 'out/x.csv'}: must be writable; got 'File too large'. Raise the limit")
    assert err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_standard_output_that_refuses_is_one_line(monkeypatch):
    class Full:
        def write(self, text):  # noqa: ARG002
            raise OSError(28, "No space left on device")

        def fileno(self):
            return self.null

    with open(os.devnull, "w") as null:  # noqa: PTH123
        Full.null = null.fileno()
        monkeypatch.setattr(sys, "stdout", Full())
        with pytest.raises(UserError, match=r"standard output: must be writable; got 'No space left on device'\. Free"):
            _command.say(["text"])


# Errors


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--data", "digits"], "must be given MODEL, the folder of a run or its model.safetensors; got none. See --help"),
    (["RUN"], "--data: must say what to predict: digits, mnist, a folder, FILE.npz or FILE.npy; got nothing"),
    (["RUN", "--dta", "digits"], "predict: must be given options it knows; got --dta. Did you mean --data?"),
    (["--prt", "test", "RUN", "--data", "digits"], "got --prt. Did you mean --part?"),
    (["--data", "digits", "RUN", "--part", "tests"], "must be one of test, validation, train, all; got tests. Did"),
    (["--data", "digits", "--part", "test", "nowhere"], "nowhere: must be a model file; got no such file"),
    (["RUNN", "--data", "digits"], "must be a model file; got no such file. Did you mean RUN?"),
    (["RUN", "--data", "digitz"], "got digitz. Did you mean digits?"),
    (["RUN", "--data", "digits", "--labels", "y.npy"], "labels: must be given only with an .npy file of rows"),
    (["RUN", "--data", "digits", "--out", "x.txt"], "--out: must end in .npy, .npz or .csv, which says the format"),
    (["RUN", "--data", "digits", "--out", "TMP/no/x.csv"], "no/x.csv: must be writable; got 'No such file"),
    (["RUN", "--data", "digits", "--out", "RUN/settings.toml/x.npz"], "A part of the path is a file; choose another"),
    (["RUN", "--data", "digits", "--out", "TMP/folder.npy"], "folder.npy, a folder"),
    (["RUN", "--data", "TMP/wide.npy", "--out", "TMP/wide.npy"], "--out: must not replace what is read; got"),
    (["RUN", "--data", "TMP/wide.npy", "--labels", "TMP/y.probabilities.npy", "--out", "TMP/y.npy"],
     "y.probabilities.npy. Choose another name"),
    (["RUN", "--data", "TMP/wide.npy"], "--data: must have the 64 columns of the model; got 65 in wide"),
    (["RUN", "--data", "TMP/wide.npy", "--part", "test"], "--part: must be all where it is not known how"),
    (["RUN", "--data", "TMP/none.npy"], "none.npy: must be a file or folder; got nothing there"),
    (["RUN", "--data", "digits", "--threads", "0"], "--threads: must be at least 1; got 0"),
    (["RUN", "--data", "digits", "--device", "cup"], "--device: must be one of auto, cpu, gpu; got cup. Did you mean"),
])
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, expected):
    (tmp_path / "folder.npy").mkdir()
    np.save(tmp_path / "wide.npy", np.eye(65, dtype=np.float32))
    np.save(tmp_path / "y.probabilities.npy", np.arange(65))
    before = sorted(tmp_path.rglob("*"))
    line = fail(capsys, *(a.replace("RUN", str(run)).replace("TMP", str(tmp_path)) for a in arguments))
    assert expected.replace("RUN", str(run)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_models_that_cannot_predict(run, tmp_path, capsys):
    made = make_run(tmp_path / "made", classes=0)
    assert fail(capsys, made, "--data", "digits") == (
        f"{made}: must be a fine-tuned model; got one that was only pretrained. Train with --finetune-epochs above 0 "
        "on labelled data")
    model = run / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    assert "must be a whole safetensors file; got one that is cut short" in fail(capsys, run, "--data", "digits")
    model.rename(run / "checkpoint.safetensors")
    assert fail(capsys, run, "--data", "digits") == (
        f"{run}: must be a finished run; got one without its model.safetensors yet. "
        f"Finish it: python -m gpudbn.train --resume {run}")
    (run / "checkpoint.safetensors").unlink()
    assert "got a folder without model.safetensors" in fail(capsys, run, "--data", "digits")


def test_a_part_without_rows(tmp_path, capsys):
    run = make_run(tmp_path / "run", Settings(data="digits", test=0))
    assert fail(capsys, run, "--data", "digits") == (
        "--part: must be rows that are there; got test, of which digits has none. Use --part all")


class Round(Exchange):
    """One of several ranks that run one after the other, the chief last: ``collect`` keeps what they gave."""

    def __init__(self, replica, replicas, given):
        super().__init__()
        self.replica, self.replicas, self.given = replica, replicas, given

    def collect(self, array):
        mine = self.given.setdefault(self.replica, [])
        mine.append(array)
        return [self.given[r][len(mine) - 1] for r in range(self.replicas)] if self.chief else None


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_take_blocks_in_turn_and_the_first_writes_the_bytes_of_one_process(run, tmp_path, monkeypatch, ranks):
    def check():
        succeed(run, "--data", "digits", "--out", tmp_path / "alone.npz")
        given, connected = {}, mpi.connect
        for rank in reversed(range(ranks)):
            exchange = Round(rank, ranks, given)
            monkeypatch.setattr(mpi, "connect", lambda *_, one=exchange, **__: one)
            succeed(run, "--data", "digits", "--out", tmp_path / "together.npz")
            assert (tmp_path / "together.npz").exists() == (rank == 0)
        monkeypatch.setattr(mpi, "connect", connected)
        assert [sum(map(len, given[rank])) for rank in range(ranks)] == [
            len([row for row in range(97) if row // 13 % ranks == rank]) for rank in range(ranks)]
        assert (tmp_path / "together.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()

    monkeypatch.setattr(_command, "BLOCK", 13)
    check()
    (tmp_path / "together.npz").unlink()
    assert_notices(check, predict, "turn[exchange.replica]", "turn[0]")


def test_where_no_file_can_be_without_a_name_it_has_a_temporary_one(run, tmp_path, monkeypatch):
    for name, nameless in (("x.npz", True), ("y.npz", False)):
        if not nameless:
            monkeypatch.delattr(os, "O_TMPFILE", raising=False)
        (tmp_path / name).write_bytes(b"old")
        succeed(run, "--data", "digits", "--out", tmp_path / name)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.npz", "y.npz"]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "examples:\n  python -m gpudbn.predict runs/digits --data digits " in capsys.readouterr().out
