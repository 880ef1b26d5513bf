"""``sampling.ahead``: an engine in another process answers the next epoch's prompts while this epoch trains.

Its weights are then one epoch old when its samples are trained on, which the metric ``weights_lag_steps`` says. A
resumed run draws them with the weights of its checkpoint instead, so it is not the run that was interrupted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from .records import RenderedPrompt, Sample
from .sampling import Sampler, sample_responses

__all__ = ["SamplesAhead"]


class SamplesAhead:
    """Prompts that are being answered in a thread; nothing may sync or use the sampler until it has ended.

    Closing the sampler ends the thread early.
    """

    def __init__(self, sampler: Sampler, prompts: Sequence[RenderedPrompt], *, seed: int):
        self.samples: list[Sample] = []
        self.duration_s = 0.0  # what the sampler took
        self.error: BaseException | None = None
        arguments: tuple[Any, ...] = (sampler, prompts, seed)
        self.thread = threading.Thread(target=self.run, args=arguments, name="inverseq-samples-ahead", daemon=True)
        self.thread.start()

    def run(self, sampler: Sampler, prompts: Sequence[RenderedPrompt], seed: int) -> None:
        started = time.perf_counter()
        try:
            self.samples = sample_responses(sampler, prompts, seed=seed)
            self.duration_s = time.perf_counter() - started
        except BaseException as error:  # raised where the samples are asked for
            self.error = error

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the sampler is free again, or after the timeout."""
        self.thread.join(timeout_s)

    def collect(self) -> list[Sample]:
        """The samples in the order of the prompts; raises what the sampler raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self.samples
