"""Models that are spread over the ranks (ZeRO-3) while they are read: no rank ever holds all weights of one.

transformers' ``from_pretrained`` does it by DeepSpeed's own means while an ``HfDeepSpeedConfig`` lives, a class that
comes with accelerate: modules are built under ``zero.Init``, each giving its weights away at once, and are filled one
after the other by ``GatheredParameters``. Only rank 0 reads values, in the file's dtype and out of pages that the
system maps and may drop, and sends them to the others: the ranks of a machine hold no copies of the file, and one that
many machines share is read once. What a rank holds beside its parts is one module's own weights, whole.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import ModelConfig
from .distributed import Ranks
from .integrations.versions import check_version
from .model import check_finite, check_loadable, read_model, resolve_device, resolve_dtype
from .zero_options import zero_config

__all__ = ["check_deepspeed", "load_deepspeed", "load_sharded", "numel_of"]


def check_deepspeed() -> None:
    """Raise ValueError when the package is missing or older than what was tested."""
    check_version("deepspeed", extra="deepspeed", what="engine.kind='deepspeed'")


def load_deepspeed(device: torch.device) -> Any:
    """The module, ready for this device: with a process group, without a compiler, and silent."""
    check_deepspeed()
    if not dist.is_initialized():  # one process without a launcher: DeepSpeed would ask for MPI
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # An all-reduce for inference that training never calls; it would be compiled by the first run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_sharded(
    path: str | Path, config: ModelConfig, *, ranks: Ranks, offload_parameters: bool = False
) -> PreTrainedModel:
    """``load_model`` by all ranks together: the same weights and buffers, of which each rank keeps its part.

    The parts are on the device, or in host memory with ``offload_parameters``. All ranks raise the ValueError of one,
    also for a missing package.
    """
    check_version("accelerate", extra="deepspeed", what="engine.zero_stage=3")
    device = resolve_device(config)
    deepspeed = load_deepspeed(device)
    options = zero_config(
        3,
        offload_optimizer=False,
        offload_parameters=offload_parameters,
        max_grad_norm=0.0,
        num_trained=1,  # nothing is reduced here; DeepSpeed refuses a bucket of 0
        dtype=resolve_dtype(config, device),
        device=device,
    )
    model = problem = None
    try:
        check_loadable(path, config)
        with spread_as_read(options):
            model = read_model(path, config)
    except ValueError as error:
        problem = str(error)
    for found in filter(None, ranks.gather(problem)):  # rank 0 alone compares shapes
        raise ValueError(found)
    gc.collect()  # the head that a tied one has replaced: DeepSpeed's weights refer to themselves
    check_finite(path, one_by_one(model.parameters(), deepspeed))
    restore_buffers(model)
    return model.to(device)


@contextmanager
def spread_as_read(options: dict[str, Any]) -> Iterator[None]:
    """What ``from_pretrained`` reads in the block is spread by DeepSpeed's configuration ``options``."""
    from transformers.integrations import deepspeed

    _living = deepspeed.HfDeepSpeedConfig(options)  # transformers itself holds a weak reference
    try:
        yield
    finally:
        deepspeed.unset_hf_deepspeed_config()


def restore_buffers(model: PreTrainedModel) -> None:
    """Give a model from ``zero.Init`` the buffers that ``from_pretrained`` computes anywhere else.

    Under ``zero.Init`` new tensors get the weights' dtype, with transformers 5.17 rotary frequencies too. The weights
    of the model that computes them are one number each, seen in the shape of a weight.
    """
    named = model.state_dict(keep_vars=True)
    stand_ins = {
        name: torch.zeros((), dtype=tensor.dtype).expand(getattr(tensor, "ds_shape", tensor.shape))
        for name, tensor in named.items()
    }
    computed = type(model).from_pretrained(None, config=model.config, state_dict=stand_ins, dtype=model.dtype)
    for name, buffer in computed.named_buffers():
        if name not in named:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)


def one_by_one(weights: Iterable[nn.Parameter], deepspeed: Any) -> Iterator[Tensor]:
    """The weights whole, one at a time. All ranks take them together."""
    for weight in weights:
        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.detach()


def numel_of(weight: Tensor) -> int:
    """Elements of a weight, of all its parts when it is spread."""
    return getattr(weight, "ds_numel", weight.numel())
