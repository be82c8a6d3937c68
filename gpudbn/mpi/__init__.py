"""Replicas over MPI: all in step, or around a parameter server.

    launch.py      what the launcher said; before NumPy and MPI are loaded
    tally.py       what a rank did when
    alone.py       what a training loop may ask of other replicas; the answers of one on its own
    wire.py        the only door to MPI: sleeping waits, staging of GPU arrays, windows, ends
    nccl.py        sums and broadcasts between GPUs
    collective.py  replicas in step, or that meet every so often
    parts.py       the parts of one replica
    replica.py     replicas around parameter servers
    server.py      a server
    rules.py       what a server does with a change
    changes.py     how a change is packed
    staged.py      how changes and parameters travel: through a window in the server's memory
    direct.py      or as messages of device memory
    transport.py   which of the two
    overlap.py     a replica that exchanges while it computes
    ledger.py      which turns are done, and who does what is left
    sandblaster.py L-BFGS and conjugate gradient whose vectors are the servers'
    hub.py         where replicas meet, and who of them is living
    watch.py       kills ranks that have been stopped for too long
    simulate.py    whole runs in virtual time, in one process: the files above, on
    virtual.py     MPI between ranks of
    machine.py     a cluster in virtual time, where things take as long as
    costs.py       says; or calibrate.py has measured

Importing this package loads neither NumPy nor MPI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from gpudbn.errors import UserError
from gpudbn.mpi import launch

if TYPE_CHECKING:
    from gpudbn.mpi.alone import Exchange
    from gpudbn.mpi.collective import Periodic
    from gpudbn.mpi.rules import Rule
    from gpudbn.mpi.server import Server
    from gpudbn.mpi.wire import Wire
    from gpudbn.settings import Settings

MODES = ("sync", "async", "local")


@dataclass(frozen=True)
class Plan:
    """How the ranks of a job are to work together. The same on all of them.

    Attributes
    ----------
    mode : "sync", "async" or "local"
        All ranks are replicas and cut every batch; the first ranks serve and the others are replicas; or all ranks
        are replicas on rows of their own, which meet now and then.
    shards : int
        How many neighbouring ranks hold a replica together.
    outer : callable, optional
        Mode local: makes the kind of replica that meets in this way; default: ``collective.Averaging``.
    stopped_seconds : float
        Ranks kill one on their machine that has been stopped (not ended) for so long; 0: never.
    servers : int
        Mode async, as all that follow: how many ranks serve, each a shard of the parameters.
    rule : callable, optional
        Makes what applies changes at a server; default: ``rules.Rule``, which adds them.
    push : str
        How replicas pack their changes, see ``changes.Packing``.
    overlap : bool
        Whether replicas exchange while they compute, see ``overlap.py``.
    transport : "auto", "staged" or "direct"
        See ``transport.py``. With ``direct`` parameters are GPU arrays, the servers' too.
    device : "auto", "gpu" or "cpu"
        Where the replicas compute.
    max_staleness : int, optional
        How many turns a replica may be ahead of the slowest; default: any number.
    """

    mode: str
    shards: int = 1
    outer: Callable[[Wire, int], Periodic] | None = None
    stopped_seconds: float = 0
    servers: int = 1
    rule: Callable[[], Rule] | None = None
    push: str = "dense"
    overlap: bool = False
    transport: str = "staged"
    device: str = "auto"
    max_staleness: int | None = None

    @property
    def serving(self) -> int:
        """How many ranks are no replicas: the first ones."""
        return self.servers if self.mode == "async" else 0


def connect(plan: Plan, size: int | Callable[[], int]) -> Exchange | Server:
    """Join the job that the launcher made; collective over its ranks.

    Parameters
    ----------
    plan : Plan
    size : int, or a function that returns it
        Entries of the largest parameter vector of the run, of one part where replicas are cut: room for it is made
        once. A function is called on the replicas, on the first of them before the others, so that data are
        downloaded or unpacked once; the server is told. Its UserError ends all ranks with one line.

    Returns
    -------
    Exchange or Server
        A ``Server``, whose ``serve()`` is to be called, on the first ranks in mode async. ``Alone``, without MPI,
        in a job of one rank or where there is no launcher.

    Raises
    ------
    UserError
        If the mode is not known, async has no replica or ``direct`` cannot be; or see ``Wire.start``.
    """
    if plan.mode not in MODES:
        raise UserError(f"mode: must be one of {', '.join(MODES)}; got {plan.mode!r}")
    world = launch.world()
    ranks = world.size if world else 1
    if plan.mode == "async" and ranks <= plan.servers:
        who = "a server" if plan.servers == 1 else f"{plan.servers} servers"
        raise UserError(f"mode: async must have at least {plan.servers + 1} ranks, {who} and a replica; got {ranks}. "
                        f"Start it with mpirun -n {plan.servers + 2}, or use sync")
    if ranks == 1:
        from gpudbn.mpi.alone import Alone

        if callable(size):
            size()
        return Alone()
    from gpudbn.mpi import transport as transports
    from gpudbn.mpi.wire import Wire

    transport, reason = plan.transport, None
    if plan.mode == "async" and transport != "staged":
        reason = ("--overlap moves copies in the host's memory" if plan.overlap else
                  "what crosses between --shards passes through the host's memory" if plan.shards > 1 else
                  transports.why_not_direct(plan.device))
    wire = Wire.start()
    wire.align()
    wire.watch(plan.stopped_seconds)
    if plan.mode == "async":
        transport, reason = transports.agreed(wire, transport, reason)
    if plan.overlap and not wire.threads:
        wire.agree("--overlap: must be off with an MPI that is for one thread alone; got on")
    if callable(size):
        size = _prepared(wire, size, first=plan.serving)
    joined = join(wire, replace(plan, transport=transport), size)
    if plan.mode == "async":
        joined.transport = f"{transport}: {reason}" if reason else transport
    return joined


def chosen(settings: Settings, ranks: int) -> Plan:
    """The plan of a run with these settings and so many ranks.

    Raises
    ------
    UserError
        If the settings do not fit so many ranks.
    """
    mode = settings.mode if ranks > 1 else "sync"
    if settings.order == "fixed" and mode != "sync":
        why = "whose replicas arrive in no fixed order" if mode == "async" else "whose replicas cut no batch"
        raise UserError(f"--order: must be fast with --mode {mode}, {why}; got fixed. Use --mode sync")
    if settings.collectives == "nccl" and mode == "async":
        raise UserError("--collectives: must be auto or mpi with --mode async, whose replicas add nothing up; got nccl")
    if settings.shards > 1:
        _check_shards(settings, mode, ranks)
    from gpudbn.mpi.collective import Averaging, Elastic
    from gpudbn.mpi.rules import from_settings

    outer: dict[str, Callable[[Wire, int], Periodic]] = {
        "average": Averaging, "elastic": partial(Elastic, elasticity=settings.elasticity),
        "nesterov": partial(Averaging, rate=settings.outer_rate, momentum=settings.outer_momentum)}
    return Plan(mode, shards=settings.shards, outer=outer[settings.outer], stopped_seconds=settings.stopped_seconds,
                servers=settings.servers, rule=partial(from_settings, settings), push=settings.push,
                overlap=settings.overlap == "on", transport=settings.transport, device=settings.device,
                max_staleness=settings.max_staleness)


def _check_shards(settings: Settings, mode: str, ranks: int) -> None:
    """Refuse what replicas in several parts cannot do."""
    for name, value, good in (("overlap", settings.overlap, ("off",)),  # parts call MPI while they compute
                              ("centring", settings.centring, ("off", *(["data"] if settings.order == "fast" else []))),
                              ("optimiser", settings.optimiser, ("adam", "adagrad", "sgd"))):
        if value not in good:
            raise UserError(f"--{name}: must be {' or '.join(good)} with --shards {settings.shards}; got {value}")
    check_ranks(settings.shards, ranks, settings.servers if mode == "async" else 0)


def check_ranks(shards: int, ranks: int, servers: int = 0) -> None:
    """Refuse ranks that are not some servers and a whole number of replicas in so many parts."""
    replicas, rest = divmod(ranks - servers, shards)
    if replicas < 1 or rest:
        behind = f", less {servers} that serve{'s' * (servers == 1)}" if servers else ""
        raise UserError(f"--shards: must divide the number of ranks{behind}; got {shards} and {ranks}. "
                        f"Start it with mpirun -n {servers + shards * max(1, replicas)}")


def join(wire: Wire, plan: Plan, size: int) -> Exchange | Server:
    """What the rank at this end of a wire is: see ``connect``. Collective over the wire; ``auto`` is no transport."""
    for peer, role in zip(wire.peers, roles(wire.size, plan.serving, plan.shards), strict=True):
        peer.role = role
    if plan.mode == "sync":
        from gpudbn.mpi.collective import Synchronous

        return Synchronous(wire, plan.shards)
    if plan.mode == "local":
        from gpudbn.mpi.collective import Averaging

        return (plan.outer or Averaging)(wire, plan.shards)
    from gpudbn.mpi.overlap import Overlapped
    from gpudbn.mpi.replica import Asynchronous, Link
    from gpudbn.mpi.rules import Rule
    from gpudbn.mpi.server import Server, Store, rooms
    from gpudbn.mpi.transport import ends

    make, servers, shards = plan.rule or Rule, plan.servers, plan.shards
    everyone = wire.split(int(wire.rank >= servers))  # who serves; or who computes
    server_end, replica_end = ends(plan.transport, everyone)
    # a wire for each server and part that have something in common; on both their ends are made in this order
    pairs = [(server, part, room) for part in range(shards)
             for server, room in rooms(size, servers, shards, part).items()]
    wires = [wire.among([server, *range(servers + part, wire.size, shards)]) for server, part, _ in pairs]
    mine = [(each, *pair) for each, pair in zip(wires, pairs, strict=True) if each is not None]
    if wire.rank < servers:
        stores = [Store(each, room, make(), server_end) for each, _, _, room in mine]
        return Server(wire, stores, everyone if servers > 1 else None)
    end = partial(replica_end, asking=make().asks)
    links = [Link(each, room, end, push=plan.push, head=server * shards // servers == part)
             for each, server, part, room in mine]
    return (Overlapped if plan.overlap else Asynchronous)(wire, everyone, links, shards,
                                                          max_staleness=plan.max_staleness)


def roles(ranks: int, servers: int, shards: int = 1) -> list[str]:
    """What messages call the ranks of a job."""
    names = ["server"] if servers == 1 else [f"server {i} of {servers}" for i in range(servers)]
    count = (ranks - servers) // shards
    return names + [f"replica {i} of {count}" + (f", part {part} of {shards}" if shards > 1 else "")
                    for i in range(count) for part in range(shards)]


def _prepared(wire: Wire, size: Callable[[], int], first: int) -> int:
    """What ``size`` returns on rank ``first``, then on the ranks behind it; the largest, on all ranks."""
    import numpy as np

    from gpudbn.mpi.alone import together

    found = 0
    for ranks in (range(first, first + 1), range(first + 1, wire.size)):
        found = max(found, together(wire.agree, lambda: size() if wire.rank in ranks else 0))  # noqa: B023 - called here
    return int(wire.allgather(np.array([found], np.int64)).max())
