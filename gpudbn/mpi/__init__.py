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
from functools import partial
from typing import TYPE_CHECKING, Any

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


def connect(mode: str, size: int | Callable[[], int], rule: Rule | None = None, servers: int = 1,
            outer: Callable[[Wire, int], Periodic] | None = None, push: str = "dense", overlap: bool = False,
            shards: int = 1, transport: str = "staged", device: str = "auto",
            max_staleness: int | None = None, stopped_seconds: float = 0) -> Exchange | Server:
    """Join the job that the launcher made; collective over its ranks.

    Parameters
    ----------
    mode : "sync", "async" or "local"
        All ranks are replicas and cut every batch; the first ranks serve and the others are replicas; or all ranks
        are replicas on rows of their own, which meet now and then.
    size : int, or a function that returns it
        Entries of the largest parameter vector of the run: room for it is made once. A function is called
        on the replicas, on the first of them before the others, so that data are downloaded or
        unpacked once; the server is told. Its UserError ends all ranks with one line.
    rule : callable (parameters, change, staleness), or a ``rules.Compensated``, optional
        How a server applies a change, in place; default: parameters += change. The same on all ranks.
    servers : int
        Mode async: how many ranks serve, each a shard of the parameters.
    outer : callable, optional
        Mode local: makes the kind of replica that meets in this way; default: ``collective.Averaging``.
    push : str
        Mode async: how replicas pack their changes, see ``changes.Packing``.
    overlap : bool
        Mode async: whether replicas exchange while they compute, see ``overlap.py``.
    shards : int
        How many neighbouring ranks hold a replica together.
    transport : "auto", "staged" or "direct"
        Mode async: see ``transport.py``. With ``direct`` parameters are GPU arrays, the servers' too.
    device : "auto", "gpu" or "cpu"
        Where the replicas compute.
    max_staleness : int, optional
        Mode async: how many turns a replica may be ahead of the slowest; default: any number.
    stopped_seconds : float
        Ranks kill one on their machine that has been stopped (not ended) for so long; 0: never.

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
    if mode not in MODES:
        raise UserError(f"mode: must be one of {', '.join(MODES)}; got {mode!r}")
    world = launch.world()
    ranks = world.size if world else 1
    if mode == "async" and ranks < servers + 1:
        who = "a server" if servers == 1 else f"{servers} servers"
        raise UserError(f"mode: async must have at least {servers + 1} ranks, {who} and a replica; got {ranks}. "
                        f"Start it with mpirun -n {servers + 2}, or use sync")
    if ranks == 1:
        from gpudbn.mpi.alone import Alone

        if callable(size):
            size()
        return Alone()
    from gpudbn.mpi import transport as transports
    from gpudbn.mpi.wire import Wire

    reason = None
    if mode == "async" and transport != "staged":
        reason = "--overlap moves copies in the host's memory" if overlap else transports.why_not_direct(device)
    wire = Wire.start()
    wire.align()
    wire.watch(stopped_seconds)
    if mode == "async":
        transport, reason = transports.agreed(wire, transport, reason)
    if overlap and not wire.threads:
        wire.agree("--overlap: must be off with an MPI that is for one thread alone; got on")
    if callable(size):
        size = _prepared(wire, size, first=servers if mode == "async" else 0)
    joined = join(wire, mode, size, rule, servers, outer, push, overlap, shards, transport,
                  max_staleness)
    if mode == "async":
        joined.transport = f"{transport}: {reason}" if reason else transport
    return joined


def chosen(settings: Settings, ranks: int) -> dict[str, Any]:
    """What ``connect`` and ``join`` take of a run's settings: keyword arguments but ``size``.

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

    outer = {"average": Averaging, "elastic": partial(Elastic, elasticity=settings.elasticity),
             "nesterov": partial(Averaging, rate=settings.outer_rate, momentum=settings.outer_momentum)}
    return {"mode": mode, "rule": from_settings(settings), "servers": settings.servers, "outer": outer[settings.outer],
            "push": settings.push, "overlap": settings.overlap == "on", "shards": settings.shards,
            "max_staleness": settings.max_staleness}


def _check_shards(settings: Settings, mode: str, ranks: int) -> None:
    """Refuse what replicas in several parts cannot do."""
    for name, value, good in (("mode", mode, ("sync", "local")),
                              ("centring", settings.centring, ("off", *(["data"] if settings.order == "fast" else []))),
                              ("optimiser", settings.optimiser, ("adam", "adagrad", "sgd")),
                              ("finetune", settings.finetune, ("classifier",))):
        if value not in good:
            raise UserError(f"--{name}: must be {' or '.join(good)} with --shards {settings.shards}; got {value}")
    if ranks % settings.shards:
        raise UserError(f"--shards: must divide the number of ranks; got {settings.shards} and {ranks}. "
                        f"Start it with mpirun -n {settings.shards * max(1, ranks // settings.shards)}")


def join(wire: Wire, mode: str, size: int, rule: Rule | None = None, servers: int = 1,
         outer: Callable[[Wire, int], Periodic] | None = None, push: str = "dense", overlap: bool = False,
         shards: int = 1, transport: str = "staged", max_staleness: int | None = None) -> Exchange | Server:
    """What the rank at this end of a wire is: see ``connect``. Collective over the wire."""
    for peer, role in zip(wire.peers, roles(wire.size, servers if mode == "async" else 0, shards), strict=True):
        peer.role = role
    if mode == "sync":
        from gpudbn.mpi.collective import Synchronous

        return Synchronous(wire, shards)
    if mode == "local":
        from gpudbn.mpi.collective import Averaging

        return (outer or Averaging)(wire, shards)
    from gpudbn.mpi.overlap import Overlapped
    from gpudbn.mpi.replica import Asynchronous
    from gpudbn.mpi.rules import Compensated
    from gpudbn.mpi.server import Server, cuts
    from gpudbn.mpi.transport import ends

    replicas = wire.split(int(wire.rank >= servers))
    links = [wire.among([server, *range(servers, wire.size)]) for server in range(servers)]
    mine = [link for link in links if link is not None]
    server_end, replica_end = ends(transport, replicas)
    if wire.rank >= servers:
        end = partial(replica_end, asking=isinstance(rule, Compensated))
        return (Overlapped if overlap else Asynchronous)(wire, replicas, mine, size, end, push=push,
                                                         max_staleness=max_staleness)
    part = cuts(size, servers)[wire.rank]
    return Server(wire, mine[0], part.stop - part.start, rule, server_end)


def roles(ranks: int, servers: int, shards: int = 1) -> list[str]:
    """What messages call the ranks of a job."""
    names = ["server"] if servers == 1 else [f"server {i} of {servers}" for i in range(servers)]
    count = (ranks - servers) // shards
    return names + [f"replica {i} of {count}" + (f", part {part} of {shards}" if shards > 1 else "")
                    for i in range(count) for part in range(shards)]


def _prepared(wire: Wire, size: Callable[[], int], first: int) -> int:
    """What ``size`` returns on rank ``first``, then on the ranks behind it; the largest, on all ranks."""
    import numpy as np

    found = 0
    for ranks in (range(first, first + 1), range(first + 1, wire.size)):
        problem = None
        if wire.rank in ranks:
            try:
                found = size()
            except UserError as error:
                problem = str(error)
        wire.agree(problem)
    return int(wire.allgather(np.array([found], np.int64)).max())
