"""One update of the engine equals plain PyTorch on full logits, however the step is packed."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from inverseq.attention import ATTENTION_NAME
from inverseq.config import EngineConfig, ModelConfig, OptimConfig, PackingConfig
from inverseq.engine import NonFiniteError, TorchEngine, accumulate, learning_rate_factor
from inverseq.engine_deepspeed import buffers_kept
from inverseq.model import enable_gradient_checkpointing, load_model
from inverseq.policy import Policy
from inverseq.records import ScoredSamples
from inverseq.steps import plan_steps, step_sizes
from tests.tiny import make_tiny_model
from tests.tiny_samples import full_logprobs, make_samples, superior_logprobs

MODEL = ModelConfig(path="tiny", device="cpu", dtype="float32")
OPTIM = OptimConfig(lr=1e-3, eps=1e-3, samples_per_step=4, max_grad_norm=1.0)  # eps: no division by rounding noise


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("model"), tied=request.param, scale=0.3)
    return load_model(path, MODEL)


def scored_samples(model, count=6, alpha=1.4) -> ScoredSamples:
    samples = make_samples(count)
    targets, plain = superior_logprobs(model, model, samples, alpha)
    model.set_attn_implementation(ATTENTION_NAME)
    offsets = torch.tensor([0, *(s.num_actions for s in samples)]).cumsum(0).numpy()
    return ScoredSamples(samples, targets.float(), plain.float(), offsets)


def make_engine(model, optim=OPTIM) -> TorchEngine:
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(ATTENTION_NAME)
    return TorchEngine(Policy(copied, 512, EngineConfig()), optim, total_updates=10)


def run(model, scored, optim=OPTIM, budget=64):
    engine = make_engine(model, optim)
    metrics = [engine.train_step(step) for step in plan_steps(scored, optim, PackingConfig(train_tokens=budget))]
    return engine, metrics


def reference_step(model, scored, optim: OptimConfig):
    """The first step with full logits, one sequence at a time, and torch's own AdamW."""
    reference = copy.deepcopy(model)
    settings = dict(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    optimizer = torch.optim.AdamW(reference.parameters(), **settings)
    count = optim.samples_per_step
    total = torch.zeros(())
    lengths = [sample.num_actions for sample in scored.samples[:count]]
    for i, sample in enumerate(scored.samples[:count]):
        with torch.enable_grad():
            logprobs_RV = full_logprobs.__wrapped__(reference, sample, -1).float()
        token_ids = torch.from_numpy(sample.response.token_ids).long()
        policy = logprobs_RV.gather(1, token_ids[:, None])[:, 0]
        squared = (scored.targets[scored.offsets[i] : scored.offsets[i + 1]] - policy).square()
        weight = {"token_mean": 1 / sum(lengths), "sum": 1.0, "sequence_mean": 1 / lengths[i] / count}
        total = total + squared.sum() * weight[optim.loss_reduction]
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), optim.max_grad_norm)
    optimizer.step()
    return reference, total.item(), norm.item()


@pytest.mark.parametrize("reduction", ["token_mean", "sum", "sequence_mean"])
def test_a_step_equals_plain_pytorch(model, reduction):
    optim = replace(OPTIM, loss_reduction=reduction, weight_decay=2.0)
    scored = scored_samples(model)
    engine = make_engine(model, optim)
    metrics = engine.train_step(plan_steps(scored, optim, PackingConfig(train_tokens=48))[0])
    reference, loss, norm = reference_step(model, scored, optim)
    assert metrics.loss == pytest.approx(loss, rel=1e-4)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    for ours, theirs in zip(engine.policy.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_pack_size_does_not_change_the_trajectory(model):
    scored = scored_samples(model, count=10)
    (_, few), (_, many) = run(model, scored, budget=1024), run(model, scored, budget=40)
    assert [m.loss for m in few] == pytest.approx([m.loss for m in many], rel=1e-4)
    assert [m.rms_log_ratio for m in few] == pytest.approx([m.rms_log_ratio for m in many], rel=1e-4)


def test_targets_equal_to_the_policy_give_no_loss_and_no_gradient(model):
    scored = scored_samples(model)
    engine = make_engine(model)
    steps = plan_steps(scored, OPTIM, PackingConfig(train_tokens=64))
    with torch.no_grad():
        own = [replace(batch, targets=engine.policy.logprobs(batch.pack)) for batch in steps[0].micro_batches]
    metrics = engine.train_step(replace(steps[0], micro_batches=own))
    assert metrics.loss < 1e-9
    assert metrics.grad_norm < 1e-4


def test_gradient_checkpointing_does_not_change_the_update(model):
    scored = scored_samples(model)
    step = plan_steps(scored, OPTIM, PackingConfig(train_tokens=64))[0]
    plain, recomputing = make_engine(model), make_engine(model)
    enable_gradient_checkpointing(recomputing.policy.model)
    layer_calls = []
    recomputing.policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layer_calls.append(1))
    expected, actual = plain.train_step(step), recomputing.train_step(step)
    assert len(layer_calls) == 2 * len(step.micro_batches), "the layer runs again in the backward pass"
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    for a, b in zip(plain.policy.parameters(), recomputing.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_metrics_are_those_of_the_formula(model):
    scored = scored_samples(model, count=4)
    _, (metrics,) = run(model, scored)
    ratio = (scored.targets - scored.plain_logprobs).double()
    assert metrics.mean_log_ratio == pytest.approx(ratio.mean().item(), rel=1e-3)
    assert metrics.rms_log_ratio == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-4)
    assert metrics.kl_to_plain == pytest.approx(0.0, abs=1e-5)
    assert metrics.loss == pytest.approx(metrics.rms_log_ratio**2, rel=1e-4)


@pytest.mark.parametrize("budget", [40, 1024])
def test_the_divergence_from_the_initial_model_is_reported_where_it_was_scored(model, budget):
    scored = scored_samples(model, count=4)
    initial = scored.plain_logprobs - torch.linspace(-0.5, 1.0, len(scored.targets))
    _, (metrics,) = run(model, replace(scored, initial_logprobs=initial), budget=budget)
    assert metrics.kl_to_initial == pytest.approx(0.25, rel=1e-4)
    assert metrics.kl_to_plain == pytest.approx(0.0, abs=1e-5)
    assert run(model, scored, budget=budget)[1][0].kl_to_initial is None


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_stops_before_the_update(model, what):
    scored = scored_samples(model)
    engine = make_engine(model)
    step = plan_steps(scored, OPTIM, PackingConfig(train_tokens=64))[0]
    if what == "loss":
        step.micro_batches[0].targets[0] = float("inf")
    else:
        engine.weights[-1].register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in engine.policy.parameters()]
    with pytest.raises(NonFiniteError, match="optimizer step 1"):
        engine.train_step(step)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.policy.parameters(), strict=True))
    assert engine.num_updates == 0
    assert not engine.optimizer.state
    assert all(p.grad is None for p in (*engine.weights, *engine.masters)), "nothing is left for the next step"


def test_bfloat16_weights_keep_updates_below_their_resolution(model):
    scored = scored_samples(model)
    engine = make_engine(copy.deepcopy(model).bfloat16(), replace(OPTIM, lr=1e-6))
    for step in plan_steps(scored, OPTIM, PackingConfig(train_tokens=64)) * 2:
        engine.train_step(step)
    moved = max((m - w.float()).abs().max().item() for w, m in zip(engine.weights, engine.masters, strict=True))
    assert moved > 1e-6


def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32(model):
    engine = make_engine(copy.deepcopy(model).bfloat16())
    step = plan_steps(scored_samples(model), OPTIM, PackingConfig(train_tokens=24))[0]
    assert len(step.micro_batches) > 1
    expected = [torch.zeros_like(master) for master in engine.masters]

    def backward(*micro_batches):
        accumulate(replace(step, micro_batches=micro_batches), engine.device, engine.policy, engine._backward)

    for micro_batch in step.micro_batches:
        engine.zero_grad()
        backward(micro_batch)
        expected = [total + master.grad for total, master in zip(expected, engine.masters, strict=True)]
    engine.zero_grad()
    backward(*step.micro_batches)
    for total, master in zip(expected, engine.masters, strict=True):
        torch.testing.assert_close(master.grad, total, rtol=1e-6, atol=1e-7)


def test_bfloat16_gradients_leave_one_by_one_and_their_sum_is_that_of_whole_micro_batches(model):
    engine = make_engine(copy.deepcopy(model).bfloat16())
    step = plan_steps(scored_samples(model), OPTIM, PackingConfig(train_tokens=24))[0]
    reference = copy.deepcopy(engine.policy)
    expected = {}
    for batch in step.micro_batches:
        reference(batch.pack, batch.targets, batch.loss_weights, step.denominator)[0].backward()
        for name, weight in reference.named_parameters():
            expected[name] = expected.get(name, 0.0) + weight.grad.float()
            weight.grad = None
    left, weights = [], engine.weights
    for weight in weights:  # behind the engine's own hook
        weight.register_post_accumulate_grad_hook(lambda _: left.append(sum(w.grad is not None for w in weights)))
    accumulate(step, engine.device, engine.policy, engine._backward)
    assert left == [0] * len(weights) * len(step.micro_batches)
    for (name, total), master in zip(expected.items(), engine.masters, strict=True):
        assert torch.equal(master.grad, total), name


SCHEDULED = replace(OPTIM, schedule="linear")


def assert_next_steps_are_equal(one, other, step):
    expected, actual = one.train_step(step), other.train_step(step)
    assert (expected.loss, expected.grad_norm) == (actual.loss, actual.grad_norm)
    rate = SCHEDULED.lr * learning_rate_factor(1, 10, SCHEDULED)
    assert (expected.learning_rate, actual.learning_rate) == (rate, rate)
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"] < rate
    assert one.num_updates == other.num_updates == 2
    for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_restores_bitwise(model):
    scored = scored_samples(model, count=8)
    steps = plan_steps(scored, SCHEDULED, PackingConfig(train_tokens=64))
    straight = make_engine(model, SCHEDULED)
    straight.train_step(steps[0])
    resumed = make_engine(straight.policy.model, SCHEDULED)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert_next_steps_are_equal(straight, resumed, steps[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_many_ranks_have_saved_restores_bitwise(model, dtype):
    scored, model = scored_samples(model, count=8), copy.deepcopy(model).to(dtype)
    steps = plan_steps(scored, SCHEDULED, PackingConfig(train_tokens=64))
    straight, resumed = make_engine(model, SCHEDULED), make_engine(model, SCHEDULED)
    straight.train_step(steps[0])

    def read(name):
        master = straight.masters[straight.names.index(name)]
        moments = {key: straight.optimizer.state[master][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        return {"master": master.detach().clone(), **moments}

    resumed.load_named_state(read, 1)
    assert_next_steps_are_equal(straight, resumed, steps[1])


def test_adamw_is_given_what_the_configuration_says(model):
    optim = replace(OPTIM, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3)
    (group,) = make_engine(model, optim).optimizer.param_groups
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [1e-3, (0.8, 0.7), 1e-5, 0.3]


def test_without_a_largest_norm_nothing_is_clipped(model):
    scored = scored_samples(model)
    (free, (first, *_)), (wide, (same, *_)) = (
        run(model, scored, replace(OPTIM, max_grad_norm=norm)) for norm in (0.0, 1e9)
    )
    assert first.grad_norm == pytest.approx(same.grad_norm) and first.grad_norm > 0
    for a, b in zip(free.policy.parameters(), wide.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_last_micro_batch_of_a_step_is_told_from_the_others(model):
    (step,) = plan_steps(scored_samples(model, count=4), OPTIM, PackingConfig(train_tokens=40))
    told = []
    accumulate(step, torch.device("cpu"), make_engine(model).policy, lambda loss, is_last: told.append(is_last))
    assert len(told) > 1 and told == [False] * (len(told) - 1) + [True]


def test_a_rank_without_samples_counts_no_action(model):
    engine = make_engine(model)
    packing = PackingConfig(train_tokens=64)
    (step,) = plan_steps(scored_samples(model, count=1), OPTIM, packing, num_ranks=2, rank=1)
    assert [batch.pack.is_dummy for batch in step.micro_batches] == [True]
    metrics = engine.train_step(step)
    assert [metrics.loss, metrics.grad_norm, metrics.mean_log_ratio, metrics.kl_to_plain] == [0.0] * 4


def test_dropout_is_on_in_a_step_and_off_in_log_probs(model):
    engine = make_engine(model)
    step = plan_steps(scored_samples(model), OPTIM, PackingConfig(train_tokens=64))[0]
    engine.train_step(step)
    assert engine.policy.training
    engine.logprobs(step.micro_batches[0].pack)
    assert not engine.policy.training
    engine.train_step(step)
    assert engine.policy.training


def test_learning_rate_warms_up_and_decays():
    constant = [learning_rate_factor(u, 10, OptimConfig(warmup_steps=3)) for u in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = [learning_rate_factor(u, 4, OptimConfig(schedule="linear")) for u in range(5)]
    assert linear == [1.0, 0.75, 0.5, 0.25, 0.0]
    warmed = [learning_rate_factor(u, 5, OptimConfig(schedule="linear", warmup_steps=1)) for u in range(7)]
    assert warmed == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    cosine = [learning_rate_factor(u, 2, OptimConfig(schedule="cosine")) for u in range(3)]
    assert cosine == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_step_sizes_keep_every_sample():
    assert step_sizes(500, 16) == [16] * 31 + [4]
    assert step_sizes(3, 16) == [3]


def test_plan_steps_covers_every_action_once_and_ranks_stay_in_step(model):
    scored = scored_samples(model, count=9)
    ranks = [plan_steps(scored, OPTIM, PackingConfig(train_tokens=48), num_ranks=4, rank=r) for r in range(4)]
    for index, per_rank in enumerate(zip(*ranks, strict=True)):
        assert len({len(step.micro_batches) for step in per_rank}) == 1
        assert len({step.denominator for step in per_rank}) == 1
        weights = sum(batch.loss_weights.sum().item() for step in per_rank for batch in step.micro_batches)
        assert math.isclose(weights, per_rank[0].denominator), f"step {index}"


def test_rotary_frequencies_stay_fp32_whatever_an_engine_does_to_its_module(model):
    policy = Policy(copy.deepcopy(model).bfloat16(), 512, EngineConfig())
    rotary = policy.model.model.rotary_emb
    rotary.inv_freq = expected = model.model.rotary_emb.inv_freq.float()
    with buffers_kept(policy):
        policy.bfloat16()  # what DeepSpeed did until its pull request 8066
        assert rotary.inv_freq.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, expected)
    assert "inv_freq" in dict(rotary.named_buffers()) and policy.model.lm_head.weight.dtype == torch.bfloat16
