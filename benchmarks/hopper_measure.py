"""What hopper_forward.py runs in a process of its own: checks against float64, then times, as lines of output.

    TRY contrast-64  a candidate: an operation and the width of its ring's stages
    AT TEXT          what is being run; should nothing follow, this is what hung
    ROW {"op": ...}  one flat row

It is checked on small shapes, then checked and timed on the goals, interleaved with the package's kernel and the bare
cuBLAS GEMMs of the same shape.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from gpu_suite_clock import Clock
from gpu_suite_report import commit, device_name, versions
from hopper_launch import EXPONENTIAL_RINGS, RINGS, Setup, contrast_logprob, exponentials, statistics_logprob
from inverseq_kernels import contrastive_logprob, linear_logprob
from inverseq_kernels.triton_common import tile_source
from inverseq_kernels.triton_exponentials import exponential_kernel
from torch import Tensor

STATISTICS, CONTRAST, EXPONENTIALS = "statistics", "contrast", "exponentials"
ALPHA = 1.4
# Rows, words and width: tiny, then nothing a multiple, then more tiles than multiprocessors.
SMALL_SHAPES = ((1, 1, 16), (100, 300, 64), (257, 1003, 208), (1000, 5000, 144), (2048, 32000, 512))
GOAL_SHAPES = ((8192, 32_000, 4096), (8192, 128_256, 4096))
LOGPROB_RMS = 1e-4  # nats
EXPONENTIAL_ERROR = 5e-3  # relative, of bf16 values
NUM_SAMPLED, REPS = 128, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the tests'


@dataclass
class Inputs:
    """Two views of the same rows under one head."""

    hidden: Tensor  # [A, D]
    plain: Tensor  # [A, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor  # [A]
    rows: Tensor  # [R] sampled

    @classmethod
    def make(cls, shape: tuple[int, int, int]) -> "Inputs":
        num_rows, num_words, dim = shape
        generator = torch.Generator(device=DEVICE).manual_seed(num_rows + num_words)

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.empty((rows, dim), dtype=torch.bfloat16, device=DEVICE)
            return values.normal_(generator=generator).mul_(scale)

        ids = torch.randint(0, num_words, (num_rows,), device=DEVICE, generator=generator)
        rows = torch.randperm(num_rows, device=DEVICE, generator=generator)[:NUM_SAMPLED]
        return cls(normal(num_rows, 1.0), normal(num_rows, 1.0), normal(num_words, 3.0 / dim**0.5), ids, rows)


def make_setup(dim: int, stages: int) -> Setup:
    """One program for every multiprocessor."""
    return Setup(torch.cuda.get_device_properties(DEVICE).multi_processor_count, dim=dim, stages=stages)


def hopper(op: str, setup: Setup, inputs: Inputs) -> Any:
    """One call of a candidate."""
    if op == STATISTICS:
        return statistics_logprob(inputs.hidden, inputs.weight, inputs.token_ids, setup)
    if op == CONTRAST:
        better, plain = (inputs.hidden, inputs.weight), (inputs.plain, inputs.weight)
        alphas = torch.full((1,), ALPHA, device=DEVICE)
        return torch.stack(contrast_logprob(better, plain, inputs.token_ids, alphas, setup))
    return exponentials(inputs.hidden, inputs.weight, inputs.token_ids, setup)[0]


def today(op: str, inputs: Inputs) -> Any:
    """The same by the package."""
    if op == STATISTICS:
        return linear_logprob(inputs.hidden, inputs.weight, inputs.token_ids, backend="triton")
    if op == CONTRAST:
        views = (inputs.hidden, inputs.weight, inputs.plain, inputs.weight)
        both = contrastive_logprob(*views, inputs.token_ids, ALPHA, return_reference=True, backend="triton")
        return torch.stack(both)
    return _today_exponentials(inputs.hidden, inputs.weight, inputs.token_ids)


def _today_exponentials(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Launch the package's kernel with the tile that it takes for wide heads."""
    (num_rows, dim), num_words = hidden.shape, weight.shape[0]
    matrix = hidden.new_empty((num_rows, triton.cdiv(num_words, 64) * 64))
    maxima, totals = hidden.new_empty((2, triton.cdiv(num_words, 256), num_rows), dtype=torch.float32)
    labels = hidden.new_empty(num_rows, dtype=torch.float32)
    exponential_kernel[(triton.cdiv(num_rows, 128) * triton.cdiv(num_words, 256),)](
        *(tile_source(hidden, (128, 64), True), tile_source(weight, (256, 64), True), None, token_ids),
        *(matrix, maxima, totals, labels, num_rows, num_words, dim, matrix.shape[1], 1.0, 1.0, 1.0),
        **{"ROWS": 128, "WORDS": 256, "DIM": 64, "GROUP_ROWS": 16, "EVEN_DIM": dim % 64 == 0, "TMA": True},
        **{"HAS_BIAS": False, "HAS_SOFTCAP": False, "TIGHT": False, "num_warps": 8, "num_stages": 4},
    )
    return matrix


def cublas(op: str, inputs: Inputs) -> None:
    """The GEMMs alone, into bf16 logits."""
    logits_AV = inputs.hidden @ inputs.weight.t()
    if op == CONTRAST:
        torch.mm(inputs.plain, inputs.weight.t(), out=logits_AV)


def measure_error(op: str, inputs: Inputs, result: Tensor) -> float:
    """Rms error of log-probs in nats, or relative error of exponentials, on the sampled rows."""
    rows, weight = inputs.rows, inputs.weight.double()
    ids = inputs.token_ids[rows][:, None]
    logits = inputs.hidden[rows].double() @ weight.t()
    if op == EXPONENTIALS:
        # Logits of these inputs stay below 44 nats, where offsets are 0.
        values = result[rows, : weight.shape[0]].double()
        return ((values - logits.exp()).norm() / logits.exp().norm()).item()
    expected = [logits.log_softmax(1).gather(1, ids)[:, 0]]
    if op == CONTRAST:
        plain = inputs.plain[rows].double() @ weight.t()
        mixed = ALPHA * logits + (1 - ALPHA) * plain
        expected = [each.log_softmax(1).gather(1, ids)[:, 0] for each in (mixed, plain)]
    difference = result.reshape(len(expected), -1)[:, rows].double() - torch.stack(expected)
    return difference.square().mean().sqrt().item()


def contenders(op: str, dim: int, shape: tuple[int, int, int]) -> dict[str, Callable[[Inputs], Any]]:
    """By name, the candidate first."""
    stages = dict(EXPONENTIAL_RINGS if op == EXPONENTIALS else RINGS)[dim]
    found = {f"gluon, {stages} stages of {dim}": partial(hopper, op, make_setup(dim, stages))}
    if shape in GOAL_SHAPES:
        found |= {"today's kernel": partial(today, op), "cuBLAS": partial(cublas, op)}
    return found


def check(op: str, inputs: Inputs, listed: dict[str, Callable]) -> dict[str, float]:
    """Errors of the contenders that compute something; the first call compiles."""
    errors = {}
    for name, call in listed.items():
        if name != "cuBLAS":
            print(f"AT {op}: {name}, {tuple(inputs.hidden.shape)} x {inputs.weight.shape[0]}", flush=True)
            errors[name] = measure_error(op, inputs, call(inputs))
    return errors


def timed(inputs: Inputs, listed: dict[str, Callable]) -> dict[str, tuple[list[float], int | None]]:
    """Interleaved milliseconds of every contender and its peak memory beyond the inputs."""
    clock, times, peaks = Clock(0.0), {name: [] for name in listed}, {}
    for name, call in listed.items():
        before = clock.reset_memory()
        call(inputs)
        peaks[name] = clock.peak_bytes(before)
    for _ in range(REPS):
        for name, call in listed.items():
            times[name].append(clock.time_ms(lambda call=call: call(inputs)))
    return {name: (times[name], peaks[name]) for name in listed}


def run(op: str, dim: int, smoke: bool, facts: dict[str, object]) -> None:
    """One candidate; a wrong result ends it."""
    for shape in SMALL_SHAPES if smoke else SMALL_SHAPES + GOAL_SHAPES:
        inputs, listed = Inputs.make(shape), contenders(op, dim, shape)
        errors = check(op, inputs, listed)
        allowed = EXPONENTIAL_ERROR if op == EXPONENTIALS else LOGPROB_RMS
        shape_facts = dict(zip(("num_rows", "num_words", "dim"), shape, strict=True)) | {"dtype": "bfloat16"}
        for name, error in errors.items():
            row = {"kind": "check", "op": op, "contender": name, **shape_facts, "error": error}
            add(facts, **row, passed=error <= allowed)
        candidate = next(iter(listed))
        if not errors[candidate] <= allowed:  # NaN too
            return
        if shape not in GOAL_SHAPES:
            continue
        print(f"AT {op}: timing {shape}", flush=True)
        flops = 2 * shape[0] * shape[1] * shape[2] * (2 if op == CONTRAST else 1)
        for name, (times, peak) in timed(inputs, listed).items():
            low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            row = {"kind": "timing", "op": op, "contender": name, **shape_facts, "reps": len(times)}
            row |= {"ms": middle, "ms_p20": low, "ms_p80": high, "tflops": flops / middle / 1e9}
            add(facts, **row, peak_bytes=peak, error=errors.get(name))


def add(facts: dict[str, object], **row: object) -> None:
    print("ROW", json.dumps(facts | row), flush=True)


def main(candidates: list[str], smoke: bool) -> None:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    facts = {"device": device_name(), "measured": DEVICE == "cuda", "commit": commit(), "versions": found}
    for candidate in candidates:
        print(f"TRY {candidate}", flush=True)
        op, dim = candidate.split("-")
        with torch.no_grad():
            run(op, int(dim), smoke, facts)


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1] == "smoke")
