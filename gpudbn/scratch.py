"""Work space of passes in NumPy."""

from __future__ import annotations

import math
import threading

import numpy as np

# Elementwise passes run in pieces of this many entries, so that they stay in the L2 cache.
PIECE = 1 << 16


class Scratch(threading.local):
    """Work space that outlives a call: allocating megabytes anew costs more than filling them."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, type], np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """An array of this thread's whose content is not specified, the same memory in each call with this name."""
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.size < size:
            buffer = self.buffers[name, dtype] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)
