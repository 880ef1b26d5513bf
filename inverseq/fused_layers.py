"""Fused RMSNorm, rotary embedding and MLP activation of liger-kernel for a loaded model, on CUDA and when asked for.

liger-kernel's cross-entropies stay out: logits are this project's own business (``inverseq_kernels``). Rotary
embeddings and the classes of a model's modules are replaced for the whole process, as liger-kernel does it: models of
one architecture are all fused or not at all, which is what targets and policy need to be the same function.
"""

from __future__ import annotations

import inspect
import logging

import torch
from transformers import PreTrainedModel

__all__ = ["check_fused_layers", "fuse_layers"]

logger = logging.getLogger(__name__)

LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_fused_layers(device: torch.device) -> None:
    """Raise ValueError when ``model.fused_layers`` cannot be had on the device."""
    if device.type != "cuda":
        raise ValueError("model.fused_layers=True: liger-kernel's layers need a CUDA device; expected false on a CPU")
    _functions_by_model_type()


def fuse_layers(model: PreTrainedModel) -> None:
    """Replace the layers of a loaded model.

    Raises ValueError when liger-kernel is absent, does not know the architecture, or takes other arguments than 0.6 to
    0.8 do.
    """
    model_type, functions = model.config.model_type, _functions_by_model_type()
    if model_type not in functions:
        raise ValueError(f"model.fused_layers=True: liger-kernel has no layers for {model_type!r}; expected false")
    function = functions[model_type]
    absent = [name for name in ("model", *LOSSES) if name not in inspect.signature(function).parameters]
    if absent:
        raise ValueError(
            f"model.fused_layers=True: liger-kernel's {function.__name__} does not take {', '.join(absent)}; "
            "expected false with this version"
        )
    logger.warning("the fused layers of liger-kernel have never been verified on a CUDA device by this project")
    function(model=model, **LOSSES)


def _functions_by_model_type() -> dict:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(
            f"model.fused_layers=True: liger-kernel cannot be imported ({error}); pip install 'inverseq[liger]'"
        ) from error
    return MODEL_TYPE_TO_APPLY_LIGER_FN
