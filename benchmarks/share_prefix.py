"""What emitting a shared prefix once per pack gains in scoring, at the lengths of Anthropic-HH.

    PYTHONPATH=.:kernels python benchmarks/share_prefix.py [--out benchmarks/results/share_prefix.jsonl]
        [--model PATH] [--device cpu] [--samples 12] [--score-tokens 4096] [--response-scale 1 4] [--repeats 3]

Both views of random samples are scored with and without ``packing.share_prefix``, interleaved; all samples share the
principle, as in training. Prompts and responses have the lengths of ``epoch_time_inputs`` (``--response-scale`` makes
responses longer, as chat models answer at greater length than HH's people did). On a CPU the time is that of all
threads together, on CUDA it is elapsed. Rows hold medians with the fastest and slowest repetition, and the largest
difference of a target between the two ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from epoch_time_inputs import PRINCIPLE_TOKENS, benchmark_config, make_samples
from gpu_suite_report import commit, device_name, versions

from inverseq.config import Config, ModelConfig
from inverseq.model import FrozenPair, load_model
from inverseq.packing import pack_views
from inverseq.records import Sample, ScoredSamples
from inverseq.small_model import convert_small_model
from inverseq.targets import score_targets


def score(frozen: FrozenPair, samples: list[Sample], config: Config) -> tuple[float, ScoredSamples]:
    """Seconds, and the targets."""
    vocab = frozen.plain.config.get_text_config().vocab_size
    on_cuda = next(frozen.parameters()).is_cuda
    clock = time.perf_counter if on_cuda else time.process_time
    if on_cuda:
        torch.cuda.synchronize()
    started = clock()
    scored = score_targets(frozen, samples, config, num_valid_vocab=vocab)
    return clock() - started, scored


def measure(frozen: FrozenPair, samples: list[Sample], score_tokens: int, repeats: int) -> dict:
    """One row: tokens, seconds and the largest difference, with prefixes repeated and shared."""
    device = next(frozen.parameters()).device.type
    config = benchmark_config(device, samples)
    ways = {}
    for name, share_prefix in (("repeated", False), ("shared", True)):
        packing = dataclasses.replace(config.packing, score_tokens=score_tokens, share_prefix=share_prefix)
        ways[name] = dataclasses.replace(config, packing=packing)
    seconds, scored = {name: [] for name in ways}, {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            duration_s, scored[name] = score(frozen, samples, way)
            if repeat:  # the first is a warm-up
                seconds[name].append(duration_s)
    row = {"max_difference_nats": (scored["shared"].targets - scored["repeated"].targets).abs().max().item()}
    for name, way in ways.items():
        packs = pack_views(samples, (0, 1), token_budget=score_tokens, share_prefix=way.packing.share_prefix)
        row[name] = {
            "tokens": sum(pack.num_tokens for pack in packs),
            "packs": len(packs),
            "median_s": median(seconds[name]),
            "fastest_s": min(seconds[name]),
            "slowest_s": max(seconds[name]),
        }
    row["tokens_saved"] = 1 - row["shared"]["tokens"] / row["repeated"]["tokens"]
    row["speedup"] = row["repeated"]["median_s"] / row["shared"]["median_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append rows to this file")
    parser.add_argument("--model", help="a model folder; the demo's 135M model unless given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--score-tokens", type=int, default=4096)
    parser.add_argument("--response-scale", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    path = arguments.model or convert_small_model()
    model = load_model(path, ModelConfig(path=str(path), device=arguments.device))
    frozen = FrozenPair(model, model)
    for scale in arguments.response_scale:
        samples = make_samples(arguments.samples, vocab=model.config.vocab_size, response_scale=scale)
        row = {"benchmark": "share_prefix", "model": Path(path).name, "num_samples": len(samples)}
        row |= {"principle_tokens": PRINCIPLE_TOKENS, "response_scale": scale}
        row |= {"mean_prompt_tokens": sum(len(s.rendered.prompt_ids) for s in samples) / len(samples)}
        row |= {"mean_response_tokens": sum(s.num_actions for s in samples) / len(samples)}
        row |= {"score_tokens": arguments.score_tokens, "dtype": str(model.dtype), "threads": torch.get_num_threads()}
        row |= measure(frozen, samples, arguments.score_tokens, arguments.repeats)
        row |= {
            "device": device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU",
            "measured": True,
            "command": "python benchmarks/share_prefix.py",
        }
        row |= {"commit": commit(), "versions": versions()}
        row |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        print(
            f"responses ×{scale:g}: {row['tokens_saved']:.1%} fewer tokens, {row['speedup']:.2f}× as fast "
            f"({row['repeated']['median_s']:.1f} s → {row['shared']['median_s']:.1f} s), "
            f"targets differ by at most {row['max_difference_nats']:.1e}"
        )
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
