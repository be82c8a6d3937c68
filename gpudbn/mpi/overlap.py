"""A replica whose exchanges run beside its computation: a thread pushes and pulls while the next turn computes.

    computing   | turn 1 | turn 2 | turn 3 |  ...
    the thread  |        | push 1, pull    | push 2, pull | ...

Parameters of turn t + 2 are what was pulled behind the push of turn t, and those of the replica's own changes that are
not in it: the replica waits only where a turn is shorter than its exchange, and is one turn staler. Dean et al., "Large
scale distributed deep networks" (2012), section 4.1, have fetching, pushing and computing in threads of their own.

Calls into MPI stay one at a time: the replica joins the thread before it makes one itself. The thread sees arrays of
the host only, so what it does needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from gpudbn.arrays import Array, is_gpu, module_of, to_cpu
from gpudbn.mpi.replica import Asynchronous
from gpudbn.mpi.tally import Tally
from gpudbn.tracing import span


class Overlapped(Asynchronous):
    """Parameters as for ``Asynchronous``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._thread = self.wire.worker()
        self._running: Future[None] | None = None
        self._beside = Tally(self.wire.clock)  # of the thread
        self._fetched = np.zeros(0, np.float32)  # what the last exchange has pulled
        self._pulled = False  # whether it is to be taken yet
        self._change, self._spare = self._fetched, self._fetched  # my last one, which is on its way; room for the next

    def begin(self, parameters: Array) -> None:
        super().begin(parameters)
        self._fetched, self._change, self._spare = (_host(parameters) for _ in range(3))

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:
        self._join()
        self._change, last, self._spare = self._spare, self._change, self._change
        _subtract(parameters, before, out=self._change)
        parts = list(zip(self.links, self._cuts, strict=True))
        packed = [link.packed(self._change[part], self.factors, self._turn) for link, part in parts]
        pushes = [(label, to_cpu(payload)) for label, payload in packed]
        for link, part in parts:
            if self._pulled:
                link.add_missing(self._fetched[part], last[part])
            link.base += 1
        if self._pulled:
            self._fetched += self._change
            _copy(self._fetched, parameters)
        before[...] = parameters
        self._pulled, self._pulls = fetch, self._pulls + fetch
        self.wire.worked("exchange", parameters.nbytes)

        def push_and_pull() -> None:
            for link, push in reversed(list(zip(self.links, pushes, strict=True))):  # see ``ledger.py``
                link.end.push(*push)
            for link, part in parts:
                if fetch:
                    link.pull(self._fetched[part])

        self._run(push_and_pull)

    def _run(self, work: Callable[[], None]) -> None:
        """Let the thread do this, and count its time and bytes apart: it is no time of this replica's."""
        for link in self.links:
            link.wire.tally = self._beside
        self._running = self._thread.submit(work)

    def _join(self) -> None:
        """Wait until the thread does nothing; raises what it has raised."""
        running, self._running = self._running, None
        if running is None:
            return
        with self.wire.tally.timing("waiting"), span("join"):
            running.exception()
        for link in self.links:
            link.wire.tally = self.wire.tally
        self.wire.tally.sent += self._beside.sent
        self.wire.tally.received += self._beside.received
        self._beside.sent = self._beside.received = 0
        running.result()

    def _drain(self) -> None:
        """Whoever waits for this pulls anew."""
        self._join()
        self._pulled = False
        super()._drain()

    def report(self) -> dict[str, Any]:
        """As of ``Exchange``, and in ``beside`` the seconds of the thread."""
        spent = self._beside.seconds()
        return super().report() | {"beside": {state: spent[state] for state in ("transferring", "waiting")}}

    def close(self) -> None:
        super().close()
        self._thread.shutdown()


def _host(like: Array) -> np.ndarray:
    """An array of the same shape and type in the host's memory, page-locked if the other is on a GPU."""
    if not is_gpu(like):
        return np.empty_like(like)
    xp: Any = module_of(like)
    return np.frombuffer(xp.cuda.alloc_pinned_memory(like.nbytes), like.dtype, like.size)


def _subtract(parameters: Array, before: Array, out: np.ndarray) -> None:
    """out = parameters - before, on the host; ``before`` is work space."""
    if not is_gpu(parameters):
        np.subtract(parameters, before, out=out)
        return
    xp: Any = module_of(parameters)
    xp.subtract(parameters, before, out=before).get(out=out)
    xp.cuda.get_current_stream().synchronize()


def _copy(host: np.ndarray, parameters: Array) -> None:
    if not is_gpu(parameters):
        parameters[...] = host
        return
    parameters.set(host)
    xp: Any = module_of(parameters)
    xp.cuda.get_current_stream().synchronize()  # the thread is about to fill it again
