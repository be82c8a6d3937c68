"""How long things take in a simulation. From a TOML file, or measured by ``calibrate.py``."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpudbn.errors import UserError


@dataclass(frozen=True)
class Hop:
    """What takes ``latency`` seconds, and as long as its bytes take at ``bandwidth`` bytes a second."""

    latency: float
    bandwidth: float

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Compute:
    """Seconds of a phase's computations on one core's share of a node: [once, for each row].

    Attributes
    ----------
    update : an update by itself; that of a batch optimiser costs the sums of its evaluations
    sums : the sums of a piece of a batch, to be added to those of others
    step : a step with such sums
    measure : what is measured at the end of an epoch, 250 rows at a time
    crowding : float, optional
        By how much all cores at work slow these down; default: that of ``Costs``.
    """

    update: tuple[float, float]
    sums: tuple[float, float]
    step: tuple[float, float]
    measure: tuple[float, float]
    crowding: float | None = None

    def seconds(self, what: str, rows: int) -> float:
        once, row = getattr(self, what)
        return once + row * rows


@dataclass(frozen=True)
class Costs:
    """All of it; seconds and bytes.

    Attributes
    ----------
    phases : tuple of Compute
        Of each layer in order, then of fine-tuning.
    copy : Hop
        One-sided reads and writes within a node.
    message : Hop
        Messages within a node.
    network : Hop
        Both, between nodes.
    apply, publish, exchange : Hop
        What a server does for a change, what it does to publish, and a replica's passes over its own memory in an
        exchange; bytes are those of the parameters.
    look : Hop
        What a server does to see whether there is anything to do, some sixty times after each change before its
        pauses are long; there are no bytes.
    node : int
        Ranks of a node, in order; 0: all are on one.
    extra : int
        Ranks that the first node has beside those, the first ones: servers for which no worker makes room.
    cores : int
        Of a node; 0: one for each of its ranks.
    crowding : float
        By how much all cores at work slow each of them down: 0.1 is 10 %. What a phase has of its own goes before it.
    oversleep : float
        How much longer than asked a rank sleeps.
    jitter : float
        Standard deviation of the logarithm of what work is multiplied by.
    steady : float
        Seconds for which that stays the same for a rank; 0: for a piece of work.
    slow : tuple of float
        What the work of each rank is multiplied by, in order; 1 for the ranks behind: 10 is ten times slower.
    """

    phases: tuple[Compute, ...] = ()
    copy: Hop = Hop(1e-6, 10e9)
    message: Hop = Hop(3e-6, 5e9)
    network: Hop = Hop(20e-6, 1e9)
    apply: Hop = Hop(50e-6, 3e9)
    publish: Hop = Hop(20e-6, 10e9)
    exchange: Hop = Hop(50e-6, 2e9)
    look: Hop = Hop(0.0, 1e12)
    node: int = 0
    extra: int = 0
    cores: int = 0
    crowding: float = 0.0
    oversleep: float = 60e-6
    jitter: float = 0.0
    steady: float = 0.0
    slow: tuple[float, ...] = field(default=())

    def to_toml(self) -> str:
        """As a TOML document, which ``Costs.read`` reads."""
        def table(item: Any) -> str:
            return "{" + ", ".join(f"{name} = {word(value)}" for name, value in dataclasses.asdict(item).items()
                                   if value is not None) + "}"

        def word(value: Any) -> str:
            if isinstance(value, list | tuple):
                return "[" + ", ".join(map(word, value)) + "]"
            return f"{value:.4g}" if isinstance(value, float) else str(value)

        lines = []
        for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)):
            if name == "phases":
                lines.append("phases = [\n" + "".join(f"  {table(phase)},\n" for phase in value) + "]")
            else:
                lines.append(f"{name} = {table(value) if isinstance(value, Hop) else word(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, path: Path | str) -> tuple[Costs, tuple[str, ...]]:
        """From a TOML file, and the names that are in it: the others have their defaults.

        Raises
        ------
        UserError
            If it cannot be read, or holds something else.
        """
        try:
            given = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise UserError(f"{path}: must be a file of costs that can be read; got '{error.strerror}'") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: must be TOML; got {error}") from None
        try:
            for name, value in given.items():
                if isinstance(value, dict):
                    given[name] = Hop(**{key: _number(number) for key, number in value.items()})
                elif name == "phases":
                    given[name] = tuple(Compute(**{key: _number(cost) if key == "crowding" else _pair(*cost)
                                                   for key, cost in phase.items()}) for phase in value)
                elif isinstance(value, list):
                    given[name] = tuple(map(_number, value))
                else:
                    given[name] = _number(value)
            return cls(**given), tuple(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: must hold costs as gpudbn.mpi.costs.Costs has them; got: {error}") from None


def _pair(once: Any, row: Any) -> Any:
    return _number(once), _number(row)


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{value!r}, where a number from 0 on must stand")
    return value
