"""``inverseq-eval``: one subcommand a module, each with ``--json``.

An error is one line and exit status 2 (bad input) or 1 (anything else); INVERSEQ_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..cli import show_log_lines, status_of, stopping_cleanly
from .command import Outcome

__all__ = ["main"]

PROGRAM = "inverseq-eval"
# Modules with add_parser(subparsers) and run(args), in the order of a user's work.
MODULES = ("generate", "judge", "tournament", "elo", "categories", "rewards", "sweep")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose options are written out."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = make_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    show_log_lines()
    try:
        with stopping_cleanly():
            outcome = arguments.run(arguments)
    except KeyboardInterrupt as error:
        return fail(status_of(error), "interrupted; what was done is kept, the same command goes on from there")
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("INVERSEQ_DEBUG") == "1":
            raise
        return fail(2 if isinstance(error, ValueError) else 1, f"error: {error}")
    return show(outcome, as_json=arguments.json)


def show(outcome: Outcome, *, as_json: bool) -> int:
    """Print an outcome to stdout, to stderr the names of the files it wrote and what is missing."""
    print(json.dumps(outcome.data, allow_nan=False) if as_json else outcome.text)
    for path in outcome.files:
        print(f"wrote {path}", file=sys.stderr)
    return fail(1, f"error: {outcome.problem}") if outcome.problem else 0


def fail(status: int, message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Evaluate chat models: responses, a judge's verdicts, ratings, rewards and token credit.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in MODULES:
        module = importlib.import_module(f".{name}", __package__)
        subparser = module.add_parser(subparsers)
        subparser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
