"""``inverseq-eval tournament``: several models against each other, judged and rated.

Every two models meet on every prompt that both answered, or on a seeded random choice of such matches. All of it goes
through the judge of ``judge.py``: one cache, one budget, one verdicts.jsonl.

    OUT/verdicts.jsonl  OUT/tournament.json  OUT/win_rate.png and .csv (each pair)  and what ``elo`` writes
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from .command import Outcome, write_outcome
from .elo import add_elo_arguments, check_elo_settings, describe_ratings, save_ratings
from .judge import (
    Comparison,
    add_judge_arguments,
    bar_row,
    judge_comparisons,
    nothing_read,
    sample_pairs,
    save_verdicts,
    settings_of,
)
from .pairwise import combine_orders, summarize
from .plots import draw_bars, save_plot
from .readers import Responses, pair_up, read_responses
from .verdicts import load_judge_prompt

__all__ = ["add_parser", "draw_matches", "run"]


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "tournament",
        help="several models against each other",
        description="Judge every two of several models against each other and rate them.",
    )
    parser.add_argument("responses", nargs="+", metavar="F", help="files of answers, one a model, at least two")
    parser.add_argument("--matches", default="all", metavar="all|N", help="all matches, or N random ones (all)")
    parser.add_argument("--out", required=True, metavar="DIR", help="results")
    add_judge_arguments(parser)
    add_elo_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Judge the matches of the command line; write verdicts, rates of each pair, ratings and plots."""
    settings, template = settings_of(args), load_judge_prompt(args.judge_prompt)
    files = [read_responses(path, empty=args.empty) for path in args.responses]
    comparisons = draw_matches(files, args)
    check_anchor(args.anchor, files)
    check_elo_settings(args.k, args.num_orders, args.sigma)
    out = Path(args.out).expanduser()
    judged = judge_comparisons(comparisons, settings, template, args, out)
    save_verdicts(out, judged)
    matches = combine_orders(judged.verdicts)
    data: dict[str, Any] = {"judge": args.judge, "orders": args.orders, **judged.counts, "pairs": []}
    lengths = {(each.pair.id, each.a, each.b): each.length_difference for each in comparisons}
    for a, b in dict.fromkeys((match.a, match.b) for match in matches):
        played = [match for match in matches if (match.a, match.b) == (a, b)]
        differences = [lengths[match.id, a, b] for match in played]
        data["pairs"].append({"a": a, "b": b, **summarize(played, differences, seed=args.seed)})
    written = [out / "verdicts.jsonl"]
    bars = [bar_row(f"{pair['a']}\nagainst {pair['b']}", pair) for pair in data["pairs"] if pair["num_counted"]]
    text, problem = describe_pairs(data["pairs"]), ""
    if bars:
        written += save_plot(out / "win_rate.png", bars, draw_bars)
        try:
            ratings, paths = save_ratings(out, matches, args)
            data["elo"], written, text = ratings, written + paths, f"{text}\n{describe_ratings(ratings)}"
        except ValueError as error:  # the verdicts are there, and the user can judge more
            problem = str(error)
    problem = judged.problem or nothing_read(judged, written[0]) or problem
    written.append(write_outcome(out / "tournament.json", data))
    return Outcome(data, text, written, problem)


def check_anchor(anchor: str | None, files: Sequence[Responses]) -> None:
    names = [file.model for file in files]
    if anchor is not None and anchor not in names:
        raise ValueError(f"--anchor {anchor}: expected one of {', '.join(names)}")


def draw_matches(files: Sequence[Responses], args: argparse.Namespace) -> list[Comparison]:
    """All matches of the tournament, or a seeded random ``--matches`` of them, spread evenly over pairs of models.

    With ``--max-requests`` and random matches no more are drawn than both orders of each fit into the budget. Raises
    ValueError for fewer than two models, files that do not pair up, and a number that is not positive.
    """
    if len(files) < 2:
        raise ValueError("tournament: expected at least two files of answers")
    common = args.common or args.empty == "drop"
    by_pair = [
        [
            Comparison(pair, a.model, b.model)
            for pair in sample_pairs(pair_up(a, b, common=common), args.limit, args.seed)
        ]
        for a, b in combinations(files, 2)
    ]
    if args.matches == "all":
        return [comparison for comparisons in by_pair for comparison in comparisons]
    if not args.matches.isdecimal() or int(args.matches) < 1:
        raise ValueError(f"--matches {args.matches}: expected all or a positive number")
    wanted = int(args.matches)
    if args.max_requests is not None:
        wanted = min(wanted, args.max_requests // (2 if args.orders == "both" else 1))
    rng = random.Random(args.seed)
    for comparisons in by_pair:
        rng.shuffle(comparisons)
    rng.shuffle(by_pair)
    rounds = max(map(len, by_pair))
    drawn = [comparisons[turn] for turn in range(rounds) for comparisons in by_pair if turn < len(comparisons)]
    if not drawn[:wanted]:
        raise ValueError(f"--max-requests {args.max_requests}: too few for one match")
    return drawn[:wanted]


def describe_pairs(pairs: Sequence[dict[str, Any]]) -> str:
    width = max(len(f"{pair['a']} : {pair['b']}") for pair in pairs)
    lines = [f"  {'pair':<{width}}     win    tie   lose   at equal length   flips   matches"]
    for pair in pairs:
        shown = [pair[key]["value"] if pair[key] else None for key in ("win", "tie", "lose")]
        equal, flips = pair["length_controlled_win_rate"], pair["flip_rate"]
        cells = "".join("      –" if value is None else f"{value:7.1%}" for value in shown)
        cells += f"{'–' if equal is None else format(equal['value'], '.1%'):>18}"
        cells += f"{'–' if flips is None else format(flips['value'], '.1%'):>8}"
        lines.append(f"  {pair['a'] + ' : ' + pair['b']:<{width}} {cells}{pair['num_counted']:10d}")
    return "\n".join(lines)
