"""``inverseq-eval generate``: a model's answers to a test set, or those of the model reading the principle.

Answers come from any sampling backend, untempered as in training. Prompts are answered in chunks; each finished chunk
is one line of a hidden file beside the output, so that a killed command goes on behind the last one and ends with the
answers it would have given. Beside F.jsonl stands F.settings.json, which says what made it: the same command again does
nothing, another one refuses to overwrite it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file, json_line, remove_directory, write_json, write_jsonl
from .command import Outcome
from .readers import Question, read_questions, turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..chat import ChatRenderer
    from ..config import Config
    from ..records import Prompt, RenderedPrompt, Sample
    from ..sampling import Sampler

__all__ = ["add_parser", "generate", "run"]

logger = logging.getLogger(__name__)

DEFAULTS = Path(__file__).parent / "generate.yaml"
CHUNK_BATCHES = 2  # batches of a chunk: fewer lose time at each chunk's end, more lose work when interrupted
GENERATE_PURPOSE = 7


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate",
        help="answers of a model to a test set",
        description="Write a model's answers to a test set; the same command goes on where an interrupted one stopped.",
        epilog="Options of sampling are section.key=value words, for example sampling.max_new_tokens=512; "
        "`inverseq-train --help` lists them.",
    )
    parser.add_argument("--model", required=True, help="a folder, a hub id, or smollm2-135m-instruct")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="SOURCE",
        help="BeaverTails-Evaluation, MT-bench, XSTest, HH or plain jsonl, another model's answers, hf:NAME, bundled",
    )
    parser.add_argument("--out", required=True, metavar="F.jsonl", help="where the answers go")
    parser.add_argument("--name", help="the model's name in rows and plots (its folder's name)")
    parser.add_argument(
        "--principle", metavar="NAME_OR_FILE", help="let the model read a principle: the prompting baseline"
    )
    parser.add_argument("--limit", type=int, default=0, help="answer a fixed random so many of the prompts")
    parser.add_argument(
        "--config", metavar="FILE", help="take sampling, chat template and system text from RUN/config.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Answer the prompts of the command line; ValueError for bad input, before any weights are loaded."""
    from ..config_loading import load_config

    out = Path(args.out).expanduser()
    if out.suffix != ".jsonl":
        raise ValueError(f"--out {args.out}: expected a name that ends with .jsonl")
    if args.limit < 0:
        raise ValueError(f"--limit {args.limit}: expected 0 (all) or more")
    overrides = [f"model.path={args.model}", f"run_dir={out.parent}", *args.overrides]
    if args.principle:
        overrides += ["contrast.kind=principle", "contrast.plain_model=", f"contrast.principle={args.principle}"]
    config = load_config(args.config or DEFAULTS, overrides)
    questions, report = read_questions(args.prompts)
    logger.info("%s", report)
    questions = some_of(questions, args.limit)
    name = args.name or default_name(args.model) + (" + principle" if args.principle else "")
    data = generate(config, questions, out, name=name, with_principle=bool(args.principle))
    text = f"{out}: {data['num_responses']} answers of {name}, {data['num_truncated']} of them cut at the limit"
    if data["num_too_long"]:
        text += f"; {data['num_too_long']} prompts left out, longer than prompts.max_prompt_tokens"
    if data["num_empty"]:
        text += f"; {data['num_empty']} answers are empty"
    return Outcome(data, text)


def some_of(questions: list[Question], limit: int) -> list[Question]:
    """All questions, or ``limit`` of them in their order, the same for every model: they depend on the ids alone."""
    if not 0 < limit < len(questions):
        return questions
    chosen = sorted(questions, key=lambda question: hashlib.sha256(question.prompt.id.encode()).digest())[:limit]
    kept = {question.prompt.id for question in chosen}
    return [question for question in questions if question.prompt.id in kept]


def default_name(model: str) -> str:
    """The last part of a model's path; of RUN/export the last two, which tell runs apart."""
    parts = Path(model).expanduser().parts or (model,)
    return "/".join(parts[-2:] if parts[-1] == "export" else parts[-1:])


def generate(
    config: Config, questions: Sequence[Question], out: Path, *, name: str, with_principle: bool = False
) -> dict[str, Any]:
    """Write rows {id, messages, response, model, finish_reason, category?} to ``out``; returns their counts.

    Questions with follow-ups are asked them behind the model's own answers, a row each. Raises ValueError for input
    that training would refuse too, and when ``out`` holds answers made with other settings.
    """
    from ..chat import ChatRenderer, load_chat_template, load_principle
    from ..resolve import check_environment, count_valid_vocab, load_model_config, load_tokenizer, resolve_model_path

    check_environment(config)
    path = resolve_model_path("model.path", config.model.path)
    model_config = load_model_config("model.path", path, config.model)
    tokenizer = load_tokenizer("model.path", path, config.model)
    num_valid_vocab = count_valid_vocab(tokenizer, model_config, path)
    renderer = ChatRenderer(
        tokenizer,
        principle_text=load_principle(config.contrast.principle) if with_principle else None,
        plain_system=config.contrast.plain_system,
        chat_template=load_chat_template(config.model.chat_template),
    )
    settings = settings_of(config, path, questions, renderer, name)
    longest = longest_prompt(config, model_config)
    finished = finished_counts(out, settings)
    if finished is not None:
        logger.info("%s is finished already", out)
        return finished
    work = Work(renderer, longest, config.sampling.batch_size * CHUNK_BATCHES, config.seed)
    asked = work.fitting([(question, question.prompt) for question in questions])
    if not asked:
        raise ValueError(f"no prompt has at most {longest} tokens (prompts.max_prompt_tokens, or what the model reads)")
    partial = Partial(out, settings)
    with sampler_of(config, path, tokenizer, num_valid_vocab, asked[0][1], out) as sampler:
        rows = [row for chunk in work.answer(asked, sampler, partial) for row in chunk]
    return finish(out, settings, [{**row, "model": name} for row in rows], work.num_too_long)


def longest_prompt(config: Config, model_config) -> int:
    """Tokens of the longest prompt that is answered: the last token of a response is only predicted, never read."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return config.prompts.max_prompt_tokens
    longest = min(config.prompts.max_prompt_tokens, positions + 1 - config.sampling.max_new_tokens)
    if longest < 1:
        raise ValueError(
            f"sampling.max_new_tokens={config.sampling.max_new_tokens}: the model has {positions} positions in all"
        )
    return longest


def settings_of(
    config: Config, path: str, questions: Sequence[Question], renderer: ChatRenderer, name: str
) -> dict[str, Any]:
    """Everything that the answers depend on, as plain JSON."""
    asked = [[q.prompt.id, list(q.prompt.messages), q.prompt.category, list(q.follow_ups)] for q in questions]
    return {
        "name": name,
        "model": path,
        "model_files": model_files(path),
        "dtype": config.model.dtype,
        "device": config.model.device,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "principle": renderer.principle_text,
        "plain_system": config.contrast.plain_system,
        "chat_template": config.model.chat_template,
        "max_prompt_tokens": config.prompts.max_prompt_tokens,
        "sampling": dataclasses.asdict(config.sampling),
        "seed": config.seed,
    }


def model_files(path: str) -> dict[str, list[int]]:
    """Size and time of the weight files of a folder: other weights under the same name are another model."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def settings_path(out: Path) -> Path:
    return out.with_suffix(".settings.json")


def finished_counts(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The counts of a finished file made with these settings; None without one, ValueError for one made otherwise."""
    if not out.exists():
        return None
    try:
        written = json.loads(settings_path(out).read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{out}: exists, and {settings_path(out).name} beside it does not say what made it") from None
    check_same_settings(out, settings, written["settings"])
    return written["counts"]


def check_same_settings(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {_short(theirs.get(key))} there, {_short(ours[key])} here" for key in differing[:3])
        raise ValueError(f"{path}: was made with other settings ({shown}); remove it or choose another --out")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def sampler_of(
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    num_valid_vocab: int,
    probe: RenderedPrompt,
    out: Path,
) -> Iterator[Sampler]:
    """The configured backend, checked to answer with the model's weights; closed, and what it was given removed."""
    from transformers.utils.logging import disable_progress_bar

    from ..freshness import Freshness
    from ..model import load_model
    from ..sampling import make_sampler
    from ..sampling_transformers import stop_token_ids

    disable_progress_bar()
    model = load_model(path, config.model)
    weights_dir = out.with_name(f".{out.name}.weights")  # for an engine in another process
    sampler = make_sampler(config.sampling, model, tokenizer, num_valid_vocab=num_valid_vocab, weights_dir=weights_dir)
    freshness = Freshness(
        probe,
        tokenizer,
        stop_ids=stop_token_ids(model, tokenizer),
        num_valid_vocab=num_valid_vocab,
        max_gap=config.sampling.max_logprob_gap,
    )
    try:
        freshness.sync(sampler, model, 0)
        yield sampler
    finally:
        sampler.close()
        remove_directory(weights_dir)


class Partial:
    """The finished chunks of an unfinished output: a header with the settings, then one line of rows a chunk."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.path = out.with_name(f".{out.name}.partial")
        self.chunks: list[list[dict[str, Any]]] = []
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # a line cut short is dropped
        if lines:
            check_same_settings(self.path, settings, json.loads(lines[0]))
            self.chunks = [json.loads(line)["rows"] for line in lines[1:]]
            logger.info("going on behind %d answers of %s", sum(map(len, self.chunks)), self.path)
        with atomic_file(self.path) as file:
            file.write(b"".join(line + b"\n" for line in lines) or json_line(settings))

    def append(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path, "ab") as file:
            file.write(json_line({"rows": rows}))
            file.flush()
            os.fsync(file.fileno())


@dataclasses.dataclass
class Work:
    """Answers questions chunk by chunk, turn by turn."""

    renderer: ChatRenderer
    max_prompt_tokens: int
    chunk_size: int
    seed: int
    num_too_long: int = 0

    def fitting(self, asked: Sequence[tuple[Question, Prompt]]) -> list[tuple[Question, RenderedPrompt]]:
        """The prompts that are short enough, rendered; the others are counted."""
        rendered = self.renderer.render_all([prompt for _, prompt in asked])
        pairs = [(question, only_read(item)) for (question, _), item in zip(asked, rendered, strict=True)]
        kept = [(question, item) for question, item in pairs if len(item.policy_ids) <= self.max_prompt_tokens]
        self.num_too_long += len(pairs) - len(kept)
        return kept

    def answer(
        self, asked: list[tuple[Question, RenderedPrompt]], sampler: Sampler, partial: Partial
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of each chunk: those that ``partial`` holds, then new ones, which it gets."""
        stored = iter(partial.chunks)
        turn = 1
        while asked:
            answered: list[dict[str, Any]] = []
            for start in range(0, len(asked), self.chunk_size):
                rows = next(stored, None)
                if rows is None:
                    items = [item for _, item in asked[start : start + self.chunk_size]]
                    rows = self.sample(sampler, items, turn, start)
                    partial.append(rows)
                answered += rows
                yield rows
            further = [
                (question, next_prompt(question, row, turn))
                for (question, _), row in zip(asked, answered, strict=True)
                if len(question.follow_ups) >= turn
            ]
            asked = self.fitting(further)
            turn += 1

    def sample(self, sampler: Sampler, items: Sequence[RenderedPrompt], turn: int, start: int) -> list[dict[str, Any]]:
        import numpy as np

        from ..sampling import sample_responses

        entropy = np.random.SeedSequence([self.seed, GENERATE_PURPOSE, turn, start])
        seed = int(entropy.generate_state(1, np.uint32)[0] >> 1)
        return [self.row(sample) for sample in sample_responses(sampler, items, seed=seed)]

    def row(self, sample: Sample) -> dict[str, Any]:
        prompt = sample.rendered.prompt
        text = self.renderer.tokenizer.decode(sample.response.token_ids.tolist(), skip_special_tokens=True)
        row = {"id": prompt.id, "messages": list(prompt.messages), "response": text}
        row |= {"model": "", "finish_reason": sample.response.finish_reason}
        return row if prompt.category is None else {**row, "category": prompt.category}


def only_read(item: RenderedPrompt) -> RenderedPrompt:
    """The prompt with the view that is read alone: the one with the principle when there is one (better, plain).

    Samplers take the last view, which it then is.
    """
    return dataclasses.replace(item, prefix_ids=item.prefix_ids[:1])


def next_prompt(question: Question, row: dict[str, Any], turn: int) -> Prompt:
    """The conversation behind an answer: the answer, and what the user says next."""
    said = (
        {"role": "assistant", "content": row["response"]},
        {"role": "user", "content": question.follow_ups[turn - 1]},
    )
    identity = turn_id(question.prompt.id, turn + 1)
    return dataclasses.replace(question.prompt, id=identity, messages=(*row["messages"], *said))


def finish(out: Path, settings: dict[str, Any], rows: list[dict[str, Any]], num_too_long: int) -> dict[str, Any]:
    """Write the output and its settings, and remove the hidden file."""
    counts = {
        "num_responses": len(rows),
        "num_truncated": sum(row["finish_reason"] == "length" for row in rows),
        "num_empty": sum(not row["response"].strip() for row in rows),
        "num_too_long": num_too_long,
        "mean_characters": sum(len(row["response"]) for row in rows) / len(rows),
    }
    write_json(settings_path(out), {"settings": settings, "counts": counts})
    write_jsonl(out, rows)
    out.with_name(f".{out.name}.partial").unlink(missing_ok=True)
    return counts
