"""Everything that a GPU can tell about the kernels, in one command and under nine minutes.

    PYTHONPATH=.:kernels python benchmarks/gpu_suite.py --out DIR
    PYTHONPATH=.:kernels python benchmarks/gpu_suite.py --smoke --out DIR        # tiny; also on a CPU

From a source checkout with torch >= 2.11 and triton >= 3.6; nothing needs installing. In order: kernels compiled by all
processors, smoke over every kernel, correctness in bf16 against float64, ``pytest -m gpu``, timing, the backends of
packed attention, a short epoch_time.py (these two need the C++ packer), and with what time is left compute-sanitizer
where it exists. Every step is a process of its own, killed with all that it started once its time is over, so that one
that crashes or hangs costs the others nothing; it prints to DIR/<step>.log, and the end of that is kept in
DIR/steps.txt. Rows are on disk as they come (DIR/gpu_suite.json); a table, the goals and plots follow at the end.
Timing starts no new shape where the steps behind it need the time. Exit status 1 when anything but a timing failed.
"""

import argparse
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

from gpu_suite_checks import SMOKE_CASES, check_every_kernel, check_operation  # noqa: E402
from gpu_suite_clock import Clock, clock_facts, sampled_clocks  # noqa: E402
from gpu_suite_contenders import LOGPROB, LOSS, TARGET, Shape  # noqa: E402
from gpu_suite_goals import goal_lines  # noqa: E402
from gpu_suite_report import Results, command_line, short, table_lines  # noqa: E402
from gpu_suite_steps import (  # noqa: E402
    DEVICE_LOST,
    ITEM,
    run_attention,
    run_compilation,
    run_epoch_time,
    run_gpu_tests,
    run_part,
    run_sanitizer,
)
from gpu_suite_timing import time_shape  # noqa: E402

ALL_OPS = (LOSS, TARGET, LOGPROB)

# The most telling shapes first, because the budget may end before the list does: A, V, D of goals and of chat models.
SHAPES = (
    Shape(8192, 128_256, 4096, ops=ALL_OPS, compiled=(LOSS, TARGET)),
    Shape(8192, 32_000, 4096, ops=ALL_OPS, compiled=(LOSS,)),
    Shape(32_768, 128_256, 4096),
    Shape(2048, 128_256, 4096, ops=(LOSS, TARGET)),
    Shape(8192, 151_936, 4096),
    Shape(8192, 262_144, 2304),
    Shape(16_384, 49_152, 576, ops=(LOSS, TARGET)),
    Shape(8192, 128_256, 8192),
    Shape(32_768, 32_000, 4096),
    Shape(8192, 49_152, 4096),
    Shape(2048, 32_000, 4096),
    Shape(512, 151_936, 2048),
)
SMOKE_SHAPES = (
    Shape(40, 300, 32, ops=ALL_OPS, compiled=ALL_OPS),
    Shape(9, 130, 16),
)
CORRECTNESS_SHAPES = (Shape(8192, 32_000, 4096, ops=ALL_OPS), Shape(2048, 128_256, 4096, ops=ALL_OPS))
PARTS = ("smoke", "correctness", "timing")  # what runs in this program; each as a process of its own
LIMIT_S = {True: 530.0, False: 2400.0}  # seconds in all on a GPU, and in the interpreter
# The most that each step may take on a GPU, in seconds; none goes past the whole command's limit.
STEP_S = {"compilation": 60.0, "smoke": 100.0, "correctness": 60.0, "tests": 120.0}
STEP_S |= {"attention": 45.0, "epoch_time": 100.0, "sanitizer": 75.0}
KEPT_S = STEP_S["attention"] + STEP_S["epoch_time"]  # timing starts no operation that would end in these
OVERTIME_S = 60.0  # of them, in which timing may end what it has started, torch.compile included


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="every step on tiny shapes; also on a CPU")
    parser.add_argument("--limit-s", type=float, help=f"seconds in all (default: {LIMIT_S[True]:.0f} on a GPU)")
    parser.add_argument("--part", choices=PARTS, help="only this part, here (what the command starts by itself)")
    parser.add_argument("--first", type=int, default=0, help="with --part: leave out what stands before this")
    arguments = parser.parse_args()
    clock = Clock(LIMIT_S[torch.cuda.is_available()] if arguments.limit_s is None else arguments.limit_s)
    if not clock.on_gpu and not arguments.smoke:
        parser.error("no CUDA device: only --smoke runs on a CPU")
    results = Results(arguments.out, command_line())
    if arguments.part is not None:
        results.reload()
        return run_items(arguments.part, part_items(arguments, results, clock), arguments.first, results, clock)
    with sampled_clocks(arguments.out / "clocks.csv"):
        run_steps(arguments, results, clock)
    if facts := clock_facts(arguments.out / "clocks.csv"):
        detail = ", ".join(f"{name} {value:.0f}" for name, value in facts.items())
        results.add(kind="clocks", op="under load", passed=True, **facts, detail=detail)
    print(results.write_text([*table_lines(results.rows), "", *goal_lines(results.rows)]))
    print("plots:", results.write_plots())
    failed = [row for row in results.rows if row.get("passed") is False]
    print(f"{len(results.rows)} rows, {len(failed)} failed, {time.monotonic() - clock.start:.0f} s")
    return 1 if failed else 0


def run_steps(arguments: argparse.Namespace, results: Results, clock: Clock) -> None:
    """All steps in order; what happens in one does not keep the next from running."""
    added_to = (results.path.name, "steps.txt", "*.log", "attention.jsonl", f"sanitizer/{results.path.name}")
    for path in [path for pattern in added_to for path in results.folder.glob(pattern)]:
        path.unlink()  # of a run before this one

    def at_most(step: str) -> float:
        return min(STEP_S[step] if clock.on_gpu else LIMIT_S[False], clock.left_s())

    tiny = ["--smoke"] if arguments.smoke else []
    run_compilation(results, clock, at_most("compilation"))
    for part in ("smoke", "correctness"):
        run_part(results, part, tiny, limit_s=at_most(part))
    run_gpu_tests(results, at_most("tests"))
    run_part(results, "timing", tiny, limit_s=clock.left_s() - KEPT_S + OVERTIME_S, overtime_s=OVERTIME_S)
    run_attention(results, arguments.out, at_most("attention"))
    run_epoch_time(results, arguments.out, tiny=arguments.smoke, limit_s=at_most("epoch_time"))
    run_sanitizer(results, arguments.out, at_most("sanitizer"))


def part_items(arguments: argparse.Namespace, results: Results, clock: Clock) -> list[tuple[str, Callable[[], None]]]:
    """What a part does, one named call after another."""
    # The interpreter multiplies bf16 bit patterns; fp16 is right there.
    dtype = torch.bfloat16 if clock.on_gpu else torch.float16
    if arguments.part == "smoke":
        return [(str(case), lambda case=case: check_every_kernel(case, results, clock)) for case in SMOKE_CASES]
    if arguments.part == "correctness":
        shapes = SMOKE_SHAPES[:1] if arguments.smoke else CORRECTNESS_SHAPES
        return [
            (f"{op} {shape}", lambda op=op, shape=shape: check_operation(op, shape, dtype, results, clock))
            for shape in shapes
            for op in shape.ops
        ]
    reps = 3 if arguments.smoke else 20
    shapes = SMOKE_SHAPES if arguments.smoke else SHAPES
    return [(str(shape), lambda shape=shape: time_shape(shape, dtype, results, clock, reps)) for shape in shapes]


def run_items(
    part: str, items: Sequence[tuple[str, Callable[[], None]]], first: int, results: Results, clock: Clock
) -> int:
    """Run the calls of a part; one that raises is a failed row. The exit status says whether the device was lost."""
    for index, (name, call) in enumerate(items[first:], first):
        if clock.left_s() <= 0 and part == "timing":
            results.add(kind="budget", op=part, passed=True, detail=f"stopped before {name}")
            break
        print(f"{ITEM} {index} {name}", flush=True)
        try:
            call()
        except Exception as error:  # the other calls still tell something
            traceback.print_exc()
            results.add(kind=part, op=name, passed=False, detail=short(error))
        if not clock.is_usable():
            detail = "every later call of this process fails; the next process goes on behind it"
            results.add(kind="device_lost", op=name, passed=False, detail=detail)
            return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
