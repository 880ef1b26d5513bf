"""Between host and device without making the host wait: what the next forward reads, and what the last one found.

On CUDA the host launches work and runs ahead of it. A copy from pageable memory, or one queued behind the running
kernels, would stop it; so tensors go through pinned memory on a stream of their own while the work before them runs,
and results are waited for only when the next work has been launched. Elsewhere both are plain copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Movable", "copied_ahead", "copied_to", "keep_together", "read_behind"]

BLOCK_BYTES, ALIGNMENT = 2**30, 64


class Movable(Protocol):
    """A record with tensors that a forward reads on the device."""

    def to(self, device: torch.device | str) -> Movable:
        """The same record with those tensors on ``device``."""
        ...

    def device_tensors(self) -> list[Tensor]:
        """Those tensors."""
        ...


def copied_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``; the host does not wait for a copy to CUDA, which is made from pinned memory."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def keep_together(weights: Iterable[nn.Parameter], *, pin_memory: bool) -> None:
    """Move weights in host memory into blocks of 1 GiB, so that they can be pinned at the size they have.

    torch takes a power of two of bytes for each pinned allocation: one for each weight of a 13B Llama would take 41 GiB
    for 24.
    """
    block, used = torch.empty(0, dtype=torch.uint8), 0
    for weight in weights:
        size = -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        if used + size > block.numel():
            block, used = torch.empty(max(BLOCK_BYTES, size), dtype=torch.uint8, pin_memory=pin_memory), 0
        place = block[used : used + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = place.copy_(weight.data)
        used += size


def copied_ahead(records: Iterable[Movable], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Each record beside its copy on the device.

    The caller launches its work on a copy and asks for the next one: that is made and copied while the work runs.
    """
    if device.type != "cuda":
        yield from ((record, record.to(device)) for record in records)
        return
    copies, computes = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for record in records:
        with torch.cuda.stream(copies):
            moved = record.to(device)
        computes.wait_stream(copies)
        for tensor in moved.device_tensors():
            tensor.record_stream(computes)  # or its memory could be reused before the work has read it
        yield record, moved


def read_behind(
    results: Iterable[tuple[Any, Sequence[Tensor]]], device: torch.device
) -> Iterator[tuple[Any, list[Tensor]]]:
    """Each (anything, tensors) with its tensors on the host; on CUDA one is waited for when the next is launched."""
    launched = deque()
    for key, tensors in results:
        hosts = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        launched.append((key, hosts, copied))
        if copied is None or len(launched) > 1:
            yield _arrived(*launched.popleft())
    yield from (_arrived(*entry) for entry in launched)


def _arrived(key: Any, hosts: list[Tensor], copied: torch.cuda.Event | None) -> tuple[Any, list[Tensor]]:
    if copied is not None:
        copied.synchronize()
    return key, hosts
