"""linear_logprob on the torch backend: forward over tiles, backward over row chunks.

Left out: autograd and argument checks, which live in logprob.py.
"""

import torch.distributed as dist
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_gradients import GradientSums, plan_chunks, write_logit_gradient_
from inverseq_kernels.torch_head import (
    MIN_ROWS,
    Head,
    HeadSettings,
    OnlineLogSumExp,
    blocks,
    end_logsumexp,
    gather_labels_,
    load_rows,
)

# Rows per tile that keep a CPU matmul efficient; with fewer the vocabulary is cut into blocks instead.
FORWARD_ROWS = 256
# [A] vectors of one running log-sum-exp with labels, and what its last step makes of them.
STATE_VECTORS = 8


def plan_tiles(
    num_rows: int, heads: list[Head], *, tiles: int, vectors: int, workspace_bytes: int
) -> tuple[int, int]:
    """(rows, words) of a forward tile: all buffers together stay within the workspace.

    A quarter of the workspace goes to converted weight rows where a head needs them; ``tiles`` is the
    number of [rows, words] buffers and ``vectors`` that of [A] vectors that are alive at once.
    """
    num_words = heads[0].num_words
    size = heads[0].dtype.itemsize
    row_bytes = sum(2 * head.dim * head.operand_dtype.itemsize for head in heads) + 64
    word_bytes = sum(head.bytes_per_scratch_word() for head in heads)
    workspace_bytes -= vectors * num_rows * size + sum(head.bias_bytes() for head in heads)
    block_words = num_words
    if word_bytes:
        block_words = max(1, min(num_words, workspace_bytes // 4 // word_bytes))
    budget = workspace_bytes - block_words * word_bytes
    rows = min(num_rows, FORWARD_ROWS)
    fits = (budget // max(rows, 1) - row_bytes) // (tiles * size)
    block_words = max(1, min(block_words, fits))
    rows = budget // (block_words * tiles * size + row_bytes)
    return max(MIN_ROWS, min(num_rows, rows)), block_words


def logprob_forward(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    token_ids: Tensor,  # [A] int64
    *,
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int,
    want_entropy: bool,
    workspace_bytes: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [A], log-sum-exp [A] and entropy ([A], or [0] when not wanted), fp32 or float64.

    With ``group`` the weight is this rank's part of the vocabulary and the results are the whole one's.
    """
    head = Head(hidden, weight, bias, HeadSettings(softcap, temperature, num_valid_vocab))
    num_rows = hidden.shape[0]
    like = hidden.new_empty(0, dtype=head.dtype)
    state = OnlineLogSumExp(like, num_rows, want_entropy)
    labels = like.new_zeros(num_rows)
    rows_per_tile, block_words = plan_tiles(
        num_rows,
        [head],
        tiles=2 if want_entropy else 1,
        vectors=STATE_VECTORS,
        workspace_bytes=workspace_bytes,
    )
    tile_size = min(rows_per_tile, num_rows) * block_words
    tile, scratch = like.new_empty(tile_size), like.new_empty(tile_size if want_entropy else 0)
    for start, stop in blocks(head.num_words, block_words):
        for first, last in blocks(num_rows, rows_per_tile):
            rows, shape = slice(first, last), (last - first, stop - start)
            logits = tile[: shape[0] * shape[1]].view(shape)
            head.write_logits(
                logits, load_rows(hidden, token_ids, rows, head.operand_dtype), start, stop, block_words
            )
            head.remove_words(logits, start, stop)
            gather_labels_(labels[rows], logits, token_ids[rows], start, stop)
            state.add_(logits, rows, scratch[: logits.numel()].view(shape) if want_entropy else None)
    return end_logsumexp(state, labels, token_ids, group)


def logprob_backward(
    grad_logprobs: Tensor,  # [A]
    grad_entropy: Tensor | None,  # [A]
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D]
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as they were summed; None where ``needs`` is False."""
    head = Head(hidden, weight, bias, HeadSettings(softcap, temperature, num_valid_vocab))
    plan = plan_chunks(hidden, weight, head, needs, workspace_bytes)
    sums = GradientSums(hidden, weight, bias, head, needs, plan)
    ignored = token_ids == IGNORE_INDEX
    grad_logprobs = grad_logprobs.to(head.dtype).masked_fill(ignored, 0.0)
    if grad_entropy is not None:
        grad_entropy = grad_entropy.to(head.dtype).masked_fill(ignored, 0.0)
    buffer = plan.new_buffer(hidden, head)
    for first, last in blocks(hidden.shape[0], plan.rows):
        rows = slice(first, last)
        hidden_rows = load_rows(hidden, token_ids, rows, head.operand_dtype)
        logits = buffer[: (last - first) * head.num_words].view(last - first, head.num_words)
        for start, stop in blocks(head.num_words, plan.block_words):
            head.write_logits(logits[:, start:stop], hidden_rows, start, stop, plan.block_words)
        entropy_rows = None if grad_entropy is None else (grad_entropy[rows], entropy[rows])
        write_logit_gradient_(logits, lse[rows], grad_logprobs[rows], entropy_rows, token_ids[rows], head)
        sums.add(logits, hidden_rows, rows)
    return sums.finish(1.0)
