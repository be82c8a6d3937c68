"""Every message of the wire, with NumPy arrays and with arrays that only look like a GPU's."""

import sys

import numpy as np

from gpudbn.mpi.wire import Wire, guarded
from tests.mpi import fakegpu

SIZES = (0, 1, 7, 100_003)


def round_trips(wire, make, peek):
    me, ranks = wire.rank, wire.size
    for size in SIZES:
        own = np.arange(size, dtype=np.float32) + 10 * me
        array = make(own)
        wire.broadcast(array, ranks - 1)
        assert (peek(array) == np.arange(size) + 10 * (ranks - 1)).all()

        array = make(own)
        wire.allreduce_(array)
        assert (peek(array) == ranks * np.arange(size) + 10 * sum(range(ranks))).all()

        array = make(own)
        if me % 2 == 0 and me + 1 < ranks:
            wire.send(array, me + 1)
        elif me % 2 == 1:
            wire.recv(array, me - 1)
            assert (peek(array) == np.arange(size) + 10 * (me - 1)).all()


def same_bits_everywhere(wire):
    for size in (3, 1001, 300_007):
        array = np.random.default_rng(wire.rank).standard_normal(size).astype(np.float32)
        wire.allreduce_(array)
        first = array.copy()
        wire.broadcast(first, 0)
        assert array.tobytes() == first.tobytes()


def texts(wire):
    me, ranks = wire.rank, wire.size
    mine = "ä€" * me
    assert wire.allgather_text(mine) == ["ä€" * rank for rank in range(ranks)]
    assert wire.gather_text(mine) == (["ä€" * rank for rank in range(ranks)] if me == 0 else None)
    if me == 0:
        wire.send_text("grüße", ranks - 1)
    if me == ranks - 1:
        assert wire.recv_text(0) == "grüße"
    table = wire.allgather(np.array([me, 2 * me]))
    assert (table == [[rank, 2 * rank] for rank in range(ranks)]).all()


def splits(wire):
    half = wire.split(wire.rank % 2)
    assert half.size == (wire.size + 1 - wire.rank % 2) // 2
    total = np.array([wire.rank])
    half.allreduce_(total)
    assert total[0] == sum(range(wire.rank % 2, wire.size, 2))
    assert half.tally is wire.tally
    assert wire.local_rank() == wire.rank  # all on this machine


def main():
    wire = Wire.start()
    round_trips(wire, lambda values: values.copy(), lambda array: array)
    refused = ""
    try:
        wire.broadcast(np.zeros((4, 4), np.float32)[:, ::2])
    except ValueError as error:
        refused = str(error)
    assert "C-contiguous" in refused
    same_bits_everywhere(wire)
    texts(wire)
    splits(wire)

    fakegpu.install()
    before = fakegpu.STREAM.synchronised
    round_trips(wire, fakegpu.FakeArray, fakegpu.FakeArray.peek)
    # a broadcast, an allreduce and, for all but a last odd one, a message, for each size
    messages = len(SIZES) * (3 if wire.rank + 1 < wire.size or wire.rank % 2 else 2)
    assert fakegpu.STREAM.synchronised - before >= messages
    wire.agree(None)
    wire.close()
    if "again" in sys.argv:
        second = Wire.start()
        second.barrier()
        second.close()
    print("done", flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
