"""Replicas that act together: sums, tables and answers over all of them; and training in step.

``Together`` is what any kind of replica needs of the others outside the updates. Three kinds need no server:

    Synchronous   each replica computes a slice of every batch, and the sums are added
    Averaging     each updates parameters of its own with rows of its own; every so often all meet, with one sum:
                  of what each has changed. Local SGD, or with momentum an outer optimiser
    Elastic       the same, but each keeps its parameters, drawn towards a centre that is drawn towards them
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.mpi.alone import Exchange
from gpudbn.mpi.nccl import Nccl, choose
from gpudbn.mpi.parts import Parts
from gpudbn.mpi.wire import Wire
from gpudbn.tracing import span


class Together(Exchange):
    """Replicas on a wire on which there is nobody else.

    Parameters
    ----------
    everyone : Wire
        The replicas: all parts of all of them.
    parts : int
        How many neighbouring ranks hold a replica together.

    Attributes
    ----------
    wire : Wire
        The replicas; where they are cut, the same part of each.
    """

    def __init__(self, everyone: Wire, parts: int = 1) -> None:
        self.wire = self.everyone = everyone
        if parts > 1:
            self.shards = Parts(everyone.split(everyone.rank // parts))
            self.wire = everyone.split(everyone.rank % parts)
        super().__init__(self.wire.tally)
        self.replica, self.replicas = self.wire.rank, self.wire.size
        self.living = tuple(range(self.replicas))
        self.local_replica = everyone.local_rank()
        label = f"replica {self.replica} of {self.replicas}"
        if parts > 1:
            label += f", part {self.shards.index} of {parts}"
        self.wire.label = everyone.label = label

    def clock(self) -> float:
        return self.wire.clock()

    def total(self, values: np.ndarray) -> np.ndarray:
        table = np.array(values, np.float64, order="C")
        self.wire.allreduce_(table)
        return table

    def any(self, flag: bool) -> bool:
        count = np.array([flag], np.int64)
        self.everyone.allreduce_(count)
        return bool(count[0])

    def collect(self, array: np.ndarray) -> list[np.ndarray] | None:
        return self.wire.collect(array)

    def told(self, text: str) -> str:
        return self.everyone.allgather_text(text)[0]

    def agree(self, error: str | None) -> None:
        self.everyone.agree(error)

    def reports(self) -> list[dict[str, Any]] | None:
        every = self.everyone.collect(np.frombuffer(json.dumps(self.report()).encode(), np.uint8))
        return None if every is None else [json.loads(report.tobytes()) for report in every]

    def ranks(self) -> list[dict[str, Any]]:
        return [peer.about() for peer in self.everyone.peers]


class Peers(Together):
    """Replicas without a server: all ranks of the wire."""

    def __init__(self, wire: Wire, parts: int = 1) -> None:
        super().__init__(wire, parts)
        self.arrays: Wire | Nccl = self.wire  # what adds and broadcasts them

    def choose_collectives(self, wanted: str, xp: Any) -> str:
        parts = [self.shards.wire] if isinstance(self.shards, Parts) else []
        (self.arrays, *between), word = choose(self.everyone, [self.wire, *parts], wanted, xp)
        if isinstance(self.shards, Parts):
            (self.shards.arrays,) = between
        return word

    def begin(self, parameters: Array) -> None:
        with span("broadcast"):
            self.arrays.broadcast(parameters, 0)

    def close(self) -> None:
        self.everyone.close()


class Synchronous(Peers):
    """Replicas in step, each on its slice of every batch."""

    cuts_batches = True

    def add_(self, sums: Array) -> None:
        with span("allreduce"):
            self.arrays.allreduce_(sums)

    def add_in_order_(self, sums: Array, partials: list[Array]) -> None:
        with span("chain"):
            self.wire.add_in_order_(sums, partials)


class Periodic(Peers):
    """Replicas on rows of their own that meet at every ``exchange``."""

    shards_rows = True

    def __init__(self, wire: Wire, parts: int = 1) -> None:
        super().__init__(wire, parts)
        self.meetings = 0

    def _sum_(self, changes: Array) -> None:
        """changes = their sum over the replicas, in place."""
        self.wire.barrier()  # so that waiting for others is told from the transfer
        with span("allreduce"):
            self.arrays.allreduce_(changes)
        self.meetings += 1
        self.wire.worked("exchange", changes.nbytes)

    def report(self) -> dict[str, Any]:
        return super().report() | {"meetings": self.meetings}


class Averaging(Periodic):
    """All go on from a common point, which follows the mean of what they changed.

        velocity <- momentum velocity + mean of (parameters - common)
        common   <- common + rate (mean + momentum velocity)

    Rate 1 and momentum 0 is the average of the parameters: local SGD (Stich, "Local SGD converges fast and
    communicates little", 2018, algorithm 1). With momentum it is Nesterov's as an outer optimiser (Douillard et al.,
    "DiLoCo: Distributed low-communication training of language models", 2023, algorithm 1: rate 0.7, momentum 0.9).

    Parameters
    ----------
    wire : Wire
    rate, momentum : float
    """

    def __init__(self, wire: Wire, parts: int = 1, *, rate: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__(wire, parts)
        self.rate, self.momentum = rate, momentum
        self._velocity: Array | None = None

    def begin(self, parameters: Array) -> None:
        super().begin(parameters)
        if self.momentum:
            self._velocity = module_of(parameters).zeros_like(parameters)

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:  # noqa: ARG002
        change = parameters  # its memory: all come away with others
        change -= before
        self._sum_(change)
        change *= np.float32(1 / self.replicas)
        if self._velocity is not None:
            self._velocity *= np.float32(self.momentum)
            self._velocity += change
            change += self._velocity * np.float32(self.momentum)
        change *= np.float32(self.rate)
        before += change
        parameters[...] = before

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        return ({} if self._velocity is None else {"outer_velocity": self._velocity}), {}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        if self._velocity is not None:
            self._velocity[...] = module_of(self._velocity).asarray(arrays["outer_velocity"])


class Elastic(Periodic):
    """Each keeps its parameters, on a spring to a centre, which is what is measured and saved.

        parameters <- parameters - a (parameters - centre)            a = elasticity / replicas
        centre     <- centre + a sum of (parameters - centre)

    Zhang, Choromanska & LeCun, "Deep learning with elastic averaging SGD" (2015), section 2: the synchronous form,
    beta = 0.9. The centre is the same on all replicas, so it needs no rank of its own.

    Parameters
    ----------
    wire : Wire
    elasticity : float
        The paper's beta.
    """

    def __init__(self, wire: Wire, parts: int = 1, *, elasticity: float = 0.9) -> None:
        super().__init__(wire, parts)
        self.a = np.float32(elasticity / self.replicas)
        self._centre = self._own = np.zeros(0, np.float32)

    def begin(self, parameters: Array) -> None:
        super().begin(parameters)
        self._centre, self._own = parameters.copy(), parameters.copy()

    def exchange(self, parameters: Array, before: Array, fetch: bool = True) -> None:  # noqa: ARG002
        """See ``Exchange``; ``before`` plays no part, and is work space."""
        pull = module_of(parameters, before).subtract(parameters, self._centre, out=before)
        pull *= self.a
        parameters -= pull
        self._sum_(pull)
        self._centre += pull

    def meet(self, parameters: Array) -> None:
        self._own[...] = parameters
        parameters[...] = self._centre

    def part(self, parameters: Array) -> None:
        parameters[...] = self._own

    def state(self) -> tuple[dict[str, Array], dict[str, Array]]:
        return {}, {"own": self._own}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._own[...] = module_of(self._own).asarray(arrays["own"])
