"""What a rank did when: in each state so many seconds, the first seconds in detail, the whole run in stretches.

    with tally.timing("transferring"): ...

A rank is in one state at a time, and what comes and goes within a wait or a transfer belongs to it. A call of the wire
that moves little counts as a wait for others; one that moves much as a transfer, the wait for others in it included.

To enter a state costs a look at the clock and two appends; every ``FOLD`` entries are added up at once. Memory is
bounded: of the whole run there are ``BINS`` stretches of equal length, which doubles when the run outgrows them.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

STATES = ("computing", "measuring", "saving", "applying", "transferring", "waiting", "starting")
NUMBER = {state: number for number, state in enumerate(STATES)}
WHOLE = (NUMBER["transferring"], NUMBER["waiting"])  # whatever happens within
FOLD = 1024  # entries between two additions
FIRST = 16384  # entries that are kept one by one
MOST = 4096  # of them that are told
SHORTEST = 20e-6  # seconds of an entry that is told on its own
BINS = 512  # of the whole run
WIDTH = 1e-3  # seconds of a bin, to begin with


class Tally:
    """Seconds and bytes of one process.

    Parameters
    ----------
    clock : callable
        Seconds since some time in the past.
    state : one of STATES
        What it is at outside of all ``timing``; see ``enter``.

    Attributes
    ----------
    sent, received : int
        Bytes.
    offset : float
        What has to be added to this clock to have that of rank 0: see ``Wire.align``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, state: str = "computing") -> None:
        self.clock = clock
        self.sent = self.received = 0
        self.offset = 0.0
        self.start = clock()
        self._stack = [NUMBER[state]]  # the innermost last
        self._times, self._states = [self.start], [NUMBER[state]]  # since when, what; not yet added up
        self._seconds = np.zeros(len(STATES))
        self._bins, self._width = np.zeros((len(STATES), BINS)), WIDTH
        self._first: list[tuple[np.ndarray, np.ndarray]] = []  # times and states
        self._until = self.start
        self._timings = [_Timing(self, number) for number in range(len(STATES))]

    def timing(self, state: str) -> AbstractContextManager[None]:
        """A context manager: what happens in it is this, unless it lies within a wait or a transfer."""
        return self._timings[NUMBER[state]]

    def enter(self, state: str) -> None:
        """From now on it is at this, outside of all ``timing``."""
        self._stack[0] = NUMBER[state]
        self._note(self._stack[-1])

    def seconds(self) -> dict[str, float]:
        """In each state, up to now."""
        self._fold()
        return {state: round(float(spent), 6) for state, spent in zip(STATES, self._seconds, strict=True)}

    def about(self) -> dict[str, Any]:
        """Who and where this process is and what it did, fit for JSON.

        Returns
        -------
        dict
            ``host``, ``pid``, ``seconds`` (of each state), ``bytes`` (sent, received), and ``timeline``, a dict:
            ``start`` by the clock of rank 0, and in seconds from there ``end``; ``times`` at which the first
            ``states`` (their numbers) began, and ``until`` when these are told; ``bins``, for each state its seconds
            in every ``width`` seconds of the whole.
        """
        seconds = self.seconds()
        kept, until = self._detail()
        times, states = zip(*kept, strict=True)
        end = self._times[0] - self.start
        used = max(1, math.ceil(end / self._width))
        return {"host": socket.gethostname(), "pid": os.getpid(), "seconds": seconds,
                "bytes": {"sent": self.sent, "received": self.received},
                "timeline": {"start": self.start + self.offset, "end": end, "times": times, "states": states,
                             "until": until, "width": self._width, "bins": self._bins[:, :used].round(6).tolist()}}

    def _detail(self) -> tuple[list[tuple[float, int]], float]:
        """The first entries, from the start, the shortest added to those before them; and up to when."""
        times = np.concatenate([times for times, _ in self._first]) - self.start
        states = np.concatenate([states for _, states in self._first])
        until = self._until - self.start
        long = np.diff(times, append=until) >= SHORTEST
        long[0] = True
        times, states = times[long], states[long]
        new = np.diff(states, prepend=-1) != 0
        found = list(zip(times[new].round(6).tolist(), states[new].tolist(), strict=True))
        return found[:MOST], found[MOST][0] if len(found) > MOST else until

    def _begin(self, state: int) -> None:
        before = self._stack[-1]
        if before in WHOLE and len(self._stack) > 1:
            state = before
        self._stack.append(state)
        if state != before:
            self._note(state)

    def _end(self) -> None:
        before = self._stack.pop()
        if self._stack[-1] != before:
            self._note(self._stack[-1])

    def _note(self, state: int) -> None:
        self._times.append(self.clock())
        self._states.append(state)
        if len(self._times) > FOLD:
            self._fold()

    def _fold(self) -> None:
        """Add up what was noted, and what it is at up to now."""
        times, states = np.array([*self._times, self.clock()]), np.array(self._states)
        spent = np.diff(times)
        self._seconds += np.bincount(states, spent, minlength=len(STATES))
        if sum(len(some) for some, _ in self._first) < FIRST:
            self._first.append((times[:-1], states))
            self._until = float(times[-1])
        while times[-1] - self.start > BINS * self._width:
            self._bins[:, : BINS // 2] = self._bins[:, ::2] + self._bins[:, 1::2]
            self._bins[:, BINS // 2 :] = 0
            self._width *= 2
        edges = self.start + self._width * np.arange(BINS + 1)
        for state in np.unique(states):
            until = np.concatenate([[0.0], np.cumsum(np.where(states == state, spent, 0))])
            self._bins[state] += np.diff(np.interp(edges, times, until))
        self._times, self._states = [float(times[-1])], [self._states[-1]]


class _Timing:
    """Enters a state and leaves it; one object for all times."""

    __slots__ = ("state", "tally")

    def __init__(self, tally: Tally, state: int) -> None:
        self.tally, self.state = tally, state

    def __enter__(self) -> None:
        self.tally._begin(self.state)

    def __exit__(self, *_: object) -> None:
        self.tally._end()
