"""What an update takes by each path of the trainer, beside PyTorch and the package rbms; and launches and barriers.

    python -m benchmarks.updates --out updates.json      needs a GPU; with PyTorch and rbms where they are
    python -m benchmarks.updates --rehearse --out F      the same code at toy sizes without one: its times mean nothing

A path is timed as the trainer goes it, in turns of 50 updates (fewer of large layers) of resident rows of zeros and
ones, the gather of the rows included. PyTorch has its rows at hand. The file is written after every measurement; CD-1
comes first, and layers in order of their size. That results are right is for the tests to say.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import counts, kernels
from benchmarks.kernels import DECAY, MOMENTUM, RATE

ESTIMATORS: dict[str, dict[str, Any]] = {"CD-1": {}, "PCD-1": {"method": "pcd"}, "CD-10": {"k": 10}}
TOY = [(13, 7, 5)]
PATHS = [("graph", "bf16x2", "mean"), ("persistent", "bf16x2", "sample"), ("persistent", "bf16x2", "mean"),
         ("wgmma", "bf16", "mean"), ("graph", "bf16", "mean"), ("fused", "bf16x2", "mean"), ("graph", "fp32", "mean"),
         ("unfused", "fp32", "mean")]  # path, precision, last hidden units
LONGEST = 4e13  # flops of an update beyond which float32 is left out
NODES = 1000
FEW = 5  # updates of a turn without kernels: hundreds of launches each

LATENCY = """
#include <cooperative_groups.h>
extern "C" __global__ void nothing() {}
extern "C" __global__ void barriers(int count)
{
    for (int i = 0; i < count; ++i) cooperative_groups::this_grid().sync();
}
"""


class Case:
    """A layer, a batch and an estimator; what an update of it costs at least."""

    def __init__(self, n: int, m: int, B: int, k: int, precision: str) -> None:
        self.n, self.m, self.B, self.k = n, m, B, k
        self.product = "float32 TFLOP/s" if precision == "fp32" else "float16 TFLOP/s"

    def cost(self, _: str) -> tuple[int, int]:
        """Floating-point operations of the products; bytes that have to move if weights do not stay on the chip."""
        n, m, B, k = self.n, self.m, self.B, self.k
        return (6 + 4 * k) * B * n * m, int(1e6 * counts.megabytes("graph", n, m, B, k))


@contextlib.contextmanager
def path_of_ours(case: Case, path: str, precision: str, last: str, options: dict[str, Any], xp: Any,
                 most: int) -> Iterator[tuple[Callable[[], None], int]]:
    """A turn of the trainer by a path, and how many updates it has."""
    from gpudbn import trials
    from gpudbn.data import DataSet, Rows
    from gpudbn.dbn import DBN
    from gpudbn.feed import feed_of
    from gpudbn.loop import Training
    from gpudbn.mpi.alone import Alone
    from gpudbn.settings import Settings

    settings = Settings(layers=(case.m,), batch=case.B, epochs=(1,), finetune_epochs=0, kernels=path,
                        precision=precision, last_hidden=last, momentum=(MOMENTUM,), decay=DECAY,
                        learning_rate=(RATE,), **options)
    count = trials.updates_of(case.cost("")[0], most)
    rows = Rows(np.random.default_rng(case.n).random((count * case.B, case.n), np.float32) < 0.3, 1.0, None).to(xp)
    data = DataSet("random", rows, rows.select(range(0)), rows.select(range(0)), None, 0, 0)
    run = Training(DBN([case.n, case.m], xp), data, settings, Alone())
    feed = feed_of(rows, xp, len(rows))
    with run.trial(run.paths[0], feed, feed.begin(np.arange(len(rows))), count) as turn:
        yield turn, count


def by_torch(case: Case, torch: Any, device: str, persistent: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Updates by PyTorch: by hand, then as tutorials have it, by the gradient of free energies."""
    n, m, B, k = case.n, case.m, case.B, case.k
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Any:
        return torch.rand(shape, generator=generator, device=device)

    v0 = (random(B, n) < 0.3).float()
    W, b, c = random(n, m).sub_(0.5).mul_(0.02), torch.zeros(n, device=device), torch.zeros(m, device=device)
    uW, ub, uc = (torch.zeros_like(x) for x in (W, b, c))
    chains = (random(B, m) < 0.5).float()

    def by_hand(kind: Any) -> Callable[[], None]:
        data = v0.to(kind)

        def update() -> None:
            weights, visible, hidden = W.to(kind), b.to(kind), c.to(kind)
            h0 = torch.bernoulli(torch.sigmoid(torch.addmm(hidden, data, weights)))
            h = chains.to(kind) if persistent else h0
            for step in range(k):
                v = torch.bernoulli(torch.sigmoid(torch.addmm(visible, h, weights.T)))
                p = torch.sigmoid(torch.addmm(hidden, v, weights))
                h = torch.bernoulli(p) if persistent or step < k - 1 else p
            if persistent:
                chains.copy_(h)
            uW.mul_(MOMENTUM).add_(W, alpha=-RATE * DECAY)
            if kind == torch.float32:
                uW.addmm_(data.T, h0, alpha=RATE / B).addmm_(v.T, p, alpha=-RATE / B)
            else:
                uW.add_(torch.mm(data.T, h0), alpha=RATE / B).add_(torch.mm(v.T, p), alpha=-RATE / B)
            ub.mul_(MOMENTUM).add_((data - v).sum(0), alpha=RATE / B)
            uc.mul_(MOMENTUM).add_((h0 - p).sum(0), alpha=RATE / B)
            W.add_(uW)
            b.add_(ub)
            c.add_(uc)

        return update

    yield "PyTorch eager, tf32", by_hand(torch.float32)
    yield "PyTorch eager, bf16", by_hand(torch.bfloat16)
    if device == "cuda":
        for name, kind in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
            yield f"PyTorch in a CUDA graph, {name}", graph_of(torch, by_hand(kind))
        if case.k == 1 and not persistent:
            yield "PyTorch compiled, bf16", torch.compile(by_hand(torch.bfloat16))
    yield "PyTorch, the tutorial's way, tf32", tutorial(torch, v0, [W.clone(), b.clone(), c.clone()], case.k)


def graph_of(torch: Any, update: Callable[[], None]) -> Callable[[], None]:
    """An update as a CUDA graph of PyTorch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    replay: Callable[[], None] = graph.replay
    return replay


def tutorial(torch: Any, v0: Any, start: list[Any], k: int) -> Callable[[], None]:
    """CD-k by automatic differentiation of F(v0) - F(vk), with an optimiser."""
    W, b, c = (torch.nn.Parameter(x) for x in start)
    optimiser = torch.optim.SGD([W, b, c], lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)

    def free_energy(v: Any) -> Any:
        return -(v @ b) - torch.nn.functional.softplus(v @ W + c).sum(1)

    def update() -> None:
        with torch.no_grad():
            v = v0
            for _ in range(k):
                h = torch.bernoulli(torch.sigmoid(v @ W + c))
                v = torch.bernoulli(torch.sigmoid(h @ W.T + b))
        loss = free_energy(v0).mean() - free_energy(v).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return update


def by_rbms(case: Case, torch: Any, device: str, persistent: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The package rbms (version 0.5): its own step, with its own centring off, and PyTorch's optimiser."""
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.training.pcd import fit_batch_pcd

    def random(*shape: int) -> Any:
        return torch.rand(shape, device=device)

    model = BBRBM(weight_matrix=random(case.n, case.m).sub_(0.5).mul_(0.02), vbias=torch.zeros(case.n, device=device),
                  hbias=torch.zeros(case.m, device=device))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    v0, weights = (random(case.B, case.n) < 0.3).float(), torch.ones((case.B, 1), device=device)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, maximize=True)
    chains = model.init_chains(num_samples=case.B)

    def update() -> None:
        nonlocal chains
        with torch.no_grad():
            if not persistent:
                chains = model.init_chains(num_samples=case.B, weights=weights, start_v=v0)
            chains, _ = fit_batch_pcd((v0, weights), chains, model, case.k, 1.0, centered=False)
            optimiser.step()

    yield "rbms", update


def latencies(xp: Any, processors: int, few: bool) -> dict[str, float]:
    """Microseconds of a launch, alone and in a graph, of a cooperative launch and of a barrier of its grid."""
    from gpudbn.cuda.persistent import THREADS

    module = xp.RawModule(code=LATENCY, options=("--std=c++17",), enable_cooperative_groups=False)
    cooperative = xp.RawModule(code=LATENCY, options=("--std=c++17",), enable_cooperative_groups=True)
    nothing, barriers = module.get_function("nothing"), cooperative.get_function("barriers")
    nodes = 10 if few else NODES

    def graph_of_nothing(count: int) -> float:
        xp.cuda.Device().synchronize()
        with xp.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            for _ in range(count):
                nothing((processors,), (THREADS,), ())
            graph = stream.end_capture()
            found = kernels.timed(xp, lambda: graph.launch(stream), stream=stream)["median_us"]
            stream.synchronize()
        return found

    def grid(count: int) -> float:
        return kernels.timed(xp, lambda: barriers((processors,), (THREADS,), (np.int32(count),)))["median_us"]

    node = (graph_of_nothing(2 * nodes) - graph_of_nothing(nodes)) / nodes
    return {"launch from Python": kernels.timed(xp, lambda: nothing((processors,), (THREADS,), ()))["median_us"],
            "graph node": node, "graph of one node": graph_of_nothing(1), "cooperative launch": grid(0),
            "grid barrier": (grid(2 * nodes) - grid(nodes)) / nodes}


def run(results: kernels.Results, cases: list[tuple[int, int, int]], xp: Any, torch: Any, toy: bool) -> None:
    """Every estimator, layer and contender; what a layer cannot take is listed."""
    from gpudbn import cuda
    from gpudbn.errors import UserError

    content, most = results.content, 2 if toy else counts.TURN
    with results.attempt(what="ceilings"):
        content["ceilings"] = kernels.ceilings(xp, torch, toy)
        print(content["ceilings"], flush=True)
    with results.attempt(what="latency"):
        content["latency"] = latencies(xp, 2 if toy else cuda.gpu().processors, toy)
        print(content["latency"], flush=True)
    content["refused"] = []
    for estimator, options in ESTIMATORS.items():
        for sizes in cases:
            for path, precision, last in PATHS:
                case, by = Case(*sizes, options.get("k", 1), precision), f"{path}, {precision}, last h {last}"
                if precision == "fp32" and case.cost("")[0] > LONGEST:
                    continue
                turns = min(most, FEW) if path == "unfused" else most
                with results.attempt(by=by, what=estimator, case=sizes):
                    try:
                        with path_of_ours(case, path, precision, last, options, xp, turns) as (turn, count):
                            results.add(case, by, estimator, kernels.timed(xp, turn, divided=count))
                    except UserError as error:
                        content["refused"].append(f"{estimator} {sizes} {by}: {error}")
            rivals = [] if torch is None else [by_torch]
            with contextlib.suppress(ImportError):
                import rbms  # noqa: F401

                rivals += [] if torch is None else [by_rbms]
            case = Case(*sizes, options.get("k", 1), "fp32" if toy else "tf32")
            for rival in rivals:
                with results.attempt(by=rival.__name__, what=estimator, case=sizes):
                    for by, update in rival(case, torch, "cpu" if toy else "cuda", "method" in options):
                        with results.attempt(by=by, what=estimator, case=sizes):
                            results.add(case, by, estimator, kernels.timed(xp, update))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.updates", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, without a GPU: only to see that it runs")
    given = parser.parse_args()
    torch: Any = None
    with contextlib.suppress(ImportError):
        import torch

        torch.set_float32_matmul_precision("high")
    with contextlib.ExitStack() as stack:
        kernels.repeats = 5
        if given.rehearse:
            kernels.repeats = 2
            from tests.pretend_cupy import installed

            stack.enter_context(installed(processors=2))
        import cupy

        results = kernels.Results(given.out, {"machine": kernels.environment(given.rehearse)})
        run(results, TOY if given.rehearse else counts.CASES, cupy, torch, given.rehearse)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
