"""The engine over many processes: DeepSpeed's ZeRO-1, 2 and 3, with the semantics of ``TorchEngine``.

The loss of a micro-batch is already divided by the count of the whole step, so DeepSpeed's division by the number of
ranks is undone and its accumulation steps are 1: the boundary of a step is set by hand, which allows another number of
micro-batches in each step. The optimizer is torch's AdamW on fp32 masters, also on the host: nothing is compiled at
run time. Left out: ZeRO-Infinity (NVMe), pipelines, tensor parallelism.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import OptimConfig
from .distributed import Ranks
from .engine import NonFiniteError, accumulate, describe_non_finite, learning_rate_factor, step_metrics
from .model import FrozenPair
from .policy import Policy
from .records import PackedViews, StepMetrics, TrainStep
from .zero_loading import load_deepspeed, numel_of
from .zero_options import GATHER_NUMEL, zero_config

__all__ = ["DeepSpeedEngine", "frozen_engine"]

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
# A gathered copy runs other kernels than the trainer's forward; equal weights agree to rounding.
COPY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # nats, largest of the probe's tokens


class DeepSpeedEngine:
    """AdamW over all ranks. Everything here is called by all ranks together."""

    def __init__(
        self,
        policy: Policy,
        optim: OptimConfig,
        total_updates: int,
        *,
        ranks: Ranks,
        zero_stage: int,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        probe: PackedViews | None = None,
    ):
        """Train ``policy``, whose weights are the same on all ranks, or spread over them as ``load_sharded`` does it.

        ``probe`` checks gathered copies of the weights.

        Stage 0 (data parallelism) runs as stage 1, which moves as much and holds less. Raises ValueError without the
        package, and for parameters on the host below stage 3.
        """
        if offload_parameters and zero_stage != 3:
            raise ValueError(f"engine.offload_parameters='cpu': needs engine.zero_stage=3, not {zero_stage}")
        self.policy, self.optim, self.ranks, self.probe = policy, optim, ranks, probe
        self.total_updates, self.num_updates = total_updates, 0
        first = next(policy.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.names = [name for name, weight in policy.model.named_parameters() if weight.requires_grad]
        deepspeed = load_deepspeed(self.device)
        self.plain_copy = without_weights(policy.model) if zero_stage == 3 else None
        self.zero = deepspeed.zero
        self.access = deepspeed.utils
        trained = self._trained()
        for weight in trained:  # fp32 adapters of a 16-bit model: DeepSpeed allows one dtype, its masters are fp32
            weight.data = weight.data.to(self.dtype)
        optimizer = torch.optim.AdamW(
            trained,
            lr=optim.lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self.device.type == "cuda" or None,
        )
        config = zero_config(
            max(1, zero_stage),
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            max_grad_norm=optim.max_grad_norm,
            num_trained=sum(map(numel_of, trained)),
            dtype=self.dtype,
            device=self.device,
        )
        # Some of its optimizers print their memory.
        with contextlib.redirect_stdout(io.StringIO()), buffers_kept(policy):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=policy, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._make_moments()

    def _make_moments(self) -> None:
        """Give AdamW its state before the first update, so that one can be loaded."""
        base, fused = self.optimizer.optimizer, self.device.type == "cuda"
        for flat in self._flat_masters():
            step = torch.tensor(0.0, device=flat.device if fused else "cpu")
            base.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> list[Tensor]:
        """This rank's fp32 weights as DeepSpeed's optimizers hold them: of ZeRO-3, ZeRO-1 and 2, ZeRO-1 on bf16."""
        names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
        return next(list(getattr(self.optimizer, name)) for name in names if hasattr(self.optimizer, name))

    def train_step(self, step: TrainStep) -> StepMetrics:
        """Accumulate the gradients of the step's packs over all ranks, clip, update.

        Raises NonFiniteError on all ranks, with the weights untouched, when loss or gradient norm is not finite.
        """
        started = time.perf_counter()
        self.engine.train()
        sums = accumulate(step, self.device, self.engine, self._backward)
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
        totals = sums.tolist()
        learning_rate = self.optim.lr * learning_rate_factor(self.num_updates, self.total_updates, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = math.nan
        if math.isfinite(totals[0]):
            self.engine.step()
            norm = math.inf if self.optimizer.overflow else float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError(describe_non_finite(self.num_updates + 1, totals[0], norm))
        self.num_updates += 1
        return step_metrics(totals, grad_norm=norm, learning_rate=learning_rate, started=started)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.ranks.world_size)

    @torch.no_grad()
    def logprobs(self, pack: PackedViews) -> Tensor:
        """See ``Engine.logprobs``."""
        self.engine.eval()
        return self.engine(pack.to(self.device))[1]

    def full_model(self) -> PreTrainedModel:
        """The trained model, or under ZeRO-3 a plain copy gathered from all ranks, one per rank.

        The copy's log-probabilities of the probe are compared with the trainer's; RuntimeError when they differ.
        """
        if self.plain_copy is None:
            return self.policy.model
        own = self.policy.model.parameters()
        for group in groups_of(zip(own, self.plain_copy.parameters(), strict=True), GATHER_NUMEL):
            with torch.no_grad(), self.zero.GatheredParameters([weight for weight, _ in group]):
                for weight, copied in group:
                    copied.data = weight.detach().clone()
        if self.probe is not None:
            self._check_copy(self.probe)
        return self.plain_copy

    @torch.no_grad()
    def _check_copy(self, probe: PackedViews) -> None:
        expected = self.logprobs(probe)
        policy = Policy(self.plain_copy, self.policy.num_valid_vocab, self.policy.engine_config)
        gap = (policy(probe.to(self.device))[1] - expected).abs().max().item()
        if not gap <= COPY_TOLERANCE[self.dtype]:
            raise RuntimeError(
                f"the weights gathered for sampling are not the trained ones: log-probs of a probe differ by {gap:.2e} "
                f"nats (at most {COPY_TOLERANCE[self.dtype]:g} by rounding)"
            )

    def release_full_model(self) -> None:
        """Free the gathered copy."""
        if self.plain_copy is not None:
            for weight in self.plain_copy.parameters():
                weight.data = weight.data.new_empty(0)

    def full_weights(self) -> dict[str, Tensor] | None:
        """See ``Engine.full_weights``: under ZeRO-3 gathered one after the other; other ranks get none."""
        if self.plain_copy is None:
            return None
        found = {}
        for name, weight in self.policy.model.named_parameters():
            with self._gathered(weight):
                if self.ranks.is_main:
                    found[name] = weight.detach().cpu().clone()
        return found

    def _gathered(self, weight: nn.Parameter, *, modifier: int | None = None):
        return self.zero.GatheredParameters([weight], modifier_rank=modifier, enabled=hasattr(weight, "ds_id"))

    def named_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, fp32 master and moments) of every trained weight, whole on every rank, one after the other."""
        for name, weight in zip(self.names, self._trained(), strict=True):
            state = {MASTER: self.access.safe_get_full_fp32_param(weight)}
            state |= {key: self.access.safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
            yield name, state

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str], dict[str, Tensor]], num_updates: int) -> None:
        """Restore what ``named_state`` gave; ``read`` finds the state of a name. World size and stage may be others."""
        for name, weight in zip(self.names, self._trained(), strict=True):
            state = read(name)
            with self._gathered(weight, modifier=0):
                weight.data.copy_(state[MASTER])
            self._set_state(weight, state)
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(float(num_updates))
        self.num_updates = num_updates

    def _set_state(self, weight: nn.Parameter, state: dict[str, Tensor]) -> None:
        if not hasattr(weight, "ds_id"):
            self.access.safe_set_full_fp32_param(weight, state[MASTER].to(self.device))
            for key in MOMENTS:
                self.access.safe_set_full_optimizer_state(weight, state[key].to(self.device), key)
            return
        size = weight.ds_tensor.ds_numel
        for key, values in state.items():
            mine = values.flatten()[self.ranks.rank * size : (self.ranks.rank + 1) * size]
            local = torch.zeros(size, device=self.device)  # the last rank's part is padded
            local[: len(mine)] = mine
            if key == MASTER:
                self.access.safe_set_local_fp32_param(weight, local)
            else:
                self.access.safe_set_local_optimizer_state(weight, local, key)

    def _trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.policy.model.parameters() if weight.requires_grad]


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that DeepSpeed casts with the weights until its pull request 8066.

    With rotary frequencies in bf16 the policy would be another function of its weights than the frozen model.
    """
    kept = dict(model.named_buffers())
    yield
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        found = getattr(module, leaf)
        if found.dtype != buffer.dtype:
            setattr(module, leaf, buffer.to(found.device))


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in evaluation mode whose weights are empty."""
    empty = {id(weight): nn.Parameter(weight.new_empty(0), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, empty).eval()


def groups_of(pairs, max_numel: int) -> Iterator[list]:
    """Pairs (ZeRO-3 weight, other) in groups of at most ``max_numel`` weights, or of one pair."""
    group, numel = [], 0
    for pair in pairs:
        if group and numel + pair[0].ds_numel > max_numel:
            yield group
            group, numel = [], 0
        group.append(pair)
        numel += pair[0].ds_numel
    if group:
        yield group


def frozen_engine(frozen: FrozenPair, device: torch.device) -> nn.Module:
    """The pair, of models from ``load_sharded``, behind an engine that gathers their layers for each forward."""
    weights = list(frozen.parameters())
    config = zero_config(
        3,
        offload_optimizer=False,
        offload_parameters=False,
        max_grad_norm=0.0,
        num_trained=sum(map(numel_of, weights)),
        dtype=weights[0].dtype,
        device=device,
    )
    with buffers_kept(frozen):
        engine, *_ = load_deepspeed(device).initialize(model=frozen, config=config, dist_init_required=False)
    engine.eval()
    return engine
