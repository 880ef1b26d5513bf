"""Evaluation of trained models: responses, a judge's verdicts, ratings, rewards, token credit and one report.

Each module says in its first lines what it computes. ``cli.py`` is the command line over all of them.
"""

__all__ = []
