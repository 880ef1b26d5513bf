"""What the Triton kernels share: tiles of head logits, their softmax statistics, and the end of a log-sum-exp.

A program of a "tiles" kernel owns one tile of ROWS action rows by WORDS vocabulary entries. It accumulates
hidden @ weight.T over D in fp32, turns the sums into logits (bias, softcap, temperature), gives absent
words -inf, and leaves per row the tile's maximum and its sum of exponentials; the logit of the row's own
token is caught in the one tile that holds it. ``combine_kernel`` then ends the log-sum-exp over tiles.
Logits stay in nats, so a row's logit and its maximum cancel exactly; only exp and log run in base 2.
Every address is int64: A * V passes 2**31 at A = 16,744 for V = 128,256.

Left out: the operations themselves, what reads stored logits (triton_stored.py), tile sizes (triton_blocks.py) and
compilation without a GPU (triton_compile.py). Tiles multiply fp16 and bf16 only.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from inverseq_kernels.checks import IGNORE_INDEX

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Maximum of a tile without words: finite, so that no difference of maxima is NaN.
EMPTY_MAX = tl.constexpr(-1.0e30)
IGNORED = tl.constexpr(IGNORE_INDEX)
# How kernels are decorated: triton compiles anew for every integer that is 1 or a multiple of 16 and for every address
# on a 16-byte boundary or off it. Rows change with every call, and vectors of rows start anywhere: one binary serves
# all. Matrices, whose loads and stores are wide, keep what is known of them.
ANY_ROWS = {
    "do_not_specialize": ["num_rows", "num_alphas", "alpha_set_stride", "alpha_row_stride", "stride_logprobs"],
    "do_not_specialize_on_alignment": [
        *("token_ids", "targets", "row_weights", "alphas", "scale", "undo_scale", "grad_logprobs", "grad_entropy"),
        *("maxima", "totals", "moments", "labels", "logprobs", "lse", "entropy"),
        *("weight_factors", "hidden_factors", "factors", "entries", "offsets"),
    ],
}
SMALLEST_ALPHA = tl.constexpr(2.0**-40)
PITCH_WORDS = 64


@triton.jit
def tile_position(num_row_blocks, num_word_blocks, GROUP_ROWS: tl.constexpr):
    """Row block and word block of this program: GROUP_ROWS row blocks go through all words together.

    The programs that run at once then read about as many hidden rows as weight rows, the fewest bytes.
    """
    program = tl.program_id(0)
    per_group = GROUP_ROWS * num_word_blocks
    group = program // per_group
    first = group * GROUP_ROWS
    size = tl.minimum(num_row_blocks - first, GROUP_ROWS)
    inside = program - group * per_group
    return first + inside % size, inside // size


@triton.jit
def add_dots(
    sums,  # [ROWS, WORDS] fp32
    hidden,  # [A, D] pointer, or descriptor under TMA
    weight,  # [V, D] likewise
    row_start,
    word_start,
    num_rows,
    num_words,
    dim,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    EVEN_DIM: tl.constexpr,
    TMA: tl.constexpr,
):
    """sums + hidden @ weight.T of one tile. Rows and words past the end hold something finite or duplicated."""
    if TMA:
        for start in range(0, dim, DIM):
            hidden_tile = hidden.load([row_start, start])
            weight_tile = weight.load([word_start, start])
            sums = tl.dot(hidden_tile, weight_tile.T, sums)
    else:
        rows = tl.minimum(row_start + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        words = tl.minimum(word_start + tl.arange(0, WORDS), num_words - 1).to(tl.int64)
        columns = tl.arange(0, DIM)
        hidden_at = hidden + (rows * dim)[:, None] + columns[None, :]
        weight_at = weight + (words * dim)[None, :] + columns[:, None]
        for start in range(0, dim, DIM):
            if EVEN_DIM:
                hidden_tile = tl.load(hidden_at)
                weight_tile = tl.load(weight_at)
            else:
                hidden_tile = tl.load(hidden_at, mask=(columns < dim - start)[None, :], other=0.0)
                weight_tile = tl.load(weight_at, mask=(columns < dim - start)[:, None], other=0.0)
            sums = tl.dot(hidden_tile, weight_tile, sums)
            hidden_at += DIM
            weight_at += DIM
    return sums


@triton.jit
def load_bias(bias, word_start, num_valid, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Finite bias [WORDS] fp32 and which words are present: below num_valid and not removed by a bias of -inf."""
    words = word_start + tl.arange(0, WORDS)
    present = words < num_valid
    finite = tl.zeros([WORDS], dtype=tl.float32)
    if HAS_BIAS:
        value = tl.load(bias + words, mask=present, other=0.0).to(tl.float32)
        removed = value == float("-inf")
        finite = tl.where(removed, 0.0, value)
        present = present & (value != float("-inf"))
    return finite, present


@triton.jit
def cap(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(logits / softcap), or the logits themselves without a softcap."""
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def tanh(x):
    """tanh in fp32: odd polynomial below 0.25, where 1 - exp(-2x) cancels; relative error about 2e-7."""
    size = tl.abs(x)
    decay = tl.exp2(size * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = -0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869489))
    small = size * (1.0 + square * series)
    return tl.where(x < 0, -1.0, 1.0) * tl.where(size < 0.25, small, large)


@triton.jit
def row_statistics(logits):
    """Maximum and sum of exp(logits - maximum) of every row of a tile; (EMPTY_MAX, 0) without words."""
    maximum = tl.maximum(tl.max(logits, axis=1), EMPTY_MAX)
    total = tl.sum(tl.exp2((logits - maximum[:, None]) * LOG2_E), axis=1)
    return maximum, total


@triton.jit
def store_label(labels, logits, token_ids, rows, row_mask, word_start, WORDS: tl.constexpr):
    """Store the logit of each row's token if this tile holds it; exactly one tile does."""
    column = tl.load(token_ids + rows, mask=row_mask, other=-1).to(tl.int32) - word_start
    inside = (column >= 0) & (column < WORDS)
    hit = tl.arange(0, WORDS)[None, :] == column[:, None]
    tl.store(labels + rows, tl.sum(tl.where(hit, logits, 0.0), axis=1), mask=inside & row_mask)


@triton.jit
def logit_gradient(
    capped,  # [ROWS, WORDS] logits before the temperature
    logprobs,  # [ROWS, WORDS]
    present,  # [WORDS]
    column,  # [ROWS] of the row's token, IGNORED where the row does not count
    word_start,
    row_grad,  # [ROWS] upstream gradient of the log-prob over the temperature
    row_grad_entropy,  # [ROWS] likewise of the entropy, read with HAS_ENTROPY
    row_entropy,  # [ROWS]
    softcap,
    WORDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """(g (onehot - P) - e P (log P + H)) dz/d(raw z) in fp32; 0 in rows that do not count and in absent words."""
    factor = tl.zeros_like(logprobs) - row_grad[:, None]
    if HAS_ENTROPY:
        factor -= row_grad_entropy[:, None] * (logprobs + row_entropy[:, None])
    result = tl.where(present[None, :], tl.exp2(logprobs * LOG2_E) * factor, 0.0)
    hit = tl.arange(0, WORDS)[None, :] == (column - word_start)[:, None]
    result = tl.where(hit, result + row_grad[:, None], result)
    if HAS_SOFTCAP:
        slope = capped / softcap
        result *= 1.0 - slope * slope
    # A word that another rank holds has a negative id too, and a gradient.
    return tl.where((column != IGNORED)[:, None], result, 0.0)


@triton.jit
def load_alpha(alphas, rows, row_mask, row_stride):
    """A row's alpha for one sum of both heads' products, which is divided by it: its size is at least 2**-40."""
    alpha = tl.load(alphas + rows.to(tl.int64) * row_stride, mask=row_mask, other=1.0)
    return tl.where(tl.abs(alpha) < SMALLEST_ALPHA, SMALLEST_ALPHA, alpha)


@triton.jit(**ANY_ROWS)
def combine_kernel(
    maxima,  # [S, tiles, A] fp32
    totals,  # [S, tiles, A] fp32
    moments,  # [S, tiles, A] fp32: sum of exp(z - maximum) * (z - maximum); read with HAS_MOMENT
    labels,  # [S, A] fp32, unwritten in ignored rows
    token_ids,  # [A] int64
    logprobs,  # [S, stride_logprobs] fp32 out
    lse,  # [A] fp32 out, written with WRITE_LSE (S = 1); the sums [S, stride_logprobs] with PARTIAL
    entropy,  # [A] fp32 out, written with HAS_MOMENT (S = 1)
    num_rows,
    num_tiles,
    stride_logprobs,
    ignore_index,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """End the log-sum-exp over vocabulary tiles: log-probs of the labels, 0 in ignored rows.

    With PARTIAL other ranks hold more words: the maximum goes to ``logprobs``, the sum to ``lse``, the moment to
    ``entropy``, and the labels are not read.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    one_set = tl.program_id(1).to(tl.int64)
    row_mask = rows < num_rows
    tiles = tl.arange(0, TILES).to(tl.int64)
    base = one_set * num_tiles * num_rows
    running = tl.full([ROWS], EMPTY_MAX, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    moment = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, num_tiles, TILES):
        at = base + (start + tiles)[:, None] * num_rows + rows[None, :]
        mask = ((start + tiles) < num_tiles)[:, None] & row_mask[None, :]
        maximum = tl.load(maxima + at, mask=mask, other=EMPTY_MAX)
        part = tl.load(totals + at, mask=mask, other=0.0)
        new = tl.maximum(running, tl.max(maximum, axis=0))
        rescale = tl.exp2((running - new) * LOG2_E)
        scale = tl.exp2((maximum - new[None, :]) * LOG2_E)
        if HAS_MOMENT:
            shifted = tl.load(moments + at, mask=mask, other=0.0) + part * (maximum - new[None, :])
            moment = (moment + total * (running - new)) * rescale + tl.sum(shifted * scale, axis=0)
        total = total * rescale + tl.sum(part * scale, axis=0)
        running = new
    at = one_set * stride_logprobs + rows
    if PARTIAL:
        tl.store(logprobs + at, running, mask=row_mask)
        tl.store(lse + at, total, mask=row_mask)
        if HAS_MOMENT:
            tl.store(entropy + rows, moment, mask=row_mask)
    else:
        log_total = tl.log2(total) * LN_2
        ignored = tl.load(token_ids + rows, mask=row_mask, other=0) == ignore_index
        label = tl.load(labels + one_set * num_rows + rows, mask=row_mask & (ignored == 0), other=0.0)
        logprob = tl.where(ignored, 0.0, (label - running) - log_total)
        tl.store(logprobs + at, logprob, mask=row_mask)
        if WRITE_LSE:
            tl.store(lse + rows, running + log_total, mask=row_mask)
        if HAS_MOMENT:
            tl.store(entropy + rows, tl.where(ignored, 0.0, log_total - moment / total), mask=row_mask)


def combine(
    maxima: Tensor,  # [S, tiles, A]
    totals: Tensor,  # [S, tiles, A]
    moments: Tensor | None,  # [S, tiles, A]
    labels: Tensor,  # [S, A]
    token_ids: Tensor,  # [A]
    logprobs: Tensor,  # [S, A], rows may be a slice of a longer one
    *,
    ignore_index: int,
    lse: Tensor | None = None,  # [A]; strided like logprobs with partial
    entropy: Tensor | None = None,  # [A]
    partial: bool = False,
) -> None:
    """Launch ``combine_kernel``: log-probs and, where given, log-sum-exp and entropy, or their partial statistics."""
    num_sets, num_tiles, num_rows = maxima.shape
    combine_kernel[(triton.cdiv(num_rows, 64), num_sets)](
        maxima,
        totals,
        moments,
        labels,
        token_ids,
        logprobs,
        lse,
        entropy,
        num_rows,
        num_tiles,
        logprobs.stride(0),
        ignore_index,
        ROWS=64,
        TILES=32,
        WRITE_LSE=lse is not None,
        HAS_MOMENT=entropy is not None,
        PARTIAL=partial,
        num_warps=4,
    )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors' one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def in_dtype_of(hidden: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Weight and bias as the kernels read them: under autocast they are fp32 beside hidden in half precision."""
    return [None if tensor is None else tensor.to(hidden.dtype) for tensor in tensors]


def tile_source(matrix: Tensor, block: tuple[int, int], tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel gets for a [rows, D] matrix: the tensor, or a descriptor that loads [block] tiles."""
    if not tma:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], list(block))


def pitch_of(num_words: int) -> int:
    """Entries from one row to the next of a [rows, V] matrix whose rows start on a 128-byte line."""
    return triton.cdiv(num_words, PITCH_WORDS) * PITCH_WORDS


def rows_within(workspace_bytes: int, bytes_per_row: int, num_rows: int, block_rows: int) -> int:
    """Rows of equal chunks that the workspace allows: whole row blocks, at least one of them, at most all rows."""
    num_blocks = triton.cdiv(max(num_rows, 1), block_rows)
    limit = max(workspace_bytes // bytes_per_row // block_rows, 1)
    return min(triton.cdiv(num_blocks, triton.cdiv(num_blocks, limit)) * block_rows, max(num_rows, 1))


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> None:
    """out = beta * out + alpha * (left @ right), fp32 accumulation; with beta 0 what out holds is not read."""
    if not out.is_cuda and left.dtype != torch.float32:
        product = (left.float() @ right.float()) * alpha
        out.copy_(product) if beta == 0.0 else out.add_(product)
    elif out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
