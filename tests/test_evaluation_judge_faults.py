"""A judge that fails: what is waited out, what stops the run, what is kept, and what is never told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from inverseq.evaluation.cli import main
from inverseq.evaluation.judge_client import JudgeClient, retry_after_s
from inverseq.evaluation.pairwise import read_verdicts
from tests.judge_server import (
    CutOff,
    Hang,
    JudgeServer,
    Raw,
    Refusal,
    Status,
    by_length,
    judge,
    results,
    shown_answers,
    summary_of,
    write_answers,
    write_two_models,
)

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    return write_two_models(tmp_path)


def test_a_killed_run_asks_nothing_twice(files, tmp_path):
    release = threading.Event()

    def slow_after_ten(text, number):
        if number >= 10:
            release.wait(600)
        return by_length(text)

    words = ["judge", "--a", files[0], "--b", files[1], "--judge", "stand-in", "--yes", "--concurrency", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with JudgeServer(slow_after_ten) as server:
        command = [sys.executable, "-m", "inverseq.evaluation.cli", *words, "--base-url", server.url]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while (len(server.asked) < 12 or len(server.answered) < 10) and time.monotonic() < deadline:
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
        Status(429, retry_after="inf"),
        Status(500),
        Status(503, body="<html>busy</html>"),
        Hang(3.0),
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
        assert judge(files, server.url, "--timeout", "1.5" if isinstance(fault, Hang) else "60") == 0
    summary = summary_of(files)
    assert summary["num_counted"] == 12 and summary["num_unreadable"] == summary["num_unanswered"] == 0
    assert summary["num_requests"] == 28 or (isinstance(fault, Hang) and summary["num_requests"] > 28)
    assert len(server.asked) == summary["num_requests"]


def test_an_interrupt_while_questions_are_handed_out_asks_none_of_those_that_wait(files, monkeypatch):
    submit, submitted = ThreadPoolExecutor.submit, []

    def submit_or_interrupt(pool, *task):
        submitted.append(task)
        if len(submitted) == 20:
            raise KeyboardInterrupt
        return submit(pool, *task)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_or_interrupt)
    with JudgeServer(lambda text, number: Hang(0.5)) as server:
        assert judge(files, server.url, "--concurrency", "1") == 130
        assert len(server.asked) < 10


def test_a_rate_limit_holds_for_every_thread(files, monkeypatch):
    limited, back_off = threading.Event(), JudgeClient.back_off

    def back_off_and_tell(*arguments):
        back_off(*arguments)
        limited.set()

    monkeypatch.setattr(JudgeClient, "back_off", back_off_and_tell)

    def limit_first(text, number):
        if number == 0:
            return Status(429, retry_after="1.5")
        if number < 3:  # on their way while the limit arrives
            limited.wait(600)
        return by_length(text)

    with JudgeServer(limit_first) as server:
        assert judge(files, server.url, "--concurrency", "3") == 0
    assert sum(at - server.times[0] < 1.4 for at in server.times) <= 3
    assert len(server.asked) == 25 and server.most_at_once <= 3


def test_a_server_that_stays_down_stops_the_run_and_keeps_what_there_is(files, monkeypatch, capsys):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.001)
    with JudgeServer(lambda text, number: by_length(text) if number < 6 else Status(500)) as server:
        assert judge(files, server.url, "--retries", "1", "--concurrency", "1") == 1
        shown = capsys.readouterr()
        assert "18 of 24 questions have no answer (8 questions in a row stayed unanswered" in shown.err
        assert "the same command asks only those" in shown.err
        assert len(server.asked) == 6 + 2 * 8
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
    assert len(server.asked) <= 2  # one of each thread
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


def test_the_line_end_of_a_key_is_no_part_of_it(files, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    with JudgeServer(by_length) as server:
        assert judge(files, server.url, "--retries", "0") == 0
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_a_server_that_asks_for_a_day_is_given_an_hour():
    def response(seconds):
        return SimpleNamespace(headers={"retry-after": seconds})

    found = [retry_after_s(response(text)) for text in ("86400", "7", "-1", "nan", "Wed, 21 Oct 2026 07:28:00 GMT")]
    assert found == [3600.0, 7.0, 0.0, None, None]


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


def test_ties_of_equal_answers_do_not_hide_a_judge_without_verdicts(tmp_path, capsys):
    texts = {1: "same", 2: "longer one"}, {1: "same", 2: "short"}
    files = [
        write_answers(tmp_path / f"{name}.jsonl", name, text) for name, text in zip(("new", "old"), texts, strict=True)
    ]
    with JudgeServer(lambda text, number: "Both have merits.") as server:
        assert judge(files, server.url) == 1
        assert "none of 2 answers of the judge holds a readable verdict" in capsys.readouterr().err
        options = ["--judge", "stand-in", "--base-url", server.url, "--yes", "--out", str(tmp_path / "out")]
        assert main(["tournament", *files, *options]) == 1
        assert "none of 2 answers of the judge holds a readable verdict" in capsys.readouterr().err


def test_the_budget_is_checked_before_and_kept_during_the_run(files, monkeypatch, capsys):
    monkeypatch.setattr("inverseq.evaluation.judge_client.BACKOFF_S", 0.001)
    with JudgeServer(lambda text, number: Status(500) if number % 2 else by_length(text)) as server:
        assert judge(files, server.url, "--max-requests", "23") == 2
        assert not server.asked and "--max-requests 23: too few for 24 requests" in capsys.readouterr().err
        assert judge(files, server.url, "--max-requests", "24") == 1
        assert len(server.asked) == 24 and "the budget of 24 requests is spent" in capsys.readouterr().err
        assert judge(files, server.url, "--max-requests", "24") == 0  # the rest
        assert judge(files, server.url, "--max-requests", "0") == 0  # all cached
