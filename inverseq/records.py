"""The records handed from stage to stage, in the order data flows.

Prompt → RenderedPrompt → Response → Sample → PackedViews → ScoredSamples → MicroBatch → TrainStep → StepMetrics.

Shape legend of the project: B padded batch, L padded length, T packed tokens, S packed sequences, A action
tokens, D hidden size, V vocabulary. Records hold data and derived sizes only; behaviour lives in the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from .transfers import copied_to

__all__ = [
    "Message",
    "MicroBatch",
    "PackedViews",
    "Prompt",
    "RenderedPrompt",
    "Response",
    "Sample",
    "ScoredSamples",
    "StepMetrics",
    "TrainStep",
]

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to be answered; its last message is a user's."""

    id: str
    messages: tuple[Message, ...]
    category: str | None = None


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as token ids. View v of the sample reads ``prefix_ids[v] + prompt_ids + response_ids``.

    Views are ordered (better, plain); with one view both contrast models and the policy read the same text.
    ``prompt_ids`` is the longest token suffix common to all views. The policy always reads the last view.
    """

    prompt: Prompt
    prefix_ids: tuple[np.ndarray, ...]  # per view [P_v] int32
    prompt_ids: np.ndarray  # [P] int32

    @property
    def policy_ids(self) -> np.ndarray:
        """Token ids that the policy answers, [P_plain + P] int32."""
        return np.concatenate([self.prefix_ids[-1], self.prompt_ids])


@dataclass(frozen=True, slots=True)
class Response:
    """What a sampling engine returned for one prompt, and what it ran with."""

    token_ids: np.ndarray  # [R] int32, the stop token included when one was sampled
    finish_reason: str  # "stop" or "length"
    seed: int
    engine: str
    engine_version: str
    weights_step: int  # optimizer steps behind the weights it sampled from


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered prompt and its response: what is scored and trained."""

    rendered: RenderedPrompt
    response: Response

    @property
    def num_actions(self) -> int:
        return len(self.response.token_ids)


DEVICE_FIELDS = ("input_ids", "position_ids", "cu_seqlens", "action_index", "token_ids", "sample_index")


@dataclass(frozen=True, slots=True)
class PackedViews:
    """Sequences laid end to end without padding, and where their action tokens are.

    Row ``action_index[v, a]`` of the hidden states predicts ``token_ids[a]`` under view v: the token-to-row shift
    is made here and nowhere else. Actions of one sample are contiguous and in response order.
    A sequence with ``parent_seq[s] >= 0`` continues that earlier sequence (a shared prefix emitted once): it
    attends to all of it and its positions start behind it.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    parent_seq: Tensor  # [S] int32, -1 without a parent; always on the host
    action_index: Tensor  # [num_views, A] int64
    token_ids: Tensor  # [A] int64
    sample_index: Tensor  # [A] int64, position of the action's sample in the packed call
    seqlens: tuple[int, ...]  # S lengths, on the host
    is_dummy: bool = False  # True: only keeps ranks in step; its loss weight is zero

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_actions(self) -> int:
        return self.token_ids.shape[0]

    def action_rows(self, offsets: np.ndarray) -> Tensor:
        """Where the pack's actions stand when sample i's actions are rows ``offsets[i]:offsets[i + 1]``, [A] int64."""
        samples, counts = torch.unique_consecutive(self.sample_index.cpu(), return_counts=True)
        first_row = torch.from_numpy(offsets)[samples] - (counts.cumsum(0) - counts)
        return first_row.repeat_interleave(counts) + torch.arange(self.num_actions)

    def device_tensors(self) -> list[Tensor]:
        """What a forward reads on the device."""
        return [getattr(self, name) for name in DEVICE_FIELDS]

    def to(self, device: torch.device | str) -> PackedViews:
        """The same pack with its device tensors on ``device`` (``parent_seq`` stays on the host)."""
        return replace(self, **{name: copied_to(getattr(self, name), device) for name in DEVICE_FIELDS})


@dataclass(frozen=True, slots=True)
class ScoredSamples:
    """Samples with their regression targets; actions of sample i are rows ``offsets[i]:offsets[i + 1]``."""

    samples: Sequence[Sample]
    targets: Tensor  # [A] fp32 on the host, log π̂(y_t)
    plain_logprobs: Tensor  # [A] fp32 on the host, log π_l(y_t)
    offsets: np.ndarray  # [num_samples + 1] int64
    initial_logprobs: Tensor | None = None  # [A] fp32 on the host, of the initial policy; with contrast.kl_to_initial

    @property
    def values(self) -> dict[str, Tensor]:
        """What every action was given, by name, each [A]; only what there is."""
        names = ("targets", "plain_logprobs", "initial_logprobs")
        return {name: values for name in names if (values := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A pack of the policy's view with everything that its loss and metrics read: what goes to the device as one."""

    pack: PackedViews
    targets: Tensor  # [A] fp32, log π̂(y_t)
    plain_logprobs: Tensor  # [A] fp32, log π_l(y_t)
    loss_weights: Tensor  # [A] fp32
    initial_logprobs: Tensor | None = None  # [A] fp32, as in ``ScoredSamples``

    def device_tensors(self) -> list[Tensor]:
        """What a micro-batch reads on the device."""
        return [*self.pack.device_tensors(), *self._values().values()]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on ``device``."""
        moved = {name: copied_to(values, device) for name, values in self._values().items()}
        return MicroBatch(self.pack.to(device), **moved)

    def _values(self) -> dict[str, Tensor]:
        names = [item.name for item in fields(self)[1:]]
        return {name: values for name in names if (values := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimizer step of one rank: its micro-batches and the denominator of the whole step."""

    micro_batches: Sequence[MicroBatch]  # equally many on all ranks
    denominator: float  # over all ranks and micro-batches
    num_samples: int  # over all ranks, as the counts below
    num_tokens: int
    num_actions: int
    num_packs: int
    num_dummy_tokens: int  # of packs that hold no sample
    index: int  # position within the epoch


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one optimizer step reports; means are over its trained action tokens, on all ranks."""

    loss: float
    mean_log_ratio: float  # mean of log π̂ − log π_θ
    rms_log_ratio: float
    kl_to_plain: float  # mean of log π_θ − log π_l on sampled tokens
    grad_norm: float  # before clipping
    learning_rate: float
    duration_s: float
    peak_memory_bytes: int  # 0 where the device does not count it
    kl_to_initial: float | None = None  # mean of log π_θ − log π_initial, with contrast.kl_to_initial
