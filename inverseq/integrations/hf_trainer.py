"""``transformers.Trainer`` with the fused next-token loss: no trainer subclass, no logits.

    loss = NextTokenLoss(model)
    Trainer(model=model, compute_loss_func=loss, …)

The trainer calls the model before it calls the loss function, so in a training step (training mode, with gradients)
the output embedding hands the hidden states through, and ``outputs.logits`` are hidden states [B, L, D]. In evaluation
mode and without gradients (``generate`` in a callback) the logits are the real ones. The head's weight is read outside
of the model's forward, so engines that spread it over processes (FSDP2, ZeRO-3) are left out: ``CausalLMLogprobs``
serves them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from inverseq_kernels import IGNORE_INDEX, linear_logprob
from torch import Tensor, nn

from .causal_lm import check_gathered, check_logits, head_keywords
from .versions import check_version

__all__ = ["NextTokenLoss"]


class NextTokenLoss:
    """The mean negative log-probability of the next tokens, as the model's own loss gives it."""

    def __init__(self, model: nn.Module, **options: Any):
        """``options`` go to ``linear_logprob``. Raises ValueError for a model that caps its logits: its forward would
        cap the hidden states instead; for one whose logits are not what goes into its output embedding times its weight
        (``check_logits``) or that scales them by an unknown name; and for a transformers that is older than what was
        tested."""
        check_version("transformers", extra="trl", what="NextTokenLoss")
        self.keywords = head_keywords(model.config)
        if self.keywords["softcap"] is not None:
            raise ValueError(f"{type(model).__name__} caps its logits: wrap it in CausalLMLogprobs instead")
        # The model's forward scales what it takes for logits, hidden states here: only the bias still lacks the scale.
        self.bias_scale = 1.0 / self.keywords["temperature"]
        self.head, self.model = model.get_output_embeddings(), model
        check_logits(model, self.keywords, self.head, lambda inputs, output: inputs[0])
        self.keywords = {**self.keywords, "temperature": 1.0, **options}
        self.real_forward = self.head.forward
        self.head.forward = self._head_forward

    def _head_forward(self, hidden: Tensor) -> Tensor:
        """What the output embedding does: hand the hidden states through in a training step, in the dtype in which it
        would read them there."""
        if not self._is_training_step():
            return self.real_forward(hidden)
        device = hidden.device.type
        self.read_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return hidden

    def _is_training_step(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one batch: labels [B, L] not shifted, divided by ``num_items_in_batch`` when it is given.

        Raises ValueError in a training step under an engine that has spread the head's weight over processes.
        """
        scored = outputs.logits[:, :-1]
        labels = labels[:, 1:].to(scored.device)
        is_scored = labels != IGNORE_INDEX
        if self._is_training_step():
            check_gathered(self.head.weight, "train without FSDP and ZeRO-3, or wrap the model in CausalLMLogprobs")
            bias = getattr(self.head, "bias", None)
            bias = bias if bias is None else bias * self.bias_scale
            hidden = scored[is_scored].to(self.read_dtype)  # accelerate makes every output of autocast fp32
            logprobs = linear_logprob(hidden, self.head.weight, labels[is_scored], bias=bias, **self.keywords)
            total = -logprobs.sum()
        else:
            total = F.cross_entropy(scored[is_scored].float(), labels[is_scored], reduction="sum")
        return total / (is_scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
