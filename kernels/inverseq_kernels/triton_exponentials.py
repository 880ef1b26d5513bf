"""The "tiles" GEMM of the squared log-ratio loss, which leaves exponentials; the row work on them is in triton_rows.py.

For a chunk of R rows, z = hidden @ weight.T in fp32 (bias, softcap, temperature), and with 2**o a power of
two per row and tile

    E = 2**-o exp(z) dz/d(raw z) T       [R, V] in hidden's dtype, the only large temporary
    maxima, totals, labels               fp32, before any rounding: log-probs come from these alone
    G = S (P - onehot) dz/d(raw z) T     in place: tiles brought to the row's own offset, exact because
                                         it is a power of two, and the token's entry made in fp32
                                         (rounding softmax first and subtracting 1 after would lose it)
    S = 2**-o sum exp(z)

S and the row's coefficient are divided out of hidden's rows and of the gradient's rows, never of the
[R, V] matrix. bf16 has exponents to spare: offsets are multiples of 128, so tiles whose maxima lie
within 44 nats of zero need no second pass. fp16 takes the tightest offset and passes over every tile.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from inverseq_kernels.triton_blocks import SHORT_DIM, choose_loss_blocks
from inverseq_kernels.triton_common import (
    ANY_ROWS,
    EMPTY_MAX,
    LOG2_E,
    add_dots,
    cap,
    load_bias,
    store_label,
    tile_position,
)
from inverseq_kernels.triton_compile import CompileCase, combine_case, compile_case
from inverseq_kernels.triton_rows import power_offset


@triton.jit(**ANY_ROWS)
def exponential_kernel(
    hidden,  # [R, D] or its descriptor
    weight,  # [V, D] or its descriptor
    bias,  # [V]
    token_ids,  # [R] int64
    exponentials,  # [R, pitch] out, 0 past num_valid
    maxima,  # [word blocks, R] fp32 out
    totals,  # [word blocks, R] fp32 out
    labels,  # [R] fp32 out
    num_rows,
    num_valid,
    dim,
    pitch,
    softcap,
    temperature,
    inverse_temperature,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TIGHT: tl.constexpr,
):
    """One tile of exponentials with its statistics."""
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
    logits = cap(logits, softcap, HAS_SOFTCAP)
    logits = tl.where(present[None, :], logits * inverse_temperature, float("-inf"))
    store_label(labels, logits, token_ids, rows, row_mask, word_start, WORDS)
    maximum = tl.maximum(tl.max(logits, axis=1), EMPTY_MAX)
    values = tl.exp2((logits - maximum[:, None]) * LOG2_E)
    at = word_block.to(tl.int64) * num_rows + rows
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(totals + at, tl.sum(values, axis=1), mask=row_mask)
    offset = power_offset(maximum, TIGHT)
    if HAS_SOFTCAP:
        # A second exp2: keeping values and slopes apart would hold two tiles in registers, which spills.
        capped = tl.where(present[None, :], logits, 0.0) * (temperature / softcap)
        values = tl.exp2(logits * LOG2_E - offset[:, None]) * (1.0 - capped * capped)
    else:
        values = values * tl.exp2(maximum * LOG2_E - offset)[:, None]
    words = word_start + tl.arange(0, WORDS)
    tile = exponentials + row_start.to(tl.int64) * pitch + word_start
    inside = tl.arange(0, ROWS)[:, None] * pitch + tl.arange(0, WORDS)[None, :]
    tl.store(
        tile + inside.to(tl.int64),
        values.to(exponentials.dtype.element_ty),
        # The pitch is a multiple of 16 and num_valid is not: 16-byte stores need a mask that is alike in 8 words.
        mask=row_mask[:, None] & (words < pitch)[None, :],
    )


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with few and with all features."""
    cases = [combine_case("loss", write_lse=True, has_moment=False)]
    for dtype in (name for name in dtypes if name != "fp32"):
        for bias, softcap in ((False, False), (True, False), (True, True)):
            cases.append(_exponential_case(capability, dtype, bias=bias, softcap=softcap))
        for bias in (False, True):
            cases.append(_exponential_case(capability, dtype, bias=bias, softcap=False, dim=SHORT_DIM))
    return cases


def _exponential_case(capability: int, dtype: str, *, bias: bool, softcap: bool, dim: int = 4096) -> CompileCase:
    blocks = choose_loss_blocks(capability, softcap, dim)
    pointers = {name: "*fp32" for name in ("maxima", "totals", "labels")}
    pointers |= {"token_ids": "*i64", "exponentials": f"*{dtype}"}
    for name, size in (("hidden", blocks.rows), ("weight", blocks.words)):
        pointers[name] = f"tensordesc<{dtype}[{size}, {blocks.dim}]>" if blocks.tma else f"*{dtype}"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": not bias,
        "TMA": blocks.tma,
        "HAS_BIAS": bias,
        "HAS_SOFTCAP": softcap,
        "TIGHT": dtype == "fp16",
    }
    if bias:
        pointers["bias"] = f"*{dtype}"
    else:
        constexprs["bias"] = None
    return compile_case(
        exponential_kernel,
        f"exponential {dtype} {'tma' if blocks.tma else 'pointers'}{' ragged bias' if bias else ''}"
        f"{' softcap' if softcap else ''}{' short' if dim <= SHORT_DIM else ''}",
        pointers=pointers,
        floats=("softcap", "temperature", "inverse_temperature"),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=True,
        divisible=("pitch", "dim"),
    )
