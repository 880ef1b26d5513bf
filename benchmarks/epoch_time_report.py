"""Rows, table and picture of epoch_time.py: seconds, tokens per second, MFU, memory, padding, and the split factor.

FLOPs are those the mathematics needs, the same for every side (P backbone parameters without embedding and head,
T real tokens, V vocabulary, D hidden size, A action tokens, Q width of all query heads; attention is causal):
training 6 P T + 6 V D A + 6 layers Q Σ len², scoring 2 P T + 4 V D A + 2 layers Q Σ len² over both views.
Embedding look-ups, recomputation, padding, dummy tokens and logits nobody needs count 0.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from epoch_time_phases import BASELINE, OURS, Measured, Measurements
from gpu_suite_report import commit, versions
from packing import cpu_name

from inverseq.packing import view_lengths
from inverseq.records import Sample

__all__ = ["CHIPS", "Chip", "Work", "chip_of", "epoch_work", "make_rows", "summary", "table", "write_plot"]


@dataclass(frozen=True, slots=True)
class Chip:
    """An accelerator by its maker's data sheet: bf16 matrix rate without sparsity, memory and NVLink (both ways)."""

    flops_per_second: float
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float


# NVIDIA's data sheets of the SXM modules with 80 GB (H200: 141 GB).
CHIPS = {
    "A100": Chip(312e12, 2.039e12, 600e9),
    "A800": Chip(312e12, 2.039e12, 400e9),
    "H100": Chip(989.4e12, 3.35e12, 900e9),
    "H200": Chip(989.4e12, 4.8e12, 900e9),
}


def chip_of(device_name: str) -> Chip | None:
    """The chip that a device's name holds; None for a CPU, an unknown chip, a part of one, and other boards of it."""
    if any(board in device_name for board in ("PCI", "NVL", "GH200", "MIG")):
        return None
    return next((chip for name, chip in CHIPS.items() if name in device_name), None)


@dataclass(frozen=True, slots=True)
class Work:
    """Real tokens and FLOPs of one epoch's scoring and training."""

    policy_tokens: int
    view_tokens: int  # of both views
    num_actions: int
    train_flops: float
    score_flops: float


def epoch_work(model: torch.nn.Module, samples: Sequence[Sample]) -> Work:
    """The work of an epoch by the formula above."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    backbone = sum(p.numel() for p in model.parameters()) - embedding.numel()
    backbone -= 0 if head is embedding else head.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim
    policy = view_lengths(samples, (-1,)).astype(np.float64)
    views = np.concatenate([policy, view_lengths(samples, (0,))])
    num_actions = sum(sample.num_actions for sample in samples)
    logits = head.shape[0] * config.hidden_size * num_actions
    return Work(
        policy_tokens=int(policy.sum()),
        view_tokens=int(views.sum()),
        num_actions=num_actions,
        train_flops=6 * (backbone * policy.sum() + logits + attention * (policy**2).sum()),
        score_flops=2 * (backbone * views.sum() + 2 * logits + attention * (views**2).sum()),
    )


def run_facts(device: torch.device) -> dict[str, object]:
    """What every row of this run says of where and how it was measured."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "measured": True,
        "command": " ".join(["python", "benchmarks/epoch_time.py", *sys.argv[1:]]),
        "commit": commit(),
        "versions": ", ".join(f"{name} {version}" for name, version in (versions() | library_versions()).items()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def library_versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, "system": platform.system()}


def make_rows(
    found: Measurements, work: Work, *, chip: Chip | None, facts: dict, ladder: Sequence[tuple[str, str, str]]
) -> list[dict]:
    """One flat row per phase and variant, then one per rung of the ladder: (what is switched on, scorer, trainer)."""
    rows = [
        facts | phase_row(found, work, chip, phase, variant, entry)
        for (phase, variant), entry in found.phases.items()
        if phase != "unreported"
    ]
    return rows + [facts | row for row in split_rows(found, ladder)]


def split_rows(found: Measurements, ladder: Sequence[tuple[str, str, str]]) -> list[dict]:
    """One row per rung that was measured whole; ``factor`` is the rung above over this one, None on the first."""
    rows: list[dict] = []
    for name, scorer, trainer in ladder:
        wall, cpu = (rung_seconds(found, scorer, trainer, clock) for clock in ("wall_s", "cpu_s"))
        if wall is None:
            continue
        row = {
            "op": "epoch_time split",
            "rung": len(rows),
            "switched_on": name,
            "error": loss_difference(found, trainer),
        }
        for suffix, parts, factor in (("s", wall, "factor"), ("cpu_s", cpu, "cpu_factor")):
            row |= {f"{part}_{suffix}": value for part, value in zip(("score", "pack", "train"), parts, strict=True)}
            row |= {f"total_{suffix}": sum(parts)}
            row |= {factor: rows[-1][f"total_{suffix}"] / sum(parts) if rows else None}
        rows.append(row)
    return rows if len(rows) > 2 else []


def phase_row(
    found: Measurements, work: Work, chip: Chip | None, phase: str, variant: str, entry: Measured
) -> dict[str, object]:
    seconds = median(entry.wall_s)
    tokens, flops = {
        "sample": (work.num_actions, None),
        "score": (work.view_tokens, work.score_flops),
        "train": (work.policy_tokens, work.train_flops),
        "forward_backward": (work.policy_tokens, work.train_flops),
    }.get(phase, (None, None))
    quantiles = [1e3 * float(np.percentile(entry.wall_s, q)) for q in (50, 20, 80)] if entry.wall_s else [None] * 3
    return {
        "op": "epoch_time",
        "phase": phase,
        "variant": variant,
        "reps": len(entry.wall_s),
        **dict(zip(("ms", "ms_p20", "ms_p80"), quantiles, strict=True)),
        "cpu_ms": 1e3 * median(entry.cpu_s) if entry.cpu_s else None,
        "peak_bytes": entry.peak_bytes,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "flops": flops,
        "mfu": flops / seconds / chip.flops_per_second if chip and flops and seconds else None,
        "pad_waste": pad_waste(found, variant) if phase in ("train", "forward_backward") else None,
        "loss": found.losses.get(variant) if phase in ("train", "forward_backward") else None,
        "error": loss_difference(found, variant) if phase in ("train", "forward_backward") else None,
        "failure": entry.failure,
    }


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def rung_seconds(
    found: Measurements, scorer: str, trainer: str, clock: str = "wall_s"
) -> tuple[float, float, float] | None:
    """Median seconds of scoring, packing and training of one rung; None when one of them is missing or failed."""
    training = "train" if ("train", OURS) in found.phases else "forward_backward"
    parts = [found.phases.get(key) for key in (("score", scorer), ("pack", trainer), (training, trainer))]
    if any(part is None or part.failure or not part.wall_s for part in parts):
        return None
    return tuple(median(getattr(part, clock)) for part in parts)


def loss_difference(found: Measurements, trainer: str) -> float | None:
    """|loss − our loss| / our loss of the first step: in bf16 it shows how coarse bf16 logits are."""
    if trainer not in found.losses or not found.losses.get(OURS):
        return None
    return abs(found.losses[trainer] - found.losses[OURS]) / found.losses[OURS]


def pad_waste(found: Measurements, variant: str) -> float | None:
    """The share of the policy's computed tokens that is padding or dummies."""
    packs = [batch.pack for step in found.steps.get(variant, ()) for batch in step.micro_batches]
    if not packs:
        return None
    computed = sum(pack.input_ids.numel() for pack in packs)
    real = sum(
        pack.num_real_tokens if hasattr(pack, "num_real_tokens") else 0 if pack.is_dummy else pack.num_tokens
        for pack in packs
    )
    return 1 - real / computed


def summary(rows: Sequence[dict]) -> dict[str, float | None]:
    """Seconds of scoring, packing and training on both sides and their ratio, wall and CPU."""

    def total(variant: str, key: str) -> float | None:
        phases = {row["phase"]: row[key] for row in rows if row["op"] == "epoch_time" and row["variant"] == variant}
        training = "train" if "train" in phases else "forward_backward"
        parts = [phases.get(phase) for phase in ("score", "pack", training)]
        return None if None in parts else sum(parts)

    sides = {key: (total(BASELINE, key), total(OURS, key)) for key in ("ms", "cpu_ms")}
    return {
        "baseline_ms": sides["ms"][0],
        "ours_ms": sides["ms"][1],
        "speed_up": None if None in sides["ms"] else sides["ms"][0] / sides["ms"][1],
        "cpu_speed_up": None if None in sides["cpu_ms"] else sides["cpu_ms"][0] / sides["cpu_ms"][1],
    }


def table(rows: Sequence[dict], title: str, clock: str = "ms") -> str:
    """The text that people read: phases of both sides, then the split; ``clock`` is "ms" or, by CPU time, "cpu_ms"."""
    phases = {(row["phase"], row["variant"]): row for row in rows if row["op"] == "epoch_time"}
    unit = "s" if clock == "ms" else "CPU s"
    header = ("phase", f"baseline {unit}", f"ours {unit}", "speed-up", f"tokens/{unit}", "MFU base", "MFU ours")
    cells = [(*header, "GiB base", "GiB ours", "pad base", "pad ours")]
    for phase in dict.fromkeys(phase for phase, _ in phases):
        base, ours = phases.get((phase, BASELINE), {}), phases.get((phase, OURS), {})
        seconds = [side[clock] / 1e3 if side.get(clock) is not None else None for side in (base, ours)]
        ratio = seconds[0] / seconds[1] if seconds[0] and seconds[1] else None
        rate = ours["tokens"] / seconds[1] if ours.get("tokens") and seconds[1] else None
        pair = [(side.get("mfu"), ".1%") for side in (base, ours)]
        pair += [(side["peak_bytes"] / 2**30 if side.get("peak_bytes") else None, ".2f") for side in (base, ours)]
        pair += [(side.get("pad_waste"), ".1%") for side in (base, ours)]
        numbers = [*((value, ".3f") for value in seconds), (ratio, ".2f"), (rate, ",.0f"), *pair]
        cells.append((phase, *(format_number(value, form) for value, form in numbers)))
    lines = [title, "", *aligned(cells)]
    lines += [f"{phase}, {variant}: {row['failure']}" for (phase, variant), row in phases.items() if row["failure"]]
    totals = summary(rows)
    if totals["speed_up"] is not None:
        lines += [
            "",
            f"score, pack, train: {totals['speed_up']:.2f}x by wall clock (baseline {totals['baseline_ms'] / 1e3:.2f} "
            f"s, ours {totals['ours_ms'] / 1e3:.2f} s), {totals['cpu_speed_up']:.2f}x by the process's CPU time",
        ]
    return "\n".join([*lines, *split_lines(rows, clock)]) + "\n"


def split_lines(rows: Sequence[dict], clock: str) -> list[str]:
    rungs = [row for row in rows if row["op"] == "epoch_time split"]
    if not rungs:
        return []
    suffix, unit, factor = split_clock(clock)
    header = ("switched on, one after another", f"score {unit}", f"train {unit}", f"total {unit}", "factor")
    cells = [(*header, "loss differs by")]
    for row in rungs:
        seconds = [f"{row[f'{part}_{suffix}']:.3f}" for part in ("score", "train", "total")]
        cells.append(
            (row["switched_on"], *seconds, format_number(row[factor], ".2f"), format_number(row["error"], ".0e"))
        )
    note = (
        "Each rung keeps what is above it; factors multiply to the whole, and another order would share it otherwise."
    )
    return ["", *aligned(cells), note]


def split_clock(clock: str) -> tuple[str, str, str]:
    """(suffix of a split row's seconds, their unit, the name of its factor) of a clock."""
    return ("s", "s", "factor") if clock == "ms" else ("cpu_s", "CPU s", "cpu_factor")


def format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]


def write_plot(rows: Sequence[dict], path: Path, title: str, clock: str = "ms") -> bool:
    """Draw phases side by side, and the split; False without matplotlib. Only measured rows are drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["measured"]]
    rungs = [row for row in rows if row["op"] == "epoch_time split"]
    figure, axes = plt.subplots(1, 2 if rungs else 1, figsize=(13 if rungs else 9, 4.8), squeeze=False)
    draw_phases(axes[0, 0], [row for row in rows if row["op"] == "epoch_time" and row["ms"] is not None], clock)
    speed_up = summary(rows)["speed_up" if clock == "ms" else "cpu_speed_up"]
    if speed_up is not None:
        axes[0, 0].set_title(f"score + pack + train: baseline ÷ ours = {speed_up:.2f}", fontsize=9)
    if rungs:
        draw_split(axes[0, 1], rungs, clock)
    figure.suptitle(title, fontsize=9 if rungs else 8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_phases(axes, rows: Sequence[dict], clock: str) -> None:
    """Two bars a phase; the baseline has only the phases that it does otherwise."""
    seconds = {(row["phase"], row["variant"]): row[clock] / 1e3 for row in rows}
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    for offset, variant, colour in ((-0.2, BASELINE, "#b0653a"), (0.2, OURS, "#2f6f9f")):
        places = [
            index + offset * ((phase, BASELINE) in seconds)  # in the middle where it stands alone
            for index, phase in enumerate(phases)
            if (phase, variant) in seconds
        ]
        heights = [seconds[phase, variant] for phase in phases if (phase, variant) in seconds]
        label = {BASELINE: "paper-like baseline", OURS: "ours"}[variant]
        bars = axes.bar(places, heights, width=0.38, color=colour, label=label)
        axes.bar_label(bars, labels=[short(height) for height in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(phases)), [phase.replace("_", "\n") for phase in phases])
    axes.set_ylabel(f"seconds of an epoch{'' if clock == 'ms' else ' (CPU time of the process)'}")
    axes.set_xlabel("the baseline scores and trains; it has no sampler and no checkpoint of its own", fontsize=8)
    axes.margins(y=0.12)
    axes.legend(fontsize=8)


def short(seconds: float) -> str:
    """Three digits of it, or that there is nothing to see."""
    if seconds < 0.01:
        return "≈ 0"
    return f"{seconds:.{max(0, 2 - max(0, math.floor(math.log10(seconds))))}f}"


def draw_split(axes, rungs: Sequence[dict], clock: str) -> None:
    """Scoring and training of each rung, stacked, with the factor that its switch brought."""
    suffix, unit, factor = split_clock(clock)
    places = list(range(len(rungs)))
    score = [row[f"score_{suffix}"] for row in rungs]
    train = [row[f"train_{suffix}"] + row[f"pack_{suffix}"] for row in rungs]
    axes.barh(places, score, color="#8fb8d4", label="score")
    axes.barh(places, train, left=score, color="#2f6f9f", label="pack + train")
    for place, row in zip(places, rungs, strict=True):
        total = row[f"total_{suffix}"]
        text = f"{short(total)} {unit}" + (f"  (÷ {row[factor]:.2f})" if row[factor] else "")
        axes.text(total, place, " " + text, va="center", fontsize=8)
    axes.set_yticks(places, [row["switched_on"].replace(": ", ":\n") for row in rungs], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.28)
    axes.set_title("one thing more switched on in each bar (÷: the bar above over this one)", fontsize=9)
    axes.set_xlabel(f"{unit} of scoring and training")
    axes.legend(fontsize=8)
