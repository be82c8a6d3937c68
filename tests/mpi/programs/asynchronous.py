"""Replicas around a server; the first argument names what is tried. The server prints its statistics."""

import json
import sys
import time
from functools import partial

import numpy as np

from gpudbn.mpi import Plan, connect
from gpudbn.mpi.rules import Rule, add
from gpudbn.mpi.server import Server, cuts
from gpudbn.mpi.wire import guarded
from tests.mpi import fakegpu


def all_equal(parameters):
    return (parameters == parameters[0]).all()


def exactly_once(exchange, size=4_099, pushes=200):
    """Integers add exactly in float32, so nothing may be lost, doubled or torn."""
    me = exchange.replica
    generator = np.random.default_rng(me)
    parameters = np.full(size, 3.0 if exchange.chief else -1.0, np.float32)
    exchange.begin(parameters)
    assert (parameters == 3).all()
    before, mine = parameters.copy(), np.zeros(size)
    for _ in range(pushes):
        step = generator.integers(-4, 5, size)
        parameters += step.astype(np.float32)
        mine += step
        exchange.exchange(parameters, before)
        assert (before == parameters).all()
    exchange.meet(parameters)
    table = np.zeros((exchange.replicas, size))
    table[me] = mine
    assert (parameters == 3 + exchange.total(table).sum(axis=0)).all()
    report = exchange.report()
    assert report["pushes"] == pushes
    assert report["pulls"] == pushes + 2
    assert sum(link.header.staleness.sum() for link in exchange.links) == pushes * exchange.replicas * len(
        exchange.links)


def own_writes(exchange, size=50, pushes=40):
    """Entry r is changed by replica r alone: it must see all its own changes at any moment."""
    me = exchange.replica
    parameters = np.zeros(size, np.float32)
    exchange.begin(parameters)
    before = parameters.copy()
    for count in range(1, pushes + 1):
        parameters[me] += 1
        exchange.exchange(parameters, before, fetch=count % 3 == 0)
        assert parameters[me] == count
        assert (parameters <= pushes).all()
    exchange.meet(parameters)
    assert (parameters[: exchange.replicas] == pushes).all()


def waits(exchange, size=1_000_003, turns=20, seconds=0.05):
    """Turns of an accelerator, which leaves the host its cores. Prints what share of its time the replica waits."""
    parameters = np.zeros(size, np.float32)
    exchange.begin(parameters)
    before, start = parameters.copy(), exchange.report()["seconds"]
    for _ in range(turns):
        time.sleep(seconds)
        parameters += 1
        exchange.exchange(parameters, before)
    spent = {state: value - start[state] for state, value in exchange.report()["seconds"].items()}
    share = (spent["waiting"] + spent["transferring"]) / sum(spent.values())
    sys.stdout.write(f"waits {share}\n")  # in one piece
    exchange.meet(parameters)
    assert (parameters == turns * exchange.replicas).all()


def phases(exchange):
    """Vectors of other sizes, one after the other; all begin with the chief's values and end with equal ones."""
    for phase, size in enumerate((4_099, 5, 1, 977)):
        parameters = np.random.default_rng([phase, exchange.replica]).standard_normal(size).astype(np.float32)
        chiefs = np.random.default_rng([phase, 0]).standard_normal(size).astype(np.float32)
        exchange.begin(parameters)
        assert (parameters == chiefs).all()
        before = parameters.copy()
        for _epoch in range(3):
            for _ in range(1 + 2 * exchange.replica):
                parameters += np.float32(0.3)
                exchange.exchange(parameters, before)
            exchange.meet(parameters)
            before[:] = parameters
            everyone = exchange.collect(parameters)
            if exchange.chief:
                assert all(other.tobytes() == parameters.tobytes() for other in everyone)
    refused = ""
    try:
        room = exchange.links[0].size
        assert room < 4_099 // len(exchange.links) + 17  # whole cache lines
        exchange.begin(np.zeros(len(exchange.links) * room + 1, np.float32))
    except ValueError as error:
        refused = str(error)
    assert f"must be of a size for which there is room, at most {room} entries a server" in refused


def contention(exchange, size=1_000_003, pushes=120):
    """All entries are equal in whatever is read, while the server writes all the time."""
    parameters = np.zeros(size, np.float32)
    exchange.begin(parameters)
    before = parameters.copy()
    torn = 0
    for _ in range(pushes):
        parameters += 1
        exchange.exchange(parameters, before)
        torn += not all_equal(parameters)
        parameters[:] = before  # one tear is one tear
    exchange.meet(parameters)
    assert exchange.any(torn > 0) or (parameters == pushes * exchange.replicas).all()
    sys.stdout.write(f"torn {torn} retried {exchange.report()['reads_retried']}\n")  # in one piece
    sys.stdout.flush()


def single_copy(exchange):
    """The planted fault: one copy, read without looking whether it is being written."""
    for link in exchange.links:
        link.end.window.read = lambda _: 0
    contention(exchange)


def ask(exchange):
    """Every read goes by message."""
    for link in exchange.links:
        link.end.attempts = 0
    exactly_once(exchange, pushes=50)
    assert exchange.report()["pulls"] == 52
    assert exchange.report()["reads_asked"] == 52 * len(exchange.links)


def pretended_device(exchange, size=1_009, pushes=30):
    """The same with arrays that only look like a GPU's."""
    fakegpu.install()
    parameters = fakegpu.FakeArray(np.full(size, exchange.replica, np.float32))
    exchange.begin(parameters)
    before = fakegpu.FakeArray(parameters.peek())
    one = fakegpu.FakeArray(np.ones(size, np.float32))
    for _ in range(pushes):
        start = fakegpu.STREAM.synchronised
        parameters += one
        exchange.exchange(parameters, before)
        assert fakegpu.STREAM.synchronised >= start + 2  # the push and the pull
        assert all(all_equal(parameters.peek()[part]) for part in cuts(size, len(exchange.links)))
    exchange.meet(parameters)
    assert (parameters.peek() == pushes * exchange.replicas).all()


def quadratic(exchange, size=101, updates=400):
    """Least squares |A x - b|^2, each replica on its rows: all come to the solution."""
    generator = np.random.default_rng(5)
    A = generator.standard_normal((3 * size, size)) / np.sqrt(3 * size)
    solution = generator.standard_normal(size)
    b = A @ solution
    rows = slice(exchange.replica, None, exchange.replicas)
    parameters = np.zeros(size, np.float32)
    exchange.begin(parameters)
    before = parameters.copy()
    for update in range(updates):
        gradient = A[rows].T @ (A[rows] @ parameters - b[rows])
        parameters -= (0.4 * gradient).astype(np.float32)
        exchange.exchange(parameters, before, fetch=update % 2 == 1)
    exchange.meet(parameters)
    distance = float(np.linalg.norm(parameters - solution) / np.linalg.norm(solution))
    assert distance < 1e-3, distance


def idle(exchange, seconds=2.0):
    """A long stretch of work on one replica: the server and those that wait must leave it the cores."""
    parameters = np.zeros(10, np.float32)
    exchange.begin(parameters)
    start, used = time.perf_counter(), time.process_time()
    if exchange.chief:
        time.sleep(seconds)
    exchange.meet(parameters)
    fraction = (time.process_time() - used) / (time.perf_counter() - start)
    assert fraction < 0.25, fraction
    if not exchange.chief:
        assert exchange.report()["seconds"]["waiting"] > 0.8 * seconds


def slow(parameters, change, staleness):
    time.sleep(0.005)
    add(parameters, change, staleness)


def main():
    what = sys.argv[1]
    servers = int(sys.argv[3])
    plan = Plan("async", rule=partial(Rule, slow if what == "own_writes" else add), servers=servers,
                overlap=sys.argv[4] == "on")
    exchange = connect(plan, 1_000_003 if what in ("contention", "single_copy", "waits") else 4_099)
    if what == "single_copy":
        ends = [exchange.stores[0].end] if isinstance(exchange, Server) else [link.end for link in exchange.links]
        for layout in (end.layout for end in ends):
            layout.copies[1] = layout.copies[0]
    if isinstance(exchange, Server):
        start, used = time.perf_counter(), time.process_time()
        statistics = exchange.serve()
        statistics["cpu"] = (time.process_time() - used) / (time.perf_counter() - start)
        sys.stdout.write(f"server {json.dumps(statistics)}\n")  # in one piece
        sys.stdout.flush()
        return
    assert exchange.replicas == int(sys.argv[2])
    assert not exchange.cuts_batches
    globals()[what](exchange)
    exchange.agree(None)
    exchange.close()


if __name__ == "__main__":
    sys.exit(guarded(main))
