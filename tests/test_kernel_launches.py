"""Launches as operations make them: integers that are 1 are constants there, which no declared case shows."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]


def run_launches(*arguments, code=None):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'benchmarks'}")
    program = ["benchmarks/kernel_launches.py"] if code is None else ["-c", code]
    command = [sys.executable, *program, *arguments, "--jobs", "1"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_launches_with_one_alpha_a_softcap_and_a_bias_compile_within_the_limits():
    result = run_launches("--sm", "90", "--case", "9")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    count = int(result.stdout.split("sm_90: ")[1].split()[0])
    assert count >= 10 and "1 cases, 0 problems" in result.stdout


def test_a_launch_that_does_not_compile_or_spills_fails_the_gate():
    """Planted: tiles of a size that no kernel takes, and a limit below what the smallest case uses."""
    code = """
import sys, dataclasses
import kernel_launches
from inverseq_kernels import triton_logprob
choose = triton_logprob.choose_blocks
triton_logprob.choose_blocks = lambda *args: dataclasses.replace(choose(*args), words=48)
kernel_launches.SHARED_MEMORY_LIMIT[80] = 1
count, problems = kernel_launches.compile_launches(kernel_launches.CASES[0], 80)
print(count, *problems, sep="\\n")
"""
    result = run_launches(code=code)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "statistics_kernel Case(num_rows=1" in result.stdout and "CompilationError" in result.stdout
    assert "shared memory" in result.stdout
