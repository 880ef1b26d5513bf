"""The command ``inverseq-credit``: what every token of a response gains, in colour, as HTML and as numbers.

inverseq-credit RUN [--epoch N] [--index I …]                          responses that a run sampled; loads no model
inverseq-credit --model M --prompt TEXT --response TEXT                a principle against none
inverseq-credit --model M --plain-model L --responses FILE --index I   two models, rows of ``inverseq-eval generate``
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ..atomic import atomic_file
from ..config import Config, ContrastConfig, ModelConfig
from ..config_loading import load_config
from ..resolve import load_tokenizer, resolve_model_path
from ..sample_files import read_evaluation, read_samples, samples_path
from .credit import TokenCredit, credit_of, score_texts
from .heatmap import credit_html, credit_rows, credit_text, messages_html, strongest_spans, value_figure
from .page import document, escape, visible

__all__ = ["main"]

PROGRAM = "inverseq-credit"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for bad input, with one line on stderr."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    try:
        credits = credits_of_run(arguments) if arguments.run else credits_of_texts(arguments)
        if arguments.html:
            write_page(Path(arguments.html), credits)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([as_json(credit) for credit in credits], ensure_ascii=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 118)
    for credit in credits:
        show(console, credit)
    if arguments.html:
        print(f"wrote {arguments.html} and {csv_path(Path(arguments.html))}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Token credit β (log π̂(y_t) − log π_l(y_t)) of responses, and its running sum, the value.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory; its samples hold their credit")
    parser.add_argument("--epoch", type=int, help="epoch of RUN; its newest one unless given")
    parser.add_argument(
        "--index", type=int, action="append", help="which response, from 0; may be repeated (default: the first)"
    )
    parser.add_argument("--model", help="better model, and with --principle the plain one too")
    parser.add_argument("--plain-model", default="", help="π_l; without it the model reads a principle against none")
    parser.add_argument(
        "--principle", help="what π_w reads: a shipped name or a file (default: default, with one model)"
    )
    parser.add_argument("--alpha", type=float, default=1.4, help="α of the superior policy (default: 1.4)")
    parser.add_argument("--beta", type=float, default=1.0, help="factor of the credit (default: 1)")
    parser.add_argument("--prompt", help="a user's message")
    parser.add_argument("--response", help="the answer to it")
    parser.add_argument("--responses", metavar="FILE", help="rows {id, messages, response} instead of the two")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page, and a CSV beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of colours")
    return parser


def credits_of_run(arguments: argparse.Namespace) -> list[TokenCredit]:
    """The chosen responses of one epoch of a run."""
    for name in ("model", "prompt", "response", "responses"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: expected nothing beside a run directory")
    run_dir = Path(arguments.run)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: holds no run (no config.yaml)")
    path = newest_samples(run_dir) if arguments.epoch is None else samples_path(run_dir, arguments.epoch)
    if not path.is_file():
        raise ValueError(f"--epoch {arguments.epoch}: {path} does not exist")
    tokenizer = tokenizer_of_run(load_config(run_dir / "config.yaml"), run_dir)
    scored = read_samples(path)
    chosen = check_indices(arguments.index, len(scored.samples), str(path))
    return [credit_of(scored, index, tokenizer, beta=arguments.beta) for index in chosen]


def newest_samples(run_dir: Path) -> Path:
    """The samples of the newest epoch that has any."""
    files = sorted((run_dir / "samples").glob("epoch_*.jsonl"))
    if not files:
        raise ValueError(f"{run_dir}: holds no samples yet")
    return files[-1]


def tokenizer_of_run(config: Config, run_dir: Path):
    """The tokenizer of a run: its exported one when the model it began with is gone."""
    export = run_dir / "export"
    if (export / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(export)
    return load_tokenizer("model.path", resolve_model_path("model.path", config.model.path), config.model)


def check_indices(indices: Sequence[int] | None, count: int, where: str) -> list[int]:
    chosen = list(indices or [0])
    for index in chosen:
        if not 0 <= index < count:
            raise ValueError(f"--index {index}: expected 0 … {count - 1}; {where} holds {count} responses")
    return chosen


def credits_of_texts(arguments: argparse.Namespace) -> list[TokenCredit]:
    """Given responses, scored by the given models."""
    if not arguments.model:
        raise ValueError("expected a run directory, or --model with --prompt and --response, or with --responses")
    if arguments.epoch is not None:
        raise ValueError("--epoch: expected only beside a run directory")
    if arguments.responses:
        if arguments.prompt is not None or arguments.response is not None:
            raise ValueError("--responses: expected nothing in --prompt and --response")
        rows = read_evaluation(arguments.responses)
        rows = [rows[index] for index in check_indices(arguments.index, len(rows), arguments.responses)]
        conversations = [(row["messages"], row["response"]) for row in rows]
    elif arguments.prompt and arguments.response:
        conversations = [([{"role": "user", "content": arguments.prompt}], arguments.response)]
    else:
        raise ValueError("expected texts in --prompt and --response, or a file in --responses")
    kind = "model" if arguments.plain_model else "principle"
    principle = arguments.principle if arguments.principle is not None else ("" if arguments.plain_model else "default")
    config = Config(
        model=ModelConfig(path=arguments.model),
        contrast=ContrastConfig(
            kind=kind, alpha=arguments.alpha, principle=principle, plain_model=arguments.plain_model
        ),
        run_dir="-",
    )
    models, scored = score_texts(config, conversations)
    return [credit_of(scored, i, models.tokenizer, beta=arguments.beta) for i in range(len(conversations))]


def show(console: Console, credit: TokenCredit) -> None:
    """One response on the terminal: prompt, coloured answer, and its strongest tokens."""
    console.rule(Text(visible(credit.prompt_id)))  # Text: what a model or a file wrote is no markup
    last = visible(credit.messages[-1]["content"]) if credit.messages else ""
    console.print(f"{last[:2000]}\n", style="dim", markup=False, highlight=False)
    console.print(credit_text(credit))
    strongest = Table("position", "token", "credit", "value", box=SIMPLE_HEAD)
    for column in (strongest.columns[0], *strongest.columns[2:]):
        column.justify = "right"
    values = credit.value
    for span, one in strongest_spans(credit, 10):
        strongest.add_row(str(span.start), Text(repr(span.text)), f"{one:+.3f}", f"{values[span.stop - 1]:+.3f}")
    console.print(strongest)
    count = len(credit.credit)
    console.print(
        f"{count} tokens, {credit.total:+.3f} nats in all, {credit.total / max(count, 1):+.4f} a token\n",
        highlight=False,
    )


def as_json(credit: TokenCredit) -> dict[str, Any]:
    rows = list(credit_rows(credit))
    return {
        "id": credit.prompt_id,
        "finish_reason": credit.finish_reason,
        "total": credit.total,
        "tokens": [row[1] for row in rows],
        "credit": [row[2] for row in rows],
        "value": [row[3] for row in rows],
    }


def csv_path(page: Path) -> Path:
    return page.with_suffix(".csv")


def write_page(path: Path, credits: Sequence[TokenCredit]) -> None:
    """The page, and the numbers of all its tokens as CSV beside it."""
    sections = ['<p class="note">Blue: the superior policy likes the token better than the plain one; red: less.</p>']
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("id", "position", "text", "credit", "value"))
    for credit in credits:
        sections += [
            f"<h2>{escape(credit.prompt_id)}: {credit.total:+.3f} nats over {len(credit.credit):,} tokens</h2>",
            messages_html(credit.messages),
            '<div class="role">assistant</div>',
            credit_html(credit),
            value_figure(credit),
        ]
        writer.writerows((credit.prompt_id, *row) for row in credit_rows(credit))
    with atomic_file(path) as file:
        file.write(document("Token credit", sections).encode())
    with atomic_file(csv_path(path)) as file:
        file.write(buffer.getvalue().encode("utf-8", "replace"))


if __name__ == "__main__":
    sys.exit(main())
