"""What load gives for every kind of data: the rows that were written, split as asked for, without filling memory."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpudbn import draws
from gpudbn.data import files, idx, load
from gpudbn.data.rows import CHUNK
from gpudbn.errors import UserError
from tests.data.writers import idx_bytes, labels_of, pictures, rows_of, write_idx


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of each test's own."""
    monkeypatch.setenv("GPUDBN_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scaled(x):
    """What the rows of these pictures must be: (N, n), float32."""
    return x.reshape(len(x), -1).astype(np.float32) * np.float32(1 / 255 if x.dtype == np.uint8 else 1)


def ordered(rows):
    """The same rows in an order of their values."""
    return rows[np.lexsort(rows.T)]


def all_rows(data):
    """Every row with its label, in one order whatever the split was."""
    rows = np.concatenate([np.column_stack([rows_of(part), labels_of(part)])
                           for part in (data.train, data.validation, data.test)])
    return ordered(rows)


def test_digits():
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1197, 300, 300)
    assert (data.n, data.image_shape, data.classes, data.constant) == (64, (8, 8), 10, 3)
    assert data.describe() == ("digits: 1197 training, 300 validation and 300 test rows of 64 columns (8 x 8), "
                               "10 classes; 3 columns never vary")
    rows = all_rows(data)
    # the UCI file: its number of each class, and the sum of all its values
    assert np.bincount(rows[:, -1].astype(int)).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (rows[:, :-1] * 16).sum() == 561718
    assert rows[:, :-1].max() == 1
    assert Path(load.__code__.co_filename).with_name("digits.npz").stat().st_size < 100_000


def test_drawn_splits_share_nothing_and_depend_on_the_seed_alone():
    one, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    for a, b, c in zip(*((d.train, d.validation, d.test) for d in (one, again, other)), strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        assert (a.index != c.index).any()
    parts = [one.train.index, one.validation.index, one.test.index]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    assert one.train.array is one.test.array
    # drawn, not cut: means of positions differ by a few standard deviations (30) at most
    assert max(abs(part.mean() - 898) for part in parts) < 120
    # the stable argsort of the specification's words, so the same on every machine
    blocks = np.arange(450, dtype=np.uint64)
    words = np.stack(draws.philox4x32((blocks, 0, 2**32 - 1, draws.Purpose.ORDER << 24), (1, 0)), axis=1).ravel()[:1797]
    np.testing.assert_array_equal(one.test.index, np.sort(np.argsort(words, kind="stable")[-300:]))


@pytest.mark.parametrize(("validation", "test", "expected"), [
    (None, None, (1197, 300, 300)), (0, 0, (1797, 0, 0)), (100, 0.5, (799, 100, 898)), (1796, 0, (1, 1796, 0)),
    (0.25, 1, (1347, 449, 1)), (300.0, np.int64(7), (1490, 300, 7))])
def test_splits_as_asked_for(validation, test, expected):
    data = load("digits", validation=validation, test=test)
    assert (len(data.train), len(data.validation), len(data.test)) == expected
    assert len(all_rows(data)) == 1797


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_idx_folder(zipped, dash, below, tmp_path):
    written = write_idx(tmp_path / "pictures" / below, zipped=zipped, dash=dash)
    data = load(tmp_path / "pictures", validation=11)
    (x, y), (x_test, y_test) = written["train"], written["t10k"]
    assert data.describe() == ("pictures: 50 training, 11 validation and 23 test rows of 15 columns (5 x 3), 4 classes")
    expected = ((x[:50], y[:50]), (x[50:], y[50:]), (x_test, y_test))
    for part, (rows, labels) in zip((data.train, data.validation, data.test), expected, strict=True):
        np.testing.assert_array_equal(rows_of(part), scaled(rows))
        np.testing.assert_array_equal(labels_of(part), labels)
        assert labels_of(part).dtype == np.int32
    assert data.train.array is data.validation.array
    assert not data.train.array.flags.writeable


def test_a_sixth_is_held_back_but_at_most_ten_thousand(tmp_path):
    write_idx(tmp_path)
    assert len(load(tmp_path).validation) == 10
    assert len(load(tmp_path, validation=0).validation) == 0
    np.save(tmp_path / "many.npy", np.random.default_rng(0).random((90_000, 1), np.float32))
    data = load(tmp_path / "many.npy", need_labels=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (70_000, 10_000, 10_000)


def test_idx_folder_without_test_rows_or_labels(tmp_path):
    written = write_idx(tmp_path, test=0, labels=False)
    data = load(tmp_path, test=0.5, validation=0, need_labels=False)
    assert (len(data.train), len(data.test), data.classes) == (31, 30, 0)
    assert data.describe().endswith("no labels")
    assert data.train.labels is None
    rows = np.concatenate([rows_of(data.train), rows_of(data.test)])
    np.testing.assert_array_equal(ordered(rows), ordered(scaled(written["train"][0])))


DTYPES = ["uint8", "bool", "float16", "float32", "float64", ">f8"]


def values(dtype, count=61, seed=0):
    x, y = pictures(count, seed=seed)
    return {"u": x, "b": x > 127}.get(np.dtype(dtype).kind, (x / 255).astype(dtype)), y


@pytest.mark.parametrize("shape", ["flat", "fortran", "picture", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_npy(dtype, shape, tmp_path):
    x, y = values(dtype)
    given = {"flat": x.reshape(61, 15), "fortran": np.asfortranarray(x.reshape(61, 15)), "picture": x,
             "channel": x[..., None]}[shape]
    np.save(tmp_path / "x.npy", given)
    np.save(tmp_path / "y.npy", y[:, None] if shape == "channel" else y)
    data = load(tmp_path / "x.npy", labels=tmp_path / "y.npy")
    assert data.image_shape == ((5, 3) if shape in ("picture", "channel") else None)
    assert isinstance(base_of(data.train.array), np.memmap)
    np.testing.assert_array_equal(all_rows(data), ordered(np.column_stack([scaled(x), y]).astype(np.float32)))


def base_of(array):
    """What an array is at last a view of, as NumPy sees it."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


NAMES = [("x_train", "y_train", "x_test", "y_test"), ("X", "Y", "X_test", "Y_test"),
         ("train_images", "train_labels", "test_images", "test_labels"),
         ("images", "labels", "images_test", "labels_test"), ("data", "target", "data_test", "target_test")]


@pytest.mark.parametrize("kind", ["stored", "packed", "packed and large"])
@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_npz(dtype, names, kind, tmp_path, monkeypatch, cache):
    if kind == "packed and large":
        monkeypatch.setattr(files, "SMALL", 100)
    (x, y), (x_test, y_test) = values(dtype), values(dtype, 23, seed=1)
    save = np.savez if kind == "stored" else np.savez_compressed
    save(tmp_path / "file.npz", allow_pickle=False, **dict(zip(names, (x, y, x_test, y_test), strict=True)))
    data = load(tmp_path / "file.npz", validation=11)
    assert data.name == "file"
    assert data.image_shape == (5, 3)
    assert isinstance(base_of(data.train.array), np.memmap) == (kind != "packed")
    expected = ((x[:50], y[:50]), (x[50:], y[50:]), (x_test, y_test))
    for part, (rows, labels) in zip((data.train, data.validation, data.test), expected, strict=True):
        np.testing.assert_array_equal(rows_of(part), scaled(rows))
        np.testing.assert_array_equal(labels_of(part), labels)
    assert cache.exists() == (kind == "packed and large")


def test_npz_in_fortran_order_and_after_other_bytes(tmp_path):
    """The offset of a stored member is right where a zip begins late and its members are not aligned."""
    x, _ = values("float64")
    np.savez(tmp_path / "whole.npz", first=np.arange(3, dtype=np.uint8), x=np.asfortranarray(x.reshape(61, 15)))
    (tmp_path / "late.npz").write_bytes(b"#!/bin/false\n" + (tmp_path / "whole.npz").read_bytes())
    data = load(tmp_path / "late.npz", need_labels=False, validation=0, test=0)
    assert not data.train.array.flags.aligned
    np.testing.assert_array_equal(rows_of(data.train), x.reshape(61, 15).astype(np.float32))


def test_compressed_npz_in_fortran_order(tmp_path):
    x, _ = values("float32")
    np.savez_compressed(tmp_path / "file.npz", x=np.asfortranarray(x.reshape(61, 15)))
    data = load(tmp_path / "file.npz", need_labels=False, validation=0, test=0)
    np.testing.assert_array_equal(rows_of(data.train), x.reshape(61, 15))


def test_classes_are_counted_over_all_rows(tmp_path):
    x, y = values("uint8")
    np.savez(tmp_path / "file.npz", x=x, y=y, x_test=x[:2], y_test=np.array([0, 7]))
    assert load(tmp_path / "file.npz").classes == 8
    np.savez(tmp_path / "file.npz", x=x, y=y, x_test=x[:2])
    data = load(tmp_path / "file.npz", need_labels=False)
    assert data.classes == 4
    assert data.test.labels is None


def test_a_file_changed_without_another_size_is_unpacked_again(tmp_path):
    """Told by the time of its last change."""
    path = tmp_path / "file"
    for content, time in ((b"one", 1_000_000_000), (b"two", 1_000_000_001)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        assert files.unpacked(path, "", io.BytesIO(content)).read_bytes() == content


def test_what_is_unpacked_is_kept_until_the_file_changes(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(files, "SMALL", 100)
    monkeypatch.setattr(idx, "SMALL", 100)
    for path, write in ((tmp_path / "a.npz", lambda x: np.savez_compressed(tmp_path / "a.npz", x=x)),
                        (tmp_path / "folder", lambda x: write_gz(tmp_path / "folder", x))):
        seen = []
        for seed in (0, 0, 1):
            x, _ = pictures(61 + seed, seed=seed)
            if seed or not seen:
                write(x)
            data = load(path, need_labels=False, validation=0, test=0)
            np.testing.assert_array_equal(rows_of(data.train), scaled(x))
            assert isinstance(base_of(data.train.array), np.memmap)
            seen.append({p.name: p.stat().st_mtime_ns for p in (cache / "unpacked").iterdir()})
        assert seen[0] == seen[1] != seen[2]
        assert len(seen[2]) == len(seen[0])  # the old one is gone


def write_gz(folder, x):
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(x)))


def test_bits_stored_as_bytes_are_not_dimmed(tmp_path):
    x = (pictures(61)[0] > 127).astype(np.uint8)
    np.savez(tmp_path / "bits.npz", x=x, x_test=x[:1] * 0)
    data = load(tmp_path / "bits.npz", need_labels=False)
    assert rows_of(data.train).max() == 1
    x[0, 0, 0] = 255  # and grey test rows are scaled as the training rows, however dark
    np.savez(tmp_path / "grey.npz", x=x, x_test=x[1:2])
    assert load(tmp_path / "grey.npz", need_labels=False).test.scale == 1 / 255


def anonymous():
    """Bytes of this process's memory that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError


@pytest.mark.parametrize("kind", ["float", "fortran", "npz"])
def test_memory_is_bounded(kind, tmp_path):
    """400 MB on disk (most of it a hole), a few MB in memory: opened, checked, split, sharded, taken."""
    dtype, columns = (np.float32, 250) if kind == "float" else (np.uint8, 1000)
    rows = 400_000
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, "w+", dtype, (rows, columns), fortran_order=kind == "fortran")
    array[0, 0], array[-1, -1] = 1, 1
    del array
    if kind == "npz":  # stored; the hole stays a hole
        path = pack(path)
    before = anonymous() if sys.platform == "linux" else 0
    tracemalloc.start()
    try:
        data = load(path, need_labels=False, validation=1000, test=1000)
        part = data.train.shard(1, 2)
        out = np.empty((100, columns), np.float32)
        part.take(np.arange(len(part) - 100, len(part)), out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.constant == columns - 2
    assert len(data.train) == 398_000
    # the order of 400,000 rows takes 3.2 MB a copy; the rows themselves, 100 or 400 MB
    assert peak < 3 * CHUNK + 6 * 8 * rows
    if sys.platform == "linux":
        assert anonymous() - before < 64 << 20


def pack(path):
    """A .npz that stores this .npy: written by hand, since zipfile would write the hole's zeros."""
    size = path.stat().st_size
    target = path.with_suffix(".npz")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x.npy", b"")
        info = archive.getinfo("x.npy")
        start = archive.fp.tell()
        with path.open("rb") as source:
            archive.fp.write(source.read(4096))
            archive.fp.seek(start + size - 4096)
            source.seek(size - 4096)
            archive.fp.write(source.read())
        info.file_size = info.compress_size = size
        archive.start_dir = archive.fp.tell()
    return target


def test_large_compressed_members_go_through_memory_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    array = np.zeros((40_000, 1000), np.uint8)
    array[7, 5] = 255
    np.savez_compressed(tmp_path / "file.npz", x=array)
    del array
    tracemalloc.start()
    try:
        data = load(tmp_path / "file.npz", need_labels=False, validation=0, test=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows_of(data.train.select(range(7, 8)))[0, 5] == 1
    assert peak < 4 * CHUNK < 40_000_000


def test_nothing_is_left_behind_by_a_failed_write(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.written(tmp_path / "a" / "file") as file:  # noqa: PT012
        file.write(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    with files.written(tmp_path / "a" / "file") as file:
        file.write(b"whole")
        assert not (tmp_path / "a" / "file").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]


def test_the_working_directory_may_hold_a_name_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "digits")
    assert load("digits").n == 64
    assert load("./digits").n == 15
    with pytest.raises(UserError):
        load("digit")
