"""Causal language models as this project uses them: a backbone over packs, and a head read by the fused operations.

Logits are never formed here: ``action_hidden`` gives the hidden states that predict action tokens, and ``Head``
carries everything an operation of ``inverseq_kernels`` needs to turn them into log-probabilities.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_accelerate_available

from .architecture import check_architecture
from .attention import ATTENTION_NAME, AttentionLayout, attention_layout, check_backend
from .config import ModelConfig
from .fused_layers import check_fused_layers, fuse_layers
from .records import PackedViews

__all__ = [
    "FrozenPair",
    "Head",
    "action_hidden",
    "check_finite",
    "check_head",
    "check_heads",
    "check_loadable",
    "enable_gradient_checkpointing",
    "first_line",
    "frozen_copy",
    "head_of",
    "load_model",
    "read_model",
    "resolve_device",
    "resolve_dtype",
]

logger = logging.getLogger(__name__)

NOISE = re.compile("drop|jitter")  # what the names of a module's random numbers hold


def resolve_device(config: ModelConfig) -> torch.device:
    """The device of ``model.device``; ValueError when CUDA is asked for and absent."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device='cuda': no CUDA device is available; use model.device=cpu")
    return torch.device(config.device)


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of ``model.dtype``: bfloat16 on CUDA and float32 elsewhere unless said otherwise."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def load_model(path: str | Path, config: ModelConfig) -> PreTrainedModel:
    """Load a causal language model with packed attention and without dropout, from safetensors only, to its device.

    Raises ValueError as ``check_loadable`` and ``read_model`` do, and for weights that are not finite.
    """
    device = resolve_device(config)
    check_loadable(path, config)
    model = read_model(path, config, **placed_as_read(device))
    check_finite(path, model.parameters())
    return model.to(device)


def check_loadable(path: str | Path, config: ModelConfig) -> None:
    """Raise ValueError, before a weight is read, for what ``read_model`` could not make of the model at ``path``.

    That is an architecture that cannot be packed, and ``model.attention`` or ``model.fused_layers`` that cannot be had.
    """
    device = resolve_device(config)
    check_backend(config.attention, device, resolve_dtype(config, device))
    if config.fused_layers:
        check_fused_layers(device)
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the model cannot be loaded: {first_line(error)}") from error
    check_architecture(str(path), found, trust_remote_code=config.trust_remote_code)


def read_model(path: str | Path, config: ModelConfig, **placement) -> PreTrainedModel:
    """``load_model`` without a look before and at the weights' values; ``placement`` goes to ``from_pretrained``.

    Dropout and router jitter are off because targets and policy must be the same function of the weights: with them, a
    policy equal to its target would have a loss. Raises ValueError when the weights cannot be read or are not all
    there: what is missing would otherwise be made up at random.
    """
    dtype = resolve_dtype(config, resolve_device(config))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **placement,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: the model cannot be loaded: {first_line(error)}") from error
    others = [f"{name} ({tuple(there)} for {tuple(wanted)})" for name, there, wanted in info["mismatched_keys"]]
    absent = sorted({*info["missing_keys"], *others})
    if absent:
        raise ValueError(f"{path}: weights are missing or of another shape: {', '.join(absent[:5])}")
    turn_off_noise(model)
    model.packed_attention_backend = config.attention
    if config.fused_layers:
        fuse_layers(model)
    return model.eval()


def check_finite(path: str | Path, weights: Iterable[Tensor]) -> None:
    """Raise ValueError when a weight of the model at ``path`` holds a number that is not finite."""
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError(f"{path}: the weights hold numbers that are not finite")


def first_line(error: Exception) -> str:
    """What an error of transformers says first; the whole in short when its first line only announces the rest."""
    line = str(error).strip().partition("\n")[0].rstrip()
    return textwrap.shorten(str(error), 300, placeholder=" …") if line.endswith(":") else line


def turn_off_noise(model: PreTrainedModel) -> None:
    """Set every dropout and jitter to 0: those of modules, and the numbers that forwards read in training mode.

    OPT drops by ``dropout``, StarCoder2 by ``residual_dropout``, Mixtral's router shakes by ``jitter_noise``.
    """
    if getattr(model.config, "attention_dropout", 0.0):
        model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        noises = [name for name, value in vars(module).items() if isinstance(value, float) and NOISE.search(name)]
        for name in noises:
            setattr(module, name, 0.0)


def placed_as_read(device: torch.device) -> dict[str, dict[str, torch.device]]:
    """Keywords of ``from_pretrained`` that put each weight on the GPU as it is read; that needs accelerate.

    Otherwise the whole model stands in host memory first, once for each rank of the host: a weight of another dtype
    than the file's (Vicuna's are float16) is not the file's own pages. The GPU's index is named because threads read,
    and a thread's own device is the first.
    """
    if device.type != "cuda":
        return {}
    if not is_accelerate_available():
        logger.info("weights are read through host memory; with accelerate installed they go straight to the GPU")
        return {}
    return {"device_map": {"": torch.device("cuda", torch.cuda.current_device())}}


@dataclass(frozen=True, slots=True)
class Head:
    """A language-model head: logits = softcap·tanh((hidden·weightᵀ + bias)/softcap)/temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    temperature: float
    num_valid_vocab: int  # columns from here on are padding of the vocabulary


def head_of(model: PreTrainedModel, num_valid_vocab: int) -> Head:
    """The head of a causal language model. The weight is the Parameter itself, so gradients reach it."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    temperature = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides by it
    temperature /= float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies by it
    return Head(
        weight=linear.weight,
        bias=getattr(linear, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
        num_valid_vocab=min(num_valid_vocab, linear.weight.shape[0]),
    )


def action_hidden(model: PreTrainedModel, pack: PackedViews) -> Tensor:
    """Hidden states that predict the action tokens under each view of the pack, [num_views, A, D]."""
    hidden_TD = model.get_decoder()(
        input_ids=pack.input_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        layout=_layout(model, pack),
    ).last_hidden_state[0]
    num_views, num_actions = pack.action_index.shape
    return hidden_TD.index_select(0, pack.action_index.flatten()).view(num_views, num_actions, -1)


def _layout(model: PreTrainedModel, pack: PackedViews) -> AttentionLayout:
    return attention_layout(pack, getattr(model, "packed_attention_backend", "auto"))


@torch.no_grad()
def check_head(model: PreTrainedModel, pack: PackedViews, num_valid_vocab: int) -> None:
    """Compare ``head_of`` with the model's own logits on a small pack of one sequence, and the sequence with itself
    behind another one.

    Raises ValueError when either differs: an architecture that shapes its logits in a way ``Head`` does not know, or
    whose layers mix what stands in one pack, would otherwise train on wrong log-probabilities without a word.
    """
    pack = pack.to(model.device)
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    _check_samples_stay_apart(model, pack, tolerance)
    own_TV = model(
        input_ids=pack.input_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        layout=_layout(model, pack),
    ).logits[0]
    own_AV = own_TV.index_select(0, pack.action_index[-1]).float()
    hidden_AD = action_hidden(model, pack)[-1].float()
    head = head_of(model, num_valid_vocab)  # behind the forwards: an engine that gathers a tied one releases it there
    logits_AV = hidden_AD @ head.weight.float().T
    if head.bias is not None:
        logits_AV += head.bias.float()
    if head.softcap is not None:
        logits_AV = head.softcap * torch.tanh(logits_AV / head.softcap)
    logits_AV /= head.temperature
    scale = own_AV.abs().max().clamp(min=1.0)
    error = ((logits_AV - own_AV).abs().max() / scale).item()
    if not error < tolerance:
        raise ValueError(
            f"{type(model).__name__}: hidden states times the output embedding differ from the model's own logits by "
            f"{error:.1e} of their size; this architecture's head is not supported"
        )


def _check_samples_stay_apart(model: PreTrainedModel, pack: PackedViews, tolerance: float) -> None:
    alone_AD = action_hidden(model, pack)[-1].float()
    length = pack.num_tokens
    behind = dataclasses.replace(
        pack,
        input_ids=torch.cat([pack.input_ids.flip(0), pack.input_ids]),
        position_ids=pack.position_ids.repeat(2),
        cu_seqlens=torch.cat([pack.cu_seqlens, pack.cu_seqlens[-1:] * 2]),
        parent_seq=pack.parent_seq.repeat(2),
        action_index=pack.action_index + length,
        seqlens=(length, length),
    )
    error = (action_hidden(model, behind)[-1].float() - alone_AD).abs().max() / alone_AD.abs().max().clamp(min=1.0)
    if not error.item() < tolerance:
        raise ValueError(
            f"{type(model).__name__}: hidden states of a sequence change by {error.item():.1e} of their size when "
            "another one stands before it in the pack; this architecture cannot be packed"
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass (transformers renamed the method in 5.2x)."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def frozen_copy(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """A copy of the model that keeps no gradients, in evaluation mode; its weights, not its buffers, on ``device``."""
    weights = {
        id(weight): nn.Parameter(weight.detach().to(device or weight.device, copy=True), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights).eval()


class FrozenPair(nn.Module):
    """π_w and π_l: one set of weights reading two views (principle contrast), or two sets of weights."""

    def __init__(self, better: PreTrainedModel, plain: PreTrainedModel):
        super().__init__()
        self.better = better.requires_grad_(False).eval()
        self.plain = plain.requires_grad_(False).eval()

    def forward(self, function: Callable, *args):
        """``function(self, *args)``: an engine that shards weights gathers them inside ``forward`` and nowhere else."""
        return function(self, *args)

    @property
    def shares_weights(self) -> bool:
        return self.better is self.plain


def check_heads(frozen: FrozenPair, pack: PackedViews, num_valid_vocab: int) -> None:
    """``check_head`` of both models; where their weights are gathered, ``frozen(check_heads, …)`` is inside forward."""
    check_head(frozen.better, pack, num_valid_vocab)
    if not frozen.shares_weights:
        check_head(frozen.plain, pack, num_valid_vocab)
