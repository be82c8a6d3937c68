"""The experiment of the talk on a simulated cluster like its own: its tables, and what this package does there.

    python -m benchmarks.talk --data FOLDER      the figures that the file does not hold yet

    theirs   their algorithm (talk.toml), to 90 % of the test digits in every cell of their two tables, and by one
             worker; with a seed by which nothing was fitted beside the one by which the costs were
    ours     what this package offers (talk-97.toml), to 97 %, by 16, 32 and 64 workers at 8 tasks a node
    one      the same by one worker, with a batch and a rate of its own

Costs are those of cluster-talk.toml, for all parts. Gradients are real, time is virtual and includes pretraining; looks
at the test error take none (``benchmarks.scaling``).
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import scaling
from benchmarks.mnist import HERE, machine
from gpudbn.mpi.costs import Costs
from gpudbn.settings import from_toml

COSTS, THEIRS, OURS = HERE / "cluster-talk.toml", HERE / "talk.toml", HERE / "talk-97.toml"
# of one worker, where that differs from OURS
ONE: dict[str, Any] = {"mode": "sync", "optimiser": "adam", "finetune_batch": 25, "finetune_learning_rate": 0.003}
ONE_CORE = 4458  # seconds: what all rows of their tables imply
ROWS = 60_000
SEEN = 10_000  # rows of pretraining, of ours
SEEDS = {"theirs": (1, 2), "ours": (2, 3, 4), "one": (2, 3, 4)}  # the costs are fitted with the first
WORKERS = (16, 32, 64)  # of ours
NODE = 8  # tasks of a node of ours
MOST = 12_000  # updates of fine-tuning, of all workers together, after which it is given up
FILES = {"theirs": (COSTS, THEIRS), "ours": (COSTS, OURS), "one": (COSTS, OURS)}
TOY = {"layers": [8], "batch": 10, "finetune_batch": 10}


class Point(NamedTuple):
    """A simulation: settings, workers, of which a node has so many, and the test errors to be reached."""

    part: str
    name: str
    given: dict[str, Any]
    workers: int
    node: int
    target: float
    seed: int
    rows: int = ROWS
    most: float = MOST


def points(part: str) -> list[Point]:
    """What a part consists of."""
    theirs, ours = from_toml(THEIRS), from_toml(OURS)
    if part == "theirs":
        cells = sorted({cell for table in scaling.TALK.values() for cell, _, _ in table})
        return [Point(part, f"{nodes}x{tasks}", theirs | ({"mode": "sync"} if nodes * tasks == 1 else {}),
                      nodes * tasks, tasks, 0.10, seed) for seed in SEEDS[part] for nodes, tasks in [(1, 1), *cells]]
    if part == "ours":
        return [Point(part, str(workers), ours, workers, NODE, 0.03, seed) for seed in SEEDS[part]
                for workers in WORKERS]
    return [Point(part, "1", ours | ONE, 1, NODE, 0.03, seed) for seed in SEEDS[part]]


@functools.cache
def digits(data: str, rows: int) -> scaling.Digits:
    """The rows, once a process."""
    return scaling.digits(data, rows)


def measure(point: Point, data: str) -> dict[str, Any]:
    """A point in virtual time."""
    costs = replace(Costs.read(COSTS)[0], node=point.node)
    seen = point.rows if point.part == "theirs" else min(SEEN, point.rows)
    found = scaling.simulated(digits(data, point.rows), point.given, costs, workers=point.workers, rows=point.rows,
                              seen=seen, targets=[point.target], most=point.most, until=ONE_CORE, seed=point.seed)
    reached = next(iter(found.get("reached", {}).values()), None)  # of the one target
    return {"workers": point.workers, "node": point.node, "seed": point.seed,
            "seconds": reached[0] if reached else None, "updates": reached[1] if reached else None,
            "rows": reached[2] if reached else None, "pretraining": found.get("pretraining", [None])[0],
            **{name: found[name] for name in ("share", "busy", "staleness", "failed", "processor") if name in found}}


def tables(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Their tables with what was simulated: of each cell seconds and speed-up, theirs and ours by seed, and ratios."""
    def seconds(name: str) -> list[float | None]:
        return [run["seconds"] for run in content["theirs"].get(name, [])]

    alone = seconds("1x1")
    found = {}
    for title, cells in scaling.TALK.items():
        found[title] = [{"nodes": nodes, "tasks": tasks, "theirs": [theirs, speedup],
                         "seconds": each, "speed-up": [a and b and a / b for a, b in zip(alone, each, strict=False)],
                         "ratio": [one and one / theirs for one in each]}
                        for (nodes, tasks), theirs, speedup in cells if (each := seconds(f"{nodes}x{tasks}"))]
    return found


def further(content: dict[str, Any]) -> dict[str, list[float | None]]:
    """How many times faster than one worker so many workers reach 97 %, by seed: the same on both sides."""
    alone = {run["seed"]: run["seconds"] for run in content["one"].get("1", [])}
    return {workers: [alone.get(run["seed"]) and run["seconds"] and alone[run["seed"]] / run["seconds"]
                      for run in runs] for workers, runs in content["ours"].items()}


def number(value: float | None, digits: int) -> str:
    """A number, or that there is none."""
    return "not reached" if value is None else f"{value:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.talk", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files (default: mnist)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "talk.json", help="the file of results")
    parser.add_argument("--parts", nargs="+", choices=list(SEEDS), default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="points at a time (default: one a core)")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these (default: those of each part)")
    parser.add_argument("--toy", action="store_true", help="toy sizes: only to see that it runs")
    given = parser.parse_args()
    begun = time.perf_counter()
    todo = [point for part in given.parts for point in points(part)]
    if given.toy:
        todo = [point._replace(given=point.given | TOY, rows=200, most=40) for point in todo if point.workers <= 16]
    content = begin(given.out)
    todo = [point for point in todo
            if point.seed not in [run["seed"] for run in content[point.part].get(point.name, [])]
            and point.seed in (given.seeds or [point.seed])]
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, point, given.data): point
                   for point in sorted(todo, key=lambda point: -point.workers)}
        for number, future in enumerate(as_completed(futures), 1):
            point, found = futures[future], future.result()
            runs = content[point.part].setdefault(point.name, [])
            runs.append(found)
            runs.sort(key=lambda run: run["seed"])
            given.out.write_text(text(content))
            print(f"{time.perf_counter() - begun:5.0f} s  {number} of {len(todo)}: {point.part}, {point.name}, seed "
                  f"{point.seed}: {found['seconds']} s", flush=True)
    for title, cells in tables(content).items():
        print(title, *(f"{cell['nodes']}x{cell['tasks']} {cell['theirs'][0]}: "
                       + ", ".join("-" if one is None else f"{one:.2f}" for one in cell["ratio"]) for cell in cells),
              sep="\n  ")
    for workers, times in sorted(further(content).items(), key=lambda item: int(item[0])):
        print(f"{workers} workers to 97 %: " + ", ".join("-" if one is None else f"{one:.1f}" for one in times))
    return 0


def begin(out: Path) -> dict[str, Any]:
    """What the file of results has, but for parts whose costs or settings have changed since."""
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    files = {path.name: path.read_text().splitlines() for paths in FILES.values() for path in paths}
    same = {part: all(kept.get("files", {}).get(path.name) == files[path.name] for path in paths)
            for part, paths in FILES.items()}
    return {"machine": machine(), "files": files, **{part: kept[part] if same[part] else {} for part in SEEDS}}


def text(content: dict[str, Any]) -> str:
    """As JSON, a line for each point."""
    lines = []
    for key, value in content.items():
        points = [f" {json.dumps(name)}: {json.dumps(runs)}" for name, runs in value.items()] if key in SEEDS else []
        whole = "{\n" + ",\n".join(points) + "}" if points else json.dumps(value, indent=1)
        lines.append(f"{json.dumps(key)}: {whole}")
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    if (os.environ.get("OPENBLAS_NUM_THREADS"), os.environ.get("OPENBLAS_CORETYPE")) != ("1", None):
        os.environ.pop("OPENBLAS_CORETYPE", None)  # its own choice is the quickest
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.talk", *sys.argv[1:]])  # noqa: S606 - NumPy anew
    sys.exit(main())
