"""The trained model: one wrapped module whose forward does backbone, action rows and fused loss.

Everything that reads a weight happens inside this forward, so that engines which gather and release weights around
``forward`` (ZeRO-3) see one ordinary module.
"""

from __future__ import annotations

from inverseq_kernels import linear_logprob, squared_log_ratio_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import EngineConfig
from .model import action_hidden, head_of
from .records import PackedViews

__all__ = ["Policy"]


class Policy(nn.Module):
    """π_θ with its loss."""

    def __init__(self, model: PreTrainedModel, num_valid_vocab: int, engine: EngineConfig):
        super().__init__()
        self.model = model
        self.num_valid_vocab = num_valid_vocab
        self.engine_config = engine
        self.kernel_options = engine.kernel_options()

    def forward(
        self,
        pack: PackedViews,
        targets: Tensor | None = None,  # [A] fp32
        loss_weights: Tensor | None = None,  # [A] fp32
        denominator: float = 1.0,
    ) -> tuple[Tensor | None, Tensor]:
        """Σ weight (log π̂ − log π_θ)² / denominator over the pack (fp32 scalar), and log π_θ(y_t) [A] fp32.

        Without targets the loss is None and the log-probabilities carry a gradient; with them they are detached. Both
        stand here because an engine that shards weights gathers them for ``forward`` alone.
        """
        hidden_AD, head = action_hidden(self.model, pack)[-1], head_of(self.model, self.num_valid_vocab)
        common = {
            "bias": head.bias,
            "softcap": head.softcap,
            "temperature": head.temperature,
            "num_valid_vocab": head.num_valid_vocab,
            **self.kernel_options,
        }
        if targets is None:
            return None, linear_logprob(hidden_AD, head.weight, pack.token_ids, **common)
        return squared_log_ratio_loss(
            hidden_AD,
            head.weight,
            pack.token_ids,
            targets,
            denominator=denominator,
            loss_mask=loss_weights,
            **common,
        )

    def logprobs(self, pack: PackedViews) -> Tensor:
        """log π_θ(y_t) of every action of the pack, [A] fp32."""
        return self(pack)[1]
