"""The studies of a small model: every method of compare.py through real TRL; convergence.py; nothing is made twice."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from inverseq import trainer
from inverseq.config_loading import load_config
from inverseq.metrics import read_metrics
from tests.tiny import make_tiny_model

pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("matplotlib", reason="the extra eval is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compare  # noqa: E402
import convergence  # noqa: E402

THINGS = ("oil", "water", "the first number", "a long word", "people", "one day", "time", "two parts")
TINY = (
    "model.device=cpu", "packing.train_tokens=1024", "optim.samples_per_step=4", "sampling.batch_size=4",
    "evaluation.num_prompts=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and files of pairs like those of Anthropic HH."""
    folder = tmp_path_factory.mktemp("compare")
    make_tiny_model(folder / "model", scale=0.2)
    (folder / "hh" / "harmless-base").mkdir(parents=True)
    for split, questions in {"train": ("how to find", "who made", "what is"), "test": ("help me with",)}.items():
        rows = []
        for question in questions:
            for thing in THINGS:
                start = f"\n\nHuman: {question} {thing}\n\nAssistant:"
                rows.append({"chosen": f"{start} please see {thing}", "rejected": f"{start} no way, not {thing}"})
        with gzip.open(folder / "hh" / "harmless-base" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_compare(inputs, monkeypatch, *words):
    out = inputs / "compare.jsonl"
    arguments = [
        "--hh", str(inputs / "hh"), "--model", str(inputs / "model"), "--rounds", "2", "--samples", "8", "--answers",
        "4", "--max-new-tokens", "6", "--lr", "3e-3", "--runs", str(inputs / "runs"), "--out", str(out), *words,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--set", *TINY])
    compare.main()
    return read_rows(out)


@pytest.fixture(scope="module")
def rows(inputs):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_compare(inputs, monkeypatch)


def test_every_method_is_evaluated_after_every_round_on_the_same_prompts(inputs, rows):
    rounds = {method: [row["round"] for row in rows if row["method"] == method] for method in compare.METHODS}
    assert rounds == {"sft": [0], "prompting": [0], "dpo": [0, 1, 2], "rloo": [0, 1, 2], "inverseq": [0, 1, 2]}
    assert {row["num_answers"] for row in rows} == {4}
    for row in rows:
        assert row["num_samples"] == 8 * row["round"] and -10 < row["reward_proxy"] < 10
        assert (row["train_duration_s"] > 0) == (row["train_cpu_s"] > 0) == (row["round"] > 0)
        assert row["win_rate_by_proxy"] == 0.5 or row["round"] or row["method"] == "prompting"
        assert 0 <= row["win_rate_standard_error"] <= 0.5 / 3**0.5  # of four answers
    for method in ("dpo", "rloo", "inverseq"):
        seconds = [row["train_cpu_s"] for row in rows if row["method"] == method]
        assert seconds == sorted(seconds)
    assert (inputs / "compare.png").stat().st_size > 10_000


@pytest.mark.parametrize("folder", ["dpo/round_2", "rloo/round_2", "inverseq/export"])
def test_every_method_has_trained_the_model(inputs, rows, folder):
    initial = load_file(inputs / "model" / "model.safetensors")
    trained = load_file(inputs / "runs" / folder / "model.safetensors")
    moved = [(weight.float() - initial[name]).abs().max().item() for name, weight in trained.items() if name in initial]
    assert len(moved) == len(initial) and max(moved) > 1e-3


def test_a_finished_row_is_not_made_again_and_a_cut_method_is(inputs, rows, monkeypatch):
    def fail(*arguments):
        raise AssertionError("trained again")

    for method in ("dpo", "rloo", "inverseq"):
        monkeypatch.setitem(compare.TRAINERS, method, fail)
    assert run_compare(inputs, monkeypatch) == rows
    out = inputs / "compare.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows if (row["method"], row["round"]) != ("dpo", 2)))
    with pytest.raises(AssertionError, match="trained again"):
        run_compare(inputs, monkeypatch, "--methods", "dpo")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_to_other_prompts_are_not_averaged(inputs, rows):
    arguments = SimpleNamespace(rounds=2, samples=8, lr=1e-3, model="m")
    with pytest.raises(SystemExit, match="prompting: answers other prompts than the initial model"):
        compare.row_of(arguments, None, "prompting", (0, compare.Stopwatch(), "m"), {"1": "x"}, {"1": "x", "2": "y"})


def test_a_stopped_convergence_run_resumes_and_a_finished_one_is_kept(inputs, monkeypatch):
    more = [
        *TINY, f"model.path={inputs / 'model'}", "epochs=2", "prompts.held_out=2", "sampling.samples_per_epoch=4",
        "sampling.max_new_tokens=6", "optim.lr=3e-3",
    ]  # fmt: skip
    out, runs = inputs / "convergence.jsonl", inputs / "convergence"
    words = ["--hh", str(inputs / "hh"), "--runs", str(runs), "--out", str(out), "--alphas", "1.4", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["convergence.py", *words, "--set", *more])
    run_epoch = trainer.run_epoch

    def stop_in_the_second(state, config):
        if state.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(state, config)

    def in_this_process(command, check):
        assert command[1:5] == ["-m", "inverseq.cli", "--config", "demo"] and check
        trainer.train(load_config("demo", [w for w in command[5:] if w != "--resume"]), resume="--resume" in command)

    monkeypatch.setattr(convergence, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(trainer, "run_epoch", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        convergence.main()
    first = runs / "alpha-1.4-seed-0" / "samples" / "epoch_0001.jsonl"
    written = first.stat().st_mtime_ns
    monkeypatch.setattr(trainer, "run_epoch", run_epoch)
    convergence.main()
    rows = read_rows(out)
    assert [(row["alpha"], row["seed"], row["epoch"]) for row in rows] == [(1.4, 0, 0), (1.4, 0, 1), (1.4, 0, 2)]
    assert first.stat().st_mtime_ns == written, "the finished epoch was made again"
    measured = read_metrics(runs / "alpha-1.4-seed-0", "epoch")
    start = measured[0]["held_out/mean_squared_log_ratio"]
    assert [row["held_out_relative"] * start for row in rows] == pytest.approx(
        [metrics["held_out/mean_squared_log_ratio"] for metrics in measured]
    )
    assert rows[0]["held_out_relative"] == 1.0 and rows[1]["mean_w_minus_l"] is not None
    monkeypatch.setattr(convergence, "subprocess", None)  # a call would fail
    convergence.main()
    assert [row["held_out"] for row in read_rows(out)] == [row["held_out"] for row in rows]
