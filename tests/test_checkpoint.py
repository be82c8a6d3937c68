"""Files that are whole or absent: every way a write or a read can fail, caused for real where the machine allows."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gpudbn import checkpoint
from gpudbn.errors import UserError

W = np.arange(21, dtype=np.float32).reshape(3, 7) / 8 - 1  # prime sizes, asymmetric
META = {"kind": "checkpoint", "update": 4120, "best": float("inf"), "layers": [7, 3], "name": "Grüße \"x\""}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def content(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder],
                          check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def child(program, *arguments, **options):
    """A Python process that runs this program."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
                            stdout=subprocess.PIPE, text=True, **options)


# What comes back


def test_every_type_shape_and_bit_comes_back(tmp_path):
    rng = np.random.default_rng(5)
    arrays = {name: rng.integers(0, 2, (2, 3, 5)).astype(name) for name in checkpoint.TYPES}
    arrays |= {"scalar": np.array(-0.5, np.float32), "empty": np.zeros((0, 3), np.float32),
               "turned": W.T, "strided": W[:, ::2], "big end first": W.astype(">f4"), "number": np.float32(3),
               "odd": np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).view(np.float32)}  # NaN, -inf, -0
    checkpoint.write(tmp_path / "c", arrays, META)
    found, meta = checkpoint.read(tmp_path / "c", "checkpoint")
    assert meta == META
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        assert found[name].shape == np.shape(array)
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        assert found[name].tobytes() == np.asarray(array).astype(found[name].dtype).tobytes(), name
        assert found[name].flags.writeable


def test_nothing_given_is_changed_and_equal_input_gives_equal_bytes(tmp_path):
    arrays, meta = {"b": W.copy(), "a": W.T.copy()}, {"kind": "model", "x": np.float64(0.1), "y": (1, np.arange(2))}
    checkpoint.write(tmp_path / "1", arrays, meta)
    checkpoint.write(tmp_path / "2", dict(reversed(arrays.items())), meta)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert np.array_equal(arrays["b"], W)
    assert meta["x"].dtype == np.float64
    assert checkpoint.read(tmp_path / "1", "model")[1] == {"kind": "model", "x": 0.1, "y": [1, [0, 1]]}


def test_other_tools_can_read_it(tmp_path):
    checkpoint.write(tmp_path / "m", {"W": W}, {"kind": "model"})
    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "m")["W"], W)
    with safetensors.safe_open(tmp_path / "m", framework="np") as file:
        head = json.loads(file.metadata()["gpudbn"])
    assert (head["format"], head["kind"], head["meta"]) == (1, "model", {"kind": "model"})


def test_the_file_follows_the_umask_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("real")
    before = os.umask(0o027)
    try:
        checkpoint.write(tmp_path / "link", {"W": W}, META)
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert content(tmp_path) == ["link", "real"]


@pytest.mark.parametrize(("arrays", "meta", "error"), [
    ({"W": W}, {}, ValueError), ({"W": W}, {"kind": "picture"}, ValueError), ({"W": np.array(["x"])}, META, TypeError),
    ({"W": np.array([None])}, META, TypeError), ({"W": W.astype(complex)}, META, TypeError),
    ({"W": W}, {**META, "x": object()}, TypeError)])
def test_our_own_mistakes_write_nothing(tmp_path, arrays, meta, error):
    with pytest.raises(error, match=r"^checkpoint\.write: .* must .*; got") as caught:
        checkpoint.write(tmp_path / "c", arrays, meta)
    assert not isinstance(caught.value, UserError)
    assert content(tmp_path) == []


# Writes that fail


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk):
    path = small_disk / "c"
    checkpoint.write(path, {"W": W}, META)
    with pytest.raises(UserError, match=r"/c: must be writable; got 'No space left on device'\. Free some") as error:
        checkpoint.write(path, {"W": np.zeros(100_000, np.float32)}, META)
    one_line(error)
    assert content(small_disk) == ["c"]
    assert np.array_equal(checkpoint.read(path, "checkpoint")[0]["W"], W)
    checkpoint.write(path, {"W": 2 * W}, META)  # the space was given back
    assert np.array_equal(checkpoint.read(path, "checkpoint")[0]["W"], 2 * W)


def test_a_limit_on_file_sizes_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c"
    checkpoint.write(path, {"W": W}, META)
    limit = (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    program = """
        import sys
        import numpy as np
        from gpudbn import checkpoint
        try:
            checkpoint.write(sys.argv[1], {"W": np.zeros(100_000, np.float32)}, {"kind": "checkpoint"})
        except checkpoint.UserError as error:
            print(error)
        """
    with child(program, path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as process:
        said = process.stdout.read()
    assert said == f"{path}: must be writable; got 'File too large'. Raise the limit on file sizes (ulimit -f)\n"
    assert content(tmp_path) == ["c"]
    assert np.array_equal(checkpoint.read(path, "checkpoint")[0]["W"], W)


def test_a_read_only_disk(small_disk):
    checkpoint.write(small_disk / "c", {"W": W}, META)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"/c: must be writable; got 'Read-only file system'\. Check its permissions"):
        checkpoint.write(small_disk / "c", {"W": 2 * W}, META)
    assert np.array_equal(checkpoint.read(small_disk / "c", "checkpoint")[0]["W"], W)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"must be writable; got 'Permission denied'\. Check its permissions"):
        checkpoint.write(tmp_path / "c", {"W": W}, META)


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, reason, hint in (("file/c", "Not a directory", "A part of the path is a file"),
                               ("no/c", "No such file or directory", "Make the folder first"),
                               ("folder", "Is a directory", "It is a folder; name a file"),
                               ("x" * 300, "File name too long", "Choose a shorter name")):
        with pytest.raises(UserError) as error:
            checkpoint.write(tmp_path / name, {"W": W}, META)
        assert one_line(error).startswith(f"{tmp_path / name}: must be writable; got '{reason}'. {hint}")
    assert content(tmp_path) == ["file", "folder"]
    assert content(tmp_path / "folder") == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(errno.EIO, "x")])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    checkpoint.write(tmp_path / "c", {"W": W}, META)

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), fail)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        checkpoint.write(tmp_path / "c", {"W": 2 * W}, META)
    monkeypatch.undo()
    assert content(tmp_path) == ["c"]
    assert np.array_equal(checkpoint.read(tmp_path / "c", "checkpoint")[0]["W"], W)


def test_the_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(os.fstat(file)), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *names: (order.append("rename"), replace(*names)))
    checkpoint.write(tmp_path / "c", {"W": W}, META)
    data, rename, folder = order
    assert rename == "rename"
    assert data.st_size == (tmp_path / "c").stat().st_size
    assert folder.st_ino == tmp_path.stat().st_ino


def test_kill_9_in_the_middle_of_writing_leaves_a_whole_file(tmp_path):
    program = """
        import sys
        import numpy as np
        from gpudbn import checkpoint
        for update in range(1, 1_000_000):
            checkpoint.write(sys.argv[1], {"W": np.full(4_000_000, update, np.float32)},
                             {"kind": "checkpoint", "update": update})
            print(update, flush=True)
        """
    path = tmp_path / "c"
    deadline = time.monotonic() + 15
    while not list(tmp_path.glob(checkpoint.TEMPORARY)):  # until one was killed in the middle
        assert time.monotonic() < deadline
        with child(program, path) as process:
            process.stdout.readline()
            while not list(tmp_path.glob(checkpoint.TEMPORARY)):
                assert time.monotonic() < deadline
            process.kill()
        assert process.returncode == -signal.SIGKILL
        arrays, meta = checkpoint.read(path, "checkpoint")
        assert meta["update"] >= 1
        assert np.all(arrays["W"] == meta["update"])


# Reads that fail


def test_a_missing_file_names_the_nearest(tmp_path):
    checkpoint.write(tmp_path / "model.safetensors", {"W": W}, {"kind": "model"})
    with pytest.raises(UserError) as error:
        checkpoint.read(tmp_path / "modle.safetensors", "model")
    assert one_line(error) == (f"{tmp_path}/modle.safetensors: must be a model file; got no such file. "
                               f"Did you mean {tmp_path}/model.safetensors?")
    with pytest.raises(UserError, match=r"got no such file$"):
        checkpoint.read(tmp_path / "quite/another", "model")
    with pytest.raises(UserError, match=r"must be readable; got 'Not a directory'\. A part of the path is a file"):
        checkpoint.read(tmp_path / "model.safetensors/x", "model")
    with pytest.raises(UserError, match=r"must be readable; got 'File name too long'"):
        checkpoint.read(tmp_path / ("x" * 300), "model")
    with pytest.raises(UserError, match=r"got a folder\. Did you mean .*/model.safetensors\?$"):
        checkpoint.read(tmp_path, "model")
    with pytest.raises(UserError, match=r"must be a checkpoint file; got a folder$"):
        checkpoint.read(tmp_path, "checkpoint")


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "c"
    checkpoint.write(path, {"W": W}, META)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 7), 1, 8, 9, len(whole) - 84, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="must be a whole safetensors file; got one that is cut short or damaged"):
            checkpoint.read(path, "checkpoint")
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path, "checkpoint")


def test_what_is_no_safetensors_file(tmp_path):
    for junk in (b"PK\3\4" + bytes(500), b"x = 1\n" * 50, b"\xff" * 64, (8).to_bytes(8, "little") + b"[1,2,3]  "):
        (tmp_path / "c").write_bytes(junk)
        with pytest.raises(UserError, match="must be a whole safetensors file") as error:
            checkpoint.read(tmp_path / "c", "model")
        one_line(error)


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_no_flipped_bit_goes_unseen(tmp_path, bit):
    path = tmp_path / "c"
    checkpoint.write(path, {"W": W, "n": np.arange(3)}, {"kind": "checkpoint", "update": 17, "rate": 0.1})
    whole = bytearray(path.read_bytes())
    for at in range(len(whole)):
        whole[at] ^= bit
        path.write_bytes(whole)
        with pytest.raises(UserError) as error:
            checkpoint.read(path, "checkpoint")
        assert str(path) in one_line(error)
        whole[at] ^= bit
    path.write_bytes(whole)
    assert checkpoint.read(path, "checkpoint")[1]["update"] == 17


def test_the_other_kind_says_who_reads_it(tmp_path):
    checkpoint.write(tmp_path / "c", {"W": W}, META)
    checkpoint.write(tmp_path / "m", {"W": W}, {"kind": "model"})
    with pytest.raises(UserError, match=r"must be a model; got a checkpoint\. gpudbn\.train --resume reads") as error:
        checkpoint.read(tmp_path / "c", "model")
    one_line(error)
    with pytest.raises(UserError, match=r"must be a checkpoint; got a model\. gpudbn\.predict, .* read models"):
        checkpoint.read(tmp_path / "m", "checkpoint")
    with pytest.raises(ValueError, match="kind must be one of model, checkpoint; got 'modle'"):
        checkpoint.read(tmp_path / "m", "modle")


def test_a_newer_format_asks_for_an_upgrade(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    checkpoint.write(tmp_path / "m", {"W": W}, {"kind": "model"})
    monkeypatch.undo()
    with pytest.raises(UserError) as error:
        checkpoint.read(tmp_path / "m", "model")
    assert one_line(error) == (f"{tmp_path}/m: must be of a format known here; got one written by a newer gpudbn "
                               "(format 7; this one reads up to 1). Upgrade gpudbn")


@pytest.mark.parametrize("head", [
    None, "{", "[]", "3", "null", '{"format": 1}', '{"format": "1", "kind": "model"}', '{"format": 0, "kind": "model"}',
    '{"format": 1, "kind": "model"}', '{"format": 1, "kind": ["x"], "meta": {}}',
    '{"format": 1, "kind": "model", "meta": 3}'])
def test_safetensors_files_of_others(tmp_path, head):
    safetensors.numpy.save_file({"W": W}, tmp_path / "m", None if head is None else {"gpudbn": head})
    with pytest.raises(UserError, match=r"/m: must .*; got ") as error:
        checkpoint.read(tmp_path / "m", "model")
    one_line(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_must_be_finite_a_checkpoint_need_not(tmp_path, value):
    arrays = {"W": W, "c": np.array([1, value, 2], np.float32), "chain": np.arange(3)}
    checkpoint.write(tmp_path / "m", arrays, {"kind": "model"})
    with pytest.raises(UserError, match=r"must hold finite numbers; got NaN or infinity in c\. Train again") as error:
        checkpoint.read(tmp_path / "m", "model")
    one_line(error)
    checkpoint.write(tmp_path / "c", arrays, META)
    assert np.array_equal(checkpoint.read(tmp_path / "c", "checkpoint")[0]["c"], arrays["c"], equal_nan=True)
