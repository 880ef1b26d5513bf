"""What a person sees while a run goes on: a bar per phase, and a table of the epochs at its end.

On a terminal a phase is a live bar with its rate; elsewhere it is one plain line when it ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as LiveBars
from rich.table import Table

from .metrics import metrics_path, read_metrics

__all__ = ["Progress", "epoch_table"]

# (heading, metrics key, format), in the order of the table
COLUMNS = (
    ("epoch", "epoch", "d"),
    ("held-out\n(log ratio)²", "held_out/mean_squared_log_ratio", ".4f"),
    ("loss", "loss", ".4f"),
    ("rms\nlog ratio", "rms_log_ratio", ".3f"),
    ("KL to\nplain", "kl_to_plain", ".4f"),
    ("KL to\ninitial", "kl_to_initial", ".4f"),
    ("response\ntokens", "response_length", ".1f"),
    ("ended\nby EOS", "eos_rate", ".0%"),
    ("sample\ns", "sample_duration_s", ".1f"),
    ("score\ns", "score_duration_s", ".1f"),
    ("train\ns", "train_duration_s", ".1f"),
    ("train\ntokens/s", "train_tokens_per_second", ",.0f"),
)
LEFT_OUT_FIRST = (  # on a terminal that is too narrow for the table, headings in this order
    *("train\ntokens/s", "score\ns", "sample\ns", "train\ns", "ended\nby EOS", "response\ntokens", "rms\nlog ratio"),
    *("KL to\ninitial", "KL to\nplain", "loss"),
)
UNLIMITED_WIDTH = 1000  # of output that is no terminal: as wide as the table is


class Progress:
    """Bars on a terminal's standard error, plain lines elsewhere; the table goes to standard output."""

    def __init__(self, *, shown: bool = True):
        """Nothing is shown with ``shown=False``, by ranks other than the first."""
        self.shown = shown
        self.bars = Console(stderr=True)

    @contextmanager
    def phase(self, title: str, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one phase over ``total`` samples; yields the function that says how many more are done."""
        started = time.perf_counter()
        done = 0
        label = title if title == name else f"{title} {name}"
        if self.shown and self.bars.is_terminal:
            label_column, rate_column = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
            columns = (label_column, BarColumn(), MofNCompleteColumn(), rate_column)
            with LiveBars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.bars) as live:
                task = live.add_task(label, total=total, rate="")

                def advance(count: int = 1) -> None:
                    nonlocal done
                    done += count
                    live.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):.1f}/s")

                yield advance
            return

        def count_up(count: int = 1) -> None:
            nonlocal done
            done += count

        yield count_up
        duration_s = time.perf_counter() - started
        line = f"{label}: {total} samples in {duration_s:.1f} s ({total / duration_s:.1f}/s)\n"
        if self.shown:
            sys.stderr.write(line)  # one write, between the lines of other processes
            sys.stderr.flush()

    def summary(self, run_dir: Path | str) -> None:
        """Print the table of the run's epochs and where the run is."""
        if not self.shown:
            return
        console = Console()
        if not console.is_terminal:
            console = Console(width=UNLIMITED_WIDTH)
        table, left_out = fitting_table(read_metrics(run_dir, "epoch"), console.width)
        console.print(table)
        if left_out:
            names = ", ".join(heading.replace("\n", " ") for heading in left_out)
            print(f"too wide for {console.width} columns, in {metrics_path(run_dir)}: {names}")
        print(f"run directory: {run_dir}", flush=True)


def fitting_table(rows: list[dict[str, Any]], width: int) -> tuple[Table, list[str]]:
    """The table of so many columns of text at most, and the headings that had to go for it: no number is cut."""
    ruler, shown = Console(width=UNLIMITED_WIDTH), {column.header for column in epoch_table(rows).columns}
    droppable = [heading for heading in LEFT_OUT_FIRST if heading in shown]
    for count in range(len(droppable) + 1):
        table = epoch_table(rows, droppable[:count])
        if ruler.measure(table).maximum <= width:
            break
    return table, droppable[:count]


def epoch_table(rows: list[dict[str, Any]], left_out: Sequence[str] = ()) -> Table:
    """One line per epoch row; a metric that a row lacks is shown as –, a column that no row has is left out."""
    columns = [column for column in COLUMNS if column[0] not in left_out]
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    table = Table(*(heading for heading, _, _ in columns), box=SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*("–" if row.get(key) is None else format(row[key], spec) for _, key, spec in columns))
    return table
