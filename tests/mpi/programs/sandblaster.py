"""Replicas that search for servers, of which some die or are slow: sandblaster.py '{"kill": {"1": ["compute", 9]}}'.

Options, as JSON; replicas by number:

    kill       {replica: [where, in which of its portions]}, in: compute, between (the pushes to two servers)
    slow       {replica: seconds a portion}; the others take ``pace``
    servers, method, searches, portions
"""

import json
import os
import signal
import sys
import time

import numpy as np

from gpudbn.mpi import Plan, connect, server
from gpudbn.mpi.wire import Window, guarded
from tests.mpi.test_sandblaster import COLUMNS, ROWS, Logistic

options = {"kill": {}, "slow": {}, "pace": 0.0, "servers": 1, "method": "lbfgs", "searches": 6, "portions": 13,
           **json.loads(sys.argv[1])}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def search(exchange):
    """Both batches; what they came to, and took."""
    me, problem, computed = str(exchange.replica), Logistic(), [0]
    where, turn = options["kill"].get(me, (None, 0))
    x, gradient = np.zeros(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    put = Window.put

    def put_one(self, array, offset):
        if computed[0] == turn and where == "between" and self is exchange.links[0].end.window:
            exchange.links[1].end.drain()  # it is counted there
            kill()
        put(self, array, offset)

    def compute(first, end):
        computed[0] += 1
        if computed[0] == turn and where == "compute":
            kill()
        time.sleep(options["slow"].get(me, options["pace"]))
        gradient[...], loss = problem.sums(x, first, end)
        return loss

    Window.put = put_one
    exchange.begin(x)
    begun = time.perf_counter()
    for rows in (ROWS, 97):
        exchange.search(x, gradient, compute, rows, history=5,
                        **{name: options[name] for name in ("method", "searches", "portions")})
    exchange.meet(x)
    return {"replica": exchange.replica, "x": x.tolist(), "computed": computed[0],
            "seconds": time.perf_counter() - begun}


def main():
    exchange = connect(Plan("async", servers=options["servers"]), COLUMNS)
    if isinstance(exchange, server.Server):
        kind, report = "server", exchange.serve()
    else:
        kind, report = "replica", search(exchange)
        exchange.close()
    sys.stdout.write(f"{kind} {json.dumps(report)}\n")  # in one piece
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded(main))
