"""The run folder: all that one training run leaves behind, and all that it needs to go on.

    settings.toml            the settings as used
    metrics.jsonl            one JSON object a line, in the order they were recorded
    checkpoint.safetensors   the state to resume from
    model.safetensors        the trained parameters
    plots/                   pictures

A resumed run cuts its metrics back to what the checkpoint had seen, so they end up as if it had
never stopped. Only the chief process writes here.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpudbn import checkpoint
from gpudbn.arrays import Array
from gpudbn.errors import UserError
from gpudbn.shards import Pieces

RECORDS = "metric_records"  # in a checkpoint's metadata: how many metric records it had seen


class Run:
    """A run folder. Made by ``Run.create`` or ``Run.open``.

    Parameters
    ----------
    path : path
        The folder. Not touched.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.settings = self.path / "settings.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.model = self.path / "model.safetensors"

    @classmethod
    def create(cls, path: Path | str, settings_toml: str) -> Run:
        """Make the folder, parents included, and write the settings into it.

        Raises
        ------
        UserError
            If the folder holds anything already, or cannot be made or written.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            content = sorted(entry.name for entry in run.path.iterdir())
        except FileExistsError:
            raise UserError(f"{path}: must be a new or empty folder; got a file. Choose another --out") from None
        except OSError as error:
            raise checkpoint.why_not(path, "a folder that can be made", error) from error
        if run.checkpoint.name in content:
            raise UserError(f"{path}: must be a new or empty folder; got a run that can go on. "
                            f"Use --resume {path}, or choose another --out")
        if content:
            raise UserError(f"{path}: must be a new or empty folder; got one that holds {content[0]}. "
                            "Choose another --out")
        checkpoint.write_atomically(run.settings, settings_toml.encode())
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in that folder, to be resumed.

        Raises
        ------
        UserError
            If it is no run folder, or the run stopped before its first checkpoint.
        """
        run = cls(path)
        try:
            content = [entry.name for entry in run.path.iterdir()]
        except FileNotFoundError:
            raise UserError(f"{path}: must be the folder of a run; "
                            f"got no such folder{checkpoint.nearest(run.path)}") from None
        except NotADirectoryError:
            raise UserError(f"{path}: must be the folder of a run; got a file. "
                            f"Did you mean {run.path.parent}?") from None
        except OSError as error:
            raise checkpoint.why_not(path, "readable", error) from error
        if run.settings.name not in content:
            raise UserError(f"{path}: must be the folder of a run; got one without {run.settings.name}")
        if run.checkpoint.name not in content:
            raise UserError(f"{path}: must hold {run.checkpoint.name} to be resumed; got none: the run stopped before "
                            "its first checkpoint. Start it again with another --out")
        for leftover in run.path.glob(checkpoint.TEMPORARY):  # of a process killed while it wrote
            with suppress(OSError):
                leftover.unlink()
        return run

    @staticmethod
    def default_path(data: str, root: Path | str = "runs") -> Path:
        """``runs/<data>-<date>-<time>``, with a number behind it if that exists. Makes nothing."""
        stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.") or "data"
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, count = Path(root) / name, 1
        while path.exists():
            count += 1
            path = Path(root) / f"{name}-{count}"
        return path

    def record(self, **values: Any) -> None:
        """Append one line to the metrics. What is not finite becomes null: JSON knows no NaN.

        Raises
        ------
        UserError
            If it cannot be written, whole; the earlier records stay as they were.
        """
        data = (json.dumps(_plain(values), allow_nan=False) + "\n").encode()
        try:
            with self.metrics.open("a+b", buffering=0) as file:
                end = file.tell()
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # the half line of a crash
                    end = file.truncate(sum(map(len, self._lines())))
                try:
                    while data:
                        data = data[file.write(data):]
                except BaseException:
                    file.truncate(end)  # no half line for the next one to run into
                    raise
        except OSError as error:
            raise checkpoint.why_not(self.metrics, "writable", error) from error

    def record_reports(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Record what each rank did, as ``Exchange.reports`` tells it; its timeline is for pictures."""
        self.record(phase="report", ranks=[{k: v for k, v in report.items() if k != "timeline"} for report in reports])

    def records(self) -> list[dict[str, Any]]:
        """The metric records, oldest first. A last line cut short by a crash is left out.

        Raises
        ------
        UserError
            If any other line is not a record.
        """
        found = []
        for number, line in enumerate(self._lines(), 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise UserError(f"{self.metrics}: line {number} must be a JSON object; got {line[:40]!r}")
            found.append(value)
        return found

    def save_checkpoint(self, arrays: Mapping[str, Array | Pieces], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint. The metadata gains the number of metric records so far.

        Raises
        ------
        UserError
            If it cannot be written; the earlier checkpoint stays whole.
        """
        # The records first, on the disk: a checkpoint must not outlive what it counts.
        try:
            with suppress(FileNotFoundError), self.metrics.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise checkpoint.why_not(self.metrics, "writable", error) from error
        checkpoint.write(self.checkpoint, arrays, {**meta, "kind": "checkpoint", RECORDS: len(self._lines())})

    def load_checkpoint(self, part: checkpoint.Part | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays, or the parts of them that ``Reader.read`` is to keep, and metadata of the last checkpoint."""
        file = checkpoint.Reader(self.checkpoint, "checkpoint")
        return file.read(part), file.meta

    def rewind(self, meta: Mapping[str, Any]) -> int:
        """Cut the metrics back to the records that the checkpoint with this metadata had seen.

        Returns
        -------
        int
            How many of those are missing: 0 unless somebody changed the file.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        seen = int(meta[RECORDS])
        lines = self._lines()
        try:
            with suppress(FileNotFoundError):
                os.truncate(self.metrics, sum(map(len, lines[:seen])))
        except OSError as error:
            raise checkpoint.why_not(self.metrics, "writable", error) from error
        return max(0, seen - len(lines))

    def save_model(self, arrays: Mapping[str, Array | Pieces], meta: Mapping[str, Any]) -> None:
        """Replace the model, as ``save_checkpoint`` replaces the checkpoint."""
        checkpoint.write(self.model, arrays, {**meta, "kind": "model"})

    def plot(self, name: str) -> Path:
        """The path of ``plots/<name>.png``; makes the folder.

        Raises
        ------
        UserError
            If the folder cannot be made.
        """
        folder = self.path / "plots"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise checkpoint.why_not(folder, "a folder that can be made", error) from error
        return folder / f"{name}.png"

    def _lines(self) -> list[bytes]:
        """The whole lines of the metrics, each with its end."""
        try:
            return [line for line in self.metrics.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise checkpoint.why_not(self.metrics, "readable", error) from error


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: NumPy and CuPy become numbers and lists, NaN and infinity null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
