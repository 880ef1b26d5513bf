"""Per-token log-probabilities of any Hugging Face causal language model, without its logits.

Everything that reads a weight happens inside one module's forward, so engines that gather and release weights around
``forward`` (FSDP2, DeepSpeed ZeRO-3) see an ordinary module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from inverseq_kernels import IGNORE_INDEX, linear_logprob
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .versions import check_version

__all__ = ["CausalLMLogprobs", "as_autocast_reads", "check_gathered", "check_logits", "head_keywords"]

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
PROBE_TOKENS = 4


def head_keywords(config: Any) -> dict[str, float | None]:
    """softcap and temperature of a model's head, as ``linear_logprob`` takes them.

    Granite divides its logits by ``logits_scaling``, HyperCLOVA X multiplies by it, as Cohere does by ``logit_scale``.
    Raises ValueError for a configuration that scales its logits by a name that is not known here.
    """
    text = config.get_text_config()
    for name in ("output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1.0):
            raise ValueError(f"{type(config).__name__}: {name}={getattr(text, name)} is not supported")
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    scaling = scaling if text.model_type.startswith("hyperclovax") else 1.0 / scaling
    scale = float(getattr(text, "logit_scale", None) or 1.0) * scaling
    softcap = next((value for name in SOFTCAPS if (value := getattr(text, name, None))), None)
    # softcap·tanh(s z / softcap) = s · (softcap / s) · tanh(z / (softcap / s))
    return {"softcap": softcap and softcap / scale, "temperature": 1.0 / scale}


def check_gathered(weight: Tensor, remedy: str) -> None:
    """Raise ValueError for the weight of a head that an engine has spread over processes at this moment."""
    if isinstance(weight, DTensor) or not weight.numel():
        raise ValueError(f"the head's weight is spread over processes where it is read: {remedy}")


def as_autocast_reads(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype in which a linear layer would read them under the autocast of the moment."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


@torch.no_grad()
def check_logits(
    model: nn.Module,
    keywords: dict[str, float | None],
    source: nn.Module,
    hidden_of: Callable[[tuple, Any], Tensor | None],
) -> None:
    """Compare the head, as ``linear_logprob`` will compute it, with the model's own logits of a few tokens.

    ``hidden_of`` finds the hidden states in the arguments and the output of ``source``, a part of the model. Raises
    ValueError when the logits differ: an architecture that shapes them in a way that is not known here, prompt tuning,
    or an adapter on the head would otherwise give wrong log-probabilities without a word. A model whose weights an
    engine holds, or that has none yet, is left unchecked.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError("an adapter on the output embedding is not read here: leave lm_head out of target_modules")
    weight = head.weight
    if weight.is_meta or not weight.numel() or isinstance(weight, DTensor):
        return
    kept: list[Tensor | None] = []
    hook = source.register_forward_hook(lambda module, inputs, output: kept.append(hidden_of(inputs, output)))
    try:
        ids = torch.arange(PROBE_TOKENS, device=model.get_input_embeddings().weight.device)[None] % len(weight)
        own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    error = float("inf")
    if len(kept) == 1 and kept[0] is not None and kept[0].shape[1] == own.shape[1] == PROBE_TOKENS:
        logits = kept[0].float() @ weight.float().T
        logits = logits if getattr(head, "bias", None) is None else logits + head.bias.float()
        if keywords["softcap"] is not None:
            logits = keywords["softcap"] * torch.tanh(logits / keywords["softcap"])
        error = ((logits / keywords["temperature"] - own).abs().max() / own.abs().max().clamp(min=1.0)).item()
    if not error < (3e-2 if weight.element_size() == 2 else 1e-4):
        raise ValueError(
            f"{type(model).__name__}: hidden states times the output embedding differ from the model's own logits by "
            f"{error:.1e} of their size; such a head is not supported"
        )


class CausalLMLogprobs(nn.Module):
    """``log_softmax(model(ids).logits / temperature)[labels]`` in fp32, differentiable, without the logits.

    Wrap this module, not the model inside, with FSDP2, DeepSpeed or DDP.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, **options: Any):
        """``options`` go to ``linear_logprob`` (``return_entropy``, ``workspace_bytes``, ``backend``).

        Raises ValueError for a transformers that is older than what was tested, for a model whose logits are not its
        hidden states times its output embedding (``check_logits``) and for one that scales them by an unknown name.
        """
        super().__init__()
        check_version("transformers", extra="trl", what="CausalLMLogprobs")
        self.engine_is_checked = False
        self.model = model
        keywords = head_keywords(model.config)
        decoder = model.get_decoder()
        check_logits(model, keywords, decoder, lambda inputs, output: getattr(output, "last_hidden_state", None))
        self.options = {**keywords, "temperature": keywords["temperature"] * temperature, **options}

    def forward(
        self,
        input_ids: Tensor,  # [B, L] int64
        labels: Tensor,  # [B, L] int64, not shifted; IGNORE_INDEX where there is nothing to score
        **inputs: Any,  # attention_mask, position_ids, … of the model
    ) -> Any:
        """Log-probability of every label given what stands before it, [B, L − 1] fp32, 0 where it is ignored.

        With ``return_entropy`` a pair of that and the entropy, [B, L − 1] fp32. Only scored positions reach the head.
        Raises ValueError where an engine has sharded the model inside instead of this module, and when the engine's
        package is older than what was tested.
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
            as_autocast_reads(hidden_BLD[:, :-1][is_scored]),
            head.weight,
            shifted_BL[is_scored],
            bias=getattr(head, "bias", None),
            **self.options,
        )
        pair = results if isinstance(results, tuple) else (results,)
        full = tuple(one.new_zeros(is_scored.shape).masked_scatter(is_scored, one) for one in pair)
        return full if len(full) > 1 else full[0]

    def _check_engine(self, weight: Tensor) -> None:
        """Check the package whose engine has gathered the head's weight."""
        if hasattr(weight, "ds_id"):
            check_version("deepspeed", extra="deepspeed", what="CausalLMLogprobs under ZeRO-3")
        state = sys.modules.get("accelerate.state")  # transformers imports it; it is in use with an Accelerator
        if isinstance(self, FSDPModule) and state is not None and state.is_initialized():
            check_version("accelerate", extra="demo", what="CausalLMLogprobs under FSDP2")
