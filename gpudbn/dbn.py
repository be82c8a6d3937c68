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
from gpudbn.rbm import RBM
from gpudbn.shards import WHOLE, Shards
from gpudbn.twins import twins_of


def classifier_shapes(sizes: Sequence[int], classes: int, shards: Shards = WHOLE) -> dict[str, tuple[int, ...]]:
    """Shapes of the network: all weights W0, W1, ... first (they decay), then all biases c0, c1, ....

    A shard has its columns of every weight, and the rows of the softmax layer that belong to its units of the top.
    """
    mine = [len(range(m)[shards.mine(m)]) for m in sizes[1:]]
    pairs = [*zip(sizes[:-1], mine, strict=True), (mine[-1], classes)]
    return {f"W{i}": pair for i, pair in enumerate(pairs)} | {f"c{i}": pair[1:] for i, pair in enumerate(pairs)}


def autoencoder_shapes(sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the stack unrolled, up and down again: all weights W0, W1, ... first, then all biases."""
    pairs = list(itertools.pairwise([*sizes, *reversed(sizes[:-1])]))
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
        autoencoder ``code`` ('logistic' or 'linear').
    """

    def __init__(self, sizes: Sequence[int], xp: ModuleType = np, shards: Shards = WHOLE) -> None:
        if len(sizes) < 2 or any(int(s) != s or s < 1 for s in sizes):
            raise UserError(f"DBN: sizes must be at least two whole numbers above 0; got {list(sizes)}")
        self.sizes = [int(s) for s in sizes]
        self.shards = shards
        self.layers = [RBM(n, m, xp, shards) for n, m in itertools.pairwise(self.sizes)]
        self.classifier: Parameters | None = None
        self.autoencoder: Parameters | None = None
        self.about: dict[str, Any] = {"binarise": "none", "precision": "fp32"}

    def set_precision(self, precision: str) -> None:
        """The arithmetic of all layers, as in ``gpudbn.precision``; the classifier's stays float32.

        ``blocks`` is an order of sums for a run, not something that a model has.
        """
        self.about["precision"] = "fp32" if precision == BLOCKS else precision
        for rbm in self.layers:
            rbm.precision = precision

    @property
    def xp(self) -> ModuleType:
        """The array module of the parameters."""
        return module_of(self.layers[0].W)

    def count(self) -> int:
        """Number of parameters of all layers."""
        return sum(self._counts())

    def _counts(self) -> list[int]:
        return [rbm.n * rbm.m + rbm.n + rbm.m for rbm in self.layers]

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
        x = self.prepare(v)
        for rbm in self.layers[:layers]:
            x = self.shards.gather(rbm.hidden_given_visible(x), rbm.m)
        return x

    def down(self, h: Array, layers: int | None = None) -> Array:
        """Mean-field activations of the data units below hidden values of layer ``layers``. (B, m) -> (B, n)."""
        for rbm in reversed(self.layers[:layers]):
            h = rbm.visible_given_hidden(self._mine(rbm, h))
        return h

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
            twins_of(v).bernoulli(v, v, seed=seed, update=0, site=site(Purpose.SAMPLING, len(self.layers) - 1, 2))
        else:
            v = self.prepare(start)
            for layer, rbm in enumerate(self.layers[:-1]):
                h = rbm.sample_hidden(v, seed=seed, update=0, site=site(Purpose.SAMPLING, layer, 2))
                v = self.shards.gather(h, rbm.m)
        depth = len(self.layers)
        for done, state in enumerate(top.gibbs(v, steps - 1, seed=seed, layer=depth - 1), 1):
            v = state
            if progress:
                progress(done)
        h = top.sample_hidden(v, seed=seed, update=steps, site=site(Purpose.SAMPLING, depth - 1, 0))
        for layer in range(depth - 1, 0, -1):
            v = self.layers[layer].sample_visible(h, seed=seed, update=steps, site=site(Purpose.SAMPLING, layer, 1))
            h = self._mine(self.layers[layer - 1], v)
        return self.layers[0].visible_given_hidden(h)

    # -- the classifier ---------------------------------------------------------------------------

    def new_classifier(self, classes: int) -> Parameters:
        """The upward weights of the layers with a softmax of zeros on top; kept in ``classifier``."""
        net = Parameters(classifier_shapes(self.sizes, classes, self.shards), self.xp)
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
        net, x = self.classifier, self.prepare(v)
        twins = twins_of(x)
        top = len(self.layers)
        for i, rbm in enumerate(self.layers):
            y = self.xp.empty((len(x), rbm.width), np.float32)
            twins.half_step(None, y, x, net[f"W{i}"], net[f"c{i}"])
            x = self.shards.gather(y, rbm.m) if i + 1 < top else y
        logits = x @ net[f"W{top}"]
        self.shards.sum_(logits)
        twins.categorical(None, logits, logits, net[f"c{top}"], logits.shape[1])
        return logits

    def predict(self, v: Array) -> Array:
        """The most probable class of each row. Array (B, n) -> (B,), int64."""
        return self.predict_probabilities(v).argmax(axis=1)

    # -- the autoencoder --------------------------------------------------------------------------

    def new_autoencoder(self, code: str = "logistic") -> Parameters:
        """The layers' weights upward, then transposed downward; kept in ``autoencoder``.

        A linear code x begins as the tangent at 0 of what it replaces, 1/2 + x/4, which the way down takes in.
        Not for a stack in several shards.
        """
        net, depth = Parameters(autoencoder_shapes(self.sizes), self.xp), len(self.layers)
        for i, rbm in enumerate(self.layers):
            net[f"W{i}"][...], net[f"c{i}"][...] = rbm.W, rbm.c
            net[f"W{2 * depth - 1 - i}"][...], net[f"c{2 * depth - 1 - i}"][...] = rbm.W.T, rbm.b
        if code == "linear":
            W = net[f"W{depth}"]
            net[f"c{depth}"][...] += W.sum(axis=0) / 2
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
        for i in range(first, end):
            W, c = net[f"W{i}"], net[f"c{i}"]
            y = xp.empty((len(x), c.size), np.float32)
            if i == len(self.layers) - 1 and self.about["code"] == "linear":
                xp.matmul(x, W, out=y)
                y += c
            else:
                twins_of(x).half_step(None, y, x, W, c)
            x = y
        return x

    # -- files ------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[str, Array, tuple[slice, ...], tuple[int, ...]]]:
        """Everything learned: name, the array that is here, what it is of the whole one, the whole one's shape."""
        everything = slice(None)
        for i, rbm in enumerate(self.layers):
            yield f"layers.{i}.W", rbm.W, (everything, rbm.mine), (rbm.n, rbm.m)
            yield f"layers.{i}.b", rbm.b, (everything,), (rbm.n,)
            yield f"layers.{i}.c", rbm.c, (rbm.mine,), (rbm.m,)
        if self.classifier is not None:
            classes = self.classifier[f"c{len(self.layers)}"].size
            sizes, mine = [*self.sizes, classes], [everything, *(rbm.mine for rbm in self.layers), everything]
            for name, array in ((name, self.classifier[name]) for name in self.classifier):
                i = int(name[1:])
                # the softmax layer is cut by rows
                rows, columns = (mine[i] if i == len(self.layers) else everything), mine[i + 1]
                if name[0] == "W":
                    yield f"classifier.{name}", array, (rows, columns), (sizes[i], sizes[i + 1])
                else:
                    yield f"classifier.{name}", array, (columns,), (sizes[i + 1],)
        if self.autoencoder is not None:
            for name in self.autoencoder:
                array = self.autoencoder[name]
                yield f"autoencoder.{name}", array, (everything,) * array.ndim, array.shape

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything learned, by name, whole and on the CPU: layers.0.W, ..., classifier.W0, ..., autoencoder.W0."""
        found = {}
        for name, array, cut, shape in self._places():
            axis = next((i for i, part in enumerate(cut) if part != slice(None)), None)
            whole = to_cpu(array)
            if axis is not None and self.shards.count > 1:
                moved = np.ascontiguousarray(np.moveaxis(whole, axis, -1))
                whole = np.moveaxis(self.shards.gather(moved, shape[axis]), -1, axis)
            found[name] = whole
        return found

    def set_arrays(self, found: dict[str, np.ndarray]) -> None:
        """Take back what ``arrays`` gave; sizes must be the same."""
        if any(name.startswith("classifier.") for name in found):
            self.new_classifier(found[f"classifier.c{len(self.layers)}"].shape[0])
        if any(name.startswith("autoencoder.") for name in found):
            self.new_autoencoder()
        places = list(self._places())
        for name, _, _, shape in places:
            if name not in found or found[name].shape != shape:
                got = f"shape {found[name].shape}" if name in found else "none"
                raise UserError(f"model: must hold {name} of shape {shape}; got {got}. Is it from another run?")
        for name, array, cut, _ in places:
            array[...] = self.xp.asarray(found[name][cut])

    def about_file(self) -> dict[str, Any]:
        """The metadata of a model file."""
        return {"kind": "model", "sizes": self.sizes, **self.about}

    def save(self, path: str | Path) -> None:
        """Write a model file (safetensors), atomically. Errors as in ``checkpoint.write``."""
        checkpoint.write(path, self.arrays(), self.about_file())


def load(path: str | Path, xp: ModuleType = np) -> DBN:
    """A saved model: a file, or a run folder with ``model.safetensors`` in it.

    Raises
    ------
    UserError
        If the file is missing, cut short, of a newer format or not a model.
    """
    path = Path(path)
    with suppress(OSError):  # a folder that may not be entered: ``read`` says so
        path = path / "model.safetensors" if path.is_dir() else path
    found, about = checkpoint.read(path, kind="model")
    try:
        dbn = DBN(about.pop("sizes"), xp)
        dbn.set_arrays(found)
        dbn.about |= {k: v for k, v in about.items() if k != "kind"}
        dbn.set_precision(dbn.about["precision"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a gpudbn model; got metadata without {error}") from None
    return dbn

