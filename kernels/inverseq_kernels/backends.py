"""Which backend serves a call, and how much temporary memory it may use.

``choose_backend`` is a plain function of device, dtype and what is installed; it runs in the public
functions, so the custom operations receive a name that is already decided.
"""

import importlib
import importlib.util
import os
import types
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

CUDA_WORKSPACE_BYTES = 512 * 2**20
OTHER_WORKSPACE_BYTES = 256 * 2**20

# Module stem of each operation; the file names are torch_<stem>.py and triton_<stem>.py.
CONTRASTIVE, LOGPROB, LOSS = "contrastive", "logprob", "loss"

# Read once: triton itself reads the variable when it decorates the kernels.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_OPS = frozenset(
    stem
    for stem in (CONTRASTIVE, LOGPROB, LOSS)
    if _HAS_TRITON and importlib.util.find_spec(f"{__package__}.triton_{stem}") is not None
)
# Paths that no run has confirmed on their device yet; the README's table "Verified on" says "never".
NEVER_VERIFIED = frozenset({("torch", "cuda"), ("triton", "cuda")})
_warned: set[str] = set()


def backend_module(backend: str, stem: str) -> types.ModuleType:
    """The module that implements one operation; triton is imported on first use only."""
    return importlib.import_module(f"{__package__}.{backend}_{stem}")


def choose_backend(backend: str | None, stem: str, hidden: Tensor) -> str:
    """Return "torch" or "triton" for an operation on ``hidden``.

    None takes triton on CUDA and torch everywhere else. For fp32 that is reasoned, not measured: triton's row
    kernels read what the same cuBLAS products leave, and pass over it fewer times than the torch backend. A named
    backend is never replaced by another: ValueError where "triton" cannot serve.
    """
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', got {backend!r}")
    obstacle = None if backend == "torch" else _triton_obstacle(stem, hidden)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"backend='triton' cannot serve this call: {obstacle}")
    device = hidden.device.type
    if backend is None:
        backend = "triton" if device == "cuda" and obstacle is None else "torch"
        if device == "cuda" and obstacle is not None:
            _warn_once(f"inverseq_kernels: {stem} runs on the slower torch backend: {obstacle}")
    if (backend, device) in NEVER_VERIFIED:
        _warn_once(f"inverseq_kernels: the {backend} backend has never been verified on {device}")
    return backend


def resolve_workspace(workspace_bytes: int | None, hidden: Tensor) -> int:
    """The limit in bytes on temporary memory; None is 512 MiB on CUDA and 256 MiB elsewhere."""
    if workspace_bytes is None:
        return CUDA_WORKSPACE_BYTES if hidden.device.type == "cuda" else OTHER_WORKSPACE_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be None or an int > 0, got {workspace_bytes!r}")
    return workspace_bytes


def _triton_obstacle(stem: str, hidden: Tensor) -> str | None:
    if hidden.dtype == torch.float64:
        return "float64 is served by the torch backend only"
    if not _HAS_TRITON:
        return "triton is not installed"
    if stem not in _TRITON_OPS:
        return f"this package has no triton_{stem} module"
    if hidden.device.type == "cuda" or (hidden.device.type == "cpu" and _INTERPRETED):
        return None
    where = "CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 set before import"
    return f"it needs {where}; got {hidden.device}"


def _warn_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, stacklevel=4)


def contiguous_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous tensors in their own dtypes; each backend reads weight and bias in hidden's dtype."""
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


def finish_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients in their own tensors' dtypes; an empty tensor for each that was not needed."""
    return tuple(
        _missing(inputs) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, inputs, strict=True)
    )


# fp16 gradients are stored with their largest entry in [2**14, 2**15).
_HALF_TOP_EXPONENT = 15


def finish_scaled_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """``finish_gradients`` for sums that fp16 may not hold, and the powers of two taken out of them, [2] fp32.

    Gradients of an fp16 weight and bias, which come in fp32, are divided by a power of two each; the caller
    multiplies it back in fp32. Nothing synchronises.
    """
    hidden, *results = gradients
    powers = [torch.ones((), dtype=torch.float32, device=inputs[0].device) for _ in results]
    for index, (gradient, like) in enumerate(zip(results, inputs[1:], strict=True)):
        if gradient is not None and like.dtype == torch.float16 and gradient.numel() > 0:
            largest = torch.stack(torch.aminmax(gradient)).abs().amax()
            exponent = torch.frexp(largest).exponent.float() - _HALF_TOP_EXPONENT
            powers[index] = torch.where(largest.isfinite(), torch.exp2(exponent.clamp(-100, 113)), 1.0)
            results[index] = torch.mul(gradient, 1.0 / powers[index], out=torch.empty_like(like))
    return (*finish_gradients((hidden, *results), inputs), torch.stack(powers))


def times(gradient: Tensor, factor: Tensor, *, in_place: bool = False) -> Tensor:
    """gradient * factor (0-d fp32), multiplied in fp32; on CUDA torch rounds a 0-d factor to gradient's dtype first."""
    out = gradient if in_place else torch.empty_like(gradient)
    if gradient.is_cuda and gradient.dtype in (torch.float16, torch.bfloat16):
        factor = factor[None]
    return torch.mul(gradient, factor, out=out)


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What ``finish_gradients`` returns, without values: for tracing."""
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if need and like is not None
        else _missing(inputs)
        for need, like in zip(needs, inputs, strict=True)
    )


def _missing(inputs: Sequence[Tensor | None]) -> Tensor:
    return inputs[0].new_empty((0,))
