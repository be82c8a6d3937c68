"""Replicas around servers on a pretended GPU, whose arrays MPI gets as they are: direct.py TRANSPORT SERVERS.

Their memory is the host's under an ordinary MPI, and out of the CPU's reach where ``mpi/pretend_driver`` has put it.
"""

import json
import sys

import numpy as np

from gpudbn.arrays import to_cpu, to_gpu
from gpudbn.mpi import Plan, connect
from gpudbn.mpi.server import Server, cuts
from gpudbn.mpi.wire import guarded
from tests import pretend_cupy

SIZE = 4_099
LARGE = 300_007


def exactly_once(exchange, size=SIZE, pushes=60):
    """Integers add exactly in float32, so nothing may be lost, doubled or torn."""
    generator = np.random.default_rng(exchange.replica)
    parameters = to_gpu(np.full(size, 3.0 if exchange.chief else -1.0, np.float32))
    exchange.begin(parameters)
    assert (to_cpu(parameters) == 3).all()
    before, mine = parameters.copy(), np.zeros(size)
    for push in range(pushes):
        step = generator.integers(-4, 5, size)
        parameters += to_gpu(step.astype(np.float32))
        mine += step
        exchange.exchange(parameters, before, fetch=push % 3 != 1)
        assert (to_cpu(before) == to_cpu(parameters)).all()
    exchange.meet(parameters)
    table = np.zeros((exchange.replicas, size))
    table[exchange.replica] = mine
    assert (to_cpu(parameters) == 3 + exchange.total(table).sum(axis=0)).all()


def contention(exchange, size=LARGE, pushes=40):
    """All entries are equal in whatever is read, while changes come in all the time."""
    parameters = to_gpu(np.zeros(size, np.float32))
    exchange.begin(parameters)
    before = parameters.copy()
    for _ in range(pushes):
        parameters += 1
        exchange.exchange(parameters, before)
        for part in cuts(size, len(exchange.links)):
            found = to_cpu(parameters[part])
            assert (found == found[0]).all(), "torn"
    exchange.meet(parameters)
    assert (to_cpu(parameters) == pushes * exchange.replicas).all()


def phases(exchange):
    """Vectors of other sizes, one after the other; all begin with the chief's values and end with equal ones."""
    for phase, size in enumerate((SIZE, 5, 1, 977)):
        parameters = to_gpu(np.random.default_rng([phase, exchange.replica]).standard_normal(size).astype(np.float32))
        exchange.begin(parameters)
        before = parameters.copy()
        for _ in range(1 + 2 * exchange.replica):
            parameters += 0.25
            exchange.exchange(parameters, before)
        exchange.meet(parameters)
        everyone = exchange.collect(to_cpu(parameters))
        assert not exchange.chief or all((other == everyone[0]).all() for other in everyone)


def main():
    transport, servers = sys.argv[1], int(sys.argv[2])
    sys.modules.setdefault("cupy", pretend_cupy.module())  # there already, in the pretend driver's memory
    device = pretend_cupy.device
    device.late_kernels = True
    exchange = connect(Plan("async", servers=servers, transport=transport, device="gpu"), LARGE)
    if isinstance(exchange, Server):
        report = exchange.serve()
        found = {name: report[name] for name in ("applied", "version", "staleness")}
    else:
        for case in (exactly_once, contention, phases):
            case(exchange)
        exchange.agree(None)
        exchange.close()
        found = {}
    found |= {"transport": exchange.transport, "taken": device.taken, "unsettled": device.unsettled}
    sys.stdout.write(f"{type(exchange).__name__} {json.dumps(found)}\n")  # in one piece
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded(main))
