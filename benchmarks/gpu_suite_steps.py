"""The steps of gpu_suite.py, each a process: its own parts, GPU tests, compute-sanitizer, attention, a short epoch."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import time

import torch
from gpu_suite_clock import Clock
from gpu_suite_report import Results

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICE_LOST = 75  # exit status of a part whose process can use the device no more
KEPT_LINES = 40  # of a step's output


def run_gpu_tests(results: Results, left_s: float) -> None:
    """``pytest -m gpu`` over the test files that hold such tests."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not files:
        results.add(kind="tests", op="pytest -m gpu", passed=True, detail=f"not run: {missing or 'no test files'}")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", *map(str, files)]
    environment = _environment()
    limit_s = min(150.0, max(left_s, 10.0))
    _run_step(results, "tests", "pytest -m gpu", command, limit_s=limit_s, environment=environment)


def run_sanitizer(results: Results, folder: pathlib.Path) -> None:
    """compute-sanitizer's memcheck over the smoke step."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        results.add(kind="sanitizer", op="memcheck", passed=True, detail="not run: no compute-sanitizer or no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "gpu_suite.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    command += ["--smoke", "--part", "smoke", "--out", str(folder.resolve() / "sanitizer")]
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _run_step(results, "sanitizer", "memcheck", command, limit_s=75.0, environment=environment, timeout_fails=False)


def run_attention(results: Results, folder: pathlib.Path) -> None:
    """attention.py: the backends of packed attention; its rows go to FOLDER/attention.jsonl."""
    if not torch.cuda.is_available():
        results.add(kind="attention", op="packed attention", passed=True, detail="not run: no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "attention.py")
    command = [sys.executable, script, "--out", str(folder.resolve() / "attention.jsonl")]
    _run_step(results, "attention", "packed attention", command, limit_s=60.0, environment=_environment())


def run_epoch_time(results: Results, folder: pathlib.Path, *, tiny: bool, limit_s: float) -> None:
    """epoch_time.py over few samples, scoring and training beside the baseline; its files go to FOLDER/epoch_time."""
    script = str(pathlib.Path(__file__).resolve().parent / "epoch_time.py")
    model, count = ("tiny", "3") if tiny else ("llama-1b", "64")
    command = [sys.executable, script, "--model", model, "--samples", count, "--reps", "1"]
    command += ["--phases", "pack,score,train", "--out", str(folder.resolve() / "epoch_time")]
    _run_step(results, "epoch_time", model, command, limit_s=limit_s, environment=_environment(), timeout_fails=False)


def run_compilation(results: Results, clock: Clock) -> None:
    """kernel_launches.py: all processors compile what the steps behind it will launch, into triton's cache."""
    if not clock.on_gpu:
        results.add(kind="compilation", op="kernels", passed=True, detail="not run: no GPU")
        return
    major, minor = torch.cuda.get_device_capability()
    script = str(pathlib.Path(__file__).resolve().parent / "kernel_launches.py")
    jobs = max(1, (os.cpu_count() or 2) - 1)
    command = [sys.executable, script, "--sm", str(10 * major + minor), "--jobs", str(jobs)]
    _run_step(results, "compilation", "kernels", command, limit_s=100.0, environment=_environment())


def run_part(results: Results, part: str, options: list[str], *, limit_s: float) -> int | None:
    """One part of gpu_suite.py as a process that adds its own rows; where to go on if it lost the device."""
    script = str(pathlib.Path(__file__).resolve().parent / "gpu_suite.py")
    command = [sys.executable, script, "--out", str(results.folder), *options]
    before = len(results.rows)
    done = _run(results, part, command, limit_s=limit_s, environment=_environment())
    results.reload()
    if done is not None and done.returncode == DEVICE_LOST:
        return results.rows[-1]["next_item"]
    if done is None or done.returncode != 0:
        lines = [] if done is None else (done.stdout + done.stderr).strip().splitlines()
        ending = f"stopped after {limit_s:.0f} s" if done is None else f"exit status {done.returncode}: {lines[-1:]}"
        results.add(kind="part", op=part, passed=False, detail=f"{ending} behind {len(results.rows) - before} rows")
    return None


def _environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")


def _run(
    results: Results, name: str, command: list[str], *, limit_s: float, environment: dict[str, str]
) -> subprocess.CompletedProcess | None:
    """One process, the end of whose output goes to FOLDER/steps.txt; None where it was stopped."""
    started, done = time.monotonic(), None
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
        output, ending = done.stdout + done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        parts = (error.stdout, error.stderr)
        output = "".join(part.decode(errors="replace") if isinstance(part, bytes) else part or "" for part in parts)
        ending = "stopped"
    lines = output.strip().splitlines()[-KEPT_LINES:]
    if done is None or done.returncode != 0:
        print("\n".join(lines))
    with (results.folder / "steps.txt").open("a") as file:
        head = f"== {name}: {ending} after {time.monotonic() - started:.0f} s: {' '.join(command)}"
        file.write("\n".join([head, *lines, "", ""]))
    return done


def _run_step(
    results: Results,
    kind: str,
    op: str,
    command: list[str],
    *,
    limit_s: float,
    environment: dict[str, str],
    timeout_fails: bool = True,
) -> None:
    """One process as a row; its last line is the detail."""
    done = _run(results, f"{kind} {op}", command, limit_s=limit_s, environment=environment)
    if done is None:
        results.add(kind=kind, op=op, passed=not timeout_fails, detail=f"stopped after {limit_s:.0f} s")
        return
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    results.add(kind=kind, op=op, passed=done.returncode == 0, detail=lines[-1][:200])
