"""Simulation beside reality: runs under mpirun on this machine, and the same in virtual time from costs measured here.

    python -m benchmarks.simulation --data FOLDER --out results.json

First costs are measured (``gpudbn.mpi.calibrate``), on no whole run. Then each way runs under mpirun, so many times,
and once in virtual time. Servers and replicas of a real run share this machine's cores; the simulation is told how
many there are. All compute with one BLAS thread a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.mnist import HERE, OPENMPI, machine
from gpudbn.settings import Settings

WAYS: dict[str, tuple[int, int, list[str]]] = {  # ranks, replicas, options
    "async 1": (2, 1, ["--mode", "async"]),
    "async 2": (3, 2, ["--mode", "async"]),
    "async 3": (4, 3, ["--mode", "async"]),
    "sync 2": (2, 2, ["--mode", "sync"]),
    "local 2": (2, 2, ["--mode", "local"]),
}
SETTINGS: dict[str, Any] = {"layers": [500], "epochs": [1], "batch": 100, "learning_rate": [0.05],
                            "finetune_epochs": 2, "finetune_learning_rate": 0.001, "finetune_patience": 0, "threads": 1,
                            "plots": "off", "checkpoint_seconds": 1e9}


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
    epochs = [r for r in records if r["phase"] in ("pretrain", "finetune")]
    ranks = records[-1]["ranks"]
    servers = [r for r in ranks if r["role"] == "server"]
    replicas = [r["seconds"] for r in ranks if r["role"] == "replica"]
    whole = [sum(seconds.values()) - seconds["starting"] for seconds in replicas]
    staleness = servers[0]["staleness"] if servers else []
    return {"seconds": [r["seconds"] for r in epochs],
            "measures": [r.get("error_validation", r.get("reconstruction_validation")) for r in epochs],
            "test_error": next(r["error"] for r in records if r["phase"] == "test"),
            "staleness": [round(count / sum(staleness), 4) for count in staleness[:8]],
            "mean_staleness": sum(s * c for s, c in enumerate(staleness)) / sum(staleness) if staleness else None,
            "waiting": round(statistics.mean(s["waiting"] / w for s, w in zip(replicas, whole, strict=True)), 4)}


def compare(way: str, data: str, costs: Path, times: int) -> dict[str, Any]:
    """One way: real runs, the simulated one, and how far their times are apart."""
    ranks, replicas, more = WAYS[way]
    given = ["--data", data, *options(SETTINGS), *more]
    mpirun = Path(sys.executable).parent / "mpirun"
    real = [run([str(mpirun), "-n", str(ranks), sys.executable, "-m", "gpudbn.train", *given]) for _ in range(times)]
    simulated = run([sys.executable, "-m", "gpudbn.simulate", "--replicas", str(replicas), "--costs", str(costs),
                     *given])
    median = statistics.median(r["seconds"][-1] for r in real)
    return {"way": way, "real": real, "simulated": simulated, "seconds": [median, simulated["seconds"][-1]],
            "ratio": round(simulated["seconds"][-1] / median, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files, or digits")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--times", type=int, default=3, help="real runs of each way")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulation.json")
    given = parser.parse_args()
    from gpudbn.mpi.calibrate import calibrate

    costs = calibrate(Settings(**SETTINGS, data=given.data))
    results = {"machine": machine() | {"load": os.getloadavg()[0]}, "settings": SETTINGS,
               "costs": costs.to_toml().splitlines(), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "costs.toml"
        file.write_text(costs.to_toml())
        for way in given.ways:
            found = compare(way, given.data, file, given.times)
            results["runs"].append(found)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            real = sorted(r["seconds"][-1] for r in found["real"])
            print(f"{way:8}  real {', '.join(f'{s:.2f}' for s in real)} s  simulated {found['seconds'][1]:.2f} s  "
                  f"ratio {found['ratio']:.3f}  staleness real {found['real'][0]['mean_staleness']} simulated "
                  f"{found['simulated']['mean_staleness']}", flush=True)


if __name__ == "__main__":
    main()
