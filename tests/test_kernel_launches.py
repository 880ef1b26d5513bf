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
    """Planted: tiles of a size that no kernel takes, and a limit below what the smallest kernel uses."""
    code = """
import sys, dataclasses
import kernel_launches
from inverseq_kernels import triton_logprob
choose = triton_logprob.choose_blocks
triton_logprob.choose_blocks = lambda *args: dataclasses.replace(choose(*args), words=48)
kernel_launches.SHARED_MEMORY_LIMIT[80] = 1
count, problems = kernel_launches.compile_launches(kernel_launches.Case(1, 1, 16), 80)
print(count, *problems, sep="\\n")
"""
    result = run_launches(code=code)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "statistics_kernel Case(num_rows=1" in result.stdout and "CompilationError" in result.stdout
    assert "shared memory" in result.stdout


VARIANTS = """
import torch, kernel_launches
from inverseq_kernels import backends, triton_contrastive, triton_logprob, triton_loss, triton_stored
from triton.runtime import driver
from triton.runtime.jit import JITFunction

seen = {}

def specialise(self, *args, grid, warmup, **options):
    *_, binder = self.device_caches[0]
    _, specialization, options = binder(*args, debug=False, **options)
    seen[num_rows].add((self.fn.__name__, str(specialization), str(options)))

driver.set_active(kernel_launches.OfflineDriver(90))
JITFunction.run = specialise
for module in (triton_contrastive, triton_logprob, triton_loss, triton_stored):
    module.capability_of = lambda tensor: 90
backends._triton_obstacle = lambda stem, hidden: None
for num_rows in (1, 5, 16, 130, 1001, 2048):
    seen[num_rows] = set()
    for dtype in (torch.bfloat16, torch.float32):
        kernel_launches.run_every_operation(
            kernel_launches.Case(num_rows, 2300, 64, dtype, has_bias=True, num_padding=3, workspace_bytes=2**20)
        )
sets = list(seen.values())
changed = sorted(name for one in sets for name, *_ in one ^ sets[0])
print(len(sets[0]), changed)
"""


def test_nothing_is_compiled_anew_for_another_number_of_rows():
    result = run_launches(code=VARIANTS)
    assert result.returncode == 0, result.stderr[-2000:]
    count, _, changed = result.stdout.strip().partition(" ")
    assert int(count) >= 15 and changed == "[]"
