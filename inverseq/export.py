"""RUN/export: the trained model as a Hugging Face folder (safetensors, tokenizer, chat template, generation_config).

It loads with ``AutoModelForCausalLM.from_pretrained`` and knows nothing of this project.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .atomic import atomic_directory, naming_file
from .lora import export_adapters, has_adapters, merged_model

__all__ = ["export_model"]

logger = logging.getLogger(__name__)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str,
    *,
    chat_template: str | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write model and tokenizer to the folder ``path``, replacing an older export whole, and return it.

    ``weights`` are the model's by name where it does not hold them whole itself (a sharded engine's).
    Adapters are merged into the weights, and also written alone to the folder ``adapter`` beside it, for peft.
    ``chat_template`` is the template that training used where it is not the tokenizer's own.
    Raises OSError naming the folder when it cannot be written; the older export then stands as it was.
    """
    path = Path(path)
    if has_adapters(model):
        export_adapters(model, path.with_name("adapter"))
        model = merged_model(model)
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    own_generation_config = model.generation_config
    model.generation_config = _valid_generation_config(model)
    try:
        with atomic_directory(path) as folder, naming_file(path):
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"could not write: {error}: '{path}'") from error
    finally:
        model.generation_config = own_generation_config
    return path


def _valid_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The model's generation settings, or only its special tokens where transformers refuses to write them.

    Some published models (Vicuna) hold a temperature without ``do_sample``; that must not cost the export.
    """
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError as error:
        logger.warning("generation_config is not valid, only its special tokens are exported: %s", error)
        return GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )
    return own
