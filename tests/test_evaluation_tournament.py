"""Tournaments, categories, plots and the command line over them."""

import csv
import json
from itertools import combinations

import pytest

from inverseq.evaluation.bradley_terry import rate
from inverseq.evaluation.cli import main
from inverseq.evaluation.command import require_package
from inverseq.evaluation.pairwise import combine_orders, read_verdicts
from inverseq.evaluation.plots import draw_bars, draw_curves, draw_radar, draw_ratings, save_plot, write_csv
from inverseq.evaluation.readers import BEAVERTAILS_CATEGORIES
from tests.judge_server import JudgeServer, Status, shown_answers, write_answers

MODELS = {"sft": 0, "ppo": 2, "iq": 4}
NAMES = [*BEAVERTAILS_CATEGORIES]


def quality(model, key):
    """Which of two answers is better; every model wins against every other somewhere."""
    return (MODELS[model] + 3 * (key * (1 + MODELS[model]) % 7)) / 10


def category_of(key):
    return NAMES[key % 14]


@pytest.fixture
def files(tmp_path):
    return [
        write_answers(
            tmp_path / f"{model}.jsonl", model, {k: f"{model} {quality(model, k)}" for k in range(28)}, category_of
        )
        for model in MODELS
    ]


def by_quality(text, number=0):
    first, second = (float(answer.split()[1]) for answer in shown_answers(text))
    return "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"


def tournament(files, server, out, *words):
    options = ["--judge", "stand-in", "--base-url", server.url, "--yes", "--out", str(out)]
    return main(["tournament", *files, *options, *words])


def test_all_pairs_meet_and_are_rated(files, tmp_path, capsys):
    with JudgeServer(by_quality) as server:
        assert tournament(files, server, tmp_path / "out", "--anchor", "sft", "--json") == 0
    assert len(server.asked) == 3 * 28 * 2
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out" / "tournament.json").read_text())
    assert [(pair["a"], pair["b"]) for pair in data["pairs"]] == [*combinations(MODELS, 2)]
    for pair in data["pairs"]:
        wins = sum(quality(pair["a"], key) > quality(pair["b"], key) for key in range(28))
        assert pair["win"]["value"] == pytest.approx(wins / 28)
    matches = combine_orders(read_verdicts([tmp_path / "out" / "verdicts.jsonl"]))
    expected = {each.model: each.rating for each in rate(matches, anchor="sft")}
    assert {row["model"]: row["bradley_terry"] for row in data["elo"]["ratings"]} == pytest.approx(expected)
    assert expected["sft"] == 1000
    with (tmp_path / "out" / "win_rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["win"]) for row in rows] == [pair["win"]["value"] for pair in data["pairs"]]
    assert (tmp_path / "out" / "elo_ratings.csv").exists() and (tmp_path / "out" / "elo_online.csv").exists()


def test_random_matches_are_seeded_even_and_within_the_budget(files, tmp_path):
    def drawn(name, *words):
        with JudgeServer(by_quality) as server:
            assert tournament(files, server, tmp_path / name, "--prior", "1", *words) == 0
        rows = read_verdicts([tmp_path / name / "verdicts.jsonl"])
        return len(server.asked), [(match.id, match.a, match.b) for match in combine_orders(rows)]

    asked, matches = drawn("a", "--matches", "30")
    assert asked == 60 and len(set(matches)) == 30
    assert {pair: sum(match[1:] == pair for match in matches) for pair in combinations(MODELS, 2)} == dict.fromkeys(
        combinations(MODELS, 2), 10
    )
    assert drawn("b", "--matches", "30")[1] == matches != drawn("c", "--matches", "30", "--seed", "1")[1]
    asked, matches = drawn("d", "--matches", "30", "--max-requests", "25")
    assert asked == 24 and len(matches) == 12
    asked, matches = drawn("e", "--matches", "30", "--max-requests", "25", "--orders", "random")
    assert asked == 25 and len(matches) == 25


def test_a_tournament_that_is_cut_short_keeps_its_verdicts(files, tmp_path, capsys):
    with JudgeServer(lambda text, number: by_quality(text) if number < 60 else Status(403)) as server:
        assert tournament(files, server, tmp_path / "out", "--concurrency", "1") == 1
    assert "questions have no answer" in capsys.readouterr().err
    assert len(read_verdicts([tmp_path / "out" / "verdicts.jsonl"])) == 60
    bad = [
        (["--anchor", "who"], "--anchor who: expected one of sft, ppo, iq"),
        (["--k", "0"], "k=0.0"),
        (["--matches", "some"], "--matches some: expected all or a positive number"),
        (["--matches", "3", "--max-requests", "1"], "too few for one match"),
    ]
    for words, message in bad:
        assert tournament(files, server, tmp_path / "other", *words) == 2
        assert message in capsys.readouterr().err
    assert tournament(files[:1], server, tmp_path / "other") == 2


def test_a_model_that_wins_everything_is_reported_and_the_rates_are_kept(tmp_path, capsys):
    strong = write_answers(tmp_path / "s.jsonl", "strong", {key: "x 9" for key in range(4)})
    weak = write_answers(tmp_path / "w.jsonl", "weak", {key: "x 1" for key in range(4)})
    with JudgeServer(by_quality) as server:
        assert tournament([strong, weak], server, tmp_path / "out") == 1
        assert "nobody else ever won against strong" in capsys.readouterr().err
        assert json.loads((tmp_path / "out" / "tournament.json").read_text())["pairs"][0]["win"]["value"] == 1
        assert tournament([strong, weak], server, tmp_path / "out", "--prior", "1") == 0
    assert len(server.asked) == 8


def test_win_rates_per_category_are_those_of_its_prompts(files, tmp_path, capsys):
    with JudgeServer(by_quality) as server:
        assert tournament(files, server, tmp_path / "out") == 0
    capsys.readouterr()
    verdicts = str(tmp_path / "out" / "verdicts.jsonl")
    assert main(["categories", verdicts, "--prompts", files[0], "--baseline", "ppo", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in data["rows"]} == {"sft", "iq"} and len(data["rows"]) == 28
    for row in data["rows"]:
        keys = [key for key in range(28) if category_of(key) == row["category"]]
        points = [
            (quality(row["model"], k) > quality("ppo", k)) + (quality(row["model"], k) == quality("ppo", k)) / 2
            for k in keys
        ]
        assert row["win_rate"]["value"] == pytest.approx(sum(points) / 2) and row["num_counted"] == len(keys) == 2
    with (tmp_path / "out" / "categories.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["series"], row["category"], float(row["value"])) for row in rows] == [
        (row["model"], row["label"], row["win_rate"]["value"]) for row in data["rows"]
    ]
    assert [row["category"] for row in rows[:14]] == [*BEAVERTAILS_CATEGORIES.values()]
    assert (tmp_path / "out" / "categories.png").read_bytes().startswith(b"\x89PNG")
    # A prompt's category may come from the test set itself, and wrong ones are errors.
    assert main(["categories", verdicts, "--prompts", files[0], "--baseline", "gpt"]) == 2
    assert "baseline 'gpt': expected one of the judged models" in capsys.readouterr().err
    assert main(["categories", verdicts, "--prompts", files[0], "--set", "xstest"]) == 2
    assert "category='animal_abuse': expected one of homonyms" in capsys.readouterr().err
    some = write_answers(tmp_path / "some.jsonl", "x", {1: "y"}, category_of)
    assert main(["categories", verdicts, "--prompts", some]) == 2
    assert "judged ids have no category in --prompts" in capsys.readouterr().err


def test_pictures_show_the_rows_that_stand_beside_them(tmp_path):
    figures = {}

    def keeping(name, draw):
        def wrapped(figure, rows):
            figures[name] = figure
            draw(figure, rows)

        return wrapped

    bar = {"label": "x", "win": 0.5, "tie": 0.2, "lose": 0.3}
    bar |= {"win_low": 0.4, "win_high": 0.6, "lose_low": 0.2, "lose_high": 0.4}
    save_plot(tmp_path / "bars.png", [bar, {**bar, "label": "y"}], keeping("bars", draw_bars))
    [axes] = figures["bars"].axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.5, 0.2, 0.3] * 2)
    assert [line.get_text() for line in axes.get_yticklabels()] == ["x", "y"]
    assert axes.get_legend_handles_labels()[1] == ["win", "tie", "lose"]

    points = [
        {"series": s, "category": c, "value": v} for s, c, v in [("m", "a", 0.2), ("m", "b", 0.9), ("m", "c", 0.4)]
    ]
    save_plot(tmp_path / "radar.png", points, keeping("radar", lambda f, rows: draw_radar(f, rows, "base")))
    ring, polygon = figures["radar"].axes[0].lines
    assert set(ring.get_ydata()) == {0.5} and ring.get_label() == "base"
    assert list(polygon.get_ydata()) == [0.2, 0.9, 0.4, 0.2]

    ratings = [{"model": "m", "rating": 1010.0, "low": 990.0, "high": 1050.0}]
    ratings += [{"model": "anchor", "rating": 1000.0, "low": None, "high": None}]
    save_plot(tmp_path / "ratings.png", ratings, keeping("ratings", lambda f, rows: draw_ratings(f, rows, "rating")))
    bars = [container.lines[2][0].get_segments()[0] for container in figures["ratings"].axes[0].containers]
    assert [[x for x, _ in bar] for bar in bars] == [[990, 1050], [1000, 1000]]

    curve = [{"series": "s", "x": i, "y": y, "y_low": y - 1, "y_high": y + 1} for i, y in enumerate([1.0, 3.0, 2.0])]
    save_plot(tmp_path / "curve.png", curve, keeping("curve", draw_curves("x", "y")))
    [line] = figures["curve"].axes[0].lines
    assert list(line.get_ydata()) == [1.0, 3.0, 2.0] and len(figures["curve"].axes[0].collections) == 1
    with (tmp_path / "curve.csv").open() as file:
        assert [float(row["y_high"]) for row in csv.DictReader(file)] == [2.0, 4.0, 3.0]


def test_a_name_does_not_turn_the_text_of_a_picture_around(tmp_path):
    kept = []
    row = {"label": "a\u202evil", "win": 0.5, "tie": 0.2, "lose": 0.3}
    row |= {key: 0.5 for key in ("win_low", "win_high", "lose_low", "lose_high")}
    save_plot(tmp_path / "bars.png", [row], lambda figure, rows: (draw_bars(figure, rows), kept.append(figure)))
    assert [label.get_text() for label in kept[0].axes[0].get_yticklabels()] == ["a⟨U+202E⟩vil"]
    with (tmp_path / "bars.csv").open(encoding="utf-8") as file:
        assert next(csv.DictReader(file))["label"] == row["label"]  # the data is what it was


def test_plots_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="ends with .png"):
        save_plot(tmp_path / "x.pdf", [{"a": 1}], draw_bars)
    with pytest.raises(ValueError, match="no rows"):
        write_csv(tmp_path / "x.csv", [])
    with pytest.raises(ValueError, match="has the columns"):
        write_csv(tmp_path / "x.csv", [{"a": 1}, {"b": 1}])
    assert not list(tmp_path.iterdir())


def test_every_subcommand_has_help_and_json(capsys):
    for name in ("generate", "judge", "tournament", "elo", "categories"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["judge", "--nonsense"])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["absent_package", "absent_package.part"])
def test_a_missing_package_is_named_with_its_extra(name):
    with pytest.raises(ValueError, match=r"absent_package is not installed: pip install 'inverseq\[eval\]'"):
        require_package(name)
    with pytest.raises(ModuleNotFoundError):  # installed, but broken inside: not to be covered up
        require_package("json.absent")
