"""Compiles every launch that the operations make, specialised as triton does it at the launch, without a GPU.

    PYTHONPATH=.:kernels python benchmarks/kernel_launches.py [--sm 90] [--jobs 2] [--case 0]

kernel_report.py compiles what the kernels declare; a launch also turns integers that are 1 into constants and tells the
compiler which integers and addresses are multiples of 16. Here the operations themselves run, on CPU tensors, with a
driver that knows the chip and launches nothing. What is compiled lands in triton's cache: on a machine with the GPU the
first launches then find it there, and many processors have shared the work. Exit status 1 where a launch does not
compile, spills, or takes more shared memory than the chip has.
"""

import os

# The interpreter would replace the kernels that are to be compiled; triton reads this when it decorates them.
os.environ.pop("TRITON_INTERPRET", None)

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import multiprocessing  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import inverseq_kernels  # noqa: E402
import torch  # noqa: E402
from inverseq_kernels import backends, triton_contrastive, triton_logprob, triton_loss, triton_stored  # noqa: E402
from kernel_report import SHARED_MEMORY_LIMIT, resource_usage  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

LAUNCH = JITFunction.run


@dataclass(frozen=True)
class Case:
    """One problem; what a launch is compiled for depends on sizes through divisibility by 16 and being 1."""

    num_rows: int
    num_words: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    has_bias: bool = False
    softcap: float | None = None
    num_padding: int = 0  # words that do not exist
    workspace_bytes: int | None = None
    shift: int = 0  # elements by which the matrices miss a 16-byte boundary


# The cheapest first; then gpu_suite's smoke step, its shapes, and those of the GPU tests.
CASES = (
    Case(1, 1, 1),
    Case(1, 150, 33, softcap=5.0),
    Case(37, 260, 64, torch.float16),
    Case(37, 150, 33, torch.float32, True, 5.0, 3),
    Case(37, 260, 64),
    Case(37, 150, 33, has_bias=True, softcap=5.0, num_padding=3),
    Case(256, 512, 2048),
    Case(256, 512, 576),
    Case(256, 512, 2048, softcap=5.0),
    Case(256, 512, 2048, has_bias=True, softcap=5.0, num_padding=3),
    Case(300, 700, 2048, has_bias=True, num_padding=7, workspace_bytes=2**16),
    Case(700, 5000, 256, has_bias=True, num_padding=7, workspace_bytes=2**20),
    Case(700, 5000, 256, has_bias=True, softcap=6.0, num_padding=7, workspace_bytes=2**20),
    Case(300, 1030, 80, has_bias=True, num_padding=7, workspace_bytes=2**20),
    Case(300, 1030, 80, has_bias=True, softcap=6.0, num_padding=7, workspace_bytes=2**20),
    Case(130, 515, 33, has_bias=True, num_padding=7, workspace_bytes=2**20),
    Case(130, 515, 33, has_bias=True, softcap=6.0, num_padding=7, workspace_bytes=2**20),
    Case(300, 700, 512, shift=1),
)


class OfflineDriver:
    """What triton's launcher asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_launches(case: Case, capability: int) -> tuple[int, list[str]]:
    """Run every operation on a case; distinct kernels compiled, and what is wrong with them. Runs in a worker."""
    kernels, problems = {}, []

    def compile_only(self, *args, grid, warmup, **options):
        assert all(0 < size for size in grid) and all(size < 65536 for size in grid[1:]), f"{self.fn.__name__} {grid}"
        try:
            kernel = LAUNCH(self, *args, grid=grid, warmup=True, **options)
            kernels[id(kernel)] = kernel
        except Exception as error:  # whatever the compiler says is the finding
            problems.append(f"{self.fn.__name__} {case}: {type(error).__name__}: {str(error)[:200]}")

    driver.set_active(OfflineDriver(capability))
    JITFunction.run = compile_only
    for module in (triton_contrastive, triton_logprob, triton_loss, triton_stored):
        module.capability_of = lambda tensor: capability
    backends._triton_obstacle = lambda stem, hidden: None
    run_every_operation(case)
    for kernel in kernels.values():
        _, stack = resource_usage(kernel)
        if stack:
            problems.append(f"{kernel.metadata.name} {case}: spills, {stack} bytes of stack")
        if kernel.metadata.shared > SHARED_MEMORY_LIMIT[capability]:
            problems.append(f"{kernel.metadata.name} {case}: shared memory {kernel.metadata.shared}")
    return len(kernels), problems


def run_every_operation(case: Case) -> None:
    """Forward and backward of all operations, with one alpha, one a row, and several."""

    def matrix(*size: int) -> torch.Tensor:
        count = torch.Size(size).numel()
        return torch.zeros(count + case.shift, dtype=case.dtype)[case.shift :].view(size)

    hidden, plain, weight = (matrix(rows, case.dim) for rows in (case.num_rows, case.num_rows, case.num_words))
    bias = torch.zeros(case.num_words, dtype=case.dtype) if case.has_bias else None
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    ids, vector = torch.zeros(case.num_rows, dtype=torch.int64), torch.ones(case.num_rows)
    options = {
        "softcap": case.softcap,
        "num_valid_vocab": case.num_words - case.num_padding,
        "workspace_bytes": case.workspace_bytes,
        "backend": "triton",
    }
    heads = (hidden, weight, plain, weight, ids)
    for alpha in (1.4, 1.4 * vector):
        inverseq_kernels.contrastive_logprob(*heads, alpha, bias_w=bias, bias_l=bias, **options)
    inverseq_kernels.contrastive_logprob_sweep(*heads, alphas=[0.0, 1.0, 1.4], bias_w=bias, bias_l=bias, **options)
    logprobs, entropy = inverseq_kernels.linear_logprob(
        hidden, weight, ids, bias=bias, return_entropy=True, **options
    )
    torch.autograd.grad((logprobs + entropy).sum(), leaves)
    torch.autograd.grad(inverseq_kernels.linear_logprob(hidden, weight, ids, bias=bias, **options).sum(), leaves)
    for rows in (hidden, hidden.detach()):
        loss, _ = inverseq_kernels.squared_log_ratio_loss(
            rows, weight, ids, vector, denominator=3.0, bias=bias, **options
        )
        loss.backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, choices=sorted(SHARED_MEMORY_LIMIT), default=90, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: %(default)s)")
    parser.add_argument("--case", type=int, action="append", help="only these lines of the table (default: all)")
    arguments = parser.parse_args()
    cases = CASES if arguments.case is None else [CASES[index] for index in arguments.case]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        found = list(pool.map(compile_launches, cases, [arguments.sm] * len(cases)))
    problems = sorted({problem for _, of_case in found for problem in of_case})
    for problem in problems:
        print(f"GATE {problem}")
    count = sum(count for count, _ in found)
    print(f"sm_{arguments.sm}: {count} kernels of {len(cases)} cases, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
