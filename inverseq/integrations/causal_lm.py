"""Per-token log-probabilities of any Hugging Face causal language model, without its logits.

Everything that reads a weight happens inside one module's forward, so engines that gather and release weights around
``forward`` (FSDP2, DeepSpeed ZeRO-3) see an ordinary module.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from inverseq_kernels import IGNORE_INDEX, linear_logprob
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .versions import check_version

__all__ = ["CausalLMLogprobs", "check_gathered", "head_keywords"]


def head_keywords(config: Any) -> dict[str, float | None]:
    """softcap and temperature of a model's head, as ``linear_logprob`` takes them.

    Granite divides its logits by ``logits_scaling``, Cohere multiplies by ``logit_scale``. Raises ValueError for a
    configuration that scales its logits by a name that is not known here.
    """
    text = config.get_text_config()
    for name in ("output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1.0):
            raise ValueError(f"{type(config).__name__}: {name}={getattr(text, name)} is not supported")
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    # softcap·tanh(s z / softcap) = s · (softcap / s) · tanh(z / (softcap / s))
    return {"softcap": softcap and softcap / scale, "temperature": 1.0 / scale}


def check_gathered(weight: Tensor, remedy: str) -> None:
    """Raise ValueError for the weight of a head that an engine has spread over processes at this moment."""
    if isinstance(weight, DTensor) or not weight.numel():
        raise ValueError(f"the head's weight is spread over processes where it is read: {remedy}")


class CausalLMLogprobs(nn.Module):
    """``log_softmax(model(ids).logits / temperature)[labels]`` in fp32, differentiable, without the logits.

    Wrap this module, not the model inside, with FSDP2, DeepSpeed or DDP.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, **options: Any):
        """``options`` go to ``linear_logprob`` (``return_entropy``, ``workspace_bytes``, ``backend``).

        Raises ValueError for a transformers that is older than what was tested.
        """
        super().__init__()
        check_version("transformers", extra="trl", what="CausalLMLogprobs")
        self.engine_is_checked = False
        self.model = model
        self.options = {**head_keywords(model.config), **options}
        self.options["temperature"] *= temperature

    def forward(
        self,
        input_ids: Tensor,  # [B, L] int64
        labels: Tensor,  # [B, L] int64, not shifted; IGNORE_INDEX where there is nothing to score
        **inputs: Any,  # attention_mask, position_ids, … of the model
    ) -> Any:
        """Log-probability of every label given what stands before it, [B, L − 1] fp32, 0 where it is ignored.

        With ``return_entropy`` a pair of that and the entropy, [B, L − 1] fp32. Only scored positions reach the head.
        Raises ValueError where an engine has sharded the model inside instead of this module.
        """
        head = self.model.get_output_embeddings()
        if not self.engine_is_checked:
            check_gathered(head.weight, "wrap the CausalLMLogprobs, not the model inside")
            self._check_engine(head.weight)
            self.engine_is_checked = True
        hidden_BLD = self.model.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        shifted_BL = labels[:, 1:]
        is_scored = shifted_BL != IGNORE_INDEX
        results = linear_logprob(
            hidden_BLD[:, :-1][is_scored],
            head.weight,
            shifted_BL[is_scored],
            bias=getattr(head, "bias", None),
            **self.options,
        )
        pair = results if isinstance(results, tuple) else (results,)
        full = tuple(torch.zeros(is_scored.shape, device=one.device).masked_scatter(is_scored, one) for one in pair)
        return full if len(full) > 1 else full[0]

    def _check_engine(self, weight: Tensor) -> None:
        """Check the package whose engine has gathered the head's weight."""
        if hasattr(weight, "ds_id"):
            check_version("deepspeed", extra="deepspeed", what="CausalLMLogprobs under ZeRO-3")
        state = sys.modules.get("accelerate.state")  # transformers imports it; it is in use with an Accelerator
        if isinstance(self, FSDPModule) and state is not None and state.is_initialized():
            check_version("accelerate", extra="demo", what="CausalLMLogprobs under FSDP2")
