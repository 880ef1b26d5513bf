"""The contrastive target in Triton: no logits are stored, one pass over both heads.

c = alpha z_w + (1 - alpha) z_l; target = c_y - logsumexp(c), and log pi_l(y) from the same pass.

One alpha, no softcap: one fp32 accumulator takes both heads' dots, so neither hidden state nor logit is
rounded. The plain head comes first: the accumulator is z_l, whose statistics are taken at once; then
it is multiplied by (1 - alpha) / alpha, the better head is added, and alpha multiplies the result. Exact
at alpha 1; |alpha| < 2**-40 is read as 2**-40, exact at alpha 0. The other order is NaN at alpha 1.
A softcap, or several alphas, need z_w and z_l apart: two accumulators in smaller tiles, and every alpha
of a sweep is mixed from the same two tiles.

Left out: argument checks and the custom operation (contrastive.py); the reference formula is there too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import OnlineLogSumExp, end_logsumexp
from inverseq_kernels.triton_blocks import (
    CONTRAST,
    CONTRAST_PAIR,
    Blocks,
    capability_of,
    choose_blocks,
    is_aligned,
)
from inverseq_kernels.triton_common import (
    add_dots,
    cap,
    combine,
    in_dtype_of,
    load_bias,
    on_device,
    row_statistics,
    rows_within,
    store_label,
    tile_position,
    tile_source,
)
from inverseq_kernels.triton_compile import (
    DTYPES,
    CompileCase,
    combine_case,
    compile_case,
)

SMALLEST_ALPHA = tl.constexpr(2.0**-40)


@triton.jit
def _store_statistics(maxima, totals, logits, one_set, rows, row_mask, num_rows, word_block, num_word_blocks):
    """Leave one set's softmax statistics of a tile."""
    maximum, total = row_statistics(logits)
    at = ((tl.zeros([], dtype=tl.int64) + one_set) * num_word_blocks + word_block) * num_rows + rows
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(totals + at, total, mask=row_mask)


@triton.jit
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
    alpha = tl.load(alphas + rows.to(tl.int64) * alpha_row_stride, mask=row_mask, other=1.0)
    alpha = tl.where(tl.abs(alpha) < SMALLEST_ALPHA, SMALLEST_ALPHA, alpha)
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


@triton.jit
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


def contrastive_forward(
    hidden_w: Tensor,  # [A, D_w]
    weight_w: Tensor,  # [V, D_w]
    bias_w: Tensor | None,  # [V]
    hidden_l: Tensor,  # [A, D_l]
    weight_l: Tensor,  # [V, D_l]
    bias_l: Tensor | None,  # [V]
    token_ids: Tensor,  # [A] int64
    alphas: Tensor,  # [K, A] or [K, 1] fp32
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    workspace_bytes: int,
    blocks: Blocks | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets [K, A] and log pi_l(y) [A], fp32; ignored rows are 0. ``blocks`` replaces the chooser's choice.

    With ``group`` the weights are this rank's part of the vocabulary and the results are the whole one's.
    """
    num_alphas, num_rows = alphas.shape[0], hidden_w.shape[0]
    use_pair = num_alphas > 1 or softcap is not None
    is_shared = weight_w.data_ptr() == weight_l.data_ptr() and weight_w.dtype == weight_l.dtype
    weight_w, bias_w = in_dtype_of(hidden_w, weight_w[:num_valid_vocab], bias_w)
    weight_l, bias_l = in_dtype_of(hidden_l, weight_l[:num_valid_vocab], bias_l)
    if is_shared and hidden_w.dtype == hidden_l.dtype and weight_w.shape == weight_l.shape:
        weight_l = weight_w
    if blocks is None:
        aligned = is_aligned(hidden_w, weight_w, hidden_l, weight_l)
        dtype = hidden_w.dtype if hidden_w.dtype == hidden_l.dtype else torch.float32
        blocks = choose_blocks(CONTRAST_PAIR if use_pair else CONTRAST, capability_of(hidden_w), dtype, aligned)
    heads = ((hidden_w, weight_w, bias_w), (hidden_l, weight_l, bias_l))
    run = _Sets(blocks, use_pair, softcap, temperature, workspace_bytes)
    if group is None:
        # Two storages: outputs of a custom operation must not share one.
        targets = hidden_w.new_empty((num_alphas, num_rows), dtype=torch.float32)
        reference = hidden_w.new_empty((num_rows,), dtype=torch.float32)
        outputs = ((slice(num_alphas), targets, None), (slice(num_alphas, None), reference[None], None))
        run.write(heads, token_ids, alphas, None, outputs)
        return targets, reference
    state = OnlineLogSumExp(hidden_w.new_empty(0, dtype=torch.float32), num_rows)
    # One state for all alphas and the plain head, so that they travel over the group together.
    state.maximum, state.sum = (each.repeat(num_alphas + 1, 1) for each in (state.maximum, state.sum))
    labels = torch.zeros_like(state.sum)
    run.write(heads, token_ids, alphas, labels, ((slice(None), state.maximum, state.sum),))
    logprobs, _, _ = end_logsumexp(state, labels, token_ids, group)
    return logprobs[:num_alphas], logprobs[num_alphas]


@dataclass(frozen=True)
class _Sets:
    """How one call makes the statistics of its sets: every alpha's mixture, then the plain head."""

    blocks: Blocks
    use_pair: bool
    softcap: float | None
    temperature: float
    workspace_bytes: int

    def write(
        self,
        heads: tuple[tuple[Tensor, Tensor, Tensor | None], ...],  # hidden [A, D], weight and bias of the valid words
        token_ids: Tensor,  # [A]
        alphas: Tensor,  # [K, A] or [K, 1]
        all_labels: Tensor | None,  # [K + 1, A] out, given where the statistics are combined with other ranks'
        outputs: tuple[tuple[slice, Tensor, Tensor | None], ...],  # sets, their log-probs or maxima, their sums
    ) -> None:
        """Run the GEMM over row chunks whose statistics fit the workspace, and end or combine their log-sum-exps."""
        (num_rows, _), num_valid, num_sets = heads[0][0].shape, heads[0][1].shape[0], alphas.shape[0] + 1
        if num_rows == 0 or num_valid == 0:
            return
        num_tiles = triton.cdiv(num_valid, self.blocks.words)
        chunk = rows_within(self.workspace_bytes, num_sets * (8 * num_tiles + 4), num_rows, self.blocks.rows)
        hidden = heads[0][0]
        statistics = hidden.new_empty((2, num_sets * num_tiles * chunk), dtype=torch.float32)
        label_buffer = hidden.new_empty(num_sets * chunk, dtype=torch.float32)
        with on_device(hidden):
            for first in range(0, num_rows, chunk):
                rows = slice(first, min(first + chunk, num_rows))
                size = rows.stop - first
                maxima, totals = statistics[:, : num_sets * num_tiles * size].view(2, num_sets, num_tiles, size)
                labels = label_buffer[: num_sets * size].view(num_sets, size)
                if all_labels is not None:
                    labels.zero_()  # where another rank holds the word
                _launch(
                    self.blocks,
                    self.use_pair,
                    *((hidden[rows], weight, bias) for hidden, weight, bias in heads),
                    token_ids[rows],
                    alphas if alphas.shape[1] == 1 else alphas[:, rows],
                    (maxima, totals, labels),
                    self.softcap,
                    1.0 / self.temperature,
                )
                for sets, out, sums in outputs:
                    combine(
                        *(maxima[sets], totals[sets], None, labels[sets]),
                        token_ids[rows],
                        out[:, rows],
                        ignore_index=IGNORE_INDEX,
                        lse=None if sums is None else sums[:, rows],
                        partial=sums is not None,
                    )
                if all_labels is not None:
                    all_labels[:, rows] = labels


def _launch(
    blocks: Blocks,
    use_pair: bool,
    better: tuple[Tensor, Tensor, Tensor | None],
    plain: tuple[Tensor, Tensor, Tensor | None],
    token_ids: Tensor,
    alphas: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    softcap: float | None,
    inverse_temperature: float,
) -> None:
    """Start one kernel over all tiles of a row chunk."""
    num_rows, num_valid = better[0].shape[0], better[1].shape[0]
    aligned = is_aligned(better[0], better[1], plain[0], plain[1])
    tma = blocks.tma and aligned
    sources = []
    for hidden, weight, bias in (better, plain):
        sources += [tile_source(hidden, (blocks.rows, blocks.dim), tma)]
        sources += [tile_source(weight, (blocks.words, blocks.dim), tma), bias]
    row_stride = 0 if alphas.shape[1] == 1 else 1
    dims = (better[0].shape[1], plain[0].shape[1])
    shared = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": aligned and all(dim % blocks.dim == 0 for dim in dims),
        "TMA": tma,
        "HAS_BIAS_W": better[2] is not None,
        "HAS_BIAS_L": plain[2] is not None,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    grid = (triton.cdiv(num_rows, blocks.rows) * triton.cdiv(num_valid, blocks.words),)
    common = (*sources, token_ids, alphas, *outputs, num_rows, num_valid, *dims)
    if use_pair:
        cap_at = 1.0 if softcap is None else softcap
        contrast_pair_kernel[grid](
            *common,
            alphas.shape[0],
            alphas.stride(0),
            row_stride,
            cap_at,
            inverse_temperature,
            HAS_SOFTCAP=softcap is not None,
            **shared,
        )
    else:
        contrast_kernel[grid](*common, row_stride, inverse_temperature, **shared)


def compile_cases(capability: int, dtypes: Sequence[str]) -> list[CompileCase]:
    """Every configuration that a launch on this capability can choose, with few and with all features."""
    cases = [
        combine_case("contrastive", write_lse=partial, has_moment=False, partial=partial) for partial in (False, True)
    ]
    for dtype in dtypes:
        for op in (CONTRAST, CONTRAST_PAIR):
            for aligned in (True, False):
                blocks = choose_blocks(op, capability, DTYPES[dtype], aligned)
                for full in (False, True):
                    cases.append(_case(op, dtype, blocks, aligned=aligned, full=full))
    return cases


def _case(op: str, dtype: str, blocks: Blocks, *, aligned: bool, full: bool) -> CompileCase:
    """One kernel with neither or all of biases, softcap and a width that is no multiple of the block."""
    tma = blocks.tma and aligned
    pointers = {name: "*fp32" for name in ("alphas", "maxima", "totals", "labels")}
    pointers["token_ids"] = "*i64"
    for head in "wl":
        for name, size in ((f"hidden_{head}", blocks.rows), (f"weight_{head}", blocks.words)):
            pointers[name] = f"tensordesc<{dtype}[{size}, {blocks.dim}]>" if tma else f"*{dtype}"
    constexprs = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": aligned and not full,
        "TMA": tma,
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
    source = "tma" if tma else "aligned" if aligned else "unaligned"
    name = f"{op} {dtype} {source} {'full' if full else 'plain'}"
    return compile_case(
        kernel,
        name,
        pointers=pointers,
        floats=floats,
        constexprs=constexprs,
        blocks=blocks,
        is_gemm=dtype != "fp32",
        divisible=("dim_w", "dim_l") if aligned else (),
    )
