"""Reward curves: what a classifier gives, how increments are scaled, and what the command writes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from inverseq.evaluation.cli import main
from inverseq.evaluation.reward_model import RewardModel
from inverseq.evaluation.rewards import increments
from tests.tiny import make_tiny_tokenizer

# A model in the manner of ArmoRM: several objectives, and their combination as ``score``.
ARMO_CODE = """
from dataclasses import dataclass
import torch
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None

class Armo(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        rewards = super().forward(*args, **kwargs).logits
        return Output(rewards=rewards, score=rewards @ torch.tensor([1.0, 10.0, 100.0]), logits=rewards)
"""


def make_reward_model(folder, *, labels, pad_token="<|endoftext|>", armo=False):
    tokenizer = make_tiny_tokenizer()
    tokenizer.pad_token = pad_token
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=len(labels), id2label=dict(enumerate(labels)), pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if armo:
        (folder / "armo.py").write_text(ARMO_CODE)
        content = json.loads((folder / "config.json").read_text())
        content["auto_map"] = {"AutoModelForSequenceClassification": "armo.Armo"}
        (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("reward"), labels=["reward"])


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("armo"), labels=["honest", "kind", "brief"], armo=True)


CONVERSATIONS = [([{"role": "user", "content": "what is true?"}], "the fact " * n + "end") for n in (1, 7, 3, 2, 5)]


def alone(folder, messages, response):
    """The classifier's outputs for one conversation, without padding."""
    tokenizer = make_tiny_tokenizer()
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(ids).logits[0].tolist()


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>"])
def test_batches_give_what_each_answer_gets_alone(tmp_path, pad_token):
    folder = make_reward_model(tmp_path, labels=["reward"], pad_token=pad_token)
    expected = [alone(folder, *conversation)[0] for conversation in CONVERSATIONS]
    np.testing.assert_allclose(RewardModel(str(folder)).score(CONVERSATIONS, batch_size=3), expected, atol=1e-5)


def test_a_model_of_several_objectives_gives_its_score_or_the_named_objective(armo):
    outputs = np.array([alone(armo, *conversation) for conversation in CONVERSATIONS])
    scores = RewardModel(str(armo), trust_remote_code=True).score(CONVERSATIONS)
    np.testing.assert_allclose(scores, outputs @ [1, 10, 100], rtol=1e-4)
    for objective in ("kind", "1"):
        kind = RewardModel(str(armo), objective=objective, trust_remote_code=True).score(CONVERSATIONS)
        np.testing.assert_allclose(kind, outputs[:, 1], atol=1e-5)


def test_several_outputs_without_a_choice_are_refused(tmp_path):
    folder = make_reward_model(tmp_path, labels=["honest", "kind"])
    with pytest.raises(ValueError, match="gives 2 numbers; choose one by --objective .honest, kind"):
        RewardModel(str(folder)).score(CONVERSATIONS)
    with pytest.raises(ValueError, match="--objective rude: expected one of honest, kind"):
        RewardModel(str(folder), objective="rude")


def test_increments_are_over_epoch_zero_and_in_standard_deviations_across_epochs():
    rewards = {0: {"a": 1.0, "b": 2.0}, 1: {"a": 2.0, "b": 4.0}, 2: {"a": 4.0, "b": 6.0}}
    scale = np.std([1.5, 3.0, 5.0], ddof=1)
    rows = increments(rewards, series="run")
    assert [row["increment"] for row in rows] == pytest.approx([0.0, 1.5 / scale, 3.5 / scale])
    assert rows[0]["increment_low"] == rows[0]["increment_high"] == 0.0
    assert (rows[1]["increment_low"], rows[1]["increment_high"]) == pytest.approx((1 / scale, 2 / scale))
    ppo = increments({0: {"a": 3.0, "b": 3.0}}, series="ppo", zero=rewards, scale=scale)
    assert ppo[0]["increment"] == pytest.approx(1.5 / scale)


def write_answers(path, answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": name,
            "messages": [{"role": "user", "content": "why?"}],
            "response": text,
            "model": "m",
            "finish_reason": "stop",
        }
        for name, text in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def answered_run(tmp_path):
    for epoch, text in enumerate(("fact", "true fact", "kind true fact")):
        write_answers(tmp_path / "run" / "eval" / f"epoch_{epoch:04d}.jsonl", {"p1": text, "p2": f"{text} help"})
    return tmp_path / "run"


def test_the_command_writes_plot_data_and_scores_nothing_twice(
    answered_run, reward_model, tmp_path, capsys, monkeypatch
):
    write_answers(tmp_path / "ppo.jsonl", {"p1": "one", "p2": "two"})
    words = [
        "rewards",
        str(answered_run),
        "--model",
        str(reward_model),
        "--baseline",
        str(tmp_path / "ppo.jsonl"),
        "--json",
    ]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    rewards = {e: [alone(reward_model, [{"role": "user", "content": "why?"}], t)[0] for t in (text, f"{text} help")]
               for e, text in enumerate(("fact", "true fact", "kind true fact"))}  # fmt: skip
    means = [np.mean(values) for values in rewards.values()]
    run_rows = [row for row in data["rows"] if row["series"] == "run"]
    assert [row["reward"] for row in run_rows] == pytest.approx(means, abs=1e-5)
    expected = (np.array(means) - means[0]) / np.std(means, ddof=1)
    assert [row["increment"] for row in run_rows] == pytest.approx(expected.tolist(), abs=1e-4)
    baseline = [row for row in data["rows"] if row["series"] == "ppo"]
    assert [row["epoch"] for row in baseline] == [0, 1, 2] and len({row["increment"] for row in baseline}) == 1
    with (answered_run / "evaluation" / "rewards.csv").open(newline="") as file:
        assert [float(row["increment"]) for row in csv.DictReader(file)] == [row["increment"] for row in data["rows"]]
    assert (answered_run / "evaluation" / "rewards.png").stat().st_size > 5000

    monkeypatch.setattr(RewardModel, "score", lambda *args, **kwargs: pytest.fail("scored again"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == data


def read_outcome(words, capsys):
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_lines_of_runs_with_one_name_are_told_apart_and_a_point_in_a_name_stays(answered_run, reward_model, tmp_path):
    for folder in ("ppo/run", "alpha-1.4"):
        shutil.copytree(answered_run, tmp_path / folder)
    words = ["rewards", str(answered_run), "--model", str(reward_model), "--baseline"]
    for baseline, names in (
        ("ppo/run", [f"{tmp_path.name}/run", "ppo/run"]),
        ("alpha-1.4", ["run", "alpha-1.4"]),
    ):
        assert main([*words, str(tmp_path / baseline)]) == 0
        rows = json.loads((answered_run / "evaluation" / "rewards.json").read_text())["rows"]
        assert list(dict.fromkeys(row["series"] for row in rows)) == names
        assert [row["epoch"] for row in rows] == [0, 1, 2] * 2
    assert main([*words, str(answered_run)]) == 2


def test_another_reward_model_under_the_same_name_scores_again(answered_run, tmp_path, capsys):
    folder = make_reward_model(tmp_path / "model", labels=["reward"])
    words = ["rewards", str(answered_run), "--model", str(folder), "--json"]
    first, again = (read_outcome(words, capsys) for _ in range(2))
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, folder / "model.safetensors")
    other = read_outcome(words, capsys)
    assert first == again
    assert [row["reward"] for row in other["rows"]] != [row["reward"] for row in first["rows"]]


def test_bad_input_is_one_line(answered_run, reward_model, tmp_path, capsys):
    write_answers(tmp_path / "other.jsonl", {"p1": "one", "q": "two"})
    write_answers(tmp_path / "young" / "eval" / "epoch_0000.jsonl", {"p1": "one"})
    for words, message in (
        ([tmp_path / "young", "--model", reward_model], "found 0; train with evaluation.every=1"),
        ([answered_run, "--model", "/nowhere"], "cannot be loaded"),
        ([answered_run, "--model", reward_model, "--baseline", "/nowhere"], "no such run or file"),
        (
            [answered_run, "--model", reward_model, "--baseline", tmp_path / "other.jsonl"],
            "does not answer the prompts",
        ),
    ):
        assert main(["rewards", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
