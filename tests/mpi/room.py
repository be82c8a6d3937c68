"""Several ranks as threads of one process, without MPI: wires on which they meet, one of them running at a time.

A rank goes on until it has to wait for another, so the code under test need not be fit for threads.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gpudbn.mpi.wire import Tally


class Room:
    """What the ranks share."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.changed = threading.Condition()
        self.calls = [0] * ranks  # of collective methods
        self.brought = {}  # call: what each rank brought
        self.messages = {}
        self.failed = False

    def wait(self, ready):
        while not ready():
            if self.failed:
                raise RuntimeError("another rank failed")
            if not self.changed.wait(timeout=20):
                raise TimeoutError("a rank waits for ever")

    def gather(self, rank, kind, value):
        """What each rank brought to the same call; all have to make it."""
        number, self.calls[rank] = self.calls[rank], self.calls[rank] + 1
        kinds, values = self.brought.setdefault(number, ({}, {}))
        kinds[rank], values[rank] = kind, value
        self.changed.notify_all()
        self.wait(lambda: len(values) == self.ranks)
        assert len(set(kinds.values())) == 1, f"ranks call different things: {kinds}"
        return [values[rank] for rank in range(self.ranks)]


class RoomWire:
    """``wire.Wire`` among threads, as far as replicas without a server use it."""

    def __init__(self, room, rank):
        self.room, self.rank, self.size = room, rank, room.ranks
        self.label, self.tally = "", Tally()

    def clock(self):
        return self.tally.clock()

    def worked(self, what, nbytes):
        pass

    def local_rank(self):
        return self.rank

    def barrier(self):
        self.room.gather(self.rank, "barrier", None)

    def broadcast(self, array, root=0):
        array[...] = self.room.gather(self.rank, "broadcast", array.copy())[root]

    def allreduce_(self, array):
        arrays = self.room.gather(self.rank, "allreduce", array.copy())
        array[...] = arrays[0]
        for other in arrays[1:]:
            array += other

    def allgather(self, array):
        return np.stack(self.room.gather(self.rank, "allgather", array.copy()))

    def allgather_text(self, text):
        return self.room.gather(self.rank, "allgather_text", text)

    def send(self, array, to, tag=0):
        self.room.messages.setdefault((self.rank, to, tag), deque()).append(array.copy())
        self.room.changed.notify_all()

    def recv(self, array, source, tag=0):
        queue = self.room.messages.setdefault((source, self.rank, tag), deque())
        self.room.wait(lambda: queue)
        array[...] = queue.popleft()

    def close(self):
        self.barrier()


def together(ranks, program):
    """``program(wire)`` on each of the ranks; what they return, in order."""
    room = Room(ranks)

    def run(rank):
        with room.changed:
            try:
                return program(RoomWire(room, rank))
            except BaseException:
                room.failed = True
                room.changed.notify_all()
                raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [future.exception() for future in futures]
    first = next((e for e in errors if e is not None and "another rank failed" not in str(e)), None)
    if first is not None:
        raise first
    return [future.result() for future in futures]
