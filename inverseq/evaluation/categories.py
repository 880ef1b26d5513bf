"""``inverseq-eval categories``: win rates per category of prompts, as a table and a radar.

The models of verdict files are compared with one of them, the baseline; the radar shows each model's win rate against
it (ties half) over the categories, 14 of them for BeaverTails-Evaluation. A category's 50 prompts tell little more than
± 14 points: the table has the intervals.

    OUT/categories.json  OUT/categories.png and .csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .command import Outcome, write_outcome
from .pairwise import Match, combine_orders, read_verdicts, summarize
from .plots import draw_radar, save_plot
from .readers import CATEGORY_SETS, read_categories

__all__ = ["add_parser", "category_rates", "run"]


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "categories",
        help="win rates per category, as table and radar",
        description="Win rates of models against a baseline, per category of prompts.",
    )
    parser.add_argument("verdicts", nargs="+", metavar="F", help="verdicts.jsonl of judge or tournament")
    parser.add_argument(
        "--prompts", required=True, action="append", metavar="SOURCE", help="the test set, or a file of answers to it"
    )
    parser.add_argument("--baseline", metavar="MODEL", help="the model that the others are compared with (the last b)")
    parser.add_argument(
        "--set", choices=(*CATEGORY_SETS, "any"), default="beavertails", help="categories to expect (beavertails)"
    )
    parser.add_argument("--out", metavar="DIR", help="results (beside the first file)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (0)")
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Rates of the verdict files per category; ValueError for unknown categories, ids without one and models."""
    matches = combine_orders(read_verdicts(args.verdicts))
    known = CATEGORY_SETS.get(args.set)
    categories = read_categories(args.prompts, known)
    labels = known or {name: name.replace("_", " ") for name in dict.fromkeys(categories.values())}
    baseline = args.baseline or matches[-1].b
    rows = category_rates(matches, categories, labels, baseline, seed=args.seed)
    out = Path(args.out).expanduser() if args.out else Path(args.verdicts[0]).parent
    points = [
        {"series": row["model"], "category": row["label"], "value": row["win_rate"]["value"]}
        | {"low": row["win_rate"]["low"], "high": row["win_rate"]["high"], "num_matches": row["num_counted"]}
        for row in rows
        if row["win_rate"] is not None
    ]
    if not points:
        raise ValueError(f"{', '.join(map(str, args.verdicts))}: no match has a readable verdict")
    data = {"baseline": baseline, "rows": rows}
    files = [write_outcome(out / "categories.json", data)]
    files += save_plot(out / "categories.png", points, lambda figure, shown: draw_radar(figure, shown, baseline))
    return Outcome(data, describe(rows, baseline), files)


def category_rates(
    matches: Sequence[Match], categories: dict[str, str], labels: dict[str, str], baseline: str, *, seed: int = 0
) -> list[dict[str, Any]]:
    """A row per model and category, in the order of ``labels``: what ``summarize`` says of model against baseline.

    Matches between two other models do not count. Raises ValueError for a baseline that nobody met and for judged ids
    without a category.
    """
    against = [turned for match in matches if (turned := facing(match, baseline)) is not None]
    if not against:
        names = dict.fromkeys(name for match in matches for name in (match.a, match.b))
        raise ValueError(f"baseline {baseline!r}: expected one of the judged models, {', '.join(names)}")
    missing = [match.id for match in against if match.id not in categories]
    if missing:
        raise ValueError(f"{len(missing)} judged ids have no category in --prompts, for example {missing[0]!r}")
    rows = []
    for model in dict.fromkeys(match.a for match in against):
        for category, label in labels.items():
            chosen = [match for match in against if match.a == model and categories[match.id] == category]
            if chosen:
                summary = summarize(chosen, seed=seed)
                rows.append({"model": model, "category": category, "label": label, **summary})
    return rows


def facing(match: Match, baseline: str) -> Match | None:
    """The match with the baseline as its second model; None when it does not play."""
    from dataclasses import replace

    if match.b == baseline:
        return match
    if match.a != baseline:
        return None
    return replace(match, a=match.b, b=match.a, score=None if match.score is None else 1 - match.score)


def describe(rows: Sequence[dict[str, Any]], baseline: str) -> str:
    """The table for people."""
    width = max(len(row["label"]) for row in rows)
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"{model} against {baseline}", f"  {'category':<{width}}    win    tie   lose   win rate, ties half"]
        for row in (row for row in rows if row["model"] == model):
            if row["win_rate"] is None:
                lines.append(f"  {row['label']:<{width}}  no readable verdict")
                continue
            shares = "".join(f"{row[key]['value']:7.0%}" for key in ("win", "tie", "lose"))
            found = row["win_rate"]
            lines.append(
                f"  {row['label']:<{width}}{shares}   {found['value']:4.0%} [{found['low']:.0%}, {found['high']:.0%}] "
                f"of {row['num_counted']}"
            )
    return "\n".join(lines)
