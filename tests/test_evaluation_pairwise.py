"""Verdicts become matches, and matches rates whose intervals hold what they promise."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inverseq.evaluation.pairwise import (
    Verdict,
    combine_orders,
    length_controlled_win_rate,
    read_verdicts,
    summarize,
)
from inverseq.evaluation.readers import turn_id

VERDICTS = ("a", "b", "tie", None)


def verdict(key, order, found, a="new", b="old", judge="j"):
    return Verdict(str(key), a, b, order, "…", found, judge)


def matches_of(pairs):
    """Matches of (verdict in order ab, verdict in order ba); a pair of one is judged in one order."""
    rows = [verdict(i, o, v) for i, found in enumerate(pairs) for o, v in zip(("ab", "ba"), found, strict=False)]
    return combine_orders(rows)


@pytest.mark.parametrize(
    ("found", "score", "flipped"),
    [
        (("a", "a"), 1.0, False),
        (("b", "b"), 0.0, False),
        (("tie", "tie"), 0.5, False),
        (("a", "b"), 0.5, True),
        (("b", "a"), 0.5, True),
        (("a", "tie"), 0.5, True),
        (("a", None), None, None),
        ((None, None), None, None),
        (("a",), 1.0, None),
        (("tie",), 0.5, None),
        ((None,), None, None),
    ],
)
def test_two_orders_must_agree_and_an_unreadable_verdict_spoils_the_match(found, score, flipped):
    [match] = matches_of([found])
    assert (match.score, match.flipped) == (score, flipped)


@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), min_size=1, max_size=12))
def test_exchanging_the_models_exchanges_wins_and_losses(pairs):
    rows = [verdict(i, o, v) for i, found in enumerate(pairs) for o, v in zip(("ab", "ba"), found, strict=True)]
    turned = combine_orders([row.turned() for row in rows])
    assert [row.turned().turned() for row in rows] == rows
    for match, other in zip(combine_orders(rows), turned, strict=True):
        assert (other.a, other.b, other.flipped) == (match.b, match.a, match.flipped)
        assert other.score == (None if match.score is None else 1 - match.score)
        assert (other.first_wins, other.num_decided) == (match.first_wins, match.num_decided)


def test_rows_that_name_the_models_the_other_way_round_are_the_same_pair():
    rows = [verdict(1, "ab", "a"), verdict(1, "ab", "b", a="old", b="new"), verdict(2, "ba", "b", a="old", b="new")]
    first, second = combine_orders(rows)
    assert (first.a, first.score, first.num_verdicts) == ("new", 1.0, 2)
    assert (second.a, second.score) == ("new", 1.0)


def test_judges_and_pairs_of_models_are_kept_apart():
    rows = [verdict(1, "ab", "a"), verdict(1, "ab", "b", judge="k"), verdict(1, "ab", "a", b="older")]
    assert [(match.judge, match.b, match.score) for match in combine_orders(rows)] == [
        ("j", "old", 1.0),
        ("k", "old", 0.0),
        ("j", "older", 1.0),
    ]


def test_an_order_that_was_judged_twice_is_an_error():
    with pytest.raises(ValueError, match="'ab' was judged twice"):
        combine_orders([verdict(1, "ab", "a"), verdict(1, "ba", "a", a="old", b="new")])


def test_the_summary_counts():
    pairs = [("a", "a")] * 5 + [("b", "b")] * 2 + [("a", "b")] * 2 + [("tie", "tie")] + [(None, "a")] * 3
    lengths = [10] * 10 + [1000] * 3
    summary = summarize(matches_of(pairs), lengths)
    assert (summary["num_matches"], summary["num_counted"], summary["num_unreadable"]) == (13, 10, 3)
    values = {key: summary[key]["value"] for key in ("win", "tie", "lose", "win_rate", "win_minus_lose", "flip_rate")}
    expected = {"win": 0.5, "tie": 0.3, "lose": 0.2, "win_rate": 0.65, "win_minus_lose": 0.3, "flip_rate": 0.2}
    assert values == pytest.approx(expected)
    assert summary["mean_length_difference"] == 10  # unreadable matches do not count
    assert summary["first_position_rate"] == pytest.approx((5 + 2 + 2 * 2 + 0) / (2 * 9 + 3))
    json.dumps(summary, allow_nan=False)


def test_without_a_readable_verdict_there_are_no_rates():
    summary = summarize(matches_of([(None, "a")]), [5])
    assert summary["win"] is summary["flip_rate"] is summary["length_controlled_win_rate"] is None
    assert summary["mean_length_difference"] is None
    json.dumps(summary, allow_nan=False)


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, covered, count = np.random.default_rng(0), {"win": 0, "win_rate": 0, "lose": 0}, 200
    for seed in range(count):
        outcomes = rng.choice(["a", "b", "t"], 120, p=[0.5, 0.3, 0.2])
        pairs = [(o, o) if o != "t" else ("a", "b") for o in outcomes]
        summary = summarize(matches_of(pairs), seed=seed)
        for key, truth in (("win", 0.5), ("win_rate", 0.6), ("lose", 0.3)):
            covered[key] += summary[key]["low"] <= truth <= summary[key]["high"]
    assert all(0.89 <= number / count <= 0.99 for number in covered.values()), covered


def two_turns(rng, count, *, shared):
    """Outcomes [count, 2] of questions with two turns; the second ends as the first did with chance ``shared``."""
    outcomes = rng.random((count, 2)) < 0.6
    outcomes[:, 1] = np.where(rng.random(count) < shared, outcomes[:, 0], outcomes[:, 1])
    return outcomes


def turn_matches(outcomes, name):
    rows = [
        verdict(name(question, turn), order, "a" if won else "b")
        for question, turns in enumerate(outcomes)
        for turn, won in enumerate(turns, 1)
        for order in ("ab", "ba")
    ]
    return combine_orders(rows)


@pytest.mark.parametrize("shared", [0.0, 0.9], ids=["independent turns", "turns that end alike"])
def test_intervals_over_questions_with_two_turns_cover_the_truth(shared):
    rng, count, covered = np.random.default_rng(3), 150, {"questions": 0, "turns": 0}
    for seed in range(count):
        outcomes = two_turns(rng, 80, shared=shared)
        matches = turn_matches(outcomes, lambda question, turn: turn_id(f"mt-bench-{question}", turn))
        apart = turn_matches(outcomes, lambda question, turn: f"{question}-{turn}")
        for key, found in (("questions", summarize(matches, seed=seed)), ("turns", summarize(apart, seed=seed))):
            assert found["win"]["value"] == outcomes.mean()
            covered[key] += found["win"]["low"] <= 0.6 <= found["win"]["high"]
    assert 0.92 <= covered["questions"] / count <= 0.98, covered
    assert (covered["turns"] / count < 0.88) == bool(shared), covered


def test_turns_that_end_alike_are_worth_one_match_a_question():
    for won in (np.ones(20), np.arange(20) % 3 > 0):
        both = turn_matches(np.stack([won, won], 1), lambda question, turn: turn_id(str(question), turn))
        one = turn_matches(won[:, None], lambda question, turn: str(question))
        lengths = np.arange(20) % 7 - 3.0
        summaries = summarize(both, lengths.repeat(2)), summarize(one, lengths)
        for key in ("win", "win_rate", "win_minus_lose", "flip_rate", "length_controlled_win_rate"):
            assert summaries[0][key] == pytest.approx(summaries[1][key], abs=2e-3), key


def test_an_interval_is_as_wide_as_theory_says():
    summary = summarize(matches_of([("a", "a")] * 500 + [("b", "b")] * 300 + [("a", "b")] * 200))
    for key, deviation in (("win", 0.5), ("lose", 0.21**0.5), ("win_minus_lose", (0.8 - 0.2**2) ** 0.5)):
        width = summary[key]["high"] - summary[key]["low"]
        assert width == pytest.approx(2 * 1.96 * deviation / 1000**0.5, rel=0.06)


@pytest.mark.parametrize("outcome", ["a", "b", "tie"])
def test_matches_that_all_end_alike_leave_room_for_what_was_not_seen(outcome):
    summary = summarize(matches_of([(outcome, outcome)] * 6), [1, -1, 2, -2, 3, -3])
    seen = {"a": "win", "b": "lose", "tie": "tie"}[outcome]
    unseen = 1 - 0.025 ** (1 / 6)
    assert summary[seen] == pytest.approx({"value": 1, "low": 1 - unseen, "high": 1})
    assert summary["flip_rate"] == pytest.approx({"value": 0, "low": 0, "high": unseen})
    half = {"a": (1 - unseen, 1), "b": (0, unseen), "tie": (0.5 - unseen / 2, 0.5 + unseen / 2)}[outcome]
    for key in ("win_rate", "length_controlled_win_rate"):
        assert (summary[key]["low"], summary[key]["high"]) == pytest.approx(half)
    scaled = [2 * bound - 1 for bound in half]
    assert (summary["win_minus_lose"]["low"], summary["win_minus_lose"]["high"]) == pytest.approx(scaled)


def length_biased(rng, count, mean, strength, advantage=0.0):
    differences = rng.normal(mean, 200, count)
    scale = np.sqrt(np.mean(differences**2))
    chance = 1 / (1 + np.exp(-advantage - strength * np.tanh(differences / scale)))
    return (rng.random(count) < chance).astype(float), differences


def test_a_planted_length_bias_shows_in_the_length_controlled_rate():
    scores, differences = length_biased(np.random.default_rng(1), 3000, mean=150, strength=2.0)
    controlled = length_controlled_win_rate(scores, differences)
    assert scores.mean() > 0.65  # what the bias makes of two equal models
    assert controlled.low < 0.5 < controlled.high
    assert abs(controlled.value - 0.5) < 0.04


def test_without_a_length_bias_the_controlled_rate_is_the_rate():
    scores, differences = length_biased(np.random.default_rng(2), 3000, mean=150, strength=0.0, advantage=0.6)
    assert length_controlled_win_rate(scores, differences).value == pytest.approx(scores.mean(), abs=0.03)


def test_the_length_controlled_rate_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    scores, differences = length_biased(np.random.default_rng(3), 400, mean=80, strength=1.5, advantage=0.3)
    shift = np.tanh(differences / np.sqrt(np.mean(differences**2)))
    design = np.stack([np.ones_like(shift), shift], 1)
    # C = 1 / the prior's precision
    model = linear_model.LogisticRegression(C=100.0, fit_intercept=False, tol=1e-12, max_iter=1000)
    theta = model.fit(design, scores).coef_[0, 0]
    found = length_controlled_win_rate(scores, differences).value
    assert found == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-6)


def test_the_length_controlled_rate_exchanges_with_the_models():
    scores, differences = length_biased(np.random.default_rng(4), 200, mean=50, strength=1.0, advantage=0.4)
    ours, theirs = (length_controlled_win_rate(*pair) for pair in ((scores, differences), (1 - scores, -differences)))
    assert ours.value + theirs.value == pytest.approx(1)
    assert ours.low + theirs.high == pytest.approx(1, abs=1e-6)


def test_where_lengths_say_nothing_there_is_no_controlled_rate():
    scores = np.array([1.0, 0.0, 0.5, 1.0])
    assert length_controlled_win_rate(scores, np.full(4, 30.0)) is None  # always longer by as much
    assert length_controlled_win_rate(scores[:0], np.zeros(0)) is None
    assert length_controlled_win_rate(scores, np.zeros(4)).value == pytest.approx(scores.mean(), abs=2e-3)


def test_a_length_that_decides_every_match_gives_finite_numbers():
    differences = np.concatenate([np.linspace(-90, -10, 20), np.linspace(10, 90, 20)])
    found = length_controlled_win_rate((differences > 0).astype(float), differences)
    assert found.value == pytest.approx(0.5, abs=1e-6) and 0 <= found.low < found.high <= 1


def test_verdict_files_are_checked(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    good = verdict(1, "ab", "a").row()
    path.write_text(json.dumps(good) + "\n")
    assert read_verdicts([path]) == [verdict(1, "ab", "a")]
    for key, value, words in [
        ("order", "xy", "order='xy': expected 'ab' or 'ba'"),
        ("verdict", "A", "verdict='A': expected"),
        ("id", 3, "id=3: expected a text"),
        ("b", "new", "a and b are both 'new'"),
    ]:
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, key: value}) + "\n")
        with pytest.raises(ValueError, match=f"line 2: {words}"):
            read_verdicts([path])
    path.write_text("")
    with pytest.raises(ValueError, match="no verdicts in"):
        read_verdicts([path])
