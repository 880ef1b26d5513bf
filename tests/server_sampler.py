"""What the tests of the server backend share: a sampler before a real server, its prompts and its trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inverseq.config import ModelConfig, SamplingConfig, ServerConfig
from inverseq.freshness import Freshness
from inverseq.model import load_model
from inverseq.records import Prompt, RenderedPrompt
from inverseq.sampling import make_sampler

from .tiny_words import EOS, NUM_WORDS, make_word_model, make_word_tokenizer, word_ids

__all__ = ["Trainer", "make_prompts"]


def make_prompts(count: int, *, seed: int = 0, ids: list[int] | None = None) -> list[RenderedPrompt]:
    """Prompts of random words and lengths, or ``count`` times the one of ``ids``."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        words = np.array(ids or rng.choice(word_ids(*range(15)), rng.integers(2, 20)), np.int32)
        prompt = Prompt(f"p{index}", ({"role": "user", "content": f"question {index}"},))
        prompts.append(RenderedPrompt(prompt, (np.array([3, 3], np.int32), words[:1]), words[1:]))
    return prompts


class Trainer:
    """A policy and the server's sampler of it."""

    def __init__(self, folder: Path, root: str, *, model_seed: int = 0, scale: float = 0.3, max_gap=0.1, **options):
        self.folder = folder
        self.initial = make_word_model(folder / "initial", seed=model_seed, scale=scale)
        self.model = load_model(str(self.initial), ModelConfig(device="cpu"))
        self.tokenizer = make_word_tokenizer()
        server = {
            "url": f"{root}/v1",
            "model": "{model_dir}",
            "dialect": "transformers",
            "prompts": "text",
            "refresh_url": f"{root}/reset",
            "timeout_s": 120.0,
            "wait_s": 600.0,
            "concurrency": 4,
        }
        own = {name: options.pop(name) for name in list(options) if name in ServerConfig.__dataclass_fields__}
        self.sampler_config = config = SamplingConfig(
            backend="server", server=ServerConfig(**server | own), **{"max_new_tokens": 6, **options}
        )
        self.sampler = make_sampler(
            config, self.model, self.tokenizer, num_valid_vocab=NUM_WORDS, weights_dir=folder / "weights"
        )
        self.freshness = Freshness(
            make_prompts(1, seed=5)[0], self.tokenizer, stop_ids=(EOS,), num_valid_vocab=NUM_WORDS, max_gap=max_gap
        )

    def sync(self, step: int) -> dict[str, float]:
        self.freshness.sync(self.sampler, self.model, step)
        return self.freshness.row

    def change_weights(self) -> None:
        """Other weights, under which other words are the most probable."""
        self.model.get_output_embeddings().weight.data.neg_()
