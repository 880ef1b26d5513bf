"""Inverse-Q*: token-level preference alignment without preference pairs, reward model or value model."""

__version__ = "0.1.0"

from .config import Config
from .config_loading import load_config

__all__ = ["Config", "__version__", "load_config", "train"]


def __getattr__(name: str):
    """``train`` is imported when first used, since it brings torch and transformers."""
    if name == "train":
        from .trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
