"""Argument checks: shapes, dtypes and devices always; tensor values where that costs no synchronisation.

Everything a caller can get wrong becomes a ValueError that names the argument, its value and what was
expected. Values of tensors (ids in range, size of alpha, bias without NaN or +inf) are looked at on the
CPU; on CUDA only when ``INVERSEQ_CHECK=1`` is set, and never while torch.compile traces.
"""

import math
import os
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

IGNORE_INDEX = -100
MAX_ALPHA = 1e20  # either sign: times logits of up to 1e9 it is over EMPTY_MAX, and finite in fp32
HEAD_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-sum-exps, outputs and accumulators: float64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object, ndim: int, device: torch.device | None = None) -> None:
    """Refuse what is not a dense, local tensor of ``ndim`` dimensions on ``device``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    # A DTensor can only exist after its module was imported; importing it here would cost every user.
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise ValueError(
            f"{name} is a DTensor: these operations read a local tensor. Under FSDP2 call them inside the "
            f"wrapped module's forward, where parameters are unsharded; otherwise pass {name}.full_tensor()"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} like the hidden states")


def check_head(suffix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check one head's three tensors; ``suffix`` is '', '_w' or '_l' in the argument names."""
    check_tensor(f"hidden{suffix}", hidden, 2)
    check_tensor(f"weight{suffix}", weight, 2, hidden.device)
    for name, tensor in ((f"hidden{suffix}", hidden), (f"weight{suffix}", weight)):
        if tensor.dtype not in HEAD_DTYPES:
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"weight{suffix} is {weight.dtype} and hidden{suffix} is {hidden.dtype}: float64 must be both"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight{suffix} must have at least one row, got shape {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight{suffix} has shape {tuple(weight.shape)}, expected {hidden.shape[1]} columns like "
            f"hidden{suffix}"
        )
    if bias is None:
        return
    check_tensor(f"bias{suffix}", bias, 1, hidden.device)
    if bias.dtype not in HEAD_DTYPES or (bias.dtype == torch.float64 and hidden.dtype != torch.float64):
        raise ValueError(f"bias{suffix} is {bias.dtype} beside hidden{suffix} in {hidden.dtype}")
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias{suffix} has {bias.shape[0]} entries, expected {weight.shape[0]}")


def check_rows(name: str, value: object, hidden: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check a vector with one entry per action row."""
    check_tensor(name, value, 1, hidden.device)
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {expected}, got {value.dtype}")
    if value.shape[0] != hidden.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} entries, expected {hidden.shape[0]} (rows of hidden)")


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite Python int or float; bool is not a number here.

    Compared, because torch.compile traces no ``math.isfinite`` of a number that changes from call to call.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def check_alpha(name: str, alpha: object) -> None:
    """Refuse an alpha, a Python number, under which fp32 logits would overflow."""
    if not (is_number(alpha) and abs(alpha) <= MAX_ALPHA):
        raise ValueError(
            f"{name} must be finite and up to ±{MAX_ALPHA:g}, a number or (contrastive_logprob) [A] fp32, got {alpha!r}"
        )


def check_alpha_values(alpha: Tensor) -> None:
    """The same of one alpha for each row."""
    bad = ~(alpha.abs() <= MAX_ALPHA)  # NaN compares false
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"alpha[{row}] is {float(alpha[row])}, expected a finite number up to ±{MAX_ALPHA:g}")


def check_settings(
    softcap: float | None,
    temperature: float,
    num_valid_vocab: int | None,
    vocab_size: int,
    *,
    fewest_valid: int = 1,
) -> tuple[float | None, float, int]:
    """Check the Python numbers that shape the logits and return them as float, float and int.

    ``fewest_valid`` is 0 for a shard of the vocabulary, which may hold nothing but padding.
    """
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap must be None or a finite number > 0, got {softcap!r}")
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    if num_valid_vocab is None:
        num_valid_vocab = vocab_size
    elif (
        isinstance(num_valid_vocab, bool)
        or not isinstance(num_valid_vocab, int)
        or not fewest_valid <= num_valid_vocab <= vocab_size
    ):
        raise ValueError(f"num_valid_vocab must be an int in {fewest_valid}..{vocab_size}, got {num_valid_vocab!r}")
    return None if softcap is None else float(softcap), float(temperature), num_valid_vocab


def should_check_values(tensor: Tensor) -> bool:
    """Whether reading tensor values is allowed: on CPU, or with INVERSEQ_CHECK=1; never under compile."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("INVERSEQ_CHECK") == "1"


def check_token_values(token_ids: Tensor, num_valid_vocab: int) -> None:
    """Refuse ids outside 0..num_valid_vocab-1 that are not IGNORE_INDEX."""
    bad = (token_ids != IGNORE_INDEX) & ((token_ids < 0) | (token_ids >= num_valid_vocab))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"token_ids[{row}] is {int(token_ids[row])}, expected 0..{num_valid_vocab - 1} or {IGNORE_INDEX}"
        )


def check_bias_values(name: str, bias: Tensor | None) -> None:
    """Refuse NaN and +inf in a bias; -inf removes a word and is welcome."""
    if bias is not None and bool((bias.isnan() | (bias == math.inf)).any()):
        raise ValueError(f"{name} holds NaN or +inf; only finite values and -inf are allowed")


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx, _gradient: Tensor) -> Tensor:
        raise RuntimeError("inverseq_kernels operations have no second derivative (double backward)")


def forbid_double_backward(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under create_graph=True tie the gradients to a node that raises when differentiated again.

    Without it the second derivative through the hidden states would be dropped silently, because the
    gradients were made in an operation that autograd does not see.
    """
    if not torch.is_grad_enabled():
        return gradients
    return tuple(
        None if gradient is None else _NoSecondDerivative.apply(gradient.detach().requires_grad_())
        for gradient in gradients
    )


def forbid_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse tensors with a tangent (``torch.func.jvp``, ``jacfwd``, ``hessian``, dual tensors).

    The operations are opaque to forward-mode differentiation, which would take their results for constants.
    """
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "inverseq_kernels operations have no forward-mode derivative (torch.func.jvp, jacfwd, hessian): "
                "take reverse mode, backward() or torch.autograd.grad"
            )
