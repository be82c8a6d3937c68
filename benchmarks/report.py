"""One page of everything that was measured: tables and pictures from ``results/*.json``.

    python -m benchmarks.report                          writes results/README.md and its pictures
    python -m benchmarks.report --measure --data FOLDER  measures again first what takes minutes, not hours

A file of results has a section here, or the page is not made: nothing is forgotten. What a section says was measured
stands in its file; what has no file is listed as not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import autoencoder, exchange, peers, scaling, simulation, talk
from benchmarks.mnist import BESIDE, HERE, paired
from gpudbn.plots import BLUE, DPI, INK, PALE, VERMILION

RESULTS = HERE / "results"
HEAD = """# What was measured

Made from the files beside it by `python -m benchmarks.report`; [../README.md](../README.md) says what each measures."""
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)  # Wong's
QUANTITIES = {"k": "Gibbs steps", "batch": "rows of a batch", "rows": "rows of an epoch"}
LABELS = {"cores": "{} cores", "threads": "{} threads", "load": "load {}", "load before": "load {} before",
          "load after": "{} after", "cpu": "{}", "commit": "commit {}", "date": "{}"}


# -- parts of a page -----------------------------------------------------------------------------


def rows_of(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table."""
    names = list(head)
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names),
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def machine_of(about: dict[str, Any]) -> str:
    """On what, with which versions, from which commit, when."""
    return "*" + ", ".join(LABELS.get(name, f"{name} {{}}").format(shown(value)) for name, value in about.items()) + "*"


def figure_of(width: float, height: float) -> Any:
    """An empty figure of so many inches; without pyplot, so that no window opens."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def axes_of(figure: Any, *place: int, title: str = "", x: str = "", y: str = "") -> Any:
    """Plain axes."""
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


class Page:
    """Lines of Markdown, and pictures beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, [HEAD, ""]

    def add(self, *lines: str) -> None:
        self.lines += lines

    def picture(self, name: str, figure: Any, text: str) -> None:
        """A picture, and what is to be seen."""
        figure.savefig(self.folder / name, dpi=DPI, metadata={"Software": "gpudbn"})
        self.add(f"![{text}]({name})", "", f"*{text}*", "")


# -- sections --------------------------------------------------------------------------------------


def show_peers(page: Page, content: dict[str, Any]) -> None:
    layer, found = content["layer"], content["summary"]
    if found["epoch"]:
        page.add(f"An epoch of {layer['rows']} rows, {layer['hidden']} hidden units, batches of {layer['batch']}. "
                 "Medians (smallest to largest) over repetitions in turn, each a process of its own. *Of ours*: over "
                 "what ours took in the same repetition, so that more than 1 is slower; ours has counter-based draws, "
                 "momentum and decay, and numba compiles draws and steps where it says so. *Others*: cores that other "
                 "processes used meanwhile, at the most.", "")
    for core_type, programs in found["epoch"].items():
        samples = itertools.chain(*content["samples"]["epoch"][core_type].values())
        kernels = ", ".join(sorted({str(one["BLAS"]) for one in samples}))
        page.add(f"`OPENBLAS_CORETYPE` {core_type} (NumPy's kernels: {kernels})", "")
        ratios = [key for key, name in peers.OURS.items() if name in programs]
        page.add(*rows_of(["", "s", *ratios, "peak MB", "beyond NumPy and rows", "others"], (
            [name, spread(row["seconds"], 3), *(spread(row[key], 2) for key in ratios), f"{row['peak MB']:.0f}",
             f"{row['peak MB'] - row['MB before']:.0f}", f"{row['others']:.2f}"]
            for name, row in sorted(programs.items(), key=lambda item: item[1]["seconds"][0]))))
    goals = found["epoch"].get("unset", {})
    page.add(*(f"- {name}: {goals[name][key][0]:.2f} {key}; the goal is at least {least:.2f}, "
               f"{'reached' if goals[name][key][0] >= least else '**not reached**'}"
               for key in peers.OURS for name, least in peers.GOALS.items() if key in goals.get(name, {})), "")
    if goals:
        page.picture("peers-epoch.png", picture_of_epochs(found["epoch"]), "Seconds an epoch; lines reach from the "
                     "smallest to the largest of the repetitions")
    for core_type, programs in found["error"].items():
        targets = [f"{100 * target:g} %" for target in peers.TARGETS]
        network = content["network"]
        page.add("Seconds until no more than so many of the test rows are wrong, looks at them after each epoch with "
                 f"labels included: {network['rows']} training rows, hidden layers {network['layers']} (scikit-learn: "
                 f"the first alone), `OPENBLAS_CORETYPE` {core_type}.", "")
        page.add(*rows_of(["", *targets, "in the end", "after s", "peak MB"], (
            [name, *(spread(row[target], 1) if row[target] else "-" for target in targets),
             f"{100 * row['errors'][0]:.2f} %", spread(row["seconds"], 1), f"{row['peak MB']:.0f}"]
            for name, row in programs.items())))
        page.picture("peers-error.png", picture_of_errors(content["samples"]["error"][core_type]),
                     "Test error against seconds, each repetition a line")
    for samples in content["samples"].get("size", {}).values():
        page.picture("peers-size.png", picture_of_sizes(samples["gpudbn"], content["base"]), "An update of ours "
                     "against its size, and its products alone; the last panel an epoch. Dashed: the slope of the "
                     "products' operations, through the largest")
        page.add(*rows_of(["doubled", "last doubling takes", "its products alone", "by their operations"],
                          slopes(samples["gpudbn"], content["base"])))
    absent = content["not measured"] | content["failed"]
    page.add("Not measured: " + ("; ".join(f"{name} ({why})" for name, why in absent.items()) or "nothing") + ".", "")


def spread(values: list[float], digits: int) -> str:
    """Median (smallest to largest)."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def picture_of_epochs(found: dict[str, dict[str, Any]]) -> Any:
    names = sorted(found["unset"], key=lambda name: -float(found["unset"][name]["seconds"][0]))
    figure = figure_of(8, 0.9 + 0.3 * len(names))
    axes = axes_of(figure, x="seconds an epoch")
    for number, (core_type, programs) in enumerate(found.items()):
        colour, away = COLOURS[number], 0.3 * ((len(found) - 1) / 2 - number)
        axes.plot([], [], "o", color=colour, markersize=4, label=f"OPENBLAS_CORETYPE {core_type}")
        for y, name in enumerate(names):
            if name in programs:
                middle, low, high = programs[name]["seconds"]
                axes.plot([low, high], [y + away] * 2, color=colour, linewidth=1)
                axes.plot(middle, y + away, "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6, colors=INK)
    axes.grid(axis="both", which="both", color=PALE, alpha=0.3, linewidth=0.5)
    axes.set_yticks(range(len(names)), names)
    axes.legend(fontsize=7, frameon=False)
    return figure


def picture_of_errors(programs: dict[str, Any]) -> Any:
    figure = figure_of(8, 3.6)
    axes = axes_of(figure, x="seconds", y="test rows that are wrong (%)")
    for colour, (name, samples) in zip(COLOURS, programs.items(), strict=False):
        for number, one in enumerate(samples):
            seconds, errors = zip(*one["curve"], strict=True)
            axes.plot(seconds, [100 * error for error in errors], "o-", color=colour, markersize=3, linewidth=1,
                      label=None if number else name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.grid(color=PALE, alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=7, frameon=False)
    return figure


def against_size(samples: list[dict[str, Any]], base: dict[str, int]) -> dict[str, tuple[list[int], Any, Any, Any]]:
    """Of each quantity: its values, medians of our seconds and of the products', and their operations."""
    found = {}
    for name, first in samples[0]["against"].items():
        ours, bare = ([statistics.median(times) for times in zip(*(one["against"][name][which] for one in samples),
                                                                 strict=True)] for which in ("gpudbn", "products"))
        operations = []
        for value in first["values"]:
            at = base | {name: value}
            updates = at["rows"] / at["batch"] if name == "rows" else 1
            operations.append(updates * (6 + 4 * at["k"]) * at["batch"] * at["visible"] * at["hidden"])
        found[name] = first["values"], ours, bare, operations
    return found


def slopes(samples: list[dict[str, Any]], base: dict[str, int]) -> Iterable[list[str]]:
    """What the last doubling of each quantity multiplies."""
    for name, (values, *series) in against_size(samples, base).items():
        if len(values) > 1:
            yield [f"{name}, {values[-2]} to {values[-1]}", *(f"{each[-1] / each[-2]:.2f}" for each in series)]


def picture_of_sizes(samples: list[dict[str, Any]], base: dict[str, int]) -> Any:
    from matplotlib.ticker import LogLocator

    found = against_size(samples, base)
    figure = figure_of(9, 5)
    for number, (name, (values, ours, bare, operations)) in enumerate(found.items()):
        axes = axes_of(figure, 2, 3, number + 1, x=QUANTITIES.get(name, f"{name} units"),
                       y="ms of an epoch" if name == "rows" else "ms of an update")
        expected = [ours[-1] * each / operations[-1] for each in operations]
        for times, look, colour, label in ((ours, "o-", BLUE, "gpudbn"), (bare, "o-", VERMILION, "its products alone"),
                                           (expected, "--", PALE, "in proportion to operations")):
            axes.loglog(values, [1e3 * each for each in times], look, color=colour, markersize=3, linewidth=1,
                        label=label)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.tick_params(axis="x", labelrotation=45)
        if not number:
            axes.legend(fontsize=6, frameon=False)
    at = ", ".join(f"{name} {value}" for name, value in base.items())
    figure.suptitle(f"Otherwise {at}", fontsize=8, color=PALE)
    return figure


def show_mnist(page: Page, content: dict[str, Any], picture: str) -> None:
    ways: dict[str, list[dict[str, Any]]] = {}
    for run in content["runs"]:
        ways.setdefault(run["way"], []).append(run)
    rows = []
    for way, runs in ways.items():
        errors, seconds = [100 * run["error"] for run in runs], [run["seconds"] for run in runs if "seconds" in run]
        beside = paired(content["runs"], way, BESIDE[way]) if way in BESIDE else None
        rows.append([way, f"**{statistics.fmean(errors):.2f} %**", ", ".join(f"{error:.2f}" for error in errors),
                     f"{beside[0]:+.3f} ({beside[1]:+.3f} to {beside[2]:+.3f}) to {BESIDE[way]}" if beside else "",
                     f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "in virtual time"])
    page.add(*rows_of(["way", "test error", "of each seed", "difference, 95 % interval", "s a run"], rows))
    commands = {run["command"].replace(f"--seed {run['seed']} ", "--seed SEED ") for run in content["runs"]}
    page.add(*(f"    {command}" for command in sorted(commands)), "")
    figure = figure_of(6, 0.8 + 0.4 * len(ways))
    axes = axes_of(figure, x="test error (%); a dot is a seed, the line the mean")
    for y, runs in enumerate(ways.values()):
        errors = [100 * run["error"] for run in runs]
        axes.plot(errors, [y] * len(errors), "o", color=BLUE, markersize=5, alpha=0.6)
        axes.plot([statistics.fmean(errors)] * 2, [y - 0.25, y + 0.25], color=VERMILION)
    axes.set_yticks(range(len(ways)), list(ways))
    axes.set_ylim(-0.6, len(ways) - 0.4)
    page.picture(picture, figure, "Test errors of each way, over seeds")


def show_autoencoder(page: Page, content: dict[str, Any]) -> None:
    page.add(f"{content['rows']} training rows, layers {content['layers']}, {content['passes']} gradients of each row.",
             "", autoencoder.table(content["runs"]), "")
    figure = figure_of(8, 3.6)
    axes = axes_of(figure, x="gradients, by training rows", y="validation rows (nats)")
    best: dict[str, dict[str, Any]] = {}
    for run in content["runs"]:
        loss = run["validation_loss"]
        if loss is not None and loss <= best.get(run["optimiser"], run)["validation_loss"]:
            best[run["optimiser"]] = run
    for colour, (optimiser, run) in zip(COLOURS, best.items(), strict=False):
        axes.plot(*zip(*run["curve"], strict=True), color=colour, linewidth=1.2, label=optimiser)
    axes.legend(fontsize=7, frameon=False)
    page.picture("autoencoder.png", figure, "The best settings of each optimiser")


def show_simulation(page: Page, content: dict[str, Any]) -> None:
    page.add("Seconds of an epoch, real, and in virtual time from costs measured in turns with the runs, with other "
             "batches, epochs and turns than they have. Medians (smallest to largest) of at most "
             f"{content['times']} runs: one that others disturbed counts only where all were. *Of real*: simulated "
             "over the median; the goal is within 15 % for one and two replicas. Three share two cores with their "
             "server. *Others*: cores that other processes used meanwhile, at the most.", "")
    figure = figure_of(8, 3.2)
    for number, network in enumerate(content["networks"], 1):
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in network["settings"].items())
        page.add(f"{network['network']}: {words}", "")
        page.add(*rows_of(["", "pretraining", "simulated", "of real", "fine-tuning", "simulated", "of real",
                           "mean staleness", "simulated", "others"], map(row_of_way, network["ways"])))
        axes = axes_of(figure, 1, len(content["networks"]), number, title=network["network"], x="simulated / real")
        axes.axvspan(0.85, 1.15, color=BLUE, alpha=0.1, linewidth=0)
        axes.axvline(1.0, color=PALE, linewidth=0.8)
        for place, kind, colour, name in ((-0.15, "pretrain", BLUE, "an epoch of pretraining"),
                                          (0.15, "finetune", VERMILION, "of fine-tuning")):
            for y, one in enumerate(network["ways"]):
                ratios = [one["simulated"][kind] / run[kind] for run in simulation.counting(one["real"])]
                axes.plot([min(ratios), max(ratios)], [y + place] * 2, color=colour, linewidth=1)
                axes.plot(one["ratios"][kind], y + place, "o", color=colour, markersize=5, label=None if y else name)
        axes.set_yticks(range(len(network["ways"])), [one["way"] for one in network["ways"]])
        axes.set_ylim(len(network["ways"]) - 0.5, -0.5)
    axes.legend(fontsize=7, frameon=False)
    page.picture("simulation.png", figure, "Simulated time over that of runs; lines reach from the slowest run to the "
                 "quickest, a dot is their median; within 15 % is shaded")


def row_of_way(way: dict[str, Any]) -> list[str]:
    """Seconds of epochs and staleness, of the real runs that count and of the simulated one."""
    runs, found = simulation.counting(way["real"]), way["simulated"]

    def real(key: str) -> str:
        return spread([of([run[key] for run in runs]) for of in (statistics.median, min, max)], 2)

    cells = [[real(kind), f"{found[kind]:.2f}", f"{way['ratios'][kind]:.2f}"] for kind in simulation.KINDS]
    staleness = ["", ""] if found["mean_staleness"] is None else [
        real("mean_staleness"), f"{found['mean_staleness']:.2f}"]
    return [way["way"], *itertools.chain(*cells), *staleness, f"{max(run['others'] for run in runs):.2f}"]


def show_talk(page: Page, content: dict[str, Any]) -> None:
    alone = [run["seconds"] for run in content["theirs"].get("1x1", [])]
    page.add("Seconds to more than 90 % of the test digits in the talk's tables, and simulated with the costs below: "
             "real gradients, virtual time. Costs and settings are fitted with the first seed; the other plays no "
             f"part. By one worker: {talk.ONE_CORE} s in the talk, " + (
                 f"{', '.join(talk.number(s, 0) for s in alone)} s here." if alone else "not measured here."), "")
    found = talk.tables(content)
    for title, cells in found.items():
        page.add(f"{title}:", "", *rows_of(["nodes x tasks", "workers", "talk, s (speed-up)", "simulated, s (speed-up)",
                                            "simulated / talk"], (
            [f"{cell['nodes']} x {cell['tasks']}", cell["nodes"] * cell["tasks"],
             f"{cell['theirs'][0]} ({cell['theirs'][1]:.1f})",
             ", ".join("not reached" if one is None else f"{one:.0f}" + (f" ({times:.1f})" if times else "")
                       for one, times in itertools.zip_longest(cell["seconds"], cell["speed-up"])),
             ", ".join("-" if one is None else f"{one:.2f}" for one in cell["ratio"])] for cell in cells)))
    page.picture("talk.png", picture_of_talk(found), "Seconds to 90 % against workers; a simulated line is a seed")
    if content["one"] and content["ours"]:
        page.add("What this package does on the same cluster, to 97 %, against one worker with a batch and a "
                 "rate of its own:", "", *rows_of([
                     "workers", "s, by seed", "times faster than one worker", "rows learned from"], (
                     [workers, ", ".join(talk.number(run["seconds"], 0) for run in runs),
                      ", ".join(talk.number(one, 1) for one in talk.further(content).get(workers, [])),
                      ", ".join(str(run["rows"]) for run in runs)]
                     for workers, runs in [*content["one"].items(), *sorted(content["ours"].items(), key=by_number)])))
    page.add("Costs, and what is assumed:", "", *(f"    {line}" for line in content["files"][talk.COSTS.name]), "")


def by_number(item: tuple[str, Any]) -> int:
    """To sort by names that are numbers."""
    return int(item[0])


def picture_of_talk(found: dict[str, list[dict[str, Any]]]) -> Any:
    """Their tables and ours."""
    figure = figure_of(8, 3.4)
    for place, (title, cells) in enumerate(found.items(), 1):
        axes = axes_of(figure, 1, len(found), place, title=title, x="workers", y="seconds to 90 %")
        workers = [cell["nodes"] * cell["tasks"] for cell in cells]
        axes.plot(workers, [cell["theirs"][0] for cell in cells], "o-", color=VERMILION, label="talk")
        for number, seconds in enumerate(zip(*(cell["seconds"] for cell in cells), strict=True)):
            axes.plot(workers, [math.nan if one is None else one for one in seconds], ".--", color=BLUE, linewidth=1,
                      label="" if number else "simulated")
        axes.set_yscale("log")
        axes.set_xticks(workers)
        axes.legend(fontsize=7, frameon=False)
    return figure


def show_exchange(page: Page, content: dict[str, Any]) -> None:
    page.add(*rows_of(["measure", "goal", *(f"{mpi}, median (quartiles)" for mpi in content)], (
        [name, f"{which} {goal:g} {unit}",
         *("{:.3f} ({:.3f}, {:.3f})".format(row["median"], *row["quartiles"]) + ("" if row["reached"] else " **no**")
           for row in (one["measures"][name] for one in content.values()))]
        for name, (unit, goal, which) in exchange.GOALS.items())))


def show_tracing(page: Page, content: dict[str, Any]) -> None:
    page.add(f"{content['layer']}: a range takes {content['range_ns']:.0f} ns.", "")
    page.add(*rows_of(["", "ranges an update", "us an update", "of that ranges"], (
        [name, f"{row['ranges_per_update']:g}", f"{row['update_us']:.0f}", f"{row['part_percent']:.4g} %"]
        for name, row in content["updates"].items())))


def show_model_parallel(page: Page, content: dict[str, Any]) -> None:
    page.add(f"CD-1 of the second of two layers of {content['units']} units, {content['rows']} rows, local with "
             f"windows of {content['window']}. Bytes are what the largest rank gives in an update; milliseconds those "
             "of jobs on this machine, whose cores more ranks than that share. **The last columns are no runs**: the "
             "processor time of a part by itself, and what machines of their own, as slow or so many times quicker, "
             "would gain over one.", "")
    quicker = [f"gain predicted, x{factor}" for factor in content["quicker"]]
    page.add(*rows_of(["", "parts", "bytes", "by the formula", "MB a rank", "ms", "processor ms of a part", *quicker], (
        [kind, parts, shown(row.get("bytes", "")), shown(row["formula"]), shown(row.get("megabytes", "")),
         shown(row.get("milliseconds", "")), shown(row["computed"]), *(f"{gain:.2f}" for gain in row["gains"])]
        for kind in ("dense", "local") for parts, row in content[kind].items())))
    page.add(f"{content['paper']}.", "")


def show_scaling(page: Page, content: dict[str, Any]) -> None:
    assumed = content["assumed"]
    cluster = assumed["cluster"]
    page.add(f"784-500-10, pretrained on {assumed['pretraining rows']:,} rows, once each, which the times include. "
             "Workers are replicas; around servers these are cores besides. Simulated but for the first table: real "
             f"gradients in virtual time, with costs measured here, {cluster['ranks a node']} ranks a node, and "
             f"between nodes {1e6 * cluster['latency between nodes, s']:g} us and "
             f"{cluster['bytes/s between nodes'] / 1e9:g} GB/s, which are given. Errors are those of the test rows, "
             "looked at after every 4 % more updates. One run a point; settings were chosen with seed 1 and all else "
             "ran with seed 2.", "")
    if "real" in content:
        page.add("Under `mpirun` on this machine, and the same in virtual time (the goal is within 15 %):", "")
        page.add(*rows_of(["", "accuracy", "real, s", "simulated, s", "simulated / real"], real_rows(content)))
    if "search" in content:
        page.add("The search, as many trials for each: seconds to 97 %; of trials that were given up when an earlier "
                 "one had been quicker the least error. Chosen: **bold**.", "")
        page.add(*rows_of(["", "rows of a batch, rate: outcome"], search_rows(content)))
    if "goals" in content:
        page.picture("scaling.png", picture_of_goals(content), "Time and speed-up until an accuracy is reached, beside "
                     "those of the talk (90 %, their cores); dashed: in proportion")
        page.add(*rows_of(["rows", "way", "workers", "servers", "90 %, s", "97 %, s", "98.5 %, s", "speed-up",
                           "updates a worker", "ms each", "computing", "waiting", "moving", "staleness"],
                          goal_rows(content)))
        page.add("Speed-up, and updates one after another with milliseconds for each: those until the highest accuracy "
                 "that this point and one worker on as many rows reached.", "", *bends(content), "")
        page.picture("scaling-parts.png", picture_of_parts(content), "Time is updates one after another times what "
                     "each takes: the middle number of rows, to the accuracy that most points of a way reach")
    if content.get("passes"):
        page.add("At a fixed number of passes (batches of 100 rows, a server for each four workers): seconds to "
                 "pretrain and to pass twice over each partition of 60,000 rows.", "")
        first = content["passes"]["1"]["end"][0]
        page.add(*rows_of(["workers", "s", "speed-up"], (
            [name, f"{one['end'][0]:.3g}", f"{first / one['end'][0]:.1f}"]
            for name, one in sorted(content["passes"].items(), key=lambda item: int(item[0])) if "end" in one)))
    if content.get("levers"):
        page.picture("scaling-levers.png", picture_of_levers(content), "What moves the bend: seconds to 90 % around "
                     "one server, each remedy by itself; a bar that is pale did not get there")
        page.add(*rows_of(["", "workers", "90 %, s", "updates of all", "ms of a worker's update", "waiting",
                           "server busy", "staleness"], lever_rows(content)))
    infinite = [name for name, one in content.get("goals", {}).items() if "failed" in one]
    page.add(*([f"Parameters became infinite: {'; '.join(infinite)}.", ""] if infinite else []))
    page.add("Not in the plan, since it would take longer here than there is time: 98.5 % by several workers, but for "
             "16 in step on 600,000 rows; 97 % by more than 64 in step, more than 16 around servers or on 10,000 "
             "rows; more than 64 around servers.", "")
    left = [f"{part} ({'; '.join(names)})" for part, names in content["not run"].items() if names]
    left += [part for part in scaling.PARTS if part != "grid" and part not in content["not run"]]
    page.add(f"In the plan, and not run: {', '.join(left) or 'nothing'}.", "")


def real_rows(content: dict[str, Any]) -> Iterable[list[str]]:
    for name, virtual in content["real"].items():
        real = content.get(scaling.MPIRUN, {}).get(name, {})
        if "failed" in real:
            yield [name, "", real["failed"], "", ""]
        for target, (seconds, *_) in virtual.get("reached", {}).items():
            if target in real.get("reached", {}):
                measured = real["reached"][target][0]
                yield [name, f"{target} %", f"{measured:.2f}", f"{seconds:.2f}", f"{seconds / measured:.2f}"]


def search_rows(content: dict[str, Any]) -> Iterable[list[str]]:
    for name, one in content["search"].items():
        chosen, words = scaling.best(content, name), []
        for trial in one["trials"]:
            given = trial["settings"]
            reached = trial.get("reached", {}).get("97")
            outcome = (f"{reached[0]:.2f} s" if reached else
                       f"{100 * min(line[-1] for line in trial['quick']):.1f} % errors" if trial.get("quick") else
                       "infinite")
            word = f"{given['finetune_batch']}, {given['finetune_learning_rate']:g}: {outcome}"
            words.append(f"**{word}**" if given == chosen else word)
        yield [f"{name}, {one['trials'][0]['workers']}", "; ".join(words)]


def way_of(name: str) -> str:
    """The family of a point, by its name."""
    return name.split(",")[0]


def speed_up(content: dict[str, Any], point: dict[str, Any]) -> tuple[str, float] | None:
    """The highest accuracy that this point and one worker on as many rows reached, and how many times as quickly."""
    alone = content["goals"].get(f"one worker, 1 on {point['rows']}", {}).get("reached", {})
    common = [target for target in point.get("reached", {}) if target in alone]
    return (common[-1], alone[common[-1]][0] / point["reached"][common[-1]][0]) if common else None


def parts_of(point: dict[str, Any], target: str) -> tuple[float, float]:
    """Updates of fine-tuning that a worker makes one after another until a target, and milliseconds of each."""
    seconds, updates, _ = point["reached"][target]
    each = updates / (point["workers"] if point["settings"]["mode"] == "async" else 1)
    return each, 1e3 * (seconds - point["pretraining"][0]) / each


def goal_rows(content: dict[str, Any]) -> Iterable[list[str]]:
    def order(item: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
        name, point = item
        return point["rows"], point["workers"] > 1, way_of(name), point["workers"]

    for name, point in sorted(content["goals"].items(), key=order):
        reached, gain = point.get("reached", {}), speed_up(content, point)
        asked = point.get("targets", [])
        servers = point["settings"].get("servers", 0) if point["settings"]["mode"] == "async" else 0
        times = [f"{reached[target][0]:.2f}" if target in reached else
                 f"not in {point['end'][1]:,} updates" if target in asked and "end" in point else ""
                 for target in ("90", "97", "98.5")]
        made = [f"{number:.3g}" for number in parts_of(point, gain[0])] if gain else ["", ""]
        share = point.get("share", {})
        yield [f"{point['rows']:,}", way_of(name), point["workers"], servers or "", *times,
               f"{gain[1]:.1f} ({gain[0]} %)" if gain else "", *made,
               *(f"{100 * share[state]:.0f} %" if share else "" for state in ("computing", "waiting", "transferring")),
               "" if point.get("staleness") is None else f"{point['staleness']:g}"]


def series(content: dict[str, Any]) -> dict[tuple[str, int, str], list[tuple[int, dict[str, Any]]]]:
    """By way, rows and target: (workers, point) of those that reached it; the one worker begins each."""
    found: dict[tuple[str, int, str], list[tuple[int, dict[str, Any]]]] = {}
    for name, point in content["goals"].items():
        alone = content["goals"].get(f"one worker, 1 on {point['rows']}", {})
        for target in point.get("reached", {}):
            if way_of(name) != "one worker" and target in alone.get("reached", {}):
                found.setdefault((way_of(name), point["rows"], target), [(1, alone)]).append((point["workers"], point))
    return {key: sorted(points, key=lambda one: one[0]) for key, points in sorted(found.items())}


def bends(content: dict[str, Any]) -> Iterable[str]:
    """A sentence for each series: from where on it pays no more, and why."""
    for (way, rows, target), points in series(content).items():
        times = [point["reached"][target][0] for _, point in points]
        best = times.index(min(times))
        (first, fewer), (last, more) = points[max(0, best - 1)], points[best]
        updates, millis = ([parts_of(point, target)[i] for point in (fewer, more)] for i in (0, 1))
        share = more["share"]
        yield (f"- {way}, {rows:,} rows, {target} %: quickest with {last} workers, {times[0] / times[best]:.1f} times "
               f"one. From {first} to {last} workers, updates one after another times "
               f"{updates[1] / updates[0]:.2f}, what each takes times {millis[1] / millis[0]:.2f}; "
               f"{100 * share['computing']:.0f} % of a worker's time is computing then, and pretraining "
               f"{100 * more['pretraining'][0] / times[best]:.0f} % of the whole"
               + (f". {points[-1][0]} take {times[-1] / times[best]:.1f} times as long" if last < points[-1][0] else "")
               + ".")


def picture_of_goals(content: dict[str, Any]) -> Any:
    figure = figure_of(9, 4.2)
    axes = [axes_of(figure, 1, 2, place + 1, x="workers; of the talk: cores", y=name)
            for place, name in enumerate(("seconds", "speed-up over one worker"))]
    ways = {"sync": "o-", "async": "s--"}
    shades = {key: COLOURS[number % len(COLOURS)] for number, key in enumerate(
        sorted({(rows, target) for _, rows, target in series(content)}))}
    most = 1
    for (way, rows, target), points in series(content).items():
        workers = [count for count, _ in points]
        times = [point["reached"][target][0] for _, point in points]
        most = max(most, *workers)
        for which, values in zip(axes, (times, [times[0] / one for one in times]), strict=True):
            which.plot(workers, values, ways[way], color=shades[rows, target], markersize=3, linewidth=1,
                       label=f"{way}, {rows:,} rows, {target} %")
    for mark, (name, table) in zip("^v", scaling.TALK.items(), strict=True):
        cores = [nodes * tasks for (nodes, tasks), _, _ in table]
        for which, column in zip(axes, (1, 2), strict=True):
            which.plot(cores, [row[column] for row in table], mark + ":", color=INK, markersize=3, linewidth=1,
                       label=f"the talk, {name}")
    axes[1].plot([1, most], [1, most], "--", color=PALE, linewidth=1, label="in proportion")
    for which in axes:
        which.set_xscale("log", base=2)
        which.set_yscale("log")
        which.grid(color=PALE, alpha=0.3, linewidth=0.5)
    axes[0].legend(fontsize=5.5, frameon=False, loc="upper right", ncols=2)
    axes[0].set_ylim(top=1e5)
    return figure


def picture_of_parts(content: dict[str, Any]) -> Any:
    figure = figure_of(9, 3.2)
    every = series(content)
    rows = 60_000 if any(key[1] == 60_000 for key in every) else max((key[1] for key in every), default=0)
    left = axes_of(figure, 1, 2, 1, x="workers", y="updates of a worker, one after another")
    right = axes_of(figure, 1, 2, 2, x="workers", y="ms of an update")
    ticks = []
    for number, way in enumerate(("sync", "async")):
        target = max((key[2] for key in every if key[:2] == (way, rows)), default=None, key=lambda name: len(every[
            way, rows, name]))
        if target is None:
            continue
        points = every[way, rows, target]
        left.loglog([count for count, _ in points], [parts_of(point, target)[0] for _, point in points], "o-",
                    color=COLOURS[number], markersize=3, linewidth=1, label=f"{way}, {target} %")
        for count, point in points[number:]:
            x, bottom, millis = len(ticks), 0.0, parts_of(point, target)[1]
            ticks.append(f"{count}\n{way if count > 1 else ''}")
            for state, colour in (("computing", BLUE), ("measuring", "#56B4E9"), ("transferring", "#E69F00"),
                                  ("waiting", VERMILION)):
                height = millis * point["share"].get(state, 0)
                right.bar(x, height, 0.7, bottom, color=colour, label=state if x == 0 else None)
                bottom += height
    left.set_xscale("log", base=2)
    left.tick_params(which="both", labelsize=7)
    right.set_xticks(range(len(ticks)), ticks)
    for which in (left, right):
        which.legend(fontsize=6, frameon=False)
    return figure


def picture_of_levers(content: dict[str, Any]) -> Any:
    points = content["levers"]
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in points))[::-1]
    counts = sorted({one["workers"] for one in points.values()})
    figure = figure_of(8, 0.8 + 0.35 * len(names))
    axes = axes_of(figure, x="seconds to 90 %")
    for number, workers in enumerate(counts):
        for y, name in enumerate(names):
            point = points.get(f"{name}, {workers}", {})
            seconds = point.get("reached", {}).get("90", point.get("end", [0]))[0]
            place = y + 0.38 * ((len(counts) - 1) / 2 - number)
            axes.barh(place, seconds, 0.36, color=COLOURS[number], alpha=1 if point.get("reached") else 0.3,
                      label=f"{workers} workers" if name == names[-1] else None)
    axes.set_yticks(range(len(names)), names)
    axes.legend(fontsize=7, frameon=False)
    return figure


def lever_rows(content: dict[str, Any]) -> Iterable[list[str]]:
    for name, point in sorted(content["levers"].items(), key=lambda item: item[1]["workers"]):
        reached = point.get("reached", {}).get("90")
        if "end" not in point:
            yield [name.rpartition(", ")[0], point["workers"], "became infinite", "", "", "", "", ""]
            continue
        seconds, updates, _ = reached or point["end"]
        millis = 1e3 * (seconds - point["pretraining"][0]) / updates * point["workers"]
        yield [name.rpartition(", ")[0], point["workers"], f"{seconds:.2f}" if reached else "not reached",
               f"{updates:,}", f"{millis:.2f}", f"{100 * point['share']['waiting']:.0f} %",
               f"{100 * max(point['busy']):.0f} %", f"{point['staleness']:g}"]


def shown(value: object) -> str:
    """A number with four digits; all else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Section(NamedTuple):
    """What a file of results is shown as."""

    title: str
    command: str
    show: Callable[[Page, dict[str, Any]], None]


SECTIONS = {
    "peers": Section("Beside other programs", "python -m benchmarks.peers", show_peers),
    "scaling": Section("Time against cores", "python -m benchmarks.scaling", show_scaling),
    "talk": Section("The experiment of the talk, simulated", "python -m benchmarks.talk", show_talk),
    "mnist": Section("MNIST, 784-500-500-2000", "python -m benchmarks.mnist",
                     lambda page, content: show_mnist(page, content, "mnist.png")),
    "mnist-small": Section("MNIST, 784-500-300: replicas in parts, and 16 simulated replicas",
                           "python -m benchmarks.mnist --ways small small-parts sixteen "
                           "--out benchmarks/results/mnist-small.json",
                           lambda page, content: show_mnist(page, content, "mnist-small.png")),
    "autoencoder": Section("A deep autoencoder by batch optimisers", "python -m benchmarks.autoencoder",
                           show_autoencoder),
    "exchange": Section("What an exchange costs", "python -m benchmarks.exchange", show_exchange),
    "simulation": Section("Simulation beside reality", "python -m benchmarks.simulation", show_simulation),
    "model_parallel": Section("Layers cut among ranks", "python -m benchmarks.model_parallel",
                              show_model_parallel),
    "tracing": Section("NVTX ranges", "python -m benchmarks.tracing", show_tracing),
}
# what --measure does again, and whether it takes --data
AGAIN = {"tracing": False, "model_parallel": False, "exchange": False, "simulation": True, "peers": True,
         "scaling": True, "talk": True}
ADDED_TO = ("exchange",)  # files that have a part for each MPI


def measure(results: Path, data: str) -> list[str]:
    """Run the programs of ``AGAIN``, one after the other; return the names of those that failed.

    A file of results is replaced when its program has ended well. One that was interrupted leaves what it has in
    ``NAME.json.begun``, where those programs that can go on the next time.
    """
    failed = []
    for number, (name, takes_data) in enumerate(AGAIN.items(), 1):
        file, begun = results / f"{name}.json", results / f"{name}.json.begun"
        if name in ADDED_TO and file.exists():
            shutil.copyfile(file, begun)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(begun.resolve()),
                   *(["--data", data] if takes_data else [])]
        print(f"{number} of {len(AGAIN)}: {' '.join(command[1:])}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if code == 0 and begun.exists():
            begun.replace(file)
        else:
            failed.append(name)
        print(f"{name}: {(time.perf_counter() - start) / 60:.1f} minutes{f', FAILED with code {code}' if code else ''}",
              flush=True)
    return failed


def machines(content: dict[str, Any]) -> list[str]:
    """A line for each machine that a file names: its own, or those of its parts."""
    if "machine" in content:
        return [machine_of(content["machine"])]
    return [machine_of(one["machine"]) for one in content.values() if isinstance(one, dict) and "machine" in one]


def make(results: Path, out: Path) -> str:
    """The page on all files of a folder; its pictures go to ``out``.

    Raises
    ------
    SystemExit
        If a file has no section, or does not say on which machine and from which commit it is.
    """
    files = {path.stem: path for path in sorted(results.glob("*.json"))}
    for name in files.keys() - SECTIONS.keys():
        raise SystemExit(f"{files[name]}: must have a section in benchmarks/report.py; got none")
    page = Page(out)
    for name, section in SECTIONS.items():
        page.add(f"## {section.title}", "", f"`{section.command}`{'' if name in AGAIN else ' (not by --measure)'}", "")
        if name not in files:
            page.add("Not measured yet.", "")
            continue
        content = json.loads(files[name].read_text("utf-8"))
        lines = machines(content)
        if not lines or not all("commit" in line for line in lines):
            raise SystemExit(f"{files[name]}: must say on which machine and from which commit it is; got {lines}")
        page.add(*(line for machine in lines for line in (machine, "")))
        note = content.get("note") or content.get("notes")
        page.add(*([str(note), ""] if note else []))
        section.show(page, content)
    page.add("## On a GPU", "", "`benchmarks/on_gpu.sh`", "")
    tables = sorted(results.glob("*/table.md"))
    for path in tables:
        page.add(f"### {path.parent.name}", "", *(f"##{line}" if line.startswith("#") else line
                                                  for line in path.read_text("utf-8").splitlines()), "")
    if not tables:
        page.add("Not measured yet: no kernel has run on a GPU.", "")
    return "\n".join(page.lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the files are")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page goes (default: beside them)")
    parser.add_argument("--measure", action="store_true", help="measure again first, which takes about 40 minutes")
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files (default: mnist)")
    given = parser.parse_args()
    out = given.out or given.results
    out.mkdir(parents=True, exist_ok=True)
    failed = measure(given.results, str(Path(given.data).resolve()) if Path(given.data).is_dir() else given.data) \
        if given.measure else []
    (out / "README.md").write_text(make(given.results, out), "utf-8")
    print(out / "README.md")
    for name in failed:
        print(f"FAILED: {name}; the page has its former figures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
