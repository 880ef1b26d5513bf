"""The package by itself: tracing, sharded heads, a copied folder, and a machine without triton."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inverseq_kernels
import pytest
import torch
import torch.distributed as dist
from inverseq_kernels import (
    backends,
    contrastive_logprob,
    contrastive_logprob_sweep,
    linear_logprob,
    squared_log_ratio_loss,
)

from tests import kernels_oracle as oracle

PACKAGE = Path(inverseq_kernels.__file__).parent
OPS = torch.ops.inverseq_kernels


def op_arguments(num_rows: int, backend: str = "torch"):
    """Arguments of every custom operation with several chunks, softcap, bias and an ignored row."""
    problem = oracle.make_problem(num_rows, 6, 19, ignored=(0,) if num_rows else ())
    hidden, weight, bias = problem.leaves
    rows, column = torch.randn(num_rows), torch.ones(2, 1)
    settings = (2.5, 0.8, 17)
    problem.token_ids.clamp_(max=16)
    detached = [tensor.detach() for tensor in problem.leaves]
    return {
        "linear_logprob": (hidden, weight, bias, problem.token_ids, *settings, True, 3000, backend),
        "linear_logprob_backward": (
            rows, rows, *detached, problem.token_ids, rows, rows, *settings, [True, False, True], 3000, backend,
        ),
        "squared_log_ratio": (
            hidden, weight, bias, problem.token_ids, rows, rows.abs(), *settings, [True] * 3, 3000, backend,
        ),
        "contrastive_logprob": (
            *detached, detached[0], detached[1], None, problem.token_ids, column, *settings, 3000, backend,
        ),
    }  # fmt: skip


@pytest.mark.parametrize(("num_rows", "backend"), [(0, "torch"), (40, "torch"), (40, "triton")])
@pytest.mark.parametrize("name", list(op_arguments(1)))
def test_custom_operations_pass_opcheck(name, num_rows, backend):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need triton's interpreter")
    torch.library.opcheck(getattr(OPS, name).default, op_arguments(num_rows, backend)[name])


def test_every_custom_operation_of_the_package_is_opchecked():
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("inverseq_kernels::")}  # fmt: skip
    assert {name for name in registered if "triton" not in name} == set(op_arguments(1))


def test_compiled_caller_has_no_graph_break_and_equal_gradients():
    def step(hidden, weight, bias, token_ids, targets):
        loss, logprobs = squared_log_ratio_loss(
            hidden * 2, weight, token_ids, targets, denominator=3, bias=bias, loss_mask=targets > 0
        )
        other, entropy = linear_logprob(hidden, weight, token_ids, bias=bias, return_entropy=True)
        heads = (hidden, weight, hidden * 2, weight, token_ids)
        target = contrastive_logprob(*heads, 1.4)
        sweep, reference = contrastive_logprob_sweep(*heads, alphas=[1.0, 1.4], return_reference=True)
        return loss * 2 + (other * target).sum() + entropy.mean() + logprobs.sum() + (sweep - reference).sum()

    problem = oracle.make_problem(7, 5, 11, ignored=(2,))
    inputs = (*problem.leaves, problem.token_ids, torch.randn(7))
    eager = step(*inputs)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(traced, eager)
    for actual, expected in zip(
        torch.autograd.grad(traced, problem.leaves), torch.autograd.grad(eager, problem.leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_numbers_that_change_from_call_to_call_break_no_compiled_caller():
    """Tokens of a step, and so its denominator, are another number every time."""

    def step(hidden, weight, token_ids, denominator, alpha, temperature):
        targets = contrastive_logprob(hidden, weight, hidden * 2, weight, token_ids, alpha)
        loss, _ = squared_log_ratio_loss(hidden, weight, token_ids, targets, denominator=denominator)
        return loss + linear_logprob(hidden, weight, token_ids, temperature=temperature).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_rows, alpha, temperature in ((5, 1.4, 1.0), (7, 1.3, 0.9), (9, 1.2, 0.8)):
        problem = oracle.make_problem(num_rows, 5, 11)
        arguments = (problem.hidden, problem.weight, problem.token_ids, num_rows - 1, alpha, temperature)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_sharded_head_raises_a_clear_error_and_its_full_tensor_works():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        problem = oracle.make_problem(4, 3, 6)
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(problem.weight.detach(), mesh, [Shard(0)])
        head = (problem.hidden, sharded, problem.token_ids)
        with pytest.raises(ValueError, match="weight is a DTensor.*full_tensor"):
            linear_logprob(*head)
        with pytest.raises(ValueError, match="weight is a DTensor"):
            squared_log_ratio_loss(*head, torch.zeros(4), denominator=1)
        with pytest.raises(ValueError, match="weight_l is a DTensor"):
            contrastive_logprob(problem.hidden, problem.weight, *head, 1.4)
        full = linear_logprob(problem.hidden, sharded.full_tensor(), problem.token_ids)
        assert torch.equal(full, linear_logprob(problem.hidden, problem.weight, problem.token_ids))
    finally:
        dist.destroy_process_group()


def test_package_imports_only_torch_triton_and_the_standard_library():
    allowed = sys.stdlib_module_names | {"torch", "triton", "inverseq_kernels"}
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name} imports relatively"
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


STANDALONE = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
if {without_triton}:
    sys.meta_path.insert(0, NoTriton())
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch
import inverseq_kernels as k
assert k.__file__.startswith({folder!r}), k.__file__
hidden = torch.randn(4, 3, requires_grad=True); weight = torch.randn(5, 3, requires_grad=True)
ids = torch.tensor([0, 4, -100, 2])
targets = k.contrastive_logprob(hidden, weight, hidden, weight, ids, 1.4)
loss, _ = k.squared_log_ratio_loss(hidden, weight, ids, targets, denominator=3)
(loss + k.linear_logprob(hidden, weight, ids).sum()).backward()
assert weight.grad.isfinite().all()
assert not any(name == "inverseq" or name.startswith("inverseq.") for name in sys.modules)
if {without_triton}:
    assert "triton" not in sys.modules
    try:
        k.linear_logprob(hidden, weight, ids, backend="triton")
    except ValueError as error:
        assert "triton is not installed" in str(error), error
    else:
        raise AssertionError("backend='triton' must raise")
print("works alone")
"""


@pytest.mark.parametrize("without_triton", [False, True])
def test_copied_folder_works_alone_also_without_triton(tmp_path, without_triton):
    shutil.copytree(PACKAGE, tmp_path / "inverseq_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", STANDALONE.format(folder=str(tmp_path), without_triton=without_triton)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "works alone" in result.stdout, result.stderr


def readme_text() -> str:
    return (PACKAGE.parent / "README.md").read_text()


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme_text(), flags=re.DOTALL)


def test_readme_examples_run_and_their_after_equals_their_before():
    better, plain = (
        oracle.make_problem(12, 6, 17, bias=False),
        oracle.make_problem(12, 6, 17, bias=False, seed=1),
    )
    names = {name: getattr(inverseq_kernels, name) for name in inverseq_kernels.__all__}
    names |= {"torch": torch, "F": torch.nn.functional, "targets": torch.zeros(12), "num_tokens": 12}
    names |= {"hidden": better.hidden, "weight": better.weight, "token_ids": better.token_ids}
    names |= {"hidden_w": better.hidden, "weight_w": better.weight}
    names |= {"hidden_l": plain.hidden, "weight_l": plain.weight}
    for block in readme_blocks():
        exec(block, names)
    sequence, vector = torch.arange(12) % 4, torch.randn(12)
    heads = (better.hidden, better.weight, plain.hidden, plain.weight, better.token_ids)
    arguments = {
        "dpo": (*heads, sequence, 2),
        "grpo": (better.hidden, better.weight, better.token_ids, -3 + vector / 10, vector),
        "distillation": heads,
    }
    assert {name.removesuffix("_loss_after") for name in names if name.endswith("_after")} == set(arguments)
    for name, values in arguments.items():
        before, after = (names[f"{name}_loss_{when}"](*values) for when in ("before", "after"))
        torch.testing.assert_close(after, before)
        leaves = (better.hidden, better.weight)
        for actual, expected in zip(
            torch.autograd.grad(after, leaves), torch.autograd.grad(before, leaves), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_readme_says_never_exactly_for_the_paths_that_warn():
    rows = re.findall(r"^\| (torch|triton) \| (CUDA)[^|]*\| never \|", readme_text(), flags=re.MULTILINE)
    assert {(backend, device.lower()) for backend, device in rows} == backends.NEVER_VERIFIED
