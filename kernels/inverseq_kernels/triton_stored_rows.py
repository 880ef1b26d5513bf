"""Row work on stored logits, the "logits" structure of triton_stored.py: one fused kernel a purpose.

hidden @ weight.T of R rows stands in a [R, pitch] fp32 buffer. A program walks through one row in segments of words;
bias, softcap, temperature and absent words come in as it reads:

statistics_rows_kernel   maximum, sum and, for the entropy, sum exp(z - max) (z - max); the token's logit. With
                         RESCALE it also turns z_l into the start of a contrast's sum, with MIXED it reads that sum
gradient_rows_kernel     G = (g (onehot - P) - e P (log P + H)) dz/d(raw z)
loss_rows_kernel         the log-sum-exp, the squared log-ratio's coefficient, and G

G is made in fp32, rounded once to hidden's dtype, and written over the logits that it came from: entry v of a row lies
at or before logit v, so a segment's G covers logits of that segment and of earlier ones.

Left out: launchers (triton_stored.py), and the contrast of two buffers (triton_contrast.py).
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from inverseq_kernels.triton_blocks import Blocks, choose_logit_blocks
from inverseq_kernels.triton_common import (
    ANY_ROWS,
    EMPTY_MAX,
    IGNORED,
    LN_2,
    LOG2_E,
    cap,
    load_alpha,
    logit_gradient,
)
from inverseq_kernels.triton_compile import CompileCase, compile_case


@triton.jit
def load_capped(
    products,  # [R, pitch] fp32
    bias,  # [pitch] fp32, -inf past the valid words
    rows,
    row_mask,
    start,
    num_valid,
    pitch,
    softcap,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One segment's logits before the temperature [ROWS, SEGMENT], anything in absent words, and who is present."""
    words = start + tl.arange(0, SEGMENT)
    at = rows.to(tl.int64)[:, None] * pitch + words[None, :]
    # The pitch is a multiple of 64 and num_valid is not: 16-byte loads need a mask that is alike in 4 words.
    value = tl.load(products + at, mask=row_mask[:, None] & (words < pitch)[None, :], other=0.0)
    present = words < num_valid
    if HAS_BIAS:
        offset = tl.load(bias + words, mask=words < pitch, other=float("-inf"))
        present = offset != float("-inf")
        value += tl.where(present, offset, 0.0)[None, :]
    return cap(value, softcap, HAS_SOFTCAP), present


@triton.jit
def load_label(
    products,
    bias,
    rows,
    column,
    inside,
    pitch,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logit of each row's token before the temperature [ROWS], and whether the bias removes that word."""
    value = tl.load(products + rows.to(tl.int64) * pitch + column, mask=inside, other=0.0)
    offset = tl.zeros_like(value)
    if HAS_BIAS:
        offset = tl.load(bias + column, mask=inside, other=0.0)
    removed = offset == float("-inf")
    value += tl.where(removed, 0.0, offset)
    return cap(value, softcap, HAS_SOFTCAP), removed


@triton.jit
def add_segment(running, total, moment, logits, HAS_MOMENT: tl.constexpr):
    """Running maximum, sum of exponentials and moment of rows [ROWS], one more segment of logits taken in."""
    new = tl.maximum(running, tl.max(logits, axis=1))
    rescale = tl.exp2((running - new) * LOG2_E)
    logits = logits - new[:, None]
    if HAS_MOMENT:
        # Bounded, so that an absent word adds 0 and not 0 * inf.
        logits = tl.maximum(logits, EMPTY_MAX)
    weights = tl.exp2(logits * LOG2_E)
    if HAS_MOMENT:
        moment = (moment + total * (running - new)) * rescale + tl.sum(weights * logits, axis=1)
    return new, total * rescale + tl.sum(weights, axis=1), moment


@triton.jit(**ANY_ROWS)
def statistics_rows_kernel(
    products,  # [R, pitch] fp32; rescaled in place with RESCALE
    bias,  # [pitch] fp32
    other_bias,  # [pitch] fp32 of the other head, with HAS_OTHER_BIAS: a word that it removes is absent
    token_ids,  # [R] int64
    alphas,  # [R] or [1] fp32, with RESCALE or MIXED
    maxima,  # [R] fp32 out
    totals,  # [R] fp32 out
    moments,  # [R] fp32 out, with HAS_MOMENT
    labels,  # [R] fp32 out, unwritten where the token is no valid word
    num_rows,
    num_valid,
    pitch,
    alpha_row_stride,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    RESCALE: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Softmax statistics and label logits of whole rows.

    RESCALE leaves z_l (1 - alpha) / alpha, to which the better head's products are added; MIXED multiplies by alpha.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    scale = tl.zeros([ROWS], dtype=tl.float32) + inverse_temperature
    rest = scale
    if RESCALE or MIXED:
        alpha = load_alpha(alphas, rows, row_mask, alpha_row_stride)
        rest = (1.0 - alpha) / alpha
        if MIXED:
            scale = alpha * inverse_temperature
    column = tl.load(token_ids + rows, mask=row_mask, other=IGNORED)
    inside = (column >= 0) & (column < num_valid)
    label, removed = load_label(products, bias, rows, column, inside, pitch, softcap, HAS_BIAS, HAS_SOFTCAP)
    if HAS_OTHER_BIAS:
        removed = removed | (tl.load(other_bias + column, mask=inside, other=0.0) == float("-inf"))
    tl.store(labels + rows, tl.where(removed, float("-inf"), label * scale), mask=inside)
    running = tl.full([ROWS], EMPTY_MAX, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    moment = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, num_valid, SEGMENT):
        capped, present = load_capped(
            products, bias, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS, HAS_SOFTCAP
        )
        if HAS_OTHER_BIAS:
            words = start + tl.arange(0, SEGMENT)
            offset = tl.load(other_bias + words, mask=words < pitch, other=float("-inf"))
            present = present & (offset != float("-inf"))
        logits = tl.where(present[None, :], capped * scale[:, None], float("-inf"))
        running, total, moment = add_segment(running, total, moment, logits, HAS_MOMENT)
        if RESCALE:
            words = start + tl.arange(0, SEGMENT)
            at = rows.to(tl.int64)[:, None] * pitch + words[None, :]
            # The store may be laid out over other threads than the load.
            tl.debug_barrier()
            tl.store(products + at, capped * rest[:, None], mask=row_mask[:, None] & (words < pitch)[None, :])
    tl.store(maxima + rows, running, mask=row_mask)
    tl.store(totals + rows, total, mask=row_mask)
    if HAS_MOMENT:
        tl.store(moments + rows, moment, mask=row_mask)


@triton.jit
def store_segment(gradient, result, rows, row_mask, start, pitch, gradient_pitch, SEGMENT: tl.constexpr):
    """Write one segment of G over the logits, when all warps have read theirs.

    A segment's G lies on logits of this and of earlier segments, which other warps of the program read. Without the
    barrier a fast warp would overwrite logits that a slow one has yet to load.
    """
    words = start + tl.arange(0, SEGMENT)
    at = rows.to(tl.int64)[:, None] * gradient_pitch + words[None, :]
    mask = row_mask[:, None] & (words < pitch)[None, :]
    tl.debug_barrier()
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(**ANY_ROWS)
def gradient_rows_kernel(
    products,  # [R, pitch] fp32
    gradient,  # [R, gradient_pitch] out, the same memory; 0 past num_valid
    bias,  # [pitch] fp32
    token_ids,  # [R] int64
    lse,  # [R] fp32
    grad_logprobs,  # [R] fp32
    grad_entropy,  # [R] fp32, with HAS_ENTROPY
    entropy,  # [R] fp32, with HAS_ENTROPY
    num_rows,
    num_valid,
    pitch,
    gradient_pitch,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """Gradient of hidden @ weight.T + bias for whole rows; 0 in ignored rows and absent words."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    row_grad = tl.load(grad_logprobs + rows, mask=row_mask, other=0.0) * inverse_temperature
    row_grad_entropy, row_entropy = row_grad, row_grad
    if HAS_ENTROPY:
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
        row_grad_entropy = tl.load(grad_entropy + rows, mask=row_mask, other=0.0) * inverse_temperature
    column = tl.load(token_ids + rows, mask=row_mask, other=IGNORED).to(tl.int32)
    for start in range(0, num_valid, SEGMENT):
        capped, present = load_capped(
            products, bias, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS, HAS_SOFTCAP
        )
        logprobs = capped * inverse_temperature - row_lse[:, None]
        result = logit_gradient(
            capped,
            logprobs,
            present,
            column,
            start,
            row_grad,
            row_grad_entropy,
            row_entropy,
            softcap,
            SEGMENT,
            HAS_SOFTCAP,
            HAS_ENTROPY,
        )
        store_segment(gradient, result, rows, row_mask, start, pitch, gradient_pitch, SEGMENT)


@triton.jit(**ANY_ROWS)
def loss_rows_kernel(
    products,  # [R, pitch] fp32
    gradient,  # [R, gradient_pitch] out, the same memory; 0 past num_valid
    bias,  # [pitch] fp32
    token_ids,  # [R] int64
    targets,  # [R] fp32
    row_weights,  # [R] fp32
    scale,  # [1] fp32, multiplies every coefficient
    undo_scale,  # [1] fp32, multiplies hidden's gradient once more
    logprobs,  # [R] fp32 out, 0 in ignored rows
    weight_factors,  # [R] fp32 out: what hidden's rows are multiplied by for the weight's gradient
    hidden_factors,  # [R] fp32 out: what the rows of G @ weight are multiplied by
    num_rows,
    num_valid,
    pitch,
    gradient_pitch,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TIGHT: tl.constexpr,
):
    """Log-probs, and G = 2 m (l - t) scale (onehot - P) dz/d(raw z) with factors 1, or 0 in rows that do not count.

    TIGHT, for fp16: G = 2**15 (onehot - P) dz/d(raw z) T, which uses all of fp16's range, and the rest is the factors'.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    column = tl.load(token_ids + rows, mask=row_mask, other=IGNORED)
    inside = (column >= 0) & (column < num_valid)
    label, removed = load_label(products, bias, rows, column, inside, pitch, softcap, HAS_BIAS, HAS_SOFTCAP)
    label = tl.where(removed, float("-inf"), label * inverse_temperature)
    running = tl.full([ROWS], EMPTY_MAX, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, num_valid, SEGMENT):
        capped, present = load_capped(
            products, bias, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS, HAS_SOFTCAP
        )
        logits = tl.where(present[None, :], capped * inverse_temperature, float("-inf"))
        running, total, _ = add_segment(running, total, total, logits, False)
    log_total = tl.log2(total) * LN_2
    logprob = tl.where(column == IGNORED, 0.0, (label - running) - log_total)
    tl.store(logprobs + rows, logprob, mask=row_mask)
    weight = tl.load(row_weights + rows, mask=row_mask, other=0.0)
    active = weight > 0.0
    target = tl.load(targets + rows, mask=active, other=0.0)
    coefficient = 2.0 * weight * (logprob - target) * tl.load(scale) * inverse_temperature
    coefficient = tl.where(active, coefficient, 0.0)
    undo = tl.load(undo_scale)
    if TIGHT:
        row_grad = tl.where(active, 32768.0, 0.0)
        factor = coefficient  # the GEMMs multiply by 2**-15
    else:
        row_grad = coefficient
        factor = tl.where(active, 1.0, 0.0)
    tl.store(weight_factors + rows, factor, mask=row_mask)
    tl.store(hidden_factors + rows, factor * undo, mask=row_mask)
    counted = tl.where(active, column, IGNORED).to(tl.int32)
    for start in range(0, num_valid, SEGMENT):
        capped, present = load_capped(
            products, bias, rows, row_mask, start, num_valid, pitch, softcap, SEGMENT, HAS_BIAS, HAS_SOFTCAP
        )
        log_probs = (capped * inverse_temperature - running[:, None]) - log_total[:, None]
        result = logit_gradient(
            capped,
            log_probs,
            present,
            counted,
            start,
            row_grad,
            row_grad,
            row_grad,
            softcap,
            SEGMENT,
            HAS_SOFTCAP,
            False,
        )
        store_segment(gradient, result, rows, row_mask, start, pitch, gradient_pitch, SEGMENT)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every kernel with few and with all features; only what writes G knows hidden's dtype."""
    blocks = choose_logit_blocks(capability)
    alone = {"RESCALE": False, "MIXED": False, "HAS_OTHER_BIAS": False, "HAS_MOMENT": False, "HAS_SOFTCAP": False}
    statistics = dict.fromkeys(("products", "alphas", "maxima", "totals", "moments", "labels"), "*fp32")
    biases = {"bias": "*fp32", "other_bias": "*fp32"}
    cases = [
        _case(statistics_rows_kernel, f"statistics_rows {name}", blocks, statistics | extra, alone | features)
        for name, extra, features in (
            ("", {}, {}),
            ("rescale", {}, {"RESCALE": True}),
            ("mixed", {}, {"MIXED": True}),
            ("entropy bias softcap", biases, {"HAS_MOMENT": True, "HAS_SOFTCAP": True}),
            ("rescale bias", biases, {"RESCALE": True}),
            ("mixed bias", biases, {"MIXED": True, "HAS_OTHER_BIAS": True}),
        )
    ]
    for dtype in dtypes:
        pointers = {"products": "*fp32", "gradient": f"*{dtype}"}
        rows = ("lse", "grad_logprobs", "grad_entropy", "entropy")
        loss_rows = ("targets", "row_weights", "scale", "undo_scale", "logprobs", "weight_factors", "hidden_factors")
        for full in (False, True):
            bias, name = ({"bias": "*fp32"}, " bias softcap") if full else ({}, "")
            for kernel, names, flag in (
                (gradient_rows_kernel, rows, {"HAS_ENTROPY": full}),
                (loss_rows_kernel, loss_rows, {"TIGHT": dtype == "fp16"}),
            ):
                cases.append(
                    _case(
                        kernel,
                        f"{kernel.__name__.removesuffix('_kernel')} {dtype}{name}",
                        blocks,
                        pointers | bias | dict.fromkeys(names, "*fp32"),
                        flag | {"HAS_SOFTCAP": full},
                    )
                )
    return cases


def _case(kernel, name: str, blocks: Blocks, pointers: dict[str, str], features: dict[str, bool]) -> CompileCase:
    """One kernel; ``pointers`` may list tensors that these features do without."""
    optional = {
        "other_bias": features.get("HAS_OTHER_BIAS"),
        "alphas": features.get("RESCALE") or features.get("MIXED"),
        "moments": features.get("HAS_MOMENT"),
        "grad_entropy": features.get("HAS_ENTROPY"),
        "entropy": features.get("HAS_ENTROPY"),
        "bias": "bias" in pointers,
    }
    absent = {name: None for name, wanted in optional.items() if not wanted and name in kernel.arg_names}
    constexprs = {"ROWS": blocks.rows, "SEGMENT": blocks.words, "HAS_BIAS": "bias" in pointers, **features, **absent}
    return compile_case(
        kernel,
        name.strip(),
        pointers={name: kind for name, kind in pointers.items() if name not in absent} | {"token_ids": "*i64"},
        floats=("softcap", "inverse_temperature"),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=False,
        divisible=tuple(name for name in ("pitch", "gradient_pitch") if name in kernel.arg_names),
    )
