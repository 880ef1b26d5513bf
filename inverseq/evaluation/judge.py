"""``inverseq-eval judge``: pairwise verdicts of a judge on two models' answers, and what they add up to.

    OUT/verdicts.jsonl   rows {id, a, b, order, raw, verdict, judge}; the verdict names the model, not the position
    OUT/summary.json     win, tie, lose with intervals, flips, lengths; what could not be read or asked
    OUT/win_rate.png     with its data in win_rate.csv

Every answer of the judge is kept in a cache file, so that nothing is asked twice. Answers cut off at the judge's length
limit and refusals are no verdicts; they are counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import write_json, write_jsonl
from .command import Outcome
from .judge_client import AnswerCache, Answers, JudgeSettings, ask_all, question_key
from .pairwise import Verdict, combine_orders, read_verdicts, summarize
from .plots import draw_bars, save_plot
from .readers import Pair, pair_up, read_responses
from .verdicts import load_judge_prompt, parse_verdict, render_comparison

__all__ = [
    "Comparison",
    "Judged",
    "add_judge_arguments",
    "add_parser",
    "judge_comparisons",
    "nothing_read",
    "run",
    "save_verdicts",
]

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # of English; for the estimate only
EQUAL = "(not asked: the answers are equal)"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models' answers to one prompt, to be judged."""

    pair: Pair
    a: str
    b: str

    @property
    def length_difference(self) -> int:
        """Characters of a's answer minus b's."""
        return len(self.pair.response_a) - len(self.pair.response_b)


@dataclass
class Judged:
    """Verdicts so far, in the order of the comparisons, and what stands in the way of the others."""

    verdicts: list[Verdict] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problem: str = ""


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of everything that asks a judge."""
    parser.add_argument("--judge", required=True, metavar="MODEL", help="the judge, for example gpt-4-turbo")
    parser.add_argument("--base-url", metavar="URL", help="an OpenAI-compatible server (OPENAI_BASE_URL, else OpenAI)")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--orders", choices=("both", "random"), default="both", help="positions of the answers (both)")
    parser.add_argument("--judge-prompt", default="pairwise", metavar="FILE", help="a prompt of yours")
    parser.add_argument(
        "--request",
        default="{}",
        metavar="JSON",
        help="further fields of a request; null removes one (temperature 0, max_tokens 1024)",
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for an answer (120)")
    parser.add_argument("--retries", type=int, default=6, help="repetitions of a request that failed (6)")
    parser.add_argument("--max-requests", type=int, metavar="N", help="budget: never send more, repetitions included")
    parser.add_argument("--yes", action="store_true", help="start without asking")
    parser.add_argument("--empty", choices=("error", "drop", "keep"), default="error", help="empty answers (error)")
    parser.add_argument("--common", action="store_true", help="judge the ids that the files share")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="a random N of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="of random orders, --limit and intervals (0)")
    parser.add_argument("--cache", metavar="FILE", help="the judge's answers (judge_cache.jsonl beside the results)")


def settings_of(args: argparse.Namespace) -> JudgeSettings:
    """The judge of the command line; ValueError for a request that is no JSON object and for numbers out of range."""
    try:
        request = json.loads(args.request)
    except ValueError as error:
        raise ValueError(f"--request {args.request}: is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError(f"--request {args.request}: expected a JSON object")
    return JudgeSettings(
        model=args.judge,
        base_url=args.base_url,
        key_env=args.key_env,
        request={"temperature": 0, "max_tokens": 1024} | request,
        concurrency=args.concurrency,
        timeout_s=args.timeout,
        retries=args.retries,
        max_requests=args.max_requests,
    )


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "judge",
        help="pairwise verdicts of a judge on two files of answers",
        description="Ask a judge which of two models answers better; an interrupted run goes on where it stopped.",
    )
    parser.add_argument("--a", required=True, metavar="F1", help="answers of the model that wins are counted for")
    parser.add_argument("--b", required=True, metavar="F2", help="answers of the other model")
    parser.add_argument("--out", metavar="DIR", help="results (F1-vs-F2 beside F1)")
    add_judge_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Judge the two files of the command line and write verdicts, summary and bar chart."""
    settings, template = settings_of(args), load_judge_prompt(args.judge_prompt)
    a, b = (read_responses(path, empty=args.empty) for path in (args.a, args.b))
    common = args.common or args.empty == "drop"
    pairs = sample_pairs(pair_up(a, b, common=common), args.limit, args.seed)
    out = Path(args.out).expanduser() if args.out else a.path.parent / f"{a.path.stem}-vs-{b.path.stem}"
    comparisons = [Comparison(pair, a.model, b.model) for pair in pairs]
    judged = judge_comparisons(comparisons, settings, template, args, out)
    save_verdicts(out, judged)
    matches = combine_orders(judged.verdicts)
    lengths = {comparison.pair.id: comparison.length_difference for comparison in comparisons}
    summary = {"a": a.model, "b": b.model, "judge": args.judge, "orders": args.orders, **judged.counts}
    summary |= summarize(matches, [lengths[match.id] for match in matches], seed=args.seed)
    files = [out / "verdicts.jsonl", out / "summary.json"]
    write_json(files[1], summary)
    if summary["num_counted"]:
        files += save_plot(out / "win_rate.png", [bar_row(f"{a.model}\nagainst {b.model}", summary)], draw_bars)
    return Outcome(summary, describe(summary), files, judged.problem or nothing_read(judged, files[0]))


def sample_pairs(pairs: list[Pair], limit: int, seed: int) -> list[Pair]:
    """All pairs, or a seeded random ``limit`` of them in their order."""
    if limit < 0:
        raise ValueError(f"--limit {limit}: expected 0 (all) or more")
    if not limit or limit >= len(pairs):
        return pairs
    chosen = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed} {pair.id}".encode()).digest())[:limit]
    kept = {pair.id for pair in chosen}
    return [pair for pair in pairs if pair.id in kept]


def orders_of(comparison: Comparison, orders: str, seed: int) -> tuple[str, ...]:
    """Both orders, or one that depends on seed, id and models alone, so that a repeated run asks the same."""
    if orders == "both":
        return ("ab", "ba")
    text = "\0".join((str(seed), comparison.pair.id, comparison.a, comparison.b))
    return ("ba",) if hashlib.sha256(text.encode()).digest()[0] % 2 else ("ab",)


def judge_comparisons(
    comparisons: Sequence[Comparison], settings: JudgeSettings, template: str, args: argparse.Namespace, out: Path
) -> Judged:
    """Verdicts on all comparisons, from the cache or the judge; whatever goes wrong, those that there are come back.

    Raises ValueError, before anything is asked, when more requests are needed than ``--max-requests`` allows, without
    a key, and when nobody confirms.
    """
    check_same_verdicts(out, comparisons, settings.model)
    planned: dict[str, str] = {}  # key: text; equal questions are asked once
    asked: list[tuple[Comparison, dict[str, str | None]]] = []  # a comparison's keys by order; None: not asked
    for comparison in comparisons:
        equal = comparison.pair.response_a == comparison.pair.response_b
        keys: dict[str, str | None] = {}
        for order in orders_of(comparison, args.orders, args.seed):
            text = render_comparison(template, comparison.pair, order)
            keys[order] = None if equal else question_key(settings, text)
            if not equal:
                planned[keys[order]] = text
        asked.append((comparison, keys))
    cache = AnswerCache(Path(args.cache).expanduser() if args.cache else out.parent / "judge_cache.jsonl")
    confirm([text for key, text in planned.items() if key not in cache.replies], len(planned), settings, args.yes)
    answers = ask_with_progress(planned, settings, cache)
    judged = Judged(counts=count([key for _, keys in asked for key in keys.values()], answers))
    for comparison, keys in asked:
        # A comparison of which one order has no answer yet is left out: its other half would be biased by position.
        if all(key is None or key in answers.replies for key in keys.values()):
            judged.verdicts += [verdict_of(comparison, order, answers, key, settings) for order, key in keys.items()]
    judged.problem = problem_of(answers, len(planned))
    return judged


def verdict_of(
    comparison: Comparison, order: str, answers: Answers, key: str | None, settings: JudgeSettings
) -> Verdict:
    """The row of one comparison in one order. The verdict as shown, "a" for the first answer, becomes a model's."""
    raw, shown = EQUAL, "tie"
    if key is not None:
        reply = answers.replies[key]
        raw, shown = reply.raw, None
        if not reply.refused and reply.finish_reason != "length":
            shown = parse_verdict(raw, (comparison.pair.response_a, comparison.pair.response_b))
    verdict = shown if shown in ("tie", None) else order["ab".index(shown)]
    return Verdict(comparison.pair.id, comparison.a, comparison.b, order, raw, verdict, settings.model)


def check_same_verdicts(out: Path, comparisons: Sequence[Comparison], judge: str) -> None:
    """Raise ValueError when the folder holds verdicts of another judge or on other models."""
    path = out / "verdicts.jsonl"
    if not path.exists():
        return
    models = {model for comparison in comparisons for model in (comparison.a, comparison.b)}
    for verdict in read_verdicts([path]):
        if verdict.judge != judge or not {verdict.a, verdict.b} <= models:
            raise ValueError(
                f"{path}: holds verdicts of {verdict.judge} on {verdict.a} and {verdict.b}; choose another --out"
            )


def confirm(texts: Sequence[str], num_planned: int, settings: JudgeSettings, yes: bool) -> None:
    """Say what asking will cost, and go on when the user agrees; ValueError when it is too much or nobody does."""
    if not texts:
        return
    settings.check_key()
    written = settings.request.get("max_tokens") or settings.request.get("max_completion_tokens")
    estimate = (
        f"{len(texts)} requests to {settings.model} at {settings.server} ({num_planned - len(texts)} of {num_planned} "
        f"answers are in the cache): about {sum(map(len, texts)) // CHARACTERS_PER_TOKEN:,} tokens to read, "
        + (f"at most {len(texts) * written:,} to write" if isinstance(written, int) else "no limit to write")
    )
    if settings.max_requests is not None and len(texts) > settings.max_requests:
        raise ValueError(
            f"--max-requests {settings.max_requests}: too few for {estimate}; raise it or judge fewer with --limit"
        )
    print(estimate, file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{estimate}: pass --yes to start")
    print("Ask them? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError("not confirmed: nothing was asked")


def ask_with_progress(planned: dict[str, str], settings: JudgeSettings, cache: AnswerCache) -> Answers:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"judge {settings.model}", total=len(planned))
        return ask_all(planned, settings, cache, lambda count: progress.advance(task, count))


def count(keys: Sequence[str | None], answers: Answers) -> dict[str, int]:
    """What was asked and what came back; a question that stands twice is counted twice."""
    asked = [key for key in keys if key is not None]
    replies = [answers.replies[key] for key in asked if key in answers.replies]
    return {
        "num_questions": len(asked),
        "num_equal_answers": len(keys) - len(asked),
        "num_unanswered": len(asked) - len(replies),
        "num_refused": sum(reply.refused for reply in replies),
        "num_cut_off": sum(reply.finish_reason == "length" for reply in replies),
        "num_requests": answers.num_requests,
        "num_cached": answers.num_cached,
    }


def problem_of(answers: Answers, num_planned: int) -> str:
    missing = num_planned - len(answers.replies)
    if not missing:
        return ""
    reason = answers.stopped or next(iter(answers.failures.values()), "")
    return f"{missing} of {num_planned} questions have no answer ({reason}); the same command asks only those"


def nothing_read(judged: Judged, path: Path) -> str:
    """The problem of a judge of whose answers none holds a readable verdict; empty when one does, or there is none."""
    asked = [verdict for verdict in judged.verdicts if verdict.raw != EQUAL]
    if not asked or any(verdict.verdict for verdict in asked):
        return ""
    return f"none of {len(asked)} answers of the judge holds a readable verdict; see {path}"


def save_verdicts(out: Path, judged: Judged) -> None:
    """Write the verdict rows that there are; EvaluationError when the judge has answered nothing at all."""
    if not judged.verdicts:
        from .command import EvaluationError

        raise EvaluationError(judged.problem)
    write_jsonl(out / "verdicts.jsonl", (verdict.row() for verdict in judged.verdicts))


def bar_row(label: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A row of ``draw_bars`` from a summary."""
    row: dict[str, Any] = {"label": label, **{key: summary[key]["value"] for key in ("win", "tie", "lose")}}
    row |= {f"{key}_{end}": summary[key][end] for key in ("win", "lose") for end in ("low", "high")}
    return {**row, "num_matches": summary["num_counted"]}


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""

    def rate(key: str) -> str:
        found = summary[key]
        return "–" if found is None else f"{found['value']:7.1%}   [{found['low']:.1%}, {found['high']:.1%}]"

    lines = [f"{summary['a']} against {summary['b']}, judged by {summary['judge']} ({summary['orders']} orders)"]
    lines += [f"  {key:<28}{rate(key)}" for key in ("win", "tie", "lose", "win_minus_lose")]
    lines += [f"  {'win rate, ties half':<28}{rate('win_rate')}"]
    lines += [f"  {'at equal length':<28}{rate('length_controlled_win_rate')}"]
    lines += [f"  {'verdict flips with order':<28}{rate('flip_rate')}"]
    if summary["first_position_rate"] is not None:
        lines += [f"  {'first answer preferred':<28}{summary['first_position_rate']:7.1%}"]
    if summary["mean_length_difference"] is not None:
        lines += [f"  {'mean length difference':<28}{summary['mean_length_difference']:+7.0f} characters"]
    lines += [
        f"  {summary['num_counted']} matches counted, {summary['num_unreadable']} without a readable verdict "
        f"({summary['num_refused']} refusals, {summary['num_cut_off']} answers cut off)"
    ]
    if summary["num_equal_answers"]:
        lines += [f"  {summary['num_equal_answers']} ties were not asked about: the answers are equal"]
    return "\n".join(lines)
