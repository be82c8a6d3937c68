"""Pictures of a run: filters, samples, reconstructions, learning curves, confusions, and its ranks, as PNG files.

Matplotlib is imported by the functions that draw, never by ``import gpudbn``. Figures are made
without pyplot, so no window opens, no global state changes, and threads may draw; files appear
whole or not at all. Colours: blue is training or right, vermilion is validation or wrong, a pair
that colour-blind readers can tell apart (Wong 2011, doi:10.1038/nmeth.1618).
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpudbn.arrays import Array, to_cpu
from gpudbn.checkpoint import write_atomically
from gpudbn.mpi.tally import STATES

BLUE, VERMILION = "#0072B2", "#D55E00"
INK, PALE = "#222222", "#8A8A8A"
DPI = 160
MOST = 100  # tiles in a mosaic
PAIRS = 30  # of data and reconstruction
WIDTH, ZOOM = 900, 10  # pixels a mosaic may take, and a pixel of it

ACROSS = 900  # pixels of a timeline
ZOOMED = 40  # changes of state that its closest look shows of a rank
# What a rank is at, from below where a pixel holds several; green, sky, purple and orange are Wong's, too.
_STATES = {"computing": BLUE, "applying": "#009E73", "measuring": "#56B4E9", "saving": "#CC79A7",
           "transferring": "#E69F00", "starting": "#BBBBBB", "waiting": "#E6E6E6"}

_drawing = threading.Lock()  # Matplotlib's font and text caches are shared between figures

# What one panel of the curves shows: quantity, its training key, its validation key, factor.
_GAP = "gap, validation − training (nats)"
_PANELS = (
    ("free energy (nats)", "free_energy_train", "free_energy_validation", 1),
    (_GAP, None, None, 1),
    ("reconstruction error", "reconstruction_train", "reconstruction_validation", 1),
    ("loss (nats)", "loss_train", "loss_validation", 1),
    ("squared error", "squared_error_train", "squared_error_validation", 1),
    ("wrong labels (%)", "error_train", "error_validation", 100),
)
_PHASES = {"finetune": "Fine-tuning"}


def available() -> str | None:
    """One sentence why no picture can be drawn, or None if they can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"Matplotlib cannot be imported ({str(error).splitlines()[0]}); pip install matplotlib"
    return None


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side, ``columns`` a row, with one pixel of NaN between and around them.

    Parameters
    ----------
    images : array (N, height, width)
        N at least 1. Not modified.
    columns : int
        At least 1.

    Returns
    -------
    array (ceil(N / columns) * (height + 1) + 1, columns * (width + 1) + 1), float32
        Image i lies at row 1 + (i // columns) * (height + 1), column 1 + (i % columns) * (width + 1).

    Examples
    --------
    >>> mosaic(np.arange(3).reshape(3, 1, 1), 2)
    array([[nan, nan, nan, nan, nan],
           [nan,  0., nan,  1., nan],
           [nan, nan, nan, nan, nan],
           [nan,  2., nan, nan, nan],
           [nan, nan, nan, nan, nan]], dtype=float32)
    """
    count, height, width = images.shape
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, height + 1, width + 1), np.nan, np.float32)
    tiles[:count, 1:, 1:] = images
    whole = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan, np.float32)
    whole[:-1, :-1] = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2).reshape(
        rows * (height + 1), columns * (width + 1))
    return whole


def filters(path: Path | str, W: Array, image_shape: tuple[int, int] | None, title: str) -> None:
    """The receptive fields of hidden units: the columns of W, largest norm first.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    W : array (n, m)
        For a deeper layer: the product of the weights from the pixels up to it. Not modified.
    image_shape : (int, int) or None
        Height and width, whose product is n. None draws the columns as a heat map.
    title : str
    """
    W = np.clip(_rows(W), -1e30, 1e30)
    norms = np.sqrt((np.nan_to_num(W) ** 2).sum(0))
    shown = W[:, np.argsort(-norms, kind="stable")[:MOST]]
    count, total = shown.shape[1], W.shape[1]
    largest = _scale(shown)
    look = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}  # white is 0
    which = f"all {total} hidden units" if count == total else f"{count} of {total} hidden units"
    note = f"{which}, largest norm first" if total > 1 else "1 hidden unit"
    if image_shape is None:
        _draw_heat_maps(path, [("", shown)], look, title, note, "weight", ("hidden unit, by norm", "visible unit"))
    else:
        images = shown.T.reshape(count, *image_shape)
        _draw_mosaics(path, [("", mosaic(images, _columns(count, image_shape)))], look, title, note, "weight")


def samples(path: Path | str, samples: Array, data: Array | None, image_shape: tuple[int, int] | None,
            title: str) -> None:
    """Samples of the model, beside data if there are any.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    samples, data : arrays (N, n), (D, n); data may be None
        The first rows of each are shown. Not modified.
    image_shape : (int, int) or None
        Height and width, whose product is n. None draws the rows as heat maps.
    title : str
    """
    drawn = _rows(samples)
    shown = [("", drawn)] if data is None else [("data", _rows(data)), ("samples of the model", drawn)]
    count = min(MOST, *(len(rows) for _, rows in shown))
    shown = [(name, rows[:count]) for name, rows in shown]
    look = _values(shown[0][1])
    if image_shape is None:
        _draw_heat_maps(path, shown, look, title, None, "value", ("visible unit", "row"))
        return
    columns = _columns(count, image_shape)
    panels = [(name, mosaic(rows.reshape(count, *image_shape), columns)) for name, rows in shown]
    _draw_mosaics(path, panels, look, title, None, None)


def reconstructions(path: Path | str, data: Array, reconstructed: Array, image_shape: tuple[int, int] | None,
                    title: str = "Data and their reconstructions") -> None:
    """Each row of the data above what the model makes of it.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    data, reconstructed : arrays (N, n)
        The first rows are shown. Not modified.
    image_shape : (int, int) or None
        Height and width, whose product is n. None draws the rows as heat maps.
    title : str
    """
    data, reconstructed = _rows(data), _rows(reconstructed)
    with np.errstate(all="ignore"):  # a diverged model still gets its picture
        error = float(np.sqrt(np.mean((data - reconstructed) ** 2)))
    note = f"root mean square difference {error:.3g}"
    count = min(len(data), PAIRS)
    data, reconstructed = data[:count], reconstructed[:count]
    look = _values(data)
    if image_shape is None:
        _draw_heat_maps(path, [("data", data), ("reconstructions", reconstructed)], look, title, note, "value",
                        ("visible unit", "row"))
        return
    columns = min(count, 10)
    pairs = []
    for start in range(0, count, columns):
        for rows in (data, reconstructed):
            band = np.full((columns, *image_shape), np.nan, np.float32)
            images = rows[start : start + columns].reshape(-1, *image_shape)
            band[: len(images)] = images
            pairs.append(band)
    _draw_mosaics(path, [("", mosaic(np.concatenate(pairs), columns))], look, title,
                  f"data above, reconstructions below; {note}", None, every=2 * (image_shape[0] + 1))


def curves(path: Path | str, records: Sequence[Mapping[str, Any]], title: str = "Learning curves") -> None:
    """What the metrics say, a column for each layer and phase.

    Free energy of training and validation rows and their gap, whose growth is the sign of
    overfitting; reconstruction error; loss and wrong labels.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    records : sequence of mappings
        Metric records. Keys that are missing or null leave gaps; unknown keys are ignored.
    title : str
    """
    from matplotlib.figure import Figure

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(_name(record.get("phase"), record.get("layer")), []).append(record)
    columns = [(name, *_lines(found)) for name, found in groups.items()]
    columns = [column for column in columns if column[3]]
    height = max((len(column[3]) for column in columns), default=1)
    with _drawing:
        figure = Figure(figsize=(max(5.6, 3.5 * len(columns)), 0.9 + 2.1 * height), dpi=DPI, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        if not columns:
            figure.suptitle("No metrics recorded yet", color=PALE, fontsize=11)
        else:
            figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=13, fontweight="bold", parse_math=False)
            grid = figure.subplots(height, len(columns), squeeze=False)
            for at, (name, x, x_name, panels) in enumerate(columns):
                for row in range(height):
                    axes = grid[row, at]
                    if row >= len(panels):
                        axes.set_axis_off()
                        continue
                    quantity, train, validation = panels[row]
                    _draw_panel(axes, x, quantity, train, validation)
                    if row == 0:
                        axes.annotate(name, (0, 1), xytext=(0, 22), xycoords="axes fraction",
                                      textcoords="offset points", color=INK, fontsize=11, parse_math=False)
                    if row == len(panels) - 1:
                        axes.set_xlabel(x_name, color=INK, fontsize=9)
            _draw_legend(figure)
        _save(figure, path)


def confusion(path: Path | str, labels: Array, predicted: Array, classes: int | Sequence[str]) -> None:
    """How many rows of each class were given each label.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    labels, predicted : arrays (N,), int
        Class numbers from 0. Not modified.
    classes : int or sequence of str
        How many, or their names.
    """
    from matplotlib.figure import Figure

    labels, predicted = (np.asarray(to_cpu(x)).astype(np.int64) for x in (labels, predicted))
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else [str(name) for name in classes]
    K = len(names)
    counts = np.zeros((K, K), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong, total = len(labels) - int(counts.trace()), len(labels)
    side = min(max(3.2, 0.46 * K), 9)
    longest = max(map(len, names))
    crowded = 0.08 * longest > side / min(K, 50)  # inches of a name, and of its place
    with _drawing:
        figure = Figure(figsize=(side + 1.3 + 0.07 * longest, side + 1.3), dpi=DPI, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        axes = figure.subplots()
        axes.imshow(_confusion_colours(shares), interpolation="nearest")
        if K <= 20:
            size = 8 if counts.max() < 10_000 else 6
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    dark = i == j and shares[i, j] > 0.5
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=size, color="white" if dark else INK)
        ticks = range(0, K, math.ceil(K / 50))
        axes.set_xticks(ticks, [names[i] for i in ticks], fontsize=8, color=INK, parse_math=False,
                        rotation=45 if crowded else 0, ha="right" if crowded else "center")
        axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=8, color=INK, parse_math=False)
        if K <= 20:
            right = axes.secondary_yaxis("right")
            right.set_yticks(range(K), [f"{100 * shares[i, i]:.1f} %" if counts[i].any() else "none" for i in range(K)],
                             fontsize=8, color=BLUE)
            right.tick_params(length=0)
            right.spines[:].set_visible(False)
        axes.set_xlabel("predicted class", color=INK, fontsize=9)
        axes.set_ylabel("true class", color=INK, fontsize=9)
        share = f" ({100 * wrong / total:.3g} %)" if total else ""
        axes.set_title(f"{wrong:,} of {total:,} labels wrong{share}", loc="left", color=INK, fontsize=12,
                       fontweight="bold", pad=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(K + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(K + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#E4E4E4" if K <= 50 else "none", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        _save(figure, path)


def ranks(place: Callable[[str], Path], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The timeline if there are several ranks, and the staleness if there are servers; their names.

    ``place`` gives the path of a picture by its name: ``Run.plot``.
    """
    drawn = {"timeline": timeline} if len(reports) > 1 else {}
    if any("staleness" in report for report in reports):
        drawn["staleness"] = staleness
    for name, draw in drawn.items():
        draw(place(name), reports)
    return list(drawn)


def timeline(path: Path | str, reports: Sequence[Mapping[str, Any]], title: str = "What each rank did") -> None:
    """The whole run, its first seconds, and a moment at the end of these, a line for each rank.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    reports : sequence of mappings
        Of all ranks, as from ``Exchange.reports``: ``role``, ``number``, ``host``, ``seconds``, ``timeline``.
    title : str
    """
    lines = [report["timeline"] for report in reports]
    zero = min(line["start"] for line in lines)
    whole = max(line["start"] + line["end"] for line in lines) - zero
    told = min(line["start"] + line["until"] for line in lines) - zero  # by all, one by one
    moment = float(np.median([_moment(line, told + zero) for line in lines])) - zero
    looks = [("the whole run", 0.0, whole, False), ("the first seconds", 0.0, told, True),
             ("a moment", moment, told, True)]
    if told > whole / 2:
        looks = [("the whole run", 0.0, whole, told > 0.99 * whole), looks[2]]
    pitch = min(max(480 // len(lines), 7), 30)
    names = _rank_names(reports)
    left, right = 60 + 11 * max(map(len, names)), 120
    top, height, gap = 164, pitch * len(lines), 110
    with _drawing:
        figure = _figure(left + ACROSS + right, top + len(looks) * (height + gap) - gap + 80)
        _head(figure, 24, title, f"{len(lines)} ranks; time by the clock of rank 0, in seconds since the first began")
        _state_legend(figure, [name for name in _STATES if any(report["seconds"][name] for report in reports)], left)
        for at, (what, start, end, exact) in enumerate(looks):
            axes = _put(figure, left, top + at * (height + gap), ACROSS, height)
            edges = np.linspace(start, end, ACROSS + 1) + zero
            picture = np.concatenate([_stripe(_shares(line, edges, exact), pitch) for line in lines])
            axes.imshow(picture, extent=(start, end, len(lines), 0), aspect="auto", interpolation="nearest")
            axes.set_title(f"{what}: {_seconds(end - start)}", loc="left", color=INK, fontsize=9, pad=8)
            every = math.ceil(11 / pitch)
            axes.set_yticks(np.arange(0, len(lines), every) + 0.5, names[::every], fontsize=8 if pitch > 14 else 6)
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.tick_params(axis="x", labelsize=8)
            axes.tick_params(length=0, colors=INK)
            axes.spines[:].set_visible(False)
            if at + 1 < len(looks):
                axes.plot(looks[at + 1][1:3], (0, 0), color=INK, linewidth=2.5, solid_capstyle="butt", clip_on=False)
            else:
                axes.set_xlabel("seconds", color=INK, fontsize=9)
            if at == 0 and pitch > 10:
                _waits(axes, reports)
        _save(figure, path)


def staleness(path: Path | str, reports: Sequence[Mapping[str, Any]], title: str = "Staleness") -> None:
    """How many versions late changes were applied, and how many came from each replica.

    Parameters
    ----------
    path : path
        Of the PNG file; its folder must exist.
    reports : sequence of mappings
        Of all ranks, as from ``Exchange.reports``; those of servers have ``staleness``, a histogram whose last entry
        counts all that are staler, and ``applied``, the changes of each replica.
    title : str
    """
    servers = [report for report in reports if "staleness" in report]
    counts = np.sum([report["staleness"] for report in servers], axis=0)
    applied = np.asarray(servers[0]["applied"])
    total = max(int(counts.sum()), 1)
    last = int(np.flatnonzero(counts).max(initial=0))
    more = last == len(counts) - 1
    mean = float(counts @ np.arange(len(counts))) / total
    replicas = len(applied)
    pitch = min(max(320 // replicas, 7), 30)
    height = max(320, pitch * replicas)
    note = (f"{int(applied.sum()):,} changes from {replicas} replicas; mean staleness {'at least ' if more else ''}"
            f"{mean:.2f}, {100 * counts[0] / total:.3g} % not stale at all")
    with _drawing:
        figure = _figure(max(90 + 520 + 130 + 360 + 90, _reach(24, title, note)), 130 + height + 80)
        _head(figure, 24, title, note)
        axes = _put(figure, 90, 130, 520, height)
        axes.bar(np.arange(last + 1), 100 * counts[: last + 1] / total, color=BLUE, width=0.85)
        axes.set_title("share of all changes (%)", loc="left", color=PALE, fontsize=8.5, pad=5)
        axes.set_xlabel("changes of others that it did not know of", color=INK, fontsize=9)
        ticks = range(last, -1, -math.ceil((last + 1) / 12))
        axes.set_xticks(ticks, [f"{i}+" if more and i == last else str(i) for i in ticks])
        beside = _put(figure, 90 + 520 + 130, 130, 360, pitch * replicas)
        beside.barh(np.arange(replicas), applied, color=BLUE, height=0.8)
        beside.invert_yaxis()
        beside.set_title("changes of each replica", loc="left", color=PALE, fontsize=8.5, pad=5)
        every = math.ceil(11 / pitch)
        beside.set_yticks(np.arange(0, replicas, every), [f"replica {i}" for i in range(0, replicas, every)])
        beside.xaxis.set_major_locator(_few_whole(4))
        for one in (axes, beside):
            one.tick_params(labelsize=8 if one is axes or pitch > 14 else 6, length=0, colors=INK)
            one.grid(axis="y" if one is axes else "x", color="#E8E8E8", linewidth=0.8)
            one.set_axisbelow(True)
            one.spines[:].set_visible(False)
        _save(figure, path)


def _few_whole(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=True)


def _rank_names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Role and number of each rank, its part of the replica and its host if there are several."""
    hosts, parts = ({report.get(key) for report in reports} - {None} for key in ("host", "part"))
    several = len(parts) > 1
    return [f"{report['role']} {report['number']}" + (f".{report['part']}" if several and "part" in report else "")
            + (f" on {str(report['host']).split('.')[0]}" if len(hosts) > 1 else "") for report in reports]


def _moment(line: Mapping[str, Any], end: float) -> float:
    """When the last changes of state before the end began, so many that one can tell them apart."""
    times = np.asarray(line["times"]) + line["start"]
    before = times[times < end - 1e-6]
    return float(before[-min(len(before), ZOOMED)]) if len(before) else end - 1e-3


def _shares(line: Mapping[str, Any], edges: np.ndarray, exact: bool) -> np.ndarray:
    """How much of the time between neighbouring edges a rank was in each state: array (states, columns)."""
    bins, states = np.asarray(line["bins"]), np.asarray(line["states"])
    if exact:
        times = np.append(line["times"], line["until"])
        spent = np.diff(times) * (states == np.arange(len(bins))[:, None])
    else:
        times = np.minimum(line["width"] * np.arange(bins.shape[1] + 1), max(line["end"], 1e-9))
        spent = bins
    until = np.cumsum(np.insert(spent, 0, 0, axis=1), axis=1)
    return np.stack([np.diff(np.interp(edges - line["start"], times, one)) for one in until]) / np.diff(edges)


def _stripe(shares: np.ndarray, pitch: int) -> np.ndarray:
    """A rank's line: an image (pitch, columns, 3) in which each column is filled from below; white is unknown."""
    from matplotlib.colors import to_rgb

    order = [STATES.index(name) for name in _STATES]
    colours = np.array([*(to_rgb(colour) for colour in _STATES.values()), (1, 1, 1)])
    filled = pitch - (4 if pitch > 14 else 1)
    levels = (np.arange(filled)[::-1] + 0.5) / filled
    which = (levels[:, None, None] > np.cumsum(shares[order], axis=0)).sum(axis=1)
    return np.concatenate([colours[which], np.ones((pitch - filled, shares.shape[1], 3))])


def _seconds(length: float) -> str:
    """A length of time in words."""
    return f"{length:.3g} s" if length >= 1 else f"{1e3 * length:.3g} ms"


def _state_legend(figure: Any, names: Sequence[str], left: float) -> None:
    """Which colour is what, in one line below the head."""
    from matplotlib.patches import Patch

    across, down = figure.get_size_inches() * DPI
    patches = [Patch(facecolor=_STATES[name]) for name in names]
    figure.legend(patches, names, ncols=len(names), frameon=False, fontsize=8, labelcolor=INK, loc="upper left",
                  bbox_to_anchor=((left - 10) / across, 1 - 90 / down), handlelength=1, handleheight=1,
                  borderpad=0, borderaxespad=0, columnspacing=1.4)


def _waits(axes: Any, reports: Sequence[Mapping[str, Any]]) -> None:
    """Beside each rank its share of waiting, since it began."""
    for number, report in enumerate(reports):
        seconds = report["seconds"]
        share = seconds["waiting"] / max(sum(seconds.values()) - seconds["starting"], 1e-9)
        axes.annotate(f"waits {100 * share:.0f} %", (1, number + 0.5), xycoords=("axes fraction", "data"),
                      xytext=(6, 0), textcoords="offset points", va="center", color=PALE, fontsize=8)


def _rows(array: Array) -> np.ndarray:
    """The array on the CPU as float64, two-dimensional and not empty."""
    array = np.asarray(to_cpu(array), np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"plots: an array must have two dimensions and an entry; got shape {array.shape}")
    return array


def _scale(array: np.ndarray) -> float:
    """The absolute value that all but the largest 0.5 % of the entries stay below; 1 if that is 0."""
    finite = np.abs(array[np.isfinite(array)])
    return float(np.quantile(finite, 0.995)) or float(finite.max()) or 1.0 if finite.size else 1.0


def _values(data: np.ndarray) -> dict[str, Any]:
    """Colours for values: black to white over [0, 1], or over the range of the data if that is another."""
    finite = data[np.isfinite(data)]
    low, high = (float(x) for x in np.quantile(finite, (0.005, 0.995))) if finite.size else (0.0, 1.0)
    if finite.size and finite.min() >= 0 and finite.max() <= 1:
        low, high = 0.0, 1.0
    return {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}


def _columns(count: int, image_shape: tuple[int, int]) -> int:
    """Images a row so that the mosaic is about as high as wide."""
    return max(1, min(count, math.ceil(math.sqrt(count * image_shape[0] / image_shape[1]))))


def _figure(width: float, height: float) -> Any:
    """An empty white figure of that many pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")


def _put(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at a place given in pixels from the upper left corner of the figure."""
    across, down = figure.get_size_inches() * DPI
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _reach(left: float, title: str, note: str | None) -> float:
    """About how many pixels ``_head`` needs: a letter takes 16 in the title, 10 in the note."""
    return left + max(16 * len(title), 10 * len(note or "")) + 24


def _head(figure: Any, left: float, title: str, note: str | None) -> None:
    """Title and note in the upper left corner."""
    across, down = figure.get_size_inches() * DPI
    figure.text(left / across, 1 - 20 / down, title, va="top", color=INK, fontsize=12, fontweight="bold",
                parse_math=False)
    if note:
        figure.text(left / across, 1 - 56 / down, note, va="top", color=PALE, fontsize=8.5, parse_math=False)


def _colour_bar(figure: Any, image: Any, place: tuple[float, float, float, float], name: str) -> None:
    """A slim scale beside the picture."""
    low, high = image.get_clim()
    below, above = bool((image.get_array() < low).any()), bool((image.get_array() > high).any())  # NaN is neither
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    bar = figure.colorbar(image, cax=_put(figure, *place), extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)
    bar.set_label(name, color=INK, fontsize=9)


def _draw_mosaics(path: Path | str, panels: list[tuple[str, np.ndarray]], look: dict[str, Any], title: str,
                  note: str | None, scale: str | None, every: int = 0) -> None:
    """Mosaics side by side, every pixel of them a square of whole pixels; a wider gap before each ``every`` rows."""
    import matplotlib as mpl

    if every:
        panels = [(name, np.insert(whole, range(every, len(whole) - 1, every), np.nan, axis=0))
                  for name, whole in panels]
    down, across = panels[0][1].shape
    zoom = min(max(1, WIDTH // max(down, across)), ZOOM)
    width, height = across * zoom, down * zoom
    pitch = max(width, 13 * len(panels[-1][0])) + 48
    top = 24 + 36 + (28 if note else 0) + (34 if panels[0][0] else 0)
    total = 24 + len(panels) * pitch - 48 + (150 if scale else 24)
    with _drawing:
        figure = _figure(max(total, _reach(24, title, note)), top + height + 24)
        _head(figure, 24, title, note)
        colours = mpl.colormaps[look["cmap"]].with_extremes(bad="#6E6E6E" if look["cmap"] == "gray" else "#D0D0D0")
        for at, (name, whole) in enumerate(panels):
            left = 24 + at * pitch
            axes = _put(figure, left, top, width, height)
            image = axes.imshow(whole, **{**look, "cmap": colours}, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            axes.set_title(name, loc="left", color=INK, fontsize=10, pad=6)
        if scale:
            _colour_bar(figure, image, (left + width + 20, top, 14, min(height, 360)), scale)
        _save(figure, path)


def _draw_heat_maps(path: Path | str, panels: list[tuple[str, np.ndarray]], look: dict[str, Any], title: str,
                    note: str | None, scale: str, names: tuple[str, str]) -> None:
    """Whole matrices side by side."""
    from matplotlib.ticker import MaxNLocator

    look = {**look, "cmap": "cividis" if look["cmap"] == "gray" else look["cmap"]}
    width, height, gap = 760 if len(panels) == 1 else 480, 480, 48
    top = 24 + 36 + (28 if note else 0) + (34 if panels[0][0] else 0)
    with _drawing:
        total = 110 + len(panels) * (width + gap) - gap + 150
        figure = _figure(max(total, _reach(24, title, note)), top + height + 90)
        _head(figure, 24, title, note)
        for at, (name, matrix) in enumerate(panels):
            left = 110 + at * (width + gap)
            axes = _put(figure, left, top, width, height)
            image = axes.imshow(matrix, **look, aspect="auto")
            axes.set_title(name, loc="left", color=INK, fontsize=10, pad=6)
            axes.set_xlabel(names[0], color=INK, fontsize=9)
            axes.tick_params(labelsize=8, length=3, colors=INK, labelleft=at == 0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.spines[:].set_visible(False)
            if at == 0:
                axes.set_ylabel(names[1], color=INK, fontsize=9)
        _colour_bar(figure, image, (left + width + 20, top, 14, min(height, 360)), scale)
        _save(figure, path)


def _name(phase: Any, layer: Any) -> str:
    """What a column of the curves is about."""
    phase = str(phase or "")
    if layer is not None and phase in ("pretrain", ""):
        return f"Layer {layer}"
    name = _PHASES.get(phase, phase.capitalize() or "All records")
    return name if layer is None else f"{name}, layer {layer}"


def _column(records: Sequence[Mapping[str, Any]], key: str | None) -> np.ndarray:
    """The values under a key, NaN where there is no number."""
    values = [record.get(key) if key else None for record in records]
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], np.float64)


def _lines(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, str, list[tuple[str, np.ndarray, np.ndarray]]]:
    """Of one phase: the abscissa, its name, and (quantity, training, validation) of each panel with a number in it."""
    panels = []
    for quantity, train_key, validation_key, factor in _PANELS:
        if quantity == _GAP:
            train = np.full(len(records), math.nan)
            validation = _column(records, "free_energy_validation") - _column(records, "free_energy_train")
        else:
            train, validation = factor * _column(records, train_key), factor * _column(records, validation_key)
        if np.isfinite(train).any() or np.isfinite(validation).any():
            panels.append((quantity, train, validation))
    for key in ("epoch", "update"):  # several records an epoch: count updates
        x = _column(records, key)
        if np.isfinite(x).all() and (np.diff(x) > 0).all():
            return x, key, panels
    return np.arange(1.0, len(records) + 1), "record", panels


def _draw_panel(axes: Any, x: np.ndarray, quantity: str, train: np.ndarray, validation: np.ndarray) -> None:
    """One quantity over time: training, validation, their last values in the upper right corner."""
    from matplotlib.ticker import MaxNLocator

    marker = {"marker": "o", "markersize": 3} if len(x) <= 30 else {}
    last = []
    for values, colour, above in ((train, BLUE, 3), (validation, INK if quantity == _GAP else VERMILION, 4)):
        finite = np.isfinite(values)
        if finite.any():
            axes.plot(x[finite], values[finite], color=colour, linewidth=1.6, zorder=above, clip_on=False, **marker)
            last.append((values[finite][-1], colour))
    if quantity == _GAP:
        axes.axhline(0, color=PALE, linewidth=0.8, zorder=1)
    axes.set_title(quantity, loc="left", color=PALE, fontsize=8.5, pad=5)
    left = 0.0
    for value, colour in reversed(last):
        text = f"{value:.4g}".replace("-", "−")
        axes.annotate(text, (1, 1), xytext=(left, 5), xycoords="axes fraction", textcoords="offset points",
                      ha="right", color=colour, fontsize=8.5)
        left -= 5.5 * len(text) + 10
    axes.tick_params(labelsize=8, length=3, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _draw_legend(figure: Any) -> None:
    """Which colour is which, once for all panels."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=2) for colour in (BLUE, VERMILION)]
    figure.legend(lines, ["training", "validation"], loc="outside upper right", ncols=2, frameon=False, fontsize=9,
                  labelcolor=[BLUE, VERMILION], handlelength=1.4)


def _confusion_colours(shares: np.ndarray) -> np.ndarray:
    """Colours (K, K, 3): right answers towards blue by their share, wrong ones towards vermilion by theirs.

    Wrong ones have a scale of their own, or nobody would see them.
    """
    def towards(colour: str) -> np.ndarray:
        return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255 - 1

    right = np.diag(np.diag(shares))
    wrong = shares - right
    wrong = wrong / max(float(wrong.max()), 1e-9) * 0.75
    return 1 + right[..., None] * towards(BLUE) + wrong[..., None] * towards(VERMILION)


def _save(figure: Any, path: Path | str) -> None:
    """Render with Agg, whatever backend the reader uses, and put the file in its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": "gpudbn"})
    write_atomically(path, picture.getvalue())
