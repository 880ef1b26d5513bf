"""``--dry-run`` checks and plans a run: right numbers, no weights read, nothing written."""

import re

import numpy as np
import pytest
from safetensors.torch import save_file

from inverseq.config_loading import load_config
from inverseq.dry_run import describe_packs, describe_runs, dry_run, synthetic_samples
from inverseq.resolve import resolve
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two model folders whose weight files hold no weights: whoever loads them fails."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tiny", "sft")):
        make_tiny_model(root / name, seed=seed)
        save_file({}, root / name / "model.safetensors")
    return root


def config_for(tmp_path, models, *overrides):
    return load_config("demo", [f"model.path={models / 'tiny'}", f"run_dir={tmp_path / 'run'}", *overrides])


def test_it_reports_and_plans_without_weights_and_writes_nothing(models, tmp_path):
    text = dry_run(config_for(tmp_path, models)).text
    for expected in ("alpha: 1.4", "127 prompts from 127 rows", "16 held out", "better view", "AdamW moments", "fits"):
        assert expected in text
    assert "Nothing was started" in text
    assert list(tmp_path.iterdir()) == []
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("q_prj", "the model has no q_prj; expected all-linear, or some of down_proj, gate_proj, k_proj"),
        ("q_proj,input_layernorm", "the model has no input_layernorm; expected"),
        ("q_proj,embed_tokens", r"expected no embedding \(embed_tokens\)"),
    ],
)
def test_adapters_that_the_model_cannot_have_are_refused_before_weights_are_read(models, tmp_path, names, expected):
    words = ("policy.lora.rank=4", f"policy.lora.target_modules={names}")
    with pytest.raises(ValueError, match=f"policy.lora.target_modules='{names}': {expected}"):
        dry_run(config_for(tmp_path, models, *words))
    dry_run(config_for(tmp_path, models, "policy.lora.rank=4", "policy.lora.target_modules=q_proj, v_proj"))


def test_the_planned_epoch_counts_every_token_of_the_first_epochs_prompts(models, tmp_path):
    config = config_for(tmp_path, models, "sampling.samples_per_epoch=21", "packing.train_tokens=700")
    text, resolved = dry_run(config).text, resolve(config)
    samples = synthetic_samples(resolved)
    first_epoch = resolve(config).prompts.next(21)
    assert [sample.rendered.prompt.id for sample in samples] == [item.prompt.id for item in first_epoch]

    responses = np.array([sample.num_actions for sample in samples])
    assert responses.min() >= 1 and responses.max() <= 48 and len(set(responses)) > 5
    read = (responses - 1).sum()  # a response's last token is only predicted
    plain = sum(len(item.policy_ids) for item in first_epoch) + read
    views = sum(len(p) + len(item.prompt_ids) for item in first_epoch for p in item.prefix_ids) + 2 * read
    training = re.search(
        r"training: (\d+) packs, ([\d,]+) tokens, largest pack ([\d,]+) of 700, ([\d.]+)% unused", text
    )
    num_packs, num_tokens, largest = (int(group.replace(",", "")) for group in training.groups()[:3])
    assert num_tokens == plain and largest <= 700
    assert float(training[4]) == pytest.approx(100 * (1 - plain / (700 * num_packs)), abs=0.06)
    assert f" {views:,} tokens" in re.search(r"scoring: .*", text)[0]
    steps = re.search(r"optimizer steps: 3 an epoch, 12 in 4 epochs; packs per step: (.*)", text)[1]
    counts = [int(n) for value, times in re.findall(r"(\d+)(?: × (\d+))?", steps) for n in [value] * int(times or 1)]
    assert len(counts) == 3 and sum(counts) == num_packs


def test_planning_leaves_the_prompt_stream_where_it_was(models, tmp_path):
    resolved = resolve(config_for(tmp_path, models))
    before = resolved.prompts.state_dict()
    once, twice = synthetic_samples(resolved), synthetic_samples(resolved)
    assert resolved.prompts.state_dict() == before
    assert [(s.rendered.prompt.id, s.num_actions) for s in once] == [
        (s.rendered.prompt.id, s.num_actions) for s in twice
    ]


def test_the_model_contrast_is_planned_with_both_models(models, tmp_path):
    contrast = ("contrast.kind=model", f"contrast.plain_model={models / 'sft'}", "contrast.principle=")
    text = dry_run(config_for(tmp_path, models, *contrast, "evaluation.every=2")).text
    assert f"plain model: {models / 'sft'}" in text and "frozen plain model" in text
    assert "only view" in text and "test prompts: 16" in text
    scoring, training = (re.search(rf"{name}: \d+ packs, ([\d,]+) tokens", text)[1] for name in ("scoring", "training"))
    assert scoring == training  # one view, read by both models


def test_what_does_not_fit_says_so_and_what_to_change(models, tmp_path):
    found = dry_run(config_for(tmp_path, models, "engine.workspace_mib=100000000"))
    assert "DOES NOT FIT" in found.text and found.problem in found.text
    assert "the estimate does not fit" in found.problem
    assert dry_run(config_for(tmp_path, models)).problem is None


def test_a_run_is_placed_on_gpus_that_are_not_there(models, tmp_path):
    overrides = ("model.device=cuda", "engine.kernel_backend=triton", "sampling.samples_per_epoch=21")
    overrides += ("model.attention=flash_attn", "model.fused_layers=true")
    text = dry_run(config_for(tmp_path, models, *overrides), hardware="8xA800").text
    assert "device: cuda" in text and "Placement on 8xA800, 8 ranks" in text
    assert re.search(r"estimated for each GPU; P = [\d,]+, b = 2, N = 8", text)
    assert re.search(r"packs per step on each of 8 ranks: 1 × 3$", text, flags=re.MULTILINE)
    samples = int(re.search(r"scoring: (\d+) packs", text)[1])
    assert samples == 8  # each rank scores what it sampled
    offloaded = dry_run(config_for(tmp_path, models, "engine.offload_optimizer=cpu"), hardware="1x80GB").text
    assert re.search(r"In host memory .*\n.*sample.*\n +fp32 master weights", offloaded)


def test_bad_input_is_refused_as_by_the_run_itself(models, tmp_path):
    with pytest.raises(ValueError, match="packing.train_tokens"):
        dry_run(config_for(tmp_path, models, "packing.train_tokens=60"))
    with pytest.raises(ValueError, match="holds no run to resume"):
        dry_run(config_for(tmp_path, models), resume=True)


def test_runs_of_equal_counts_are_written_once():
    assert describe_runs([2, 2, 2, 1]) == "2 × 3, 1"
    assert describe_runs([1]) == "1"
    assert describe_packs("training", [50, 100], 100) == (
        "training: 2 packs, 150 tokens, largest pack 100 of 100, 25.0% unused"
    )
