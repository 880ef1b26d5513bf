"""Checkpoints: everything a run needs to go on bit for bit after an epoch.

    RUN/checkpoints/epoch_0001/model.safetensors   weights and buffers; tied ones once
                               engine.pt           optimizer, scheduler, master weights  } loaded with
                               rng.pt              torch (CPU, CUDA), Python, NumPy      } weights_only=True
                               state.json          epoch, progress, versions, size and crc32 of every file

A checkpoint is written into a hidden folder, synced and renamed, so that ``epoch_NNNN`` is complete or absent; older
ones go only after the new one stands. What many processes write together is in ``checkpoint_sharded``.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import re
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .atomic import atomic_directory, naming_file, remove_directory
from .checkpoint_files import (
    describe_file,
    file_crc32,
    named_tensors,
    read_tensors,
    restore_rng,
    rng_state,
    write_state,
    write_tensors,
)
from .distributed import Ranks

__all__ = [
    "check_checkpoint",
    "check_or_offer_older",
    "check_progress",
    "checkpoint_epoch",
    "checkpoint_path",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "remove_half_written",
    "remove_old",
    "save_checkpoint",
    "write_content",
]

log = logging.getLogger(__name__)

FORMAT = 1
MODEL_FILE, ENGINE_FILE, RNG_FILE, STATE_FILE = "model.safetensors", "engine.pt", "rng.pt", "state.json"


def checkpoint_epoch(path: Path | str) -> int:
    """The epoch a checkpoint folder is named after; ValueError for another name."""
    match = re.fullmatch(r"epoch_(\d{4,})", Path(path).name)
    if match is None:
        raise ValueError(f"{path}: not a checkpoint folder; expected a name like epoch_0001")
    return int(match[1])


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """Checkpoint folders of a run, oldest first; folders without ``state.json`` (half-written) are left out."""
    folders = (Path(run_dir) / "checkpoints").glob("epoch_*")
    found = [folder for folder in folders if re.fullmatch(r"epoch_\d{4,}", folder.name)]
    for folder in found:
        if not (folder / STATE_FILE).is_file():
            log.warning("%s: half-written (no %s), ignored", folder, STATE_FILE)
    return sorted((folder for folder in found if (folder / STATE_FILE).is_file()), key=checkpoint_epoch)


def latest_checkpoint(run_dir: Path | str) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    return next(reversed(list_checkpoints(run_dir)), None)


def save_checkpoint(
    run_dir: Path | str,
    epoch: int,
    *,
    model: nn.Module,
    engine_state: dict[str, Any],
    progress: dict[str, Any],
    keep_last: int,
    before_rename: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``RUN/checkpoints/epoch_NNNN`` and return it; the newest ``keep_last`` stay.

    ``before_rename`` is called when all is on the disk and nothing counts yet. ``engine_state`` holds tensors and plain
    Python values; ``progress`` (prompt cursor, optimizer step) plain JSON values. Checkpoints of later epochs, from
    which the run was taken back, are removed too.
    Raises OSError naming the file when it cannot be written; the older checkpoints then stand as they were.
    """
    check_progress(progress)
    path = checkpoint_path(run_dir, epoch)
    remove_half_written(path.parent)
    with atomic_directory(path, before_rename=before_rename) as folder:
        write_tensors(folder, path, MODEL_FILE, named_tensors(model))
        write_state(folder, path, ENGINE_FILE, engine_state)
        write_state(folder, path, RNG_FILE, rng_state())
        files = {name: describe_file(folder / name) for name in (MODEL_FILE, ENGINE_FILE, RNG_FILE)}
        write_content(folder, path, {"epoch": epoch, "progress": progress, "files": files})
    remove_old(run_dir, epoch, keep_last)
    return path


def checkpoint_path(run_dir: Path | str, epoch: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"epoch_{epoch:04d}"


def check_progress(progress: dict[str, Any]) -> None:
    """Raise ValueError for values that JSON would change."""
    if json.loads(json.dumps(progress)) != progress:
        raise ValueError("progress: expected plain JSON values (lists, not tuples; text keys), which come back equal")


def write_content(folder: Path, path: Path, content: dict[str, Any]) -> None:
    """Write ``state.json`` into ``folder``, which becomes ``path``: the last file, which completes the checkpoint."""
    content = {"format": FORMAT, "versions": _versions(), **content}
    content["crc32"] = _content_crc32(content)
    with naming_file(path / STATE_FILE):
        (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_checkpoint(
    path: Path | str, *, model: nn.Module, map_location: Any = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the model's tensors and the random generators bit for bit; return (engine_state, progress) as saved.

    Everything is checked before anything is changed. A missing, short or altered file raises ValueError naming it and
    the older complete checkpoint, as do weights whose names, shapes or dtypes are not the model's.
    """
    path = Path(path)
    content = check_or_offer_older(path)
    engine_state = torch.load(path / ENGINE_FILE, map_location=map_location, weights_only=True)
    generators = torch.load(path / RNG_FILE, map_location="cpu", weights_only=True)
    read_tensors(path / MODEL_FILE, named_tensors(model))
    restore_rng(generators)
    return engine_state, content["progress"]


def check_checkpoint(path: Path | str, ranks: Ranks | None = None) -> dict[str, Any]:
    """The content of ``state.json`` after comparing size and checksum of every file; ValueError names a bad one.

    Several ranks share the files and all raise what one of them finds.
    """
    path = Path(path)
    state_file = path / STATE_FILE
    if not state_file.is_file():
        raise ValueError(f"{state_file}: missing; the checkpoint is half-written")
    try:
        content = json.loads(state_file.read_text())
        complete = content.pop("crc32") == _content_crc32(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{state_file}: corrupt")
    if content["format"] != FORMAT:
        raise ValueError(f"{state_file}: format {content['format']}; this version reads format {FORMAT}")
    ranks = ranks or Ranks()
    problems = [problem for name in ranks.share(list(content["files"])) if (problem := _problem(path, name, content))]
    for problem in itertools.chain(*ranks.gather(problems)):
        raise ValueError(problem)
    return content


def _problem(path: Path, name: str, content: dict[str, Any]) -> str | None:
    """What is wrong with a file of the checkpoint."""
    file, expected = path / name, content["files"][name]
    if not file.is_file():
        return f"{file}: missing; the checkpoint is corrupt"
    if file.stat().st_size != expected["bytes"]:
        return f"{file}: corrupt ({file.stat().st_size} bytes instead of {expected['bytes']})"
    if file_crc32(file) != expected["crc32"]:
        return f"{file}: corrupt (its checksum is not the saved one)"
    return None


def check_or_offer_older(path: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """``check_checkpoint``; its ValueError also says which older checkpoint is complete."""
    try:
        return check_checkpoint(path, ranks)
    except ValueError as error:
        epoch = checkpoint_epoch(path)
        older = [p for p in list_checkpoints(path.parent.parent) if checkpoint_epoch(p) < epoch]
        for candidate in reversed(older):
            try:
                check_checkpoint(candidate)
            except ValueError:
                continue
            advice = f"the older checkpoint {candidate} is complete: to resume from it, move {path} away"
            break
        else:
            advice = "there is no older complete checkpoint; start the run anew in another run_dir"
        raise ValueError(f"{error}; {advice}") from error


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "transformers")}
    return {"inverseq": __version__, "python": platform.python_version(), "torch": torch.__version__, **packages}


def _content_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def remove_half_written(folder: Path) -> None:
    """Remove what a killed process left: hidden folders, and checkpoint folders without ``state.json``."""
    for litter in (*folder.glob(".epoch_*.tmp"), *folder.glob(".epoch_*.old")):
        remove_directory(litter)
    for checkpoint in folder.glob("epoch_*"):
        if not (checkpoint / STATE_FILE).is_file():
            remove_directory(checkpoint)


def remove_old(run_dir: Path | str, epoch: int, keep_last: int) -> None:
    """Keep the newest ``keep_last`` checkpoints up to ``epoch``."""
    existing = list_checkpoints(run_dir)
    kept = [path for path in existing if checkpoint_epoch(path) <= epoch][-keep_last:]
    for path in existing:
        if path not in kept:
            remove_directory(path)
