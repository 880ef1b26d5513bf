"""Checkpoints that all ranks write together, and reading either layout by the names of weights.

    RUN/checkpoints/epoch_0001/state_0000_000.safetensors   fp32 master, exp_avg and exp_avg_sq of some weights, whole
                               rng_0000.pt                  random generators of rank 0; one file a rank
                               state.json                   as in ``checkpoint``, with ``"layout": "sharded"``

A weight is gathered, given to one rank in turn and written there, so that the ranks write side by side and none holds
more than a part. What is written knows neither the number of ranks nor the ZeRO stage: any number of ranks, any stage
and the engine of one process read it without a conversion, as the sharded engine reads a checkpoint of one process.
All ranks must see the run directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .atomic import atomic_directory, naming_file, temporary_name
from .checkpoint import (
    ENGINE_FILE,
    MODEL_FILE,
    RNG_FILE,
    check_or_offer_older,
    check_progress,
    checkpoint_path,
    remove_half_written,
    remove_old,
    write_content,
)
from .checkpoint_files import describe_file, restore_rng, rng_state, write_state, write_tensors
from .distributed import Ranks

__all__ = ["SavedState", "is_sharded", "load_named_checkpoint", "save_sharded_checkpoint"]

log = logging.getLogger(__name__)

LAYOUT = "sharded"
PART_BYTES = 2**31  # largest part of the state that a rank holds before it is written
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's state by the names of weights: ``read(name)`` gives {master, exp_avg, exp_avg_sq}, fp32."""

    read: Callable[[str], dict[str, Tensor]]
    num_updates: int
    progress: dict[str, Any]


def save_sharded_checkpoint(
    run_dir: Path | str,
    epoch: int,
    *,
    named_state: Iterable[tuple[str, dict[str, Tensor]]],
    num_updates: int,
    progress: dict[str, Any],
    keep_last: int,
    ranks: Ranks,
    before_rename: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``RUN/checkpoints/epoch_NNNN`` by all ranks and return it; the newest ``keep_last`` stay.

    ``named_state`` gives all ranks (name, state of the whole weight) in one order. As ``save_checkpoint``: complete or
    absent whenever any rank is killed, and OSError names a file that cannot be written. Rank 0 calls ``before_rename``.
    """
    check_progress(progress)
    path = checkpoint_path(run_dir, epoch)
    if ranks.is_main:
        remove_half_written(path.parent)
    with _shared_folder(path, ranks, before_rename) as folder:
        names = list(_write_parts(folder, path, named_state, ranks))
        write_state(folder, path, f"rng_{ranks.rank:04d}.pt", rng_state())
        names.append(f"rng_{ranks.rank:04d}.pt")
        for name in names:
            _sync(folder, path, name)
        files: dict[str, Any] = {}
        for part in ranks.gather({name: describe_file(folder / name) for name in names}):
            files |= part
        if ranks.is_main:
            content = {"epoch": epoch, "progress": progress, "files": files, "layout": LAYOUT}
            write_content(folder, path, content | {"num_updates": num_updates, "world_size": ranks.world_size})
    ranks.barrier()
    if ranks.is_main:
        remove_old(run_dir, epoch, keep_last)
    return path


@contextmanager
def _shared_folder(path: Path, ranks: Ranks, before_rename: Callable[[], None]) -> Iterator[Path]:
    """The hidden folder that all ranks fill; rank 0 makes it and renames it at the end."""
    if ranks.is_main:
        with atomic_directory(path, before_rename=before_rename) as folder:
            ranks.barrier()
            yield folder
    else:
        ranks.barrier()
        yield temporary_name(path)


def _write_parts(folder: Path, path: Path, named_state, ranks: Ranks) -> Iterator[str]:
    """Write this rank's weights, every ``world_size``-th one, in files of about ``PART_BYTES``; yields their names."""
    part: dict[str, Tensor] = {}
    num_parts = 0
    for index, (name, state) in enumerate(named_state):
        if index % ranks.world_size == ranks.rank:
            part |= {f"{kind}/{name}": state[kind].detach().cpu() for kind in KINDS}
        if sum(tensor.nbytes for tensor in part.values()) >= PART_BYTES:
            yield _write_part(folder, path, part, ranks.rank, num_parts)
            part, num_parts = {}, num_parts + 1
    if part:
        yield _write_part(folder, path, part, ranks.rank, num_parts)


def _write_part(folder: Path, path: Path, part: dict[str, Tensor], rank: int, number: int) -> str:
    name = f"state_{rank:04d}_{number:03d}.safetensors"
    write_tensors(folder, path, name, part)
    return name


def _sync(folder: Path, path: Path, name: str) -> None:
    """Let this machine's part of a shared file system reach the disk."""
    with naming_file(path / name), open(folder / name, "rb") as file:
        os.fsync(file.fileno())


def load_named_checkpoint(path: Path | str, *, names: Sequence[str], ranks: Ranks) -> SavedState:
    """A checkpoint's state by name, for the trained weights ``names`` in the model's order; restores the generators.

    Reads both layouts. Everything is checked first; ValueError names a missing, short or altered file and the older
    complete checkpoint, and says so when the checkpoint is of other weights.
    """
    path = Path(path)
    content = check_or_offer_older(path, ranks)
    if content.get("layout") != LAYOUT:
        read, num_updates = _read_whole(path, names)
        own = RNG_FILE
    else:
        read, num_updates = _read_parts(path, content["files"], names), content["num_updates"]
        own = f"rng_{ranks.rank:04d}.pt" if content["world_size"] == ranks.world_size else "rng_0000.pt"
        if content["world_size"] != ranks.world_size and ranks.is_main:
            log.info("%s: written by %d ranks, read by %d", path, content["world_size"], ranks.world_size)
    restore_rng(torch.load(path / own, map_location="cpu", weights_only=True))
    return SavedState(read, num_updates, content["progress"])


def is_sharded(path: Path) -> bool:
    """Whether all ranks wrote the checkpoint together."""
    return not (Path(path) / MODEL_FILE).is_file()


def _read_parts(path: Path, files: Iterable[str], names: Sequence[str]) -> Callable[[str], dict[str, Tensor]]:
    """The reader of a sharded checkpoint: tensors come from mapped files when they are asked for."""
    parts = [safe_open(path / name, framework="pt", device="cpu") for name in files if name.endswith(".safetensors")]
    holder = {key: part for part in parts for key in part.keys()}  # noqa: SIM118
    _check_names(path, {key.removeprefix("master/") for key in holder if key.startswith("master/")}, names)
    return lambda name: {kind: holder[f"{kind}/{name}"].get_tensor(f"{kind}/{name}") for kind in KINDS}


def _read_whole(path: Path, names: Sequence[str]) -> tuple[Callable[[str], dict[str, Tensor]], int]:
    """The reader of a checkpoint of one process, and its number of updates."""
    engine = torch.load(path / ENGINE_FILE, map_location="cpu", weights_only=True, mmap=True)
    weights = safe_open(path / MODEL_FILE, framework="pt", device="cpu")
    moments = engine["optimizer"]["state"]
    if len(moments) != len(names):
        raise ValueError(f"{path}: holds the state of {len(moments)} weights, the model trains {len(names)}")
    _check_names(path, set(weights.keys()) & set(names), names)
    sixteen_bit = [name for name in names if weights.get_slice(name).get_dtype() != "F32"]
    masters = dict(zip(sixteen_bit, engine["masters"], strict=True))

    def read(name: str) -> dict[str, Tensor]:
        master = masters[name] if name in masters else weights.get_tensor(name)
        state = moments[names.index(name)]
        return {"master": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    return read, engine["num_updates"]


def _check_names(path: Path, found: set[str], names: Sequence[str]) -> None:
    if found != set(names):
        differing = ", ".join(sorted(found ^ set(names))[:4])
        raise ValueError(f"{path}: holds other weights than the model, for example {differing}")
