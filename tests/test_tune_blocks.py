"""The search for tile sizes, on tiny shapes: every operation is checked and timed, and wrong tiles are noticed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]
ROW_FIELDS = {"op", "device", "measured", "command", "commit", "versions", "date", "num_rows", "num_words", "dim"}
ROW_FIELDS |= {"dtype", "reps", "ms", "ms_p20", "ms_p80", "peak_bytes", "error", "registers", "shared", "failure"}


def run_python(*arguments):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'benchmarks'}")
    environment.pop("TRITON_INTERPRET", None)  # each process decides by what it does
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_smoke_run_times_the_candidates_of_every_operation(tmp_path):
    options = ["--smoke", "--jobs", "1", "--budget-s", "3600", "--out", str(tmp_path)]
    result = run_python("benchmarks/tune_blocks.py", *options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = json.loads((tmp_path / "tune_blocks.json").read_text())
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    tuned = [row for row in rows if row["kind"] == "tune"]
    assert all(ROW_FIELDS <= row.keys() for row in tuned)
    assert {(row["op"], row["group"]) for row in tuned} == {
        (op, group) for op in ("loss", "target", "logprob", "logprob_backward") for group in ("wide", "narrow")
    }
    assert all(row["ms"] > 0 and row["error"] < 1e-2 for row in tuned)
    assert all((row["registers"] > 0) == (row["structure"] == "tiles") for row in tuned)
    assert {(row["structure"], row["tile_words"]) for row in tuned} == {("tiles", 128), ("logits", 1024), ("tiles", 64)}
    text = (tmp_path / "tune_blocks.txt").read_text()
    assert text.count("\nBlocks(rows=") == 8 and "# loss, wide: " in text


CANDIDATES = """
import json, sys
from tune_blocks_candidates import OPS, Candidate, chosen, compile_candidate, list_candidates
from inverseq_kernels.triton_blocks import Blocks
lists = {(op, sm, dim): list_candidates(op, sm, dim, 24) for op in OPS for sm in (80, 90) for dim in (576, 4096)}
for (op, sm, dim), found in lists.items():
    assert found[0] == chosen(op, sm, dim) and len(set(found)) == len(found) == 24
    assert [one.structure for one in found[1:4]] == ["logits"] * 3
    blocks = [one.blocks for one in found if one.structure == "tiles"]
    assert len(blocks) == 21 and all(one.tma is False for one in blocks if sm == 80)
    assert all(one.rows * one.words <= 128 * 32 * one.num_warps for one in blocks)
small, large = Blocks(64, 64, 32, num_warps=4, num_stages=2), Blocks(128, 256, 32, num_warps=4, num_stages=2)
fine = compile_candidate("logprob", Candidate("tiles", small), 80, 576)
spills = compile_candidate("target", Candidate("tiles", large), 80, 576)
print(json.dumps([fine.refused, fine.registers, spills.refused]))
"""


def test_candidates_start_at_the_choosers_choice_and_spilling_ones_are_refused():
    result = run_python("-c", CANDIDATES)
    assert result.returncode == 0, result.stderr[-2000:]
    refused, registers, spills = json.loads(result.stdout.splitlines()[-1])
    assert refused == "" and 32 <= registers <= 255
    assert "spills" in spills


CACHED = """
import pathlib, sys, torch
import kernel_launches
from inverseq_kernels import triton_logprob
from inverseq_kernels.triton_blocks import Blocks
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tune_blocks_candidates import Candidate, compile_candidate

def cached():
    return {path for path in pathlib.Path(sys.argv[1]).rglob("*.cubin")}

blocks = Blocks(64, 64, 64, num_warps=4, num_stages=2, tma=True)
assert compile_candidate("logprob", Candidate("tiles", blocks), 90, 256).refused == ""
before = cached()
JITFunction.run = lambda self, *args, grid, warmup, **options: kernel_launches.LAUNCH(
    self, *args, grid=grid, warmup=True, **options
)
driver.set_active(kernel_launches.OfflineDriver(90))
hidden, weight = torch.zeros(256, 256, dtype=torch.bfloat16), torch.zeros(512, 256, dtype=torch.bfloat16)
triton_logprob.logprob_forward(
    hidden, weight, None, torch.zeros(256, dtype=torch.int64), softcap=None, temperature=1.0, num_valid_vocab=512,
    want_entropy=False, workspace_bytes=2**29, blocks=blocks,
)
print(len(before), *sorted(path.stem for path in cached() - before))
"""


def test_a_launch_takes_what_was_compiled_ahead_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run_python("-c", CACHED, str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "1 combine_kernel"  # of the launch, the tile kernel is not compiled anew


def test_tiles_with_other_results_fail_the_run(tmp_path):
    """A planted bug in one candidate: its launch leaves out the second half of the rows."""
    code = """
import sys, tune_blocks, torch
call_of = tune_blocks.make_call
def planted(op, inputs):
    call = call_of(op, inputs)
    def run(candidate):
        outputs = call(candidate)
        if candidate.blocks.rows == 16:
            outputs[-1][len(outputs[-1]) // 2:].zero_()
        return outputs
    return run
tune_blocks.make_call = planted
sys.argv[1:] = ["--smoke", "--op", "logprob", *"--jobs 1 --budget-s 3600 --out".split(), sys.argv[1]]
if __name__ == "__main__":
    sys.exit(tune_blocks.main())
"""
    script = tmp_path / "planted.py"
    script.write_text(code)
    result = run_python(str(script), str(tmp_path / "out"))
    assert result.returncode == 1, result.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "tune_blocks.json").read_text())
    wrong = [row for row in rows if row["passed"] is False]
    assert wrong and all(row["tile_rows"] == 16 and "differs from the choosers'" in row["failure"] for row in wrong)


LOST = """
import sys, tune_blocks
call_of, lost = tune_blocks.make_call, []
def planted(op, inputs):
    if op == "logprob" and inputs.hidden.shape[0] == 20:
        raise RuntimeError("no kernel image")
    call = call_of(op, inputs)
    def run(candidate):
        if op == "target" and candidate.structure == "logits":
            lost.append(candidate)
            raise RuntimeError("an illegal memory access")
        return call(candidate)
    return run
tune_blocks.make_call = planted
tune_blocks.Clock.is_usable = lambda clock: not lost
sys.argv[1:] = ["--smoke", "--op", "logprob", "--op", "target", *"--jobs 1 --budget-s 3600 --out".split(), sys.argv[1]]
if __name__ == "__main__":
    sys.exit(tune_blocks.main())
"""


def test_a_task_that_fails_costs_its_own_rows_and_a_lost_device_ends_the_table(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(LOST)
    result = run_python(str(script), str(tmp_path / "out"))
    assert result.returncode == 1, result.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "tune_blocks.json").read_text())
    assert [(row["kind"], row["op"], row["passed"]) for row in rows] == [
        ("tune_task", "logprob", False), ("tune", "target", True), ("tune", "target", False),
        ("tune_task", "target", False), ("device_lost", "target", False),
    ]  # fmt: skip
    assert "no kernel image" in rows[0]["detail"] and "illegal memory access" in rows[2]["failure"]
    assert (tmp_path / "out" / "tune_blocks.txt").exists()


def test_a_call_that_hangs_ends_the_program_with_the_place():
    code = """
import time, types, tune_blocks
tune_blocks.HANG_S = 1.0
tune_blocks.watch(types.SimpleNamespace(on_gpu=True))
if __name__ == "__main__":
    time.sleep(60)
"""
    result = run_python("-c", code)
    assert result.returncode == 1 and "Timeout" in result.stderr
