"""A tiny random chat model for tests: a Llama of a few layers and a byte-level BPE tokenizer with a ChatML template.

``make_tiny_model`` writes what ``from_pretrained`` reads; nothing is downloaded and nothing is trained but the
tokenizer's merges (on the words below, the same every time).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["CHATML", "make_tiny_model", "make_tiny_tokenizer"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYLLABLES = "ba be bi bo da de di do ka ke ki ko la le li lo ma me mi mo na ne ni no ra re ri ro sa se si so".split()
ENGLISH = (
    "system user assistant the of and to in is you that it he was for on are as with his they at be this have from "
    "or one had by word but not what all were we when your can said there use an each which she do how their if will "
    "up other about out many then them these so some her would make like him into time has look two more write go "
    "see number no way could people my than first water been call who oil its now find long down day did get come "
    "made may part question answer help please explain safe kind true fact topic"
).split()


def corpus() -> list[str]:
    invented = [first + second for first in SYLLABLES for second in SYLLABLES]
    return [" ".join(ENGLISH)] * 20 + [" ".join(invented)] * 2


def make_tiny_tokenizer(*, vocab: int = 512, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly ``vocab`` tokens: 3 special ones (EOS is ``<|im_end|>``), 256 bytes and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == vocab, f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {vocab}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(
    path: Path | str,
    *,
    vocab: int = 512,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    scale: float = 0.08,
    max_positions: int = 2048,
) -> Path:
    """Write a random Llama with its tokenizer to ``path`` and return it; ``scale`` is the weights' standard deviation.

    Grouped-query attention (4 heads on 2), fp32 safetensors, the same weights for the same arguments. The
    generation_config holds sampling settings that training must not follow.
    """
    path = Path(path)
    tokenizer = make_tiny_tokenizer(vocab=vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=scale,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=5, top_p=0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
