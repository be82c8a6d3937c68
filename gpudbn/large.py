"""Pretraining of a large layer in bf16, by Hopper's tensor cores: ``half_step_wgmma.cu``, ``cd_update_wgmma.cu``.

The estimator, its draws and their addresses are those of ``rbm.Contrast``. What differs is what the products are
made of. Weights are float32 where steps are taken, and copied to bf16 for the half-steps, in two parts with
``--precision bf16x2``; all units are bf16, which changes means and data that are not 0 or 1 by 2^-9 at most, in the
gradient too. The step keeps the copies; since others may change the weights between turns (a checkpoint, other
replicas), every turn begins with new ones. Persistent chains are float32 between updates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of
from gpudbn.cuda.wgmma import padded
from gpudbn.feed import Source
from gpudbn.pretrain import LayerPhase, Piece
from gpudbn.rbm import RBM, Contrast, Estimator
from gpudbn.twins import twins_of


class LargeRBM(RBM):
    """An RBM with the parameters of another, whose half-steps are of units and weights in bf16.

    Parameters
    ----------
    rbm : RBM
        Whole, of ``precision`` bf16 or bf16x2.

    Attributes
    ----------
    high, low : array (n, m), uint16 (bf16)
        Copies of its weights: high, or high + low; low is None with bf16.
    """

    def __init__(self, rbm: RBM) -> None:
        xp = module_of(rbm.W)
        super().__init__(rbm.n, rbm.m, xp, parameters=rbm.parameters)
        self.precision = rbm.precision
        self.high = padded(xp, rbm.n, rbm.width)
        self.low = padded(xp, rbm.n, rbm.width) if rbm.precision == "bf16x2" else None
        self.twins = twins_of(rbm.W)

    def renew(self) -> None:
        """Copy the weights."""
        self.twins.to_bf16(self.high, self.W, low=self.low)

    def up(self, sample: Array | None, mean: Array | None, v: Array, **address: Any) -> None:
        """As of an RBM, of arrays in bf16."""
        self.twins.half_step_wgmma(sample, mean, v, self.high, self.c, W_low=self.low, **address)

    def down(self, sample: Array | None, mean: Array | None, h: Array, **address: Any) -> None:
        """As of an RBM, of arrays in bf16."""
        self.twins.half_step_wgmma(sample, mean, h, self.high, self.b, W_low=self.low, transpose=True, **address)


class LargeContrast(Contrast):
    """``Contrast`` whose v, h and working chains are bf16, uint16; the caller's data rows and chains are float32."""

    def __init__(self, rbm: LargeRBM, rows: int, estimator: Estimator, *, seed: int, layer: int,
                 chains: Array | None) -> None:
        xp = module_of(rbm.W)
        self.pair = None if chains is None else (self._units(xp, *chains.shape), chains)
        super().__init__(rbm, rows, estimator, seed=seed, layer=layer, chains=self.pair and self.pair[0])
        self.data, self.twins = xp.empty((rows, rbm.n), np.float32), rbm.twins

    @staticmethod
    def _units(xp: Any, rows: int, units: int) -> Array:
        return padded(xp, rows, units)

    def fill(self, rows: int, *, update: int, row: int, chains: slice = slice(0), chain_row: int = 0,
             clock: Array | None = None) -> tuple[Array, Array]:
        """See ``Contrast.fill``."""
        self.twins.to_bf16(self.v[:rows], self.data[:rows])
        if self.pair:
            self.twins.to_bf16(*(each[chains] for each in self.pair))
        filled = super().fill(rows, update=update, row=row, chains=chains, chain_row=chain_row, clock=clock)
        if self.pair:
            self.twins.to_float(*(each[chains] for each in reversed(self.pair)))
        return filled


class LargeLayerPhase(LayerPhase):
    """Pretraining of one large layer; parameters as of ``LayerPhase``.

    It has updates and no ``sums``: where these are to be added, or units centred, ``paths`` takes another way.
    """

    def _contrast(self, rows: int, estimator: Estimator) -> Contrast:
        self.copies = LargeRBM(self.rbm)
        return LargeContrast(self.copies, rows, estimator, seed=self.settings.seed, layer=self.layer,
                             chains=self.chains)

    def begin_turn(self) -> None:
        """Copy the weights: others may have changed them."""
        self.copies.renew()

    def update(self, rows: Source, piece: Piece) -> None:
        """Gradient, step and the copies of the new weights in one."""
        v, h = self._fill(rows, piece)
        count = len(piece.positions)
        self.twins.cd_update_wgmma(self.parameters, self.velocity, self.copies.high, v[:count], h[:count], v[count:],
                                   h[count:], W_low=self.copies.low, model_weight=piece.model_weight, rate=self.rate,
                                   momentum=self.momentum, decay=self.settings.decay,
                                   rates=None if piece.clock is None else self.rates)
