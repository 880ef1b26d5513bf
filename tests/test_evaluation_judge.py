"""The judge, against a stand-in server: what is asked, what is counted, and what is written."""

import csv
import json
import random

import pytest

from inverseq.evaluation.cli import main
from inverseq.evaluation.pairwise import read_verdicts
from tests.judge_server import (
    JudgeServer,
    by_length,
    first_shown,
    judge,
    results,
    shown_answers,
    summary_of,
    write_answers,
    write_two_models,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    return write_two_models(tmp_path)


def test_both_orders_are_asked_and_the_verdict_names_the_model(files, capsys):
    with JudgeServer(by_length) as server:
        assert judge(files, server.url, "--json") == 0
    assert len(server.asked) == 24
    rows = read_verdicts([results(files) / "verdicts.jsonl"])
    assert [row.order for row in rows] == ["ab", "ba"] * 12
    assert all(row.verdict == ("a" if int(row.id) < 8 else "b") for row in rows)
    assert {(row.a, row.b, row.judge) for row in rows} == {("new", "old", "stand-in")}
    assert all(row.raw.startswith("The longer one.") for row in rows)
    first_row = json.loads((results(files) / "verdicts.jsonl").read_text().splitlines()[0])
    assert list(first_row) == ["id", "a", "b", "order", "raw", "verdict", "judge"]
    summary = summary_of(files)
    assert json.loads(capsys.readouterr().out) == summary
    assert [summary[key]["value"] for key in ("win", "tie", "lose", "flip_rate")] == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert summary["mean_length_difference"] == pytest.approx((8 * 10 - 4 * 5) / 12)
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 1024
    assert len(server.bodies[0]["messages"]) == 1


def test_swapping_orders_removes_a_position_bias(files):
    with JudgeServer(first_shown) as server:
        assert judge(files, server.url) == 0
    summary = summary_of(files)
    assert summary["tie"]["value"] == summary["flip_rate"]["value"] == summary["first_position_rate"] == 1
    assert summary["win_minus_lose"]["value"] == 0


def test_a_better_model_shows_through_a_position_bias(tmp_path):
    rng = random.Random(0)
    quality = {key: rng.gauss(0.5, 1) for key in range(150)}
    new = write_answers(tmp_path / "new.jsonl", "new", {key: f"new {value}" for key, value in quality.items()})
    old = write_answers(tmp_path / "old.jsonl", "old", dict.fromkeys(range(150), "old 0.0"))

    def biased(text, number):
        first, second = (float(answer.split()[1]) for answer in shown_answers(text))
        return "[[A]]" if first + 0.7 > second else "[[B]]"

    with JudgeServer(biased) as server:
        assert judge((new, old), server.url, "--concurrency", "4") == 0
    summary = summary_of((new, old))
    assert summary["win"]["value"] == pytest.approx(sum(value > 0.7 for value in quality.values()) / 150)
    assert summary["lose"]["value"] == pytest.approx(sum(value < -0.7 for value in quality.values()) / 150)
    assert summary["flip_rate"]["value"] == pytest.approx(summary["tie"]["value"]) and summary["tie"]["value"] > 0.2
    assert summary["first_position_rate"] > 0.6


def test_random_orders_ask_once_and_the_same_when_repeated(files, tmp_path):
    with JudgeServer(first_shown) as server:
        assert judge(files, server.url, "--orders", "random") == 0
        rows = read_verdicts([results(files) / "verdicts.jsonl"])
        assert judge(files, server.url, "--orders", "random") == 0
    assert len(server.asked) == 12 and {row.order for row in rows} == {"ab", "ba"}
    assert all(row.verdict == row.order[0] for row in rows)  # the first one shown
    assert read_verdicts([results(files) / "verdicts.jsonl"]) == rows


def test_the_bar_charts_data_stands_beside_it(files):
    with JudgeServer(by_length) as server:
        assert judge(files, server.url) == 0
    with (results(files) / "win_rate.csv").open() as file:
        [row] = csv.DictReader(file)
    summary = summary_of(files)
    for key in ("win", "tie", "lose"):
        assert float(row[key]) == summary[key]["value"]
    assert float(row["win_low"]) == summary["win"]["low"] and float(row["lose_high"]) == summary["lose"]["high"]
    assert row["label"] == "new\nagainst old"
    assert (results(files) / "win_rate.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_asked_twice(files, tmp_path):
    with JudgeServer(by_length) as server:
        assert judge(files, server.url) == 0
        before = (results(files) / "verdicts.jsonl").read_bytes()
        assert judge(files, server.url) == 0
        assert len(server.asked) == 24 and (results(files) / "verdicts.jsonl").read_bytes() == before
        assert summary_of(files)["num_requests"] == 0 and summary_of(files)["num_cached"] == 24
        assert judge(files, server.url, "--request", '{"max_tokens": 7}') == 0  # another question
        assert len(server.asked) == 48 and server.bodies[-1]["max_tokens"] == 7


def test_equal_answers_are_ties_that_nobody_is_asked_about(tmp_path):
    new = write_answers(tmp_path / "new.jsonl", "new", {1: "same", 2: "longer one"})
    old = write_answers(tmp_path / "old.jsonl", "old", {1: "same", 2: "short"})
    with JudgeServer(by_length) as server:
        assert judge((new, old), server.url) == 0
    assert len(server.asked) == 2
    summary = summary_of((new, old))
    assert (summary["num_equal_answers"], summary["tie"]["value"], summary["win"]["value"]) == (2, 0.5, 0.5)


def test_nothing_is_asked_without_confirmation(files, capsys, monkeypatch):
    with JudgeServer(by_length) as server:
        words = ["judge", "--a", files[0], "--b", files[1], "--judge", "stand-in", "--base-url", server.url]
        assert main(words) == 2
        assert "pass --yes" in capsys.readouterr().err

        class Terminal:
            def __init__(self, line):
                self.line = line

            def isatty(self):
                return True

            def readline(self):
                return self.line

        monkeypatch.setattr("sys.stdin", Terminal("n\n"))
        assert main(words) == 2 and not server.asked
        assert "tokens to read" in (shown := capsys.readouterr().err) and "24 requests to stand-in" in shown
        monkeypatch.setattr("sys.stdin", Terminal("y\n"))
        assert main(words) == 0 and len(server.asked) == 24


def test_a_limit_takes_a_seeded_part_of_the_prompts(files, tmp_path):
    with JudgeServer(by_length) as server:
        chosen = []
        for seed in ("0", "0", "1"):
            assert judge(files, server.url, "--limit", "5", "--seed", seed) == 0
            chosen.append({row.id for row in read_verdicts([results(files) / "verdicts.jsonl"])})
    assert chosen[0] == chosen[1] != chosen[2] and all(len(ids) == 5 for ids in chosen)


def test_bad_input_is_one_error_before_anything_is_asked(files, tmp_path, capsys):
    new, old = files
    fewer = write_answers(tmp_path / "fewer.jsonl", "fewer", {1: "x", 99: "y"})
    empty = write_answers(tmp_path / "empty.jsonl", "empty", {key: "" if key == 3 else "x" for key in range(12)})
    same = write_answers(tmp_path / "same.jsonl", "old", {key: "x" for key in range(12)})
    bare = write_answers(tmp_path / "none.jsonl", "none", {})
    with JudgeServer(by_length) as server:
        for pair, words, message in [
            ((new, fewer), [], "do not pair up by id: 11 ids are only in the first"),
            ((new, empty), [], r"1 of 12 responses are empty ('3'); --empty drop"),
            ((same, old), [], "both are of the model 'old'"),
            ((new, bare), [], "holds no responses"),
            ((new, str(tmp_path / "absent.jsonl")), [], "no such file"),
            ((new, old), ["--request", "[1]"], "--request [1]: expected a JSON object"),
            ((new, old), ["--request", "{"], "is not JSON"),
            ((new, old), ["--concurrency", "0"], "--concurrency 0: expected 1 or more"),
            ((new, old), ["--limit", "-1"], "--limit -1"),
            ((new, old), ["--base-url", "localhost:8000/v1"], "--base-url localhost:8000/v1: expected http://"),
            ((new, old), ["--judge-prompt", "absent.txt"], "expected a text file or a shipped name"),
        ]:
            assert judge(pair, server.url, *words) == 2, message
            shown = capsys.readouterr().err
            assert message in shown and len(shown.strip().splitlines()) == 1
        assert not server.asked
        assert judge((new, fewer), server.url, "--common") == 0 and len(server.asked) == 2
        assert judge((new, empty), server.url, "--empty", "drop") == 0 and len(server.asked) == 2 + 20


def test_results_of_another_judge_are_not_overwritten(files, capsys):
    with JudgeServer(by_length) as server:
        assert judge(files, server.url) == 0
        words = ["judge", "--a", files[0], "--b", files[1], "--base-url", server.url, "--yes", "--judge", "other"]
        assert main(words) == 2
    assert "holds verdicts of stand-in on new and old; choose another --out" in capsys.readouterr().err
    assert len(server.asked) == 24


def test_a_second_turn_is_judged_with_the_turns_before_it(tmp_path):
    def rows(path, model, first):
        user, again = {"role": "user", "content": "one"}, {"role": "user", "content": "two"}
        messages = [user, {"role": "assistant", "content": first}, again]
        row = {"id": "t", "messages": messages, "response": f"{model} says", "model": model, "finish_reason": "stop"}
        path.write_text(json.dumps(row) + "\n")
        return str(path)

    files = rows(tmp_path / "new.jsonl", "new", "first of new"), rows(tmp_path / "old.jsonl", "old", "first of old")
    with JudgeServer(by_length) as server:
        assert judge(files, server.url) == 0
    shown = {shown_answers(text) for text in server.asked}
    new, old = (f"assistant: first of {m}\n\nuser: two\n\nassistant: {m} says" for m in ("new", "old"))
    assert shown == {(new, old), (old, new)}
    assert all("user: one\n---" in text for text in server.asked)
