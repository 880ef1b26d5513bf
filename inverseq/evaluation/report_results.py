"""The results of ``inverseq-eval`` as sections of the report, each from the JSON document that its command wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .page import escape, figure_svg, table
from .plots import draw_curves

__all__ = ["results_sections"]


def results_sections(paths: Sequence[Path]) -> Iterator[str]:
    """A section per result; ValueError naming a file that is none."""
    yield "<h2>Evaluation</h2>"
    if not paths:
        yield '<p class="note">No results: inverseq-eval writes them into RUN/evaluation.</p>'
    for path in paths:
        yield result_section(path)


def result_section(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["kind"]
        section = SECTIONS[kind](content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no result of inverseq-eval: {type(error).__name__} {error}") from error
    return f"<h3>{escape(TITLES[kind])}</h3>{section}"


def rewards_section(content: dict[str, Any]) -> str:
    rows = content["rows"]
    keys = ("series", "epoch", "reward", "increment", "increment_low", "increment_high")
    label = "standard deviations across epochs"
    caption = f"Reward by {content['reward_model']}: increment over epoch 0, with 95 % intervals"
    return curves(rows, "epoch", "increment", label, caption) + table(keys, ([row[k] for k in keys] for row in rows))


def sweep_section(content: dict[str, Any]) -> str:
    rows = content["rows"]
    keys = [key for key in rows[0] if key != "series"]
    y = "mean_w_minus_l" if content["mode"] == "runs" else "mean_target_gain"
    parts = [curves(rows, "alpha", y, "nats a token", f"{y} against α")]
    if any(row.get("win_minus_lose") is not None for row in rows):
        parts.append(curves(rows, "alpha", "win_minus_lose", "win − lose", "win − lose against α"))
    return "".join(parts) + table(keys, ([row[k] for k in keys] for row in rows))


def curves(rows: Sequence[dict[str, Any]], x: str, y: str, label: str, caption: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # a run's name may hold dollars
        figure = Figure()
        draw_curves(x, y, y_label=label)(figure, rows)
        return figure_svg(figure, caption)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"rewards": rewards_section, "sweep": sweep_section}
TITLES = {"rewards": "Reward model", "sweep": "Contrast strength"}
