"""The phases of an epoch, each measured apart: sample, pack, score, train, checkpoint, sync.

A phase's seconds are wall-clock, the device synchronised at both ends; beside them stand the process's CPU seconds,
which other programs on the machine disturb less. Peak memory is what the allocator held on a GPU, and the process's
resident memory on Linux. Sides take turns; a side that runs out of memory is a result, not a crash.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import epoch_time_variants as variants
import torch
from epoch_time_variants import SCORERS, TRAINERS, Bench

from inverseq.checkpoint import save_checkpoint
from inverseq.records import ScoredSamples, TrainStep
from inverseq.sampling_transformers import TransformersSampler

__all__ = ["ALL_PHASES", "DEFAULT_PHASES", "Measured", "Measurements", "measure_epoch", "sample_forced"]

DEFAULT_PHASES = ("sample", "pack", "score", "train", "checkpoint", "sync")
ALL_PHASES = (*DEFAULT_PHASES, "forward_backward")
BASELINE, OURS = "baseline", "ours"


@dataclass(slots=True)
class Measured:
    """One phase of one variant over all repetitions."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass(slots=True)
class Measurements:
    """Measurements by (phase, variant), and what the variants computed."""

    phases: dict[tuple[str, str], Measured] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)  # of the first step, by trainer
    scored: dict[str, ScoredSamples] = field(default_factory=dict)
    steps: dict[str, list[TrainStep]] = field(default_factory=dict)

    def measure(self, phase: str, variant: str, work: Callable[[], object], device: torch.device) -> object | None:
        """The result of ``work``, whose time and memory are added; None when memory ran out."""
        entry = self.phases.setdefault((phase, variant), Measured())
        gc.collect()
        if any(other.failure for other in self.phases.values()) and device.type == "cuda":
            torch.cuda.empty_cache()  # what a failed side left in pieces; else the cache is kept, as in training
        reset_peak(device)
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            result = work()
            synchronize(device)
        except torch.OutOfMemoryError as error:
            entry.failure = f"out of memory: {str(error).splitlines()[0]}"[:200]
            return None
        entry.wall_s.append(time.perf_counter() - wall)
        entry.cpu_s.append(time.process_time() - cpu)
        peak = peak_bytes(device)
        entry.peak_bytes = peak if entry.peak_bytes is None or peak is None else max(entry.peak_bytes, peak)
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far; without effect where the system has no such switch."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since ``reset_peak``; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return None


def measure_epoch(
    bench: Bench,
    phases: Sequence[str],
    *,
    found: Measurements,
    reps: int,
    rungs: Sequence[tuple[str, str]],
    progress: Callable[[str], None],
) -> None:
    """Fill ``found``; ``rungs`` are the (scorer, trainer) pairs to compare, ours among them.

    ``progress`` is called before each measurement, so that what is known by then can be kept.
    """
    scorers, trainers = (list(dict.fromkeys(pair[k] for pair in rungs)) for k in (0, 1))
    training = [phase for phase in ("train", "forward_backward") if phase in phases]
    gc.freeze()  # what lives now is not searched again before each measurement
    warm_up(bench, scorers, trainers if training else [])
    gc.collect()
    gc.freeze()
    for rep in range(reps):
        if "sample" in phases:
            progress(f"repetition {rep + 1}: sample")
            found.measure("sample", OURS, lambda: sample_forced(bench), bench.device)
        for name in scorers if "score" in phases else [OURS]:
            progress(f"repetition {rep + 1}: score, {name}")
            measure_score(found, bench, name, "score" if "score" in phases else "unreported")
        for scorer, name in trainer_pairs(rungs) if training or "pack" in phases else ():
            progress(f"repetition {rep + 1}: train, {name}")
            measure_training(found, bench, scorer, name, training)
        if "checkpoint" in phases:
            progress(f"repetition {rep + 1}: checkpoint")
            measure_checkpoint(found, bench)
        if "sync" in phases:
            sampler = make_sampler(bench)
            found.measure("sync", OURS, lambda s=sampler: s.sync(bench.policy, bench.engine.num_updates), bench.device)
    gc.unfreeze()


def trainer_pairs(rungs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each trainer once, with the scorer whose targets it trains on: the last rung's that has it."""
    return [(scorer, trainer) for trainer, scorer in {trainer: scorer for scorer, trainer in rungs}.items()]


def measure_score(found: Measurements, bench: Bench, name: str, phase: str) -> None:
    scored = found.measure(phase, name, lambda: variants.score(bench, SCORERS[name]), bench.device)
    if scored is not None:
        found.scored[name] = scored


def measure_training(found: Measurements, bench: Bench, scorer: str, name: str, training: Sequence[str]) -> None:
    """Micro-batches, then forward, backward and update; nothing when scoring failed for want of memory."""
    scored, trainer = found.scored.get(scorer) or found.scored.get(OURS), TRAINERS[name]
    if scored is None:
        return
    steps = found.measure("pack", name, lambda: trainer.steps(bench, scored), bench.device)
    found.steps[name] = steps
    if "forward_backward" in training:
        losses = found.measure(
            "forward_backward", name, lambda: variants.train_without_update(bench, trainer, steps), bench.device
        )
        if losses is not None:
            found.losses.setdefault(name, losses[0])
    if "train" in training:
        metrics = found.measure("train", name, lambda: variants.train(bench, trainer, steps), bench.device)
        if metrics is not None:
            found.losses.setdefault(name, metrics[0].loss)
    drop_gradients(bench)


def drop_gradients(bench: Bench) -> None:
    """What a side that ran out of memory left behind must not count for the next."""
    for parameter in bench.policy.parameters():
        parameter.grad = None
    if bench.engine is not None:
        bench.engine.zero_grad()


def warm_up(bench: Bench, scorers: Sequence[str], trainers: Sequence[str]) -> None:
    """Compile and allocate before the clock runs: every variant on one step on a GPU, two sides on a pair on a CPU."""
    on_cuda = bench.device.type == "cuda"
    count = bench.config.optim.samples_per_step if on_cuda else 2
    shortest = sorted(bench.samples, key=lambda sample: sample.num_actions + len(sample.rendered.prompt_ids))
    few = Bench(
        bench.config,
        bench.policy,
        bench.frozen,
        bench.samples[:count] if on_cuda else shortest[:count],
        bench.num_valid_vocab,
        bench.engine,
    )
    unmeasured = Measurements()
    for name in scorers if on_cuda else [name for name in scorers if name in (BASELINE, OURS)]:
        measure_score(unmeasured, few, name, "score")
    kind = "forward_backward" if bench.engine is None else "train"
    for name in trainers if on_cuda else [name for name in trainers if name in (BASELINE, OURS)]:
        measure_training(unmeasured, few, name, name, [kind])


def measure_checkpoint(found: Measurements, bench: Bench) -> None:
    """Write a checkpoint as the trainer does, into a temporary folder; a note instead where the disk is too small."""
    with tempfile.TemporaryDirectory(prefix="epoch_time-") as folder:
        num_bytes = sum(p.numel() * p.element_size() for p in bench.policy.parameters())
        num_bytes += 12 * sum(p.numel() for p in bench.policy.parameters())  # fp32 moments and master weights
        free = shutil.disk_usage(folder).free
        if free < 1.1 * num_bytes:
            failure = f"not measured: {num_bytes / 2**30:.0f} GiB to write, {free / 2**30:.0f} GiB free"
            found.phases[("checkpoint", OURS)] = Measured(failure=failure)
            return
        found.measure("checkpoint", OURS, lambda: write_checkpoint(Path(folder), bench), bench.device)


def write_checkpoint(folder: Path, bench: Bench) -> None:
    save_checkpoint(
        folder, 1, model=bench.policy, engine_state=bench.engine.state_dict(), progress={"epoch": 1}, keep_last=1
    )


def make_sampler(bench: Bench) -> TransformersSampler:
    """The project's sampler; no tokenizer stands behind random weights, and no token ends a response."""
    return TransformersSampler(
        bench.config.sampling, bench.policy, SimpleNamespace(eos_token_id=0), num_valid_vocab=bench.num_valid_vocab
    )


def sample_forced(bench: Bench) -> list[int]:
    """Answer the prompts by the project's continuous batching, each with exactly its sample's number of tokens.

    Returns the tokens generated for each. Forced because random weights never end a response by themselves; what is
    generated is dropped, so that every variant scores and trains the same tokens.
    """
    lengths = [sample.num_actions for sample in bench.samples]
    prompts = [sample.rendered for sample in bench.samples]
    counts = [0] * len(prompts)
    for index, response in make_sampler(bench).generate(prompts, seed=bench.config.seed, lengths=lengths):
        counts[index] = len(response.token_ids)
    if counts != lengths:
        raise RuntimeError(f"the sampler generated {counts} tokens instead of {lengths}")
    return counts
