"""Every setting of a run: its name, default, range and help, once.

The same names serve the command line (``--learning-rate 0.1``), a TOML file (``learning-rate =
0.1``) and Python (``Settings(learning_rate=0.1)``). Sizes are totals over all replicas of a
synchronous run. Imports neither NumPy nor MPI, so that the command line can be read before the
number of BLAS threads is fixed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gpudbn.errors import UserError

Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_0: Rule = (lambda x: x >= 0, "be at least 0")
AT_LEAST_1: Rule = (lambda x: x >= 1, "be at least 1")
POSITIVE: Rule = (lambda x: 0 < x < float("inf"), "be above 0")
BETWEEN: Rule = (lambda x: 0 < x < 1, "lie between 0 and 1")
BELOW_1: Rule = (lambda x: 0 <= x < 1, "lie in [0, 1)")
SERVER_RULES = ("sgd", "momentum", "adagrad")
PUSH = ("dense", "float16", "bfloat16", "factored")
STALENESS = ("count", "divide", "compensate")
BATCH_OPTIMISERS = ("lbfgs", "cg")
LARGE_BATCH = 1000  # rows, of a batch optimiser: Hinton & Salakhutdinov (2006)
SEED: Rule = (lambda x: 0 <= x < 1 << 64, "lie in [0, 2**64)")


def option(default: Any, text: str, *, group: str, rule: Rule | None = None, choices: Sequence[str] = (),
           metavar: str | None = None, follows: bool = False) -> Any:
    """A field of Settings with what the command line needs to know of it; ``follows``: None is what fits the others."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group, "rule": rule, "follows": follows,
                                                        "choices": tuple(choices), "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run; checked on construction.

    Raises
    ------
    UserError
        If a value is outside its range or does not fit another.
    """

    data: str = option("digits", "digits (8x8, built in), mnist (downloaded once), a folder of IDX files, FILE.npz or "
                       "FILE.npy", group="data")
    labels: str | None = option(None, "labels for --data FILE.npy", group="data", metavar="FILE.npy")
    validation: float | None = option(None, "validation rows cut from the training data: a count, or a fraction below "
                                      "1 (default: about a sixth)", group="data", rule=AT_LEAST_0, metavar="ROWS")
    test: float | None = option(None, "test rows, where the data have no test part of their own: as --validation",
                                group="data", rule=AT_LEAST_0, metavar="ROWS")
    binarise: str = option("none", "real values in [0, 1]: none takes them as probabilities, threshold cuts at 1/2, "
                           "stochastic draws them anew each time a row is used", group="data",
                           choices=("none", "threshold", "stochastic"))

    layers: tuple[int, ...] = option((256, 256, 256), "hidden units of each layer, from the data up",
                                     group="network", rule=AT_LEAST_1, metavar="M")
    local: tuple[int, ...] = option((0,), "visible units that a hidden unit sees, a window around its place, so that "
                                    "memory and time are those of the window; in images, whose pixels stand row by "
                                    "row, a band of rows. One number, or one a layer; 0: all", group="network",
                                    rule=AT_LEAST_0, metavar="F")
    initial_weights: float = option(0.01, "standard deviation of the initial weights", group="network",
                                    rule=AT_LEAST_0, metavar="SD")

    method: str = option("cd", "negative phase: contrastive divergence, or persistent chains", group="pretraining",
                         choices=("cd", "pcd"))
    k: int = option(1, "Gibbs steps an update", group="pretraining", rule=AT_LEAST_1)
    epochs: tuple[int, ...] = option((20,), "passes over the data for each layer: one number, or one a layer",
                                     group="pretraining", rule=AT_LEAST_0, metavar="N")
    batch: int = option(20, "rows an update; of all replicas together in --mode sync, of each otherwise",
                        group="pretraining", rule=AT_LEAST_1, metavar="ROWS")
    learning_rate: tuple[float, ...] = option((0.02,), "step size: one number, or one a layer", group="pretraining",
                                              rule=POSITIVE, metavar="RATE")
    schedule: str = option("linear", "how the rate falls over the epochs of a layer", group="pretraining",
                           choices=("constant", "linear", "exponential", "cosine"))
    learning_rate_end: float = option(0.1, "rate of the last epoch as a fraction of the first", group="pretraining",
                                      rule=(lambda x: 0 < x <= 1, "lie in (0, 1]"), metavar="FRACTION")
    momentum: tuple[float, ...] = option(None, "momentum: one number, or the one to begin with and the one after "
                                         "--momentum-epochs (default: 0.5 0.9, or 0 where replicas make plain steps: "
                                         "see --server-rule)", group="pretraining", rule=BELOW_1, metavar="MU",
                                         follows=True)
    momentum_epochs: int = option(5, "epochs with the first momentum", group="pretraining", rule=AT_LEAST_0,
                                  metavar="N")
    decay: float = option(2e-4, "L2 decay of the weights (times the learning rate)", group="pretraining",
                          rule=AT_LEAST_0)
    centring: str = option("off", "data: the gradient is that of units less their mean over the data, by a moving "
                           "average; learns as well on data that are mostly 1 as on data that are mostly 0",
                           group="pretraining", choices=("off", "data"))
    sparsity_target: float | None = option(None, "share of the data for which a hidden unit is to be 1 (default: no "
                                           "target)", group="pretraining", rule=BETWEEN, metavar="P")
    sparsity_cost: float = option(0.1, "how much a hidden unit is drawn to --sparsity-target", group="pretraining",
                                  rule=AT_LEAST_0, metavar="COST")
    patience: int = option(0, "end a layer after this many epochs without progress of the reconstruction of held-out "
                           "rows (0: never)", group="pretraining", rule=AT_LEAST_0, metavar="N")
    data_hidden: str = option("sample", "hidden units of the data phase in the gradient", group="estimator",
                              choices=("sample", "mean"))
    last_hidden: str = option("mean", "hidden units after the last Gibbs step in the gradient", group="estimator",
                              choices=("sample", "mean"))
    reconstruction: str = option("sample", "visible units of the Gibbs steps", group="estimator",
                                 choices=("sample", "mean"))
    up: str = option("sample", "what the layer above is trained on", group="estimator", choices=("sample", "mean"))

    finetune: str = option("classifier", "what the stack is fine-tuned to: a classifier of labels, or a deep "
                           "autoencoder, the stack unrolled up and down again", group="fine-tuning",
                           choices=("classifier", "autoencoder"))
    code: str = option("logistic", "units at the top of an autoencoder", group="fine-tuning",
                       choices=("logistic", "linear"))
    finetune_data: str | None = option(None, "other labelled data for fine-tuning (default: those of --data)",
                                       group="fine-tuning", metavar="DATA")
    finetune_epochs: int = option(60, "passes over the labelled data (0: pretraining only)", group="fine-tuning",
                                  rule=AT_LEAST_0, metavar="N")
    finetune_batch: int | None = option(None, "rows an update (default: --batch; 1000 for lbfgs and cg)",
                                        group="fine-tuning", rule=AT_LEAST_1, metavar="ROWS")
    optimiser: str = option(None, "step rule of fine-tuning; lbfgs and cg search along lines on large batches (default:"
                            " adam, or sgd where replicas make plain steps: see --server-rule)", group="fine-tuning",
                            choices=("adam", "adagrad", "sgd", "lbfgs", "cg"), follows=True)
    line_searches: int = option(3, "lbfgs, cg: line searches on each batch", group="fine-tuning", rule=AT_LEAST_1,
                                metavar="N")
    history: int = option(10, "lbfgs: steps whose curvature it remembers", group="fine-tuning", rule=AT_LEAST_1,
                          metavar="N")
    finetune_learning_rate: float = option(0.004, "step size of fine-tuning", group="fine-tuning", rule=POSITIVE,
                                           metavar="RATE")
    finetune_schedule: str = option("cosine", "how that rate falls over the epochs", group="fine-tuning",
                                    choices=("constant", "linear", "exponential", "cosine"))
    finetune_learning_rate_end: float = option(0.01, "rate of the last epoch as a fraction of the first",
                                               group="fine-tuning", metavar="FRACTION",
                                               rule=(lambda x: 0 < x <= 1, "lie in (0, 1]"))
    finetune_momentum: float = option(None, "momentum of --optimiser sgd (default: 0.9, or 0 where replicas make plain "
                                      "steps: see --server-rule)", group="fine-tuning", rule=BELOW_1, metavar="MU",
                                      follows=True)
    finetune_decay: float = option(0.0, "L2 decay of the weights (times the learning rate)", group="fine-tuning",
                                   rule=AT_LEAST_0, metavar="DECAY")
    dropout: float = option(0.3, "fraction of hidden units left out in each fine-tuning update", group="fine-tuning",
                            rule=BELOW_1, metavar="P")
    input_dropout: float = option(0.0, "fraction of visible units left out", group="fine-tuning", rule=BELOW_1,
                                  metavar="P")
    finetune_patience: int = option(20, "end after this many epochs without progress on the validation rows, whose "
                                    "best epoch is kept (0: take the last epoch)", group="fine-tuning",
                                    rule=AT_LEAST_0, metavar="N")

    seed: int = option(1, "number behind every random draw", group="run", rule=SEED)
    device: str = option("auto", "where to compute", group="run", choices=("auto", "cpu", "gpu"))
    precision: str = option("auto", "arithmetic of layers: fp32; bf16x2, tf32 or bf16, which tensor cores multiply; "
                            "exact, whose sums are of integers, so that all GPUs and CPUs come to the same bits. "
                            "auto: bf16x2 on a GPU, else fp32. Fine-tuning stays fp32", group="run",
                            choices=("auto", "fp32", "bf16x2", "tf32", "bf16", "exact"))
    kernels: str = option("auto", "how updates run on a GPU: wgmma (large layers in bf16 on Hopper), graph (kernels in "
                          "CUDA graphs), persistent (many updates in one launch), fused (kernels one by one), unfused "
                          "(CuPy and cuBLAS, to compare with); auto: the quickest of those that are as exact as "
                          "--precision, timed before each layer; predicted: wgmma where a layer is large and "
                          "--precision is bf16, graph, or else fused", group="run",
                          choices=("auto", "predicted", "wgmma", "graph", "persistent", "fused", "unfused"))
    resident: str = option("auto", "training rows in the GPU's memory: yes, no (they stream from the host), or yes if "
                           "there is room", group="run", choices=("auto", "yes", "no"))
    threads: int | None = option(None, "BLAS threads a rank (default: the node's cores shared among its computing "
                                 "ranks)", group="run", rule=AT_LEAST_1, metavar="N")
    checkpoint_seconds: float = option(5.0, "a checkpoint is written at the end of an epoch if the last one is this "
                                       "old", group="run", rule=AT_LEAST_0, metavar="SECONDS")
    plots: str = option("on", "pictures in the run folder", group="run", choices=("on", "off"))

    mode: str = option("async", "under mpirun: async (parameter servers on the first ranks, the others replicas on "
                       "their own shards of the data), sync (all ranks are replicas on slices of every batch) or local "
                       "(all ranks are replicas on their own shards, which meet every --period updates)",
                       group="distribution", choices=("async", "sync", "local"))
    shards: int = option(1, "ranks that hold a replica together, each its hidden units of every layer",
                         group="distribution", rule=AT_LEAST_1, metavar="M")
    servers: int = option(1, "async: ranks that serve, each a shard of the parameters", group="distribution",
                          rule=AT_LEAST_1, metavar="S")
    n_push: int = option(4, "async: updates between two pushes", group="distribution", rule=AT_LEAST_1, metavar="N")
    n_fetch: int = option(4, "async: updates between two fetches, a multiple of --n-push", group="distribution",
                          rule=AT_LEAST_1, metavar="N")
    max_staleness: int | None = option(None, "async: a replica waits while it is more than so many pushes ahead of the "
                                       "slowest (default: it never waits)", group="distribution", rule=AT_LEAST_0,
                                       metavar="N")
    warm_start: int = option(0, "async: updates that the first replica does alone at the start of each phase",
                             group="distribution", rule=AT_LEAST_0, metavar="N")
    portions: int | None = option(None, "async: into how many portions lbfgs and cg cut a batch, which replicas "
                                  "compute as they get free; the same number gives the same bits for any number of "
                                  "replicas (default: 8 for each)", group="distribution", rule=AT_LEAST_1, metavar="N")
    overlap: str = option("off", "async: on: a replica computes its next turn while it pushes the last and fetches; "
                          "what it works on is one turn older", group="distribution", choices=("off", "on"))
    period: int = option(10, "local: updates between two meetings; the end of an epoch is always one",
                         group="distribution", rule=AT_LEAST_1, metavar="N")
    outer: str = option("average", "local: what a meeting does: average (all go on from the mean), nesterov (from the "
                        "last such point, by a step with momentum along the mean change) or elastic (each goes on from "
                        "its own parameters, drawn to a centre that is drawn to all; the centre is what is measured "
                        "and saved)", group="distribution", choices=("average", "nesterov", "elastic"))
    outer_rate: float = option(0.7, "local: step size of --outer nesterov", group="distribution", rule=POSITIVE,
                               metavar="RATE")
    outer_momentum: float = option(0.9, "local: momentum of --outer nesterov", group="distribution", rule=BELOW_1,
                                   metavar="MU")
    elasticity: float = option(0.9, "local: share of the way from the centre to the mean that --outer elastic moves it",
                               group="distribution", rule=(lambda x: 0 < x <= 1, "lie in (0, 1]"), metavar="BETA")
    push: str = option("dense", "async: how changes travel: dense (float32); in 16 bits, float16 or bfloat16, what is "
                       "rounded away being added to the next; or, of a layer, factored: as the units that made them, "
                       "where these are fewer bytes, which wants --momentum 0", group="distribution", choices=PUSH)
    server_rule: str = option("sgd", "async: what a server does with a change: sgd adds --server-rate times it, "
                              "momentum takes that for the step of momentum, adagrad the change for a gradient. The "
                              "latter two want plain steps at the replicas: no momentum, and --optimiser sgd",
                              group="distribution", choices=SERVER_RULES)
    server_rate: float = option(None, "async: rate of --server-rule (default: 1; adagrad: 0.05, what a parameter "
                                "moves in its first step)", group="distribution", rule=POSITIVE, metavar="RATE",
                                follows=True)
    server_momentum: float = option(0.9, "async: momentum of --server-rule momentum", group="distribution",
                                    rule=BELOW_1, metavar="MU")
    staleness: str = option("count", "async: a change that comes s changes of others late is: only counted; divided by "
                            "max(1, s); or compensated to first order for where the parameters have gone since, which "
                            "wants plain steps at the replicas", group="distribution", choices=STALENESS)
    compensation: float = option(2.0, "async: how much --staleness compensate does", group="distribution",
                                 rule=AT_LEAST_0, metavar="LAMBDA")
    collectives: str = option("auto", "sync, local: what adds up arrays on GPUs: mpi (through host memory), nccl "
                              "(between GPUs, one for each replica) or auto (nccl where it can)", group="distribution",
                              choices=("auto", "mpi", "nccl"))
    transport: str = option("auto", "async: direct gives arrays of a GPU to MPI, which must be CUDA-aware; staged "
                            "passes them through the host; auto: direct where a trial shows that it works",
                            group="distribution", choices=("auto", "staged", "direct"))
    stopped_seconds: float = option(30.0, "a rank that has been stopped, not ended, for so long is killed by those of "
                                    "its machine (0: never)", group="distribution", rule=AT_LEAST_0, metavar="SECONDS")
    order: str = option("fast", "fixed: sums in blocks of constant size and constant order, so that any number of "
                        "synchronous replicas, or of their parts, gives the same bits on CPUs (slower)",
                        group="distribution", choices=("fast", "fixed"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        self._settle()
        for name in ("epochs", "learning_rate", "local"):
            if len(getattr(self, name)) not in (1, len(self.layers)):
                raise UserError(f"{flag(name)}: must be one number, or one for each of the {len(self.layers)} layers; "
                                f"got {len(getattr(self, name))}")
        if len(self.momentum) > 2:
            raise UserError(f"--momentum: must be one number or two; got {len(self.momentum)}")
        if self.n_fetch % self.n_push:
            raise UserError(f"--n-fetch: must be a multiple of --n-push {self.n_push}; got {self.n_fetch}")
        if self.overlap == "on" and self.staleness == "compensate":
            raise UserError("--overlap: must be off with --staleness compensate, whose server has to know what a "
                            "replica works on; got on")
        if self.precision == "exact" and (self.centring != "off" or self.sparsity_target is not None):
            raise UserError("--precision: must not be exact with --centring or --sparsity-target; got exact. Centred "
                            "units are no whole numbers")
        if self.precision == "bf16" and self.sparsity_target is not None:
            raise UserError("--precision: must not be bf16 with --sparsity-target, which moves units by less than bf16 "
                            "can tell; got bf16. Use bf16x2")
        if self.optimiser in BATCH_OPTIMISERS and self.order == "fixed":
            raise UserError(f"--optimiser: must be adam, adagrad or sgd with --order fixed; got {self.optimiser}")
        if any(self.local):
            self._check_local()
        if len(self.layers) > 255:
            raise UserError(f"--layers: must be at most 255 layers; got {len(self.layers)}")

    def _check_local(self) -> None:
        """Refuse what local layers cannot do."""
        for name, good in (("centring", ("off",)), ("sparsity_target", (None,)), ("precision", ("auto", "fp32")),
                           ("kernels", ("auto", "predicted", "unfused")), ("order", ("fast",)),
                           ("push", ("dense", "float16", "bfloat16")), ("finetune", ("classifier",))):
            if getattr(self, name) not in good:
                rule = "be left out" if good == (None,) else f"be {' or '.join(good)}"  # type: ignore[arg-type]
                raise UserError(f"{flag(name)}: must {rule} with --local {' '.join(map(str, self.local))}; "
                                f"got {getattr(self, name)}")

    def _settle(self) -> None:
        """Fill in what follows other settings. Where servers make the steps, those of replicas are plain."""
        steps = (f"--server-rule {self.server_rule}" if self.server_rule != "sgd" else
                 f"--staleness {self.staleness}" if self.staleness == "compensate" else None)
        for name in ("server_rule", "staleness", "push", "overlap", "max_staleness", "warm_start", "portions"):
            value = getattr(self, name)
            if self.mode != "async" and value != FIELDS[name].default:
                raise UserError(f"--mode: must be async with {flag(name)} {value}, since others have no servers; "
                                f"got {self.mode}")
        factored = f"--push {self.push}" if self.push == "factored" else None
        self._follow("momentum", (0.5, 0.9), 0.0, steps or factored)
        self._follow("optimiser", "adam", "sgd", steps)
        self._follow("finetune_momentum", 0.9, 0.0, steps)
        self._follow("server_rate", 0.05 if self.server_rule == "adagrad" else 1.0, None, None)

    def _follow(self, name: str, usual: Any, plain: Any, steps: str | None) -> None:
        """Set it if it was not given: to ``plain`` where a setting, ``steps``, wants plain steps at the replicas."""
        value = getattr(self, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if value is None:
            value = usual if not steps else (plain,) if isinstance(usual, tuple) else plain
            object.__setattr__(self, name, value)
        elif steps and any(number != plain for number in numbers):
            raise UserError(f"{flag(name)}: must be {plain} with {steps}, for which replicas make plain steps; "
                            f"got {' '.join(map(str, numbers))}")

    @property
    def finetuning_batch(self) -> int:
        """Rows of an update of fine-tuning."""
        return self.finetune_batch or (LARGE_BATCH if self.optimiser in BATCH_OPTIMISERS else self.batch)

    def of_layer(self, name: str, layer: int) -> Any:
        """The value for one layer of a setting that has one number, or one a layer."""
        values = getattr(self, name)
        return values[layer] if len(values) > 1 else values[0]

    def to_toml(self) -> str:
        """All settings as a TOML document with comments; None is left out."""
        lines, group = [], None
        for field in dataclasses.fields(self):
            if field.metadata["group"] != group:
                group = field.metadata["group"]
                lines += ["", f"# {group}"]
            value = getattr(self, field.name)
            if value is not None:
                lines.append(f"{flag(field.name)[2:]} = {json.dumps(value)}")
        return "\n".join(lines[1:]) + "\n"


HINTS = get_type_hints(Settings)
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# what names the run itself, and so stands only on the command line
RUN_OPTIONS = {
    "out": ("RUN", "folder for settings, metrics, checkpoints, model and pictures (default: a new one under runs/)"),
    "resume": ("RUN", "go on with an interrupted run, with its own settings"),
    "config": ("FILE", "settings from a TOML file, by the same names; the command line goes before it"),
}
# what may differ when a run is resumed: none of it changes what is computed
RESUMABLE = ("device", "collectives", "transport", "kernels", "resident", "threads", "plots", "checkpoint_seconds",
             "stopped_seconds")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _plain_type(name: str) -> tuple[type, bool, bool]:
    """(type of one value, is a list, may be None)."""
    hint = HINTS[name]
    optional = get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        hint = next(t for t in get_args(hint) if t is not type(None))
    many = get_origin(hint) is tuple
    return (get_args(hint)[0] if many else hint), many, optional


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value with its exact type, or a UserError that names setting, rule and value."""
    kind, many, optional = _plain_type(field.name)
    if value is None and (optional or field.metadata["follows"]):
        return None
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if many and not values:
        raise UserError(f"{flag(field.name)}: must have at least one number; got none")
    if not many and len(values) != 1:
        raise UserError(f"{flag(field.name)}: must be one value; got {len(values)}")
    result = []
    for item in values:
        good = isinstance(item, (int, float)) if kind is float else isinstance(item, kind)
        if not good or isinstance(item, bool) or item != item:
            word = {int: "a whole number", float: "a number", str: "text"}[kind]
            raise UserError(f"{flag(field.name)}: must be {word}; got {item!r}")
        item = kind(item)
        choices, rule = field.metadata["choices"], field.metadata["rule"]
        if choices and item not in choices:
            raise UserError(f"{flag(field.name)}: must be one of {', '.join(choices)}; "
                            f"got {item}.{nearest(item, choices)}")
        if rule and not rule[0](item):
            raise UserError(f"{flag(field.name)}: must {rule[1]}; got {item}")
        result.append(item)
    return tuple(result) if many else result[0]


def nearest(word: str, known: Sequence[str]) -> str:
    """`` Did you mean ...?`` with the known word most like this one, or nothing."""
    close = difflib.get_close_matches(str(word), known, 1, 0.5)
    return f" Did you mean {close[0]}?" if close else ""


def from_toml(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file, as keyword arguments for Settings; unknown names are refused."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: must be a file of settings that can be read; got '{error.strerror}'") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: must be TOML; got {error}") from None
    known = [flag(name)[2:] for name in FIELDS]
    for name in table:
        if name not in known:
            raise UserError(f"{path}: must hold settings only; got {name}.{nearest(name, known)}")
    return {name.replace("-", "_"): value for name, value in table.items()}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message}. See --help")


def command_line(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for every field of Settings and the run's own options."""
    parser = Parser(prog=prog, usage=f"{prog} [options]", description=description, epilog=epilog, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict[str, Any] = {}
    for name, field in FIELDS.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, many, _ = _plain_type(name)
        default: Any = field.default
        shown = " ".join(map(str, default)) if many and default is not None else default
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {shown})")
        word = "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata["choices"] else (
            field.metadata["metavar"] or {int: "N", float: "X", str: "TEXT"}[kind])
        groups[group].add_argument(flag(name), dest=name, nargs="+" if many else None, default=None, metavar=word,
                                   type=reader(kind), help=text.replace("%", "%%"))
    for name, (word, text) in RUN_OPTIONS.items():
        groups["run"].add_argument(flag(name), metavar=word, help=text)
    return parser


def reader(kind: type) -> Callable[[str], Any]:
    """What argparse is to make of a text: a number if it is one; if not, ``checked`` says so in our words."""
    def read(text: str) -> Any:
        try:
            return int(text) if kind is int else float(text) if kind is float else text
        except ValueError:
            return text
    return read


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; an unknown option is refused with the nearest right one."""
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings]
        name = unknown[0].split("=")[0]
        raise UserError(f"{parser.prog}: must be given options it knows; got {name}.{nearest(name, known)}")
    return found


def settings_of(found: argparse.Namespace) -> Settings:
    """Settings from ``--resume``'s own file, or from defaults, then ``--config``, then the command line."""
    given = {name: getattr(found, name) for name in FIELDS if getattr(found, name) is not None}
    if found.resume:
        fixed = [name for name in given if name not in RESUMABLE]
        fixed += [name for name in ("out", "config") if getattr(found, name)]
        if fixed:
            raise UserError(f"--resume: must stand without {flag(fixed[0])}, the run has its own settings; only "
                            f"{', '.join(flag(n) for n in RESUMABLE)} may differ")
        file = Path(found.resume) / "settings.toml"
        if not file.is_file():
            raise UserError(f"--resume: must be a run folder; got {found.resume}, which has no settings.toml")
        return Settings(**{**from_toml(file), **given})
    return Settings(**{**(from_toml(found.config) if found.config else {}), **given})
