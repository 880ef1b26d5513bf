"""Plots with their data beside them: every PNG has a CSV of the same name, and the picture is drawn from its rows.

Bars of win, tie and lose; ratings with their intervals; a radar of categories; curves with a band. Drawn by matplotlib
without a display; colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file
from .command import require_package
from .page import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "Row", "draw_bars", "draw_curves", "draw_radar", "draw_ratings", "save_plot", "write_csv"]

Row = dict[str, Any]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
WIN, TIE, LOSE = "#0072B2", "#C8C8C8", "#D55E00"
MAX_FILLED = 2  # series of a radar whose area is tinted
LABEL_WIDTH = 22  # characters of a line of a radar's label
STYLES = ("-", "--", ":", "-.")
DPI = 150


def write_csv(path: Path | str, rows: Sequence[Row]) -> Path:
    """Write rows of equal keys as CSV with a header, whole or not at all; ValueError for rows that differ in keys."""
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    keys = list(rows[0])
    for row in rows:
        if list(row) != keys:
            raise ValueError(f"{path}: a row has the columns {list(row)}, the first one {keys}")
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    return Path(path)


def save_plot(path: Path | str, rows: Sequence[Row], draw: Callable[[Figure, Sequence[Row]], None]) -> list[Path]:
    """Write ``rows`` to PATH.csv, then ``draw(figure, rows)`` to PATH (a .png); returns both paths.

    In the picture, characters of a name that reorder or hide its text are written by their code points. Raises
    ValueError for a path of another ending, for no rows or rows that differ in keys, and without matplotlib.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"plot {str(path)!r}: expected a name that ends with .png")
    figure = require_package("matplotlib.figure").Figure(layout="constrained")
    written = write_csv(path.with_suffix(".csv"), rows)
    with require_package("matplotlib").rc_context({"text.parse_math": False}):  # names may hold dollars
        draw(figure, [{key: visible(it) if isinstance(it, str) else it for key, it in row.items()} for row in rows])
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    return [path, written]


def draw_bars(figure: Figure, rows: Sequence[Row]) -> None:
    """Stacked bars of rows {label, win, tie, lose, win_low, win_high, lose_low, lose_high}, fractions of one."""
    figure.set_size_inches(8, 1.4 + 0.55 * len(rows))
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        left = 0.0
        for key, color, text_color in (("win", WIN, "white"), ("tie", TIE, "black"), ("lose", LOSE, "white")):
            label = key if position == 0 else None
            axes.barh(position, row[key], left=left, color=color, height=0.62, label=label)
            if row[key] >= 0.06:
                where = left + row[key] / 2
                axes.text(where, position, f"{row[key]:.0%}", ha="center", va="center", color=text_color, fontsize=9)
            left += row[key]
        # The interval of win above the middle, that of lose (counted from the right) below it: they may overlap.
        for at, low, high, height in (
            (row["win"], row["win_low"], row["win_high"], -0.2),
            (1 - row["lose"], 1 - row["lose_high"], 1 - row["lose_low"], 0.2),
        ):
            error = [[max(at - low, 0.0)], [max(high - at, 0.0)]]
            axes.errorbar(at, position + height, xerr=error, color="black", capsize=2.5, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction of prompts, with 95 % intervals of win and lose")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def draw_radar(figure: Figure, rows: Sequence[Row], baseline: str = "") -> None:
    """A polygon per series of rows {series, category, value}, values from 0 to 1; the ring at one half is a draw."""
    import math

    categories = list(dict.fromkeys(row["category"] for row in rows))
    angles = [2 * math.pi * index / len(categories) for index in range(len(categories))]
    figure.set_size_inches(9, 8)
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    circle = [2 * math.pi * step / 180 for step in range(181)]
    axes.plot(circle, [0.5] * len(circle), color="black", linewidth=1, linestyle=":", label=baseline or None)
    num_series = len({row["series"] for row in rows})
    for index, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
        found = {row["category"]: row["value"] for row in rows if row["series"] == series}
        values = [found.get(category, math.nan) for category in categories]
        color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], style, color=color, marker="o", markersize=3.5, label=series
        )
        if len(found) == len(categories) and num_series <= MAX_FILLED:
            axes.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.08)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["25 %", "50 %", "75 %", "100 %"], fontsize=8, color="#444444")
    axes.set_rlabel_position(math.degrees(angles[1]) / 2 if len(angles) > 1 else 0)
    axes.set_xticks(angles, ["\n".join(textwrap.wrap(category, LABEL_WIDTH)) for category in categories], fontsize=9)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):
        side, height = math.sin(angle), math.cos(angle)  # clockwise from the top
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        label.set_verticalalignment("center" if abs(height) < 0.5 else "bottom" if height > 0 else "top")
    axes.tick_params(axis="x", pad=4)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)


def draw_ratings(figure: Figure, rows: Sequence[Row], x_label: str) -> None:
    """Points with error bars of rows {model, rating, low, high}; a bound that is None is not drawn."""
    figure.set_size_inches(8, 1.2 + 0.4 * len(rows))
    axes = figure.add_subplot()
    for position, row in enumerate(rows):
        error = [[0.0 if row[end] is None else abs(row["rating"] - row[end])] for end in ("low", "high")]
        axes.errorbar(row["rating"], position, xerr=error, fmt="o", color=COLORS[0], capsize=4)
        axes.annotate(
            f"{row['rating']:.0f}", (row["rating"], position), (0, 7), textcoords="offset points", ha="center"
        )
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel(f"{x_label}, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(x: str, y: str, *, x_label: str = "", y_label: str = "") -> Callable[[Figure, Sequence[Row]], None]:
    """A drawing function of lines: rows {series, x, y} with, where they have them, a band from y_low to y_high."""

    def draw(figure: Figure, rows: Sequence[Row]) -> None:
        figure.set_size_inches(8, 4.8)
        axes = figure.add_subplot()
        for index, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
            points = [row for row in rows if row["series"] == series and row[y] is not None]
            at = [row[x] for row in points]
            color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
            marker = "o" if len(points) <= 30 else None
            axes.plot(at, [row[y] for row in points], style, color=color, marker=marker, markersize=4, label=series)
            if points and f"{y}_low" in points[0]:
                low, high = ([row[f"{y}_{end}"] for row in points] for end in ("low", "high"))
                axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label or x)
        axes.set_ylabel(y_label or y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len({row["series"] for row in rows}) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

    return draw
