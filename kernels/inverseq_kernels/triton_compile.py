"""Compilation of the Triton kernels without a GPU, for benchmarks/kernel_report.py and its gate.

Each ``triton_*.py`` file with kernels lists in ``compile_cases`` the configurations that its launchers can choose.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from inverseq_kernels.triton_blocks import Blocks
from inverseq_kernels.triton_common import combine_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CompileCase:
    """One kernel configuration that a launcher can choose, described for compilation without a GPU."""

    kernel: Any  # triton JITFunction
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    is_gemm: bool  # whether tensor-core instructions are expected: no for fp32, which must not use tf32
    divisible: tuple[str, ...] = field(default=())  # arguments that are multiples of 16 when launched


def compile_case(
    kernel: Any,
    name: str,
    *,
    pointers: dict[str, str],
    floats: tuple[str, ...],
    constexprs: dict[str, Any],
    blocks: Blocks,
    is_gemm: bool,
    divisible: tuple[str, ...] = (),
) -> CompileCase:
    """Describe a launch: pointer types by name, fp32 numbers, constants; every other argument is an int32."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        else:
            signature[argument] = pointers.get(argument, "fp32" if argument in floats else "i32")
    unknown = (set(pointers) | set(floats) | set(constexprs) | set(divisible)) - set(kernel.arg_names)
    assert not unknown, f"{name}: no such arguments {sorted(unknown)}"
    return CompileCase(kernel, name, signature, constexprs, blocks.num_warps, blocks.num_stages, is_gemm, divisible)


def compile_offline(case: CompileCase, capability: int) -> Any:
    """Compile one case for sm_<capability> without a GPU, as a launch on 16-byte aligned tensors would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Written as a launch writes them, constants too from triton 3.7 on: then it finds this in triton's cache.
    writes_constants = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
    attributes = {}
    for index, name in enumerate(case.kernel.arg_names):
        if case.signature[name] == "constexpr" and writes_constants:
            attributes[(index,)] = []
        elif case.signature[name][0] == "*":
            anywhere = name in case.kernel.do_not_specialize_on_alignment
            attributes[(index,)] = [] if anywhere else [["tt.divisibility", 16]]
        elif name in case.divisible and name not in case.kernel.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constexprs,
        attrs=attributes,
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def combine_case(operation: str, *, write_lse: bool, has_moment: bool, partial: bool = False) -> CompileCase:
    """The combine kernel as one operation launches it."""
    pointers = {name: "*fp32" for name in ("maxima", "totals", "labels", "logprobs")}
    pointers["token_ids"] = "*i64"
    constexprs = {"ROWS": 64, "TILES": 32, "WRITE_LSE": write_lse, "HAS_MOMENT": has_moment, "PARTIAL": partial}
    for name, wanted in (("moments", has_moment), ("lse", write_lse), ("entropy", has_moment)):
        if wanted:
            pointers[name] = "*fp32"
        else:
            constexprs[name] = None
    return compile_case(
        combine_kernel,
        f"combine {operation}{' entropy' if has_moment else ''}{' partial' if partial else ''}",
        pointers=pointers,
        floats=(),
        constexprs=constexprs,
        blocks=Blocks(64, 32, 0, num_warps=4, num_stages=3),
        is_gemm=False,
    )
