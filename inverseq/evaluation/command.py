"""What a subcommand of ``inverseq-eval`` is.

A module with a subcommand has two functions: ``add_parser(subparsers)`` returns the ``argparse`` parser that it adds,
and ``run(args)`` does the work and returns an ``Outcome``. ``cli.py`` lists the modules and adds ``--json``. Modules
import torch, matplotlib, openai and scipy inside functions, so that ``--help`` and errors are quick.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["EvaluationError", "Outcome", "require_package", "write_outcome"]


class EvaluationError(RuntimeError):
    """Something outside of the user's input went wrong; what was done so far is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a subcommand found: ``data`` for ``--json`` (plain JSON, no NaN) and ``text`` for people."""

    data: dict[str, Any]
    text: str
    files: list[Path] = field(default_factory=list)  # written, named on stderr
    problem: str = ""  # what is missing though the rest is kept; makes the exit status 1


def require_package(name: str, extra: str = "eval") -> ModuleType:
    """The imported package; ValueError naming the extra that brings it when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ValueError(
            f"the package {error.name} is not installed: pip install 'inverseq[{extra}]' brings it"
        ) from None


def write_outcome(path: Path, data: dict[str, Any]) -> Path:
    """Write an outcome's data as one JSON document; returns the path."""
    from ..atomic import write_json

    write_json(path, data)
    return path
