"""The contrastive target log softmax(alpha log pi_w + (1 - alpha) log pi_l) of given tokens.

pi_w and pi_l are two frozen distributions over one vocabulary, each given by hidden states and a head.
c = alpha z_w + (1 - alpha) z_l needs one log-sum-exp, since both normalisers cancel. No gradient is made.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from inverseq_kernels import backends, checks, vocab_parallel
from inverseq_kernels.checks import IGNORE_INDEX
from inverseq_kernels.torch_head import disabled_autocast


def contrastive_reference(
    hidden_w: Tensor,  # [A, D_w]
    weight_w: Tensor,  # [V, D_w]
    hidden_l: Tensor,  # [A, D_l]
    weight_l: Tensor,  # [V, D_l]
    token_ids: Tensor,  # [A] int64
    alpha: float | Tensor,  # number or [A]
    *,
    bias_w: Tensor | None = None,
    bias_l: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch with full logits, in the inputs' dtype: targets [A], log pi_l(y) [A]."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z_AV = torch.nn.functional.linear(hidden, weight)
        removed_V = torch.zeros_like(z_AV[0]) if bias is None else bias.isneginf() * 1.0
        z_AV = z_AV if bias is None else z_AV + bias.nan_to_num(neginf=0.0)
        z_AV = z_AV if softcap is None else softcap * torch.tanh(z_AV / softcap)
        return (z_AV / temperature).masked_fill(removed_V > 0, -math.inf)

    z_w, z_l = logits(hidden_w, weight_w, bias_w), logits(hidden_l, weight_l, bias_l)
    alpha = alpha[:, None] if isinstance(alpha, Tensor) else alpha
    removed = z_w.isneginf() | z_l.isneginf()
    mixed = (alpha * z_w + (1 - alpha) * z_l).masked_fill(removed, -math.inf)
    ignored = token_ids == IGNORE_INDEX
    column = token_ids.clamp(min=0)[:, None]
    targets = mixed.log_softmax(dim=1).gather(1, column).squeeze(1).masked_fill(ignored, 0.0)
    return targets, z_l.log_softmax(dim=1).gather(1, column).squeeze(1).masked_fill(ignored, 0.0)


@torch.library.custom_op(
    "inverseq_kernels::contrastive_logprob",
    mutates_args=(),
    schema="(Tensor hidden_w, Tensor weight_w, Tensor? bias_w, Tensor hidden_l, Tensor weight_l, "
    "Tensor? bias_l, Tensor token_ids, Tensor alphas, float? softcap, float temperature, "
    "int num_valid_vocab, int workspace_bytes, str backend) -> (Tensor, Tensor)",
)
def _contrastive_op(
    hidden_w,
    weight_w,
    bias_w,
    hidden_l,
    weight_l,
    bias_l,
    token_ids,
    alphas,
    softcap,
    temperature,
    num_valid_vocab,
    workspace_bytes,
    backend,
):
    better = backends.contiguous_head(hidden_w, weight_w, bias_w)
    # One weight for both views stays one tensor, so that a backend can see that it is shared.
    plain = backends.contiguous_head(hidden_l, weight_l, bias_l)
    layouts = [(weight.data_ptr(), weight.dtype, weight.shape, weight.stride()) for weight in (weight_w, weight_l)]
    if layouts[0] == layouts[1]:
        plain = (plain[0], better[1], plain[2])
    with disabled_autocast(hidden_w):
        return backends.backend_module(backend, backends.CONTRASTIVE).contrastive_forward(
            *better,
            *plain,
            token_ids.contiguous(),
            alphas.contiguous(),
            softcap=softcap,
            temperature=temperature,
            num_valid_vocab=num_valid_vocab,
            workspace_bytes=workspace_bytes,
        )


@_contrastive_op.register_fake
def _contrastive_fake(hidden_w, weight_w, bias_w, hidden_l, weight_l, bias_l, token_ids, alphas, *_settings):
    dtype = checks.accumulate_dtype(hidden_w.dtype)
    num_rows = hidden_w.shape[0]
    targets = hidden_w.new_empty((alphas.shape[0], num_rows), dtype=dtype)
    return targets, hidden_w.new_empty((num_rows,), dtype=dtype)


def contrastive_logprob(
    hidden_w: Tensor,  # [A, D_w]
    weight_w: Tensor,  # [V, D_w]
    hidden_l: Tensor,  # [A, D_l]
    weight_l: Tensor,  # [V, D_l]
    token_ids: Tensor,  # [A] int64
    alpha: float | Tensor,  # number or [A] fp32
    *,
    bias_w: Tensor | None = None,  # [V]
    bias_l: Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    return_reference: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability [A] of each token under softmax(alpha log pi_w + (1 - alpha) log pi_l), in nats.

    Equals ``(alpha * z_w.log_softmax(-1) + (1 - alpha) * z_l.log_softmax(-1)).log_softmax(-1)`` gathered
    at ``token_ids``, with z = hidden @ weight.T + bias in fp32, softcapped, divided by the temperature and
    cut to ``num_valid_vocab`` words. ``alpha`` is a number of size up to 1e20, or one per row; 1 and 0 are exact.
    Rows with IGNORE_INDEX give 0. With ``return_reference`` also log pi_l(y) [A] from the same pass.
    No gradient. Raises ValueError naming the argument. Source: Inverse-Q*, estimated superior policy.

    With ``vocab_group`` weights and biases are this rank's words from ``vocab_start`` on, hidden states are
    the same on every rank, ``token_ids`` and ``num_valid_vocab`` are global.
    """
    if isinstance(alpha, Tensor):
        dtype = checks.accumulate_dtype(hidden_w.dtype) if isinstance(hidden_w, Tensor) else torch.float32
        checks.check_head("_w", hidden_w, weight_w, bias_w)
        checks.check_rows("alpha", alpha, hidden_w, (dtype, torch.float32))
        if checks.should_check_values(alpha):
            checks.check_alpha_values(alpha)
        alphas = alpha.detach()[None, :]
    else:
        alphas = _alpha_column("alpha", [alpha], hidden_w)
    targets, reference = _contrast(
        hidden_w,
        weight_w,
        hidden_l,
        weight_l,
        token_ids,
        alphas,
        bias_w=bias_w,
        bias_l=bias_l,
        softcap=softcap,
        temperature=temperature,
        num_valid_vocab=num_valid_vocab,
        workspace_bytes=workspace_bytes,
        backend=backend,
        vocab_group=vocab_group,
        vocab_start=vocab_start,
    )
    return (targets[0], reference) if return_reference else targets[0]


def contrastive_logprob_sweep(
    hidden_w: Tensor,  # [A, D_w]
    weight_w: Tensor,  # [V, D_w]
    hidden_l: Tensor,  # [A, D_l]
    weight_l: Tensor,  # [V, D_l]
    token_ids: Tensor,  # [A] int64
    *,
    alphas: Sequence[float],
    bias_w: Tensor | None = None,  # [V]
    bias_l: Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    num_valid_vocab: int | None = None,
    return_reference: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``contrastive_logprob`` for every alpha of a list from one pass over both heads: [len(alphas), A].

    With ``return_reference`` also log pi_l(y) [A]. No gradient. Raises ValueError naming the argument, also for an
    empty list.
    """
    if isinstance(alphas, (Tensor, str)) or not isinstance(alphas, Sequence) or len(alphas) == 0:
        raise ValueError(f"alphas must be a non-empty list of numbers, got {alphas!r}")
    targets, reference = _contrast(
        hidden_w,
        weight_w,
        hidden_l,
        weight_l,
        token_ids,
        _alpha_column("alphas", alphas, hidden_w),
        bias_w=bias_w,
        bias_l=bias_l,
        softcap=softcap,
        temperature=temperature,
        num_valid_vocab=num_valid_vocab,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return (targets, reference) if return_reference else targets


def _alpha_column(name: str, alphas: Sequence[float], hidden: Tensor) -> Tensor:
    """[K, 1] tensor of Python numbers, made on the device without a synchronisation."""
    for alpha in alphas:
        checks.check_alpha(name, alpha)
    checks.check_tensor("hidden_w", hidden, 2)
    dtype = checks.accumulate_dtype(hidden.dtype)
    return torch.cat([hidden.new_full((1, 1), float(alpha), dtype=dtype) for alpha in alphas])


def _check_heads(hidden_w, weight_w, bias_w, hidden_l, weight_l, bias_l) -> None:
    """Check both heads and that they speak of the same rows and words."""
    checks.check_head("_w", hidden_w, weight_w, bias_w)
    checks.check_head("_l", hidden_l, weight_l, bias_l)
    if hidden_l.shape[0] != hidden_w.shape[0]:
        raise ValueError(f"hidden_l has {hidden_l.shape[0]} rows, expected {hidden_w.shape[0]} like hidden_w")
    if hidden_l.device != hidden_w.device:
        raise ValueError(f"hidden_l is on {hidden_l.device}, expected {hidden_w.device} like hidden_w")
    if (hidden_l.dtype == torch.float64) != (hidden_w.dtype == torch.float64):
        raise ValueError(f"hidden_l is {hidden_l.dtype} and hidden_w {hidden_w.dtype}: float64 must be both")
    if weight_l.shape[0] != weight_w.shape[0]:
        raise ValueError(f"weight_l has {weight_l.shape[0]} rows, expected {weight_w.shape[0]} like weight_w")


def _contrast(
    hidden_w,
    weight_w,
    hidden_l,
    weight_l,
    token_ids,
    alphas,
    *,
    bias_w,
    bias_l,
    softcap,
    temperature,
    num_valid_vocab,
    workspace_bytes,
    backend,
    vocab_group=None,
    vocab_start=0,
) -> tuple[Tensor, Tensor]:
    """Check every argument and call the custom operation without a graph."""
    _check_heads(hidden_w, weight_w, bias_w, hidden_l, weight_l, bias_l)
    checks.check_rows("token_ids", token_ids, hidden_w, (torch.int64,))
    vocab_parallel.check_vocab_group(vocab_group, vocab_start)
    if vocab_group is not None:
        num_valid_vocab = vocab_parallel.local_valid_vocab(num_valid_vocab, vocab_start, weight_w.shape[0])
    softcap, temperature, valid = checks.check_settings(
        softcap, temperature, num_valid_vocab, weight_w.shape[0], fewest_valid=1 if vocab_group is None else 0
    )
    workspace_bytes = backends.resolve_workspace(workspace_bytes, hidden_w)
    if checks.should_check_values(token_ids):
        checks.check_bias_values("bias_w", bias_w)
        checks.check_bias_values("bias_l", bias_l)
    if vocab_group is not None:
        return vocab_parallel.parallel_contrast(
            (hidden_w, weight_w, bias_w, hidden_l, weight_l, bias_l),
            token_ids,
            alphas,
            vocab_start=vocab_start,
            settings=vocab_parallel.settings(softcap, temperature, valid, workspace_bytes),
            backend=backends.choose_backend(backend, backends.CONTRASTIVE, hidden_w),
            group=vocab_group,
        )
    if checks.should_check_values(token_ids):
        checks.check_token_values(token_ids, valid)
    backend = backends.choose_backend(backend, backends.CONTRASTIVE, hidden_w)
    with torch.no_grad():
        return torch.ops.inverseq_kernels.contrastive_logprob(
            hidden_w,
            weight_w,
            bias_w,
            hidden_l,
            weight_l,
            bias_l,
            token_ids,
            alphas,
            *(softcap, temperature, valid, workspace_bytes, backend),
        )
