"""Kernels of the contrastive target: statistics of the mixed and of the plain logits of a tile, or of stored rows.

contrast_kernel        one accumulator for both heads: one alpha a row, no softcap
contrast_pair_kernel   two accumulators: a softcap, or several alphas
contrast_rows_kernel   the same from stored logits of both heads

Why the plain head comes first is explained in triton_contrastive.py, which launches them.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from inverseq_kernels.triton_blocks import (
    CONTRAST,
    CONTRAST_BIAS,
    CONTRAST_PAIR,
    Blocks,
    choose_blocks,
    choose_logit_blocks,
)
from inverseq_kernels.triton_common import (
    ANY_ROWS,
    EMPTY_MAX,
    IGNORED,
    add_dots,
    cap,
    load_alpha,
    load_bias,
    row_statistics,
    store_label,
    tile_position,
)
from inverseq_kernels.triton_compile import CompileCase, combine_case, compile_case
from inverseq_kernels.triton_stored_rows import add_segment, load_capped, load_label


@triton.jit
def _store_statistics(maxima, totals, logits, one_set, rows, row_mask, num_rows, word_block, num_word_blocks):
    """Leave one set's softmax statistics of a tile."""
    maximum, total = row_statistics(logits)
    at = ((tl.zeros([], dtype=tl.int64) + one_set) * num_word_blocks + word_block) * num_rows + rows
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(totals + at, total, mask=row_mask)


@triton.jit(**ANY_ROWS)
def contrast_kernel(
    hidden_w,  # [A, D_w] or its descriptor
    weight_w,  # [V, D_w] or its descriptor
    bias_w,  # [V]
    hidden_l,  # [A, D_l] or its descriptor
    weight_l,  # [V, D_l] or its descriptor
    bias_l,  # [V]
    token_ids,  # [A] int64
    alphas,  # [A] or [1] fp32
    maxima,  # [2, word blocks, A] fp32 out: mixed, plain
    totals,  # [2, word blocks, A] fp32 out
    labels,  # [2, A] fp32 out
    num_rows,
    num_valid,
    dim_w,
    dim_l,
    alpha_row_stride,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS_W: tl.constexpr,
    HAS_BIAS_L: tl.constexpr,
):
    """One accumulator for both heads: statistics of c and of z_l for a tile."""
    num_word_blocks = tl.cdiv(num_valid, WORDS)
    row_block, word_block = tile_position(tl.cdiv(num_rows, ROWS), num_word_blocks, GROUP_ROWS)
    row_start, word_start = row_block * ROWS, word_block * WORDS
    rows = row_start + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    sums = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    sums = add_dots(
        sums, hidden_l, weight_l, row_start, word_start, num_rows, num_valid, dim_l, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    finite, present_l = load_bias(bias_l, word_start, num_valid, WORDS, HAS_BIAS_L)
    if HAS_BIAS_L:
        sums += finite[None, :]
    # In place, so that one tile is alive: words without a logit hold garbage later and are masked again.
    sums = tl.where(present_l[None, :], sums * inverse_temperature, float("-inf"))
    _store_statistics(maxima, totals, sums, 1, rows, row_mask, num_rows, word_block, num_word_blocks)
    store_label(labels + tl.cast(num_rows, tl.int64), sums, token_ids, rows, row_mask, word_start, WORDS)
    alpha = load_alpha(alphas, rows, row_mask, alpha_row_stride)
    sums = sums * ((1.0 - alpha) / (alpha * inverse_temperature))[:, None]
    sums = add_dots(
        sums, hidden_w, weight_w, row_start, word_start, num_rows, num_valid, dim_w, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    finite, present = load_bias(bias_w, word_start, num_valid, WORDS, HAS_BIAS_W)
    if HAS_BIAS_W:
        sums += finite[None, :]
    if HAS_BIAS_L:
        _, present_l = load_bias(bias_l, word_start, num_valid, WORDS, HAS_BIAS_L)
        present = present & present_l
    sums = tl.where(present[None, :], sums * (alpha * inverse_temperature)[:, None], float("-inf"))
    _store_statistics(maxima, totals, sums, 0, rows, row_mask, num_rows, word_block, num_word_blocks)
    store_label(labels, sums, token_ids, rows, row_mask, word_start, WORDS)


# A launch with one alpha would have its number as a constant and the loop over alphas unrolled, which spills.
@triton.jit(**ANY_ROWS)
def contrast_pair_kernel(
    hidden_w,  # [A, D_w] or its descriptor
    weight_w,  # [V, D_w] or its descriptor
    bias_w,  # [V]
    hidden_l,  # [A, D_l] or its descriptor
    weight_l,  # [V, D_l] or its descriptor
    bias_l,  # [V]
    token_ids,  # [A] int64
    alphas,  # [K, A] or [K, 1] fp32
    maxima,  # [K + 1, word blocks, A] fp32 out: each alpha, then plain
    totals,  # [K + 1, word blocks, A] fp32 out
    labels,  # [K + 1, A] fp32 out
    num_rows,
    num_valid,
    dim_w,
    dim_l,
    num_alphas,
    alpha_set_stride,
    alpha_row_stride,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS_W: tl.constexpr,
    HAS_BIAS_L: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Two accumulators: statistics of z_l and of the mixture under every alpha for a tile."""
    num_word_blocks = tl.cdiv(num_valid, WORDS)
    row_block, word_block = tile_position(tl.cdiv(num_rows, ROWS), num_word_blocks, GROUP_ROWS)
    row_start, word_start = row_block * ROWS, word_block * WORDS
    rows = row_start + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    plain = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    plain = add_dots(
        plain, hidden_l, weight_l, row_start, word_start, num_rows, num_valid, dim_l, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    better = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    better = add_dots(
        better, hidden_w, weight_w, row_start, word_start, num_rows, num_valid, dim_w, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    finite_l, present_l = load_bias(bias_l, word_start, num_valid, WORDS, HAS_BIAS_L)
    finite_w, present_w = load_bias(bias_w, word_start, num_valid, WORDS, HAS_BIAS_W)
    if HAS_BIAS_L:
        plain += finite_l[None, :]
    if HAS_BIAS_W:
        better += finite_w[None, :]
    plain = cap(plain, softcap, HAS_SOFTCAP) * inverse_temperature
    better = cap(better, softcap, HAS_SOFTCAP) * inverse_temperature
    present = present_l & present_w
    for one_set in range(0, num_alphas):
        set_start = tl.zeros([], dtype=tl.int64) + one_set
        alpha = tl.load(
            alphas + set_start * alpha_set_stride + rows.to(tl.int64) * alpha_row_stride, mask=row_mask, other=1.0
        )
        mixed = alpha[:, None] * better + (1.0 - alpha)[:, None] * plain
        mixed = tl.where(present[None, :], mixed, float("-inf"))
        _store_statistics(maxima, totals, mixed, one_set, rows, row_mask, num_rows, word_block, num_word_blocks)
        store_label(labels + set_start * num_rows, mixed, token_ids, rows, row_mask, word_start, WORDS)
    plain = tl.where(present_l[None, :], plain, float("-inf"))
    _store_statistics(maxima, totals, plain, num_alphas, rows, row_mask, num_rows, word_block, num_word_blocks)
    set_start = tl.zeros([], dtype=tl.int64) + num_alphas
    store_label(labels + set_start * num_rows, plain, token_ids, rows, row_mask, word_start, WORDS)


@triton.jit(**ANY_ROWS)
def contrast_rows_kernel(
    better,  # [R, pitch] fp32 products of the better head
    plain,  # [R, pitch] fp32 products of the plain head
    bias_w,  # [pitch] fp32
    bias_l,  # [pitch] fp32
    token_ids,  # [R] int64
    alphas,  # [K, R] or [K, 1] fp32
    maxima,  # [K + 1, R] fp32 out: each alpha, then plain
    totals,  # [K + 1, R] fp32 out
    labels,  # [K + 1, R] fp32 out, unwritten where the token is no valid word
    num_rows,
    num_valid,
    pitch,
    num_alphas,
    alpha_set_stride,
    alpha_row_stride,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS_W: tl.constexpr,
    HAS_BIAS_L: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Statistics of z_l and of the mixture under every alpha for whole rows, from one pass over both buffers.

    What an alpha has so far is kept in ``maxima`` and ``totals``: there may be any number of them.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    column = tl.load(token_ids + rows, mask=row_mask, other=IGNORED)
    inside = (column >= 0) & (column < num_valid)
    label_w, removed_w = load_label(better, bias_w, rows, column, inside, pitch, softcap, HAS_BIAS_W, HAS_SOFTCAP)
    label_l, removed_l = load_label(plain, bias_l, rows, column, inside, pitch, softcap, HAS_BIAS_L, HAS_SOFTCAP)
    label_w, label_l = label_w * inverse_temperature, label_l * inverse_temperature
    running = tl.full([ROWS], EMPTY_MAX, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, num_valid, SEGMENT):
        z_w, present_w = load_capped(
            better, bias_w, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS_W, HAS_SOFTCAP
        )
        z_l, present = load_capped(
            plain, bias_l, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS_L, HAS_SOFTCAP
        )
        is_first = start == 0
        z_w *= inverse_temperature
        z_l = tl.where(present[None, :], z_l * inverse_temperature, float("-inf"))
        running, total, _ = add_segment(running, total, total, z_l, False)
        present = present & present_w
        for one_set in range(0, num_alphas):
            set_start = tl.zeros([], dtype=tl.int64) + one_set
            at = alphas + set_start * alpha_set_stride + rows.to(tl.int64) * alpha_row_stride
            alpha = tl.load(at, mask=row_mask, other=1.0)
            mixed = alpha[:, None] * z_w + (1.0 - alpha)[:, None] * z_l
            mixed = tl.where(present[None, :], mixed, float("-inf"))
            # One thread stores what all warps read: every store is behind their loads, every load behind the store.
            tl.debug_barrier()
            at = set_start * num_rows + rows
            before = tl.where(is_first, EMPTY_MAX, tl.load(maxima + at, mask=row_mask))
            before_total = tl.where(is_first, 0.0, tl.load(totals + at, mask=row_mask))
            new, new_total, _ = add_segment(before, before_total, before_total, mixed, False)
            tl.debug_barrier()
            tl.store(maxima + at, new, mask=row_mask)
            tl.store(totals + at, new_total, mask=row_mask)
            label = tl.where(removed_w | removed_l, float("-inf"), alpha * label_w + (1.0 - alpha) * label_l)
            tl.store(labels + at, label, mask=inside & is_first)
    last = (tl.zeros([], dtype=tl.int64) + num_alphas) * num_rows + rows
    tl.store(labels + last, tl.where(removed_l, float("-inf"), label_l), mask=inside)
    tl.store(maxima + last, running, mask=row_mask)
    tl.store(totals + last, total, mask=row_mask)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with few and with all features."""
    cases = [
        combine_case("contrastive", write_lse=partial, has_moment=False, partial=partial) for partial in (False, True)
    ]
    for dtype in (name for name in dtypes if name != "fp32"):
        for op, full in ((CONTRAST, False), (CONTRAST_BIAS, True), (CONTRAST_PAIR, False), (CONTRAST_PAIR, True)):
            cases.append(_case(op, dtype, choose_blocks(op, capability), full=full))
    blocks = choose_logit_blocks(capability)
    return cases + [_rows_case(blocks, full=full) for full in (False, True)]


def _rows_case(blocks: Blocks, *, full: bool) -> CompileCase:
    """Stored logits with neither or all of biases and softcap."""
    constexprs = {"ROWS": blocks.rows, "SEGMENT": blocks.words}
    constexprs |= dict.fromkeys(("HAS_BIAS_W", "HAS_BIAS_L", "HAS_SOFTCAP"), full)
    pointers = dict.fromkeys(("better", "plain", "alphas", "maxima", "totals", "labels"), "*fp32")
    for name in ("bias_w", "bias_l"):
        (pointers if full else constexprs)[name] = "*fp32" if full else None
    return compile_case(
        contrast_rows_kernel,
        f"contrast_rows {'full' if full else 'plain'}",
        pointers=pointers | {"token_ids": "*i64"},
        floats=("softcap", "inverse_temperature"),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=False,
        divisible=("pitch",),
    )


def _case(op: str, dtype: str, blocks: Blocks, *, full: bool) -> CompileCase:
    """One kernel with neither or all of biases, softcap and a width that is no multiple of the block."""
    pointers = {name: "*fp32" for name in ("alphas", "maxima", "totals", "labels")}
    pointers["token_ids"] = "*i64"
    for head in "wl":
        for name, size in ((f"hidden_{head}", blocks.rows), (f"weight_{head}", blocks.words)):
            pointers[name] = f"tensordesc<{dtype}[{size}, {blocks.dim}]>" if blocks.tma else f"*{dtype}"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": not full,
        "TMA": blocks.tma,
        "HAS_BIAS_W": full,
        "HAS_BIAS_L": full,
    }
    for name in ("bias_w", "bias_l"):
        if full:
            pointers[name] = f"*{dtype}"
        else:
            constexprs[name] = None
    kernel = contrast_kernel
    floats = ("inverse_temperature",)
    if op == CONTRAST_PAIR:
        kernel = contrast_pair_kernel
        constexprs["HAS_SOFTCAP"] = full
        floats = ("inverse_temperature", "softcap")
    return compile_case(
        kernel,
        f"{op} {dtype} {'tma' if blocks.tma else 'pointers'} {'full' if full else 'plain'}",
        pointers=pointers,
        floats=floats,
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=True,
        divisible=("dim_w", "dim_l"),
    )
