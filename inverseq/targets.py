"""Regression targets: the superior policy's log-probability of every sampled token, from two frozen distributions.

    log π̂(· | y_<t, x) = log_softmax( α log π_w(· | y_<t, x) + (1 − α) log π_l(· | y_<t, x) )

With shared weights both views of a sample stand in one pack and one forward serves both. Targets are one fp32
number per action token and stay on the host until their optimizer step. On CUDA the host runs one pack ahead: while a
forward runs, the next pack is written and copied, and only then is the result before it waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from inverseq_kernels import contrastive_logprob, linear_logprob
from torch import Tensor

from .config import Config
from .distributed import Ranks
from .model import FrozenPair, action_hidden, head_of
from .packing import FlatSamples, pack_views, plan_packs, view_lengths, write_pack
from .records import PackedViews, Sample, ScoredSamples
from .transfers import copied_ahead, read_behind

__all__ = ["score_targets"]


def score_targets(
    frozen: FrozenPair,
    samples: Sequence[Sample],
    config: Config,
    *,
    num_valid_vocab: int,
    ranks: Ranks | None = None,
    advance: Callable[[int], None] = lambda num_samples: None,
) -> ScoredSamples:
    """Score every action of the samples: log π̂(y_t) and log π_l(y_t), fp32 [A] on the host, in sample order.

    With ``contrast.kl_to_initial`` also those by the better model, as which the policy starts, reading the policy's
    view: where that is its own view its hidden states are there already, else both stand in one pack.

    All ranks give all samples and get all targets; each scores some packs, equally many. ``advance`` is called with the
    number of samples a pack held after each pack.

    Raises ValueError for a sample over ``packing.score_tokens``, an empty response or a token id out of range, and for
    models that shape their logits differently; ArithmeticError when a model gives log-probs that are not numbers.
    """
    ranks = ranks or Ranks()
    offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum([sample.num_actions for sample in samples], out=offsets[1:])
    names = ("targets", "plain_logprobs") + ("initial_logprobs",) * config.contrast.kl_to_initial
    values = {name: torch.full((int(offsets[-1]),), float("nan")) for name in names}
    plan, contrast = (_packs_together, _contrast_views) if frozen.shares_weights else (_packs_apart, _contrast_models)
    device = next(frozen.parameters()).device
    share_prefix = config.packing.shares_prefix(device.type, len(samples[0].rendered.prefix_ids) if samples else 1)
    config = replace(config, packing=replace(config.packing, share_prefix=share_prefix))
    scored = []
    # Weights that are gathered for one forward cannot be inference tensors.
    with torch.inference_mode() if type(frozen) is FrozenPair else torch.no_grad():
        planned = map(ScoringPacks, plan(samples, config, num_valid_vocab, ranks))
        results = (
            (there.packs[-1], frozen(contrast, here.packs, config, num_valid_vocab))
            for there, here in copied_ahead(planned, device)
        )
        for pack, found in read_behind(results, device):
            if not pack.is_dummy:
                scored.append((pack.action_rows(offsets), found))
                advance(len(pack.sample_index.unique()))
    for rows, found in itertools.chain(*ranks.gather(scored)):
        for name, pack_values in zip(names, found, strict=True):
            values[name][rows] = pack_values
    if any(torch.isnan(column).any() for column in values.values()):
        raise ArithmeticError("a frozen model gave log-probabilities that are not numbers")
    return ScoredSamples(samples, offsets=offsets, **values)


@dataclass(frozen=True, slots=True)
class ScoringPacks:
    """Packs of the same samples, one for each set of weights."""

    packs: tuple[PackedViews, ...]

    def device_tensors(self) -> list[Tensor]:
        return [tensor for pack in self.packs for tensor in pack.device_tensors()]

    def to(self, device: torch.device | str) -> ScoringPacks:
        return ScoringPacks(tuple(pack.to(device) for pack in self.packs))


def _packs_together(
    samples: Sequence[Sample], config: Config, num_valid_vocab: int, ranks: Ranks
) -> Iterator[tuple[PackedViews, ...]]:
    """A rank's packs that hold all views of their samples."""
    num_views = len(samples[0].rendered.prefix_ids) if samples else 1
    for pack in pack_views(
        samples,
        tuple(range(num_views)),
        token_budget=config.packing.score_tokens,
        share_prefix=config.packing.share_prefix,
        num_valid_vocab=num_valid_vocab,
        num_ranks=ranks.world_size,
        rank=ranks.rank,
    ):
        yield (pack,)


def _packs_apart(
    samples: Sequence[Sample], config: Config, num_valid_vocab: int, ranks: Ranks
) -> Iterator[tuple[PackedViews, ...]]:
    """A rank's pairs of packs of the same samples, one for each model."""
    views = tuple(range(len(samples[0].rendered.prefix_ids))) if samples else (0,)
    better = views if config.contrast.scores_views_together else views[:1]
    flat, share_prefix = FlatSamples.of(samples), config.packing.share_prefix
    lengths = np.maximum(view_lengths(flat, better), view_lengths(flat, views[-1:]))
    plan = plan_packs(lengths, token_budget=config.packing.score_tokens, num_ranks=ranks.world_size)
    for indices in plan.packs(0, ranks.rank):
        yield tuple(
            write_pack(flat, indices, read, share_prefix=shared, num_valid_vocab=num_valid_vocab)
            for read, shared in ((better, share_prefix), (views[-1:], False))
        )


def _contrast_views(frozen: FrozenPair, packs, config: Config, num_valid_vocab: int) -> tuple[Tensor, Tensor]:
    """Targets and log π_l of a pack that holds both views, for one model: one forward serves both."""
    hidden_VAD = action_hidden(frozen.plain, packs[0])
    return _contrast(frozen, hidden_VAD[0], hidden_VAD[-1], packs[0].token_ids, config, num_valid_vocab)


def _contrast_models(frozen: FrozenPair, packs, config: Config, num_valid_vocab: int) -> tuple[Tensor, ...]:
    """Targets and log π_l of two packs of the same samples, for two models; on request the better one's log-probs."""
    hidden_VAD, token_ids = action_hidden(frozen.better, packs[0]), packs[1].token_ids
    hidden_l = action_hidden(frozen.plain, packs[1])[0]
    found = _contrast(frozen, hidden_VAD[0], hidden_l, token_ids, config, num_valid_vocab)
    if not config.contrast.kl_to_initial:
        return found
    head = head_of(frozen.better, num_valid_vocab)
    initial = linear_logprob(
        hidden_VAD[-1],
        head.weight,
        token_ids,
        bias=head.bias,
        softcap=head.softcap,
        temperature=head.temperature,
        num_valid_vocab=head.num_valid_vocab,
        **config.engine.kernel_options(),
    )
    return (*found, initial)


def _contrast(
    frozen: FrozenPair, hidden_w: Tensor, hidden_l: Tensor, token_ids: Tensor, config: Config, num_valid_vocab: int
) -> tuple[Tensor, Tensor]:
    head_w, head_l = head_of(frozen.better, num_valid_vocab), head_of(frozen.plain, num_valid_vocab)
    if (head_w.softcap, head_w.temperature) != (head_l.softcap, head_l.temperature):
        raise ValueError(
            f"contrast.plain_model: the models shape their logits differently: softcap and temperature are "
            f"{(head_w.softcap, head_w.temperature)} and {(head_l.softcap, head_l.temperature)}"
        )
    return contrastive_logprob(
        hidden_w,
        head_w.weight,
        hidden_l,
        head_l.weight,
        token_ids,
        config.contrast.alpha,
        bias_w=head_w.bias,
        bias_l=head_l.bias,
        softcap=head_l.softcap,
        temperature=head_l.temperature,
        num_valid_vocab=head_l.num_valid_vocab,
        return_reference=True,
        **config.engine.kernel_options(),
    )
