"""The judge, against a stand-in server: what is asked, what is counted, what is kept, and what it costs."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from inverseq.evaluation.cli import main
from inverseq.evaluation.pairwise import read_verdicts
from tests.judge_server import CutOff, Hang, JudgeServer, Raw, Refusal, Status, by_length, first_shown, shown_answers

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def write_answers(path, model, answers, category=None):
    with open(path, "w") as file:
        for key, answer in answers.items():
            messages = [{"role": "user", "content": f"question {key}"}]
            row = {"id": str(key), "messages": messages, "response": answer, "model": model, "finish_reason": "stop"}
            file.write(json.dumps(row if category is None else {**row, "category": category(key)}) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Two models' answers to 12 questions: new's are longer on the first 8."""
    new = {key: "n" * (20 if key < 8 else 5) for key in range(12)}
    old = {key: "o" * 10 for key in range(12)}
    return write_answers(tmp_path / "new.jsonl", "new", new), write_answers(tmp_path / "old.jsonl", "old", old)


def judge(files, url, *words, out=None):
    """Exit status of the command; the summary is in the folder of results."""
    options = ["--judge", "stand-in", "--base-url", url, "--yes", *words]
    return main(["judge", "--a", files[0], "--b", files[1], *options, *(["--out", str(out)] if out else [])])


def results(files, out=None):
    return Path(out or Path(files[0]).parent / "new-vs-old")


def summary_of(files, out=None):
    return json.loads((results(files, out) / "summary.json").read_text())


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


def test_a_killed_run_asks_nothing_twice(files, tmp_path):
    release = threading.Event()

    def slow_after_ten(text, number):
        if number >= 10:
            release.wait(20)
        return by_length(text)

    words = ["judge", "--a", files[0], "--b", files[1], "--judge", "stand-in", "--yes", "--concurrency", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with JudgeServer(slow_after_ten) as server:
        command = [sys.executable, "-m", "inverseq.evaluation.cli", *words, "--base-url", server.url]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(server.asked) < 12 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(server.answered) == 10 and not results(files).exists()
        kept = server.answered[:]
        release.set()
        cache = Path(files[0]).parent / "judge_cache.jsonl"
        cache.write_bytes(cache.read_bytes() + b'{"key": "torn')  # and the kill tore a line
        del server.asked[:]
        assert judge(files, server.url) == 0
    assert not set(server.asked) & set(kept) and len(server.asked) == 14
    assert summary_of(files)["num_counted"] == 12 and summary_of(files)["win"]["value"] == pytest.approx(2 / 3)
    with JudgeServer(by_length):
        assert judge(files, server.url) == 0  # the cache holds all, behind the torn line too: the server is gone


@pytest.mark.parametrize(
    "fault",
    [
        Status(429),
        Status(429, retry_after="0.05"),
        Status(500),
        Status(503, body="<html>busy</html>"),
        Hang(1.0),
        Raw("<html>a proxy's page</html>", "text/html"),
        Raw('{"object": "error", "message": "no choices"}'),
        Raw('{"choices": [{"finish_reason": "stop"}]}'),
        Raw('{"choices": []}'),
        Raw('{"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}'),
        Raw('{"choices": not json'),
        Raw('{"choices": [{"message": {"content": "[[A]]"}, "finish_reason": "stop"}]}', broken=True),
    ],
    ids=lambda fault: type(fault).__name__ + str(getattr(fault, "code", getattr(fault, "body", ""))),
)
def test_a_fault_that_passes_is_waited_out(files, fault, monkeypatch):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.01)
    failed = set()

    def once_each(text, number):
        if text in failed or len(failed) >= 4:
            return by_length(text)
        failed.add(text)
        return fault

    with JudgeServer(once_each) as server:
        assert judge(files, server.url, "--timeout", "0.4") == 0
    summary = summary_of(files)
    assert summary["num_counted"] == 12 and summary["num_unreadable"] == summary["num_unanswered"] == 0
    assert summary["num_requests"] == len(server.asked) == 28


def test_a_rate_limit_holds_for_every_thread(files, monkeypatch):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.01)
    with JudgeServer(lambda text, number: Status(429, retry_after="0.6") if number == 0 else by_length(text)) as server:
        assert judge(files, server.url, "--concurrency", "3") == 0
    started = server.times[0]
    early = [at - started for at in server.times[1:] if at - started < 0.55]
    assert len(early) < 24 and max(early, default=0) < 0.3  # what was on its way, and then a pause
    assert server.most_at_once <= 3


def test_a_server_that_stays_down_stops_the_run_and_keeps_what_there_is(files, monkeypatch, capsys):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.001)
    with JudgeServer(lambda text, number: by_length(text) if number < 6 else Status(500)) as server:
        assert judge(files, server.url, "--retries", "1", "--concurrency", "1") == 1
        shown = capsys.readouterr()
        assert "18 of 24 questions have no answer (8 questions in a row stayed unanswered" in shown.err
        assert "the same command asks only those" in shown.err
        assert len(server.asked) <= 6 + 2 * 10
    assert len(read_verdicts([results(files) / "verdicts.jsonl"])) == 6
    assert summary_of(files)["num_counted"] == 3 and summary_of(files)["num_unanswered"] == 18
    with JudgeServer(by_length) as other:
        server_port = other.url  # another address is another judge: the answers of the first do not count
        assert judge(files, server_port) == 0 and len(other.asked) == 24


def test_an_order_without_its_counterpart_is_left_out(files, monkeypatch):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.001)
    turned_down = Status(400, body='{"error": {"message": "content filter"}}')

    def answer(text, number):
        return turned_down if shown_answers(text)[0].startswith("o") and "question 3" in text else by_length(text)

    with JudgeServer(answer) as server:
        assert judge(files, server.url) == 1
    assert len(server.asked) == 24  # 400 is not repeated
    rows = read_verdicts([results(files) / "verdicts.jsonl"])
    assert "3" not in {row.id for row in rows} and len(rows) == 22


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(401, body=json.dumps({"error": {"message": f"bad key {KEY}"}})), "status 401"),
        (Status(403), "status 403"),
        (Status(404, body='{"error": {"message": "no such model"}}'), "no such model"),
        (Status(429, body='{"error": {"message": "pay", "code": "insufficient_quota"}}'), "insufficient_quota"),
    ],
    ids=["401", "403", "404", "quota"],
)
def test_an_error_that_repeating_cannot_mend_stops_at_once(files, status, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer(lambda text, number: status) as server:
        assert judge(files, server.url, "--concurrency", "2") == 1
    assert len(server.asked) <= 4
    shown = capsys.readouterr()
    assert words in shown.err and KEY not in shown.err + shown.out


def test_the_key_goes_into_the_header_and_nowhere_else(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(lambda text, number: f"Your key is {KEY}.\n[[A]]") as server:
        assert judge(files, server.url, "--key-env", "JUDGE_KEY") == 0
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        url = server.url.replace("http://", "http://user:password@") + "?key=parameter"
        assert judge(files, url, "--key-env", "JUDGE_KEY", "--request", '{"seed": 1}') == 0
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (KEY, "password", "parameter"):
        assert secret not in shown.out + shown.err and secret.encode() not in written
    assert b"Your key is ***." in written


def test_without_a_key_openai_is_not_asked(files, monkeypatch, capsys):
    words = ["judge", "--a", files[0], "--b", files[1], "--judge", "gpt-4-turbo", "--yes"]
    assert main(words) == 2
    assert "put it into the environment variable OPENAI_API_KEY" in capsys.readouterr().err
    assert not results(files).exists()


def test_refusals_and_answers_cut_off_are_no_verdicts(files, capsys):
    def answer(text, number):
        if "question 1\n" in text:
            return Refusal("I cannot judge this. [[A]]")
        return CutOff("So far [[A]]") if "question 2\n" in text else by_length(text)

    with JudgeServer(answer) as server:
        assert judge(files, server.url) == 0
    summary = summary_of(files)
    assert (summary["num_refused"], summary["num_cut_off"], summary["num_unreadable"]) == (2, 2, 2)
    assert summary["num_counted"] == 10
    raws = {row.raw for row in read_verdicts([results(files) / "verdicts.jsonl"]) if row.verdict is None}
    assert raws == {"I cannot judge this. [[A]]", "So far [[A]]"}
    assert "2 refusals, 2 answers cut off" in capsys.readouterr().out


def test_a_judge_that_never_gives_a_verdict_is_an_error_and_its_words_are_kept(files, capsys):
    with JudgeServer(lambda text, number: "Both have merits.") as server:
        assert judge(files, server.url) == 1
    assert "none of 24 answers of the judge holds a readable verdict" in capsys.readouterr().err
    rows = read_verdicts([results(files) / "verdicts.jsonl"])
    assert len(rows) == 24 and {(row.raw, row.verdict) for row in rows} == {("Both have merits.", None)}


def test_equal_answers_are_ties_that_nobody_is_asked_about(tmp_path):
    new = write_answers(tmp_path / "new.jsonl", "new", {1: "same", 2: "longer one"})
    old = write_answers(tmp_path / "old.jsonl", "old", {1: "same", 2: "short"})
    with JudgeServer(by_length) as server:
        assert judge((new, old), server.url) == 0
    assert len(server.asked) == 2
    summary = summary_of((new, old))
    assert (summary["num_equal_answers"], summary["tie"]["value"], summary["win"]["value"]) == (2, 0.5, 0.5)


def test_the_budget_is_checked_before_and_kept_during_the_run(files, monkeypatch, capsys):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.001)
    with JudgeServer(lambda text, number: Status(500) if number % 2 else by_length(text)) as server:
        assert judge(files, server.url, "--max-requests", "23") == 2
        assert not server.asked and "--max-requests 23: too few for 24 requests" in capsys.readouterr().err
        assert judge(files, server.url, "--max-requests", "24") == 1
        assert len(server.asked) == 24 and "the budget of 24 requests is spent" in capsys.readouterr().err
        assert judge(files, server.url, "--max-requests", "24") == 0  # the rest
        assert judge(files, server.url, "--max-requests", "0") == 0  # all cached


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
