"""Packs: which samples share a forward, and the padding-free arrays of their views.

A sample under view v is one sequence, ``prefix_ids[v] + prompt_ids + response_ids`` without its last token: the last
response token predicts nothing, so it is not fed, and a response of R tokens costs R − 1 tokens and gives R actions.
Planning is best fit decreasing per optimizer step. The work is done in C++ (``csrc/``) without the GIL; arrays are
allocated once and become tensors without a copy. Attention over a pack is ``inverseq.attention``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .records import PackedViews, Sample

try:
    from . import _packing
except ImportError as error:
    raise ImportError(
        "inverseq._packing, the C++ packer, cannot be imported. Build it: `python setup.py build_ext --inplace` in a "
        f"source checkout, or `pip install ./kernels .` (both need a C++17 compiler). Python said: {error}"
    ) from error

__all__ = [
    "DUMMY_TOKENS",
    "FlatSamples",
    "PackPlan",
    "Ragged",
    "pack_views",
    "plan_packs",
    "view_lengths",
    "write_pack",
]

ANY_TOKEN_ID = 2**31  # token ids are int32
DUMMY_TOKENS = 2  # of a pack without samples, under each view


class Ragged(NamedTuple):
    """Arrays laid end to end; array i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # [sum of lengths] int32
    offsets: np.ndarray  # [N + 1] int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class FlatSamples:
    """Token ids of N samples as flat arrays, made once where many packs are written from the same samples."""

    prefixes: tuple[Ragged, ...]  # per view
    prompts: Ragged
    responses: Ragged

    def __len__(self) -> int:
        return len(self.prompts.offsets) - 1

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> FlatSamples:
        """Flatten samples; ValueError when they differ in their number of views or hold anything but int32 ids."""
        num_views = len(samples[0].rendered.prefix_ids) if samples else 0
        for index, sample in enumerate(samples):
            views = len(sample.rendered.prefix_ids)
            if views != num_views:
                raise ValueError(f"sample {index} has {views} views, sample 0 has {num_views}")
        return cls(
            tuple(
                _flatten(samples, f"prefix_ids[{view}]", lambda sample, view=view: sample.rendered.prefix_ids[view])
                for view in range(num_views)
            ),
            _flatten(samples, "prompt_ids", lambda sample: sample.rendered.prompt_ids),
            _flatten(samples, "response token_ids", lambda sample: sample.response.token_ids),
        )

    def views(self, views: Sequence[int]) -> list[Ragged]:
        """The prefixes of the views asked for; −1 is the last view."""
        num_views = len(self.prefixes)
        for view in views:
            if not -num_views <= view < num_views:
                raise ValueError(f"views={tuple(views)}: expected numbers from {-num_views} to {num_views - 1}")
        return [self.prefixes[view] for view in views]


def _flatten(samples: Sequence[Sample], name: str, ids_of: Callable[[Sample], np.ndarray]) -> Ragged:
    pieces = [ids_of(sample) for sample in samples]
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)), out=offsets[1:])
    ids = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    if ids.dtype != np.int32:
        for index, piece in enumerate(pieces):
            if getattr(piece, "dtype", None) != np.int32:
                raise ValueError(f"sample {index}: {name} is {getattr(piece, 'dtype', type(piece))}, expected int32")
    return Ragged(ids, offsets)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Samples of every pack. A step's packs stand rank by rank, equally many for each rank; an empty one is a dummy."""

    sample_indices: np.ndarray  # [num_samples] int64
    pack_offsets: np.ndarray  # [num_packs + 1] int64
    step_offsets: np.ndarray  # [num_steps + 1] int64, first pack of each step
    num_ranks: int

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    def num_micro_steps(self, step: int = 0) -> int:
        """Packs of each rank in a step."""
        return int(self.step_offsets[step + 1] - self.step_offsets[step]) // self.num_ranks

    def num_dummies(self, step: int = 0) -> int:
        """Packs of a step without samples, over all ranks."""
        bounds = self.pack_offsets[int(self.step_offsets[step]) : int(self.step_offsets[step + 1]) + 1]
        return int((np.diff(bounds) == 0).sum())

    def packs(self, step: int = 0, rank: int = 0) -> list[np.ndarray]:
        """Sample indices of a rank's packs in a step, int64, the dearest pack and in it the longest sample first."""
        if not 0 <= step < self.num_steps or not 0 <= rank < self.num_ranks:
            raise ValueError(f"step={step}, rank={rank}: the plan has {self.num_steps} steps, {self.num_ranks} ranks")
        first = int(self.step_offsets[step]) + rank * self.num_micro_steps(step)
        bounds = self.pack_offsets[first : first + self.num_micro_steps(step) + 1].tolist()
        return [self.sample_indices[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def plan_packs(
    lengths: np.ndarray,  # [num_samples] tokens of a sample, all its views together
    *,
    token_budget: int,
    num_ranks: int = 1,
    step_sizes: Sequence[int] | None = None,
    shared_tokens: int = 0,
    linear_cost: float = 1.0,
    attention_cost: float = 0.0,
) -> PackPlan:
    """Group samples into packs of at most ``token_budget`` tokens, for every optimizer step and rank.

    Consecutive ``step_sizes`` samples make a step (None: one step); a pack never crosses steps. Packs are filled best
    fit decreasing. With several ranks the packs that this needs are dealt, or their samples spread evenly over as many
    packs, whichever makes the step's micro-steps shorter: a micro-step lasts as long as its dearest pack, and a sample
    of n tokens is estimated to cost ``linear_cost * n + attention_cost * n**2``. O(n log n).
    ``shared_tokens`` of every sample are emitted once a pack (a shared prefix).

    Raises ValueError for a sample over the budget, naming its index, its length and the budget, and for step sizes
    that do not add up to the samples.
    """
    lengths = _int64_vector(lengths, "lengths")
    sizes = np.array([len(lengths)]) if step_sizes is None else step_sizes
    arrays = _packing.plan(
        lengths,
        step_sizes=_int64_vector(sizes, "step_sizes"),
        token_budget=token_budget,
        num_ranks=num_ranks,
        shared_tokens=shared_tokens,
        linear_cost=linear_cost,
        attention_cost=attention_cost,
    )
    return PackPlan(*arrays, num_ranks)


def view_lengths(samples: Sequence[Sample] | FlatSamples, views: Sequence[int]) -> np.ndarray:
    """Tokens that each sample takes in a pack under all of ``views``, [num_samples] int64.

    Raises ValueError for a sample whose response is empty, for views that the samples do not have, and for samples that
    differ in their number of views.
    """
    flat = _flat(samples)
    lengths = np.zeros(len(flat), dtype=np.int64)
    if not len(flat):
        return lengths
    num_actions = flat.responses.lengths
    if not num_actions.all():
        raise ValueError(f"sample {int(num_actions.argmin())}: its response is empty")
    for prefix in flat.views(views):
        lengths += prefix.lengths + flat.prompts.lengths + num_actions - 1
    return lengths


def write_pack(
    samples: Sequence[Sample] | FlatSamples,
    indices: Sequence[int] | np.ndarray,  # samples of this pack, in the order of its actions; none make a dummy pack
    views: Sequence[int],
    *,
    share_prefix: bool = False,
    num_valid_vocab: int | None = None,
) -> PackedViews:
    """The arrays of one pack: for each view, the sequences of its samples end to end.

    With ``share_prefix`` the tokens that all sequences of a view begin with are emitted once in front of them, and the
    sequences continue it (``parent_seq``); each keeps at least the last token of its prompt, whose row predicts the
    first response token. The last of several views is left whole: the policy reads it whole when it trains, and 16-bit
    attention rounds alike only when it runs alike. No samples make a dummy pack. The ids are checked on the host to be
    in ``range(num_valid_vocab)`` (None: not negative).

    Raises ValueError naming the sample for an empty response, nothing before a response, or an id out of range.
    """
    numbers = _int64_vector(indices, "indices")
    if not len(views):
        raise ValueError("views=(): expected at least one")
    if not len(numbers):
        return _dummy_pack(len(views))
    outside = (numbers < 0) | (numbers >= len(samples))
    if outside.any():
        raise ValueError(f"indices: {numbers[outside][0]} is none of the {len(samples)} samples")
    if isinstance(samples, FlatSamples):
        flat, rows = samples, numbers
    else:
        flat, rows = FlatSamples.of([samples[number] for number in numbers]), np.arange(len(numbers))
    input_ids, position_ids, cu_seqlens, max_seqlen, parent_seq, action_index, token_ids, sample_index = _packing.write(
        flat.views(views),
        flat.prompts,
        flat.responses,
        rows=rows,
        sample_numbers=numbers,
        share_prefix=share_prefix,
        num_valid_vocab=ANY_TOKEN_ID if num_valid_vocab is None else num_valid_vocab,
    )
    return PackedViews(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max_seqlen,
        parent_seq=torch.from_numpy(parent_seq),
        action_index=torch.from_numpy(action_index),
        token_ids=torch.from_numpy(token_ids),
        sample_index=torch.from_numpy(sample_index),
        seqlens=tuple(np.diff(cu_seqlens).tolist()),
    )


def pack_views(
    samples: Sequence[Sample],
    views: Sequence[int],
    *,
    token_budget: int,
    share_prefix: bool = False,
    num_valid_vocab: int | None = None,
    num_ranks: int = 1,
    rank: int = 0,
) -> list[PackedViews]:
    """A rank's packs of at most ``token_budget`` tokens, without steps (scoring).

    All ranks give all samples; each gets equally many packs, the last ones possibly dummies. A prefix that all samples
    share is counted once a pack when it is emitted once.
    """
    flat = _flat(samples)
    lengths = view_lengths(flat, views)
    shared_tokens = 0
    if share_prefix and len(flat) and lengths.max() <= token_budget:
        everything = np.arange(len(flat))
        shared_tokens = sum(
            _packing.shared_lengths(
                flat.views(views), flat.prompts, flat.responses, rows=everything, num_valid_vocab=ANY_TOKEN_ID
            )
        )
    plan = plan_packs(lengths, token_budget=token_budget, shared_tokens=shared_tokens, num_ranks=num_ranks)
    return [
        write_pack(flat, indices, views, share_prefix=share_prefix, num_valid_vocab=num_valid_vocab)
        for indices in plan.packs(0, rank)
    ]


def _flat(samples: Sequence[Sample] | FlatSamples) -> FlatSamples:
    return samples if isinstance(samples, FlatSamples) else FlatSamples.of(samples)


def _int64_vector(values, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected whole numbers in one dimension, got {array.dtype} of {array.ndim}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _dummy_pack(num_views: int) -> PackedViews:
    """Tokens of id 0 and one action under each view: enough for forward and backward to run."""
    starts = torch.arange(0, DUMMY_TOKENS * num_views + 1, DUMMY_TOKENS, dtype=torch.int32)
    return PackedViews(
        input_ids=torch.zeros(DUMMY_TOKENS * num_views, dtype=torch.int64),
        position_ids=torch.arange(DUMMY_TOKENS).repeat(num_views),
        cu_seqlens=starts,
        max_seqlen=DUMMY_TOKENS,
        parent_seq=torch.full((num_views,), -1, dtype=torch.int32),
        action_index=starts[1:, None].long() - 1,
        token_ids=torch.zeros(1, dtype=torch.int64),
        sample_index=torch.zeros(1, dtype=torch.int64),
        seqlens=(DUMMY_TOKENS,) * num_views,
        is_dummy=True,
    )
