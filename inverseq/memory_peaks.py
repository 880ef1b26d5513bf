"""Measured peaks of memory, phase by phase, to stand beside the estimate of ``inverseq.memory``.

On CUDA a peak is what torch's allocator had handed out at most (its cache and the CUDA context are not in it), on Linux
without a GPU the largest resident set of this process less what it held before the models were loaded. Elsewhere
nothing is measured.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

logger = logging.getLogger(__name__)

GIB = 2**30
PROCESS = Path("/proc/self")


class PeakMemory:
    """Peaks of the phases of an epoch on one device. Make it before the models are loaded."""

    def __init__(self, device: torch.device, estimated_bytes: Mapping[str, int]):
        self.device = device
        self.estimated_bytes = dict(estimated_bytes)
        self.peaks: dict[str, int] = {}
        self.baseline = 0 if device.type == "cuda" else self._read("VmRSS")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the peak of what runs inside; a phase met again keeps its largest."""
        measured = self._reset()
        yield
        if measured:
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak())

    def row(self) -> dict[str, int]:
        """``peak_memory_<phase>_bytes`` of each phase measured since the last row, for the epoch's metrics; logged."""
        if self.peaks:
            logger.info("%s", self.describe())
        row = {f"peak_memory_{name}_bytes": peak for name, peak in self.peaks.items()}
        self.peaks = {}
        return row

    def describe(self) -> str:
        """``peak memory: train 3.31 GiB (estimated 4.19), …``."""
        words = []
        for name, peak in self.peaks.items():
            estimate = self.estimated_bytes.get(name)
            beside = "" if estimate is None else f" (estimated {estimate / GIB:.2f})"
            words.append(f"{name} {peak / GIB:.2f} GiB{beside}")
        return "peak memory: " + ", ".join(words)

    def _reset(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            (PROCESS / "clear_refs").write_text("5")  # the peak of the resident set starts again
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, self._read("VmHWM") - self.baseline)

    def _read(self, key: str) -> int:
        try:
            status = (PROCESS / "status").read_text()
        except OSError:
            return 0
        found = re.search(rf"^{key}:\s+(\d+) kB", status, flags=re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
