"""Packing speed: planning against an O(n log n) Python best-fit-decreasing planner, writing against NumPy.

    python benchmarks/packing.py [--num-samples 100000] [--reps 15] [--out benchmarks/results/packing.jsonl]

Both planners get the same lengths and return the same packs; both writers get the same flat id arrays and plan and
must give equal arrays. Sides are interleaved; each is one thread without input or output, and its milliseconds are
that thread's CPU time, page faults included, so that other programs on the machine do not count. Lengths are
log-normal (median 245, at most 4,096 tokens), and once uniform above half a budget: there packs cannot be full, and
every sample opens a pack.
Rows are appended to ``--out``; peak_bytes is what tracemalloc sees, NumPy's arrays included, and null for the C++
planner, whose memory it does not see.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import tracemalloc
from bisect import bisect_left, insort
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from inverseq.packing import FlatSamples, PackPlan, Ragged, plan_packs, view_lengths, write_pack

__all__ = ["main", "numpy_write_pack", "python_plan"]

VOCAB = 32_000
PRINCIPLE_TOKENS = 120


def python_plan(lengths: np.ndarray, token_budget: int) -> list[list[int]]:
    """Best fit decreasing with bisection over the distinct rooms; packs of equal room form a stack. O(n log n)."""
    order = np.argsort(-lengths, kind="stable").tolist()
    lengths = lengths.tolist()
    rooms: list[int] = []  # distinct rooms of open packs, sorted
    open_packs: dict[int, list[list[int]]] = {}
    packs = []
    for i in order:
        length = lengths[i]
        k = bisect_left(rooms, length)
        if k < len(rooms):
            room = rooms[k]
            stack = open_packs[room]
            pack = stack.pop()
            if not stack:
                del rooms[k], open_packs[room]
            pack.append(i)
        else:
            room, pack = token_budget, [i]
            packs.append(pack)
        room -= length
        if room:
            if room in open_packs:
                open_packs[room].append(pack)
            else:
                open_packs[room] = [pack]
                insort(rooms, room)
    return packs


def ragged_arange(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """concatenate([arange(s, s + c) for s, c in zip(starts, counts)])"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def numpy_write_pack(flat: FlatSamples, indices: np.ndarray, views: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The arrays of a pack by vectorised NumPy: a gather over all pieces, no loop over samples."""
    prompts, responses = flat.prompts, flat.responses
    actions, prompt_lengths = responses.lengths[indices], prompts.lengths[indices]
    ids, action_index, seqlens = [], [], []
    for view in views:
        prefixes = flat.prefixes[view]
        prefix_lengths = prefixes.lengths[indices]
        counts = np.stack([prefix_lengths, prompt_lengths, actions - 1], axis=1).ravel()
        first = np.stack(
            [
                prefixes.offsets[indices],
                prompts.offsets[indices] + len(prefixes.ids),
                responses.offsets[indices] + len(prefixes.ids) + len(prompts.ids),
            ],
            axis=1,
        ).ravel()
        pieces = ragged_arange(first, counts)
        bounds = (len(prefixes.ids), len(prefixes.ids) + len(prompts.ids))
        tokens = np.empty(len(pieces), dtype=np.int64)
        for source, low, high in (
            (prefixes.ids, 0, bounds[0]),
            (prompts.ids, *bounds),
            (responses.ids, bounds[1], np.inf),
        ):
            here = (pieces >= low) & (pieces < high)
            tokens[here] = source[pieces[here] - low]
        lengths = prefix_lengths + prompt_lengths + actions - 1
        starts = np.cumsum(lengths) - lengths + sum(len(part) for part in ids)
        ids.append(tokens)
        seqlens.append(lengths)
        action_index.append(ragged_arange(starts + prefix_lengths + prompt_lengths - 1, actions))
    all_lengths = np.concatenate(seqlens)
    return {
        "input_ids": np.concatenate(ids),
        "position_ids": ragged_arange(np.zeros_like(all_lengths), all_lengths),
        "cu_seqlens": np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int32),
        "parent_seq": np.full(len(all_lengths), -1, dtype=np.int32),
        "action_index": np.stack(action_index),
        "token_ids": responses.ids[ragged_arange(responses.offsets[indices], actions)].astype(np.int64),
        "sample_index": np.repeat(indices, actions),
    }


def random_samples(num_samples: int, rng: np.random.Generator) -> FlatSamples:
    """Flat samples with log-normal prompts and responses and a principle in front of the better view."""

    def ragged(lengths: np.ndarray) -> Ragged:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Ragged(rng.integers(0, VOCAB, offsets[-1], dtype=np.int32), offsets)

    def lengths(median: float, longest: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), 0.8, num_samples), 1, longest).astype(np.int64)

    prefixes = (ragged(np.full(num_samples, PRINCIPLE_TOKENS)), ragged(np.zeros(num_samples, dtype=np.int64)))
    return FlatSamples(prefixes, ragged(lengths(80, 800)), ragged(lengths(150, 1000)))


def interleaved_ms(sides: dict[str, Callable[[], object]], reps: int) -> dict[str, list[float]]:
    """CPU milliseconds of every repetition of each side, after one warm-up, sides taking turns."""
    for run in sides.values():
        run()
    durations: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(reps):
        for name, run in sides.items():
            started = time.thread_time()
            run()
            durations[name].append((time.thread_time() - started) * 1e3)
    return durations


def peak_bytes(run: Callable[[], object]) -> int:
    tracemalloc.start()
    run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def git_commit() -> str:
    """The checkout's commit, marked when the packer differs from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "csrc", "inverseq/packing.py", "benchmarks/packing.py").returncode
    return f"{commit}-dirty" if changed else commit


def rows_of(
    op: str, sides: dict[str, Callable[[], object]], *, reps: int, shapes: dict, dtype: str, extra: dict | None = None
) -> list[dict]:
    """One benchmark row per side; ``bound`` is the side compared with and ``speedup`` the ratio of the medians."""
    durations = interleaved_ms(sides, reps)
    medians = {name: float(np.median(values)) for name, values in durations.items()}
    bound = max(medians, key=lambda name: name != "inverseq")
    rows = []
    for name, values in durations.items():
        row = {
            "op": op,
            "backend": name,
            "device": cpu_name(),
            "measured": True,
            "command": " ".join(["python", *sys.argv]),
            "commit": git_commit(),
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "shapes": shapes,
            "dtype": dtype,
            "reps": reps,
            "clock": "CPU time of the thread",
            "ms": medians[name],
            "ms_p20": float(np.percentile(values, 20)),
            "ms_p80": float(np.percentile(values, 80)),
            "peak_bytes": None if (op, name) == ("plan_packs", "inverseq") else peak_bytes(sides[name]),
            "error": 0.0,  # the sides' results were compared and are equal
            "bound": bound,
            "speedup": medians[bound] / medians[name],
        }
        rows.append(row | (extra or {}))
        print(f"{op:>14} {name:>9} {row['ms']:10.2f} ms  {row['speedup']:6.1f}x {bound}  {shapes}  {extra or ''}")
    return rows


def bench_planning(name: str, lengths: np.ndarray, token_budget: int, reps: int) -> list[dict]:
    expected = sorted(map(sorted, python_plan(lengths, token_budget)))
    packs = plan_packs(lengths, token_budget=token_budget).packs()
    assert sorted(sorted(pack.tolist()) for pack in packs) == expected, "both planners make the same packs"
    rows = []
    for num_ranks in (1, 8):
        sides = {
            "inverseq": lambda num_ranks=num_ranks: plan_packs(lengths, token_budget=token_budget, num_ranks=num_ranks),
            "python": lambda: python_plan(lengths, token_budget),
        }
        plan: PackPlan = sides["inverseq"]()
        num_packs = len(plan.pack_offsets) - 1
        shapes = {
            "lengths": name,
            "num_samples": len(lengths),
            "token_budget": token_budget,
            "num_ranks": num_ranks,
            "num_packs": num_packs,
        }
        fill = {"fill": round(float(lengths.sum()) / (num_packs * token_budget), 5)}
        rows += rows_of("plan_packs", sides, reps=reps, shapes=shapes, dtype="int64", extra=fill)
    return rows


def bench_writing(flat: FlatSamples, token_budget: int, reps: int) -> list[dict]:
    views = (0, 1)
    plan = plan_packs(view_lengths(flat, views), token_budget=token_budget).packs()
    for indices in plan[:50]:
        pack = write_pack(flat, indices, views, num_valid_vocab=VOCAB)
        for name, array in numpy_write_pack(flat, indices, views).items():
            np.testing.assert_array_equal(getattr(pack, name).numpy(), array)
    sides = {
        "inverseq": lambda: [write_pack(flat, indices, views, num_valid_vocab=VOCAB) for indices in plan],
        "numpy": lambda: [numpy_write_pack(flat, indices, views) for indices in plan],
    }
    shapes = {"num_samples": len(flat), "token_budget": token_budget, "num_views": 2, "num_packs": len(plan)}
    return rows_of("write_pack", sides, reps=reps, shapes=shapes, dtype="int32 to int64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=100_000, help="samples to plan (default %(default)s)")
    parser.add_argument("--write-samples", type=int, default=10_000, help="samples to write (default %(default)s)")
    parser.add_argument("--reps", type=int, default=15, help="repetitions of every side (default %(default)s)")
    parser.add_argument("--out", type=Path, help="append the rows to this jsonl file")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    log_normal = np.clip(rng.lognormal(5.5, 0.8, args.num_samples), 2, 4096).astype(np.int64)
    rows = []
    for token_budget in (4096, 16384):
        rows += bench_planning("log-normal", log_normal, token_budget, args.reps)
    rows += bench_planning("uniform 2049..4096", rng.integers(2049, 4097, args.num_samples), 4096, args.reps)
    rows += bench_writing(random_samples(args.write_samples, rng), 16384, max(args.reps // 3, 3))
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
