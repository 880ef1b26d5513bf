"""The contrastive target on the torch backend, for any number of alphas from one pass over both heads.

With c = alpha z_w + (1 - alpha) z_l the target is c_y - logsumexp(c): the two softmax normalisers cancel.
The logits are mixed in fp32, so nothing is rounded, and log pi_l(y) comes from the same tiles.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import (
    Head,
    HeadSettings,
    OnlineLogSumExp,
    blocks,
    gather_labels_,
    load_rows,
)
from inverseq_kernels.torch_logprob import STATE_VECTORS, plan_tiles


def _mix_tile(
    out: Tensor, logits: list[Tensor], alpha: Tensor, heads: tuple[Head, Head], start: int, stop: int
) -> None:
    """out = alpha z_w + (1 - alpha) z_l for a tile of finite logits; words that either head removes: -inf."""
    torch.mul(logits[0], alpha, out=out).addcmul_(logits[1], 1 - alpha)
    for head in heads:
        head.remove_words(out, start, stop)


def _reduce_(
    group: dist.ProcessGroup, states: tuple[OnlineLogSumExp, ...], labels: tuple[Tensor, ...]
) -> None:
    """Combine the log-sum-exps over the group's vocabulary; a label logit is 0 but where its word lives."""
    for state in states:
        state.reduce_(group)
    for logits in labels:
        dist.all_reduce(logits, group=group)


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
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets [K, A] and log pi_l(y) [A], fp32 or float64; ignored rows are 0.
    With ``group`` the weights are this rank's part of the vocabulary and the results are the whole one's.
    """
    settings = HeadSettings(softcap, temperature, num_valid_vocab)
    better, plain = Head(hidden_w, weight_w, bias_w, settings), Head(hidden_l, weight_l, bias_l, settings)
    num_alphas, num_rows = alphas.shape[0], hidden_w.shape[0]
    like = hidden_w.new_empty(0, dtype=better.dtype)
    mixed = [OnlineLogSumExp(like, num_rows) for _ in range(num_alphas)]
    reference = OnlineLogSumExp(like, num_rows)
    labels = like.new_zeros((num_alphas, num_rows))
    reference_labels = like.new_zeros(num_rows)
    alphas = alphas.to(like.dtype).expand(num_alphas, num_rows)
    # The last alpha is mixed in the better head's own tile.
    num_tiles = 2 if num_alphas == 1 else 3
    rows_per_tile, block_words = plan_tiles(
        num_rows,
        [better, plain],
        tiles=num_tiles,
        vectors=STATE_VECTORS * (num_alphas + 1),
        workspace_bytes=workspace_bytes,
    )
    tiles = [like.new_empty(min(rows_per_tile, num_rows) * block_words) for _ in range(num_tiles)]
    for start, stop in blocks(better.num_words, block_words):
        for first, last in blocks(num_rows, rows_per_tile):
            rows, shape = slice(first, last), (last - first, stop - start)
            views = [tile[: shape[0] * shape[1]].view(shape) for tile in tiles]
            for head, hidden, view in zip((better, plain), (hidden_w, hidden_l), views[:2], strict=True):
                operand = load_rows(hidden, token_ids, rows, head.operand_dtype)
                head.write_logits(view, operand, start, stop, block_words)
            for k, state in enumerate(mixed):
                out = views[0] if k == num_alphas - 1 else views[2]
                _mix_tile(out, views, alphas[k, rows][:, None], (better, plain), start, stop)
                gather_labels_(labels[k, rows], out, token_ids[rows], start, stop)
                state.add_(out, rows)
            plain.remove_words(views[1], start, stop)
            gather_labels_(reference_labels[rows], views[1], token_ids[rows], start, stop)
            reference.add_(views[1], rows)
    if group is not None:
        _reduce_(group, (*mixed, reference), (labels, reference_labels))
    ignored = token_ids == IGNORE_INDEX
    for k, state in enumerate(mixed):
        labels[k] = state.logprobs(labels[k])
    return labels.masked_fill_(ignored, 0.0), reference.logprobs(reference_labels).masked_fill_(ignored, 0.0)
