"""Time and memory of the device at hand, as gpu_suite.py and tune_blocks.py read them."""

import gc
import time

import torch


class Clock:
    """Time since start, device events, and peak memory; host clock and no memory on a CPU."""

    def __init__(self, budget_s: float):
        self.start, self.budget_s = time.monotonic(), budget_s
        self.on_gpu = torch.cuda.is_available()

    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.start)

    def mark(self) -> object:
        """A moment, ordered with the work before it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, first: object, second: object) -> float:
        """Milliseconds between two moments; the second has happened."""
        return first.elapsed_time(second) if self.on_gpu else 1e3 * (second - first)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def reset_memory(self) -> int:
        """Empty the cache, forget the peak, return what is allocated now."""
        gc.collect()
        if not self.on_gpu:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated() - before if self.on_gpu else None

    def is_usable(self) -> bool:
        """Whether the device still works: after an illegal access every later call of the process fails."""
        try:
            self.synchronize()
        except Exception:  # torch has several errors for a lost device
            return False
        return True
