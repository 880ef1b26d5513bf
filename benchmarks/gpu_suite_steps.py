"""The steps of gpu_suite.py, each a process: its own parts, GPU tests, compute-sanitizer, attention, a short epoch."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from gpu_suite_clock import Clock
from gpu_suite_report import Results

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICE_LOST = 75  # exit status of a part whose process can use the device no more
KEPT_LINES = 40  # of a step's output
SHORTEST_S = 5.0  # a step with less time is not started
ITEM = "ITEM"  # what a part's line starts with that says which of its calls comes, by number
MOST_TRIES = 4  # processes of one part


@dataclass(frozen=True)
class Ended:
    """How a step's process ended."""

    status: int | None  # None: it was stopped or not started
    how: str
    lines: list[str]  # of its output


def run_gpu_tests(results: Results, limit_s: float) -> None:
    """``pytest -m gpu`` over the test files that hold such tests, those of the kernels first."""
    files = [path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()]
    files.sort(key=lambda path: (not path.stem.startswith("test_gpu_"), path.stem))
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not files:
        results.add(kind="tests", op="pytest -m gpu", passed=True, detail=f"not run: {missing or 'no test files'}")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", *map(str, files)]
    command += ["-vv", "--durations=10"]  # should they be stopped, it is known what ran
    if importlib.util.find_spec("xdist") is not None and torch.cuda.is_available():
        command += ["-n", "4"]  # torch.compile takes most of the time, on one processor a test
    _run_step(results, "tests", "pytest -m gpu", command, limit_s=limit_s)


def run_sanitizer(results: Results, folder: pathlib.Path, limit_s: float) -> None:
    """compute-sanitizer's memcheck over the smoke step."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        results.add(kind="sanitizer", op="memcheck", passed=True, detail="not run: no compute-sanitizer or no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "gpu_suite.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    command += ["--smoke", "--part", "smoke", "--out", str(folder.resolve() / "sanitizer")]
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _run_step(results, "sanitizer", "memcheck", command, limit_s=limit_s, more=no_cache, timeout_fails=False)


def run_attention(results: Results, folder: pathlib.Path, limit_s: float) -> None:
    """attention.py: packed attention by kernels made ahead; its rows go to FOLDER/attention.jsonl as they come.

    FlexAttention is left out: torch.compile would take most of the time, and the tests run it.
    """
    if not torch.cuda.is_available():
        results.add(kind="attention", op="packed attention", passed=True, detail="not run: no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "attention.py")
    command = [sys.executable, script, "--out", str(folder.resolve() / "attention.jsonl")]
    for backend in ("flash_attn", "varlen", "sdpa"):
        command += ["--backend", backend]
    _run_step(results, "attention", "packed attention", command, limit_s=limit_s, timeout_fails=False)


def run_epoch_time(results: Results, folder: pathlib.Path, *, tiny: bool, limit_s: float) -> None:
    """epoch_time.py over few samples, scoring and training beside the baseline; its files go to FOLDER/epoch_time."""
    script = str(pathlib.Path(__file__).resolve().parent / "epoch_time.py")
    model, count = ("tiny", "3") if tiny else ("llama-1b", "64")
    command = [sys.executable, script, "--model", model, "--samples", count, "--reps", "1"]
    command += ["--phases", "pack,score,train", "--out", str(folder.resolve() / "epoch_time")]
    _run_step(results, "epoch_time", model, command, limit_s=limit_s, timeout_fails=False)


def run_compilation(results: Results, clock: Clock, limit_s: float) -> None:
    """kernel_launches.py: all processors compile what the steps behind it will launch, into triton's cache."""
    if not clock.on_gpu:
        results.add(kind="compilation", op="kernels", passed=True, detail="not run: no GPU")
        return
    major, minor = torch.cuda.get_device_capability()
    script = str(pathlib.Path(__file__).resolve().parent / "kernel_launches.py")
    jobs = max(1, (os.cpu_count() or 2) - 1)
    command = [sys.executable, script, "--sm", str(10 * major + minor), "--jobs", str(jobs)]
    _run_step(results, "compilation", "kernels", command, limit_s=limit_s)


def run_part(results: Results, part: str, options: list[str], *, limit_s: float, overtime_s: float = 0.0) -> None:
    """One part of gpu_suite.py as a process that adds its own rows; behind what crashed it another one goes on.

    In the last ``overtime_s`` it starts nothing.
    """
    script = str(pathlib.Path(__file__).resolve().parent / "gpu_suite.py")
    first, until = 0, time.monotonic() + limit_s
    for _ in range(MOST_TRIES):
        before, left_s = len(results.rows), until - time.monotonic()
        command = [sys.executable, script, "--out", str(results.folder), "--part", part, "--first", str(first)]
        command += ["--limit-s", f"{left_s - overtime_s:.0f}", *options]
        ended = _run(results, part, command, limit_s=left_s)
        results.reload()
        if ended.status == 0:
            return
        item = max((line for line in ended.lines if line.startswith(f"{ITEM} ")), key=_item_number, default=None)
        detail = f"{ended.how}, last in {item}: {ended.lines[-1:]}, {len(results.rows) - before} rows"
        results.add(kind="part", op=part, passed=False, detail=detail)
        if item is None or until - time.monotonic() < SHORTEST_S:
            return
        first = _item_number(item) + 1


def _item_number(line: str) -> int:
    return int(line.split()[1])


def _run(
    results: Results, name: str, command: list[str], *, limit_s: float, more: dict[str, str] | None = None
) -> Ended:
    """One process with all that it starts; its output goes to FOLDER/<name>.log as it comes, the end to steps.txt.

    ``more`` is added to its environment.
    """
    started, log = time.monotonic(), results.folder / f"{re.sub('[^a-z]+', '_', name)}.log"
    before = log.stat().st_size if log.exists() else 0  # an earlier process of the same part
    # What the caller's path holds too: packages may stand in a folder of their own.
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | (more or {})
    status = None
    if limit_s >= SHORTEST_S:
        with log.open("ab") as output:
            # A group of its own: compilers, and what compute-sanitizer watches, must not outlive it on the GPU.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit_s)
            finally:
                _end_group(process)
        lines = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
        ending = f"stopped after {limit_s:.0f} s" if status is None else f"exit status {status}"
    else:
        lines, ending = [], "not started: no time is left"
    if status != 0:
        print("\n".join(lines[-KEPT_LINES:]))
    with (results.folder / "steps.txt").open("a") as file:
        head = f"== {name}: {ending} after {time.monotonic() - started:.0f} s: {' '.join(command)}"
        file.write("\n".join([head, *lines[-KEPT_LINES:], "", ""]))
    return Ended(status, ending, lines)


def _end_group(process: subprocess.Popen) -> None:
    """Kill what is left of a process that leads a group, and of the group; what the driver holds is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)  # so that its GPU is free again, where that can be had


def _run_step(
    results: Results,
    kind: str,
    op: str,
    command: list[str],
    *,
    limit_s: float,
    more: dict[str, str] | None = None,
    timeout_fails: bool = True,
) -> None:
    """One process as a row; its last line is the detail."""
    ended = _run(results, f"{kind} {op}", command, limit_s=limit_s, more=more)
    if ended.status is None:
        results.add(kind=kind, op=op, passed=not timeout_fails, detail=ended.how)
        return
    results.add(kind=kind, op=op, passed=ended.status == 0, detail=(ended.lines or [""])[-1][:200])
