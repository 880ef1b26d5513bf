"""What a model's configuration tells of it before any weight is loaded: can this project pack, score and adapt it?

The model is built and run on the meta device, where weights have shapes alone: milliseconds and no memory whatever its
size. Left out: numbers. Whether hidden states times the head are the model's own logits, and whether a sequence of a
pack keeps to itself, ``model.check_head`` compares once the weights are there.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention import ATTENTION_NAME, AttentionLayout, packed_attention
from .config import LoraConfig

__all__ = ["adapted_modules", "check_architecture", "check_cached_heads", "empty_model"]

PROBE_NAME = "inverseq_probe"
PROBE_TOKENS = 8
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # what placement and sampling read


def empty_model(
    config: PretrainedConfig, *, trust_remote_code: bool = False, attention: str = ATTENTION_NAME
) -> PreTrainedModel:
    """The model of a configuration on the meta device, without weights; the configuration is left as it is."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            dtype=torch.bfloat16,  # the products of experts take no other on the meta device
        ).eval()


def _check_layer_types(what: str, config: PretrainedConfig) -> None:
    """Raise ValueError for layers whose tokens see anything but a causal range: packs would be read wrongly."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"{what}: layers of kind {', '.join(unknown)}; expected full or sliding attention alone")


def check_architecture(what: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError, one line that begins with ``what``, for an architecture that cannot be packed.

    It must have an output embedding, take positions, and attend in every layer through transformers' attention
    functions, handing them the keywords of its forward; older ones have attention of their own (Falcon, Bloom, GPT-J).
    """
    _check_layer_types(what, config)
    what = f"{what}: the architecture {type(config).__name__.removesuffix('Config')} cannot be packed"
    text = config.get_text_config()
    absent = [name for name in SIZES if not isinstance(getattr(text, name, None), int)]
    if absent:
        raise ValueError(f"{what}: its configuration names no {', '.join(absent)}")
    try:
        model = empty_model(config, trust_remote_code=trust_remote_code, attention=PROBE_NAME)
    except Exception as error:  # the classes of older architectures fail in any way
        own = isinstance(error, KeyError) and error.args == (PROBE_NAME,)
        raise ValueError(f"{what}: {'its attention is its own' if own else _describe(error)}") from error
    if model.get_output_embeddings() is None:
        raise ValueError(f"{what}: it has no output embedding")
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        raise ValueError(f"{what}: its forward takes no position_ids")
    num_calls, error = _attention_calls(model)
    if error is not None and not num_calls and not _is_of_meta(error):
        raise ValueError(f"{what}: {_describe(error)}") from error
    if error is None and num_calls < text.num_hidden_layers:
        raise ValueError(
            f"{what}: {num_calls or 'none'} of its {text.num_hidden_layers} layers attend through transformers' "
            "attention functions"
        )


def check_cached_heads(what: str, config: PretrainedConfig) -> None:
    """Raise ValueError for keys whose size transformers' continuous batching does not know: latent attention."""
    text = config.get_text_config()
    parts = [getattr(text, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if None not in parts and sum(parts) != getattr(text, "head_dim", None):
        raise ValueError(
            f"sampling.backend='transformers': its cache has no room for the keys of {what} ({type(text).__name__} has "
            "heads of two parts); expected lmdeploy or server"
        )


def _attention_calls(model: PreTrainedModel) -> tuple[int, Exception | None]:
    """How many layers hand a small pack of one sequence to packed attention, and what ended the forward before."""
    lengths, attended = (PROBE_TOKENS,), []
    with torch.device("meta"), torch.no_grad():
        bounds = torch.zeros(2, dtype=torch.int32)
        layout = AttentionLayout(lengths, lengths, (-1,), bounds, bounds, None, None, *lengths, *lengths)
        try:
            model.get_decoder()(
                input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.int64),
                position_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.int64),
                use_cache=False,
                layout=layout,
                attended=attended,
            )
        except Exception as error:  # of the model's own code, any
            return len(attended), error
    return len(attended), None


def _probe_attention(module: nn.Module, query: Tensor, *args, attended: list | None = None, **kwargs):
    if attended is None:
        raise ValueError(f"{type(module).__name__} is not handed the keywords of the model's forward")
    output = packed_attention(module, query, *args, **{**kwargs, "dropout": 0.0})  # loading turns dropout off
    attended.append(module)
    return output


def _is_of_meta(error: Exception) -> bool:
    """Whether a forward has ended at a value that the meta device does not have, of which the model is innocent."""
    return isinstance(error, NotImplementedError | RuntimeError) and "meta" in str(error)


def _describe(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"


def adapted_modules(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The names that ``policy.lora.target_modules`` lists, or ``all-linear``, each of which the model has.

    Raises ValueError for a name that no linear layer has, and for an embedding.
    """
    targets = [name.strip() for name in config.target_modules.split(",")]
    if targets == ["all-linear"]:
        return targets
    key, head = f"policy.lora.target_modules={config.target_modules!r}", model.get_output_embeddings()
    found: dict[str, set[str]] = {"linear": set(), "embedding": set()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            kind = "embedding" if module is head or isinstance(module, nn.Embedding) else "linear"
            found[kind].add(name.rpartition(".")[2])
    for target in targets:
        if target in found["embedding"]:
            raise ValueError(f"{key}: expected no embedding ({target})")
        if target not in found["linear"]:
            raise ValueError(
                f"{key}: the model has no {target}; expected all-linear, or some of "
                f"{', '.join(sorted(found['linear']))}, separated by commas"
            )
    return targets


AttentionInterface.register(PROBE_NAME, _probe_attention)
