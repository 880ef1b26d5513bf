"""``python -m tests.faulty_cli …`` is ``python -m inverseq.cli …`` with accidents.

The variable FAULTS holds JSON rows ``[rank, function, number, deed]``: just before call ``number`` of
``module:Owner.function`` in the process of that rank, the deed is done: SIGKILL, or an error with the deed as its
text. Each happens once, whatever the attempt; the folder FAULTS_DONE remembers which did.
"""

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path


def plant(function: str, number: int, deed: str, done: Path) -> None:
    """Let the deed be done before a call of a function of the program."""
    module, _, name = function.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not done.exists():
            done.touch()
            if deed == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(deed)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    for index, (rank, function, number, deed) in enumerate(json.loads(os.environ["FAULTS"])):
        if rank == int(os.environ["RANK"]):
            plant(function, number, deed, Path(os.environ["FAULTS_DONE"]) / str(index))
    from inverseq.cli import main

    sys.exit(main())
