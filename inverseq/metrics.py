"""RUN/metrics.jsonl: one flat JSON object a row, of ``kind`` "step" or "epoch", and the same numbers in TensorBoard.

The epoch's row is written when its checkpoint is on the disk and does not count yet, so that it holds the checkpoint's
seconds and every complete checkpoint has its row. Answers to test prompts are drawn behind both: their seconds and peak
of memory, ``evaluation_…``, stand in the next epoch's row, and those of the last epoch in the log alone.

A row is on the disk when the call that wrote it returns. A number that is not finite is written as null, so that
every row is valid JSON. A resumed run drops the rows after its checkpoint first, a torn last line with them.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .atomic import atomic_file, json_line, naming_file
from .config import LoggingConfig

__all__ = ["MetricsLog", "metrics_path", "read_metrics"]


def metrics_path(run_dir: Path | str) -> Path:
    return Path(run_dir) / "metrics.jsonl"


def read_metrics(run_dir: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run in order, all or of one kind; an unfinished last line (a killed run's) is left out.

    Raises ValueError naming file and line of any other line that is not a row.
    """
    rows = [row for _, row in _parsed_lines(metrics_path(run_dir))]
    return rows if kind is None else [row for row in rows if row["kind"] == kind]


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases as configured."""

    def __init__(self, run_dir: Path | str, logging: LoggingConfig):
        if logging.wandb and find_spec("wandb") is None:
            raise ValueError("logging.wandb=True: the package wandb is not installed (pip install wandb)")
        self.path = metrics_path(run_dir)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.sinks = [_TensorBoard(self.path.parent)] if logging.tensorboard else []
        if logging.wandb:
            self.sinks.append(_Wandb(self.path.parent))
        self._descriptor: int | None = None

    def step(self, row: dict[str, Any]) -> None:
        """Append the row of one optimizer step; it has ``epoch`` and ``step``."""
        self._append("step", row, position=row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Append the row of one epoch; it has ``epoch``, which is 0 before training."""
        self._append("epoch", row, position=row["epoch"])

    def truncate_after(self, epoch: int) -> None:
        """Drop the rows of later epochs, at once or not at all; −1 drops all. Comes before the first row."""
        assert self._descriptor is None, "rows were appended before truncate_after"
        kept = [(line, row) for line, row in _parsed_lines(self.path) if row["epoch"] <= epoch]
        with atomic_file(self.path) as file:
            file.writelines(line for line, _ in kept)
        next_step = max((row["step"] for _, row in kept if row["kind"] == "step"), default=-1) + 1
        for sink in self.sinks:
            sink.resume(next_step=next_step, next_epoch=epoch + 1)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        while self.sinks:
            self.sinks.pop().close()

    def _append(self, kind: str, row: dict[str, Any], position: int) -> None:
        row = {"kind": kind, **{key: _plain_value(key, value) for key, value in row.items()}}
        self._append_line(json_line(row))
        scalars = {
            key: value for key, value in row.items() if isinstance(value, numbers.Real) and not isinstance(value, bool)
        }
        for sink in self.sinks:
            sink.add(kind, scalars, position)

    def _append_line(self, line: bytes) -> None:
        """Append the whole line and sync it; when that fails, the file is as it was before."""
        with naming_file(self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._descriptor).st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise


class _TensorBoard:
    """Two event folders, because step rows count optimizer steps and epoch rows count epochs."""

    def __init__(self, run_dir: Path):
        self.folders = {"step": run_dir / "tensorboard" / "steps", "epoch": run_dir / "tensorboard" / "epochs"}
        self.purge: dict[str, int | None] = {"step": None, "epoch": None}
        self.writers: dict[str, Any] = {}

    def resume(self, *, next_step: int, next_epoch: int) -> None:
        self.purge = {"step": next_step, "epoch": next_epoch}

    def add(self, kind: str, scalars: dict[str, float], position: int) -> None:
        if kind not in self.writers:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only wanted here

            self.writers[kind] = SummaryWriter(str(self.folders[kind]), purge_step=self.purge[kind])
        for key, value in scalars.items():
            self.writers[kind].add_scalar(f"{kind}/{key}", value, position)
        if kind == "epoch":
            for writer in self.writers.values():
                writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class _Wandb:
    """One W&B run per run directory, gone on with when the run is resumed (W&B keeps rows logged twice)."""

    def __init__(self, run_dir: Path):
        import wandb

        run_id = f"{zlib.crc32(os.fsencode(run_dir.absolute())):08x}"
        self.run = wandb.init(project="inverseq", name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow")
        for kind in ("step", "epoch"):
            self.run.define_metric(f"{kind}/*", step_metric=f"{kind}/{kind}")

    def resume(self, *, next_step: int, next_epoch: int) -> None:
        pass

    def add(self, kind: str, scalars: dict[str, float], position: int) -> None:
        self.run.log({f"{kind}/{key}": value for key, value in scalars.items()})

    def close(self) -> None:
        self.run.finish()


def _plain_value(key: str, value: Any) -> Any:
    """A JSON scalar; NumPy and 0-d tensor scalars become Python's, non-finite numbers None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"metric {key}={value!r}: expected a number or text; rows are flat")


def _parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, row) of every complete line of the file; none where there is no file."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            complete = row["kind"] in ("step", "epoch") and isinstance(row["epoch"], int)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise ValueError(f"{path}, line {number}: not a metrics row: {line[:80]!r}")
        parsed.append((line + b"\n", row))
    return parsed
