"""The files of a checkpoint: tensors as safetensors, other state as ``torch.save`` loads it with ``weights_only``.

Every error names the file that stands in the checkpoint's final folder, also while it is written elsewhere.
"""

from __future__ import annotations

import logging
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import naming_file

__all__ = [
    "describe_file",
    "file_crc32",
    "named_tensors",
    "read_tensors",
    "restore_rng",
    "rng_state",
    "write_state",
    "write_tensors",
]

log = logging.getLogger(__name__)

CHECKSUM_BLOCK_BYTES = 2**24


def named_tensors(model: nn.Module, *, whole: bool = False) -> dict[str, Tensor]:
    """The model's weights and buffers by name, a tied one under its first name only.

    Of a model that trains some of its weights (adapters) those alone, unless ``whole``: the others are where it was
    loaded from.
    """
    seen, tensors = set(), {}
    is_partial = not whole and not all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and (tensor.requires_grad or not is_partial):
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def write_tensors(folder: Path, path: Path, file_name: str, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file into ``folder``, which becomes ``path``; OSError naming it there."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file_name)
    except SafetensorError as error:
        raise OSError(f"could not write: {error}: '{path / file_name}'") from error


def read_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the model's; ValueError before that unless names, shapes and dtypes are equal."""
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


def write_state(folder: Path, path: Path, name: str, state: dict[str, Any]) -> None:
    """Write tensors and plain Python values into ``folder``, which becomes ``path``."""
    with naming_file(path / name), open(folder / name, "wb") as file:
        keeper = _ErrorKeeper(file)
        try:
            torch.save(state, keeper)
        except RuntimeError as error:
            raise (keeper.error or error) from error


def rng_state() -> dict[str, Any]:
    """The random generators of this process."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put the generators back; those of GPUs only where there are as many as when they were saved."""
    algorithm, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) == num_devices:
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning("saved with %d CUDA generators, %d here: they are not restored", len(state["cuda"]), num_devices)


def describe_file(file: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    return {"bytes": file.stat().st_size, "crc32": file_crc32(file)}


def file_crc32(file: Path) -> int:
    """The checksum of a file's content."""
    checksum = 0
    with open(file, "rb") as content:
        while block := content.read(CHECKSUM_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


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
