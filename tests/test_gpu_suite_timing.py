"""The numbers of gpu_suite.py by hand: times, FLOPs, memory, errors and their truth, what passes, the table."""

import pathlib
import sys

import pytest
import torch

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
import gpu_suite_checks as checks  # noqa: E402
import gpu_suite_contenders as contenders  # noqa: E402
from gpu_suite_clock import Clock  # noqa: E402
from gpu_suite_contenders import LOGPROB, LOSS, OURS, TARGET, Contender, Shape  # noqa: E402
from gpu_suite_report import Results, table_lines  # noqa: E402
from gpu_suite_timing import time_shape  # noqa: E402

SHAPE = Shape(9, 130, 16, ops=(LOSS, TARGET))
GEMM = 2 * 9 * 130 * 16
GRADIENTS = 4 * 16 * (9 + 130)


class Machine(Clock):
    """A device on which contenders themselves say how long they take and how many bytes they hold at most."""

    def __init__(self):
        super().__init__(60.0)
        self.now_s, self.most = 0.0, 0

    def mark(self) -> float:
        return self.now_s

    def reset_memory(self) -> int:
        self.most = 7000
        return 7000

    def peak_bytes(self, before: int) -> int:
        return self.most - before

    def contender(self, name: str, op: str, *, rms: float = 0.0, gradient: float = 0.0) -> Contender:
        """Call n takes n ms and holds 10,000 bytes, its backward 100 n ms and 30,000; with errors of this size."""
        inputs = contenders.make_inputs(SHAPE, torch.float32, "cpu")
        truth, calls = contenders.make_truth(inputs, (op,)), []

        def forward(_inputs):
            calls.append(None)
            self.now_s += 1e-3 * len(calls)
            self.most = max(self.most, 17_000)
            return truth.logprobs[op] + rms * torch.tensor([2**0.5, 0.0]).repeat(5)[:9] * (9 / 10) ** 0.5

        def backward(inputs, _result):
            self.now_s += 1e-1 * len(calls)
            self.most = max(self.most, 37_000)
            inputs.hidden.grad = ((1 + gradient) * truth.hidden_gradient[op]).float()

        return Contender(name, op, op, forward, None if op == TARGET else backward, lambda result: result)


def test_a_rows_numbers_are_those_of_its_phase(tmp_path, monkeypatch):
    machine, results = Machine(), Results(tmp_path, "command")
    assert results.facts["measured"] is torch.cuda.is_available()

    def listed(op, _compiled):
        return [machine.contender(name, op, rms=0.25, gradient=0.5) for name in (OURS, "eager")], []

    monkeypatch.setattr(contenders, "list_contenders", listed)
    time_shape(SHAPE, torch.float32, results, machine, reps=5)
    rows = {(row["op"], row["contender"], row["phase"]): row for row in results.rows}
    assert len(rows) == len(results.rows) == 2 * (3 + 1)
    # Calls 1 to 3 measure error and memory and warm up; 4 to 8 are timed.
    for phase, factor in (("forward", 1), ("backward", 100), ("together", 101)):
        row = rows[LOSS, OURS, phase]
        assert row["reps"] == 5
        quantiles = [row[key] for key in ("ms", "ms_p20", "ms_p80")]
        assert quantiles == pytest.approx([6 * factor, 4.8 * factor, 7.2 * factor])
    flops = {phase: rows[LOSS, OURS, phase]["flops"] for phase in ("forward", "backward", "together")}
    assert flops == {"forward": GEMM, "backward": 2 * GEMM, "together": 3 * GEMM}
    target = rows[TARGET, OURS, "together"]
    assert (target["ms"], target["flops"]) == (pytest.approx(6), 2 * GEMM)
    assert rows[LOSS, OURS, "backward"]["peak_bytes"] is None
    # Our loss has its gradients from the forward on, others from their backward; vectors of two times 9 entries.
    for name, phase, peak, outputs in (
        (OURS, "forward", 10_000, 72 + GRADIENTS),
        (OURS, "together", 30_000, 72 + GRADIENTS),
        ("eager", "forward", 10_000, 72),
        ("eager", "together", 30_000, 72 + GRADIENTS),
    ):
        row = rows[LOSS, name, phase]
        assert (row["peak_bytes"], row["beyond_output_bytes"]) == (peak, peak - outputs)
    assert (target["peak_bytes"], target["beyond_output_bytes"]) == (10_000, 10_000 - 36)
    assert rows[LOSS, OURS, "together"]["error"] == pytest.approx(0.5, rel=1e-4)
    assert rows[LOSS, OURS, "together"]["logprob_rms"] == pytest.approx(0.25, rel=1e-4)
    assert target["error"] == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("rms", "gradient", "passed"), [(9e-5, 0.019, True), (1.1e-4, 0.019, False), (9e-5, 0.021, False)]
)
def test_an_operation_passes_with_small_errors_of_both_kinds(tmp_path, monkeypatch, rms, gradient, passed):
    machine, results = Machine(), Results(tmp_path, "command")
    pair = [
        machine.contender(OURS, LOGPROB, rms=rms, gradient=gradient),
        machine.contender("eager", LOGPROB, rms=1.0, gradient=0.01),
    ]
    monkeypatch.setattr(contenders, "list_contenders", lambda *_: (pair, []))
    checks.check_operation(LOGPROB, SHAPE, torch.float32, results, machine)
    [row] = results.rows
    assert row["passed"] is passed
    assert row["logprob_rms"] == pytest.approx(rms, rel=1e-3)
    assert row["gradient_error"] == pytest.approx(gradient, rel=1e-3)
    assert row["eager_gradient_error"] == pytest.approx(0.01, rel=1e-3)


def test_one_output_of_many_that_differs_fails_the_smoke_step(tmp_path, monkeypatch):
    results, outputs = Results(tmp_path, "command"), {"torch": [1.0, 2.0], "triton": [1.0, 2.0]}

    def run(*_arguments):
        return [torch.full((3,), value) for value in outputs[_arguments[-1]]]

    monkeypatch.setattr(checks, "_run_every_op", run)
    for value in (2.0, 2.001):
        outputs["triton"][1] = value
        checks.check_every_kernel((torch.float32, True), results, Clock(60.0))
    assert [row["passed"] for row in results.rows] == [True, False]


def test_the_truth_is_what_autograd_says(monkeypatch):
    monkeypatch.setattr(contenders, "TRUTH_WORDS", 50)  # three blocks
    inputs = contenders.make_inputs(SHAPE, torch.float32, "cpu", num_sampled=5)
    truth = contenders.make_truth(inputs, (LOSS, TARGET))
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight, rows, ids = inputs.weight.detach().double(), inputs.rows, inputs.token_ids[:, None]

    def logprobs(z):
        return z.log_softmax(1).gather(1, ids)[:, 0]

    own, plain = logprobs(hidden @ weight.t()), inputs.hidden_plain.double() @ weight.t()
    target = logprobs(contenders.ALPHA * (hidden @ weight.t()) + (1 - contenders.ALPHA) * plain)
    assert len(rows) == 5
    torch.testing.assert_close(truth.logprobs[LOSS], own[rows])
    torch.testing.assert_close(truth.logprobs[TARGET], target[rows])
    for computed, scalar in (
        (LOSS, (inputs.targets - own).square().mean()),
        (LOGPROB, (inputs.upstream * own).sum()),
        ("cross_entropy", -own.mean()),
    ):
        [gradient] = torch.autograd.grad(scalar, hidden, retain_graph=True)
        torch.testing.assert_close(truth.hidden_gradient[computed], gradient[rows])


def test_the_table_compares_with_bare_matmuls_of_the_same_shape():
    common = {"kind": "timing", "op": LOSS, "num_rows": 8, "num_words": 9, "phase": "together", "failure": None}
    common |= {"flops": 6e12, "peak_bytes": 3 * 2**20, "beyond_output_bytes": 2**21, "error": 0.03}
    rows = [
        common | {"contender": "cuBLAS, 3 GEMMs", "dim": 5, "ms": 40.0},
        common | {"contender": "cuBLAS, 3 GEMMs", "dim": 4, "ms": 10.0},
        common | {"contender": OURS, "dim": 4, "ms": 12.5},
        common | {"contender": "lost", "dim": 4, "ms": None, "failure": "out of memory"},
    ]
    *_, ours, lost = (line.split() for line in table_lines(rows))
    assert ours[-7:] == ["together", "12.500", "1.25", "480", "3", "2", "3.0e-02"]
    assert lost[-9:] == ["together", "-", "-", "-", "3", "2", "out", "of", "memory"]


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_row_is_the_exit_status(tmp_path, monkeypatch, passed):
    def add(_arguments, results, _clock):
        results.add(kind="smoke", op="x", passed=True, detail="")
        results.add(kind="tests", op="pytest", passed=passed, detail="")

    monkeypatch.setattr(gpu_suite, "run_steps", add)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--smoke", "--out", str(tmp_path)])
    assert gpu_suite.main() == (0 if passed else 1)


def test_peak_memory_of_a_device_is_what_came_on_top(monkeypatch):
    forgotten = []
    for name, value in (("is_available", True), ("memory_allocated", 300), ("max_memory_allocated", 1000)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: forgotten.append(True))
    clock = Clock(1.0)
    assert clock.peak_bytes(clock.reset_memory()) == 700 and forgotten
