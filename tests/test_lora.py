"""LoRA: one copy of the weights is policy and μ; losses, targets, resume and exports are those of merged weights."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from inverseq import trainer
from inverseq.attention import ATTENTION_NAME
from inverseq.checkpoint import latest_checkpoint
from inverseq.config import LoraConfig
from inverseq.config_loading import load_config
from inverseq.lora import AdapterlessPair, adapters_off, add_adapters, has_adapters, merged_model, merged_weights
from inverseq.memory import adapter_parameters, model_size
from inverseq.model import load_model
from inverseq.packing import pack_views
from inverseq.placement import plan_placement, problem_of
from inverseq.policy import Policy
from inverseq.sample_files import read_samples, samples_path
from inverseq.sampling_lmdeploy_weights import layers_of
from inverseq.trainer import train
from tests.test_placement import LLAMA_7B, job
from tests.tiny import make_tiny_model
from tests.tiny_run import tiny_run_options
from tests.tiny_samples import make_samples, superior_logprobs

LORA = ["policy.lora.rank=4", "policy.lora.alpha=16", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("lora") / "model", scale=0.2)


def options(model_path, run_dir, *more):
    return load_config("demo", tiny_run_options(f"model.path={model_path}", f"run_dir={run_dir}", *LORA, *more))


@pytest.fixture(scope="module")
def run_dir(model_path, tmp_path_factory):
    return train(options(model_path, tmp_path_factory.mktemp("runs") / "lora"))


def epoch_rows(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "epoch"]


def moved_model(model_path, **settings):
    """A model with adapters that are not zero."""
    config = load_config("demo", [f"model.path={model_path}", "run_dir=-", "model.device=cpu"]).model
    model = load_model(str(model_path), config)
    add_adapters(model, LoraConfig(rank=4, **settings), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def test_targets_are_those_of_the_initial_model_in_every_epoch(model_path, run_dir):
    config = load_config(run_dir / "config.yaml")
    initial = load_model(str(model_path), config.model)
    for epoch in (1, 2):
        scored = read_samples(samples_path(run_dir, epoch))
        targets, plain = superior_logprobs(initial, initial, scored.samples, config.contrast.alpha)
        torch.testing.assert_close(scored.targets.double(), targets, atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(scored.plain_logprobs.double(), plain, atol=2e-4, rtol=1e-5)


def test_training_learns_and_moves_adapters_only(model_path, run_dir):
    values = [row["held_out/mean_squared_log_ratio"] for row in epoch_rows(run_dir)]
    assert values[-1] < 0.98 * values[0]
    from safetensors.torch import load_file

    saved = load_file(latest_checkpoint(run_dir) / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)


def test_the_model_contrast_scores_the_base_against_the_plain_model(model_path, tmp_path):
    plain_path = make_tiny_model(tmp_path / "plain", seed=3, scale=0.2)
    run = train(options(
        model_path, tmp_path / "run", "contrast.kind=model", f"contrast.plain_model={plain_path}",
        "contrast.principle=", "epochs=2",
    ))  # fmt: skip
    config = load_config(run / "config.yaml")
    initial, plain = load_model(str(model_path), config.model), load_model(str(plain_path), config.model)
    scored = read_samples(samples_path(run, 2))
    targets, _ = superior_logprobs(initial, plain, scored.samples, config.contrast.alpha)
    torch.testing.assert_close(scored.targets.double(), targets, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True}, {"target_modules": "q_proj, v_proj"}])
def test_loss_and_logprobs_are_those_of_the_merged_weights(model_path, settings):
    model = moved_model(model_path, **settings)
    merged = merged_model(model)
    assert not has_adapters(merged) and not any("lora" in name for name, _ in merged.named_parameters())
    [pack] = pack_views(make_samples(5), (-1,), token_budget=512)
    targets, weights = torch.randn(pack.num_actions) - 5, torch.ones(pack.num_actions)
    engine = load_config("demo", ["run_dir=-"]).engine
    results = []
    for one in (model, merged):
        one.set_attn_implementation(ATTENTION_NAME)
        results.append(Policy(one, 512, engine)(pack, targets, weights, float(pack.num_actions)))
    (loss, logprobs), (merged_loss, merged_logprobs) = results
    torch.testing.assert_close(logprobs, merged_logprobs, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss, merged_loss, atol=1e-4, rtol=1e-5)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with adapters_off(model):
        base = Policy(model, 512, engine)(pack, targets, weights, float(pack.num_actions))[1]
    assert (base - logprobs).abs().max() > 1e-2
    torch.testing.assert_close(Policy(model, 512, engine)(pack, targets, weights, 1.0)[1], logprobs, atol=0, rtol=0)


@pytest.mark.parametrize(("is_stabilized", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_adapters_product_is_scaled_by_the_rank_or_its_root(model_path, is_stabilized, scale):
    model = moved_model(model_path, alpha=8.0, rank_stabilized=is_stabilized)
    layer = model.model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = dict(merged_model(model).named_parameters())["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(merged, layer.base_layer.weight + scale * product)


def test_merging_into_a_16_bit_base_rounds_once(model_path):
    model = moved_model(model_path, alpha=0.5)  # small beside the weights, most of it lost where it is rounded first
    for name, weight in model.named_parameters():
        weight.data = weight.data if "lora_" in name else weight.data.bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    base, product = layer.base_layer.weight, layer.get_delta_weight("default")
    assert base.dtype == torch.bfloat16 and product.dtype == torch.float32
    merged = dict(merged_weights(model))["model.layers.0.mlp.up_proj.weight"]
    assert merged.equal((base.float() + product).bfloat16()) and not merged.equal(base + product.bfloat16())


def test_what_is_merged_or_frozen_beside_adapters_is_ready_for_use(model_path):
    model, plain = moved_model(model_path), load_model(model_path, load_config("demo", ["run_dir=-"]).model)
    assert not merged_model(model.train()).training
    pair = AdapterlessPair(model, plain.train().requires_grad_(True))
    assert pair.plain is plain and not plain.training
    assert not any(weight.requires_grad for weight in plain.parameters())
    assert any(weight.requires_grad for weight in pair.better.parameters())


def test_adapters_of_a_16_bit_model_are_fp32_and_learn(model_path, tmp_path):
    run = train(options(model_path, tmp_path / "run", "model.dtype=bfloat16", "evaluation.every=0"))
    from safetensors.torch import load_file

    saved = load_file(latest_checkpoint(run) / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(run / "export").dtype == torch.bfloat16
    values = [row["held_out/mean_squared_log_ratio"] for row in epoch_rows(run)]
    assert values[-1] < 0.98 * values[0]


def test_the_exports_load_everywhere_and_give_the_trained_policy(model_path, run_dir):
    import peft

    exported = AutoModelForCausalLM.from_pretrained(run_dir / "export", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), run_dir / "adapter"
    )
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    initial = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(exported(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert (exported(ids).logits - initial).abs().max() > 1e-2


def test_a_stopped_run_ends_where_an_uninterrupted_one_ends(model_path, run_dir, tmp_path, monkeypatch):
    path = tmp_path / "stopped"
    original = trainer.run_epoch

    def stop_in_the_second(state, config):
        if state.epoch == 1:
            raise KeyboardInterrupt
        original(state, config)

    monkeypatch.setattr(trainer, "run_epoch", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(options(model_path, path))
    monkeypatch.setattr(trainer, "run_epoch", original)
    train(options(model_path, path), resume=True)
    for name in ("export/model.safetensors", "adapter/adapter_model.safetensors", "samples/epoch_0002.jsonl"):
        assert (path / name).read_bytes() == (run_dir / name).read_bytes(), name
    shutil.rmtree(path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_engine_that_takes_weights_by_layer_gets_the_merged_ones(tmp_path, tied):
    model = moved_model(make_tiny_model(tmp_path / "model", scale=0.2, tied=tied))
    merged = dict(merged_model(model).named_parameters())
    layers = list(layers_of(model))
    assert len(layers) == 3 and all(name.startswith("model.layers.1.") for name in layers[1])
    found = {name: weight for layer in layers for name, weight in layer.items()}
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, atol=0, rtol=0, msg=name)


def test_a_7b_model_fits_one_80_gb_gpu_without_offload_or_a_second_copy():
    task = job(LLAMA_7B, "1x80GB", "policy.lora.rank=64")
    placement = plan_placement(task)
    assert problem_of(task, placement) is None
    assert (placement.zero_stage, placement.offload_optimizer, placement.frozen) == (0, False, "replicated")
    whole = job(LLAMA_7B, "1x80GB")
    assert problem_of(whole, plan_placement(whole)) is not None or plan_placement(whole).offload_optimizer


def test_the_planner_counts_the_adapters_that_peft_makes(model_path):
    for settings in ({}, {"target_modules": "q_proj,v_proj"}):
        model = moved_model(model_path, **settings)
        count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        plain = AutoModelForCausalLM.from_pretrained(model_path)
        assert adapter_parameters(model_size(plain.config), LoraConfig(rank=4, **settings)) == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.overlap=true"], "sampling.overlap=True: expected false with policy.lora: one copy of"),
        (["contrast.refresh_every=1"], "contrast.refresh_every=1: expected 0 with policy.lora: one copy of"),
        (["policy.lora.rank=-1"], "policy.lora.rank=-1: expected 0 or more"),
        (["engine.zero_stage=3"], "engine.zero_stage='3': expected auto or 0 or 1 or 2 with policy.lora.rank=4"),
        (["engine.frozen=sharded"], "engine.frozen='sharded': expected auto or replicated with policy.lora.rank=4"),
        (["policy.lora.target_modules=q_prj"], "the model has no q_prj; expected all-linear, or some of down_proj, "),
        (["policy.lora.target_modules=lm_head"], "expected no embedding"),
    ],
)
def test_bad_input_is_one_clear_error(model_path, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train(options(model_path, tmp_path / "run", *words))
