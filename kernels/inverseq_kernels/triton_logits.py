"""Kernels over one head's logits: softmax statistics of a tile, and the gradient of a tile of logits.

statistics_kernel   GEMM without stored logits; maxima, sums, label logits and, for the entropy,
                    sum exp(z - max) (z - max)
gradient_kernel     the same GEMM; its epilogue makes (g (onehot - P) - e P (log P + H)) dz/d(raw z) in fp32
                    and rounds it once, to the type that the next GEMMs read
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from inverseq_kernels.triton_blocks import (
    GRADIENT,
    GRADIENT_RICH,
    SHORT_DIM,
    STATISTICS,
    STATISTICS_RICH,
    choose_blocks,
)
from inverseq_kernels.triton_common import (
    ANY_ROWS,
    EMPTY_MAX,
    IGNORED,
    LOG2_E,
    add_dots,
    cap,
    load_bias,
    logit_gradient,
    row_statistics,
    store_label,
    tile_position,
)
from inverseq_kernels.triton_compile import CompileCase, combine_case, compile_case


@triton.jit(**ANY_ROWS)
def statistics_kernel(
    hidden,  # [A, D] or its descriptor
    weight,  # [V, D] or its descriptor
    bias,  # [V]
    token_ids,  # [A] int64
    maxima,  # [word blocks, A] fp32 out
    totals,  # [word blocks, A] fp32 out
    moments,  # [word blocks, A] fp32 out, with HAS_MOMENT
    labels,  # [A] fp32 out
    num_rows,
    num_valid,
    dim,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
):
    """Softmax statistics and label logits of one tile."""
    num_word_blocks = tl.cdiv(num_valid, WORDS)
    row_block, word_block = tile_position(tl.cdiv(num_rows, ROWS), num_word_blocks, GROUP_ROWS)
    row_start, word_start = row_block * ROWS, word_block * WORDS
    rows = row_start + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    logits = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    logits = add_dots(
        logits, hidden, weight, row_start, word_start, num_rows, num_valid, dim, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    finite, present = load_bias(bias, word_start, num_valid, WORDS, HAS_BIAS)
    if HAS_BIAS:
        logits += finite[None, :]
    logits = tl.where(present[None, :], cap(logits, softcap, HAS_SOFTCAP) * inverse_temperature, float("-inf"))
    store_label(labels, logits, token_ids, rows, row_mask, word_start, WORDS)
    at = word_block.to(tl.int64) * num_rows + rows
    if HAS_MOMENT:
        maximum = tl.maximum(tl.max(logits, axis=1), EMPTY_MAX)
        # Bounded, so that an absent word adds 0 and not 0 * inf.
        logits = tl.maximum(logits - maximum[:, None], EMPTY_MAX)
        total = tl.sum(tl.exp2(logits * LOG2_E), axis=1)
        tl.store(moments + at, tl.sum(tl.exp2(logits * LOG2_E) * logits, axis=1), mask=row_mask)
    else:
        maximum, total = row_statistics(logits)
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(totals + at, total, mask=row_mask)


@triton.jit(**ANY_ROWS)
def gradient_kernel(
    hidden,  # [R, D] or its descriptor
    weight,  # [V, D] or its descriptor
    bias,  # [V]
    token_ids,  # [R] int64
    lse,  # [R] fp32
    grad_logprobs,  # [R] fp32
    grad_entropy,  # [R] fp32, with HAS_ENTROPY
    entropy,  # [R] fp32, with HAS_ENTROPY
    gradient,  # [R, pitch] out, 0 past num_valid
    num_rows,
    num_valid,
    dim,
    pitch,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Gradient of hidden @ weight.T + bias for one tile; 0 in ignored rows and absent words."""
    num_word_blocks = tl.cdiv(num_valid, WORDS)
    row_block, word_block = tile_position(tl.cdiv(num_rows, ROWS), num_word_blocks, GROUP_ROWS)
    row_start, word_start = row_block * ROWS, word_block * WORDS
    rows = row_start + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    sums = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    sums = add_dots(
        sums, hidden, weight, row_start, word_start, num_rows, num_valid, dim, ROWS, WORDS, DIM, EVEN_DIM, TMA
    )
    finite, present = load_bias(bias, word_start, num_valid, WORDS, HAS_BIAS)
    if HAS_BIAS:
        sums += finite[None, :]
    sums = cap(sums, softcap, HAS_SOFTCAP)
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    row_grad = tl.load(grad_logprobs + rows, mask=row_mask, other=0.0) * inverse_temperature
    row_grad_entropy, row_entropy = row_grad, row_grad
    if HAS_ENTROPY:
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
        row_grad_entropy = tl.load(grad_entropy + rows, mask=row_mask, other=0.0) * inverse_temperature
    column = tl.load(token_ids + rows, mask=row_mask, other=IGNORED).to(tl.int32)
    logprobs = sums * inverse_temperature - row_lse[:, None]
    result = logit_gradient(
        sums,
        logprobs,
        present,
        column,
        word_start,
        row_grad,
        row_grad_entropy,
        row_entropy,
        softcap,
        WORDS,
        HAS_SOFTCAP,
        HAS_ENTROPY,
    )
    words = tl.arange(0, WORDS)
    at = rows.to(tl.int64)[:, None] * pitch + (word_start + words)[None, :]
    # The pitch is a multiple of 64 and num_valid is not: 16-byte stores need a mask that is alike in 8 words.
    inside = row_mask[:, None] & (word_start + words < pitch)[None, :]
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with few and with all features."""
    cases = [
        combine_case("logprob", write_lse=True, has_moment=entropy, partial=partial)
        for entropy in (False, True)
        for partial in (False, True)
    ]
    for dtype in (name for name in dtypes if name != "fp32"):
        for op in (STATISTICS, GRADIENT):
            for dim in (4096, SHORT_DIM):
                cases.append(_case(op, dtype, capability, even=True, dim=dim))
                cases.append(_case(op, dtype, capability, bias=True, dim=dim))
        for op in (STATISTICS_RICH, GRADIENT_RICH):
            cases.append(_case(op, dtype, capability, even=True, softcap=True))
            cases.append(_case(op, dtype, capability, even=True, entropy=True))
            cases.append(_case(op, dtype, capability, bias=True, softcap=True, entropy=True))
    return cases


def _case(
    op: str,
    dtype: str,
    capability: int,
    *,
    even: bool = False,
    bias: bool = False,
    softcap: bool = False,
    entropy: bool = False,
    dim: int = 4096,
) -> CompileCase:
    """One kernel with a choice of features; ``even``: the width is a multiple of the block."""
    blocks = choose_blocks(op, capability, dim)
    if op in (STATISTICS, STATISTICS_RICH):
        kernel, flag, optional = statistics_kernel, "HAS_MOMENT", ("moments",)
        pointers = {name: "*fp32" for name in ("maxima", "totals", "labels")}
    else:
        kernel, flag, optional = gradient_kernel, "HAS_ENTROPY", ("grad_entropy", "entropy")
        pointers = {"lse": "*fp32", "grad_logprobs": "*fp32", "gradient": f"*{dtype}"}
    pointers["token_ids"] = "*i64"
    for name, size in (("hidden", blocks.rows), ("weight", blocks.words)):
        pointers[name] = f"tensordesc<{dtype}[{size}, {blocks.dim}]>" if blocks.tma else f"*{dtype}"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": even,
        "TMA": blocks.tma,
        "HAS_BIAS": bias,
        "HAS_SOFTCAP": softcap,
        flag: entropy,
    }
    for name in (*optional, "bias"):
        if bias if name == "bias" else entropy:
            pointers[name] = f"*{dtype}" if name == "bias" else "*fp32"
        else:
            constexprs[name] = None
    wanted = {"bias": bias, "softcap": softcap, "entropy": entropy, "ragged": not even, "short": dim <= SHORT_DIM}
    features = "".join(f" {name}" for name, value in wanted.items() if value)
    return compile_case(
        kernel,
        f"{op} {dtype} {'tma' if blocks.tma else 'pointers'}{features}",
        pointers=pointers,
        floats=("softcap", "inverse_temperature"),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=True,
        divisible=("dim", "pitch") if kernel is gradient_kernel else ("dim",),
    )
