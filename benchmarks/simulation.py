"""Simulation beside reality: runs on this machine, and the same in virtual time from costs measured here.

    python -m benchmarks.simulation --data FOLDER --out results.json

Costs are measured (``gpudbn.mpi.calibrate``) for two networks, with batches of 100 rows, on no whole run. What is
compared are whole runs with other batches, epochs and turns: each way runs so many times, alone or under mpirun, and
once in virtual time. Runs and measurements of costs take turns, so that both meet the same weather: on a cloud's
machine the same program is 20 % slower some minutes later. Servers and replicas of a real run share this machine's
cores; the simulation is told how many there are. All compute with one BLAS thread a rank.

How many cores other programs use is measured, too. A run waits for them to pause, for some time, and is repeated if
they used more than ``DISTURBED`` beside it, some times at most. One that was disturbed all the same does not count,
unless all of its way were: then the least disturbed does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.mnist import HERE, OPENMPI, machine
from gpudbn.settings import Settings

WAYS: dict[str, tuple[int, int, list[str]]] = {  # ranks, replicas, options
    "alone": (1, 1, ["--mode", "sync"]),
    "async 1": (2, 1, ["--mode", "async"]),
    "async 2": (3, 2, ["--mode", "async"]),
    "async 3": (4, 3, ["--mode", "async"]),
    "sync 2": (2, 2, ["--mode", "sync"]),
    "local 2": (2, 2, ["--mode", "local"]),
}
COMMON: dict[str, Any] = {"learning_rate": [0.05], "finetune_learning_rate": 0.001, "finetune_patience": 0,
                          "threads": 1, "plots": "off", "checkpoint_seconds": 1e9}
CALIBRATED = {"batch": 100, "finetune_epochs": 1}
NETWORKS: dict[str, dict[str, Any]] = {  # what the runs have that costs were not measured with
    "784-300-10": {"layers": [300], "epochs": [1], "finetune_epochs": 1, "batch": 64, "finetune_batch": 80,
                   "n_push": 4, "n_fetch": 8, "period": 5},
    "784-200-100-10": {"layers": [200, 100], "epochs": [1, 1], "finetune_epochs": 2, "batch": 200,
                       "finetune_batch": 150, "n_push": 8, "n_fetch": 8, "period": 20},
}
KINDS = ("pretrain", "finetune")
DISTURBED = 0.1  # cores
LOOK = 0.3  # seconds


def options(settings: dict[str, Any]) -> list[str]:
    """As words of a command line."""
    return [word for name, value in settings.items()
            for word in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value]))]


def run(command: list[str]) -> dict[str, Any]:
    """What a run's folder tells: seconds and held-out error of each epoch, and what the ranks reported."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run([*command, "--out", str(out)], check=True, env=OPENMPI | os.environ, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if r["phase"] in KINDS]
    lengths = [(r["phase"], r["seconds"] - before["seconds"])
               for before, r in zip([{"seconds": 0.0}, *epochs], epochs, strict=False)]
    ranks = records[-1]["ranks"]
    servers = [r for r in ranks if r["role"] == "server"]
    replicas = [r["seconds"] for r in ranks if r["role"] == "replica"]
    whole = [sum(seconds.values()) - seconds["starting"] for seconds in replicas]
    staleness = servers[0]["staleness"] if servers else []
    return {"seconds": epochs[-1]["seconds"],
            **{kind: round(statistics.mean(seconds for of, seconds in lengths if of == kind), 4) for kind in KINDS},
            "measures": [r.get("error_validation", r.get("reconstruction_validation")) for r in epochs],
            "test_error": next(r["error"] for r in records if r["phase"] == "test"),
            "staleness": [round(count / sum(staleness), 4) for count in staleness[:8]],
            "mean_staleness": sum(s * c for s, c in enumerate(staleness)) / sum(staleness) if staleness else None,
            "waiting": round(statistics.mean(s["waiting"] / w for s, w in zip(replicas, whole, strict=True)), 4)}


def others() -> float:
    """Processor seconds that other programs than this one and its children have taken, from some time on."""
    fields = Path("/proc/stat").read_text().split()
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    mine = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine


def await_calm(patience: float) -> None:
    """Wait until others leave the cores alone, so many seconds at most."""
    until = time.perf_counter() + patience
    while time.perf_counter() < until:
        begun, before = time.perf_counter(), others()
        time.sleep(LOOK)
        if others() - before < DISTURBED * (time.perf_counter() - begun):
            break


def real(network: str, way: str, given: argparse.Namespace) -> dict[str, Any]:
    """A run: the least disturbed of some."""
    ranks, _, more = WAYS[way]
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks > 1 else []
    command = [*mpirun, sys.executable, "-m", "gpudbn.train", "--data", given.data,
               *options(COMMON | NETWORKS[network]), *more]
    found: list[dict[str, Any]] = []
    while len(found) < given.tries and all(one["others"] > DISTURBED for one in found):
        await_calm(given.patience)
        begun, before = time.perf_counter(), others()
        one = run(command)
        found.append(one | {"others": round(max(0.0, others() - before) / (time.perf_counter() - begun), 3)})
    return min(found, key=lambda one: one["others"])


def counting(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs those that others did not disturb; or else the one that they disturbed least."""
    return [one for one in runs if one["others"] <= DISTURBED] or [min(runs, key=lambda one: float(one["others"]))]


def simulated(network: str, way: str, data: str, costs: Path) -> dict[str, Any]:
    """The same in virtual time."""
    _, replicas, more = WAYS[way]
    return run([sys.executable, "-m", "gpudbn.simulate", "--replicas", str(replicas), "--costs", str(costs),
                "--data", data, *options(COMMON | NETWORKS[network]), *more])


def compare(network: str, given: argparse.Namespace) -> dict[str, Any]:
    """All ways to train a network: costs and runs, and how far simulated and real times are apart."""
    from gpudbn.mpi.calibrate import Calibration
    from gpudbn.mpi.costs import Costs

    ran: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
    settings = Settings(**COMMON | CALIBRATED, layers=NETWORKS[network]["layers"], data=given.data)
    with Calibration(settings) as calibration:
        for _ in range(given.times):
            await_calm(given.patience)
            calibration.measure(given.seconds / given.times)
            for way in given.ways:
                ran[way].append(real(network, way, given))
        costs = calibration.costs(Costs()).to_toml()
    ways = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "costs.toml"
        file.write_text(costs)
        for way, runs in ran.items():
            found = simulated(network, way, given.data, file)
            ratios = {kind: round(found[kind] / statistics.median(one[kind] for one in counting(runs)), 3)
                      for kind in (*KINDS, "seconds")}
            ways.append({"way": way, "real": runs, "simulated": found, "ratios": ratios})
            seconds, staleness = ([one[key] and round(one[key], 2) for one in (*runs, found)]
                                  for key in ("seconds", "mean_staleness"))
            print(f"{network} {way:8} seconds {seconds} ratios {ratios} staleness {staleness}, the last simulated; "
                  f"others {max(one['others'] for one in runs)}", flush=True)
    return {"network": network, "settings": NETWORKS[network], "costs": costs.splitlines(), "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files, or digits")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--times", type=int, default=3, help="real runs of each way")
    parser.add_argument("--tries", type=int, default=2, help="for each of these at most, where others disturb")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to wait for others to pause, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the costs of each network")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulation.json")
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": machine() | {"load": os.getloadavg()[0]}, "common": COMMON,
                               "calibrated": CALIBRATED, "times": given.times, "networks": []}
    begun = time.perf_counter()
    for network in given.networks:
        results["networks"].append(compare(network, given))
        results["wall_seconds"] = round(time.perf_counter() - begun)
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
