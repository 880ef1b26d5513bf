"""The policy's weights as handles of GPU memory, for an LMDeploy engine in another process on the same GPU.

LMDeploy reads base64 of a pickled list of (name, (function, arguments)), where calling the function opens the tensor:
what ``torch.multiprocessing.reductions.reduce_tensor`` returns. Nothing is copied but by the engine, and the tensors
must live until it has answered. Whole layers go together, because an engine fuses their projections.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from transformers import PreTrainedModel

from .lora import merged_weights, plain_name

__all__ = ["layers_of", "serialized"]


def layers_of(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The model's parameters by layer, those of no layer last; a head tied to the embedding is not named again.

    Adapters are merged into the weights, a layer at a time.
    """
    names = {plain_name(name) for name, _ in model.named_parameters()}
    layer: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    current = None
    for name, weight in merged_weights(model):
        found = re.match(r".*?\.\d+\.", name)
        if name not in names:  # a buffer, or a tied weight's second name
            continue
        if found is None:
            others[name] = weight.contiguous()
            continue
        if layer and found[0] != current:
            yield layer
            layer = {}
        current = found[0]
        layer[name] = weight.contiguous()
    if layer:
        yield layer
    yield others


@torch.no_grad()
def serialized(tensors: dict[str, Tensor]) -> str:
    """Handles of tensors as the text that ``/update_weights`` takes."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump([(name, reduce_tensor(tensor)) for name, tensor in tensors.items()])
    return base64.b64encode(buffer.getvalue()).decode()
