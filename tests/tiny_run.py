"""A finished run of a tiny model: the input of everything that reads a run directory."""

from __future__ import annotations

from pathlib import Path

from inverseq.config_loading import load_config
from inverseq.trainer import train

from .tiny import make_tiny_model

__all__ = ["make_tiny_run", "tiny_run_options"]

TINY_RUN = (
    "model.device=cpu",
    "prompts.held_out=4",
    "sampling.samples_per_epoch=6",
    "sampling.max_new_tokens=10",
    "sampling.batch_size=8",
    "packing.train_tokens=1024",
    "packing.score_tokens=4096",
    "optim.lr=3e-3",
    "optim.samples_per_step=4",
    "evaluation.every=1",
    "logging.tensorboard=false",
    "epochs=2",
)


def make_tiny_run(folder: Path, *overrides: str) -> Path:
    """Train a tiny model in ``folder/run`` (about two seconds) and return that run directory."""
    model = make_tiny_model(folder / "model", scale=0.2)
    words = tiny_run_options(f"model.path={model}", f"run_dir={folder / 'run'}", *overrides)
    return train(load_config("demo", words))


def tiny_run_options(*overrides: str) -> list[str]:
    """The options of a tiny run with some of them changed."""
    return list(dict((word.partition("=")[0], word) for word in (*TINY_RUN, *overrides)).values())
