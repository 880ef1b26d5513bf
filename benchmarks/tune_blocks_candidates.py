"""What tune_blocks.py tries, most promising first: both structures, their sizes; what compiling tiles shows."""

import dataclasses
import itertools
from dataclasses import dataclass

from inverseq_kernels import triton_contrast, triton_exponentials, triton_logits
from inverseq_kernels.triton_blocks import (
    CONTRAST,
    GRADIENT,
    LOGITS,
    STATISTICS,
    TILES,
    Blocks,
    choose_blocks,
    choose_logit_blocks,
    choose_loss_blocks,
    is_hopper_like,
)
from inverseq_kernels.triton_compile import CompileCase, compile_offline

LOSS, TARGET, LOGPROB, LOGPROB_BACKWARD = "loss", "target", "logprob", "logprob_backward"
OPS = (LOSS, TARGET, LOGPROB, LOGPROB_BACKWARD)
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
VALUES = {
    "rows": (64, 128, 256),
    "words": (64, 128, 256),
    "dim": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "group_rows": (4, 8, 16, 32),
    "tma": (False, True),
}
MOST_CHANGES = 3  # settings in which a candidate differs from the chooser's choice
MOST_ACCUMULATORS = 128  # fp32 registers of a thread that hold the tile; more would spill


@dataclass(frozen=True)
class Candidate:
    """A structure and its sizes, as the launchers take them."""

    structure: str
    blocks: Blocks


@dataclass(frozen=True)
class Compiled:
    """What came out of compiling a candidate, and why it is left out; "" where it is tried."""

    registers: int
    stack: int
    shared: int
    refused: str


def chosen(op: str, capability: int, dim: int) -> Candidate:
    """What the package's own choosers take for bf16 and aligned matrices."""
    if op == LOSS:
        return Candidate(TILES, choose_loss_blocks(capability, False, dim))
    family = {TARGET: CONTRAST, LOGPROB: STATISTICS, LOGPROB_BACKWARD: GRADIENT}[op]
    return Candidate(TILES, choose_blocks(family, capability, dim))


def list_candidates(op: str, capability: int, dim: int, limit: int) -> list[Candidate]:
    """The choosers' choice, stored logits, then the choice's neighbours among tiles.

    Of the neighbours those with fewer changed settings come first, larger tiles first among equals.
    """
    first, rows = chosen(op, capability, dim), choose_logit_blocks(capability)
    if capability == 0:  # the interpreter knows no hardware: one of each shows that the choice reaches the launch
        others = [Candidate(LOGITS, rows), Candidate(TILES, dataclasses.replace(first.blocks, rows=16, words=64))]
        return [first, *others][:limit]
    stored = [rows, *(dataclasses.replace(rows, words=rows.words // 2, num_warps=warps) for warps in (4, 8))]
    names = list(VALUES)
    found = []
    for values in itertools.product(*VALUES.values()):
        blocks = Blocks(**dict(zip(names, values, strict=True)))
        if blocks != first.blocks and _can_fit(blocks, capability):
            changes = sum(getattr(blocks, name) != getattr(first.blocks, name) for name in names)
            # The order in which row blocks walk matters least, and with it alone the kernel need not be compiled anew.
            walks = blocks.group_rows != first.blocks.group_rows
            found.append((changes, walks, -blocks.rows * blocks.words, blocks))
    ranked = sorted((entry for entry in found if entry[0] <= MOST_CHANGES), key=lambda entry: entry[:3])
    tiles = [Candidate(TILES, blocks) for *_, blocks in ranked]
    return [first, *(Candidate(LOGITS, blocks) for blocks in stored), *tiles][:limit]


def _can_fit(blocks: Blocks, capability: int) -> bool:
    accumulators = blocks.rows * blocks.words / (32 * blocks.num_warps)
    shared = 2 * (blocks.rows + blocks.words) * blocks.dim * blocks.num_stages
    limit = SHARED_MEMORY_LIMIT.get(capability, SHARED_MEMORY_LIMIT[80])
    return accumulators <= MOST_ACCUMULATORS and shared <= limit and (not blocks.tma or is_hopper_like(capability))


def compile_case(op: str, blocks: Blocks, capability: int, dim: int) -> CompileCase:
    """The kernel of an operation with these blocks, as a launch on multiples of 16 compiles it."""
    module, kernel = {
        LOSS: (triton_exponentials, "exponential_kernel"),
        TARGET: (triton_contrast, "contrast_kernel"),
        LOGPROB: (triton_logits, "statistics_kernel"),
        LOGPROB_BACKWARD: (triton_logits, "gradient_kernel"),
    }[op]
    case = next(
        case
        for case in module.compile_cases(capability, ["bf16"])
        if case.kernel.fn.__name__ == kernel and case.constexprs["EVEN_DIM"] and not _has_features(case)
    )
    sizes, even = {"ROWS": blocks.rows, "WORDS": blocks.words, "DIM": blocks.dim}, dim % blocks.dim == 0
    signature = dict(case.signature)
    for name in signature:
        if name.startswith(("hidden", "weight")):
            lines = blocks.rows if name.startswith("hidden") else blocks.words
            signature[name] = f"tensordesc<bf16[{lines}, {blocks.dim}]>" if blocks.tma else "*bf16"
    return dataclasses.replace(
        case,
        name=f"{op} {blocks}",
        signature=signature,
        constexprs=case.constexprs | sizes | {"GROUP_ROWS": blocks.group_rows, "TMA": blocks.tma, "EVEN_DIM": even},
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        divisible=tuple(name for name, kind in signature.items() if kind == "i32"),
    )


def _has_features(case: CompileCase) -> bool:
    return any(value is True for name, value in case.constexprs.items() if name.startswith("HAS_"))


def compile_candidate(op: str, candidate: Candidate, capability: int, dim: int) -> Compiled:
    """Compile one candidate's tiles for sm_<capability>; runs in a worker process, without a GPU.

    Row kernels on stored logits are small and compile at their first launch.
    """
    from kernel_report import resource_usage

    if candidate.structure == LOGITS:
        return Compiled(0, 0, 0, "")
    try:
        compiled = compile_offline(compile_case(op, candidate.blocks, capability, dim), capability)
    except Exception as error:  # the compiler may refuse a tile in many ways; the row says how
        return Compiled(0, 0, 0, f"does not compile: {type(error).__name__}: {str(error)[:120]}")
    registers, stack = resource_usage(compiled)
    shared, limit = compiled.metadata.shared, SHARED_MEMORY_LIMIT.get(capability, SHARED_MEMORY_LIMIT[80])
    refused = f"spills: {stack} bytes of stack" if stack else ""
    if shared > limit:
        refused = f"shared memory {shared} > {limit}"
    return Compiled(registers, stack, shared, refused)
