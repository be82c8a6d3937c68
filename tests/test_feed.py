"""Feeds: resident or streamed, the rows are the same; buffers are never used before or after their time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpudbn import feed
from gpudbn.data import Rows
from gpudbn.dbn import DBN
from gpudbn.errors import NonFiniteError
from gpudbn.feed import Feed, Resident, Span, Streamed, feed_of
from gpudbn.loop import Training
from gpudbn.mpi.alone import Alone
from tests.cuda_on_cpu import runtime
from tests.helpers import planted
from tests.pretend_cupy import installed
from tests.test_gpu_path import finished, on_device, strong
from tests.test_loop import small_data

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=f"no kernel runs here: {runtime.why_not()}")

# What of the device comes late: copies, kernels, or both, so that the host is far ahead.
LATE = {"copies": (False, True), "kernels": (True, False), "both": (True, True)}
DTYPES = ["uint8", "bool", "float16", "float32", "float64"]


def table(dtype, N=53, n=13):
    """Rows of this dtype with labels, some of a larger table."""
    numbers = np.random.default_rng(4)
    values = numbers.integers(0, 256, (N, n)) if dtype == "uint8" else numbers.random((N, n)) < 0.4 \
        if dtype == "bool" else numbers.random((N, n))
    return Rows(values.astype(dtype), 1 / 255 if dtype == "uint8" else 1.0,
                numbers.integers(0, 9, N).astype(np.int32), np.arange(N - 1, 2, -1))


def epoch(of, order, xp, turn=6, batch=4):
    """All minibatches and labels of an epoch, with turns of ``turn`` rows."""
    positions, found, labels = of.begin(order), [], []
    for first in range(0, len(order), turn):
        here = positions[first : first + turn]
        of.turn(first, len(here))
        for lo in range(0, len(here), batch):
            part = here[lo : lo + batch]
            out = xp.empty((len(part), of.rows.n), np.float32)
            of.take(part, out)
            found.append(out)
            labels.append(of.take_labels(part).copy())
        of.ahead(first + turn, len(positions[first + turn : first + 2 * turn]))
    return [np.concatenate([array if xp is np else array.get() for array in arrays]) for arrays in (found, labels)]


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_feed_gives_the_same_rows(dtype, late):
    rows = table(dtype)
    orders = [np.random.default_rng(seed).permutation(len(rows)) for seed in range(3)]
    here = feed_of(rows, np, 6)
    assert type(here) is Feed
    expected = [epoch(here, order, np) for order in orders]
    assert np.array_equal(expected[0][0], rows.array[rows.index[orders[0]]].astype(np.float32) * np.float32(rows.scale))
    with installed() as device:
        import cupy

        device.late_kernels, device.late_copies = LATE[late]
        for of, kind in ((feed_of(rows.to(cupy), cupy, 6), Resident), (feed_of(rows, cupy, 6), Streamed)):
            assert type(of) is kind
            for order, wanted in zip(orders, expected, strict=True):
                for found, array in zip(epoch(of, order, cupy), wanted, strict=True):
                    assert found.dtype == array.dtype
                    assert np.array_equal(found, array)


def test_spans_are_cut_as_arrays_are():
    whole = np.arange(7)
    for cut in (slice(2, 5), slice(5, 20), slice(0, 0), slice(9, 12)):
        part = Span(0, 7)[cut]
        assert list(range(part.first, part.first + len(part))) == whole[cut].tolist() or len(part) == 0
    assert Span(3, 9, "turn")[2:4] == Span(5, 2, "turn")


def test_buffers_have_room_for_no_more_rows_than_there_are():
    """However long the turns are that --period or --n-push asks for."""
    with installed() as device:
        import cupy

        rows = table("uint8")
        feed = feed_of(rows, cupy, 10**4)
        assert [len(side.arrays[0][0]) for side in feed.sides] == [len(rows)] * 2
        assert device.held == 2 * len(rows) * (rows.n + 4)


def test_bytes_travel_as_bytes():
    with installed() as device:
        import cupy

        epoch(feed_of(table("uint8"), cupy, 6), np.arange(50), cupy)
        sent = device.copies("to device")
    assert sum(size for dtype, size in sent if dtype == np.uint8) == 50 * 13
    assert sum(size for dtype, size in sent if dtype == np.int32) == 50
    assert {dtype for dtype, _ in sent} == {np.dtype(np.uint8), np.dtype(np.int32)}


# ------------------------------------------------------------------------------------------------- whole runs


def streamed(late, options, tmp_path):
    """All arrays after a run with training rows in a file."""
    with installed() as device:
        import cupy

        device.late_kernels, device.late_copies = LATE[late]
        data = small_data()
        rows = np.empty((len(data.train), data.n), np.float32)
        data.train.take(np.arange(len(rows)), rows)
        np.save(tmp_path / "rows.npy", rows)
        mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
        data = replace(data, train=Rows(mapped, 1.0, data.train.take_labels(np.arange(len(rows)))))
        settings = strong(**options)
        run = Training(DBN([data.n, *settings.layers], cupy), data, settings, Alone())
        list(run.run())
        return run.dbn.arrays(), device.graphs


OPTIONS = {"method": "pcd", "k": 2, "epochs": 4, "binarise": "stochastic"}


def resident():
    with installed():
        return finished(on_device(strong(**OPTIONS)))[0].dbn.arrays()


@pytest.mark.parametrize("late", LATE)
def test_a_streamed_run_has_the_bits_of_a_resident_one(late, monkeypatch, tmp_path):
    monkeypatch.setattr("gpudbn.loop.TURN", 2)
    expected = resident()
    found, graphs = streamed(late, OPTIONS, tmp_path)
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    assert graphs, "a graph for each of the two buffers"


FAULTS = {
    "a buffer of the host is filled before it is sent": ("side.copied.synchronize()", "pass", "both"),
    "a buffer of the device is filled before it is read": ("self.copying.wait_event(side.used)", "pass", "kernels"),
    "a buffer is read before it is filled": ("computing.wait_event(side.copied)", "pass", "copies"),
    "the end of a turn is told too early": ("self.sides[self.side].used.record(computing)",
                                            "self.sides[self.side].used.record(self.copying)", "kernels"),
    "the buffers are in the wrong order": ("self._send(self.sides[1 - self.side], first, count)",
                                           "self._send(self.sides[self.side], first, count)", "kernels"),
    "rows of an epoch before": ("side.count = 0", "pass", "copies"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_buffer_used_at_the_wrong_time_is_noticed(fault, monkeypatch, tmp_path):
    monkeypatch.setattr("gpudbn.loop.TURN", 4 if "epoch" in fault else 2)  # two turns an epoch, or four
    line, becomes, late = FAULTS[fault]
    expected = resident()
    with planted(feed, line, becomes):
        try:
            found, _ = streamed(late, OPTIONS, tmp_path)
        except (NonFiniteError, ValueError):
            return
    assert any(not np.array_equal(found[name], array) for name, array in expected.items())


def test_a_turn_is_short_enough_for_its_buffers(monkeypatch, tmp_path):
    monkeypatch.setattr("gpudbn.loop.AT_ONCE", 3 * 8 * 13 * 4 + 1)  # three updates, of 8 rows of 13 floats
    sizes = []
    monkeypatch.setattr(feed.Side, "__init__", lambda self, xp, count, rows, inner=feed.Side.__init__: (
        sizes.append(count), inner(self, xp, count, rows))[1])
    expected = resident()
    found, _ = streamed("copies", OPTIONS, tmp_path)
    assert set(sizes) == {24, 20}, "3 updates of 8 rows; 2 of 10 in fine-tuning"
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
