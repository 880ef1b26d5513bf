"""The Inverse-Q* loop, readable from here alone: sample, score, plan, step, checkpoint, evaluate, export.

Each stage is one call whose inputs and outputs are records of ``inverseq.records``. Only this file and the command
line know the order of the stages.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .checkpoint import latest_checkpoint
from .config import Config
from .distributed import Ranks, init_ranks
from .engine import NonFiniteError
from .export import export_model
from .overlap import sample_and_score
from .packing import pack_views
from .records import RenderedPrompt, Sample, ScoredSamples
from .resolve import Resolved, resolve
from .run_directory import has_begun, sole_writer, write_run_config
from .run_state import State, build_state, last_refresh, refresh_frozen, restore, save
from .sample_files import eval_path, held_out_path, samples_path, write_evaluation, write_samples
from .sampling import sample_responses
from .sampling_ahead import SamplesAhead
from .sampling_replay import ReplaySampler
from .steps import plan_steps
from .summary import epoch_row, held_out_row, response_metrics, step_row
from .targets import score_targets
from .transfers import copied_ahead, read_behind

__all__ = ["State", "derive_seed", "run_epoch", "train"]

PURPOSES = ("sampling", "held_out", "evaluation", "torch")


def derive_seed(seed: int, epoch: int, purpose: str, rank: int = 0) -> int:
    """A 31-bit seed for one purpose of one epoch on one rank."""
    entropy = np.random.SeedSequence([seed, epoch, PURPOSES.index(purpose), rank])
    return int(entropy.generate_state(1, np.uint32)[0] >> 1)


def train(config: Config, *, resume: bool = False) -> Path:
    """Train as configured and return the run directory, which then holds the exported model.

    Bad input raises ValueError before any model is loaded. With ``resume`` the run goes on behind its newest
    complete checkpoint; an epoch that was cut short is replayed from its start. Processes that torchrun started again
    resume a run that had begun.
    """
    ranks = init_ranks(config)
    with ranks.failing_together():
        return train_ranks(config, ranks, resume=resume or (ranks.num_restarts > 0 and has_begun(config)))


def train_ranks(config: Config, ranks: Ranks, *, resume: bool) -> Path:
    """``train`` as one of several processes."""
    resolved = resolve(config, resume=resume, ranks=ranks)
    ranks.barrier()  # a rank that is ahead must not write what another one still checks
    with sole_writer(config, resume=resume) if ranks.is_main else nullcontext():
        return train_resolved(resolved, ranks, resume=resume)


def train_resolved(resolved: Resolved, ranks: Ranks, *, resume: bool) -> Path:
    """``train_ranks`` from checked settings, in a run directory that is this run's alone."""
    config = resolved.config
    checkpoint = latest_checkpoint(resolved.run_dir) if resume else None
    state = build_state(resolved, ranks)
    if ranks.is_main:
        write_run_config(config, resolved.run_dir)
    try:
        if checkpoint is not None:
            restore(state, checkpoint)
            score_held_out_again(state)
        else:
            measure_before_training(state)
        evaluate_if_due(state)
        while state.epoch < config.epochs:
            run_epoch(state, config)
        export(state)
        state.progress.summary(state.run_dir)
    finally:
        state.sampler.close()
        if state.ahead is not None:
            state.ahead.wait(timeout_s=5.0)
        if state.log is not None:
            state.log.close()
    return state.run_dir


def run_epoch(state: State, config: Config) -> None:
    """One epoch: every stage once, in order."""
    epoch, ranks = state.epoch + 1, state.ranks
    state.running_epoch = epoch
    started = time.perf_counter()
    torch.manual_seed(derive_seed(config.seed, epoch, "torch", ranks.rank))

    prompts = state.resolved.prompts.next(config.sampling.samples_per_epoch, copies=config.sampling.samples_per_prompt)
    if state.ahead is not None:
        scored = score(state, collect_ahead(state))
    elif config.sampling.overlap:
        scored = sample_and_score_epoch(state, prompts, epoch)
    else:
        scored = score(state, sample_epoch(state, prompts, epoch, "sampling"))
    lag_steps = state.engine.num_updates - min(sample.response.weights_step for sample in scored.samples)
    if config.sampling.ahead and epoch < config.epochs:
        start_ahead(state, epoch + 1)
    if ranks.is_main:
        write_samples(samples_path(state.run_dir, epoch), scored, state.resolved.tokenizer)

    steps_done = []
    with state.phase("train", len(scored.samples)) as advance:
        for step in plan_steps(scored, config.optim, config.packing, num_ranks=ranks.world_size, rank=ranks.rank):
            metrics = state.engine.train_step(step)
            row = step_row(epoch, state.engine.num_updates, step, metrics, config.packing.train_tokens)
            if state.log is not None:
                state.log.step(row)
            steps_done.append((step, metrics))
            advance(step.num_samples)

    row = epoch_row(epoch, state.engine.num_updates, steps_done, config.packing.train_tokens)
    row |= response_metrics(scored)
    row |= measure_held_out(state)
    sampling_s = state.durations_s.get("sample_ahead_duration_s", state.durations_s["sample_duration_s"])
    row["sample_tokens_per_second"] = row["num_actions"] / sampling_s
    row |= state.freshness.row | state.phase_row()
    row["weights_lag_steps"] = lag_steps
    row["epoch_duration_s"] = time.perf_counter() - started
    state.epoch = epoch
    refresh_contrast_if_due(state)
    save(state, row)
    evaluate_if_due(state)


def sample_epoch(state: State, prompts: Sequence[RenderedPrompt], epoch: int, purpose: str) -> list[Sample]:
    """The prompts answered with the policy's current weights: every rank answers its share and gets all answers."""
    ranks, sampler = state.ranks, state.sampler
    if isinstance(sampler, ReplaySampler):
        ranks = Ranks()  # every rank reads all: which stored response a prompt gets depends on the prompts before it
    seed = sampling_seed(state.config, epoch, purpose, ranks)
    share = ranks.share(prompts)
    with state.phase("evaluation" if purpose == "evaluation" else "sample", len(share)) as advance:
        if state.ahead is not None:
            state.ahead.wait()  # it answers with the weights that this sync replaces
        state.freshness.sync(sampler, state.engine.full_model(), state.engine.num_updates, state.ranks)
        samples = sample_responses(sampler, share, seed=seed, advance=advance)
        state.engine.release_full_model()
        return ranks.unshare(samples)


def sampling_seed(config: Config, epoch: int, purpose: str, ranks: Ranks) -> int:
    """The seed of this rank's share of the prompts; seeds of single prompts do not depend on the rank."""
    return derive_seed(config.seed, epoch, purpose, 0 if config.sampling.per_prompt_seeds else ranks.rank)


def sample_and_score_epoch(state: State, prompts: Sequence[RenderedPrompt], epoch: int) -> ScoredSamples:
    """``sample_epoch`` and ``score`` in one phase: what is finished is scored while the rest is generated."""
    ranks, config = state.ranks, state.config
    with state.phase("sample", len(ranks.share(prompts))) as advance, state.frozen_on_device() as frozen:
        state.freshness.sync(state.sampler, state.engine.full_model(), state.engine.num_updates, ranks)
        scored, state.durations_s["score_duration_s"] = sample_and_score(
            state.sampler,
            frozen,
            prompts,
            config,
            seed=sampling_seed(config, epoch, "sampling", ranks),
            ranks=ranks,
            num_valid_vocab=state.resolved.num_valid_vocab,
            advance=advance,
        )
        state.engine.release_full_model()
    return scored


def start_ahead(state: State, epoch: int) -> None:
    """Let the sampler answer the prompts of the next epoch with the weights of now, while this epoch trains."""
    stream, sampling = state.resolved.prompts, state.config.sampling
    before = stream.state_dict()
    prompts = stream.next(sampling.samples_per_epoch, copies=sampling.samples_per_prompt)
    stream.load_state_dict(before)  # a checkpoint of this epoch does not know of them
    state.freshness.sync(state.sampler, state.engine.full_model(), state.engine.num_updates, state.ranks)
    state.engine.release_full_model()
    state.sampler.recheck = partial(state.freshness.check_unchanged, state.sampler)  # the trainer's weights move on
    seed = sampling_seed(state.config, epoch, "sampling", state.ranks)
    state.ahead = SamplesAhead(state.sampler, state.ranks.share(prompts), seed=seed)


def collect_ahead(state: State) -> list[Sample]:
    """What was sampled while the epoch before trained; waits for what is still missing.

    The phase lasts only as long as the wait; what the slowest rank's sampler took is ``sample_ahead_duration_s``.
    """
    ahead, state.ahead = state.ahead, None
    with state.phase("sample", len(ahead.samples)):
        samples = state.ranks.unshare(ahead.collect())
    state.durations_s["sample_ahead_duration_s"] = max(state.ranks.gather(ahead.duration_s))
    return samples


def score(state: State, samples: Sequence[Sample]) -> ScoredSamples:
    """Targets of samples, from the frozen pair."""
    with state.phase("score", len(samples)) as advance, state.frozen_on_device() as frozen:
        return score_targets(
            frozen,
            samples,
            state.config,
            num_valid_vocab=state.resolved.num_valid_vocab,
            ranks=state.ranks,
            advance=advance,
        )


def measure_before_training(state: State) -> None:
    """Make the held-out responses with the initial policy, score them, and log epoch 0."""
    if state.log is not None:
        state.log.truncate_after(-1)  # rows of a run that was cut short before its first checkpoint
    prompts = state.resolved.prompts.held_out
    row = {"epoch": 0, "step": 0}
    if prompts:
        samples = sample_epoch(state, prompts, 0, "held_out")
        state.held_out = score(state, samples)
        if state.ranks.is_main:
            write_samples(held_out_path(state.run_dir), state.held_out, state.resolved.tokenizer)
        row |= measure_held_out(state)
    if state.log is not None:
        state.log.epoch(row | state.freshness.row | state.phase_row())


def measure_held_out(state: State) -> dict[str, float]:
    """The policy's mean squared log-ratio on the fixed held-out responses; nothing without held-out prompts."""
    held_out, ranks = state.held_out, state.ranks
    if held_out is None:
        return {}
    budget = state.config.packing.score_tokens
    packs = pack_views(held_out.samples, (-1,), token_budget=budget, num_ranks=ranks.world_size, rank=ranks.rank)
    mine = []
    with state.phase("held_out", len(held_out.samples)) as advance:
        device = state.engine.device
        results = ((pack, [state.engine.logprobs(moved)]) for pack, moved in copied_ahead(packs, device))
        for pack, (logprobs,) in read_behind(results, device):
            if not pack.is_dummy:
                mine.append((pack.action_rows(held_out.offsets), logprobs))
                advance(len(pack.seqlens))
    policy_logprobs = torch.full_like(held_out.targets, math.nan)
    for rows, logprobs in itertools.chain(*ranks.gather(mine)):
        policy_logprobs[rows] = logprobs
    row = held_out_row(held_out, policy_logprobs)
    if not all(map(math.isfinite, row.values())):
        raise NonFiniteError(f"epoch {state.running_epoch}: held-out metrics {row}; the last checkpoint is kept")
    return row


def refresh_contrast_if_due(state: State) -> None:
    """Every ``contrast.refresh_every`` epochs the policy takes the place of μ, for the held-out targets too."""
    if state.epoch and last_refresh(state.config, state.epoch) == state.epoch:
        refresh_frozen(state)
        score_held_out_again(state)


def score_held_out_again(state: State) -> None:
    """The held-out responses stay those of the initial model; their targets are those of what stands for μ now."""
    if state.held_out is not None and last_refresh(state.config, state.epoch):
        state.held_out = score(state, state.held_out.samples)


def evaluate_if_due(state: State) -> None:
    """Answer the fixed test prompts into RUN/eval/epoch_NNNN.jsonl when this epoch is due and has none yet."""
    every, epoch = state.config.evaluation.every, state.epoch
    path = eval_path(state.run_dir, epoch)
    if not state.ranks.broadcast(every and epoch % every == 0 and not path.exists()):
        return
    samples = sample_epoch(state, state.resolved.test_prompts, 0, "evaluation")
    if state.ranks.is_main:
        write_evaluation(path, samples, state.resolved.tokenizer, model=f"{state.run_dir.name}/epoch_{epoch:04d}")


def export(state: State) -> None:
    """Write the trained model to RUN/export."""
    weights = state.engine.full_weights()
    if state.ranks.is_main:
        template = state.resolved.renderer.chat_template
        path = state.run_dir / "export"
        export_model(state.policy.model, state.resolved.tokenizer, path, chat_template=template, weights=weights)
