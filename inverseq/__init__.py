"""Inverse-Q*: token-level preference alignment without preference pairs, reward model or value model."""

__version__ = "0.1.0"
