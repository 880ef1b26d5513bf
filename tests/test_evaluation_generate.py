"""A model's answers to a test set: with and without the principle, resumable, and the same either way."""

import json
import os
import shutil
from pathlib import Path

import pytest

from inverseq.chat import load_principle
from inverseq.evaluation import generate as module
from inverseq.evaluation.cli import main
from inverseq.evaluation.readers import pair_up, read_responses
from tests.tiny import make_tiny_model

SETTINGS = ["sampling.max_new_tokens=4", "sampling.batch_size=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "category": "self_harm"}) + "\n" for i in range(6)))
    return path


def generate(model, prompts, out, *words):
    return main(["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), *words, *SETTINGS])


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def count_samples(monkeypatch, fail_after=None):
    """Numbers of prompts of the sampling calls; the call behind ``fail_after`` others is interrupted."""
    calls, sample = [], module.Work.sample

    def counted(self, sampler, items, turn, start):
        if len(calls) == fail_after:
            raise KeyboardInterrupt
        calls.append(len(items))
        return sample(self, sampler, items, turn, start)

    monkeypatch.setattr(module.Work, "sample", counted)
    return calls


def test_rows_are_what_the_judge_reads(model, prompts, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    assert generate(model, prompts, out, "--json") == 0
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [f"prompts-{i}" for i in range(1, 7)]
    assert list(rows[0]) == ["id", "messages", "response", "model", "finish_reason", "category"]
    assert {row["model"] for row in rows} == {"tiny"} and {row["category"] for row in rows} == {"self_harm"}
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    counts = json.loads(capsys.readouterr().out)
    assert counts["num_responses"] == 6
    assert counts["num_truncated"] == sum(row["finish_reason"] == "length" for row in rows)
    settings = json.loads((tmp_path / "answers.settings.json").read_text())["settings"]
    assert settings["principle"] is None and settings["sampling"]["max_new_tokens"] == 4


def test_an_interrupted_run_goes_on_and_ends_with_the_same_answers(model, prompts, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert generate(model, prompts, whole) == 0
    with monkeypatch.context() as patch:
        assert count_samples(patch, fail_after=1) == []
        assert generate(model, prompts, cut) == 130
    assert "interrupted" in capsys.readouterr().err and not cut.exists()
    partial = tmp_path / ".cut.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + b'{"rows": [{"id": "torn')  # and the kill tore a line
    with monkeypatch.context() as patch:
        calls = count_samples(patch)
        assert generate(model, prompts, cut) == 0
    assert calls == [2]  # chunks of 4 and 2: the first one was there
    assert cut.read_bytes() == whole.read_bytes() and not partial.exists()


def test_a_finished_file_is_not_made_again_and_not_overwritten(model, prompts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    assert generate(model, prompts, out) == 0
    before = out.read_bytes()
    calls = count_samples(monkeypatch)
    assert generate(model, prompts, out) == 0 and not calls
    for words, what in [
        (["--principle", "default", "--name", "tiny"], "principle"),
        (["--limit", "3"], "questions"),
        (["--name", "other"], "name"),
        (["seed=1"], "seed"),
    ]:
        assert generate(model, prompts, out, *words) == 2
        assert f"was made with other settings ({what}: " in capsys.readouterr().err
    assert out.read_bytes() == before
    other = shutil.copytree(model, tmp_path / "tiny")
    monkeypatch.setattr(module, "model_files", lambda path: {"model.safetensors": [1, 2]})  # other weights in there
    assert generate(model, prompts, out) == 2
    assert "model_files" in capsys.readouterr().err
    monkeypatch.undo()
    assert module.model_files(str(other)).keys() == {"model.safetensors"}
    os.utime(other / "model.safetensors", ns=(0, 0))
    assert module.model_files(str(other)) != module.model_files(str(model))
    (tmp_path / "answers.settings.json").unlink()
    assert generate(model, prompts, out) == 2
    assert "does not say what made it" in capsys.readouterr().err


def test_the_prompting_baseline_reads_the_principle_and_its_rows_do_not_show_it(model, prompts, tmp_path, monkeypatch):
    read = []
    sample = module.Work.sample

    def seeing(self, sampler, items, turn, start):
        read.extend(self.renderer.tokenizer.decode(item.policy_ids.tolist()) for item in items)
        assert all(len(item.prefix_ids) == 1 for item in items)
        return sample(self, sampler, items, turn, start)

    monkeypatch.setattr(module.Work, "sample", seeing)
    plain, prompted = tmp_path / "plain.jsonl", tmp_path / "prompted.jsonl"
    assert generate(model, prompts, plain, "--limit", "2") == 0
    assert generate(model, prompts, prompted, "--limit", "2", "--principle", "default") == 0
    principle = load_principle("default")
    assert [principle in text for text in read] == [False, False, True, True]
    chosen = [row["messages"][0]["content"] for row in rows_of(plain)]
    assert chosen == [row["messages"][0]["content"] for row in rows_of(prompted)] and chosen[1] in read[3]
    pairs = pair_up(read_responses(prompted, empty="keep"), read_responses(plain, empty="keep"))
    assert len(pairs) == 2 and principle not in prompted.read_text()
    assert {row["model"] for row in rows_of(prompted)} == {"tiny + principle"}


def test_second_turns_follow_the_models_own_answers(model, tmp_path):
    prompts, out = tmp_path / "bench.jsonl", tmp_path / "answers.jsonl"
    turns = [["one", "two"], ["eins", "zwei", "drei"], ["un"]]
    rows = [{"question_id": i, "category": "math", "turns": each} for i, each in enumerate(turns)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate(model, prompts, out) == 0
    rows = {row["id"]: row for row in rows_of(out)}
    assert [*rows] == [
        *(f"mt-bench-{i}" for i in range(3)), "mt-bench-0-turn-2", "mt-bench-1-turn-2", "mt-bench-1-turn-3",
    ]  # fmt: skip
    third = rows["mt-bench-1-turn-3"]["messages"]
    assert [turn["content"] for turn in third] == [
        "eins", rows["mt-bench-1"]["response"], "zwei", rows["mt-bench-1-turn-2"]["response"], "drei",
    ]  # fmt: skip
    assert {row["category"] for row in rows.values()} == {"math"}


def test_prompts_that_are_too_long_are_left_out_and_counted(model, prompts, tmp_path, capsys):
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 300}) + "\n")
    out = tmp_path / "answers.jsonl"
    assert generate(model, prompts, out, "prompts.max_prompt_tokens=60") == 0
    assert "1 prompts left out" in capsys.readouterr().out and len(rows_of(out)) == 6
    assert generate(model, prompts, tmp_path / "none.jsonl", "prompts.max_prompt_tokens=3") == 2
    assert "no prompt has at most 3 tokens" in capsys.readouterr().err


def test_a_trained_runs_configuration_is_taken(model, prompts, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: elsewhere}\ncontrast: {plain_system: Be brief.}\nrun_dir: runs/x\nepochs: 3\n")
    out = tmp_path / "answers.jsonl"
    assert generate(model, prompts, out, "--config", str(config)) == 0
    settings = json.loads((tmp_path / "answers.settings.json").read_text())["settings"]
    assert settings["plain_system"] == "Be brief." and settings["model"] == str(model)


def test_bad_input_is_one_error_before_any_weights_are_loaded(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "sampler_of", lambda *_: pytest.fail("weights were loaded"))
    out = tmp_path / "answers.jsonl"
    for words, message in [
        ([tmp_path / "absent", prompts, out], "no such folder"),
        ([model, tmp_path / "absent.jsonl", out], "no such file"),
        ([model, prompts, tmp_path / "answers.txt"], "expected a name that ends with .jsonl"),
        ([model, prompts, out, "--limit", "-2"], "--limit -2"),
        ([model, prompts, out, "--principle", "absent"], "contrast.principle='absent'"),
        ([model, prompts, out, "sampling.max_new_token=3"], "did you mean sampling.max_new_tokens"),
    ]:
        assert generate(*words) == 2, message
        shown = capsys.readouterr().err.strip().splitlines()
        assert message in shown[-1] and not out.exists()
    assert (
        main(
            [
                "generate",
                "--model",
                str(model),
                "--prompts",
                str(prompts),
                "--out",
                str(out),
                "sampling.max_new_tokens=5000",
            ]
        )
        == 2
    )
    assert "the model has 2048 positions in all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"), [("runs/demo/export", "demo/export"), ("zephyr-7b/", "zephyr-7b"), ("org/model", "model")]
)
def test_a_model_is_named_by_its_folder(path, name):
    assert module.default_name(path) == name
