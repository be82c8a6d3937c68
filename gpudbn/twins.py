"""The one place that chooses between the twins: ``reference`` for NumPy arrays, a ``cuda.Launcher`` for CuPy's."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn import cuda, reference
from gpudbn.arrays import Array, module_of


def twins_of(*arrays: Array) -> Any:
    """What has the functions that work on these arrays; the two have the same names and signatures."""
    return reference if module_of(*arrays) is np else cuda.gpu()
