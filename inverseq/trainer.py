"""The Inverse-Q* loop, readable from here alone: sample, score, plan, step, checkpoint, evaluate, export.

Each stage is one call whose inputs and outputs are records of ``inverseq.records``. Only this file and the command
line know the order of the stages.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import Config
from .distributed import Ranks, init_ranks
from .engine import Engine, NonFiniteError, TorchEngine
from .export import export_model
from .memory_peaks import PeakMemory
from .metrics import MetricsLog
from .model import FrozenPair, check_head, enable_gradient_checkpointing, frozen_copy, load_model, resolve_device
from .packing import pack_views
from .placement import place_run
from .policy import Policy
from .progress import Progress
from .records import RenderedPrompt, Sample, ScoredSamples
from .resolve import Resolved, resolve
from .run_directory import has_begun, write_run_config
from .sample_files import eval_path, held_out_path, read_samples, samples_path, write_evaluation, write_samples
from .sampling import Sampler, make_sampler, sample_responses
from .steps import plan_steps, step_sizes
from .summary import epoch_row, held_out_row, response_metrics, step_row
from .targets import score_targets

__all__ = ["State", "derive_seed", "run_epoch", "train"]

logger = logging.getLogger(__name__)

PURPOSES = ("sampling", "held_out", "evaluation", "torch")


def derive_seed(seed: int, epoch: int, purpose: str, rank: int = 0) -> int:
    """A 31-bit seed for one purpose of one epoch on one rank."""
    entropy = np.random.SeedSequence([seed, epoch, PURPOSES.index(purpose), rank])
    return int(entropy.generate_state(1, np.uint32)[0] >> 1)


@dataclass
class State:
    """Everything a run holds. ``epoch`` counts finished epochs; ``running_epoch`` is shown to the user."""

    config: Config
    ranks: Ranks
    resolved: Resolved
    run_dir: Path
    engine: Engine
    frozen: FrozenPair
    sampler: Sampler
    log: MetricsLog
    progress: Progress
    memory: PeakMemory
    held_out: ScoredSamples | None = None
    epoch: int = 0
    running_epoch: int = 0
    durations_s: dict[str, float] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator:
        """Show and time one phase of the epoch; yields the function that advances its bar."""
        started = time.perf_counter()
        described = f"epoch {self.running_epoch}/{self.config.epochs}"
        with self.progress.phase(described, name, total) as advance, self.memory.phase(name):
            yield advance
        self.durations_s[f"{name}_duration_s"] = time.perf_counter() - started


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
    resolved = resolve(config, resume=resume)
    ranks.barrier()  # a rank that is ahead must not write what another one still checks
    checkpoint = latest_checkpoint(resolved.run_dir) if resume else None
    state = build_state(resolved, ranks)
    write_run_config(config, resolved.run_dir)
    try:
        if checkpoint is not None:
            restore(state, checkpoint)
        else:
            measure_before_training(state)
        evaluate_if_due(state)
        while state.epoch < config.epochs:
            run_epoch(state, config)
        template = resolved.renderer.chat_template
        export_model(state.policy.model, resolved.tokenizer, state.run_dir / "export", chat_template=template)
        state.progress.summary(state.run_dir)
    finally:
        state.sampler.close()
        state.log.close()
    return state.run_dir


def run_epoch(state: State, config: Config) -> None:
    """One epoch: every stage once, in order."""
    epoch = state.running_epoch = state.epoch + 1
    started = time.perf_counter()
    torch.manual_seed(derive_seed(config.seed, epoch, "torch"))

    prompts = state.resolved.prompts.next(
        config.sampling.samples_per_epoch, copies=config.sampling.samples_per_prompt
    )
    samples = sample_epoch(state, prompts, derive_seed(config.seed, epoch, "sampling"))
    scored = score(state, samples)
    write_samples(samples_path(state.run_dir, epoch), scored, state.resolved.tokenizer)

    steps_done = []
    with state.phase("train", len(samples)) as advance:
        for step in plan_steps(scored, config.optim, config.packing):
            metrics = state.engine.train_step(step)
            state.log.step(step_row(epoch, state.engine.num_updates, step, metrics, config.packing.train_tokens))
            steps_done.append((step, metrics))
            advance(step.num_samples)

    row = epoch_row(epoch, state.engine.num_updates, steps_done, config.packing.train_tokens)
    row |= response_metrics(scored)
    row |= measure_held_out(state)
    row["sample_tokens_per_second"] = row["num_actions"] / state.durations_s["sample_duration_s"]
    row |= state.memory.row() | state.durations_s | {"epoch_duration_s": time.perf_counter() - started}
    state.epoch = epoch
    state.log.epoch(row)
    save(state)
    evaluate_if_due(state)


def build_state(resolved: Resolved, ranks: Ranks) -> State:
    """Load the models where the placement says and make the engine, the sampler and the logs of a run."""
    config = resolved.config
    placement = place_run(resolved, world_size=ranks.world_size)  # ValueError when it cannot fit
    memory = PeakMemory(resolve_device(config.model), placement.phase_bytes)
    initial = load_model(resolved.model_path, config.model)
    check_head(initial, resolved.probe_pack(), resolved.num_valid_vocab)
    better = frozen_copy(initial)
    plain = better
    if config.contrast.kind == "model":
        plain = load_model(resolved.plain_model_path, config.model)
        check_head(plain, resolved.probe_pack(), resolved.num_valid_vocab)
    if placement.gradient_checkpointing:
        enable_gradient_checkpointing(initial)
    policy = Policy(initial, resolved.num_valid_vocab, config.engine)
    updates = config.epochs * len(step_sizes(config.sampling.samples_per_epoch, config.optim.samples_per_step))
    return State(
        config=config,
        ranks=ranks,
        resolved=resolved,
        run_dir=resolved.run_dir,
        engine=TorchEngine(policy, config.optim, updates),
        frozen=FrozenPair(better, plain),
        sampler=make_sampler(
            config.sampling, initial, resolved.tokenizer, num_valid_vocab=resolved.num_valid_vocab
        ),
        log=MetricsLog(resolved.run_dir, config.logging),
        progress=Progress(),
        memory=memory,
    )


def sample_epoch(state: State, prompts: list[RenderedPrompt], seed: int) -> list[Sample]:
    """Answer prompts with the policy's current weights."""
    with state.phase("sample", len(prompts)) as advance:
        state.sampler.sync(state.policy.model, state.engine.num_updates)
        return sample_responses(state.sampler, prompts, seed=seed, advance=advance)


def score(state: State, samples: list[Sample]) -> ScoredSamples:
    """Targets of samples, from the frozen pair."""
    with state.phase("score", len(samples)) as advance:
        return score_targets(
            state.frozen, samples, state.config, num_valid_vocab=state.resolved.num_valid_vocab, advance=advance
        )


def measure_before_training(state: State) -> None:
    """Make the held-out responses with the initial policy, score them, and log epoch 0."""
    state.log.truncate_after(-1)  # rows of a run that was cut short before its first checkpoint
    prompts = state.resolved.prompts.held_out
    row = {"epoch": 0, "step": 0}
    if prompts:
        samples = sample_epoch(state, prompts, derive_seed(state.config.seed, 0, "held_out"))
        state.held_out = score(state, samples)
        write_samples(held_out_path(state.run_dir), state.held_out, state.resolved.tokenizer)
        row |= measure_held_out(state)
    state.log.epoch(row | state.durations_s)


def measure_held_out(state: State) -> dict[str, float]:
    """The policy's mean squared log-ratio on the fixed held-out responses; nothing without held-out prompts."""
    if state.held_out is None:
        return {}
    packs = pack_views(state.held_out.samples, (-1,), token_budget=state.config.packing.score_tokens)
    device = next(state.policy.parameters()).device
    state.policy.eval()
    logprobs = []
    with state.phase("held_out", len(state.held_out.samples)) as advance, torch.no_grad():
        for pack in packs:
            logprobs.append(state.policy.logprobs(pack.to(device)).cpu())
            advance(len(pack.seqlens))
    row = held_out_row(state.held_out, packs, logprobs)
    if not all(map(math.isfinite, row.values())):
        raise NonFiniteError(f"epoch {state.running_epoch}: held-out metrics {row}; the last checkpoint is kept")
    return row


def evaluate_if_due(state: State) -> None:
    """Answer the fixed test prompts into RUN/eval/epoch_NNNN.jsonl when this epoch is due and has none yet."""
    every, epoch = state.config.evaluation.every, state.epoch
    path = eval_path(state.run_dir, epoch)
    if not every or epoch % every or path.exists():
        return
    samples = sample_epoch(state, state.resolved.test_prompts, derive_seed(state.config.seed, 0, "evaluation"))
    write_evaluation(path, samples, state.resolved.tokenizer, model=f"{state.run_dir.name}/epoch_{epoch:04d}")


def save(state: State) -> None:
    """Write the checkpoint of the epoch just finished."""
    started = time.perf_counter()
    path = save_checkpoint(
        state.run_dir,
        state.epoch,
        model=state.policy.model,
        engine_state=state.engine.state_dict(),
        progress={"epoch": state.epoch, "prompts": state.resolved.prompts.state_dict()},
        keep_last=state.config.checkpoint.keep_last,
    )
    logger.info("checkpoint %s in %.1f s", path, time.perf_counter() - started)


def restore(state: State, checkpoint: Path) -> None:
    """Put the run back to where the checkpoint was written."""
    engine_state, progress = load_checkpoint(checkpoint, model=state.policy.model)
    state.engine.load_state_dict(engine_state)
    state.resolved.prompts.load_state_dict(progress["prompts"])
    state.epoch = state.running_epoch = progress["epoch"]
    state.log.truncate_after(state.epoch)
    if state.resolved.prompts.held_out:
        state.held_out = read_samples(held_out_path(state.run_dir), state.resolved.prompts.held_out)
    logger.info("resumed %s behind epoch %d", state.run_dir, state.epoch)
