"""``python -m gpudbn.simulate``: train with many servers and replicas in virtual time, in one process.

Thin: reads the command line, reads or measures costs, runs ``mpi.simulate`` and writes a run folder.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from gpudbn.errors import UserError
from gpudbn.mpi import launch
from gpudbn.settings import AT_LEAST_1, Settings, command_line, parse, reader, settings_of

if TYPE_CHECKING:
    from gpudbn.mpi.costs import Costs
    from gpudbn.runs import Run

DESCRIPTION = """\
What training would do on a cluster that is not there: the real servers and replicas, real gradients, real data, in one
process; only time is imagined. All options of gpudbn.train, and how many replicas there are and what things cost."""

EPILOG = """\
examples:
  python -m gpudbn.simulate --replicas 2                          as mpirun -n 3 python -m gpudbn.train
  python -m gpudbn.simulate --replicas 128 --servers 4 --data mnist --layers 500 --costs cluster.toml
  python -m gpudbn.simulate --replicas 16 --mode sync --costs cluster.toml

costs: a TOML file, of which gpudbn/mpi/costs.py says what it may hold; the run folder keeps all that were used. What it
does not hold of this machine's doing (updates, copies, messages, a server's work) is measured before the run."""

MEASURED = ("phases", "crowding", "copy", "message", "apply", "publish", "exchange", "look", "oversleep", "jitter",
            "steady")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_line("python -m gpudbn.simulate", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("simulation")
    group.add_argument("--replicas", type=reader(int), default=2, metavar="R", help="replicas (default: 2)")
    group.add_argument("--costs", metavar="FILE", help="what things cost (default: one node, as this machine)")
    try:
        found = parse(parser, arguments)
        if found.resume:
            raise UserError("--resume: must not be given: a simulation is not resumed")
        settings = settings_of(found)
        good, rule = AT_LEAST_1
        if not isinstance(found.replicas, int) or not good(found.replicas):
            raise UserError(f"--replicas: must {rule}; got {found.replicas}")
        if settings.device == "gpu":
            raise UserError("--device: must be cpu, where simulations compute; got gpu. --costs may be those of a GPU")
    except UserError as error:
        from gpudbn.mpi.wire import end

        return end(error)
    if "numpy" not in sys.modules:  # a program that calls main() has made its own choice
        launch.limit_threads(settings.threads or 1, 1)  # a rank's share
    from gpudbn.mpi.wire import guarded

    return guarded(lambda: run(settings, found.replicas, found.costs, found.out))


def run(settings: Settings, replicas: int, costs: str | None, out: str | None) -> int:
    """Simulate, and write what came of it; returns the exit code."""
    from gpudbn._command import load_data
    from gpudbn.checkpoint import write_atomically
    from gpudbn.mpi.costs import Costs
    from gpudbn.mpi.simulate import simulate
    from gpudbn.runs import Run

    given, known = (Costs.read(costs) if costs else (Costs(), ()))
    data, labelled = load_data(settings, quiet=False)
    folder = Run.create(out or Run.default_path(settings.data), settings.to_toml())
    used = _measured(settings, given, known)
    write_atomically(folder.path / "costs.toml", used.to_toml().encode())
    began = time.perf_counter()

    def record(values: dict[str, Any]) -> None:
        folder.record(**values)
        shown = [f"{values['phase']:8}", *([f"layer {values['layer']}"] if "layer" in values else []),
                 f"epoch {values['epoch']:>3}" if "epoch" in values else "",
                 *(f"{name.replace('_', ' ')} {values[name]:.4g}" for name in (
                     "reconstruction_validation", "loss_validation", "error_validation", "error")
                   if values.get(name) is not None)]
        print("  ".join(shown) + f"   {values['seconds']:.2f} s of {replicas} replicas", flush=True)

    result = simulate(settings, data, replicas=replicas, costs=used, labelled=labelled, record=record)
    assert result.dbn is not None
    folder.save_model(result.dbn.arrays(), result.dbn.about_file())
    reports = [*result.servers, *result.replicas]
    folder.record_reports(reports)
    if settings.plots == "on":
        _draw(folder, reports)
    busy = [report["seconds"]["computing"] / sum(report["seconds"].values()) for report in result.replicas]
    print(f"replicas compute for {100 * min(busy):.0f} to {100 * max(busy):.0f} % of {result.seconds:.2f} virtual s"
          + "".join(f"; server {i} is busy for {100 * server['seconds']['applying'] / result.seconds:.0f} %"
                    for i, server in enumerate(result.servers)))
    print(f"everything is in {folder.path}: model.safetensors, metrics.jsonl, settings.toml, costs.toml "
          f"({time.perf_counter() - began:.1f} s to simulate)")
    return 0


def _draw(folder: Run, reports: list[dict[str, Any]]) -> None:
    """Pictures of what the ranks did. Without Matplotlib none, and a line that says so."""
    from gpudbn import plots

    missing = plots.available()
    if missing:
        print(f"no pictures: {missing}", flush=True)
        return
    plots.ranks(folder.plot, reports)


def _measured(settings: Settings, costs: Costs, known: tuple[str, ...]) -> Costs:
    """The costs, with what is not known measured here."""
    if set(MEASURED) <= set(known):
        return costs
    from gpudbn.mpi.calibrate import calibrate

    print("measuring what is not in --costs", flush=True)
    return calibrate(settings, costs, known=known)


if __name__ == "__main__":
    sys.exit(main())
