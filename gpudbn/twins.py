"""The one place that chooses between the twins: ``reference`` for NumPy arrays, a ``cuda.Launcher`` for CuPy's.

Within ``without_kernels()`` arrays on a GPU get CuPy's own operations instead: ``unfused``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from gpudbn import cuda, reference, unfused
from gpudbn.arrays import Array, module_of

_unfused: ContextVar[bool] = ContextVar("unfused", default=False)


def twins_of(*arrays: Array) -> Any:
    """What has the functions that work on these arrays; the two have the same names and signatures."""
    if module_of(*arrays) is np:
        return reference
    return unfused if _unfused.get() else cuda.gpu()


@contextmanager
def without_kernels(really: bool = True) -> Iterator[None]:
    """While it lasts, what is asked for on a GPU is ``unfused``."""
    before = _unfused.set(really)
    try:
        yield
    finally:
        _unfused.reset(before)
