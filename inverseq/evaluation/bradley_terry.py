"""Bradley–Terry strengths of several models from their matches, with intervals.

P(i beats j) = σ(θ_i − θ_j); a tie counts as half a win for each. The strengths are the maximum-likelihood ones (of the
logistic regression of wins on the models' difference), found by Newton's method. Intervals are of the difference to
the anchor, from the sandwich covariance with one cluster a question: answers to one question in several matches, and in
its several turns, are not independent, and ties vary less than the wins they stand for. Ratings are on Elo's scale,
400 / ln 10 a unit of θ.

After Hunter, "MM algorithms for generalized Bradley–Terry models", Annals of Statistics 32 (2004), for existence and
uniqueness; White (1980) and Liang and Zeger (1986) for the covariance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .pairwise import Match
from .readers import question_of

__all__ = ["ELO_SCALE", "Rating", "Strengths", "fit_bradley_terry", "rate"]

ELO_SCALE = 400 / math.log(10)
NEWTON_STEPS = 100
TOLERANCE = 1e-12
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Strengths:
    """θ of each model, the anchor's 0, and the covariance of the estimates."""

    models: tuple[str, ...]
    theta: np.ndarray  # [M] float64
    covariance: np.ndarray  # [M, M] float64, zero in the anchor's row and column
    num_clusters: int


@dataclass(frozen=True, slots=True)
class Rating:
    """A model's rating on Elo's scale and the 95 % interval of its difference to the anchor, put on the same scale."""

    model: str
    rating: float
    low: float
    high: float
    num_matches: int


def rate(matches: Sequence[Match], *, anchor: str, anchor_rating: float = 1000.0, prior: float = 0.0) -> list[Rating]:
    """Ratings of all models, best first; see ``fit_bradley_terry`` for what is raised."""
    from .command import require_package

    strengths = fit_bradley_terry(matches, anchor=anchor, prior=prior)
    freedom = max(strengths.num_clusters - 1, 1)
    quantile = float(require_package("scipy.stats").t.ppf((1 + LEVEL) / 2, freedom))
    ratings = []
    for index, model in enumerate(strengths.models):
        rating = anchor_rating + ELO_SCALE * float(strengths.theta[index])
        margin = ELO_SCALE * quantile * math.sqrt(max(float(strengths.covariance[index, index]), 0.0))
        played = sum(model in (match.a, match.b) for match in matches if match.score is not None)
        ratings.append(Rating(model, rating, rating - margin, rating + margin, played))
    return sorted(ratings, key=lambda each: (-each.rating, each.model))


def fit_bradley_terry(matches: Sequence[Match], *, anchor: str, prior: float = 0.0) -> Strengths:
    """Maximum-likelihood strengths relative to the anchor; matches without a readable verdict are left out.

    ``prior`` adds so many ties between every two models, for tournaments where a model wins (or loses) every match:
    without it no finite strength exists there, and ValueError names the models. Raises ValueError for an unknown anchor
    and for fewer than two models too.
    """
    counted = [match for match in matches if match.score is not None]
    models = tuple(dict.fromkeys(name for match in counted for name in (match.a, match.b)))
    if anchor not in models:
        raise ValueError(f"anchor {anchor!r}: expected one of the models {', '.join(models) or '(none was judged)'}")
    if not (prior >= 0 and math.isfinite(prior)):
        raise ValueError(f"prior={prior!r}: expected 0 or more virtual ties")
    index = {model: position for position, model in enumerate(models)}
    pairs = np.array([(index[match.a], index[match.b]) for match in counted])
    scores = np.array([match.score for match in counted])
    if not prior:
        check_finite(models, pairs, scores)
    theta, information = newton(pairs, scores, len(models), index[anchor], prior)
    clusters = np.unique([question_of(match.id) for match in counted], return_inverse=True)[1]
    covariance = sandwich(pairs, scores, theta, information, clusters, index[anchor], prior)
    return Strengths(models, theta, covariance, int(clusters.max()) + 1)


def check_finite(models: Sequence[str], pairs: np.ndarray, scores: np.ndarray) -> None:
    """Raise ValueError unless every model can be reached from every other by won (or tied) matches: Ford's condition.

    It is necessary and sufficient for finite, unique strengths.
    """
    beats = np.eye(len(models), dtype=bool)
    beats[pairs[scores > 0, 0], pairs[scores > 0, 1]] = True
    beats[pairs[scores < 1, 1], pairs[scores < 1, 0]] = True
    reaches = beats
    for _ in range(len(models)):
        reaches = (reaches.astype(int) @ reaches) > 0
    above = [
        name for name, row, column in zip(models, reaches, reaches.T, strict=True) if row.all() and not column.all()
    ]
    if not reaches.all():
        who = f"nobody else ever won against {', '.join(above)}" if above else "some models never met"
        raise ValueError(
            f"no finite ratings exist: {who}; judge more matches, or add virtual ties between all models with --prior 1"
        )


def newton(
    pairs: np.ndarray, scores: np.ndarray, num_models: int, anchor: int, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """(θ [M] with the anchor's at 0, information [M, M]) of pairs [n, 2] int and scores of the first [n]."""
    played = np.zeros((num_models, num_models))
    np.add.at(played, (pairs[:, 0], pairs[:, 1]), 1.0)
    played += played.T + prior * (1 - np.eye(num_models))
    won = np.zeros(num_models)
    np.add.at(won, pairs[:, 0], scores)
    np.add.at(won, pairs[:, 1], 1 - scores)
    won += prior / 2 * (num_models - 1)
    free = np.arange(num_models) != anchor
    theta = np.zeros(num_models)
    for _ in range(NEWTON_STEPS):
        chance = _sigmoid(theta[:, None] - theta[None, :])
        gradient = won - (played * chance).sum(1)
        information = -played * chance * (1 - chance)
        np.fill_diagonal(information, -information.sum(1))
        step = np.linalg.solve(information[np.ix_(free, free)], gradient[free])
        theta[free] += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < TOLERANCE:
            return theta, information
    raise ArithmeticError(f"Bradley–Terry strengths did not settle in {NEWTON_STEPS} Newton steps")


def sandwich(
    pairs: np.ndarray,
    scores: np.ndarray,
    theta: np.ndarray,
    information: np.ndarray,
    clusters: np.ndarray,
    anchor: int,
    prior: float,
) -> np.ndarray:
    """Cluster-robust covariance of θ, [M, M]; zero where the anchor is. One cluster has no spread: infinite then.

    Virtual ties count as matches of clusters of their own. Without them a model that won every match would have next to
    no residual, and so next to no interval, though nothing but the ties says where its rating ends.
    """
    free = np.arange(len(theta)) != anchor
    num_clusters = int(clusters.max()) + 1
    covariance = np.zeros((len(theta), len(theta)))
    if num_clusters < 2:
        covariance[free, free] = np.inf
        return covariance
    residual = scores - _sigmoid(theta[pairs[:, 0]] - theta[pairs[:, 1]])
    gradients = np.zeros((num_clusters, len(theta)))
    np.add.at(gradients, (clusters, pairs[:, 0]), residual)
    np.add.at(gradients, (clusters, pairs[:, 1]), -residual)
    bread = np.linalg.inv(information[np.ix_(free, free)])
    meat = gradients[:, free].T @ gradients[:, free] * num_clusters / (num_clusters - 1)
    surprise = prior * (0.5 - _sigmoid(theta[:, None] - theta[None, :])) ** 2  # of the ties of each two models
    meat += (np.diag(surprise.sum(1)) - surprise)[np.ix_(free, free)]
    covariance[np.ix_(free, free)] = bread @ meat @ bread
    return covariance


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))
