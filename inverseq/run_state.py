"""What a run holds between its stages: made, saved and restored here, by one process or by all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from transformers import PreTrainedModel

from .atomic import atomic_file
from .attention import backend_of
from .checkpoint import checkpoint_epoch, list_checkpoints, load_checkpoint, save_checkpoint
from .checkpoint_files import named_tensors, read_tensors
from .checkpoint_sharded import is_sharded, load_named_checkpoint, save_sharded_checkpoint
from .config import Config
from .distributed import Ranks
from .engine import Engine, TorchEngine
from .engine_deepspeed import DeepSpeedEngine, frozen_engine
from .freshness import Freshness
from .lora import AdapterlessPair, adapters_off, add_adapters, has_adapters
from .memory import Placement
from .memory_peaks import PeakMemory
from .metrics import MetricsLog
from .model import (
    FrozenPair,
    check_head,
    check_heads,
    enable_gradient_checkpointing,
    frozen_copy,
    load_model,
    resolve_device,
)
from .placement import place_run
from .policy import Policy
from .progress import Progress
from .records import ScoredSamples
from .resolve import Resolved
from .sample_files import held_out_path, read_samples, remove_evaluations_behind
from .sampling import Sampler, make_sampler
from .sampling_ahead import SamplesAhead
from .sampling_transformers import stop_token_ids
from .steps import step_sizes
from .transfers import keep_together
from .zero_loading import check_deepspeed, load_sharded

__all__ = ["State", "build_state", "last_refresh", "refresh_frozen", "restore", "save"]

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Everything a run holds. ``epoch`` counts finished epochs; ``running_epoch`` is shown to the user."""

    config: Config
    ranks: Ranks
    resolved: Resolved
    run_dir: Path
    engine: Engine
    frozen: FrozenPair  # or an engine that shards it
    sampler: Sampler
    freshness: Freshness
    log: MetricsLog | None  # None on every rank but the first
    progress: Progress
    placement: Placement
    memory: PeakMemory
    held_out: ScoredSamples | None = None
    ahead: SamplesAhead | None = None  # the next epoch's, while this one trains
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

    def phase_row(self) -> dict[str, float]:
        """Seconds and peaks of memory of the phases since the last row."""
        row = self.memory.row() | self.durations_s
        self.durations_s = {}
        return row

    @contextmanager
    def frozen_on_device(self) -> Iterator[FrozenPair]:
        """The frozen pair where it can be run: on the device for a while, or the policy without its adapters."""
        if has_adapters(self.policy.model):
            with adapters_off(self.policy.model):
                yield self.frozen
            return
        moved = list(self.frozen.parameters()) if self.placement.frozen == "host" else []
        at_home = [weight.data for weight in moved]
        for weight in moved:
            weight.data = weight.data.to(self.engine.device, non_blocking=True)
        try:
            yield self.frozen
        finally:
            for weight, values in zip(moved, at_home, strict=True):
                weight.data = values


def build_state(resolved: Resolved, ranks: Ranks) -> State:
    """Load the models where the placement says and make the engine, the sampler and the logs of a run."""
    config = resolved.config
    placement = place_run(resolved, ranks)  # ValueError when it cannot fit
    kind = engine_kind(config, placement, ranks)
    memory = PeakMemory(resolve_device(config.model), placement.phase_bytes)
    with memory.phase("load"):
        initial, frozen = load_models(kind, resolved, placement, ranks)
        sampler = make_sampler(
            config.sampling,
            initial,
            resolved.tokenizer,
            num_valid_vocab=resolved.num_valid_vocab,
            weights_dir=resolved.run_dir / "weights",
            is_main=ranks.is_main,
        )
        policy = Policy(initial, resolved.num_valid_vocab, config.engine)
        engine = make_engine(kind, policy, resolved, ranks, placement)
    memory.row()  # logged; no row of metrics is about it
    return State(
        config=config,
        ranks=ranks,
        resolved=resolved,
        run_dir=resolved.run_dir,
        engine=engine,
        frozen=frozen,
        sampler=sampler,
        freshness=Freshness(
            resolved.prompts.training[0],
            resolved.tokenizer,
            stop_ids=stop_token_ids(initial, resolved.tokenizer),
            num_valid_vocab=resolved.num_valid_vocab,
            max_gap=config.sampling.max_logprob_gap,
        ),
        log=MetricsLog(resolved.run_dir, config.logging) if ranks.is_main else None,
        progress=Progress(shown=ranks.is_main),
        placement=placement,
        memory=memory,
    )


def check_same_attention(backend: str, ranks: Ranks) -> None:
    """Raise ValueError on all ranks when attention is served by another ``backend`` on one of them.

    A sample is scored by one rank and trained by another; in bf16 two backends round apart by more nats than a target
    may be wrong (README, *What rounding costs*).
    """
    backends = ranks.gather(backend)
    for rank, other in enumerate(backends):
        if other != backends[0]:
            raise ValueError(
                f"model.attention='auto': is {backends[0]} on rank 0 and {other} on rank {rank}; expected one on all "
                "ranks: install the same packages everywhere or set model.attention"
            )


def make_engine(kind: str, policy: Policy, resolved: Resolved, ranks: Ranks, placement: Placement) -> Engine:
    """The engine that trains the policy, by its ``engine_kind``."""
    config = resolved.config
    updates = config.epochs * len(step_sizes(config.sampling.samples_per_epoch, config.optim.samples_per_step))
    if kind == "torch":
        return TorchEngine(policy, config.optim, updates)
    return DeepSpeedEngine(
        policy,
        config.optim,
        updates,
        ranks=ranks,
        zero_stage=placement.zero_stage,
        offload_optimizer=placement.offload_optimizer,
        offload_parameters=placement.offload_parameters,
        probe=resolved.probe_pack(),
    )


def engine_kind(config: Config, placement: Placement, ranks: Ranks) -> str:
    """ "torch" or "deepspeed"; ValueError when the one that is asked for cannot do what is asked of it."""
    needs = {
        f"{ranks.world_size} processes": ranks.world_size > 1,
        "engine.offload_optimizer='cpu'": placement.offload_optimizer,
        "engine.offload_parameters='cpu'": placement.offload_parameters,
        "engine.frozen='sharded'": placement.frozen == "sharded",
    }
    asked = config.engine.kind
    reasons = [need for need, is_needed in needs.items() if is_needed]
    if asked == "torch" and reasons:
        raise ValueError(f"engine.kind='torch': runs in one process without offload; {reasons[0]} needs deepspeed")
    if placement.frozen == "sharded":
        message = "expected {} with frozen models that are sharded over ranks"
        if config.sampling.overlap:
            raise ValueError(f"sampling.overlap=True: {message.format('false')}")
        if config.contrast.refresh_every:
            raise ValueError(f"contrast.refresh_every={config.contrast.refresh_every}: {message.format(0)}")
    kind = asked if asked != "auto" else "deepspeed" if reasons else "torch"
    if kind == "deepspeed":
        check_deepspeed()
    return kind


def load_models(
    kind: str, resolved: Resolved, placement: Placement, ranks: Ranks
) -> tuple[PreTrainedModel, FrozenPair]:
    """What the policy starts as, for an engine of this kind, and the frozen pair."""
    config, path = resolved.config, resolved.model_path
    is_sharded = kind == "deepspeed" and placement.zero_stage == 3
    if is_sharded:
        initial = load_sharded(path, config.model, ranks=ranks, offload_parameters=placement.offload_parameters)
    else:
        initial = load_whole(path, resolved)
    check_same_attention(backend_of(initial), ranks)
    if config.policy.lora.rank:
        add_adapters(initial, config.policy.lora, seed=config.seed)
    frozen = build_frozen(resolved, placement, ranks, None if is_sharded else initial)
    if placement.gradient_checkpointing:
        enable_gradient_checkpointing(initial)
    return initial, frozen


def load_whole(path: str, resolved: Resolved, home: str | None = None) -> PreTrainedModel:
    """A model on the device, whose head is one that the operations know; afterwards its weights go ``home``."""
    model = load_model(path, resolved.config.model)
    check_head(model, resolved.probe_pack(), resolved.num_valid_vocab)
    for weight in model.parameters() if home else ():
        weight.data = weight.data.to(home)
    return model


def build_frozen(
    resolved: Resolved, placement: Placement, ranks: Ranks, initial: PreTrainedModel | None
) -> FrozenPair:
    """π_w and π_l where the placement says: what the policy starts as, and for the model contrast another model.

    ``initial`` is the policy where this rank has it whole; else its file is read again. What is sharded is never whole.
    """
    config, path, plain_path = resolved.config.model, resolved.model_path, resolved.plain_model_path
    if placement.frozen == "sharded":
        better = load_sharded(path, config, ranks=ranks)
        plain = better if plain_path is None else load_sharded(plain_path, config, ranks=ranks)
        frozen = frozen_engine(FrozenPair(better, plain), resolve_device(config))
        frozen(check_heads, resolved.probe_pack(), resolved.num_valid_vocab)
        return frozen
    home = "cpu" if placement.frozen == "host" else None
    plain = None if plain_path is None else load_whole(plain_path, resolved, home)
    if initial is not None and has_adapters(initial):
        return AdapterlessPair(initial, plain)
    better = load_whole(path, resolved, home) if initial is None else frozen_copy(initial, home)
    frozen = FrozenPair(better, better if plain is None else plain)
    if placement.frozen == "host" and resolve_device(config).type == "cuda":
        keep_together(frozen.parameters(), pin_memory=True)
    return frozen


def refreshed_path(run_dir: Path, epoch: int) -> Path:
    """The weights that took the place of μ behind an epoch."""
    return run_dir / "frozen" / f"epoch_{epoch:04d}.safetensors"


def last_refresh(config: Config, epoch: int) -> int:
    """The epoch whose policy stands for μ once ``epoch`` is finished; 0 is the initial model."""
    every = config.contrast.refresh_every
    return epoch // every * every if every else 0


def refresh_frozen(state: State) -> None:
    """Put the policy's current weights in the place of μ, and write them for a resumed run."""
    tensors = named_tensors(state.engine.full_model(), whole=True)
    with torch.no_grad():
        for name, frozen in named_tensors(state.frozen.better, whole=True).items():
            frozen.copy_(tensors[name])
    state.engine.release_full_model()
    if state.ranks.is_main:
        path = refreshed_path(state.run_dir, state.epoch)
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            file.write(safetensors_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    logger.info("the policy of epoch %d took the place of the frozen model", state.epoch)


def restore_refreshed(state: State) -> None:
    """Put the weights that stood for μ back."""
    epoch = last_refresh(state.config, state.epoch)
    path = refreshed_path(state.run_dir, epoch)
    if not epoch:
        return
    if not path.is_file():
        raise ValueError(f"{path}: missing; without it the run cannot go on behind epoch {state.epoch}")
    read_tensors(path, named_tensors(state.frozen.better, whole=True))


def remove_refreshed(state: State) -> None:
    """Remove what no kept checkpoint needs any more."""
    kept = {last_refresh(state.config, checkpoint_epoch(path)) for path in list_checkpoints(state.run_dir)}
    for path in (state.run_dir / "frozen").glob("epoch_*.safetensors"):
        if path not in {refreshed_path(state.run_dir, epoch) for epoch in kept}:
            path.unlink()


def save(state: State, row: dict[str, Any]) -> None:
    """Write the checkpoint of the epoch just finished, and the epoch's ``row`` before the checkpoint counts.

    A run that is killed in between is resumed from the checkpoint before, which drops the row.
    """
    started = time.perf_counter()

    def write_row() -> None:
        if state.log is not None:
            state.log.epoch(row | {"checkpoint_duration_s": time.perf_counter() - started})

    common: dict[str, Any] = {
        "before_rename": write_row,
        "progress": {"epoch": state.epoch, "prompts": state.resolved.prompts.state_dict()},
        "keep_last": state.config.checkpoint.keep_last,
    }
    engine = state.engine
    if isinstance(engine, TorchEngine):
        path = save_checkpoint(
            state.run_dir, state.epoch, model=state.policy.model, engine_state=engine.state_dict(), **common
        )
    else:
        path = save_sharded_checkpoint(
            state.run_dir,
            state.epoch,
            named_state=engine.named_state(),
            num_updates=engine.num_updates,
            ranks=state.ranks,
            **common,
        )
    if state.config.contrast.refresh_every and state.ranks.is_main:
        remove_refreshed(state)
    logger.info("checkpoint %s in %.1f s", path, time.perf_counter() - started)


def restore(state: State, checkpoint: Path) -> None:
    """Put the run back to where the checkpoint was written, by whichever engine and number of ranks.

    What it logged and answered behind that epoch goes; the samples of later epochs are written over when it gets there.
    """
    engine = state.engine
    if isinstance(engine, TorchEngine) and not is_sharded(checkpoint):
        engine_state, progress = load_checkpoint(checkpoint, model=state.policy.model)
        engine.load_state_dict(engine_state)
    else:
        saved = load_named_checkpoint(checkpoint, names=engine.names, ranks=state.ranks)
        engine.load_named_state(saved.read, saved.num_updates)
        progress = saved.progress
    state.resolved.prompts.load_state_dict(progress["prompts"])
    state.epoch = state.running_epoch = progress["epoch"]
    if state.log is not None:
        state.log.truncate_after(state.epoch)
        remove_evaluations_behind(state.run_dir, state.epoch)
    if state.resolved.prompts.held_out:
        state.held_out = read_samples(held_out_path(state.run_dir), state.resolved.prompts.held_out)
    restore_refreshed(state)
    logger.info("resumed %s behind epoch %d", state.run_dir, state.epoch)
