"""Ratings: Bradley–Terry against scikit-learn and planted strengths, online Elo against its definition."""

import csv
import json
import math
import os
import signal
import time

import numpy as np
import pytest

from inverseq.evaluation import elo
from inverseq.evaluation.bradley_terry import ELO_SCALE, fit_bradley_terry, rate
from inverseq.evaluation.cli import main
from inverseq.evaluation.elo import online_elo
from inverseq.evaluation.pairwise import Match, Verdict
from inverseq.evaluation.readers import turn_id

STRENGTHS = {"m0": 0.0, "m1": 0.4, "m2": -0.3, "m3": 1.0, "m4": 0.7}


def match(a, b, score, key="1"):
    return Match(str(key), a, b, "j", score, None, 1, 0, 0)


def tournament(seed, *, prompts, per_prompt=4, shared=0.0):
    """Two judgements a match, disagreement a tie: a's expected score is the Bradley–Terry chance.

    ``shared`` is the chance that a prompt's matches are all decided by one draw, which makes them depend on each other.
    """
    rng, names = np.random.default_rng(seed), [*STRENGTHS]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    matches = []
    for prompt in range(prompts):
        draws = rng.random((per_prompt, 2))
        if rng.random() < shared:
            draws[:] = draws[0]
        for index, pick in enumerate(rng.choice(len(pairs), per_prompt, replace=False)):
            a, b = pairs[pick]
            chance = 1 / (1 + math.exp(STRENGTHS[b] - STRENGTHS[a]))
            matches.append(match(a, b, float((draws[index] < chance).mean()), prompt))
    return matches


def test_bradley_terry_agrees_with_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    matches = tournament(0, prompts=60)
    names = [*STRENGTHS]
    rows, wins, weights = [], [], []
    for each in matches:
        row = [(name == each.a) - (name == each.b) for name in names[1:]]  # m0 is the anchor
        rows += [row, row]
        wins += [1, 0]
        weights += [each.score, 1 - each.score]
    model = linear_model.LogisticRegression(C=math.inf, fit_intercept=False, tol=1e-13, max_iter=10000)
    theirs = dict(zip(names[1:], model.fit(rows, wins, sample_weight=weights).coef_[0], strict=True))
    ours = fit_bradley_terry(matches, anchor="m0")
    assert {0.0, 0.5, 1.0} == {each.score for each in matches}
    for name, theta in zip(ours.models, ours.theta, strict=True):
        assert theta == pytest.approx(theirs.get(name, 0.0), abs=1e-6)


def test_known_strengths_are_recovered():
    ratings = rate(tournament(1, prompts=6000), anchor="m2", anchor_rating=800)
    for each in ratings:
        truth = 800 + ELO_SCALE * (STRENGTHS[each.model] - STRENGTHS["m2"])
        assert each.rating == pytest.approx(truth, abs=10)
    assert [each.model for each in ratings] == ["m3", "m4", "m1", "m0", "m2"]
    assert ratings[-1].low == ratings[-1].high == 800


@pytest.mark.parametrize("shared", [0.0, 1.0], ids=["independent", "matches of a prompt depend on each other"])
def test_intervals_cover_the_truth_in_92_to_98_percent_of_400_tournaments(shared):
    covered = total = 0
    for seed in range(400):
        for each in rate(tournament(seed, prompts=60, shared=shared), anchor="m0", anchor_rating=0.0):
            if each.model != "m0":
                covered += each.low <= ELO_SCALE * STRENGTHS[each.model] <= each.high
                total += 1
    assert total == 1600
    assert 0.92 <= covered / total <= 0.98, covered / total


def test_intervals_cover_the_truth_where_the_turns_of_a_question_end_alike():
    rng, covered, truth = np.random.default_rng(5), {"questions": 0, "turns": 0}, 400 * math.log10(0.6 / 0.4)
    for _ in range(300):
        won = (rng.random(80) < 0.6).astype(float)
        for kind, name in (("questions", turn_id), ("turns", lambda question, turn: f"{question}-{turn}")):
            matches = [match("x", "y", s, name(f"q{key}", turn)) for key, s in enumerate(won) for turn in (1, 2)]
            best = next(each for each in rate(matches, anchor="y", anchor_rating=0.0) if each.model == "x")
            covered[kind] += best.low <= truth <= best.high
    assert 0.92 <= covered["questions"] / 300 <= 0.98 and covered["turns"] / 300 < 0.88, covered


def test_unreadable_matches_do_not_move_a_rating():
    matches = tournament(2, prompts=40)
    more = [*matches, *(match("m1", "m0", None, key) for key in range(50))]
    assert rate(more, anchor="m0") == rate(matches, anchor="m0")


def test_the_anchor_moves_no_difference():
    matches = tournament(3, prompts=40)
    by_model = [{each.model: each.rating for each in rate(matches, anchor=name)} for name in ("m0", "m3")]
    shifts = [by_model[0][name] - by_model[1][name] for name in STRENGTHS]
    assert shifts == pytest.approx([shifts[0]] * 5)


def test_where_no_finite_rating_exists_an_error_says_who_won_everything():
    matches = [match("x", "y", 1.0, key) for key in range(9)] + [match("y", "z", score) for score in (0.0, 1.0)]
    with pytest.raises(ValueError, match="nobody else ever won against x; .* --prior 1"):
        fit_bradley_terry(matches, anchor="y")
    ratings = {each.model: each.rating for each in rate(matches, anchor="y", prior=1.0)}
    assert ratings["x"] > ratings["y"] == 1000
    apart = [match("x", "y", s) for s in (0.0, 1.0)] + [match("u", "v", s) for s in (0.0, 1.0)]
    with pytest.raises(ValueError, match="some models never met"):
        fit_bradley_terry(apart, anchor="x")
    with pytest.raises(ValueError, match="anchor 'w': expected one of the models x, y"):
        fit_bradley_terry(matches[:9], anchor="w")
    with pytest.raises(ValueError, match="prior=-1"):
        fit_bradley_terry(matches, anchor="y", prior=-1)


@pytest.mark.parametrize("count", [10, 50, 200])
def test_the_interval_of_a_model_that_won_everything_reaches_down_to_what_its_wins_exclude(count):
    """A chance p of winning all of ``count`` matches is excluded at 97.5 % where p ** count < 2.5 %."""
    wins = [match("x", "y", 1.0, key) for key in range(count)]
    best = rate(wins, anchor="y", prior=1.0)[0]
    chance = 0.025 ** (1 / count)
    bound = 1000 + 400 * math.log10(chance / (1 - chance))
    assert best.model == "x" and best.low == pytest.approx(bound, abs=15)
    assert best.high - best.rating == pytest.approx(best.rating - best.low)


def test_with_virtual_ties_intervals_cover_the_truth_where_matches_nearly_separate_the_models():
    rng, covered, truth = np.random.default_rng(1), 0, 1000 + 400 * math.log10(0.95 / 0.05)
    for _ in range(200):
        matches = [match("x", "y", float(won), key) for key, won in enumerate(rng.random(40) < 0.95)]
        best = rate(matches, anchor="y", prior=1.0)[0]
        covered += best.low <= truth <= best.high
    assert covered / 200 >= 0.9, covered


def test_a_tie_links_two_models():
    matches = [match("x", "y", 1.0), match("x", "y", 0.5, "2")]
    rating = {each.model: each.rating for each in rate(matches, anchor="y")}["x"]
    assert rating == pytest.approx(1000 + 400 * math.log10(3))  # three quarters of the points


def naive_elo(matches, k):
    ratings, history = dict.fromkeys(STRENGTHS, 0.0), []
    for each in matches:
        expected = 1 / (1 + 10 ** ((ratings[each.b] - ratings[each.a]) / 400))
        ratings[each.a] += k * (each.score - expected)
        ratings[each.b] -= k * (each.score - expected)
        history.append({name: ratings[name] - ratings["m1"] for name in ratings})
    return history


def test_online_elo_is_its_definition_averaged_over_the_orders():
    matches = tournament(4, prompts=12)
    curves = online_elo(matches, anchor="m1", anchor_rating=1200, k=20, num_orders=3, sigma=0, seed=5)
    rng = np.random.default_rng(5)
    histories = [naive_elo([matches[i] for i in rng.permutation(len(matches))], 20) for _ in range(3)]
    for game in (0, 7, len(matches) - 1):
        for column, name in enumerate(curves.models):
            expected = 1200 + np.mean([history[game][name] for history in histories])
            assert curves.mean[game + 1, column] == pytest.approx(expected)
    finals = [[history[-1][name] for history in histories] for name in curves.models]
    assert curves.spread == pytest.approx(np.std(finals, axis=1))
    assert (curves.mean[0] == 1200).all()


def test_the_curve_is_smoothed_with_sigma_10_and_the_anchor_is_a_line():
    matches = tournament(5, prompts=50)
    curves = online_elo(matches, anchor="m1", num_orders=4)
    column, middle = curves.models.index("m3"), 100
    offsets = np.arange(-40, 41)
    kernel = np.exp(-0.5 * (offsets / 10) ** 2)
    by_hand = (curves.mean[middle + offsets, column] * kernel).sum() / kernel.sum()
    assert curves.smooth[middle, column] == pytest.approx(by_hand)
    assert (curves.smooth[:, curves.models.index("m1")] == 1000).all()
    assert np.abs(np.diff(curves.smooth[:, column])).max() < np.abs(np.diff(curves.mean[:, column])).max()


def test_online_elo_comes_near_bradley_terry():
    matches = tournament(6, prompts=1500)
    curves = online_elo(matches, anchor="m0", k=8, num_orders=20)
    ratings = {each.model: each.rating for each in rate(matches, anchor="m0")}
    for column, name in enumerate(curves.models):
        assert curves.mean[-1, column] == pytest.approx(ratings[name], abs=25)


def test_online_elo_refuses_settings_out_of_range():
    matches = tournament(7, prompts=3)
    for wrong in ({"k": 0}, {"num_orders": 0}, {"sigma": -1}, {"k": math.nan}):
        with pytest.raises(ValueError, match="expected positive numbers"):
            online_elo(matches, anchor="m0", **wrong)
    with pytest.raises(ValueError, match="anchor 'who'"):
        online_elo(matches, anchor="who")


def write_verdicts(path, matches):
    words = {1.0: ("a", "a"), 0.5: ("a", "b"), 0.0: ("b", "b")}
    with path.open("w") as file:
        for number, each in enumerate(matches):
            for order, found in zip(("ab", "ba"), words[each.score], strict=True):
                row = Verdict(f"{each.id}-{number}", each.a, each.b, order, "…", found, "j").row()
                file.write(json.dumps(row) + "\n")
    return path


def test_the_command_writes_both_ratings_and_the_curve_with_its_data(tmp_path, capsys):
    matches = tournament(8, prompts=30)
    first, second = (write_verdicts(tmp_path / f"{part}.jsonl", matches[part::2]) for part in (0, 1))
    status = main(["elo", str(first), str(second), "--anchor", "m0", "--out", str(tmp_path / "out"), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert status == 0 and data == json.loads((tmp_path / "out" / "elo.json").read_text())
    expected = {each.model: each for each in rate(matches, anchor="m0")}
    for row in data["ratings"]:
        assert row["bradley_terry"] == pytest.approx(expected[row["model"]].rating)
        assert row["num_matches"] == expected[row["model"]].num_matches
    with (tmp_path / "out" / "elo_ratings.csv").open() as file:
        points = list(csv.DictReader(file))
    for point, row in zip(points, data["ratings"], strict=True):
        assert point["model"] == row["model"]
        assert [float(point[key]) for key in ("rating", "low", "high")] == [
            row[key] for key in ("bradley_terry", "low", "high")
        ]
    with (tmp_path / "out" / "elo_online.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {row["series"]: row for row in rows}
    assert list(last) == [row["model"] for row in data["ratings"]]
    for row in data["ratings"]:
        assert float(last[row["model"]]["unsmoothed"]) == pytest.approx(row["online_elo"])
    assert {float(row["rating"]) for row in rows if row["series"] == "m0"} == {1000.0}
    assert len(rows) == 5 * (len(matches) + 1)
    for name in ("elo_ratings.png", "elo_online.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert main(["elo", str(first), "--anchor", "nobody"]) == 2
    assert "anchor 'nobody': expected one of the models" in capsys.readouterr().err
    row = Verdict("x", "unread", "m0", "ab", "…", None, "j").row()
    unread = tmp_path / "unread.jsonl"
    unread.write_text(json.dumps(row) + "\n" + first.read_text())
    assert main(["elo", str(unread), "--out", str(tmp_path / "out"), "--json"]) == 0  # nobody chose an anchor
    assert json.loads(capsys.readouterr().out)["anchor"] == matches[0].a


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_in_one_line(number, status, monkeypatch, capsys):
    """The signal comes within a destructor, where Python drops what a handler raises."""

    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), number)

    def run(args):
        Destroyed()
        time.sleep(30)

    monkeypatch.setattr(elo, "run", run)
    handler = signal.getsignal(number)
    try:
        assert main(["elo", "verdicts.jsonl"]) == status
    finally:
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert err == "inverseq-eval: interrupted; what was done is kept, the same command goes on from there\n"
