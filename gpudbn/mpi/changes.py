"""A change on its way to a server: a label that says what it is, and the bytes that carry it.

    dense      float32, as it is
    float16    times a power of two, which is in the label, so that the largest entry stays finite and small ones are
               not lost below 2^-14
    bfloat16   the upper half of float32
    factored   the activations that made it, where those are fewer bytes: see ``factors.py``

What 16 bits round away is not lost: a replica keeps it and adds it to its next change (error feedback: Seide et al.,
"1-bit stochastic gradient descent and its application to data-parallel distributed training of speech DNNs" (2014),
section 3). Only the rest of a phase's last push goes, and that of the last one before a run is stopped and resumed: no
checkpoint keeps it.
"""

from __future__ import annotations

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.factors import Factors, read
from gpudbn.mpi.rules import Rule
from gpudbn.precision import from_bf16, round_to_bf16
from gpudbn.scratch import Scratch

WORDS = 8  # int64 words of a label
# the first ones; those behind are the encoding's own
BASE = 0  # how many versions the parameters contained on which the change was computed
ENCODING = 1
BYTES = 2  # of the payload
TURN = 3  # which turn of the run it is of, so that no turn is applied twice
EXPONENT = 4  # float16: of the power of two
LOSS = 4  # of a portion: see ``sandblaster.py``; the bits of a float64
ENCODINGS = ("dense", "float16", "bfloat16", "factored")
DENSE, FLOAT16, BFLOAT16, FACTORED = range(len(ENCODINGS))
NO_TURN = -1  # a change that is of no turn
LARGEST = 15  # a change in float16 is below 2^15, half of what there is room for

_scratch = Scratch()


class Packing:
    """How a replica packs its changes for one server.

    Parameters
    ----------
    push : "dense", "float16", "bfloat16" or "factored"

    Attributes
    ----------
    last : str
        How the last change was packed.
    """

    def __init__(self, push: str = "dense") -> None:
        self.push = push
        self.last = "dense"
        self.begin(0)

    def begin(self, first: int) -> None:
        """Changes of other parameters follow; the server's shard of them begins at ``first``."""
        self.first = first
        self._residual: Array | None = None  # what is not yet sent

    def encode(self, change: Array, *, base: int, turn: int = NO_TURN,
               factors: Factors | None = None) -> tuple[np.ndarray, Array]:
        """Label and payload of a change.

        Parameters
        ----------
        change : array (size,), float32
            Afterwards what the server will make of it.
        base, turn : int
            Words of the label.
        factors : Factors, optional
            The updates that made the change.

        Returns
        -------
        label : array (WORDS,), int64
        payload : array, contiguous
            At most as many bytes as the change; where that is. Valid until the next call.
        """
        label = np.zeros(WORDS, np.int64)
        label[BASE], label[TURN] = base, turn
        payload = change
        if self.push in ("float16", "bfloat16"):
            payload = self._round(label, change)
        elif self.push == "factored" and factors:
            packed = factors.pack(self.first, change.size)
            if packed.nbytes < change.nbytes:
                label[ENCODING], payload = FACTORED, packed
        label[BYTES], self.last = payload.nbytes, ENCODINGS[label[ENCODING]]
        return label, payload

    def _round(self, label: np.ndarray, change: Array) -> Array:
        """The change and what was left of the last one, in 16 bits; keeps what is left now."""
        if self._residual is None:
            self._residual = module_of(change).zeros_like(change)
        change += self._residual
        if self.push == "bfloat16":
            label[ENCODING] = BFLOAT16
            payload = round_to_bf16(change)
        else:
            label[ENCODING], label[EXPONENT] = FLOAT16, _exponent(change)
            payload = (change * np.float32(2.0 ** int(label[EXPONENT]))).astype(np.float16)
        self._residual[...] = change
        decode(label, payload, change, out=change)
        self._residual -= change
        return payload.view(np.uint8)  # a type that every MPI has


def _exponent(change: Array) -> int:
    """Of the power of two that takes the largest entry of a change to just below 2^LARGEST."""
    largest = max(float(change.max()), -float(change.min())) if change.size else 0.0
    exponent = LARGEST - int(np.frexp(largest)[1]) if 0 < largest < np.inf else 0
    return min(exponent, 126)  # float32 ends there


def decode(label: np.ndarray, payload: Array, parameters: Array, *, out: Array) -> Array:
    """The change that a label and a payload carry: array (size,), float32; ``out``, or the payload itself if dense.

    Parameters
    ----------
    parameters : array (size,), float32
        What it is a change of, for their decay.
    payload : array, contiguous, of any type; on a server uint8
        Not modified.
    out : array (size,), float32
        Work space.
    """
    if label[ENCODING] == DENSE:
        return payload.view(np.float32)
    if label[ENCODING] == FLOAT16:
        out[...] = payload.view(np.float16)
        out *= np.float32(2.0 ** -int(label[EXPONENT]))
    elif label[ENCODING] == BFLOAT16:
        out[...] = from_bf16(payload.view(np.uint16))
    elif label[ENCODING] == FACTORED:
        read(payload).change(parameters, out)
    else:
        raise ValueError(f"decode: encoding must be one of {DENSE} to {FACTORED}; got {label[ENCODING]}")
    return out


def apply(rule: Rule, parameters: Array, label: np.ndarray, payload: Array, staleness: int,
          replica: int = 0) -> bool:
    """Change the parameters by the rule and the change that ``Packing.encode`` packed; False, and not, if it has NaN.

    Parameters
    ----------
    payload : array (bytes,), uint8
        Not modified.
    replica : int
        Whose change it is.
    """
    if label[ENCODING] == FACTORED:
        made = read(payload)
        if made.whole(parameters.size) and made.kept > 0:
            v, h, ones = made.factors()
            if _bounded(v, h) and rule.activations(parameters, v, h, ones, 1 - made.kept, staleness):
                return True
    xp = module_of(parameters, payload)
    work = _scratch.get("change", parameters.shape) if xp is np else xp.empty_like(parameters)
    change = decode(label, payload, parameters, out=work)
    if not _finite(change):
        return False
    rule(parameters, change, staleness, replica)
    return True


def _bounded(v: Array, h: Array) -> bool:
    """Whether no entry of v^T h can be infinite or NaN: none is more than the product of both lengths."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(module_of(v, h).isfinite((v.ravel() @ v.ravel()) * (h.ravel() @ h.ravel())))


def _finite(change: Array) -> bool:
    """Whether it holds no NaN and no infinity: one pass over it, by way of its length."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(float(change @ change)) or module_of(change).isfinite(change).all())
