"""One restricted Boltzmann machine: energies, conditionals, Gibbs chains, and the CD-k and PCD statistics.

Written once for NumPy and CuPy: the array decides; and for a layer in one or several parts
(``shards.py``). Notation as in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from gpudbn.arrays import Array, module_of, to_cpu
from gpudbn.draws import Purpose, normals, site
from gpudbn.errors import UserError
from gpudbn.local import Local
from gpudbn.parameters import Parameters, rbm_shapes
from gpudbn.precision import BLOCK, BLOCKS
from gpudbn.reference import bernoulli
from gpudbn.shards import WHOLE, Shards
from gpudbn.twins import twins_of


def product(out: Array, a: Array, b: Array, precision: str) -> None:
    """out <- a b, where nothing has to be added up between shards; ``precision`` as in ``Shards.product_``."""
    if precision == BLOCKS:
        twins_of(out).product(out, a, b, BLOCKS)
    else:
        module_of(out, a, b).matmul(a, b, out=out)


class RBM:
    """A Bernoulli restricted Boltzmann machine with n visible and m hidden units.

    Parameters
    ----------
    n, m : int
        Visible and hidden units.
    xp : module
        ``numpy`` or ``cupy``: where the parameters live.
    shards : Shards
        Which of the hidden units are here. Wherever m is a size of an array below, it is the number of
        those: all of them, unless the layer is cut.
    parameters : Parameters, optional
        Those of another RBM of this size, to share; new ones if not given.
    fan : int
        Visible units that a hidden unit sees (``local.py``); 0: all. Of a local layer that is cut, n stands below for
        the visible units that are here, too.

    Attributes
    ----------
    parameters : Parameters
        W (n, m), or (fan, m), b (n,), c (m,), float32, in one flat buffer; all zero at first.
    mine : slice
        The hidden units that are here.
    width, height : int
        How many hidden and visible units are here.
    local : Local or None
        The windows, if they are not all.
    precision : str
        Of half-steps and gradients, as in ``gpudbn.precision``.
    """

    def __init__(self, n: int, m: int, xp: ModuleType = np, shards: Shards = WHOLE,
                 parameters: Parameters | None = None, fan: int = 0) -> None:
        self.n, self.m, self.shards = n, m, shards
        self.mine = shards.mine(m)
        self.width = self.mine.stop - self.mine.start
        self.columns = {"column": self.mine.start, "columns": m}  # of the draws of hidden units
        self.local = Local(n, m, fan, shards) if fan else None
        seen = slice(0, n) if self.local is None else self.local.seen
        self.height = seen.stop - seen.start
        self.rows = {} if self.height == n else {"column": seen.start, "columns": n}  # of the draws of visible units
        self.parameters = (Parameters(rbm_shapes(self.height, self.width, fan or None), xp) if parameters is None else
                           parameters)
        self.precision = "fp32"

    @property
    def W(self) -> Array:  # noqa: N802 - the papers' letter
        """Weights (n, m)."""
        return self.parameters["W"]

    @property
    def b(self) -> Array:
        """Visible biases (n,)."""
        return self.parameters["b"]

    @property
    def c(self) -> Array:
        """Hidden biases (m,)."""
        return self.parameters["c"]

    def initialise(self, *, sd: float, seed: int, layer: int = 0, visible_means: Array | None = None,
                   hidden_mean: float = 0.5) -> None:
        """W ~ N(0, sd^2), b_i = log(p_i / (1 - p_i)) with p the means of the training rows; c of ``hidden_mean``.

        The means (n,) are kept away from 0 and 1 by 1/1000, so that a constant unit gets a strong, finite bias.
        Hinton (2012), section 8.
        """
        xp = module_of(self.W)
        address = {"seed": seed, "update": 0, "site": site(Purpose.INITIALISATION, layer), **self.columns}
        if self.precision == "exact":  # the logarithm of a device has bits of its own
            self.W[...] = xp.asarray(normals(np.empty(self.W.shape, np.float32), **address))
        else:
            twins_of(self.W).normals(self.W, **address)
        xp.multiply(self.W, np.float32(sd), out=self.W)
        self.c[...] = np.log(hidden_mean / (1 - hidden_mean))
        self.b[...] = 0
        if visible_means is not None:  # on the host, whose logarithm gives every device the same bits
            p = np.clip(to_cpu(visible_means).astype(np.float64), 1e-3, 1 - 1e-3)
            self.b[...] = xp.asarray(self.see(np.log(p / (1 - p)).astype(np.float32)[None])[0])

    # -- the parts of a layer that is cut -----------------------------------------------------------

    @property
    def cut_below(self) -> bool:
        """Whether each shard has visible units of its own, even if one sees all of them."""
        return self.local is not None and self.shards.count > 1

    def see(self, v: Array) -> Array:
        """The visible units that are here, of all: array (B, all) -> (B, n)."""
        return v if self.local is None else self.local.see(v)

    def gather(self, h: Array, out: Array | None = None) -> Array:
        """The visible units that are here, from this shard's hidden values of the layer below: (B, own) -> (B, n).

        ``out`` is where to put them, if they have to be put together.
        """
        if self.local is None or self.shards.count == 1:
            return self.shards.gather(h, self.n, out)
        return self.local.gather(h, module_of(h).empty((len(h), self.height), h.dtype) if out is None else out)

    def own(self, v: Array) -> Array:
        """The other way: of the visible units that are here, this shard's of the layer below. (B, n) -> (B, own)."""
        if self.local is not None or self.shards.count == 1:
            return v if self.local is None else self.local.own(v)
        return module_of(v).ascontiguousarray(v[:, self.shards.mine(self.n)])

    def whole(self, v: Array) -> Array:
        """All visible units, on each shard: array (B, n) -> (B, all)."""
        return v if self.local is None else self.shards.gather(self.local.own(v), self.n)

    def squared_errors(self, v: Array, w: Array) -> Array:
        """|v - w|^2 of each row, of all visible units. Arrays (B, n), (B, n) -> (B,)."""
        errors = twins_of(v).squared_errors(module_of(v).empty(len(v), np.float32),
                                            *((self.own(v), self.own(w)) if self.cut_below else (v, w)))
        if self.cut_below:
            self.shards.sum_(errors)
        return errors

    # -- energies -----------------------------------------------------------------------------------

    @np.errstate(invalid="ignore")  # OpenBLAS computes with what lies beyond short rows, and discards it
    def energy(self, v: Array, h: Array) -> Array:
        """E(v, h) = -b.v - c.h - v W h for each row. Arrays (B, n), (B, m) -> (B,), nats."""
        of_hidden = h @ self.c + (self._input(v) * h).sum(axis=1)
        v, b = self._answered(v)
        if self.cut_below:
            of_hidden += v @ b
        self.shards.sum_(of_hidden)
        return -of_hidden if self.cut_below else -(v @ b) - of_hidden

    def _input(self, v: Array) -> Array:
        """v W. Array (B, n) -> (B, m)."""
        if self.local is None:
            return v @ self.W
        x = module_of(v, self.W).empty((len(v), self.width), np.float32)
        self.local.product(x, v, self.W)
        return x

    def _answered(self, v: Array) -> tuple[Array, Array]:
        """Visible units and their biases: those that no other shard counts where each sees some, else all."""
        return (self.own(v), self.own(self.b[None])[0]) if self.cut_below else (v, self.b)

    @np.errstate(invalid="ignore")  # OpenBLAS computes with what lies beyond short rows, and discards it
    def free_energy(self, v: Array) -> Array:
        """F(v) = -b.v - sum_j log(1 + exp(c_j + (v W)_j)) for each row. Array (B, n) -> (B,), nats.

        -F(v) is log p(v) up to log Z; for real-valued v it is that of the row taken as it is.
        """
        xp, twins = module_of(v, self.W), twins_of(v, self.W)
        energies = xp.empty(len(v), np.float32)
        if self.precision == BLOCKS:
            x = xp.empty((len(v), self.width), np.float32)
            twins.product(x, v, self.W, BLOCKS)
            blocks = [slice(lo, lo + BLOCK) for lo in range(0, self.width, BLOCK)]
            parts = [twins.free_energy(xp.empty_like(energies), x[:, block], self.c[block]) for block in blocks]
            self.shards.add_in_order_(energies, parts)
            return xp.subtract(energies, v @ self.b, out=energies)
        visible = self._answered(v) if self.shards.index == 0 or self.cut_below else ()  # once
        twins.free_energy(energies, self._input(v), self.c, *visible)
        self.shards.sum_(energies)
        return energies

    def up(self, sample: Array | None, mean: Array | None, v: Array, **address: Any) -> None:
        """mean <- P(h = 1 | v), sample ~ P(h | v): arrays (B, m), or None where not wanted; from v (B, n)."""
        self.up_by(sample, mean, v, self.W, self.c, self.precision, **address, **self.columns)

    def up_by(self, sample: Array | None, mean: Array | None, v: Array, W: Array, c: Array,
              precision: str, **address: Any) -> None:
        """``up`` by other weights and biases of this layer: fine-tuned ones."""
        twins = twins_of(v, W)
        if self.local is None:
            twins.half_step(sample, mean, v, W, c, precision=precision, **address)
        else:
            out = sample if mean is None else mean
            self.local.product(out, v, W)
            twins.activate(sample, mean, out, c, **address)

    def down(self, sample: Array | None, mean: Array | None, h: Array, **address: Any) -> None:
        """mean <- P(v = 1 | h), sample ~ P(v | h): arrays (B, n), or None where not wanted; from h (B, m)."""
        twins = twins_of(h, self.W)
        if self.local is None and self.shards.count == 1 and self.precision != BLOCKS:  # in one launch
            twins.half_step(sample, mean, h, self.W, self.b, transpose=True, precision=self.precision, **address)
        elif self.precision == "exact":
            raise UserError("--precision exact: must have whole layers; got layers cut into "
                            f"{self.shards.count} shards, between which float32 sums cross")
        else:
            out = sample if mean is None else mean
            self.product_back(out, h, self.W, self.precision)
            twins.activate(sample, mean, out, self.b, **address, **self.rows)

    def product_back(self, out: Array, h: Array, W: Array, precision: str = "fp32") -> None:
        """out <- h W^T, summed over shards: arrays (B, n), (B, m), and W as that of this layer."""
        if self.local is None:
            self.shards.product_(out, h, W.T, precision)
        else:
            self.local.product_back(out, h, W)

    def gradient(self, dW: Array, v: Array, h: Array, precision: str = "fp32") -> None:
        """dW <- v^T h, where there are weights: arrays as W, (B, n), (B, m)."""
        if self.local is not None:
            self.local.gradient(dW, v, h)
        else:
            product(dW, v.T, h, precision)

    def hidden_given_visible(self, v: Array) -> Array:
        """P(h_j = 1 | v). Array (B, n) -> (B, m)."""
        mean = module_of(v).empty((len(v), self.width), np.float32)
        self.up(None, mean, v)
        return mean

    def visible_given_hidden(self, h: Array) -> Array:
        """P(v_i = 1 | h). Array (B, m) -> (B, n)."""
        mean = module_of(h).empty((len(h), self.height), np.float32)
        self.down(None, mean, h)
        return mean

    def sample_hidden(self, v: Array, **address: int) -> Array:
        """h ~ P(h | v). Array (B, n) -> (B, m) of 0 and 1; ``address`` of the draws as in ``draws``."""
        h = module_of(v).empty((len(v), self.width), np.float32)
        self.up(h, None, v, **address)
        return h

    def sample_visible(self, h: Array, **address: int) -> Array:
        """v ~ P(v | h). Array (B, m) -> (B, n) of 0 and 1."""
        v = module_of(h).empty((len(h), self.height), np.float32)
        self.down(v, None, h, **address)
        return v

    def gibbs(self, v: Array, steps: int, *, seed: int, layer: int = 0, row: int = 0,
              first: int = 0) -> Iterator[Array]:
        """The visible states after each of ``steps`` full Gibbs steps from v.

        Parameters
        ----------
        v : array (B, n), float32
            Where the chains start. Not modified.
        steps : int
        seed, layer, row : int
            Address of the draws; ``row`` is the number of the first chain.
        first : int
            The number of the first step, which stands in the place of the update.

        Yields
        ------
        array (B, n), float32
            Samples of 0 and 1, a new array each step.
        """
        for step in range(first, first + steps):
            h = self.sample_hidden(v, seed=seed, update=step, site=site(Purpose.SAMPLING, layer, 0), row=row)
            v = self.sample_visible(h, seed=seed, update=step, site=site(Purpose.SAMPLING, layer, 1), row=row)
            yield v

    def reconstruct(self, v: Array) -> Array:
        """P(v' | P(h | v)), the mean-field reconstruction. Array (B, n) -> (B, n)."""
        return self.visible_given_hidden(self.hidden_given_visible(v))


@dataclass(frozen=True)
class Estimator:
    """Which estimate of the gradient: the defaults follow the talk's Algorithm 1 with CD-1.

    Attributes
    ----------
    method : 'cd' or 'pcd'
        Chains that start at the data in every update, or persist (Tieleman 2008).
    k : int
        Gibbs steps an update.
    data_hidden, last_hidden, reconstruction : 'sample' or 'mean'
        Hidden units of the data term; hidden units after the last step; visible units of the steps.
    """

    method: str = "cd"
    k: int = 1
    data_hidden: str = "sample"
    last_hidden: str = "mean"
    reconstruction: str = "sample"


class Contrast:
    """The buffers of one CD-k or PCD update, allocated once, and what fills them.

    ``v`` and ``h`` hold the data phase in their first rows and the model phase behind it, so that
    both gradient products are one (``reference.cd_sums``). ``data``, array (rows, n), float32, is where the
    caller puts the data rows.

    Parameters
    ----------
    rbm : RBM
    rows : int
        The most data rows an update may bring.
    chains : array (C, m), float32, or None
        PCD: hidden states of the persistent chains. Modified by each update.
    """

    def __init__(self, rbm: RBM, rows: int, estimator: Estimator, *, seed: int, layer: int,
                 chains: Array | None) -> None:
        xp = module_of(rbm.W)
        model_rows = rows if chains is None else len(chains)
        self.rbm, self.estimator, self.seed, self.layer, self.chains = rbm, estimator, seed, layer, chains
        self.v = self._units(xp, rows + model_rows, rbm.height)
        self.h = self._units(xp, rows + model_rows, rbm.width)
        self.data = self.v[:rows]

    @staticmethod
    def _units(xp: Any, rows: int, units: int) -> Array:
        """Room for the states of some units: array (rows, units)."""
        return xp.empty((rows, units), np.float32)

    def fill(self, rows: int, *, update: int, row: int, chains: slice = slice(0), chain_row: int = 0,
             clock: Array | None = None) -> tuple[Array, Array]:
        """Run the data phase on ``v[:rows]`` and the k Gibbs steps of the model phase.

        Parameters
        ----------
        rows : int
            Data rows; the caller has put them in ``self.data[:rows]``.
        update, row : int
            Address of the draws: the number of the update, the position of the first row in the global batch.
        chains : slice
            PCD: which of ``self.chains`` go along with these rows.
        chain_row : int
            PCD: the number of the first of them, for the draws' address.
        clock : array (1,), uint32, optional
            Added to ``update``, see ``draws``.

        Returns
        -------
        v, h : arrays (rows + C, n), (rows + C, m)
            Views: what ``cd_sums`` wants.
        """
        moving = None if self.chains is None else self.chains[chains]
        end = rows + (rows if moving is None else len(moving))
        v, h = self.v[:end], self.h[:end]
        address = {"seed": self.seed, "update": update, "clock": clock}
        if rows:
            self._data_phase(v, h, rows, {**address, "row": row})
        if moving is not None:
            self._pcd(v[rows:], moving, h[rows:], {**address, "row": chain_row})
        elif rows:
            self._cd(v[rows:], h[:rows], h[rows:], {**address, "row": row})
        return v, h

    def _data_phase(self, v: Array, h: Array, rows: int, address: dict[str, Any]) -> None:
        rbm, e, where = self.rbm, self.estimator, site(Purpose.CD, self.layer, 0)
        if e.data_hidden == "sample":
            rbm.up(h[:rows], None, v[:rows], site=where, **address)
        elif self.chains is None:  # the chains need a sample all the same: it waits in the model rows
            rbm.up(h[rows:], h[:rows], v[:rows], site=where, **address)
        else:
            rbm.up(None, h[:rows], v[:rows])

    def _cd(self, v: Array, h0: Array, h: Array, address: dict[str, Any]) -> None:
        rbm, e = self.rbm, self.estimator
        start = h0 if e.data_hidden == "sample" else h
        for step in range(e.k):
            self._visible(v, start, Purpose.CD, 2 * step + 1, address)
            if step < e.k - 1 or e.last_hidden == "sample":
                rbm.up(h, None, v, site=site(Purpose.CD, self.layer, 2 * step + 2), **address)
            else:
                rbm.up(None, h, v)
            start = h

    def _pcd(self, v: Array, chains: Array, h: Array, address: dict[str, Any]) -> None:
        rbm, e = self.rbm, self.estimator
        for step in range(e.k):
            self._visible(v, chains, Purpose.CHAIN, 2 * step + 1, address)
            last = step == e.k - 1
            rbm.up(chains, h if last else None, v, site=site(Purpose.CHAIN, self.layer, 2 * step + 2), **address)
        if e.last_hidden == "sample":
            h[...] = chains

    def _visible(self, v: Array, h: Array, purpose: Purpose, half_step: int, address: dict[str, Any]) -> None:
        rbm = self.rbm
        if self.estimator.reconstruction == "mean":
            rbm.down(None, v, h)
        else:
            rbm.down(v, None, h, site=site(purpose, self.layer, half_step), **address)


def new_chains(count: int, rbm: RBM, *, seed: int, layer: int, row: int = 0) -> np.ndarray:
    """Hidden states of ``count`` persistent chains: fair coins, the exact distribution while W = c = 0.

    Array (count, m), float32, on the CPU.
    """
    chains = np.full((count, rbm.width), 0.5, np.float32)
    return bernoulli(chains, chains, seed=seed, update=0, site=site(Purpose.CHAIN, layer, 0), row=row, **rbm.columns)
