"""Test sets and files of answers: the real ones are read, and what is wrong is named."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from inverseq.evaluation.readers import (
    BEAVERTAILS_CATEGORIES,
    CATEGORY_SETS,
    pair_up,
    read_categories,
    read_questions,
    read_responses,
    turn_id,
)

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real test sets are not there")


def answer(key, response="yes", model="m", question="why?", **more):
    messages = [{"role": "user", "content": question}]
    return {"id": key, "messages": messages, "response": response, "model": model, "finish_reason": "stop", **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@real_data
def test_beavertails_has_14_categories_of_50_prompts():
    questions, report = read_questions(str(DATA / "beavertails-evaluation.json"))
    counts = Counter(question.prompt.category for question in questions)
    assert counts == dict.fromkeys(BEAVERTAILS_CATEGORIES, 50) and "700 prompts (BeaverTails-Evaluation)" in report
    assert questions[0].prompt.id == "beavertails-1" and questions[0].prompt.messages[0]["role"] == "user"


@real_data
def test_xstest_and_mt_bench_have_the_categories_that_they_are_known_for():
    xstest, _ = read_questions(str(DATA / "xstest_prompts.csv"))
    assert Counter(question.prompt.category for question in xstest) == dict.fromkeys(CATEGORY_SETS["xstest"], 25)
    bench, _ = read_questions(str(DATA / "mt_bench_question.jsonl"))
    assert Counter(question.prompt.category for question in bench) == dict.fromkeys(CATEGORY_SETS["mt-bench"], 10)
    assert all(len(question.follow_ups) == 1 for question in bench) and bench[0].prompt.id == "mt-bench-81"
    assert bench[0].follow_ups == ("Rewrite your previous response. Start every sentence with the letter A.",)


@real_data
def test_hh_test_splits_are_read_as_training_reads_them():
    questions, report = read_questions(str(DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"))
    assert len(questions) == 199 and "dropped 1" in report
    assert all(question.prompt.messages[-1]["role"] == "user" for question in questions)


def test_answers_of_another_model_are_questions_with_the_same_ids(tmp_path):
    path = write(tmp_path / "f.jsonl", [answer("x-7", category="self_harm"), answer("x-9", question="how?")])
    questions, _ = read_questions(str(path))
    assert [question.prompt.id for question in questions] == ["x-7", "x-9"]
    assert questions[0].prompt.category == "self_harm" and questions[1].prompt.messages[0]["content"] == "how?"


def test_plain_rows_and_gzip_are_read(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "Hi", "category": "greeting"}\n'))
    [question] = read_questions(str(path))[0]
    assert (question.prompt.id, question.prompt.category) == ("own-1", "greeting")
    bench = tmp_path / "bench.jsonl.gz"
    bench.write_bytes(gzip.compress(json.dumps({"question_id": 3, "category": "math", "turns": ["a", "b"]}).encode()))
    assert read_questions(str(bench))[0][0].follow_ups == ("b",)
    assert read_questions("bundled")[0]


def test_a_wrong_row_is_named(tmp_path):
    good = {"prompt": "p", "category": "self_harm", "category_id": 1}
    for name, rows, words in [
        (
            "a.json",
            [good, {**good, "category": "gardening"}],
            "a.json row 2: category='gardening': expected one of the 14",
        ),
        ("b.json", [good, {**good, "prompt": " "}], "b.json row 2: prompt=' '"),
        ("c.json", {"rows": []}, "c.json: expected a list of objects"),
        ("d.json", [{"question": 1}], "d.json: expected rows of BeaverTails-Evaluation or MT-bench; found question"),
        ("e.jsonl", [{"question_id": 1, "turns": []}], "e.jsonl:1: turns: expected a list of texts"),
        ("f.jsonl", [answer("1"), {**answer("2"), "messages": "hi"}], "f.jsonl:2: messages: expected a list"),
        ("g.jsonl", [answer("1"), answer("1")], "1 ids stand there twice \\('1'\\)"),
        ("h.jsonl", [{"unknown": 1}], "h.jsonl:1: expected the keys chosen and rejected"),
    ]:
        path = tmp_path / name
        path.write_text(json.dumps(rows)) if name.endswith(".json") else write(path, rows)
        with pytest.raises(ValueError, match=words):
            read_questions(str(path))
    for name, text, words in [
        ("i.csv", "id,text\n1,2\n", r"expected the columns id, prompt and type \(XSTest\); found id, text"),
        ("j.csv", "id,prompt,type,label\n", "holds no rows"),
        ("k.json", "{", "is not JSON"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            read_questions(str(tmp_path / name))
    with pytest.raises(ValueError, match="no such file"):
        read_questions(str(tmp_path / "absent.jsonl"))


def test_xstest_rows_with_line_breaks_and_commas_stay_whole(tmp_path):
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["id", "prompt", "type", "label"], ["1", 'How, "exactly",\ncan I kill time?', "homonyms", "safe"]]
        )
    [question] = read_questions(str(path))[0]
    assert question.prompt.messages[0]["content"] == 'How, "exactly",\ncan I kill time?'


def test_answer_files_are_checked(tmp_path):
    path = tmp_path / "f.jsonl"
    for rows, words in [
        ([answer("1"), answer("1")], "the id '1' stands there twice"),
        ([answer("1"), answer("2", model="other")], "answers of several models \\('m', 'other'\\)"),
        ([answer("1"), answer("2", response=" \n")], "1 of 2 responses are empty \\('2'\\)"),
        ([{**answer("1"), "response": 5}], "line 1: response=5"),
        ([{"id": "1"}], "line 1: no field 'messages'"),
        ([], "holds no responses"),
    ]:
        write(path, rows)
        with pytest.raises(ValueError, match=words):
            read_responses(path)
    write(path, [answer("1"), answer("2", response="")])
    assert [*read_responses(path, empty="drop").answers] == ["1"]
    assert [*read_responses(path, empty="keep").answers] == ["1", "2"]


def test_pairs_are_of_one_question(tmp_path):
    a = read_responses(write(tmp_path / "a.jsonl", [answer("1"), answer("2", category="x")]))
    b = read_responses(write(tmp_path / "b.jsonl", [answer("2", model="n", response="no"), answer("1", model="n")]))
    first, second = pair_up(a, b)
    assert (first.id, second.id, second.response_a, second.response_b, second.category) == ("1", "2", "yes", "no", "x")
    other = read_responses(
        write(tmp_path / "c.jsonl", [answer("1", model="n", question="what?"), answer("2", model="n")])
    )
    with pytest.raises(ValueError, match="id '1' is another question in each"):
        pair_up(a, other)
    more = read_responses(write(tmp_path / "d.jsonl", [answer("1", model="n"), answer("3", model="n")]))
    with pytest.raises(
        ValueError, match=r"1 ids are only in the first \('2'\), 1 only in the second \('3'\); --common"
    ):
        pair_up(a, more)
    assert [pair.id for pair in pair_up(a, more, common=True)] == ["1"]
    none = read_responses(write(tmp_path / "e.jsonl", [answer("9", model="n")]))
    with pytest.raises(ValueError, match="have no id in common"):
        pair_up(a, none, common=True)


def test_categories_of_ids_are_looked_up_and_checked(tmp_path):
    known = CATEGORY_SETS["beavertails"]
    first = write(tmp_path / "a.jsonl", [answer("1", category="self_harm"), answer("2")])
    bench = write(tmp_path / "b.jsonl", [{"question_id": 5, "category": "math", "turns": ["a", "b"]}])
    assert read_categories([str(first)], known) == {"1": "self_harm"}
    assert read_categories([str(bench)], None) == {"mt-bench-5": "math", "mt-bench-5-turn-2": "math"}
    assert turn_id("mt-bench-5", 2) == "mt-bench-5-turn-2"
    with pytest.raises(ValueError, match="id 'mt-bench-5': category='math': expected one of animal_abuse"):
        read_categories([str(bench)], known)
    second = write(tmp_path / "c.jsonl", [answer("1", category="privacy_violation")])
    with pytest.raises(ValueError, match="id '1': is of category 'self_harm' and of 'privacy_violation'"):
        read_categories([str(first), str(second)], known)
    bare = write(tmp_path / "d.jsonl", [answer("1")])
    with pytest.raises(ValueError, match="no row has a category"):
        read_categories([str(bare)], known)
