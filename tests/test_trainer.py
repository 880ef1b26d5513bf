"""The whole loop on a tiny model: what a run writes, that it learns, and that targets are those of the formula."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inverseq import run_state
from inverseq.config_loading import load_config
from inverseq.engine import NonFiniteError, TorchEngine
from inverseq.model import load_model
from inverseq.resolve import resolve
from inverseq.sample_files import read_samples
from inverseq.trainer import PURPOSES, derive_seed, train
from tests.tiny import make_tiny_model
from tests.tiny_samples import superior_logprobs

OVERRIDES = [
    "model.device=cpu",
    "prompts.held_out=6",
    "sampling.samples_per_epoch=10",
    "sampling.max_new_tokens=12",
    "sampling.batch_size=8",
    "packing.train_tokens=1024",
    "packing.score_tokens=4096",
    "optim.lr=3e-3",
    "optim.samples_per_step=4",
    "epochs=2",
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", scale=0.2)


@pytest.fixture(scope="module")
def run_dir(model_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "principle"
    config = load_config("demo", [f"model.path={model_path}", f"run_dir={path}", *OVERRIDES, "evaluation.every=2"])
    assert train(config) == path
    return path


def rows(run_dir, kind):
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if row["kind"] == kind]


def test_a_run_writes_every_file_it_promises(run_dir):
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    promised = {"config.yaml", "metrics.jsonl", "held_out.jsonl"}
    promised |= {"samples/epoch_0001.jsonl", "samples/epoch_0002.jsonl"}
    promised |= {"eval/epoch_0000.jsonl", "eval/epoch_0002.jsonl", "export/model.safetensors", "export/config.json"}
    assert promised <= names
    assert "eval/epoch_0001.jsonl" not in names
    assert any(name.startswith("tensorboard/") for name in names)
    assert not [name for name in names if "tmp" in name]


def test_metrics_have_one_row_a_step_and_an_epoch_with_the_promised_keys(run_dir):
    epochs, steps = rows(run_dir, "epoch"), rows(run_dir, "step")
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["num_samples"] for row in steps] == [4, 4, 2] * 2
    promised = {
        "loss", "mean_log_ratio", "rms_log_ratio", "kl_to_plain", "response_length", "truncation_rate", "eos_rate",
        "pad_waste", "sample_duration_s", "score_duration_s", "train_duration_s", "train_tokens_per_second",
        "peak_memory_sample_bytes", "peak_memory_score_bytes", "peak_memory_train_bytes", "checkpoint_duration_s",
    }  # fmt: skip
    assert promised <= set(epochs[1])
    assert ["evaluation_duration_s" in row for row in epochs] == [False, True, False], "in the row behind the answers"
    assert ["checkpoint_duration_s" in row for row in epochs] == [False, True, True]
    assert all("held_out/mean_squared_log_ratio" in row for row in epochs)
    assert all(not isinstance(value, (dict, list)) for row in epochs + steps for value in row.values())


def test_training_lowers_the_held_out_squared_log_ratio(run_dir):
    first, *_, last = (row["held_out/mean_squared_log_ratio"] for row in rows(run_dir, "epoch"))
    assert last < 0.95 * first


def test_stored_targets_are_those_of_the_formula(run_dir, model_path):
    scored = read_samples(run_dir / "samples" / "epoch_0002.jsonl")
    initial = AutoModelForCausalLM.from_pretrained(model_path).eval()
    targets, plain = superior_logprobs(initial, initial, list(scored.samples), 1.4)
    torch.testing.assert_close(scored.targets.double(), targets, rtol=0, atol=5e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), plain, rtol=0, atol=5e-5)
    assert (targets - plain).abs().max() > 0.01


def test_the_export_loads_and_differs_from_the_initial_model(run_dir, model_path):
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    initial = AutoModelForCausalLM.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "help"}], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert not torch.equal(exported(**ids).logits, initial(**ids).logits)


def test_a_finished_run_cannot_be_resumed_with_fewer_epochs(run_dir, model_path):
    overrides = [item for item in OVERRIDES if not item.startswith("epochs=")]
    paths = [f"model.path={model_path}", f"run_dir={run_dir}", "evaluation.every=2"]
    with pytest.raises(ValueError, match="epochs=1: the run has finished epoch 2 already"):
        train(load_config("demo", [*paths, *overrides, "epochs=1"]), resume=True)


def test_a_run_cannot_be_resumed_with_other_test_prompts(run_dir, model_path, tmp_path):
    copied = shutil.copytree(run_dir, tmp_path / "run")
    config = load_config("demo", [f"model.path={model_path}", f"run_dir={copied}", *OVERRIDES, "evaluation.every=2"])
    resolve(config, resume=True)
    answered = copied / "eval" / "epoch_0000.jsonl"
    answered.write_text("\n".join(reversed(answered.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match="evaluation.prompts: differ from those"):
        resolve(config, resume=True)


def test_model_contrast_trains_on_the_two_models_targets(model_path, tmp_path):
    plain_path = make_tiny_model(tmp_path / "sft", seed=1, scale=0.2)
    overrides = [
        *OVERRIDES,
        "contrast.kind=model",
        f"contrast.plain_model={plain_path}",
        "contrast.principle=",
        "contrast.kl_to_initial=true",
        "epochs=1",
    ]
    overrides = [item for item in overrides if item != "epochs=2"]
    run_dir = tmp_path / "run"
    train(load_config("demo", [f"model.path={model_path}", f"run_dir={run_dir}", *overrides]))
    better, plain = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model_path, plain_path))
    scored = read_samples(run_dir / "samples" / "epoch_0001.jsonl")
    targets, plain_logprobs = superior_logprobs(better, plain, list(scored.samples), 1.4)
    torch.testing.assert_close(scored.targets.double(), targets, rtol=0, atol=5e-5)
    torch.testing.assert_close(scored.plain_logprobs.double(), plain_logprobs, rtol=0, atol=5e-5)
    assert_divergence_from_the_initial_model(run_dir, better)


def assert_divergence_from_the_initial_model(run_dir, initial):
    before, after = rows(run_dir, "epoch")
    steps = rows(run_dir, "step")
    assert steps[0]["kl_to_initial"] == pytest.approx(0.0, abs=1e-5), "the policy starts as the initial model"
    weights = [row["num_actions"] for row in steps]
    mean = sum(row["kl_to_initial"] * weight for row, weight in zip(steps, weights, strict=True)) / sum(weights)
    assert after["kl_to_initial"] == pytest.approx(mean) and abs(mean) > 1e-4
    held_out = read_samples(run_dir / "held_out.jsonl")
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "export").eval()
    own, initials = (superior_logprobs(model, model, list(held_out.samples), 1.0)[1] for model in (trained, initial))
    key = "held_out/mean_log_ratio_to_initial"
    assert before[key] == pytest.approx(0.0, abs=1e-5)
    assert after[key] == pytest.approx((own - initials).mean().item(), rel=1e-3, abs=1e-5)


def test_a_plain_model_with_an_unknown_head_is_refused(model_path, tmp_path, monkeypatch):
    plain_path = make_tiny_model(tmp_path / "sft", seed=1)

    def load_with_scaled_logits(path, config):
        model = load_model(path, config)
        if path == str(plain_path):
            model.lm_head.register_forward_hook(lambda module, args, logits: 3.0 * logits)
        return model

    monkeypatch.setattr(run_state, "load_model", load_with_scaled_logits)
    contrast = ["contrast.kind=model", f"contrast.plain_model={plain_path}", "contrast.principle="]
    paths = [f"model.path={model_path}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="head is not supported"):
        train(load_config("demo", [*paths, *OVERRIDES, *contrast]))
    assert not (tmp_path / "run").exists(), "a refused start leaves nothing behind"


def test_a_policy_that_is_no_longer_finite_is_not_saved(model_path, tmp_path, monkeypatch):
    train_step = TorchEngine.train_step

    def poison(engine, step):
        metrics = train_step(engine, step)
        with torch.no_grad():
            engine.weights[0][0].fill_(float("nan"))
        return metrics

    monkeypatch.setattr(TorchEngine, "train_step", poison)
    overrides = [item for item in OVERRIDES if not item.startswith("sampling.samples_per_epoch")]
    paths = [f"model.path={model_path}", f"run_dir={tmp_path / 'run'}", "sampling.samples_per_epoch=4"]
    with pytest.raises(NonFiniteError, match="epoch 1: held-out metrics"):
        train(load_config("demo", [*paths, *overrides]))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_became_of_the_prompts_is_logged(model_path, tmp_path, caplog):
    config = load_config("demo", [f"model.path={model_path}", f"run_dir={tmp_path / 'run'}", *OVERRIDES])
    with caplog.at_level("INFO", logger="inverseq"):
        resolve(config)
    assert "127 prompts from 127 rows" in caplog.text and "6 held out" in caplog.text


def test_seeds_differ_by_epoch_purpose_and_rank():
    seeds = {derive_seed(0, epoch, purpose, rank) for epoch in range(9) for purpose in PURPOSES for rank in range(9)}
    assert len(seeds) == 9 * len(PURPOSES) * 9
    assert derive_seed(1, 2, "sampling") == derive_seed(1, 2, "sampling") < 2**31
