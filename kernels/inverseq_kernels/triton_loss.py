"""The squared log-ratio loss in Triton and cuBLAS: three GEMMs, gradients made in the forward.

L = sum_a m_a (t_a - l_a)^2 / denominator with l_a = log softmax(z_a)[y_a], hence
dL/dz = 2 m (l - t) (onehot - P) / denominator. By chunks of rows that fit the workspace, in the "tiles" structure

    exponential_kernel      GEMM 1; exponentials in hidden's dtype, fp32 maxima, sums and label logits
    combine, row factors    log-sum-exp, log-probs, and the row's coefficient, all fp32
    logit_gradient_kernel   G = S (P - onehot) in place; in most rows this writes the token's entry only

or in the "logits" structure

    GEMM 1 (cuBLAS)         logits in fp32
    loss_rows_kernel        log-sum-exp, log-probs, coefficient, and G = coefficient (onehot - P) in place

and then in either

    weight += G.T @ (factor * hidden)         GEMM 2 (cuBLAS), fp32 sum over chunks in order, no atomics
    hidden's gradient = factor * (G @ weight) GEMM 3 (cuBLAS), scaled in place

The workspace holds G, its statistics and, where hidden needs no gradient, the scaled hidden rows; the rows of
hidden's gradient otherwise lend their place to them. Without any gradient the forward of the log-prob
operation does the work. fp16 makes the weight's gradient divided by the largest row weight and hidden state
(powers of two), so that neither small nor large ones leave its range, and multiplies its fp32 sum back at the end.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import HeadSettings
from inverseq_kernels.triton_blocks import (
    TILES,
    Blocks,
    capability_of,
    choose_loss_blocks,
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
from inverseq_kernels.triton_exponentials import (
    exponential_kernel,
)
from inverseq_kernels.triton_logprob import logprob_forward
from inverseq_kernels.triton_rows import (
    choose_row_blocks,
    column_sum_kernel,
    logit_gradient_kernel,
    row_factor_kernel,
    scale_rows_kernel,
)
from inverseq_kernels.triton_stored import StoredLogits, padded_bias, stored_rows

# fp16 exponentials carry a factor 2**15, which the GEMMs take out again.
HALF_UNIT = 2.0**-15
# fp16 rows of hidden are brought to at most 2**5 before a row's coefficient multiplies them.
HALF_HIDDEN_EXPONENT = 5


def tile_rows(
    num_rows: int, num_words: int, row_bytes: int, dtype: torch.dtype, blocks: Blocks, workspace_bytes: int
) -> int:
    """Rows of equal chunks, whole row blocks each, whose temporaries fit the workspace; ``row_bytes`` come on top."""
    row_bytes += pitch_of(num_words) * dtype.itemsize + 8 * triton.cdiv(num_words, blocks.words) + 24
    return rows_within(workspace_bytes, row_bytes, num_rows, blocks.rows)


def squared_log_ratio_forward(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D], read in hidden's dtype
    bias: Tensor | None,  # [V], read in hidden's dtype
    token_ids: Tensor,  # [A] int64
    targets: Tensor,  # [A] fp32, may be NaN where the row weight is 0
    row_weights: Tensor,  # [A] fp32, 0 on ignored rows
    denominator: Tensor,  # 0-d fp32
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    needs: tuple[bool, bool, bool],
    workspace_bytes: int,
    structure: str | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, log-probs [A] and, where needed, gradients of hidden, weight and bias for upstream gradient 1.

    Gradients of an fp32 weight and bias, and sums that fp16 may not hold, are fp32. ``structure`` and ``blocks``
    replace the choosers' choices.
    """
    if not any(needs):
        logprobs, _, _ = logprob_forward(
            hidden,
            weight,
            bias,
            token_ids,
            softcap=softcap,
            temperature=temperature,
            num_valid_vocab=num_valid_vocab,
            want_entropy=False,
            workspace_bytes=workspace_bytes,
            structure=structure,
        )
        return _loss(logprobs, targets, row_weights) / denominator, logprobs, None, None, None
    head = in_dtype_of(hidden, hidden, weight[:num_valid_vocab], bias)
    settings = HeadSettings(softcap, temperature, num_valid_vocab)
    if structure is None:
        structure = choose_structure(capability_of(hidden), hidden.dtype, is_aligned(*head[:2]))
    row_bytes = hidden.shape[1] * hidden.element_size() if needs[1] and not needs[0] else 0
    logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    scales = _coefficient_scales(row_weights, denominator, hidden)
    with on_device(hidden):
        chunks = (_TileChunks if structure == TILES else _LogitChunks)(
            head, settings, row_bytes, workspace_bytes, blocks
        )
        sums = _GradientSums((hidden, weight, bias), head[1], needs, chunks.num_rows)
        for first in range(0, hidden.shape[0], chunks.num_rows):
            rows = slice(first, min(first + chunks.num_rows, hidden.shape[0]))
            gradient, factors = chunks.logit_gradient(
                rows, token_ids[rows], targets[rows], row_weights[rows], scales, logprobs[rows]
            )
            sums.add(gradient, factors, rows)
        gradients = sums.finish(scales[1])
    return (_loss(logprobs, targets, row_weights) / denominator, logprobs, *gradients)


def _loss(logprobs: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Sum of weighted squares; a row of weight 0 adds 0 even where its target or log-prob is NaN."""
    residual = torch.where(row_weights > 0, logprobs - targets, 0.0)
    return (row_weights * residual.square()).sum()


def _coefficient_scales(row_weights: Tensor, denominator: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What row coefficients are multiplied by before the GEMMs, and gradients after them; 0-d fp32 each.

    fp16 divides by the powers of two of the largest row weight and of the largest entry of a row of hidden that counts
    first, which leaves room for log-ratios between 2**-10 and 2**9 nats, and by the denominator last.
    """
    if hidden.dtype != torch.float16 or hidden.numel() == 0:
        return 1.0 / denominator, torch.ones_like(denominator)
    least, most = torch.aminmax(hidden, dim=1)
    sizes = torch.where(row_weights > 0, torch.maximum(most, -least), 0.0)
    exponents = [torch.frexp(values.amax().float()).exponent for values in (row_weights, sizes)]
    power = torch.exp2((sum(exponents) - HALF_HIDDEN_EXPONENT).clamp(-100, 100).float())
    return 1.0 / power, power / denominator


class _LogitChunks:
    """The fp32 logits and row values of one chunk; reused by all chunks of a call."""

    def __init__(
        self,
        head: Sequence[Tensor | None],  # hidden [A, D], weight and bias of the valid words
        settings: HeadSettings,
        row_bytes: int,
        workspace_bytes: int,
        blocks: Blocks | None,
    ):
        self.hidden, self.weight, bias = head
        self.bias = padded_bias(bias, settings.num_valid_vocab)
        row_bytes += 4 * pitch_of(settings.num_valid_vocab) + 24
        self.num_rows = stored_rows(workspace_bytes, row_bytes, self.hidden.shape[0])
        self.stored = StoredLogits(self.hidden, settings, self.num_rows, blocks)
        self.factors = self.hidden.new_empty((2, self.num_rows), dtype=torch.float32)

    def logit_gradient(
        self,
        rows: slice,
        token_ids: Tensor,  # [R]
        targets: Tensor,  # [R]
        row_weights: Tensor,  # [R]
        scales: tuple[Tensor, Tensor],
        logprobs: Tensor,  # [R] out
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Write the chunk's log-probs; return G [R, V] and the factors [R] of hidden's rows and of G @ weight."""
        weight_factors, hidden_factors = self.factors[:, : token_ids.shape[0]]
        self.stored.write(self.hidden[rows], self.weight)
        gradient = self.stored.write_loss_gradient(
            self.bias,
            token_ids,
            (targets, row_weights, *scales),
            (logprobs, weight_factors, hidden_factors),
            self.hidden.dtype,
        )
        return gradient, (weight_factors, hidden_factors)


class _TileChunks:
    """The [rows, V] matrix of exponentials and row values of one chunk; reused by all chunks of a call."""

    def __init__(
        self,
        head: Sequence[Tensor | None],  # hidden [A, D], weight and bias of the valid words
        settings: HeadSettings,
        row_bytes: int,
        workspace_bytes: int,
        blocks: Blocks | None,
    ):
        self.hidden, self.weight, self.bias = hidden, weight, _ = head
        capability, num_words = capability_of(hidden), weight.shape[0]
        if blocks is None:
            blocks = choose_loss_blocks(capability, settings.softcap is not None, hidden.shape[1])
        self.settings, self.blocks, self.row_blocks = settings, blocks, choose_row_blocks(capability)
        self.tight = hidden.dtype == torch.float16
        self.num_tiles = triton.cdiv(num_words, blocks.words)
        self.num_rows = tile_rows(hidden.shape[0], num_words, row_bytes, hidden.dtype, blocks, workspace_bytes)
        rows = min(self.num_rows, hidden.shape[0])
        self.exponentials = hidden.new_empty((rows, pitch_of(num_words)))
        self.statistics = hidden.new_empty(2 * self.num_tiles * rows, dtype=torch.float32)
        self.row_values = hidden.new_empty((6, rows), dtype=torch.float32)

    def logit_gradient(
        self,
        rows: slice,
        token_ids: Tensor,  # [R]
        targets: Tensor,  # [R]
        row_weights: Tensor,  # [R]
        scales: tuple[Tensor, Tensor],
        logprobs: Tensor,  # [R] out
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Write the chunk's log-probs; return G [R, V] and the factors [R] of hidden's rows and of G @ weight."""
        num_rows, num_valid = token_ids.shape[0], self.settings.num_valid_vocab
        matrix = self.exponentials[:num_rows]
        maxima, totals = self.statistics[: 2 * self.num_tiles * num_rows].view(2, 1, self.num_tiles, -1)
        labels, lse, weight_factors, hidden_factors, entries, offsets = self.row_values[:, :num_rows]
        self._exponentials(self.hidden[rows], token_ids, matrix, maxima, totals, labels)
        combine(maxima, totals, None, labels[None], token_ids, logprobs[None], ignore_index=IGNORE_INDEX, lse=lse)
        softcap = self.settings.softcap
        row_factor_kernel[(triton.cdiv(num_rows, self.row_blocks.factor_rows),)](
            logprobs,
            lse,
            labels,
            targets,
            row_weights,
            *scales,
            weight_factors,
            hidden_factors,
            entries,
            offsets,
            num_rows,
            1.0 if softcap is None else softcap,
            self.settings.temperature,
            HAS_SOFTCAP=softcap is not None,
            TIGHT=self.tight,
            ROWS=self.row_blocks.factor_rows,
        )
        grid = (
            triton.cdiv(num_rows, self.row_blocks.gradient_rows),
            triton.cdiv(num_valid, self.row_blocks.gradient_words),
        )
        logit_gradient_kernel[grid](
            matrix,
            maxima,
            offsets,
            weight_factors,
            entries,
            token_ids,
            num_rows,
            num_valid,
            matrix.stride(0),
            ROWS=self.row_blocks.gradient_rows,
            SEGMENT=self.row_blocks.gradient_words,
            TILE_WORDS=self.blocks.words,
            TIGHT=self.tight,
        )
        return matrix[:, :num_valid], (weight_factors, hidden_factors)

    def _exponentials(
        self, hidden: Tensor, token_ids: Tensor, matrix: Tensor, maxima: Tensor, totals: Tensor, labels: Tensor
    ) -> None:
        """Launch GEMM 1 over all tiles of the chunk."""
        blocks, softcap = self.blocks, self.settings.softcap
        num_rows, (num_valid, dim) = hidden.shape[0], self.weight.shape
        exponential_kernel[(triton.cdiv(num_rows, blocks.rows) * triton.cdiv(num_valid, blocks.words),)](
            tile_source(hidden, (blocks.rows, blocks.dim), blocks.tma),
            tile_source(self.weight, (blocks.words, blocks.dim), blocks.tma),
            self.bias,
            token_ids,
            matrix,
            maxima,
            totals,
            labels,
            num_rows,
            num_valid,
            dim,
            matrix.stride(0),
            1.0 if softcap is None else softcap,
            self.settings.temperature,
            1.0 / self.settings.temperature,
            ROWS=blocks.rows,
            WORDS=blocks.words,
            DIM=blocks.dim,
            GROUP_ROWS=blocks.group_rows,
            EVEN_DIM=dim % blocks.dim == 0,
            TMA=blocks.tma,
            HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=softcap is not None,
            TIGHT=self.tight,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )


class _GradientSums:
    """Gradients of hidden, weight and bias, added up over chunks in order."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None],  # hidden, weight and bias as the caller has them
        valid: Tensor,  # [valid words, D] of the weight in hidden's dtype
        needs: tuple[bool, bool, bool],
        chunk: int,
    ):
        hidden, weight, bias = inputs
        self.source, self.valid = hidden, valid
        self.row_blocks = choose_row_blocks(capability_of(hidden))
        self.unit = HALF_UNIT if hidden.dtype == torch.float16 else 1.0
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = self.bias = self.scaled = None
        if needs[1]:
            # One chunk needs no sum: cuBLAS writes bf16 itself. fp16 may not hold a sum over rows.
            direct = chunk >= hidden.shape[0] and weight.dtype == hidden.dtype != torch.float16
            self.weight = torch.empty_like(weight, dtype=weight.dtype if direct else torch.float32)
            self.weight[valid.shape[0] if hidden.shape[0] > 0 else 0 :].zero_()
            if self.hidden is None:
                self.scaled = hidden.new_empty((min(chunk, hidden.shape[0]), hidden.shape[1]))
        if needs[2] and bias is not None:
            self.bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, gradient: Tensor, factors: tuple[Tensor, Tensor], rows: slice) -> None:
        """Add one chunk: gradient = G [R, V], factors [R] of hidden's rows and of the rows of G @ weight."""
        if self.bias is not None:
            self._add_bias(gradient, factors[0])
        if self.weight is not None:
            scaled = self.hidden[rows] if self.scaled is None else self.scaled[: gradient.shape[0]]
            self._scale_rows(self.source[rows], factors[0], scaled)
            beta = 0.0 if rows.start == 0 else 1.0
            matmul_into(self.weight[: gradient.shape[1]], gradient.t(), scaled, beta=beta, alpha=self.unit)
        if self.hidden is not None:
            result = self.hidden[rows]
            matmul_into(result, gradient, self.valid, beta=0.0, alpha=self.unit)
            self._scale_rows(result, factors[1], result)

    def finish(self, undo_scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the dtypes that they were summed in; hidden's has had ``undo_scale`` in its factors."""
        for total in (self.weight, self.bias):
            if total is not None and self.source.dtype == torch.float16:
                total.mul_(undo_scale)
        return self.hidden, self.weight, self.bias

    def _scale_rows(self, source: Tensor, factors: Tensor, scaled: Tensor) -> None:
        (num_rows, dim), blocks = source.shape, self.row_blocks
        grid = (triton.cdiv(num_rows, blocks.scale_rows), triton.cdiv(dim, blocks.scale_columns))
        scale_rows_kernel[grid](
            source, factors, scaled, num_rows, dim, ROWS=blocks.scale_rows, DIM=blocks.scale_columns
        )

    def _add_bias(self, gradient: Tensor, factors: Tensor) -> None:
        (num_rows, num_valid), blocks = gradient.shape, self.row_blocks
        column_sum_kernel[(triton.cdiv(num_valid, blocks.sum_words),)](
            gradient,
            factors,
            self.bias,
            self.unit,
            num_rows,
            num_valid,
            gradient.stride(0),
            ROWS=blocks.sum_rows,
            WORDS=blocks.sum_words,
        )
