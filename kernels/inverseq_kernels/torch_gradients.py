"""Gradients of the head's inputs on the torch backend: from [R, V] logit gradients to hidden, weight, bias.

One row chunk at a time: the caller fills a [R, V] fp32 buffer with logits, turns it in place into the
gradient of the logits (onehot - P made in fp32 before any rounding), and ``GradientSums`` runs the two
matmuls. The weight's gradient is summed in fp32 in chunk order, so it is deterministic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inverseq_kernels.torch_head import MIN_ROWS, Head, blocks, matmul_into

# Columns per elementwise pass where a pass needs a temporary of its own.
PASS_COLUMNS = 2048
# [A] vectors alive in one call beside its results.
VECTORS = 8


@dataclass(frozen=True)
class ChunkPlan:
    """How one call cuts its rows and, where operands are converted, its vocabulary."""

    rows: int
    block_words: int
    num_chunks: int

    def new_buffer(self, hidden: Tensor, head: Head) -> Tensor:
        """The logits buffer of one chunk, flat."""
        rows = min(self.rows, hidden.shape[0])
        return hidden.new_empty(rows * head.num_words, dtype=head.dtype)


def plan_chunks(
    hidden: Tensor, weight: Tensor, head: Head, needs: tuple[bool, bool, bool], workspace_bytes: int
) -> ChunkPlan:
    """Choose rows per chunk and words per converted block so that all temporaries fit the workspace."""
    num_rows, size = hidden.shape[0], head.dtype.itemsize
    row_bytes = (head.num_words + 2 * PASS_COLUMNS + 3 * head.dim) * size + 64
    if head.half_matmul:
        row_bytes += head.num_words * hidden.dtype.itemsize
    word_bytes = head.bytes_per_scratch_word()
    if needs[1] and weight.dtype != head.dtype:
        word_bytes += head.dim * size
    workspace_bytes -= VECTORS * num_rows * size + head.bias_bytes()
    block_words = head.num_words
    if word_bytes:
        block_words = max(1, min(head.num_words, workspace_bytes // 4 // word_bytes))
    rows = (workspace_bytes - block_words * word_bytes) // row_bytes
    rows = max(1, min(max(rows, MIN_ROWS), num_rows))
    return ChunkPlan(rows, block_words, -(-num_rows // rows))


def write_logit_gradient_(
    logits: Tensor,  # [R, V] finite logits, overwritten
    lse: Tensor,  # [R]
    grad_logprobs: Tensor,  # [R]
    entropy: tuple[Tensor, Tensor] | None,  # (upstream gradient [R], entropy [R])
    token_ids: Tensor,  # [R]
    head: Head,
) -> None:
    """Turn logits in place into the gradient of hidden @ weight.T + bias.

    d log p_y / dz = onehot - P and dH / dz = -P (log P + H); softcap and temperature multiply both by
    (1 - (z T / softcap)^2) / T.
    """
    softcap, temperature = head.settings.softcap, head.settings.temperature
    column = token_ids.clamp(min=0)[:, None]
    label_gradient = grad_logprobs / temperature
    if softcap is not None:
        capped = logits.gather(1, column).squeeze(1) * (temperature / softcap)
        label_gradient = label_gradient * (1 - capped.square())
    for start, stop in blocks(head.num_words, PASS_COLUMNS):
        part = logits[:, start:stop]
        slope = None
        if softcap is not None:
            slope = (part * (temperature / softcap)).square_().neg_().add_(1)
        head.remove_words(part, start, stop)
        part.sub_(lse[:, None])
        if entropy is None:
            part.exp_().mul_((-grad_logprobs / temperature)[:, None])
        else:
            grad_entropy, entropy_rows = entropy
            factor = (part + entropy_rows[:, None]).clamp_(min=-1e4)
            factor.mul_((-grad_entropy / temperature)[:, None]).sub_((grad_logprobs / temperature)[:, None])
            part.exp_().mul_(factor)
        if slope is not None:
            part.mul_(slope)
    label_gradient = label_gradient.masked_fill(token_ids < 0, 0.0)  # ignored, or another rank's word
    logits.scatter_add_(1, column, label_gradient[:, None])


class GradientSums:
    """Running gradients of hidden [A, D], weight [V, D] and bias [V] over the row chunks of one call."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        needs: tuple[bool, bool, bool],
        plan: ChunkPlan,
    ):
        self.head, self.plan = head, plan
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.bias = None
        if needs_bias and bias is not None:
            self.bias = hidden.new_zeros(bias.shape[0], dtype=head.dtype)
        # One chunk needs no sum: its blocks go straight into the result, unless fp16 may overflow unscaled.
        self.direct = weight.dtype not in (head.dtype, torch.float16) and plan.num_chunks <= 1
        dtype = weight.dtype if self.direct else head.dtype
        self.weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        self._block = None
        if self.direct and needs_weight:
            self._block = weight.new_empty((plan.block_words, head.dim), dtype=head.dtype)

    def add(self, logit_gradient: Tensor, hidden_rows: Tensor, rows: slice) -> None:
        """Add one chunk: logit_gradient [R, V] fp32, hidden_rows [R, D] in the matmul's operand dtype."""
        if self.bias is not None:
            self.bias[: self.head.num_words].add_(logit_gradient.sum(dim=0))
        if self.head.half_matmul:
            logit_gradient = logit_gradient.to(self.head.operand_dtype)
        if self.hidden is not None:
            self._add_hidden(logit_gradient, rows)
        if self.weight is not None:
            self._add_weight(logit_gradient, hidden_rows)

    def _add_hidden(self, logit_gradient: Tensor, rows: slice) -> None:
        exact = self.hidden.dtype == self.head.dtype
        result = self.hidden[rows]
        if not exact:
            result = torch.zeros_like(result, dtype=self.head.dtype)
        for start, stop in blocks(self.head.num_words, self.plan.block_words):
            weight_block = self.head.weight_block(start, stop, self.plan.block_words)
            matmul_into(result, logit_gradient[:, start:stop], weight_block, accumulate=True)
        if not exact:
            self.hidden[rows].copy_(result)

    def _add_weight(self, logit_gradient: Tensor, hidden_rows: Tensor) -> None:
        for start, stop in blocks(self.head.num_words, self.plan.block_words):
            left = logit_gradient[:, start:stop].t()
            if self.direct:
                block = self._block[: stop - start]
                matmul_into(block, left, hidden_rows)
                self.weight[start:stop].copy_(block)
            else:
                matmul_into(self.weight[start:stop], left, hidden_rows, accumulate=True)

    def finish(self, scale: float | Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients times ``scale``, in the dtypes that they were summed in."""
        results = (self.hidden, self.weight, self.bias)
        for total in results:
            if total is not None and not (isinstance(scale, float) and scale == 1.0):
                total.mul_(scale)
        return results
