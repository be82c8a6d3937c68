"""A CuPy that is not there: arrays that NumPy and MPI cannot touch unless they are copied to the host.

``install()`` puts it in place of CuPy. It counts how often the stream was synchronised, and
an array whose copy to the host was not followed by that shows garbage.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np


class Stream:
    """The current stream: copies to the host land when it is synchronised."""

    def __init__(self):
        self.synchronised = 0
        self.pending = []

    def synchronize(self):
        self.synchronised += 1
        for host, values in self.pending:
            host[...] = values
        self.pending.clear()


STREAM = Stream()


class FakeArray:
    """What ``gpudbn`` uses of ``cupy.ndarray``. Deliberately without ``__array__`` and the buffer protocol."""

    def __init__(self, values):
        self._values = np.array(values, order="C")

    dtype = property(lambda self: self._values.dtype)
    shape = property(lambda self: self._values.shape)
    nbytes = property(lambda self: self._values.nbytes)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    flags = property(lambda self: self._values.flags)

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def get(self, out):
        out.view(np.uint8)[...] = 0xAA
        STREAM.pending.append((out, self._values.copy()))
        return out

    def set(self, host):
        self._values[...] = host

    def fill(self, value):
        self._values.fill(value)

    def __iadd__(self, other):
        self._values += other._values
        return self

    def __getitem__(self, part):
        view = FakeArray.__new__(FakeArray)
        view._values = self._values[part]
        return view

    def __setitem__(self, key, other):
        self._values[key] = other._values

    def peek(self):
        """The values, for the test."""
        return self._values


def install():
    """Make ``gpudbn`` believe that CuPy is loaded and these are its arrays."""
    cupy = ModuleType("cupy")
    cupy.ndarray = FakeArray
    cupy.subtract = lambda a, b, out: np.subtract(a.peek(), b.peek(), out=out.peek())
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: STREAM, alloc_pinned_memory=bytearray)
    sys.modules["cupy"] = cupy
