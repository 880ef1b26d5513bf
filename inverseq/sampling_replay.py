"""Sampling by looking up the stored samples of an earlier run instead of drawing new ones.

For comparing two runs on equal responses: packing, accumulation, another engine or machine. A prompt's response is
the stored one of the same prompt, token by token, that was drawn with the same seed. So the replaying run must have
the earlier run's prompts, rendering and seed; anything else is an error, never a different response.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from .config import SamplingConfig
from .records import RenderedPrompt, Response
from .sample_files import held_out_path, read_samples

__all__ = ["ReplaySampler"]


class ReplaySampler:
    """The samples stored under ``sampling.replay_path``: a run directory or its samples folder."""

    name = "replay"
    version = "1"

    def __init__(self, config: SamplingConfig):
        self.config = config
        self.folder = Path(config.replay_path).expanduser()
        self.stored: dict[tuple, list[Response]] = defaultdict(list)  # several when an epoch draws a prompt twice
        files = sample_files_of(self.folder)
        if not files:
            raise ValueError(f"sampling.replay_path={config.replay_path!r}: no epoch_NNNN.jsonl of samples in there")
        for path in files:
            samples = read_samples(path).samples
            seed = samples[0].response.seed  # rank 0's, which stands for the epoch; every rank has drawn with its own
            for sample in samples:
                self.stored[replay_key(sample.rendered, seed)].append(sample.response)

    def sync(self, policy: nn.Module, weights_step: int) -> None:
        """Stored responses do not depend on weights; each keeps the step of those that it was drawn from."""

    def generate(self, prompts: Sequence[RenderedPrompt], *, seed: int) -> Iterator[tuple[int, Response]]:
        """Yield (index, stored response) in order; see ``Sampler.generate``. All are looked up before the first."""
        drawn: Counter[tuple] = Counter()
        responses = []
        for prompt in prompts:
            key = replay_key(prompt, seed)
            responses.append(self.find(prompt, seed, drawn[key]))
            drawn[key] += 1
        yield from enumerate(responses)

    def find(self, prompt: RenderedPrompt, seed: int, occurrence: int) -> Response:
        """The stored response number ``occurrence`` of this prompt and seed; ValueError that says what differs."""
        stored = self.stored.get(replay_key(prompt, seed), [])
        if occurrence >= len(stored):
            ids = prompt_key(prompt)
            found = {key[-1]: len(self.stored[key]) for key in self.stored if key[:-1] == ids}
            raise ValueError(
                f"{self.folder}: no response number {occurrence + 1} to prompt {prompt.prompt.id!r} with seed {seed}; "
                f"stored for its token ids are {found or 'none'} (seed: responses)"
            )
        response = stored[occurrence]
        limit = self.config.max_new_tokens
        if len(response.token_ids) > limit:
            raise ValueError(
                f"{self.folder}: the response to prompt {prompt.prompt.id!r} has {len(response.token_ids)} tokens, "
                f"sampling.max_new_tokens is {limit}"
            )
        return response

    def close(self) -> None:
        """No file stays open."""


def sample_files_of(folder: Path) -> list[Path]:
    """The files of samples: those of epochs, and the held-out ones, which a run draws before its first epoch."""
    samples = folder / "samples" if (folder / "samples").is_dir() else folder
    epochs = sorted(samples.glob("epoch_*.jsonl"))
    held_out = held_out_path(samples.parent)
    return [*epochs, held_out] if epochs and held_out.is_file() else epochs


def prompt_key(prompt: RenderedPrompt) -> tuple[bytes, ...]:
    """What the models read before the response: the token ids of every view."""
    return (*(ids.tobytes() for ids in prompt.prefix_ids), prompt.prompt_ids.tobytes())


def replay_key(prompt: RenderedPrompt, seed: int) -> tuple:
    return (*prompt_key(prompt), seed)
