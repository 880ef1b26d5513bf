"""What ``inverseq-eval`` found, as sections of the report: every plot with the numbers that it is drawn from.

Each command writes PATH.png with its data in PATH.csv; both are shown, whatever command wrote them.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from .page import escape, table

__all__ = ["find_results", "plots_below", "results_sections"]

MAX_ROWS = 200
TITLES = {
    "win_rate": "Win rates by the judge",
    "elo_ratings": "Bradley–Terry ratings",
    "elo_online": "Online Elo",
    "categories": "Win rates by category",
    "rewards": "Reward model",
    "sweep": "Contrast strength α",
    "sweep_win_minus_lose": "Win − lose against α",
}


def find_results(folders: Sequence[Path]) -> list[Path]:
    """Plots with their data below folders; ValueError for a folder that does not exist or holds none."""
    found = []
    for folder in folders:
        plots = plots_below(folder)
        if not plots:
            raise ValueError(f"{folder}: holds no result of inverseq-eval (a plot with its .csv)")
        found += plots
    return found


def plots_below(folder: Path) -> list[Path]:
    """Plots with their data in a folder and those inside; none where there is no such folder."""
    return [path for path in sorted(folder.rglob("*.png")) if path.with_suffix(".csv").is_file()]


def results_sections(plots: Sequence[Path]) -> Iterator[str]:
    """A section per plot."""
    yield "<h2>Evaluation</h2>"
    if not plots:
        yield '<p class="note">No results: inverseq-eval writes them into RUN/evaluation.</p>'
    for path in plots:
        title = TITLES.get(path.stem, path.stem.replace("_", " "))
        if path.parent.name != "evaluation":
            title = f"{title}: {path.parent.name}"
        image = base64.b64encode(path.read_bytes()).decode()
        yield (
            f"<h3>{escape(title)}</h3>"
            f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{image}"></figure>'
            f"<details><summary>{escape(path.with_suffix('.csv').name)}</summary>{csv_table(path.with_suffix('.csv'))}"
            "</details>"
        )


def csv_table(path: Path) -> str:
    """The rows of a CSV as a table; of a long one the first ones."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            heading, *rows = csv.reader(file)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path}: is no table: {error}") from error
    shown = [[as_number(cell) for cell in row] for row in rows[:MAX_ROWS]]
    rest = f'<p class="note">{len(rows) - MAX_ROWS:,} more rows.</p>' if len(rows) > MAX_ROWS else ""
    return table(heading, shown) + rest


def as_number(cell: str) -> str | float:
    """The float that a cell writes, else its text; whole numbers stay as they are written."""
    try:
        return float(cell) if "." in cell else cell
    except ValueError:
        return cell
