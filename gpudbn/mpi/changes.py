"""A change on its way to a server: a label that says what it is, and the bytes that carry it.

    dense   float32, as it is
"""

from __future__ import annotations

import numpy as np

from gpudbn.arrays import Array
from gpudbn.mpi.rules import Rule

WORDS = 8  # int64 words of a label
# the first ones; those behind are the encoding's own
BASE = 0  # how many versions the parameters contained on which the change was computed
ENCODING = 1
BYTES = 2  # of the payload
TURN = 3  # which turn of the run it is of, so that no turn is applied twice
DENSE = 0
NO_TURN = -1  # a change that is of no turn


def encode(change: Array, *, base: int, turn: int = NO_TURN) -> tuple[np.ndarray, Array]:
    """Label (WORDS,), int64, and payload, contiguous, at most as many bytes as the change."""
    label = np.zeros(WORDS, np.int64)
    label[BASE], label[ENCODING], label[BYTES], label[TURN] = base, DENSE, change.nbytes, turn
    return label, change


def apply(rule: Rule, parameters: Array, label: np.ndarray, payload: Array, staleness: int) -> None:
    """Change the parameters by the rule and the change that ``encode`` packed.

    Parameters
    ----------
    payload : array (bytes,), uint8
        Not modified.
    """
    if label[ENCODING] != DENSE:
        raise ValueError(f"apply: encoding must be {DENSE}; got {label[ENCODING]}")
    rule(parameters, payload.view(np.float32), staleness)
