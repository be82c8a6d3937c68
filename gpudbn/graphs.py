"""Turns of equal updates as CUDA graphs: launched one by one the first time, captured the second, repeated then.

A graph repeats its launches with the arguments they were captured with. What differs from turn to
turn is in device memory: two counters, which the last launch of the graph advances (``reference.advance``),
and the rates of the epoch. So the host copies nothing and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import numpy as np

from gpudbn.arrays import Array
from gpudbn.tracing import span
from gpudbn.twins import twins_of


class Graphs:
    """The graphs of one phase.

    Parameters
    ----------
    xp : module
        CuPy.
    launch : callable
        ``launch(count, clock, turn)`` launches ``count`` updates, numbered from 0, of the rows from 0 on. The number
        of the first, and the position of its first row, are in ``clock`` and ``turn``, arrays (1,), uint32, in device
        memory. It must make no array and use those it always uses: a graph knows their addresses.
    """

    def __init__(self, xp: ModuleType, launch: Callable[[int, Array, Array], None]) -> None:
        self.xp: Any = xp
        self.launch = launch
        self.counters = xp.zeros(2, np.uint32)
        self.there = (0, 0)  # what the counters are, or will be when the stream has come here
        self.capturing = self.xp.cuda.Stream(non_blocking=True)
        self.graphs: dict[Hashable, Any] = {}  # None: launched one by one so far

    def run(self, count: int, rows: int, *, update: int, row: int, side: int) -> bool:
        """Launch the next ``count`` updates, of ``rows`` rows in all, the first of which has these numbers.

        Returns False, and does nothing, the first time: the caller is to launch them one by one, so that every kernel
        has been compiled and loaded before it is captured.
        """
        key = count, side
        if key not in self.graphs:
            self.graphs[key] = None
            return False
        if self.graphs[key] is None:
            with span(f"capture {count} updates"):
                self.graphs[key] = self._capture(count, rows)
        if self.there != (update, row):
            self.counters[...] = self.xp.asarray(np.array([update, row], np.uint64).astype(np.uint32))
        with span(f"graph of {count} updates"):
            self.graphs[key].launch(self.xp.cuda.get_current_stream())
        self.there = (update + count, row + rows)
        return True

    def _capture(self, count: int, rows: int) -> Any:
        with self.capturing:
            self.capturing.begin_capture()
            try:
                self.launch(count, self.counters[:1], self.counters[1:])
                twins_of(self.counters).advance(self.counters, updates=count, rows=rows)
            finally:
                graph = self.capturing.end_capture()
        return graph
