"""Times both structures of every operation, and promising sizes of each, beside the choosers' choice on this GPU.

    PYTHONPATH=.:kernels python benchmarks/tune_blocks.py --out DIR [--op loss] [--budget-s 240]
    PYTHONPATH=.:kernels python benchmarks/tune_blocks.py --smoke --out DIR        # tiny; also on a CPU

Tiles that spill or exceed shared memory are left out by compiling them without the GPU, in the other processors
meanwhile. Each of the others must first give what the choosers' choice gives. All are timed through the launchers'
``structure`` and ``blocks`` arguments, the whole operation each, in turn with the choosers' own; the best of a
group's first shape go on to its other shapes. Rows are on disk as they come (DIR/tune_blocks.json); the table at the
end holds lines that can be pasted into triton_blocks.py. What fails costs its task no more than its own rows; where the
device is lost the table ends, and a candidate that hangs ends the program (--op goes on with the others). bf16, no
bias, no softcap.
"""

import multiprocessing
import os

import torch

if multiprocessing.current_process().name != "MainProcess":  # a worker, which compiles
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import faulthandler  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402

from gpu_suite_clock import Clock  # noqa: E402
from gpu_suite_contenders import ALPHA, Inputs, Shape, make_inputs  # noqa: E402
from gpu_suite_report import Results, command_line, short  # noqa: E402
from inverseq_kernels.backends import CUDA_WORKSPACE_BYTES  # noqa: E402
from inverseq_kernels.triton_blocks import capability_of  # noqa: E402
from inverseq_kernels.triton_contrastive import contrastive_forward  # noqa: E402
from inverseq_kernels.triton_logprob import logprob_backward, logprob_forward  # noqa: E402
from inverseq_kernels.triton_loss import squared_log_ratio_forward  # noqa: E402
from torch import Tensor  # noqa: E402
from tune_blocks_candidates import (  # noqa: E402
    LOGPROB,
    LOGPROB_BACKWARD,
    OPS,
    TARGET,
    Candidate,
    Compiled,
    compile_candidate,
    list_candidates,
)

# Shapes that want the same tiles; candidates are screened on the first of a group.
GROUPS = {
    "wide": (Shape(8192, 32_000, 4096), Shape(8192, 128_256, 4096), Shape(2048, 128_256, 4096)),
    "narrow": (Shape(16_384, 49_152, 576),),
}
SMOKE_GROUPS = {"wide": (Shape(20, 150, 16), Shape(8, 150, 16)), "narrow": (Shape(8, 80, 16),)}
REPS = 5
FINALISTS = 3  # of a group's first shape, timed on its other shapes
HANG_S = 90.0  # without a result on a GPU: longer than anything takes that comes to an end
LARGEST_DIFFERENCE = 1e-2  # of a result, relative to the chooser's: bf16 rounding in another order


@dataclass(frozen=True)
class Task:
    """One operation on one group of shapes, and its candidates; the chooser's stands first."""

    op: str
    group: str
    shapes: tuple[Shape, ...]
    candidates: list[Candidate]
    reps: int


@dataclass(frozen=True)
class Timing:
    """A candidate beside the choosers' choice, both in turn on the same inputs."""

    candidate: Candidate
    milliseconds: list[float]
    chosen_milliseconds: list[float]

    @property
    def ratio(self) -> float:
        """Median time over the chooser's."""
        return _quantile(self.milliseconds, 0.5) / _quantile(self.chosen_milliseconds, 0.5)


def make_call(op: str, inputs: Inputs) -> Callable[[Candidate], tuple[Tensor, ...]]:
    """The operation's launcher on these inputs, as a function of the candidate; it returns outputs and gradients."""
    hidden, weight, ids = inputs.hidden.detach(), inputs.weight.detach(), inputs.token_ids
    common = {
        "softcap": None,
        "temperature": 1.0,
        "num_valid_vocab": weight.shape[0],
        "workspace_bytes": CUDA_WORKSPACE_BYTES,
    }
    if op == TARGET:
        alphas = torch.full((1, 1), ALPHA, device=hidden.device)
        plain = (inputs.hidden_plain, weight, None)
        return lambda one: contrastive_forward(hidden, weight, None, *plain, ids, alphas, **vars(one), **common)
    if op == LOGPROB:
        options = common | {"want_entropy": False}
        return lambda one: logprob_forward(hidden, weight, None, ids, **vars(one), **options)[:2]
    needs = {"needs": (True, True, False)}
    if op == LOGPROB_BACKWARD:
        _, lse, entropy = logprob_forward(hidden, weight, None, ids, want_entropy=False, **common)
        saved = (inputs.upstream, None, hidden, weight, None, ids, lse, entropy)
        return lambda one: logprob_backward(*saved, **vars(one), **common, **needs)[:2]
    rows = (inputs.targets, torch.ones_like(inputs.targets), torch.tensor(float(len(ids)), device=hidden.device))
    return lambda one: squared_log_ratio_forward(
        hidden, weight, None, ids, *rows, **vars(one), **common, **needs
    )[:4]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="every step on tiny shapes; also on a CPU")
    parser.add_argument("--op", choices=OPS, action="append", help="only these operations (default: all)")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=24, help="candidates of a task (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile")
    arguments = parser.parse_args()
    clock = Clock(arguments.budget_s)
    if not clock.on_gpu and not arguments.smoke:
        parser.error("no CUDA device: only --smoke runs on a CPU")
    results = Results(arguments.out, command_line("tune_blocks"), stem="tune_blocks")
    capability = capability_of(torch.empty(0, device="cuda")) if clock.on_gpu else 0
    groups, reps = (SMOKE_GROUPS, 1) if arguments.smoke else (GROUPS, REPS)
    tasks = [
        Task(op, group, shapes, list_candidates(op, capability, shapes[0].dim, arguments.candidates), reps)
        for group, shapes in groups.items()
        for op in arguments.op or OPS
    ]
    lines = run_tasks(tasks, capability, results, clock, jobs=arguments.jobs)
    print(results.write_text(lines))
    failed = [row for row in results.rows if row.get("passed") is False]
    print(f"{len(results.rows)} rows, {len(failed)} failed, {arguments.budget_s - clock.left_s():.0f} s")
    return 1 if failed else 0


def run_tasks(tasks: list[Task], capability: int, results: Results, clock: Clock, *, jobs: int) -> list[str]:
    """Compile all candidates in other processes and time each as it is ready; the lines of the final table."""
    context = multiprocessing.get_context("spawn")
    lines = []
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        # Without a GPU the tiles of an H100 are compiled all the same: the step is part of the smoke run.
        compiled = {
            (task.op, task.group, candidate): pool.submit(
                compile_candidate, task.op, candidate, capability or 90, task.shapes[0].dim
            )
            for task in tasks
            for candidate in task.candidates
        }
        for index, task in enumerate(tasks):
            share_s = clock.left_s() / (len(tasks) - index)
            if share_s <= 0:
                results.add(kind="budget", op=task.op, passed=True, detail=f"stopped before {task.op} {task.group}")
                continue
            ready = {candidate: compiled[task.op, task.group, candidate] for candidate in task.candidates}
            try:
                lines += run_task(task, ready, results, clock, until_s=clock.left_s() - share_s)
            except Exception as error:  # the other tasks still tell something
                traceback.print_exc()
                results.add(kind="tune_task", op=task.op, group=task.group, passed=False, detail=short(error))
            if not clock.is_usable():
                detail = "every later call of this process fails"
                results.add(kind="device_lost", op=task.op, group=task.group, passed=False, detail=detail)
                break
        pool.shutdown(cancel_futures=True)
        faulthandler.cancel_dump_traceback_later()
    return lines


def run_task(
    task: Task,
    compiled: dict[Candidate, concurrent.futures.Future],
    results: Results,
    clock: Clock,
    *,
    until_s: float,
) -> list[str]:
    """Screen the candidates on the first shape, time the best on the others; lines of the final table."""
    chosen, *others = task.candidates
    timings: dict[Candidate, list[Timing]] = {}
    screened = [chosen, *others]
    # A third of the time is kept for the finalists' other shapes.
    screening_until_s = until_s + (clock.left_s() - until_s) / 3 if len(task.shapes) > 1 else until_s
    for shape in task.shapes:
        floor_s = screening_until_s if shape is task.shapes[0] else until_s
        watch(clock)
        clock.reset_memory()
        try:
            call = make_call(task.op, make_inputs(shape, _dtype(clock), "cuda" if clock.on_gpu else "cpu"))
            expected = call(chosen)
        except torch.OutOfMemoryError as error:
            results.add(kind="tune_inputs", op=task.op, passed=True, failure=str(error)[:120], **_facts(shape, clock))
            continue
        for one in screened:
            if clock.left_s() <= floor_s:
                results.add(kind="budget", op=task.op, passed=True, detail=f"stopped at {one} of {shape}")
                break
            timing = time_candidate(task, shape, (chosen, one), call, expected, compiled[one], results, clock)
            if timing is not None:
                timings.setdefault(one, []).append(timing)
        del call, expected
        ranked = sorted(timings, key=lambda one: timings[one][0].ratio)
        screened = [chosen, *[one for one in ranked if one != chosen][:FINALISTS]]
    return _best_lines(task, timings)


def time_candidate(
    task: Task,
    shape: Shape,
    pair: tuple[Candidate, Candidate],  # the choosers' and the candidate
    call: Callable[[Candidate], tuple[Tensor, ...]],
    expected: tuple[Tensor, ...],
    compiled: concurrent.futures.Future,
    results: Results,
    clock: Clock,
) -> Timing | None:
    """One row: why the candidate is left out, or its times beside the chooser's; None unless it was timed."""
    chosen, candidate = pair
    watch(clock)
    made: Compiled = compiled.result()
    failure, error, peak, timing, passed = made.refused or None, None, None, None, True
    if failure is None or candidate == chosen:
        try:
            before = clock.reset_memory()
            error = _largest_difference(call(candidate), expected)
            peak = clock.peak_bytes(before)
            if error <= LARGEST_DIFFERENCE:
                timing = _time_in_turn(call, pair, task.reps, clock)
            else:
                failure, passed = f"differs from the choosers' choice by {error:.1e}", False
        except Exception as problem:  # a launch may fail in many ways; the row says how
            failure, passed = short(problem), clock.is_usable()
    times = dict.fromkeys(("ms", "ms_p20", "ms_p80", "chosen_ms"))
    if timing is not None:
        for name, share in (("ms", 0.5), ("ms_p20", 0.2), ("ms_p80", 0.8)):
            times[name] = _quantile(timing.milliseconds, share)
        times["chosen_ms"] = _quantile(timing.chosen_milliseconds, 0.5)
    results.add(
        kind="tune",
        op=task.op,
        group=task.group,
        structure=candidate.structure,
        **_facts(shape, clock),
        **{f"tile_{name}": value for name, value in asdict(candidate.blocks).items()},
        is_chosen=candidate == chosen,
        registers=made.registers,
        stack=made.stack,
        shared=made.shared,
        reps=0 if timing is None else task.reps,
        **times,
        peak_bytes=peak,
        error=error,
        failure=failure,
        passed=passed,
    )
    if failure is not None and not clock.is_usable():
        raise RuntimeError(f"the device is lost behind {candidate}")
    return timing


def watch(clock: Clock) -> None:
    """End the program, with the place in it, when the next call does not come in time: a kernel hangs."""
    if clock.on_gpu:
        faulthandler.dump_traceback_later(HANG_S, exit=True)


def _time_in_turn(
    call: Callable[[Candidate], object], pair: tuple[Candidate, Candidate], reps: int, clock: Clock
) -> Timing:
    milliseconds = {"chosen": [], "candidate": []}
    for _ in range(reps):
        for name, one in zip(("chosen", "candidate"), pair, strict=True):
            milliseconds[name].append(clock.time_ms(lambda one=one: call(one)))
    return Timing(pair[1], milliseconds["candidate"], milliseconds["chosen"])


def _largest_difference(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    differences = [
        (one.double() - other.double()).norm() / (other.double().norm() + 1e-30)
        for one, other in zip(actual, expected, strict=True)
    ]
    return torch.stack(differences).nan_to_num(float("inf")).max().item()


def _best_lines(task: Task, timings: dict[Candidate, list[Timing]]) -> list[str]:
    """What takes the least time over the group's shapes, as it is written in triton_blocks.py."""
    most = max((len(of_one) for of_one in timings.values()), default=0)
    chosen, everywhere = task.candidates[0], [one for one in timings if 0 < len(timings[one]) == most]
    # Beside itself the choosers' choice shows the noise, which must not make it the best or the worst.
    means = {
        one: 1.0 if one == chosen else sum(timing.ratio for timing in timings[one]) / most for one in everywhere
    }
    if not means:
        return [f"# {task.op}, {task.group}: nothing was timed"]
    best, shape = min(means, key=means.get), task.shapes[0]
    first = timings[best][0]
    ours, theirs = _quantile(first.milliseconds, 0.5), _quantile(first.chosen_milliseconds, 0.5)
    return [
        f"# {task.op}, {task.group}: {means[best]:.3f} of the choosers' time over {most} of {len(task.shapes)} shapes; "
        f"{ours:.3f} ms against {theirs:.3f} at {shape.num_rows} x {shape.num_words} x {shape.dim}",
        f"# the choosers': {chosen.structure}, {chosen.blocks}",
        f"# structure: {best.structure}",
        str(best.blocks),
    ]


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def _dtype(clock: Clock) -> torch.dtype:
    return torch.bfloat16 if clock.on_gpu else torch.float16  # the interpreter multiplies bf16 bit patterns


def _facts(shape: Shape, clock: Clock) -> dict:
    dtype = str(_dtype(clock)).removeprefix("torch.")
    return {"num_rows": shape.num_rows, "num_words": shape.num_words, "dim": shape.dim, "dtype": dtype}


if __name__ == "__main__":
    sys.exit(main())
