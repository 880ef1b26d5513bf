"""Checkpoints: everything a run needs to go on bit for bit after an epoch.

    RUN/checkpoints/epoch_0001/model.safetensors   weights and buffers; tied ones once
                               engine.pt           optimizer, scheduler, master weights  } loaded with
                               rng.pt              torch (CPU, CUDA), Python, NumPy      } weights_only=True
                               state.json          epoch, progress, versions, size and crc32 of every file

A checkpoint is written into a hidden folder, synced and renamed, so that ``epoch_NNNN`` is complete or absent; older
ones go only after the new one stands. Sharded (multi-process) states are not written here.
"""

from __future__ import annotations

import json
import logging
import platform
import random
import re
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import __version__
from .atomic import atomic_directory, naming_file, remove_directory

__all__ = [
    "check_checkpoint",
    "check_or_offer_older",
    "checkpoint_epoch",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
]

log = logging.getLogger(__name__)

FORMAT = 1
MODEL_FILE, ENGINE_FILE, RNG_FILE, STATE_FILE = "model.safetensors", "engine.pt", "rng.pt", "state.json"
CHECKSUM_BLOCK_BYTES = 2**24


def checkpoint_epoch(path: Path | str) -> int:
    """The epoch a checkpoint folder is named after."""
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
) -> Path:
    """Write ``RUN/checkpoints/epoch_NNNN`` and return it; the newest ``keep_last`` stay.

    ``engine_state`` holds tensors and plain Python values; ``progress`` (prompt cursor, optimizer step) plain JSON
    values. Checkpoints of later epochs, from which the run was taken back, are removed too.
    Raises OSError naming the file when it cannot be written; the older checkpoints then stand as they were.
    """
    if json.loads(json.dumps(progress)) != progress:
        raise ValueError("progress: expected plain JSON values (lists, not tuples; text keys), which come back equal")
    path = Path(run_dir) / "checkpoints" / f"epoch_{epoch:04d}"
    _remove_half_written(path.parent)
    with atomic_directory(path) as folder:
        _write_tensors(folder, path, _named_tensors(model))
        _write_state(folder, path, ENGINE_FILE, engine_state)
        _write_state(folder, path, RNG_FILE, _rng_state())
        content = {
            "format": FORMAT,
            "epoch": epoch,
            "progress": progress,
            "versions": _versions(),
            "files": {name: _description(folder / name) for name in (MODEL_FILE, ENGINE_FILE, RNG_FILE)},
        }
        content["crc32"] = _content_crc32(content)
        with naming_file(path / STATE_FILE):
            (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    _remove_old(run_dir, epoch, keep_last)
    return path


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
    rng_state = torch.load(path / RNG_FILE, map_location="cpu", weights_only=True)
    _read_tensors(path / MODEL_FILE, _named_tensors(model))
    _restore_rng(rng_state)
    return engine_state, content["progress"]


def check_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of ``state.json`` after comparing size and checksum of every file; ValueError names a bad one."""
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
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; the checkpoint is corrupt")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file}: corrupt ({file.stat().st_size} bytes instead of {expected['bytes']})")
        if _crc32(file) != expected["crc32"]:
            raise ValueError(f"{file}: corrupt (its checksum is not the saved one)")
    return content


def check_or_offer_older(path: Path) -> dict[str, Any]:
    """``check_checkpoint``; its error also says which older checkpoint is complete."""
    try:
        return check_checkpoint(path)
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


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers by name, a tied one under its first name only."""
    seen, tensors = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _write_tensors(folder: Path, path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL_FILE)
    except SafetensorError as error:
        raise OSError(f"could not write: {error}: '{path / MODEL_FILE}'") from error


def _read_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the model's after checking that names, shapes and dtypes are the same."""
    with safe_open(file, framework="pt", device="cpu") as saved:
        names = set(saved.keys())
        if names != set(tensors):
            differing = ", ".join(sorted(names ^ set(tensors))[:4])
            raise ValueError(f"{file}: holds other weights than the model, for example {differing}")
        for name, tensor in tensors.items():
            description = saved.get_slice(name)
            found = tuple(description.get_shape()), SAFETENSORS_DTYPES.get(description.get_dtype())
            expected = tuple(tensor.shape), tensor.dtype
            if found != expected:
                raise ValueError(f"{file}: {name} has shape and dtype {found}, the model's {expected}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved.get_tensor(name))


class _ErrorKeeper:
    """A file that remembers why a write failed: ``torch.save`` reports such an error as an unrelated RuntimeError."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_state(folder: Path, path: Path, name: str, state: dict[str, Any]) -> None:
    with naming_file(path / name), open(folder / name, "wb") as file:
        keeper = _ErrorKeeper(file)
        try:
            torch.save(state, keeper)
        except RuntimeError as error:
            raise (keeper.error or error) from error


def _rng_state() -> dict[str, Any]:
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    algorithm, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) == num_devices:
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning("saved with %d CUDA generators, %d here: they are not restored", len(state["cuda"]), num_devices)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "transformers")}
    return {"inverseq": __version__, "python": platform.python_version(), "torch": torch.__version__, **packages}


def _description(file: Path) -> dict[str, int]:
    return {"bytes": file.stat().st_size, "crc32": _crc32(file)}


def _crc32(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as content:
        while block := content.read(CHECKSUM_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _content_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _remove_half_written(folder: Path) -> None:
    """Remove what a killed process left: hidden folders, and checkpoint folders without ``state.json``."""
    for litter in (*folder.glob(".epoch_*.tmp"), *folder.glob(".epoch_*.old")):
        remove_directory(litter)
    for checkpoint in folder.glob("epoch_*"):
        if not (checkpoint / STATE_FILE).is_file():
            remove_directory(checkpoint)


def _remove_old(run_dir: Path | str, epoch: int, keep_last: int) -> None:
    """Keep the newest ``keep_last`` checkpoints up to ``epoch``."""
    existing = list_checkpoints(run_dir)
    kept = [path for path in existing if checkpoint_epoch(path) <= epoch][-keep_last:]
    for path in existing:
        if path not in kept:
            remove_directory(path)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
