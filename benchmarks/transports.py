"""Changes and parameters by way of the host and from GPU to GPU: the same numbers, and how fast they move.

    python -m benchmarks.transports --mpirun "FOLDER/mpirun" --out mpi.json      FOLDER: see cuda_mpi.sh

Starts a server and two replicas twice, with ``--transport staged`` and ``direct``; on one machine they may share a GPU.

    equal     whether both end with the same parameters when the replicas take turns: adding, bit for bit; with Adagrad,
              which NumPy does for ``staged`` and a kernel for ``direct``, to within 1e-6 of the largest
    push      seconds until the server has applied the change (and, ``staged``, published the sum)
    pull      seconds until the parameters are in the replica's array

A replica alone, and both at once. A figure is the median of the calls; GB/s are the bytes of the vector over it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

TRANSPORTS = ("staged", "direct")
MEGABYTES = (4, 64)
CALLS = 20
TURNS = 6
TOLERANCE = 1e-6
FOUND = "transports: "  # begins the line in which a job tells what it found


# -- what the ranks of a job do ------------------------------------------------------------------


def bandwidth(exchange: Any, nbytes: int, calls: int, make: Any) -> dict[str, list[float]]:
    """Seconds of pushes and pulls of a vector, by this replica; all call it together.

    Parameters
    ----------
    exchange : Asynchronous
        Around one server.
    nbytes : int
        Of the vector.
    make : callable (size) -> array
        Where the replica computes: float32, not zero.

    Returns
    -------
    dict
        ``push`` and ``pull``: one replica after the other; ``push together``, ``pull together``.
    """
    from benchmarks.exchange import label

    parameters, change = make(nbytes // 4), make(nbytes // 4)
    exchange.begin(parameters)
    (link,) = exchange.links

    def push() -> None:
        link.end.push(label(change, int(link.header.version[0])), change)
        link.end.drain()

    def pull() -> None:
        link.end.pull(link.header.words, parameters)

    def timed(action: Any) -> list[float]:
        spent = []
        for _ in range(calls + 2):  # the first make room, and open the other's memory
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
        return spent[2:]

    found: dict[str, list[float]] = {}
    for name, action in (("push", push), ("pull", pull)):
        for replica in range(exchange.replicas):
            exchange.wire.barrier()
            if replica == exchange.replica:
                found[name] = timed(action)
        exchange.wire.barrier()
        found[f"{name} together"] = timed(action)
    exchange.meet(parameters)
    return found


def in_turns(exchange: Any, size: int, make: Any) -> list[float]:
    """Parameters after changes that the replicas made one after the other: always the same."""
    import numpy as np

    from gpudbn.arrays import to_cpu, to_gpu

    parameters = make(size)
    exchange.begin(parameters)
    before = parameters.copy()
    for turn in range(TURNS):
        if turn % exchange.replicas == exchange.replica:
            step = np.random.default_rng(turn).standard_normal(size).astype(np.float32)
            parameters += to_gpu(step)
            exchange.exchange(parameters, before)
        exchange.meet(parameters)
        before[...] = parameters
    found: list[float] = to_cpu(parameters).tolist()
    return found


def rank(transport: str, rehearse: bool) -> int:
    """What each rank does; the first replica prints what was found."""
    import numpy as np

    from gpudbn.arrays import to_gpu
    from gpudbn.mpi import Plan, connect
    from gpudbn.mpi import transport as transports
    from gpudbn.mpi.rules import Steps
    from gpudbn.mpi.server import Server
    from gpudbn.optimiser import Adagrad

    sizes = [nbytes >> (8 if rehearse else 0) for nbytes in (megabytes << 20 for megabytes in MEGABYTES)]
    calls = 3 if rehearse else CALLS

    def make(size: int) -> Any:
        return to_gpu(np.linspace(-1, 1, size, dtype=np.float32))

    found: dict[str, Any] = {"parameters": {}, "seconds": {}}
    for name, rule in (("add", None), ("Adagrad", partial(Steps, partial(Adagrad, decay=0), rate=0.01))):
        exchange = connect(Plan("async", rule=rule, transport=transport, device="gpu"), max(sizes) // 4)
        if transport == "direct":
            os.environ[transports.VARIABLE] = "1"  # it was tried just now, and cannot be once MPI has started
        if isinstance(exchange, Server):
            exchange.serve()
            continue
        found["parameters"][name] = in_turns(exchange, 5_003, make)
        if rule is None:
            for nbytes in sizes:
                measured = bandwidth(exchange, nbytes, calls, make)
                for what, seconds in measured.items():
                    every = exchange.collect(np.array(seconds))
                    if every is not None:
                        found["seconds"][f"{what} {nbytes}"] = np.concatenate(every).tolist()
        exchange.agree(None)
        exchange.close()
        found["transport"], chief = exchange.transport, exchange.chief
    if not isinstance(exchange, Server) and chief:
        sys.stdout.write(f"{FOUND}{json.dumps(found)}\n")
        sys.stdout.flush()
    return 0


# -- outside -------------------------------------------------------------------------------------


def run(mpirun: str, transport: str, rehearse: bool, limit: float) -> dict[str, Any]:
    """What a job found with this transport.

    Raises
    ------
    RuntimeError
        If it failed; with what it said.
    """
    command = [*shlex.split(mpirun), "-n", "3", sys.executable, "-m", "benchmarks.transports", "--rank", transport]
    done = subprocess.run([*command, *(["--rehearse"] if rehearse else [])], capture_output=True, text=True,
                          check=False, timeout=limit)
    line = next((line for line in done.stdout.splitlines() if line.startswith(FOUND)), None)
    if done.returncode or line is None:
        said = (done.stdout + done.stderr).strip()
        raise RuntimeError(f"{transport}: the job ended with code {done.returncode}: {said[-2000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix(FOUND))
    return found


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far apart the parameters of the two are: of the largest, by rule; and whether that is near enough."""
    apart = {}
    for rule, staged in found["staged"]["parameters"].items():
        direct = found["direct"]["parameters"][rule]
        apart[rule] = max(abs(a - b) for a, b in zip(staged, direct, strict=True)) / max(map(abs, staged))
    return {"apart": apart, "equal": apart["add"] == 0 and apart["Adagrad"] <= TOLERANCE}


def rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each measure, with the medians of both."""
    measured = []
    for name in found["staged"]["seconds"]:
        what, _, nbytes = name.rpartition(" ")
        row: dict[str, Any] = {"what": what, "bytes": int(nbytes)}
        for transport in TRANSPORTS:
            seconds = found[transport]["seconds"][name]
            median = statistics.median(seconds)
            row[transport] = {"median_us": 1e6 * median, "min_us": 1e6 * min(seconds), "max_us": 1e6 * max(seconds),
                              "GB/s": int(nbytes) / median / 1e9}
        measured.append(row)
    return measured


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of a page."""
    lines = ["| what | MB | " + " | ".join(f"{t} us | GB/s" for t in TRANSPORTS) + " |", "|---|---|---|---|---|---|"]
    for row in result["transfers"]:
        told = [f"{row[t]['median_us']:.0f} | {row[t]['GB/s']:.2f}" for t in TRANSPORTS]
        lines.append(f"| {row['what']} | {row['bytes'] / 2**20:.4g} | {' | '.join(told)} |")
    apart = ", ".join(f"{value:.1e} by {rule}" for rule, value in result["apart"].items())
    word = "agree" if result["equal"] else "DIFFER"
    return [*lines, "", f"Parameters of direct and staged {word}: {apart} of the largest"]


def main() -> int:
    """The command; its exit code is 0 if both transports ran and agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpirun", default="mpirun", help="command that starts ranks, with its options")
    parser.add_argument("--out", type=Path, help="file for the results (JSON)")
    parser.add_argument("--rehearse", action="store_true", help="vectors 256 times smaller, few calls")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each of the two jobs")
    parser.add_argument("--rank", choices=TRANSPORTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        from gpudbn.mpi.wire import guarded

        return guarded(lambda: rank(given.rank, given.rehearse))
    result: dict[str, Any] = {"rehearsal": given.rehearse, "failures": []}
    try:
        found = {transport: run(given.mpirun, transport, given.rehearse, given.limit) for transport in TRANSPORTS}
        result |= compared(found) | {"transfers": rows(found)}
        print("\n".join(table(result)))
        if not result["equal"]:
            result["failures"].append("the parameters of the two transports differ")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        result["failures"].append(str(error))
    for failure in result["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
