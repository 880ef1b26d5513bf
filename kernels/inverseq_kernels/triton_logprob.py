"""log softmax(z)[y] and its gradients in Triton and cuBLAS, z = hidden @ weight.T + bias in fp32.

Forward: one GEMM without stored logits; every tile leaves its maxima, sums and, for the entropy,
sum exp(z - max) (z - max). Backward, any upstream gradients g of log p_y and e of the entropy H, by chunks of
rows that fit the workspace:

    G = (g (onehot - P) - e P (log P + H)) dz/d(raw z)     GEMM 1 again, its epilogue makes G in fp32 from
                                                           fp32 logits and rounds it once, to hidden's dtype
    hidden's gradient = G @ weight                         GEMM 2 (cuBLAS)
    weight += G.T @ hidden                                 GEMM 3 (cuBLAS), fp32 sum in chunk order, no atomics

fp16 gradients are scaled by a power of two near 1 / max(|g|, |e|) before G is rounded and scaled back at the end:
G of a mean over thousands of tokens would sink below fp16's range.

Left out: argument checks, the custom operations and autograd (logprob.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.triton_common import (
    DTYPES,
    EMPTY_MAX,
    GRADIENT,
    GRADIENT_RICH,
    LOG2_E,
    STATISTICS,
    STATISTICS_RICH,
    Blocks,
    CompileCase,
    add_dots,
    cap,
    capability_of,
    choose_blocks,
    combine,
    combine_case,
    compile_case,
    is_aligned,
    load_bias,
    matmul_into,
    on_device,
    row_statistics,
    rows_within,
    store_label,
    tile_position,
    tile_source,
)

# The matrix of logit gradients starts every row on a 128-byte line.
PITCH_WORDS = 64
# fp16 gradients are brought to at most 2**-4, which leaves room for sums over rows.
HALF_TOP_EXPONENT = -4


@triton.jit
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


@triton.jit
def gradient_kernel(
    hidden,  # [R, D] or its descriptor
    weight,  # [V, D] or its descriptor
    bias,  # [V]
    token_ids,  # [R] int64
    lse,  # [R] fp32
    grad_logprobs,  # [R] fp32
    grad_entropy,  # [R] fp32, with HAS_ENTROPY
    entropy,  # [R] fp32, with HAS_ENTROPY
    gradient,  # [R, pitch] out
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
    column = tl.load(token_ids + rows, mask=row_mask, other=-1).to(tl.int32)
    words = tl.arange(0, WORDS)
    logprobs = sums * inverse_temperature - row_lse[:, None]
    factor = tl.zeros([ROWS, WORDS], dtype=tl.float32) - row_grad[:, None]
    if HAS_ENTROPY:
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
        row_grad_entropy = tl.load(grad_entropy + rows, mask=row_mask, other=0.0) * inverse_temperature
        factor -= row_grad_entropy[:, None] * (logprobs + row_entropy[:, None])
    result = tl.where(present[None, :], tl.exp2(logprobs * LOG2_E) * factor, 0.0)
    hit = words[None, :] == (column - word_start)[:, None]
    result = tl.where(hit, result + row_grad[:, None], result)
    if HAS_SOFTCAP:
        capped = sums / softcap
        result *= 1.0 - capped * capped
    result = tl.where((column >= 0)[:, None], result, 0.0)
    at = rows.to(tl.int64)[:, None] * pitch + (word_start + words)[None, :]
    inside = row_mask[:, None] & (word_start + words < num_valid)[None, :]
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)


def logprob_forward(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D] in hidden's dtype
    bias: Tensor | None,  # [V]
    token_ids: Tensor,  # [A] int64
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    want_entropy: bool,
    workspace_bytes: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [A], log-sum-exp [A], entropy [A] (or [0]), fp32. ``blocks`` replaces the chooser's choice."""
    num_rows = hidden.shape[0]
    logprobs, lse = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    entropy = hidden.new_empty(num_rows if want_entropy else 0, dtype=torch.float32)
    if num_rows == 0:
        return logprobs, lse, entropy
    weight = weight[:num_valid_vocab]
    if blocks is None:
        op = STATISTICS_RICH if want_entropy or softcap is not None else STATISTICS
        blocks = choose_blocks(op, capability_of(hidden), hidden.dtype, is_aligned(hidden, weight))
    num_tiles = triton.cdiv(num_valid_vocab, blocks.words)
    parts = 3 if want_entropy else 2
    chunk = rows_within(workspace_bytes, 4 * parts * num_tiles + 4, num_rows, blocks.rows)
    statistics = hidden.new_empty(parts * num_tiles * chunk, dtype=torch.float32)
    labels = hidden.new_empty(chunk, dtype=torch.float32)
    with on_device(hidden):
        for first in range(0, num_rows, chunk):
            rows = slice(first, min(first + chunk, num_rows))
            size = rows.stop - first
            maxima, totals, *moments = statistics[: parts * num_tiles * size].view(parts, 1, num_tiles, size)
            moments = moments[0] if want_entropy else None
            grid, arguments, constants = _tiles(hidden[rows], weight, bias, blocks, softcap)
            statistics_kernel[grid](
                *arguments,
                token_ids[rows],
                maxima,
                totals,
                moments,
                labels,
                size,
                *weight.shape,
                1.0 if softcap is None else softcap,
                1.0 / temperature,
                HAS_MOMENT=want_entropy,
                **constants,
            )
            combine(
                maxima,
                totals,
                moments,
                labels[None, :size],
                token_ids[rows],
                logprobs[None, rows],
                ignore_index=IGNORE_INDEX,
                lse=lse[rows],
                entropy=entropy[rows] if want_entropy else None,
            )
    return logprobs, lse, entropy


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, softcap: float | None
) -> tuple[tuple[int], tuple, dict]:
    """Grid, first arguments and constants of a kernel over all tiles of [R, D] rows and [V, D] valid words."""
    aligned = is_aligned(hidden, weight)
    tma = blocks.tma and aligned
    constants = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": aligned and hidden.shape[1] % blocks.dim == 0,
        "TMA": tma,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    hidden_source = tile_source(hidden, (blocks.rows, blocks.dim), tma)
    weight_source = tile_source(weight, (blocks.words, blocks.dim), tma)
    grid = (triton.cdiv(hidden.shape[0], blocks.rows) * triton.cdiv(weight.shape[0], blocks.words),)
    return grid, (hidden_source, weight_source, bias), constants


def logprob_backward(
    grad_logprobs: Tensor,  # [A]
    grad_entropy: Tensor | None,  # [A]
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D] in hidden's dtype
    bias: Tensor | None,  # [V]
    token_ids: Tensor,  # [A] int64
    lse: Tensor,  # [A]
    entropy: Tensor,  # [A] or [0]
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias in their own dtypes; None where ``needs`` is False."""
    num_rows = hidden.shape[0]
    valid = weight[:num_valid_vocab]
    if blocks is None:
        op = GRADIENT_RICH if grad_entropy is not None or softcap is not None else GRADIENT
        blocks = choose_blocks(op, capability_of(hidden), hidden.dtype, is_aligned(hidden, valid))
    pitch = triton.cdiv(num_valid_vocab, PITCH_WORDS) * PITCH_WORDS
    chunk = _chunk_rows(hidden, pitch, needs[1], workspace_bytes, blocks)
    grads, undo_scale = _scaled_gradients(grad_logprobs, grad_entropy, hidden.dtype)
    sums = _GradientSums(hidden, weight, bias, num_valid_vocab, needs, chunk, undo_scale)
    matrix = hidden.new_empty((chunk, pitch))
    with on_device(hidden):
        for first in range(0, num_rows, chunk):
            rows = slice(first, min(first + chunk, num_rows))
            grid, arguments, constants = _tiles(hidden[rows], valid, bias, blocks, softcap)
            gradient_kernel[grid](
                *arguments,
                token_ids[rows],
                lse[rows],
                grads[0][rows],
                None if grad_entropy is None else grads[1][rows],
                None if grad_entropy is None else entropy[rows],
                matrix,
                rows.stop - first,
                *valid.shape,
                pitch,
                1.0 if softcap is None else softcap,
                1.0 / temperature,
                HAS_ENTROPY=grad_entropy is not None,
                **constants,
            )
            sums.add(matrix[: rows.stop - first, :num_valid_vocab], token_ids[rows], rows)
        return sums.finish()


def _chunk_rows(hidden: Tensor, pitch: int, needs_weight: bool, workspace_bytes: int, blocks: Blocks) -> int:
    """Rows of equal chunks whose logit gradients, and copied hidden rows for the weight, fit the workspace."""
    num_rows, dim = hidden.shape
    bytes_per_row = hidden.element_size() * (pitch + (dim if needs_weight else 0)) + 16
    limit = max(workspace_bytes // bytes_per_row // blocks.rows, 1)
    num_blocks = triton.cdiv(max(num_rows, 1), blocks.rows)
    return min(triton.cdiv(num_blocks, triton.cdiv(num_blocks, limit)) * blocks.rows, max(num_rows, 1))


def _scaled_gradients(
    grad_logprobs: Tensor, grad_entropy: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """Upstream gradients in fp32, and for fp16 what undoes the power of two that they were multiplied by."""
    grads = [grad.float() for grad in (grad_logprobs, grad_entropy) if grad is not None]
    if dtype != torch.float16 or grad_logprobs.numel() == 0:
        return grads, None
    largest = torch.stack([grad.abs().amax() for grad in grads]).amax()
    exponent = torch.frexp(largest).exponent - HALF_TOP_EXPONENT
    exponent = exponent.clamp(-100, 100).float()
    return [grad * torch.exp2(-exponent) for grad in grads], torch.exp2(exponent)


class _GradientSums:
    """Gradients of hidden, weight and bias, added up over chunks in order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        num_valid: int,
        needs: tuple[bool, bool, bool],
        chunk: int,
        undo_scale: Tensor | None,
    ):
        self.inputs, self.num_valid, self.undo_scale = (hidden, weight, bias), num_valid, undo_scale
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.bias = self.weight = self.hidden_rows = None
        if needs[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=torch.float32)
        if needs[1]:
            # One chunk needs no sum: cuBLAS rounds the result itself.
            dtype = weight.dtype if chunk >= hidden.shape[0] else torch.float32
            self.weight = torch.empty_like(weight, dtype=dtype)
            self.weight[num_valid if hidden.shape[0] else 0 :].zero_()
            self.hidden_rows = hidden.new_empty((chunk, hidden.shape[1]))

    def add(self, gradient: Tensor, token_ids: Tensor, rows: slice) -> None:
        """Add one chunk's logit gradients [R, V]."""
        hidden, weight, _ = self.inputs
        if self.bias is not None:
            self.bias[: self.num_valid] += gradient.sum(dim=0, dtype=torch.float32)
        if self.weight is not None:
            # Whatever ignored rows hold, NaN too, does not reach the weight.
            copy = self.hidden_rows[: gradient.shape[0]].copy_(hidden[rows])
            copy.masked_fill_((token_ids == IGNORE_INDEX)[:, None], 0.0)
            beta = 0.0 if rows.start == 0 else 1.0
            matmul_into(self.weight[: self.num_valid], gradient.t(), copy, beta=beta)
        if self.hidden is not None:
            matmul_into(self.hidden[rows], gradient, weight[: self.num_valid], beta=0.0)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients without fp16's scale and in their own dtypes."""
        results = []
        for total, like in zip((self.hidden, self.weight, self.bias), self.inputs, strict=True):
            if total is not None and self.undo_scale is not None:
                total.mul_(self.undo_scale)
            results.append(None if total is None else total.to(like.dtype))
        return tuple(results)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with few and with all features."""
    cases = [combine_case("logprob", write_lse=True, has_moment=entropy) for entropy in (False, True)]
    for dtype in dtypes:
        for aligned in (True, False):
            for op in (STATISTICS, GRADIENT):
                cases.append(_case(op, dtype, capability, aligned=aligned, even=aligned))
                cases.append(_case(op, dtype, capability, aligned=aligned, bias=True))
            for op in (STATISTICS_RICH, GRADIENT_RICH):
                cases.append(_case(op, dtype, capability, aligned=aligned, even=aligned, softcap=True))
                cases.append(_case(op, dtype, capability, aligned=aligned, even=aligned, entropy=True))
                cases.append(
                    _case(op, dtype, capability, aligned=aligned, bias=True, softcap=True, entropy=True)
                )
    return cases


def _case(
    op: str,
    dtype: str,
    capability: int,
    *,
    aligned: bool,
    even: bool = False,
    bias: bool = False,
    softcap: bool = False,
    entropy: bool = False,
) -> CompileCase:
    """One kernel with a choice of features; ``even``: the width is a multiple of the block."""
    blocks = choose_blocks(op, capability, DTYPES[dtype], aligned)
    tma = blocks.tma and aligned
    if op in (STATISTICS, STATISTICS_RICH):
        kernel, flag, optional = statistics_kernel, "HAS_MOMENT", ("moments",)
        pointers = {name: "*fp32" for name in ("maxima", "totals", "labels")}
    else:
        kernel, flag, optional = gradient_kernel, "HAS_ENTROPY", ("grad_entropy", "entropy")
        pointers = {"lse": "*fp32", "grad_logprobs": "*fp32", "gradient": f"*{dtype}"}
    pointers["token_ids"] = "*i64"
    for name, size in (("hidden", blocks.rows), ("weight", blocks.words)):
        pointers[name] = f"tensordesc<{dtype}[{size}, {blocks.dim}]>" if tma else f"*{dtype}"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": even,
        "TMA": tma,
        "HAS_BIAS": bias,
        "HAS_SOFTCAP": softcap,
        flag: entropy,
    }
    for name in (*optional, "bias"):
        if bias if name == "bias" else entropy:
            pointers[name] = f"*{dtype}" if name == "bias" else "*fp32"
        else:
            constexprs[name] = None
    wanted = {"bias": bias, "softcap": softcap, "entropy": entropy, "ragged": not even}
    features = "".join(f" {name}" for name, value in wanted.items() if value)
    source = "tma" if tma else "aligned" if aligned else "unaligned"
    return compile_case(
        kernel,
        f"{op} {dtype} {source}{features}",
        pointers=pointers,
        floats=("softcap", "inverse_temperature"),
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=dtype != "fp32",
        divisible=(("dim",) if aligned else ()) + (("pitch",) if kernel is gradient_kernel else ()),
    )
