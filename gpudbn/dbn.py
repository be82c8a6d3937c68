"""The stack: layers of RBMs, the way up and down, samples, and what fine-tuning makes of it.

Pretraining makes the layers, a generative model. Fine-tuning makes a copy of their upward weights with a
softmax on top, a classifier (``classifier``), or unrolls them up and down again, an autoencoder (``autoencoder``).
The layers stay as they were: ``sample``, ``reconstruct`` and ``free_energy`` use them, ``predict`` the
classifier, ``encode`` and ``decode`` the autoencoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gpudbn import checkpoint
from gpudbn.arrays import Array, module_of, to_cpu
from gpudbn.draws import Purpose, site
from gpudbn.errors import UserError
from gpudbn.parameters import Parameters
from gpudbn.precision import BLOCKS
from gpudbn.rbm import RBM, product
from gpudbn.shards import WHOLE, Pieces, Shards, go_along
from gpudbn.twins import twins_of


def classifier_shapes(layers: Sequence[RBM], classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the network: all weights W0, W1, ... first (they decay), then all biases c0, c1, ....

    A shard has its columns of every weight, and the rows of the softmax layer that belong to its units of the top.
    """
    pairs = [*(rbm.W.shape for rbm in layers), (layers[-1].width, classes)]
    return {f"W{i}": pair for i, pair in enumerate(pairs)} | {f"c{i}": pair[1:] for i, pair in enumerate(pairs)}


def autoencoder_shapes(sizes: Sequence[int], shards: Shards = WHOLE) -> dict[str, tuple[int, ...]]:
    """Shapes of the stack unrolled, up and down again: all weights W0, W1, ... first, then all biases.

    A shard has its columns of the weights upward, and downward the rows that belong to the same units.
    """
    up = [(n, len(range(m)[shards.mine(m)])) for n, m in itertools.pairwise(sizes)]
    pairs = [*up, *((m, n) for n, m in reversed(up))]
    return {f"W{i}": pair for i, pair in enumerate(pairs)} | {f"c{i}": pair[1:] for i, pair in enumerate(pairs)}


def threshold(v: Array) -> Array:
    """v <- 1 where v >= 1/2, else 0; in place. Returns ``v``."""
    module_of(v).greater_equal(v, np.float32(0.5), out=v)
    return v


class DBN:
    """A deep belief network.

    Parameters
    ----------
    sizes : sequence of int
        Visible units, then the hidden units of each layer, from the data up.
    xp : module
        ``numpy`` or ``cupy``: where the parameters live.
    shards : Shards
        Which part of each layer is here; the methods are then called on all shards together. Rows, and
        hidden values that these methods take or give, are whole.
    local : sequence of int
        How many visible units a hidden unit of each layer sees (``local.py``), 0 being all; one number: every layer.

    Attributes
    ----------
    layers : list of RBM
    classifier : Parameters or None
        W0, ..., c0, ...: the fine-tuned network; its last pair is the softmax layer.
    autoencoder : Parameters or None
        W0, ..., c0, ...: the stack unrolled and fine-tuned; pair L - 1 makes the code, the last one the rows.
    about : dict
        What must be known to use the model, kept in its file: ``binarise`` ('none', 'threshold' or
        'stochastic'), ``precision`` (``set_precision``), ``image_shape``, ``classes``, ``data``; of an
        autoencoder ``code`` ('logistic' or 'linear'); if there are local layers, ``local``.
    """

    def __init__(self, sizes: Sequence[int], xp: ModuleType = np, shards: Shards = WHOLE,
                 local: Sequence[int] = (0,)) -> None:
        if len(sizes) < 2 or any(int(s) != s or s < 1 for s in sizes):
            raise UserError(f"DBN: sizes must be at least two whole numbers above 0; got {list(sizes)}")
        self.sizes = [int(s) for s in sizes]
        self.shards = shards
        fans = [int(fan) for fan in local] * (len(sizes) - 1 if len(local) == 1 else 1)
        self.layers = [RBM(n, m, xp, shards, fan=fan)
                       for (n, m), fan in zip(itertools.pairwise(self.sizes), fans, strict=True)]
        # where layers are cut: along which dimension an array is, how many units there are, and which are here
        self._cuts: dict[str, tuple[int, int, slice]] = {}
        for i, rbm in enumerate(self.layers):
            self._cuts |= {f"layers.{i}.W": (1, rbm.m, rbm.mine), f"layers.{i}.c": (0, rbm.m, rbm.mine)}
            if rbm.local is not None:
                self._cuts[f"layers.{i}.b"] = (0, rbm.n, rbm.local.seen)
            self._cuts |= {f"{net}.{name}": (dimension, rbm.m, rbm.mine) for net in ("classifier", "autoencoder")
                           for name, dimension in ((f"W{i}", 1), (f"c{i}", 0), (f"W{2 * len(self.layers) - 1 - i}", 0))}
        self.classifier: Parameters | None = None
        self.autoencoder: Parameters | None = None
        self.about: dict[str, Any] = {"binarise": "none", "precision": "fp32", **({"local": fans} if any(fans) else {})}

    def set_precision(self, precision: str) -> None:
        """The arithmetic of all layers, as in ``gpudbn.precision``; the classifier's stays float32.

        ``blocks`` is an order of sums for a run, not something that a model has.
        """
        self.about["precision"] = "fp32" if precision == BLOCKS else precision
        for rbm in self.layers:
            rbm.precision = precision

    @property
    def sums(self) -> str:
        """The precision of what was fine-tuned: never what tensor cores multiply."""
        return BLOCKS if self.layers[0].precision == BLOCKS else "fp32"

    @property
    def xp(self) -> ModuleType:
        """The array module of the parameters."""
        return module_of(self.layers[0].W)

    def count(self) -> int:
        """Number of parameters of all layers."""
        return sum(self._counts())

    def _counts(self) -> list[int]:
        return [rbm.W.shape[0] * rbm.m + rbm.n + rbm.m for rbm in self.layers]

    def describe(self) -> str:
        """The network in one line, with its parameter count."""
        arrows = " - ".join(map(str, self.sizes))
        return f"DBN {arrows}: {self.count():,} parameters ({', '.join(f'{count:,}' for count in self._counts())})"

    # -- up and down ------------------------------------------------------------------------------

    def prepare(self, v: Array) -> Array:
        """Rows as the model saw them in training: cut at 1/2 if it was trained on ``binarise='threshold'``."""
        xp = self.xp
        v = xp.ascontiguousarray(xp.asarray(v), dtype=np.float32)
        if v.ndim != 2 or v.shape[1] != self.sizes[0]:
            raise UserError(f"DBN: rows must have shape (B, {self.sizes[0]}); got {v.shape}")
        return threshold(v.copy()) if self.about["binarise"] == "threshold" else v

    def transform(self, v: Array, layers: int | None = None) -> Array:
        """Mean-field activations of layer ``layers`` (default: the top). Array (B, n) -> (B, m), float32."""
        x, layer = self.prepare(v), -1
        for layer, rbm in enumerate(self.layers[:layers]):
            h = rbm.hidden_given_visible(rbm.see(x) if layer == 0 else x)
            last = layer + 1 == len(self.layers[:layers])
            x = self.shards.gather(h, rbm.m) if last else self.layers[layer + 1].gather(h)
        return x

    def down(self, h: Array, layers: int | None = None) -> Array:
        """Mean-field activations of the data units below hidden values of layer ``layers``. (B, m) -> (B, n)."""
        below = self.layers[:layers]
        if not below:
            return h
        h = self._mine(below[-1], h)
        for rbm in reversed(below[1:]):
            h = rbm.own(rbm.visible_given_hidden(h))
        return below[0].whole(below[0].visible_given_hidden(h))

    def _mine(self, rbm: RBM, h: Array) -> Array:
        """This shard's columns of hidden values of a layer. Array (B, m) -> (B, own)."""
        return h if self.shards.count == 1 else self.xp.ascontiguousarray(h[:, rbm.mine])

    def reconstruct(self, v: Array) -> Array:
        """Up to the top and down again, mean-field. Array (B, n) -> (B, n)."""
        return self.down(self.transform(v))

    def sample(self, count: int, *, steps: int = 1000, seed: int = 0, start: Array | None = None,
               progress: Callable[[int], None] | None = None) -> Array:
        """Samples of the model: Gibbs chains in the top RBM, then one pass down.

        Hinton, Osindero & Teh (2006), section 2.1.

        Parameters
        ----------
        count : int
            Number of chains, one sample each.
        steps : int
            Gibbs steps of each chain.
        seed : int
        start : array (count, n), optional
            Data rows at which the chains start, taken up by sampling; by default the top RBM's visible
            units start at their biases.
        progress : callable, optional
            Called with the number of Gibbs steps done, after each.

        Returns
        -------
        array (count, n), float32
            Probabilities of the data units given the last samples of the layer above.
        """
        if steps < 1 or count < 1:
            raise UserError(f"sample: count and steps must be at least 1; got {count} and {steps}")
        xp, top = self.xp, self.layers[-1]
        if start is None:
            v = twins_of(top.b).sigmoid(xp.tile(top.b, (count, 1)), precision=top.precision)
            twins_of(v).bernoulli(v, v, seed=seed, update=0, site=site(Purpose.SAMPLING, len(self.layers) - 1, 2),
                                  **top.rows)
        else:
            v = self.layers[0].see(self.prepare(start))
            for layer, (rbm, above) in enumerate(itertools.pairwise(self.layers)):
                v = above.gather(rbm.sample_hidden(v, seed=seed, update=0, site=site(Purpose.SAMPLING, layer, 2)))
        depth = len(self.layers)
        for done, state in enumerate(top.gibbs(v, steps - 1, seed=seed, layer=depth - 1), 1):
            v = state
            if progress:
                progress(done)
        h = top.sample_hidden(v, seed=seed, update=steps, site=site(Purpose.SAMPLING, depth - 1, 0))
        for layer in range(depth - 1, 0, -1):
            rbm = self.layers[layer]
            h = rbm.own(rbm.sample_visible(h, seed=seed, update=steps, site=site(Purpose.SAMPLING, layer, 1)))
        return self.layers[0].whole(self.layers[0].visible_given_hidden(h))

    def filters(self, layer: int, at_most: int = 2000) -> Array:
        """What the first hidden units of a layer respond to: the product of the weights from the data up to them.

        Array (n, units), float32, the same on each shard.
        """
        xp, top = self.xp, self.layers[layer]
        h = xp.ascontiguousarray(xp.eye(min(top.m, at_most), top.m, dtype=np.float32)[:, top.mine])
        for rbm in reversed(self.layers[: layer + 1]):
            x = xp.empty((len(h), rbm.height), np.float32)
            rbm.product_back(x, h, rbm.W)
            h = rbm.own(x) if rbm is not self.layers[0] else x
        return self.layers[0].whole(x).T

    # -- the classifier ---------------------------------------------------------------------------

    def new_classifier(self, classes: int) -> Parameters:
        """The upward weights of the layers with a softmax of zeros on top; kept in ``classifier``."""
        net = Parameters(classifier_shapes(self.layers, classes), self.xp)
        for i, rbm in enumerate(self.layers):
            net[f"W{i}"][...] = rbm.W
            net[f"c{i}"][...] = rbm.c
        self.classifier = net
        self.about["classes"] = classes
        return net

    def predict_probabilities(self, v: Array) -> Array:
        """P(class | v) by the fine-tuned network. Array (B, n) -> (B, classes), float32; rows sum to 1.

        Raises
        ------
        UserError
            If the model was not fine-tuned.
        """
        if self.classifier is None:
            raise UserError("predict: must have a fine-tuned model; got one that was only pretrained. "
                            "Train with --finetune-epochs above 0 on labelled data")
        net, x = self.classifier, self.layers[0].see(self.prepare(v))
        twins = twins_of(x)
        top = len(self.layers)
        for i, rbm in enumerate(self.layers):
            y = self.xp.empty((len(x), rbm.width), np.float32)
            rbm.up_by(None, y, x, net[f"W{i}"], net[f"c{i}"], self.sums)
            x = self.layers[i + 1].gather(y) if i + 1 < top else y
        logits = self.xp.empty((len(x), self.about["classes"]), np.float32)
        self.shards.product_(logits, x, net[f"W{top}"], self.sums)
        twins.categorical(None, logits, logits, net[f"c{top}"], logits.shape[1])
        return logits

    def predict(self, v: Array) -> Array:
        """The most probable class of each row. Array (B, n) -> (B,), int64."""
        return self.predict_probabilities(v).argmax(axis=1)

    # -- the autoencoder --------------------------------------------------------------------------

    def new_autoencoder(self, code: str = "logistic") -> Parameters:
        """The layers' weights upward, then transposed downward; kept in ``autoencoder``.

        A linear code x begins as the tangent at 0 of what it replaces, 1/2 + x/4, which the way down takes in.
        """
        net, depth = Parameters(autoencoder_shapes(self.sizes, self.shards), self.xp), len(self.layers)
        for i, rbm in enumerate(self.layers):
            net[f"W{i}"][...], net[f"c{i}"][...] = rbm.W, rbm.c
            net[f"W{2 * depth - 1 - i}"][...], net[f"c{2 * depth - 1 - i}"][...] = rbm.W.T, rbm.b
        if code == "linear":
            W = net[f"W{depth}"]
            below = self.xp.empty((1, W.shape[1]), np.float32)
            self.shards.product_(below, self.xp.full((1, len(W)), 0.5, np.float32), W, self.sums)
            net[f"c{depth}"][...] += below[0]
            W[...] = W / 4
        self.autoencoder = net
        self.about["code"] = code
        return net

    def encode(self, v: Array) -> Array:
        """The codes of rows, by the fine-tuned autoencoder. Array (B, n) -> (B, m), float32, m units at the top."""
        return self._through(self.prepare(v), 0, len(self.layers))

    def decode(self, codes: Array) -> Array:
        """Rows from codes: probabilities of the data units. Array (B, m) -> (B, n), float32."""
        xp, m = self.xp, self.sizes[-1]
        codes = xp.ascontiguousarray(xp.asarray(codes), dtype=np.float32)
        if codes.ndim != 2 or codes.shape[1] != m:
            raise UserError(f"decode: codes must have shape (B, {m}); got {codes.shape}")
        return self._through(codes, len(self.layers), 2 * len(self.layers))

    def _through(self, x: Array, first: int, end: int) -> Array:
        """Pairs ``first`` to ``end`` of the autoencoder."""
        net, xp = self.autoencoder, self.xp
        if net is None:
            raise UserError("autoencoder: must be a model fine-tuned as one; got one that was not. "
                            "Train with --finetune autoencoder")
        twins, depth = twins_of(x), len(self.layers)
        for i in range(first, end):
            W, c = net[f"W{i}"], net[f"c{i}"]
            y = xp.empty((len(x), c.size), np.float32)
            if i >= depth and (self.shards.count > 1 or self.sums == BLOCKS):
                self.shards.product_(y, self._mine(self.layers[2 * depth - 1 - i], x), W, self.sums)
                twins.activate(None, y, y, c)
            elif i == depth - 1 and self.about["code"] == "linear":
                product(y, x, W, self.sums)
                y += c
            else:
                twins.half_step(None, y, x, W, c, precision=self.sums)
            x = self.shards.gather(y, self.layers[i].m) if i < depth else y
        return x

    # -- files ------------------------------------------------------------------------------------

    def _learned(self) -> Iterator[tuple[str, Array]]:
        """Everything learned that is here, by name."""
        for i, rbm in enumerate(self.layers):
            yield from ((f"layers.{i}.{name}", rbm.parameters[name]) for name in rbm.parameters)
        for kind, net in (("classifier", self.classifier), ("autoencoder", self.autoencoder)):
            if net is not None:
                yield from ((f"{kind}.{name}", net[name]) for name in net)

    def part(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Which part of a whole array of that name and shape is here."""
        if name not in self._cuts or self.shards.count == 1:
            return ()
        dimension, units, here = self._cuts[name]
        if shape[dimension : dimension + 1] != (units,):
            raise UserError(f"model: must hold {name} of {units} units; got shape {shape}. Is it from another run?")
        return (*[slice(None)] * dimension, here)

    def _cut(self) -> Iterator[tuple[str, Array, int | None]]:
        """What is learned here, by name, and the dimension along which it is cut; of what several see each its own."""
        for name, array in self._learned():
            dimension = self._cuts[name][0] if name in self._cuts and self.shards.count > 1 else None
            if dimension is not None and name.endswith(".b"):
                array = self.layers[int(name.split(".")[1])].own(array[None])[0]
            yield name, array, dimension

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything learned, by name, whole and on the CPU: layers.0.W, ..., classifier.W0, ..., autoencoder.W0."""
        found = {}
        for name, array, dimension in self._cut():
            whole = to_cpu(array)
            if dimension is not None:
                moved = np.ascontiguousarray(np.moveaxis(whole, dimension, -1))
                whole = np.moveaxis(self.shards.gather(moved, self._cuts[name][1]), -1, dimension)
            found[name] = whole
        return found

    def pieces(self) -> dict[str, np.ndarray | Pieces]:
        """What ``arrays`` gives, for a file: what is cut comes together only as it is written (``go_along``)."""
        found: dict[str, np.ndarray | Pieces] = {}
        for name, array, dimension in self._cut():
            if dimension is None:
                found[name] = to_cpu(array)
            else:
                together = self.shards.columns if dimension == array.ndim - 1 else self.shards.rows
                found[name] = together(array, self._cuts[name][1])
        return found

    def set_arrays(self, found: dict[str, np.ndarray], *, whole: bool = True) -> None:
        """Take back what ``arrays`` gave, or, if not ``whole``, the parts of it that are here; of the same sizes."""
        for kind, make in (("classifier", self.new_classifier), ("autoencoder", lambda _: self.new_autoencoder())):
            biases = found.get(f"{kind}.c{len(self.layers)}")
            if biases is not None:
                make(biases.shape[0])
        for name, array in self._learned():
            got = found.get(name)
            if got is not None and whole:
                got = got[self.part(name, got.shape)]
            if got is None or got.shape != array.shape:
                raise UserError(f"model: must hold {name} of shape {array.shape}; got "
                                f"{'none' if got is None else f'shape {got.shape}'}. Is it from another run?")
            array[...] = self.xp.asarray(got)

    def about_file(self) -> dict[str, Any]:
        """The metadata of a model file."""
        return {"kind": "model", "sizes": self.sizes, **self.about}

    def save(self, path: str | Path) -> None:
        """Write a model file (safetensors), atomically. Errors as in ``checkpoint.write``."""
        if self.shards.index:
            go_along(self.pieces())
        else:
            checkpoint.write(path, self.pieces(), self.about_file())


def load(path: str | Path, xp: ModuleType = np, shards: Shards = WHOLE) -> DBN:
    """A saved model: a file, or a run folder with ``model.safetensors`` in it; of a shard, its part.

    Raises
    ------
    UserError
        If the file is missing, cut short, of a newer format or not a model.
    """
    path = Path(path)
    with suppress(OSError):  # a folder that may not be entered: ``Reader`` says so
        path = path / "model.safetensors" if path.is_dir() else path
    file = checkpoint.Reader(path, kind="model")
    about = dict(file.meta)
    try:
        dbn = DBN(about.pop("sizes"), xp, shards, about.get("local", (0,)))
        dbn.set_arrays(file.read(dbn.part), whole=False)
        dbn.about |= {k: v for k, v in about.items() if k != "kind"}
        dbn.set_precision(dbn.about["precision"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a gpudbn model; got metadata without {error}") from None
    return dbn
