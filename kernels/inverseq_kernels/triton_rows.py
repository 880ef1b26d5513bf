"""Row work of the squared log-ratio loss, elementwise on the [R, V] exponentials of triton_exponentials.py.

The names E, G, S and the offsets are explained there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from inverseq_kernels.triton_blocks import SHORT_DIM, Blocks, choose_loss_blocks
from inverseq_kernels.triton_common import ANY_ROWS, EMPTY_MAX, LOG2_E
from inverseq_kernels.triton_compile import CompileCase, compile_case

# The elementwise kernels run with triton's own number of warps and stages.
DEFAULT_OPTIONS = Blocks(0, 0, 0, num_warps=4, num_stages=3)

# Exponent that fp16 gives the largest number: 2**15 is the last power of two below its overflow.
HALF_TOP = tl.constexpr(15)


@dataclass(frozen=True)
class RowBlocks:
    """Block sizes of the elementwise kernels: rows and columns of a program."""

    factor_rows: int
    gradient_rows: int
    gradient_words: int
    scale_rows: int
    scale_columns: int
    sum_rows: int
    sum_words: int


def choose_row_blocks(capability: int) -> RowBlocks:
    """Few large programs in the interpreter; on a GPU one row each where rows decide what is written."""
    if capability == 0:
        return RowBlocks(256, 32, 4096, 64, 1024, 64, 4096)
    return RowBlocks(128, 1, 4096, 1, 2048, 32, 128)


@triton.jit
def power_offset(logit, TIGHT: tl.constexpr):
    """Exponent o such that exp(logit) * 2**-o is in (2**14, 2**15] when tight and in 2**[-64, 64] otherwise."""
    bits = logit * LOG2_E
    if TIGHT:
        offset = tl.ceil(bits) - HALF_TOP
    else:
        offset = tl.floor(bits * 0.0078125 + 0.5) * 128.0
    return tl.where(logit > EMPTY_MAX, offset, 0.0)


@triton.jit(**ANY_ROWS)
def row_factor_kernel(
    logprobs,  # [R] fp32
    lse,  # [R] fp32
    labels,  # [R] fp32
    targets,  # [R] fp32
    row_weights,  # [R] fp32
    scale,  # [1] fp32, multiplies every coefficient
    undo_scale,  # [1] fp32, multiplies hidden's gradient once more
    weight_factors,  # [R] fp32 out: what hidden's rows are multiplied by for the weight's gradient
    hidden_factors,  # [R] fp32 out: what the rows of G @ weight are multiplied by
    entries,  # [R] fp32 out: G at the row's token
    offsets,  # [R] fp32 out
    num_rows,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    TIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per row: dL/d(raw z) = factor * G with factor = -2 m (l - t) / (S T); 0 where the row does not count."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    weight = tl.load(row_weights + rows, mask=mask, other=0.0)
    active = weight > 0.0
    logprob = tl.load(logprobs + rows, mask=active, other=0.0)
    target = tl.load(targets + rows, mask=active, other=0.0)
    log_total = tl.load(lse + rows, mask=active, other=0.0)
    offset = power_offset(log_total, TIGHT)
    total = tl.exp2(log_total * LOG2_E - offset)
    entry = total * (tl.exp2(logprob * LOG2_E) - 1.0)
    if HAS_SOFTCAP:
        capped = tl.load(labels + rows, mask=active, other=0.0) * (temperature / softcap)
        entry = entry * (1.0 - capped * capped)
    if TIGHT:
        total = total * 0.000030517578125  # the GEMMs multiply by 2**-15
    coefficient = 2.0 * weight * (target - logprob) * tl.load(scale) / temperature
    factor = tl.where(active, coefficient / total, 0.0)
    tl.store(weight_factors + rows, factor, mask=mask)
    tl.store(hidden_factors + rows, factor * tl.load(undo_scale), mask=mask)
    tl.store(entries + rows, tl.where(factor == 0.0, 0.0, entry), mask=mask)
    tl.store(offsets + rows, offset, mask=mask)


@triton.jit(**ANY_ROWS)
def logit_gradient_kernel(
    exponentials,  # [R, pitch] in and out
    maxima,  # [word blocks, R] fp32
    offsets,  # [R] fp32
    factors,  # [R] fp32
    entries,  # [R] fp32
    token_ids,  # [R] int64
    num_rows,
    num_valid,
    pitch,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    TIGHT: tl.constexpr,
):
    """Turn E into G: rescale tiles whose offset is not the row's, write the token's entry, zero idle rows.

    SEGMENT is a multiple of TILE_WORDS. In most segments nothing but one entry, or nothing at all, is written.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    start = tl.program_id(1) * SEGMENT
    row_offset = tl.load(offsets + rows, mask=row_mask, other=0.0)
    factor = tl.load(factors + rows, mask=row_mask, other=1.0)
    entry = tl.load(entries + rows, mask=row_mask, other=0.0)
    column = tl.load(token_ids + rows, mask=row_mask, other=-1).to(tl.int32) - start
    tiles = start // TILE_WORDS + tl.arange(0, SEGMENT // TILE_WORDS)
    tile_mask = row_mask[:, None] & (tiles * TILE_WORDS < num_valid)[None, :]
    tile_at = tiles.to(tl.int64)[None, :] * num_rows + rows[:, None]
    maximum = tl.load(maxima + tile_at, mask=tile_mask, other=EMPTY_MAX)
    moved = tile_mask & (maximum > EMPTY_MAX) & (power_offset(maximum, TIGHT) != row_offset[:, None])
    idle = row_mask & (factor == 0.0)
    base = exponentials + rows.to(tl.int64) * pitch + start
    rewrite = tl.max(tl.max(moved.to(tl.int32), axis=1) | idle.to(tl.int32), axis=0)
    if rewrite != 0:
        words = tl.arange(0, SEGMENT)
        mask = (row_mask & (idle == 0))[:, None] & (start + words < pitch)[None, :]
        word_tile = ((start + words) // TILE_WORDS).to(tl.int64)
        spread = tl.load(maxima + word_tile[None, :] * num_rows + rows[:, None], mask=mask, other=EMPTY_MAX)
        shift = tl.where(spread > EMPTY_MAX, power_offset(spread, TIGHT) - row_offset[:, None], 0.0)
        # Two exact halves, because 2**-128 alone would be flushed to zero.
        half = tl.floor(0.5 * shift)
        first, second = tl.exp2(half), tl.exp2(shift - half)
        at = base[:, None] + words[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32) * first * second
        value = tl.where(words[None, :] == column[:, None], entry[:, None], value)
        # An idle row loads nothing and has entry 0: it is overwritten with zeros whatever it held.
        mask = row_mask[:, None] & (start + words < pitch)[None, :]
        tl.store(at, value.to(exponentials.dtype.element_ty), mask=mask)
    else:
        # Ids are not checked on CUDA: one past the vocabulary must not reach another row, or past the matrix.
        hit = row_mask & (column >= 0) & (column < SEGMENT) & (start + column < num_valid)
        tl.store(base + column, entry.to(exponentials.dtype.element_ty), mask=hit)


@triton.jit(**ANY_ROWS)
def scale_rows_kernel(
    source,  # [R, D]
    factors,  # [R] fp32
    scaled,  # [R, D] out, may be source
    num_rows,
    dim,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """scaled = source * factor per row; a factor of 0 gives 0 whatever the row holds."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * DIM + tl.arange(0, DIM)
    row_mask = rows < num_rows
    factor = tl.load(factors + rows, mask=row_mask, other=0.0)
    at = (rows.to(tl.int64) * dim)[:, None] + columns[None, :]
    mask = row_mask[:, None] & (columns < dim)[None, :]
    value = tl.load(source + at, mask=mask & (factor != 0.0)[:, None], other=0.0).to(tl.float32)
    tl.store(scaled + at, (value * factor[:, None]).to(scaled.dtype.element_ty), mask=mask)


@triton.jit(**ANY_ROWS)
def column_sum_kernel(
    gradient,  # [R, pitch]
    factors,  # [R] fp32
    sums,  # [V] fp32 in and out
    unit,  # fp32, multiplies the factors
    num_rows,
    num_valid,
    pitch,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add sum over rows of factor * G to the bias's gradient; rows in order, no atomics."""
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros([WORDS], dtype=tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        row_mask = rows < num_rows
        factor = tl.load(factors + rows, mask=row_mask, other=0.0) * unit
        at = (rows.to(tl.int64) * pitch)[:, None] + words[None, :]
        value = tl.load(gradient + at, mask=row_mask[:, None] & (words < pitch)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * factor[:, None], axis=0)
    word_mask = words < num_valid
    tl.store(sums + words, tl.load(sums + words, mask=word_mask, other=0.0) + total, mask=word_mask)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with all features."""
    row_blocks, cases = choose_row_blocks(capability), []
    # The one number that the row kernels take from a tile of the GEMM is its words.
    tiles = {choose_loss_blocks(capability, False, dim).words for dim in (SHORT_DIM, SHORT_DIM + 1)}
    for dtype in dtypes:
        if dtype != "fp32":
            cases += [_logit_gradient_case(dtype, words, row_blocks) for words in sorted(tiles)]
        cases += _row_cases(dtype, row_blocks)
    return cases


def _logit_gradient_case(dtype: str, words: int, row_blocks: RowBlocks) -> CompileCase:
    pointers = {name: "*fp32" for name in ("maxima", "offsets", "factors", "entries")}
    return compile_case(
        logit_gradient_kernel,
        f"logit_gradient {dtype} tiles of {words}",
        pointers=pointers | {"exponentials": f"*{dtype}", "token_ids": "*i64"},
        floats=(),
        constexprs={
            "ROWS": row_blocks.gradient_rows,
            "SEGMENT": row_blocks.gradient_words,
            "TILE_WORDS": words,
            "TIGHT": dtype == "fp16",
        },
        blocks=DEFAULT_OPTIONS,
        is_gemm=False,
        divisible=("pitch",),
    )


def _row_cases(dtype: str, row_blocks: RowBlocks) -> list[CompileCase]:
    factor = {"HAS_SOFTCAP": True, "TIGHT": dtype == "fp16", "ROWS": row_blocks.factor_rows}
    scale = {"ROWS": row_blocks.scale_rows, "DIM": row_blocks.scale_columns}
    column_sum = {"ROWS": row_blocks.sum_rows, "WORDS": row_blocks.sum_words}
    factor_pointers = dict.fromkeys(row_factor_kernel.arg_names[:11], "*fp32")
    rows = (f"*{dtype}", "*fp32", f"*{dtype}")
    specs = [
        (scale_rows_kernel, dict(zip(("source", "factors", "scaled"), rows, strict=True)), (), scale, ("dim",)),
        (
            column_sum_kernel,
            {"gradient": f"*{dtype}", "factors": "*fp32", "sums": "*fp32"},
            ("unit",),
            column_sum,
            ("pitch",),
        ),
    ]
    if dtype != "fp32":
        specs.append((row_factor_kernel, factor_pointers, ("softcap", "temperature"), factor, ()))
    return [
        compile_case(
            kernel,
            f"{kernel.__name__.removesuffix('_kernel')} {dtype}",
            pointers=pointers,
            floats=floats,
            constexprs=constexprs,
            blocks=DEFAULT_OPTIONS,
            is_gemm=False,
            divisible=divisible,
        )
        for kernel, pointers, floats, constexprs, divisible in specs
    ]
