"""Parameters: one flat float32 buffer with named views into it.

The same shape serves parameters, gradients, changes, velocities and step-rule state, so the
optimiser works on one flat array, and the exchange sends one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import ModuleType

import numpy as np

from gpudbn.arrays import Array, module_of

Shapes = Mapping[str, tuple[int, ...]]


class Parameters:
    """Named float32 arrays laid end to end in ``flat``.

    Parameters
    ----------
    shapes : mapping from name to shape
        In the order in which they lie in the buffer.
    xp : module
        ``numpy`` or ``cupy``: where a new buffer is made (zeros).
    flat : array (size,), float32, optional
        An existing buffer to lay the views over, for instance a window of MPI. Not copied.
    """

    def __init__(self, shapes: Shapes, xp: ModuleType = np, flat: Array | None = None) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        size = sum(prod(shape) for shape in self.shapes.values())
        if flat is None:
            flat = xp.zeros(size, np.float32)
        if flat.shape != (size,) or flat.dtype != np.float32:
            raise ValueError(f"Parameters: flat must be float32 of shape ({size},); got {flat.dtype} {flat.shape}")
        self.flat = flat
        self.offsets: dict[str, int] = {}
        self._views: dict[str, Array] = {}
        start = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = start
            self._views[name] = flat[start : start + prod(shape)].reshape(shape)
            start += prod(shape)

    def __getitem__(self, name: str) -> Array:
        """The view of that name: shares memory with ``flat``."""
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    @property
    def size(self) -> int:
        """Number of float32 entries."""
        return self.flat.size

    def zeros_like(self) -> Parameters:
        """New Parameters of the same shapes and place, all zero."""
        return Parameters(self.shapes, module_of(self.flat))

    def copy(self) -> Parameters:
        """New Parameters with a copy of the buffer."""
        return Parameters(self.shapes, flat=self.flat.copy())


def rbm_shapes(n: int, m: int, fan: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of one RBM with n visible and m hidden units: W (n, m), or (fan, m) if local, b (n,), c (m,)."""
    return {"W": (n if fan is None else fan, m), "b": (n,), "c": (m,)}
