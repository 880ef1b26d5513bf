"""A tiny random chat model whose text and token ids tell each other: one token a word, words joined by spaces.

For servers that return text only. ``tests.tiny`` has bytes among its tokens, and most of what it says is no text.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["EOS", "NUM_WORDS", "make_word_model", "make_word_tokenizer", "word_ids", "write_word_prompts"]

EOS = 0
WORDS = ["<eos>", "other", "system", "user", "assistant", *(f"w{i}" for i in range(15))]
NUM_WORDS = len(WORDS)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Words are looked up; unknown ones are ``other``; the EOS token is the only special one."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="other"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)


def make_word_model(path: Path | str, *, seed: int = 0, scale: float = 0.3) -> Path:
    """Write a random Llama of two layers with its tokenizer; its generation_config asks for what nobody must follow."""
    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=2, top_p=0.5, repetition_penalty=3.0)
    model.save_pretrained(path)
    make_word_tokenizer().save_pretrained(path)
    return Path(path)


def word_ids(*numbers: int) -> list[int]:
    """Token ids of the words w0, w1, …"""
    return [WORDS.index(f"w{number}") for number in numbers]


def write_word_prompts(path: Path, count: int) -> Path:
    """A .jsonl file of different prompts of 1 to 9 words."""
    rows = []
    for index in range(count):
        words = [f"w{(index * 7 + k * k) % 15}" for k in range(1 + index % 9)] + [f"w{index % 15}", f"w{index // 15}"]
        rows.append(json.dumps({"messages": [{"role": "user", "content": " ".join(words)}]}))
    path.write_text("\n".join(rows) + "\n")
    return path
