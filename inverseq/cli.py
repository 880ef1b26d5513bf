"""The command ``inverseq-train``: read the configuration, then train or only check and plan (``--dry-run``).

Bad input ends with one line on stderr and exit status 2, a run that stopped with 1 and its last checkpoint intact, an
interrupt with 130 and the command that continues the run. ``INVERSEQ_DEBUG=1`` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .config import Config, iter_options
from .config_loading import load_config, recipe_names

__all__ = ["main"]

PROGRAM = "inverseq-train"
HELP_WIDTH = 100


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{PROGRAM}: error: {message} (see {PROGRAM} --help)\n")


class StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, so that log lines go above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_intermixed_args(words)
    show_log_lines()
    config = None
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from .dry_run import dry_run

            print(dry_run(config, resume=arguments.resume))
        else:
            from transformers.utils.logging import disable_progress_bar

            from .trainer import train

            disable_progress_bar()  # a bar for the shards of a model file; the trainer has bars of its own
            train(config, resume=arguments.resume)
        return 0
    except KeyboardInterrupt:
        return fail(130, describe_interrupt(config, words))
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("INVERSEQ_DEBUG") == "1":
            raise
        return fail(2 if isinstance(error, ValueError) else 1, f"error: {error}")


def fail(status: int, message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe_interrupt(config: Config | None, words: Sequence[str]) -> str:
    if config is None or "--dry-run" in words or not (Path(config.run_dir).expanduser() / "config.yaml").exists():
        return "interrupted before the run began"
    words = [*words] if "--resume" in words else [*words, "--resume"]
    return f"interrupted; continue with: {PROGRAM} {shlex.join(words)}"


def show_log_lines() -> None:
    """Send this package's log lines to stderr, once however often ``main`` is called."""
    logger = logging.getLogger("inverseq")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --config RECIPE_OR_FILE [--resume] [--dry-run] [section.key=value ...]",
        description="Train a chat model with Inverse-Q*: no preference pairs, no reward model, no value model.",
        epilog=describe_options(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=HELP_WIDTH),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE_OR_FILE",
        help=f"a YAML file, or a recipe: {', '.join(recipe_names())}",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in run_dir behind its newest complete checkpoint"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve and check everything, print prompts, memory and the packs of an epoch, and start nothing",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options on top of the file, for example optim.lr=1e-6",
    )
    return parser


def describe_options() -> str:
    """Every option of the configuration with its default and help text, section by section."""
    lines = ["options of the configuration, with their defaults (recipes set values of their own):"]
    section = None
    for key, _, default, help_text in iter_options():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        left = f"  {key}={format_default(default)}"
        wrapped = textwrap.wrap(help_text, HELP_WIDTH - 42)
        lines.append(f"{left:<41} {wrapped[0]}" if len(left) < 41 else f"{left}\n{'':41} {wrapped[0]}")
        lines += [f"{'':41} {line}" for line in wrapped[1:]]
    lines += ["", "A value may refer to others: run_dir='runs/alpha-${contrast.alpha}'."]
    lines += ["With INVERSEQ_DEBUG=1 in the environment an error shows its traceback."]
    return "\n".join(lines)


def format_default(value) -> str:
    """A default as one would write it on the command line."""
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
