"""log softmax(z)[y] and its gradients in Triton and cuBLAS, z = hidden @ weight.T + bias in fp32.

Forward: one GEMM, without stored logits in the "tiles" structure, and what is left of every tile, or of every row
with "logits": maximum, sum and, for the entropy, sum exp(z - max) (z - max). Backward, any upstream gradients g of
log p_y and e of the entropy H, by chunks of rows that fit the workspace:

    G = (g (onehot - P) - e P (log P + H)) dz/d(raw z)     GEMM 1 again; its epilogue, or a kernel on the stored
                                                           logits, makes G in fp32 and rounds it once
    hidden's gradient = G @ weight                         GEMM 2 (cuBLAS)
    weight += G.T @ hidden                                 GEMM 3 (cuBLAS), fp32 sum in chunk order, no atomics

fp16 gradients are scaled by a power of two near 1 / max(|g|, |e|) before G is rounded and scaled back at the end:
G of a mean over thousands of tokens would sink below fp16's range.

Left out: argument checks, the custom operations and autograd (logprob.py); kernels are in triton_logits.py and
triton_stored_rows.py.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from inverseq_kernels.backends import times
from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import HeadSettings, OnlineLogSumExp, end_logsumexp
from inverseq_kernels.triton_blocks import (
    GRADIENT,
    GRADIENT_RICH,
    STATISTICS,
    STATISTICS_RICH,
    TILES,
    Blocks,
    capability_of,
    choose_blocks,
    choose_structure,
    is_aligned,
)
from inverseq_kernels.triton_common import (
    combine,
    in_dtype_of,
    matmul_into,
    on_device,
    pitch_of,
    rows_within,
    tile_source,
)
from inverseq_kernels.triton_logits import gradient_kernel, statistics_kernel
from inverseq_kernels.triton_stored import StoredLogits, padded_bias, stored_rows

# fp16 gradients are brought to at most 2**-4, which leaves room for sums over rows.
HALF_TOP_EXPONENT = -4


def logprob_forward(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D], read in hidden's dtype
    bias: Tensor | None,  # [V]
    token_ids: Tensor,  # [A] int64
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    want_entropy: bool,
    workspace_bytes: int,
    structure: str | None = None,
    blocks: Blocks | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [A], log-sum-exp [A], entropy [A] (or [0]), fp32.

    ``structure`` and ``blocks`` replace the choosers' choices.
    With ``group`` the weight is this rank's part of the vocabulary and the results are the whole one's.
    """
    num_rows = hidden.shape[0]
    if group is None:
        logprobs, lse = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
        entropy = hidden.new_empty(num_rows if want_entropy else 0, dtype=torch.float32)
        outputs, labels = (logprobs, lse, entropy if want_entropy else None), None
    else:
        state = OnlineLogSumExp(hidden.new_empty(0, dtype=torch.float32), num_rows, want_entropy)
        outputs, labels = (state.maximum, state.sum, state.moment), state.maximum.new_zeros(num_rows)
    weight, bias = in_dtype_of(hidden, weight[:num_valid_vocab], bias)
    if structure is None:
        structure = choose_structure(capability_of(hidden), hidden.dtype, is_aligned(hidden, weight))
    settings = HeadSettings(softcap, temperature, num_valid_vocab)
    if num_rows > 0 and num_valid_vocab > 0:
        with on_device(hidden):
            head = (hidden, weight, bias)
            _write_statistics(head, token_ids, labels, outputs, settings, workspace_bytes, structure, blocks)
    return (logprobs, lse, entropy) if group is None else end_logsumexp(state, labels, token_ids, group)


def _write_statistics(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden [A, D], weight and bias of the valid words
    token_ids: Tensor,  # [A]
    all_labels: Tensor | None,  # [A] out, given where the statistics are combined with other ranks'
    outputs: tuple[Tensor, Tensor, Tensor | None],  # log-probs, log-sum-exp, entropy; or maxima, sums, moments
    settings: HeadSettings,
    workspace_bytes: int,
    structure: str,
    blocks: Blocks | None,
) -> None:
    """Run the GEMM over row chunks that fit the workspace, and end or combine their log-sum-exps."""
    hidden, weight, bias = head
    (num_rows, dim), num_words, stored = hidden.shape, weight.shape[0], None
    parts = 2 if outputs[2] is None else 3
    if structure == TILES:
        if blocks is None:
            op = STATISTICS_RICH if parts == 3 or settings.softcap is not None else STATISTICS
            blocks = choose_blocks(op, capability_of(hidden), dim)
        num_tiles = triton.cdiv(num_words, blocks.words)
        chunk = rows_within(workspace_bytes, 4 * parts * num_tiles + 4, num_rows, blocks.rows)
    else:
        num_tiles = 1
        chunk = stored_rows(workspace_bytes, 4 * (pitch_of(num_words) + parts + 1), num_rows)
        stored = StoredLogits(hidden, settings, chunk, blocks)
        bias = padded_bias(bias, num_words)
    statistics = hidden.new_empty(parts * num_tiles * chunk, dtype=torch.float32)
    chunk_labels = hidden.new_empty(chunk, dtype=torch.float32) if all_labels is None else None
    for first in range(0, num_rows, chunk):
        rows = slice(first, min(first + chunk, num_rows))
        size = rows.stop - first
        maxima, totals, *moments = statistics[: parts * num_tiles * size].view(parts, 1, num_tiles, size)
        labels = chunk_labels[:size] if all_labels is None else all_labels[rows]
        written = (maxima, totals, moments[0] if moments else None, labels)
        if stored is None:
            _tile_statistics((hidden[rows], weight, bias), token_ids[rows], written, settings, blocks)
        else:
            stored.write(hidden[rows], weight)
            stored.write_statistics(bias, token_ids[rows], written)
        logprobs, lse, entropy = (None if output is None else output[rows] for output in outputs)
        combine(
            *(*written[:3], labels[None]),
            token_ids[rows],
            logprobs[None],
            ignore_index=IGNORE_INDEX,
            lse=lse,
            entropy=entropy,
            partial=all_labels is not None,
        )


def _tile_statistics(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden [R, D], weight and bias of the valid words
    token_ids: Tensor,  # [R]
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor],  # maxima, totals, moments, labels
    settings: HeadSettings,
    blocks: Blocks,
) -> None:
    """Launch ``statistics_kernel`` over all tiles."""
    hidden, weight, bias = head
    grid, arguments, constants = _tiles(hidden, weight, bias, blocks, settings.softcap)
    statistics_kernel[grid](
        *arguments,
        token_ids,
        *outputs,
        hidden.shape[0],
        *weight.shape,
        1.0 if settings.softcap is None else settings.softcap,
        1.0 / settings.temperature,
        HAS_MOMENT=outputs[2] is not None,
        **constants,
    )


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, softcap: float | None
) -> tuple[tuple[int], tuple, dict]:
    """Grid, first arguments and constants of a kernel over all tiles of [R, D] rows and [V, D] valid words."""
    constants = {
        "ROWS": blocks.rows,
        "WORDS": blocks.words,
        "DIM": blocks.dim,
        "GROUP_ROWS": blocks.group_rows,
        "EVEN_DIM": hidden.shape[1] % blocks.dim == 0,
        "TMA": blocks.tma,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    hidden_source = tile_source(hidden, (blocks.rows, blocks.dim), blocks.tma)
    weight_source = tile_source(weight, (blocks.words, blocks.dim), blocks.tma)
    grid = (triton.cdiv(hidden.shape[0], blocks.rows) * triton.cdiv(weight.shape[0], blocks.words),)
    return grid, (hidden_source, weight_source, bias), constants


def logprob_backward(
    grad_logprobs: Tensor,  # [A]
    grad_entropy: Tensor | None,  # [A]
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D], read in hidden's dtype
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
    structure: str | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as they were summed; None where ``needs`` is False."""
    (num_rows, dim), stored = hidden.shape, None
    valid, read_bias = in_dtype_of(hidden, weight[:num_valid_vocab], bias)
    if structure is None:
        structure = choose_structure(capability_of(hidden), hidden.dtype, is_aligned(hidden, valid))
    settings = HeadSettings(softcap, temperature, num_valid_vocab)
    row_bytes = 16 + (dim * hidden.element_size() if needs[1] else 0)  # with the copy of hidden for the weight
    pitch = pitch_of(num_valid_vocab)
    if structure == TILES:
        if blocks is None:
            op = GRADIENT_RICH if grad_entropy is not None or softcap is not None else GRADIENT
            blocks = choose_blocks(op, capability_of(hidden), dim)
        row_bytes += pitch * hidden.element_size()
        chunk = rows_within(workspace_bytes, row_bytes, num_rows, blocks.rows)
        matrix = hidden.new_empty((chunk, pitch))
    else:
        chunk = stored_rows(workspace_bytes, row_bytes + 4 * pitch, num_rows)
        stored = StoredLogits(hidden, settings, chunk, blocks)
        read_bias = padded_bias(read_bias, num_valid_vocab)
    grads, undo_scale = _scaled_gradients(grad_logprobs, grad_entropy, token_ids, hidden.dtype)
    vectors = (lse, grads[0], *((None, None) if grad_entropy is None else (grads[1], entropy)))
    sums = _GradientSums((hidden, weight, bias), valid, needs, chunk, undo_scale)
    with on_device(hidden):
        for first in range(0, num_rows, chunk):
            rows = slice(first, min(first + chunk, num_rows))
            values = [None if vector is None else vector[rows] for vector in vectors]
            if stored is None:
                head = (hidden[rows], valid, read_bias)
                gradient = _tile_gradient(head, token_ids[rows], values, matrix, settings, blocks)
            else:
                stored.write(hidden[rows], valid)
                gradient = stored.write_gradient(read_bias, token_ids[rows], values, hidden.dtype)
            sums.add(gradient, token_ids[rows], rows)
        return sums.finish()


def _tile_gradient(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden [R, D], weight and bias of the valid words
    token_ids: Tensor,  # [R]
    vectors: Sequence[Tensor | None],  # lse, gradients of log-probs and entropy, entropy
    matrix: Tensor,  # [chunk, pitch] out
    settings: HeadSettings,
    blocks: Blocks,
) -> Tensor:
    """Launch ``gradient_kernel`` over all tiles; the logit gradients [R, V]."""
    hidden, weight, bias = head
    grid, arguments, constants = _tiles(hidden, weight, bias, blocks, settings.softcap)
    gradient_kernel[grid](
        *arguments,
        token_ids,
        *vectors,
        matrix,
        hidden.shape[0],
        *weight.shape,
        matrix.stride(0),
        1.0 if settings.softcap is None else settings.softcap,
        1.0 / settings.temperature,
        HAS_ENTROPY=vectors[2] is not None,
        **constants,
    )
    return matrix[: hidden.shape[0], : weight.shape[0]]


def _scaled_gradients(
    grad_logprobs: Tensor, grad_entropy: Tensor | None, token_ids: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """Upstream gradients in fp32, and for fp16 what undoes the power of two that they were multiplied by.

    Ignored rows are 0, so that what they hold does not choose the power.
    """
    ignored = token_ids == IGNORE_INDEX
    grads = [grad.float().masked_fill(ignored, 0.0) for grad in (grad_logprobs, grad_entropy) if grad is not None]
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
        inputs: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight and bias as the caller has them
        valid: Tensor,  # [valid words, D] of the weight in hidden's dtype
        needs: tuple[bool, bool, bool],
        chunk: int,
        undo_scale: Tensor | None,
    ):
        hidden, weight, bias = inputs
        self.source, self.valid, self.undo_scale = hidden, valid, undo_scale
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.bias = self.weight = self.hidden_rows = None
        if needs[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=torch.float32)
        if needs[1]:
            # One chunk needs no sum: cuBLAS rounds the result itself, and not at all for an fp32 weight.
            direct = chunk >= hidden.shape[0] and weight.dtype == hidden.dtype
            self.weight = torch.empty_like(weight, dtype=weight.dtype if direct else torch.float32)
            self.weight[valid.shape[0] if hidden.shape[0] else 0 :].zero_()
            self.hidden_rows = hidden.new_empty((chunk, hidden.shape[1]))

    def add(self, gradient: Tensor, token_ids: Tensor, rows: slice) -> None:
        """Add one chunk's logit gradients [R, V]."""
        num_valid = self.valid.shape[0]
        if self.bias is not None:
            self.bias[:num_valid] += gradient.sum(dim=0, dtype=torch.float32)
        if self.weight is not None:
            # Whatever ignored rows hold, NaN too, does not reach the weight.
            copy = self.hidden_rows[: gradient.shape[0]].copy_(self.source[rows])
            copy.masked_fill_((token_ids == IGNORE_INDEX)[:, None], 0.0)
            beta = 0.0 if rows.start == 0 else 1.0
            matmul_into(self.weight[:num_valid], gradient.t(), copy, beta=beta)
        if self.hidden is not None:
            matmul_into(self.hidden[rows], gradient, self.valid, beta=0.0)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients without fp16's scale, in the dtypes that they were summed in."""
        results = (self.hidden, self.weight, self.bias)
        for total in results:
            if total is not None and self.undo_scale is not None:
                times(total, self.undo_scale, in_place=True)
        return results
