"""Replicas in step: sums, chains, tables, answers; prints the bits of an ordered sum."""

import sys

import numpy as np

from gpudbn.mpi import Plan, connect
from gpudbn.mpi.wire import guarded
from tests.mpi import fakegpu

BLOCKS = 8


def blocks():
    generator = np.random.default_rng(7)
    return [(generator.standard_normal((13, 7)) * 10.0 ** generator.integers(-4, 4)).astype(np.float32)
            for _ in range(BLOCKS)]


def main():
    exchange = connect(Plan("sync"), 100)
    me, replicas = exchange.replica, exchange.replicas
    assert exchange.chief == (me == 0)
    assert exchange.cuts_batches == (replicas > 1)
    assert exchange.local_replica == me

    parameters = np.full(11, me + 5, np.float32)
    exchange.begin(parameters)
    assert (parameters == 5).all()
    before = parameters.copy()
    exchange.exchange(parameters, before)
    exchange.meet(parameters)
    assert (parameters == 5).all()

    sums = np.arange(17, dtype=np.float32) * (me + 1)
    exchange.add_(sums)
    assert (sums == np.arange(17) * (replicas * (replicas + 1) // 2)).all()

    mine = blocks()[me * BLOCKS // replicas : (me + 1) * BLOCKS // replicas]
    in_order = np.full((13, 7), np.nan, np.float32)
    exchange.add_in_order_(in_order, mine)
    few = np.empty((13, 7), np.float32)
    exchange.add_in_order_(few, blocks()[:1] if me == replicas - 1 else [])  # replicas without blocks
    assert (few == blocks()[0]).all()

    table = np.zeros((BLOCKS, 2))
    table[me::replicas] = np.random.default_rng(1).standard_normal((BLOCKS, 2))[me::replicas]
    assert (exchange.total(table) == np.random.default_rng(1).standard_normal((BLOCKS, 2))).all()

    assert exchange.any(me == replicas - 1)
    assert not exchange.any(False)
    collected = exchange.collect(np.arange(me, dtype=np.int16).reshape(1, me))
    if exchange.chief:
        assert [a.shape for a in collected] == [(1, r) for r in range(replicas)]
        assert all((a == np.arange(r)).all() and a.dtype == np.int16 for r, a in enumerate(collected))
    else:
        assert collected is None

    fakegpu.install()
    on_gpu = fakegpu.FakeArray(np.zeros((13, 7), np.float32))
    exchange.add_in_order_(on_gpu, [fakegpu.FakeArray(block) for block in mine])
    assert on_gpu.peek().tobytes() == in_order.tobytes()

    exchange.agree(None)
    report = exchange.report()
    assert report["pushes"] == 0
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert (report["bytes"]["sent"] > 0) == (replicas > 1)
    if exchange.chief:
        print("bits", in_order.tobytes().hex(), flush=True)
    exchange.close()


if __name__ == "__main__":
    sys.exit(guarded(main))
