"""Files of answered prompts in the run directory, and their readers.

    RUN/samples/epoch_0001.jsonl   what an epoch sampled, with the regression target of every token
    RUN/held_out.jsonl             the same of the held-out prompts, answered once by the initial model
    RUN/eval/epoch_0000.jsonl      answers to the fixed test prompts; epoch 0 is the initial model

A row of the first two is a whole ``Sample`` with its targets: reading gives back what was written, bit for bit (a
float32 is written as the double of the same value; one that is not finite as the string "-inf", "inf" or "nan").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .atomic import read_jsonl, write_jsonl
from .records import Prompt, RenderedPrompt, Response, Sample, ScoredSamples

__all__ = [
    "eval_path",
    "held_out_path",
    "read_evaluation",
    "read_samples",
    "remove_evaluations_behind",
    "samples_path",
    "write_evaluation",
    "write_samples",
]

FINISH_REASONS = ("stop", "length")


def samples_path(run_dir: Path | str, epoch: int) -> Path:
    return Path(run_dir) / "samples" / f"epoch_{epoch:04d}.jsonl"


def eval_path(run_dir: Path | str, epoch: int) -> Path:
    return Path(run_dir) / "eval" / f"epoch_{epoch:04d}.jsonl"


def held_out_path(run_dir: Path | str) -> Path:
    return Path(run_dir) / "held_out.jsonl"


def write_samples(path: Path | str, scored: ScoredSamples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write samples in order, each with its part of ``ScoredSamples.values`` under the same names."""

    def rows() -> Iterator[dict[str, Any]]:
        for index, sample in enumerate(scored.samples):
            actions = slice(int(scored.offsets[index]), int(scored.offsets[index + 1]))
            row = _sample_row(sample, _text(tokenizer, sample.response))
            yield row | {name: _floats_out(values[actions]) for name, values in scored.values.items()}

    write_jsonl(path, rows())


def read_samples(path: Path | str, prompts: Sequence[RenderedPrompt] | None = None) -> ScoredSamples:
    """Samples with their targets, as ``write_samples`` got them; with ``prompts``, checked to answer exactly those.

    Raises ValueError naming file and line of a row that is not a sample, or that answers another prompt.
    """
    samples, columns = [], {"targets": [], "plain_logprobs": []}
    for number, content in read_jsonl(path):
        row = _Row(path, number, content)
        sample = _sample_in(row)
        if prompts is not None and number <= len(prompts):
            row.require_prompt(sample.rendered, prompts[number - 1])
        if "initial_logprobs" in content and not samples:
            columns["initial_logprobs"] = []
        samples.append(sample)
        for name, values in columns.items():
            values.append(row.floats(name, sample.num_actions))
    if not samples:
        raise ValueError(f"{path}: no samples in this file")
    if prompts is not None and len(samples) != len(prompts):
        raise ValueError(f"{path}: {len(samples)} samples; expected {len(prompts)}, one per prompt")
    offsets = np.cumsum([0, *(sample.num_actions for sample in samples)], dtype=np.int64)
    return ScoredSamples(samples, offsets=offsets, **{name: torch.cat(values) for name, values in columns.items()})


def write_evaluation(
    path: Path | str, samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, *, model: str
) -> None:
    """Write one row {id, messages, response, model, finish_reason, category?} per answered test prompt."""

    def rows() -> Iterator[dict[str, Any]]:
        for sample in samples:
            prompt = sample.rendered.prompt
            row = {
                "id": prompt.id,
                "messages": list(prompt.messages),
                "response": _text(tokenizer, sample.response),
                "model": model,
                "finish_reason": sample.response.finish_reason,
            }
            yield row if prompt.category is None else {**row, "category": prompt.category}

    write_jsonl(path, rows())


def read_evaluation(path: Path | str) -> list[dict[str, Any]]:
    """The rows of an evaluation file, checked. ValueError names file and line of one that lacks a field."""
    rows = []
    for number, content in read_jsonl(path):
        row = _Row(path, number, content)
        row.messages("messages")
        for key in ("id", "response", "model", "finish_reason"):
            row.field(key, str)
        rows.append(content)
    return rows


def remove_evaluations_behind(run_dir: Path | str, epoch: int) -> None:
    """Remove the answers of later epochs, from which a run was taken back: it will reach them with other weights."""
    for path in eval_path(run_dir, epoch).parent.glob("epoch_*.jsonl"):
        number = path.stem.removeprefix("epoch_")
        if number.isdecimal() and int(number) > epoch:
            path.unlink()


def _text(tokenizer: PreTrainedTokenizerBase, response: Response) -> str:
    return tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)


def _sample_row(sample: Sample, text: str) -> dict[str, Any]:
    rendered, response = sample.rendered, sample.response
    return {
        "prompt_id": rendered.prompt.id,
        "category": rendered.prompt.category,
        "messages": list(rendered.prompt.messages),
        "prefix_ids": [ids.tolist() for ids in rendered.prefix_ids],
        "prompt_ids": rendered.prompt_ids.tolist(),
        "response_ids": response.token_ids.tolist(),
        "response": text,
        "finish_reason": response.finish_reason,
        "seed": int(response.seed),
        "engine": response.engine,
        "engine_version": response.engine_version,
        "weights_step": int(response.weights_step),
    }


def _sample_in(row: _Row) -> Sample:
    category = row.content.get("category")
    prompt = Prompt(
        id=row.field("prompt_id", str),
        messages=tuple(row.messages("messages")),
        category=None if category is None else row.field("category", str),
    )
    prefixes = row.field("prefix_ids", list)
    row.require(len(prefixes) > 0, "prefix_ids", prefixes, "a list of token ids per view")
    rendered = RenderedPrompt(
        prompt=prompt,
        prefix_ids=tuple(row.token_ids("prefix_ids", ids) for ids in prefixes),
        prompt_ids=row.token_ids("prompt_ids", row.field("prompt_ids", list)),
    )
    finish_reason = row.field("finish_reason", str)
    row.require(finish_reason in FINISH_REASONS, "finish_reason", finish_reason, "one of " + ", ".join(FINISH_REASONS))
    response = Response(
        token_ids=row.token_ids("response_ids", row.field("response_ids", list)),
        finish_reason=finish_reason,
        seed=row.field("seed", int),
        engine=row.field("engine", str),
        engine_version=row.field("engine_version", str),
        weights_step=row.field("weights_step", int),
    )
    return Sample(rendered, response)


def _floats_out(values: Tensor) -> list[float | str]:
    """float32 values as doubles of the same value; not finite ones as text, because JSON has no word for them."""
    return [value if math.isfinite(value) else str(value) for value in values.tolist()]


class _Row:
    """One row of a file under reading; its errors name file, line, field and value."""

    def __init__(self, path: Path | str, number: int, content: dict[str, Any]):
        self.where = f"{path}, line {number}"
        self.content = content

    def require(self, condition: bool, key: str, value: Any, expectation: str) -> None:
        if not condition:
            shown = repr(value)
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise ValueError(f"{self.where}: {key}={shown}: expected {expectation}")

    def field(self, key: str, kind: type) -> Any:
        if key not in self.content:
            raise ValueError(f"{self.where}: no field {key!r}")
        value = self.content[key]
        self.require(isinstance(value, kind) and not isinstance(value, bool), key, value, f"a {kind.__name__}")
        return value

    def require_prompt(self, rendered: RenderedPrompt, expected: RenderedPrompt) -> None:
        """Raise ValueError unless the row's prompt is the expected one, in every view."""
        same = rendered.prompt.id == expected.prompt.id and len(rendered.prefix_ids) == len(expected.prefix_ids)
        ours = (*rendered.prefix_ids, rendered.prompt_ids)
        theirs = (*expected.prefix_ids, expected.prompt_ids)
        if not (same and all(map(np.array_equal, ours, theirs))):
            raise ValueError(f"{self.where}: answers prompt {rendered.prompt.id!r}, expected {expected.prompt.id!r}")

    def messages(self, key: str) -> list[dict[str, str]]:
        messages = self.field(key, list)
        for message in messages:
            well_formed = isinstance(message, dict) and {type(message.get(k)) for k in ("role", "content")} == {str}
            self.require(well_formed, key, message, "messages with the texts role and content")
        return messages

    def token_ids(self, key: str, values: Any) -> np.ndarray:
        """A list of token ids as [n] int32."""
        well_formed = isinstance(values, list) and all(type(value) is int and 0 <= value < 2**31 for value in values)
        self.require(well_formed, key, values, "a list of token ids")
        return np.array(values, dtype=np.int32)

    def floats(self, key: str, count: int) -> Tensor:
        """A list of ``count`` numbers as [count] fp32."""
        values = self.field(key, list)
        self.require(len(values) == count, key, values, f"{count} numbers, one per response token")
        well_formed = all(type(value) in (float, int) or value in ("-inf", "inf", "nan") for value in values)
        self.require(well_formed, key, values, "numbers")
        return torch.tensor([float(value) for value in values], dtype=torch.float64).float()
