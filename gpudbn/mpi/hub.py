"""Where the replicas of asynchronous training meet: at the first server, which alone says who is living.

A meeting is one operation. Each living replica brings some bytes and gets what all of them brought, in the order of
the replicas; sums, answers and barriers are what it makes of these. Messages, and no collective calls of MPI: those
hang or fail where a rank has died, and here a death completes the meeting without the one that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Hub:
    """The meetings of some replicas.

    Attributes
    ----------
    living : list of int
        Replicas that are waited for, in order.
    """

    def __init__(self, replicas: int) -> None:
        self.living = list(range(replicas))
        self._here: dict[int, bytes] = {}

    def come(self, replica: int, content: bytes) -> None:
        """A living replica is here, with this."""
        if replica in self._here:
            raise RuntimeError(f"hub: replica {replica} must leave before it comes again")
        self._here[replica] = content

    def lose(self, replica: int) -> None:
        """Wait for it no more. What it brought to a meeting that is not complete is lost, too."""
        self.living.remove(replica)
        self._here.pop(replica, None)

    def complete(self) -> dict[int, bytes] | None:
        """What each of the living brought, if all of them are here: they leave. None if not."""
        if not self.living or len(self._here) < len(self.living):
            return None
        here, self._here = self._here, {}
        return {replica: here[replica] for replica in self.living}


def pack(parts: Mapping[int, bytes]) -> bytes:
    """What ``unpack`` takes apart: how many, then number and length of each, then the contents. Words are int64."""
    words = [len(parts), *(word for replica, content in parts.items() for word in (replica, len(content)))]
    return np.array(words, np.int64).tobytes() + b"".join(parts.values())


def unpack(message: bytes) -> dict[int, bytes]:
    """The parts that ``pack`` put together."""
    (count,) = np.frombuffer(message, np.int64, 1)
    table = np.frombuffer(message, np.int64, 2 * count, offset=8).reshape(-1, 2)
    ends = 8 + 16 * int(count) + np.cumsum(table[:, 1])
    return {int(replica): message[end - length : end] for (replica, length), end in zip(table, ends, strict=True)}
