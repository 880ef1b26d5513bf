"""An epoch by phase, beside the paper-like baseline in the same run, and what each difference brings.

    PYTHONPATH=.:kernels python benchmarks/epoch_time.py [--model PRESET_OR_PATH] [--samples N] [--phases score,train]
    PYTHONPATH=.:kernels python benchmarks/epoch_time.py --project 8xA800 --rows FILE.json [--model vicuna-7b]

From a source checkout (``python setup.py build_ext --inplace`` builds the packer). Without --model it takes the largest
preset that fits and says so. Responses have forced lengths, since random weights never end one by themselves; a model
at a path is measured with the same random tokens. Phases: sample, pack, score, train, checkpoint, sync, and on request
forward_backward (training without an optimizer, for models whose optimizer state does not fit). It writes
epoch_time.json, .txt and .png to --out. A projection is made from a measured row, printed with every assumption, and
never called a measurement. Left out: the model contrast, more than one process, the sampler of the baseline.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import epoch_time_projection
import epoch_time_report as report
import torch
from epoch_time_inputs import (
    PRESETS,
    baseline_bytes,
    benchmark_config,
    build_random_model,
    estimated_bytes,
    largest_preset,
    make_samples,
)
from epoch_time_phases import ALL_PHASES, BASELINE, DEFAULT_PHASES, OURS, Measurements, measure_epoch
from epoch_time_variants import TRAINERS, Bench, Rung, ladder, train_without_update
from transformers import AutoConfig, PretrainedConfig

from inverseq.atomic import write_json
from inverseq.config import ModelConfig
from inverseq.engine import TorchEngine
from inverseq.memory import available_bytes
from inverseq.model import FrozenPair, frozen_copy, load_model
from inverseq.policy import Policy
from inverseq.records import Sample

__all__ = ["main"]

CPU_NOTE = "CPU seconds are not GPU seconds: shares and ratios differ on a GPU, and so does what is worth switching on."
LOW_MFU = 0.15  # below it the baseline's profile is written too


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help=f"a model folder or one of: {', '.join(PRESETS)}")
    parser.add_argument("--samples", type=int, default=0, help="samples of the epoch (default 500 on CUDA, 8 on a CPU)")
    parser.add_argument("--phases", default=",".join(DEFAULT_PHASES), help=f"of {', '.join(ALL_PHASES)}")
    parser.add_argument("--length-profile", choices=["hh"], default="hh", help="lengths of prompts and responses")
    parser.add_argument("--response-scale", type=float, default=1.0, help="multiplies the profile's response lengths")
    parser.add_argument(
        "--reps", type=int, default=0, help="repetitions, sides in turn (default 3 on CUDA, 1 on a CPU)"
    )
    parser.add_argument("--no-split", action="store_true", help="only the baseline and ours, no rungs in between")
    parser.add_argument("--profile", action="store_true", help="also write a profile of one step of both sides")
    parser.add_argument("--out", type=Path, default=Path("runs/epoch_time"), help="folder (default %(default)s)")
    parser.add_argument("--project", default="", metavar="8xA800", help="project an epoch on other GPUs; needs --rows")
    parser.add_argument("--rows", type=Path, help="epoch_time.json of a measured run on one GPU, for --project")
    arguments = parser.parse_args(argv)
    arguments.phases = [phase for phase in arguments.phases.split(",") if phase]
    try:
        check_arguments(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError naming the option, its value and what was expected."""
    unknown = [phase for phase in arguments.phases if phase not in ALL_PHASES]
    if unknown or not arguments.phases:
        raise ValueError(f"--phases={','.join(unknown)!r}: expected some of {', '.join(ALL_PHASES)}")
    for name in ("samples", "reps"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name}={getattr(arguments, name)}: expected a positive number")
    if not 0 < arguments.response_scale <= 100:
        raise ValueError(f"--response-scale={arguments.response_scale}: expected a positive number, at most 100")
    model = arguments.model
    if model and model not in PRESETS and not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model={model!r}: expected a folder with config.json or one of {', '.join(PRESETS)}")
    if bool(arguments.project) != bool(arguments.rows):
        raise ValueError("--project and --rows: expected both or none; --rows is epoch_time.json of a run on one GPU")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING)
    if arguments.project:
        return epoch_time_projection.run(arguments)
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    count = arguments.samples or (500 if on_cuda else 8)
    name = arguments.model or largest_preset(device.type, count)
    if not arguments.model:
        reason = "the largest preset that fits" if on_cuda else "the preset for a CPU"
        print(f"no --model given: {name}, {reason} ({available_bytes(device.type) / 2**30:.0f} GiB)", flush=True)
    bench = build_bench(name, count, device, arguments)
    rungs = choose_rungs(arguments, ladder(bench.config.packing.shares_prefix(device.type, num_views=2)))
    facts = report.run_facts(device) | bench_facts(name, bench, arguments)
    found = Measurements()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)
        write_rows(arguments.out, bench, found, facts, rungs)

    pairs = [(rung.scorer, rung.trainer) for rung in rungs]
    reps = arguments.reps or (3 if on_cuda else 1)
    measure_epoch(bench, arguments.phases, found=found, reps=reps, rungs=pairs, progress=progress)
    write_results(arguments, bench, found, facts, rungs)
    print(f"{time.monotonic() - started:.0f} s in all, {time.process_time():.0f} s of CPU time")
    return 0


def choose_rungs(arguments: argparse.Namespace, rungs: Sequence[Rung]) -> list[Rung]:
    """All rungs when the whole factor is to be split, else the baseline and ours."""
    whole = "score" in arguments.phases and {"train", "forward_backward"} & set(arguments.phases)
    return list(rungs) if whole and not arguments.no_split else [rungs[0], rungs[-1]]


def build_bench(name: str, count: int, device: torch.device, arguments: argparse.Namespace) -> Bench:
    """Policy, frozen copy, samples and, when training is asked for, the engine."""
    config = PRESETS[name].config() if name in PRESETS else AutoConfig.from_pretrained(name)
    vocab = config.get_text_config().vocab_size
    samples = make_samples(count, vocab=vocab, response_scale=arguments.response_scale)
    has_optimizer = bool({"train", "checkpoint", "sync"} & set(arguments.phases))
    recompute = needs_recomputation(config, samples, device, has_optimizer=has_optimizer)
    if name in PRESETS:
        model = build_random_model(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    else:
        model = load_model(name, ModelConfig(path=name))
    settings = benchmark_config(device.type, samples, recompute=recompute)
    frozen = frozen_copy(model)
    engine = None
    if has_optimizer:
        engine = TorchEngine(Policy(model, vocab, settings.engine), settings.optim, total_updates=10**6)
    return Bench(settings, model, FrozenPair(frozen, frozen), samples, vocab, engine)


def needs_recomputation(
    config: PretrainedConfig, samples: Sequence[Sample], device: torch.device, *, has_optimizer: bool
) -> bool:
    """Whether the memory estimate asks for activation checkpointing on our side; warns when nothing would fit."""
    limit = 0.9 * available_bytes(device.type)
    logits = baseline_bytes(config, samples, device.type)
    kept, recomputed = (
        logits + estimated_bytes(config, samples, device.type, recompute=recompute, has_optimizer=has_optimizer)
        for recompute in (False, True)
    )
    if recomputed > limit:
        advice = "; --phases score,forward_backward needs no optimizer" if has_optimizer else ""
        estimate = f"{recomputed / 2**30:.0f} GiB, nine tenths of the memory are {limit / 2**30:.0f} GiB"
        print(f"warning: the estimate is {estimate}{advice}", flush=True)
    return kept > limit


def bench_facts(name: str, bench: Bench, arguments: argparse.Namespace) -> dict[str, object]:
    """What was measured, for every row."""
    work = report.epoch_work(bench.policy, bench.samples)
    weights = "random weights" if name in PRESETS else "weights from a folder"
    return {
        "model": name if name in PRESETS else Path(name).name,
        "weights": weights,
        "dtype": str(next(bench.policy.parameters()).dtype).removeprefix("torch."),
        "num_samples": len(bench.samples),
        "policy_tokens": work.policy_tokens,
        "view_tokens": work.view_tokens,
        "num_actions": work.num_actions,
        "shapes": f"{len(bench.samples)} samples, {work.policy_tokens} policy tokens, {work.view_tokens} tokens of "
        f"both views, {work.num_actions} response tokens",
        "length_profile": arguments.length_profile,
        "response_scale": arguments.response_scale,
        "train_tokens": bench.config.packing.train_tokens,
        "score_tokens": bench.config.packing.score_tokens,
        "samples_per_step": bench.config.optim.samples_per_step,
        "recomputation": bench.config.model.gradient_checkpointing,
    }


def write_rows(folder: Path, bench: Bench, found: Measurements, facts: dict, rungs: Sequence[Rung]) -> list[dict]:
    """Rows of what is measured by now, on disk: a run that is cut short keeps them."""
    chip, work = report.chip_of(facts["device"]), report.epoch_work(bench.policy, bench.samples)
    ladder = [(rung.switched_on, rung.scorer, rung.trainer) for rung in rungs]
    rows = report.make_rows(found, work, chip=chip, facts=facts, ladder=ladder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "epoch_time.json", rows)
    return rows


def write_results(
    arguments: argparse.Namespace, bench: Bench, found: Measurements, facts: dict, rungs: Sequence[Rung]
) -> None:
    """Print the table and write JSON, text, picture and, where one is due, profiles."""
    rows = write_rows(arguments.out, bench, found, facts, rungs)
    title = (
        f"{facts['model']} ({facts['weights']}, {facts['dtype']}), {facts['shapes']}\n"
        f"measured on {facts['device']}, {facts['date']}, commit {facts['commit']}, "
        f"{facts['threads']} thread(s), load {facts['load_average']} at the start"
    )
    notes = [] if report.chip_of(facts["device"]) else ["No MFU: the device is not in the table of peak rates."]
    notes += [CPU_NOTE] if bench.device.type == "cpu" else []
    clock = "cpu_ms" if bench.device.type == "cpu" else "ms"  # other programs share a CPU
    text = report.table(rows, title, clock) + "".join(f"{note}\n" for note in notes)
    print(text)
    (arguments.out / "epoch_time.txt").write_text(text)
    if not report.write_plot(rows, arguments.out / "epoch_time.png", "\n".join([title, *notes]), clock):
        print("matplotlib is not installed: no picture (pip install 'inverseq[eval]')")
    low = [row for row in rows if row.get("variant") == BASELINE and row.get("mfu") and row["mfu"] < LOW_MFU]
    if found.steps and (arguments.profile or low):
        for name in (BASELINE, OURS):
            path = arguments.out / f"epoch_time_profile_{name}.txt"
            path.write_text(
                f"{title}\n{name}, forward and backward of one micro-batch\n\n{profile(bench, found, name)}"
            )
            print(f"profile: {path}")


def profile(bench: Bench, found: Measurements, name: str) -> str:
    """Where one micro-batch's forward and backward spend their time, by operator."""
    step = found.steps[name][0]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as recorded:
        train_without_update(bench, TRAINERS[name], [replace(step, micro_batches=step.micro_batches[:1])])
    order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


if __name__ == "__main__":
    sys.exit(main())
