"""The squared log-ratio loss sum_a m_a (t_a - log pi(y_a))^2 / denominator, gradients made in the forward.

The targets are known and the loss is row-local, so hidden's and weight's gradients follow from each row
chunk's logits at once: three matmuls instead of four. The operation sums over rows; the division by the
denominator stays in autograd, so that fp16 gradients are not made tiny before a loss scale reaches them. The
sums of an fp16 weight and bias, which pass 65,504 with some thousand rows, are kept divided by a power of two.
"""

import torch
from torch import Tensor

from inverseq_kernels import backends, checks
from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import disabled_autocast


@torch.library.custom_op(
    "inverseq_kernels::squared_log_ratio",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor targets, "
    "Tensor row_weights, float? softcap, float temperature, int num_valid_vocab, bool[] needs, "
    "int workspace_bytes, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _loss_op(
    hidden,
    weight,
    bias,
    token_ids,
    targets,
    row_weights,
    softcap,
    temperature,
    num_valid_vocab,
    needs,
    workspace_bytes,
    backend,
):
    one = torch.ones((), dtype=checks.accumulate_dtype(hidden.dtype), device=hidden.device)
    with disabled_autocast(hidden):
        loss, logprobs, *gradients = backends.backend_module(
            backend, backends.LOSS
        ).squared_log_ratio_forward(
            *backends.contiguous_head(hidden, weight, bias),
            token_ids.contiguous(),
            targets.contiguous(),
            row_weights.contiguous(),
            one,
            softcap=softcap,
            temperature=temperature,
            num_valid_vocab=num_valid_vocab,
            needs=tuple(needs),
            workspace_bytes=workspace_bytes,
        )
    return (loss, logprobs, *backends.finish_scaled_gradients(gradients, (hidden, weight, bias)))


@_loss_op.register_fake
def _loss_fake(
    hidden, weight, bias, token_ids, targets, row_weights, softcap, temperature, num_valid_vocab, needs, *_
):
    dtype = checks.accumulate_dtype(hidden.dtype)
    loss, logprobs = hidden.new_empty((), dtype=dtype), hidden.new_empty((hidden.shape[0],), dtype=dtype)
    powers = hidden.new_empty((2,), dtype=torch.float32)
    return (loss, logprobs, *backends.empty_gradients((hidden, weight, bias), needs), powers)


def _setup_context(ctx, inputs, output) -> None:
    _, logprobs, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(logprobs, *gradients)
    # Else autograd makes a tensor of zeros for each of them, as large as all gradients together.
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[9]


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    *gradients, powers = ctx.saved_tensors
    grad_loss = grad_loss.detach()
    factors = (grad_loss, grad_loss * powers[0], grad_loss * powers[1])
    gradients = tuple(
        backends.times(gradient, factor) if need else None
        for gradient, factor, need in zip(gradients, factors, ctx.needs, strict=True)
    )
    return (*checks.forbid_double_backward(gradients), *[None] * 9)


_loss_op.register_autograd(_backward, setup_context=_setup_context)


def squared_log_ratio_loss(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D]
    token_ids: Tensor,  # [A] int64
    targets: Tensor,  # [A] fp32
    *,
    denominator: float | Tensor,  # number or 0-d
    loss_mask: Tensor | None = None,  # [A] bool, or fp32 weights >= 0
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss (0-d fp32) and the policy's log-probs [A] fp32, detached.

    Equals ``(loss_mask * (targets - logprobs).square()).sum() / denominator`` with ``logprobs`` as in
    ``linear_logprob``; gradients reach hidden, weight and bias only. ``denominator`` counts over the whole
    optimizer step, so micro-batches and ranks add up. Rows with IGNORE_INDEX or weight 0 add nothing and
    may hold NaN targets. Raises ValueError naming the argument. Source: Inverse-Q*, Algorithm 1.
    """
    checks.check_head("", hidden, weight, bias)
    checks.forbid_forward_mode(hidden, weight, bias)
    checks.check_rows("token_ids", token_ids, hidden, (torch.int64,))
    dtype = checks.accumulate_dtype(hidden.dtype)
    checks.check_rows("targets", targets, hidden, (torch.float32, dtype))
    if loss_mask is not None:
        checks.check_rows("loss_mask", loss_mask, hidden, (torch.bool, torch.float32, dtype))
    softcap, temperature, valid = checks.check_settings(
        softcap, temperature, num_valid_vocab, weight.shape[0]
    )
    denominator = _check_denominator(denominator, hidden, dtype)
    if checks.should_check_values(token_ids):
        checks.check_token_values(token_ids, valid)
        checks.check_bias_values("bias", bias)
        if loss_mask is not None and not bool((loss_mask >= 0).all()):
            raise ValueError("loss_mask must be >= 0 in every row")
    row_weights = (token_ids != IGNORE_INDEX).to(dtype)
    if loss_mask is not None:
        row_weights = torch.where(row_weights > 0, loss_mask.detach().to(dtype), 0.0)
    heads = (hidden, weight, bias)
    needs = [torch.is_grad_enabled() and one is not None and one.requires_grad for one in heads]
    loss, logprobs, *_ = torch.ops.inverseq_kernels.squared_log_ratio(
        hidden,
        weight,
        bias,
        token_ids,
        targets.detach().to(dtype),
        row_weights,
        softcap,
        temperature,
        valid,
        needs,
        backends.resolve_workspace(workspace_bytes, hidden),
        backends.choose_backend(backend, backends.LOSS, hidden),
    )
    return loss / denominator, logprobs.detach()


def _check_denominator(denominator: float | Tensor, hidden: Tensor, dtype: torch.dtype) -> float | Tensor:
    if isinstance(denominator, Tensor):
        checks.check_tensor("denominator", denominator, 0, hidden.device)
        if checks.should_check_values(denominator) and not bool(denominator > 0):
            raise ValueError(f"denominator must be > 0, got {denominator.item()!r}")
        return denominator.detach().to(dtype)
    if not checks.is_number(denominator) or denominator <= 0:
        raise ValueError(f"denominator must be a finite number > 0 or a 0-d tensor, got {denominator!r}")
    return float(denominator)
