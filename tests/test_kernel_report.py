"""The offline gate: every kernel compiles for sm_80 and sm_90 within its limits, and the gate can be red."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import inverseq_kernels  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]

PLANTED = """
import triton
import triton.language as tl
from inverseq_kernels.triton_blocks import Blocks
from inverseq_kernels.triton_compile import compile_case


@triton.jit
def large_kernel(left, right, out, stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, DIM)
    at = (tl.program_id(0) * ROWS + rows) * stride
    sums = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    for start in range(0, stride, DIM):
        a = tl.load(left + at[:, None] + start + columns[None, :])
        b = tl.load(right + at[None, :] + start + columns[:, None])
        sums = tl.dot(a, b, sums)
    tl.store(out + at[:, None] + rows[None, :], tl.exp2(sums) * tl.sum(sums, axis=1)[:, None])


@triton.jit
def forgotten_kernel(out):
    tl.store(out, 1.0)


def compile_cases(capability, dtypes):
    pointers = {"left": "*bf16", "right": "*bf16", "out": "*fp32"}
    constexprs = {"ROWS": 128, "DIM": 16}
    return [
        compile_case(
            large_kernel, "planted", pointers=pointers, floats=(), constexprs=constexprs,
            blocks=Blocks(128, 128, 16, num_warps=2, num_stages=2), is_gemm=True,
        )
    ]
"""


def run_report(*arguments, extra_path=""):
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{extra_path}")
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_report.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The bf16 report of this checkout, made once: exit status, output and rows."""
    folder = tmp_path_factory.mktemp("report")
    result = run_report("--out", str(folder))
    assert (folder / "kernel_report.json").exists(), result.stderr
    return result, json.loads((folder / "kernel_report.json").read_text())["rows"]


def test_every_kernel_compiles_for_both_chips_within_the_limits(report):
    result, rows = report
    assert result.returncode == 0, result.stdout[-3000:]
    assert {row["sm"] for row in rows} == {80, 90}
    for row in rows:
        assert row["spills"] == row["stack"] == 0 and not row["int32_products"]
        assert row["shared"] <= {80: 163, 90: 227}[row["sm"]] * 1024
        assert not row["is_gemm"] or row[{80: "HMMA", 90: "HGMMA"}[row["sm"]]] > 0


def test_tiles_for_short_widths_leave_room_for_a_second_program(report):
    """What they are chosen for: its products run while the first one's rows are worked on."""
    short = [row for row in report[1] if "short" in row["case"] and "ragged" not in row["case"]]
    assert {(row["sm"], row["kernel"].removesuffix("_kernel")) for row in short} == {
        (sm, kernel) for sm in (80, 90) for kernel in ("exponential", "statistics", "gradient")
    }
    for row in short:
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536
        assert 2 * row["shared"] <= {80: 163, 90: 227}[row["sm"]] * 1024


def test_every_kernel_that_an_operation_launches_is_in_the_table(report, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("launches are recorded in the interpreter")
    from triton.runtime.interpreter import InterpretedFunction

    launched, run = set(), InterpretedFunction.run

    def record(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    for dtype in (torch.float32, torch.bfloat16):  # stored logits, tiles
        launch_every_operation(dtype)
    assert launched <= {row["kernel"] for row in report[1]}
    assert len(launched) >= 13


def launch_every_operation(dtype):
    hidden, weight, bias = (torch.randn(*size).to(dtype) for size in ((3, 16), (20, 16), (20,)))
    ids, targets = torch.tensor([1, -100, 19]), torch.zeros(3)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    common = {"backend": "triton"}
    inverseq_kernels.contrastive_logprob(hidden, weight, hidden, weight, ids, 1.4, **common)
    inverseq_kernels.contrastive_logprob_sweep(hidden, weight, hidden, weight, ids, alphas=[0.5, 2.0], **common)
    logprobs, entropy = inverseq_kernels.linear_logprob(hidden, weight, ids, bias=bias, return_entropy=True, **common)
    (logprobs.sum() + entropy.sum()).backward()
    inverseq_kernels.linear_logprob(hidden, weight, ids, **common).sum().backward()
    loss, _ = inverseq_kernels.squared_log_ratio_loss(
        hidden, weight, ids, targets, bias=bias, denominator=2.0, **common
    )
    loss.backward()


def test_the_gate_is_red_on_a_spill_a_32_bit_address_and_a_forgotten_kernel(tmp_path):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "triton_planted.py").write_text(PLANTED)
    result = run_report("--package", "planted", "--jobs", "1", extra_path=str(tmp_path))
    assert result.returncode == 1, result.stderr
    assert "GATE sm_80 planted: spills" in result.stdout
    assert "32-bit products in addresses" in result.stdout
    assert "GATE planted.triton_planted.forgotten_kernel is in no compile case" in result.stdout
    assert "large_kernel is in no compile case" not in result.stdout


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shared": 164 * 1024}, "shared memory"),
        ({"HMMA": 0}, "no HMMA"),
        ({"stack": 8}, "spills"),
        ({"spills": 1}, "spills"),
    ],
)
def test_each_limit_is_checked(change, words):
    code = (
        "import json, sys; sys.path.insert(0, 'benchmarks'); import kernel_report;"
        "print(json.dumps(kernel_report.row_problems(json.loads(sys.argv[1]))))"
    )
    row = {"sm": 80, "spills": 0, "stack": 0, "shared": 1, "is_gemm": True, "HMMA": 4, "HGMMA": 0}
    row["int32_products"] = []
    results = []
    for one in (row, row | change):
        output = subprocess.run(
            [sys.executable, "-c", code, json.dumps(one)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        results.append(json.loads(output.stdout))
    assert results[0] == [] and len(results[1]) == 1 and words in results[1][0]
