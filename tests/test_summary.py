"""Metric rows: weighted means, and packing shares that count what was really processed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from inverseq.config import OptimConfig, PackingConfig
from inverseq.packing import view_lengths
from inverseq.records import ScoredSamples, StepMetrics
from inverseq.steps import plan_steps
from inverseq.summary import epoch_row, held_out_row, response_metrics, step_row
from tests.tiny_samples import make_samples

METRICS = StepMetrics(
    loss=1.0, mean_log_ratio=0.5, rms_log_ratio=1.0, kl_to_plain=0.1, grad_norm=2.0, learning_rate=1e-3, duration_s=2.0,
    peak_memory_bytes=7,
)  # fmt: skip


@pytest.fixture
def scored() -> ScoredSamples:
    samples = make_samples(5)
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)])
    plain = torch.linspace(-3, 0, int(offsets[-1]))
    return ScoredSamples(samples, plain + 0.25, plain, offsets)


def steps_of(scored, **ranks):
    return plan_steps(scored, OptimConfig(samples_per_step=4), PackingConfig(train_tokens=40), **ranks)


def test_one_process_wastes_nothing_and_fill_is_the_used_budget(scored):
    row = step_row(1, 1, steps_of(scored)[0], METRICS, 40)
    tokens = int(view_lengths(scored.samples[:4], (-1,)).sum())
    assert row["pad_waste"] == 0.0
    assert row["pack_fill"] == pytest.approx(tokens / (row["num_packs"] * 40))
    assert row["tokens_per_second"] == tokens / 2.0


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_packs_of_all_ranks_are_counted_whichever_rank_writes_the_row(scored, num_ranks):
    ranks = [steps_of(scored, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
    for index, steps in enumerate(zip(*ranks, strict=True)):
        packs = [batch.pack for step in steps for batch in step.micro_batches]
        real, dummies = (sum(p.num_tokens for p in packs if p.is_dummy == is_dummy) for is_dummy in (False, True))
        rows = [step_row(1, index + 1, step, METRICS, 40) for step in steps]
        assert all(row == rows[0] for row in rows)
        assert rows[0]["num_packs"] == len(packs) and rows[0]["num_tokens"] == real
        assert rows[0]["pad_waste"] == pytest.approx(dummies / (real + dummies))
        assert rows[0]["pack_fill"] == pytest.approx(real / (len(packs) * 40))
    assert dummies == 2 * (num_ranks - 1), "the last step holds one sample: the other ranks run a dummy pack"


def test_epoch_means_are_weighted_by_action_tokens(scored):
    steps = steps_of(scored)
    first_metrics = replace(METRICS, kl_to_plain=0.0, kl_to_initial=1.0)
    other = replace(
        METRICS,
        loss=3.0,
        rms_log_ratio=2.0,
        peak_memory_bytes=9,
        learning_rate=7e-6,
        kl_to_plain=0.0,
        kl_to_initial=2.0,
    )
    row = epoch_row(1, 2, list(zip(steps, [first_metrics, other], strict=True)), 40)
    first, second = (step.num_actions for step in steps)
    assert row["loss"] == pytest.approx((first + 3 * second) / (first + second))
    assert row["rms_log_ratio"] == pytest.approx(((first + 4 * second) / (first + second)) ** 0.5)
    assert row["kl_to_initial"] == pytest.approx((first + 2 * second) / (first + second))
    assert row["peak_memory_bytes"] == 9
    assert row["learning_rate"] == 7e-6, "that of the last step"


def test_the_held_out_row_says_how_far_the_policy_is_from_each_reference(scored):
    policy = scored.plain_logprobs + 0.5
    row = held_out_row(replace(scored, initial_logprobs=scored.plain_logprobs - 1.0), policy)
    assert row["held_out/mean_squared_log_ratio"] == pytest.approx(0.25**2)
    assert row["held_out/mean_log_ratio_to_plain"] == pytest.approx(0.5)
    assert row["held_out/mean_log_ratio_to_initial"] == pytest.approx(1.5)
    assert "held_out/mean_log_ratio_to_initial" not in held_out_row(scored, policy)


def test_response_metrics_count_what_ended(scored):
    row = response_metrics(scored)
    assert row["eos_rate"] == pytest.approx(3 / 5)
    assert row["truncation_rate"] == pytest.approx(2 / 5)
    assert row["response_length"] == pytest.approx(scored.offsets[-1] / 5)
    assert row["mean_target_gain"] == pytest.approx(0.25)
