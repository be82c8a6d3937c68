"""How long an update takes by each of several paths: timed once on this device, and remembered for equal cases.

    times = recalled(case, names)                      of this process, or of the file
    times[name] = timed(xp, turn) / count              if there is nothing to recall
    remember(case, times)

The file is ``paths.json`` in the cache folder (``data.files.cache_folder``), or the one that the environment variable
``GPUDBN_PATHS`` names; if that is empty there is none. A file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gpudbn.checkpoint import write_atomically
from gpudbn.data.files import cache_folder
from gpudbn.errors import UserError

WARM = 4  # turns before those that count: a graph is captured in the second of each buffer of a feed
SAMPLES = 3
WORK = 1e13  # flops of a turn, at most, unless that were less than two updates

_known: dict[str, dict[str, float]] = {}  # of this process


def updates_of(flops: float, most: int) -> int:
    """How many updates of so many flops a turn of a trial has: all, but for large layers."""
    return min(most, max(2, int(WORK / flops)))


def timed(xp: ModuleType, turn: Callable[[], None]) -> float:
    """Microseconds that a turn takes on the current stream, from its first launch to its end. Waits for the GPU.

    Parameters
    ----------
    xp : module
        CuPy.
    turn : callable
        Launches the same work at every call.
    """
    cupy: Any = xp
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    found = []
    for _ in range(WARM + SAMPLES):
        start.record()
        turn()
        end.record()
        end.synchronize()
        found.append(1000 * float(cupy.cuda.get_elapsed_time(start, end)))
    return statistics.median(found[WARM:])


def recalled(case: Mapping[str, Any], names: Iterable[str]) -> dict[str, float] | None:
    """Microseconds an update by each of these paths in an equal case, or None if they are not all known."""
    key = _key(case)
    found = _known.get(key) or _read().get(key)
    if not isinstance(found, dict) or set(found) != set(names):
        return None
    usable = all(type(time) in (int, float) and 0 < time < math.inf for time in found.values())
    return found if usable else None


def remember(case: Mapping[str, Any], times: Mapping[str, float]) -> None:
    """Keep the times of a case, for this process and for others."""
    _known[_key(case)] = dict(times)
    path = _file()
    if path is not None:
        with contextlib.suppress(OSError, UserError):  # nothing depends on it
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(_read() | {_key(case): dict(times)}, indent=1) + "\n").encode())


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)


def _file() -> Path | None:
    name = os.environ.get("GPUDBN_PATHS")
    return cache_folder() / "paths.json" if name is None else Path(name).expanduser() if name else None


def _read() -> dict[str, Any]:
    """What the file holds, if it is one of ours."""
    path = _file()
    with contextlib.suppress(OSError, ValueError):  # ValueError: no JSON, no text
        found = json.loads(path.read_text("utf-8")) if path is not None else {}
        return found if isinstance(found, dict) else {}
    return {}
