"""The GPU benchmark's whole path on tiny shapes, before anybody spends GPU time on it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]
ROW_FIELDS = {"op", "device", "measured", "command", "commit", "versions", "date"}
TIMING_FIELDS = {"num_rows", "num_words", "dim", "dtype", "reps", "ms", "ms_p20", "ms_p80", "peak_bytes", "error"}


def test_smoke_run_measures_every_operation_and_contender(tmp_path):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}")
    command = [sys.executable, "benchmarks/gpu_suite.py", "--smoke", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert all(ROW_FIELDS <= row.keys() for row in rows)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert {"smoke", "correctness", "tests", "sanitizer", "timing"} <= {row["kind"] for row in rows}
    assert rows[-1]["kind"] == "epoch_time" and (tmp_path / "epoch_time" / "epoch_time.png").exists()
    timed = [row for row in rows if row["kind"] == "timing"]
    assert all(TIMING_FIELDS <= row.keys() for row in timed)
    ops = {"squared_log_ratio_loss", "contrastive_logprob", "linear_logprob"}
    for contender in ("inverseq triton", "inverseq torch", "eager", "torch.compile"):
        ours = [row for row in timed if row["contender"] == contender]
        assert {row["op"] for row in ours} == ops
        assert all(row["failure"] is None and row["ms"] > 0 and row["error"] < 1e-2 for row in ours)
    assert "squared_log_ratio_loss" in (tmp_path / "gpu_suite.txt").read_text()
    assert len(list(tmp_path.glob("*.png"))) <= 5


def test_without_a_gpu_only_the_smoke_run_starts(tmp_path):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "benchmarks/gpu_suite.py", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "--smoke" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ending", "passed"), [(1, False), (subprocess.TimeoutExpired("x", 1), True)])
def test_an_epoch_that_fails_is_a_row(tmp_path, monkeypatch, ending, passed):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_suite_report import Results
    from gpu_suite_steps import run_epoch_time

    def run(command, **options):
        assert options["timeout"] == 7 and "llama-1b" in command
        if isinstance(ending, Exception):
            raise ending
        return subprocess.CompletedProcess(command, ending, "first\n", "no packer")

    results = Results(tmp_path, "command")
    monkeypatch.setattr(subprocess, "run", run)
    run_epoch_time(results, tmp_path, tiny=False, limit_s=7)
    [row] = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert row["kind"] == "epoch_time" and row["passed"] is passed
    assert row["detail"] == ("stopped after 7 s" if passed else "no packer")
