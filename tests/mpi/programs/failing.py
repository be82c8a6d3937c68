"""Something goes wrong on one replica, or on all: arguments mode, kind, where (one, all)."""

import os
import sys
import time

import numpy as np

from gpudbn.errors import NonFiniteError, UserError
from gpudbn.mpi import Plan, connect, launch
from gpudbn.mpi.server import Server
from gpudbn.mpi.wire import guarded

mode, kind, where = sys.argv[1:]


def fail(me):
    if where == "one" and me != 1:
        return
    if kind == "user":
        raise UserError("data: must be there; got nothing. Look for it")
    if kind == "finite":
        raise NonFiniteError("layer 0: not finite at update 7")
    if kind == "fault":
        raise ZeroDivisionError("a fault of ours")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "exit":
        sys.exit(5)
    if kind == "dead":
        os._exit(9)


def main():
    if mode == "early":
        fail(launch.world().rank)
    exchange = connect(Plan("async" if mode == "async" else "sync"), 10)
    if isinstance(exchange, Server):
        exchange.serve()
        return
    exchange.begin(np.zeros(10, np.float32))
    if kind == "agree":
        exchange.agree("data: must be there; got nothing" if exchange.replica == 1 or where == "all" else None)
    fail(exchange.replica)
    exchange.any(False)
    time.sleep(60)


if __name__ == "__main__":
    if kind == "unguarded":
        kind = "fault"
        main()
    sys.exit(guarded(main))
