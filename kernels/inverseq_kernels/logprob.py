"""Log-probability of given tokens under a language-model head, differentiable, without storing logits.

log softmax(z)[y] with z = hidden @ weight.T + bias in fp32; the backward recomputes the logits chunk by
chunk and takes any upstream gradient. The entropy of the softmax is optional and differentiable too.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from inverseq_kernels import backends, checks, vocab_parallel
from inverseq_kernels.torch_head import disabled_autocast


@torch.library.custom_op(
    "inverseq_kernels::linear_logprob",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, float? softcap, "
    "float temperature, int num_valid_vocab, bool want_entropy, int workspace_bytes, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def _logprob_op(
    hidden,
    weight,
    bias,
    token_ids,
    softcap,
    temperature,
    num_valid_vocab,
    want_entropy,
    workspace_bytes,
    backend,
):
    with disabled_autocast(hidden):
        return backends.backend_module(backend, backends.LOGPROB).logprob_forward(
            *backends.contiguous_head(hidden, weight, bias),
            token_ids.contiguous(),
            softcap=softcap,
            temperature=temperature,
            num_valid_vocab=num_valid_vocab,
            want_entropy=want_entropy,
            workspace_bytes=workspace_bytes,
        )


@_logprob_op.register_fake
def _logprob_fake(hidden, weight, bias, token_ids, softcap, temperature, num_valid_vocab, want_entropy, *_):
    dtype = checks.accumulate_dtype(hidden.dtype)
    num_rows = hidden.shape[0]
    entropy = hidden.new_empty((num_rows if want_entropy else 0,), dtype=dtype)
    return hidden.new_empty((num_rows,), dtype=dtype), hidden.new_empty((num_rows,), dtype=dtype), entropy


@torch.library.custom_op(
    "inverseq_kernels::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor token_ids, Tensor lse, Tensor entropy, float? softcap, float temperature, int num_valid_vocab, "
    "bool[] needs, int workspace_bytes, str backend) -> (Tensor, Tensor, Tensor)",
)
def _logprob_backward_op(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    token_ids,
    lse,
    entropy,
    softcap,
    temperature,
    num_valid_vocab,
    needs,
    workspace_bytes,
    backend,
):
    with disabled_autocast(hidden):
        gradients = backends.backend_module(backend, backends.LOGPROB).logprob_backward(
            grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            *backends.contiguous_head(hidden, weight, bias),
            token_ids.contiguous(),
            lse,
            entropy,
            softcap=softcap,
            temperature=temperature,
            num_valid_vocab=num_valid_vocab,
            needs=tuple(needs),
            workspace_bytes=workspace_bytes,
        )
    return backends.finish_gradients(gradients, (hidden, weight, bias))


@_logprob_backward_op.register_fake
def _logprob_backward_fake(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    bias,
    token_ids,
    lse,
    entropy,
    softcap,
    temperature,
    valid,
    needs,
    *_,
):
    return backends.empty_gradients((hidden, weight, bias), needs)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, token_ids, *settings = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, lse, entropy)
    ctx.settings = settings
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, _grad_lse, grad_entropy):
    hidden, weight, bias, token_ids, lse, entropy = ctx.saved_tensors
    softcap, temperature, num_valid_vocab, want_entropy, workspace_bytes, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:3])
    unused = [None] * 7
    if (grad_logprobs is None and grad_entropy is None) or not any(needs):
        return None, None, None, *unused
    with torch.no_grad():
        gradients = torch.ops.inverseq_kernels.linear_logprob_backward(
            torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs,
            grad_entropy if want_entropy else None,
            hidden,
            weight,
            bias,
            token_ids,
            lse,
            entropy,
            softcap,
            temperature,
            num_valid_vocab,
            needs,
            workspace_bytes,
            backend,
        )
    gradients = tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*checks.forbid_double_backward(gradients), *unused)


_logprob_op.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,  # [A, D]
    weight: Tensor,  # [V, D]
    token_ids: Tensor,  # [A] int64
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability [A] fp32 of each token in nats, and the softmax's entropy [A] when asked for.

    Equals ``torch.nn.functional.linear(hidden, weight, bias).float().log_softmax(-1)`` gathered at
    ``token_ids`` with fp32 logits throughout, softcapped, divided by the temperature and cut to
    ``num_valid_vocab`` words. Differentiable in hidden, weight and bias for any upstream gradient, once.
    Rows with IGNORE_INDEX give 0 and no gradient. Raises ValueError naming the argument.
    With ``vocab_group`` weight and bias are this rank's words from ``vocab_start`` on, hidden is alike on all
    ranks, ``token_ids`` and ``num_valid_vocab`` are global, and hidden's gradient is summed over ranks.
    """
    checks.check_head("", hidden, weight, bias)
    checks.forbid_forward_mode(hidden, weight, bias)
    checks.check_rows("token_ids", token_ids, hidden, (torch.int64,))
    vocab_parallel.check_vocab_group(vocab_group, vocab_start)
    num_words, fewest = weight.shape[0], 1
    if vocab_group is not None:
        num_valid_vocab, fewest = vocab_parallel.local_valid_vocab(num_valid_vocab, vocab_start, num_words), 0
    softcap, temperature, valid = checks.check_settings(
        softcap, temperature, num_valid_vocab, num_words, fewest_valid=fewest
    )
    workspace_bytes = backends.resolve_workspace(workspace_bytes, hidden)
    if checks.should_check_values(token_ids):
        checks.check_bias_values("bias", bias)
        if vocab_group is None:
            checks.check_token_values(token_ids, valid)
    if vocab_group is not None:
        logprobs, entropy = vocab_parallel.parallel_logprob(
            (hidden, weight, bias),
            token_ids,
            vocab_start=vocab_start,
            want_entropy=bool(return_entropy),
            settings=vocab_parallel.settings(softcap, temperature, valid, workspace_bytes),
            backend=backends.choose_backend(backend, backends.LOGPROB, hidden),
            group=vocab_group,
        )
        return (logprobs, entropy) if return_entropy else logprobs
    logprobs, _, entropy = torch.ops.inverseq_kernels.linear_logprob(
        hidden,
        weight,
        bias,
        token_ids,
        *(softcap, temperature, valid, bool(return_entropy), workspace_bytes),
        backends.choose_backend(backend, backends.LOGPROB, hidden),
    )
    return (logprobs, entropy) if return_entropy else logprobs
