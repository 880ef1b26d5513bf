"""squared_log_ratio_loss on the torch backend: loss and gradients in one pass over row chunks.

L = sum_a m_a (t_a - l_a)^2 / denominator with l_a = log softmax(z_a)[y_a], so
dL/dz = 2 m (l - t) (onehot - P) / denominator, known as soon as a row's log-sum-exp is. One fp32
[chunk, V] buffer holds logits, then exponentials, then the gradient.
"""

import torch
from torch import Tensor

from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_gradients import PASS_COLUMNS, GradientSums, plan_chunks, write_logit_gradient_
from inverseq_kernels.torch_head import EMPTY_MAX, Head, HeadSettings, blocks, load_rows
from inverseq_kernels.torch_logprob import logprob_forward


def squared_log_ratio_forward(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, log-probs [A] and, where needed, gradients of hidden, weight and bias for upstream gradient 1."""
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
        )
        return _loss(logprobs, targets, row_weights) / denominator, logprobs, None, None, None
    head = Head(hidden, weight, bias, HeadSettings(softcap, temperature, num_valid_vocab))
    plan = plan_chunks(hidden, weight, head, needs, workspace_bytes)
    sums = GradientSums(hidden, weight, bias, head, needs, plan)
    logprobs = hidden.new_zeros(hidden.shape[0], dtype=head.dtype)
    buffer = plan.new_buffer(hidden, head)
    for first, last in blocks(hidden.shape[0], plan.rows):
        rows = slice(first, last)
        hidden_rows = load_rows(hidden, token_ids, rows, head.operand_dtype)
        logits = buffer[: (last - first) * head.num_words].view(last - first, head.num_words)
        for start, stop in blocks(head.num_words, plan.block_words):
            head.write_logits(logits[:, start:stop], hidden_rows, start, stop, plan.block_words)
        logprobs[rows] = _logit_gradient_(logits, token_ids[rows], targets[rows], row_weights[rows], head)
        # A row that does not count may hold NaN, which times 0 is no 0.
        idle = ~(row_weights[rows] > 0)[:, None]
        logits.masked_fill_(idle, 0.0)
        hidden_rows.masked_fill_(idle, 0.0)
        sums.add(logits, hidden_rows, rows)
    loss = _loss(logprobs, targets, row_weights) / denominator
    return (loss, logprobs, *sums.finish(1.0 / denominator))


def _loss(logprobs: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Sum of weighted squares; a row of weight 0 adds 0 even where its target is NaN."""
    residual = torch.where(row_weights > 0, logprobs - targets, 0.0)
    return (row_weights * residual.square()).sum()


def _logit_gradient_(
    logits: Tensor,  # [R, V] finite logits, overwritten with the gradient for denominator 1
    token_ids: Tensor,  # [R]
    targets: Tensor,  # [R]
    row_weights: Tensor,  # [R]
    head: Head,
) -> Tensor:
    """Return the rows' log-probs [R] and leave 2 m (l - t) (onehot - P) dz/d(raw z) in ``logits``."""
    ignored = token_ids == IGNORE_INDEX
    column = token_ids.clamp(min=0)[:, None]
    labels = logits.gather(1, column).squeeze(1)
    if head.removed is not None:
        labels = labels + head.removed[column.squeeze(1)]
    if head.settings.softcap is not None:
        lse = _logsumexp(logits, head)
        logprobs = (labels - lse).masked_fill_(ignored, 0.0)
        upstream = _upstream(logprobs, targets, row_weights)
        write_logit_gradient_(logits, lse, upstream, None, token_ids, head)
        return logprobs
    # Without a softcap the exponentials themselves become the gradient: one exp per logit.
    head.remove_words(logits, 0, head.num_words)
    maximum = logits.amax(dim=1).clamp_(min=EMPTY_MAX)
    total = logits.sub_(maximum[:, None]).exp_().sum(dim=1)
    logprobs = (labels - maximum - total.log()).masked_fill_(ignored, 0.0)
    upstream = _upstream(logprobs, targets, row_weights) / head.settings.temperature
    logits.mul_((-upstream / total)[:, None])
    logits.scatter_add_(1, column, upstream[:, None])
    return logprobs


def _upstream(logprobs: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """dL/dl = 2 m (l - t) for denominator 1, 0 where the row does not count."""
    return torch.where(row_weights > 0, 2.0 * row_weights * (logprobs - targets), 0.0)


def _logsumexp(logits: Tensor, head: Head) -> Tensor:
    """[R] log-sum-exp of logits [R, V] that stay as they are, by column blocks."""
    maximum = logits.amax(dim=1).clamp_(min=EMPTY_MAX)
    total = torch.zeros_like(maximum)
    for start, stop in blocks(head.num_words, PASS_COLUMNS):
        part = logits[:, start:stop] - maximum[:, None]
        head.remove_words(part, start, stop)
        total.add_(part.exp_().sum(dim=1))
    return maximum + total.log()
