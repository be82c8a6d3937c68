"""The stack: layers of RBMs, the way up and down, samples, and the classifier on top of a fine-tuned one.

Pretraining makes the layers, a generative model; fine-tuning makes a copy of their upward weights
with a softmax on top, a classifier (``classifier``). The layers stay as they were: ``sample``,
``reconstruct`` and ``free_energy`` use them, ``predict`` the classifier.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
from gpudbn.rbm import RBM
from gpudbn.twins import twins_of


def classifier_shapes(sizes: Sequence[int], classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the network: all weights W0, W1, ... first (they decay), then all biases c0, c1, ...."""
    widths = [*sizes, classes]
    pairs = list(itertools.pairwise(widths))
    return {f"W{i}": pair for i, pair in enumerate(pairs)} | {f"c{i}": pair[1:] for i, pair in enumerate(pairs)}


def threshold(v: Array) -> Array:
    """v <- 1 where v >= 1/2, else 0; in place. Returns ``v``."""
    v[...] = v >= np.float32(0.5)
    return v


class DBN:
    """A deep belief network.

    Parameters
    ----------
    sizes : sequence of int
        Visible units, then the hidden units of each layer, from the data up.
    xp : module
        ``numpy`` or ``cupy``: where the parameters live.

    Attributes
    ----------
    layers : list of RBM
    classifier : Parameters or None
        W0, ..., c0, ...: the fine-tuned network; its last pair is the softmax layer.
    about : dict
        What must be known to use the model, kept in its file: ``binarise`` ('none', 'threshold' or
        'stochastic'), ``image_shape``, ``classes``, ``data``.
    """

    def __init__(self, sizes: Sequence[int], xp: ModuleType = np) -> None:
        if len(sizes) < 2 or any(int(s) != s or s < 1 for s in sizes):
            raise UserError(f"DBN: sizes must be at least two whole numbers above 0; got {list(sizes)}")
        self.sizes = [int(s) for s in sizes]
        self.layers = [RBM(n, m, xp) for n, m in itertools.pairwise(self.sizes)]
        self.classifier: Parameters | None = None
        self.about: dict[str, Any] = {"binarise": "none"}

    @property
    def xp(self) -> ModuleType:
        """The array module of the parameters."""
        return module_of(self.layers[0].W)

    def count(self) -> int:
        """Number of parameters of all layers."""
        return sum(rbm.parameters.size for rbm in self.layers)

    def describe(self) -> str:
        """The network in one line, with its parameter count."""
        arrows = " - ".join(map(str, self.sizes))
        return f"DBN {arrows}: {self.count():,} parameters ({', '.join(f'{r.parameters.size:,}' for r in self.layers)})"

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
            x = rbm.hidden_given_visible(x)
        return x

    def down(self, h: Array, layers: int | None = None) -> Array:
        """Mean-field activations of the data units below hidden values of layer ``layers``. (B, m) -> (B, n)."""
        for rbm in reversed(self.layers[:layers]):
            h = rbm.visible_given_hidden(h)
        return h

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
            v = twins_of(top.b).sigmoid(xp.tile(top.b, (count, 1)))
            twins_of(v).bernoulli(v, v, seed=seed, update=0, site=site(Purpose.SAMPLING, len(self.layers) - 1, 2))
        else:
            v = self.prepare(start)
            for layer, rbm in enumerate(self.layers[:-1]):
                v = rbm.sample_hidden(v, seed=seed, update=0, site=site(Purpose.SAMPLING, layer, 2))
        depth = len(self.layers)
        for done, state in enumerate(top.gibbs(v, steps - 1, seed=seed, layer=depth - 1), 1):
            v = state
            if progress:
                progress(done)
        h = top.sample_hidden(v, seed=seed, update=steps, site=site(Purpose.SAMPLING, depth - 1, 0))
        for layer in range(depth - 1, 0, -1):
            h = self.layers[layer].sample_visible(h, seed=seed, update=steps, site=site(Purpose.SAMPLING, layer, 1))
        return self.layers[0].visible_given_hidden(h)

    # -- the classifier ---------------------------------------------------------------------------

    def new_classifier(self, classes: int) -> Parameters:
        """The upward weights of the layers with a softmax of zeros on top; kept in ``classifier``."""
        net = Parameters(classifier_shapes(self.sizes, classes), self.xp)
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
        for i in range(len(self.layers)):
            y = self.xp.empty((len(x), self.sizes[i + 1]), np.float32)
            twins.half_step(None, y, x, net[f"W{i}"], net[f"c{i}"])
            x = y
        top = len(self.layers)
        logits = x @ net[f"W{top}"] + net[f"c{top}"]
        logits -= logits.max(axis=1, keepdims=True)
        p = self.xp.exp(logits)
        return p / p.sum(axis=1, keepdims=True)

    def predict(self, v: Array) -> Array:
        """The most probable class of each row. Array (B, n) -> (B,), int64."""
        return self.predict_probabilities(v).argmax(axis=1)

    # -- files ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything learned, by name, on the CPU: layers.0.W, ..., classifier.W0, ...."""
        found = {f"layers.{i}.{name}": to_cpu(rbm.parameters[name])
                 for i, rbm in enumerate(self.layers) for name in rbm.parameters}
        if self.classifier is not None:
            found |= {f"classifier.{name}": to_cpu(self.classifier[name]) for name in self.classifier}
        return found

    def set_arrays(self, found: dict[str, np.ndarray]) -> None:
        """Take back what ``arrays`` gave; sizes must be the same."""
        if any(name.startswith("classifier.") for name in found):
            self.new_classifier(found[f"classifier.c{len(self.layers)}"].shape[0])
        places = {f"layers.{i}.{name}": rbm.parameters[name]
                  for i, rbm in enumerate(self.layers) for name in rbm.parameters}
        if self.classifier is not None:
            places |= {f"classifier.{name}": self.classifier[name] for name in self.classifier}
        for name, place in places.items():
            if name not in found or found[name].shape != place.shape:
                got = f"shape {found[name].shape}" if name in found else "none"
                raise UserError(f"model: must hold {name} of shape {place.shape}; got {got}. Is it from another run?")
        for name, place in places.items():
            place[...] = self.xp.asarray(found[name])

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
        dbn.about = {"binarise": "none"} | {k: v for k, v in about.items() if k != "kind"}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a gpudbn model; got metadata without {error}") from None
    return dbn

