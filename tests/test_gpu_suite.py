"""The GPU benchmark's whole path on tiny shapes, before anybody spends GPU time on it."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace

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
    assert rows[-2]["kind"] == "epoch_time" and (tmp_path / "epoch_time" / "epoch_time.png").exists()
    assert rows[-1]["kind"] == "sanitizer"
    timed = [row for row in rows if row["kind"] == "timing"]
    assert all(TIMING_FIELDS <= row.keys() for row in timed)
    ops = {"squared_log_ratio_loss", "contrastive_logprob", "linear_logprob"}
    ours = ("inverseq triton", "inverseq triton, stored logits", "inverseq torch")
    for contender in (*ours, "eager", "torch.compile"):
        its = [row for row in timed if row["contender"] == contender]
        assert {row["op"] for row in its} == ops
        assert all(row["failure"] is None and row["ms"] > 0 and row["error"] < 1e-2 for row in its)
    assert "squared_log_ratio_loss" in (tmp_path / "gpu_suite.txt").read_text()
    assert len(list(tmp_path.glob("*.png"))) <= 5
    steps = (tmp_path / "steps.txt").read_text()
    assert all(f"== {part}: exit status 0" in steps for part in ("smoke", "correctness", "timing"))
    goals = [line for line in (tmp_path / "gpu_suite.txt").read_text().splitlines() if line.startswith("goal ")]
    assert len(goals) == 9 and all(line.endswith(": not measured") for line in goals)  # by the interpreter


def test_without_a_gpu_only_the_smoke_run_starts(tmp_path):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "benchmarks/gpu_suite.py", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "--smoke" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_what_raises_is_a_row_and_the_rest_still_runs(tmp_path, benchmarks_on_path, capsys):
    from gpu_suite import run_items
    from gpu_suite_clock import Clock
    from gpu_suite_report import Results
    from gpu_suite_steps import DEVICE_LOST

    def broken():
        raise RuntimeError("no kernel image")

    called, clock, results = [], Clock(9.0), Results(tmp_path, "command")
    items = [("one", broken), ("two", lambda: called.append("two"))]
    assert run_items("smoke", items, 0, results, clock) == 0 and called == ["two"]
    [row] = results.rows
    assert row["op"] == "one" and row["passed"] is False and "no kernel image" in row["detail"]
    clock.is_usable = lambda: False  # an illegal access: the next process goes on behind it
    assert run_items("smoke", items, 0, results, clock) == DEVICE_LOST and called == ["two"]
    assert results.rows[-1]["kind"] == "device_lost" and results.rows[-1]["passed"] is False
    assert "no kernel image" in capsys.readouterr().err


@pytest.fixture
def steps(benchmarks_on_path, monkeypatch):
    """gpu_suite_steps, whose processes run the ``code`` of this namespace with their arguments instead."""
    import gpu_suite_steps

    run, planted = gpu_suite_steps._run, SimpleNamespace(module=gpu_suite_steps, code="")

    def run_planted(results, name, command, **options):
        return run(results, name, [sys.executable, "-c", planted.code, *command[2:]], **options)

    monkeypatch.setattr(gpu_suite_steps, "_run", run_planted)
    monkeypatch.setattr(gpu_suite_steps, "SHORTEST_S", 0.5)
    return planted


@pytest.mark.parametrize(
    ("code", "limit_s", "passed", "detail"),
    [
        ("print('first'); raise SystemExit('no packer')", 600.0, False, "no packer"),
        ("while 1: 0", 2.0, True, "stopped after 2 s"),
    ],
)
def test_an_epoch_that_fails_is_a_row(tmp_path, steps, code, limit_s, passed, detail):
    from gpu_suite_report import Results

    steps.code = code
    steps.module.run_epoch_time(Results(tmp_path, "command"), tmp_path, tiny=False, limit_s=limit_s)
    [row] = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert (row["kind"], row["op"], row["passed"], row["detail"]) == ("epoch_time", "llama-1b", passed, detail)


@pytest.mark.parametrize(
    ("code", "limit_s", "detail"),
    [
        ("raise SystemExit(9)", 600.0, "exit status 9"),
        ("while 1: 0", 2.0, "stopped after 2 s"),
        ("", 0.1, "not started: no time is left"),
    ],
)
def test_a_part_that_crashes_or_hangs_is_a_row(tmp_path, steps, code, limit_s, detail):
    from gpu_suite_report import Results

    steps.code, results = code, Results(tmp_path, "command")
    steps.module.run_part(results, "timing", [], limit_s=limit_s)
    [row] = results.rows
    assert row["passed"] is False and detail in row["detail"]
    assert f"== timing: {detail}" in (tmp_path / "steps.txt").read_text()


def test_a_step_sees_the_checkout_first_and_then_what_its_caller_sees(tmp_path, steps, monkeypatch):
    from gpu_suite_report import Results

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    steps.code = "import sys; print(sys.path[1:4])"
    results = Results(tmp_path, "command")
    steps.module.run_epoch_time(results, tmp_path, tiny=True, limit_s=600.0)
    [row] = results.rows
    assert row["detail"] == str([str(ROOT), str(ROOT / "kernels"), str(tmp_path / "site")])


def test_behind_the_call_that_crashes_a_part_another_process_goes_on(tmp_path, steps):
    from gpu_suite_report import Results

    steps.code = """
import os, sys
first = int(sys.argv[sys.argv.index("--first") + 1])
for item in range(first, 5):
    print("ITEM", item, "a shape", flush=True)
    if item in (1, 3):
        os.abort()
"""
    results = Results(tmp_path, "command")
    steps.module.run_part(results, "timing", [], limit_s=600.0)
    assert [row["detail"].split(":")[0] for row in results.rows] == [
        "exit status -6, last in ITEM 1 a shape", "exit status -6, last in ITEM 3 a shape",
    ]  # fmt: skip
    assert "== timing: exit status 0" in (tmp_path / "steps.txt").read_text()
    assert (tmp_path / "timing.log").read_text().count("ITEM") == 5


def test_what_a_stopped_step_has_started_ends_with_it(tmp_path, steps):
    """As what compute-sanitizer watches would go on beside the timing."""
    from gpu_suite_report import Results

    steps.code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid); subprocess.run(['sleep', '600'])"
    steps.module._run_step(Results(tmp_path, "command"), "sanitizer", "memcheck", ["", ""], limit_s=6.0)
    pid = int((tmp_path / "sanitizer_memcheck.log").read_text())
    deadline = time.monotonic() + 120
    while not is_dead(pid) and time.monotonic() < deadline:  # killed, but not yet scheduled to die
        time.sleep(0.01)
    assert is_dead(pid)


def is_dead(pid: int) -> bool:
    try:
        return "State:\tZ" in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def measured_rows(milliseconds, *, beyond=537 * 2**20, rms=2e-5, gradient=1.5):
    """Rows as an H100 might give them, times by contender."""
    common = {"num_rows": 8192, "num_words": 32_000, "dim": 4096, "phase": "together", "measured": True}
    rows = [
        common
        | {"kind": "timing", "op": "squared_log_ratio_loss", "contender": name, "ms": ms}
        | {"beyond_output_bytes": 2**31, "accumulator_bytes": 2**20}  # the gradients, scaled, beside themselves
        for name, ms in milliseconds.items()
    ]
    rows.append(rows[0] | {"phase": "forward", "contender": "inverseq triton", "beyond_output_bytes": beyond + 2**20})
    target = {"op": "contrastive_logprob", "contender": "inverseq triton", "ms": 6.5}
    rows.append(rows[0] | target | {"beyond_output_bytes": 2**20, "accumulator_bytes": 0})
    checked = {"kind": "correctness", "op": "x", "logprob_rms": 1e-5, "measured": True}
    checked |= {"gradient_error": 1e-3, "eager_gradient_error": 1e-3}
    return [*rows, checked, checked | {"op": "y", "logprob_rms": rms, "gradient_error": gradient * 1e-3}]


def test_goals_are_answered_from_measured_rows_alone(benchmarks_on_path):
    from gpu_suite_goals import goal_lines

    times = {"inverseq triton": 10.5, "cuBLAS, 3 GEMMs": 9.0, "quack-kernels": 10.0, "eager": 30.0}
    times |= {"inverseq torch": 20.0, "inverseq triton, stored logits": 9.5}  # no peers of our own
    lines = [line for line in goal_lines(measured_rows(times)) if not line.endswith("not measured")]
    answers = [line.split(": ")[-1].split(" (")[0] for line in lines]
    assert answers == ["met", "met", "met", "MISSED", "met", "met", "met"]
    assert lines[0] == "goal target 8192 x 32000 x 4096, TFLOP/s: 661 >= 600: met"
    assert lines[1] == "goal loss 8192 x 32000 x 4096, time over three bare GEMMs: 1.17 <= 1.25: met"
    assert "time over quack-kernels's: 1.05 <= 1: MISSED" in lines[3]
    worse = goal_lines(measured_rows(times | {"inverseq triton": 12.0}, beyond=2**30, rms=2e-4, gradient=2.5))
    assert sum("MISSED" in line for line in worse) == 5
    nothing = {"measured": False, "beyond_output_bytes": None}
    interpreted = [row | nothing for row in measured_rows(times)]
    assert all(line.endswith("not measured") for line in goal_lines(interpreted))


def test_the_contender_with_stored_logits_runs_them_and_leaves_the_choice_as_it_was(benchmarks_on_path):
    import torch
    from gpu_suite_contenders import STEMS, on_stored_logits
    from inverseq_kernels import triton_contrastive, triton_logprob, triton_loss

    modules = (triton_contrastive, triton_logprob, triton_loss)
    assert len(modules) == len(STEMS)

    def choices():
        return [module.choose_structure(90, torch.bfloat16, True) for module in modules]

    assert on_stored_logits(choices)() == ["logits"] * 3 and choices() == ["tiles"] * 3


def test_a_copy_without_git_takes_the_commit_that_it_is_told(tmp_path, benchmarks_on_path, monkeypatch):
    import gpu_suite_report

    assert gpu_suite_report.commit() != "unknown"
    monkeypatch.setattr(gpu_suite_report, "__file__", str(tmp_path / "gpu_suite_report.py"))
    monkeypatch.delenv("INVERSEQ_COMMIT", raising=False)
    assert gpu_suite_report.commit() == "unknown"
    monkeypatch.setenv("INVERSEQ_COMMIT", "1234abc")
    assert gpu_suite_report.commit() == "1234abc"
    monkeypatch.setenv("PATH", "")
    assert gpu_suite_report.commit() == "1234abc"


@pytest.mark.parametrize("workspace", [2**15, 45_000, 2**20])  # 45,000 just hold all rows of the loss
@pytest.mark.parametrize("op", ["squared_log_ratio_loss", "linear_logprob"])
def test_a_rows_accumulator_is_what_the_operation_takes(benchmarks_on_path, monkeypatch, op, workspace):
    import gpu_suite_timing
    import torch
    from gpu_suite_contenders import Shape, list_contenders, make_inputs
    from inverseq_kernels import backends, triton_logprob, triton_loss

    taken, shape = [], Shape(64, 300, 32)
    for module in (triton_logprob, triton_loss):

        class Spied(module._GradientSums):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                taken.append(self.weight.nbytes if self.weight.dtype == torch.float32 else 0)

        monkeypatch.setattr(module, "_GradientSums", Spied)
    monkeypatch.setattr(backends, "OTHER_WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(gpu_suite_timing, "CUDA_WORKSPACE_BYTES", workspace)
    ours, inputs = list_contenders(op, False)[0][0], make_inputs(shape, torch.bfloat16, "cpu")
    ours.backward(inputs, ours.forward(inputs))
    assert taken == [gpu_suite_timing.accumulator_bytes(shape, torch.bfloat16, op)]
    fits = workspace == 2**20 or (workspace == 45_000 and op == "squared_log_ratio_loss")
    assert taken == [0 if fits else 4 * 300 * 32]


def test_clocks_are_those_of_a_busy_device(tmp_path, benchmarks_on_path, monkeypatch):
    from gpu_suite_clock import clock_facts, sampled_clocks

    tool = tmp_path / "nvidia-smi"
    busy = [f"{rate}, 650.5, 60, 99" for rate in (1980, 1700, 1410, 1690, 1695)]
    lines = ["345, 70.1, 30, 0", *busy, "[N/A], 1, 1, 9", "17"]
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + "exec sleep 600\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "clocks.csv"
    with sampled_clocks(path):
        while not path.exists() or not path.read_text().endswith("17\n"):
            time.sleep(0.05)
    found = clock_facts(path)
    assert found == {"sm_mhz": 1695, "sm_mhz_p20": pytest.approx(1466), "power_w": 650.5, "temperature_c": 60}
    path.write_text("345, 70.1, 30, 0\n")
    assert clock_facts(path) == clock_facts(tmp_path / "absent.csv") == {}


def test_a_peer_that_fails_while_it_is_timed_costs_nobody_else_a_row(tmp_path, benchmarks_on_path, monkeypatch):
    import gpu_suite_contenders as contenders
    import torch
    from gpu_suite_clock import Clock
    from gpu_suite_report import Results
    from gpu_suite_timing import time_shape

    eager, calls = contenders.list_contenders(contenders.LOSS, False)[0][4], []

    def forward(inputs):
        calls.append(inputs)
        if len(calls) > 4:  # error, memory, warm-up, one round
            raise RuntimeError("a peer's own error")
        return eager.forward(inputs)

    peer = dataclasses.replace(eager, name="peer", forward=forward)
    monkeypatch.setattr(contenders, "list_contenders", lambda *_: ([peer, eager], []))
    results = Results(tmp_path, "command")
    time_shape(contenders.Shape(9, 130, 16), torch.float32, results, Clock(600.0), reps=3)
    rows = {row["contender"]: row for row in results.rows if row["phase"] == "together"}
    assert (rows["eager"]["reps"], rows["eager"]["failure"]) == (3, None)
    assert (rows["peer"]["reps"], rows["peer"]["failure"]) == (1, "RuntimeError: a peer's own error")
