"""Kills the ranks of this machine that have been stopped for too long: all the others would wait for them for ever.

MPI sees that a process has died, not that it is stopped (SIGSTOP, a debugger that was left). Once
killed it is dead like any other, and cannot come back with what it knew. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

LOOKS = 10  # at a process that is stopped, before it is killed


def state(pid: int) -> tuple[str, int]:
    """State (T: stopped) and start time, in clock ticks, of a process; ("", 0) if there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def watch(others: Mapping[int, tuple[int, str]], seconds: float) -> None:
    """Look at other processes from a thread of its own, for as long as this process lives.

    Parameters
    ----------
    others : mapping
        By process number: its start time, so that nothing else of this number is meant, and what to call it.
    seconds : float
        How long one may be stopped; 0: for ever. Counted in looks: where this process was stopped as well, as when
        the whole job is suspended, it has not looked.
    """
    if seconds and others:
        threading.Thread(target=_look, args=(dict(others), seconds), daemon=True, name="watch").start()


def _look(others: dict[int, tuple[int, str]], seconds: float) -> None:
    seen = dict.fromkeys(others, 0)
    while True:
        time.sleep(seconds / LOOKS)
        for pid, (started, name) in others.items():
            seen[pid] = seen[pid] + 1 if state(pid) == ("T", started) else 0
            if seen[pid] == LOOKS:
                sys.stderr.write(f"{name} was stopped for {seconds:g} s: killed\n")
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
