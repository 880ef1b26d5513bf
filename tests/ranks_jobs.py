"""Cutting a finished run back to where one of its checkpoints was written."""

from __future__ import annotations

import shutil
from pathlib import Path

from inverseq.checkpoint import checkpoint_epoch, list_checkpoints


def cut_back(run: Path, copy: Path, *, num_epochs: int) -> None:
    """Copy a run without the checkpoints behind epoch ``num_epochs``, as if it had been stopped there."""
    shutil.copytree(run, copy)
    checkpoints = list_checkpoints(copy)
    assert num_epochs in map(checkpoint_epoch, checkpoints), f"{run} has no checkpoint of epoch {num_epochs}"
    for checkpoint in checkpoints:
        if checkpoint_epoch(checkpoint) > num_epochs:
            shutil.rmtree(checkpoint)
