"""LoRA through peft: low-rank adapters inside the policy, whose base weights stay those of the frozen model μ.

With adapters off the policy is μ, so one copy of the weights serves the policy and both views of the contrast. The
adapters are fp32 whatever the base is, but for DeepSpeed, which gives all weights one dtype and holds fp32 masters.
Left out: adapters on the output embedding and on the token embedding, because the fused operations read those weights
themselves; and ZeRO-3, whose weights are there only inside the engine's forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .architecture import adapted_modules
from .atomic import atomic_directory
from .config import LoraConfig
from .integrations.versions import check_version
from .model import FrozenPair

__all__ = [
    "AdapterlessPair",
    "add_adapters",
    "adapters_off",
    "check_lora",
    "export_adapters",
    "has_adapters",
    "merged_model",
    "merged_weights",
    "plain_name",
]

ADAPTER = "default"


def check_lora() -> None:
    """Raise ValueError when the package is missing or older than what was tested."""
    check_version("peft", extra="lora", what="policy.lora")


def add_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> None:
    """Put adapters into the model; they alone are trained from now on. Their initial product is 0.

    ``seed`` draws the half of each adapter that does not start at 0. Raises ValueError when a target module does not
    exist or is an embedding, and when peft is missing or older than what was tested.
    """
    check_lora()
    import peft

    targets = adapted_modules(model, config)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=config.rank_stabilized,
    )
    devices = [model.device] if model.device.type == "cuda" else []  # without them torch asks about every GPU there is
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.add_adapter(settings, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def has_adapters(model: torch.nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its adapters, μ, for a while; it was training them before and does so after."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


class AdapterlessPair(FrozenPair):
    """π_w and π_l whose better model is the policy itself; it is used with ``adapters_off``."""

    def __init__(self, policy: PreTrainedModel, plain: PreTrainedModel | None = None):
        torch.nn.Module.__init__(self)  # the adapters keep their gradients
        self.better = policy
        self.plain = policy if plain is None else plain.requires_grad_(False).eval()


def plain_name(name: str) -> str:
    """A weight's name in a model without adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in a model without adapters, weight) of every weight, the adapters added in fp32 where there are any."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if re.search(r"\.lora_[A-Za-z_]+\.", name):
            continue
        module, plain = name.rpartition(".base_layer.")[0], plain_name(name)
        if module in layers and name.endswith(".base_layer.weight"):
            delta = layers[module].get_delta_weight(ADAPTER).float()
            yield plain, (tensor.detach().float() + delta).to(tensor.dtype)
        else:
            yield plain, tensor.detach()


def merged_model(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model with the adapters in its weights, on the host: a second copy of the weights."""
    with torch.device("meta"):
        merged = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in merged_weights(model)}
    merged.load_state_dict(weights, strict=True, assign=True)
    merged.tie_weights()
    for name, buffer in model.named_buffers():  # those that no state dict holds, rotary frequencies for one
        owner, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(owner), leaf, buffer.detach().to("cpu", copy=True))
    merged.generation_config = model.generation_config
    return merged.eval()


def export_adapters(model: PreTrainedModel, path: Path | str) -> Path:
    """Write the adapters alone as a folder that ``peft.PeftModel.from_pretrained`` reads, whole or not at all."""
    with atomic_directory(Path(path)) as folder:
        model.save_pretrained(folder)
    return Path(path)
