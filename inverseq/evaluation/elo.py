"""``inverseq-eval elo``: ratings of several models from verdict files.

Bradley–Terry ratings with intervals are the result; online Elo is what papers plot. Online Elo depends on the order of
the matches, so it is averaged over many seeded orders; its curve is that mean, smoothed by a Gaussian of σ matches.
Both are anchored: the anchor keeps its rating, at every point of the curve.

    OUT/elo.json         both ratings of each model
    OUT/elo_ratings.png  Bradley–Terry ratings with their intervals, with elo_ratings.csv beside it
    OUT/elo_online.png   the mean online ratings after each match, with elo_online.csv beside it
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bradley_terry import Rating, rate
from .command import Outcome, require_package, write_outcome
from .pairwise import Match, combine_orders, read_verdicts
from .plots import draw_curves, draw_ratings, save_plot

__all__ = ["EloCurves", "add_parser", "describe_ratings", "online_elo", "run", "save_ratings"]

ANCHOR_RATING = 1000.0
K_FACTOR = 16.0
NUM_ORDERS = 200
SIGMA = 10.0
MAX_POINTS = 500  # of a curve in the plot
DECADE = 400.0  # rating points of ten-to-one odds


@dataclass(frozen=True, slots=True)
class EloCurves:
    """Online Elo after each match, relative to the anchor's rating."""

    models: tuple[str, ...]
    mean: np.ndarray  # [G + 1, M] over orders; row 0 is before the first match
    spread: np.ndarray  # [M] standard deviation of the final ratings over orders
    smooth: np.ndarray  # [G + 1, M] the mean, smoothed


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "elo",
        help="ratings of several models from verdict files",
        description="Rate models from verdict files of judge or tournament: Bradley–Terry, and online Elo's curve.",
    )
    parser.add_argument("verdicts", nargs="+", metavar="F", help="verdicts.jsonl of judge or tournament")
    add_elo_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of online Elo's orders (0)")
    parser.add_argument("--out", metavar="DIR", help="results (beside the first file)")
    return parser


def add_elo_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of everything that rates models."""
    parser.add_argument("--anchor", metavar="MODEL", help="the model whose rating is fixed (the first judged)")
    parser.add_argument("--anchor-rating", type=float, default=ANCHOR_RATING, help="its rating (1000)")
    parser.add_argument("--prior", type=float, default=0.0, metavar="N", help="virtual ties between all models (0)")
    parser.add_argument("--k", type=float, default=K_FACTOR, help="online Elo's step (16)")
    parser.add_argument("--num-orders", type=int, default=NUM_ORDERS, help="orders that are averaged (200)")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="σ of the curve's Gaussian, in matches (10)")


def check_elo_settings(k: float, num_orders: int, sigma: float) -> None:
    """Raise ValueError for numbers that online Elo cannot use."""
    if not (k > 0 and num_orders > 0 and sigma >= 0 and math.isfinite(k) and math.isfinite(sigma)):
        raise ValueError(f"k={k}, num_orders={num_orders}, sigma={sigma}: expected positive numbers (sigma may be 0)")


def run(args: argparse.Namespace) -> Outcome:
    """Rate the models of the verdict files; write ratings and curve."""
    matches = combine_orders(read_verdicts(args.verdicts))
    out = Path(args.out).expanduser() if args.out else Path(args.verdicts[0]).parent
    data, files = save_ratings(out, matches, args)
    return Outcome(data, describe_ratings(data), files)


def save_ratings(out: Path, matches: Sequence[Match], args: argparse.Namespace) -> tuple[dict[str, Any], list[Path]]:
    """Both ratings as plain JSON, and the files they were written to; ValueError as ``rate`` raises it."""
    anchor = args.anchor or next((match.a for match in matches if match.score is not None), "")
    ratings = rate(matches, anchor=anchor, anchor_rating=args.anchor_rating, prior=args.prior)
    curves = online_elo(
        matches,
        anchor=anchor,
        anchor_rating=args.anchor_rating,
        k=args.k,
        num_orders=args.num_orders,
        sigma=args.sigma,
        seed=args.seed,
    )
    data = ratings_data(ratings, curves, anchor, matches)
    rows = curve_rows(curves, [rating.model for rating in ratings])
    scale = f"{anchor} = {args.anchor_rating:g}"
    draw = draw_curves("match", "rating", x_label="matches", y_label=f"online Elo, {scale}")
    files = [write_outcome(out / "elo.json", data)]
    points = [{"model": row["model"], "rating": row["bradley_terry"], **row} for row in data["ratings"]]
    files += save_plot(
        out / "elo_ratings.png", points, lambda figure, shown: draw_ratings(figure, shown, f"Bradley–Terry, {scale}")
    )
    return data, files + save_plot(out / "elo_online.png", rows, draw)


def ratings_data(ratings: Sequence[Rating], curves: EloCurves, anchor: str, matches: Sequence[Match]) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    final = dict(zip(curves.models, zip(curves.mean[-1], curves.spread, strict=True), strict=True))
    return {
        "anchor": anchor,
        "num_matches": sum(match.score is not None for match in matches),
        "num_unreadable": sum(match.score is None for match in matches),
        "ratings": [
            {
                "model": each.model,
                "bradley_terry": each.rating,
                "low": finite(each.low),
                "high": finite(each.high),
                "online_elo": float(final[each.model][0]),
                "online_elo_spread": float(final[each.model][1]),
                "num_matches": each.num_matches,
            }
            for each in ratings
        ],
    }


def online_elo(
    matches: Sequence[Match],
    *,
    anchor: str,
    anchor_rating: float = ANCHOR_RATING,
    k: float = K_FACTOR,
    num_orders: int = NUM_ORDERS,
    sigma: float = SIGMA,
    seed: int = 0,
) -> EloCurves:
    """Online Elo of all models, averaged over seeded orders of the matches that could be read.

    After a match in which i scored s against j: r_i += k (s − 1 / (1 + 10^((r_j − r_i) / 400))), and j loses as much.
    Raises ValueError for an unknown anchor and for k, num_orders or sigma that are not positive (sigma may be 0).
    """
    check_elo_settings(k, num_orders, sigma)
    counted = [match for match in matches if match.score is not None]
    models = tuple(dict.fromkeys(name for match in counted for name in (match.a, match.b)))
    if anchor not in models:
        raise ValueError(f"anchor {anchor!r}: expected one of the models {', '.join(models) or '(none was judged)'}")
    pairs = np.array([(models.index(match.a), models.index(match.b)) for match in counted])
    scores = np.array([match.score for match in counted])
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(counted)) for _ in range(num_orders)])  # [R, G]
    ratings = np.zeros((num_orders, len(models)))
    mean = np.zeros((len(counted) + 1, len(models)))
    rows, base = np.arange(num_orders), models.index(anchor)
    for game in range(len(counted)):
        first, second = pairs[orders[:, game]].T
        expected = 1 / (1 + 10 ** ((ratings[rows, second] - ratings[rows, first]) / DECADE))
        change = k * (scores[orders[:, game]] - expected)
        ratings[rows, first] += change
        ratings[rows, second] -= change
        mean[game + 1] = (ratings - ratings[:, [base]]).mean(0)
    final = ratings - ratings[:, [base]]
    smooth = mean
    if sigma:
        smooth = require_package("scipy.ndimage").gaussian_filter1d(mean, sigma, axis=0, mode="nearest")
    return EloCurves(models, anchor_rating + mean, final.std(0), anchor_rating + smooth)


def curve_rows(curves: EloCurves, models: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the plot, the given models in order; at most MAX_POINTS a model."""
    last = len(curves.smooth) - 1
    games = np.unique(np.linspace(0, last, min(last + 1, MAX_POINTS)).round().astype(int))
    return [
        {
            "series": model,
            "match": int(game),
            "rating": float(curves.smooth[game, curves.models.index(model)]),
            "unsmoothed": float(curves.mean[game, curves.models.index(model)]),
        }
        for model in models
        for game in games
    ]


def describe_ratings(data: dict[str, Any]) -> str:
    """The table for people, best model first."""
    width = max(len(row["model"]) for row in data["ratings"])
    lines = [f"  {'model':<{width}}  Bradley–Terry   95 % interval   online Elo   matches"]
    for row in data["ratings"]:
        fixed = row["model"] == data["anchor"]
        bounds = "(anchor)" if fixed else "–" if row["low"] is None else f"[{row['low']:.0f}, {row['high']:.0f}]"
        lines.append(
            f"  {row['model']:<{width}}  {row['bradley_terry']:13.0f}  {bounds:>14}   "
            f"{row['online_elo']:10.0f}   {row['num_matches']:7d}"
        )
    lines.append(f"  {data['num_matches']} matches counted, {data['num_unreadable']} without a readable verdict")
    return "\n".join(lines)
