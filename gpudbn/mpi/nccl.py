"""Sums, broadcasts and gathers between GPUs by NCCL, in place of a wire's: no array passes through host memory.

    choose(everyone, wires, "auto", xp)    the wires themselves, or an ``Nccl`` over the ranks of each; a word

A call is put behind the kernels on the current stream, and the next kernels behind it: the host waits for nothing.
NCCL refuses two ranks on one GPU. Its sums are the same bits on every rank, and other bits than MPI's.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.errors import UserError
from gpudbn.mpi.wire import Tally, Wire

ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES


class Nccl:
    """The ranks of a wire, each with a GPU of its own. Arrays are contiguous and on the current GPU.

    Parameters
    ----------
    nccl : module
        ``cupy.cuda.nccl``.
    comm : cupy.cuda.nccl.NcclCommunicator
        Over the ranks of the wire, in their order.
    tally : Tally
        Where bytes are counted. Not seconds: a transfer takes the GPU's time, not the host's.
    """

    def __init__(self, nccl: Any, comm: Any, tally: Tally) -> None:
        self._nccl, self._comm, self._tally = nccl, comm, tally
        self._kinds = {np.dtype(np.float32): nccl.NCCL_FLOAT32, np.dtype(np.float64): nccl.NCCL_FLOAT64}

    def allreduce_(self, array: Array) -> None:
        """array = sum over ranks of array, in place; the same bits on every rank."""
        where, count, kind, stream = self._arguments(array)
        self._comm.allReduce(where, where, count, kind, self._nccl.NCCL_SUM, stream)
        self._tally.sent += array.nbytes
        self._tally.received += array.nbytes

    def broadcast(self, array: Array, root: int = 0) -> None:
        """array = that of ``root``, in place."""
        where, count, kind, stream = self._arguments(array)
        self._comm.broadcast(where, where, count, kind, root, stream)
        if self._comm.rank_id() == root:
            self._tally.sent += array.nbytes
        else:
            self._tally.received += array.nbytes

    def allgather_(self, arrays: Array) -> None:
        """arrays[r] = that of rank r, for all r, in place: shape (size, ...), of which each rank has filled its own."""
        where, _, kind, stream = self._arguments(arrays)
        mine = arrays[self._comm.rank_id()]
        self._comm.allGather(mine.data.ptr, where, mine.size, kind, stream)
        self._tally.sent += mine.nbytes
        self._tally.received += arrays.nbytes

    def _arguments(self, array: Array) -> tuple[int, int, int, int]:
        """Address, entries and type of an array, and the stream on which it is ready."""
        if not array.flags.c_contiguous or array.dtype not in self._kinds:
            raise ValueError(f"nccl: array must be C-contiguous, float32 or float64; got {array.dtype} {array.shape}")
        stream = module_of(array).cuda.get_current_stream()
        return array.data.ptr, array.size, self._kinds[array.dtype], stream.ptr


def choose(everyone: Wire, wires: Sequence[Wire], wanted: str, xp: Any) -> tuple[list[Wire | Nccl], str]:
    """What adds, broadcasts and gathers arrays of this module among the ranks of some wires.

    Parameters
    ----------
    everyone : Wire
        All ranks of the run. Collective over these.
    wires : sequence of Wire
        Those that arrays go by, split off it.
    wanted : "auto", "mpi" or "nccl"
        auto: NCCL between GPUs where it can be.
    xp : module
        ``numpy`` or ``cupy``, whose current device is this rank's.

    Returns
    -------
    transports : list of Wire or Nccl
        One for each wire, with its ``allreduce_``, ``broadcast`` and ``allgather_``.
    word : str
        For the log: what was taken, and why not NCCL; empty on CPUs.

    Raises
    ------
    UserError
        If NCCL is wanted and cannot be, on all ranks; or, on the rank concerned, if it can be and fails.
    """
    if wanted == "mpi":
        return list(wires), "" if xp is np else "sums by MPI"
    reason = _why_not(everyone, xp)
    if reason and wanted == "nccl":
        everyone.agree(f"--collectives: must be auto or mpi here; got nccl, but {reason}")
    if reason:
        return list(wires), "" if xp is np else f"sums by MPI ({reason})"
    nccl = _module()
    found: list[Wire | Nccl] = []
    for wire in wires:
        one = Nccl(nccl, _communicator(wire, nccl), wire.tally)
        _prove(one, wire.size, xp)
        found.append(one)
    version = nccl.get_version()
    return found, f"sums by NCCL {version // 10_000}.{version % 10_000 // 100}"


def _module() -> Any:
    """``cupy.cuda.nccl``; its ``available`` says whether there is a library behind it."""
    with warnings.catch_warnings():  # CuPy's way to say that there is none
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl


def _why_not(wire: Wire, xp: Any) -> str:
    """One reason, the same on all ranks, why NCCL cannot be; empty if it can."""
    if xp is np:
        mine, place = "arrays are on CPUs", ""
    elif not _module().available:
        mine, place = "CuPy finds no NCCL (pip install nvidia-nccl-cu13 or nvidia-nccl-cu12)", ""
    else:
        bus = xp.cuda.runtime.deviceGetPCIBusId(xp.cuda.runtime.getDevice())
        mine, place = "", f"{socket.gethostname()} {bus}"
    reason = next(filter(None, wire.allgather_text(mine)), "")
    places = wire.allgather_text(place)
    if reason or len(set(places)) == len(places):
        return reason
    pair = next((places.index(one), rank) for rank, one in enumerate(places) if places.index(one) < rank)
    return f"ranks {pair[0]} and {pair[1]} share a GPU, which NCCL refuses"


def _communicator(wire: Wire, nccl: Any) -> Any:
    """An NCCL communicator over the ranks of the wire."""
    name, problem = np.zeros(1 + ID_BYTES, np.uint8), ""
    if wire.rank == 0:
        try:
            found = nccl.get_unique_id()  # bytes from CuPy 14 on; a tuple of chars before
            name[0] = isinstance(found, bytes)
            name[1:] = np.frombuffer(found, np.uint8) if name[0] else np.array(found, np.int8).view(np.uint8)
        except Exception as error:  # the others wait for the name
            problem = _failed(error)
    wire.agree(problem or None)
    wire.broadcast(name)
    identity = name[1:].tobytes() if name[0] else tuple(name[1:].view(np.int8).tolist())
    try:
        return nccl.NcclCommunicator(wire.size, identity, wire.rank)
    except Exception as error:
        raise UserError(_failed(error)) from error  # not agreed on: others may wait inside NCCL; this ends them


def _prove(transport: Nccl, ranks: int, xp: Any) -> None:
    """One sum that is known. Its first use is when NCCL makes its connections."""
    one = xp.ones(1, np.float32)
    transport.allreduce_(one)
    if float(one[0]) != ranks:
        raise UserError(_failed(f"a sum of {float(one[0]):g} where {ranks} ranks have 1 each"))


def _failed(why: Exception | str) -> str:
    return (f"--collectives: must be a way that works here; got nccl, which says: {str(why).splitlines()[0]}. "
            "Use --collectives mpi")
