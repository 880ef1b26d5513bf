"""Trains one configuration after the other in the processes of one torchrun: starting them is what costs.

``python -m tests.ranks_worker JOBS`` with JOBS a JSON list of {"name", "overrides", "resume"}; rank 0 writes
NAME.ok or, where a rank raised, every such rank NAME.error.RANK beside JOBS. Raises at the end when one did.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from inverseq import trainer
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks, init_ranks

ACTIONS = {}  # by name: what a job does around its training, in the processes of the ranks


def action(function):
    ACTIONS[function.__name__] = function
    return function


def run_job(job: dict, ranks: Ranks) -> None:
    config = load_config("demo", job["overrides"])
    around = ACTIONS.get(job.get("action"), lambda train: train())
    around(lambda: trainer.train_ranks(config, ranks, resume=job["resume"]))


def main(path: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    jobs = json.loads(path.read_text())
    ranks = init_ranks(load_config("demo", jobs[0]["overrides"]))
    failed = []
    with ranks.failing_together():
        for job in jobs:
            try:
                run_job(job, ranks)
            except Exception:
                (path.parent / f"{job['name']}.error.{ranks.rank}").write_text(traceback.format_exc())
                failed.append(job["name"])
                if not job.get("raises"):
                    raise
            if ranks.is_main and job["name"] not in failed:
                (path.parent / f"{job['name']}.ok").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
