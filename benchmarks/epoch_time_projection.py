"""An epoch on other GPUs, projected from a measured one-GPU row by stated assumptions. Never a measurement.

Training and scoring take the FLOPs of each rank's packs at the peak rate of the target times the measured MFU; ZeRO-3
moves weights twice and gradients once a micro-step over NVLink; sampling reads the weights once per decoding step,
of which the longest response sets the least number, and the keys and values of all running sequences. What is left
out is printed too.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from epoch_time_inputs import PLAIN_TOKENS as PLAIN
from epoch_time_inputs import PRESETS, SAMPLES_PER_STEP, Architecture, hh_lengths
from epoch_time_inputs import PRINCIPLE_TOKENS as PRINCIPLE
from epoch_time_report import CHIPS, Chip, chip_of

from inverseq.atomic import write_json
from inverseq.config import SamplingConfig
from inverseq.memory import ModelSize, model_size
from inverseq.packing import plan_packs

__all__ = ["Source", "project", "read_source", "run"]

WEIGHT_BYTES = 2
OPTIMIZER_BYTES = 30  # a parameter: read weight, gradient, two moments (16), write weight, two moments, bf16 copy (14)
NUM_SAMPLES, TRAIN_TOKENS = 500, 4096
PAPER_S = 420
RESULTS = Path(__file__).parent / "results" / "projected"


@dataclass(frozen=True, slots=True)
class Source:
    """The measured rows that a projection rests on."""

    file: str
    model: str
    device: str
    commit: str
    date: str
    train_mfu: float
    train_phase: str
    score_mfu: float
    response_scale: float
    decode_efficiency: float | None  # bandwidth bound over measured seconds of sampling; None when not measured


def read_source(path: Path) -> Source:
    """Our side's rows of one measured run; ValueError for a projection, a CPU, or rows without MFU."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--rows={path}: expected the epoch_time.json of a measured run: {error}") from error
    ours = {
        row["phase"]: row
        for row in rows
        if isinstance(row, dict) and row.get("variant") == "ours" and row.get("measured") is True
    }
    phase = "forward_backward" if "forward_backward" in ours else "train"  # the optimizer is counted apart
    training = ours.get(phase)
    if not training or not training.get("mfu") or not ours.get("score", {}).get("mfu"):
        raise ValueError(
            f"--rows={path}: expected measured rows with an MFU for score and train; a CPU and a GPU that is not in "
            f"the table of peak rates have none, and a projection is not measured"
        )
    return Source(
        file=path.name,
        **{key: training[key] for key in ("model", "device", "commit", "date", "response_scale")},
        train_mfu=training["mfu"],
        train_phase=phase,
        score_mfu=ours["score"]["mfu"],
        decode_efficiency=decode_efficiency(ours.get("sample")),
    )


def decode_efficiency(row: dict | None) -> float | None:
    """The bandwidth bound of the measured sampling over its seconds."""
    chip = chip_of(row["device"]) if row and row.get("ms") else None
    if chip is None or row["model"] not in PRESETS:
        return None
    prompts, responses = hh_lengths(row["num_samples"], seed=0, response_scale=row["response_scale"])
    return sampling_bound(PRESETS[row["model"]], prompts + PLAIN, responses, chip) / (row["ms"] / 1e3)


@functools.cache
def size_of(shape: Architecture) -> ModelSize:
    return model_size(shape.config())


def sampling_bound(shape: Architecture, prompts: np.ndarray, responses: np.ndarray, chip: Chip) -> float:
    """Seconds in which one GPU reads weights and caches while it decodes all prompts, at most 64 at a time."""
    size = size_of(shape)
    cache_bytes = 2 * size.num_layers * size.key_value_width * WEIGHT_BYTES
    # Token t of a response attends to its prompt and the t tokens before it.
    read = float((responses * prompts + responses * (responses - 1) / 2).sum()) * cache_bytes
    steps = max(int(responses.max()), -(-int(responses.sum()) // SamplingConfig().batch_size))
    return (steps * WEIGHT_BYTES * size.num_parameters + read) / chip.memory_bytes_per_second


def flops_of(
    shape: Architecture, lengths: np.ndarray, num_actions: np.ndarray, *, factor: int, dots: int
) -> np.ndarray:
    """FLOPs of each sample: factor (P T + dots V D A + layers Q T²); see epoch_time_report."""
    size = size_of(shape)
    backbone = size.num_parameters - size.vocab * size.hidden * (1 if shape.tied else 2)
    lengths = lengths.astype(np.float64)
    logits = dots * size.vocab * size.hidden * num_actions
    return factor * (backbone * lengths + logits + size.num_layers * size.query_width * lengths**2)


@dataclass(frozen=True, slots=True)
class Epoch:
    """Seconds of a projected epoch; training between communication hidden behind compute, and none hidden."""

    sample_s: float
    score_s: float
    train_overlapped_s: float
    train_exposed_s: float
    gather_s: float
    num_steps: int


def project(source: Source, *, model: str, num_gpus: int, chip: Chip) -> Epoch:
    """An epoch of 500 samples of ``model`` on ``num_gpus`` of ``chip``."""
    shape = PRESETS[model]
    parameters = size_of(shape).num_parameters
    prompts, responses = hh_lengths(NUM_SAMPLES, seed=0, response_scale=source.response_scale)
    policy = PLAIN + prompts + responses - 1
    train_flops = flops_of(shape, policy, responses, factor=6, dots=1)
    score_flops = flops_of(shape, policy, responses, factor=2, dots=2)
    score_flops += flops_of(shape, policy - PLAIN + PRINCIPLE, responses, factor=2, dots=0)
    shares = [slice(rank, None, num_gpus) for rank in range(num_gpus)]
    weights_s = WEIGHT_BYTES * parameters / chip.memory_bytes_per_second
    one_way = chip.nvlink_bytes_per_second / 2
    gather_s = WEIGHT_BYTES * parameters * (num_gpus - 1) / num_gpus / one_way
    sizes = [SAMPLES_PER_STEP] * (NUM_SAMPLES // SAMPLES_PER_STEP) + [NUM_SAMPLES % SAMPLES_PER_STEP]
    sizes = [size for size in sizes if size]
    plan = plan_packs(policy, token_budget=max(TRAIN_TOKENS, int(policy.max())), num_ranks=num_gpus, step_sizes=sizes)
    overlapped = exposed = 0.0
    optimizer_s = OPTIMIZER_BYTES * parameters / num_gpus / chip.memory_bytes_per_second
    for step in range(plan.num_steps):
        ranks = [plan.packs(step, rank) for rank in range(num_gpus)]
        for packs in zip(*ranks, strict=True):  # a micro-step lasts as long as its dearest pack
            flops = max(float(train_flops[indices].sum()) for indices in packs)
            compute_s = max(flops / chip.flops_per_second / source.train_mfu, 3 * weights_s)
            overlapped += max(compute_s, 3 * gather_s)
            exposed += compute_s + 3 * gather_s
        overlapped += optimizer_s
        exposed += optimizer_s
    score_rate = chip.flops_per_second * source.score_mfu
    bound = max(sampling_bound(shape, (prompts + PLAIN)[share], responses[share], chip) for share in shares)
    return Epoch(
        sample_s=bound / (source.decode_efficiency or 1.0),
        score_s=max(float(score_flops[share].sum()) for share in shares) / score_rate,
        train_overlapped_s=overlapped,
        train_exposed_s=exposed,
        gather_s=gather_s,
        num_steps=plan.num_steps,
    )


def assumptions(source: Source, epoch: Epoch, *, model: str, num_gpus: int, name: str) -> list[str]:
    """Every assumption in words, with its number."""
    chip, measured = CHIPS[name], chip_of(source.device)
    _, responses = hh_lengths(NUM_SAMPLES, seed=0, response_scale=source.response_scale)
    ratio = chip.flops_per_second / measured.flops_per_second if measured else float("nan")
    if source.decode_efficiency is None:
        sampling = "no sampling was measured: this is the bandwidth bound itself, which no engine reaches"
    else:
        sampling = f"at the measured {source.decode_efficiency:.1%} of the bandwidth bound"
    return [
        f"source: {source.file}, {source.model} on one {source.device}, {source.date}, commit {source.commit}",
        f"peak rate {chip.flops_per_second / 1e12:.0f} TFLOP/s in bf16, {ratio:.2f} of the measured GPU's",
        f"the measured MFU carries over to {model} on {name}: training {source.train_mfu:.1%}, scoring "
        f"{source.score_mfu:.1%} (smaller packs a GPU would lower it, a lower peak rate would raise it)",
        f"training's MFU is that of the measured phase {source.train_phase}, "
        + ("without an optimizer" if source.train_phase != "train" else "a one-GPU optimizer included: a little low"),
        "a micro-step takes no less time than three readings of the weights from memory",
        f"{NUM_SAMPLES} samples with HH's lengths, responses times {source.response_scale:g} (mean "
        f"{responses.mean():.0f}, longest {responses.max()} tokens); the paper does not give its lengths",
        f"{SAMPLES_PER_STEP} samples a step, {epoch.num_steps} steps; a micro-step lasts as long as the rank with most",
        f"ZeRO-3 moves the bf16 weights twice and their gradients once a micro-step: 3 x {epoch.gather_s * 1e3:.0f} ms "
        f"over NVLink at {chip.nvlink_bytes_per_second / 2e9:.0f} GB/s each way "
        f"({chip.nvlink_bytes_per_second / 1e9:.0f} GB/s both ways); best case hidden behind compute, worst not",
        f"frozen weights stand whole on every GPU: scoring communicates nothing; {num_gpus} GPUs share samples evenly",
        f"sampling: each of {num_gpus} GPUs decodes its {-(-NUM_SAMPLES // num_gpus)} prompts, "
        f"{SamplingConfig().batch_size} at a time and at least one step per token of the longest response, reading the "
        f"weights ({WEIGHT_BYTES} bytes a parameter) and all caches at "
        f"{chip.memory_bytes_per_second / 1e12:.2f} TB/s; {sampling}; reading prompts is not counted",
        f"the optimizer moves {OPTIMIZER_BYTES} bytes a parameter, sharded; weights for sampling are gathered once",
        "not counted: checkpoints, evaluation, packing, start-up, other programs on the machine",
    ]


def run(arguments: argparse.Namespace) -> int:
    """``--project NxCHIP``: print and write the projection."""
    found = re.fullmatch(r"(\d+)x(\w+)", arguments.project)
    if not found or found[2] not in CHIPS or not 1 <= int(found[1]) <= 1024:
        print(f"--project={arguments.project!r}: expected a number of GPUs and one of {', '.join(CHIPS)}, as in 8xA800")
        return 2
    model = arguments.model or "vicuna-7b"
    if model not in PRESETS:
        print(f"--model={model!r}: a projection takes one of {', '.join(PRESETS)}")
        return 2
    try:
        source = read_source(arguments.rows)
    except ValueError as error:
        print(error)
        return 2
    num_gpus, name = int(found[1]), found[2]
    epoch = project(source, model=model, num_gpus=num_gpus, chip=CHIPS[name])
    said = assumptions(source, epoch, model=model, num_gpus=num_gpus, name=name)
    best = epoch.sample_s + epoch.score_s + epoch.train_overlapped_s + epoch.gather_s
    worst = best - epoch.train_overlapped_s + epoch.train_exposed_s
    lines = [
        f"PROJECTION, not a measurement: an epoch of {model} on {num_gpus}x{name}",
        f"sample {epoch.sample_s:.1f} s, score {epoch.score_s:.1f} s, train {epoch.train_overlapped_s:.1f} s "
        f"(communication hidden) to {epoch.train_exposed_s:.1f} s (none hidden), weights to the sampler "
        f"{epoch.gather_s:.2f} s",
        f"projected epoch {best:.1f} s to {worst:.1f} s; the paper reports {PAPER_S} s for 7B on 8xA800",
        "assumptions:",
        *(f"- {assumption}" for assumption in said),
    ]
    print("\n".join(lines))
    row = {
        "op": "epoch_time projection", "measured": False, "device": f"{num_gpus}x{name}", "model": model,
        "command": f"python benchmarks/epoch_time.py --project {arguments.project} --rows {arguments.rows.name}",
        "source_file": source.file, "source_device": source.device, "source_commit": source.commit,
        "source_date": source.date, "versions": f"torch {torch.__version__}", "sample_s": epoch.sample_s,
        "score_s": epoch.score_s, "train_overlapped_s": epoch.train_overlapped_s,
        "train_exposed_s": epoch.train_exposed_s, "gather_s": epoch.gather_s, "epoch_best_s": best,
        "epoch_worst_s": worst, "assumptions": "; ".join(said),
    }  # fmt: skip
    folder = RESULTS if arguments.out == Path("runs/epoch_time") else arguments.out / "projected"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch_time_{arguments.project}_{model}.json"
    write_json(path, [row])
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(f"written: {path}")
    return 0
