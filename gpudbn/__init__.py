"""Deep belief networks trained on GPUs, across machines.

    from gpudbn import DBN, RBM, load
    from gpudbn.fit import finetune, pretrain

Names are loaded on first use, so that ``python -m gpudbn.train`` can choose the number of BLAS
threads before NumPy starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpudbn.dbn import DBN as DBN
    from gpudbn.dbn import load as load
    from gpudbn.rbm import RBM as RBM

__version__ = "0.1.0"
__all__ = ["DBN", "RBM", "load"]
_HOME = {"DBN": "dbn", "RBM": "rbm", "load": "dbn"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"gpudbn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gpudbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
