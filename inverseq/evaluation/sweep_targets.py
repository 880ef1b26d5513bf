"""Targets for several α from one pass over the frozen pair: log π̂_α(y_t) of every action token.

The same packs and views as ``inverseq.targets``, with the sweep operation in place of the single one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from inverseq_kernels import contrastive_logprob_sweep
from torch import Tensor

from ..config import Config
from ..model import FrozenPair, action_hidden, head_of
from ..packing import FlatSamples, plan_packs, view_lengths, write_pack
from ..records import Sample

__all__ = ["sweep_targets"]


@torch.inference_mode()
def sweep_targets(
    frozen: FrozenPair, samples: Sequence[Sample], config: Config, *, alphas: Sequence[float], num_valid_vocab: int
) -> Tensor:
    """log π̂_α(y_t) for each α and every action in sample order, [len(alphas), A] fp32 on the host.

    α = 0 gives log π_l and α = 1 gives log π_w.
    """
    device = next(frozen.parameters()).device
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)])
    flat, last = FlatSamples.of(samples), len(samples[0].rendered.prefix_ids) - 1
    lengths = np.max([view_lengths(flat, (view,)) for view in range(last + 1)], axis=0)
    result = torch.empty(len(alphas), int(offsets[-1]))
    for indices in plan_packs(lengths, token_budget=config.packing.score_tokens).packs():
        better, plain = (write_pack(flat, indices, (view,), num_valid_vocab=num_valid_vocab) for view in (0, last))
        hidden_w = action_hidden(frozen.better, better.to(device))[0]
        hidden_l = action_hidden(frozen.plain, plain.to(device))[0]
        head_w, head_l = head_of(frozen.better, num_valid_vocab), head_of(frozen.plain, num_valid_vocab)
        logprobs = contrastive_logprob_sweep(
            hidden_w,
            head_w.weight,
            hidden_l,
            head_l.weight,
            plain.token_ids.to(device),
            alphas=list(alphas),
            bias_w=head_w.bias,
            bias_l=head_l.bias,
            softcap=head_l.softcap,
            temperature=head_l.temperature,
            num_valid_vocab=head_l.num_valid_vocab,
            **config.engine.kernel_options(),
        )
        result[:, plain.action_rows(offsets)] = logprobs.cpu()
    return result
