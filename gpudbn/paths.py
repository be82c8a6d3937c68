"""Which way the updates of a phase take: the rule, in one table, and its reasons.

    numpy       on a CPU
    unfused     CuPy's operations and cuBLAS, one launch each: for comparison
    fused       kernels of ours, launched one by one
    graph       the same launches, repeated as a CUDA graph of a whole turn
    persistent  a whole turn in one launch, with the weights on the chip (``reference.cd_run``)
    wgmma       kernels of Hopper's tensor cores for large layers in bf16, in a CUDA graph where it can be

``--kernels`` forces a path. With ``auto`` the paths that a layer can take, and that compute as exactly as
``--precision`` promises, are its ``rivals``: they are timed on the device before the phase begins (``trials.py``), and
the quickest is taken. So wgmma is a rival only with bf16, since of bf16x2 it splits the weights alone; persistent
only with bf16x2, and not where data are neither samples nor whole numbers, since it rounds them to float16, and not to
two bf16; and unfused only with fp32 and exact.

The last hidden means cross the chip as float16, too (``reference.as_half``), of which the log tells. They are off by at
most 2^-12 + 2^-17, an eighth of what bf16 would lose, and sums of them over rows are exact; in the gradient of an
update this is 3e-4 of what chance makes it differ from seed to seed (tests/test_precision.py).

Where nothing can be timed, and with ``predicted``, it is the first of ``ORDER`` that can be taken, wgmma only where
each product of the layer has tiles for half of the processors. That order is a prediction, not yet measured on a GPU:
CD-1 of 784 x 500 units with 100 rows is some 250 launches of CuPy, most of them for draws, 5 of ours, at 4 to 10 us
each from Python and about 1.3 us each in a graph, so more than a millisecond unfused, 20 to 50 fused and 13 to 18 as
a graph. Where products take hundreds of microseconds the paths with kernels do not differ, and a graph costs nothing.
There the products decide: on Hopper wgmma is expected to make them some 1.6 times as fast as older instructions on all
processors, and slower with tiles for less than half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpudbn.errors import UserError

ORDER = ("wgmma", "graph", "fused")  # predicted, on a GPU
RIVALS = ("wgmma", "graph", "persistent", "fused", "unfused")  # that auto times
CHOICES = ("auto", "predicted", "wgmma", "graph", "persistent", "fused", "unfused")
WGMMA, BF16 = "sm_90", ("bf16", "bf16x2")  # the architecture that has it; the precisions it has


@dataclass(frozen=True)
class Case:
    """What the choice depends on.

    Attributes
    ----------
    what : str
        For messages: ``layer 2``, ``fine-tuning``.
    gpu : bool
    finetune : bool
        The products of fine-tuning are cuBLAS's, which CUDA graphs refuse.
    host_between : str or None
        Who has to act between the launches of an update: ``other replicas``, ``--order fixed``.
    updates : int
        Equal updates of an epoch: those of full batches.
    precision : str
        CuPy's operations have float32 and exact, wgmma bf16 and bf16x2.
    means : str or None
        An option under which states that are not samples cross the chip: ``--data-hidden mean``.
    rounded : str or None
        Visible units that the persistent path rounds and no other does: ``--up mean``.
    last_means : bool
        The last hidden units are means.
    offsets : bool
        Units are centred or drawn to a target of sparsity.
    fits : bool
        The layer, its velocity and a minibatch fit on the chip.
    architecture : str
        Of the GPU: ``sm_90``.
    tiles, processors : int
        Tiles of wgmma in the smallest of the layer's products, and what they are spread over.
    """

    what: str
    gpu: bool = True
    finetune: bool = False
    host_between: str | None = None
    updates: int = 1 << 20
    precision: str = "fp32"
    means: str | None = None
    rounded: str | None = None
    last_means: bool = False
    offsets: bool = False
    fits: bool = True
    architecture: str = "sm_80"
    tiles: int = 0
    processors: int = 1


@dataclass(frozen=True)
class Path:
    """A way for updates to take.

    Attributes
    ----------
    name, why : str
        For the log.
    graph : bool
        Whether turns are CUDA graphs.
    rivals : tuple of Path
        Those with which it is timed, itself among them, before one is taken. None: it needs no trial.
    """

    name: str
    why: str
    graph: bool = False
    rivals: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def _against(name: str, case: Case) -> str | None:
    """Why a path cannot be taken, or None."""
    if name == "unfused" and case.precision not in ("fp32", "exact"):
        return f"--precision {case.precision} is kernels'"
    if name == "wgmma":
        return _against_wgmma(case)
    if name in ("fused", "unfused"):
        return None
    if case.finetune:
        return "its products are cuBLAS's, which a CUDA graph cannot hold" if name == "graph" else "it is no CD"
    if case.host_between:
        return f"{case.host_between} must act within each update"
    if name == "persistent":
        return (f"--precision {case.precision} is not its arithmetic" if case.precision not in ("fp32", "bf16x2") else
                f"{case.means} lets means cross the chip" if case.means else
                "--centring and --sparsity-target need each update's units" if case.offsets else
                None if case.fits else "the layer or the minibatch does not fit on the chip")
    if case.updates < 2:
        return f"an epoch has {case.updates} full batches, and nothing repeats"
    return None


def _against_wgmma(case: Case) -> str | None:
    """Why wgmma cannot be taken, or None."""
    if case.finetune:
        return "it has no kernels of fine-tuning"
    if case.architecture != WGMMA:
        return f"the GPU is {case.architecture}, and {WGMMA} has it alone"
    if case.precision not in BF16:
        return f"--precision {case.precision} is not bf16 or bf16x2"
    if case.host_between:
        return f"{case.host_between} must act within each update"
    if case.offsets:
        return "--centring and --sparsity-target need sums that its step does not make"
    return None


def _path(name: str, why: list[str], case: Case) -> Path:
    """The path, with what is to be known of it besides why; wgmma is taken in CUDA graphs where these can be."""
    no_graph = _against("graph", case)
    if name == "wgmma" and no_graph:
        why = [*why, f"no graph: {no_graph}"]
    if name == "persistent" and case.last_means:
        why = [*why, "last hidden means as float16"]
    return Path(name, "; ".join(why), name == "graph" or (name == "wgmma" and not no_graph))


def _too_small(name: str, case: Case) -> str | None:
    """Why a path that can be taken is not the first choice, or None."""
    if name == "wgmma" and 2 * case.tiles < case.processors:
        return f"{case.tiles} tiles are too few for {case.processors} processors"
    return None


def _coarser(name: str, case: Case) -> bool:
    """Whether a path that can be taken computes less exactly than the precision promises: it has to be asked for."""
    return (name == "wgmma" and case.precision != "bf16") or (
        name == "persistent" and (case.precision != "bf16x2" or case.rounded is not None))


def _rivals(case: Case) -> tuple[Path, ...]:
    """The paths among which the device is to decide: two or more, or none. Replicas in step take the same."""
    found = () if case.host_between else tuple(
        _path(name, [], case) for name in RIVALS if _against(name, case) is None and not _coarser(name, case))
    return found if len(found) > 1 else ()


def quickest(predicted: Path, times: Mapping[str, float], failed: Mapping[str, str]) -> Path:
    """Of a path's rivals the one that took least time, with all that was found as its reason.

    Parameters
    ----------
    predicted : Path
        What it is if there are no times.
    times : mapping from name to microseconds an update
    failed : mapping from name to reason
        Of rivals that could not be timed.
    """
    best = min((path for path in predicted.rivals if path.name in times), key=lambda path: times[path.name],
               default=predicted)
    told = ", ".join(f"{name} {times[name]:.4g}" for name in sorted(times, key=lambda name: times[name]))
    why = [f"timed, us an update: {told}", best.why] if times else [predicted.why]
    why += [f"{name} failed: {reason}" for name, reason in failed.items()]
    return replace(best, why="; ".join(filter(None, why)), rivals=predicted.rivals)


def choose_path(asked: str, case: Case) -> Path:
    """The path for a phase.

    Parameters
    ----------
    asked : str
        ``--kernels``: auto, predicted, or the name of a path. ``graph`` means: wherever it can be.
    case : Case

    Raises
    ------
    UserError
        If a path that is asked for needs a GPU and there is none, or cannot be taken by a layer.
    """
    if not case.gpu:
        if asked not in ("auto", "predicted"):
            raise UserError(f"--kernels: must be auto without a GPU; got {asked}")
        return Path("numpy", "no GPU")
    if asked in ("auto", "predicted"):
        has_wgmma = case.architecture == WGMMA and case.precision == "bf16"  # of bf16x2 it splits the weights alone
        order = tuple(name for name in ORDER if name != "wgmma" or has_wgmma)
        against = {name: _against(name, case) or _too_small(name, case) for name in order}
        name = next(name for name in order if against[name] is None)
        why = [f"no {other}: {against[other]}" for other in order[: order.index(name)]]
        path = _path(name, why, case)
        return replace(path, why=path.why or "the first choice", rivals=_rivals(case) if asked == "auto" else ())
    reason = _against(asked, case)
    if reason is None:
        return _path(asked, ["--kernels"], case)
    if case.finetune:
        return Path("fused", f"no {asked}: {reason}")
    raise UserError(f"--kernels: must be a path that {case.what} can take; got {asked}, but {reason}. Use auto")
