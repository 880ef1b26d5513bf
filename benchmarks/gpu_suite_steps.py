"""The steps of gpu_suite.py that are other programs: the GPU tests, compute-sanitizer, attention, a short epoch."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import torch
from gpu_suite_report import Results

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_gpu_tests(results: Results, left_s: float) -> None:
    """``pytest -m gpu`` over the test files that hold such tests."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not files:
        results.add(kind="tests", op="pytest -m gpu", passed=True, detail=f"not run: {missing or 'no test files'}")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *map(str, files)]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    limit_s = min(120.0, max(left_s, 10.0))
    _run_step(results, "tests", "pytest -m gpu", command, limit_s=limit_s, environment=environment)


def run_sanitizer(results: Results, folder: pathlib.Path) -> None:
    """compute-sanitizer's memcheck over the smoke step."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        results.add(kind="sanitizer", op="memcheck", passed=True, detail="not run: no compute-sanitizer or no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "gpu_suite.py")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, script]
    command += ["--smoke", "--kernels-only", "--out", str(folder.resolve() / "sanitizer")]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = dict(os.environ, PYTHONPATH=path, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    _run_step(results, "sanitizer", "memcheck", command, limit_s=75.0, environment=environment, timeout_fails=False)


def run_attention(results: Results, folder: pathlib.Path) -> None:
    """attention.py: the backends of packed attention; its rows go to FOLDER/attention.jsonl."""
    if not torch.cuda.is_available():
        results.add(kind="attention", op="packed attention", passed=True, detail="not run: no GPU")
        return
    script = str(pathlib.Path(__file__).resolve().parent / "attention.py")
    command = [sys.executable, script, "--out", str(folder.resolve() / "attention.jsonl")]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    _run_step(results, "attention", "packed attention", command, limit_s=90.0, environment=environment)


def run_epoch_time(results: Results, folder: pathlib.Path, *, tiny: bool, limit_s: float) -> None:
    """epoch_time.py over few samples, scoring and training beside the baseline; its files go to FOLDER/epoch_time."""
    script = str(pathlib.Path(__file__).resolve().parent / "epoch_time.py")
    model, count = ("tiny", "3") if tiny else ("llama-1b", "64")
    command = [sys.executable, script, "--model", model, "--samples", count, "--reps", "1"]
    command += ["--phases", "pack,score,train", "--out", str(folder.resolve() / "epoch_time")]
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    _run_step(results, "epoch_time", model, command, limit_s=limit_s, environment=environment, timeout_fails=False)


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
    """One subprocess as a row; its last line is the detail."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        results.add(kind=kind, op=op, passed=not timeout_fails, detail=f"stopped after {limit_s:.0f} s")
        return
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    if done.returncode != 0:
        print("\n".join(lines[-40:]))
    results.add(kind=kind, op=op, passed=done.returncode == 0, detail=lines[-1][:200])
