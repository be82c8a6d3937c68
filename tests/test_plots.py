"""Pictures: whole PNG files of the right size whose pixels are where they belong, from ordinary and odd inputs."""

from __future__ import annotations

import importlib
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest

from gpudbn import plots
from gpudbn.errors import UserError
from gpudbn.mpi.tally import STATES, Tally
from tests.helpers import assert_close, assert_notices

rng = np.random.default_rng(11)
W = rng.normal(size=(35, 13)).astype(np.float32)
ROWS = rng.random((17, 35), np.float32)
LABELS, PREDICTED = rng.integers(0, 3, 101), rng.integers(0, 3, 101)
RECORDS = [
    *({"phase": "pretrain", "layer": layer, "epoch": epoch, "update": 600 * epoch, "free_energy_train": -50.0 - epoch,
       "free_energy_validation": -50.0 - epoch / 2, "reconstruction_train": 8.0 / epoch, "learning_rate": 0.1}
      for layer in (1, 2) for epoch in range(1, 6)),
    *({"phase": "finetune", "epoch": epoch, "loss_train": 1 / epoch, "error_train": 0.1 / epoch,
       "loss_validation": 1.1 / epoch, "error_validation": 0.11 / epoch} for epoch in range(1, 4))]


def pixels(path):
    """The picture as array (height, width, 3), uint8, after every check that a PNG file allows."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, packed = 8, [], b""
    while at < len(data):
        (size,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        packed += body if kind == b"IDAT" else b""
        at += 12 + size
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack_from(">II", data, 16)
    assert len(zlib.decompress(packed)) == height * (1 + 4 * width)
    from matplotlib.image import imread

    picture = np.rint(imread(path)[..., :3] * 255).astype(np.uint8)
    assert picture.shape == (height, width, 3)
    assert 120 <= width <= 4000
    assert 120 <= height <= 4000
    assert picture.std() > 1, "empty"
    return picture


# The builder of mosaics


def test_mosaic_places_every_image():
    images = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    whole = plots.mosaic(images, 2)
    gap = np.nan
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, [
        [gap, gap, gap, gap, gap, gap, gap, gap, gap],
        [gap, 0, 1, 2, gap, 6, 7, 8, gap],
        [gap, 3, 4, 5, gap, 9, 10, 11, gap],
        [gap, gap, gap, gap, gap, gap, gap, gap, gap],
        [gap, 12, 13, 14, gap, 18, 19, 20, gap],
        [gap, 15, 16, 17, gap, 21, 22, 23, gap],
        [gap, gap, gap, gap, gap, gap, gap, gap, gap],
        [gap, 24, 25, 26, gap, gap, gap, gap, gap],
        [gap, 27, 28, 29, gap, gap, gap, gap, gap],
        [gap, gap, gap, gap, gap, gap, gap, gap, gap]])


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (1, 3), (7, 7), (7, 1), (8, 3), (100, 10)])
def test_mosaic_follows_its_formula(count, columns):
    images = rng.random((count, 5, 7), np.float32)
    whole = plots.mosaic(images, columns)
    assert whole.shape == (-(-count // columns) * 6 + 1, columns * 8 + 1)
    for i, image in enumerate(images):
        row, column = 1 + (i // columns) * 6, 1 + (i % columns) * 8
        assert np.array_equal(whole[row : row + 5, column : column + 7], image)
    assert np.isfinite(whole).sum() == images.size


# Where the pixels land


def zoomed(picture, whole, zoom, top, left=24):
    """The middle of each square that shows one entry of the mosaic."""
    height, width = whole.shape
    part = picture[top : top + height * zoom, left : left + width * zoom]
    squares = part.reshape(height, zoom, width, zoom, 3)
    middle = squares[:, zoom // 2, :, zoom // 2]
    assert (squares == middle[:, None, :, None]).all(), "squares are not even"
    return middle.astype(int)


def test_filters_show_the_largest_norms_first_red_above_zero_blue_below(tmp_path):
    weights = np.zeros((35, 4), np.float32)
    weights[:, 2], weights[:, 0], weights[3, 1] = 2, -1, 1
    plots.filters(tmp_path / "f.png", weights, (5, 7), "Filters")
    whole = plots.mosaic(weights.T[[2, 0, 1, 3]].reshape(4, 5, 7), 2)
    shown = zoomed(pixels(tmp_path / "f.png"), whole, plots.ZOOM, top=88)
    assert (shown[np.isnan(whole)] == 0xD0).all()
    red, blue = shown[..., 0], shown[..., 2]
    assert (red > blue)[whole > 0].all()
    assert (red < blue)[whole < 0].all()
    assert (np.abs(red - blue) <= 2)[whole == 0].all()  # white at 0, whatever the extremes
    assert len(np.unique(shown[1:6, 1:8].reshape(-1, 3), axis=0)) == 1


def test_samples_stand_beside_data_black_at_0_white_at_1(tmp_path):
    data, samples = ROWS[:6].round(), 1 - ROWS[:6].round()
    plots.samples(tmp_path / "s.png", samples, data, (5, 7), "Samples")
    picture = pixels(tmp_path / "s.png")
    for rows, left in ((data, 24), (samples, 24 + 13 * len("samples of the model") + 48)):
        whole = plots.mosaic(rows.reshape(6, 5, 7), 3)
        shown = zoomed(picture, whole, plots.ZOOM, top=94, left=left)
        np.testing.assert_array_equal(shown[..., 0], np.where(np.isnan(whole), 0x6E, 255 * whole))


def test_reconstructions_lie_below_their_data(tmp_path):
    data = ROWS[:12].round()
    plots.reconstructions(tmp_path / "r.png", data, 1 - data, (5, 7))
    band = np.zeros((10, 5, 7)) + np.nan
    tiles = [data[:10].reshape(10, 5, 7), 1 - data[:10].reshape(10, 5, 7), band.copy(), band.copy()]
    tiles[2][:2], tiles[3][:2] = data[10:].reshape(2, 5, 7), 1 - data[10:].reshape(2, 5, 7)
    whole = np.insert(plots.mosaic(np.concatenate(tiles), 10), 12, np.nan, axis=0)
    shown = zoomed(pixels(tmp_path / "r.png"), whole, plots.ZOOM, top=88)
    np.testing.assert_array_equal(shown[..., 0], np.where(np.isnan(whole), 0x6E, 255 * whole))


def test_confusion_colours_right_blue_and_wrong_vermilion():
    colours = plots._confusion_colours(np.array([[0.9, 0.1, 0], [0.05, 0.95, 0], [0, 0, 1.0]]))
    assert np.allclose(colours[2, 2] * 255, [0x00, 0x72, 0xB2])
    assert np.allclose(colours[0, 2], 1)
    assert colours[0, 1][0] > colours[0, 1][2]  # the largest share of errors is seen, however small
    assert np.allclose(1 - colours[1, 0], (1 - colours[0, 1]) / 2)


# Everything draws, without a warning (pytest makes them errors)


def test_ordinary_inputs(tmp_path):
    path = tmp_path / "p.png"
    plots.filters(path, W, None, "Weights")
    pixels(path)
    plots.samples(path, ROWS, ROWS[::-1], None, "Samples")
    pixels(path)
    plots.reconstructions(path, ROWS, ROWS**2, None)
    pixels(path)
    plots.confusion(path, LABELS, PREDICTED, 3)
    pixels(path)
    plots.confusion(path, LABELS, PREDICTED, ["cat", "US$ and $", "Tyrannosaurus rex"])
    pixels(path)
    plots.curves(path, RECORDS)
    picture = pixels(path)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (picture == colour).all(-1).sum() > 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize(("weights", "shape"), [
    (W[:, :1], (5, 7)), (W[:, :1], None), (W[:1, :1], (1, 1)), (W[:1, :1], None), (W, (35, 1)),
    (np.zeros((35, 3)), (5, 7)), (np.full((35, 3), 2.5), None), (np.full((35, 2), np.nan), (5, 7)),
    (np.full((35, 2), np.nan), None), (np.where(W > 1, np.inf, W), (5, 7)), (W * 1e-30, None),
    (W.astype(np.float64) * 1e300, (5, 7)), (rng.normal(size=(35, 211)), (5, 7))])
def test_odd_filters(tmp_path, weights, shape):
    plots.filters(tmp_path / "f.png", weights, shape, "x $ \\alpha_{ " * 6)
    pixels(tmp_path / "f.png")


@pytest.mark.parametrize(("rows", "shape"), [
    (ROWS[:1], (5, 7)), (ROWS[:1], None), (np.zeros((3, 35)), (1, 35)), (np.full((3, 35), -7.0), (35, 1)),
    (np.full((3, 35), np.nan), (5, 7)), (np.full((3, 35), np.nan), None), (100 * ROWS - 50, (5, 7)),
    (ROWS.astype(np.uint8), None), (np.tile(ROWS, (13, 1)), (5, 7)), (ROWS > 0.5, (5, 7))])
def test_odd_rows(tmp_path, rows, shape):
    plots.samples(tmp_path / "s.png", rows, ROWS, shape, "Samples")
    pixels(tmp_path / "s.png")
    plots.reconstructions(tmp_path / "r.png", rows, np.asarray(rows, float)[::-1], shape)
    pixels(tmp_path / "r.png")


@pytest.mark.parametrize("records", [
    [], [{}], [{"phase": None}], RECORDS[:1], RECORDS[:3], [{"epoch": 1}, {"epoch": 2}],
    [{"loss": None, "epoch": 1}, {"loss": 2.0, "epoch": 2}, {"epoch": 3}, {"loss_train": 1.0}],
    [{"phase": "pretrain", "layer": 1, "free_energy_train": float("nan"), "reconstruction_train": "text"}],
    [{"phase": "pretrain", "layer": 1, "epoch": 1, "free_energy_train": -1.0, "free_energy_validation": None}] * 3,
    [{"phase": "up-down $", "layer": [1], "update": 10**12, "loss_train": 1e300, "loss_validation": -1e-300}],
    [{"phase": "finetune", "epoch": 1 + i // 10, "update": i, "error_train": 0.5} for i in range(400)]])
def test_odd_records(tmp_path, records):
    plots.curves(tmp_path / "c.png", records)
    pixels(tmp_path / "c.png")


@pytest.mark.parametrize("classes", [2, 13, 60])
def test_odd_confusions(tmp_path, classes):
    labels = rng.integers(0, classes, 1009)
    plots.confusion(tmp_path / "k.png", labels, labels, classes)  # none wrong
    pixels(tmp_path / "k.png")
    plots.confusion(tmp_path / "k.png", np.zeros(5, int), np.ones(5, int), classes)  # all wrong, classes without rows
    pixels(tmp_path / "k.png")


def test_no_labels_at_all(tmp_path):
    plots.confusion(tmp_path / "k.png", np.zeros(0, int), np.zeros(0, int), ["a", "b"])
    assert (tmp_path / "k.png").is_file()


def test_several_records_an_epoch_count_updates():
    records = [{"epoch": 1 + i // 2, "update": 10 * i, "loss_train": 1.0} for i in range(5)]
    assert plots._lines(records)[:2] == (pytest.approx([0, 10, 20, 30, 40]), "update")
    assert plots._lines(records[::2])[:2] == (pytest.approx([1, 2, 3]), "epoch")
    assert plots._lines([{"loss_train": 1.0}] * 2)[:2] == (pytest.approx([1, 2]), "record")


def test_the_gap_of_the_free_energies_and_percent():
    _, _, panels = plots._lines(RECORDS[:5])
    quantity, train, validation = panels[1]
    assert quantity.startswith("gap")
    assert np.isnan(train).all()
    assert np.array_equal(validation, [0.5, 1, 1.5, 2, 2.5])
    _, _, panels = plots._lines(RECORDS[-3:])
    assert [panel[0] for panel in panels] == ["loss (nats)", "wrong labels (%)"]
    assert np.allclose(panels[1][1], [10, 5, 10 / 3])


# The ranks


def rank(role, number, life, host="a", start=7.0, **more):
    """The report of a rank that was in these states for so many seconds."""
    clock = [start]
    tally = Tally(lambda: clock[0], life[0][0])
    for state, seconds in life:
        tally.enter(state)
        clock[0] += seconds
    return {"role": role, "number": number, **tally.about(), "host": host, **more}


def ranks(count):
    turns = 400
    replicas = [rank("replica", i, [("starting", 0.5), *turns * [("computing", 0.01 + i / 1000), ("waiting", 0.002)]],
                     host=f"node{i % 3}.here") for i in range(count)]
    server = rank("server", 0, [("starting", 0.1), *turns * [("waiting", 0.01), ("applying", 0.001)]],
                  applied=[turns + i for i in range(count)], staleness=[5, 40, 20, *[0] * 29])
    return [server, *replicas]


@pytest.mark.parametrize("count", [1, 6, 63])
def test_pictures_of_few_and_many_ranks(tmp_path, count):
    plots.timeline(tmp_path / "t.png", ranks(count))
    plots.staleness(tmp_path / "s.png", ranks(count))
    pixels(tmp_path / "t.png")
    pixels(tmp_path / "s.png")


def test_a_timeline_shows_who_did_what_when(tmp_path):
    """Two ranks that change places in the middle of a run; the second one begins and ends two seconds later."""
    def check():
        plots.timeline(tmp_path / "t.png", [rank("replica", 0, [("computing", 4), ("waiting", 4)]),
                                            rank("replica", 1, [("waiting", 4), ("computing", 4)], start=9.0)])
        picture = pixels(tmp_path / "t.png")
        height, left = 30, 60 + 11 * len("replica 0")
        lines = [picture[164 + 13 + i * height, left : left + plots.ACROSS] for i in range(2)]
        blue, grey = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (
            plots.BLUE, plots._STATES["waiting"]))
        for line, at, colour in ((0, 0.2, blue), (0, 3.8, blue), (0, 4.2, grey), (0, 7.8, grey), (0, 8.2, None),
                                 (1, 1.8, None), (1, 2.2, grey), (1, 5.8, grey), (1, 6.2, blue), (1, 9.8, blue)):
            assert lines[line][int(at / 10 * plots.ACROSS)].tolist() == (colour or [255, 255, 255]), (line, at)

    assert_notices(check, plots, 'edges - line["start"]', "edges - 7")


def test_stretches_and_single_entries_show_the_same():
    line = rank("replica", 0, 200 * [("computing", 0.013), ("waiting", 0.004), ("transferring", 0.003)])["timeline"]
    edges = np.linspace(0.5, 3.5, 7) + 7.0
    stretches, entries = plots._shares(line, edges, exact=False), plots._shares(line, edges, exact=True)
    assert_close(stretches, entries, atol=0.02)
    assert_close(stretches[:, 0], [0.65, 0, 0, 0, 0.15, 0.2, 0], atol=0.02)


def test_a_column_of_a_timeline_is_filled_by_shares():
    shares = np.zeros((len(STATES), 3))
    shares[STATES.index("computing")], shares[STATES.index("waiting")] = [1, 0.75, 0], [0, 0.25, 0]
    stripe = plots._stripe(shares, 8)
    assert stripe.shape == (8, 3, 3)
    assert len(np.unique(stripe[:7, 0], axis=0)) == 1
    assert (stripe[7] == 1).all()
    assert (stripe[:7, 2] == 1).all()
    assert (stripe[:2, 1] == stripe[0, 1]).all()
    assert (stripe[2:7, 1] == stripe[0, 0]).all()


# Around the pictures


def test_equal_input_gives_equal_bytes_in_every_thread(tmp_path):
    def draw(i):
        plots.filters(tmp_path / f"f{i}.png", W, (5, 7), "Filters")
        plots.curves(tmp_path / f"c{i}.png", RECORDS[:5])

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for letter in "fc":
        assert len({(tmp_path / f"{letter}{i}.png").read_bytes() for i in range(4)}) == 1


def test_one_thread_draws_at_a_time(tmp_path):
    thread = threading.Thread(target=plots.curves, args=(tmp_path / "c.png", []))
    with plots._drawing:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(30)
    assert (tmp_path / "c.png").is_file()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no/f\.png: must be writable; got 'No such file or directory'"):
        plots.filters(tmp_path / "no/f.png", W, (5, 7), "Filters")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0)), np.zeros((1, 2, 3))])
def test_what_is_no_matrix(tmp_path, array):
    with pytest.raises(ValueError, match=r"must have two dimensions and an entry; got shape \("):
        plots.filters(tmp_path / "f.png", array, None, "Filters")


def test_without_matplotlib_it_says_so(monkeypatch):
    assert plots.available() is None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in plots.available()
    importlib.reload(plots)  # the module itself needs none


def test_import_brings_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    program = f"""
import sys, numpy
from gpudbn import plots
assert not [name for name in sys.modules if name.startswith("matplotlib")]
plots.filters({str(tmp_path / "f.png")!r}, numpy.eye(6), (2, 3), "x")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "MPLBACKEND": "tkagg"})
    assert (tmp_path / "f.png").is_file()
