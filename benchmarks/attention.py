"""Backends of packed attention side by side on one pack at the lengths of Anthropic-HH.

    PYTHONPATH=.:kernels python benchmarks/attention.py [--out benchmarks/results/attention.jsonl] [--tokens 16384]

One layer with the heads of a 7B model (32 query heads of 128; as many key heads, and 8). For each backend that serves:
milliseconds of the scoring forward, of the scoring forward over a pack with a shared principle, and of forward and
backward without one, interleaved, medians with 20th and 80th percentiles; and the error of the outputs relative to
fp32 attention of the same 16-bit inputs. A backend that cannot serve is a row that says why. Rows of one number of key
heads are on disk before the next is measured. On a CPU: fp32, tiny, elapsed time, to try the script.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from epoch_time_inputs import make_samples
from gpu_suite_clock import Clock
from gpu_suite_report import command_line, commit, device_name, versions
from torch import Tensor, nn

from inverseq.attention import BACKENDS, AttentionLayout, attention_layout, packed_attention
from inverseq.packing import pack_views
from inverseq.records import PackedViews

HEAD_SIZE, QUERY_HEADS = 128, 32


def make_packs(tokens: int, device: torch.device) -> tuple[PackedViews, PackedViews]:
    """The same samples' views with the principle repeated, and emitted once."""
    samples = make_samples(max(2, tokens // 700), vocab=32_000, response_scale=4.0)
    packs = [pack_views(samples, (0, 1), token_budget=2**20, share_prefix=share)[0] for share in (False, True)]
    return packs[0].to(device), packs[1].to(device)


def make_heads(pack: PackedViews, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value [1, H, T, head size]."""
    generator = torch.Generator(pack.input_ids.device).manual_seed(0)
    options = {"generator": generator, "device": pack.input_ids.device}
    counts = (QUERY_HEADS, key_heads, key_heads)
    return [torch.randn(1, count, pack.num_tokens, HEAD_SIZE, **options).to(dtype) for count in counts]


def attend(heads: list[Tensor], layout: AttentionLayout) -> Tensor:
    return packed_attention(nn.Module(), *heads, None, layout=layout)[0]


def passes(backend: str, packs: tuple[PackedViews, PackedViews], key_heads: int, dtype: torch.dtype) -> dict:
    """What is timed, by name; each returns the attention's output [1, T, H, head size]."""
    repeated, shared = (make_heads(pack, key_heads, dtype) for pack in packs)
    layouts = [attention_layout(pack, backend) for pack in packs]
    leaves = [head.clone().requires_grad_() for head in repeated]

    def forward(heads: list[Tensor], layout: AttentionLayout) -> Tensor:
        with torch.inference_mode():
            return attend(heads, layout)

    def both() -> Tensor:
        out = attend(leaves, layouts[0])
        torch.autograd.grad(out, leaves, out)
        return out.detach()

    return {
        "forward": lambda: forward(repeated, layouts[0]),
        "forward, shared principle": lambda: forward(shared, layouts[1]),
        "forward and backward": both,
    }


def measure(
    packs: tuple[PackedViews, PackedViews], key_heads: int, dtype: torch.dtype, *, reps: int, backends: Sequence[str]
) -> list[dict]:
    """A row for every backend and pass."""
    clock = Clock(0.0)
    truth = {name: work() for name, work in passes("sdpa", packs, key_heads, torch.float32).items()}
    rows, ready = [], {}
    for backend in backends:
        try:
            works = passes(backend, packs, key_heads, dtype)
            for name, work in works.items():
                error = (work().float() - truth[name]).norm() / truth[name].norm()
                ready[backend, name] = work, {"error": error.item()}
        except (ValueError, RuntimeError, NotImplementedError) as reason:
            rows.append({"backend": backend, "failure": str(reason).splitlines()[0][:200]})
    del truth
    times = {key: [] for key in ready}
    for _ in range(reps):
        for key, (work, _) in ready.items():
            times[key].append(clock.time_ms(work))
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    for (backend, name), (_, facts) in ready.items():
        values = torch.tensor(times[backend, name], dtype=torch.float64).quantile(quantiles).tolist()
        row = dict(zip(("ms", "ms_p20", "ms_p80"), values, strict=True))
        rows.append({"backend": backend, "pass": name, "failure": None} | row | facts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append rows to this file")
    parser.add_argument("--tokens", type=int, default=16_384 if torch.cuda.is_available() else 1024)
    parser.add_argument("--reps", type=int, default=20 if torch.cuda.is_available() else 3)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only these (default: all)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packs = make_packs(arguments.tokens, device)
    facts = {"benchmark": "attention", "query_heads": QUERY_HEADS, "head_size": HEAD_SIZE, "dtype": str(dtype)}
    facts |= {"tokens": packs[0].num_tokens, "tokens_shared": packs[1].num_tokens, "reps": arguments.reps}
    facts |= {"device": device_name(), "measured": device.type == "cuda", "command": command_line()}
    facts |= {"commit": commit(), "versions": versions()}
    facts |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for key_heads in (QUERY_HEADS, 8):
        rows = measure(packs, key_heads, dtype, reps=arguments.reps, backends=arguments.backend or BACKENDS)
        for row in rows:
            cells = row["failure"] or f"{row['pass']:26} {row['ms']:8.3f} ms  error {row['error']:.1e}"
            print(f"{key_heads:3} key heads  {row['backend']:10} {cells}", flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(facts | {"key_heads": key_heads} | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
