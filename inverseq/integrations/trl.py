"""TRL's trainers (DPO, GRPO, SFT and the others that share its head) on ``linear_logprob``: one call before training.

    from inverseq.integrations.trl import use_linear_logprob
    use_linear_logprob()

TRL computes per-token log-probabilities of all its trainers in one autograd function, from logits in the model's
dtype. That function is replaced; masks, losses and metrics stay TRL's. The two metrics that need whole rows of logits
(the mean logit, and whether the label is the likeliest token) are computed here in chunks without gradient. DeepSpeed
ZeRO-3 is served: the head's weight is whole on a rank only while one of the two passes reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from inverseq_kernels import linear_logprob
from torch import Tensor

from .causal_lm import as_autocast_reads
from .versions import check_version, describe_tested, installed_version, is_tested

__all__ = ["use_linear_logprob"]

NAME = "_ChunkedLogProbFunction"
PARAMETERS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
]  # fmt: skip
METRIC_BYTES = 64 * 2**20  # fp32 logits of one chunk of rows


def use_linear_logprob(*, backend: str | None = None, workspace_bytes: int | None = None) -> Callable[[], None]:
    """Make TRL's trainers use ``linear_logprob`` from now on; returns the function that undoes it.

    A second call changes the options of the first until it is undone. Raises ValueError when trl is not installed or
    is a version whose head is not the one this was tested with.
    """
    found = installed_version("trl", extra="trl", what="use_linear_logprob")
    import trl.trainer.utils as utils

    original = getattr(utils, NAME, None)
    forward = getattr(original, "forward", None)
    is_known = isinstance(original, LinearLogprob) or (
        forward is not None and list(inspect.signature(forward).parameters) == PARAMETERS
    )
    if not is_known or not is_tested("trl", found):  # a part of trl is replaced: a newer one is refused as well
        raise ValueError(f"trl {found}: this adapter was tested with {describe_tested('trl')}")
    setattr(utils, NAME, LinearLogprob(backend=backend, workspace_bytes=workspace_bytes))
    return lambda: setattr(utils, NAME, original)


class LinearLogprob:
    """What TRL calls in place of its autograd function."""

    def __init__(self, **options: Any):
        self.options = options
        self.engine_is_checked = False

    def apply(
        self,
        hidden: Tensor,  # [A, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [A] int64
        *settings: Any,  # temperature, chunk size, softcap, logit scale, names of the outputs
    ) -> tuple[Tensor | None, ...]:
        """(log-probabilities, entropy, log Σ p², mean logit, label is likeliest), [A] each, None when not asked for.

        Raises ValueError for an older DeepSpeed than what was tested, when it holds the weight.
        """
        if hasattr(weight, "ds_id") and not self.engine_is_checked:
            check_version("deepspeed", extra="deepspeed", what="use_linear_logprob under ZeRO-3")
            self.engine_is_checked = True
        temperature, _, softcap, scale, outputs = settings
        hidden = as_autocast_reads(hidden)
        # softcap·tanh(s z / softcap) / T = (softcap / s) · tanh(z / (softcap / s)) / (T / s)
        head = {"softcap": softcap and softcap / scale, "temperature": temperature / scale}
        wants_entropy = "entropy" in outputs
        with gathered_in_backward(weight):
            results = linear_logprob(
                hidden, weight, labels, bias=bias, return_entropy=wants_entropy, **head, **self.options
            )
        logprobs, entropy = results if wants_entropy else (results, None)
        rows = row_statistics(hidden, weight, bias, labels, outputs=outputs, **head)
        return logprobs, entropy, *(rows.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1"))


def gathered_in_backward(weight: Tensor) -> AbstractContextManager:
    """Where autograd saves the head: weights of ZeRO-3 are gathered again when the backward pass asks for them.

    What a custom operation saves of a parameter is the parameter itself, which TRL empties after the forward pass. The
    copy that is gathered lives until the gradients are made.
    """
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    def unpack(saved: Tensor) -> Tensor:
        if not hasattr(saved, "ds_id"):
            return saved
        with maybe_gather_lm_head_ctx(saved):
            return saved.detach()  # the parameter itself is empty again after this line

    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack)


@torch.no_grad()
def row_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, softcap, temperature, outputs
) -> dict[str, Tensor]:
    """The wanted ones of log Σ p², mean logit and "the label is likeliest" of every row, from chunks of logits."""
    wanted = [name for name in ("log_sum_sq_probs", "mean_logits", "is_top1") if name in outputs]
    if not wanted:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    num_rows = max(1, METRIC_BYTES // (4 * weight.shape[0]))
    weight = weight.to(hidden.dtype)
    for rows, ids in zip(hidden.split(num_rows), labels.split(num_rows), strict=True):
        logits = (rows @ weight.T).float()
        if bias is not None:
            logits += bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits /= temperature
        for name in wanted:
            found[name].append(STATISTICS[name](logits, ids))
    return {name: torch.cat(parts) for name, parts in found.items()}


STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_sum_sq_probs": lambda logits, ids: (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),
    "mean_logits": lambda logits, ids: logits.mean(-1),
    "is_top1": lambda logits, ids: logits.argmax(-1) == ids,
}
