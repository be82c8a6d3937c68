"""Rows: what is taken is plain NumPy indexing, whatever the dtype and place; shards share nothing and lose nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gpudbn.data.rows import Rows

DTYPES = ["uint8", "bool", "float16", "float32", "float64", ">f4"]


def table(dtype, rows=101, columns=37, seed=0):
    """Random rows of this dtype and their scale."""
    numbers = np.random.default_rng(seed)
    if dtype == "uint8":
        return numbers.integers(0, 256, (rows, columns), np.uint8), 1 / 255
    values = numbers.random((rows, columns))
    return (values < 0.5 if dtype == "bool" else values.astype(dtype)), 1.0


def taken(rows, positions, empty=np.empty):
    out = empty((len(positions), rows.n), np.float32)
    rows.take(np.asarray(positions), out)
    return out


@pytest.mark.parametrize("place", ["memory", "fortran", "mapped", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_take_is_indexing(dtype, place, tmp_path):
    array, scale = table(dtype)
    positions = np.array([100, 0, 7, 7, 53])
    expected = array[positions].astype(np.float32) * np.float32(scale)
    if place == "fortran":
        array = np.asfortranarray(array)
    elif place != "memory":
        skipped = 0 if place == "mapped" else 3
        (tmp_path / "rows").write_bytes(b"x" * skipped + array.tobytes())
        array = np.asarray(np.memmap(tmp_path / "rows", array.dtype, "r", skipped, array.shape))
    np.testing.assert_array_equal(taken(Rows(array, scale), positions), expected)


def test_bytes_fill_the_unit_interval():
    array = np.arange(256, dtype=np.uint8)[:, None]
    out = taken(Rows(array, 1 / 255), np.arange(256))
    assert out[0] == 0
    assert out[255] == 1
    assert (np.diff(out[:, 0]) > 0).all()


@pytest.mark.parametrize("index", [None, range(5, 95), np.random.default_rng(1).permutation(101)[:90]],
                         ids=["all", "range", "drawn"])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_shards_partition_the_rows(index, parts):
    array = np.arange(101, dtype=np.float32)[:, None] / 101
    rows = Rows(array, labels=np.arange(101, dtype=np.int32), index=index)
    shards = [rows.shard(part, parts) for part in range(parts)]
    assert all(shard.array is array for shard in shards)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    labels = np.concatenate([shard.take_labels(np.arange(len(shard))) for shard in shards])
    np.testing.assert_array_equal(np.sort(labels), np.sort(np.arange(101) if index is None else np.asarray(index)))
    for shard in shards:
        everything = np.arange(len(shard))
        np.testing.assert_array_equal(taken(shard, everything)[:, 0], array[shard.take_labels(everything), 0])
    third_of_last = np.array([2 * parts + parts - 1])
    np.testing.assert_array_equal(shards[-1].take_labels(np.array([2])), rows.take_labels(third_of_last))


@pytest.mark.parametrize("first", [None, range(10, 90, 2), np.arange(90, 10, -2)], ids=["all", "range", "drawn"])
@pytest.mark.parametrize("second", [range(3, 30, 4), np.array([30, 3, 3])], ids=["range", "drawn"])
def test_selections_of_selections(first, second):
    array = np.arange(101, dtype=np.float32)[:, None] / 101
    rows = Rows(array, index=first).select(second)
    expected = (np.arange(101) if first is None else np.asarray(first))[np.asarray(second)]
    np.testing.assert_array_equal(taken(rows, np.arange(len(rows)))[:, 0], array[expected, 0])


def test_positions_of_other_splits_are_refused():
    rows = Rows(np.zeros((10, 3), np.uint8), labels=np.zeros(10, np.int32), index=range(2, 5))
    for position in (3, -1):
        with pytest.raises(IndexError, match=r"positions must lie in \[0, 3\)"):
            taken(rows, [0, position])
        with pytest.raises(IndexError, match="positions must lie"):
            rows.take_labels(np.array([position]))


def test_wrong_use_is_refused():
    rows = Rows(np.zeros((10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"out must be \(1, 3\) float32; got \(2, 3\) float32"):
        rows.take(np.array([0]), np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="float64"):
        rows.take(np.array([0]), np.empty((1, 3)))
    with pytest.raises(ValueError, match="must have labels"):
        rows.take_labels(np.array([0]))
    with pytest.raises(ValueError, match=r"part must lie in \[0, 2\); got 2"):
        rows.shard(2, 2)


class Device:
    """An array that only its own module may touch, as CuPy's are."""

    def __init__(self, held):
        self.held = held

    shape, dtype = property(lambda self: self.held.shape), property(lambda self: self.held.dtype)

    def __len__(self):
        return len(self.held)

    def __getitem__(self, key):
        assert isinstance(key, Device), "indexed by an array of another place"
        return Device(self.held[key.held])

    def __setitem__(self, key, value):
        assert isinstance(value, Device), "assigned an array of another place"
        self.held[key] = value.held

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to NumPy")

    def get(self):
        return self.held.copy()


@pytest.fixture
def pretend(monkeypatch):
    """A module that stands for CuPy."""
    def copyto(out, given, casting):
        np.copyto(out.held, given.held, casting=casting)

    def multiply(given, factor, out):
        np.multiply(given.held, factor, out=out.held)

    xp = SimpleNamespace(ndarray=Device, copyto=copyto, multiply=multiply, asarray=lambda a: Device(a.copy()),
                         empty=lambda shape, dtype: Device(np.empty(shape, dtype)))
    monkeypatch.setitem(sys.modules, "cupy", xp)
    return xp


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_a_device(dtype, pretend, monkeypatch):
    monkeypatch.setattr("gpudbn.data.rows.CHUNK", 1000)  # several chunks
    array, scale = table(dtype)
    rows = Rows(array, scale, np.arange(101, dtype=np.int32), range(10, 90))
    there = rows.to(pretend)
    assert isinstance(there.array, Device)
    assert len(there) == len(there.array) == 80
    assert there.array.dtype == (np.float32 if dtype in (">f4", "float64") else dtype)
    assert there.to(pretend) is there
    assert rows.to(np) is rows
    positions = np.array([79, 0, 0, 31])
    np.testing.assert_array_equal(taken(there, positions, pretend.empty).held, taken(rows, positions))
    np.testing.assert_array_equal(there.take_labels(positions).held, positions + 10)
    shard = there.shard(1, 3)
    np.testing.assert_array_equal(taken(shard, [2], pretend.empty).held, taken(rows, [7]))
    back = there.to(np)
    np.testing.assert_array_equal(taken(back, positions), taken(rows, positions))
    with pytest.raises(TypeError, match="NumPy and CuPy arrays together"):
        taken(there, positions)
