"""The contrastive target in Triton, one pass over both heads: the "tiles" structure stores no logits.

c = alpha z_w + (1 - alpha) z_l; target = c_y - logsumexp(c), and log pi_l(y) from the same pass.

One alpha, no softcap: one fp32 accumulator takes both heads' dots, so neither hidden state nor logit is
rounded. The plain head comes first: the accumulator is z_l, whose statistics are taken at once; then
it is multiplied by (1 - alpha) / alpha, the better head is added, and alpha multiplies the result. Exact
at alpha 1; |alpha| < 2**-40 is read as 2**-40, exact at alpha 0. The other order is NaN at alpha 1.
A softcap, or several alphas, need z_w and z_l apart: two accumulators in smaller tiles, and every alpha
of a sweep is mixed from the same two tiles.

The "logits" structure does the same with stored rows in the place of tiles: one fp32 buffer takes both heads'
products one after the other, or two buffers take one each.

Left out: argument checks and the custom operation (contrastive.py); the reference formula is there too. The kernels
are in triton_contrast.py and triton_stored_rows.py.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import HeadSettings, OnlineLogSumExp, end_logsumexp
from inverseq_kernels.triton_blocks import (
    CONTRAST,
    CONTRAST_BIAS,
    CONTRAST_PAIR,
    TILES,
    Blocks,
    capability_of,
    choose_blocks,
    choose_structure,
    is_aligned,
)
from inverseq_kernels.triton_common import combine, in_dtype_of, on_device, pitch_of, rows_within, tile_source
from inverseq_kernels.triton_contrast import contrast_kernel, contrast_pair_kernel, contrast_rows_kernel
from inverseq_kernels.triton_stored import StoredLogits, padded_bias, stored_rows

Head = tuple[Tensor, Tensor, Tensor | None]  # hidden [A, D], weight and bias of the valid words


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
    structure: str | None = None,
    blocks: Blocks | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets [K, A] and log pi_l(y) [A], fp32; ignored rows are 0.

    ``structure`` and ``blocks`` replace the choosers' choices.
    With ``group`` the weights are this rank's part of the vocabulary and the results are the whole one's.
    """
    num_alphas, num_rows = alphas.shape[0], hidden_w.shape[0]
    use_pair = num_alphas > 1 or softcap is not None
    is_shared = weight_w.data_ptr() == weight_l.data_ptr() and weight_w.dtype == weight_l.dtype
    weight_w, bias_w = in_dtype_of(hidden_w, weight_w[:num_valid_vocab], bias_w)
    weight_l, bias_l = in_dtype_of(hidden_l, weight_l[:num_valid_vocab], bias_l)
    if is_shared and hidden_w.dtype == hidden_l.dtype and weight_w.shape == weight_l.shape:
        weight_l = weight_w
    if structure is None:
        dtype = hidden_w.dtype if hidden_w.dtype == hidden_l.dtype else None
        aligned = is_aligned(hidden_w, weight_w, hidden_l, weight_l)
        structure = choose_structure(capability_of(hidden_w), dtype, aligned)
    if structure == TILES and blocks is None:
        op = CONTRAST if bias_w is None and bias_l is None else CONTRAST_BIAS
        blocks = choose_blocks(CONTRAST_PAIR if use_pair else op, capability_of(hidden_w))
    heads = ((hidden_w, weight_w, bias_w), (hidden_l, weight_l, bias_l))
    settings = HeadSettings(softcap, temperature, num_valid_vocab)
    run = _Sets(structure, blocks, use_pair, settings, workspace_bytes)
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

    structure: str
    blocks: Blocks | None
    use_pair: bool
    settings: HeadSettings
    workspace_bytes: int

    def write(
        self,
        heads: tuple[Head, Head],
        token_ids: Tensor,  # [A]
        alphas: Tensor,  # [K, A] or [K, 1]
        all_labels: Tensor | None,  # [K + 1, A] out, given where the statistics are combined with other ranks'
        outputs: tuple[tuple[slice, Tensor, Tensor | None], ...],  # sets, their log-probs or maxima, their sums
    ) -> None:
        """Run the GEMMs over row chunks that fit the workspace, and end or combine their log-sum-exps."""
        hidden, num_valid, num_sets = heads[0][0], self.settings.num_valid_vocab, alphas.shape[0] + 1
        num_rows, buffers = hidden.shape[0], []
        if num_rows == 0 or num_valid == 0:
            return
        if self.structure == TILES:
            num_tiles = triton.cdiv(num_valid, self.blocks.words)
            chunk = rows_within(self.workspace_bytes, num_sets * (8 * num_tiles + 4), num_rows, self.blocks.rows)
        else:
            num_tiles, num_buffers = 1, 2 if self.use_pair else 1
            row_bytes = 4 * num_buffers * pitch_of(num_valid) + 12 * num_sets
            chunk = stored_rows(self.workspace_bytes, row_bytes, num_rows)
            buffers = [StoredLogits(hidden, self.settings, chunk, self.blocks) for _ in range(num_buffers)]
            heads = tuple((hidden, weight, padded_bias(bias, num_valid)) for hidden, weight, bias in heads)
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
                better, plain = ((hidden[rows], weight, bias) for hidden, weight, bias in heads)
                row_alphas = alphas if alphas.shape[1] == 1 else alphas[:, rows]
                written = (maxima, totals, labels)
                if self.structure == TILES:
                    self._tiles(better, plain, token_ids[rows], row_alphas, written)
                elif self.use_pair:
                    self._rows_of_two(buffers, better, plain, token_ids[rows], row_alphas, written)
                else:
                    self._rows_of_one(buffers[0], better, plain, token_ids[rows], row_alphas[0], written)
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

    def _rows_of_one(
        self,
        logits: StoredLogits,
        better: Head,
        plain: Head,
        token_ids: Tensor,  # [R]
        alphas: Tensor,  # [R] or [1]
        outputs: tuple[Tensor, Tensor, Tensor],  # maxima and totals [2, 1, R], labels [2, R]: mixed, plain
    ) -> None:
        """Both heads' products in one buffer, the plain head's first; their statistics after each."""
        mixed, reference = ((maxima, totals, None, labels) for maxima, totals, labels in zip(*outputs, strict=True))
        logits.write(plain[0], plain[1])
        logits.write_statistics(plain[2], token_ids, reference, rescale=alphas)
        logits.write(better[0], better[1], beta=1.0)
        logits.write_statistics(better[2], token_ids, mixed, other_bias=plain[2], mixed=alphas)

    def _rows_of_two(
        self,
        buffers: list[StoredLogits],
        better: Head,
        plain: Head,
        token_ids: Tensor,  # [R]
        alphas: Tensor,  # [K, R] or [K, 1]
        outputs: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """A buffer for each head's products, mixed under every alpha as they are read."""
        for logits, head in zip(buffers, (better, plain), strict=True):
            logits.write(head[0], head[1])
        constants = buffers[0].constants(None)
        del constants["HAS_BIAS"]
        contrast_rows_kernel[buffers[0].grid(token_ids)](
            *(logits.products for logits in buffers),
            better[2],
            plain[2],
            token_ids,
            alphas,
            *outputs,
            *buffers[0].sizes(token_ids),
            alphas.shape[0],
            alphas.stride(0),
            0 if alphas.shape[1] == 1 else 1,
            *buffers[0].numbers(),
            HAS_BIAS_W=better[2] is not None,
            HAS_BIAS_L=plain[2] is not None,
            **constants,
        )

    def _tiles(
        self,
        better: Head,
        plain: Head,
        token_ids: Tensor,  # [R]
        alphas: Tensor,  # [K, R] or [K, 1]
        outputs: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Launch one kernel over all tiles of a row chunk."""
        blocks, softcap, inverse_temperature = self.blocks, self.settings.softcap, 1.0 / self.settings.temperature
        num_rows, num_valid = better[0].shape[0], better[1].shape[0]
        sources = []
        for hidden, weight, bias in (better, plain):
            sources += [tile_source(hidden, (blocks.rows, blocks.dim), blocks.tma)]
            sources += [tile_source(weight, (blocks.words, blocks.dim), blocks.tma), bias]
        row_stride = 0 if alphas.shape[1] == 1 else 1
        dims = (better[0].shape[1], plain[0].shape[1])
        shared = {
            "ROWS": blocks.rows,
            "WORDS": blocks.words,
            "DIM": blocks.dim,
            "GROUP_ROWS": blocks.group_rows,
            "EVEN_DIM": all(dim % blocks.dim == 0 for dim in dims),
            "TMA": blocks.tma,
            "HAS_BIAS_W": better[2] is not None,
            "HAS_BIAS_L": plain[2] is not None,
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
        }
        grid = (triton.cdiv(num_rows, blocks.rows) * triton.cdiv(num_valid, blocks.words),)
        common = (*sources, token_ids, alphas, *outputs, num_rows, num_valid, *dims)
        if self.use_pair:
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
