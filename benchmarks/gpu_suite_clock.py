"""Time and memory of the device at hand, as the benchmarks read them; its clock rate and power, as nvidia-smi does."""

import contextlib
import gc
import pathlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch

LEAD_CYCLES = 2_000_000  # of the device's clock: about a millisecond


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

    def lead(self) -> None:
        """Occupy an idle device for a moment, in which the host launches what is timed next.

        Without it the time from mark to mark holds the host's launches too, which training hides behind other work:
        several per cent of ten milliseconds, and more where an operation makes many launches.
        """
        if self.on_gpu:
            torch.cuda._sleep(LEAD_CYCLES)

    def time_ms(self, work: Callable[[], object]) -> float:
        """Milliseconds of the device in one call; the device is idle before and after."""
        self.lead()
        start = self.mark()
        work()
        end = self.mark()
        self.synchronize()
        return self.between_ms(start, end)

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


SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")


@contextlib.contextmanager
def sampled_clocks(path: pathlib.Path) -> Iterator[None]:
    """nvidia-smi writes ``SAMPLED`` to a file twice a second meanwhile, where there is one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield
        return
    options = [f"--query-gpu={','.join(SAMPLED)}", "--format=csv,noheader,nounits", "-lms", "500"]
    with path.open("w") as file, subprocess.Popen([tool, *options], stdout=file, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def clock_facts(path: pathlib.Path) -> dict[str, float]:
    """Medians of a file of ``sampled_clocks`` while the device was busy, and the clock rate's 20th percentile."""
    samples = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # "[N/A]", and a line that was being written
            rate, power, temperature, load = map(float, line.split(","))
            if load >= 50:
                samples.append((rate, power, temperature))
    if len(samples) < 2:
        return {}
    rate, power, temperature = map(statistics.median, zip(*samples, strict=True))
    slow = statistics.quantiles([sample[0] for sample in samples], n=5)[0]
    return {"sm_mhz": rate, "sm_mhz_p20": slow, "power_w": power, "temperature_c": temperature}
