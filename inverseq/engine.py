"""The engine: turns one ``TrainStep`` into one update of the policy.

``TorchEngine`` is the single-process engine on a CPU or one GPU. Its optimizer state is fp32: bfloat16 weights are
trained through fp32 master copies, because an update of 1e-6 is far below bfloat16's resolution. The gradients of
micro-batches are summed in fp32, each as soon as the backward pass has made it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from .config import OptimConfig
from .records import MicroBatch, PackedViews, StepMetrics, TrainStep
from .transfers import copied_ahead

__all__ = [
    "Engine",
    "NonFiniteError",
    "TorchEngine",
    "accumulate",
    "describe_non_finite",
    "learning_rate_factor",
    "step_metrics",
]


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not a finite number; the update was not made."""


def describe_non_finite(update: int, loss: float, norm: float) -> str:
    """Why a run stops at a step, and what it leaves."""
    return f"optimizer step {update}: loss {loss}, gradient norm {norm}: not updated, the last checkpoint is kept"


class Engine(Protocol):
    """What the trainer needs of an engine. ``policy`` is called as ``policy(pack, targets, weights, denominator)``."""

    policy: nn.Module
    names: list[str]  # of the trained weights, as the model has them
    num_updates: int
    device: torch.device

    def train_step(self, step: TrainStep) -> StepMetrics:
        """One update. All ranks call it together."""
        ...

    def logprobs(self, pack: PackedViews) -> Tensor:
        """log π_θ(y_t) of the pack's actions, [A] fp32 without a gradient. All ranks call it equally often."""
        ...

    def full_model(self) -> PreTrainedModel:
        """The policy's current weights as an ordinary model, on this rank's device. All ranks call it together."""
        ...

    def release_full_model(self) -> None:
        """Free what ``full_model`` made beside the trained weights."""
        ...

    def full_weights(self) -> dict[str, Tensor] | None:
        """The trained weights by name on the host of rank 0; None where the policy's own model has them whole."""
        ...

    def load_named_state(self, read: Callable[[str], dict[str, Tensor]], num_updates: int) -> None:
        """Restore fp32 masters and AdamW's moments, ``read(name)`` = {master, exp_avg, exp_avg_sq}."""
        ...


def learning_rate_factor(update: int, total_updates: int, optim: OptimConfig) -> float:
    """Learning rate of update number ``update`` (from 0) over the peak: linear warm-up, then the schedule."""
    if update < optim.warmup_steps:
        return (update + 1) / (optim.warmup_steps + 1)
    progress = (update - optim.warmup_steps) / max(1, total_updates - optim.warmup_steps)
    if optim.schedule == "linear":
        return max(0.0, 1.0 - progress)
    if optim.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def accumulate(
    step: TrainStep, device: torch.device, policy: nn.Module, backward: Callable[[Tensor, bool], None]
) -> Tensor:
    """Forward and backward of a step's micro-batches; ``micro_batch_sums`` of the step, on the device.

    ``backward(loss, is_last)`` of each. Each micro-batch is copied while the one before it runs, and nothing waits for
    the device.
    """
    sums: Tensor | None = None
    for index, (_, batch) in enumerate(copied_ahead(step.micro_batches, device), 1):
        loss, policy_logprobs = policy(batch.pack, batch.targets, batch.loss_weights, step.denominator)
        backward(loss, index == len(step.micro_batches))
        part = micro_batch_sums(loss, policy_logprobs, batch)
        sums = part if sums is None else sums + part
    assert sums is not None, "a step has a micro-batch on every rank"
    return sums


def micro_batch_sums(
    loss: Tensor,  # scalar fp32
    policy_logprobs: Tensor,  # [A] fp32
    batch: MicroBatch,
) -> Tensor:
    """What ``step_metrics`` is made of, summed over a micro-batch: float64, to be added over all of the step."""
    trained = batch.loss_weights > 0
    ratio = torch.where(trained, batch.targets - policy_logprobs, 0.0)
    references = [batch.plain_logprobs, *([] if batch.initial_logprobs is None else [batch.initial_logprobs])]
    divergences = [torch.where(trained, policy_logprobs - reference, 0.0) for reference in references]
    sums = [values.double().sum() for values in (trained, ratio, ratio**2, *divergences)]
    return torch.stack([loss.detach().double(), *sums])


def step_metrics(sums: Sequence[float], *, grad_norm: float, learning_rate: float, started: float) -> StepMetrics:
    """The metrics of a step from its ``micro_batch_sums`` over all ranks; ``started`` is of ``time.perf_counter``."""
    loss, num_actions, ratio, squared_ratio, *divergences = sums
    num_actions = max(num_actions, 1.0)
    kl_to_plain, *kl_to_initial = (divergence / num_actions for divergence in divergences)
    return StepMetrics(
        loss=loss,
        mean_log_ratio=ratio / num_actions,
        rms_log_ratio=math.sqrt(squared_ratio / num_actions),
        kl_to_plain=kl_to_plain,
        kl_to_initial=kl_to_initial[0] if kl_to_initial else None,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        duration_s=time.perf_counter() - started,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


class TorchEngine:
    """AdamW in one process."""

    def __init__(self, policy: nn.Module, optim: OptimConfig, total_updates: int):
        self.policy = policy
        self.optim = optim
        self.num_updates = 0
        self.weights = [p for p in policy.parameters() if p.requires_grad]
        self.names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.weights]
        for weight, master in self._pairs():
            weight.register_post_accumulate_grad_hook(partial(_add_gradient, master))
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=optim.lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self.weights[0].is_cuda or None,
        )
        self.scheduler = LambdaLR(self.optimizer, lambda update: learning_rate_factor(update, total_updates, optim))

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def train_step(self, step: TrainStep) -> StepMetrics:
        """Accumulate the gradients of the step's packs, clip, update.

        Raises NonFiniteError, with the weights untouched, when the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        self.policy.train()
        sums = accumulate(step, self.device, self.policy, self._backward)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        grad_norm = self._clip()
        *sums, norm = torch.cat([sums, grad_norm.double()[None]]).tolist()
        if not (math.isfinite(sums[0]) and math.isfinite(norm)):
            self.zero_grad()
            raise NonFiniteError(describe_non_finite(self.num_updates + 1, sums[0], norm))
        self._update()
        return step_metrics(sums, grad_norm=norm, learning_rate=learning_rate, started=started)

    @torch.no_grad()
    def logprobs(self, pack: PackedViews) -> Tensor:
        self.policy.eval()
        return self.policy(pack.to(self.device))[1]

    def full_model(self) -> PreTrainedModel:
        """The trained model itself; see ``Engine.full_model``."""
        return self.policy.model

    def release_full_model(self) -> None:
        """Nothing was made."""

    def full_weights(self) -> None:
        """The model has them."""

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each 16-bit weight with its fp32 master."""
        return [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if m is not w]

    def _clip(self) -> Tensor:
        """Clip the accumulated gradients and return their norm before clipping."""
        if not self.optim.max_grad_norm:
            return nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        return nn.utils.clip_grad_norm_(self.masters, self.optim.max_grad_norm)

    @torch.no_grad()
    def _update(self) -> None:
        self.optimizer.step()
        self.scheduler.step()
        self.zero_grad()
        if pairs := self._pairs():
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        self.num_updates += 1

    def zero_grad(self) -> None:
        for parameter in (*self.weights, *self.masters):
            parameter.grad = None

    def state_dict(self) -> dict:
        """Optimizer, schedule and, for 16-bit weights, the fp32 master copies."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "masters": [master.detach() for _, master in self._pairs()],
            "num_updates": self.num_updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore ``state_dict``; the policy's own weights are restored by the checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.num_updates = state["num_updates"]
        for (_, master), saved in zip(self._pairs(), state["masters"], strict=True):
            master.copy_(saved)

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str], dict[str, Tensor]], num_updates: int) -> None:
        """Restore the state that many ranks have saved; see ``Engine.load_named_state``."""
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            state = read(name)
            master.copy_(state["master"])
            weight.copy_(state["master"])
            moments = {key: state[key].to(master.device).clone() for key in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(num_updates), device=master.device if master.is_cuda else "cpu")
            self.optimizer.state[master] = {"step": step, **moments}
        self.num_updates = self.scheduler.last_epoch = num_updates
        for group, factor in zip(self.optimizer.param_groups, self.scheduler.lr_lambdas, strict=True):
            group["lr"] = self.optim.lr * factor(num_updates)


def _add_gradient(master: nn.Parameter, weight: nn.Parameter) -> None:
    """Add a weight's 16-bit gradient to its master's fp32 sum and drop it: of all weights one exists at a time."""
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None
