"""This package beside what else trains an RBM or a network of the same layers: time, peak memory, errors.

    python -m benchmarks.peers --data FOLDER --out FILE.json      everything, or what the file does not hold yet
    python -m benchmarks.peers --parts epoch --core-types unset   a part of it

    epoch   an epoch of an RBM, 784x500 with batches of 100, by each program; and its five matrix products alone
    error   seconds until a network for labels, pretrained or not, errs on no more than some of the test rows
    size    what an update of ours, and its products alone, take against the number of units, rows and Gibbs steps

Each sample is a process of its own; repetitions of all programs are taken in turn, and the file is written after each
sample. OpenBLAS chooses its kernels by the CPU (``unset``), or is told to take those of ``OPENBLAS_CORETYPE``; PyTorch
has a BLAS of its own. Beside each sample stands how many cores others used meanwhile; where it is much, the sample is
taken again.

Programs that are not installed are listed as not measured: scikit-learn, PyTorch, rbms, learnergy (gigabytes; ``pip
install 'gpudbn[peers]'``), and ours with numba. Where there is a GPU, ours and those of PyTorch run there as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.mnist import HERE, machine

RATE, MOMENTUM, DECAY = 0.05, 0.5, 0.0002
SD = 0.01  # of initial weights
SAMPLES = 3  # epochs of a sample, behind one to warm up
BUSY = 0.3  # cores that others used: such a sample is taken again
PROBE = 1000  # rows that are reconstructed at the end
PACKAGES = {"sklearn": "scikit-learn", "torch": "torch", "rbms": "rbms", "learnergy": "learnergy", "numba": "numba"}
OURS = {"of ours": "gpudbn", "of ours, numba": "gpudbn, numba"}  # ratio: to which of ours
TARGETS = (0.05, 0.03, 0.02)  # test errors
# how many times as long as ours they are to take, with two threads and OpenBLAS choosing its kernels
GOALS = {"scikit-learn, float32": 1.8, "PyTorch, the tutorial's way": 2.8, "five products alone": 1 / 1.5}


class Layer(NamedTuple):
    """What is trained: rows (N, n), uint8; hidden units; rows of a batch, a divisor of N; where."""

    rows: np.ndarray
    m: int
    B: int
    device: str

    def scaled(self, dtype: Any = np.float32) -> np.ndarray:
        """The rows in [0, 1]."""
        return np.multiply(self.rows, 1 / 255, dtype=dtype)


Trained = tuple[Any, Any, Any]  # W (n, m), b, c
Epochs = Iterator[Callable[[], Trained] | None]  # each step trains an epoch, and gives what tells the parameters
Timed = Iterator[tuple[dict[str, float], Callable[[], Trained]]]  # the same, with seconds that it measured itself


# -- an epoch, by each ---------------------------------------------------------------------------


def ours(layer: Layer, **options: Any) -> Timed:
    """This package: the trainer's epochs, with and without what they measure of themselves."""
    from gpudbn.data import DataSet, Rows
    from gpudbn.dbn import DBN
    from gpudbn.loop import Training
    from gpudbn.mpi.alone import Alone
    from gpudbn.settings import Settings

    xp = __import__("cupy") if layer.device == "cuda" else np
    rows = Rows(layer.rows, 1 / 255, None)
    data = DataSet("rows", rows, rows.select(range(0)), rows.select(range(0)), None, 0, 0).to(xp)
    settings = Settings(layers=(layer.m,), batch=layer.B, epochs=(SAMPLES + 1,), learning_rate=(RATE,),
                        schedule="constant", momentum=(MOMENTUM,), decay=DECAY, finetune_epochs=0, **options)
    dbn, alone = DBN([layer.rows.shape[1], layer.m], xp), Alone()
    begun, measured = time.perf_counter(), 0.0
    for record in Training(dbn, data, settings, alone).run():
        if record["phase"] == "test":
            return
        whole, measuring = time.perf_counter() - begun, alone.tally.seconds()["measuring"]
        rbm = dbn.layers[0]
        yield ({"seconds": whole - (measuring - measured), "with measures": whole},
               lambda rbm=rbm: (rbm.W, rbm.b, rbm.c))  # type: ignore[misc]
        begun, measured = time.perf_counter(), measuring


def products(layer: Layer, package: str = "numpy") -> Epochs:
    """Three half-steps and both gradients of each batch: their matrix products and nothing else."""
    n, m, B = layer.rows.shape[1], layer.m, layer.B
    step = cd_products(n, m, B, 1, together=False, xp=importlib.import_module(package))
    while True:
        for _ in range(len(layer.rows) // B):
            step()
        yield None


def cd_products(n: int, m: int, B: int, k: int, *, together: bool, xp: Any = np) -> Callable[[], None]:
    """The products of a CD-k update, by NumPy or PyTorch; those of the gradient as one of twice the rows, or as two."""
    rng = np.random.default_rng(1)
    v, h = rng.random((2 * B, n), np.float32), rng.random((2 * B, m), np.float32)
    W, dW = rng.standard_normal((n, m), np.float32), np.empty((n, m), np.float32)
    up, down = np.empty((B, m), np.float32), np.empty((B, n), np.float32)
    if xp is not np:
        v, h, W, dW, up, down = map(xp.from_numpy, (v, h, W, dW, up, down))

    def step() -> None:
        xp.matmul(v[:B], W, out=up)
        for _ in range(k):
            xp.matmul(h[:B], W.T, out=down)
            xp.matmul(v[:B], W, out=up)
        if together:
            xp.matmul(v.T, h, out=dW)
        else:
            xp.matmul(v[:B].T, h[:B], out=dW)
            xp.matmul(v[B:].T, h[B:], out=dW)

    return step


def sklearn_rbm(layer: Layer, dtype: str) -> Timed:
    """BernoulliRBM, which is PCD-1 with plain steps; all epochs in one call of ``fit``, its beginning included."""
    from sklearn.neural_network import BernoulliRBM

    x = layer.scaled(dtype)
    for epochs in (1, SAMPLES):
        model = BernoulliRBM(layer.m, learning_rate=RATE, batch_size=layer.B, n_iter=epochs, random_state=1)
        begun = time.perf_counter()
        model.fit(x)
        seconds = (time.perf_counter() - begun) / epochs
        yield ({"seconds": seconds}, lambda model=model: (  # type: ignore[misc]
            model.components_.T, model.intercept_visible_, model.intercept_hidden_))


def torch_tutorial(layer: Layer) -> Epochs:
    """As tutorials have it: a module, a DataLoader, free energies, automatic differentiation, plain SGD."""
    import torch
    from torch.nn.functional import linear, softplus
    from torch.utils.data import DataLoader, TensorDataset

    class Machine(torch.nn.Module):
        def __init__(self, n: int, m: int) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(SD * torch.randn(m, n))
            self.b, self.c = torch.nn.Parameter(torch.zeros(n)), torch.nn.Parameter(torch.zeros(m))

        def forward(self, v: Any) -> Any:
            h = torch.bernoulli(torch.sigmoid(linear(v, self.W, self.c)))
            return torch.bernoulli(torch.sigmoid(linear(h, self.W.t(), self.b)))

        def free_energy(self, v: Any) -> Any:
            return (-(v @ self.b) - softplus(linear(v, self.W, self.c)).sum(1)).mean()

    rbm = Machine(layer.rows.shape[1], layer.m).to(layer.device)
    optimiser = torch.optim.SGD(rbm.parameters(), lr=RATE)
    loader = DataLoader(TensorDataset(torch.from_numpy(layer.scaled())), batch_size=layer.B, shuffle=True)
    while True:
        for (v,) in loader:
            v = v.to(layer.device)
            reconstructed = rbm(v).detach()
            loss = rbm.free_energy(v) - rbm.free_energy(reconstructed)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        yield lambda: (rbm.W.detach().T, rbm.b.detach(), rbm.c.detach())


def torch_by_hand(layer: Layer, way: str = "eager") -> Epochs:
    """The gradient written out, in place, without automatic differentiation; steps as ours, with momentum and decay."""
    import torch

    n, m, B, device = layer.rows.shape[1], layer.m, layer.B, layer.device
    x = torch.from_numpy(layer.scaled()).to(device)
    W, b, c = SD * torch.randn(n, m, device=device), torch.zeros(n, device=device), torch.zeros(m, device=device)
    uW, ub, uc = (torch.zeros_like(a) for a in (W, b, c))
    v0, v, h0, h = (torch.empty(B, units, device=device) for units in (n, n, m, m))
    u_v, u_h = torch.empty_like(v), torch.empty_like(h)

    def update() -> None:
        torch.addmm(c, v0, W, out=h0).sigmoid_()
        torch.lt(u_h.uniform_(), h0, out=h0)
        torch.addmm(b, h0, W.T, out=v).sigmoid_()
        torch.lt(u_v.uniform_(), v, out=v)
        torch.addmm(c, v, W, out=h).sigmoid_()
        uW.mul_(MOMENTUM).add_(W, alpha=-RATE * DECAY)
        uW.addmm_(v0.T, h0, alpha=RATE / B).addmm_(v.T, h, alpha=-RATE / B)
        ub.mul_(MOMENTUM).add_((v0 - v).sum(0), alpha=RATE / B)
        uc.mul_(MOMENTUM).add_((h0 - h).sum(0), alpha=RATE / B)
        W.add_(uW)
        b.add_(ub)
        c.add_(uc)

    with torch.no_grad():
        if way == "compiled":
            update = torch.compile(update)
        elif way == "graph":
            from benchmarks.updates import graph_of

            update = graph_of(torch, update)
        while True:
            order = torch.randperm(len(x), device=device)
            for first in range(0, len(x), B):
                torch.index_select(x, 0, order[first : first + B], out=v0)
                update()
            yield lambda: (W, b, c)


def rbms_package(layer: Layer) -> Epochs:
    """The package rbms: the inner loop of its PCD-1 without centring, and PyTorch's optimiser."""
    import torch
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.training.pcd import fit_batch_pcd

    n, device = layer.rows.shape[1], layer.device
    x = torch.from_numpy(layer.scaled()).to(device)
    model = BBRBM(weight_matrix=SD * torch.randn(n, layer.m, device=device), vbias=torch.zeros(n, device=device),
                  hbias=torch.zeros(layer.m, device=device))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = torch.ones((layer.B, 1), device=device)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, maximize=True)
    chains = model.init_chains(num_samples=layer.B)
    while True:
        order = torch.randperm(len(x), device=device)
        for first in range(0, len(x), layer.B):
            batch = x[order[first : first + layer.B]]
            with torch.no_grad():
                chains, _ = fit_batch_pcd((batch, weights), chains, model, 1, 1.0, centered=False)
                optimiser.step()
        yield lambda: (model.weight_matrix, model.vbias, model.hbias)


def learnergy_package(layer: Layer) -> Epochs:
    """The package learnergy: ``fit`` of its RBM, CD-1; it measures the pseudo-likelihood of every batch."""
    import torch
    from learnergy.models.bernoulli import RBM
    from torch.utils.data import TensorDataset

    model = RBM(n_visible=layer.rows.shape[1], n_hidden=layer.m, steps=1, learning_rate=RATE)
    data = TensorDataset(torch.from_numpy(layer.scaled()), torch.zeros(len(layer.rows)))
    while True:
        model.fit(data, batch_size=layer.B, epochs=1)
        yield lambda: (model.W.detach(), model.a.detach(), model.b.detach())


class Program(NamedTuple):
    """How something is run: a function, its arguments, the packages it needs, and where."""

    run: Callable[..., Any]
    options: dict[str, Any] = {}  # noqa: RUF012 - a constant
    needs: tuple[str, ...] = ()
    device: str = "cpu"


EPOCH = {
    "gpudbn": Program(ours),
    "gpudbn, numba": Program(ours, needs=("numba",)),
    "gpudbn, PCD-1": Program(ours, {"method": "pcd"}),
    "five products alone": Program(products),
    "five products alone, PyTorch": Program(products, {"package": "torch"}, ("torch",)),
    "PyTorch, by hand": Program(torch_by_hand, needs=("torch",)),
    "PyTorch, the tutorial's way": Program(torch_tutorial, needs=("torch",)),
    "scikit-learn, float32": Program(sklearn_rbm, {"dtype": "float32"}, ("sklearn",)),
    "scikit-learn, float64": Program(sklearn_rbm, {"dtype": "float64"}, ("sklearn",)),
    "rbms": Program(rbms_package, needs=("rbms", "torch")),
    "learnergy": Program(learnergy_package, needs=("learnergy", "torch")),
    "gpudbn, GPU": Program(ours, needs=("cupy",), device="cuda"),
    "PyTorch by hand, GPU": Program(torch_by_hand, needs=("torch",), device="cuda"),
    "PyTorch by hand, compiled, GPU": Program(torch_by_hand, {"way": "compiled"}, ("torch",), "cuda"),
    "PyTorch by hand, CUDA graph, GPU": Program(torch_by_hand, {"way": "graph"}, ("torch",), "cuda"),
    "PyTorch, the tutorial's way, GPU": Program(torch_tutorial, needs=("torch",), device="cuda"),
    "rbms, GPU": Program(rbms_package, needs=("rbms", "torch"), device="cuda"),
}


def epoch(program: Program, given: argparse.Namespace) -> dict[str, Any]:
    """A sample: seconds an epoch, and how far the rows are from what the trained RBM makes of them."""
    layer = Layer(np.load(given.file), given.hidden, given.batch, program.device)
    watch = Watch()
    times: dict[str, list[float]] = {}
    trained = None
    steps = program.run(layer, **program.options)
    for number in range(SAMPLES + 1):
        watch.begin()
        try:
            found = next(steps)
        except StopIteration:  # it has trained several epochs at once
            break
        own, trained = found if isinstance(found, tuple) else ({"seconds": watch.seconds(program.device)}, found)
        for name, value in own.items() if number else ():
            times.setdefault(name, []).append(value)
    return {**{name: statistics.median(values) for name, values in times.items()}, **watch.told(),
            "reconstruction": reconstruction(layer, trained() if trained else None)}


def reconstruction(layer: Layer, trained: Trained | None) -> float | None:
    """Mean squared error of a row, of the first rows, by what was trained."""
    if trained is None:
        return None
    W, b, c = (np.asarray(a.get() if hasattr(a, "get") else a.cpu() if hasattr(a, "cpu") else a) for a in trained)
    v = np.multiply(layer.rows[:PROBE], 1 / 255, dtype=np.float32)
    h = 1 / (1 + np.exp(-(v @ W + c)))
    return float(((1 / (1 + np.exp(-(h @ W.T + b))) - v) ** 2).sum(axis=1).mean())


# -- until an error is reached -------------------------------------------------------------------


class Labelled(NamedTuple):
    """Bytes and labels, int32, of training and test rows."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def our_network(data: Labelled, layers: list[int], seed: int, epochs: int, pretraining: int) -> Iterator[float]:
    """This package: layers one by one, then fine-tuning; as a user does it, with all that it measures."""
    from gpudbn.data import DataSet, Rows
    from gpudbn.dbn import DBN
    from gpudbn.loop import Training
    from gpudbn.mpi.alone import Alone
    from gpudbn.settings import Settings

    rows, test = Rows(data.x, 1 / 255, data.y), Rows(data.x_test, 1 / 255, data.y_test)
    settings = Settings(layers=tuple(layers), epochs=(pretraining,), batch=100, learning_rate=(0.1,), seed=seed,
                        finetune_epochs=epochs, finetune_learning_rate=0.002, finetune_patience=0)
    dbn = DBN([rows.n, *layers])
    for record in Training(dbn, DataSet("rows", rows, test, test, None, 10, 0), settings, Alone()).run():
        if record["phase"] == "finetune":
            yield record["error_validation"]


def torch_network(data: Labelled, layers: list[int], seed: int, epochs: int, pretraining: int) -> Iterator[float]:  # noqa: ARG001
    """A PyTorch MLP with the same layers and optimiser, and no pretraining."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    sizes = [data.x.shape[1], *layers]
    hidden = [part for n, m in itertools.pairwise(sizes) for part in (torch.nn.Linear(n, m), torch.nn.ReLU())]
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(sizes[-1], 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, x_test = (torch.from_numpy(np.multiply(a, 1 / 255, dtype=np.float32)) for a in (data.x, data.x_test))
    y, y_test = (torch.from_numpy(a.astype(np.int64)) for a in (data.y, data.y_test))
    loader = DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True)
    for _ in range(epochs):
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            yield float((model(x_test).argmax(1) != y_test).float().mean())


def sklearn_pipeline(data: Labelled, layers: list[int], seed: int, epochs: int, pretraining: int) -> Iterator[float]:  # noqa: ARG001
    """scikit-learn's example: BernoulliRBM, then logistic regression on its hidden units, in float32."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import BernoulliRBM
    from sklearn.pipeline import make_pipeline

    x, x_test = (np.multiply(a, 1 / 255, dtype=np.float32) for a in (data.x, data.x_test))
    model = make_pipeline(BernoulliRBM(layers[0], learning_rate=0.05, batch_size=100, n_iter=pretraining,
                                       random_state=seed), LogisticRegression(C=100, max_iter=100))
    yield 1 - float(model.fit(x, data.y).score(x_test, data.y_test))


ERROR = {
    "gpudbn": Program(our_network, {"epochs": 8, "pretraining": 1}),
    "PyTorch MLP": Program(torch_network, {"epochs": 12, "pretraining": 0}, ("torch",)),
    "scikit-learn, 1 epoch": Program(sklearn_pipeline, {"epochs": 1, "pretraining": 1}, ("sklearn",)),
    "scikit-learn, 10 epochs": Program(sklearn_pipeline, {"epochs": 1, "pretraining": 10}, ("sklearn",)),
}


def error(program: Program, given: argparse.Namespace) -> dict[str, Any]:
    """A sample: seconds and test error after each epoch with labels, until the last target is reached."""
    with np.load(given.file) as file:
        data = Labelled(*(file[name] for name in Labelled._fields))
    watch = Watch()
    watch.begin()
    curve: list[tuple[float, float]] = []
    with np.errstate(over="ignore"), contextlib.closing(program.run(data, given.layers, given.seed, **program.options)
                                                        ) as errors:
        for value in errors:
            curve.append((round(watch.seconds(program.device), 3), value))
            if value <= TARGETS[-1]:
                break
    return {"curve": curve, **watch.told()}


# -- against the size ----------------------------------------------------------------------------


BASE = {"visible": 512, "hidden": 512, "batch": 128, "k": 1, "rows": 1024}
DOUBLED = {"visible": [128, 256, 512, 1024, 2048, 4096], "hidden": [128, 256, 512, 1024, 2048, 4096],
           "batch": [16, 32, 64, 128, 256, 512, 1024], "k": [1, 2, 4, 8, 16],
           "rows": [1024, 2048, 4096, 8192, 16384, 32768, 65536]}
ENOUGH = 0.03  # seconds of a measurement, at least


def size(_: Program, given: argparse.Namespace) -> dict[str, Any]:
    """A sample: seconds of an update of each size, or of an epoch of so many rows; ours, and the products alone."""
    watch = Watch()
    watch.begin()
    found = {}
    for name in DOUBLED:
        values = [value for value in DOUBLED[name] if value <= given.largest]
        times = [one_size(**BASE | {name: value}, whole=name == "rows") for value in values]
        found[name] = {"values": values, "gpudbn": [ours for ours, _ in times], "products": [bare for _, bare in times]}
    return {"against": found, **watch.told()}


def one_size(*, visible: int, hidden: int, batch: int, k: int, rows: int, whole: bool) -> tuple[float, float]:
    """Seconds of an update, or of the ``whole`` epoch: ours, and the products alone."""
    from gpudbn.data import DataSet, Rows
    from gpudbn.dbn import DBN
    from gpudbn.feed import Feed
    from gpudbn.loop import Training
    from gpudbn.mpi.alone import Alone
    from gpudbn.settings import Settings

    updates = rows // batch if whole else 1
    table = Rows(np.random.default_rng(1).integers(0, 256, (updates * batch, visible), np.uint8), 1 / 255, None)
    none = table.select(range(0))
    settings = Settings(layers=(hidden,), batch=batch, k=k, epochs=(1,), finetune_epochs=0)
    run = Training(DBN([visible, hidden]), DataSet("rows", table, none, none, None, 0, 0), settings, Alone())
    bare = cd_products(visible, hidden, batch, k, together=True)
    with run.trial(run.paths[0], Feed(table), np.arange(len(table)), updates) as turn:
        return at_leisure(turn), at_leisure(bare) * updates


def at_leisure(action: Callable[[], None]) -> float:
    """Seconds of a call: the median of three rounds, each long enough to be measured."""
    action()
    found: list[float] = []
    while len(found) < 3:
        begun, calls = time.perf_counter(), 0
        while time.perf_counter() - begun < ENOUGH:
            action()
            calls += 1
        found.append((time.perf_counter() - begun) / calls)
    return statistics.median(found)


# -- a sample ------------------------------------------------------------------------------------


class Watch:
    """Time, and what a process and the others of its machine use meanwhile."""

    def __init__(self) -> None:
        self.first = self._now()
        self.memory = memory("VmRSS")  # what is imported and the rows

    def begin(self) -> None:
        """Time counts from here."""
        self.begun = time.perf_counter()

    def seconds(self, device: str) -> float:
        """Since ``begin``, all work of the GPU included."""
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - self.begun

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of this process, of all processors at work."""
        busy = 0.0
        with contextlib.suppress(OSError):
            words = Path("/proc/stat").read_text().partition("\n")[0].split()
            user, nice, system, _, _, irq, soft = map(int, words[1:8])
            busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy

    def told(self) -> dict[str, Any]:
        """Megabytes at the most and before training, how many cores others used, and NumPy's kernels."""
        clock, own, busy = (now - then for now, then in zip(self._now(), self.first, strict=True))
        others = max(0.0, round((busy - own) / clock, 2))
        return {"peak MB": memory("VmHWM"), "MB before": self.memory, "others": others, "BLAS": blas()}


def blas() -> str | None:
    """For which CPU NumPy's OpenBLAS has taken its kernels, where threadpoolctl is there to tell it."""
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_info

        kernels = [pool["architecture"] for pool in threadpool_info() if pool.get("internal_api") == "openblas"]
        return kernels[0] if kernels else None
    return None


def memory(name: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at the most. (``getrusage`` would tell those of the parent.)"""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return round(int(found[1]) * 1024 / 1e6, 1) if found else 0.0


PARTS: dict[str, tuple[dict[str, Program], Callable[[Program, argparse.Namespace], dict[str, Any]]]] = {
    "epoch": (EPOCH, epoch), "error": (ERROR, error), "size": ({"gpudbn": Program(ours)}, size)}


# -- the run -------------------------------------------------------------------------------------


def missing(program: Program, gpu: bool) -> str | None:
    """Why a program is not measured, or None."""
    lacking = [PACKAGES.get(name, name) for name in program.needs if importlib.util.find_spec(name) is None]
    if program.device == "cuda" and not gpu:
        return "no GPU here"
    return f"{', '.join(lacking)} not installed" if lacking else None


def has_gpu() -> bool:
    """Whether PyTorch or CuPy finds one; asked in a process of its own."""
    asked = ("import torch; assert torch.cuda.is_available()", "import cupy; cupy.zeros(1)")
    return any(subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False).returncode == 0
               for ask in asked)


def about(threads: int) -> dict[str, Any]:
    """The machine, versions and the threads of a BLAS."""
    found = machine() | {"threads": threads}
    del found["OPENBLAS_CORETYPE"]  # each sample has its own
    for name in PACKAGES.values():
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def sample(part: str, name: str, core_type: str, options: list[str], threads: int, folder: Path) -> dict[str, Any]:
    """What a program tells, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if core_type != "unset":
        environment["OPENBLAS_CORETYPE"] = core_type
    command = [sys.executable, "-m", "benchmarks.peers", "--sample", part, "--name", name, *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise RuntimeError(f"code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class Results:
    """The file of results, written after each sample."""

    def __init__(self, path: Path | None, start: dict[str, Any]) -> None:
        self.path, self.content = path, start
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            same = all(_clean(kept["machine"]) == _clean(start["machine"]) and kept[key] == start[key]
                       for key in ("layer", "network"))
            if same:
                self.content = kept
            print(f"{path}: {'goes on' if same else 'of another commit, day, machine or size: begun anew'}")

    def samples(self, part: str, core_type: str, name: str) -> list[dict[str, Any]]:
        """Those of a program, to append to."""
        found: list[dict[str, Any]] = self.content["samples"].setdefault(part, {}).setdefault(core_type, {}).setdefault(
            name, [])
        return found

    def write(self) -> None:
        if self.path is not None:
            self.content["summary"] = summary(self.content)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def _clean(about: dict[str, Any]) -> dict[str, Any]:
    """Without what a results file in the tree changes."""
    return about | {"commit": str(about["commit"]).removesuffix("-dirty")}


def spread(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [statistics.median(values), min(values), max(values)]


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """For each program of ``epoch`` seconds, and its seconds over ours of the same repetition, with and without numba;
    for ``error``, seconds until each target, None where one is not reached. Each a median, smallest and largest."""
    found: dict[str, Any] = {"epoch": {}, "error": {}}
    for core_type, programs in content["samples"].get("epoch", {}).items():
        ours = {key: [one["seconds"] for one in programs[name]] for key, name in OURS.items() if programs.get(name)}
        found["epoch"][core_type] = {
            name: {"seconds": spread([one["seconds"] for one in samples]),
                   **{key: spread([one["seconds"] / mine for one, mine in zip(samples, each, strict=False)])
                      for key, each in ours.items()},
                   "peak MB": statistics.median(one["peak MB"] for one in samples),
                   "MB before": statistics.median(one["MB before"] for one in samples),
                   "others": max(one["others"] for one in samples)}
            for name, samples in programs.items() if samples and ours}
    for core_type, programs in content["samples"].get("error", {}).items():
        found["error"][core_type] = {
            name: {f"{100 * target:g} %": spread(times) if len(times) == len(samples) else None for target in TARGETS
                   for times in [[seconds for one in samples for seconds in reached(one["curve"], target)]]} |
            {"errors": spread([one["curve"][-1][1] for one in samples]),
             "seconds": spread([one["curve"][-1][0] for one in samples]),
             "peak MB": statistics.median(one["peak MB"] for one in samples)}
            for name, samples in programs.items() if samples}
    return found


def reached(curve: list[list[float]], target: float) -> list[float]:
    """Seconds until the error was no more than this, in a list; an empty one if it never was."""
    return [seconds for seconds, value in curve if value <= target][:1]


def table(content: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for core_type, programs in content["summary"]["epoch"].items():
        lines += [f"\nan epoch, OPENBLAS_CORETYPE {core_type}",
                  f"{'':34} {'s':>8}  {'of ours':>8}  {'':13} {'peak MB':>8}"]
        for name, row in programs.items():
            middle, low, high = row["of ours"]
            lines.append(f"{name:34} {row['seconds'][0]:8.4f}  {middle:8.2f}  {low:5.2f} to {high:4.2f} "
                         f"{row['peak MB']:8.0f}")
    for core_type, programs in content["summary"]["error"].items():
        lines.append(f"\nuntil a test error, OPENBLAS_CORETYPE {core_type}")
        for name, row in programs.items():
            times = [f"{target} in {times[0]:.1f} s" for target, times in row.items() if target.endswith("%") and times]
            lines.append(f"{name:44} {', '.join(times)}; {100 * row['errors'][0]:.2f} % in {row['seconds'][0]:.1f} s")
    for name, why in content["not measured"].items():
        lines.append(f"not measured: {name} ({why})")
    return "\n".join(lines)


def tasks(given: argparse.Namespace, results: Results) -> Iterator[tuple[str, str, str, int]]:
    """Part, core type, program and number of each sample that is not there yet, programs in turn."""
    gpu = has_gpu()
    for part in given.parts:
        whys = {name: missing(program, gpu) for name, program in PARTS[part][0].items()}
        results.content["not measured"] |= {name: why for name, why in whys.items() if why}
        names = [name for name, why in whys.items() if not why]
        for number in range(given.repetitions if part == "epoch" else given.few):
            for core_type in given.core_types if part == "epoch" and number < given.few else given.core_types[:1]:
                for i in range(len(names)):  # each repetition begins with another
                    name = names[(i + number) % len(names)]
                    if len(results.samples(part, core_type, name)) == number:
                        yield part, core_type, name, number


def prepare(given: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Put the rows into files for the processes; the options with which each part finds them."""
    from gpudbn.data import load

    data = load(given.data, validation=0)

    def read(rows: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        where = np.arange(min(count, len(rows)))
        x = np.empty((len(where), rows.n), np.float32)
        rows.take(where, x)
        return np.rint(255 * x).astype(np.uint8), rows.take_labels(where)

    x, y = read(data.train, given.network_rows)
    np.save(folder / "rows.npy", x[: min(given.rows, len(x)) // given.batch * given.batch])
    np.savez(folder / "labelled.npz", **dict(zip(Labelled._fields, (x, y, *read(data.test, 10_000)), strict=True)))
    return {"epoch": ["--file", str(folder / "rows.npy"), "--hidden", str(given.hidden), "--batch", str(given.batch)],
            "error": ["--file", str(folder / "labelled.npz"), "--layers", *map(str, given.layers)],
            "size": ["--largest", str(given.largest)]}


def measure(given: argparse.Namespace, results: Results) -> None:
    """Every sample that is not there yet."""
    content = results.content
    content["failed"] = {}  # what failed before may do now
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = prepare(given, folder)
        for part, core_type, name, number in tasks(given, results):
            load = os.getloadavg()[0]
            words = [*options[part], "--seed", str(number + 1)]
            try:
                for _ in range(given.attempts):
                    found = sample(part, name, core_type, words, given.threads, folder)
                    if found["others"] <= BUSY:
                        break
            except RuntimeError as error:
                content["failed"][f"{part}: {name}"] = said = str(error)
            else:
                results.samples(part, core_type, name).append(found | {"load": round(load, 2)})
                said = f"{found['seconds']:.4f} s" if part == "epoch" else str(found.get("curve", [""])[-1])
            print(f"{part} {number + 1}, {core_type}, {name}: {said}", flush=True)
            results.write()
    results.write()


TOY = {"data": "digits", "rows": 200, "network_rows": 300, "hidden": 16, "batch": 20, "layers": [16, 8], "largest": 16,
       "repetitions": 1, "few": 1, "attempts": 1, "core_types": ["unset"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", help="mnist, or a folder of IDX files (default: mnist)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json", help="the file of results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repetitions", type=int, default=3,
                        help="of an epoch by each program, with the first of --core-types (default: 3)")
    parser.add_argument("--few", type=int, default=2, help="of the other core types and parts (default: 2)")
    parser.add_argument("--attempts", type=int, default=3, help="at a sample while others use the machine (default: 3)")
    parser.add_argument("--core-types", nargs="+", default=["unset", os.environ.get("OPENBLAS_CORETYPE", "Haswell")],
                        help="values of OPENBLAS_CORETYPE; the first is the one of the other parts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each BLAS (default: one a core)")
    parser.add_argument("--note", default="", help="what a reader of the file should know")
    parser.add_argument("--toy", action="store_true", help="toy sizes: only to see that it runs")
    for name, kind, value in (("rows", int, 10_000), ("network-rows", int, 60_000), ("hidden", int, 500),
                              ("batch", int, 100), ("largest", int, 1 << 16), ("seed", int, 1), ("file", Path, None),
                              ("sample", str, None), ("name", str, None)):  # sizes, and what a process is told
        parser.add_argument(f"--{name}", type=kind, default=value, help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs="+", type=int, default=[500, 500], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sample:
        programs, action = PARTS[given.sample]
        program = programs[given.name]
        if "numba" not in program.needs:
            sys.modules["numba"] = None  # type: ignore[assignment] # as if it were not installed
        print(json.dumps(action(program, given)), flush=True)
        return 0
    if given.toy:
        vars(given).update(TOY)
    results = Results(given.out, {
        "machine": about(given.threads), "layer": {"rows": given.rows, "hidden": given.hidden, "batch": given.batch},
        "network": {"rows": given.network_rows, "layers": given.layers, "targets": list(TARGETS)}, "base": BASE,
        "note": "", "not measured": {}, "failed": {}, "samples": {}})
    results.content["note"] = given.note or results.content["note"]
    measure(given, results)
    print(table(results.content))
    for name, why in results.content["failed"].items():
        print(f"FAILED: {name}: {why}")
    return 1 if results.content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
