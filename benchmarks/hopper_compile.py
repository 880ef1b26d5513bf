"""Compilation of hopper_kernels.py for sm_90 without a GPU, as hopper_launch.py would start them."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

try:
    from benchmarks.hopper_launch import Setup
except ImportError:  # run as a script
    from hopper_launch import Setup

KERNELS = ("hopper_statistics_kernel", "hopper_contrast_kernel", "hopper_exponential_kernel")
FP32_POINTERS = frozenset({"maxima", "totals", "labels", "alphas"})


def compile_hopper(name: str, setup: Setup) -> Any:
    """Compile one kernel on bf16 matrices whose widths are multiples of 16."""
    kernel = getattr(setup.kernels, name)
    constants = {"STAGES": setup.stages, "GROUP_ROWS": setup.group_rows}
    signature = {argument: _type_of(argument, setup, constants) for argument in kernel.arg_names}
    divisible = [
        (index,)
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument][0] == "*" or argument.startswith("dim")
    ]
    attributes = {place: [["tt.divisibility", 16]] for place in divisible}
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def _type_of(argument: str, setup: Setup, constants: dict[str, int]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in FP32_POINTERS:
        return "*fp32"
    blocks = {"hidden": [setup.half, setup.dim], "weight": [setup.words, setup.dim]}
    blocks["exponentials"] = [setup.half, setup.words // 4]
    block = blocks.get(argument.split("_")[0])
    if block is not None:
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return f"tensordesc<bf16{block},{layout!r}>"
    return {"token_ids": "*i64", "inverse_temperature": "fp32"}.get(argument, "i32")
