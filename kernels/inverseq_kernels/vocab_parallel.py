"""Vocabulary-parallel heads: every rank of a group holds some consecutive words of one head.

Each rank runs a backend on its own words; the partial (maximum, sum, label logit) of every row are
combined over the group, three small collectives of [A] vectors, so all ranks return the same log-probs.
The gradient of hidden, which all ranks hold alike, is summed over the group; weight and bias gradients stay
local. Every rank must call with the same rows and the same upstream gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from inverseq_kernels import backends, checks
from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import NOT_IN_SHARD, disabled_autocast


def check_vocab_group(vocab_group: object, vocab_start: int) -> None:
    """Refuse what cannot name a shard; without a group the shard must be the whole vocabulary."""
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be an int >= 0, got {vocab_start!r}")
    if vocab_group is None:
        if vocab_start != 0:
            raise ValueError(f"vocab_start is {vocab_start} without a vocab_group, expected 0")
        return
    if not isinstance(vocab_group, dist.ProcessGroup):
        raise ValueError(f"vocab_group must be a process group, got {type(vocab_group).__name__}")


def local_valid_vocab(num_valid_vocab: int | None, vocab_start: int, num_local: int) -> int:
    """How many of this rank's words count when the whole vocabulary has ``num_valid_vocab``; 0 in padding.

    What is refused here is refused on every rank: one that raises alone leaves the others waiting.
    """
    if num_valid_vocab is None:
        return num_local
    if isinstance(num_valid_vocab, bool) or not isinstance(num_valid_vocab, int):
        raise ValueError(f"num_valid_vocab must be an int, got {num_valid_vocab!r}")
    if num_valid_vocab < 1:
        raise ValueError(f"num_valid_vocab must be > 0, got {num_valid_vocab}")
    return max(0, min(num_local, num_valid_vocab - vocab_start))


def local_token_ids(token_ids: Tensor, vocab_start: int, num_valid: int, group: dist.ProcessGroup) -> Tensor:
    """Ids counted from this shard's first word; words of other ranks become NOT_IN_SHARD."""
    inside = (token_ids >= vocab_start) & (token_ids < vocab_start + num_valid)
    ignored = token_ids == IGNORE_INDEX
    if checks.should_check_values(token_ids):
        owners = inside.to(torch.float32)
        dist.all_reduce(owners, group=group)
        bad = ~ignored & (owners != 1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"token_ids[{row}] is {int(token_ids[row])}, which {int(owners[row])} ranks of vocab_group hold; "
                "expected one (check vocab_start)"
            )
    return torch.where(inside, token_ids - vocab_start, torch.where(ignored, IGNORE_INDEX, NOT_IN_SHARD))


def settings(
    softcap: float | None, temperature: float, num_valid_vocab: int, workspace_bytes: int
) -> dict[str, float | int | None]:
    """The checked numbers as a backend's keywords."""
    return {
        "softcap": softcap,
        "temperature": temperature,
        "num_valid_vocab": num_valid_vocab,
        "workspace_bytes": workspace_bytes,
    }


class _ParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, token_ids, want_entropy, settings, backend, group):
        with disabled_autocast(hidden):
            logprobs, lse, entropy = backends.backend_module(backend, backends.LOGPROB).logprob_forward(
                *backends.contiguous_head(hidden, weight, bias),
                token_ids,
                want_entropy=want_entropy,
                group=group,
                **settings,
            )
        ctx.save_for_backward(hidden, weight, bias, token_ids, lse, entropy)
        ctx.settings, ctx.backend, ctx.group, ctx.want_entropy = settings, backend, group, want_entropy
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, token_ids, lse, entropy = ctx.saved_tensors
        if grad_logprobs is None and (grad_entropy is None or not ctx.want_entropy):
            return (None,) * 8
        needs, grad_entropy = ctx.needs_input_grad[:3], grad_entropy if ctx.want_entropy else None
        with torch.no_grad(), disabled_autocast(hidden):
            if ctx.settings["num_valid_vocab"] == 0:
                gradients = _zero_gradients((hidden, weight, bias), needs)
            else:
                gradients = backends.backend_module(ctx.backend, backends.LOGPROB).logprob_backward(
                    (torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs).contiguous(),
                    None if grad_entropy is None else grad_entropy.contiguous(),
                    *backends.contiguous_head(hidden, weight, bias),
                    token_ids,
                    lse,
                    entropy,
                    needs=needs,
                    **ctx.settings,
                )
            total, *rest = gradients
            if total is not None:
                total = total.to(lse.dtype)  # ranks add up in fp32, then one rounding
                dist.all_reduce(total, group=ctx.group)
            gradients = tuple(
                None if gradient is None else gradient.to(like.dtype)
                for gradient, like in zip((total, *rest), (hidden, weight, bias), strict=True)
            )
        return (*checks.forbid_double_backward(gradients), None, None, None, None, None)


def _zero_gradients(inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.zeros_like(like) if need and like is not None else None
        for like, need in zip(inputs, needs, strict=True)
    )


def parallel_logprob(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden [A, D] alike on all ranks, weight, bias [V_local]
    token_ids: Tensor,  # [A] int64, global
    *,
    vocab_start: int,
    want_entropy: bool,
    settings: dict,
    backend: str,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Log-probs [A] and entropy [A] ([0] when not wanted) of the whole vocabulary, alike on every rank."""
    local_ids = local_token_ids(token_ids, vocab_start, settings["num_valid_vocab"], group)
    return _ParallelLogprob.apply(*head, local_ids, want_entropy, settings, backend, group)


@torch.no_grad()
def parallel_contrast(
    heads: tuple[Tensor | None, ...],  # hidden_w, weight_w, bias_w, hidden_l, weight_l, bias_l
    token_ids: Tensor,  # [A] int64, global
    alphas: Tensor,  # [K, A] or [K, 1]
    *,
    vocab_start: int,
    settings: dict,
    backend: str,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Contrastive targets [K, A] and log pi_l(y) [A] of the whole vocabulary, alike on every rank."""
    local_ids = local_token_ids(token_ids, vocab_start, settings["num_valid_vocab"], group)
    better, plain = backends.contiguous_head(*heads[:3]), backends.contiguous_head(*heads[3:])
    with disabled_autocast(heads[0]):
        return backends.backend_module(backend, backends.CONTRASTIVE).contrastive_forward(
            *better, *plain, local_ids, alphas.contiguous(), group=group, **settings
        )
