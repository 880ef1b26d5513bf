"""A reward model: any Hugging Face sequence classifier that reads a conversation and gives a number.

One output is the reward. With several, ``objective`` names one; models in the manner of ArmoRM, whose output carries
a combined ``score`` beside the objectives, give that score unless an objective is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

__all__ = ["RewardModel"]

Conversation = tuple[Sequence[dict[str, str]], str]


class RewardModel:
    """Scores (messages, response) pairs."""

    def __init__(self, path: str, *, objective: str | None = None, trust_remote_code: bool = False):
        """Raises ValueError for a model that cannot be loaded, has no chat template, or lacks the objective."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                trust_remote_code=trust_remote_code,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--model {path}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"--model {path}: is no reward model: its weights lack {missing}")
        if not self.tokenizer.chat_template:
            raise ValueError(f"--model {path}: its tokenizer has no chat template to write a conversation with")
        # A classifier reads its number at the last token that is not padding: where padding is EOS, an answer's own
        # EOS would be taken for padding, so such models read one answer at a time.
        pad = self.tokenizer.pad_token_id
        self.can_pad = pad is not None and pad != self.tokenizer.eos_token_id
        self.model.config.get_text_config().pad_token_id = pad if self.can_pad else None
        self.model.to(device).eval()
        self.path = path
        self.objective = self._find_objective(objective)

    def _find_objective(self, objective: str | None) -> int | None:
        if objective is None:
            return None
        labels = {str(name): int(index) for index, name in self.model.config.id2label.items()}
        index = labels.get(objective, int(objective) if objective.isdigit() else -1)
        if not 0 <= index < len(labels):
            raise ValueError(f"--objective {objective}: expected one of {', '.join(labels)} or its index")
        return index

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation], *, batch_size: int = 8) -> list[float]:
        """The reward of each response, in order; batches hold responses of similar length."""
        texts = [
            self.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
            for messages, response in conversations
        ]
        batch_size = batch_size if self.can_pad else 1
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        rewards = [0.0] * len(texts)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            inputs = self.tokenizer(
                [texts[index] for index in chosen], padding=self.can_pad, add_special_tokens=False, return_tensors="pt"
            )
            values = self._rewards_of(self.model(**inputs.to(self.model.device))).double().tolist()
            for index, value in zip(chosen, values, strict=True):
                rewards[index] = value
        return rewards

    def _rewards_of(self, output: Any) -> Tensor:
        """One reward per row of a model output, [B]."""
        score = getattr(output, "score", None)
        if self.objective is None and score is not None:
            return score.float().reshape(-1)
        values = getattr(output, "rewards", None)
        values = output.logits if values is None else values
        if self.objective is not None:
            return values[:, self.objective].float()
        if values.shape[-1] != 1:
            labels = ", ".join(map(str, self.model.config.id2label.values()))
            raise ValueError(
                f"--model {self.path}: gives {values.shape[-1]} numbers; choose one by --objective ({labels})"
            )
        return values[:, 0].float()
