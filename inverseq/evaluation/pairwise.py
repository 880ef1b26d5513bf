"""From verdicts to rates: win, tie and lose with intervals, position flips, and the win rate at equal length.

A match is one prompt answered by two models. Where both orders were asked, both verdicts must agree; a disagreement is
a tie, so that a judge who follows position alone finds nothing but ties. A match with an unreadable verdict counts for
nothing and is reported. Intervals are percentiles of a seeded bootstrap over questions: the turns of a question, which
answer to each other, are drawn together. Where all matches end alike the bootstrap has no spread; an outcome unseen in
n questions may then have the probability u with (1 − u)ⁿ = 2.5 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import read_jsonl
from .readers import question_of

__all__ = [
    "Interval",
    "Match",
    "Verdict",
    "combine_orders",
    "length_controlled_win_rate",
    "read_verdicts",
    "summarize",
]

RESAMPLES = 2000
LEVEL = 0.95
PRIOR_PRECISION = 0.01  # of the length model's two coefficients: keeps them finite, moves a rate by less than 0.002
NEWTON_STEPS = 60
MAX_NEWTON_STEP = 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer of a judge, a row of a verdict file. ``verdict`` names the model (a or b), not the position."""

    id: str
    a: str
    b: str
    order: str  # "ab": a's answer was shown first
    raw: str
    verdict: str | None  # "a", "b", "tie", or None when it cannot be read
    judge: str

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def turned(self) -> Verdict:
        """The same verdict with the models' roles exchanged."""
        other = {"a": "b", "b": "a", "ab": "ba", "ba": "ab"}
        verdict = other.get(self.verdict, self.verdict)
        return Verdict(self.id, self.b, self.a, other[self.order], self.raw, verdict, self.judge)


@dataclass(frozen=True, slots=True)
class Match:
    """One prompt answered by two models, judged in one order or both."""

    id: str
    a: str
    b: str
    judge: str
    score: float | None  # of a: 1, 0.5 (tie), 0; None when a verdict could not be read
    flipped: bool | None  # whether the orders disagree; None without two readable verdicts
    num_verdicts: int
    first_wins: int  # readable verdicts for the answer shown first
    num_decided: int  # readable verdicts for either answer


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def read_verdicts(paths: Iterable[Path | str]) -> list[Verdict]:
    """Rows of verdict files; ValueError naming file and line for a row that is not a verdict."""
    verdicts = []
    for path in paths:
        for number, row in read_jsonl(path):
            where = f"{path}, line {number}"
            for key in ("id", "a", "b", "raw", "judge"):
                if not isinstance(row.get(key), str):
                    raise ValueError(f"{where}: {key}={row.get(key)!r}: expected a text")
            if row.get("order") not in ("ab", "ba"):
                raise ValueError(f"{where}: order={row.get('order')!r}: expected 'ab' or 'ba'")
            if "verdict" not in row or row["verdict"] not in ("a", "b", "tie", None):
                raise ValueError(f"{where}: verdict={row.get('verdict')!r}: expected 'a', 'b', 'tie' or null")
            if row["a"] == row["b"]:
                raise ValueError(f"{where}: a and b are both {row['a']!r}: expected two models")
            verdicts.append(Verdict(*(row[key] for key in ("id", "a", "b", "order", "raw", "verdict", "judge"))))
    if not verdicts:
        raise ValueError(f"no verdicts in {', '.join(map(str, paths))}")
    return verdicts


def combine_orders(verdicts: Sequence[Verdict]) -> list[Match]:
    """One match per prompt, pair of models and judge; ValueError when an order was judged twice.

    A pair of models keeps the roles in which it comes first, whatever roles later rows give it.
    """
    roles: dict[frozenset[str], str] = {}
    groups: dict[tuple, dict[str, Verdict]] = defaultdict(dict)
    for verdict in verdicts:
        pair = frozenset((verdict.a, verdict.b))
        verdict = verdict if roles.setdefault(pair, verdict.a) == verdict.a else verdict.turned()
        orders = groups[verdict.id, verdict.a, verdict.b, verdict.judge]
        if verdict.order in orders:
            raise ValueError(
                f"id {verdict.id!r}, {verdict.a!r} against {verdict.b!r}: order {verdict.order!r} was judged twice"
            )
        orders[verdict.order] = verdict
    return [_match(*key, [*orders.values()]) for key, orders in groups.items()]


def _match(identity: str, a: str, b: str, judge: str, verdicts: list[Verdict]) -> Match:
    found = [verdict.verdict for verdict in verdicts]
    readable = None not in found
    agreed = found[0] if len(set(found)) == 1 else "tie"
    decided = [verdict for verdict in verdicts if verdict.verdict in ("a", "b")]
    return Match(
        id=identity,
        a=a,
        b=b,
        judge=judge,
        score={"a": 1.0, "tie": 0.5, "b": 0.0}[agreed] if readable else None,
        flipped=len(set(found)) > 1 if readable and len(found) == 2 else None,
        num_verdicts=len(verdicts),
        first_wins=sum(verdict.verdict == verdict.order[0] for verdict in decided),
        num_decided=len(decided),
    )


def summarize(
    matches: Sequence[Match], length_differences: Sequence[float] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Rates of model a against model b over matches of one pair, as plain JSON.

    ``length_differences`` are characters of a's answer minus b's, a number per match. Rates are over the matches whose
    verdicts could all be read; without any, they are None.
    """
    kept = [index for index, match in enumerate(matches) if match.score is not None]
    scores = np.array([matches[index].score for index in kept])
    questions = number_questions([matches[index] for index in kept])
    both_orders = [matches[index] for index in kept if matches[index].flipped is not None]
    flips = np.array([[match.flipped] for match in both_orders], dtype=float).reshape(-1, 1)
    decided = sum(match.num_decided for match in matches)
    result: dict[str, Any] = {
        "num_matches": len(matches),
        "num_counted": len(kept),
        "num_unreadable": len(matches) - len(kept),
    }
    outcomes = np.stack([scores == 1, scores == 0.5, scores == 0, scores], 1).astype(float)
    intervals = bootstrap_means(outcomes, questions, seed)
    intervals += bootstrap_means(2 * scores[:, None] - 1, questions, seed, lowest=-1.0)
    for name, interval in zip(("win", "tie", "lose", "win_rate", "win_minus_lose"), intervals, strict=True):
        result[name] = _plain(interval)
    result["flip_rate"] = _plain(bootstrap_means(flips, number_questions(both_orders), seed)[0])
    result["first_position_rate"] = sum(match.first_wins for match in matches) / decided if decided else None
    if length_differences is not None:
        differences = np.array([length_differences[index] for index in kept], dtype=float)
        result["mean_length_difference"] = float(differences.mean()) if len(kept) else None
        result["length_controlled_win_rate"] = _plain(
            length_controlled_win_rate(scores, differences, questions, seed=seed)
        )
    return result


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def number_questions(matches: Sequence[Match]) -> np.ndarray:
    """The number of each match's question, [n] int64, in the order in which they come first."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(question_of(match.id), len(numbers)) for match in matches], dtype=np.int64)


@lru_cache(maxsize=2)
def bootstrap_counts(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` questions is drawn in each resample, [RESAMPLES, count] float64, not to change."""
    drawn = np.random.default_rng([seed, count]).integers(count, size=(RESAMPLES, count))
    drawn += np.arange(RESAMPLES)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(float)


def bootstrap_weights(questions: np.ndarray, seed: int) -> np.ndarray:
    """How often each match is drawn in each resample of the questions [n] int, [RESAMPLES, n] float64."""
    return bootstrap_counts(int(questions.max()) + 1, seed)[:, questions]


def bootstrap_means(
    values: np.ndarray, questions: np.ndarray, seed: int, lowest: float = 0.0
) -> list[Interval | None]:
    """Mean and interval of each column of ``values`` [n, columns], numbers from ``lowest`` to 1; None when n is 0."""
    if len(values) == 0:
        return [None] * values.shape[1]
    weights = bootstrap_weights(questions, seed)
    means = weights @ values / weights.sum(1, keepdims=True)
    intervals: list[Interval | None] = []
    for column, resampled in zip(values.T, means.T, strict=True):
        if np.ptp(column) == 0:
            intervals.append(constant_interval(float(column[0]), int(questions.max()) + 1, lowest))
        else:
            intervals.append(Interval(float(column.mean()), *percentiles(resampled)))
    return intervals


def constant_interval(value: float, count: int, lowest: float = 0.0) -> Interval:
    """The interval of a mean when all ``count`` questions gave ``value``: the unseen pulls towards ``lowest`` or 1."""
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    return Interval(value, value - unseen * (value - lowest), value + unseen * (1 - value))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def length_controlled_win_rate(
    scores: np.ndarray, differences: np.ndarray, questions: np.ndarray | None = None, *, seed: int = 0
) -> Interval | None:
    """Win rate of a (ties half) at equal answer lengths, from a logistic regression; None when it cannot be told.

    P(a wins) = σ(θ + φ tanh(d / s)), d the difference of lengths [n] and s its root mean square; the rate is σ(θ). This
    is AlpacaEval 2's model (Dubois et al. 2024, arXiv 2404.04475) without its term for a prompt's difficulty. It
    exchanges with the models: that of b is 1 minus that of a. It cannot be told where all differences are equal and not
    zero: no match then says what happens at equal length. ``questions`` [n] numbers the question of each match; without
    them each match has its own.
    """
    count = len(scores)
    questions = np.arange(count) if questions is None else questions
    scale = float(np.sqrt(np.mean(np.square(differences)))) if count else 0.0
    shift = np.tanh(differences / scale) if scale > 0 else np.zeros(count)
    if count == 0 or (scale > 0 and np.ptp(shift) < 1e-9):
        return None
    if np.ptp(scores) == 0:
        return constant_interval(float(scores[0]), int(questions.max()) + 1)
    weights = bootstrap_weights(questions, seed)
    estimate = fit_length_model(scores, shift, np.ones((1, count)))[0, 0]
    resampled = fit_length_model(scores, shift, weights)[:, 0]
    return Interval(float(_sigmoid(estimate)), *percentiles(_sigmoid(resampled)))


def fit_length_model(scores: np.ndarray, shift: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(θ, φ) of σ(θ + φ shift) for every row of match weights [R, n], by Newton's method: [R, 2] float64."""
    coefficients = np.zeros((len(weights), 2))
    design = np.stack([np.ones_like(shift), shift], 1)
    products = design[:, :, None] * design[:, None, :]
    for _ in range(NEWTON_STEPS):
        chance = _sigmoid(coefficients @ design.T)
        gradient = (weights * (scores - chance)) @ design - PRIOR_PRECISION * coefficients
        curvature = np.einsum("rn,nij->rij", weights * chance * (1 - chance), products)
        step = np.linalg.solve(curvature + PRIOR_PRECISION * np.eye(2), gradient[:, :, None])[:, :, 0]
        coefficients += step * np.minimum(1.0, MAX_NEWTON_STEP / np.maximum(np.abs(step).max(1, keepdims=True), 1e-300))
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))
